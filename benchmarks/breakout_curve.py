"""Draws the learning curve of runs of a2c_breakout.py: the score of every whole game, and their running mean.

    python benchmarks/breakout_curve.py runs/default_seed1 --name default_seed1

Reads the TensorBoard files of the run's folder and writes benchmarks/results/breakout_curve_<name>.csv (timestep,
return, length: one row for each whole game) and a picture beside it.
"""

import argparse
import csv
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--name", required=True, help="of the files to write")
    args = parser.parse_args()

    events = EventAccumulator(str(args.run_dir), size_guidance={"scalars": 0}).Reload()
    games, lengths = events.Scalars("charts/episodic_return"), events.Scalars("charts/episodic_length")
    rows = [(game.step, game.value, length.value) for game, length in zip(games, lengths, strict=True)]
    with open(RESULTS / f"breakout_curve_{args.name}.csv", "w", newline="") as file:
        csv.writer(file).writerows([("timestep", "return", "length"), *((s, int(r), int(n)) for s, r, n in rows)])

    steps, returns = np.array([row[:2] for row in rows]).T
    window = min(100, len(returns))
    mean = np.convolve(returns, np.ones(window) / window, mode="valid")
    figure, axes = plt.subplots(figsize=(8, 4.5))
    axes.plot(steps / 1e6, returns, ".", markersize=2, alpha=0.25, color="tab:blue", label="one whole game")
    axes.plot(steps[window - 1 :] / 1e6, mean, color="tab:red", label=f"mean of the last {window}")
    axes.set(xlabel="timesteps (millions)", ylabel="score of the game")
    flags = json.loads((args.run_dir / "args.json").read_text())
    axes.set_title(f"A2C on {flags['env_id']}, seed {flags['seed']}" + ", annealed" * flags["anneal_lr"])
    axes.legend(loc="upper left")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(RESULTS / f"breakout_curve_{args.name}.png", dpi=110)
    print(f"{len(rows)} games up to timestep {int(steps[-1])}; mean of the first {window} {mean[0]:.2f}, of the last {mean[-1]:.2f}")


if __name__ == "__main__":
    main()
