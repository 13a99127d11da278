"""Shows side by side what a run of a2c_breakout.py played after so many timesteps.

    python benchmarks/breakout_strip.py runs/seed1 0 1080000 3600000

Each policy, a weight_*.pth of the run's folder, plays ten whole games, seeds 10000 to 10009. Shown
is the one with the fifth best score, a median, from its first decision to its last, so that nobody
picks a game. A game that is over stays on its last screen until the longest is over as well.
Written to benchmarks/results/breakout_strip.gif: 600 frames, 20 of them a second, and as many
decisions between two of them as that takes.
"""

import argparse
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import torch
from breakout_gif import RESULTS, save_gif
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from play_breakout import Game, act, load_network, make_env

GAP, HEADING = 12, 36  # pixels between two screens and above them


def weights_after(run: Path, timesteps: int) -> Path:
    """The file of the weights after so many timesteps."""
    flags = json.loads((run / "args.json").read_text())
    if timesteps == flags["total_timesteps"]:
        return run / "weight_end.pth"
    update, rest = divmod(timesteps, flags["num_envs"] * flags["num_steps"])
    if rest:
        raise ValueError(f"no update of {run} ends after {timesteps} timesteps")
    return run / f"weight_{update}.pth"


def median_game(weights: Path, seeds: range) -> list[np.ndarray]:
    """All screens, (210, 160, 3) uint8, of the game whose score is in the middle."""
    env = make_env("BreakoutNoFrameskip-v4", whole_games=True)
    network, games = load_network(weights, env), []
    for seed in seeds:
        game = Game(env, seed, whole=True)
        while game.score is None:
            game.step(act(network, [game], greedy=False, device="cpu")[0])
        games.append(game)
    shown = sorted(games, key=lambda game: -game.score)[(len(games) - 1) // 2]
    again, screens = Game(env, shown.seed, whole=True), []
    for action in shown.actions:
        screens.append(env.unwrapped.ale.getScreenRGB())
        again.step(action)
    print(f"{weights}: seed {shown.seed}, score {shown.score:g}, {len(screens)} decisions")
    return screens


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
    parser.add_argument("timesteps", type=int, nargs="+", help="such as 0 1080000 3600000")
    parser.add_argument("--seed", type=int, default=10_000, help="of each policy's first game")
    parser.add_argument("--games", type=int, default=10, help="of each policy")
    parser.add_argument("--frames", type=int, default=600, help="of the GIF")
    args = parser.parse_args()

    torch.set_num_threads(1)
    seeds = range(args.seed, args.seed + args.games)
    try:
        films = [median_game(weights_after(args.run, t), seeds) for t in tqdm(args.timesteps)]
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    moments = np.linspace(0, max(map(len, films)) - 1, args.frames).astype(int)
    headings = [f"{timesteps:,} timesteps" for timesteps in args.timesteps]
    frames = []
    for moment in moments:
        screens = [film[min(moment, len(film) - 1)] for film in films]
        panels = [with_heading(screen, text) for screen, text in zip(screens, headings)]
        frames.append(np.concatenate(panels, axis=1)[:, :-GAP])
    save_gif(RESULTS / "breakout_strip.gif", frames, fps=20)


if __name__ == "__main__":
    main()
