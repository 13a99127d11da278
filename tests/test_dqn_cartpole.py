"""Tests of dqn_cartpole.py: memory, targets, exploration, and when the task counts as solved."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dqn_cartpole
from dqn_cartpole import (
    Args,
    Batch,
    QNetwork,
    ReplayMemory,
    book_reward,
    join_weights,
    learn,
    td_targets,
    update,
)

CPU = torch.device("cpu")


class Table(nn.Module):
    """Looks action values up: the first component of a state is its row."""

    def __init__(self, values: list[list[float]]):
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values))
        self.values.grad = torch.zeros_like(self.values)

    def forward(self, states):
        return self.values[states[..., 0].long()]


def states(*rows: int) -> torch.Tensor:
    return torch.tensor([[row, 0.0, 0.0, 0.0] for row in rows])


def three_transitions(rewards, masks) -> Batch:
    """From states 0, 0, 1 with actions 0, 1, 1 to states 1, 2, 2."""
    return Batch(
        states(0, 0, 1),
        torch.tensor([[0], [1], [1]]),
        torch.tensor(rewards)[:, None],
        states(1, 2, 2),
        torch.tensor(masks)[:, None],
    )


class NoWriter:
    def add_scalar(self, *args):
        pass


class ScriptedEnv:
    """Episodes of given lengths, whatever the actions are."""

    def __init__(self, lengths: list[int]):
        self.lengths = lengths
        self.episode = -1

    def reset(self, seed=None):
        if seed is None:  # the reset with a seed comes before the first episode
            self.episode += 1
            self.left = self.lengths[self.episode]
        return np.zeros(4, np.float32), {}

    def step(self, action):
        self.left -= 1
        return np.zeros(4, np.float32), 1.0, self.left == 0, False, {}


# ---- memory -------------------------------------------------------------------


def memory_of(count: int, capacity: int) -> ReplayMemory:
    """Transition i goes from state i to state i + 0.5 with action i % 2 and reward i."""
    memory = ReplayMemory(capacity, np.random.default_rng(0))
    for i in range(count):
        memory.push(np.full(4, i, np.float32), i % 2, float(i), np.full(4, i + 0.5), i % 3 == 0)
    return memory


def test_memory_overwrites_the_oldest():
    memory = memory_of(13, capacity=10)
    assert memory.size == 10
    assert sorted(memory.rewards[:, 0]) == list(range(3, 13))
    memory.push(np.zeros(4), 0, 99.0, np.zeros(4), False)
    assert sorted(memory.rewards[:, 0]) == [*range(4, 13), 99]


def test_memory_keeps_the_parts_of_a_transition_together():
    batch = memory_of(13, capacity=10).sample(64, CPU)
    i = batch.rewards  # (64, 1)
    assert torch.equal(batch.states, i.expand(-1, 4))
    assert torch.equal(batch.next_states, batch.states + 0.5)
    assert torch.equal(batch.actions, (i % 2).long())
    assert torch.equal(batch.masks, (i % 3 != 0).float())
    assert batch.states.dtype == batch.next_states.dtype == torch.float32


@pytest.mark.parametrize(("count", "capacity"), [(25, 40), (47, 40)])  # partly filled; overwritten
def test_memory_samples_uniformly(count, capacity):
    memory = memory_of(count, capacity)
    draws = memory.sample(40_000, CPU).rewards[:, 0].long().numpy()
    counts = np.bincount(draws, minlength=count)[max(0, count - capacity) :]
    expected = 40_000 / len(counts)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = len(counts) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)  # mean and 4 standard deviations
    assert counts.sum() == 40_000


# ---- targets and update -------------------------------------------------------


def test_targets_by_hand():
    network = Table([[0.0, 0.0], [1.0, 3.0], [5.0, 2.0]])
    targets = td_targets(network, three_transitions([0.5, 0.0, -1.0], [1.0, 1.0, 1.0]), 0.9)
    expected = torch.tensor([[0.5 + 0.9 * 3], [0.9 * 5], [-1 + 0.9 * 5]])
    torch.testing.assert_close(targets, expected)
    assert not targets.requires_grad


def test_an_end_bootstraps_nothing():
    network = Table([[0.0, 0.0], [1.0, 3.0], [5.0, 2.0]])
    targets = td_targets(network, three_transitions([1.0, -1.0, 0.0], [0.0, 0.0, 0.0]), 0.9)
    assert targets.tolist() == [[1.0], [-1.0], [0.0]]


def test_update_is_gradient_descent_on_the_huber_loss_of_the_taken_actions():
    network = Table([[0.0, 0.0], [1.0, 3.0], [5.0, 2.0]])
    batch = three_transitions([0.5, 0.0, -1.0], [1.0, 1.0, 0.0])
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    loss, values = update(network, network.values, optimizer, batch, 0.9)
    assert values.tolist() == [[0.0], [0.0], [3.0]]
    # Errors: 0 - 3.2, 0 - 4.5, 3 - -1. Beyond 1 the Huber loss is linear: |error| - 0.5.
    assert loss.item() == pytest.approx((2.7 + 4.0 + 3.5) / 3)
    expected = [[1 / 3, 1 / 3], [1.0, 3.0 - 1 / 3], [5.0, 2.0]]
    torch.testing.assert_close(network.values.data, torch.tensor(expected))


# ---- rewards and exploration --------------------------------------------------


def test_book_reward():
    assert book_reward(195, done=True) == -1.0
    assert book_reward(196, done=True) == book_reward(200, done=True) == 1.0
    assert book_reward(1, done=False) == book_reward(199, done=False) == 0.0


def test_the_environment_ends_an_episode_after_200_steps():
    env = dqn_cartpole.make_env()
    state, _ = env.reset(seed=0)
    for step in range(1, 201):
        state, _, terminated, truncated, _ = env.step(int(state[2] + state[3] > 0))
        assert not terminated and truncated == (step == 200)


def test_zero_init_starts_all_values_at_zero():
    inputs = torch.randn(5, 4)
    assert torch.equal(QNetwork(32, zero_init=True)(inputs), torch.zeros(5, 2))
    assert QNetwork(32, zero_init=False)(inputs).abs().min() > 0


def test_epsilon_is_half_divided_by_the_episode(monkeypatch):
    """Counts the steps in which the network is asked; in the others the action was random."""
    env = ScriptedEnv([4000, 4000, 4000, 4000])
    asked = np.zeros(4)

    def greedy_action(network, state, device):
        asked[env.episode] += 1
        return 0

    monkeypatch.setattr(dqn_cartpole, "greedy_action", greedy_action)
    monkeypatch.setattr(dqn_cartpole, "make_env", lambda: env)
    args = Args(num_episodes=4, batch_size=20_000, memory_size=20_000)  # too large for any update
    learn(args, QNetwork(32, True), CPU, NoWriter())
    assert 1 - asked / 4000 == pytest.approx([1 / 2, 1 / 4, 1 / 6, 1 / 8], abs=0.03)


# ---- when it is solved --------------------------------------------------------


def learn_with_lengths(monkeypatch, lengths, num_episodes=500):
    monkeypatch.setattr(dqn_cartpole, "make_env", lambda: ScriptedEnv(lengths))
    args = Args(num_episodes=num_episodes, batch_size=10_000)
    return learn(args, QNetwork(32, True), CPU, NoWriter())


def test_solved_at_the_tenth_success_in_a_row(monkeypatch):
    lengths = [200, 200, 195] + [196] * 9 + [10] + [196, 200] * 5
    assert learn_with_lengths(monkeypatch, lengths) == (22, 23, sum(lengths))


def test_not_solved_within_the_episodes(monkeypatch):
    lengths = [50] + [200] * 9
    assert learn_with_lengths(monkeypatch, lengths, num_episodes=10) == (None, 10, sum(lengths))


def test_one_update_per_step_once_a_batch_is_stored(monkeypatch):
    calls = []

    def counted(network, weights, optimizer, batch, gamma):
        calls.append(len(batch.rewards))
        return F.mse_loss(torch.zeros(1), torch.zeros(1)), torch.zeros(1)

    monkeypatch.setattr(dqn_cartpole, "update", counted)
    monkeypatch.setattr(dqn_cartpole, "make_env", lambda: ScriptedEnv([20, 30]))
    learn(Args(num_episodes=2), QNetwork(32, True), CPU, NoWriter())
    assert calls == [32] * (50 - 31)


def test_joined_weights_learn_what_single_ones_learn():
    networks = [QNetwork(32, zero_init=False), QNetwork(32, zero_init=False)]
    networks[1].load_state_dict(networks[0].state_dict())
    before = networks[1](torch.ones(3, 4))
    weights = join_weights(networks[1])
    torch.testing.assert_close(networks[1](torch.ones(3, 4)), before)
    single = torch.optim.Adam(networks[0].parameters(), lr=0.01)
    joined = torch.optim.Adam([weights], lr=0.01, fused=True)
    for step in range(5):
        batch = three_transitions([step, -1.0, 0.5], [1.0, 0.0, 1.0])
        update(networks[1], weights, joined, batch, 0.99)

        values = networks[0](batch.states).gather(1, batch.actions)
        loss = F.smooth_l1_loss(values, td_targets(networks[0], batch, 0.99))
        single.zero_grad()
        loss.backward()
        single.step()
    for single, joined in zip(*(network.parameters() for network in networks)):
        torch.testing.assert_close(joined, single)
    assert not torch.equal(before, networks[1](torch.ones(3, 4)))


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_the_network_ends_with_the_averaged_weights(monkeypatch, decay):
    history = []

    def joined(network):
        weights = join_weights(network)
        history.append(weights.detach().clone())
        monkeypatch.setattr(torch.optim.Adam, "step", lambda optimizer: stepped(optimizer, weights))
        return weights

    def stepped(optimizer, weights):
        step(optimizer)
        history.append(weights.detach().clone())

    step = torch.optim.Adam.step
    monkeypatch.setattr(dqn_cartpole, "join_weights", joined)
    network = QNetwork(32, zero_init=False)
    args = Args(num_episodes=5, average_decay=decay, learning_rate=0.01)
    learn(args, network, CPU, NoWriter())
    average = history[0]
    for weights in history[1:]:
        average = decay * average + (1 - decay) * weights
    assert len(history) > 10
    result = nn.utils.parameters_to_vector(network.parameters())
    torch.testing.assert_close(result, average)
