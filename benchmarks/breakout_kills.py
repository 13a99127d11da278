"""Kills a2c_breakout.py 100 times, resumes it, and compares it with a run left in peace.

    python benchmarks/breakout_kills.py                              # 100 kills, some 20 minutes
    python benchmarks/breakout_kills.py --kills 5 --results trial

Linux only (it finds processes in /proc). First comes a small run that nobody disturbs: the
reference. Then the same run is started in another folder with --resume, killed, resumed, killed
..., until it gets to its end; then it starts anew in a fresh folder, until all the kills are used
up. The moments:

    start-up    anywhere between the start of Python and the first step
    training    up to 3 seconds after the first step
    checkpoint  as soon as its temporary file appears, and up to 30 ms later
    end         as soon as weight_end.pth or its temporary file appears, and up to 300 ms later

and what is sent: SIGKILL, SIGTERM or SIGINT to the program, or SIGKILL to one of its worker
processes (to the program itself as long as it has none). After each kill, the program and all its
processes must be gone within a minute, the checkpoint must load, and no traceback may have been
printed (but for that of Python itself, if Ctrl-C meets it while it is still importing: these are
counted apart). After each run that got to its end, the weights must have the reference's hash,
and every curve (but charts/SPS, that of the clock) its points: the same steps with the same
values, none missing and none twice.

One row a kill in benchmarks/results/breakout_kills.csv: update_reached is the last update that
was logged, update_saved the one that the checkpoint holds (where the next start goes on),
exit_code is negative where a signal ended the process, seconds are from the start to the kill,
and from there to the end of the last process. The exit code of the benchmark is 1 if anything was
not as it must be.
"""

import argparse
import csv
import hashlib
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
NUM_ENVS, NUM_STEPS, UPDATES = 4, 5, 300
FLAGS = [
    *(
        "--num-envs",
        NUM_ENVS,
        "--num-steps",
        NUM_STEPS,
        "--total-timesteps",
        UPDATES * NUM_ENVS * NUM_STEPS,
    ),
    *("--checkpoint-every", 10, "--log-every", 1, "--device", "cpu"),
]
MOMENTS = {  # name: (how often, the file that announces it, at most so long before the kill)
    "start-up": (20, None, None),  # as long as the reference took to its first step
    "training": (45, "events.*", 3.0),
    "checkpoint": (25, "checkpoint.pth.*tmp", 0.03),
    "end": (10, "weight_end.pth*", 0.3),
}
SIGNALS = {"SIGKILL": 40, "SIGTERM": 20, "SIGINT": 20, "worker SIGKILL": 20}  # name: how often
PATIENCE = 60  # seconds
COLUMNS = "kill run moment signal seconds update_reached update_saved exit_code".split()
COLUMNS += ["seconds_to_end", "left_behind", "traceback"]


# ---- processes ---------------------------------------------------------------------------------


def start(run_dir: Path) -> subprocess.Popen:
    """Starts or resumes the run, in a session of its own: so all its processes can be found."""
    command = [sys.executable, ROOT / "a2c_breakout.py", "--resume", run_dir, *FLAGS]
    command = [str(word) for word in command]
    env = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
    }  # the log is to show all that came before a SIGKILL
    with open(run_dir.with_suffix(".log"), "w") as log:
        return subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)


def processes(session: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue  # it has just ended
        if int(its_session) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found


def wait_until_gone(process: subprocess.Popen) -> int:
    """Waits for all processes of the run. Returns how many had to be killed because they stayed."""
    deadline = time.monotonic() + PATIENCE
    while (left := processes(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.01)
        process.poll()  # else it stays a zombie
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    return len(left)


def wait_for(
    announcement: str | None, delay: float, process: subprocess.Popen, run_dir: Path
) -> bool:
    """Waits for the moment to kill. Returns False if the process ends before it has come."""
    started = time.time()
    while announcement and not any(
        changed_since(started, file) for file in run_dir.glob(announcement)
    ):
        if process.poll() is not None:
            return False
        time.sleep(0.001)
    time.sleep(delay)
    return process.poll() is None


def changed_since(moment: float, file: Path) -> bool:
    try:
        return file.stat().st_mtime > moment
    except FileNotFoundError:
        return False


def kill(signal_name: str, process: subprocess.Popen, rng: random.Random) -> str:
    """Sends the signal. Returns its name, which is another if there is no worker to kill."""
    workers = [pid for pid in processes(process.pid) if pid != process.pid]
    if signal_name == "worker SIGKILL" and workers:
        os.kill(rng.choice(workers), signal.SIGKILL)
        return signal_name
    signal_name = signal_name.removeprefix("worker ")
    process.send_signal(getattr(signal, signal_name))
    return signal_name


# ---- what a run leaves behind ------------------------------------------------------------------


def weights_hash(run_dir: Path) -> str:
    weights = torch.load(run_dir / "weight_end.pth", weights_only=True)
    return hashlib.sha256(
        b"".join(tensor.numpy().tobytes() for tensor in weights.values())
    ).hexdigest()


def read_curves(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Every point of every curve that does not depend on the clock."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag != "charts/SPS"]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def saved_update(run_dir: Path) -> int | str:
    """The update that the checkpoint holds, 0 if there is none, "damaged" if it cannot be read."""
    try:
        return torch.load(run_dir / "checkpoint.pth", weights_only=True)["progress"]["update"]
    except FileNotFoundError:
        return 0
    except Exception:  # whatever it is that torch.load cannot stomach
        return "damaged"


def find_traceback(log: str) -> str:
    """Whether a traceback was printed "while importing" or "while running", "" if there is none."""
    if "Traceback" not in log:
        return ""
    return (
        "while importing"
        if "KeyboardInterrupt" in log and ", in train" not in log
        else "while running"
    )


def reached_update(log: str) -> int | str:
    """The last update that was logged, "" if there was none."""
    logged = re.findall(r"timesteps (\d+)", log)
    return int(logged[-1]) // (NUM_ENVS * NUM_STEPS) if logged else ""


# ---- the benchmark -----------------------------------------------------------------------------


def run_to_the_end(run_dir: Path) -> float:
    """Starts or resumes the run and lets it finish. Returns the seconds to the first step."""
    started = time.monotonic()
    process = start(run_dir)
    try:
        wait_for("events.*", 0, process, run_dir)
        startup = time.monotonic() - started
        process.wait()
    finally:  # also when the benchmark itself is interrupted
        process.kill()
        wait_until_gone(process)
    check_exit(process, run_dir)
    return startup


def kill_once(run_dir: Path, startup: float, rng: random.Random) -> dict | None:
    """Starts or resumes the run and kills it. Returns what happened, None if it ended unkilled."""
    (moment,) = rng.choices([*MOMENTS], [often for often, _, _ in MOMENTS.values()])
    (signal_name,) = rng.choices([*SIGNALS], [*SIGNALS.values()])
    _, announcement, longest = MOMENTS[moment]
    started = time.monotonic()
    process = start(run_dir)
    try:
        if not wait_for(announcement, rng.uniform(0, longest or startup), process, run_dir):
            check_exit(process, run_dir)
            return None
        signal_name = kill(signal_name, process, rng)
        killed = time.monotonic()
        left_behind = wait_until_gone(process)
        gone = time.monotonic()
    finally:
        process.kill()
        wait_until_gone(process)
    log = run_dir.with_suffix(".log").read_text()
    return {
        "moment": moment,
        "signal": signal_name,
        "seconds": f"{killed - started:.2f}",
        "update_reached": reached_update(log),
        "update_saved": saved_update(run_dir),
        "exit_code": process.returncode,
        "seconds_to_end": f"{gone - killed:.2f}",
        "left_behind": left_behind,
        "traceback": find_traceback(log),
    }


def check_exit(process: subprocess.Popen, run_dir: Path) -> None:
    if process.returncode != 0:
        log = run_dir.with_suffix(".log").read_text()
        raise SystemExit(
            f"a run that nobody killed ended with {process.returncode}:\n{log[-2000:]}"
        )


def summarise(rows: list[dict]) -> None:
    print(f"\n{len(rows)} kills")
    for column in ("moment", "signal"):
        counts = Counter(row[column] for row in rows)
        print(f"{column}: " + ", ".join(f"{name} {n}" for name, n in counts.items()))
    for name in SIGNALS:
        codes = Counter(row["exit_code"] for row in rows if row["signal"] == name)
        listed = ", ".join(f"{code} ({n} times)" for code, n in sorted(codes.items()))
        print(f"exit codes after {name}: {listed}")
    importing = sum(row["traceback"] == "while importing" for row in rows)
    print(f"tracebacks of Ctrl-C while Python was importing: {importing}")
    seconds = [float(row["seconds_to_end"]) for row in rows]
    median, longest = statistics.median(seconds), max(seconds)
    print(f"from the kill to the end of the last process: {median:.2f} s, at most {longest:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and signals")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    # Started with a shell's &, SIGINT would be ignored, and the runs would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    rng = random.Random(args.seed)
    args.results.mkdir(parents=True, exist_ok=True)
    rows, runs, failures = [], 0, []

    with (
        tempfile.TemporaryDirectory() as folder,
        (args.results / "breakout_kills.csv").open("w", newline="") as file,
    ):
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        reference = Path(folder) / "reference"
        startup = run_to_the_end(reference)
        expected_hash, expected_curves = weights_hash(reference), read_curves(reference)
        lengths = {tag: len(points) for tag, points in expected_curves.items()}
        print(f"reference: {startup:.1f} s to the first step, weights {expected_hash[:12]}")
        print(f"points of its curves: {lengths}", flush=True)

        while len(rows) < args.kills:
            run_dir, saved = Path(folder) / f"run{runs}", 0
            while len(rows) < args.kills and (row := kill_once(run_dir, startup, rng)):
                rows.append({"kill": len(rows), "run": runs, **row})
                writer.writerow(rows[-1])
                file.flush()
                print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
                lost = row["update_saved"] == "damaged" or row["update_saved"] < saved
                saved = saved if lost else row["update_saved"]
                if lost or row["left_behind"] or row["traceback"] == "while running":
                    log = run_dir.with_suffix(".log").read_text()
                    failures.append(f"kill {len(rows) - 1}:\n{log[-2000:]}")
            if row:  # the kills are used up before this run is at its end
                run_to_the_end(run_dir)
            curves = read_curves(run_dir)
            tags = expected_curves | curves
            different = [tag for tag in tags if curves.get(tag) != expected_curves.get(tag)]
            if weights_hash(run_dir) != expected_hash:
                different.insert(0, "weights")
            print(
                f"run {runs} is at its end: {', '.join(different) or 'nothing'} differs", flush=True
            )
            failures += [f"run {runs}: {what} differs from the reference" for what in different]
            runs += 1

    summarise(rows)
    print(f"{runs} runs to the end, weights and {len(lengths)} curves compared with the reference")
    if failures:
        sys.exit("FAILED\n" + "\n".join(failures))
    print("all as it must be")


if __name__ == "__main__":
    main()
