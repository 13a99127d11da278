"""Times a2c_breakout.py under torchrun with 1 and 2 ranks that share this machine's cores.

    python benchmarks/breakout_ranks.py                              # 5 rounds, some 6 minutes
    python benchmarks/breakout_ranks.py --rounds 1 --updates 20 --results trial

Sixteen environments, played by one rank or shared by two (gloo). The averaging of the gradients
costs time; but one rank's emulators can use a core while the other rank's network does not. The
two take turns; what counts is the median over the rounds of the ratio within a round. The
averaging is timed alone as well: two ranks, the network's gradients.

Raw measurements in benchmarks/results/breakout_ranks.csv: seconds of one update of a training run
(without its start-up), or of one averaging.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NUM_ENVS, NUM_STEPS = 16, 5
CORES = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
WARM_UP = 3  # averagings that are not counted


def torchrun(ranks: int, *command) -> None:
    """Runs a script in so many ranks, which share the cores."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command = [str(word) for word in (*launcher, ranks, *command)]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, CORES // ranks))}
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)


def time_training(ranks: int, updates: int) -> float:
    """Seconds of one update of a2c_breakout.py."""
    flags = ["--num-envs", NUM_ENVS, "--num-steps", NUM_STEPS, "--device", "cpu"]
    flags += ["--total-timesteps", updates * NUM_ENVS * NUM_STEPS]
    with tempfile.TemporaryDirectory() as folder:
        torchrun(ranks, ROOT / "a2c_breakout.py", *flags, "--runs-dir", folder)
        (result,) = Path(folder).glob("*/result.json")
        return NUM_ENVS * NUM_STEPS / json.loads(result.read_text())["steps_per_second"]


def time_averaging(updates: int) -> list[float]:
    """Seconds of each averaging of the gradients over two ranks."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "seconds.json"
        torchrun(2, __file__, "--updates", updates, "--averaging", file)
        return json.loads(file.read_text())


def average(updates: int) -> list[float]:
    """What each of the two ranks does for time_averaging."""
    sys.path.insert(0, str(ROOT))
    import a2c_breakout
    import torch

    torch.distributed.init_process_group("gloo")
    gradients = [torch.randn_like(weight) for weight in a2c_breakout.ActorCritic(4).parameters()]
    seconds = []
    for _ in range(updates + WARM_UP):
        torch.distributed.barrier()
        started = time.perf_counter()
        a2c_breakout.average_over_ranks(gradients)
        seconds.append(time.perf_counter() - started)
    torch.distributed.destroy_process_group()
    return seconds[WARM_UP:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=200, help="in each measurement")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--averaging", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.averaging:
        seconds = average(args.updates)
        if os.environ["RANK"] == "0":
            args.averaging.write_text(json.dumps(seconds))
        return

    args.results.mkdir(parents=True, exist_ok=True)
    training, averaging = {1: [], 2: []}, []
    with (args.results / "breakout_ranks.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["round", "what", "ranks", "seconds"])
        for number in range(args.rounds):
            for ranks, seconds in training.items():
                seconds.append(time_training(ranks, args.updates))
                writer.writerow([number, "training", ranks, f"{seconds[-1]:.6f}"])
                rate = 1 / seconds[-1]
                print(f"round {number}, {ranks} rank(s): {rate:.2f} updates/s", flush=True)
            times = time_averaging(args.updates)
            writer.writerows((number, "averaging", 2, f"{seconds:.6f}") for seconds in times)
            averaging += times

    print(f"\n{NUM_ENVS} environments, {CORES} cores, medians over rounds: {args.rounds}")
    for ranks, seconds in training.items():
        print(f"  {ranks} rank(s)  {1 / statistics.median(seconds):6.2f} updates/s")
    ratio = statistics.median(one / two for one, two in zip(*training.values()))
    print(f"  2 ranks reach {ratio:.2f} of the updates/s of 1")
    print(f"  averaging  {1000 * statistics.median(averaging):6.2f} ms an update")


if __name__ == "__main__":
    main()
