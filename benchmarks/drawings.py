"""Draws what the lessons explain. The words in the pictures are names of the code alone, so that
one picture serves both languages.

    python benchmarks/drawings.py

In benchmarks/results/:

    replay_memory.png   a replay memory, and a batch drawn from it
    double_dqn.png      the two networks of Double DQN and their target
    dueling.png         how V and A make Q
    rollout.png         five steps of 32 poles, and the rewards in each of the five returns
    wrappers.png        from the Atari's screen to what the network sees
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # pictures go to files: no display is needed
import cv2
import matplotlib.pyplot as plt
import numpy as np
import torch
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from matplotlib.patches import FancyBboxPatch, Rectangle

RESULTS = Path(__file__).resolve().parent / "results"
sys.path.insert(0, str(RESULTS.parent.parent))
import a2c_breakout
import dqn_cartpole

GRAY, BLUE, ORANGE, GREEN, RED = "0.45", "#3b78b5", "#e08a1e", "#5a9e4b", "#c8403a"
CODE = {"family": "monospace", "fontsize": 10}


def canvas(width: float, height: float) -> plt.Axes:
    """Axes without frame; a unit is an inch, (0, 0) is at the lower left."""
    figure = plt.figure(figsize=(width, height), dpi=130)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return axes


def text(axes: plt.Axes, x: float, y: float, words: str, **style) -> None:
    axes.text(x, y, words, **{"ha": "center", "va": "center", "fontsize": 11} | style)


def box(axes: plt.Axes, x, y, width, height, colour="white", edge=GRAY, **style) -> None:
    axes.add_patch(Rectangle((x, y), width, height, fc=colour, ec=edge, **style))


def rounded(axes: plt.Axes, x, y, width, height, edge=GRAY) -> None:
    style = {"boxstyle": "round,pad=0,rounding_size=0.12", "fc": "white", "lw": 1.4}
    axes.add_patch(FancyBboxPatch((x, y), width, height, ec=edge, **style))


def arrow(axes: plt.Axes, start, end, colour=GRAY, **style) -> None:
    arrow_style = {"arrowstyle": "-|>", "color": colour, "lw": 1.4, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=arrow_style | style)


def bars(axes: plt.Axes, x, y, values, labels, colours, width=0.4, gap=0.22) -> None:
    """One bar for each value, on a line at height y: the value at its end, the label below all."""
    scale, below = 1.4, y - (0.16 if min(values) >= 0 else 0.46)
    for i, (value, label, colour) in enumerate(zip(values, labels, colours)):
        left, end = x + i * (width + gap), y + value * scale
        box(axes, left, y, width, value * scale, colour, colour)
        number = f"{value:.2f}".replace("-", "\N{MINUS SIGN}")
        text(axes, left + width / 2, end + (0.12 if value >= 0 else -0.12), number, fontsize=9)
        text(axes, left + width / 2, below, label, fontsize=10)
    axes.plot([x - 0.1, x + len(values) * (width + gap) - gap + 0.1], [y, y], color=GRAY, lw=1)


def replay_memory() -> None:
    """A cell is a transition, in the colour of the pole's lean; a black foot ends an episode."""
    env, rng = dqn_cartpole.make_env(), np.random.default_rng(0)
    env.reset(seed=1)
    leans, ends = [], []
    while len(leans) < 10_019:  # a memory of 10,000 is full, and its oldest rows are overwritten
        state, done = env.reset()[0], False
        while not done:
            next_state, _, terminated, truncated, _ = env.step(int(rng.integers(2)))
            done = terminated or truncated
            leans.append(state[2])
            ends.append(done)
            state = next_state
    axes = canvas(10, 2.9)
    shown, newest, left, size = 56, 19, 0.45, 0.16  # rows 0 to 18 hold the newest transitions
    pushes = [row + 10_000 if row < newest else row for row in range(shown)]

    def cell(x: float, y: float, width: float, push: int) -> None:
        lean = leans[push]
        box(axes, x, y, width, 0.5, plt.get_cmap("coolwarm")(0.5 + 2.2 * lean), "white", lw=0.6)
        foot = np.array([x + width / 2, y + 0.09])
        top = foot + 0.33 * np.array([np.sin(2 * lean), np.cos(2 * lean)])
        axes.plot(*zip(foot, top), color="black", lw=1.3, solid_capstyle="round")

    for row, push in enumerate(pushes):
        cell(left + row * size, 1.75, size, push)
        if ends[push]:
            box(axes, left + row * size, 1.66, size, 0.05, "black", "black", linewidth=0)
    text(axes, left + shown * size + 0.2, 2.0, "...")
    pushed = left + (newest + 0.5) * size
    arrow(axes, (pushed, 2.65), (pushed, 2.29), RED)
    text(axes, pushed + 0.12, 2.6, "memory.push(state, action, reward, next_state, done)",
         ha="left", color=RED, **CODE)  # fmt: skip
    for i, row in enumerate(rng.permutation(range(2, shown, 5))):
        x = 3.1 + i * 0.34
        cell(x, 0.3, 0.3, pushes[row])
        arrow(axes, (left + (row + 0.5) * size, 1.62), (x + 0.15, 0.86), "0.7", lw=0.8)
    text(axes, x + 0.5, 0.55, "...")
    text(axes, 2.95, 0.55, "batch = memory.sample(32)", ha="right", color=BLUE, **CODE)
    axes.figure.savefig(RESULTS / "replay_memory.png")


def double_dqn() -> None:
    axes = canvas(9.2, 3.3)
    text(axes, 0.35, 1.65, "$s'$", fontsize=15)
    for y, name, edge in ((2.0, "network", BLUE), (0.35, "target_network", ORANGE)):
        rounded(axes, 1.2, y, 2.0, 0.9, edge)
        text(axes, 2.2, y + 0.45, name, color=edge, **CODE)
        arrow(axes, (0.6, 1.65), (1.15, y + 0.45))
        arrow(axes, (3.25, y + 0.45), (3.75, y + 0.45))
    arrow(axes, (2.2, 1.96), (2.2, 1.29), ls="--")
    text(axes, 2.3, 1.63, "load_state_dict", ha="left", color=GRAY, **CODE)
    labels = ["$Q(s',0)$", "$Q(s',1)$"]
    bars(axes, 4.1, 2.1, [0.31, 0.42], labels, ["0.75", BLUE], 0.5, 0.5)
    labels = [r"$Q_{\mathrm{target}}(s',0)$", r"$Q_{\mathrm{target}}(s',1)$"]
    bars(axes, 4.1, 0.45, [0.36, 0.27], labels, ["0.75", ORANGE], 0.5, 0.5)
    arrow(axes, (5.75, 2.4), (6.25, 2.4), BLUE)
    text(axes, 6.35, 2.4, r"$a^* = \mathrm{argmax}_{a'}\, Q(s', a') = 1$", ha="left", color=BLUE)
    arrow(axes, (6.5, 2.18), (5.42, 1.12), BLUE, connectionstyle="arc3,rad=-0.25")
    arrow(axes, (5.75, 0.65), (6.25, 0.65), ORANGE)
    text(axes, 6.35, 0.65, r"$y = r + \gamma \cdot 0.27$", ha="left", fontsize=13, color=ORANGE)
    axes.figure.savefig(RESULTS / "double_dqn.png")


def dueling() -> None:
    axes = canvas(9.6, 3.2)
    text(axes, 0.3, 1.6, "$s$", fontsize=15)
    rounded(axes, 0.85, 1.15, 1.1, 0.9)
    text(axes, 1.4, 1.6, "fc1\nfc2", color=GRAY, **CODE)
    arrow(axes, (0.45, 1.6), (0.8, 1.6))
    for y, name, edge in ((2.15, "fc3_value", GREEN), (0.4, "fc3_advantage", ORANGE)):
        rounded(axes, 2.6, y, 1.55, 0.7, edge)
        text(axes, 3.37, y + 0.35, name, color=edge, **CODE)
        arrow(axes, (2.0, 1.6), (2.55, y + 0.35))
        arrow(axes, (4.2, y + 0.35), (4.6, y + 0.35))
    bars(axes, 4.85, 2.2, [0.40], ["$V(s)$"], [GREEN])
    bars(axes, 4.85, 0.72, [0.30, -0.10], ["$A(s,0)$", "$A(s,1)$"], [ORANGE, ORANGE])
    axes.plot([4.75, 6.0], [0.86] * 2, color=RED, lw=1.2, ls="--")
    mean = r"$\mathrm{mean}_{a'}\, A(s,a') = 0.10$"
    text(axes, 6.05, 0.86, mean, ha="left", fontsize=10, color=RED)
    text(axes, 6.55, 1.6, r"$V + A - \mathrm{mean}\, A$", fontsize=11)
    arrow(axes, (5.4, 2.4), (5.9, 1.8))
    arrow(axes, (5.5, 1.2), (5.9, 1.4))
    arrow(axes, (7.25, 1.6), (7.65, 1.6))
    bars(axes, 7.9, 1.15, [0.60, 0.20], ["$Q(s,0)$", "$Q(s,1)$"], [BLUE, BLUE])
    axes.plot([7.8, 9.05], [1.15 + 0.56] * 2, color=GREEN, lw=1.2, ls="--")
    text(axes, 9.1, 1.71, "$V(s)$", ha="left", fontsize=10, color=GREEN)
    axes.figure.savefig(RESULTS / "dueling.png")


def rollout() -> None:
    """Where episodes end is real: 32 poles pushed at random, from their 16th to their 20th step."""
    torch.manual_seed(0)
    poles, ends, decisions = CartPoleVectorEnv(32, max_episode_steps=200), [], []
    poles.reset(seed=0)
    for _ in range(20):
        _, ones, terminated, truncated, _ = poles.step(torch.randint(2, (32,)).numpy())
        ends.append(torch.from_numpy(terminated | truncated))
        decisions.append(torch.from_numpy(ones > 0))
    dones, decided = torch.stack(ends[15:]), torch.stack(decisions[15:])  # (5, 32) both
    axes = canvas(10, 5.5)
    top, height, green = 5.05, 0.15, "#cfe3c8"
    reset = {"hatch": "////", "linewidth": 0.5}

    def row(n: int) -> float:
        return top - n * height

    for t in range(5):
        text(axes, 0.9 + t * 0.3, 5.33, str(t), fontsize=9, color=GRAY)
        for n in range(32):
            colour = RED if dones[t, n] else green
            style = {"linewidth": 0.5} if decided[t, n] else reset | {"fc": "white"}
            axes.add_patch(Rectangle((0.75 + t * 0.3, row(n)), 0.3, height,
                                     **{"fc": colour, "ec": "0.6"} | style))  # fmt: skip
    text(axes, 0.6, 5.33, "t", color=GRAY, style="italic")
    text(axes, 1.5, 0.2, "num_steps = 5", **CODE)
    text(axes, 0.3, 2.8, "num_envs = 32", rotation=90, **CODE)

    def returns(n: int, y: float, end: int) -> None:
        """R_0 to R_4 of pole n, below y; its episode ends in step `end`, 5 if it goes on."""
        for corner, to in ((row(n) + height, y + 0.36), (row(n), y - 4 * 0.44)):
            axes.plot([2.27, 2.75], [corner, to], color="0.6", lw=0.7)
        axes.plot([2.75, 2.75], [y + 0.36, y - 4 * 0.44], color="0.6", lw=0.7)
        for t in range(5):
            at = y - t * 0.44
            if t == end + 1:  # the step that resets the pole
                box(axes, 3.55, at, 5.95, 0.36, "white", "0.6", **reset)
                continue
            text(axes, 3.1, at + 0.18, f"$R_{t}$ =", fontsize=12)
            for k in range(t, end + 1 if t <= end else 6):
                discount = ["", r"\gamma\, ", *(rf"\gamma^{i}\, " for i in range(2, 6))][k - t]
                what, colour = (f"r_{k}", RED if k == end else green) if k < 5 else ("V(s_5)", BLUE)
                width = 0.85 if k < 5 else 1.2
                box(axes, 3.55 + k * 0.95, at, width, 0.36, colour, "none")
                text(axes, 3.55 + k * 0.95 + width / 2, at + 0.18, f"${discount}{what}$",
                     color="black" if colour == green else "white")  # fmt: skip

    goes_on = decided.all(0) & ~dones.any(0)  # (32,)
    returns(int(goes_on.nonzero()[6]), 4.84, 5)
    returns(int(dones[2].nonzero()[0]), 2.16, 2)
    axes.figure.savefig(RESULTS / "rollout.png")


def wrappers() -> None:
    env = a2c_breakout.make_env("BreakoutNoFrameskip-v4")
    ale, rng = env.unwrapped.ale, np.random.default_rng(0)
    env.reset(seed=2)
    ball = np.zeros(4)
    while ball.min() < 60:  # in all four frames it is between the wall and the paddle
        _, _, terminated, truncated, _ = env.step(int(rng.choice([1, 2, 3])))
        if terminated or truncated:
            env.reset()
        ball = env.frames[:, 41:72, 8:76].max(axis=(1, 2))
    before, screens, grays = ale.cloneState(), [], []
    for _ in range(4):
        ale.act(0)
        screens.append(ale.getScreenRGB())
        grays.append(ale.getScreenGrayscale().reshape(210, 160))
    ale.restoreState(before)
    env.step(0)
    gray = np.maximum(*grays[2:])
    assert (cv2.resize(gray, (84, 84), interpolation=cv2.INTER_AREA) == env.frames[-1]).all()

    axes = canvas(10.2, 4)
    layer = iter(range(2, 100))  # what is drawn later covers what was drawn before

    def show(image: np.ndarray, x: float, y: float, edge: str) -> None:
        height, width = (0.01 * size for size in image.shape[:2])  # inches
        area, order = (x, x + width, y, y + height), next(layer)
        axes.imshow(image, cmap="gray", vmin=0, vmax=255, extent=area, aspect="auto", zorder=order)
        box(axes, x, y, width, height, "none", edge, linewidth=1.5, zorder=order)

    for i, screen in enumerate(screens):
        show(screen, 0.25 + i * 0.38, 1.35 - i * 0.24, ORANGE if i >= 2 else "white")
    show(gray, 3.75, 1.0, ORANGE)
    show(env.frames[-1], 6.15, 1.63, "white")
    for i, frame in enumerate(env.frames):
        show(frame, 7.65 + i * 0.52, 2.35 - i * 0.48, "white")
    for x, name in ((3.37, "MaxAndSkip"), (5.75, "Warp"), (7.32, "FrameStack")):
        text(axes, x, 3.75, name, color=BLUE, **CODE)
        arrow(axes, (x - 0.25, 2.05), (x + 0.25, 2.05), BLUE)
    shapes = [(1.6, "4 × (210, 160, 3)"), (4.55, "(210, 160)"), (6.57, "(84, 84)")]
    for x, shape in [*shapes, (8.85, "(4, 84, 84)")]:
        text(axes, x, 0.3, shape, **CODE)
    axes.set(xlim=(0, 10.2), ylim=(0, 4))  # imshow has changed them
    axes.figure.savefig(RESULTS / "wrappers.png")


if __name__ == "__main__":
    replay_memory()
    double_dqn()
    dueling()
    rollout()
    wrappers()
