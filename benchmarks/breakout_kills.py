"""Kills a2c_breakout.py 100 times, resumes it, and compares it with a run left in peace.

    python benchmarks/breakout_kills.py                              # 100 kills, some 20 minutes
    python benchmarks/breakout_kills.py --kills 5 --results trial

Linux only (it finds processes in /proc). First comes a small run that nobody disturbs. The same run
is then started in another folder, killed, resumed, killed ... until it gets to its end; then in
a fresh folder, until all kills are used up. MOMENTS says when, SIGNALS what is sent, to the program
or to one of its workers. After each kill all processes must be gone within a minute, the
checkpoint must load and be no older than before, and no traceback may have been printed (but for
Python's own, if Ctrl-C meets it while it is still importing). At its end each run must have the
weights of the undisturbed one, bit for bit, and all points of its curves, none twice (but for
charts/SPS, which depends on the clock). If anything is not so, the exit code is 1.

A row for each kill in benchmarks/results/breakout_kills.csv: seconds are from the start to the
kill, and from there to the end of the last process; the next start goes on at timesteps_saved.
"""

import argparse
import csv
import os
import random
import shutil
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
FLAGS = "--num-envs 4 --num-steps 5 --total-timesteps 6000 --device cpu".split()  # 300 updates
FLAGS += ["--checkpoint-every", "10"]
MOMENTS = {  # name: (how often, the file that announces it, at most so many seconds later)
    "start-up": (20, None, None),  # as long as the undisturbed run took to its first step
    "training": (45, "events.*", 3.0),
    "checkpoint": (25, "checkpoint.pth.part", 0.03),
    "end": (10, "weight_end.pth*", 0.3),
}
# name: how often
SIGNALS = {"SIGKILL": 30, "SIGTERM": 15, "SIGHUP": 20, "SIGINT": 15, "worker SIGKILL": 20}


def start(run_dir: Path) -> subprocess.Popen:
    """Starts or resumes the run, in a session of its own: so all its processes can be found."""
    command = [sys.executable, "-u", ROOT / "a2c_breakout.py", "--resume", run_dir, *FLAGS]
    with open(run_dir.with_suffix(".log"), "w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


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
    """Waits a minute for all processes of the run. Returns how many had to be killed then."""
    deadline = time.monotonic() + 60
    while (left := processes(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.01)
        process.poll()  # else it stays a zombie
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    return len(left)


def wait_for(file: str | None, delay: float, process: subprocess.Popen, run_dir: Path) -> bool:
    """Waits for a new file, and a delay. Returns False if the process ends before that."""
    old = {path: path.stat().st_mtime for path in run_dir.glob(file)} if file else {}
    while file and process.poll() is None:
        try:
            if any(path.stat().st_mtime != old.get(path) for path in run_dir.glob(file)):
                break
        except FileNotFoundError:
            pass  # it has just been renamed
        time.sleep(0.001)
    time.sleep(delay)
    return process.poll() is None


def outcome(run_dir: Path) -> dict:
    """What a run ends with: the bits of its weights, and each curve that knows no clock."""
    weights = torch.load(run_dir / "weight_end.pth", weights_only=True).values()
    ending = {"weights": b"".join(weight.numpy().tobytes() for weight in weights)}
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    for tag in set(events.Tags()["scalars"]) - {"charts/SPS"}:
        ending[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    return ending


def timesteps_saved(run_dir: Path) -> int:
    """How far the checkpoint has come, 0 if there is none, -1 if it cannot be read."""
    try:
        return torch.load(run_dir / "checkpoint.pth", weights_only=True)["progress"]["timesteps"]
    except FileNotFoundError:
        return 0
    except Exception:  # whatever torch.load makes of damage
        return -1


def run_to_the_end(run_dir: Path) -> float:
    """Starts or resumes the run and lets it finish. Returns the seconds to the first step."""
    started, process = time.monotonic(), start(run_dir)
    wait_for("events.*", 0, process, run_dir)
    startup = time.monotonic() - started
    check_exit(process, run_dir)
    return startup


def check_exit(process: subprocess.Popen, run_dir: Path) -> None:
    if process.wait():
        sys.exit(f"a run that nobody killed failed:\n{run_dir.with_suffix('.log').read_text()}")


def kill_once(run_dir: Path, startup: float, rng: random.Random) -> dict | None:
    """Starts or resumes the run and kills it. Returns what happened, None if it ended unkilled."""
    (moment,) = rng.choices([*MOMENTS], [often for often, _, _ in MOMENTS.values()])
    (name,) = rng.choices([*SIGNALS], [*SIGNALS.values()])
    _, file, longest = MOMENTS[moment]
    started, process = time.monotonic(), start(run_dir)
    if not wait_for(file, rng.uniform(0, longest or startup), process, run_dir):
        check_exit(process, run_dir)
        return None
    workers = [pid for pid in processes(process.pid) if pid != process.pid]
    who, _, signal_name = name.rpartition(" ")
    target = rng.choice(workers) if who and workers else process.pid
    os.kill(target, getattr(signal, signal_name))
    killed = time.monotonic()
    left_behind = wait_until_gone(process)
    gone = time.monotonic()
    log = run_dir.with_suffix(".log").read_text()
    while_importing = "KeyboardInterrupt" in log and ", in train" not in log
    return {
        "moment": moment,
        "signal": name if target != process.pid else signal_name,
        "seconds": f"{killed - started:.2f}",
        "timesteps_saved": timesteps_saved(run_dir),
        "exit_code": process.returncode,
        "seconds_to_end": f"{gone - killed:.2f}",
        "left_behind": left_behind,
        "traceback": int("Traceback" in log and not while_importing),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and signals")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    # Started with a shell's & or nohup, it would ignore these two, and the runs would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    rng, rows, runs, failures = random.Random(args.seed), [], 0, []
    folder = Path(tempfile.mkdtemp())  # it stays if something fails
    startup = run_to_the_end(folder / "whole")
    expected = outcome(folder / "whole")
    while len(rows) < args.kills:
        run_dir, saved = folder / f"run{runs}", 0
        while len(rows) < args.kills and (row := kill_once(run_dir, startup, rng)):
            rows.append({"kill": len(rows), "run": runs} | row)
            print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
            if row["timesteps_saved"] < saved or row["left_behind"] or row["traceback"]:
                failures.append(f"kill {len(rows) - 1}:\n{run_dir.with_suffix('.log').read_text()}")
            saved = row["timesteps_saved"]
        run_to_the_end(run_dir)  # the rest, where the kills are used up
        ending = outcome(run_dir)
        different = [name for name in expected | ending if ending.get(name) != expected.get(name)]
        print(f"run {runs} is at its end: {', '.join(different) or 'nothing'} differs", flush=True)
        failures += [f"run {runs}: {name} differs" for name in different]
        runs += 1

    args.results.mkdir(parents=True, exist_ok=True)
    with (args.results / "breakout_kills.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"\n{len(rows)} kills; {runs} runs to their ends, with {len(expected) - 1} curves each")
    counts = Counter((row["moment"], row["signal"]) for row in rows)
    for moment in MOMENTS:
        print(f"{moment}: " + ", ".join(f"{name} {counts[moment, name]}" for name in SIGNALS))
    codes = Counter((row["signal"], row["exit_code"]) for row in rows)
    for (name, code), count in codes.items():
        print(f"exit code {code} after {name}: {count}")
    seconds = [float(row["seconds_to_end"]) for row in rows]
    median, longest = statistics.median(seconds), max(seconds)
    print(f"to the last process's end: median {median:.2f} s, max {longest:.2f} s")
    if failures:
        sys.exit(f"FAILED ({folder} has the runs)\n" + "\n".join(failures))
    shutil.rmtree(folder)
    print("all as it must be")


if __name__ == "__main__":
    main()
