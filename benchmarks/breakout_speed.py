"""Times a2c_breakout.py against the A2C of Stable-Baselines3 2.9.2, and shows where its time goes.

    python benchmarks/breakout_speed.py                                  # 5 rounds, some 8 minutes
    python benchmarks/breakout_speed.py --before older/a2c_breakout.py   # and an older file in turn
    python benchmarks/breakout_speed.py --rounds 1 --timesteps 2000 --results trial

Both play BreakoutNoFrameskip-v4 in 16 environments, on the CPU, with one thread of PyTorch for
each core. Stable-Baselines3 has the hyperparameters of its rl-baselines3-zoo for Atari:
make_atari_env, a stack of 4 frames, CnnPolicy, RMSpropTFLike with eps 1e-5, entropy 0.01, value
loss 0.25; but SubprocVecEnv (the zoo's default is DummyVecEnv), and no curves are written.
a2c_breakout.py runs as a user starts it, curves and weights and all.

The programs take turns, each in a process of its own, so that a busy moment of the machine meets
them all; each reports its own timesteps a second, without its start-up. What counts is the median
over the rounds of the ratio to Stable-Baselines3 in the same round. In every round there are also
the raw emulator, four times ale.act per decision on all cores, and the bare network, 6 acting
passes and an update on random frames. One after the other and with nothing around them they would
make 1 / (1/emulator + 1/network) steps a second: what the machine allows.

The first run makes a virtual environment for Stable-Baselines3 in runs/cache/sb3 (or --sb3-python
names one that has it). A row a program and round goes to benchmarks/results/breakout_speed.csv.
"""

import argparse
import csv
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
ENV_ID, NUM_ENVS, NUM_STEPS = "BreakoutNoFrameskip-v4", 16, 5
CORES = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()


# ---- what is timed, each in a process of its own -------------------------------


def time_sb3(timesteps: int) -> dict:
    """Stable-Baselines3, from the first step to the last, in its own virtual environment."""
    import stable_baselines3
    import torch
    from stable_baselines3 import A2C
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
    from stable_baselines3.common.vec_env import SubprocVecEnv, VecFrameStack

    class Clock(BaseCallback):
        def _on_training_start(self) -> None:  # the environments are reset by then
            self.started = time.perf_counter()

        def _on_step(self) -> bool:
            return True

        def _on_training_end(self) -> None:
            self.seconds = time.perf_counter() - self.started

    torch.set_num_threads(CORES)
    env_id = f"ale_py:{ENV_ID}"  # each of its processes has to import ale_py to know the game
    envs = VecFrameStack(make_atari_env(env_id, NUM_ENVS, 1, vec_env_cls=SubprocVecEnv), 4)
    optimizer = {"optimizer_class": RMSpropTFLike, "optimizer_kwargs": {"eps": 1e-5}}
    coefficients = {"ent_coef": 0.01, "vf_coef": 0.25}
    model = A2C("CnnPolicy", envs, policy_kwargs=optimizer, **coefficients, device="cpu", seed=1)
    clock = Clock()
    model.learn(timesteps, callback=clock)
    envs.close()
    version = f"stable_baselines3 {stable_baselines3.__version__}, torch {torch.__version__}"
    return {"steps_per_second": model.num_timesteps / clock.seconds, "version": version}


def time_ours(timesteps: int, script: Path = ROOT / "a2c_breakout.py") -> dict:
    """a2c_breakout.py as a user starts it; it measures its own time."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--num-envs {NUM_ENVS} --device cpu --total-timesteps {timesteps}".split()
        command = [sys.executable, script, *flags, "--runs-dir", folder]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        [result] = Path(folder).glob("*/result.json")
        return {"steps_per_second": json.loads(result.read_text())["steps_per_second"]}


def act_raw(decisions: int) -> float:
    """Seconds that so many decisions of the bare emulator take, games started anew included."""
    import ale_py

    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    ale = ale_py.ALEInterface()
    ale.setFloat("repeat_action_probability", 0.0)
    ale.loadROM(ale_py.roms.get_rom_path("breakout"))
    actions = ale.getMinimalActionSet()
    started = time.perf_counter()
    for decision in range(decisions):
        for _ in range(4):
            ale.act(actions[decision // 3 % len(actions)])
        if ale.game_over():
            ale.reset_game()
    return time.perf_counter() - started


def time_raw_emulator(timesteps: int) -> dict:
    with multiprocessing.Pool(CORES) as pool:
        seconds = pool.map(act_raw, [timesteps // CORES] * CORES, chunksize=1)
    return {"steps_per_second": timesteps / max(seconds)}


def time_bare_network(timesteps: int) -> dict:
    """Nothing but NUM_STEPS + 1 acting passes and an update, over and over."""
    import a2c_breakout as a2c
    import torch

    torch.set_num_threads(CORES)
    frames = torch.randint(256, (NUM_STEPS + 1, NUM_ENVS, 84, 84, 4), dtype=torch.uint8)
    frames = frames.permute(0, 1, 4, 2, 3)
    actions = torch.randint(4, (NUM_STEPS * NUM_ENVS,))
    returns = torch.randn(NUM_STEPS * NUM_ENVS)
    network = a2c.ActorCritic(4)
    optimizer = torch.optim.RMSprop(network.parameters(), 7e-4, 0.99, 1e-5)
    updates = timesteps // (NUM_STEPS * NUM_ENVS)
    for update in range(-2, updates):
        if update == 0:  # the first two only warm up
            started = time.perf_counter()
        with torch.no_grad():
            for t in range(NUM_STEPS + 1):
                network(frames[t])
        losses = a2c.compute_losses(network, frames[:-1].flatten(0, 1), actions, returns)
        optimizer.zero_grad()
        sum(losses).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        optimizer.step()
    return {"steps_per_second": updates * NUM_STEPS * NUM_ENVS / (time.perf_counter() - started)}


PROGRAMS = {
    "stable-baselines3": time_sb3,
    "a2c_breakout.py": time_ours,
    "raw emulator": time_raw_emulator,
    "bare network": time_bare_network,
}


# ---- the rounds ----------------------------------------------------------------


def install_sb3() -> Path:
    """Makes the virtual environment, or finds it complete. Returns its Python."""
    folder = ROOT / "runs" / "cache" / "sb3"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pins = re.sub(r"\[.*?\]", "", (ROOT / "requirements.txt").read_text()).split()
    torch, *others = [pin for pin in pins if re.match("(torch|ale-py|numpy|opencv-python)=", pin)]
    # PyTorch comes first, so that the others cannot choose another one.
    for packages in ([torch], ["stable-baselines3==2.9.2", *others]):
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


def measure(program: str, args: argparse.Namespace) -> dict:
    """Calls one of PROGRAMS in a fresh process; the last line that it prints is the result."""
    python = args.sb3_python if program == "stable-baselines3" else sys.executable
    command = [python, __file__, "--program", program, "--timesteps", str(args.timesteps)]
    command += ["--before", args.before] if program == "before" else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{program} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def report(rows: list[dict], rounds: int) -> None:
    """Medians over the rounds, and medians of the ratios within a round."""
    speed = {(row["round"], row["program"]): row["steps_per_second"] for row in rows}
    print(f"\n{rounds} rounds, {CORES} cores, medians in steps/s:")
    for program in dict.fromkeys(row["program"] for row in rows):
        print(f"  {program:18} {statistics.median(speed[n, program] for n in range(rounds)):6.0f}")
    ours = [speed[n, "a2c_breakout.py"] for n in range(rounds)]
    ratios = [ours[n] / speed[n, "stable-baselines3"] for n in range(rounds)]
    shares = [ours[n] * (1 / speed[n, "raw emulator"] + 1 / speed[n, "bare network"])
              for n in range(rounds)]  # fmt: skip
    lines = [("times Stable-Baselines3", ratios), ("of what is possible", shares)]
    if (0, "before") in speed:
        older = [ours[n] / speed[n, "before"] for n in range(rounds)]
        lines.append(("times the file before", older))
    for what, values in lines:
        every = ", ".join(f"{value:.2f}" for value in values)
        print(f"a2c_breakout.py makes {statistics.median(values):.2f} {what} ({every})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--timesteps", type=int, default=16_000, help="of each run")
    parser.add_argument("--before", type=Path, help="an older a2c_breakout.py, timed in turn")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--sb3-python", help="a Python that has stable-baselines3 2.9.2")
    parser.add_argument("--program", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.program:
        before = partial(time_ours, script=args.before)
        print(json.dumps((PROGRAMS | {"before": before})[args.program](args.timesteps)))
        return

    args.sb3_python = args.sb3_python or install_sb3()
    args.results.mkdir(parents=True, exist_ok=True)
    path, rows = args.results / "breakout_speed.csv", []
    programs = [*["before"] * (args.before is not None), *reversed(PROGRAMS)]
    with path.open("w", newline="") as file:
        columns = ["round", "program", "steps_per_second", "version"]
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for number in range(args.rounds):
            programs.reverse()  # who comes after whom may matter
            for program in programs:
                rows.append({"round": number, "program": program} | measure(program, args))
                writer.writerow(rows[-1])
                file.flush()
                speed = rows[-1]["steps_per_second"]
                print(f"round {number}: {program}, {speed:.0f} steps/s", flush=True)
    report(rows, args.rounds)


if __name__ == "__main__":
    main()
