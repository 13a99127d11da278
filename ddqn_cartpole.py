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
"""Double DQN on CartPole: one network picks the next action, another says what it is worth.

The maximum over noisy estimates is too high on average: it picks whichever action is overestimated,
and a network that learns from its own maximum feeds the error back to itself. Double Q-learning
lets the network being trained pick the action, and takes the value from a second one, the target
network, a copy of the first that is refreshed after every other episode:

    a*   = argmax_a' Q(s', a')
    y    = r + gamma * Q_target(s', a*)        (y = r where the episode ended)
    loss = Huber(Q(s, a) - y)

The rest is dqn_cartpole.py; `diff dqn_cartpole.py ddqn_cartpole.py` shows what is new.

van Hasselt, Guez, Silver, "Deep Reinforcement Learning with Double Q-learning", AAAI 2016,
equation 4. The target network is that of Mnih et al., Nature 518, 2015.

    python ddqn_cartpole.py
    python ddqn_cartpole.py --seed 7 --target-interval 4
    python ddqn_cartpole.py --weights runs/.../weight_end.pth --eval-only

"The book" is the Japanese textbook series whose programs this collection rebuilds. The task is the
book's: 200 steps an episode, solved after 10 episodes in a row of 196 steps or more, at most 500
episodes. The reward is the book's as well, not the environment's +1 a step: 0 on the way, and at
the end +1 for 196 steps or more, -1 for fewer. Every end is terminal, the time limit too: nothing
is bootstrapped from the state after step 200, though the pole still stands there. With other
rewards that would be a mistake; here, reaching the limit is the goal itself.

The target is copied at the end of episodes 0, 2, 4 ...; during episode 0 it has weights of its own
(with --weights, those of the file).

Differs from the book, as does dqn_cartpole.py:
- The output layer starts at zero (--no-zero-init for the book's way), and the saved weights are a
  moving average (--average-decay 0 for the book's way).
- Gymnasium's API: terminated and truncated, and max_episode_steps=200 on CartPole-v1.
- The memory is a set of arrays, and a batch is drawn with replacement.
- Training stops at the 10th success in a row; film and evaluation are greedy, in a fresh
  environment.
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
from typing import Literal, NamedTuple

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
SUCCESSES_TO_SOLVE = 10  # in a row


# ---- arguments and result -----------------------------------------------------


@dataclass
class Args:
    """Train a Double Deep Q-Network on CartPole."""

    seed: int = 0
    """seed of every random generator (NumPy, PyTorch, environment), 0 to 2**32 - 1"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the network lives; auto takes CUDA when there is one"""
    runs_dir: Path = Path("runs")
    """folder in which the run's own folder is made"""
    num_episodes: int = 500
    """episodes of training at most, 1 or more"""
    learning_rate: float = 1e-4
    """step size of Adam, greater than 0"""
    epsilon: float = 0.5
    """chance of a random action in episode 0; in episode n it is this divided by n + 1, 0 to 1"""
    gamma: float = 0.99
    """discount of the reward one step later, 0 to 1"""
    batch_size: int = 32
    """transitions in one update, 1 or more, at most the memory size"""
    hidden_size: int = 32
    """units in each of the two hidden layers, 1 to 4096"""
    zero_init: bool = True
    """all values start at 0; --no-zero-init is the book's way, PyTorch's own random start"""
    memory_size: int = 10_000
    """transitions the replay memory holds, 1 to 10 million"""
    target_interval: int = 2
    """episodes from one copy to the target network to the next, 1 or more"""
    average_decay: float = 0.998
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
    solved_episode: int | None  # index, from 0, of the 10th success in a row
    episodes: int
    steps: int
    steps_per_second: float
    eval_mean: float  # steps an episode, 200 at most
    eval_std: float


class UserError(Exception):
    """Something the user can put right: shown as one line, without a traceback."""


def check(args: Args) -> None:
    """Refuses values that make no sense (a NaN fails every comparison, so it is refused too)."""
    for flag, good, meaning in [
        ("--seed", 0 <= args.seed < 2**32, "from 0 to 2**32 - 1"),
        ("--num-episodes", args.num_episodes >= 1, "1 or more"),
        ("--learning-rate", 0 < args.learning_rate < math.inf, "greater than 0 and finite"),
        ("--epsilon", 0 <= args.epsilon <= 1, "from 0 to 1"),
        ("--gamma", 0 <= args.gamma <= 1, "from 0 to 1"),
        ("--memory-size", 1 <= args.memory_size <= 10**7, "from 1 to 10**7"),
        ("--batch-size", 1 <= args.batch_size <= args.memory_size, "from 1 to --memory-size"),
        ("--hidden-size", 1 <= args.hidden_size <= 4096, "from 1 to 4096"),
        ("--target-interval", args.target_interval >= 1, "1 or more"),
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
    return gym.make(
        "CartPole-v1",
        max_episode_steps=MAX_STEPS,
        render_mode=render_mode,
        disable_env_checker=True,  # it looks for mistakes of new environments: 4 of 16 us a step
    )


def book_reward(steps: int, done: bool) -> float:
    """0 on the way; at the end +1 for an episode of 196 steps or more, -1 for a shorter one."""
    if not done:
        return 0.0
    return 1.0 if steps >= SUCCESS_STEPS else -1.0


# ---- network ------------------------------------------------------------------


class QNetwork(nn.Module):
    """The value of both actions in each state: (batch, 4) -> (batch, 2)."""

    def __init__(self, hidden_size: int, zero_init: bool):
        super().__init__()
        self.fc1 = nn.Linear(4, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)
        self.fc3 = nn.Linear(hidden_size, 2)
        if zero_init:  # optimistic: what has led to a fall looks worse than what is untried
            nn.init.zeros_(self.fc3.weight)
            nn.init.zeros_(self.fc3.bias)

    def forward(self, states: Tensor) -> Tensor:
        hidden = torch.relu(self.fc1(states))  # (batch, hidden_size)
        hidden = torch.relu(self.fc2(hidden))  # (batch, hidden_size)
        return self.fc3(hidden)  # (batch, 2)


@torch.no_grad()
def greedy_action(network: QNetwork, state: np.ndarray, device: torch.device) -> int:
    """The action of higher value in one state (4,)."""
    return network(torch.from_numpy(state).to(device)).argmax().item()


# ---- replay memory ------------------------------------------------------------


class Batch(NamedTuple):
    """Transitions drawn from the memory."""

    states: Tensor  # (batch, 4) float32
    actions: Tensor  # (batch, 1) int64
    rewards: Tensor  # (batch, 1) float32
    next_states: Tensor  # (batch, 4) float32
    masks: Tensor  # (batch, 1) float32, 0 where the episode ended, else 1


class ReplayMemory:
    """The last `capacity` transitions, in NumPy arrays allocated once.

    NumPy, because single rows go in at every step: 2 us for a push, 30 us into torch tensors.
    """

    def __init__(self, capacity: int, rng: np.random.Generator):
        self.states = np.zeros((capacity, 4), np.float32)
        self.actions = np.zeros((capacity, 1), np.int64)
        self.rewards = np.zeros((capacity, 1), np.float32)
        self.next_states = np.zeros((capacity, 4), np.float32)
        self.masks = np.zeros((capacity, 1), np.float32)
        self.capacity = capacity
        self.rng = rng
        self.index = 0  # where the next transition goes
        self.size = 0  # how many there are

    def push(
        self, state: np.ndarray, action: int, reward: float, next_state: np.ndarray, done: bool
    ) -> None:
        """Stores one transition, in place of the oldest when the memory is full."""
        self.states[self.index] = state
        self.actions[self.index] = action
        self.rewards[self.index] = reward
        self.next_states[self.index] = next_state
        self.masks[self.index] = not done
        self.index = (self.index + 1) % self.capacity
        self.size = min(self.size + 1, self.capacity)

    def sample(self, batch_size: int, device: torch.device) -> Batch:
        """Draws transitions uniformly, with replacement."""
        rows = self.rng.integers(self.size, size=batch_size)
        return self.take(rows, device)

    def take(self, rows: np.ndarray, device: torch.device) -> Batch:
        """The transitions in these rows, as tensors."""
        arrays = (self.states, self.actions, self.rewards, self.next_states, self.masks)
        return Batch(*(torch.from_numpy(array.take(rows, axis=0)).to(device) for array in arrays))


# ---- learning -----------------------------------------------------------------


def join_weights(network: QNetwork) -> nn.Parameter:
    """Moves all weights into one vector, (number of weights,); the layers keep views of it.

    Adam and the average then have one tensor to go through, not one for each weight and bias: 12%
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


@torch.no_grad()
def td_targets(
    network: QNetwork,
    target_network: QNetwork,
    batch: Batch,
    gamma: float,
) -> Tensor:
    """r + gamma * Q_target(s', argmax_a' Q(s', a')), and r alone at an end: (batch, 1)."""
    next_actions = network(batch.next_states).argmax(dim=1, keepdim=True)  # (batch, 1)
    next_values = target_network(batch.next_states).gather(1, next_actions)  # (batch, 1)
    return batch.rewards + gamma * batch.masks * next_values


def update(
    network: QNetwork,
    target_network: QNetwork,
    weights: nn.Parameter,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    gamma: float,
) -> tuple[Tensor, Tensor]:
    """One step of gradient descent; returns the loss () and the values Q(s, a) (batch, 1)."""
    targets = td_targets(network, target_network, batch, gamma)  # (batch, 1)
    values = network(batch.states).gather(1, batch.actions)  # (batch, 1)
    loss = F.smooth_l1_loss(values, targets)  # Huber
    weights.grad.zero_()  # and with it the layers' gradients: 9% faster than optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss, values


def learn(
    args: Args, network: QNetwork, device: torch.device, writer: SummaryWriter
) -> tuple[int | None, int, int]:
    """Trains the network in place, until it is solved or the episodes are used up.

    In the end (not after Ctrl-C) the network has the averaged weights. Returns the episode (from 0)
    of the 10th success in a row or None, and the numbers of episodes and steps played.
    """
    rng = np.random.default_rng(args.seed)
    target_network = QNetwork(args.hidden_size, args.zero_init).to(device)
    if args.weights is not None:
        target_network.load_state_dict(network.state_dict())
    weights = join_weights(network)
    optimizer = torch.optim.Adam([weights], lr=args.learning_rate, fused=True)
    memory = ReplayMemory(args.memory_size, rng)
    average = weights.detach().clone()
    env = make_env()
    env.reset(seed=args.seed)  # seeds the environment's generator, once and for all
    last_steps: deque[int] = deque(maxlen=SUCCESSES_TO_SOLVE)
    solved_episode, total_steps = None, 0
    started = time.perf_counter()

    for episode in tqdm(range(args.num_episodes), unit="episode"):
        epsilon = args.epsilon / (episode + 1)
        state, _ = env.reset()
        steps, done = 0, False
        while not done:
            # 1. act
            if rng.random() < epsilon:
                action = int(rng.integers(2))
            else:
                action = greedy_action(network, state, device)

            # 2. step
            next_state, _, terminated, truncated, _ = env.step(action)
            done = terminated or truncated
            steps += 1

            # 3. remember
            memory.push(state, action, book_reward(steps, done), next_state, done)
            state = next_state

            # 4. update
            if memory.size >= args.batch_size:
                batch = memory.sample(args.batch_size, device)
                loss, values = update(
                    network, target_network, weights, optimizer, batch, args.gamma
                )
                average.lerp_(weights.detach(), 1 - args.average_decay)

        # 5. copy the network to the target network
        if episode % args.target_interval == 0:
            target_network.load_state_dict(network.state_dict())

        # log
        last_steps.append(steps)
        total_steps += steps
        tqdm.write(f"episode {episode}: {steps} steps, mean of 10 {np.mean(last_steps):.1f}")
        writer.add_scalar("charts/episodic_length", steps, episode)
        writer.add_scalar("charts/epsilon", epsilon, episode)
        writer.add_scalar("charts/SPS", total_steps / (time.perf_counter() - started), episode)
        if memory.size >= args.batch_size:  # those of the episode's last update
            if not loss.isfinite():
                raise UserError(f"episode {episode}: the loss is not finite, lower --learning-rate")
            writer.add_scalar("losses/td_loss", loss.item(), episode)
            writer.add_scalar("losses/q_values", values.mean().item(), episode)
        if len(last_steps) == SUCCESSES_TO_SOLVE and min(last_steps) >= SUCCESS_STEPS:
            solved_episode = episode
            break

    weights.data.copy_(average)
    return solved_episode, episode + 1, total_steps


# ---- evaluation ---------------------------------------------------------------


def greedy_episode(
    network: QNetwork, env: gym.Env, seed: int, device: torch.device
) -> Iterator[int]:
    """Plays one episode without exploration; yields the number of steps so far after each step."""
    state, _ = env.reset(seed=seed)
    for step in range(1, MAX_STEPS + 1):
        state, _, terminated, truncated, _ = env.step(greedy_action(network, state, device))
        yield step
        if terminated or truncated:
            return


def evaluate(network: QNetwork, args: Args, device: torch.device) -> list[int]:
    """The steps (1 to 200) of each of args.eval_episodes greedy episodes in a fresh environment."""
    env = make_env()
    seeds = range(args.seed + 1, args.seed + 1 + args.eval_episodes)
    # The last number that an episode yields is the largest: its length.
    return [max(greedy_episode(network, env, seed, device)) for seed in seeds]


def film(network: QNetwork, path: Path, args: Args, device: torch.device) -> None:
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


def load_weights(network: QNetwork, path: Path, device: torch.device) -> None:
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
    network = QNetwork(args.hidden_size, args.zero_init).to(device)
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
        tqdm.write(f"Solved: {SUCCESSES_TO_SOLVE} successes in a row by episode {solved_episode}.")
    elif not args.eval_only:
        tqdm.write(f"Not solved in {episodes} episodes.")
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
