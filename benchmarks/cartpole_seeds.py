"""Runs one CartPole script with many seeds and draws its learning curves.

    python benchmarks/cartpole_seeds.py dqn_cartpole
    python benchmarks/cartpole_seeds.py a2c_cartpole --seeds 5 --jobs 4 --results trial
    python benchmarks/cartpole_seeds.py per_cartpole --tag alpha_1 -- --alpha 1 --beta 0

The seeds are shared out among processes with one thread each; flags after a bare -- go to the
script. Three files come out, under benchmarks/results/:

    cartpole_dqn.csv           one row a seed: the numbers of its result.json
    cartpole_dqn_episodes.csv  one row an episode: the steps it lasted (A2C: environment 0's)
    cartpole_dqn.png           the learning curves: all seeds, median, quartiles
"""

import argparse
import contextlib
import csv
import importlib
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # pictures go to files: no display is needed
import matplotlib.pyplot as plt
import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
COLUMNS = "seed solved_episode episodes steps seconds steps_per_second eval_mean eval_std".split()


def run_seed(script_name: str, seed: int, flags: list[str]) -> tuple[dict, list[int]]:
    """Trains with one seed; returns the result and the steps of each episode."""
    script = importlib.import_module(script_name)
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as null:
        seed_flags = ["--seed", str(seed), "--device", "cpu", "--runs-dir", folder]
        args = tyro.cli(script.Args, args=seed_flags + flags)
        with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            result = script.train(args)
        (run_dir,) = Path(folder).iterdir()
        events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
        episodes = [int(event.value) for event in events.Scalars("charts/episodic_length")]
    print(
        f"{script_name} seed {seed}: solved {result['solved_episode']}, "
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
    parser.epilog = "What follows a bare -- goes to the script."
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    args, flags = parser.parse_args(words[:end]), words[end + 1 :]

    spawn = multiprocessing.get_context("spawn")  # a process that shares nothing, on every system
    with ProcessPoolExecutor(args.jobs, spawn) as pool:
        runs = list(pool.map(partial(run_seed, args.script, flags=flags), range(args.seeds)))

    tag = f"_{args.tag}" if args.tag else ""
    name = "cartpole_" + args.script.removesuffix("_cartpole") + tag
    args.results.mkdir(parents=True, exist_ok=True)
    rows = [[result[column] for column in COLUMNS] for result, _ in runs]
    write_rows(args.results / f"{name}.csv", COLUMNS, rows)
    curves = [steps for _, steps in runs]
    episodes = [[s, e, n] for s, steps in enumerate(curves) for e, n in enumerate(steps)]
    write_rows(args.results / f"{name}_episodes.csv", ["seed", "episode", "steps"], episodes)
    title = " ".join([f"{args.script}.py", *flags]) + f", {args.seeds} seeds"
    draw(args.results / f"{name}.png", title, curves)

    solved = [result["solved_episode"] for result, _ in runs]
    good = sum(result["eval_mean"] >= 195 for result, _ in runs)
    print(f"solved {sum(s is not None for s in solved)} of {args.seeds}, evaluation >= 195: {good}")


if __name__ == "__main__":
    main()
