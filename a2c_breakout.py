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

One network looks at the last four frames and answers two questions: how much reward is still to come (the critic, V),
and how likely each action is to be taken (the actor, pi). 16 copies of the game are played side by side with the same
network; after 5 steps in each, all 80 transitions go into one gradient step:

    R_t    = r_t + gamma R_{t+1},  0 behind the end of a life,  V(s_T) where the rollout breaks off
    A_t    = R_t - V(s_t)                        (the advantage: how much better it went than the critic thought)
    loss   = - mean A_t log pi(a_t|s_t)  +  0.5 mean A_t^2  -  0.01 mean entropy(pi(.|s_t))

In the first term A_t is a number, no gradient flows through it. Mnih et al. 2016, "Asynchronous Methods for Deep
Reinforcement Learning", algorithm S3 made synchronous; the treatment of the screen and the network are those of
Mnih et al. 2015, "Human-level control through deep reinforcement learning", Methods.

    python a2c_breakout.py --num-envs 16                     # the book's run of 10 million timesteps
    python a2c_breakout.py --resume runs/long                # starts there, or goes on where it stopped, to the bit
    torchrun --nproc-per-node 4 a2c_breakout.py --num-envs 64

"To the bit" holds on the CPU of one machine with the same number of threads. A timestep is one decision in one
environment, 4 frames of the emulator. To the learner a life is an episode; the returns in the curves are those of whole
games, all five lives. Rewards are not clipped to +-1 as in Mnih et al. 2015 (the book does not clip them either): in
games that give hundreds of points at once, the losses are as large.

Differs from the book:
- Gymnasium in place of gym: a game ends `terminated` (lost) or `truncated` (108,000 frames); both cut the return.
- The screen turns gray before the maximum of two frames is taken, not after it: faster, and a few gray levels apart.
- Frames stay uint8 until they enter the network, a quarter of the memory, and lie channels-last, as convolutions want.
- One process per core steps its share of the environments, in place of one process per environment.
- Checkpoints, --resume and torchrun are new. (torchrun gives each rank one core; OMP_NUM_THREADS=4 gives it four.)
"""

import atexit
import ctypes
import io
import json
import math
import os
import platform
import signal
import sys
import time
import zipfile
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

# PyTorch's threads spin while they wait: some 0.1 ms, which bridges the gap to the next layer, and no longer, for the
# emulators need the cores. On two of them 15% more steps/s than without spinning.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
# What an update frees stays with the process for the next one, and does not go back to Linux each time: 11% more
# steps/s. The options are called M_TRIM_THRESHOLD and M_MMAP_THRESHOLD.
if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
    for option in (-1, -3):
        ctypes.CDLL(None).mallopt(option, 2**30)  # bytes
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until it trains, Ctrl-C just ends it: no traceback of an import

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# torchrun starts this file once per rank and says so here; started by hand, it is rank 0 of 1.
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
PACKAGES = ("ale-py", "gymnasium", "numpy", "opencv-python", "torch")  # whose versions result.json names
START_METHOD = "fork" if sys.platform == "linux" else "spawn"  # macOS cannot fork safely, Windows not at all


@dataclass
class Args:
    """Train A2C on an Atari game."""

    env_id: str = "BreakoutNoFrameskip-v4"
    """a game of ale-py that does not skip frames itself: <Game>NoFrameskip-v4"""
    seed: int = 1
    """seed of the network and the actions; environment i has seed + i; 0 or more"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the network lives; auto takes CUDA when there is one"""
    bf16: bool = False
    """run the convolutional part in bfloat16: faster on processors that know it and do nothing else"""
    num_envs: int = 16
    """environments that are played side by side (on all ranks together), 1 or more"""
    num_steps: int = 5
    """steps in each environment between two updates: the length of the return; 1 or more"""
    total_timesteps: int = 10_000_000
    """decisions in all environments together; the run does total_timesteps // (num_envs * num_steps) updates"""
    learning_rate: float = 7e-4
    """learning rate of RMSprop, greater than 0"""
    anneal_lr: bool = False
    """lower the learning rate linearly to 0"""
    anneal_timesteps: int = 0
    """with --anneal-lr: over this many timesteps at the end, before that it is constant; 0: over the whole run"""
    rmsprop_eps: float = 1e-5
    """term in RMSprop's denominator, greater than 0"""
    rmsprop_alpha: float = 0.99
    """smoothing of RMSprop's squared gradients, from 0 to below 1"""
    gamma: float = 0.99
    """discount per step, from 0 to 1"""
    value_loss_coef: float = 0.5
    """weight of the value loss, 0 or more"""
    entropy_coef: float = 0.01
    """weight of the entropy bonus, 0 or more"""
    max_grad_norm: float = 0.5
    """norm to which the gradient is clipped, greater than 0"""
    runs_dir: Path = Path("runs")
    """folder in which the run's own folder is made"""
    resume: Path | None = None
    """folder of the run to go on with; a new or empty folder starts one there"""
    checkpoint_every: int = 2000
    """updates between two checkpoints, 1 or more; a run begins and ends with one too"""
    save_every: int = 12_500
    """updates between two files of weights that are kept (weight_12500.pth ...), 1 or more"""
    log_every: int = 100
    """updates between two lines of output, 1 or more"""


@dataclass
class Result:
    """The content of result.json."""

    seed: int
    seconds: float  # of training, over all resumptions
    versions: dict[str, str]
    timesteps: int
    steps_per_second: float
    mean_return: float | None  # of the last 100 whole games; None while there is none
    games: int


class UserError(Exception):
    """Something the user can put right: shown as one line, without a traceback."""


def check(args: Args) -> None:
    """Refuses values that make no sense (a NaN fails every comparison, so it is refused too)."""
    for flag, good, meaning in [
        ("--seed", 0 <= args.seed < 2**31, "from 0 to below 2147483648"),
        ("--device", args.device != "cuda" or torch.cuda.is_available(), "auto or cpu on a machine without CUDA"),
        ("--num-envs", args.num_envs >= 1, "1 or more"),
        ("--num-envs", args.num_envs % WORLD_SIZE == 0, f"a multiple of {WORLD_SIZE}, the number of ranks"),
        ("--num-steps", args.num_steps >= 1, "1 or more"),
        ("--total-timesteps", args.total_timesteps >= args.num_envs * args.num_steps,
         f"at least one update of {args.num_envs} * {args.num_steps} timesteps"),
        ("--learning-rate", 0 < args.learning_rate < math.inf, "greater than 0 and finite"),
        ("--anneal-timesteps", args.anneal_lr or args.anneal_timesteps == 0, "0 without --anneal-lr"),
        ("--anneal-timesteps", 0 <= args.anneal_timesteps <= args.total_timesteps, "from 0 to --total-timesteps"),
        ("--rmsprop-eps", 0 < args.rmsprop_eps < math.inf, "greater than 0 and finite"),
        ("--rmsprop-alpha", 0 <= args.rmsprop_alpha < 1, "from 0 to below 1"),
        ("--gamma", 0 <= args.gamma <= 1, "from 0 to 1"),
        ("--value-loss-coef", 0 <= args.value_loss_coef < math.inf, "0 or more and finite"),
        ("--entropy-coef", 0 <= args.entropy_coef < math.inf, "0 or more and finite"),
        ("--max-grad-norm", 0 < args.max_grad_norm < math.inf, "greater than 0 and finite"),
        ("--checkpoint-every", args.checkpoint_every >= 1, "1 or more"),
        ("--save-every", args.save_every >= 1, "1 or more"),
        ("--log-every", args.log_every >= 1, "1 or more"),
    ]:  # fmt: skip
        if not good:
            raise UserError(f"{flag} must be {meaning}, not {getattr(args, flag[2:].replace('-', '_'))}")


# ---- the game -------------------------------------------------------------------------------------------------------


class NoopReset(gym.Wrapper):
    """Begins each game with 1 to 30 no-ops, so that no two are alike (Mnih et al. 2015, Methods)."""

    def reset(self, **kwargs):
        observation, info = self.env.reset(**kwargs)
        for _ in range(self.unwrapped.np_random.integers(1, 31)):
            observation, _, terminated, truncated, info = self.env.step(0)
            if terminated or truncated:
                observation, info = self.env.reset()
        return observation, info


class MaxAndSkip(gym.Wrapper):
    """Repeats an action for 4 frames; the observation is the gray maximum of the last two screens, (210, 160) uint8.

    The Atari draws some sprites in every other frame only: the brighter of two pixels shows them all.
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
        """The whole emulator, and the generator that draws the no-ops. The screens are filled anew by each step (or,
        where the game ends within the step, by the reset that follows)."""
        return {
            "emulator": self.unwrapped.ale.cloneSystemState().serialize(),
            "noop_generator": self.unwrapped.np_random.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.unwrapped.ale.restoreSystemState(ale_py.ALEState(state["emulator"]))
        self.unwrapped.np_random.bit_generator.state = state["noop_generator"]


class EpisodicLife(gym.Wrapper):
    """Ends the episode when a life is lost, so that the loss is felt; the game itself goes on to its last life.

    When a life ends, info["life"] is its return; when a game ends, info["game"] is the return and the length (in
    decisions) of all its lives together. The no-op of a reset can end a game too.
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.game = {"game_over": True, "lives": 0, "life_return": 0.0, "game_return": 0.0, "game_length": 0}

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        now, lives = self.game, self.unwrapped.ale.lives()
        life_over = 0 < lives < now["lives"]  # Qbert shows 0 lives for some frames before the game is over
        now["lives"], now["game_over"] = lives, terminated or truncated
        now["life_return"] += reward
        now["game_return"] += reward
        now["game_length"] += 1
        if now["game_over"] or life_over:
            info["life"] = now["life_return"]
        if now["game_over"]:
            info["game"] = (now["game_return"], now["game_length"])
        return observation, reward, terminated or life_over, truncated, info

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        info, now = {}, self.game
        if not now["game_over"] and seed is None:
            observation, _, _, _, info = self.step(0)  # the bricks stay, the game goes on
        if now["game_over"] or seed is not None:
            observation, reset_info = self.env.reset(seed=seed, options=options)
            info |= reset_info
            now.update(game_over=False, lives=self.unwrapped.ale.lives(), game_return=0.0, game_length=0)
        now["life_return"] = 0.0
        return observation, info

    def state_dict(self) -> dict[str, Any]:
        return {"game": dict(self.game)} | self.env.get_wrapper_attr("state_dict")()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.game = dict(state["game"])
        self.env.get_wrapper_attr("load_state_dict")(state)


class Warp(gym.ObservationWrapper):
    """Shrinks the gray screen to (84, 84)."""

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return cv2.resize(observation, (84, 84), interpolation=cv2.INTER_AREA)


class FrameStack(gym.Wrapper):
    """Shows the last four frames, (84, 84, 4) uint8, the newest last: a single one does not tell where the ball flies.

    The four values of a pixel share one 32-bit word, the oldest in its lowest byte: one shift moves them all. The
    array is the same at every step: who keeps an observation copies it.
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(0, 255, (84, 84, 4), np.uint8)
        self.words = np.zeros((84, 84), "<u4")
        self.frames = self.words.view(np.uint8).reshape(84, 84, 4)

    def push(self, frame: np.ndarray) -> np.ndarray:
        self.words >>= 8
        self.words |= frame.astype("<u4") << 24
        return self.frames

    def reset(self, **kwargs):
        frame, info = self.env.reset(**kwargs)
        self.words[:] = 0  # no frame from before the end of an episode
        return self.push(frame), info

    def step(self, action):
        frame, *rest = self.env.step(action)
        return self.push(frame), *rest

    def state_dict(self) -> dict[str, Any]:
        return {"frames": self.words.tobytes()} | self.env.get_wrapper_attr("state_dict")()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.words[:] = np.frombuffer(state["frames"], "<u4").reshape(84, 84)
        self.env.get_wrapper_attr("load_state_dict")(state)


def make_env(env_id: str) -> gym.Env:
    """The game in all its wrappers. Raises UserError for anything but an Atari game without frame skip."""
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner
    gym.register_envs(ale_py)
    try:
        spec = gym.spec(env_id)
    except (gym.error.Error, ImportError, ValueError) as error:
        raise UserError(f"--env-id {env_id}: {str(error).splitlines()[0]}") from None
    wanted = {"frameskip": 1, "repeat_action_probability": 0.0}  # whatever skips or repeats is a wrapper's business
    if spec.entry_point != "ale_py.env:AtariEnv" or not wanted.items() <= spec.kwargs.items():
        raise UserError(f"--env-id must be an Atari game without frame skip, <Game>NoFrameskip-v4, not {env_id}")
    # MaxAndSkip reads the screen itself, when it needs it; of all observations the RAM costs least.
    env = gym.make(env_id, obs_type="ram", disable_env_checker=True)
    return FrameStack(Warp(EpisodicLife(MaxAndSkip(NoopReset(env)))))


# ---- the rollout, and the processes that fill it --------------------------------------------------------------------


class RolloutStorage:
    """T steps of N environments, in memory that the workers write and the learner reads: no frame is sent."""

    def __init__(self, num_steps: int, num_envs: int):
        T, N = num_steps, num_envs
        self.observations = torch.zeros(T + 1, N, 84, 84, 4, dtype=torch.uint8).share_memory_()
        self.actions = torch.zeros(T, N, dtype=torch.int64).share_memory_()
        self.rewards = torch.zeros(T, N).share_memory_()
        self.masks = torch.zeros(T, N).share_memory_()  # 0 where the step ended an episode, else 1
        self.life_returns = torch.zeros(N).share_memory_()  # of each environment's last finished life


def work(connection, parents_end, storage: RolloutStorage, env_id: str, seed: int, indices: range) -> None:
    """A worker process: steps its share of the environments when it is told to, and ends when its parent is gone."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)  # when to stop is for the parent to say
    parents_end.close()
    cv2.setNumThreads(1)
    observations, actions = storage.observations.numpy(), storage.actions.numpy()
    rewards, masks, life_returns = storage.rewards.numpy(), storage.masks.numpy(), storage.life_returns.numpy()
    envs = {index: make_env(env_id) for index in indices}
    for index, env in envs.items():
        observations[0, index], _ = env.reset(seed=seed + index)
    try:
        while True:
            command, argument = connection.recv()
            answer = []
            if command == "be ready":
                pass  # it is
            elif command == "step":
                t = argument
                for index, env in envs.items():
                    observation, rewards[t, index], terminated, truncated, info = env.step(actions[t, index])
                    masks[t, index] = not (terminated or truncated)
                    if terminated or truncated:
                        life_returns[index] = info["life"]
                        observation, reset_info = env.reset()
                        info |= reset_info
                    observations[t + 1, index] = observation
                    if "game" in info:
                        answer.append((index, *info["game"]))
            elif command == "state_dict":
                answer = [env.state_dict() for env in envs.values()]
            elif command == "load_state_dict":
                for index, env in envs.items():
                    env.load_state_dict(argument[index])
                    observations[0, index] = env.frames
            connection.send(answer)
    except (EOFError, OSError):
        pass  # the parent has closed the connection, or died, perhaps in the middle of a message


class ParallelEnvs:
    """The environments of a storage, spread over worker processes. Environment i is seeded with seed + i.

    After wait() their first observations are in slot 0 of the storage. Raises UserError when a worker dies.
    """

    def __init__(self, storage: RolloutStorage, env_id: str, seed: int, num_workers: int):
        context, num_envs = mp.get_context(START_METHOD), len(storage.life_returns)
        num_workers = min(num_workers, num_envs)
        self.workers = []
        atexit.register(self.close)  # should the start fail: at exit, multiprocessing waits for workers that are left
        ctrl_c = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the workers inherit this from their first moment on
        for i in range(num_workers):
            indices = range(i * num_envs // num_workers, (i + 1) * num_envs // num_workers)
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs, ours, storage, env_id, seed, indices), daemon=True)
            process.start()
            theirs.close()  # the worker holds the only other end: if it dies, we read an end of file
            self.workers.append((process, ours))
        signal.signal(signal.SIGINT, ctrl_c)

    def wait(self) -> None:
        """Returns when all environments are made and reset: a second or two, in which the network can be made."""
        self.ask("be ready")

    def ask(self, command: str, argument: Any = None) -> list[Any]:
        """Sends a command to all workers and joins their answers, in the order of the environments."""
        answers = []
        try:
            for process, connection in self.workers:
                connection.send((command, argument))
            for process, connection in self.workers:
                answers += connection.recv()
        except (EOFError, OSError):
            self.close()
            raise UserError(f"worker process {process.pid} died (exit code {process.exitcode}); "
                            "--resume goes on from the last checkpoint") from None  # fmt: skip
        return answers

    def step(self, t: int) -> list[tuple[int, float, int]]:
        """Takes actions[t] and fills rewards[t], masks[t] and observations[t + 1], which is the first observation of
        the next episode where one ended. Returns (environment, return, length) of each game that ended."""
        return self.ask("step", t)

    def close(self) -> None:
        atexit.unregister(self.close)
        for _, connection in self.workers:
            connection.close()
        for process, _ in self.workers:
            process.join()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


# ---- the network and its loss ---------------------------------------------------------------------------------------


def init(layer: nn.Module, gain: float) -> nn.Module:
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class ActorCritic(nn.Module):
    """The convolutional network of Mnih et al. 2015 with two heads. The parameters have the book's names."""

    def __init__(self, num_actions: int, bf16: bool = False):
        super().__init__()
        self.conv = nn.Sequential(
            init(nn.Conv2d(4, 32, kernel_size=8, stride=4), math.sqrt(2)),  # (B, 32, 20, 20)
            nn.ReLU(inplace=True),  # in place: 5% more steps/s
            init(nn.Conv2d(32, 64, kernel_size=4, stride=2), math.sqrt(2)),  # (B, 64, 9, 9)
            nn.ReLU(inplace=True),
            init(nn.Conv2d(64, 64, kernel_size=3, stride=1), math.sqrt(2)),  # (B, 64, 7, 7)
            nn.ReLU(inplace=True),
            nn.Flatten(),  # (B, 3136)
            init(nn.Linear(64 * 7 * 7, 512), math.sqrt(2)),
            nn.ReLU(inplace=True),
        ).to(memory_format=torch.channels_last)  # a third more steps/s
        self.critic = init(nn.Linear(512, 1), 1.0)
        self.actor = init(nn.Linear(512, num_actions), 0.01)  # at the start all actions are about as likely
        self.bf16 = bf16

    def forward(self, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """observations (B, 84, 84, 4) uint8 -> values (B,) and logits (B, num_actions), float32."""
        precision = torch.bfloat16 if self.bf16 else torch.float32  # not by way of float32: 5% more steps/s (AMX)
        pixels = observations.permute(0, 3, 1, 2).to(precision).div_(255)  # (B, 4, 84, 84), channels last in memory
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.bf16):
            features = self.conv(pixels)  # (B, 512)
        with torch.autocast(pixels.device.type, enabled=False):  # in bfloat16 a value of 20 could only change by 0.125
            features = features.float()
            return self.critic(features).squeeze(-1), self.actor(features)


@torch.no_grad()
def act(network: ActorCritic, observations: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draws an action from the policy for each observation: (N, 84, 84, 4) uint8 -> (N,) int64."""
    _, logits = network(observations)
    # The argmax of p / Exp(1) is distributed as p. It is what torch.multinomial does, but for its checks: those would
    # end the program at a NaN with a traceback; here the update tells of it in one line.
    return (logits.softmax(-1) / torch.empty_like(logits).exponential_(generator=generator)).argmax(-1)


def compute_returns(rewards: torch.Tensor, masks: torch.Tensor, last_values: torch.Tensor, gamma: float):
    """Discounted returns (T, N) of rewards (T, N); last_values (N,) follow step T - 1. A mask of 0 ends a return."""
    returns, following = torch.empty_like(rewards), last_values
    for t in reversed(range(len(rewards))):
        following = returns[t] = rewards[t] + gamma * masks[t] * following
    return returns


def compute_losses(network: ActorCritic, observations: torch.Tensor, actions: torch.Tensor, returns: torch.Tensor):
    """Value loss, policy loss and entropy, each the mean over B transitions.

    observations (B, 84, 84, 4) uint8, actions (B,) int64, returns (B,) float32.
    """
    values, logits = network(observations)
    log_probs = F.log_softmax(logits, dim=-1)  # (B, num_actions)
    entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
    advantages = returns - values
    value_loss = advantages.pow(2).mean()
    policy_loss = -(advantages.detach() * log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)).mean()
    return value_loss, policy_loss, entropy


# ---- several ranks --------------------------------------------------------------------------------------------------


def gather(value: Any) -> list[Any]:
    """The values of all ranks, in their order, on every rank."""
    values = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(values, value)
    return values


def average_gradients(parameters: list[nn.Parameter], stop: bool) -> bool:
    """Averages the gradients over all ranks. Returns whether any rank was asked to stop, so that they stop together."""
    if WORLD_SIZE == 1:
        return stop
    pieces = [parameter.grad.flatten() for parameter in parameters]
    everything = torch.cat([*pieces, pieces[0].new_tensor([stop])])  # one message in place of thirteen
    dist.all_reduce(everything)
    *pieces, stops = everything.div_(WORLD_SIZE).split([*map(len, pieces), 1])
    for parameter, piece in zip(parameters, pieces):
        parameter.grad.copy_(piece.view_as(parameter.grad))
    return stops.item() > 0


# ---- what is kept on disk -------------------------------------------------------------------------------------------


def write(path: Path, content: bytes) -> None:
    """Writes beside and renames: whatever happens in between, the previous file stays whole."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
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
    buffer = io.BytesIO()  # torch.save itself does not end well on a full disk
    torch.save(content, buffer)
    write(path, buffer.getvalue())


def settings(args: Args) -> dict[str, Any]:
    """The arguments as args.json holds them: with the device that auto stands for on this machine."""
    cuda = args.device != "cpu" and torch.cuda.is_available()
    values = asdict(args) | {"runs_dir": str(args.runs_dir), "device": "cuda" if cuda else "cpu"}
    del values["resume"]
    return values


def refuse_changes(args: Args, saved: dict[str, Any], source: Path, updates_done: int = 0) -> None:
    """Raises UserError if a run with these arguments from the start would not have come to where this one is.

    How long it runs and when its learning rate falls may change, as long as the updates_done had the same rate.
    """
    saved = settings(Args()) | saved  # a run from before a flag existed had its default
    changed = {name: value for name, value in settings(args).items() if value != saved[name]}
    schedule = ["total_timesteps", "anneal_lr", "anneal_timesteps"]
    free = {"runs_dir", "checkpoint_every", "save_every", "log_every", *schedule}
    for name in changed:
        if name not in free:
            flag = f"--{name.replace('_', '-')} {changed[name]}"
            raise UserError(f"cannot resume with {flag}: {source} says {saved[name]}")
    before = Args(**saved)
    for update in range(updates_done):
        if learning_rate(args, update) != learning_rate(before, update):
            flags = [f"--{name.replace('_', '-')} {changed[name]}" for name in schedule if name in changed]
            raise UserError(f"cannot resume with {' '.join(flags)}: of the {updates_done} updates of {source}, "
                            f"update {update} would have had another learning rate")  # fmt: skip


def parse_args(argv: list[str] | None = None) -> Args:
    """Reads the flags. With --resume, args.json of that run gives the defaults, and must not be contradicted."""
    args = tyro.cli(Args, args=argv)
    path = args.resume / "args.json" if args.resume else None
    if path is None or not path.exists():
        return args
    try:
        saved = json.loads(path.read_text())
        defaults = Args(**{**saved, "runs_dir": Path(saved["runs_dir"]), "resume": args.resume})
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(f"cannot resume: {path} is damaged, or of another script") from None
    args = tyro.cli(Args, args=argv, default=defaults)
    refuse_changes(args, saved, path)
    return args


def load_checkpoint(args: Args) -> dict[str, Any] | None:
    """The checkpoint to go on from; None at the start of a run. Raises UserError if it is damaged or does not fit."""
    path = args.resume / "checkpoint.pth" if args.resume else None
    if path is None or not path.exists():
        others = {file.name for file in args.resume.glob("*") if file.suffix != ".tmp"} if args.resume else set()
        if others and "args.json" not in others:
            raise UserError(f"cannot resume: {args.resume} is neither the folder of a run nor empty")
        if any(name.startswith("weight_") for name in others - {"weight_0.pth"}):
            raise UserError(f"cannot resume: {path} is missing, and a new start would overwrite the weights beside it")
        return None
    try:
        if zipfile.ZipFile(path).testzip():  # torch.load itself does not look at the checksums
            raise ValueError
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # nothing in it can run code
        update, ranks = checkpoint["progress"]["update"], len(checkpoint["ranks"])
        refuse_changes(args, checkpoint["args"], path, update)
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except Exception:  # a damaged file makes torch.load and zipfile raise nearly anything
        raise UserError(f"cannot resume: {path} is damaged, or not a checkpoint of this script") from None
    if ranks != WORLD_SIZE:
        raise UserError(f"cannot resume: {path} holds the environments of {ranks} ranks, not of {WORLD_SIZE}")
    if update > args.total_timesteps // (args.num_envs * args.num_steps):
        raise UserError(f"--total-timesteps {args.total_timesteps} is less than this run has done")
    return checkpoint


def make_run_dir(args: Args) -> Path:
    """Makes runs/<script>__<seed>__<time>, or the folder to resume in, and writes args.json into it."""
    name = f"{Path(__file__).stem}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    run_dir = args.resume or args.runs_dir / name
    try:
        run_dir.mkdir(parents=True, exist_ok=args.resume is not None)
    except OSError as error:
        raise UserError(f"cannot make {run_dir}: {error.strerror}") from None
    for left_over in run_dir.glob("*.tmp"):  # by a process that was killed while it wrote
        left_over.unlink(missing_ok=True)
    write(run_dir / "args.json", json.dumps(settings(args), indent=2).encode())
    return run_dir


# ---- training -------------------------------------------------------------------------------------------------------


@contextmanager
def stop_requests():
    """Yields a list to which Ctrl-C and SIGTERM only add their number, so that the update under way is finished."""
    received = []
    signals = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(signum, lambda signum, _: received.append(signum)) for signum in signals]
    try:
        yield received
    finally:
        for signum, handler in zip(signals, handlers):
            signal.signal(signum, handler)


def learning_rate(args: Args, update: int) -> float:
    """The learning rate of an update, counted from 0: constant, or with --anneal-lr falling to 0 at the end."""
    timesteps_per_update = args.num_envs * args.num_steps
    num_updates = args.total_timesteps // timesteps_per_update
    falling = args.anneal_timesteps / timesteps_per_update or num_updates
    return args.learning_rate * min(1.0, (num_updates - update) / falling) if args.anneal_lr else args.learning_rate


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def log_games(writer: SummaryWriter, progress: dict[str, Any], games: list[tuple[int, float, int]]) -> None:
    """Adds whole games, each a (timestep, return, length), to the curves and to the progress."""
    for timestep, game_return, length in sorted(games):
        writer.add_scalar("charts/episodic_return", game_return, timestep)
        writer.add_scalar("charts/episodic_length", length, timestep)
        progress["last_returns"] = [*progress["last_returns"][-99:], game_return]
    progress["games"] += len(games)


def train(args: Args) -> Result:
    """Trains, and leaves weights, checkpoint, curves and result.json in the run's folder. Raises UserError, OSError.

    Ctrl-C and SIGTERM end it early with everything saved; after SIGTERM it raises SystemExit with the code 143. To
    receive these it must run in the main thread. The result is whole on rank 0 alone.
    """
    check(args)
    with make_env(args.env_id) as env:
        num_actions = int(env.action_space.n)
    checkpoint = load_checkpoint(args)
    envs_per_rank = args.num_envs // WORLD_SIZE
    try:
        storage = RolloutStorage(args.num_steps, envs_per_rank)
    except RuntimeError as error:
        raise UserError(f"no (shared) memory for {envs_per_rank} environments of {args.num_steps} steps: "
                        f"{str(error).splitlines()[0]}") from None  # fmt: skip
    run_dir = make_run_dir(args) if RANK == 0 else None
    progress = {"update": 0, "seconds": 0.0, "games": 0, "last_returns": []}
    if checkpoint:
        progress = checkpoint["progress"]
    timesteps_per_update = args.num_envs * args.num_steps
    num_updates = args.total_timesteps // timesteps_per_update
    first_timestep = progress["update"] * timesteps_per_update
    cuda = args.device != "cpu" and torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")

    with (
        stop_requests() as stop_signals,
        ParallelEnvs(storage, args.env_id, args.seed + RANK * envs_per_rank, torch.get_num_threads()) as envs,
        # What an interrupted run logged after its last checkpoint is purged: it is about to be logged again.
        SummaryWriter(run_dir, purge_step=first_timestep + 1) if RANK == 0 else nullcontext() as writer,
        tqdm(total=num_updates * timesteps_per_update, initial=first_timestep, unit="step", mininterval=1,
             dynamic_ncols=True, disable=None if RANK == 0 else True) as bar,
    ):  # fmt: skip
        if WORLD_SIZE > 1:
            dist.init_process_group()  # after the workers were forked, not to copy its threads' locks
        torch.manual_seed(args.seed)  # the same network on all ranks
        network = ActorCritic(num_actions, args.bf16).to(device)
        parameters = list(network.parameters())
        optimizer = torch.optim.RMSprop(parameters, args.learning_rate, args.rmsprop_alpha, args.rmsprop_eps)
        generator = torch.Generator(device).manual_seed(args.seed + RANK)  # draws the actions
        envs.wait()
        if checkpoint:
            try:
                network.load_state_dict(checkpoint["network"])
                optimizer.load_state_dict(checkpoint["optimizer"])
                generator.set_state(checkpoint["ranks"][RANK]["generator"])
                storage.life_returns[:] = checkpoint["ranks"][RANK]["life_returns"]
                envs.ask("load_state_dict", checkpoint["ranks"][RANK]["envs"])
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise UserError(f"cannot resume: the checkpoint does not fit: {str(error).splitlines()[0]}") from None

        def save_checkpoint() -> None:
            mine = {"generator": generator.get_state(), "life_returns": storage.life_returns.clone()}
            ranks = gather(mine | {"envs": envs.ask("state_dict")})
            if RANK == 0:
                writer.flush()
                save(run_dir / "checkpoint.pth", {
                    "args": settings(args), "progress": progress, "network": network.state_dict(),
                    "optimizer": optimizer.state_dict(), "ranks": ranks,
                })  # fmt: skip

        if len(set(gather(progress["update"]))) > 1:
            raise UserError("the ranks see different checkpoints: is the folder on a disk that all machines share?")
        if RANK == 0:
            tqdm.write(f"{network}\n{args.env_id}: {args.num_envs} environments, {len(envs.workers)} worker processes, "
                       f"network on {device}. The run's folder is {run_dir}")  # fmt: skip
            if args.bf16 and device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
                tqdm.write("--bf16: this processor has no bfloat16 instructions; float32 is 10 times faster")
            if not checkpoint:
                save(run_dir / "weight_0.pth", network.state_dict())
        if not checkpoint:
            save_checkpoint()  # now, so that a disk which is full shows now, and memory has its final size
        start, seconds_before, games = time.perf_counter(), progress["seconds"], []

        for update in range(progress["update"], num_updates):
            optimizer.param_groups[0]["lr"] = learning_rate(args, update)

            # 1. Act and step: T decisions in each of the N environments, all with the same network. With --bf16, one
            # autocast around all passes turns the weights into bfloat16 once, not in each: 4% more steps/s (AMX)
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                for t in range(args.num_steps):
                    storage.actions[t] = act(network, storage.observations[t].to(device), generator)
                    for index, game_return, length in envs.step(t):
                        timestep = update * timesteps_per_update + t * args.num_envs + RANK * envs_per_rank + index + 1
                        games.append((timestep, game_return, length))
                last_values, _ = network(storage.observations[-1].to(device))

            # 2. Returns: (T, N)
            returns = compute_returns(storage.rewards, storage.masks, last_values.cpu(), args.gamma)

            # 3. Loss: the mean over T * N transitions
            value_loss, policy_loss, entropy = compute_losses(
                network,
                storage.observations[:-1].flatten(0, 1).to(device),
                storage.actions.flatten().to(device),
                returns.flatten().to(device),
            )
            loss = args.value_loss_coef * value_loss + policy_loss - args.entropy_coef * entropy

            # 4. Update: one gradient step; the next rollout goes on where this one broke off
            optimizer.zero_grad()
            loss.backward()
            stop = average_gradients(parameters, bool(stop_signals))
            grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            storage.observations[0] = storage.observations[-1]
            progress["update"] = update + 1
            bar.update(timesteps_per_update)

            # 5. Log and save, now and then. Reading the losses makes the CPU wait for a GPU: it is done only here
            logging = update % args.log_every == 0
            keeping = (update + 1) % args.save_every == 0
            checkpointing = (update + 1) % args.checkpoint_every == 0 or stop or update + 1 == num_updates
            if not (logging or keeping or checkpointing):
                continue
            losses = torch.stack([value_loss, policy_loss, entropy, grad_norm]).tolist()
            ranks = gather({"losses": losses, "life_returns": storage.life_returns.tolist(), "games": games})
            games = []
            losses = np.mean([rank["losses"] for rank in ranks], axis=0)
            if not np.isfinite(losses).all():
                raise UserError(f"update {update}: the loss or its gradient is not finite; the last checkpoint stands")
            progress["seconds"] = seconds_before + time.perf_counter() - start
            if RANK == 0:
                log_games(writer, progress, [game for rank in ranks for game in rank["games"]])
            if logging and RANK == 0:
                timestep = (update + 1) * timesteps_per_update
                steps_per_second = (timestep - first_timestep) / (progress["seconds"] - seconds_before)
                writer.add_scalar("charts/SPS", steps_per_second, timestep)
                writer.add_scalar("charts/learning_rate", optimizer.param_groups[0]["lr"], timestep)
                writer.add_scalar("losses/value_loss", losses[0], timestep)
                writer.add_scalar("losses/policy_loss", losses[1], timestep)
                writer.add_scalar("losses/entropy", losses[2], timestep)
                lives = np.concatenate([rank["life_returns"] for rank in ranks])
                mean_return = f"mean return of the last 100 games {mean(progress['last_returns']):.1f}"
                tqdm.write(f"finished timesteps {timestep}, last lives: mean/median {lives.mean():.1f}/"
                           f"{np.median(lives):.1f}, min/max {lives.min():.0f}/{lives.max():.0f}, {mean_return}, "
                           f"{steps_per_second:.0f} steps/s")  # fmt: skip
                bar.set_postfix_str(mean_return)
            if keeping and RANK == 0:
                save(run_dir / f"weight_{update + 1}.pth", network.state_dict())
            if checkpointing:
                save_checkpoint()
            if stop:
                break
        if WORLD_SIZE > 1:
            dist.destroy_process_group()

    timesteps = progress["update"] * timesteps_per_update
    result = Result(
        seed=args.seed,
        seconds=progress["seconds"],
        versions={"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        timesteps=timesteps,
        steps_per_second=timesteps / progress["seconds"],
        mean_return=mean(progress["last_returns"]) if progress["games"] else None,
        games=progress["games"],
    )
    if RANK == 0:
        save(run_dir / "weight_end.pth", network.state_dict())
        write(run_dir / "result.json", json.dumps(asdict(result), indent=2).encode())
        if progress["update"] < num_updates:
            print(f"Stopped after {timesteps} timesteps. Go on with: python {Path(__file__).name} --resume {run_dir}")
        print(f"Everything is in {run_dir}")
    if signal.SIGTERM in stop_signals:
        sys.exit(128 + signal.SIGTERM)
    return result


if __name__ == "__main__":
    try:
        train(parse_args())
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if WORLD_SIZE == 1:
            raise
        sys.exit(f"error: rank {RANK} stopped ({str(error).splitlines()[0]}); did another rank say why?")
