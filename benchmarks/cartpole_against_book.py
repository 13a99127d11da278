"""Compares the episodes each CartPole script needs with those of the book's own code.

    python benchmarks/cartpole_against_book.py

The episodes of the book's code, run on today's Gymnasium with 10 seeds, are below. Ours are the
rows that benchmarks/cartpole_seeds.py left in benchmarks/results/. The question is whether ours are
larger (worse): a one-sided Mann-Whitney U test, in which a run that was not solved counts as later
than any other. The table goes to cartpole_against_book.csv there.
"""

import argparse
import csv
import math
from pathlib import Path

import numpy as np
from scipy.stats import mannwhitneyu

RESULTS = Path(__file__).resolve().parent / "results"
BOOK = {
    "dqn": [90, 94, 100, 111, 131, 138, 142, 173, 192, 212],
    "ddqn": [89, 103, 119, 131, 132, 137, 157, 159, 162, 245],
    "dueling": [88, 90, 94, 99, 101, 118, 128, 149, 180, 307],
    "per": [82, 106, 107, 128, 135, 190, 197, 284, 330, 498],
    "a2c": [10, 14, 16, 19, 21, 25, 27, 31, 41, 42],
}
HEADER = "run seeds solved median book_median p_worse eval_at_least_195 lowest_eval".split()


def read(path: Path) -> tuple[list[float], list[float]]:
    """The solved episodes (infinite where there is none) and the evaluations of a file of seeds."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    solved = [float(row["solved_episode"] or math.inf) for row in rows]
    return solved, [float(row["eval_mean"]) for row in rows]


def compare(name: str, path: Path) -> list:
    """One row of the table."""
    solved, evaluations = read(path)
    p = mannwhitneyu(solved, BOOK[name], alternative="greater").pvalue
    return [
        path.stem.removeprefix("cartpole_"),
        len(solved),
        sum(map(math.isfinite, solved)),
        np.median(solved),
        np.median(BOOK[name]),
        round(float(p), 3),
        sum(mean >= 195 for mean in evaluations),
        min(evaluations),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    results = parser.parse_args().results
    table = [HEADER]
    for name in BOOK:
        for path in (results / f"cartpole_{name}.csv", results / f"cartpole_{name}_book.csv"):
            if path.exists():
                table.append(compare(name, path))
    with (results / "cartpole_against_book.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(table)
    for row in table:
        print("".join(f"{cell!s:>19}" for cell in row))


if __name__ == "__main__":
    main()
