# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "gymnasium[classic-control]==1.4.0", "imageio[ffmpeg]==2.38.1", "numpy==2.4.6",
#     "tensorboard==2.21.0", "torch==2.13.0", "tqdm==4.70.1", "tyro==1.0.17",
# ]
# ///
"""Advantage actor-critic (A2C) on CartPole: a policy learns from a critic, 32 poles at a time.

In each step an agent observes a state s (where cart and pole are, and how fast), takes an action a
(push left or right), and gets a reward r. The return is the sum of all the rewards to come, each
multiplied by gamma = 0.99 once for every step until then. One network gives two answers: pi(a|s),
the probability with which each action is taken, called the policy (the actor), and V(s), the return
to expect from state s (the critic). Five steps in 32 environments, a rollout, make one update of
both, and are then forgotten:

    R_t  = r_t + gamma R_{t+1}      or r_t alone where step t ended an episode; R_T = V(s_T), T = 5
    A_t  = R_t - V(s_t)             the advantage: how much better it went than the critic thought
    loss = - mean A_t log pi(a_t|s_t)  +  0.5 mean A_t^2  -  0.01 mean entropy(pi(.|s_t))

R_t is an n-step return: n = 5 rewards and then V(s_5) for the first of the five steps, n = 1 for
the last. To let V stand for what was not played is called bootstrapping, and makes R_t, like A_t,
an estimate.

The first term is the policy gradient: an action that went better than expected gets more likely,
one that went worse less. On average, its gradient is that of the expected return. So it would be
with R_t in place of A_t, but then whichever action was drawn in a good state would get more likely,
the worse one as well; V, which is taken off, is called the baseline. A_t is a constant in this
term: V is trained by the second one, which moves it towards R_t, a constant as well (else R_t would
move towards V). The third term is the entropy, highest where all actions are equally likely. It
keeps the policy, from which the actions are drawn, from settling too soon: only actions that are
tried (exploration) show what they bring. 0.5 and 0.01 weigh the terms against each other.

There is no replay memory: A_t tells how good an action was if the policy goes on as it is, so steps
of an older policy would teach the wrong thing. A2C is on-policy. In place of a memory, 32 poles,
soon at different points of their episodes, make the 160 steps of a batch differ.

This is algorithm S3 of Mnih et al., "Asynchronous Methods for Deep Reinforcement Learning", ICML
2016, made synchronous; a2c_breakout.py has the same loop for Atari games.

    python a2c_cartpole.py                                      # train, evaluate, film
    python a2c_cartpole.py --seed 7 --num-envs 16 --num-steps 10
    python a2c_cartpole.py --weights runs/.../weight_end.pth    # evaluate and film only

The task is the book's (Yutaro Ogawa, つくりながら学ぶ！深層強化学習, 2018): an episode ends when
the pole leans too far, the cart leaves the track or 200 steps are over. The reward is 0 on the way,
and at the end +1 for 196 steps or more (a success), -1 for fewer; through gamma, a later fall costs
less. Training ends once each environment's last episode was a success, or after 5,120,000 steps.

Differs from the book (a flag, where given, brings the book's way back):
- An average of the weights is kept, as the last update can be a bad one: --average-decay 0
- All poles are simulated in one array, in which a reset takes up a step. It is not counted, and
  nothing is learnt from it.
"""

import copy
import io
import json
import os
import signal
import sys
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    """Train an advantage actor-critic (A2C) on CartPole."""

    seed: int = 0  # seed of every random generator, from 0 to 2**32 - 1
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes CUDA where there is one
    runs_dir: Path = Path("runs")  # folder in which the run makes its own folder
    weights: Path | None = None  # file of an earlier run to evaluate and film, without training
    num_envs: int = 32  # environments that are played side by side, 1 or more
    num_steps: int = 5  # steps in each environment between two updates, 1 or more
    total_timesteps: int = 5_120_000  # steps of all environments at most, one rollout or more
    eval_episodes: int = 100  # greedy episodes in the evaluation, 1 or more
    hidden_size: int = 32  # units in each of the two hidden layers, from 1 to 4096
    learning_rate: float = 0.01  # step size of Adam, above 0
    gamma: float = 0.99  # discount of a reward one step later, from 0 to 1
    value_loss_coef: float = 0.5  # weight of the value loss, 0 or more
    entropy_coef: float = 0.01  # weight of the entropy bonus, 0 or more
    max_grad_norm: float = 0.5  # norm to which the gradient is clipped, above 0
    average_decay: float = 0.975  # share the average keeps per update; from 0 (the book) to below 1

    def __post_init__(self):  # tyro shows the message; a NaN fails every comparison
        self.runs_dir = Path(os.path.expanduser(self.runs_dir))
        if self.weights is not None:
            self.weights = Path(os.path.expanduser(self.weights))
        rollout = self.num_envs * self.num_steps  # timesteps of an update
        for good, rule in [
            (0 <= self.seed < 2**32, "--seed must be from 0 to 2**32 - 1"),
            (min(self.num_envs, self.num_steps) >= 1, "--num-envs, --num-steps must be 1 or more"),
            (rollout <= 10**7, "--num-envs * --num-steps: 10**7 at most"),
            (rollout <= self.total_timesteps, "--total-timesteps: num_envs * num_steps or more"),
            (self.eval_episodes >= 1, "--eval-episodes must be 1 or more"),
            (1 <= self.hidden_size <= 4096, "--hidden-size must be from 1 to 4096"),
            (0 < self.learning_rate < np.inf, "--learning-rate must be above 0 and finite"),
            (0 <= self.gamma <= 1, "--gamma must be from 0 to 1"),
            (0 <= self.value_loss_coef < np.inf, "--value-loss-coef must be 0 or more and finite"),
            (0 <= self.entropy_coef < np.inf, "--entropy-coef must be 0 or more and finite"),
            (0 < self.max_grad_norm < np.inf, "--max-grad-norm must be above 0 and finite"),
            (0 <= self.average_decay < 1, "--average-decay must be from 0 to below 1"),
            (not self.weights or self.weights.is_file(), f"--weights: no file {self.weights}"),
            (self.device != "cuda" or torch.cuda.is_available(), "--device cuda: no CUDA here"),
        ]:
            if not good:
                raise ValueError(rule)


# ---- environment -------------------------------------------------------------------------------

MAX_STEPS = 200  # an episode ends here at the latest
SUCCESS_STEPS = 196  # an episode of this many steps or more is a success


def make_env(render_mode: str | None = None) -> gym.Env:
    """CartPole-v1 with the book's 200 steps: observations (4,) float32, actions 0 and 1."""
    return gym.make("CartPole-v1", max_episode_steps=MAX_STEPS, render_mode=render_mode)


def book_rewards(steps: Tensor, dones: Tensor) -> Tensor:
    """0 on the way; at the end +1 for a success, -1 for a shorter episode. All are (N,).

    The same fall brings -1 in step 195 and +1 in step 196, and the state does not hold the step: V
    can only learn the mean. The theory (Markov decision processes) assumes a state that holds all.
    """
    return torch.where(dones, torch.where(steps >= SUCCESS_STEPS, 1.0, -1.0), 0.0)


class CartPoles:
    """N CartPoles, simulated in one array, with the book's rewards.

    Where an episode has ended, the next step resets the pole and ignores the action. That is not a
    decision, and nothing may be learnt from it.
    """

    def __init__(self, num_envs: int, seed: int):
        self.envs = CartPoleVectorEnv(num_envs, max_episode_steps=MAX_STEPS)
        self.observations = torch.from_numpy(self.envs.reset(seed=seed)[0])  # (N, 4) float32
        self.steps = torch.zeros(num_envs, dtype=torch.int64)  # in the episodes under way
        self.dones = torch.zeros(num_envs, dtype=torch.bool)  # where the last step was the end
        self.last_lengths = torch.zeros_like(self.steps)  # in steps, of the last whole episodes

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Takes actions; returns rewards, ends, and which actions were decisions. All are (N,)."""
        decided = ~self.dones
        observations, _, terminated, truncated, _ = self.envs.step(actions.numpy())
        self.observations = torch.from_numpy(observations)
        # The time limit (truncated) is an end too, as to reach it is the goal here. In most other
        # tasks the next state still has a value then, and only `terminated` ends it.
        self.dones = torch.from_numpy(terminated | truncated)
        self.steps = torch.where(decided, self.steps + 1, 0)
        self.last_lengths = torch.where(self.dones, self.steps, self.last_lengths)
        return book_rewards(self.steps, self.dones), self.dones, decided


# ---- network -----------------------------------------------------------------------------------


class ActorCritic(nn.Module):
    """One body with two heads: the critic's values and the actor's logits (softmax: pi)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.fc1 = nn.Linear(4, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)
        self.critic = nn.Linear(hidden_size, 1)
        self.actor = nn.Linear(hidden_size, 2)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """observations (B, 4) -> values (B,), logits (B, 2)."""
        hidden = torch.relu(self.fc1(observations))  # (B, hidden_size)
        hidden = torch.relu(self.fc2(hidden))  # (B, hidden_size)
        return self.critic(hidden).squeeze(-1), self.actor(hidden)

    @torch.no_grad()
    def act(self, observations: Tensor) -> Tensor:
        """Draws an action for each environment: (N, 4) -> (N,) int64."""
        _, logits = self(observations)  # (N, 2)
        probs = logits.softmax(-1).nan_to_num(1)  # multinomial refuses NaN; learn() reports it
        return torch.multinomial(probs, num_samples=1).squeeze(-1)

    @torch.no_grad()
    def greedy_action(self, observation: np.ndarray) -> int:
        """Greedy: the more likely action for one observation (4,)."""
        _, logits = self(torch.from_numpy(observation).to(self.fc1.weight.device))  # (2,)
        return logits.argmax().item()


# ---- rollout storage ---------------------------------------------------------------------------


class RolloutStorage:
    """T steps of N environments. The next rollout overwrites them."""

    def __init__(self, num_steps: int, num_envs: int):
        T, N = num_steps, num_envs
        self.observations = torch.zeros(T, N, 4)
        self.actions = torch.zeros(T, N, dtype=torch.int64)
        self.rewards = torch.zeros(T, N)
        self.masks = torch.zeros(T, N)  # 0 where the step ended an episode, else 1
        self.decided = torch.zeros(T, N, dtype=torch.bool)  # False at a reset step


# ---- learning ----------------------------------------------------------------------------------


def compute_returns(rewards: Tensor, masks: Tensor, last_values: Tensor, gamma: float) -> Tensor:
    """R_t = r_t + gamma * mask_t * R_{t+1}, and R_T = V(s_T) (Mnih et al. 2016, algorithm S3).

    rewards, masks and the returns are (T, N), last_values (N,). A mask of 0 ends a return, so that
    none reaches over a reset.
    """
    returns, next_returns = torch.empty_like(rewards), last_values
    for t in reversed(range(len(rewards))):
        next_returns = returns[t] = rewards[t] + gamma * masks[t] * next_returns
    return returns


def compute_losses(
    network: ActorCritic, observations: Tensor, actions: Tensor, returns: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Value loss, policy loss and entropy, each the mean over B decisions.

    observations (B, 4), actions (B,) int64, returns (B,) float32.
    """
    values, logits = network(observations)
    log_probs = F.log_softmax(logits, dim=-1)  # (B, 2)
    entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
    advantages = returns - values  # (B,)
    value_loss = advantages.pow(2).mean()
    action_log_probs = log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)  # (B,)
    policy_loss = -(advantages.detach() * action_log_probs).mean()  # detach: a constant
    return value_loss, policy_loss, entropy


def learn(args: Args, network: ActorCritic, averaged: ActorCritic, writer: SummaryWriter) -> dict:
    """Trains the network until its own episodes, random actions included, have solved the task.

    `averaged`, the moving average of its weights, is what is saved, evaluated and filmed. Returns,
    for result.json, environment 0's last episode (from 0; None if not solved), how many it had, and
    the steps of all environments. Raises ValueError when a gradient is not finite.
    """
    device = network.fc1.weight.device
    envs = CartPoles(args.num_envs, args.seed)
    storage = RolloutStorage(args.num_steps, args.num_envs)
    parameters = list(network.parameters())
    optimizer = torch.optim.Adam(parameters, args.learning_rate, fused=True)
    lengths: deque[int] = deque(maxlen=10)  # of environment 0's last episodes, in steps
    episode = -1  # of environment 0: none has ended yet
    timesteps, update, start = 0, 0, time.perf_counter()
    limit = args.total_timesteps - args.num_envs * args.num_steps  # after it no rollout fits in
    bar = tqdm(total=args.total_timesteps, unit="timestep")

    while timesteps <= limit and envs.last_lengths.min() < SUCCESS_STEPS:
        # 1. rollout: T steps in each of N environments, into the storage
        ended = []  # episodes of environment 0: (timestep, length)
        for t in range(args.num_steps):
            storage.observations[t] = envs.observations  # (N, 4)
            storage.actions[t] = network.act(envs.observations.to(device))  # (N,)
            storage.rewards[t], dones, storage.decided[t] = envs.step(storage.actions[t])
            storage.masks[t] = ~dones
            timesteps += int(storage.decided[t].sum())
            if dones[0]:
                ended.append((timesteps, int(envs.last_lengths[0])))
        if not storage.decided.any():
            continue  # nothing but resets: possible where environments and steps are few

        # 2. returns: what came of each action, (T, N)
        with torch.no_grad():  # R_t is a constant
            last_values, _ = network(envs.observations.to(device))  # (N,)
        returns = compute_returns(storage.rewards, storage.masks, last_values.cpu(), args.gamma)

        # 3. loss: over the batch of B decisions, T * N without the resets. The network runs on them
        # again, all at once, as step 1 has kept no gradients.
        value_loss, policy_loss, entropy = compute_losses(
            network,
            storage.observations[storage.decided].to(device),
            storage.actions[storage.decided].to(device),
            returns[storage.decided].to(device),
        )
        loss = policy_loss + args.value_loss_coef * value_loss - args.entropy_coef * entropy

        # 4. update: the gradient is clipped, so that no batch, however odd, pulls too hard
        optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        if not grad_norm.isfinite():
            raise ValueError(f"update {update}: gradient not finite, lower --learning-rate")
        optimizer.step()
        # One update can spoil the policy, but hardly the moving average of the weights (Polyak
        # averaging). It is not ddqn_cartpole.py's target network: no R_t is computed with it.
        with torch.no_grad():
            for mean, weight in zip(averaged.parameters(), parameters):
                mean.lerp_(weight, 1 - args.average_decay)  # a small part of the way
        update += 1

        # 5. log
        bar.update(timesteps - bar.n)
        for timestep, length in ended:
            episode += 1
            lengths.append(length)
            tqdm.write(f"episode {episode}: {length} steps, mean of 10 {np.mean(lengths):.1f}")
            writer.add_scalar("charts/episode", episode, timestep)
            writer.add_scalar("charts/episodic_length", length, timestep)
        if update % 20 == 0:  # the curves need no more
            writer.add_scalar("charts/SPS", timesteps / (time.perf_counter() - start), timesteps)
            writer.add_scalar("losses/value_loss", value_loss.item(), timesteps)
            writer.add_scalar("losses/policy_loss", policy_loss.item(), timesteps)
            writer.add_scalar("losses/entropy", entropy.item(), timesteps)

    bar.close()
    solved = envs.last_lengths.min() >= SUCCESS_STEPS
    tqdm.write(f"Solved in episode {episode} of environment 0." if solved else "Not solved.")
    return dict(solved_episode=episode if solved else None, episodes=episode + 1, steps=timesteps)


# ---- evaluation and the run --------------------------------------------------------------------


def play(network: ActorCritic, env: gym.Env, pictures: list | None = None) -> int:
    """Plays a greedy episode; returns its steps, and adds a picture of each to the list."""
    state, _ = env.reset()
    steps, done = 0, False
    while not done:
        state, _, terminated, truncated, _ = env.step(network.greedy_action(state))
        steps, done = steps + 1, terminated or truncated
        if pictures is not None:
            pictures.append(env.render())
    return steps


def evaluate(network: ActorCritic, args: Args) -> dict[str, float]:
    """Mean and standard deviation of the steps of greedy episodes."""
    env = make_env()
    env.reset(seed=2**32 + args.seed)  # no seed of training: those are below 2**32
    lengths = [play(network, env) for _ in range(args.eval_episodes)]
    return {"eval_mean": float(np.mean(lengths)), "eval_std": float(np.std(lengths))}


def film(network: ActorCritic, args: Args) -> bytes:
    """The evaluation's first episode once more, as an MP4."""
    import pygame  # here, so that without it only the film is missing

    env, pictures = make_env(render_mode="rgb_array"), []
    env.reset(seed=2**32 + args.seed)
    env.unwrapped.screen = pygame.Surface((600, 400))  # drawn in memory: no display needed
    play(network, env, pictures)
    fps = env.metadata["render_fps"]
    mp4 = imageio.mimwrite("<bytes>", pictures, "mp4", fps=fps, macro_block_size=2)
    imageio.get_reader(mp4, "mp4").close()  # ffmpeg does not say if it failed
    return mp4


def load_weights(network: ActorCritic, path: Path) -> None:
    """Loads a file's weights into the network; ValueError says why they are not for it."""
    try:
        network.load_state_dict(torch.load(path, "cpu", weights_only=True))
    except Exception as error:  # a damaged file can raise nearly anything
        layer = str(error).partition("\n\t")[2].partition("\n")[0]  # the first that does not fit
        raise ValueError(f"--weights: {path} is damaged or of another network. {layer}") from error
    if not all(weight.isfinite().all() for weight in network.parameters()):
        raise ValueError(f"--weights: {path} holds weights that are not finite")


def save(path: Path, content: bytes) -> None:
    """Writes a file beside and renames it: a full disk or a kill leaves no half one."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def train(args: Args) -> dict:
    """A run in its own folder: flags, curves, weights, result, film; returns the result."""
    torch.manual_seed(args.seed)
    cuda = args.device != "cpu" and torch.cuda.is_available()
    network = ActorCritic(args.hidden_size).to("cuda" if cuda else "cpu")
    if args.weights:
        load_weights(network, args.weights)
    averaged = copy.deepcopy(network)
    run_dir = args.runs_dir / f"a2c_cartpole__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    run_dir.mkdir(parents=True)
    save(run_dir / "args.json", json.dumps(asdict(args), indent=2, default=str).encode())

    outcome, start = {"solved_episode": None, "episodes": 0, "steps": 0}, time.perf_counter()
    print(network)
    try:
        if not args.weights:
            writer = SummaryWriter(run_dir, flush_secs=1)
            outcome = learn(args, network, averaged, writer)
            writer.close()  # not after Ctrl-C, which may have left it with a lock: it would hang
    finally:  # after Ctrl-C as well
        content = io.BytesIO()  # onto a full disk, torch.save itself fails with another error
        torch.save(averaged.state_dict(), content)
        save(run_dir / "weight_end.pth", content.getvalue())
        print(f"The weights are in {run_dir}")
    seconds = time.perf_counter() - start
    versions = {module.__name__: module.__version__ for module in (torch, gym, np)}
    versions["python"] = sys.version.split()[0]
    result = {"seed": args.seed, "seconds": seconds, "versions": versions, **outcome}
    result |= {"steps_per_second": outcome["steps"] / seconds, **evaluate(averaged, args)}
    save(run_dir / "result.json", json.dumps(result, indent=2).encode())
    print(f"Greedy: {result['eval_mean']:.1f} steps an episode")
    try:
        save(run_dir / "film.mp4", film(averaged, args))
    except Exception as error:  # they can raise nearly anything
        reason = f"pygame, imageio or ffmpeg failed: {error}".partition("\n")[0]
        raise OSError(f"no film: {reason}; everything else is in {run_dir}") from error
    print(f"Everything is in {run_dir}")
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)  # this network is too small to share
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")  # prints a folder of any name
    for number in {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:  # as Ctrl-C
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup has SIGHUP ignored
            signal.signal(number, signal.default_int_handler)
    threading.excepthook = lambda _: None  # TensorBoard raises its thread's errors in ours again
    try:
        train(tyro.cli(Args))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
