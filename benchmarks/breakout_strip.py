"""Shows side by side what a run of a2c_breakout.py played after so many timesteps.

    python benchmarks/breakout_strip.py runs/seed1 0 1000000 3600000

Each policy, a weight_*.pth of the run's folder, plays whole games from the same seed on; when a
game is over the next begins. Written to benchmarks/results/breakout_strip.gif: every third
decision, 20 of them a second, so four times as fast as the game itself.
"""

import argparse
import json
import sys
from itertools import count
from pathlib import Path

import cv2
import numpy as np
import torch
from breakout_gif import RESULTS, save_gif
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from play_breakout import Game, act, load_network, make_env

EVERY, GAP, HEADING = 3, 12, 36  # decisions; pixels between two screens and above them


def weights_after(run: Path, timesteps: int) -> Path:
    """The file of the weights after so many timesteps."""
    flags = json.loads((run / "args.json").read_text())
    if timesteps == flags["total_timesteps"]:
        return run / "weight_end.pth"
    update, rest = divmod(timesteps, flags["num_envs"] * flags["num_steps"])
    if rest:
        raise ValueError(f"no update of {run} ends after {timesteps} timesteps")
    return run / f"weight_{update}.pth"


def screens(weights: Path, seed: int, num_frames: int) -> list[np.ndarray]:
    """Every third screen, (210, 160, 3) uint8, of the games that a policy plays one by one."""
    env = make_env("BreakoutNoFrameskip-v4", whole_games=True)
    network, frames = load_network(weights, env.action_space.n), []
    for game_seed in count(seed):
        game = Game(env, game_seed, whole=True)
        while game.score is None:
            if len(game.actions) % EVERY == 0:
                frames.append(env.unwrapped.ale.getScreenRGB())
            if len(frames) == num_frames:
                return frames
            game.step(act(network, [game], greedy=False, device="cpu")[0])


def with_heading(screen: np.ndarray, text: str) -> np.ndarray:
    """The screen twice as large, a gap to its right, a line of text above: (456, 332, 3)."""
    screen = screen.repeat(2, axis=0).repeat(2, axis=1)
    panel = np.full((HEADING + screen.shape[0], screen.shape[1] + GAP, 3), 255, np.uint8)
    panel[HEADING:, :-GAP] = screen
    (width, _), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.7, 1)
    place = ((screen.shape[1] - width) // 2, HEADING - 11)
    cv2.putText(panel, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.7, (0, 0, 0), 1, cv2.LINE_AA)
    return panel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("timesteps", type=int, nargs="+", help="such as 0 1000000 3600000")
    parser.add_argument("--seed", type=int, default=10_000, help="of each policy's first game")
    parser.add_argument("--frames", type=int, default=600, help="of the GIF")
    args = parser.parse_args()

    torch.set_num_threads(1)
    columns = []
    try:
        for timesteps in tqdm(args.timesteps, unit="policy"):
            film = screens(weights_after(args.run, timesteps), args.seed, args.frames)
            text = f"{timesteps:,} timesteps"
            columns.append([with_heading(screen, text) for screen in film])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    frames = [np.concatenate(panels, axis=1)[:, :-GAP] for panels in zip(*columns)]
    save_gif(RESULTS / "breakout_strip.gif", frames, fps=20)


if __name__ == "__main__":
    main()
