"""Makes the pictures of the documents: what the network sees, and what CartPole's scripts learn.

    python benchmarks/pictures.py
    python benchmarks/pictures.py cartpole_all zero_init    # these alone

In benchmarks/results/, the last two from the files that cartpole_seeds.py left there:

    network_input.png   a screen of Breakout, and the four frames that the network sees then
    cartpole.gif        the film of a run of dqn_cartpole.py
    cartpole_all.png    how the episodes of the five CartPole scripts grow longer, over the steps
    zero_init.png       DQN with an output layer that starts at zero, and with a random one
"""

import argparse
import csv
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # pictures go to files: no display is needed
import cv2
import imageio.v2 as imageio
import matplotlib.pyplot as plt
import numpy as np
import torch
from breakout_gif import RESULTS, save_gif
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dqn_cartpole
from play_breakout import PRETRAINED, Game, act, load_network, make_env

COLOURS = {"dqn": "C0", "ddqn": "C1", "dueling": "C2", "per": "C3", "a2c": "C4"}


def network_input() -> None:
    env = make_env("BreakoutNoFrameskip-v4", whole_games=True)
    network, game = load_network(PRETRAINED, env), Game(env, 10_000, whole=True)
    in_flight = np.zeros(4)
    while len(game.actions) < 1400 or in_flight.min() < 60:  # the ball is between wall and paddle
        game.step(act(network, [game], greedy=False, device="cpu")[0])
        in_flight = game.frames[:, 41:72, 8:76].max(axis=(1, 2))  # (4,)
    figure, axes = plt.subplot_mosaic("sab;scd", width_ratios=[1.62, 1, 1], figsize=(9, 5.6))
    axes["s"].imshow(env.unwrapped.ale.getScreenRGB())
    axes["s"].set_title("the screen, 160 x 210, in colour")
    times = ["3 decisions ago", "2 decisions ago", "1 decision ago", "now"]
    for name, frame, when in zip("abcd", game.frames, times):
        axes[name].imshow(frame, cmap="gray", vmin=0, vmax=255)
        axes[name].set_title(when)
        row, column = np.unravel_index(frame[41:72, 8:76].argmax(), (31, 68))
        axes[name].plot(column + 8, row + 41, "o", ms=16, mfc="none", mec="gold")
    for each in axes.values():
        each.axis("off")
    figure.suptitle("What the network sees: four frames, gray, 84 x 84 (the rings mark the ball)")
    figure.savefig(RESULTS / "network_input.png")


def cartpole_gif() -> None:
    with tempfile.TemporaryDirectory() as folder:
        dqn_cartpole.train(dqn_cartpole.Args(runs_dir=Path(folder), device="cpu"))
        (film,) = Path(folder).glob("*/film.mp4")
        frames = [frame for frame in imageio.get_reader(film)][::2]  # 25 of 50 a second
    frames = [cv2.resize(f, (300, 200), interpolation=cv2.INTER_AREA) for f in frames]
    save_gif(RESULTS / "cartpole.gif", frames, fps=25)


def read_seeds(name: str) -> list[tuple[list[int], list[float], bool]]:
    """Of each seed: where its episodes end, in steps of all environments; the mean length of the
    last (up to) 10 at each of these points; and whether it solved the task."""
    with open(RESULTS / f"cartpole_{name}.csv") as file:
        runs = {row["seed"]: row for row in csv.DictReader(file)}
    ends, lengths = defaultdict(list), defaultdict(list)
    with open(RESULTS / f"cartpole_{name}_episodes.csv") as file:
        for row in csv.DictReader(file):
            ends[row["seed"]].append(int(row["total_steps"]))
            lengths[row["seed"]].append(int(row["steps"]))
    seeds = []
    for seed, steps in lengths.items():
        means = [np.mean(steps[max(0, end - 10) : end]) for end in range(1, len(steps) + 1)]
        solved = bool(runs[seed]["solved_episode"])
        if solved:  # the last episodes, of A2C those of all poles, were successes
            ends[seed].append(int(runs[seed]["steps"]))
            means.append(200.0)
        seeds.append((ends[seed], means, solved))
    return seeds


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """The mean of the middle half of the seeds: (..., seeds, points) -> (..., points)."""
    cut = values.shape[-2] // 4
    return np.sort(values, axis=-2)[..., cut : values.shape[-2] - cut, :].mean(axis=-2)


def draw(axes: plt.Axes, name: str, colour: str, limit: int) -> None:
    """Every seed up to its end, with a dot if it solved the task; and the interquartile mean over
    the seeds, with its 95% interval by the bootstrap: the seeds are drawn anew 2,000 times."""
    seeds = read_seeds(name)
    grid = np.linspace(0, limit, 400)
    curves = np.stack([np.interp(grid, ends, means) for ends, means, _ in seeds])  # (seeds, 400)
    draws = np.random.default_rng(0).integers(len(seeds), size=(2000, len(seeds)))
    redrawn = interquartile_mean(curves[draws])  # (2000, 400)
    low, high = np.percentile(redrawn, [2.5, 97.5], axis=0)  # (400,) each
    for ends, means, solved in sorted(seeds, key=lambda seed: not seed[2]):  # black on top
        axes.plot(ends, means, **(SEED if solved else UNSOLVED))
        if solved:
            axes.plot(ends[-1], means[-1], **SOLVED)
    axes.fill_between(grid, low, high, color=colour, alpha=0.3, linewidth=0)
    axes.plot(grid, interquartile_mean(curves), color=colour, linewidth=2)
    axes.set(xlim=(0, limit), ylim=(0, 206), xticks=range(0, limit + 1, limit // 3))
    axes.xaxis.set_major_formatter("{x:,.0f}")


SEED = {"color": "0.6", "linewidth": 0.6}
UNSOLVED = {"color": "black", "linewidth": 0.7}
SOLVED = {"color": "0.3", "marker": "o", "markersize": 3, "linestyle": "", "zorder": 3}


def legend(figure: plt.Figure, colour: str, unsolved: bool) -> None:
    """What draw() draws, below the panels."""
    mean = Line2D([], [], color=colour, linewidth=2), Patch(color=colour, alpha=0.3, linewidth=0)
    entries = {
        "a seed": Line2D([], [], **SEED),
        "a seed that is never solved": Line2D([], [], **UNSOLVED),
        "solved: the seed stops, and counts as 200": Line2D([], [], **SOLVED),
        "interquartile mean, 95% interval": mean,
    }
    if not unsolved:
        del entries["a seed that is never solved"]
    place = {"loc": "outside lower center", "ncols": 2 if unsolved else 3, "frameon": False}
    figure.legend(entries.values(), entries, **place)


def cartpole_all() -> None:
    figure, grid = plt.subplots(2, 3, figsize=(9, 6))
    *singles, share = grid.flat
    for axes, (name, colour) in zip(singles, COLOURS.items()):
        draw(axes, name, colour, limit=150_000 if name == "a2c" else 30_000)
        axes.set_title(f"{name}_cartpole.py" + ", 1 of 32 poles" * (name == "a2c"))
        ends = sorted(ends[-1] if solved else np.inf for ends, _, solved in read_seeds(name))
        share.step([1, *ends], [*range(len(ends) + 1)], where="post", color=colour, label=name)
    share.set(title="seeds that are solved", xscale="log", xlim=(2_000, 10**6))
    share.set(yticks=range(0, len(ends) + 1, 5))
    share.legend(loc="lower right", fontsize="small", handlelength=1)
    for axes in grid[1]:
        axes.set_xlabel("steps in the environments")
    for axes in grid[:, 0]:
        axes.set_ylabel("steps in an episode")
    figure.suptitle(f"CartPole, {len(ends)} seeds: steps in an episode, mean of the last 10")
    legend(figure, "0.4", unsolved=False)
    figure.savefig(RESULTS / "cartpole_all.png")


def zero_init() -> None:
    figure, both = plt.subplots(1, 2, sharey=True, figsize=(9, 4.5))
    for axes, name, start in zip(both, ("dqn", "dqn_book"), ("at zero", "at random (the book)")):
        solved = [solved for _, _, solved in read_seeds(name)]
        draw(axes, name, COLOURS["dqn"], limit=30_000)
        score = f"{sum(solved)} of {len(solved)} seeds solve the task"
        axes.set_title(f"DQN, the output layer starts {start}:\n{score}")
        axes.set_xlabel("steps in the environment")
    both[0].set_ylabel("steps in an episode (mean of the last 10)")
    legend(figure, COLOURS["dqn"], unsolved=True)
    figure.savefig(RESULTS / "zero_init.png")


PICTURES = (network_input, cartpole_gif, cartpole_all, zero_init)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [make.__name__ for make in PICTURES]
    parser.add_argument("names", nargs="*", choices=[[], *names], help="which ones; all by default")
    chosen = parser.parse_args().names
    torch.set_num_threads(1)
    plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                     "grid.alpha": 0.3, "figure.dpi": 110, "figure.constrained_layout.use": True}
    for make in PICTURES:
        if not chosen or make.__name__ in chosen:
            make()
