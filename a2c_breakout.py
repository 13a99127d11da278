# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "ale-py==0.12.1",
#     "gymnasium[classic-control]==1.4.0",
#     "numpy==2.4.6",
#     "opencv-python==5.0.0.93",
#     "tensorboard==2.21.0",
#     "torch==2.13.0",
#     "tyro==1.0.17",
# ]
# ///
"""Advantage Actor-Critic (A2C) on Atari Breakout, learnt from the pixels alone.

One network looks at the last four frames and gives two answers: V(s), the discounted return to
expect from here (the critic), and pi(a|s), the probability of each action (the actor). Sixteen
games are played side by side for five steps; these 80 transitions then make one gradient step:

    R_t  = r_t + gamma R_{t+1}      or r_t alone where step t ended a life; R_T = V(s_T), T = 5
    A_t  = R_t - V(s_t)             the advantage: how much better it went than the critic thought
    loss = - mean A_t log pi(a_t|s_t)  +  0.25 mean A_t^2  -  0.01 mean entropy(pi(.|s_t))

In the first term A_t is a constant: no gradient flows through it. This is algorithm S3 of Mnih et
al., "Asynchronous Methods for Deep Reinforcement Learning", ICML 2016 (A3C), made synchronous.
The frames and the network are those of Mnih et al., "Human-level control through deep
reinforcement learning", Nature 518, 2015, Methods.

    python a2c_breakout.py --num-envs 16                         # 10 million timesteps
    python a2c_breakout.py --resume runs/a2c_breakout__1__...    # continues, bit for bit on a CPU
    torchrun --nproc-per-node 4 a2c_breakout.py --num-envs 64    # several processes (or machines)

A timestep is one decision in one environment, four frames of the emulator. To the learner a life
is an episode; the curves show whole games of five lives, in the game's own points.

Differs from the book (Yutaro Ogawa, つくりながら学ぶ！深層強化学習, 2018), whose recipe is
--no-clip-rewards --value-loss-coef 0.5 --no-anneal-lr --max-idle-steps 0 --average-decay 0.
Here rewards are cut to their sign, the value loss weighs half as much, the learning rate falls to
0, a game ends after 400 decisions without a reward, and the weights saved for play are a moving
average. A process for each core plays several environments with one network in shared memory,
where the book has a process for each environment; screens are turned gray before, not after, the
maximum of two is taken. docs/breakout.md has the reasons and the numbers.
"""

import argparse
import copy
import ctypes
import io
import json
import math
import os
import platform
import signal
import sys
import threading
import time
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

# Let PyTorch's OpenMP threads spin for only 0.1 ms before they sleep: 15% more steps/s.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # it is read when torch is imported
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until train(), Ctrl-C ends us silently
    threading.excepthook = lambda _: None  # TensorBoard raises its thread's errors in ours again

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

# torchrun starts this file once for each rank and says so here; started by hand, it is rank 0 of 1.
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@dataclass
class Args:
    """Train A2C on an Atari game."""

    env_id: str = "BreakoutNoFrameskip-v4"  # or another <Game>NoFrameskip-v4 of ale-py
    seed: int = 1  # seed of the network and of the environments, from 0 to 2**31 - 1
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes CUDA where there is one
    bf16: bool = False  # all layers but the last in bfloat16: faster on a few processors
    num_envs: int = 16  # environments side by side, on all ranks together, 1 or more
    num_steps: int = 5  # steps between two updates, the length of the return, 1 or more
    total_timesteps: int = 10_000_000  # decisions in all environments, num_envs * num_steps or more
    learning_rate: float = 7e-4  # learning rate of RMSprop, above 0
    anneal_lr: bool = True  # lower the learning rate linearly, to 0 at the end
    rmsprop_alpha: float = 0.99  # decay of RMSprop's mean of squared gradients, from 0 to below 1
    rmsprop_eps: float = 1e-5  # term in RMSprop's denominator, above 0
    gamma: float = 0.99  # discount of a reward one step later, from 0 to 1
    clip_rewards: bool = True  # learn from a reward's sign; curves show the game's own points
    max_idle_steps: int = 400  # end a game after so many decisions without reward; 0: never
    value_loss_coef: float = 0.25  # weight of the value loss, from 0
    entropy_coef: float = 0.01  # weight of the entropy bonus, from 0
    max_grad_norm: float = 0.5  # norm to which the gradient is clipped, above 0
    average_decay: float = 0.99  # decay, per 10 updates, of the kept average; 0: the last weights
    runs_dir: Path = Path("runs")  # folder in which the run's own folder is made
    resume: Path | None = None  # folder of a run to continue, or a new one to begin in
    checkpoint_every: int = 2000  # updates between two checkpoints, 1 or more
    save_every: int = 12_500  # updates between two weight_*.pth, 1 or more
    log_every: int = 100  # updates between two lines of output, 1 or more

    def __post_init__(self):  # tyro shows the message; a NaN fails every comparison
        batch = self.num_envs * self.num_steps
        for names, good, rule in [
            ("num_envs num_steps", lambda x: x >= 1, "1 or more"),
            ("checkpoint_every save_every log_every", lambda x: x >= 1, "1 or more"),
            ("max_idle_steps", lambda x: x >= 0, "0 or more"),
            ("seed", lambda x: 0 <= x < 2**31, "from 0 to 2**31 - 1"),
            ("learning_rate rmsprop_eps max_grad_norm", lambda x: 0 < x < math.inf, "above 0"),
            ("value_loss_coef entropy_coef", lambda x: 0 <= x < math.inf, "0 or more"),
            ("rmsprop_alpha average_decay", lambda x: 0 <= x < 1, "from 0 to below 1"),
            ("gamma", lambda x: 0 <= x <= 1, "from 0 to 1"),
            ("total_timesteps", lambda x: x >= batch, f"{batch} or more"),
            ("device", lambda x: x != "cuda" or torch.cuda.is_available(), "auto or cpu (no CUDA)"),
        ]:
            for name in names.split():
                if not good(getattr(self, name)):
                    flag = f"--{name.replace('_', '-')}"
                    raise ValueError(f"{flag} must be {rule}, not {getattr(self, name)}")


# ---- environment ---------------------------------------------------------------


class NoopReset(gym.Wrapper):
    """Begins a game with 1 to 30 no-ops, so that not all games begin alike (Mnih et al. 2015)."""

    def reset(self, **kwargs):
        observation, info = self.env.reset(**kwargs)
        for _ in range(self.unwrapped.np_random.integers(1, 31)):
            observation, _, terminated, truncated, info = self.env.step(0)
            if terminated or truncated:
                observation, info = self.env.reset()
        return observation, info


class MaxAndSkip(gym.Wrapper):
    """Repeats an action for 4 frames and shows the maximum of the last two, (210, 160) uint8, gray.

    The Atari draws some sprites in every other frame only: the brighter of two pixels shows them.
    The screens are those of gymnasium.wrappers.AtariPreprocessing, bit for bit.
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


class EpisodicLife(gym.Wrapper):
    """Ends the episode when a life is lost, so that losing it has a cost; the game goes on.

    When a whole game ends, info["game"] is its score and its length in decisions. A game also ends
    after max_idle_steps decisions without a reward (in training; 0: never).
    """

    def __init__(self, env: gym.Env, max_idle_steps: int = 0):
        super().__init__(env)
        self.max_idle_steps = max_idle_steps
        self.game = {"over": True}  # reset() adds lives, score, length, idle

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        game, lives_before = self.game, self.game["lives"]
        game["lives"] = self.unwrapped.ale.lives()
        game["score"] += reward
        game["length"] += 1
        game["idle"] = 0 if reward else game["idle"] + 1
        truncated = truncated or 0 < self.max_idle_steps <= game["idle"]
        game["over"] = terminated or truncated
        if game["over"]:
            info["game"] = (game["score"], game["length"])
        # Qbert shows 0 lives for some frames before its game is over.
        life_lost = 0 < game["lives"] < lives_before
        return observation, reward, terminated or life_lost, truncated, info

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        info = {}
        if seed is None and not self.game["over"]:
            observation, _, _, _, info = self.step(0)  # the next life begins with a no-op
        if seed is not None or self.game["over"]:  # the no-op, too, can end a game
            observation, _ = self.env.reset(seed=seed, options=options)
            lives = self.unwrapped.ale.lives()
            self.game = {"over": False, "lives": lives, "score": 0.0, "length": 0, "idle": 0}
        return observation, info


class Warp(gym.ObservationWrapper):
    """Shrinks the gray screen to (84, 84)."""

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return cv2.resize(observation, (84, 84), interpolation=cv2.INTER_AREA)


class FrameStack(gym.Wrapper):
    """Shows the last four frames, (4, 84, 84) uint8, the newest last: a single one shows no motion.

    The array is the same at every step: copy it if you keep it.
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
        self.frames = np.zeros((4, 84, 84), np.uint8)

    def reset(self, **kwargs):
        frame, info = self.env.reset(**kwargs)
        self.frames[:] = 0  # nothing of the life before
        self.frames[-1] = frame
        return self.frames, info

    def step(self, action):
        frame, reward, terminated, truncated, info = self.env.step(action)
        self.frames[:-1] = self.frames[1:]
        self.frames[-1] = frame
        return self.frames, reward, terminated, truncated, info


def make_env(env_id: str, max_idle_steps: int = 0) -> gym.Env:
    """The game in its wrappers; ValueError for anything but an Atari game without frame skip."""
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner
    gym.register_envs(ale_py)
    if env_id not in gym.registry or not env_id.endswith("NoFrameskip-v4"):
        raise ValueError(f"--env-id {env_id}: not a game of ale-py, <Game>NoFrameskip-v4")
    # From frame 65,536 on, Breakout's cartridge serves no ball. Other games may last 108,000.
    max_frames = 65_536 if env_id.startswith("Breakout") else 108_000
    # MaxAndSkip reads the screen itself; RAM is the cheapest observation to ask for.
    env = gym.make(
        env_id, obs_type="ram", max_num_frames_per_episode=max_frames, disable_env_checker=True
    )
    return FrameStack(Warp(EpisodicLife(MaxAndSkip(NoopReset(env)), max_idle_steps)))


# ---- network -------------------------------------------------------------------


def init(layer: nn.Module, gain: float) -> nn.Module:
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class ActorCritic(nn.Module):
    """The network of Mnih et al. 2015 with two heads; named as in the book, whose weights load."""

    def __init__(self, num_actions: int, bf16: bool = False):
        super().__init__()
        self.bf16 = bf16
        self.conv = nn.Sequential(
            init(nn.Conv2d(4, 32, kernel_size=8, stride=4), math.sqrt(2)),  # (B, 32, 20, 20)
            nn.ReLU(inplace=True),
            init(nn.Conv2d(32, 64, kernel_size=4, stride=2), math.sqrt(2)),  # (B, 64, 9, 9)
            nn.ReLU(inplace=True),
            init(nn.Conv2d(64, 64, kernel_size=3, stride=1), math.sqrt(2)),  # (B, 64, 7, 7)
            nn.ReLU(inplace=True),
            nn.Flatten(),  # (B, 3136)
            init(nn.Linear(64 * 7 * 7, 512), math.sqrt(2)),
            nn.ReLU(inplace=True),
        ).to(memory_format=torch.channels_last)  # a third more steps/s
        self.critic = init(nn.Linear(512, 1), 1.0)
        self.actor = init(nn.Linear(512, num_actions), 0.01)  # at first all equally likely

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """observations (B, 4, 84, 84) uint8 -> values (B,), logits (B, num_actions), float32."""
        with torch.autocast(observations.device.type, torch.bfloat16, enabled=self.bf16):
            features = self.conv(observations / 255)  # (B, 512)
        features = features.float()  # in bfloat16 a value of 20 could only change by 0.125
        return self.critic(features).squeeze(-1), self.actor(features)


# ---- rollout: the workers ------------------------------------------------------


class RolloutStorage:
    """T steps of N environments, in memory that the workers write and the learner reads."""

    def __init__(self, num_steps: int, num_envs: int):
        T, N = num_steps, num_envs
        frames = torch.zeros(T + 1, N, 84, 84, 4, dtype=torch.uint8).share_memory_()
        self.observations = frames.permute(0, 1, 4, 2, 3)  # (T + 1, N, 4, 84, 84), channels last
        self.actions = torch.zeros(T, N, dtype=torch.int64).share_memory_()
        self.rewards = torch.zeros(T, N).share_memory_()
        self.masks = torch.zeros(T, N).share_memory_()  # 0 where an episode ended, else 1


class Worker:
    """Plays some of this rank's environments, with one thread and the shared network."""

    def __init__(self, args: Args, network: ActorCritic, storage: RolloutStorage, indices: range):
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        self.network, self.storage, self.indices = network, storage, indices
        self.envs = [make_env(args.env_id, args.max_idle_steps) for _ in indices]
        # Hashed from the run's seed: with seed + i, runs 1 and 2 would share environments.
        seeds = np.random.SeedSequence(args.seed).generate_state(args.num_envs)
        self.num_envs = args.num_envs
        # The number of this worker's first environment; all ranks have equally many.
        self.first = RANK * args.num_envs // WORLD_SIZE + indices.start
        for index, seed, env in zip(indices, seeds[self.first :], self.envs):
            observation, _ = env.reset(seed=int(seed))
            storage.observations[-1, index] = torch.from_numpy(observation)  # rollout() begins here

    @torch.no_grad()
    def act(self, observations: Tensor) -> np.ndarray:
        """Draws an action for each environment: (n, 4, 84, 84) uint8 -> (n,) int64."""
        _, logits = self.network(observations)  # (n, num_actions)
        # argmax(logits + Gumbel noise) is a draw from softmax(logits). The noise comes from each
        # environment's own generator, so that it does not matter which process plays it.
        noise = [env.unwrapped.np_random.gumbel(size=logits.shape[1]) for env in self.envs]
        return (logits.numpy() + noise).argmax(axis=-1)

    def rollout(self, update: int) -> list[tuple[int, float, int]]:
        """Plays T steps in each environment and stores them.

        Returns (timestep, score, length) of each game that ended.
        """
        mine = slice(self.indices.start, self.indices.stop)
        observations = self.storage.observations[:, mine]  # (T + 1, n, 4, 84, 84)
        actions = self.storage.actions[:, mine].numpy()  # (T, n)
        rewards = self.storage.rewards[:, mine].numpy()
        masks = self.storage.masks[:, mine].numpy()
        observations[0] = observations[-1]  # goes on where the last rollout ended
        games = []
        for t in range(len(actions)):
            actions[t] = self.act(observations[t])
            for i, env in enumerate(self.envs):
                observation, rewards[t, i], terminated, truncated, info = env.step(actions[t, i])
                masks[t, i] = not (terminated or truncated)  # no bootstrapping at a cut either
                if terminated or truncated:
                    observation, reset_info = env.reset()
                    info |= reset_info
                if "game" in info:  # ended by the step, or by the no-op of the reset
                    timestep = (update * len(actions) + t) * self.num_envs + self.first + i + 1
                    games.append((timestep, *info["game"]))
                observations[t + 1, i] = torch.from_numpy(observation)
        return games

    def state_dict(self) -> list[dict[str, Any]]:
        """All that the future of each environment depends on."""
        return [
            {
                "game": env.get_wrapper_attr("game"),
                "frames": env.frames.tobytes(),  # torch.load, weights_only, refuses arrays
                "emulator": env.unwrapped.ale.cloneSystemState().serialize(),
                "generator": env.unwrapped.np_random.bit_generator.state,
            }
            for env in self.envs
        ]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Takes over its environments' part of the states of all environments, on all ranks."""
        for index, env, state in zip(self.indices, self.envs, states[self.first :]):
            env.get_wrapper_attr("game").update(state["game"])
            env.frames[:] = np.frombuffer(state["frames"], np.uint8).reshape(4, 84, 84)
            # The emulator has played in __init__: a fresh one would go on differently in Qbert.
            env.unwrapped.ale.restoreSystemState(ale_py.ALEState(state["emulator"]))
            env.unwrapped.np_random.bit_generator.state = state["generator"]
            self.storage.observations[-1, index] = torch.from_numpy(env.frames)


def run_worker(worker_end, parent_end, *worker_args) -> None:
    """A worker's process: does what it is told, until its parent is gone."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)  # it is the parent that is asked to stop
    parent_end.close()  # recv() below raises EOFError once the parent has gone
    worker = Worker(*worker_args)
    with suppress(EOFError, OSError):
        while True:
            method, *arguments = worker_end.recv()
            worker_end.send(getattr(worker, method)(*arguments))


@contextmanager
def start_workers(args: Args, network: ActorCritic, storage: RolloutStorage):
    """Starts a worker for each of PyTorch's threads; yields tell_workers(method, *arguments).

    That calls the method in every worker and joins the answers, in the order of the environments.
    """
    # macOS cannot fork safely, Windows not at all.
    context = torch.multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    num_envs = storage.actions.shape[1]  # those of this rank
    num_workers = min(torch.get_num_threads(), num_envs)  # torchrun gives each rank one thread
    workers = []

    def tell_workers(method: str, *arguments) -> list[Any]:
        answers = []
        try:
            for process, parent_end in workers:
                parent_end.send((method, *arguments))
            for process, parent_end in workers:
                answers += parent_end.recv() or []
        except (EOFError, OSError):
            raise ValueError(f"worker process {process.pid} died; continue with --resume") from None
        return answers

    try:
        for i in range(num_workers):
            indices = range(i * num_envs // num_workers, (i + 1) * num_envs // num_workers)
            parent_end, worker_end = context.Pipe()
            run_args = (worker_end, parent_end, args, network, storage, indices)
            process = context.Process(target=run_worker, args=run_args, daemon=True)
            process.start()
            worker_end.close()  # only the worker holds it now: if it dies, recv() ends
            workers.append((process, parent_end))
        yield tell_workers
    finally:
        for process, _ in workers:
            process.kill()
            process.join()


# ---- learning ------------------------------------------------------------------


def compute_returns(rewards: Tensor, masks: Tensor, last_values: Tensor, gamma: float) -> Tensor:
    """R_t = r_t + gamma * mask_t * R_{t+1}, and R_T = V(s_T) (Mnih et al. 2016, algorithm S3).

    rewards, masks and the returns are (T, N), last_values (N,). A mask of 0 ends a return.
    """
    returns, next_returns = torch.empty_like(rewards), last_values
    for t in reversed(range(len(rewards))):
        next_returns = returns[t] = rewards[t] + gamma * masks[t] * next_returns
    return returns


def compute_losses(
    network: ActorCritic, observations: Tensor, actions: Tensor, returns: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Value loss, policy loss and entropy, each the mean over B transitions.

    observations (B, 4, 84, 84) uint8, actions (B,) int64, returns (B,) float32.
    """
    values, logits = network(observations)
    log_probs = F.log_softmax(logits, dim=-1)  # (B, num_actions)
    entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
    advantages = returns - values  # (B,)
    value_loss = advantages.pow(2).mean()
    action_log_probs = log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)  # (B,)
    policy_loss = -(advantages.detach() * action_log_probs).mean()
    return value_loss, policy_loss, entropy


def learn(args: Args, network: ActorCritic, storage: RolloutStorage, tell_workers, run) -> None:
    """Trains until the end or a stop signal. Raises ValueError when a gradient is not finite.

    The workers play with the network, and the learner is trained: on a CPU they are one and the
    same, on CUDA the learner's weights are copied to the network for each rollout. The run (a Run,
    below) knows how far it is, collects the games that ended and the stop signals, logs and saves.
    """
    on_cuda = args.device != "cpu" and torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))  # a machine's ranks share its GPUs
    device = torch.device(f"cuda:{local_rank % torch.cuda.device_count()}" if on_cuda else "cpu")
    learner = copy.deepcopy(network).to(device) if on_cuda else network
    averaged = copy.deepcopy(learner).requires_grad_(False)
    parameters = list(learner.parameters())
    optimizer = torch.optim.RMSprop(parameters, alpha=args.rmsprop_alpha, eps=args.rmsprop_eps)
    # This loads the checkpoint, or writes the first one.
    run.begin({"network": learner, "averaged": averaged, "optimizer": optimizer}, tell_workers)
    num_updates = args.total_timesteps // (args.num_envs * args.num_steps)

    for update in range(run.progress["update"], num_updates):
        fraction_left = 1 - update / num_updates if args.anneal_lr else 1
        optimizer.param_groups[0]["lr"] = args.learning_rate * fraction_left

        # 1. rollout: T steps in each of N environments, into the storage
        if on_cuda:
            network.load_state_dict(learner.state_dict())
        run.ended_games += tell_workers("rollout", update)

        # 2. returns: (T, N)
        with torch.no_grad():
            last_values, _ = learner(storage.observations[-1].to(device))  # (N,)
        rewards = storage.rewards.sign() if args.clip_rewards else storage.rewards
        returns = compute_returns(rewards, storage.masks, last_values.cpu(), args.gamma)

        # 3. loss: over the batch of T * N transitions
        value_loss, policy_loss, entropy = compute_losses(
            learner,
            storage.observations[:-1].flatten(0, 1).to(device),
            storage.actions.flatten().to(device),
            returns.flatten().to(device),
        )
        loss = policy_loss + args.value_loss_coef * value_loss - args.entropy_coef * entropy

        # 4. update
        optimizer.zero_grad()
        loss.backward()
        # Averaged with the gradients, a stop signal to one rank is above 0 on all: all stop.
        stop = torch.tensor(float(len(run.stop_signals)), device=device)
        average_over_ranks([stop, *(parameter.grad for parameter in parameters)])
        grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        if not grad_norm.isfinite():
            raise ValueError(f"update {update}: gradient not finite; the last checkpoint is intact")
        optimizer.step()
        # Every tenth is enough for an average: those in between are nearly the same.
        if update % 10 == 0 or args.average_decay == 0:
            with torch.no_grad():
                for mean, weight in zip(averaged.parameters(), parameters):
                    mean.lerp_(weight, 1 - args.average_decay)

        # 5. log, and save now and then
        run.progress["update"] = update + 1
        if update % args.log_every == 0:
            losses = {"value_loss": value_loss, "policy_loss": policy_loss, "entropy": entropy}
            run.log(losses, optimizer.param_groups[0]["lr"])
        if (update + 1) % args.save_every == 0:
            run.save_weights(f"weight_{update + 1}.pth")
        if (update + 1) % args.checkpoint_every == 0 or stop > 0 or update + 1 == num_updates:
            run.save_checkpoint(tell_workers)
        if stop > 0:
            break


# ---- several ranks (torchrun) --------------------------------------------------


def average_over_ranks(tensors: list[Tensor]) -> None:
    """Replaces each tensor by its mean over all ranks, in one message."""
    if WORLD_SIZE > 1:
        joined = torch.cat([tensor.flatten() for tensor in tensors]).cpu()
        dist.all_reduce(joined)
        means = (joined / WORLD_SIZE).split([tensor.numel() for tensor in tensors])
        for tensor, mean in zip(tensors, means):
            tensor.copy_(mean.view_as(tensor))


def gather(value: Any) -> list[Any]:
    """The values of all ranks, in their order, on every rank."""
    values = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(values, value)
    return values


# ---- the run: its folder, curves, weights and checkpoints ----------------------


class Run:
    """The folder of a run: its curves, weights and checkpoints. Rank 0 alone writes them.

    Making one refuses bad input before a worker is started; begin() then needs the workers.
    """

    def __init__(self, args: Args):
        name = f"{Path(__file__).stem}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
        self.args, self.folder = args, args.resume or args.runs_dir / name
        refuse_changes(args)
        if RANK == 0:
            self.folder.mkdir(parents=True, exist_ok=args.resume is not None)
            self.lock = lock(self.folder)
        self.checkpoint = load_checkpoint(self.folder, args)  # {} where a run begins
        fresh = {"update": 0, "seconds": 0.0, "games": 0, "last_scores": []}
        self.progress = self.checkpoint.get("progress", fresh)
        self.ended_games, self.stop_signals = [], []
        if self.timesteps > args.total_timesteps:
            raise ValueError(f"--total-timesteps: {self.folder} has done {self.timesteps} already")

    @property
    def timesteps(self) -> int:
        return self.progress["update"] * self.args.num_envs * self.args.num_steps

    def begin(self, parts: dict[str, Any], tell_workers) -> None:
        """Restores the network, its average, the optimizer and the workers, or saves them."""
        self.parts = parts
        checkpoint, self.checkpoint = self.checkpoint, None  # freed when this returns
        if len(set(gather((bool(checkpoint), self.timesteps)))) > 1:
            raise ValueError("the ranks see different checkpoints: do they share a disk?")
        device = parts["network"].actor.weight.device.type
        self.machine = f"{device}, {torch.get_num_threads()} threads, {WORLD_SIZE} rank(s)"
        if checkpoint:
            try:
                for name, part in parts.items():
                    part.load_state_dict(checkpoint[name])
                tell_workers("load_state_dict", checkpoint["envs"])
            except (KeyError, TypeError, RuntimeError):
                raise ValueError(f"{self.folder}/checkpoint.pth is of another version") from None
        if RANK == 0:
            save(self.folder / "args.json", asdict(self.args))
            # Purge the points logged after the checkpoint: they will be logged again.
            self.writer = SummaryWriter(self.folder, purge_step=self.timesteps + 1)
            print(f"{parts['network']}\n{self.args.env_id} on {self.machine}, in {self.folder}")
            if checkpoint and checkpoint["machine"] != self.machine:
                print(f"It ran on {checkpoint['machine']}: it continues, but not bit for bit.")
        self.start = time.perf_counter() - self.progress["seconds"]
        if not checkpoint:
            self.save_weights("weight_0.pth")
            self.save_checkpoint(tell_workers)  # now, so that a full disk shows now
            self.start = time.perf_counter()  # the start of the workers does not count

    def log_games(self) -> None:
        """Brings the progress and the curves up to date with the games that ended, on all ranks."""
        games, self.ended_games = sorted(sum(gather(self.ended_games), [])), []
        progress = self.progress
        progress["seconds"] = time.perf_counter() - self.start
        progress["games"] += len(games)
        progress["last_scores"] += [score for _, score, _ in games]
        del progress["last_scores"][:-100]
        if RANK == 0:
            for timestep, score, length in games:  # whole games, under CleanRL's names
                self.writer.add_scalar("charts/episodic_return", score, timestep)
                self.writer.add_scalar("charts/episodic_length", length, timestep)

    def log(self, losses: dict[str, Tensor], learning_rate: float) -> None:
        """Adds a point to each curve and prints a line."""
        self.log_games()
        speed = self.timesteps / self.progress["seconds"]
        curves = {"charts/SPS": speed, "charts/learning_rate": learning_rate}
        curves |= {f"losses/{name}": loss.item() for name, loss in losses.items()}
        scores = self.progress["last_scores"] or [math.nan]
        hours = (self.args.total_timesteps - self.timesteps) / speed / 3600
        if RANK == 0:
            for name, value in curves.items():
                self.writer.add_scalar(name, value, self.timesteps)
            print(
                f"finished timesteps {self.timesteps}, last 100 games: mean/median "
                f"{np.mean(scores):.1f}/{np.median(scores):.1f}, min/max {min(scores):.0f}/"
                f"{max(scores):.0f}, {speed:.0f} steps/s, {hours:.1f} h left",
                flush=True,
            )

    def save_weights(self, name: str) -> None:
        if RANK == 0:
            weights = self.parts["averaged"].state_dict()
            save(self.folder / name, {key: weight.cpu() for key, weight in weights.items()})

    def save_checkpoint(self, tell_workers) -> None:
        """Saves all that the rest of the run depends on."""
        self.log_games()
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state["envs"] = sum(gather(tell_workers("state_dict")), [])
        state |= {"env_id": self.args.env_id, "machine": self.machine, "progress": self.progress}
        if RANK == 0:
            self.writer.flush()
            save(self.folder / "checkpoint.pth", state)

    def finish(self) -> dict[str, Any]:
        """Saves the last weights and result.json, and returns what that says."""
        seconds, games = self.progress["seconds"], self.progress["games"]
        result = {
            "seed": self.args.seed,
            "seconds": seconds,
            "versions": {m.__name__: m.__version__ for m in (ale_py, cv2, gym, np, torch)}
            | {"python": platform.python_version()},
            "timesteps": self.timesteps,
            "steps_per_second": self.timesteps / seconds,
            "mean_return": float(np.mean(self.progress["last_scores"])) if games else None,
            "games": games,
        }
        self.save_weights("weight_end.pth")
        if RANK == 0:
            self.writer.close()
            save(self.folder / "result.json", result)
            left = self.args.total_timesteps - self.timesteps
            unfinished = left >= self.args.num_envs * self.args.num_steps
            how = f"; continue with --resume {self.folder}" if unfinished else ""
            print(f"{self.timesteps} timesteps are done{how}. Everything is in {self.folder}")
        return result


def lock(folder: Path):
    """Locks a run's folder until this process ends, and returns the open file."""
    file = open(folder / "lock", "w")
    with suppress(ImportError, OSError):  # Windows has no fcntl, some network disks have no locks
        import fcntl

        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by the workers
        except (BlockingIOError, PermissionError):
            raise ValueError(f"another process is training in {folder}") from None
    return file


def save(path: Path, content: Any) -> None:
    """Writes beside and renames: after a kill or a power cut the old or the new file is whole."""
    buffer = io.BytesIO()  # on a full disk torch.save itself fails with an error of its own
    if path.suffix == ".json":
        buffer.write(json.dumps(content, indent=2, default=str).encode())
    else:
        torch.save(content, buffer)
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror}") from None
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        with suppress(OSError):  # some network disks cannot
            os.fsync(folder)  # the new name, too, has to reach the disk
        os.close(folder)


def read_args(folder: Path) -> Args | None:
    """The flags that the run in a folder began with; None where no run has begun."""
    path = folder / "args.json"
    if not path.exists():
        if any(file.name != "lock" and file.suffix != ".tmp" for file in folder.glob("*")):
            raise ValueError(f"--resume: {folder} is neither the folder of a run nor empty")
        return None
    here = {"resume": folder, "runs_dir": Path("runs")}
    try:
        flags = json.loads(path.read_text())
        flags["device"] = flags["device"].replace("cuda", "auto")  # there may be none here
        return Args(**flags | here)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--resume: {path} is damaged, or of another version: {error}") from None


def refuse_changes(args: Args) -> None:
    """Raises ValueError if a flag differs that a resumed run cannot change."""
    may_change = {"device", "resume", "runs_dir", "checkpoint_every", "save_every", "log_every"}
    if not args.anneal_lr:  # a falling rate depends on it from the first update on
        may_change.add("total_timesteps")
    began_with = args.resume and read_args(args.resume)
    for name, value in asdict(began_with).items() if began_with else ():
        if name not in may_change and getattr(args, name) != value:
            flag = f"--{name.replace('_', '-')}"
            why = " while the learning rate falls" if name == "total_timesteps" else ""
            raise ValueError(f"{flag}: {args.resume} began with {value}; that cannot change{why}")


def load_checkpoint(folder: Path, args: Args) -> dict[str, Any]:
    """The checkpoint in a folder, {} where a run begins. ValueError if damaged or foreign."""
    path = folder / "checkpoint.pth"
    if not path.exists():
        if any(file.name != "weight_0.pth" for file in folder.glob("weight_*.pth")):
            raise ValueError(f"{path} is missing; a new start would overwrite the weights")
        return {}
    try:
        if zipfile.ZipFile(path).testzip():  # torch.load does not look at the checksums
            raise ValueError
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if (checkpoint["env_id"], len(checkpoint["envs"])) != (args.env_id, args.num_envs):
            raise ValueError  # the message comes below
    except OSError:
        raise
    except Exception:  # damage makes zipfile and torch.load raise nearly anything
        raise ValueError(f"{path} is damaged, of another version, or not of this run") from None
    return checkpoint


@contextmanager
def stop_requests(received: list[int]):
    """Ctrl-C and SIGTERM add their number to a list, and the update under way is finished.

    A second one ends everything at once, in case a worker hangs. Within half a second it is taken
    for the same request: timeout(1) sends each twice, torchrun one that the ranks had already.
    """
    first = math.inf

    def receive(signum, _):
        nonlocal first
        if time.monotonic() > first + 0.5:
            for process in torch.multiprocessing.active_children():
                process.kill()
            os._exit(128 + signum)
        first = min(first, time.monotonic())
        received.append(signum)

    before = {signum: signal.signal(signum, receive) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def train(args: Args) -> dict:
    """A run, from its start or its last checkpoint; returns what result.json says.

    To be called in the main thread, which alone receives signals: Ctrl-C and SIGTERM end it early
    with everything saved (SIGTERM by SystemExit with code 143). Raises ValueError for bad input, a
    gradient that is not finite or a worker that died, OSError when a file cannot be written.
    """
    if args.num_envs % WORLD_SIZE:
        raise ValueError(f"--num-envs must be a multiple of {WORLD_SIZE}, the number of ranks")
    with make_env(args.env_id) as env:
        num_actions = int(env.action_space.n)
    try:
        storage = RolloutStorage(args.num_steps, args.num_envs // WORLD_SIZE)
    except RuntimeError:
        raise ValueError("--num-envs, --num-steps: not enough memory for so many") from None
    if platform.libc_ver()[0] == "glibc":  # keep the memory that an update frees: 13% more steps/s
        for option, size in ((-1, 2**30), (-3, 2**25)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(option, size)
    torch.manual_seed(args.seed)  # the same network on all ranks
    network = ActorCritic(num_actions, args.bf16).share_memory()
    run = Run(args)
    with start_workers(args, network, storage) as tell_workers:
        if WORLD_SIZE > 1:
            # gloo works with and without GPUs. After the fork, which would copy its threads' locks.
            dist.init_process_group("gloo")
        with stop_requests(run.stop_signals):
            learn(args, network, storage, tell_workers, run)
            result = run.finish()
    if WORLD_SIZE > 1:
        dist.destroy_process_group()
    if signal.SIGTERM in run.stop_signals:
        sys.exit(128 + signal.SIGTERM)
    return result


def parse_args(argv: list[str] | None = None) -> Args:
    """Reads the flags; with --resume, those that the run began with are the defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", type=Path)
    folder = parser.parse_known_args(argv)[0].resume
    return tyro.cli(Args, args=argv, default=folder and read_args(folder))


if __name__ == "__main__":
    try:
        train(parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if WORLD_SIZE == 1:
            raise
        sys.exit(f"error: rank {RANK} stopped ({error}); did another rank say why?")
