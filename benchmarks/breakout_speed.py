"""Times a2c_breakout.py against the A2C of Stable-Baselines3 2.9.2, and shows where its time goes.

    python benchmarks/breakout_speed.py                                  # 3 rounds, some 10 minutes
    python benchmarks/breakout_speed.py --rounds 5 --timesteps 100000
    python benchmarks/breakout_speed.py --rounds 1 --timesteps 2000 --results trial

Both play BreakoutNoFrameskip-v4 in 16 environments, on the CPU, with one thread of PyTorch for
each core. Stable-Baselines3 runs as its rl-baselines3-zoo does for Atari: make_atari_env,
SubprocVecEnv, a stack of 4 frames, CnnPolicy, RMSpropTFLike with eps 1e-5, entropy 0.01, value
loss 0.25, no curves written. a2c_breakout.py runs as a user starts it, curves and weights and
all. The first run makes a virtual environment for Stable-Baselines3 in runs/cache/sb3, with the
pins of requirements.txt.

The programs take turns, each a process of its own, so that a busy moment of the machine meets
them all; each reports its own timesteps a second, without its start-up. What counts is the median
over the rounds of the ratio to Stable-Baselines3 in the same round. In every round there are also

- a2c_breakout.py with a stopwatch in it: the shares of the emulator, of the acting passes (with
  the sixth, for the last value, and the returns), of the update, and of all the rest;
- the emulator alone (the 16 environments in their worker processes, random actions) and the
  network alone (6 acting passes and an update on random frames), both with all cores. One after
  the other and with no other work they would reach 1 / (1/emulator + 1/network): the bound. What
  a2c_breakout.py reaches of it, in the same round, shows how much its loop costs.

With --bf16, which is on by default where the processor has bfloat16 instructions, all that is
about a2c_breakout.py is done with its --bf16 too. One row a program and round in
benchmarks/results/breakout_speed.csv.
"""

import argparse
import csv
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
ENV_ID, NUM_ENVS, NUM_STEPS = "BreakoutNoFrameskip-v4", 16, 5
CORES = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
SB3, OURS = "stable-baselines3", "a2c_breakout.py"
PARTS = ["emulator", "acting", "update", "rest"]


# ---- what is timed: each of these is called in a process of its own ----------------------------


def time_sb3(timesteps: int, bf16: bool) -> dict:
    """Stable-Baselines3, from the first step to the last, in its own virtual environment."""
    import ale_py
    import gymnasium
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
    envs = make_atari_env(env_id, NUM_ENVS, seed=1, vec_env_cls=SubprocVecEnv)
    envs = VecFrameStack(envs, n_stack=4)
    optimizer = {"optimizer_class": RMSpropTFLike, "optimizer_kwargs": {"eps": 1e-5}}
    coefficients = {"ent_coef": 0.01, "vf_coef": 0.25}
    model = A2C("CnnPolicy", envs, policy_kwargs=optimizer, **coefficients, device="cpu", seed=1)
    clock = Clock()
    model.learn(timesteps, callback=clock)
    envs.close()
    modules = (stable_baselines3, gymnasium, ale_py, torch)
    versions = {module.__name__: module.__version__ for module in modules}
    return {"steps_per_second": model.num_timesteps / clock.seconds, "versions": versions}


def time_ours(timesteps: int, bf16: bool) -> dict:
    """a2c_breakout.py as a user starts it; it measures its own time."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [
            "--total-timesteps",
            timesteps,
            "--num-envs",
            NUM_ENVS,
            "--device",
            "cpu",
            "--runs-dir",
            folder,
        ]
        command = [sys.executable, ROOT / "a2c_breakout.py", *flags, *["--bf16"][:bf16]]
        subprocess.run([str(word) for word in command], stdout=subprocess.DEVNULL, check=True)
        (result,) = Path(folder).glob("*/result.json")
        return json.loads(result.read_text())


def time_parts(timesteps: int, bf16: bool) -> dict:
    """a2c_breakout.py again, with a stopwatch around the calls in its loop."""
    import a2c_breakout
    import torch

    seconds, last = dict.fromkeys(PARTS, 0.0), None

    def lap(part: str) -> None:  # the time since the last lap belongs to this part
        nonlocal last
        now = time.perf_counter()
        seconds[part] += 0 if last is None else now - last
        last = now

    def watch(owner, name: str, before: str, after: str) -> None:
        function = getattr(owner, name)

        def watched(*args, **kwargs):
            lap(before)
            result = function(*args, **kwargs)
            lap(after)
            return result

        setattr(owner, name, watched)

    watch(a2c_breakout, "act", "rest", "acting")
    watch(a2c_breakout.ParallelEnvs, "step", "rest", "emulator")
    watch(a2c_breakout, "compute_losses", "acting", "update")
    watch(torch.optim.RMSprop, "step", "update", "update")
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        flags = {"total_timesteps": timesteps, "num_envs": NUM_ENVS, "device": "cpu", "bf16": bf16}
        a2c_breakout.train(a2c_breakout.Args(**flags, runs_dir=Path(folder)))
    total = sum(seconds.values())
    return {"steps_per_second": timesteps / total} | {part: seconds[part] / total for part in PARTS}


def time_bare_emulator(timesteps: int, bf16: bool) -> dict:
    """Nothing but steps of the environments, in a2c_breakout's worker processes."""
    import a2c_breakout
    import torch

    storage = a2c_breakout.RolloutStorage(NUM_STEPS, NUM_ENVS)
    generator = torch.Generator().manual_seed(1)
    rollouts = timesteps // (NUM_STEPS * NUM_ENVS)
    with a2c_breakout.ParallelEnvs(storage, ENV_ID, 1, CORES) as envs:
        envs.wait()
        started = time.perf_counter()
        for _ in range(rollouts):
            storage.actions[:] = torch.randint(4, (NUM_STEPS, NUM_ENVS), generator=generator)
            for t in range(NUM_STEPS):
                envs.step(t)
        return {
            "steps_per_second": rollouts * NUM_STEPS * NUM_ENVS / (time.perf_counter() - started)
        }


def time_bare_network(timesteps: int, bf16: bool) -> dict:
    """Nothing but the network: NUM_STEPS + 1 acting passes and an update, over and over."""
    import a2c_breakout
    import torch

    torch.set_num_threads(CORES)
    generator = torch.Generator().manual_seed(1)
    frames = torch.randint(256, (NUM_STEPS + 1, NUM_ENVS, 84, 84, 4), generator=generator).to(
        torch.uint8
    )
    actions = torch.randint(4, (NUM_STEPS * NUM_ENVS,), generator=generator)
    returns = torch.randn(NUM_STEPS * NUM_ENVS, generator=generator)
    network = a2c_breakout.ActorCritic(4, bf16)
    optimizer = torch.optim.RMSprop(network.parameters(), 7e-4, 0.99, 1e-5)
    updates = timesteps // (NUM_STEPS * NUM_ENVS)
    for update in range(-2, updates):
        if update == 0:  # the first two only warm up
            started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            for t in range(NUM_STEPS + 1):
                a2c_breakout.act(network, frames[t], generator)
        losses = a2c_breakout.compute_losses(network, frames[:-1].flatten(0, 1), actions, returns)
        optimizer.zero_grad()
        sum(losses).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        optimizer.step()
    return {"steps_per_second": updates * NUM_STEPS * NUM_ENVS / (time.perf_counter() - started)}


PROGRAMS = {
    SB3: time_sb3,
    OURS: time_ours,
    "with a stopwatch": time_parts,
    "bare emulator": time_bare_emulator,
    "bare network": time_bare_network,
}


# ---- the rounds --------------------------------------------------------------------------------


def install_sb3() -> Path:
    """Makes the virtual environment, or finds it complete. Returns its Python."""
    folder = ROOT / "runs" / "cache" / "sb3"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pins = re.sub(r"\[.*?\]", "", (ROOT / "requirements.txt").read_text()).split()
    torch, *others = [
        pin for pin in pins if re.match("(torch|ale-py|gymnasium|numpy|opencv-python)==", pin)
    ]
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    # PyTorch comes first, so that the others cannot choose another one.
    for packages in ([torch], ["stable-baselines3==2.9.2", *others]):
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


def measure(program: str, timesteps: int, bf16: bool, python: Path | str = sys.executable) -> dict:
    """Calls one of PROGRAMS in a fresh process; the last line that it prints is the result."""
    command = [
        python,
        __file__,
        "--program",
        program,
        "--timesteps",
        str(timesteps),
        "--bf16" if bf16 else "--no-bf16",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{program} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 itself: without that, PyTorch emulates it."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and bool(
        re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", cpuinfo.read_text())
    )


def report(rows: list[dict], bf16: bool) -> None:
    """Medians over the rounds, and medians of the ratios within a round."""
    speeds = {
        (row["round"], row["program"]): row["steps_per_second"]
        for row in rows
        if row["bf16"] == bf16
    }
    speeds |= {
        (row["round"], SB3): row["steps_per_second"] for row in rows if row["program"] == SB3
    }
    rounds = sorted({number for number, _ in speeds})
    bounds = [1 / (1 / speeds[n, "bare emulator"] + 1 / speeds[n, "bare network"]) for n in rounds]
    shares = {
        part: [row[part] for row in rows if row["bf16"] == bf16 and part in row] for part in PARTS
    }

    precision = "bfloat16" if bf16 else "float32"
    print(f"\n{precision}, {len(rounds)} rounds, {CORES} cores, medians in steps/s:")
    for program in PROGRAMS:
        print(f"  {program:20} {statistics.median(speeds[n, program] for n in rounds):6.0f}")
    print(f"  {'bound':20} {statistics.median(bounds):6.0f}")
    ratios = [speeds[n, OURS] / speeds[n, SB3] for n in rounds]
    print(f"{OURS} is {statistics.median(ratios):.2f} times as fast as {SB3} "
          f"({', '.join(f'{ratio:.2f}' for ratio in ratios)})")  # fmt: skip
    of_bound = [speeds[n, OURS] / bound for n, bound in zip(rounds, bounds)]
    print(f"and reaches {statistics.median(of_bound):.2f} of the bound")
    print(
        "its time goes to: "
        + ", ".join(f"{part} {statistics.median(shares[part]):.0%}" for part in PARTS)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timesteps", type=int, default=40_000, help="of each run")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=has_bf16())
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--program", choices=PROGRAMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.program:
        print(json.dumps(PROGRAMS[args.program](args.timesteps, args.bf16)))
        return

    if not has_bf16():
        print(
            "This processor has no instructions for bfloat16: training with it is 10 times slower."
        )
        print(
            "It is measured all the same." if args.bf16 else "It is left out (--bf16 measures it)."
        )
    sb3_python = install_sb3()
    args.results.mkdir(parents=True, exist_ok=True)
    precisions = (False, True) if args.bf16 else (False,)
    rows = []
    with (args.results / "breakout_speed.csv").open("w", newline="") as file:
        columns = ["round", "program", "bf16", "steps_per_second", *PARTS, "versions"]
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for number in range(args.rounds):
            for program, bf16 in [
                (SB3, False),
                *product([p for p in PROGRAMS if p != SB3], precisions),
            ]:
                python = sb3_python if program == SB3 else sys.executable
                row = measure(program, args.timesteps, bf16, python)
                rows.append({"round": number, "program": program, "bf16": bf16, **row})
                writer.writerow(rows[-1])
                file.flush()
                name = f"{program} --bf16" if bf16 else program
                print(f"round {number}: {name}, {row['steps_per_second']:.0f} steps/s", flush=True)
    for row in rows[:2]:
        print(f"{row['program']}: {row['versions']}")
    for bf16 in precisions:
        report(rows, bf16)


if __name__ == "__main__":
    main()
