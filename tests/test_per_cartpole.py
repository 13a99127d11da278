"""Tests of per_cartpole.py: how priorities are kept, drawn and corrected for."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import per_cartpole
from per_cartpole import Args, QNetwork, ReplayMemory, learn
from test_dqn_cartpole import Writer, assert_frequencies

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


@pytest.mark.parametrize("alpha", [1.0, 0.6, 0.0])
def test_transitions_are_drawn_in_proportion_to_their_priorities(alpha):
    memory = memory_of(30, capacity=40, alpha=alpha)
    errors = np.random.default_rng(2).normal(size=30)
    memory.set_priorities(errors)
    priorities = (np.abs(errors) + EPSILON) ** alpha
    assert_frequencies(memory.sample_by_priority(50_000, CPU), priorities / priorities.sum())


def test_a_point_on_the_total_stays_inside_the_memory():
    memory = memory_of(3, capacity=10)
    memory.rng = SimpleNamespace(random=np.ones)
    assert memory.sample_by_priority(2, CPU)["rewards"][:, 0].tolist() == [2.0, 2.0]


@pytest.mark.parametrize("alpha", [1.0, 0.6])
@pytest.mark.parametrize("capacity", [40, 16])  # while it fills, and where it wraps round
def test_a_new_transition_has_td_error_0_until_they_are_recomputed(capacity, alpha):
    memory = memory_of(16, capacity, alpha)
    memory.set_priorities(np.full(16, 4 * EPSILON))
    for i in range(16, 20):
        memory.push(np.zeros(4), 0, float(i), np.zeros(4), False)
    priorities = np.array([5.0] * 16 + [1.0] * 4) ** alpha * (np.arange(20) >= 20 - capacity)
    assert_frequencies(memory.sample_by_priority(50_000, CPU), priorities / priorities.sum())


def test_priorities_of_a_full_memory_are_summed_in_float64():
    """In float32 the last of many small priorities would be rounded away."""
    memory = memory_of(10_000, capacity=10_000)
    memory.set_priorities(np.array([1e5] + [0.0] * 9999))  # float32 resolves 0.008 there
    total = memory.priorities.sum()
    middles = (np.arange(64) + 0.5) * EPSILON  # of the last 64 transitions' shares, from the end
    memory.rng = SimpleNamespace(random=lambda size: 1 - middles / total)
    batch = memory.sample_by_priority(64, CPU)
    assert batch["rewards"][:, 0].tolist() == list(range(9999, 9935, -1))


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.6, 0.4), (1.0, 1.0)])
def test_importance_factors(alpha, beta):
    memory = memory_of(30, capacity=40, alpha=alpha, beta=beta)
    errors = np.random.default_rng(2).normal(size=30)
    memory.set_priorities(errors)
    batch = memory.sample_by_priority(64, CPU)
    priorities = (np.abs(errors) + EPSILON) ** alpha
    drawn = (priorities / priorities.sum())[batch["rewards"][:, 0].long().numpy()]
    factors = (30 * drawn) ** -beta
    expected = torch.tensor(factors / factors.max(), dtype=torch.float32)
    torch.testing.assert_close(batch["importance"], expected[:, None])
    assert batch["importance"].max() == 1


def test_uniform_batches_have_importance_1_and_are_uniform():
    memory = memory_of(30, capacity=40)
    memory.set_priorities(np.arange(30.0))
    batch = memory.sample(50_000, CPU)
    assert torch.equal(batch["importance"], torch.ones(50_000, 1))
    assert_frequencies(batch, np.full(30, 1 / 30))


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
    learn(args, network, copy.deepcopy(network), Writer())

    optimizer = torch.optim.Adam(expected.parameters(), 0.01, fused=True)
    for batch in batches:
        values = expected(batch["states"]).gather(1, batch["actions"])
        errors = values - batch["rewards"]  # gamma is 0
        huber = torch.where(errors.abs() < 1, errors.square() / 2, errors.abs() - 0.5)
        optimizer.zero_grad()
        (batch["importance"] * huber).mean().backward()
        optimizer.step()
    assert any(batch["importance"].min() < 0.9 for batch in batches)
    for ours, theirs in zip(network.parameters(), expected.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_first_uniform_then_by_priority_and_at_an_episodes_end_priorities_before_the_copy(
    monkeypatch,
):
    """The priorities are the TD errors of all that is stored, by the networks before the copy."""
    events, last = [], {}

    def spy(owner, name, event):
        method = getattr(owner, name)

        def spied(*args):
            events.extend([event] * (event not in events[-1:]))
            last[event] = args
            return method(*args)

        monkeypatch.setattr(owner, name, spied)

    spy(ReplayMemory, "sample", "uniform")
    spy(ReplayMemory, "sample_by_priority", "priority")
    spy(per_cartpole, "td_errors", "recompute")
    spy(QNetwork, "load_state_dict", "copy")
    network = QNetwork(32, False)
    args = Args(num_episodes=4, uniform_episodes=2, batch_size=1, memory_size=40, gamma=0.8,
                alpha=0.7, beta=0.3, learning_rate=0.01)  # fmt: skip
    learn(args, network, copy.deepcopy(network), Writer())
    assert events == (
        ["uniform", "recompute", "copy", "uniform", "recompute"]
        + ["priority", "recompute", "copy", "priority", "recompute"]
    )
    memory, (main, target, everything, gamma) = last["priority"][0], last["recompute"]
    assert (len(memory.table), memory.alpha, memory.beta, gamma) == (40, 0.7, 0.3, 0.8)
    assert main is network is not target and len(everything["rewards"]) == len(memory) == 40
    targets = per_cartpole.td_targets(main, target, everything, 0.8)[:, 0]
    errors = targets - network(everything["states"])[range(40), everything["actions"][:, 0]]
    expected = (errors.detach().abs().numpy() + EPSILON) ** 0.7
    np.testing.assert_allclose(memory.priorities, expected, rtol=1e-3, atol=1e-6)
