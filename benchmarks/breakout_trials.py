"""One trial of a change to a2c_breakout.py: trains 3,000,000 timesteps, then plays 30 whole games.

    python benchmarks/breakout_trials.py recipe 1001
    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/breakout_trials.py inside1e-8 1001

docs/results.md has the rule by which the trials are judged. Names, each with a training seed:

    recipe                   the default flags
    outside1e-4              epsilon 1e-4 outside RMSprop's root, as PyTorch has it: sqrt(v) + 1e-4
    inside1e-8               epsilon 1e-8 inside the root, as the paper has it: sqrt(v + 1e-8)
    inside1e-8_lr2           the same, with twice the learning rate
    bootstrap                a game that is cut as idle is worth V of its last state, and not 0

A trial that was stopped (Ctrl-C, SIGTERM) goes on when it is started again; its folder is
runs/trials/NAME_SEED. At its end it prints how it learnt and where it fell, and writes, under
benchmarks/results, its games in training to breakout_trial_NAME_SEED.csv, and the scores of the
games with the seeds 30000 to 30029 to breakout_scores_trial_NAME_SEED.csv.
"""

import argparse
import csv
import re
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import a2c_breakout as a2c  # noqa: E402 (it is found only now, and sets how torch's threads wait)
import torch  # noqa: E402
from breakout_curve import RESULTS, games_of, report  # noqa: E402

TIMESTEPS, GAMES, FIRST_GAME = 3_000_000, 30, 30_000
CUT = "masks[t, i] = not (terminated or truncated)"
BOOTSTRAP = f"""{CUT}
                    if truncated and not terminated and info["game"][1] < 16_000:  # as idle
                        value = network(torch.from_numpy(frames)[None])[0].item()
                        rewards[t, i] = np.sign(rewards[t, i]) + args.gamma * value"""
SIGN = "storage.rewards.sign() if args.clip_rewards else storage.rewards"
MIXED = "torch.where(storage.rewards % 1 == 0, storage.rewards.sign(), storage.rewards)"


class RootRMSprop(torch.optim.Optimizer):
    """The paper's (Mnih et al. 2016, section 4), with epsilon inside the root:

    v <- alpha v + (1 - alpha) g^2,    w <- w - lr g / sqrt(v + eps)
    """

    def __init__(self, parameters, alpha: float, eps: float):
        super().__init__(parameters, {"lr": 0.0, "alpha": alpha, "eps": eps})

    @torch.no_grad()
    def step(self) -> None:
        [group] = self.param_groups
        for weight in group["params"]:
            v = self.state[weight].setdefault("square_avg", torch.zeros_like(weight))
            v.mul_(group["alpha"]).addcmul_(weight.grad, weight.grad, value=1 - group["alpha"])
            weight.addcdiv_(weight.grad, (v + group["eps"]).sqrt_(), value=-group["lr"])


def replace(old: str, new: str) -> None:
    """Changes the script's own text, and has it define its functions again."""
    source = getattr(a2c, "source", None) or Path(a2c.__file__).read_text(encoding="utf-8")
    if source.count(old) != 1:
        raise SystemExit(f"a2c_breakout.py is another one: {old}")
    a2c.source = source.replace(old, new)
    exec(compile(a2c.source, a2c.__file__, "exec"), a2c.__dict__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("seed", type=int)
    args = parser.parse_args()
    match = re.fullmatch(r"(recipe|bootstrap|(outside|inside)([\d.e-]+))(_lr2)?", args.name)
    if not match:
        parser.error(f"no trial has the name {args.name}")
    _, where, eps, twice = match.groups()
    if where == "inside":
        torch.optim.RMSprop = RootRMSprop
    if args.name == "bootstrap":
        replace(CUT, BOOTSTRAP)
        replace(SIGN, MIXED)
    folder = ROOT / "runs" / "trials" / f"{args.name}_{args.seed}"
    for signum in a2c.STOP_SIGNALS:
        signal.signal(signum, a2c.request_stop)
    result = a2c.train(a2c.Args(
        seed=args.seed, total_timesteps=TIMESTEPS, device="cpu", resume=folder,
        rmsprop_eps=float(eps or 1e-5), learning_rate=1.4e-3 if twice else 7e-4,
    ))  # fmt: skip
    if result["timesteps"] < TIMESTEPS:
        sys.exit(130)
    name = f"trial_{args.name}_{args.seed}"
    games = games_of(folder)
    report(name, games)
    with open(RESULTS / f"breakout_{name}.csv", "w", newline="") as file:
        rows = [(args.seed, *map(int, game)) for game in games]
        header = ("seed", "timestep", "score", "length")
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
    scores = [Path(__file__).parent / "breakout_scores.py", name, "--games", f"{GAMES}"]
    scores += ["--seed", f"{FIRST_GAME}", "--weights", folder / "weight_end.pth"]
    subprocess.run([sys.executable, *scores], check=True)


if __name__ == "__main__":
    main()
