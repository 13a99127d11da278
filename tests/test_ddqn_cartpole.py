"""Tests of ddqn_cartpole.py: the double target and the copies to the target network."""

import copy

import pytest
import torch
from torch import nn

import ddqn_cartpole
from ddqn_cartpole import Args, QNetwork, learn, td_targets
from test_dqn_cartpole import Writer


def test_main_network_chooses_and_target_network_values():
    torch.manual_seed(3)
    main, target = QNetwork(32, zero_init=False), QNetwork(32, zero_init=False)
    next_states, rewards, not_done = torch.randn(64, 4), torch.randn(64, 1), torch.ones(64, 1)
    not_done[:9] = 0  # these ended their episodes
    batch = {"rewards": rewards, "next_states": next_states, "not_done": not_done}
    targets = td_targets(main, target, batch, 0.9)
    assert torch.equal(targets[:9], rewards[:9]) and not targets.requires_grad
    chosen = main(next_states).argmax(dim=1)
    assert (chosen != target(next_states).argmax(dim=1))[9:].any()
    values = target(next_states)[range(64), chosen]
    torch.testing.assert_close(targets[9:, 0], (rewards[:, 0] + 0.9 * values)[9:])


@pytest.mark.parametrize("interval", [2, 3])
def test_the_target_is_copied_after_every_interval_and_unchanged_between(monkeypatch, interval):
    """Looks at both networks where they meet, in td_targets."""
    torch.manual_seed(0)
    seen, writer, main = [], Writer(), QNetwork(32, False)

    def spied_targets(network, target_network, batch, gamma):
        both = [nn.utils.parameters_to_vector(n.parameters()) for n in (network, target_network)]
        episode = len(writer["charts/episode"])
        seen.append((episode, *(weights.detach().clone() for weights in both)))
        return td_targets(network, target_network, batch, gamma)

    monkeypatch.setattr(ddqn_cartpole, "td_targets", spied_targets)
    args = Args(num_episodes=8, batch_size=4, target_interval=interval, learning_rate=0.01)
    learn(args, main, copy.deepcopy(main), writer)

    start_of = {episode: weights for episode, weights, _ in reversed(seen)}
    assert len(start_of) == 8
    for episode, _, target_weights in seen:
        copies = [e for e in range(episode) if e % interval == 0]  # ends of earlier episodes
        copied = start_of[copies[-1] + 1 if copies else 0]  # it starts as a copy, too
        assert torch.equal(target_weights, copied)
