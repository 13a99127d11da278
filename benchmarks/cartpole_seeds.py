"""Runs one CartPole script with many seeds and draws its learning curves.

    python benchmarks/cartpole_seeds.py dqn_cartpole
    python benchmarks/cartpole_seeds.py a2c_cartpole --seeds 5 --jobs 4 --results /tmp/try
    python benchmarks/cartpole_seeds.py per_cartpole --tag paper -- --alpha 0.6 --beta 0.4

Every seed is a process of its own, with one thread, as a user would start it; flags after a bare --
go to the script. Three files come out, under benchmarks/results/:

    cartpole_dqn.csv           one row a seed: the numbers of its result.json
    cartpole_dqn_episodes.csv  one row an episode: the steps it lasted (A2C: environment 0's)
    cartpole_dqn.png           the learning curves: all seeds, median, quartiles
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # pictures go to files: no display is needed
import matplotlib.pyplot as plt
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = "seed solved_episode episodes steps seconds steps_per_second eval_mean eval_std".split()
ONE_CORE = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}


def run_seed(script: str, seed: int, flags: list[str]) -> tuple[dict, list[int]]:
    """Runs the script with one seed; returns its result and the steps of each episode."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / f"{script}.py", "--seed", str(seed), "--device", "cpu"]
        done = subprocess.run(
            [*command, "--runs-dir", folder, *flags],
            env={**os.environ, **ONE_CORE},
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise SystemExit(f"{script} --seed {seed} failed:\n{done.stderr[-2000:]}")
        (run_dir,) = Path(folder).iterdir()
        result = json.loads((run_dir / "result.json").read_text())
        events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
        episodes = [int(event.value) for event in events.Scalars("charts/episodic_length")]
    print(
        f"{script} seed {seed}: solved {result['solved_episode']}, "
        f"evaluation {result['eval_mean']:.1f}, {result['seconds']:.0f} s",
        flush=True,
    )
    return result, episodes


def write_rows(path: Path, header: list[str], rows: list[list]) -> None:
    """Writes a CSV file with a header line."""
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def mean_of_last_ten(steps: list[int], length: int) -> np.ndarray:
    """Mean of the last (up to) 10 episodes at each one; after the end it keeps its last value."""
    means = [np.mean(steps[max(0, end - 10) : end]) for end in range(1, len(steps) + 1)]
    return np.array(means + [means[-1]] * (length - len(means)))  # (length,)


def draw(path: Path, title: str, curves: list[list[int]]) -> None:
    """Draws every seed thinly, and the median and the quartiles over the seeds."""
    length = max(map(len, curves))
    means = np.stack([mean_of_last_ten(steps, length) for steps in curves])  # (seeds, length)
    low, median, high = np.percentile(means, [25, 50, 75], axis=0)
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    for steps, curve in zip(curves, means):
        axes.plot(curve[: len(steps)], color="0.65", linewidth=0.6)
        axes.plot(len(steps) - 1, curve[-1], ".", color="0.45", markersize=4)
    axes.fill_between(range(length), low, high, color="tab:blue", alpha=0.25, label="quartiles")
    axes.plot(median, color="tab:blue", linewidth=2, label="median")
    axes.axhline(196, color="0.3", linewidth=0.6, linestyle=":")
    axes.set(title=title, xlabel="episode", ylabel="steps, mean of the last 10", ylim=(0, 205))
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("script", help="name of the script, such as dqn_cartpole")
    parser.add_argument("--seeds", type=int, default=20, help="run the seeds 0 to SEEDS - 1")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--tag", help="ending of the file names, for a run with other flags")
    parser.add_argument("flags", nargs="*", help="flags for the script, after a bare --")
    args = parser.parse_args()

    with ThreadPoolExecutor(args.jobs) as pool:  # threads that only wait for their process
        runs = list(pool.map(lambda s: run_seed(args.script, s, args.flags), range(args.seeds)))

    tag = f"_{args.tag}" if args.tag else ""
    name = "cartpole_" + args.script.removesuffix("_cartpole") + tag
    args.results.mkdir(parents=True, exist_ok=True)
    rows = [[result[column] for column in COLUMNS] for result, _ in runs]
    write_rows(args.results / f"{name}.csv", COLUMNS, rows)
    curves = [steps for _, steps in runs]
    episodes = [[s, e, n] for s, steps in enumerate(curves) for e, n in enumerate(steps)]
    write_rows(args.results / f"{name}_episodes.csv", ["seed", "episode", "steps"], episodes)
    title = " ".join([f"{args.script}.py", *args.flags]) + f", {args.seeds} seeds"
    draw(args.results / f"{name}.png", title, curves)

    solved = [result["solved_episode"] for result, _ in runs]
    good = sum(result["eval_mean"] >= 195 for result, _ in runs)
    print(f"solved {sum(s is not None for s in solved)} of {args.seeds}, evaluation >= 195: {good}")


if __name__ == "__main__":
    main()
