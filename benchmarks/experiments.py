"""Makes the experiments that the pages propose under "Try it", each with twenty seeds.

    python benchmarks/experiments.py --data-dir data/mnist
    python benchmarks/experiments.py per_cartpole.py --seeds 5 --results trial

One row a run goes to benchmarks/results/experiments.csv, where no run is made twice: a program that
was stopped goes on where it was. Then the table is printed: medians over the seeds, and first those
of the scripts without flags, from the rows that cartpole_seeds.py and mnist_accuracy.py left there.
"""

import argparse
import contextlib
import csv
import importlib
import math
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
EXPERIMENTS = {  # where an A2C may never stop, it gets fewer steps
    "mnist.py": ["--learning-rate 1", "--no-anneal-lr", "--hidden-size 1"],
    "dqn_cartpole.py": ["--epsilon 0", "--memory-size 32", "--gamma 0.5", "--no-zero-init"],
    "ddqn_cartpole.py": ["--target-interval 100000", "--target-interval 1", "--no-zero-init"],
    "dueling_cartpole.py": ["--no-zero-init"],
    "per_cartpole.py": [
        "--alpha 0", "--beta 0", "--beta 1", "--uniform-episodes 0", "--no-zero-init"
    ],
    "a2c_cartpole.py": [
        "--num-steps 1 --total-timesteps 200000",
        "--num-steps 20 --total-timesteps 500000",
        "--num-envs 1 --total-timesteps 100000",
        "--entropy-coef 0 --total-timesteps 500000",
    ],
}  # fmt: skip
COLUMNS = ["experiment", "seed", "solved_episode", "episodes", "steps", "eval_mean"]


def run(key: tuple[str, int], data_dir: Path) -> list:
    """One row; mnist.py has no episodes, and in place of the evaluation its accuracy."""
    experiment, seed = key
    torch.set_num_threads(1)
    name, *flags = experiment.split()
    script = importlib.import_module(name.removesuffix(".py"))
    script.film = lambda *_: b""  # no film is needed here
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as null:
        flags += ["--seed", str(seed), "--device", "cpu", "--runs-dir", folder]
        flags += ["--data-dir", str(data_dir)] * (name == "mnist.py")
        with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            result = script.train(tyro.cli(script.Args, args=flags))
    score = result["accuracy"] if name == "mnist.py" else result["eval_mean"]
    return [*key, *(result.get(column) for column in COLUMNS[2:-1]), score]


def read(path: Path) -> list[dict]:
    """The rows of a file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_unchanged(script: str, results: Path) -> list[dict]:
    """The rows of a script without flags."""
    if script == "mnist.py":
        rows = read(results / "mnist_accuracy.csv")
        return [{"eval_mean": row["accuracy"]} for row in rows if row["recipe"] == "default"]
    return read(results / f"cartpole_{script.removesuffix('_cartpole.py')}.csv")


def summary(name: str, rows: list[dict]) -> str:
    """A line of the table; a run that did not solve the task counts as later than any other."""
    scores = [float(row["eval_mean"]) for row in rows]
    if name.startswith("mnist.py"):
        return f"| {name} | | | | {median(scores):.2%} | {min(scores):.2%} | |"
    solved = [row for row in rows if row["solved_episode"]]
    late = [math.inf] * (len(rows) - len(solved))
    episode = median([int(row["solved_episode"]) for row in solved] + late)
    steps = median([int(row["steps"]) for row in solved] + late)
    steps = steps if math.isinf(steps) else math.floor(steps + 0.5)
    good = sum(score >= 195 for score in scores)
    return (
        f"| {name} | {len(solved)}/{len(rows)} | {episode:g} | {steps:,.0f} "
        f"| {median(scores):.1f} | {min(scores):.1f} | {good}/{len(rows)} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scripts", nargs="*", help="of these scripts alone, such as mnist.py")
    parser.add_argument("--seeds", type=int, default=20, help="run the seeds 0 to SEEDS - 1")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--data-dir", type=Path, default=Path("data/mnist"))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()

    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / "experiments.csv"
    scripts = args.scripts or list(EXPERIMENTS)
    names = {script: [f"{script} {flags}" for flags in EXPERIMENTS[script]] for script in scripts}
    done = {(row["experiment"], int(row["seed"])) for row in read(path)}
    keys = [(name, n) for s in scripts for name in names[s] for n in range(args.seeds)]
    spawn = multiprocessing.get_context("spawn")  # a process that shares nothing, on every system
    with ProcessPoolExecutor(args.jobs, spawn) as pool, path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if path.stat().st_size == 0:
            writer.writerow(COLUMNS)
        todo = [key for key in keys if key not in done]
        for row in pool.map(partial(run, data_dir=args.data_dir), todo):
            writer.writerow(row)
            file.flush()
            print(*row, sep=",", flush=True)

    print("\n| | solved | episode | steps | evaluation | lowest | 195 or more |")
    print("|---|---|---|---|---|---|---|")
    rows = read(path)
    for script in scripts:
        if unchanged := read_unchanged(script, args.results):
            print(summary(script, unchanged))
        for name in names[script]:
            print(summary(name, [row for row in rows if row["experiment"] == name]))


if __name__ == "__main__":
    main()
