"""Trains A2C of Stable-Baselines3 2.9.2 as its zoo does, and scores it over whole games.

    python3 -m venv sb3 && sb3/bin/pip install torch==2.13.0
    sb3/bin/pip install stable-baselines3==2.9.2 ale-py==0.12.1 opencv-python==5.0.0.93
    sb3/bin/python benchmarks/breakout_sb3.py --timesteps 3600000 --seed 1

What a user gets who takes the library: the settings of rl-baselines3-zoo for Atari (16 environments
in a DummyVecEnv, CnnPolicy, RMSpropTFLike with eps 1e-5, entropy 0.01, value loss 0.25, a constant
rate of 7e-4), one thread. Every 100,000 timesteps the model is saved in --folder; the same command
goes on from there, with new games, as the library does not save environments.

The score is that of 100 whole games with the seeds 10000 to 10099, sampled actions, 65,536 frames
at most, as in play_breakout.py. But the library's own wrappers stay, since the policy was trained
with them: FIRE is pressed when a life begins, and the screens turn gray after the maximum of two.
The rows go to benchmarks/results/breakout_scores_sb3_seed1.csv.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
import torch
from stable_baselines3 import A2C
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.vec_env import VecFrameStack

ROOT = Path(__file__).resolve().parent.parent
ENV_ID = "ale_py:BreakoutNoFrameskip-v4"
PART = 100_000  # timesteps between two saves


def train(timesteps: int, seed: int, folder: Path) -> A2C:
    """Trains to the end, from the last save if there is one."""
    envs, path = VecFrameStack(make_atari_env(ENV_ID, 16, seed), 4), folder / "model.zip"
    if path.exists():
        model = A2C.load(path, envs, device="cpu")
    else:
        optimizer = {"optimizer_class": RMSpropTFLike, "optimizer_kwargs": {"eps": 1e-5}}
        model = A2C("CnnPolicy", envs, policy_kwargs=optimizer, ent_coef=0.01, vf_coef=0.25,
                    seed=seed, device="cpu")  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    while model.num_timesteps < timesteps:
        part = min(PART, timesteps - model.num_timesteps)
        model.learn(part, reset_num_timesteps=False)
        model.save(folder / "part.zip")
        (folder / "part.zip").replace(path)
        scores = [info["r"] for info in model.ep_info_buffer] or [np.nan]
        print(f"{model.num_timesteps} timesteps, last 100 games: {np.mean(scores):.1f}", flush=True)
    envs.close()
    return model


def play(model: A2C, seed: int) -> float:
    """The score of a whole game: the library's Monitor counts it beneath the wrapper of lives."""
    options = {"max_num_frames_per_episode": 65_536}
    env = VecFrameStack(make_atari_env(ENV_ID, 1, seed, env_kwargs=options), 4)
    torch.manual_seed(seed)
    observations = env.reset()
    while True:
        actions, _ = model.predict(observations, deterministic=False)
        observations, _, _, [info] = env.step(actions)
        if "episode" in info:
            env.close()
            return info["episode"]["r"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--timesteps", type=int, default=3_600_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--games", type=int, default=100)
    parser.add_argument("--folder", type=Path, help="of the saves; by default runs/sb3_seed1")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = train(args.timesteps, args.seed, args.folder or ROOT / f"runs/sb3_seed{args.seed}")
    rows = [(seed, f"{play(model, seed):g}") for seed in range(10_000, 10_000 + args.games)]
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / f"breakout_scores_sb3_seed{args.seed}.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("seed", "score"), *rows])
    scores = [float(score) for _, score in rows]
    print(f"{path.name}: mean {np.mean(scores):.1f}, standard deviation {np.std(scores):.1f}, "
          f"min {min(scores):g}, max {max(scores):g}")  # fmt: skip


if __name__ == "__main__":
    main()
