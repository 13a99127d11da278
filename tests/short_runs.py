"""Short runs of the eight scripts, each in a process of its own, pasted as into a notebook's cell.

mnist.py learns from small files there, in which a brighter row tells the label.
"""

import functools
import gzip
import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from launch import Process
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import mnist
import play_breakout

ROOT = Path(__file__).resolve().parent.parent
Q_LEARNING = ["dqn_cartpole", "ddqn_cartpole", "dueling_cartpole", "per_cartpole"]
A2C = "a2c_cartpole"
CARTPOLE = [*Q_LEARNING, A2C]
EVERY = [*CARTPOLE, "mnist", "a2c_breakout", "play_breakout"]
SHORT = {name: {"num_episodes": 6, "eval_episodes": 3} for name in Q_LEARNING}
SHORT["per_cartpole"]["uniform_episodes"] = 3
SHORT[A2C] = {"total_timesteps": 4000, "eval_episodes": 3}
SHORT["mnist"] = {"epochs": 1, "image_index": 20}
SHORT["a2c_breakout"] = {"num_envs": 1, "num_steps": 2, "total_timesteps": 200}
SHORT["a2c_breakout"]["max_idle_steps"] = 15
SHORT["play_breakout"] = {"max_attempts": 1}
SHORT = {name: {"seed": 3, "device": "cpu"} | values for name, values in SHORT.items()}
IGNORE_SIGHUP = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"  # as nohup does

FILES, MIRRORS = dict(mnist.FILES), list(mnist.MIRRORS)  # the real ones
NAMES = TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = list(FILES)
NO_MIRROR = "http://127.0.0.1:9/"  # nobody listens at this port


def make_data(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise with a brighter row, whose number is the label: (count, 28, 28) and (count,), uint8."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(10, size=count, dtype=np.uint8)
    images = rng.integers(100, size=(count, 28, 28), dtype=np.uint8)
    images[range(count), labels] += 150
    return images, labels


def pack_idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


ARRAYS = dict(zip(NAMES, [*make_data(1500, seed=0), *make_data(200, seed=1)], strict=True))
CONTENTS = {name: pack_idx(array) for name, array in ARRAYS.items()}
PACKED = {name: gzip.compress(content) for name, content in CONTENTS.items()}
HASHES = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENTS.items()}


def put_digits(folder: Path) -> Path:
    folder.mkdir()
    for name in NAMES:
        (folder / f"{name}.gz").write_bytes(PACKED[name])
    return folder


@functools.cache
def digits() -> Path:
    return put_digits(Path(tempfile.mkdtemp()) / "data")


@functools.cache
def policy() -> Path:
    """One that has learnt nothing: a life of Breakout is over after some 30 decisions."""
    torch.manual_seed(0)
    path = Path(tempfile.mkdtemp()) / "weight_end.pth"
    torch.save(play_breakout.ActorCritic(4).state_dict(), path)
    return path


class Bomb:
    """Pickles as a call that would make a folder."""

    __reduce__ = lambda self: (os.mkdir, ("bomb",))  # noqa: E731


def source(name: str) -> str:
    """The script; mnist.py with the checksums of the small files, and no mirror that answers."""
    code = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    if name == "mnist":
        changes = dict(zip(FILES.values(), HASHES.values())) | dict.fromkeys(MIRRORS, NO_MIRROR)
        for old, new in changes.items():
            code = code.replace(old, new)
    return code


def flags(name: str, **values) -> list[str]:
    """Those of a short run, but for these values."""
    files = {"mnist": {"data_dir": digits}, "play_breakout": {"weights": policy}}.get(name, {})
    values = SHORT[name] | {field: make() for field, make in files.items()} | values
    return [f"--{field.replace('_', '-')}={value}" for field, value in values.items()]


def start(name: str, cwd: Path, code="", env={}, limits={}, output=None, **values) -> Process:
    """Starts a script, or other code in its place, with these values of its flags."""
    process = {"cwd": cwd, "env": env, "limits": limits, "output": output}
    return Process(code or source(name), *flags(name, **values), **process)


def curves(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """All that TensorBoard shows of a run: (step, value) by the name of the curve."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]}  # fmt: skip
