"""Runs one CartPole script with many seeds and keeps what each episode came to.

    python benchmarks/cartpole_seeds.py dqn_cartpole
    python benchmarks/cartpole_seeds.py a2c_cartpole --seeds 5 --jobs 4 --results trial
    python benchmarks/cartpole_seeds.py per_cartpole --tag alpha_1 -- --alpha 1 --beta 0

The seeds are shared out among processes with one thread each; flags after a bare -- go to the
script. Two files come out, under benchmarks/results/; pictures.py draws them:

    cartpole_dqn.csv           one row a seed: the numbers of its result.json
    cartpole_dqn_episodes.csv  one row an episode: its steps, and those of all environments up to
                               its end, as more than one may play (A2C: environment 0's episodes)
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

import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
COLUMNS = "seed solved_episode episodes steps seconds steps_per_second eval_mean eval_std".split()


def run_seed(script_name: str, seed: int, flags: list[str]) -> tuple[dict, list[tuple[int, int]]]:
    """Trains with one seed; returns the result, and of each episode its end and its length."""
    torch.set_num_threads(1)
    script = importlib.import_module(script_name)
    script.film = lambda *_: b""  # no film is needed here
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as null:
        seed_flags = ["--seed", str(seed), "--device", "cpu", "--runs-dir", folder]
        args = tyro.cli(script.Args, args=seed_flags + flags)
        with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            result = script.train(args)
        (run_dir,) = Path(folder).iterdir()
        events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
        lengths = events.Scalars("charts/episodic_length")
        episodes = [(event.step, int(event.value)) for event in lengths]
    print(
        f"{script_name} seed {seed}: solved {result['solved_episode']}, {result['steps']} steps, "
        f"evaluation {result['eval_mean']:.1f}, {result['seconds']:.0f} s",
        flush=True,
    )
    return result, episodes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("script", help="name of the script, such as dqn_cartpole")
    parser.add_argument("--seeds", type=int, default=20, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--tag", help="ending of the file names, for a run with other flags")
    parser.epilog = "What follows a bare -- goes to the script."
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    args, flags = parser.parse_args(words[:end]), words[end + 1 :]

    seeds = range(args.first_seed, args.first_seed + args.seeds)
    spawn = multiprocessing.get_context("spawn")  # a process that shares nothing, on every system
    with ProcessPoolExecutor(args.jobs, spawn) as pool:
        runs = list(pool.map(partial(run_seed, args.script, flags=flags), seeds))

    tag = f"_{args.tag}" if args.tag else ""
    name = "cartpole_" + args.script.removesuffix("_cartpole") + tag
    args.results.mkdir(parents=True, exist_ok=True)
    results = [[result[column] for column in COLUMNS] for result, _ in runs]
    episodes = [
        [result["seed"], episode, steps, total]
        for result, ends in runs
        for episode, (total, steps) in enumerate(ends)
    ]
    for path, header, rows in [
        (args.results / f"{name}.csv", COLUMNS, results),
        (args.results / f"{name}_episodes.csv", "seed episode steps total_steps".split(), episodes),
    ]:
        with path.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows])

    solved = sum(result["solved_episode"] is not None for result, _ in runs)
    good = sum(result["eval_mean"] >= 195 for result, _ in runs)
    print(f"solved {solved} of {args.seeds}, evaluation >= 195: {good}")


if __name__ == "__main__":
    main()
