"""Scores a policy over whole games and keeps each game's score.

    python benchmarks/breakout_scores.py seed1 --weights runs/seed1/weight_end.pth

That is `python play_breakout.py --full-games 100 --weights FILE`; the rows go to
benchmarks/results/breakout_scores_seed1.csv. The published scores are those of the seeds 10000 to
10099, with which no policy is chosen; to choose between policies, use --seed 20000.
"""

import argparse
import csv
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cv2
import play_breakout
import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="ending of the name of the file to write")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--games", type=int, default=100)
    parser.add_argument("--seed", type=int, default=10_000, help="of the first game")
    parser.add_argument("--env-id", default="BreakoutNoFrameskip-v4", help="as in play_breakout.py")
    parser.add_argument("--sticky-actions", type=float, default=0, help="as in play_breakout.py")
    args = parser.parse_args()

    torch.set_num_threads(1)  # as play_breakout.py does where it is started itself
    cv2.setNumThreads(1)
    play_breakout.film = lambda *_, **__: None  # scores alone are wanted
    try:
        result = play_breakout.play(play_breakout.Args(
            weights=args.weights, seed=args.seed, full_games=args.games,
            sticky_actions=args.sticky_actions, env_id=args.env_id, runs_dir=ROOT / "runs",
        ))  # fmt: skip
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    path = ROOT / "benchmarks" / "results" / f"breakout_scores_{args.name}.csv"
    with open(path, "w", newline="") as file:
        rows = [(args.seed + game, f"{score:.0f}") for game, score in enumerate(result["scores"])]
        csv.writer(file, lineterminator="\n").writerows([("seed", "score"), *rows])
    print(f"{path.name}: mean {result['mean']:.1f}, standard deviation {result['std']:.1f}, "
          f"min {result['min']:.0f}, max {result['max']:.0f}")  # fmt: skip


if __name__ == "__main__":
    main()
