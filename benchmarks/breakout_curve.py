"""Keeps and draws how runs of a2c_breakout.py learnt: the scores of all games; prints the falls.

    python benchmarks/breakout_curve.py runs/seed1 runs/seed2 runs/seed3 --name breakout_3m6
    python benchmarks/breakout_curve.py runs/a runs/b --labels default higher --name trials
    python benchmarks/breakout_curve.py benchmarks/results/pong.csv --name pong --picture

Reads the TensorBoard files in the runs' folders and writes, in benchmarks/results/,
breakout_3m6.csv, a row for each game in training (the run's seed or label; timestep: when the
game ended; length: in decisions), and with --picture breakout_3m6.png: a dot is a game, a line a
running mean of 100. From such .csv files it draws alone: their rows are there already.

Prints for each run when the running mean first reached 0 (in Pong), 100, 200, 300 and 400; how much
of the last million timesteps went into games of over 3000 decisions, and into those among them of
432 points or more (in Breakout they cleared the first wall); and the falls: how often the running
mean lost more than a quarter of its highest value so far, when it had lost so much, and how deep it
fell.
"""

import argparse
import csv
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # pictures go to files: no display is needed
import matplotlib.pyplot as plt
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

RESULTS = Path(__file__).resolve().parent / "results"
LONG, WALL = 3000, 432  # decisions, points


def running_mean(scores: np.ndarray) -> np.ndarray:
    """Means of the last 100 (n,) -> (n - 99,); fewer scores have one mean."""
    window = min(100, len(scores))
    return np.convolve(scores, np.ones(window) / window, mode="valid")


def report(label: str, games: np.ndarray) -> None:
    """Prints when the running mean passed each hundred, the share of long games, and the falls."""
    timesteps, scores, lengths = games.T
    mean = running_mean(scores)
    times = timesteps[-len(mean) :]  # when each mean was reached
    print(f"{label}: {len(games)} games in {timesteps[-1]:,.0f} timesteps, "
          f"mean of the last 100 {mean[-1]:.1f}, best game {scores.max():.0f}")  # fmt: skip
    for goal in (0, 100, 200, 300, 400):
        if mean[0] < goal <= mean.max():
            print(f"  {goal} after {times[np.argmax(mean >= goal)]:,.0f} timesteps")
    late = timesteps > timesteps[-1] - 1_000_000
    long, decisions = late & (lengths > LONG), lengths[late].sum()
    share, cleared = (lengths[some].sum() / decisions for some in (long, long & (scores >= WALL)))
    print(f"  last million timesteps: {share:.1%} of the decisions in games of over {LONG}, "
          f"{cleared:.1%} in those of them with {WALL} points or more")  # fmt: skip
    highest = np.maximum.accumulate(mean)
    fallen = mean < highest - 0.25 * np.abs(highest)
    for high in np.unique(highest[fallen]):  # each is one fall, until it is reached again
        below = fallen & (highest == high)
        low, (first, last) = mean[below].min(), times[below][[0, -1]]
        when = times[np.argmax(mean == high)]
        depth = (high - low) / abs(high)
        print(f"  a fall from {high:.1f} (after {when:,.0f} timesteps) to {low:.1f}, "
              f"{depth:.0%}; below from {first:,.0f} to {last:,.0f}")  # fmt: skip


def games_of(run: Path) -> np.ndarray:
    """The whole games of a run's folder, (n, 3): timestep, score, length."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    scores = events.Scalars("charts/episodic_return")
    lengths = events.Scalars("charts/episodic_length")
    pairs = zip(scores, lengths, strict=True)
    return np.array([(score.step, score.value, length.value) for score, length in pairs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs, or their .csv")
    parser.add_argument("--labels", nargs="+", help="of the folders, in place of their seeds")
    parser.add_argument("--name", required=True, help="of the files to write")
    parser.add_argument("--picture", action="store_true", help="draw them as well")
    args = parser.parse_args()
    if args.labels and len(args.labels) != len(args.runs):
        parser.error("--labels: one for each run")

    curves, rows = {}, []  # label: games (n, 3); the .csv of the folders
    for number, run in enumerate(args.runs):
        if run.suffix == ".csv":
            with open(run, newline="") as file:
                (column, *_), *old = csv.reader(file)
            for key in dict.fromkeys(row[0] for row in old):
                label = f"seed {key}" if column == "seed" else key
                curves[label] = np.array([row[1:] for row in old if row[0] == key], dtype=float)
            continue
        result = json.loads((run / "result.json").read_text())
        key = args.labels[number] if args.labels else result["seed"]
        label = key if args.labels else f"seed {key}"
        curves[label] = games_of(run)
        rows += [(key, *map(int, game)) for game in curves[label]]
        print(f"{label}: {result['timesteps']:,} timesteps in {result['seconds'] / 3600:.2f} hours")
    if rows:
        header = ("run" if args.labels else "seed", "timestep", "score", "length")
        with open(RESULTS / f"{args.name}.csv", "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows])

    figure, axes = plt.subplots(figsize=(9, 4), dpi=110)
    for number, (label, games) in enumerate(curves.items()):
        report(label, games)
        mean, millions = running_mean(games[:, 1]), games[:, 0] / 1e6
        axes.plot(millions, games[:, 1], ".", markersize=2, alpha=0.15, color=f"C{number}")
        axes.plot(millions[-len(mean) :], mean, color=f"C{number}", label=label)
    scores = np.concatenate([games[:, 1] for games in curves.values()])
    if args.name.startswith("breakout"):
        axes.axhline(WALL, color="0.4", linewidth=0.8, linestyle=":", label="the first wall")
    axes.set(xlabel="timesteps (millions)", ylabel="score of a whole game (points)")
    axes.set(xlim=(0, None), ylim=(min(0, scores.min()), None))
    legend = "mean of the last 100 games;\na dot is a single game"
    axes.legend(loc="upper left", alignment="left", title=legend)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    if args.picture:
        figure.savefig(RESULTS / f"{args.name}.png")


if __name__ == "__main__":
    main()
