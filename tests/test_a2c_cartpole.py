"""Tests of a2c_cartpole.py: returns, losses, the poles and their reset steps, the updates."""

import copy
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

import a2c_cartpole
from a2c_cartpole import ActorCritic, Args, CartPoles, book_rewards, learn
from test_dqn_cartpole import Writer


def learn_from(seed: int = 0, **values) -> dict:
    torch.manual_seed(seed)
    network = ActorCritic(32)
    return learn(Args(seed=seed, **values), network, copy.deepcopy(network), Writer())


# ---- returns and actions -------------------------------------------------------------------------


def brute_force_return(rewards, masks, last_value, gamma, start) -> float:
    """Adds up the discounted rewards from one step on, until an end or the end of the rollout."""
    total, discount = 0.0, 1.0
    for reward, mask in zip(rewards[start:], masks[start:]):
        total += discount * reward
        discount *= gamma
        if mask == 0:
            return total
    return total + discount * last_value


def test_actions_are_drawn_from_the_policy():
    torch.manual_seed(0)
    network = ActorCritic(32)
    with torch.no_grad():
        network.actor.weight.zero_()
        network.actor.bias.copy_(torch.tensor([0.0, math.log(3)]))  # 1 is three times as likely
    actions = network.act(torch.zeros(20_000, 4))
    assert actions.dtype == torch.int64 and actions.shape == (20_000,)
    assert actions.double().mean() == pytest.approx(0.75, abs=0.013)  # 4 standard deviations
    assert network.greedy_action(np.zeros(4, np.float32)) == 1


# ---- environment ---------------------------------------------------------------------------------


def test_book_rewards():
    steps = torch.tensor([1, 195, 196, 200, 195, 199])
    dones = torch.tensor([False, True, True, True, False, False])
    rewards = book_rewards(steps, dones)
    assert rewards.tolist() == [0, -1, 1, 1, 0, 0]
    assert rewards.dtype == torch.float32


def test_poles_behave_like_the_single_environment_and_reset_steps_are_no_decisions():
    """The single environment is put where each episode began, and given the same actions."""
    envs, single = CartPoles(4, seed=0), gym.make("CartPole-v1").unwrapped
    starts, trails, ended = list(envs.observations), [[] for _ in range(4)], 0
    for _ in range(120):
        actions, before = torch.randint(2, (4,)), envs.dones
        rewards, dones, decided = envs.step(actions)
        assert torch.equal(decided, ~before)  # a reset follows each end, and nothing else
        for i in range(4):
            if not decided[i]:
                assert envs.steps[i] == 0 and rewards[i] == 0 and not dones[i]
                assert envs.observations[i].abs().max() <= 0.05
                starts[i], trails[i] = envs.observations[i], []
                continue
            trails[i].append(int(actions[i]))
            assert envs.steps[i] == len(trails[i])
            if dones[i]:
                single.reset()
                single.state = starts[i].double().numpy()
                for step, action in enumerate(trails[i], 1):
                    observation, _, terminated, _, _ = single.step(action)
                    assert terminated == (step == len(trails[i]))
                np.testing.assert_allclose(observation, envs.observations[i], atol=1e-3)
                assert rewards[i] == -1 and envs.last_lengths[i] == step
                ended += 1
    assert ended > 10


def test_every_episode_may_last_200_steps():
    """The first one and those after a reset."""
    envs, ends = CartPoles(3, seed=0), []
    assert len({tuple(row.tolist()) for row in envs.observations}) == 3  # they start differently
    for step in range(1, 403):
        angle, speed = envs.observations[:, 2], envs.observations[:, 3]
        rewards, dones, _ = envs.step((angle + speed > 0).long())  # push towards the fall
        if dones.any():
            assert dones.all() and rewards.tolist() == [1, 1, 1]
            assert envs.last_lengths.tolist() == [200, 200, 200]
            ends.append(step)
    assert ends == [200, 401]


# ---- learning ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("decay", "max_grad_norm"), [(0.0, 1e-3), (0.9, 1e3)])
def test_every_update_is_replayed(monkeypatch, decay, max_grad_norm):
    """From what the poles were asked and answered alone: batch, returns, loss, clipping, average.

    The replay knows nothing of the storage. A step after an end is a reset and is left out. The
    curves show each twentieth update.
    """
    T, N, transitions, writer = 5, 4, [], Writer()

    class Spied(CartPoles):
        def step(self, actions):
            before, reset_steps = self.observations.clone(), self.dones.clone()
            rewards, dones, decided = super().step(actions)
            after = self.observations.clone()
            step = (before, actions.clone(), rewards.clone(), dones.clone(), after, reset_steps)
            transitions.append(step)
            return rewards, dones, decided

    monkeypatch.setattr(a2c_cartpole, "CartPoles", Spied)
    torch.manual_seed(0)
    network = ActorCritic(32)
    expected, averaged = copy.deepcopy(network), copy.deepcopy(network)
    args = Args(num_envs=N, num_steps=T, total_timesteps=430, gamma=0.9, value_loss_coef=0.3,
                entropy_coef=0.2, average_decay=decay, max_grad_norm=max_grad_norm)  # fmt: skip
    outcome = learn(args, network, averaged, writer)

    parameters = list(expected.parameters())
    optimizer = torch.optim.Adam(parameters, 0.01, fused=True)
    average = nn.utils.parameters_to_vector(parameters).detach()
    decisions = ends = bootstraps = 0
    for first in range(0, len(transitions), T):
        before, actions, rewards, dones, after, reset_steps = zip(*transitions[first : first + T])
        rewards, masks = torch.stack(rewards).tolist(), (~torch.stack(dones)).float().tolist()
        last_values = expected(after[-1])[0].tolist()
        losses = []  # of the value, the policy, and the entropy
        for t in range(T):
            for i in range(N):
                if reset_steps[t][i]:
                    continue
                of_env = [row[i] for row in rewards], [row[i] for row in masks], last_values[i]
                target = brute_force_return(*of_env, gamma=0.9, start=t)
                bootstraps += all(row[i] for row in masks[t:])
                ends += masks[t][i] == 0
                value, logits = expected(before[t][i])
                p = logits.softmax(-1)
                gain = (target - value.item()) * p[actions[t][i]].log()
                losses.append(torch.stack([(target - value) ** 2, -gain, -(p * p.log()).sum()]))
        parts = torch.stack(losses).mean(dim=0)
        if first == 19 * T:
            logged = parts.tolist()
        optimizer.zero_grad()
        (0.3 * parts[0] + parts[1] - 0.2 * parts[2]).backward()
        norm = torch.cat([parameter.grad.flatten() for parameter in parameters]).norm()
        for parameter in parameters:
            parameter.grad *= min(1.0, max_grad_norm / norm.item())
        optimizer.step()
        decisions += len(losses)
        weights = nn.utils.parameters_to_vector(parameters).detach()
        average = decay * average + (1 - decay) * weights
    assert len(transitions) >= 20 * T and ends > 10 and bootstraps > 100
    assert outcome["steps"] == decisions < N * len(transitions)
    [*curves] = (writer[f"losses/{name}"] for name in ("value_loss", "policy_loss", "entropy"))
    np.testing.assert_allclose(curves, np.reshape(logged, (3, 1)), rtol=1e-3)
    for ours, theirs in [(network, weights), (averaged, average)]:
        vector = nn.utils.parameters_to_vector(ours.parameters())
        torch.testing.assert_close(vector, theirs, rtol=1e-3, atol=1e-5)


def test_a_rollout_of_nothing_but_a_reset_is_no_update():
    """Its batch would be empty, and the mean loss of nothing is not finite."""
    outcome = learn_from(num_envs=1, num_steps=1, total_timesteps=100)
    assert outcome["episodes"] > 1 and outcome["steps"] == 100


def test_no_more_timesteps_are_played_than_asked_for():
    """An update takes 160."""
    assert [learn_from(total_timesteps=limit)["steps"] for limit in (160, 319)] == [160, 160]


# ---- when it is solved ---------------------------------------------------------------------------


class ScriptedPoles:
    """Episodes of given lengths, one list for each environment, without reset steps."""

    def __init__(self, lengths: list[list[int]]):
        self.lengths, self.num_envs = [iter(of_one) for of_one in lengths], len(lengths)
        self.left = torch.tensor([next(of_one) for of_one in self.lengths])
        self.observations = torch.zeros(self.num_envs, 4)
        self.steps = torch.zeros(self.num_envs, dtype=torch.int64)
        self.last_lengths = torch.zeros(self.num_envs, dtype=torch.int64)
        self.dones = torch.zeros(self.num_envs, dtype=torch.bool)

    def step(self, actions):
        self.steps[self.dones] = 0
        self.steps += 1
        self.left -= 1
        self.dones = self.left == 0
        for i in self.dones.nonzero():
            self.left[i] = next(self.lengths[int(i)])
            self.last_lengths[i] = self.steps[i]
        return book_rewards(self.steps, self.dones), self.dones, torch.ones_like(self.dones)


@pytest.mark.parametrize(
    ("lengths", "limit", "outcome"),
    [  # both have a success at step 446, and the rollout that was under way is finished
        ([[10, 200, 200, 10**6], [150, 100, 196, 10**6]], 10_000, (2, 3, 2 * 450)),
        ([[200, 10**6], [195, 10**6]], 1000, (None, 1, 1000)),
    ],
)
def test_solved_when_the_last_episode_of_every_environment_was_a_success(
    monkeypatch, lengths, limit, outcome
):
    poles = {(2, 7): ScriptedPoles(lengths)}  # by number and seed
    monkeypatch.setattr(a2c_cartpole, "CartPoles", lambda *args: poles[args])
    found = learn_from(seed=7, num_envs=2, num_steps=5, total_timesteps=limit)
    assert tuple(found.values()) == outcome  # solved_episode, episodes, steps
