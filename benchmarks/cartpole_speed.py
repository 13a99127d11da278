"""Compares the CartPole scripts' speed with the same recipes written the book's way.

    python benchmarks/cartpole_speed.py

The book's way is written afresh below: a list of named tuples, torch.cat for each batch, an Adam
without fused=True, a Python loop over the priorities, a Python loop over the 32 environments. Both
sides run in one process on one thread, in turn; what counts is the median of the ratios of the
pairs. Prioritized replay is measured with a full memory and a trained policy, since it is then that
the loop over the priorities is long. Rows go to benchmarks/results/cartpole_speed.csv.

The script then times the parts of each loop (environment, acting, memory, update); shares of the
whole go to benchmarks/results/cartpole_profile.csv.
"""

import argparse
import contextlib
import csv
import os
import random
import sys
import tempfile
import time
from collections import namedtuple
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.tensorboard import SummaryWriter

import a2c_cartpole
import ddqn_cartpole
import dqn_cartpole
import per_cartpole

CPU = torch.device("cpu")
Transition = namedtuple("Transition", ("state", "action", "next_state", "reward"))


def make_env() -> gym.Env:
    return gym.make("CartPole-v1", max_episode_steps=200)


# ---- the book's way: Q-learning -----------------------------------------------


class BookMemory:
    """A list of named tuples."""

    def __init__(self):
        self.capacity, self.memory, self.index = 10_000, [], 0

    def push(self, *transition):
        if len(self.memory) < self.capacity:
            self.memory.append(None)
        self.memory[self.index] = Transition(*transition)
        self.index = (self.index + 1) % self.capacity

    def sample(self, batch_size):
        return random.sample(self.memory, batch_size)


class BookPriorities:
    """A list of TD errors, searched with a loop."""

    def __init__(self):
        self.capacity, self.memory, self.index = 10_000, [], 0

    def push(self, td_error):
        if len(self.memory) < self.capacity:
            self.memory.append(None)
        self.memory[self.index] = td_error
        self.index = (self.index + 1) % self.capacity

    def draw(self, batch_size):
        total = np.sum(np.absolute(self.memory)) + 0.0001 * len(self.memory)
        indices, index, reached = [], 0, 0.0
        for point in np.sort(np.random.uniform(0, total, batch_size)):
            while reached < point:
                reached += abs(self.memory[index]) + 0.0001
                index += 1
            indices.append(min(index, len(self.memory) - 1))
        return indices


def book_network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2)
    )


class BookAgent:
    """DQN, or with target=True Double DQN, or with prioritized=True that with priorities."""

    def __init__(self, target=False, prioritized=False):
        self.network = book_network()
        self.target_network = book_network() if target else None
        self.memory = BookMemory()
        self.priorities = BookPriorities() if prioritized else None
        self.optimizer = optim.Adam(self.network.parameters(), lr=0.0001)

    def act(self, state, episode):
        if 0.5 / (episode + 1) <= np.random.uniform(0, 1):
            self.network.eval()
            with torch.no_grad():
                return self.network(state).max(1)[1].view(1, 1)
        return torch.LongTensor([[random.randrange(2)]])

    def targets(self, transitions):
        batch = Transition(*zip(*transitions))
        states, actions = torch.cat(batch.state), torch.cat(batch.action)
        rewards = torch.cat(batch.reward)
        going_on = torch.tensor([state is not None for state in batch.next_state])
        next_states = torch.cat([state for state in batch.next_state if state is not None])
        self.network.eval()
        values = self.network(states).gather(1, actions)
        next_values = torch.zeros(len(transitions))
        if self.target_network is None:
            next_values[going_on] = self.network(next_states).max(1)[0].detach()
        else:
            self.target_network.eval()
            best = self.network(next_states).max(1)[1].view(-1, 1)
            best_values = self.target_network(next_states).gather(1, best)
            next_values[going_on] = best_values.detach().squeeze()
        return values, rewards + 0.99 * next_values

    def update(self):
        if len(self.memory.memory) < 32:
            return
        if self.priorities is None:
            transitions = self.memory.sample(32)
        else:
            transitions = [self.memory.memory[index] for index in self.priorities.draw(32)]
        values, targets = self.targets(transitions)
        self.network.train()
        loss = F.smooth_l1_loss(values, targets.unsqueeze(1))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def end_episode(self, episode):
        if self.priorities is not None:
            values, targets = self.targets(self.memory.memory)
            self.priorities.memory = (targets - values.squeeze()).detach().numpy().tolist()
        if self.target_network is not None and episode % 2 == 0:
            self.target_network.load_state_dict(self.network.state_dict())


def as_state(observation) -> torch.Tensor:
    return torch.from_numpy(observation).type(torch.FloatTensor).unsqueeze(0)


def book_q_learning(agent: BookAgent, seed: int, num_episodes: int) -> int:
    """Runs the episodes and returns the steps."""
    env, total_steps, last_ten = make_env(), 0, np.zeros(10)
    env.reset(seed=seed)
    for episode in range(num_episodes):
        state = as_state(env.reset()[0])
        for step in range(200):
            action = agent.act(state, episode)
            observation, _, terminated, truncated, _ = env.step(action.item())
            done = terminated or truncated
            if done:
                next_state = None
                last_ten = np.hstack((last_ten[1:], step + 1))
                reward = torch.FloatTensor([1.0 if step >= 195 else -1.0])
            else:
                next_state = as_state(observation)
                reward = torch.FloatTensor([0.0])
            agent.memory.push(state, action, next_state, reward)
            if agent.priorities is not None:
                agent.priorities.push(0)
            agent.update()
            state = next_state
            if done:
                print(f"{episode}: {step + 1} steps, mean of 10 {last_ten.mean():.1f}")
                agent.end_episode(episode)
                break
        total_steps += step + 1
    return total_steps


# ---- the book's way: A2C ------------------------------------------------------


class BookActorCritic(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 32), nn.Linear(32, 32)
        self.actor, self.critic = nn.Linear(32, 2), nn.Linear(32, 1)

    def forward(self, x):
        x = F.relu(self.fc2(F.relu(self.fc1(x))))
        return self.critic(x), self.actor(x)


class BookStorage:
    def __init__(self, num_steps, num_envs):
        self.observations = torch.zeros(num_steps + 1, num_envs, 4)
        self.masks = torch.ones(num_steps + 1, num_envs, 1)
        self.rewards = torch.zeros(num_steps, num_envs, 1)
        self.actions = torch.zeros(num_steps, num_envs, 1).long()
        self.returns = torch.zeros(num_steps + 1, num_envs, 1)

    def compute_returns(self, next_value):
        self.returns[-1] = next_value
        for step in reversed(range(len(self.rewards))):
            after = self.returns[step + 1] * 0.99 * self.masks[step + 1]
            self.returns[step] = after + self.rewards[step]


def book_a2c(seed: int, timesteps: int, num_envs: int = 32, num_steps: int = 5) -> int:
    """Runs that many timesteps, in whole updates, and returns the timesteps."""
    network = BookActorCritic()
    optimizer = optim.Adam(network.parameters(), lr=0.01)
    storage = BookStorage(num_steps, num_envs)
    envs = [make_env() for _ in range(num_envs)]
    observations = np.array([env.reset(seed=seed + i)[0] for i, env in enumerate(envs)])
    storage.observations[0] = torch.from_numpy(observations).float()
    episode_rewards, final_rewards = torch.zeros(num_envs, 1), torch.zeros(num_envs, 1)
    rewards, dones = np.zeros((num_envs, 1)), np.zeros(num_envs, bool)
    each_step, episode = np.zeros(num_envs, int), 0
    num_updates = timesteps // (num_envs * num_steps)
    for _ in range(num_updates):
        for step in range(num_steps):
            with torch.no_grad():
                _, logits = network(storage.observations[step])
                actions = F.softmax(logits, dim=1).multinomial(num_samples=1)
            choices = actions.squeeze(1).numpy()
            for i in range(num_envs):
                observations[i], _, terminated, truncated, _ = envs[i].step(choices[i])
                dones[i] = terminated or truncated
                if dones[i]:
                    if i == 0:
                        print(f"{episode}: {each_step[i] + 1} steps")
                        episode += 1
                    rewards[i] = 1.0 if each_step[i] >= 195 else -1.0
                    each_step[i] = 0
                    observations[i] = envs[i].reset()[0]
                else:
                    rewards[i] = 0.0
                    each_step[i] += 1
            reward = torch.from_numpy(rewards).float()
            masks = torch.FloatTensor([[0.0] if done else [1.0] for done in dones])
            episode_rewards += reward
            final_rewards = final_rewards * masks + (1 - masks) * episode_rewards
            episode_rewards *= masks
            storage.observations[step + 1].copy_(torch.from_numpy(observations).float())
            storage.masks[step + 1].copy_(masks)
            storage.rewards[step].copy_(reward)
            storage.actions[step].copy_(actions)
        with torch.no_grad():
            next_value = network(storage.observations[-1])[0]
        storage.compute_returns(next_value)
        values, logits = network(storage.observations[:-1].view(-1, 4))
        log_probs, probs = F.log_softmax(logits, dim=1), F.softmax(logits, dim=1)
        action_log_probs = log_probs.gather(1, storage.actions.view(-1, 1))
        entropy = -(log_probs * probs).sum(-1).mean()
        advantages = storage.returns[:-1].view(-1, 1) - values
        value_loss = advantages.pow(2).mean()
        gain = (action_log_probs * advantages.detach()).mean()
        loss = value_loss * 0.5 - gain - entropy * 0.01
        network.train()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        optimizer.step()
        storage.observations[0].copy_(storage.observations[-1])
        storage.masks[0].copy_(storage.masks[-1])
        if final_rewards.sum() >= num_envs:
            break
    return num_updates * num_envs * num_steps


# ---- this collection ----------------------------------------------------------


def ours(script, network: nn.Module, **flags) -> int:
    """Runs a script's learning loop and returns the steps."""
    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        return script.learn(script.Args(**flags), network, CPU, writer)[-1]


def ours_q_learning(script, seed: int, num_episodes: int) -> int:
    return ours(script, script.QNetwork(32, False), seed=seed, num_episodes=num_episodes)


def ours_a2c(seed: int, timesteps: int) -> int:
    return ours(a2c_cartpole, a2c_cartpole.ActorCritic(32), seed=seed, total_timesteps=timesteps)


def full_memory(policy: nn.Module) -> list[tuple]:
    """10,000 transitions of a policy that takes one action in ten at random."""
    rng, env, transitions = np.random.default_rng(0), make_env(), []
    while len(transitions) < 10_000:
        state, steps, done = env.reset(seed=len(transitions))[0], 0, False
        while not done:
            greedy = per_cartpole.greedy_action(policy, state, CPU)
            action = int(rng.integers(2)) if rng.random() < 0.1 else greedy
            next_state, _, terminated, truncated, _ = env.step(action)
            done, steps = terminated or truncated, steps + 1
            reward = per_cartpole.book_reward(steps, done)
            transitions.append((state, action, reward, next_state, done))
            state = next_state
    return transitions[-10_000:]


def ours_per(policy: nn.Module, transitions: list[tuple], num_episodes: int) -> int:
    """The prioritized script with a memory that is full from the start."""

    class FullMemory(per_cartpole.ReplayMemory):
        def __init__(self, *args):
            super().__init__(*args)
            for transition in transitions:
                self.push(*transition)

    network = per_cartpole.QNetwork(32, False)
    network.load_state_dict(policy.state_dict())
    flags = {"uniform_episodes": 0, "alpha": 1.0, "beta": 0.0}  # the book's
    per_cartpole.ReplayMemory, plain = FullMemory, per_cartpole.ReplayMemory
    try:
        return ours(per_cartpole, network, num_episodes=num_episodes, **flags)
    finally:
        per_cartpole.ReplayMemory = plain


def book_per(policy: nn.Module, transitions: list[tuple], num_episodes: int) -> int:
    """The book's way, likewise."""
    agent = BookAgent(target=True, prioritized=True)
    weights = dict(zip(agent.network.state_dict(), policy.state_dict().values()))
    agent.network.load_state_dict(weights)
    for state, action, reward, next_state, done in transitions:
        next_state = None if done else as_state(next_state)
        action, reward = torch.LongTensor([[action]]), torch.FloatTensor([reward])
        agent.memory.push(as_state(state), action, next_state, reward)
        agent.priorities.push(0)
    return book_q_learning(agent, 0, num_episodes)


# ---- measurement --------------------------------------------------------------


def rate(loop, *args, **flags) -> float:
    """Steps per second of a loop that returns its number of steps; what it prints is dropped.

    The seconds are the processor's, on one thread: other programs disturb them less than the clock.
    """
    with open(os.devnull, "w") as null:
        with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            start = time.process_time()
            return loop(*args, **flags) / (time.process_time() - start)


def write_rows(path: Path, rows: list[list]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def trained_policy() -> nn.Module:
    """A policy that holds the pole up, so that the measured episodes have their usual length."""
    torch.manual_seed(0)
    policy = per_cartpole.QNetwork(32, False)
    rate(ours, per_cartpole, policy)
    return policy


def compare(
    policy: nn.Module, transitions: list[tuple], pairs: int, size: float, path: Path
) -> None:
    """Runs both ways in turn; size scales the lengths of the runs."""
    episodes, timesteps = max(1, round(125 * size)), max(160, round(20_000 * size))
    contests = {
        "dqn": (
            lambda seed: ours_q_learning(dqn_cartpole, seed, episodes),
            lambda seed: book_q_learning(BookAgent(), seed, episodes),
        ),
        "ddqn": (
            lambda seed: ours_q_learning(ddqn_cartpole, seed, episodes),
            lambda seed: book_q_learning(BookAgent(target=True), seed, episodes),
        ),
        "per_full_memory": (
            lambda seed: ours_per(policy, transitions, max(1, round(10 * size))),
            lambda seed: book_per(policy, transitions, max(1, round(10 * size))),
        ),
        "a2c": (
            lambda seed: ours_a2c(seed, timesteps),
            lambda seed: book_a2c(seed, timesteps),
        ),
    }
    rows = [["script", "pair", "steps_per_second", "book_steps_per_second", "ratio"]]
    for name, (our_way, books_way) in contests.items():
        ratios = []
        rate(our_way, 0), rate(books_way, 0)  # the first run of a process is slower
        for pair in range(pairs):
            torch.manual_seed(pair)
            fast, slow = rate(our_way, pair), rate(books_way, pair)
            ratios.append(fast / slow)
            rows.append([name, pair, round(fast, 1), round(slow, 1), round(fast / slow, 3)])
        print(f"{name}: {np.median(ratios):.2f} times the book's way", [f"{r:.2f}" for r in ratios])
    write_rows(path, rows)


class Stopwatch:
    """Adds up the time spent in functions, which are replaced by timed ones until it is closed."""

    def __init__(self):
        self.seconds, self.replaced = {}, []

    def time(self, part: str, owner, name: str) -> None:
        function = getattr(owner, name)
        self.replaced.append((owner, name, function))

        def timed(*args, **kwargs):
            start = time.process_time()
            result = function(*args, **kwargs)
            self.seconds[part] = self.seconds.get(part, 0.0) + time.process_time() - start
            return result

        setattr(owner, name, timed)

    def close(self) -> None:
        for owner, name, function in self.replaced:
            setattr(owner, name, function)


def profile(policy: nn.Module, transitions: list[tuple], size: float, path: Path) -> None:
    """Writes how each loop's time is shared out among its parts."""
    rows = [["script", "part", "share"]]
    for script in (dqn_cartpole, ddqn_cartpole, per_cartpole, a2c_cartpole):
        watch = Stopwatch()
        if script is a2c_cartpole:
            watch.time("environments", script.CartPoles, "step")
            watch.time("acting", script, "act")
            loop, *settings = ours_a2c, 0, max(160, round(20_000 * size))
        else:
            watch.time("environment", gym.wrappers.TimeLimit, "step")
            watch.time("acting", script, "greedy_action")
            watch.time("memory", script.ReplayMemory, "push")
            watch.time("memory", script.ReplayMemory, "sample")
            watch.time("update", script, "update")
            loop, *settings = ours_q_learning, script, 0, max(40, round(125 * size))
        if script is per_cartpole:
            watch.time("memory", script.ReplayMemory, "sample_by_priority")
            watch.time("priorities", script, "td_errors")
            loop, *settings = ours_per, policy, transitions, max(1, round(10 * size))
        start = time.process_time()
        rate(loop, *settings)
        whole = time.process_time() - start
        watch.close()
        rest = "update and the rest" if script is a2c_cartpole else "the rest"
        watch.seconds[rest] = whole - sum(watch.seconds.values())
        for part, seconds in watch.seconds.items():
            rows.append([script.__name__, part, round(seconds / whole, 3)])
        print(script.__name__, {part: f"{s / whole:.0%}" for part, s in watch.seconds.items()})
    write_rows(path, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=9, help="how often each comparison is made")
    parser.add_argument("--size", type=float, default=1.0, help="scales the lengths of the runs")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    policy = trained_policy()
    transitions = full_memory(policy)
    compare(policy, transitions, args.pairs, args.size, args.results / "cartpole_speed.csv")
    profile(policy, transitions, args.size, args.results / "cartpole_profile.csv")


if __name__ == "__main__":
    main()
