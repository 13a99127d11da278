# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "gymnasium[classic-control]==1.4.0", "imageio[ffmpeg]==2.38.1", "numpy==2.4.6",
#     "tensorboard==2.21.0", "torch==2.13.0", "tqdm==4.70.1", "tyro==1.0.17",
# ]
# ///
"""Dueling network on CartPole: how good is this state, and how much better is each action?

In most states of CartPole either action will do, and what matters is the state. The network
therefore splits after the shared layers into two streams, one number V(s) for the state and one
advantage A(s, a) for each action, and adds them up again:

    Q(s, a) = V(s) + A(s, a) - mean_a' A(s, a')

Every transition now teaches V, whichever action was taken. Without the mean, V and A could drift:
V + c and A - c give the same Q for any c. With it, V(s) is the mean of Q(s, .), not the value of
the best action. The target is that of Double DQN. The rest is ddqn_cartpole.py; to see what is new:
diff ddqn_cartpole.py dueling_cartpole.py

Wang et al., "Dueling Network Architectures for Deep Reinforcement Learning", ICML 2016, equation 9.
There each stream has two layers, not one, and the gradient is scaled and clipped.

    python dueling_cartpole.py                                      # train, evaluate, film
    python dueling_cartpole.py --seed 7 --hidden-size 64
    python dueling_cartpole.py --weights runs/.../weight_end.pth    # evaluate and film only

The task is the book's (Yutaro Ogawa, つくりながら学ぶ！深層強化学習, 2018): an episode ends when
the pole leans too far, the cart leaves the track or 200 steps are over. The reward is 0 on the way,
and at the end +1 for 196 steps or more (a success), -1 for fewer; through gamma, a later fall costs
less. Training ends after 10 successes in a row, or 500 episodes.

Differs from the book (a flag, where given, brings the book's way back):
- Both streams start at zero; from a random start it takes longer: --no-zero-init
- A moving average of the weights is kept, as the last update can be bad: --average-decay 0
- The target network starts as a copy of the network, in the book as another random one.
- The memory is one table, not a list of named tuples; a uniform batch is drawn with replacement.
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
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass  # tyro makes flags of the fields, and help of their comments
class Args:
    """Train a Dueling Double Deep Q-Network on CartPole."""

    seed: int = 0  # seed of every random generator, from 0 to 2**32 - 1
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes CUDA where there is one
    runs_dir: Path = Path("runs")  # folder in which the run makes its own folder
    weights: Path | None = None  # file of an earlier run to evaluate and film, without training
    num_episodes: int = 500  # episodes of training at most, 1 or more
    eval_episodes: int = 100  # greedy episodes in the evaluation, 1 or more
    memory_size: int = 10_000  # transitions in the replay memory, from 1 to 10 million
    batch_size: int = 32  # transitions in an update, from 1 to the memory size
    hidden_size: int = 32  # units in each of the two hidden layers, from 1 to 4096
    target_interval: int = 2  # episodes between copies to the target network, 1 or more
    learning_rate: float = 1e-4  # step size of Adam, above 0
    gamma: float = 0.99  # discount of a reward one step later, from 0 to 1
    epsilon: float = 0.5  # chance of a random action, divided by n + 1 in episode n, from 0 to 1
    zero_init: bool = True  # all values start at 0; --no-zero-init is the book's way
    average_decay: float = 0.998  # share the mean weights keep per update, below 1; 0 is the book's

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
        for good, rule in [
            (0 <= self.seed < 2**32, "--seed must be from 0 to 2**32 - 1"),
            (1 <= self.num_episodes <= 10**9, "--num-episodes must be from 1 to 10**9"),
            (self.eval_episodes >= 1, "--eval-episodes must be 1 or more"),
            (1 <= self.memory_size <= 10**7, "--memory-size must be from 1 to 10 million"),
            (1 <= self.batch_size <= self.memory_size, "--batch-size must be 1 to --memory-size"),
            (1 <= self.hidden_size <= 4096, "--hidden-size must be from 1 to 4096"),
            (self.target_interval >= 1, "--target-interval must be 1 or more"),
            (0 < self.learning_rate < np.inf, "--learning-rate must be above 0 and finite"),
            (0 <= self.gamma <= 1, "--gamma must be from 0 to 1"),
            (0 <= self.epsilon <= 1, "--epsilon must be from 0 to 1"),
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
SUCCESSES_TO_SOLVE = 10  # in a row


def make_env(render_mode: str | None = None) -> gym.Env:
    """CartPole-v1 with the book's 200 steps: states (4,) float32, actions 0 and 1."""
    return gym.make("CartPole-v1", max_episode_steps=MAX_STEPS, render_mode=render_mode)


def book_reward(steps: int, done: bool) -> float:
    """0 on the way; at the end +1 for a success, -1 for a shorter episode.

    The same fall brings -1 in step 195 and +1 in step 196, and the state does not hold the step: Q
    can only learn the mean. (Theory asks that a state hold all that matters: the Markov property.)
    """
    if not done:
        return 0.0
    return 1.0 if steps >= SUCCESS_STEPS else -1.0


# ---- network -----------------------------------------------------------------------------------


class QNetwork(nn.Module):
    """The value of both actions in each state: (batch, 4) -> (batch, 2)."""

    def __init__(self, hidden_size: int, zero_init: bool):
        super().__init__()
        self.fc1 = nn.Linear(4, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)
        self.fc3_advantage = nn.Linear(hidden_size, 2)
        self.fc3_value = nn.Linear(hidden_size, 1)
        if zero_init:  # all values begin at 0, but still learn: fc1 and fc2 are random
            for layer in (self.fc3_advantage, self.fc3_value):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, states: Tensor) -> Tensor:
        hidden = torch.relu(self.fc1(states))  # (batch, hidden_size)
        hidden = torch.relu(self.fc2(hidden))  # (batch, hidden_size)
        advantages = self.fc3_advantage(hidden)  # (batch, 2)
        value = self.fc3_value(hidden)  # (batch, 1)
        return value + advantages - advantages.mean(dim=-1, keepdim=True)  # (batch, 2)

    @torch.no_grad()
    def greedy_action(self, state: np.ndarray) -> int:
        """The action of higher value in one state (4,)."""
        return self(torch.from_numpy(state).to(self.fc1.weight.device)).argmax().item()


# ---- replay memory -----------------------------------------------------------------------------

Batch = dict[str, Tensor]  # the columns of some transitions, (batch, 4) or (batch, 1)


class ReplayMemory:
    """The last `capacity` transitions (s, a, r, s', not done), rows of a structured array."""

    def __init__(self, capacity: int, rng: np.random.Generator):
        columns = [  # name, type, shape
            ("states", np.float32, (4,)),
            ("actions", np.int64, (1,)),
            ("rewards", np.float32, (1,)),
            ("next_states", np.float32, (4,)),
            ("not_done", np.float32, (1,)),  # 0 where the episode ended, else 1
        ]
        self.table = np.zeros(capacity, columns)
        self.pushes, self.rng = 0, rng

    def __len__(self) -> int:
        return min(self.pushes, len(self.table))

    def push(self, state, action: int, reward: float, next_state, done: bool) -> None:
        """Stores one transition, with states (4,), in place of the oldest if the memory is full."""
        row = self.pushes % len(self.table)
        self.table[row] = state, action, reward, next_state, not done
        self.pushes += 1

    def sample(self, batch_size: int, device: torch.device) -> Batch:
        """Draws transitions uniformly, with replacement."""
        batch = self.table.take(self.rng.integers(len(self), size=batch_size))
        return {name: torch.from_numpy(batch[name]).to(device) for name in batch.dtype.names}


# ---- learning ----------------------------------------------------------------------------------


@torch.no_grad()  # y is a constant: no gradient goes through it
def td_targets(network: QNetwork, target_network: QNetwork, batch: Batch, gamma: float) -> Tensor:
    """r + gamma * Q_target(s', argmax_a' Q(s', a')), and r alone at an end: (batch, 1)."""
    next_actions = network(batch["next_states"]).argmax(dim=1, keepdim=True)  # (batch, 1)
    next_values = target_network(batch["next_states"]).gather(1, next_actions)  # (batch, 1)
    return batch["rewards"] + gamma * batch["not_done"] * next_values


def learn(args: Args, network: QNetwork, averaged: QNetwork, writer: SummaryWriter) -> dict:
    """Trains until the network's episodes, random actions included, solve the task, if ever.

    `averaged`, the moving average of its weights, is what is saved, evaluated and filmed. Returns
    the episode that solved the task (from 0, or None), and how many episodes and steps were played,
    for result.json. Raises ValueError if the loss is not finite.
    """
    device = network.fc1.weight.device
    target_network = copy.deepcopy(network)
    rng = np.random.default_rng(2**32 + args.seed)  # other numbers than the environment's
    memory = ReplayMemory(args.memory_size, rng)
    optimizer = torch.optim.Adam(network.parameters(), args.learning_rate, fused=True)
    env = make_env()
    env.reset(seed=args.seed)  # seeds the environment's generator, once and for all
    lengths: deque[int] = deque(maxlen=SUCCESSES_TO_SOLVE)  # of the last episodes, in steps
    total_steps, start = 0, time.perf_counter()

    for episode in tqdm(range(args.num_episodes), unit="episode", disable=not sys.stderr):
        epsilon = args.epsilon / (episode + 1)
        state, _ = env.reset()
        steps, done = 0, False
        while not done:
            # 1. act: epsilon-greedy
            explore = rng.random() < epsilon
            action = int(rng.integers(2)) if explore else network.greedy_action(state)

            # 2. step: CartPole's own reward, 1 in every step, is not used
            next_state, _, terminated, truncated, _ = env.step(action)
            # The time limit (truncated) is an end too, as to reach it is the goal here. In most
            # other tasks the rewards to come still count then, and only `terminated` ends them.
            done = terminated or truncated
            steps += 1

            # 3. remember the transition
            memory.push(state, action, book_reward(steps, done), next_state, done)
            state = next_state

            # 4. learn: one update, from a random batch
            if len(memory) >= args.batch_size:
                batch = memory.sample(args.batch_size, device)
                targets = td_targets(network, target_network, batch, args.gamma)  # (batch, 1)
                # gather picks, of both values, that of the action taken.
                values = network(batch["states"]).gather(1, batch["actions"])  # (batch, 1): Q(s, a)
                loss = F.smooth_l1_loss(values, targets)  # Huber
                optimizer.zero_grad()
                loss.backward()  # the gradient of the loss with respect to each weight
                optimizer.step()  # a small step against it
                # One update can spoil the policy, but hardly the moving average of the weights
                # (Polyak averaging). It is not a target network: no target uses it.
                with torch.no_grad():
                    for mean, weight in zip(averaged.parameters(), network.parameters()):
                        mean.lerp_(weight, 1 - args.average_decay)  # a small step towards it

        # 5. copy the network to the target network
        if episode % args.target_interval == 0:
            target_network.load_state_dict(network.state_dict())

        # 6. log, and stop if solved
        lengths.append(steps)
        total_steps += steps
        tqdm.write(f"episode {episode}: {steps} steps, mean of 10 {np.mean(lengths):.1f}")
        writer.add_scalar("charts/episode", episode, total_steps)
        writer.add_scalar("charts/episodic_length", steps, total_steps)
        writer.add_scalar("charts/epsilon", epsilon, total_steps)
        writer.add_scalar("charts/SPS", total_steps / (time.perf_counter() - start), total_steps)
        if len(memory) >= args.batch_size:  # loss and values of the last update
            if not loss.isfinite():
                raise ValueError(f"loss not finite in episode {episode}: lower --learning-rate")
            writer.add_scalar("losses/td_loss", loss.item(), total_steps)
            writer.add_scalar("losses/q_values", values.mean().item(), total_steps)
        solved = len(lengths) == SUCCESSES_TO_SOLVE and min(lengths) >= SUCCESS_STEPS
        if solved:
            break

    tqdm.write(f"Solved in episode {episode}." if solved else "Not solved.")
    return dict(solved_episode=episode if solved else None, episodes=episode + 1, steps=total_steps)


# ---- evaluation and the run --------------------------------------------------------------------


def evaluate(network: QNetwork, env: gym.Env, seed: int, num_episodes: int) -> list[int]:
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


def film(network: QNetwork, seed: int) -> bytes:
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
    network = QNetwork(args.hidden_size, args.zero_init).to("cuda" if cuda else "cpu")
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
    run_dir = args.runs_dir / f"dueling_cartpole__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
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
