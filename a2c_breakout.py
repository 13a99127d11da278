# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "ale-py==0.12.1", "gymnasium==1.4.0", "numpy==2.4.6",
#     "opencv-python==5.0.0.93", "tensorboard==2.21.0", "torch==2.13.0", "tyro==1.0.17",
# ]
# ///
"""Advantage Actor-Critic (A2C) on Atari Breakout, learnt from the screen.

One network sees the screens of the last four decisions, and gives two answers: V(s), the
discounted return to expect from here (the critic), and pi(a|s), the probability of each action (the
actor). Sixteen games are played side by side for five steps; these 80 transitions then make one
gradient step, and are forgotten: their returns are this policy's, not the next one's (on-policy).

    R_t  = r_t + gamma R_{t+1}    or r_t alone where a life or the game ended; R_T = V(s_T), T = 5
    A_t  = R_t - V(s_t)
    loss = - mean A_t log pi(a_t|s_t)  +  0.25 mean A_t^2  -  0.01 mean entropy(pi(.|s_t))

R_t is an n-step return: five rewards for the first step, one for the last, then V (bootstrapping).
A_t estimates the advantage: how much better it went than the critic (the baseline) expected. The
first term, the policy gradient, makes actions of A_t > 0 more likely (with A_t as a constant), the
second moves V(s_t) to R_t, the entropy bonus keeps the policy from settling too soon.

Mnih et al., "Asynchronous Methods for Deep Reinforcement Learning", ICML 2016, algorithm S3, made
synchronous; frames and network of Mnih et al., Nature 518, 2015, Methods.

    python a2c_breakout.py --num-envs 16                         # 10 million timesteps
    python a2c_breakout.py --resume runs/a2c_breakout__1__...    # goes on, bit for bit on a CPU
    OMP_NUM_THREADS=4 torchrun --nproc-per-node 4 a2c_breakout.py --num-envs 64     # on 16 cores

A timestep is one decision in one game, four frames. A life is an episode, r_t the points' sign.
First read compute_returns, compute_losses and learn(), then wrappers, network and work().

Differs from the book (Yutaro Ogawa, つくりながら学ぶ！深層強化学習, 2018) in flags. The book's are
--no-clip-rewards --value-loss-coef 0.5 --no-anneal-lr --max-idle-steps 0 --average-decay 0;
its MaxAndSkip takes the maximum in colour. docs/breakout.md and docs/book.md say why.
"""

import copy
import ctypes
import io
import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # torch's threads spin 0.1 ms: 15% more steps/s
os.environ["OMP_PROC_BIND"] = "false"  # a bound one would keep all workers on its core

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

# torchrun starts this file several times, each one a rank, and says so here; by hand: rank 0 of 1.
RANK = int(os.environ.get("RANK") or 0) % (WORLD_SIZE := int(os.environ.get("WORLD_SIZE") or 1))
STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
stop_requests: dict[int, float] = {}  # signals, and when they first came: see request_stop


@dataclass  # tyro makes flags of the fields, and help of their comments
class Args:
    """Train A2C on an Atari game."""

    env_id: str = "BreakoutNoFrameskip-v4"  # or another <Game>NoFrameskip-v4 of ale-py
    seed: int = 1  # seed of the network and of the environments, from 0 to 2**31 - 1
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes CUDA where there is one
    num_envs: int = 16  # environments side by side, on all ranks together, 1 or more
    num_steps: int = 5  # steps between two updates, the length of the return, 1 or more
    total_timesteps: int = 10_000_000  # decisions in all environments, num_envs * num_steps or more
    learning_rate: float = 7e-4  # learning rate of RMSprop, above 0
    anneal_lr: bool = True  # lower the learning rate linearly, to 0 at the end
    rmsprop_eps: float = 1e-5  # added to RMSprop's root, in the paper inside it; above 0
    gamma: float = 0.99  # discount of a reward one step later, from 0 to 1
    clip_rewards: bool = True  # learn from a reward's sign; curves show the game's own points
    max_idle_steps: int | None = None  # unrewarded steps that end a game; 0: never; Breakout: 400
    sticky_actions: float = 0.0  # chance per frame that the last action goes on (in papers 0.25)
    value_loss_coef: float = 0.25  # weight of the value loss, from 0
    entropy_coef: float = 0.01  # weight of the entropy bonus, from 0
    max_grad_norm: float = 0.5  # norm to which the gradient is clipped, above 0
    average_decay: float = 0.99  # share that the mean weights keep per 10 updates; 0: last weights
    runs_dir: Path = Path("runs")  # folder in which the run's own folder is made
    resume: Path | None = None  # folder of a run to continue, or a new one to begin in
    checkpoint_every: int = 2000  # updates between two checkpoints, 1 or more

    def __post_init__(self):  # tyro shows the error; a NaN fails every comparison
        self.runs_dir = Path(os.path.expanduser(self.runs_dir))
        self.resume = Path(os.path.expanduser(self.resume)) if self.resume else None
        if self.max_idle_steps is None:  # in Breakout the ball can fly in a loop for ever
            self.max_idle_steps = 400 if self.env_id.startswith("Breakout") else 0
        for names, good, rule in [
            ("num_envs num_steps checkpoint_every", lambda x: x >= 1 and x % 1 == 0, "1, 2, ..."),
            ("total_timesteps", lambda x: x // self.num_envs >= self.num_steps, "1 update or more"),
            ("total_timesteps max_idle_steps", lambda x: x >= 0 and x % 1 == 0, "0, 1, ..."),
            ("value_loss_coef entropy_coef", lambda x: 0 <= x < np.inf, "from 0"),
            ("learning_rate rmsprop_eps max_grad_norm", lambda x: 1e-30 <= x < 1e30, "from 1e-30"),
            ("average_decay sticky_actions", lambda x: 0 <= x < 1, "from 0 to below 1"),
            ("gamma", lambda x: 0 <= x <= 1, "from 0 to 1"),
            ("seed", lambda x: 0 <= x < 2**31 and x % 1 == 0, "whole, from 0 to 2**31 - 1"),
            ("resume", lambda x: not x or not x.is_file(), "the folder of a run"),
            ("device", {"auto": 1, "cpu": 1, "cuda": torch.cuda.is_available()}.get, "auto or cpu"),
        ]:
            for name in names.split():
                if not good(value := getattr(self, name)):
                    raise ValueError(f"--{name.replace('_', '-')} must be {rule}, not {value}")
        for name, kind in Args.__annotations__.items():
            if kind in (bool, int, float, int | None):  # a caller may give np.int64(8), or 8.0
                setattr(self, name, (kind if kind in (bool, float) else int)(getattr(self, name)))


# ---- environment ---------------------------------------------------------------


class NoopReset(gym.Wrapper):
    """Begins a game with 1 to 30 no-ops, so that not all games begin alike (Mnih et al. 2015)."""

    def reset(self, **kwargs):
        observation, info = self.env.reset(**kwargs)
        for _ in range(self.unwrapped.np_random.integers(1, 31)):
            observation, _, _, _, info = self.env.step(0)  # no game is over so soon
        return observation, info


class MaxAndSkip(gym.Wrapper):
    """Repeats an action for 4 frames and shows the maximum of the last two, (210, 160) uint8, gray.

    Some sprites are drawn in every other frame only. AtariPreprocessing does the same, bit for bit.
    """

    def __init__(self, env: gym.Env, sticky_actions: float = 0.0):
        super().__init__(env)
        self.sticky_actions = sticky_actions
        self.screens = np.zeros((2, *self.unwrapped.ale.getScreenDims()), np.uint8)

    def reset(self, **kwargs):
        _, info = self.env.reset(**kwargs)
        self.unwrapped.ale.getScreenGrayscale(self.screens[0])
        self.screens[1], self.last_action = 0, 0
        return self.screens[0], info

    def step(self, action):
        total_reward = 0.0
        for frame in range(4):
            if self.sticky_actions == 0 or self.np_random.random() >= self.sticky_actions:
                self.last_action = action  # else the one before goes on
            _, reward, terminated, truncated, info = self.env.step(self.last_action)
            total_reward += reward
            if terminated or truncated:
                break
            if frame >= 2:  # the last two go to screens 1 and 0
                self.unwrapped.ale.getScreenGrayscale(self.screens[3 - frame])
        np.maximum(self.screens[0], self.screens[1], out=self.screens[0])
        return self.screens[0], total_reward, terminated, truncated, info


class EpisodicLife(gym.Wrapper):
    """Ends the episode when a life is lost: that costs the rewards to come. The game goes on.

    When a whole game ends, info["game"] is its score and its length in decisions. A game also ends
    after max_idle_steps decisions without a reward (in training; 0: never).
    """

    def __init__(self, env: gym.Env, max_idle_steps: int = 0):
        super().__init__(env)
        self.max_idle_steps, self.game = max_idle_steps, {"over": True}

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        game, lives = self.game, self.unwrapped.ale.lives()
        life_lost = 0 < lives < game["lives"]  # Qbert shows 0 for some frames before it is over
        game["lives"] = lives
        game["score"] += reward
        game["length"] += 1
        game["idle"] = 0 if reward else game["idle"] + 1
        truncated = truncated or 0 < self.max_idle_steps <= game["idle"]
        game["over"] = terminated or truncated
        if game["over"]:
            info["game"] = (game["score"], game["length"])
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


class FrameStack(gym.ObservationWrapper):
    """Shows the last four screens, (4, 84, 84) uint8, newest last; copy them to keep them."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
        self.frames = np.zeros((4, 84, 84), np.uint8)  # a single one would show no motion

    def reset(self, **kwargs):
        self.frames[:] = 0  # nothing of the life before
        return super().reset(**kwargs)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        self.frames[:-1] = self.frames[1:]
        self.frames[-1] = observation
        return self.frames


def make_env(env_id: str, max_idle_steps: int = 0, sticky_actions: float = 0.0) -> gym.Env:
    """The game in its wrappers; ValueError for anything but an Atari game without frame skip."""
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner
    gym.register_envs(ale_py)
    if env_id not in gym.registry or not env_id.endswith("NoFrameskip-v4"):
        raise ValueError(f"--env-id {env_id}: not a game of ale-py, <Game>NoFrameskip-v4")
    frames = 65_536 if env_id.startswith("Breakout") else 108_000  # Breakout serves no ball later
    # MaxAndSkip reads the screen itself; RAM is the cheapest observation to ask for.
    game = NoopReset(gym.make(env_id, obs_type="ram", max_num_frames_per_episode=frames).unwrapped)
    return FrameStack(Warp(EpisodicLife(MaxAndSkip(game, sticky_actions), max_idle_steps)))


def get_state(env: gym.Env) -> tuple:
    """All that the future of an environment depends on, in types that torch.load takes."""
    game = env.get_wrapper_attr("game") | {"last_action": int(env.get_wrapper_attr("last_action"))}
    emulator, generator = env.unwrapped.ale, env.unwrapped.np_random.bit_generator
    return game, env.frames.tobytes(), emulator.cloneSystemState().serialize(), generator.state


def set_state(env: gym.Env, state: tuple) -> None:
    """Puts all that back, after a reset (without one, Qbert would go on differently)."""
    game, frames, emulator, env.unwrapped.np_random.bit_generator.state = state
    env.get_wrapper_attr("game").update(game)
    env.set_wrapper_attr("last_action", game["last_action"])
    env.frames[:] = np.frombuffer(frames, np.uint8).reshape(4, 84, 84)
    env.unwrapped.ale.restoreSystemState(ale_py.ALEState(emulator))


# ---- network -------------------------------------------------------------------


def init(layer: nn.Module, gain: float) -> nn.Module:
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class ActorCritic(nn.Module):
    """The network of Mnih et al. 2015 with two heads; named as in the book, whose weights load."""

    def __init__(self, num_actions: int):
        super().__init__()
        self.conv = nn.Sequential(
            init(nn.Conv2d(4, 32, kernel_size=8, stride=4), np.sqrt(2)),  # (B, 32, 20, 20)
            nn.ReLU(inplace=True),
            init(nn.Conv2d(32, 64, kernel_size=4, stride=2), np.sqrt(2)),  # (B, 64, 9, 9)
            nn.ReLU(inplace=True),
            init(nn.Conv2d(64, 64, kernel_size=3, stride=1), np.sqrt(2)),  # (B, 64, 7, 7)
            nn.ReLU(inplace=True),
            nn.Flatten(),  # (B, 3136)
            init(nn.Linear(64 * 7 * 7, 512), np.sqrt(2)),
            nn.ReLU(inplace=True),
        ).to(memory_format=torch.channels_last)  # a third more steps/s
        self.critic = init(nn.Linear(512, 1), 1.0)
        self.actor = init(nn.Linear(512, num_actions), 0.01)  # at first all equally likely

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """observations (B, 4, 84, 84) uint8 -> values (B,), logits (B, actions): before softmax."""
        features = self.conv(observations / 255)  # (B, 512)
        return self.critic(features).squeeze(-1), self.actor(features)


# ---- rollout: the workers ------------------------------------------------------


class RolloutStorage:
    """T steps of N environments, in memory that the workers write and the learner reads."""

    def __init__(self, T: int, N: int):
        frames = torch.zeros(T + 1, N, 84, 84, 4, dtype=torch.uint8).share_memory_()
        self.observations = frames.permute(0, 1, 4, 2, 3)  # (T + 1, N, 4, 84, 84), channels last
        self.actions = torch.zeros(T, N, dtype=torch.int64).share_memory_()
        self.rewards = torch.zeros(T, N).share_memory_()
        self.masks = torch.zeros(T, N).share_memory_()  # 0 where an episode ended, else 1


@torch.no_grad()
def work(pipe, learners_end, args: Args, network: ActorCritic, storage, share: slice, states: list):
    """A worker process: for each update, T steps in its n environments, with the shared network."""
    learners_end.close()  # our copy: while one is open, recv() never sees that the learner is dead
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)  # it is the learner that is asked to stop
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    observations = storage.observations[:, share]  # (T + 1, n, 4, 84, 84)
    actions = storage.actions[:, share].numpy()  # (T, n)
    rewards, masks = storage.rewards[:, share].numpy(), storage.masks[:, share].numpy()  # (T, n)
    envs = [make_env(args.env_id, args.max_idle_steps, args.sticky_actions) for _ in actions[0]]
    first = RANK * args.num_envs // WORLD_SIZE + share.start  # the number of its first environment
    # Hashed from the run's seed: with seed + i, runs 1 and 2 would share environments.
    seeds = np.random.SeedSequence(args.seed).generate_state(args.num_envs)
    for i, env in enumerate(envs):
        env.reset(seed=int(seeds[first + i]))
        if states:  # of all environments, where a run goes on
            set_state(env, states[first + i])
        observations[-1, i] = torch.from_numpy(env.frames)

    with suppress(EOFError, OSError):
        while True:
            update = pipe.recv()
            observations[0] = observations[-1]  # goes on where the last rollout ended
            games = []  # that ended: (timestep, score, length)
            for t in range(args.num_steps):
                _, logits = network(observations[t])  # (n, num_actions)
                # argmax(logits + Gumbel noise) is a draw from softmax(logits). Each environment has
                # a generator of its own, so that it does not matter which process plays it.
                noise = [env.unwrapped.np_random.gumbel(size=logits.shape[1]) for env in envs]
                actions[t] = (logits.numpy() + noise).argmax(axis=-1)
                for i, env in enumerate(envs):
                    frames, rewards[t, i], terminated, truncated, info = env.step(actions[t, i])
                    masks[t, i] = not (terminated or truncated)  # at a cut too: idling is worth 0
                    if terminated or truncated:
                        frames, reset_info = env.reset()
                        info |= reset_info
                    if "game" in info:  # ended by the step, or by the no-op of the reset
                        timestep = (update * args.num_steps + t) * args.num_envs + first + i + 1
                        games.append((timestep, *info["game"]))
                    observations[t + 1, i] = torch.from_numpy(frames)
            pipe.send((games, [get_state(env) for env in envs]))  # saved even after an error


def start_workers(args: Args, network: ActorCritic, storage: RolloutStorage, states: list) -> list:
    """Starts a worker for each of PyTorch's threads; returns our ends of their pipes."""
    # macOS cannot fork safely, Windows not at all.
    mp = torch.multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    num_envs = storage.actions.shape[1]  # those of this rank
    num_workers = min(torch.get_num_threads(), num_envs)
    pipes = []
    for i in range(num_workers):
        share = slice(i * num_envs // num_workers, (i + 1) * num_envs // num_workers)
        ours, theirs = mp.Pipe()
        mp.Process(target=work, args=(theirs, ours, args, network, storage, share, states)).start()
        theirs.close()  # only the worker holds it now: if it dies, recv() raises EOFError
        pipes.append(ours)
    return pipes


# ---- learning ------------------------------------------------------------------


def compute_returns(rewards: Tensor, masks: Tensor, last_values: Tensor, gamma: float) -> Tensor:
    """R_t = r_t + gamma * mask_t * R_{t+1}, and R_T = V(s_T) (Mnih et al. 2016, algorithm S3).

    Rewards (float32), masks and returns are (T, N), last_values (N,). A mask of 0 ends a return.
    """
    returns, next_returns = torch.empty_like(rewards), last_values
    for t in reversed(range(len(rewards))):
        next_returns = returns[t] = rewards[t] + gamma * masks[t] * next_returns
    return returns


def compute_losses(network, observations, actions, returns) -> tuple[Tensor, Tensor, Tensor]:
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


def average_over_ranks(tensors: list[Tensor]) -> None:
    """Replaces each tensor by its mean over all ranks of torchrun."""
    for tensor in tensors if WORLD_SIZE > 1 else ():
        dist.all_reduce(tensor.div_(WORLD_SIZE))


def gather(values: list) -> list:
    """The lists of all ranks, joined in their order, on every rank."""
    lists = [values] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(lists, values)
    return sum(lists, [])


def learn(args: Args, network, storage, workers, run_dir: Path, checkpoint: dict) -> dict[str, Any]:
    """Trains until the end or a stop request, logs and saves; returns how far the run has come."""
    # The workers play with the network. On a CPU it also learns; on CUDA a copy of it does.
    on_cuda = args.device != "cpu" and torch.cuda.is_available()
    device = f"cuda:{RANK % torch.cuda.device_count()}" if on_cuda else "cpu"
    learner = copy.deepcopy(network).to(device) if on_cuda else network
    averaged = copy.deepcopy(network).requires_grad_(False)
    parameters = list(learner.parameters())
    optimizer = torch.optim.RMSprop(parameters, alpha=0.99, eps=args.rmsprop_eps)
    progress = {"timesteps": 0, "seconds": 0.0, "games": 0, "last_scores": [], "to_log": []}
    progress |= checkpoint.get("progress", {})
    parts = {"network": learner, "averaged": averaged, "optimizer": optimizer}
    for name in parts if checkpoint else ():
        parts[name].load_state_dict(checkpoint[name])
    parts |= {"env_id": args.env_id, "progress": progress, "envs": checkpoint.get("envs", [])}
    # What was logged after the checkpoint will be logged again.
    writer = SummaryWriter(run_dir, purge_step=progress["timesteps"] + 1) if RANK == 0 else None
    start, batch = None, args.num_envs * args.num_steps
    num_updates = args.total_timesteps // batch

    try:
        for update in range(progress["timesteps"] // batch, num_updates):
            if update % max(1000, num_updates // 10) == 0:  # a tenth of a long run
                save(run_dir / f"weight_{update}.pth", averaged.state_dict())
            rate = args.learning_rate * (1 - update / num_updates if args.anneal_lr else 1)
            optimizer.param_groups[0]["lr"] = rate

            # 1. rollout: T steps in each of N environments, into the storage
            if on_cuda:
                network.load_state_dict(learner.state_dict())
            for pipe in workers:
                pipe.send(update)
            replies = [pipe.recv() for pipe in workers]
            games, states = (sum(lists, []) for lists in zip(*replies))
            start = start or time.perf_counter() - progress["seconds"]  # without the start-up

            # 2. returns: (T, N)
            with torch.no_grad():
                last_values, _ = learner(storage.observations[-1].to(device))  # (N,)
            rewards = storage.rewards.sign() if args.clip_rewards else storage.rewards
            returns = compute_returns(rewards, storage.masks, last_values.cpu(), args.gamma)

            # 3. loss: over the batch of T * N transitions
            transitions = storage.observations[:-1], storage.actions, returns  # (T, N, ...) each
            transitions = [part.flatten(0, 1).to(device) for part in transitions]  # (T * N, ...)
            value_loss, policy_loss, entropy = compute_losses(learner, *transitions)
            loss = policy_loss + args.value_loss_coef * value_loss - args.entropy_coef * entropy

            # 4. update
            optimizer.zero_grad()
            loss.backward()
            stop = torch.tensor(float(len(stop_requests)))  # a request to one rank stops all
            average_over_ranks([stop, *(parameter.grad for parameter in parameters)])
            grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            if not grad_norm.isfinite():
                raise ValueError(f"update {update}: gradient not finite: lower --learning-rate")
            parts["envs"] = []  # until step 5 an update is half done: not to be saved
            optimizer.step()
            # The mean weights are for play: one update can be bad. Every tenth is enough.
            if update % 10 == 0 or args.average_decay == 0:
                decay = min(args.average_decay, update / (update + 100))  # forget the random start
                for mean, weight in zip(averaged.parameters(), parameters):
                    mean.lerp_(weight.detach().cpu(), 1 - decay)

            # 5. log, and save now and then
            progress["timesteps"] += batch
            progress["seconds"] = time.perf_counter() - start
            progress["to_log"] += games
            parts["envs"] = states
            stopping = stop > 0 or update + 1 == num_updates
            saving = stopping or (update + 1) % args.checkpoint_every == 0
            if saving or (update + 1) % 100 == 0:
                losses = {"value_loss": value_loss, "policy_loss": policy_loss, "entropy": entropy}
                log(args, writer, progress, losses if (update + 1) % 100 == 0 else {}, rate)
            if saving:
                save(run_dir / "checkpoint.pth", parts | {"envs": gather(states)})
            if stopping:
                break
    except BaseException:  # a worker died, for example: what was learnt is kept
        if parts["envs"] and WORLD_SIZE == 1:  # other ranks' environments cannot be had now
            save(run_dir / "checkpoint.pth", parts)
        raise
    finally:
        save(run_dir / "weight_end.pth", averaged.state_dict())
    if RANK == 0:
        writer.close()  # not after an error: it may hold a lock then, and hang
    return progress


# ---- the run: its curves and files, its ranks and signals -----------------------


def log(args: Args, writer, progress: dict[str, Any], losses: dict, rate: float) -> None:
    """Brings progress and curves up to date, with the games that ended on all ranks."""
    games, progress["to_log"] = sorted(gather(progress["to_log"])), []
    progress["games"] += len(games)
    scores = progress["last_scores"] = (progress["last_scores"] + [x[1] for x in games])[-100:]
    mean = progress["mean_return"] = float(np.mean(scores)) if scores else None
    timesteps = progress["timesteps"]
    speed = progress["steps_per_second"] = timesteps / progress["seconds"]
    if RANK > 0:
        return
    for timestep, score, length in games:  # whole games, under CleanRL's names
        writer.add_scalar("charts/episodic_return", score, timestep)
        writer.add_scalar("charts/episodic_length", length, timestep)
    curves = {f"losses/{name}": loss for name, loss in losses.items()}
    curves |= {"charts/SPS": speed, "charts/learning_rate": rate} if losses else {}
    for name, value in curves.items():
        writer.add_scalar(name, value, timesteps)
    writer.flush()
    last = "no game is over yet"
    if scores:
        last = f"last 100 games: mean/median {mean:.1f}/{np.median(scores):.1f}, "
        last += f"min/max {min(scores):.0f}/{max(scores):.0f}"
    hours = (args.total_timesteps - timesteps) / speed / 3600
    say(f"finished timesteps {timesteps}, {last}, {speed:.0f} steps/s, {hours:.1f} h left")


def say(text: str) -> None:
    """Prints on rank 0. Where nobody reads it (`| head`, a closed terminal), we are to stop."""
    try:
        if RANK == 0:
            print(text, flush=True)
    except OSError:
        stop_requests[13] = time.monotonic()  # the number of SIGPIPE, which Windows does not have
        sys.stdout = None  # print does nothing now; else Python's exit would try once more


def save(path: Path, content: Any) -> None:
    """Writes beside and renames: a kill or a full disk leaves the old file or the new, whole."""
    if RANK > 0:
        return
    buffer = io.BytesIO()  # on a full disk torch.save itself fails with an error of its own
    if path.suffix == ".json":
        buffer.write(json.dumps(content, indent=2, default=str).encode())
    else:
        plain = {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in content.items()}
        torch.save(plain, buffer)
    part = path.with_name(f"{path.name}.part")
    try:
        with open(part, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_run(args: Args) -> tuple[Args, dict[str, Any]]:
    """Flags and checkpoint of the run that goes on; the flags as given and {} where one begins."""
    if not args.resume or not [*args.resume.glob("*.json"), *args.resume.glob("*.pth")]:
        return args, {}
    here, checkpoint = {"resume": args.resume, "runs_dir": args.runs_dir}, {}
    try:
        saved = Args(**json.loads((path := args.resume / "args.json").read_text()) | here)
        if (path := args.resume / "checkpoint.pth").exists():
            checkpoint = torch.load(path, "cpu", weights_only=True)
            if (checkpoint["env_id"], len(checkpoint["envs"])) != (saved.env_id, saved.num_envs):
                raise ValueError("it is another run's")
    except Exception as error:  # damage makes torch.load raise nearly anything
        raise ValueError(f"{path} is damaged, or does not fit here: {error!r:.80}") from None
    defaults = Args(**here), Args(saved.env_id, **here)  # a default counts as not given
    for name, value in asdict(args).items():
        if value not in (has := getattr(saved, name), *(getattr(x, name) for x in defaults)):
            raise ValueError(f"--{name.replace('_', '-')}: {args.resume} has {has}, not {value}")
    return saved, checkpoint


def join_ranks(args: Args, checkpoint: dict) -> None:
    """Connects the ranks of torchrun; ValueError where they would wait for ever or learn apart."""
    several_hosts = WORLD_SIZE > int(os.environ.get("LOCAL_WORLD_SIZE", WORLD_SIZE))
    if several_hosts and "GLOO_SOCKET_IFNAME" not in os.environ:  # gloo often guesses lo
        raise ValueError("set GLOO_SOCKET_IFNAME to the network interface to the other machines")
    # gloo works with and without GPUs; it waits a minute for another rank, at the start up to five.
    dist.init_process_group("gloo", timeout=timedelta(minutes=1))
    mine = asdict(args) | {"device": None, "resume": None, "runs_dir": None}
    mine["timesteps"] = checkpoint and checkpoint["progress"]["timesteps"]
    if any(other != mine for other in gather([mine])):
        raise ValueError("the ranks were given different flags, or see different checkpoints")


def train(args: Args) -> dict[str, Any]:
    """A run, from its start or its last checkpoint; returns what result.json says.

    Raises ValueError (bad input, no finite gradient), OSError (disk, worker), RuntimeError (ranks).
    """
    stop_requests.pop(13, None)  # of an earlier train(), whose output nobody read
    args, checkpoint = read_run(args)
    if args.num_envs % WORLD_SIZE:
        raise ValueError(f"--num-envs must be a multiple of {WORLD_SIZE}, the number of ranks")
    num_actions = int(make_env(args.env_id).action_space.n)
    for option, size in ((-1, 2**30), (-3, 2**25)) if sys.platform == "linux" else ():
        ctypes.CDLL(None).mallopt(option, size)  # keep what an update frees: 13% more steps/s
    torch.manual_seed(args.seed)  # the same network on all ranks
    try:
        network = ActorCritic(num_actions).share_memory()
        storage = RolloutStorage(args.num_steps, args.num_envs // WORLD_SIZE)
    except (RuntimeError, TypeError):
        raise ValueError("--num-envs, --num-steps: not enough shared memory") from None
    name = f"a2c_breakout__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    run_dir = args.resume or args.runs_dir / name
    if RANK == 0:
        run_dir.mkdir(parents=True, exist_ok=bool(args.resume))
        lock = open(run_dir / "lock", "w")  # held until it is closed
        with suppress(AttributeError, OSError):  # Windows and some network disks have no locks
            try:
                os.lockf(lock.fileno(), os.F_TLOCK, 0)
            except BlockingIOError:
                raise ValueError(f"another process is training in {run_dir}") from None
    workers = start_workers(args, network, storage, checkpoint.get("envs", []))
    try:
        if WORLD_SIZE > 1:  # after the fork, which would copy the locks of gloo's threads
            join_ranks(args, checkpoint)
        save(run_dir / "args.json", asdict(args))
        goes_on = checkpoint and f"goes on at timestep {checkpoint['progress']['timesteps']}"
        say(f"{network}\n{args.env_id}: {goes_on or 'begins'} in {run_dir}")
        progress = learn(args, network, storage, workers, run_dir, checkpoint)
    except (EOFError, ConnectionError, InterruptedError):  # the last: Ctrl-C on Windows
        where = f'--resume "{run_dir}"' if RANK == 0 else "rank 0's folder"
        raise OSError(f"a worker process died or was interrupted; go on with {where}") from None
    finally:
        for pipe in workers:
            pipe.close()  # its worker ends
        if RANK == 0:
            lock.close()
    versions = {module.__name__: module.__version__ for module in (ale_py, cv2, gym, np, torch)}
    versions["python"] = sys.version.split()[0]
    save(run_dir / "result.json", result := {"seed": args.seed, "versions": versions, **progress})
    unfinished = args.total_timesteps - progress["timesteps"] >= args.num_envs * args.num_steps
    hint = f'; go on with --resume "{run_dir}"' if unfinished else ""
    say(f"{progress['timesteps']} timesteps are done{hint}. Everything is in {run_dir}")
    weights = f'--env-id {args.env_id} --weights "{run_dir}/weight_end.pth"'
    say(f"Watch: python play_breakout.py {weights} --max-attempts 5")
    return result


def request_stop(signum: int, _) -> None:
    """Has learn stop after its update; again, over a second later, it kills the workers."""
    if time.monotonic() > stop_requests.setdefault(signum, time.monotonic()) + 1:
        for process in torch.multiprocessing.active_children():
            process.kill()


if __name__ == "__main__":
    for signum in STOP_SIGNALS:
        if signum == signal.SIGINT or signal.getsignal(signum) == signal.SIG_DFL:  # not nohup's
            signal.signal(signum, request_stop)
    if hasattr(sys.stdout, "reconfigure") and not hasattr(sys, "ps1"):  # not at a prompt
        sys.stdout.reconfigure(errors="backslashreplace")  # prints a folder of any name
        threading.excepthook = lambda _: None  # else TensorBoard's thread prints its error, too
    try:  # in a notebook, argv is the kernel's
        train(tyro.cli(Args, args=[] if sys.argv[0].endswith("kernel_launcher.py") else None))
        if stop_requests and signal.SIGINT not in stop_requests:
            sys.exit(128 + min(stop_requests))
    except (ValueError, OSError, *[RuntimeError] * (WORLD_SIZE > 1)) as error:  # a rank has gone
        sys.exit(f"error: {error}" if WORLD_SIZE == 1 else f"error: rank {RANK}: {error}")
    finally:
        stop_requests.clear()  # in a notebook the next train() is not asked to stop
        if hasattr(sys, "ps1") or sys.flags.inspect:  # and at a prompt Ctrl-C is its own again
            signal.signal(signal.SIGINT, signal.default_int_handler)
