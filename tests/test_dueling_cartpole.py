"""Tests of dueling_cartpole.py: the two streams and how they are put together."""

import torch

from dueling_cartpole import QNetwork


def test_values_and_advantages_add_up_without_the_mean():
    torch.manual_seed(0)
    network, states = QNetwork(32, zero_init=False), torch.randn(16, 4)
    with torch.no_grad():
        hidden = torch.relu(network.fc2(torch.relu(network.fc1(states))))
        value, advantages = network.fc3_value(hidden), network.fc3_advantage(hidden)
        q = network(states)
    assert q.shape == (16, 2)
    torch.testing.assert_close(q.mean(dim=1), value.squeeze(1))  # the mean advantage is removed
    torch.testing.assert_close(q[:, 1] - q[:, 0], advantages[:, 1] - advantages[:, 0])
