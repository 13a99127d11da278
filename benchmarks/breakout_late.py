"""Makes the folder of a run that goes on from the middle of another one, with another cut.

    python benchmarks/breakout_late.py runs/idle500_seed1 100000 runs/late_400 --max-idle-steps 400
    python a2c_breakout.py --resume runs/late_400

What the last part of a run does differently is seen without its first part being made again: the
new run has the old one's flags, so its learning rate falls from where it was after that update.
The weights are those that the old run saved then, the average of its last updates. RMSprop's means
and the games come from its last checkpoint, as no others are kept.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import a2c_breakout
import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run with checkpoint.pth")
    parser.add_argument("update", type=int, help="of the weights to begin with, weight_*.pth")
    parser.add_argument("folder", type=Path, help="to make")
    parser.add_argument("--max-idle-steps", type=int, required=True)
    args = parser.parse_args()

    try:
        checkpoint = torch.load(args.run / "checkpoint.pth", "cpu", weights_only=True)
        weights = torch.load(args.run / f"weight_{args.update}.pth", "cpu", weights_only=True)
        flags = json.loads((args.run / "args.json").read_text())
        args.folder.mkdir(parents=True)
    except OSError as error:
        sys.exit(f"error: {error}")
    for part in ("network", "averaged"):
        for name, weight in weights.items():
            checkpoint[part][name].copy_(weight)  # keeps the layout in memory
    progress = checkpoint["progress"]
    timesteps = args.update * flags["num_envs"] * flags["num_steps"]
    progress["seconds"] *= timesteps / progress["timesteps"]
    progress |= {"timesteps": timesteps, "games": 0, "last_scores": [], "to_log": []}
    a2c_breakout.save(args.folder / "checkpoint.pth", checkpoint)
    a2c_breakout.save(args.folder / "args.json", flags | {"max_idle_steps": args.max_idle_steps})


if __name__ == "__main__":
    main()
