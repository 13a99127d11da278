"""Times dqn_cartpole.py and a2c_cartpole.py against DQN and A2C of Stable-Baselines3.

    python3 -m venv sb3 && sb3/bin/pip install torch==2.13.0 stable-baselines3==2.9.2
    python benchmarks/cartpole_speed.py --sb3-python sb3/bin/python
    python benchmarks/cartpole_speed.py --sb3-python sb3/bin/python --rounds 1 --results trial

This compares programs as they come, not one implementation of the same arithmetic with another.
What is alike: CartPole with 200 steps an episode, one thread on the CPU, two hidden layers of 32
ReLU units and Adam; DQN with a batch of 32 from the last 10,000 transitions and an update at every
step; A2C with 32 environments and 5 steps. What Stable-Baselines3 does otherwise, it keeps:

    DQN  the reward is 1 a step; y is asked of a target network (never copied to here); the gradient
         is clipped
    A2C  the reward is 1 a step; policy and value have a network each, so twice the arithmetic; the
         32 environments are Python objects, stepped in a loop, where ours are one array

So the ratio of A2C tells more of environments than of learning. How well either side learns is not
compared. The scripts run as a user runs them, curves and all, one seed after the other until the
given number of steps is reached; start-up, evaluation and film are not timed.

The programs take turns, each in a process of its own, so that a busy moment of the machine meets
them all. What counts is the median over the rounds of the ratio within a round. The rows, one a
script and round, go to benchmarks/results/cartpole_speed.csv.
"""

import argparse
import csv
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
STEPS = {"dqn_cartpole": 10_000, "a2c_cartpole": 200_000}  # some ten seconds each


# ---- what is timed: each of these is called in a process of its own ----------------------------


def time_ours(name: str, steps: int) -> dict:
    """Trains with the seeds 0, 1, 2 ..., each until solved, until so many steps are played."""
    import torch

    torch.set_num_threads(1)
    script = importlib.import_module(name)
    played = seconds = seed = 0
    with tempfile.TemporaryDirectory() as folder:
        common = {"device": "cpu", "runs_dir": Path(folder), "eval_episodes": 1}
        while played < steps:
            result = script.train(script.Args(seed=seed, **common))
            played += result["steps"]
            seconds += result["seconds"]
            seed += 1
    return {"steps_per_second": played / seconds, "versions": result["versions"]}


def time_sb3(name: str, steps: int) -> dict:
    """The same algorithm of Stable-Baselines3, in its own environment."""
    import gymnasium
    import stable_baselines3
    import torch
    from stable_baselines3 import A2C, DQN
    from stable_baselines3.common.env_util import make_vec_env

    torch.set_num_threads(1)
    num_envs = 32 if name == "a2c_cartpole" else 1
    envs = make_vec_env("CartPole-v1", num_envs, seed=0, env_kwargs={"max_episode_steps": 200})
    network = {"net_arch": [32, 32], "activation_fn": torch.nn.ReLU}
    common = {"env": envs, "policy_kwargs": network, "gamma": 0.99, "seed": 0, "device": "cpu"}
    if name == "a2c_cartpole":
        losses = {"vf_coef": 0.5, "ent_coef": 0.01, "max_grad_norm": 0.5}
        adam = {"use_rms_prop": False, "learning_rate": 0.01}
        model = A2C("MlpPolicy", n_steps=5, **adam, **losses, **common)
    else:
        memory = {"buffer_size": 10_000, "batch_size": 32, "learning_starts": 32}
        update = {"train_freq": 1, "gradient_steps": 1, "target_update_interval": 10**9}
        explore = {"exploration_initial_eps": 0.5, "exploration_final_eps": 0.01}
        model = DQN("MlpPolicy", learning_rate=1e-4, **memory, **update, **explore, **common)
    start = time.perf_counter()
    model.learn(steps)
    seconds = time.perf_counter() - start
    modules = (stable_baselines3, torch, gymnasium)
    versions = {module.__name__: module.__version__ for module in modules}
    return {"steps_per_second": model.num_timesteps / seconds, "versions": versions}


# ---- the rounds --------------------------------------------------------------------------------


def measure(side: str, name: str, python: Path | str) -> dict:
    """Calls time_ours or time_sb3 in a fresh process; the last line it prints is the result."""
    done = subprocess.run(
        [python, __file__, "--side", side, "--script", name], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise SystemExit(f"{side} {name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sb3-python", type=Path, help="Python that has stable-baselines3")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--side", choices=["ours", "sb3"], help=argparse.SUPPRESS)
    parser.add_argument("--script", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        time_side = time_ours if args.side == "ours" else time_sb3
        print(json.dumps(time_side(args.script, STEPS[args.script])))
        return
    if args.sb3_python is None or not args.sb3_python.is_file():
        parser.error("--sb3-python must name the Python of an environment with stable-baselines3")

    args.results.mkdir(parents=True, exist_ok=True)
    ratios = {name: [] for name in STEPS}
    with (args.results / "cartpole_speed.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["script", "round", "steps_per_second", "sb3_steps_per_second", "ratio"])
        for number in range(args.rounds):
            for name in STEPS:
                ours = measure("ours", name, sys.executable)
                sb3 = measure("sb3", name, args.sb3_python)
                speeds = ours["steps_per_second"], sb3["steps_per_second"]
                ratios[name].append(speeds[0] / speeds[1])
                writer.writerow([name, number, *(round(x, 1) for x in speeds), ratios[name][-1]])
                file.flush()
                print(f"round {number}: {name} {speeds[0]:.0f} steps/s, SB3 {speeds[1]:.0f}")
    print(f"versions: {ours['versions']}, {sb3['versions']}")
    for name, values in ratios.items():
        print(f"{name}.py is {statistics.median(values):.2f} times as fast as Stable-Baselines3")


if __name__ == "__main__":
    main()
