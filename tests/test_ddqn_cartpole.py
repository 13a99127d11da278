"""Tests of ddqn_cartpole.py: the double target and the copies to the target network."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import ddqn_cartpole
from ddqn_cartpole import Args, Batch, QNetwork, learn, td_targets
from test_dqn_cartpole import Writer


class Table(nn.Module):
    """Looks action values up: the first component of a state is its row."""

    def __init__(self, values: list[list[float]]):
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values))

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


class CountedEnv:
    """Episodes of 20 steps with random states; knows the episode's number."""

    def __init__(self):
        self.episode = -2  # the reset with the seed makes it -1, the first episode 0
        self.rng = np.random.default_rng(0)

    def state(self):
        return self.rng.normal(size=4).astype(np.float32)

    def reset(self, seed=None):
        self.episode, self.left = self.episode + 1, 20
        return self.state(), {}

    def step(self, action):
        self.left -= 1
        return self.state(), 1.0, self.left == 0, False, {}


@pytest.mark.parametrize("interval", [2, 3])
def test_the_target_is_copied_after_every_interval_and_unchanged_between(monkeypatch, interval):
    """Looks at both networks where they meet, in td_targets."""
    torch.manual_seed(0)
    env, seen = CountedEnv(), []

    def spied_targets(network, target_network, batch, gamma):
        both = [nn.utils.parameters_to_vector(n.parameters()) for n in (network, target_network)]
        seen.append((env.episode, *(weights.detach().clone() for weights in both)))
        return td_targets(network, target_network, batch, gamma)

    monkeypatch.setattr(ddqn_cartpole, "make_env", lambda: env)
    monkeypatch.setattr(ddqn_cartpole, "td_targets", spied_targets)
    main = QNetwork(32, False)
    args = Args(num_episodes=8, batch_size=4, target_interval=interval, learning_rate=0.01)
    learn(args, main, copy.deepcopy(main), Writer())

    start_of = {episode: weights for episode, weights, _ in reversed(seen)}
    for episode, _, target_weights in seen:
        copies = [e for e in range(episode) if e % interval == 0]  # ends of earlier episodes
        copied = start_of[copies[-1] + 1 if copies else 0]  # it starts as a copy, too
        assert torch.equal(target_weights, copied)
