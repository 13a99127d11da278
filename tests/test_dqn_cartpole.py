"""Tests of dqn_cartpole.py: memory, targets, exploration, and when the task counts as solved."""

import copy
import math
from collections import defaultdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dqn_cartpole
from dqn_cartpole import Args, QNetwork, ReplayMemory, book_reward, learn

CPU = torch.device("cpu")


class Writer(defaultdict):
    """Keeps the values of each curve."""

    def __init__(self):
        super().__init__(list)

    def add_scalar(self, tag, value, step):
        self[tag].append(value)


class ScriptedEnv:
    """Episodes of given lengths, whatever the actions are."""

    def __init__(self, lengths: list[int]):
        self.lengths = lengths
        self.episode = -1
        self.actions = [[] for _ in lengths]

    def reset(self, seed=None):
        if seed is None:  # the reset with a seed comes before the first episode
            self.episode += 1
            self.left = self.lengths[self.episode]
        return np.zeros(4, np.float32), {}

    def step(self, action):
        self.actions[self.episode].append(action)
        self.left -= 1
        return np.zeros(4, np.float32), 1.0, self.left == 0, False, {}


def learn_with_lengths(monkeypatch, lengths, **values) -> dict:
    monkeypatch.setattr(dqn_cartpole, "make_env", lambda: ScriptedEnv(lengths))
    network = QNetwork(32, True)
    return learn(Args(**values), network, copy.deepcopy(network), Writer())


# ---- memory ------------------------------------------------------------------------------------


def memory_of(count: int, capacity: int) -> ReplayMemory:
    """Transition i goes from state i to state i + 0.5 with action i % 2 and reward i."""
    memory = ReplayMemory(capacity, np.random.default_rng(0))
    for i in range(count):
        memory.push(np.full(4, i, np.float32), i % 2, float(i), np.full(4, i + 0.5), i % 3 == 0)
    return memory


def test_memory_keeps_the_newest_and_their_parts_together():
    batch = memory_of(13, capacity=10).sample(200, CPU)
    i = batch["rewards"]  # (200, 1)
    assert sorted(set(i[:, 0].tolist())) == list(range(3, 13))
    assert torch.equal(batch["states"], i.expand(-1, 4))
    assert torch.equal(batch["next_states"], batch["states"] + 0.5)
    assert torch.equal(batch["actions"], (i % 2).long())
    assert torch.equal(batch["not_done"], (i % 3 != 0).float())
    assert batch["states"].dtype == batch["next_states"].dtype == torch.float32


def assert_frequencies(batch: dict, probabilities: np.ndarray) -> None:
    """Chi-square of the rewards drawn, 0, 1, 2 ..., up to its mean and 4 standard deviations."""
    counts = np.bincount(batch["rewards"][:, 0].long().numpy(), minlength=len(probabilities))
    expected = len(batch["rewards"]) * np.asarray(probabilities)
    assert not counts[expected == 0].any()
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(counts) - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(("count", "capacity"), [(25, 40), (47, 40)])  # partly filled; overwritten
def test_memory_samples_uniformly(count, capacity):
    stored = np.arange(count) >= count - capacity
    assert_frequencies(memory_of(count, capacity).sample(40_000, CPU), stored / stored.sum())


# ---- targets and updates -----------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_every_step_is_adam_on_the_huber_loss_and_the_average_follows(monkeypatch, decay):
    """Replays each update with its batch on a copy of the network, and compares the curves."""
    torch.manual_seed(0)
    network, batches, writer = QNetwork(32, zero_init=False), [], Writer()
    sample = ReplayMemory.sample

    def spied(memory, batch_size, device):
        assert (len(memory.table), batch_size) == (5000, 16)
        batches.append((len(writer["charts/episode"]), sample(memory, batch_size, device)))
        return batches[-1][1]

    monkeypatch.setattr(ReplayMemory, "sample", spied)
    args = Args(num_episodes=5, average_decay=decay, learning_rate=0.01, gamma=0.9,
                memory_size=5000, batch_size=16)  # fmt: skip
    expected, averaged = copy.deepcopy(network), copy.deepcopy(network)
    average = nn.utils.parameters_to_vector(network.parameters()).detach()
    steps = learn(args, network, averaged, writer)["steps"]

    optimizer = torch.optim.Adam(expected.parameters(), 0.01, fused=True)
    last = {}  # loss and mean value of each episode's last update
    for episode, batch in batches:
        with torch.no_grad():
            best = expected(batch["next_states"]).max(dim=1).values
        targets = batch["rewards"][:, 0] + 0.9 * batch["not_done"][:, 0] * best
        values = expected(batch["states"])[torch.arange(16), batch["actions"][:, 0]]
        loss = F.huber_loss(values, targets)
        last[episode] = loss.item(), values.mean().item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        weights = nn.utils.parameters_to_vector(expected.parameters()).detach()
        average = decay * average + (1 - decay) * weights
    assert len(batches) == steps - 15 > 10  # one a step, once a batch is stored
    for ours, theirs in [(network, weights), (averaged, average)]:
        vector = nn.utils.parameters_to_vector(ours.parameters())
        torch.testing.assert_close(vector, theirs, rtol=1e-4, atol=1e-5)
    curves = zip(writer["losses/td_loss"], writer["losses/q_values"], strict=True)
    np.testing.assert_allclose([*curves], [*last.values()], rtol=1e-3, atol=1e-5)


def test_greedy_action_has_the_higher_value():
    torch.manual_seed(0)
    network = QNetwork(32, zero_init=False)
    states = torch.randn(50, 4)
    actions = [network.greedy_action(state.numpy()) for state in states]
    assert actions == network(states).argmax(dim=1).tolist() and len(set(actions)) == 2


# ---- environment and exploration ---------------------------------------------------------------


def test_book_reward():
    assert book_reward(195, done=True) == -1.0
    assert book_reward(196, done=True) == book_reward(200, done=True) == 1.0
    assert book_reward(1, done=False) == book_reward(199, done=False) == 0.0


def test_epsilon_is_half_divided_by_the_episode(monkeypatch):
    """Counts the steps in which the network is asked; in the others the action is random."""
    env = ScriptedEnv([4000, 4000, 4000, 4000])
    asked = np.zeros(4)

    class Asked(QNetwork):
        def greedy_action(self, state):
            asked[env.episode] += 1
            return 0

    monkeypatch.setattr(dqn_cartpole, "make_env", lambda: env)
    args = Args(num_episodes=4, batch_size=20_000, memory_size=20_000)  # too large for any update
    learn(args, Asked(32, True), Asked(32, True), Writer())
    assert 1 - asked / 4000 == pytest.approx([1 / 2, 1 / 4, 1 / 6, 1 / 8], abs=0.03)
    # The network always says 0: half of the random actions are 1.
    assert np.mean(env.actions, axis=1) == pytest.approx([1 / 4, 1 / 8, 1 / 12, 1 / 16], abs=0.03)


# ---- when it is solved -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "solved"),
    [([200, 200, 195] + [196] * 9 + [10] + [196, 200] * 5, 22), ([50] + [200] * 9, None)],
)
def test_solved_at_the_tenth_success_in_a_row(monkeypatch, lengths, solved):
    count = len(lengths)
    result = learn_with_lengths(monkeypatch, lengths, num_episodes=count, batch_size=10_000)
    assert result == {"solved_episode": solved, "episodes": count, "steps": sum(lengths)}


def test_the_time_limit_is_an_end_like_any_other(monkeypatch):
    """A truncated episode is stored with not_done 0, and counts as a success."""
    pushed = []
    monkeypatch.setattr(ReplayMemory, "push", lambda memory, *transition: pushed.append(transition))
    monkeypatch.setattr(QNetwork, "greedy_action", lambda _, state: int(state[2] + state[3] > 0))
    network = QNetwork(32, True)
    learn(Args(num_episodes=1, epsilon=0), network, network, Writer())
    assert len(pushed) == 200
    assert [(reward, done) for _, _, reward, _, done in pushed[-2:]] == [(0.0, False), (1.0, True)]
