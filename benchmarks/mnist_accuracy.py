"""Trains mnist.py with many seeds: as it is, and with the book's constant learning rate.

    python benchmarks/mnist_accuracy.py --data-dir data/mnist
    python benchmarks/mnist_accuracy.py --seeds 3 --results trial

One row a run in benchmarks/results/mnist_accuracy.csv; of the first run also its pictures,
mnist_test_image.png and mnist_most_wrong.png.
"""

import argparse
import contextlib
import csv
import io
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import mnist  # noqa: E402 (it is found only now)

RECIPES = {"default": True, "book (--no-anneal-lr)": False}  # name: anneal_lr
COLUMNS = ["recipe", "seed", "accuracy_before", "accuracy", "seconds_per_epoch"]
PICTURES = {"test_image_2020.png": "mnist_test_image.png", "most_wrong.png": "mnist_most_wrong.png"}


def run(args: mnist.Args, results: Path, keep_pictures: bool) -> dict:
    """One run of mnist.py in a folder that is thrown away, without its output."""
    with tempfile.TemporaryDirectory() as folder:
        args.runs_dir = Path(folder)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            result = mnist.train(args)
        if keep_pictures:
            (run_dir,) = args.runs_dir.iterdir()
            for source, target in PICTURES.items():
                shutil.copy(run_dir / source, results / target)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data/mnist"))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.results.mkdir(parents=True, exist_ok=True)

    rows = []
    for recipe, anneal_lr in RECIPES.items():
        for seed in range(options.seeds):
            args = mnist.Args(
                seed=seed, anneal_lr=anneal_lr, data_dir=options.data_dir, device="cpu"
            )
            result = run(args, options.results, keep_pictures=not rows)
            seconds = f"{result['seconds_per_epoch']:.3f}"
            rows.append([recipe, seed, result["accuracy_before"], result["accuracy"], seconds])
            print(*rows[-1], sep="  ", flush=True)
    with (options.results / "mnist_accuracy.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])

    for recipe in RECIPES:
        before = [row[2] for row in rows if row[0] == recipe]
        after = [row[3] for row in rows if row[0] == recipe]
        print(
            f"{recipe}: {statistics.mean(before):.2%} before, {statistics.mean(after):.2%} after, "
            f"lowest {min(after):.2%}, highest {max(after):.2%} ({len(after)} seeds)"
        )


if __name__ == "__main__":
    main()
