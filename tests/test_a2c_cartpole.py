"""Tests of a2c_cartpole.py: returns, losses, the poles and their reset steps, the updates."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import a2c_cartpole
from a2c_cartpole import ActorCritic, Args, CartPoleVectorEnv, book_reward, learn
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
    actions = network.act(np.zeros((20_000, 4), np.float32))
    assert actions.dtype == np.int64 and actions.shape == (20_000,)
    assert actions.mean() == pytest.approx(0.75, abs=0.013)  # 4 standard deviations
    assert network.greedy_action(np.zeros(4, np.float32)) == 1


# ---- environment ---------------------------------------------------------------------------------


def test_book_reward():
    steps = np.array([1, 195, 196, 200, 195, 199])
    rewards = book_reward(steps, np.array([False, True, True, True, False, False]))
    assert rewards.tolist() == [0, -1, 1, 1, 0, 0] and rewards.dtype == np.float32


# ---- learning ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("decay", "max_grad_norm"), [(0.0, 1e-3), (0.9, 1e3)])
def test_every_update_is_replayed(monkeypatch, decay, max_grad_norm):
    """From what the poles were asked and answered alone: batch, returns, loss, clipping, average.

    The replay counts the steps itself. A step after an end is a reset and is left out. The curves
    show each twentieth update.
    """
    T, N, transitions, writer = 5, 4, [], Writer()

    class Spied(CartPoleVectorEnv):
        def reset(self, **options):
            self.seen, _ = answer = super().reset(**options)
            self.lengths = np.zeros(N)
            self.ended = self.lengths > 0
            return answer

        def step(self, actions):
            before, reset_steps = torch.from_numpy(self.seen), self.ended
            self.seen, _, terminated, truncated, _ = answer = super().step(actions)
            self.ended = terminated | truncated
            self.lengths = np.where(reset_steps, 0, self.lengths + 1)
            rewards = torch.from_numpy(np.where(self.ended & (self.lengths < 196), -1.0, 0.0))
            after, dones = torch.from_numpy(self.seen), torch.from_numpy(self.ended)
            transitions.append((before, actions.copy(), rewards, dones, after, reset_steps))
            return answer

    monkeypatch.setattr(a2c_cartpole, "CartPoleVectorEnv", Spied)
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
        self.lengths = [iter(of_one) for of_one in lengths]
        self.left = np.array([next(of_one) for of_one in self.lengths])
        self.steps, self.dones = np.zeros((2, len(lengths)), int)

    def reset(self, seed):
        assert seed == 7
        return np.zeros((len(self.steps), 4), np.float32), {}

    def step(self, actions):
        self.steps = np.where(self.dones, 0, self.steps) + 1
        self.left -= 1
        self.dones = self.left == 0
        for i in self.dones.nonzero()[0]:
            self.left[i] = next(self.lengths[i])
        states, ones = np.zeros((len(actions), 4), np.float32), np.ones(len(actions))
        return states, ones, self.dones & (self.steps < 200), self.dones & (self.steps == 200), {}


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
    rewarded = []  # lengths of the episodes that have ended

    def spied_reward(steps, done):
        rewarded.extend(steps[done].tolist())
        return book_reward(steps, done)

    def make(num_envs, max_episode_steps):
        assert (num_envs, max_episode_steps) == (2, 200)
        return ScriptedPoles(lengths)

    monkeypatch.setattr(a2c_cartpole, "CartPoleVectorEnv", make)
    monkeypatch.setattr(a2c_cartpole, "book_reward", spied_reward)
    found = learn_from(seed=7, num_envs=2, num_steps=5, total_timesteps=limit)
    assert tuple(found.values()) == outcome  # solved_episode, episodes, steps
    assert sorted(rewarded) == sorted(length for row in lengths for length in row if length < 999)
