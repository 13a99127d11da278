"""Makes the pictures of the documents: what the network sees, and what CartPole's scripts learn.

    python benchmarks/pictures.py

In benchmarks/results/, the last two from the files that cartpole_seeds.py left there:

    network_input.png   a screen of Breakout, and the four frames that the network sees then
    cartpole.gif        the film of a run of dqn_cartpole.py
    cartpole_all.png    how the episodes of the five CartPole scripts grow longer
    zero_init.png       DQN with an output layer that starts at zero, and with a random one
"""

import csv
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import cv2
import imageio.v2 as imageio
import numpy as np
from breakout_gif import RESULTS, save_gif
from cartpole_seeds import mean_of_last_ten, plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dqn_cartpole
from play_breakout import PRETRAINED, Game, act, load_network, make_env

COLOURS = {"dqn": "C0", "ddqn": "C1", "dueling": "C2", "per": "C3", "a2c": "C4"}


def network_input() -> None:
    env = make_env("BreakoutNoFrameskip-v4", whole_games=True)
    network, game = load_network(PRETRAINED, env.action_space.n), Game(env, 10_000, whole=True)
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


def read_episodes(name: str) -> list[list[int]]:
    """The steps of each episode, a list for each seed."""
    episodes = defaultdict(list)
    with open(RESULTS / f"cartpole_{name}_episodes.csv") as file:
        for row in csv.DictReader(file):
            episodes[row["seed"]].append(int(row["steps"]))
    return list(episodes.values())


def draw(axes: plt.Axes, seeds: list[list[int]], colour: str, band: bool = True) -> None:
    """The mean of the last 10 episodes: its median over the seeds, and the quartiles.

    After the end of the training the length of the last episode is kept.
    """
    length = max(map(len, seeds)) + 10
    padded = [steps + steps[-1:] * (length - len(steps)) for steps in seeds]
    means = np.stack([mean_of_last_ten(steps, length) for steps in padded])
    low, median, high = np.percentile(means, [25, 50, 75], axis=0)  # (episodes,) each
    axes.plot(median, color=colour, linewidth=2, label="median, quartiles")
    if band:
        axes.fill_between(range(len(median)), low, high, color=colour, alpha=0.25, linewidth=0)


def cartpole_all() -> None:
    figure, grid = plt.subplots(2, 3, sharex=True, sharey=True, figsize=(9, 5.6))
    *singles, together = grid.flat
    for axes, (script, colour) in zip(singles, COLOURS.items()):
        seeds = read_episodes(script)
        draw(axes, seeds, colour)
        draw(together, seeds, colour, band=False)
        axes.set_title(f"{script}_cartpole.py" + ", 1 of 32 envs" * (script == "a2c"))
    together.set(title="the five medians", xlim=(0, 200), ylim=(0, 205))
    figure.suptitle(f"CartPole: steps in an episode, median and quartiles of {len(seeds)} seeds")
    figure.supxlabel("episode")
    figure.supylabel("steps (mean of the last 10 episodes)")
    figure.savefig(RESULTS / "cartpole_all.png")


def zero_init() -> None:
    figure, both = plt.subplots(1, 2, sharex=True, sharey=True, figsize=(9, 4.5))
    for axes, name, start in zip(both, ("dqn", "dqn_book"), ("at zero", "at random (the book)")):
        seeds = read_episodes(name)
        solved = [min(steps[-10:]) >= dqn_cartpole.SUCCESS_STEPS for steps in seeds]
        for steps, good in sorted(zip(seeds, solved), key=lambda pair: pair[1]):
            label = "one seed" if good else "never solved"
            axes.plot(mean_of_last_ten(steps, len(steps)), label=label,
                      color="0.6" if good else "black", linewidth=0.7)  # fmt: skip
        draw(axes, seeds, COLOURS["dqn"])
        score = f"{sum(solved)} of {len(seeds)} seeds solve the task"
        axes.set_title(f"DQN, the output layer starts {start}:\n{score}")
    handles = dict(zip(*both[1].get_legend_handles_labels()[::-1]))  # each label once
    both[1].legend(handles.values(), handles, loc="center right")
    both[0].set(xlim=(0, 500), ylim=(0, 205))
    figure.supxlabel("episode")
    figure.supylabel("steps (mean of the last 10 episodes)")
    figure.savefig(RESULTS / "zero_init.png")


if __name__ == "__main__":
    plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                     "grid.alpha": 0.3, "figure.dpi": 110, "figure.constrained_layout.use": True}
    network_input()
    cartpole_gif()
    cartpole_all()
    zero_init()
