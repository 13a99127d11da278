"""Means, medians and intervals of Breakout's scores, from the rows that breakout_scores.py left.

    python benchmarks/breakout_intervals.py 10m_seed1 10m_seed2 10m_seed3
    python benchmarks/breakout_intervals.py 3m6_seed1 3m6_seed2 3m6_seed3

Each name is the ending of a file benchmarks/results/breakout_scores_<name>.csv, and stands for a
training run. The intervals hold 95% of 10,000 bootstrap means. Where games alone are drawn anew,
they tell how sure the mean of these policies is; where runs are as well, that of the recipe.
"""

import argparse
import csv
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).resolve().parent / "results"
WALL = 432  # points, with which a game has cleared the first wall


def summary(scores: np.ndarray) -> str:
    return (f"mean {scores.mean():.1f}, median {np.median(scores):g}, first wall cleared in "
            f"{(scores >= WALL).mean():.0%}, {scores.min():g} to {scores.max():g}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", help="endings of the files, one for each run")
    names = parser.parse_args().names

    runs = []
    for name in names:
        with open(RESULTS / f"breakout_scores_{name}.csv", newline="") as file:
            runs.append([float(row["score"]) for row in csv.DictReader(file)])
        print(f"{name}: {summary(np.array(runs[-1]))}")
    scores = np.array(runs)  # (runs, games)
    means, (n, games), generator = scores.mean(1), scores.shape, np.random.default_rng(0)
    print(f"all: {summary(scores)}")
    for what, which in [("games", np.tile(np.arange(n), (10_000, 1))),
                        ("runs and games", generator.integers(n, size=(10_000, n)))]:  # fmt: skip
        drawn = generator.integers(games, size=(10_000, n, games))
        low, high = np.quantile(scores[which[..., None], drawn].mean((1, 2)), [0.025, 0.975])
        print(f"  95% interval of the mean, {what} drawn anew: {low:.0f} to {high:.0f}")
    if n > 1:
        print(f"  standard deviation between the runs' means: {means.std(ddof=1):.1f}")


if __name__ == "__main__":
    main()
