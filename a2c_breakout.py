# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "ale-py==0.12.1",
#     "gymnasium[classic-control]==1.4.0",
#     "numpy==2.4.6",
#     "opencv-python==5.0.0.93",
#     "tensorboard==2.21.0",
#     "torch==2.13.0",
#     "tqdm==4.70.1",
#     "tyro==1.0.17",
# ]
# ///
"""Advantage Actor-Critic (A2C) on Atari Breakout, learnt from the pixels alone.

One network looks at the last four frames and answers two questions: how much reward is still to come (the critic,
V), and which action to take (the actor, a probability for each action, pi). 16 copies of the game are played side by
side with the same network. After 5 steps in each, all 80 transitions go into one gradient step:

    R_t    = r_t + gamma R_{t+1},  and 0 behind the end of a life;  R_T = V(s_T) where the rollout breaks off
    A_t    = R_t - V(s_t)                                            (the advantage; no gradient in the second term)
    loss   = - mean log pi(a_t|s_t) A_t  +  0.5 mean (R_t - V(s_t))^2  -  0.01 mean entropy(pi(.|s_t))

Mnih et al. 2016, "Asynchronous Methods for Deep Reinforcement Learning" (algorithm S3, made synchronous); the
network and the treatment of the frames are those of Mnih et al. 2015, "Human-level control through deep
reinforcement learning" (Methods).

    python a2c_breakout.py --num-envs 16              # the book's run: 10 million timesteps
    python a2c_breakout.py --resume runs/long         # starts there, or goes on where it stopped, to the bit
    torchrun --nproc-per-node 4 a2c_breakout.py --num-envs 64
    tensorboard --logdir runs

One timestep is one decision in one environment: 4 frames of the emulator. A life is an episode for the learner; the
returns that are logged are those of whole games, all five lives.

Differs from the book:
- gymnasium instead of gym; an end is `terminated` (lost) or `truncated` (108,000 frames), and both cut the return.
- The screen is taken in gray before the maximum of two frames, the book takes it after: faster, a few levels apart.
- Frames stay uint8 until they enter the network (a quarter of the memory), and lie channels-last.
- The environments run in one process per core, not in one process each; they write straight into the rollout.
- It saves checkpoints, resumes bit for bit, and runs under torchrun.
"""

import io
import json
import math
import multiprocessing
import os
import pickle
import platform
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

# A thread of PyTorch that waits must not spin: the emulators need the core. 8 to 13% more steps/s on two cores.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# torchrun tells each process its place through these; without torchrun there is one process, rank 0 of 1.
RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
CORES = max(1, len(os.sched_getaffinity(0) if sys.platform == "linux" else range(os.cpu_count() or 1))
            // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # fmt: skip


@dataclass
class Args:
    """Train A2C on an Atari game."""

    env_id: str = "BreakoutNoFrameskip-v4"
    """an Atari game of ale-py that does not skip frames itself: <Game>NoFrameskip-v4"""
    seed: int = 1
    """seed of the network, the actions and (seed + index) the environments, 0 or more"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the network lives; auto takes CUDA when there is one"""
    bf16: bool = False
    """run the convolutional part in bfloat16: faster where the processor has it, far slower where it has not"""
    num_envs: int = 16
    """environments that are played side by side (under torchrun: on all ranks together), 1 or more"""
    num_steps: int = 5
    """steps in each environment between two updates, the length of the return, 1 or more"""
    total_timesteps: int = 10_000_000
    """decisions in all environments together, at least num_envs * num_steps"""
    learning_rate: float = 7e-4
    """learning rate of RMSprop, greater than 0"""
    anneal_lr: bool = False
    """lower the learning rate linearly to 0 over the run"""
    rmsprop_eps: float = 1e-5
    """added to RMSprop's denominator, greater than 0"""
    rmsprop_alpha: float = 0.99
    """smoothing of RMSprop's squared gradients, 0 to 1 (exclusive)"""
    gamma: float = 0.99
    """discount per step, 0 to 1"""
    value_loss_coef: float = 0.5
    """weight of the value loss, 0 or more"""
    entropy_coef: float = 0.01
    """weight of the entropy bonus, 0 or more"""
    max_grad_norm: float = 0.5
    """length to which the gradient is clipped, greater than 0"""
    runs_dir: Path = Path("runs")
    """folder in which the run's own folder is made"""
    resume: Path | None = None
    """folder of a run to go on with; a new or empty folder starts one there"""
    checkpoint_every: int = 2000
    """updates between two checkpoints, 1 or more"""
    save_every: int = 12_500
    """updates between two kept copies of the weights (weight_12500.pth ...), 1 or more"""
    log_every: int = 100
    """updates between two lines of output, 1 or more"""


@dataclass
class Result:
    """What result.json says of a run."""

    seed: int
    seconds: float
    versions: dict[str, str]
    timesteps: int
    steps_per_second: float
    mean_return: float | None  # of the last 100 whole games
    games: int


class UserError(Exception):
    """Something the user can put right: shown as one line, without a traceback."""


def check(args: Args) -> None:
    """Refuses values that make no sense (a NaN fails every comparison, so it is refused too)."""
    for flag, good, meaning in [
        ("--seed", 0 <= args.seed < 2**31, "0 or more and below 2147483648"),
        ("--num-envs", args.num_envs >= 1, "1 or more"),
        ("--num-envs", args.num_envs % WORLD_SIZE == 0, f"a multiple of the {WORLD_SIZE} ranks that share them"),
        ("--num-steps", args.num_steps >= 1, "1 or more"),
        ("--total-timesteps", args.total_timesteps >= args.num_envs * args.num_steps,
         f"at least one update, {args.num_envs} * {args.num_steps} timesteps"),
        ("--learning-rate", 0 < args.learning_rate < math.inf, "greater than 0 and finite"),
        ("--rmsprop-eps", 0 < args.rmsprop_eps < math.inf, "greater than 0 and finite"),
        ("--rmsprop-alpha", 0 <= args.rmsprop_alpha < 1, "from 0 to below 1"),
        ("--gamma", 0 <= args.gamma <= 1, "from 0 to 1"),
        ("--value-loss-coef", 0 <= args.value_loss_coef < math.inf, "0 or more and finite"),
        ("--entropy-coef", 0 <= args.entropy_coef < math.inf, "0 or more and finite"),
        ("--max-grad-norm", 0 < args.max_grad_norm < math.inf, "greater than 0 and finite"),
        ("--checkpoint-every", args.checkpoint_every >= 1, "1 or more"),
        ("--save-every", args.save_every >= 1, "1 or more"),
        ("--log-every", args.log_every >= 1, "1 or more"),
        ("--device", args.device != "cuda" or torch.cuda.is_available(), "cpu or auto where there is no CUDA"),
    ]:  # fmt: skip
        if not good:
            raise UserError(f"{flag} must be {meaning}, not {getattr(args, flag[2:].replace('-', '_'))}")


# ---- the game: four wrappers and a stack of frames ---------------------------------------------


class NoopReset(gym.Wrapper):
    """Lets a game begin with 1 to 30 no-ops, so that no two games are alike (Mnih et al. 2015, Methods)."""

    def reset(self, **kwargs):
        observation, info = self.env.reset(**kwargs)
        for _ in range(self.unwrapped.np_random.integers(1, 31)):
            observation, _, terminated, truncated, info = self.env.step(0)
            if terminated or truncated:
                observation, info = self.env.reset()
        return observation, info


class MaxAndSkip(gym.Wrapper):
    """Repeats an action for 4 frames and shows, pixel by pixel, the brighter of the last two.

    The Atari draws some sprites in every other frame only; the maximum of two holds them all. The observation is the
    gray screen, (210, 160) uint8 in most games.
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.screens = np.zeros((2, *self.unwrapped.ale.getScreenDims()), np.uint8)

    def reset(self, **kwargs):
        _, info = self.env.reset(**kwargs)
        self.unwrapped.ale.getScreenGrayscale(self.screens[0])
        self.screens[1] = 0
        return self.screens[0], info

    def step(self, action):
        total_reward = 0.0
        for frame in range(4):
            _, reward, terminated, truncated, info = self.env.step(action)
            total_reward += reward
            if terminated or truncated:
                break
            if frame >= 2:
                self.unwrapped.ale.getScreenGrayscale(self.screens[3 - frame])
        np.maximum(self.screens[0], self.screens[1], out=self.screens[0])
        return self.screens[0], total_reward, terminated, truncated, info

    def state_dict(self) -> dict[str, Any]:
        """The emulator and the generator that draws the no-ops. The screens are drawn anew by the next step."""
        return {
            "emulator": self.unwrapped.ale.cloneSystemState().serialize(),
            "noop_generator": self.unwrapped.np_random.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.unwrapped.ale.restoreSystemState(ale_py.ALEState(state["emulator"]))
        self.unwrapped.np_random.bit_generator.state = state["noop_generator"]


class EpisodicLife(gym.Wrapper):
    """Ends the episode when a life is lost, so that the loss is felt; the game goes on until its last life.

    The info of a step that ends a life holds "life", its return. The info of a step (or of a reset, whose no-op can do
    it too) that ends the game holds "game", the (return, length in decisions) of all its lives together.
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.game_over = True
        self.lives = 0
        self.life_return = self.game_return = 0.0
        self.game_length = 0

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.life_return += reward
        self.game_return += reward
        self.game_length += 1
        lives, lives_before = self.unwrapped.ale.lives(), self.lives
        self.lives = lives
        self.game_over = terminated or truncated
        if self.game_over:
            info["game"] = (self.game_return, self.game_length)
        # Qbert shows 0 lives for some frames before it is over: that is no end yet.
        terminated = terminated or 0 < lives < lives_before
        if terminated or truncated:
            info["life"] = self.life_return
        return observation, reward, terminated, truncated, info

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        info = {}
        if not self.game_over and seed is None:
            observation, _, _, _, info = self.step(0)  # the bricks stay; this no-op may be the end of the game
        if self.game_over or seed is not None:
            observation, reset_info = self.env.reset(seed=seed, options=options)
            info = {**info, **reset_info}
            self.game_over = False
            self.game_return, self.game_length = 0.0, 0
        self.life_return = 0.0
        self.lives = self.unwrapped.ale.lives()
        return observation, info

    def state_dict(self) -> dict[str, Any]:
        own = ("game_over", "lives", "life_return", "game_return", "game_length")
        return {name: getattr(self, name) for name in own} | self.env.get_wrapper_attr("state_dict")()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.env.get_wrapper_attr("load_state_dict")(state)
        for name in ("game_over", "lives", "life_return", "game_return", "game_length"):
            setattr(self, name, state[name])


class Warp(gym.ObservationWrapper):
    """Shrinks the gray screen to (84, 84)."""

    def observation(self, screen: np.ndarray) -> np.ndarray:
        return cv2.resize(screen, (84, 84), interpolation=cv2.INTER_AREA)


class FrameStack(gym.Wrapper):
    """Shows the last four frames, (84, 84, 4) uint8, the newest last: one frame does not tell where the ball flies.

    The four values of a pixel share one 32-bit word with the oldest in its lowest byte, so that one shift moves them
    all: 10 times as fast as moving bytes.
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(0, 255, (84, 84, 4), np.uint8)
        self.words = np.zeros((84, 84), "<u4")

    @property
    def frames(self) -> np.ndarray:
        return self.words.view(np.uint8).reshape(84, 84, 4)

    def push(self, frame: np.ndarray) -> np.ndarray:
        self.words >>= 8
        self.words |= frame.astype("<u4") << 24
        return self.frames

    def reset(self, **kwargs):
        frame, info = self.env.reset(**kwargs)
        self.words[:] = 0
        return self.push(frame), info

    def step(self, action):
        frame, reward, terminated, truncated, info = self.env.step(action)
        return self.push(frame), reward, terminated, truncated, info

    def state_dict(self) -> dict[str, Any]:
        return {"frames": self.words.tobytes()} | self.env.get_wrapper_attr("state_dict")()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.words[:] = np.frombuffer(state["frames"], "<u4").reshape(84, 84)
        self.env.get_wrapper_attr("load_state_dict")(state)


def make_env(env_id: str) -> gym.Env:
    """The game with all its wrappers. Raises UserError for anything but an Atari game without frame skip."""
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner
    gym.register_envs(ale_py)
    cv2.setNumThreads(1)  # there is a process for each core already
    try:
        spec = gym.spec(env_id)
    except (gym.error.Error, ImportError, ValueError) as error:
        raise UserError(f"--env-id {env_id}: {error}") from None
    if spec.entry_point != "ale_py.env:AtariEnv" or spec.kwargs.get("frameskip") != 1:
        raise UserError(f"--env-id must be an Atari game without frame skip, <Game>NoFrameskip-v4, not {env_id}")
    # The screen is read where it is needed; the RAM is the cheapest observation in the meantime.
    env = gym.make(env_id, obs_type="ram", disable_env_checker=True)
    return FrameStack(Warp(EpisodicLife(MaxAndSkip(NoopReset(env)))))


# ---- the rollout, and the processes that fill it -----------------------------------------------


class RolloutStorage:
    """T steps in N environments, in memory that all worker processes share: nothing is sent, nothing copied.

    observations: (T + 1, N, 84, 84, 4) uint8, slot T is where the next rollout starts
    actions:      (T, N) int64
    rewards:      (T, N) float32
    masks:        (T, N) float32, 0 where the step ended an episode, else 1
    life_returns: (N) float32, the return of the last finished life in each environment
    """

    def __init__(self, num_steps: int, num_envs: int, context):
        T, N = num_steps, num_envs
        self.layout = {
            "observations": ((T + 1, N, 84, 84, 4), np.uint8),
            "actions": ((T, N), np.int64),
            "rewards": ((T, N), np.float32),
            "masks": ((T, N), np.float32),
            "life_returns": ((N,), np.float32),
        }
        self.memory = {
            name: context.RawArray("B", math.prod(shape) * np.dtype(dtype).itemsize)
            for name, (shape, dtype) in self.layout.items()
        }
        self.map_memory()

    def map_memory(self) -> None:
        for name, (shape, dtype) in self.layout.items():
            setattr(self, name, np.frombuffer(self.memory[name], dtype).reshape(shape))

    def __getstate__(self):
        return {"layout": self.layout, "memory": self.memory}  # what a spawned worker gets: the memory, no copies

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.map_memory()


def work(connection, parents_end, storage: RolloutStorage, env_id: str, seed: int, indices: range) -> None:
    """A worker process: steps its share of the environments whenever it is told to, until its parent is gone."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)  # the parent decides when to stop
    parents_end.close()
    envs = {index: make_env(env_id) for index in indices}
    for index, env in envs.items():
        storage.observations[0, index] = env.reset(seed=seed + index)[0]
    try:
        while True:
            command, argument = connection.recv()
            answer = []
            if command == "step":
                for index, env in envs.items():
                    action = storage.actions[argument, index]
                    observation, reward, terminated, truncated, info = env.step(action)
                    if terminated or truncated:
                        storage.life_returns[index] = info["life"]
                        observation, reset_info = env.reset()
                        info |= reset_info
                    if "game" in info:
                        answer.append((argument, index, *info["game"]))
                    storage.observations[argument + 1, index] = observation
                    storage.rewards[argument, index] = reward
                    storage.masks[argument, index] = not (terminated or truncated)
            elif command == "state_dict":
                answer = [env.state_dict() for env in envs.values()]
            elif command == "load_state_dict":
                for index, env in envs.items():
                    env.load_state_dict(argument[index])
                    storage.observations[0, index] = env.frames
            connection.send(answer)
    except (EOFError, ConnectionError):
        pass  # the parent has finished, or died


class ParallelEnvs:
    """Environments in one worker process per core. Their observations appear in the storage's slot 0.

    Raises UserError when a worker dies. Environment i is seeded with seed + i.
    """

    def __init__(self, storage: RolloutStorage, env_id: str, seed: int, num_workers: int, context):
        num_envs = storage.observations.shape[1]
        num_workers = min(num_workers, num_envs)
        self.workers = []
        ctrl_c = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the workers inherit this
        for i in range(num_workers):
            indices = range(i * num_envs // num_workers, (i + 1) * num_envs // num_workers)
            ours, theirs = context.Pipe()
            process = context.Process(
                target=work, args=(theirs, ours, storage, env_id, seed, indices), daemon=True
            )
            process.start()
            theirs.close()  # the worker holds the only other end: when it dies, we read an end of file
            self.workers.append((process, ours))
        signal.signal(signal.SIGINT, ctrl_c)
        self.ask("ready")

    def ask(self, command: str, argument: Any = None) -> list:
        """Sends a command to all workers and joins their answers, in the order of the environments."""
        answers = []
        try:
            for process, connection in self.workers:
                connection.send((command, argument))
            for process, connection in self.workers:
                answers += connection.recv()
        except (EOFError, ConnectionError):
            self.close()
            raise UserError(f"worker process {process.pid} died (exit code {process.exitcode})") from None
        return answers

    def step(self, t: int) -> list[tuple[int, int, float, int]]:
        """Takes actions[t], fills rewards[t], masks[t], observations[t + 1]. Returns (t, index, return, length) of
        each game that ended."""
        return self.ask("step", t)

    def state_dict(self) -> list[dict[str, Any]]:
        return self.ask("state_dict")

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        self.ask("load_state_dict", states)

    def close(self) -> None:
        for _, connection in self.workers:
            connection.close()
        for process, _ in self.workers:
            process.join()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


# ---- the network and the loss ------------------------------------------------------------------


def init(layer: nn.Module, gain: float) -> nn.Module:
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class ActorCritic(nn.Module):
    """The convolutional network of Mnih et al. 2015 with two heads. Its parameter names are the book's."""

    def __init__(self, num_actions: int, bf16: bool = False):
        super().__init__()
        gain = nn.init.calculate_gain("relu")  # sqrt 2
        self.conv = nn.Sequential(
            init(nn.Conv2d(4, 32, kernel_size=8, stride=4), gain),  # (B, 32, 20, 20)
            nn.ReLU(inplace=True),
            init(nn.Conv2d(32, 64, kernel_size=4, stride=2), gain),  # (B, 64, 9, 9)
            nn.ReLU(inplace=True),
            init(nn.Conv2d(64, 64, kernel_size=3, stride=1), gain),  # (B, 64, 7, 7)
            nn.ReLU(inplace=True),
            nn.Flatten(),  # (B, 3136)
            init(nn.Linear(64 * 7 * 7, 512), gain),
            nn.ReLU(inplace=True),
        ).to(memory_format=torch.channels_last)  # convolutions run a third faster on it
        self.critic = init(nn.Linear(512, 1), 1.0)
        self.actor = init(nn.Linear(512, num_actions), 0.01)  # all actions alike at the start
        self.bf16 = bf16

    def forward(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """frames (B, 84, 84, 4) uint8 -> values (B,), logits (B, num_actions)."""
        pixels = frames.permute(0, 3, 1, 2).float().div_(255)  # (B, 4, 84, 84), in channels-last order already
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.bf16):
            features = self.conv(pixels)
        features = features.float()  # bfloat16 would round a value of 20 to steps of 0.125
        return self.critic(features).squeeze(-1), self.actor(features)


@torch.no_grad()
def act(network: ActorCritic, frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draws an action for each environment from the policy: (N, 84, 84, 4) -> (N,)."""
    _, logits = network(frames)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


def compute_returns(
    rewards: torch.Tensor, masks: torch.Tensor, last_values: torch.Tensor, gamma: float
) -> torch.Tensor:
    """Discounted n-step returns, (T, N): none leaks across a mask of 0. last_values (N,) follow the last step."""
    returns = torch.empty_like(rewards)
    following = last_values
    for t in reversed(range(len(rewards))):
        following = returns[t] = rewards[t] + gamma * masks[t] * following
    return returns


def compute_losses(
    network: ActorCritic, frames: torch.Tensor, actions: torch.Tensor, returns: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Value loss, policy loss and entropy, each the mean over a batch of B transitions.

    frames (B, 84, 84, 4) uint8, actions (B,) int64, returns (B,).
    """
    values, logits = network(frames)
    log_probs = F.log_softmax(logits, dim=-1)  # (B, num_actions)
    entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
    advantages = returns - values
    value_loss = advantages.pow(2).mean()
    chosen_log_probs = log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    policy_loss = -(chosen_log_probs * advantages.detach()).mean()
    return value_loss, policy_loss, entropy


# ---- many processes: torchrun starts this file once per rank -----------------------------------


@contextmanager
def other_ranks():
    """Turns the failure of a collective operation into one line: torchrun ends (or restarts) the other ranks."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(f"rank {RANK} lost another rank: {str(error).splitlines()[0]}") from None


def gather(value: Any) -> list[Any]:
    """The value of every rank, in the order of the ranks, on all of them."""
    if WORLD_SIZE == 1:
        return [value]
    values = [None] * WORLD_SIZE
    with other_ranks():
        dist.all_gather_object(values, value)
    return values


def average_gradients(parameters: list[nn.Parameter], stop: bool) -> bool:
    """Averages the gradients over all ranks. Returns whether any of them was asked to stop: so they stop together."""
    if WORLD_SIZE == 1:
        return stop
    pieces = [parameter.grad.flatten() for parameter in parameters]
    flat = torch.cat([*pieces, pieces[0].new_tensor([stop])])
    with other_ranks():
        dist.all_reduce(flat)
    flat /= WORLD_SIZE
    for parameter, piece in zip(parameters, flat.split([*map(len, pieces), 1])):
        parameter.grad.copy_(piece.view_as(parameter.grad))
    return bool(flat[-1] > 0)


# ---- what is kept on disk ----------------------------------------------------------------------


def write(path: Path, content: bytes) -> None:
    """Writes beside and renames: whatever happens in the middle, the previous file stays whole."""
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def save(path: Path, content: Any) -> None:
    buffer = io.BytesIO()  # torch.save straight to a full disk would not end with a clean error
    torch.save(content, buffer)
    write(path, buffer.getvalue())


def load(path: Path, map_location: Any = "cpu") -> Any:
    """Reads what save wrote, and refuses anything that could run code."""
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except (OSError, EOFError, KeyError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        reason = "not one of our files, or damaged" if not isinstance(error, OSError) else error.strerror
        raise UserError(f"cannot read {path}: {reason}") from None


def settings(args: Args) -> dict[str, Any]:
    """The arguments as args.json holds them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(args).items() if name != "resume"}


def refuse_changes(args: Args, saved: dict[str, Any], source: Path) -> None:
    """Raises UserError if going on with these arguments would not give what the run was started for."""
    free = {"runs_dir", "checkpoint_every", "save_every", "log_every"} | (set() if args.anneal_lr else {"total_timesteps"})
    for name, value in settings(args).items():
        if name not in free and value != saved.get(name):
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {value} would change the result of this run: {source} says {saved.get(name)}")


def parse_args(argv: list[str] | None = None) -> Args:
    """Reads the flags. On --resume, the run's args.json gives the defaults; flags that contradict it are refused."""
    args = tyro.cli(Args, args=argv)
    path = args.resume / "args.json" if args.resume else None
    if path is None or not path.exists():
        return args
    try:
        saved = json.loads(path.read_text())
        saved_args = Args(**{**saved, "runs_dir": Path(saved["runs_dir"]), "resume": args.resume})
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(f"cannot resume: {path} is damaged or of another script") from None
    args = tyro.cli(Args, args=argv, default=saved_args)
    refuse_changes(args, saved, path)
    return args


def load_checkpoint(args: Args) -> dict[str, Any] | None:
    """The checkpoint to go on from, None where a run starts. Raises UserError if it is damaged or does not fit."""
    if args.resume is None or not args.resume.exists():
        return None
    path = args.resume / "checkpoint.pth"
    if not path.exists():
        left = {file.name for file in args.resume.iterdir() if file.suffix != ".tmp"} if args.resume.is_dir() else {"."}
        if left and "args.json" not in left:
            raise UserError(f"cannot resume: {args.resume} is neither the folder of a run nor empty")
        return None
    checkpoint = load(path)
    if not isinstance(checkpoint, dict) or not {"args", "progress", "network", "ranks"} <= checkpoint.keys():
        raise UserError(f"cannot resume: {path} is not a checkpoint of a2c_breakout.py")
    refuse_changes(args, checkpoint["args"], path)
    if len(checkpoint["ranks"]) != WORLD_SIZE:
        raise UserError(f"cannot resume: {path} was made by {len(checkpoint['ranks'])} ranks, each with its own "
                        f"environments and generator, not by {WORLD_SIZE}")  # fmt: skip
    if checkpoint["progress"]["update"] > args.total_timesteps // (args.num_envs * args.num_steps):
        raise UserError(f"--total-timesteps {args.total_timesteps} is behind this run: it has done "
                        f"{checkpoint['update'] * args.num_envs * args.num_steps}")  # fmt: skip
    return checkpoint


def make_run_dir(args: Args) -> Path:
    """Makes runs/<script>__<seed>__<time>, or the folder to resume in, and writes args.json into it."""
    name = f"{Path(__file__).stem}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    run_dir = args.resume or args.runs_dir / name
    try:
        run_dir.mkdir(parents=True, exist_ok=args.resume is not None)
    except OSError as error:
        raise UserError(f"cannot make {run_dir}: {error.strerror}") from None
    write(run_dir / "args.json", json.dumps(settings(args), indent=2).encode())
    return run_dir


# ---- training ----------------------------------------------------------------------------------


def restore(checkpoint: dict[str, Any], network, optimizer, generator, storage, envs) -> dict[str, Any]:
    """Puts everything back to where the checkpoint was made. Returns the progress made until then."""
    try:
        network.load_state_dict(checkpoint["network"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        mine = checkpoint["ranks"][RANK]
        generator.set_state(mine["generator"])
        storage.life_returns[:] = mine["life_returns"]
        envs.load_state_dict(mine["envs"])
        return checkpoint["progress"]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot resume: the checkpoint does not fit ({str(error).splitlines()[0]})") from None


@contextmanager
def stop_requests():
    """Ctrl-C and SIGTERM only leave their number in the list that this yields: the update under way ends first."""
    received = []
    handlers = {s: signal.signal(s, lambda signum, _: received.append(signum)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def train(args: Args) -> Result:
    """Trains, and leaves weights, checkpoint, curves and result.json in the run's folder. Raises UserError.

    Ctrl-C (SIGINT) and SIGTERM end it after the update under way, with everything saved; SIGTERM's exit code is 143.
    """
    check(args)
    with make_env(args.env_id) as env:
        num_actions = int(env.action_space.n)
    checkpoint = load_checkpoint(args)
    run_dir = make_run_dir(args) if RANK == 0 else None

    timesteps_per_update = args.num_envs * args.num_steps
    num_updates = args.total_timesteps // timesteps_per_update
    device = torch.device(f"cuda:{LOCAL_RANK}" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    torch.set_num_threads(CORES)
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    num_envs = args.num_envs // WORLD_SIZE  # of this rank; N below, and T is num_steps
    storage = RolloutStorage(args.num_steps, num_envs, context)
    observations, rewards, masks, actions = map(
        torch.from_numpy, (storage.observations, storage.rewards, storage.masks, storage.actions)
    )
    first_timestep = checkpoint["progress"]["update"] * timesteps_per_update if checkpoint else 0

    with (
        stop_requests() as stop_signals,
        ParallelEnvs(storage, args.env_id, args.seed + RANK * num_envs, CORES, context) as envs,
        SummaryWriter(run_dir, purge_step=first_timestep + 1) if RANK == 0 else nullcontext() as writer,
        tqdm(total=num_updates * timesteps_per_update, initial=first_timestep, unit="step", mininterval=1,
             dynamic_ncols=True, disable=None if RANK == 0 else True) as bar,
    ):  # fmt: skip
        if WORLD_SIZE > 1:
            dist.init_process_group()  # after the workers: a fork would copy its threads' locks
        torch.manual_seed(args.seed)  # the same network on all ranks
        network = ActorCritic(num_actions, args.bf16).to(device)
        parameters = list(network.parameters())
        optimizer = torch.optim.RMSprop(parameters, args.learning_rate, args.rmsprop_alpha, args.rmsprop_eps)
        generator = torch.Generator(device).manual_seed(args.seed + RANK)  # draws the actions
        progress = {"update": 0, "seconds": 0.0, "games": 0, "last_returns": []}
        if checkpoint is not None:
            progress = restore(checkpoint, network, optimizer, generator, storage, envs)
        if len(set(gather(progress["update"]))) > 1:
            raise UserError("the ranks see different checkpoints: is --resume on a disk that all machines share?")
        if RANK == 0:
            tqdm.write(f"{network}\n{args.env_id}, {args.num_envs} environments on {WORLD_SIZE} x {CORES} cores, "
                       f"network on {device}. The run's folder is {run_dir}")  # fmt: skip
            if progress["update"] == 0:
                save(run_dir / "weight_0.pth", network.state_dict())
        start, seconds_before, finished_games = time.perf_counter(), progress["seconds"], []

        for update in range(progress["update"], num_updates):
            if args.anneal_lr:
                optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - update / num_updates)

            # 1. Act: T steps in every environment, with one and the same network
            for t in range(args.num_steps):
                actions[t] = act(network, observations[t].to(device), generator)
                for step, index, game_return, length in envs.step(t):
                    timestep = update * timesteps_per_update + step * args.num_envs + RANK * num_envs + index + 1
                    finished_games.append((timestep, game_return, length))

            # 2. Returns, from the value of the state in which the rollout breaks off
            with torch.no_grad():
                last_values, _ = network(observations[-1].to(device))
            returns = compute_returns(rewards, masks, last_values.cpu(), args.gamma)

            # 3. Loss over all T * N transitions
            value_loss, policy_loss, entropy = compute_losses(
                network,
                observations[:-1].flatten(0, 1).to(device),
                actions.flatten().to(device),
                returns.flatten().to(device),
            )
            loss = args.value_loss_coef * value_loss + policy_loss - args.entropy_coef * entropy

            # 4. Update
            optimizer.zero_grad()
            loss.backward()
            stop = average_gradients(parameters, bool(stop_signals))
            grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            observations[0] = observations[-1]  # the next rollout goes on where this one broke off
            progress["update"] = update + 1
            bar.update(timesteps_per_update)

            # 5. Log and save: the only moments at which the losses are looked at, which costs time on a GPU
            log_now = update % args.log_every == 0
            keep_now = (update + 1) % args.save_every == 0
            checkpoint_now = (update + 1) % args.checkpoint_every == 0 or stop or update + 1 == num_updates
            if not (log_now or keep_now or checkpoint_now):
                continue
            losses = torch.stack([value_loss, policy_loss, entropy, grad_norm]).tolist()
            ranks = gather({"losses": losses, "life_returns": storage.life_returns.tolist(), "games": finished_games})
            finished_games = []
            losses = np.mean([rank["losses"] for rank in ranks], axis=0)
            if not np.isfinite(losses).all():
                raise UserError(f"update {update}: the loss or its gradient is no longer finite; nothing was overwritten")
            elapsed = time.perf_counter() - start
            steps_per_second = ((update + 1) * timesteps_per_update - first_timestep) / elapsed
            progress["seconds"] = seconds_before + elapsed
            if RANK == 0:
                games = sorted(game for rank in ranks for game in rank["games"])
                for timestep, game_return, length in games:
                    writer.add_scalar("charts/episodic_return", game_return, timestep)
                    writer.add_scalar("charts/episodic_length", length, timestep)
                progress["games"] += len(games)
                progress["last_returns"] = [*progress["last_returns"], *(game[1] for game in games)][-100:]
            if log_now and RANK == 0:
                timestep = (update + 1) * timesteps_per_update
                for name, value in {
                    "charts/SPS": steps_per_second,
                    "charts/learning_rate": optimizer.param_groups[0]["lr"],
                    "losses/value_loss": losses[0],
                    "losses/policy_loss": losses[1],
                    "losses/entropy": losses[2],
                }.items():
                    writer.add_scalar(name, value, timestep)
                lives = np.concatenate([rank["life_returns"] for rank in ranks])
                mean_return = np.mean(progress["last_returns"]) if progress["last_returns"] else math.nan
                tqdm.write(f"finished timesteps {timestep}, last lives: mean/median {lives.mean():.1f}/"
                           f"{np.median(lives):.1f}, min/max {lives.min():.1f}/{lives.max():.1f}, "
                           f"mean of the last 100 games {mean_return:.1f}, {steps_per_second:.0f} steps/s")  # fmt: skip
                bar.set_postfix_str(f"mean return {mean_return:.1f}")
            if keep_now and RANK == 0:
                save(run_dir / f"weight_{update + 1}.pth", network.state_dict())
            if checkpoint_now:
                mine = {
                    "generator": generator.get_state(),
                    "life_returns": storage.life_returns.tolist(),
                    "envs": envs.state_dict(),
                }
                content = {
                    "args": settings(args),
                    "progress": progress,
                    "network": network.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "ranks": gather(mine),
                }
                if RANK == 0:
                    writer.flush()  # what is logged up to here stays; what comes later is purged on resuming
                    save(run_dir / "checkpoint.pth", content)
            if stop:
                break

        if WORLD_SIZE > 1:
            dist.destroy_process_group()

    timesteps = progress["update"] * timesteps_per_update
    result = Result(
        seed=args.seed,
        seconds=progress["seconds"],
        versions={"python": platform.python_version(), "ale-py": ale_py.__version__}
        | {module.__name__: module.__version__ for module in (torch, gym, np, cv2)},
        timesteps=timesteps,
        steps_per_second=timesteps / progress["seconds"],
        mean_return=float(np.mean(progress["last_returns"])) if progress["last_returns"] else None,
        games=progress["games"],
    )
    if RANK == 0:
        save(run_dir / "weight_end.pth", network.state_dict())
        write(run_dir / "result.json", json.dumps(asdict(result), indent=2).encode())
        if progress["update"] < num_updates:
            print(f"Stopped at {timesteps} timesteps. Go on with: python {Path(__file__).name} --resume {run_dir}")
        print(f"Everything is in {run_dir}")
    if signal.SIGTERM in stop_signals:
        sys.exit(128 + signal.SIGTERM)
    return result


if __name__ == "__main__":
    try:
        train(parse_args())
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted before the first update")
