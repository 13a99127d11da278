"""Tests of dueling_cartpole.py: the two streams and how they are put together."""

import pytest
import torch

from dueling_cartpole import QNetwork


@pytest.fixture
def network() -> QNetwork:
    torch.manual_seed(0)
    return QNetwork(32, zero_init=False)


def test_values_and_advantages_add_up_without_the_mean(network):
    states = torch.randn(16, 4)
    with torch.no_grad():
        hidden = torch.relu(network.fc2(torch.relu(network.fc1(states))))
        value, advantages = network.fc3_value(hidden), network.fc3_advantage(hidden)
        q = network(states)
    assert q.shape == (16, 2)
    torch.testing.assert_close(q.mean(dim=1), value.squeeze(1))  # the mean advantage is removed
    torch.testing.assert_close(q[:, 1] - q[:, 0], advantages[:, 1] - advantages[:, 0])


def test_adding_a_constant_to_the_advantages_changes_nothing(network):
    states = torch.randn(16, 4)
    with torch.no_grad():
        before = network(states)
        network.fc3_advantage.bias += 7.0
        torch.testing.assert_close(network(states), before, atol=1e-5, rtol=0)
        network.fc3_value.bias += 7.0  # while one added to the value is seen in full
        torch.testing.assert_close(network(states), before + 7.0, atol=1e-5, rtol=0)


def test_each_transition_teaches_the_value_of_both_actions(network):
    state = torch.randn(1, 4)
    network(state)[0, 0].backward()
    assert network.fc3_value.bias.grad.item() == pytest.approx(1.0)
    assert network.fc3_advantage.bias.grad.tolist() == pytest.approx([0.5, -0.5])


def test_zero_init_starts_all_values_at_zero():
    assert torch.equal(QNetwork(32, zero_init=True)(torch.randn(5, 4)), torch.zeros(5, 2))
