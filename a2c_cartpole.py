# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "gymnasium[classic-control]==1.4.0",
#     "imageio[ffmpeg]==2.38.1",
#     "numpy==2.4.6",
#     "tensorboard==2.21.0",
#     "torch==2.13.0",
#     "tqdm==4.70.1",
#     "tyro==1.0.17",
# ]
# ///
"""Advantage actor-critic (A2C) on CartPole: 32 poles at once, a policy and its critic.

One network answers two questions about each state: how much reward is still to come (the critic, V)
and how likely each action should be (the actor, pi). 32 environments are played side by side; after
5 steps in each, all decisions go into one gradient step, and are then forgotten. No memory is
needed: 32 environments at 32 different moments make a random enough batch.

    R_t  = r_t + gamma * R_{t+1}     (R_t = r_t at an end; R_T = V(s_T) where the 5 steps break off)
    A_t  = R_t - V(s_t)              (advantage: how much better it went than expected)
    loss = 0.5 * mean A_t^2 - mean A_t * log pi(a_t | s_t) - 0.01 * mean entropy(pi(. | s_t))

In the second term A_t is a number: no gradient flows through it. The entropy keeps the policy from
settling too soon.

Mnih et al., "Asynchronous Methods for Deep Reinforcement Learning", ICML 2016, algorithm S3, made
synchronous.

    python a2c_cartpole.py
    python a2c_cartpole.py --seed 7 --num-envs 16 --num-steps 10
    python a2c_cartpole.py --weights runs/.../weight_end.pth --eval-only

"The book" is the Japanese textbook series whose programs this collection rebuilds. The task is the
book's: 200 steps an episode, solved when the last episode of every environment had 196 steps or
more, at most 5,120,000 timesteps (a timestep is one decision in one environment). The reward is the
book's as well, not the environment's +1 a step: 0 on the way, and at the end +1 for 196 steps or
more, -1 for fewer. Every end is terminal, the time limit too: nothing is bootstrapped from the
state after step 200, though the pole still stands there. With other rewards that would be a
mistake; here, reaching the limit is the goal itself.

Differs from the book:
- The weights that are saved and evaluated are a moving average over about 40 updates, the 200 steps
  in which the successes were won. At a learning rate of 0.01 the network changes so fast that the
  last weights alone (--average-decay 0, the book's way) often let the pole fall. Training itself
  never sees the average, so the task is solved after just as many episodes.
- The environments are simulated as one batch, not in a Python loop. Such an environment resets at
  the step after an end and ignores that action; the reset steps count neither in the loss nor as
  timesteps. The book resets at once, so its batches always have 160 decisions, these a few less.
- Gymnasium's API: terminated and truncated, and max_episode_steps=200 on CartPole-v1.
- Film and evaluation are greedy, in a fresh environment.
"""

import json
import math
import os
import platform
import sys
import time
from collections import deque
from collections.abc import Iterator
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
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

MAX_STEPS = 200  # steps an episode at most
SUCCESS_STEPS = 196  # an episode of this many steps or more is a success
LOG_EVERY = 20  # updates from one TensorBoard entry of the losses to the next


# ---- arguments and result -----------------------------------------------------


@dataclass
class Args:
    """Train an advantage actor-critic (A2C) on CartPole."""

    seed: int = 0
    """seed of every random generator (PyTorch, environments), 0 to 2**32 - 1"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the network lives; auto takes CUDA when there is one"""
    runs_dir: Path = Path("runs")
    """folder in which the run's own folder is made"""
    num_envs: int = 32
    """environments that step side by side, 1 to 65536"""
    num_steps: int = 5
    """steps of each environment before an update, and the length of the return, 1 to 65536"""
    total_timesteps: int = 5_120_000
    """decisions, over all environments, at most (the last rollout is finished), 1 or more"""
    learning_rate: float = 0.01
    """step size of Adam, greater than 0"""
    gamma: float = 0.99
    """discount of the reward one step later, 0 to 1"""
    hidden_size: int = 32
    """units in each of the two hidden layers, 1 to 4096"""
    value_loss_coef: float = 0.5
    """weight of the value loss, 0 or more"""
    entropy_coef: float = 0.01
    """weight of the entropy, which keeps the policy from settling too soon, 0 or more"""
    max_grad_norm: float = 0.5
    """norm to which the gradient is clipped, greater than 0"""
    average_decay: float = 0.975
    """decay, per update, of the average that becomes the saved weights; 0 (the book) to below 1"""
    weights: Path | None = None
    """weights of an earlier run (weight_end.pth) to start from"""
    eval_only: bool = False
    """no training: evaluate and film the weights given with --weights"""
    eval_episodes: int = 100
    """greedy episodes in the evaluation, 1 or more"""


@dataclass
class Result:
    """What a run leaves in result.json."""

    seed: int
    seconds: float  # of training, without the evaluation and the film
    versions: dict[str, str]
    solved_episode: int | None  # index, from 0, of environment 0's last finished episode
    episodes: int  # finished by environment 0
    steps: int  # decisions, over all environments
    steps_per_second: float
    eval_mean: float  # steps an episode, 200 at most
    eval_std: float


class UserError(Exception):
    """Something the user can put right: shown as one line, without a traceback."""


def check(args: Args) -> None:
    """Refuses values that make no sense (a NaN fails every comparison, so it is refused too)."""
    for flag, good, meaning in [
        ("--seed", 0 <= args.seed < 2**32, "from 0 to 2**32 - 1"),
        ("--num-envs", 1 <= args.num_envs <= 65536, "from 1 to 65536"),
        ("--num-steps", 1 <= args.num_steps <= 65536, "from 1 to 65536"),
        ("--num-steps", args.num_envs * args.num_steps <= 10**7, "10**7 / --num-envs at most"),
        ("--total-timesteps", args.total_timesteps >= 1, "1 or more"),
        ("--learning-rate", 0 < args.learning_rate < math.inf, "greater than 0 and finite"),
        ("--gamma", 0 <= args.gamma <= 1, "from 0 to 1"),
        ("--hidden-size", 1 <= args.hidden_size <= 4096, "from 1 to 4096"),
        ("--value-loss-coef", 0 <= args.value_loss_coef < math.inf, "0 or more and finite"),
        ("--entropy-coef", 0 <= args.entropy_coef < math.inf, "0 or more and finite"),
        ("--max-grad-norm", 0 < args.max_grad_norm < math.inf, "greater than 0 and finite"),
        ("--average-decay", 0 <= args.average_decay < 1, "from 0 to below 1"),
        ("--eval-episodes", args.eval_episodes >= 1, "1 or more"),
    ]:
        if not good:
            value = getattr(args, flag[2:].replace("-", "_"))
            raise UserError(f"{flag} must be {meaning}, not {value}")
    if args.eval_only and args.weights is None:
        raise UserError("--eval-only needs --weights")


# ---- environment --------------------------------------------------------------


def make_env(render_mode: str | None = None) -> gym.Env:
    """CartPole with the book's 200 steps an episode: states (4,) float32, actions 0 and 1."""
    return gym.make("CartPole-v1", max_episode_steps=MAX_STEPS, render_mode=render_mode)


def book_rewards(steps: np.ndarray, dones: np.ndarray) -> np.ndarray:
    """0 on the way; at the end +1 for an episode of 196 steps or more, -1 for a shorter one.

    All three arrays are (num_envs,); the rewards are float32.
    """
    return np.where(dones, np.where(steps >= SUCCESS_STEPS, 1.0, -1.0), 0.0).astype(np.float32)


class CartPoles:
    """Many CartPoles, simulated as one batch, with the book's rewards.

    A CartPole whose episode has ended resets at its next step and ignores the action given to it
    then. Such a step is not a decision; step() marks it, so that nothing is learnt from it.
    """

    def __init__(self, num_envs: int, seed: int):
        self.envs = gym.make_vec(
            "CartPole-v1",
            num_envs=num_envs,
            vectorization_mode="vector_entry_point",
            max_episode_steps=MAX_STEPS,
        )
        self.observations, _ = self.envs.reset(seed=seed)  # (num_envs, 4) float32
        self.steps = np.zeros(num_envs, np.int64)  # of the episodes under way
        self.dones = np.zeros(num_envs, np.bool_)  # whose episode ended at the last step

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Acts, (num_envs,) int64, and returns the rewards, the ends and which were decisions.

        Each array is (num_envs,). The new observations and step counts stay in this object.
        """
        decided = ~self.dones
        self.observations, _, terminated, truncated, _ = self.envs.step(actions)
        self.dones = terminated | truncated
        self.steps = np.where(decided, self.steps + 1, 0)
        return book_rewards(self.steps, self.dones), self.dones, decided


# ---- network ------------------------------------------------------------------


class ActorCritic(nn.Module):
    """Two answers to each observation: its value, and how likely each action should be."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.fc1 = nn.Linear(4, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)
        self.critic = nn.Linear(hidden_size, 1)
        self.actor = nn.Linear(hidden_size, 2)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """observations (batch, 4) -> values (batch,) and logits (batch, 2)."""
        hidden = torch.relu(self.fc1(observations))  # (batch, hidden_size)
        hidden = torch.relu(self.fc2(hidden))  # (batch, hidden_size)
        return self.critic(hidden).squeeze(-1), self.actor(hidden)


@torch.no_grad()
def act(network: ActorCritic, observations: np.ndarray, device: torch.device) -> np.ndarray:
    """Draws an action from the policy for each observation: (num_envs, 4) -> (num_envs,) int64."""
    _, logits = network(torch.as_tensor(observations, device=device))  # (num_envs, 2)
    # The argmax of p / Exp(1) is distributed as p. torch.multinomial does the same and checks its
    # input, which costs 6% of the steps a second.
    scores = logits.softmax(-1) / torch.empty_like(logits).exponential_()  # (num_envs, 2)
    return scores.argmax(-1).cpu().numpy()


@torch.no_grad()
def greedy_action(network: ActorCritic, observation: np.ndarray, device: torch.device) -> int:
    """The more likely action for one observation (4,)."""
    _, logits = network(torch.as_tensor(observation, device=device))
    return int(logits.argmax())


# ---- rollout storage ----------------------------------------------------------


class RolloutStorage:
    """num_steps steps of num_envs environments, in NumPy arrays allocated once.

    NumPy, because small rows go in at every step, and small sums come out: 10% more steps a second
    than with torch tensors from the returns on.
    """

    def __init__(self, num_steps: int, num_envs: int):
        self.observations = np.zeros((num_steps, num_envs, 4), np.float32)
        self.actions = np.zeros((num_steps, num_envs), np.int64)
        self.rewards = np.zeros((num_steps, num_envs), np.float32)
        self.masks = np.zeros((num_steps, num_envs), np.float32)  # 0 where an episode ended, else 1
        self.decided = np.zeros((num_steps, num_envs), np.bool_)  # False at a reset step

    def decisions(
        self, returns: np.ndarray, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Observations (batch, 4), actions (batch,) and returns (batch,), without the reset steps.

        returns is (num_steps, num_envs); batch is the number of decisions in the rollout.
        """
        return (
            torch.from_numpy(self.observations[self.decided]).to(device),
            torch.from_numpy(self.actions[self.decided]).to(device),
            torch.from_numpy(returns[self.decided]).to(device),
        )


# ---- learning -----------------------------------------------------------------


def compute_returns(
    rewards: np.ndarray, masks: np.ndarray, last_values: np.ndarray, gamma: float
) -> np.ndarray:
    """R_t = r_t + gamma * mask_t * R_{t+1}; no return leaks past a mask of 0.

    rewards, masks and the result are (num_steps, num_envs); last_values (num_envs,) are those of
    the observations after the rollout.
    """
    returns, following = np.empty_like(rewards), last_values
    for t in reversed(range(len(rewards))):
        following = returns[t] = rewards[t] + gamma * masks[t] * following
    return returns


def compute_losses(
    network: ActorCritic, observations: Tensor, actions: Tensor, returns: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Value loss, policy loss and entropy, each the mean over a batch of decisions.

    observations (batch, 4), actions (batch,) int64, returns (batch,).
    """
    values, logits = network(observations)
    log_probs = F.log_softmax(logits, dim=-1)  # (batch, 2)
    entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
    advantages = returns - values  # (batch,)
    value_loss = advantages.pow(2).mean()
    action_log_probs = log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)  # (batch,)
    policy_loss = -(advantages.detach() * action_log_probs).mean()
    return value_loss, policy_loss, entropy


def join_weights(network: ActorCritic) -> nn.Parameter:
    """Moves all weights into one vector, (number of weights,); the layers keep views of it.

    Adam and the average then have one tensor to go through, not one for each weight and bias: 5%
    more steps a second. Call it when the network is complete and on its device. The gradients are
    views as well: set to None they would be lost, and Adam would move nothing.
    """
    weights = nn.Parameter(nn.utils.parameters_to_vector(network.parameters()).detach())
    weights.grad = torch.zeros_like(weights)
    start = 0
    for parameter in network.parameters():
        end = start + parameter.numel()
        parameter.data = weights.data[start:end].view_as(parameter)
        parameter.grad = weights.grad[start:end].view_as(parameter)
        start = end
    return weights


def learn(
    args: Args, network: ActorCritic, device: torch.device, writer: SummaryWriter
) -> tuple[int | None, int, int]:
    """Trains the network in place, until it is solved or the timesteps are used up.

    In the end (not after Ctrl-C) the network has the averaged weights. Returns the index (from 0)
    of environment 0's last episode if solved, else None; the number of its episodes; the number of
    all decisions.
    """
    weights = join_weights(network)
    optimizer = torch.optim.Adam([weights], lr=args.learning_rate, fused=True)
    envs = CartPoles(args.num_envs, args.seed)
    storage = RolloutStorage(args.num_steps, args.num_envs)
    final_steps = np.zeros(args.num_envs, np.int64)  # of each environment's last whole episode
    last_steps: deque[int] = deque(maxlen=10)  # of environment 0's last whole episodes
    average = weights.detach().clone()
    episodes, timesteps, updates = 0, 0, 0
    bar = tqdm(total=args.total_timesteps, unit="timestep")
    started = time.perf_counter()

    while timesteps < args.total_timesteps and final_steps.min() < SUCCESS_STEPS:
        # 1. act and step
        for t in range(args.num_steps):
            storage.observations[t] = envs.observations  # (num_envs, 4)
            storage.actions[t] = act(network, envs.observations, device)  # (num_envs,)
            storage.rewards[t], dones, storage.decided[t] = envs.step(storage.actions[t])
            storage.masks[t] = ~dones
            timesteps += int(storage.decided[t].sum())
            final_steps[dones] = envs.steps[dones]
            if dones[0]:
                steps = int(final_steps[0])
                last_steps.append(steps)
                mean = np.mean(last_steps)
                tqdm.write(f"episode {episodes}: {steps} steps, mean of 10 {mean:.1f}")
                writer.add_scalar("charts/episodic_length", steps, timesteps)
                episodes += 1
        if not storage.decided.any():
            continue  # one environment and one step can be a reset and nothing else

        # 2. returns
        with torch.no_grad():
            last_values, _ = network(torch.as_tensor(envs.observations, device=device))
        last_values = last_values.cpu().numpy()  # (num_envs,)
        returns = compute_returns(storage.rewards, storage.masks, last_values, args.gamma)

        # 3. loss
        batch = storage.decisions(returns, device)
        value_loss, policy_loss, entropy = compute_losses(network, *batch)
        loss = args.value_loss_coef * value_loss + policy_loss - args.entropy_coef * entropy

        # 4. update
        weights.grad.zero_()  # and with it the gradients of all layers: see join_weights
        loss.backward()
        nn.utils.clip_grad_norm_([weights], args.max_grad_norm)
        optimizer.step()
        average.lerp_(weights.detach(), 1 - args.average_decay)
        updates += 1

        # log
        if not loss.isfinite():
            raise UserError(f"update {updates}: the loss is not finite, lower --learning-rate")
        bar.update(timesteps - bar.n)
        if updates % LOG_EVERY == 0:
            writer.add_scalar("charts/SPS", timesteps / (time.perf_counter() - started), timesteps)
            writer.add_scalar("losses/value_loss", value_loss.item(), timesteps)
            writer.add_scalar("losses/policy_loss", policy_loss.item(), timesteps)
            writer.add_scalar("losses/entropy", entropy.item(), timesteps)

    bar.close()
    weights.data.copy_(average)
    solved = final_steps.min() >= SUCCESS_STEPS
    return episodes - 1 if solved else None, episodes, timesteps


# ---- evaluation ---------------------------------------------------------------


def greedy_episode(
    network: ActorCritic, env: gym.Env, seed: int, device: torch.device
) -> Iterator[int]:
    """Plays one episode without exploration; yields the number of steps so far after each step."""
    observation, _ = env.reset(seed=seed)
    for step in range(1, MAX_STEPS + 1):
        action = greedy_action(network, observation, device)
        observation, _, terminated, truncated, _ = env.step(action)
        yield step
        if terminated or truncated:
            return


def evaluate(network: ActorCritic, args: Args, device: torch.device) -> list[int]:
    """The steps (1 to 200) of each of args.eval_episodes greedy episodes in a fresh environment."""
    env = make_env()
    seeds = range(args.seed + 1, args.seed + 1 + args.eval_episodes)
    # The last number that an episode yields is the largest: its length.
    return [max(greedy_episode(network, env, seed, device)) for seed in seeds]


def film(network: ActorCritic, path: Path, args: Args, device: torch.device) -> None:
    """Films the first episode of the evaluation as an MP4, at the speed of the simulation."""
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # the frames need no display
    env = make_env(render_mode="rgb_array")
    fps = env.metadata["render_fps"]  # 50
    with imageio.get_writer(path, fps=fps, macro_block_size=2) as video:  # keeps 600 x 400 as it is
        for _ in greedy_episode(network, env, args.seed + 1, device):
            video.append_data(env.render())
    env.close()


# ---- files --------------------------------------------------------------------


def choose_device(name: str) -> torch.device:
    """The device for auto, cpu or cuda; raises UserError for cuda where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device here")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def load_weights(network: ActorCritic, path: Path, device: torch.device) -> None:
    """Fills the network from a saved state dict; raises UserError for any other file."""
    if not os.path.isfile(path):
        raise UserError(f"--weights: there is no file {path}")
    try:
        network.load_state_dict(torch.load(path, map_location=device, weights_only=True))
    except Exception:  # damaged files raise nearly anything
        raise UserError(
            f"--weights: {path} does not hold the weights of this network "
            f"(--hidden-size must be the one they were trained with)"
        ) from None


def make_run_dir(args: Args) -> Path:
    """Makes runs/<script>__<seed>__<time>, writes args.json into it and returns its path."""
    name = f"{Path(__file__).stem}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    run_dir = args.runs_dir / name
    try:
        run_dir.mkdir(parents=True)
        (run_dir / "args.json").write_text(json.dumps(asdict(args), indent=2, default=str))
    except OSError as error:
        raise UserError(f"cannot write to {run_dir}: {error.strerror}") from None
    return run_dir


def versions() -> dict[str, str]:
    """The versions a result depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "gymnasium": gym.__version__,
    }


# ---- training -----------------------------------------------------------------


def train(args: Args) -> Result:
    """Trains, saves the weights, evaluates and films them; the results go into the run's folder."""
    check(args)
    device = choose_device(args.device)
    torch.set_num_threads(1)  # this network is too small to share: two threads are slower
    torch.manual_seed(args.seed)
    network = ActorCritic(args.hidden_size).to(device)
    if args.weights is not None:
        load_weights(network, args.weights, device)
    run_dir = make_run_dir(args)
    writer = SummaryWriter(run_dir)
    tqdm.write(str(network))

    solved_episode, episodes, steps = None, 0, 0
    started = time.perf_counter()
    try:
        if not args.eval_only:
            solved_episode, episodes, steps = learn(args, network, device, writer)
    finally:  # after Ctrl-C as well
        seconds = time.perf_counter() - started
        writer.close()
        torch.save(network.state_dict(), run_dir / "weight_end.pth")
        tqdm.write(f"The weights are in {run_dir}")

    if solved_episode is not None:
        tqdm.write(f"Solved: {args.num_envs} successes, episode {solved_episode} of environment 0.")
    elif not args.eval_only:
        tqdm.write(f"Not solved in {steps} timesteps.")
    eval_steps = evaluate(network, args, device)
    film(network, run_dir / "film.mp4", args, device)
    result = Result(
        seed=args.seed,
        seconds=seconds,
        versions=versions(),
        solved_episode=solved_episode,
        episodes=episodes,
        steps=steps,
        steps_per_second=steps / seconds,
        eval_mean=float(np.mean(eval_steps)),
        eval_std=float(np.std(eval_steps)),
    )
    (run_dir / "result.json").write_text(json.dumps(asdict(result), indent=2))
    tqdm.write(
        f"Greedy evaluation: {result.eval_mean:.1f} steps an episode "
        f"(standard deviation {result.eval_std:.1f}, {args.eval_episodes} episodes)."
    )
    tqdm.write(f"Everything is in {run_dir}")
    return result


if __name__ == "__main__":
    try:
        train(tyro.cli(Args))
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(130)
