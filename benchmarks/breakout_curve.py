"""Draws how runs of a2c_breakout.py learnt: scores and lengths of their whole games.

    python benchmarks/breakout_curve.py runs/seed1 runs/seed2 runs/seed3 --name breakout_3m6
    python benchmarks/breakout_curve.py runs/a runs/b --labels default higher --name breakout_trials

Reads the TensorBoard files in the runs' folders and writes, in benchmarks/results/,
breakout_3m6.csv, a row for each game in training (the run's seed or label; timestep: when the
game ended; length: in decisions), and breakout_3m6.png: above the scores, below the lengths, the
dots single games, the lines running means of 100. Prints when the running mean first reached 100,
200, 300 and 400, and how much of the last million timesteps went into games of over 3000 decisions,
and into those among them that cleared the first wall (432 points). In place of runs whose folders
are gone you can name the .csv that was made of them: they are drawn and kept, but not reported.
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


def running_mean(values: np.ndarray) -> np.ndarray:
    """Means of the last 100 (n,) -> (n - 99,); fewer values have one mean."""
    window = min(100, len(values))
    return np.convolve(values, np.ones(window) / window, mode="valid")


def report(label: str, last: int, games: np.ndarray, events: EventAccumulator) -> None:
    """Prints when the running mean passed each hundred, and the share of the long games."""
    timesteps, scores, lengths = games.T
    points = events.Scalars("charts/SPS")
    seconds = np.diff([point.wall_time for point in points], prepend=points[0].wall_time)
    pause = 10 * np.median(seconds)  # a run that was stopped and resumed later
    hours = np.cumsum(np.where(seconds > pause, 0, seconds)) / 3600
    mean = running_mean(scores)
    print(f"{label}: {len(games)} games, {last:,} timesteps in {hours[-1]:.2f} hours, "
          f"mean of the last 100 games {mean[-1]:.1f}, best game {scores.max():.0f}")  # fmt: skip
    for goal in (100, 200, 300, 400):
        if mean.max() < goal:
            print(f"  {goal} is not reached")
            break
        timestep = timesteps[len(scores) - len(mean) + np.argmax(mean >= goal)]
        after = np.interp(timestep, [point.step for point in points], hours)
        print(f"  {goal} after {timestep:,.0f} timesteps, {after:.2f} hours")
    late = timesteps > last - 1_000_000
    long, decisions = late & (lengths > LONG), lengths[late].sum()
    share, cleared = (lengths[some].sum() / decisions for some in (long, long & (scores >= WALL)))
    print(f"  last million timesteps: {share:.1%} of the decisions in games of over {LONG}, "
          f"{cleared:.1%} in those of them that cleared the first wall")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs, or their .csv")
    parser.add_argument("--labels", nargs="+", help="of the runs, in place of their seeds")
    parser.add_argument("--name", required=True, help="of the two files to write")
    parser.add_argument("--title", default="A2C on Breakout: whole games during training")
    args = parser.parse_args()
    if args.labels and len(args.labels) != len(args.runs):
        parser.error("--labels: one for each run")

    column = "run" if args.labels else "seed"
    curves = []  # of each run its seed or label and its games (n, 3): timestep, score, length
    for number, run in enumerate(args.runs):
        if run.suffix == ".csv":
            with open(run, newline="") as file:
                (column, *_), *rows = csv.reader(file)
            for key in dict.fromkeys(row[0] for row in rows):
                games = np.array([row[1:] for row in rows if row[0] == key], dtype=float)
                curves.append((key, games))
            continue
        result = json.loads((run / "result.json").read_text())
        key = args.labels[number] if args.labels else str(result["seed"])
        events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
        tags = ("charts/episodic_return", "charts/episodic_length")
        scores, lengths = (events.Scalars(tag) for tag in tags)
        pairs = zip(scores, lengths, strict=True)
        games = np.array([(game.step, game.value, length.value) for game, length in pairs])
        curves.append((key, games))
        report(key if column == "run" else f"seed {key}", result["timesteps"], games, events)

    figure, (above, below) = plt.subplots(2, sharex=True, figsize=(9, 7), dpi=110)
    for number, (key, games) in enumerate(curves):
        for axes, values in ((above, games[:, 1]), (below, games[:, 2])):
            mean, millions = running_mean(values), games[:, 0] / 1e6
            axes.plot(millions, values, ".", markersize=2, alpha=0.15, color=f"C{number}")
            label = key if column == "run" else f"seed {key}"
            axes.plot(millions[-len(mean):], mean, color=f"C{number}", label=label)

    above.set(title=args.title, ylabel="score (points)", xlim=(0, None), ylim=(0, None))
    legend = "mean of the last 100 games;\na dot is a single game"
    above.legend(loc="upper left", alignment="left", title=legend)
    line = below.axhline(LONG, color="0.4", linewidth=0.8, linestyle=":", label=f"{LONG} decisions")
    below.legend(handles=[line], loc="upper left")
    below.set(xlabel="timesteps (millions)", ylabel="length (decisions)", ylim=(0, None))
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(RESULTS / f"{args.name}.png")
    with open(RESULTS / f"{args.name}.csv", "w", newline="") as file:
        rows = [(key, *map(int, game)) for key, games in curves for game in games]
        header = (column, "timestep", "score", "length")
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


if __name__ == "__main__":
    main()
