# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "gymnasium[classic-control]==1.4.0", "imageio[ffmpeg]==2.38.1", "numpy==2.4.6",
#     "tensorboard==2.21.0", "torch==2.13.0", "tqdm==4.70.1", "tyro==1.0.17",
# ]
# ///
"""Advantage actor-critic (A2C) on CartPole: a policy learns from a critic, 32 poles at a time.

A cart is pushed so that the pole on it stays up. In each step the agent sees a state s (where cart
and pole are, and how fast), takes an action a (push left or right), and gets a reward r. The return
is the sum of all the rewards to come, one that is k steps ahead times gamma^k (gamma is 0.99). One
network gives two answers: pi(a|s), the probability with which each action is taken, called the
policy (the actor), and V(s), the return to expect from state s if this policy acts (the critic).
T = 5 steps in N = 32 environments, a rollout, make one update of both, and are then forgotten:

    R_t  = r_t + gamma R_{t+1}      or r_t alone where step t ended an episode; R_5 = V(s_5)
    A_t  = R_t - V(s_t)             the advantage: how much better it went than the critic thought
    loss = - mean A_t log pi(a_t|s_t)  +  0.5 mean A_t^2  -  0.01 mean entropy(pi(.|s_t))

R_t is an n-step return: n = 5 rewards and then V(s_5) for the first of the five steps, n = 1 for
the last. To let V stand for what was not played is called bootstrapping; so R_t and A_t are
estimates.

The first term makes an action that went better than expected more likely, one that went worse less
(by its logarithm, as a rare action is seldom drawn and must count for more). Lowering it raises the
expected return, on average and as far as the estimates are right: minus its gradient is the policy
gradient. R_t in place of A_t would do so, too, but then whichever action was drawn in a good state
would get more likely, the worse one as well; V, which is subtracted, is called the baseline. A_t is
held fixed in this term: V is trained by the second one, which moves it towards R_t, held fixed as
well (else R_t would move towards V). The third term is the entropy, highest where all actions are
equally likely. It keeps the policy, from which the actions are drawn, from settling too soon: only
actions that are tried (exploration) show what they bring. 0.5 and 0.01 weigh the terms.

There is no replay memory: A_t tells how good an action was if the policy goes on as it is. Steps of
an older policy would teach the wrong thing: A2C is on-policy. In place of a memory, 32 poles,
soon at different points of their episodes, make the 160 steps of a batch differ; a network trained
on steps that are all alike forgets the other kinds.

This is algorithm S3 of Mnih et al., "Asynchronous Methods for Deep Reinforcement Learning", ICML
2016, but one update, by Adam, serves all environments. a2c_breakout.py has the same loop for Atari.

    python a2c_cartpole.py                                      # train, evaluate, film
    python a2c_cartpole.py --seed 7 --num-envs 16 --num-steps 10
    python a2c_cartpole.py --weights runs/.../weight_end.pth    # evaluate and film only

The task is the book's (Yutaro Ogawa, つくりながら学ぶ！深層強化学習, 2018): an episode ends when
the pole leans too far, the cart leaves the track or 200 steps are over. The reward is 0 on the way,
and at the end +1 for 196 steps or more (a success), -1 for fewer; through gamma, a later fall costs
less. Training ends once each environment's last episode was a success, or after 5,120,000 steps.

Differs from the book (a flag, where given, brings the book's way back):
- A moving average of the weights is kept, as the last update can be bad: --average-decay 0
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


@dataclass  # tyro makes flags of the fields, and help of their comments
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
    entropy_coef: float = 0.01  # weight of the entropy, 0 or more
    max_grad_norm: float = 0.5  # norm that the gradient has at most (clipping), above 0
    average_decay: float = 0.975  # share the mean weights keep per update, below 1; 0 is the book's

    def __post_init__(self):  # tyro shows the error; a NaN fails every comparison
        for name, kind in Args.__annotations__.items():
            value = getattr(self, name)
            if kind is int and value % 1 != 0:
                raise ValueError(f"--{name.replace('_', '-')} must be a whole number, not {value}")
            if kind in (bool, int, float):  # a caller may give NumPy's, or whole floats such as 1e4
                setattr(self, name, kind(value))
        self.runs_dir = Path(os.path.expanduser(self.runs_dir))
        if self.weights is not None:
            self.weights = Path(os.path.expanduser(self.weights))
        rollout_steps = self.num_envs * self.num_steps  # between two updates
        for good, rule in [
            (0 <= self.seed < 2**32, "--seed must be from 0 to 2**32 - 1"),
            (min(self.num_envs, self.num_steps) >= 1, "--num-envs, --num-steps must be 1 or more"),
            (rollout_steps <= 10**7, "--num-envs * --num-steps: 10**7 at most"),
            (rollout_steps <= self.total_timesteps, f"--total-timesteps: {rollout_steps} or more"),
            (self.eval_episodes >= 1, "--eval-episodes must be 1 or more"),
            (1 <= self.hidden_size <= 4096, "--hidden-size must be from 1 to 4096"),
            (0 < self.learning_rate < np.inf, "--learning-rate must be above 0 and finite"),
            (0 <= self.gamma <= 1, "--gamma must be from 0 to 1"),
            (0 <= self.value_loss_coef < np.inf, "--value-loss-coef must be 0 or more and finite"),
            (0 <= self.entropy_coef < np.inf, "--entropy-coef must be 0 or more and finite"),
            (0 < self.max_grad_norm < np.inf, "--max-grad-norm must be above 0 and finite"),
            (0 <= self.average_decay < 1, "--average-decay must be from 0 to below 1"),
            (not self.weights or self.weights.is_file(), f"--weights: no file {self.weights}"),
            (self.device in ("auto", "cpu", "cuda"), "--device must be auto, cpu or cuda"),
            (self.device != "cuda" or torch.cuda.is_available(), "--device cuda: there is no GPU"),
        ]:
            if not good:
                raise ValueError(rule)


# ---- environment -------------------------------------------------------------------------------

MAX_STEPS = 200  # an episode ends here at the latest
SUCCESS_STEPS = 196  # an episode of this many steps or more is a success


def make_env(render_mode: str | None = None) -> gym.Env:
    """CartPole-v1 with the book's 200 steps, to evaluate and film: states (4,), actions 0 and 1."""
    return gym.make("CartPole-v1", max_episode_steps=MAX_STEPS, render_mode=render_mode)


def book_reward(steps: np.ndarray, done: np.ndarray) -> np.ndarray:
    """0 on the way; at the end +1 for a success, -1 for a shorter episode: (N,), of N environments.

    The same fall brings -1 in step 195 and +1 in step 196, and the state does not hold the step: V
    can only learn the mean. (Theory asks that a state hold all that matters: the Markov property.)
    """
    return np.where(done, np.where(steps >= SUCCESS_STEPS, 1, -1), 0).astype(np.float32)


# ---- network -----------------------------------------------------------------------------------


class ActorCritic(nn.Module):
    """One body with two heads: the critic's values and the actor's logits, whose softmax is pi."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.fc1 = nn.Linear(4, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)
        self.critic = nn.Linear(hidden_size, 1)
        self.actor = nn.Linear(hidden_size, 2)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """states (B, 4) -> values (B,), logits (B, 2)."""
        hidden = torch.relu(self.fc1(states))  # (B, hidden_size)
        hidden = torch.relu(self.fc2(hidden))  # (B, hidden_size)
        return self.critic(hidden).squeeze(-1), self.actor(hidden)

    @torch.no_grad()
    def act(self, states: np.ndarray) -> np.ndarray:
        """Draws an action by its probability in each environment: (N, 4) -> (N,) int64."""
        _, logits = self(torch.from_numpy(states).to(self.fc1.weight.device))  # (N, 2)
        probs = logits.softmax(-1).nan_to_num(1)  # multinomial refuses NaN; learn() reports it
        return torch.multinomial(probs, num_samples=1).squeeze(-1).cpu().numpy()

    @torch.no_grad()
    def greedy_action(self, state: np.ndarray) -> int:
        """The more likely action in one state (4,)."""
        _, logits = self(torch.from_numpy(state).to(self.fc1.weight.device))  # (2,)
        return logits.argmax().item()


# ---- learning ----------------------------------------------------------------------------------


def compute_returns(rewards: Tensor, masks: Tensor, last_values: Tensor, gamma: float) -> Tensor:
    """R_t = r_t + gamma * mask_t * R_{t+1}, and R_T = V(s_T) (Mnih et al. 2016, algorithm S3).

    Rewards (float32), masks and returns are (T, N), last_values (N,). A mask of 0 ends a return, so
    that none reaches over a reset.
    """
    returns, next_returns = torch.empty_like(rewards), last_values
    for t in reversed(range(len(rewards))):
        next_returns = returns[t] = rewards[t] + gamma * masks[t] * next_returns
    return returns


def compute_losses(network, states, actions, returns) -> tuple[Tensor, Tensor, Tensor]:
    """Value loss, policy loss and entropy, each the mean over B decisions (steps, but no resets).

    states (B, 4), actions (B,) int64, returns (B,) float32.
    """
    values, logits = network(states)
    log_probs = F.log_softmax(logits, dim=-1)  # (B, 2)
    entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
    advantages = returns - values  # (B,)
    value_loss = advantages.pow(2).mean()
    action_log_probs = log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)  # (B,)
    policy_loss = -(advantages.detach() * action_log_probs).mean()  # detach: a constant
    return value_loss, policy_loss, entropy


def learn(args: Args, network: ActorCritic, averaged: ActorCritic, writer: SummaryWriter) -> dict:
    """Trains the network until its own episodes, of drawn actions, solve the task, if ever.

    `averaged`, the moving average of its weights, is what is saved, evaluated and filmed. Returns,
    for result.json, environment 0's last episode (counted from 0; None if not solved), how many it
    had, and the steps of all environments. Raises ValueError when a gradient is not finite.
    """
    device = network.fc1.weight.device
    envs = CartPoleVectorEnv(args.num_envs, max_episode_steps=MAX_STEPS)  # N poles in one array
    states, _ = envs.reset(seed=args.seed)  # (N, 4) float32
    last_lengths = np.zeros(args.num_envs)  # in steps, of each environment's last whole episode
    parameters = list(network.parameters())
    optimizer = torch.optim.Adam(parameters, args.learning_rate, fused=True)
    lengths: deque[int] = deque(maxlen=10)  # of environment 0's last episodes, in steps
    episode = -1  # of environment 0: none has ended yet
    timesteps, update, start = 0, 0, time.perf_counter()
    rollout_steps = args.num_envs * args.num_steps
    bar = tqdm(total=args.total_timesteps, unit="timestep", disable=not sys.stderr)

    while timesteps + rollout_steps <= args.total_timesteps and last_lengths.min() < SUCCESS_STEPS:
        # 1. rollout: T steps in each of N environments
        rollout = []
        for _ in range(args.num_steps):
            actions = network.act(states)  # (N,)
            next_states, pole_rewards, terminated, truncated, _ = envs.step(actions)
            # The time limit (truncated) is an end too, as to reach it is the goal here. In most
            # other tasks the rewards to come still count then, and only `terminated` ends them.
            dones = terminated | truncated  # (N,)
            # In the step after an end, CartPoleVectorEnv resets the pole, ignores the action and
            # rewards 0, not 1. That was no decision, and nothing may be learnt from it.
            decided = pole_rewards > 0  # (N,)
            rollout.append((states, actions, book_reward(envs.steps, dones), ~dones, decided))
            states = next_states
            last_lengths[dones] = envs.steps[dones]
            timesteps += int(decided.sum())
            if dones[0]:
                episode += 1
                steps = int(envs.steps[0])
                lengths.append(steps)
                tqdm.write(f"episode {episode}: {steps} steps, mean of 10 {np.mean(lengths):.1f}")
                writer.add_scalar("charts/episode", episode, timesteps)
                writer.add_scalar("charts/episodic_length", steps, timesteps)
        columns = [torch.from_numpy(np.stack(column)).to(device) for column in zip(*rollout)]
        batch_states, batch_actions, rewards, masks, decisions = columns  # (T, N, 4); others (T, N)
        if not decisions.any():
            continue  # nothing but resets: possible where environments and steps are few

        # 2. returns: what came of each action, (T, N)
        with torch.no_grad():  # R_t is a constant
            last_values, _ = network(torch.from_numpy(states).to(device))  # (N,)
        returns = compute_returns(rewards, masks, last_values, args.gamma)

        # 3. loss: over the batch of B decisions, T * N without the resets. The network runs on
        # the batch again, all at once, as step 1 has kept no gradients.
        value_loss, policy_loss, entropy = compute_losses(
            network, batch_states[decisions], batch_actions[decisions], returns[decisions]
        )
        loss = policy_loss + args.value_loss_coef * value_loss - args.entropy_coef * entropy

        # 4. update: the gradient is clipped, so that no batch, however odd, pulls too hard
        optimizer.zero_grad()
        loss.backward()  # the gradient of the loss with respect to each weight
        grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        if not grad_norm.isfinite():
            raise ValueError(f"update {update}: gradient not finite, lower --learning-rate")
        optimizer.step()  # a small step against it
        # One update can spoil the policy, but hardly the moving average of the weights (Polyak
        # averaging). It is not ddqn_cartpole.py's target network: no R_t is computed with it.
        with torch.no_grad():
            for mean, weight in zip(averaged.parameters(), parameters):
                mean.lerp_(weight, 1 - args.average_decay)  # a small step towards it
        update += 1

        # 5. log
        bar.update(timesteps - bar.n)
        if update % 20 == 0:  # the curves need no more
            writer.add_scalar("charts/SPS", timesteps / (time.perf_counter() - start), timesteps)
            writer.add_scalar("losses/value_loss", value_loss.item(), timesteps)
            writer.add_scalar("losses/policy_loss", policy_loss.item(), timesteps)
            writer.add_scalar("losses/entropy", entropy.item(), timesteps)

    bar.close()
    solved = last_lengths.min() >= SUCCESS_STEPS
    tqdm.write(f"Solved in episode {episode} of environment 0." if solved else "Not solved.")
    return dict(solved_episode=episode if solved else None, episodes=episode + 1, steps=timesteps)


# ---- evaluation and the run --------------------------------------------------------------------


def evaluate(network: ActorCritic, env: gym.Env, seed: int, num_episodes: int) -> list[int]:
    """The lengths of greedy episodes, without random actions, in steps."""
    env.reset(seed=2**33 + seed)  # training's seeds are below 2**33
    lengths = []
    for _ in range(num_episodes):
        state, _ = env.reset()
        steps, done = 0, False
        while not done:
            state, _, terminated, truncated, _ = env.step(network.greedy_action(state))
            steps, done = steps + 1, terminated or truncated
        lengths.append(steps)
    return lengths


def film(network: ActorCritic, seed: int) -> bytes:
    """The evaluation's first episode once more, as an MP4."""
    import pygame  # here, so that without it only the film is missing

    env = make_env(render_mode="rgb_array_list")  # keeps a picture of each step
    env.unwrapped.screen = pygame.Surface((600, 400))  # drawn in memory: no display needed
    evaluate(network, env, seed, num_episodes=1)
    mp4 = imageio.mimwrite("<bytes>", env.render(), "mp4", fps=50, macro_block_size=2)
    imageio.get_reader(mp4, "mp4").close()  # raises if ffmpeg failed: mimwrite does not
    return mp4


def save(path: Path, content: bytes) -> None:
    """Writes a .part file, then renames it: a full disk or a kill leaves no half file."""
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
        content = io.BytesIO(args.weights.read_bytes())
        try:
            network.load_state_dict(torch.load(content, "cpu", weights_only=True))
        except Exception as error:  # a damaged file can raise nearly anything
            layer = str(error).partition(":\n\t")[2].partition("\n")[0]  # that does not fit
            why = f"{args.weights} is damaged or of another network. {layer}"
            raise ValueError(f"--weights: {why}") from error
        if not all(weight.isfinite().all() for weight in network.parameters()):
            raise ValueError(f"--weights: {args.weights} holds weights that are not finite")
    averaged = copy.deepcopy(network)
    run_dir = args.runs_dir / f"a2c_cartpole__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    run_dir.mkdir(parents=True)
    save(run_dir / "args.json", json.dumps(asdict(args), indent=2, default=str).encode())

    outcome = {"solved_episode": None, "episodes": 0, "steps": 0}
    start = time.perf_counter()
    print(network)
    try:
        if not args.weights:
            writer = SummaryWriter(run_dir, flush_secs=1)
            outcome = learn(args, network, averaged, writer)
            writer.close()  # not after Ctrl-C: it may hold a lock then, and hang
    finally:  # after Ctrl-C as well
        content = io.BytesIO()  # torch.save's own error on a full disk is no OSError
        torch.save(averaged.state_dict(), content)
        save(run_dir / "weight_end.pth", content.getvalue())
        print(f"The weights are in {run_dir}")
    seconds = time.perf_counter() - start
    versions = {module.__name__: module.__version__ for module in (torch, gym, np)}
    versions["python"] = sys.version.split()[0]
    lengths = evaluate(averaged, make_env(), args.seed, args.eval_episodes)
    result = {"seed": args.seed, "seconds": seconds, "versions": versions, **outcome}
    result |= {"steps_per_second": outcome["steps"] / seconds}
    result |= {"eval_mean": float(np.mean(lengths)), "eval_std": float(np.std(lengths))}
    save(run_dir / "result.json", json.dumps(result, indent=2).encode())
    print(f"Greedy: {result['eval_mean']:.1f} steps an episode. Everything is in {run_dir}")
    try:
        save(run_dir / "film.mp4", film(averaged, args.seed))
    except Exception as error:  # they can raise nearly anything
        why = f"pygame, imageio or ffmpeg failed: {error}".partition("\n")[0]
        raise OSError(f"no film: {why}; everything else is in {run_dir}") from error
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)  # this network is too small for more
    if hasattr(sys.stdout, "reconfigure") and not hasattr(sys, "ps1"):  # not at a prompt
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)  # any name, at once
        threading.excepthook = lambda _: None  # else TensorBoard's thread prints its error, too
    first = {}  # when the first signal to stop came

    def stop(*_):
        now = time.monotonic()
        if not 0 < now - first.setdefault("time", now) < 1:  # `timeout` and others send two at once
            raise KeyboardInterrupt  # the weights are saved all the same

    for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)}:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup has SIGHUP ignored
            signal.signal(number, stop)
    try:  # in a notebook, argv is the kernel's
        train(tyro.cli(Args, args=[] if sys.argv[0].endswith("kernel_launcher.py") else None))
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # nobody reads on (`| head`)
            sys.stdout = None  # else Python's exit would print into the pipe once more
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
