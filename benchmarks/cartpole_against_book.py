"""How likely a CartPole script solves the task in fewer episodes than the book's own code.

    python benchmarks/cartpole_against_book.py

The episodes of the book's code, run on today's Gymnasium with 10 seeds, are below. Ours are the
rows that cartpole_seeds.py and experiments.py left in benchmarks/results/. What is estimated is the
probability of improvement: that a seed of the one needs fewer episodes than a seed of the other, a
tie counting half, and a run that was not solved as later than any other. 0.5 says that neither is
better. The 95% interval is the bootstrap's: both sides' seeds are drawn anew 10,000 times. The
second table compares a start at zero with a random one in the same way; the four scripts together
are the mean of their probabilities. The third compares the default flags of per_cartpole.py with
each experiment of its lesson, in steps, on both processors ("in 71% of the pairs").

The tables go to cartpole_against_book.csv, cartpole_zero_init.csv and cartpole_per_pairs.csv there.
"""

import argparse
import csv
import math
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).resolve().parent / "results"
BOOK = {
    "dqn": [90, 94, 100, 111, 131, 138, 142, 173, 192, 212],
    "ddqn": [89, 103, 119, 131, 132, 137, 157, 159, 162, 245],
    "dueling": [88, 90, 94, 99, 101, 118, 128, 149, 180, 307],
    "per": [82, 106, 107, 128, 135, 190, 197, 284, 330, 498],
    "a2c": [10, 14, 16, 19, 21, 25, 27, 31, 41, 42],
}
Q_LEARNING = ["dqn", "ddqn", "dueling", "per"]


def read(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def until_solved(rows: list[dict], column: str) -> list[float]:
    """The episode or the steps in which each seed solved the task; infinite where it did not."""
    return [float(row[column]) if row["solved_episode"] else math.inf for row in rows]


def p_fewer(ours: list[float], others: list[float], rng: np.random.Generator) -> np.ndarray:
    """The probability that ours needs less than others: first as it came, then 10,000 redrawn."""
    samples = []
    for sample in map(np.array, (ours, others)):
        picks = rng.integers(len(sample), size=(10_000, len(sample)))
        samples.append(np.vstack([sample, sample[picks]]))  # (10001, seeds)
    ours, others = samples[0][:, :, None], samples[1][:, None, :]
    return ((ours < others) + 0.5 * (ours == others)).mean(axis=(1, 2))  # (10001,)


def interval(probabilities: np.ndarray) -> dict[str, float]:
    """What p_fewer found, with the 95% interval, as columns."""
    low, high = np.percentile(probabilities[1:], [2.5, 97.5])
    return {"p_fewer": round(probabilities[0], 4), "low": round(low, 2), "high": round(high, 2)}


def against_book(results: Path, rng: np.random.Generator) -> list[dict]:
    """A row a script, and one for the same set to the book's way."""
    table = []
    for name, book in BOOK.items():
        for run in (name, f"{name}_book"):
            if not (results / f"cartpole_{run}.csv").exists():
                continue
            rows = read(results / f"cartpole_{run}.csv")
            episodes = until_solved(rows, "solved_episode")
            evaluations = [float(row["eval_mean"]) for row in rows]
            table.append(
                {
                    "run": run,
                    "seeds": len(rows),
                    "solved": sum(map(math.isfinite, episodes)),
                    "median_steps": np.median(until_solved(rows, "steps")),
                    "median": np.median(episodes),
                    "book_median": np.median(book),
                    **interval(p_fewer(episodes, book, rng)),
                    "eval_at_least_195": sum(mean >= 195 for mean in evaluations),
                    "lowest_eval": min(evaluations),
                }
            )
    return table


def zero_init(results: Path, rng: np.random.Generator) -> list[dict]:
    """A row a Q-learning script, a start at zero against a random one; last, the four together."""
    table, probabilities = [], []
    experiments = read(results / "experiments.csv")
    for name in Q_LEARNING:
        command = f"{name}_cartpole.py --no-zero-init"
        zero = until_solved(read(results / f"cartpole_{name}.csv"), "solved_episode")
        rows = [row for row in experiments if row["experiment"] == command]
        random = until_solved(rows, "solved_episode")
        probabilities.append(p_fewer(zero, random, rng))
        medians = {"median": np.median(zero), "median_random": np.median(random)}
        table.append({"script": name, **medians, **interval(probabilities[-1])})
    return [*table, {"script": "all four", **interval(np.mean(probabilities, axis=0))}]


def per_pairs(results: Path, rng: np.random.Generator) -> list[dict]:
    """A row an experiment and processor: the default flags against it, in steps."""
    table = []
    for ending in ("", "_intel"):
        default = until_solved(read(results / f"cartpole_per{ending}.csv"), "steps")
        experiments = read(results / f"experiments{ending}.csv")
        for name in dict.fromkeys(row["experiment"] for row in experiments):
            if name.startswith("per_cartpole.py --"):
                rows = [row for row in experiments if row["experiment"] == name]
                other = until_solved(rows, "steps")
                median = {"median_steps": np.median(default), "other_median": np.median(other)}
                found = interval(p_fewer(default, other, rng))
                table.append({"experiment": name, "rows": f"per{ending}", **median, **found})
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    results = parser.parse_args().results
    for make in (against_book, zero_init, per_pairs):
        table = make(results, np.random.default_rng(0))
        with (results / f"cartpole_{make.__name__}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)
        print(*table[0], sep="  ")
        for row in table:
            print(*row.values(), sep="  ")


if __name__ == "__main__":
    main()
