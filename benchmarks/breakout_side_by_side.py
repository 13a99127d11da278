"""Several runs of a2c_breakout.py at once, one for each core: what sharing the cores costs them.

    python benchmarks/breakout_side_by_side.py                             # 3 rounds, some 6 minutes
    python benchmarks/breakout_side_by_side.py --rounds 1 --timesteps 800 --no-bf16 --results trial

As many runs as there are cores, each with another seed and 16 environments, start together: as a
user would start them, so that each of them uses all cores, and with OMP_NUM_THREADS=1, so that
each has one. A parallel operation ends when its slowest thread does, and that thread may be
waiting for a core on which another run's thread is only waiting too. The bfloat16 kernels of the
convolutions' gradients meet for every single image, and suffer most.

Each run reports its own timesteps a second, without its start-up; a row for each of them in
benchmarks/results/breakout_side_by_side.csv. The summary gives the medians, over the rounds, of
what all runs of a kind make together.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

from breakout_speed import CORES, has_bf16

ROOT = Path(__file__).resolve().parent.parent


def side_by_side(threads: int, bf16: bool, timesteps: int) -> list[float]:
    """Steps/s of each of CORES runs that start together, each with so many threads of PyTorch."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for seed in range(CORES):
            flags = ["--seed", seed, "--total-timesteps", timesteps, "--device", "cpu"]
            command = [sys.executable, ROOT / "a2c_breakout.py", *flags, "--runs-dir", folder]
            command += ["--bf16"] if bf16 else []
            command = [str(word) for word in command]
            runs.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment))
        if any([run.wait() for run in runs]):
            raise SystemExit("a run failed: its message stands above")
        results = Path(folder).glob("*/result.json")
        return [json.loads(result.read_text())["steps_per_second"] for result in results]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timesteps", type=int, default=4000, help="of each run")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=has_bf16())
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()

    args.results.mkdir(parents=True, exist_ok=True)
    kinds = list(product((False, True) if args.bf16 else (False,), (CORES, 1)))
    together = {kind: [] for kind in kinds}
    with (args.results / "breakout_side_by_side.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["round", "bf16", "threads", "steps_per_second"])
        for number, (bf16, threads) in product(range(args.rounds), kinds):
            speeds = side_by_side(threads, bf16, args.timesteps)
            writer.writerows((number, bf16, threads, f"{speed:.1f}") for speed in speeds)
            file.flush()
            together[bf16, threads].append(sum(speeds))

    for (bf16, threads), speeds in together.items():
        print(f"{CORES} runs at once, {'bfloat16' if bf16 else 'float32'}, {threads} threads each: "
              f"{statistics.median(speeds):.0f} steps/s together "
              f"({', '.join(f'{speed:.0f}' for speed in speeds)})")  # fmt: skip


if __name__ == "__main__":
    main()
