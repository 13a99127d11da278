"""Tests of ddqn_cartpole.py: the double target and the copies to the target network."""

import numpy as np
import pytest
import torch
from torch import nn

import ddqn_cartpole
import dqn_cartpole
from ddqn_cartpole import Args, Batch, QNetwork, learn, td_targets, update

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


MAIN = [[0.0, 0.0], [1.0, 3.0], [5.0, 2.0]]
TARGET = [[0.0, 0.0], [9.0, 7.0], [4.0, 8.0]]  # would choose the other action in states 1 and 2
BATCH = Batch(
    states(0, 0, 1),
    torch.tensor([[0], [1], [1]]),
    torch.tensor([[0.5], [0.0], [-1.0]]),
    states(1, 2, 2),
    torch.tensor([[1.0], [1.0], [0.0]]),  # the last one ended its episode
)


def test_main_network_chooses_and_target_network_values():
    targets = td_targets(Table(MAIN), Table(TARGET), BATCH, 0.9)
    torch.testing.assert_close(targets, torch.tensor([[0.5 + 0.9 * 7], [0.9 * 4], [-1.0]]))
    assert not targets.requires_grad


def test_the_target_differs_from_that_of_dqn():
    batch = dqn_cartpole.Batch(*BATCH)
    plain = dqn_cartpole.td_targets(Table(MAIN), batch, 0.9)
    torch.testing.assert_close(plain, torch.tensor([[0.5 + 0.9 * 3], [0.9 * 5], [-1.0]]))
    same = td_targets(Table(MAIN), Table(MAIN), BATCH, 0.9)  # one network for both: plain DQN
    torch.testing.assert_close(same, plain)


def test_an_end_bootstraps_nothing():
    ended = BATCH._replace(masks=torch.zeros(3, 1))
    assert torch.equal(td_targets(Table(MAIN), Table(TARGET), ended, 0.9), BATCH.rewards)


def test_update_moves_the_main_network_only():
    main, target = Table(MAIN), Table(TARGET)
    optimizer = torch.optim.SGD(main.parameters(), lr=1.0)
    loss, values = update(main, target, main.values, optimizer, BATCH, 0.9)
    assert values.tolist() == [[0.0], [0.0], [3.0]]
    # Errors: 0 - 6.8, 0 - 3.6, 3 - -1. Beyond 1 the Huber loss is linear: |error| - 0.5.
    assert loss.item() == pytest.approx((6.3 + 3.1 + 3.5) / 3)
    expected = [[1 / 3, 1 / 3], [1.0, 3.0 - 1 / 3], [5.0, 2.0]]
    torch.testing.assert_close(main.values.data, torch.tensor(expected))
    assert target.values.tolist() == TARGET and not target.values.grad.any()


class NoWriter:
    def add_scalar(self, *args):
        pass


class CountedEnv:
    """Episodes of 20 steps; knows the episode's number."""

    def __init__(self):
        self.episode = -2  # the reset with the seed makes it -1, the first episode 0

    def reset(self, seed=None):
        self.episode, self.left = self.episode + 1, 20
        return np.zeros(4, np.float32), {}

    def step(self, action):
        self.left -= 1
        return np.zeros(4, np.float32), 1.0, self.left == 0, False, {}


@pytest.mark.parametrize("interval", [2, 3])
def test_the_target_is_copied_after_every_interval_and_unchanged_between(monkeypatch, interval):
    env, main, seen = CountedEnv(), QNetwork(32, False), []

    def spied_update(network, target_network, weights, optimizer, batch, gamma):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.01)  # the main network moves at every step
        weights = [nn.utils.parameters_to_vector(n.parameters()) for n in (network, target_network)]
        seen.append((env.episode, *(w.detach().clone() for w in weights)))
        return torch.zeros(()), torch.zeros(1)

    monkeypatch.setattr(ddqn_cartpole, "make_env", lambda: env)
    monkeypatch.setattr(ddqn_cartpole, "update", spied_update)
    learn(Args(num_episodes=8, batch_size=1, target_interval=interval), main, CPU, NoWriter())

    first_target = seen[0][2]
    assert not torch.equal(first_target, seen[0][1] - 0.01)  # weights of its own at the start
    end_of = {episode: main_weights for episode, main_weights, _ in seen}
    for episode, _, target_weights in seen:
        copies = [e for e in range(episode) if e % interval == 0]  # ends of earlier episodes
        expected = end_of[copies[-1]] if copies else first_target
        assert torch.equal(target_weights, expected)
