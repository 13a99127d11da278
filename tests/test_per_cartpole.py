"""Tests of per_cartpole.py: how priorities are kept, drawn and corrected for."""

import copy
import math

import numpy as np
import pytest
import torch

import per_cartpole
from per_cartpole import Args, QNetwork, ReplayMemory, learn, td_errors

CPU = torch.device("cpu")
EPSILON = 1e-4


def memory_of(count: int, capacity: int, alpha: float = 1.0, beta: float = 0.0) -> ReplayMemory:
    """Transition i carries i in its reward; its state and next state are random."""
    memory = ReplayMemory(capacity, np.random.default_rng(0), alpha, beta)
    rng = np.random.default_rng(1)
    for i in range(count):
        state, next_state = rng.normal(size=(2, 4))
        memory.push(state, i % 2, float(i), next_state, i % 5 == 0)
    return memory


def assert_frequencies(memory: ReplayMemory, probabilities: np.ndarray) -> None:
    """Chi-square: 50,000 draws against the probabilities, up to mean and 4 standard deviations."""
    draws = memory.sample_by_priority(50_000, CPU).rewards[:, 0].long().numpy()
    counts = np.bincount(draws, minlength=len(probabilities))
    expected = 50_000 * probabilities
    assert expected.min() > 5
    freedom = len(probabilities) - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("alpha", [1.0, 0.6, 0.0])
def test_transitions_are_drawn_in_proportion_to_their_priorities(alpha):
    memory = memory_of(30, capacity=40, alpha=alpha)
    errors = np.random.default_rng(2).normal(size=30)
    memory.set_priorities(errors)
    priorities = (np.abs(errors) + EPSILON) ** alpha
    assert_frequencies(memory, priorities / priorities.sum())


def test_each_end_of_the_memory_is_drawn():
    """The book's sampler never returns the first transition, and the last one too often."""
    memory = memory_of(4, capacity=4)
    memory.set_priorities(np.array([3.0, 0.0, 0.0, 1.0]))
    draws = memory.sample_by_priority(4000, CPU).rewards[:, 0].long().numpy()
    assert np.bincount(draws, minlength=4) == pytest.approx([3000, 0, 0, 1000], abs=120)


def test_a_point_on_the_total_stays_inside_the_memory():
    memory = memory_of(3, capacity=10)

    class AlwaysOne:
        def random(self, size):
            return np.ones(size)

    memory.rng = AlwaysOne()
    assert memory.sample_by_priority(2, CPU).rewards[:, 0].tolist() == [2.0, 2.0]


def test_a_new_transition_enters_with_td_error_0():
    for alpha in (1.0, 0.6):
        memory = memory_of(5, capacity=5, alpha=alpha)
        memory.set_priorities(np.ones(5))
        memory.push(np.zeros(4), 0, 5.0, np.zeros(4), False)  # over transition 0
        kept = (1 + EPSILON) ** alpha
        assert memory.priorities == pytest.approx([EPSILON**alpha, kept, kept, kept, kept])


@pytest.mark.parametrize("alpha", [1.0, 0.6])
def test_running_sums_are_those_of_the_priorities(alpha):
    """While the memory fills, where it wraps round, and after every recomputation."""
    memory, rng = memory_of(0, capacity=50, alpha=alpha), np.random.default_rng(4)
    for number in range(180):
        memory.push(np.zeros(4), 0, float(number), np.zeros(4), False)
        np.testing.assert_allclose(memory.cumulative, np.cumsum(memory.priorities), rtol=1e-9)
        if number % 40 == 39:
            memory.set_priorities(rng.normal(size=len(memory)))


def test_priorities_of_a_full_memory_are_summed_in_float64():
    """In float32 the last of many small priorities would be rounded away."""
    memory = memory_of(10_000, capacity=10_000)
    assert memory.priorities.dtype == np.float64
    errors = np.zeros(10_000)
    errors[0] = 1e5  # float32 resolves 0.008 there, 80 times a small priority
    memory.set_priorities(errors)
    total = memory.priorities.sum()

    class Points:  # one in the middle of each of the last 64 transitions' shares
        def random(self, size):
            return (total - EPSILON * (np.arange(size) + 0.5)) / total

    memory.rng = Points()
    assert memory.sample_by_priority(64, CPU).rewards[:, 0].tolist() == list(range(9999, 9935, -1))


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.6, 0.4), (1.0, 1.0)])
def test_importance_factors(alpha, beta):
    memory = memory_of(30, capacity=40, alpha=alpha, beta=beta)
    errors = np.random.default_rng(2).normal(size=30)
    memory.set_priorities(errors)
    batch = memory.sample_by_priority(64, CPU)
    priorities = (np.abs(errors) + EPSILON) ** alpha
    drawn = (priorities / priorities.sum())[batch.rewards[:, 0].long().numpy()]
    factors = (30 * drawn) ** -beta
    expected = torch.tensor(factors / factors.max(), dtype=torch.float32)
    torch.testing.assert_close(batch.importance, expected[:, None])
    assert batch.importance.max() == 1


def test_uniform_batches_have_importance_1_and_are_uniform():
    memory = memory_of(30, capacity=40)
    memory.set_priorities(np.arange(30.0))
    batch = memory.sample(50_000, CPU)
    assert batch.importance == 1.0
    counts = np.bincount(batch.rewards[:, 0].long().numpy(), minlength=30)
    assert ((counts - 50_000 / 30) ** 2 / (50_000 / 30)).sum() < 29 + 4 * math.sqrt(2 * 29)


def test_recomputed_priorities_are_the_td_errors_of_a_float64_recomputation():
    torch.manual_seed(0)
    memory = memory_of(500, capacity=600)
    main, target = QNetwork(32, False), QNetwork(32, False)
    memory.rewards /= 100
    memory.set_priorities(td_errors(main, target, memory.take(np.arange(len(memory)), CPU), 0.97))

    main, target = main.double(), target.double()
    rows, expected = np.arange(500), np.zeros(500)
    with torch.no_grad():
        q = main(torch.from_numpy(memory.states[:500]).double()).numpy()
        next_q = main(torch.from_numpy(memory.next_states[:500]).double()).numpy()
        next_target = target(torch.from_numpy(memory.next_states[:500]).double()).numpy()
    for row in rows:
        bootstrap = 0.0 if row % 5 == 0 else next_target[row, np.argmax(next_q[row])]
        reward = memory.rewards[row, 0].astype(np.float64)
        expected[row] = abs(reward + 0.97 * bootstrap - q[row, row % 2])
    np.testing.assert_allclose(memory.priorities[:500], expected + EPSILON, atol=2e-6)
    assert not memory.priorities[500:].any()


class NoWriter:
    def add_scalar(self, *args):
        pass


def test_importance_scales_each_transition_in_the_loss(monkeypatch):
    """Replays each update with the same batch on a copy of the network."""
    torch.manual_seed(0)
    batches, sample = [], ReplayMemory.sample_by_priority

    def spied(*args):
        batches.append(sample(*args))
        return batches[-1]

    monkeypatch.setattr(ReplayMemory, "sample_by_priority", spied)
    args = Args(num_episodes=4, uniform_episodes=0, batch_size=9, learning_rate=0.01, gamma=0)
    network = QNetwork(32, False)
    expected = copy.deepcopy(network)
    learn(args, network, copy.deepcopy(network), NoWriter())

    optimizer = torch.optim.Adam(expected.parameters(), 0.01, fused=True)
    for batch in batches:
        errors = expected(batch.states).gather(1, batch.actions) - batch.rewards  # gamma is 0
        huber = torch.where(errors.abs() < 1, errors.square() / 2, errors.abs() - 0.5)
        optimizer.zero_grad()
        (batch.importance * huber).mean().backward()
        optimizer.step()
    assert any(batch.importance.min() < 0.9 for batch in batches)
    for ours, theirs in zip(network.parameters(), expected.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_order_of_events(monkeypatch):
    """Uniform first, then by priority; at an episode's end first all priorities, then the copy."""
    events = []

    class SpiedMemory(ReplayMemory):
        def sample(self, *args):
            assert (self.capacity, args[0]) == (40, 1)
            events.append("uniform")
            return super().sample(*args)

        def sample_by_priority(self, *args):
            assert args[0] == 1
            events.append("priority")
            return super().sample_by_priority(*args)

        def set_priorities(self, errors):
            assert len(errors) == len(self) and (self.alpha, self.beta) == (0.7, 0.3)
            events.append("recompute")
            super().set_priorities(errors)

    class SpiedNetwork(QNetwork):
        def load_state_dict(self, *args):
            events.append("copy")
            return super().load_state_dict(*args)

    def spied_errors(main, target, *rest):
        assert main is network and target is not network and rest[-1] == 0.8
        return td_errors(main, target, *rest)

    monkeypatch.setattr(per_cartpole, "td_errors", spied_errors)
    monkeypatch.setattr(per_cartpole, "ReplayMemory", SpiedMemory)
    monkeypatch.setattr(per_cartpole, "QNetwork", SpiedNetwork)
    args = Args(num_episodes=4, uniform_episodes=2, batch_size=1, alpha=0.7, beta=0.3,
                memory_size=40, gamma=0.8)  # fmt: skip
    network = SpiedNetwork(32, True)
    learn(args, network, SpiedNetwork(32, True), NoWriter())
    summary = [e for i, e in enumerate(events) if i == 0 or e != events[i - 1]]
    assert summary == (
        ["uniform", "recompute", "copy", "uniform", "recompute"]
        + ["priority", "recompute", "copy", "priority", "recompute"]
    )
