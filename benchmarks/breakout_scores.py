"""Scores a policy over 100 whole games and keeps each game's score.

    python benchmarks/breakout_scores.py default_seed1 --weights runs/default_seed1/weight_end.pth

That is `python play_breakout.py --full-games 100 --weights FILE`; the rows go to
benchmarks/results/breakout_scores_<name>.csv. Policies are chosen with --seed 20000, and published with the default
seeds, 10000 to 10099, which choose nothing.
"""

import argparse
import csv
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import play_breakout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="of the file to write")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=play_breakout.Args.seed, help="of the first game")
    parser.add_argument("--games", type=int, default=100)
    parser.add_argument("--greedy", action="store_true", help="the likeliest action in place of a drawn one")
    args = parser.parse_args()

    try:
        result = play_breakout.play(play_breakout.Args(
            weights=args.weights, seed=args.seed, full_games=args.games, greedy=args.greedy, runs_dir=ROOT / "runs",
        ))  # fmt: skip
    except play_breakout.UserError as error:
        sys.exit(f"error: {error}")
    path = ROOT / "benchmarks" / "results" / f"breakout_scores_{args.name}.csv"
    with open(path, "w", newline="") as file:
        rows = [(args.seed + game, f"{score:g}") for game, score in enumerate(result.scores)]
        csv.writer(file, lineterminator="\n").writerows([("seed", "score"), *rows])


if __name__ == "__main__":
    main()
