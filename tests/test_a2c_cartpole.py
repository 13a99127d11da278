"""Tests of a2c_cartpole.py: returns, losses, the batch of environments and its reset steps."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

import a2c_cartpole
from a2c_cartpole import (
    ActorCritic,
    Args,
    CartPoles,
    RolloutStorage,
    act,
    book_rewards,
    compute_losses,
    compute_returns,
    join_weights,
    learn,
)

CPU = torch.device("cpu")


class NoWriter:
    def add_scalar(self, *args):
        pass


# ---- returns and losses -------------------------------------------------------


def brute_force_return(rewards, masks, last_value, gamma, start) -> float:
    """Adds up the discounted rewards from one step on, until an end or the end of the rollout."""
    total, discount = 0.0, 1.0
    for reward, mask in zip(rewards[start:], masks[start:]):
        total += discount * reward
        discount *= gamma
        if mask == 0:
            return total
    return total + discount * last_value


def test_returns_against_brute_force_with_several_ends():
    rng = np.random.default_rng(0)
    rewards, last_values = rng.normal(size=(12, 6)), rng.normal(size=6)
    masks = np.ones((12, 6))
    masks[[2, 5, 6, 11], [0, 0, 0, 0]] = 0  # several ends in one environment, one at the very end
    masks[0, 1] = masks[11, 2] = 0
    masks[:, 3] = 0
    returns = compute_returns(rewards, masks, last_values, gamma=0.9)
    for env in range(6):
        for start in range(12):
            of_env = rewards[:, env], masks[:, env], last_values[env]
            expected = brute_force_return(*of_env, gamma=0.9, start=start)
            assert returns[start, env].item() == pytest.approx(expected)


def test_losses_against_a_calculation_by_hand():
    torch.manual_seed(0)
    network = ActorCritic(32)
    observations, returns = torch.randn(7, 4), torch.randn(7)
    actions = torch.tensor([0, 1, 1, 0, 1, 0, 0])
    value_loss, policy_loss, entropy = compute_losses(network, observations, actions, returns)
    values, logits = (output.detach().double().numpy() for output in network(observations))
    squares, gains, entropies = [], [], []
    for i in range(7):
        p = np.exp(logits[i]) / np.exp(logits[i]).sum()
        advantage = returns[i].item() - values[i]
        squares.append(advantage**2)
        gains.append(advantage * math.log(p[actions[i]]))
        entropies.append(-sum(p * np.log(p)))
    assert value_loss.item() == pytest.approx(np.mean(squares), rel=1e-5)
    assert policy_loss.item() == pytest.approx(-np.mean(gains), rel=1e-5)
    assert entropy.item() == pytest.approx(np.mean(entropies), rel=1e-5)


def test_the_policy_loss_leaves_the_critic_alone():
    network = ActorCritic(32)
    batch = torch.randn(7, 4), torch.zeros(7, dtype=torch.int64), torch.randn(7)
    _, policy_loss, _ = compute_losses(network, *batch)
    policy_loss.backward()
    assert network.critic.weight.grad is None or not network.critic.weight.grad.any()
    assert network.actor.weight.grad.any()


def test_actions_are_drawn_from_the_policy():
    torch.manual_seed(0)
    network = ActorCritic(32)
    with torch.no_grad():
        network.actor.weight.zero_()
        network.actor.bias.copy_(torch.tensor([0.0, math.log(3)]))  # 1 is three times as likely
    actions = act(network, np.zeros((20_000, 4), np.float32), CPU)
    assert actions.dtype == np.int64 and actions.shape == (20_000,)
    assert actions.mean() == pytest.approx(0.75, abs=0.013)  # 4 standard deviations


# ---- environments -------------------------------------------------------------


def test_book_rewards():
    steps = np.array([1, 195, 196, 200, 195, 199])
    dones = np.array([False, True, True, True, False, False])
    rewards = book_rewards(steps, dones)
    assert rewards.tolist() == [0, -1, 1, 1, 0, 0]
    assert rewards.dtype == np.float32


def test_reset_steps_are_marked_and_count_no_step():
    """Against the single environment: it is put where each episode of the batch began."""
    envs = CartPoles(4, seed=0)
    single = gym.make("CartPole-v1").unwrapped
    rng = np.random.default_rng(0)
    starts, trails = [envs.observations[i] for i in range(4)], [[] for _ in range(4)]
    lengths = []
    for _ in range(120):
        actions, before = rng.integers(2, size=4), envs.dones
        rewards, dones, decided = envs.step(actions)
        assert np.array_equal(decided, ~before)  # a reset follows each end, and nothing else
        for i in range(4):
            if not decided[i]:
                assert envs.steps[i] == 0 and rewards[i] == 0 and not dones[i]
                assert np.abs(envs.observations[i]).max() <= 0.05
                starts[i], trails[i] = envs.observations[i], []
                continue
            trails[i].append(int(actions[i]))
            assert envs.steps[i] == len(trails[i])
            if dones[i]:
                single.reset()
                single.state = starts[i].astype(np.float64)
                for step, action in enumerate(trails[i], 1):
                    observation, _, terminated, _, _ = single.step(action)
                    assert terminated == (step == len(trails[i]))
                np.testing.assert_allclose(observation, envs.observations[i], atol=1e-3)
                assert rewards[i] == -1
                lengths.append(step)
    assert len(lengths) > 10


def test_every_episode_may_last_200_steps():
    """The first one and those after a reset."""
    envs, ends = CartPoles(3, seed=0), []
    for step in range(1, 403):
        angle, speed = envs.observations[:, 2], envs.observations[:, 3]
        rewards, dones, _ = envs.step((angle + speed > 0).astype(np.int64))  # balances
        if dones.any():
            assert dones.all() and rewards.tolist() == [1, 1, 1]
            assert envs.steps.tolist() == [200, 200, 200]
            ends.append(step)
    assert ends == [200, 401]


def test_environments_start_differently():
    observations = CartPoles(32, seed=0).observations
    assert len({tuple(row) for row in observations}) == 32


# ---- learning -----------------------------------------------------------------


def test_decisions_leave_out_the_reset_steps():
    storage = RolloutStorage(num_steps=3, num_envs=2)
    storage.observations[:] = np.arange(24).reshape(3, 2, 4)
    storage.actions[:] = np.arange(6).reshape(3, 2)
    storage.decided[:] = [[True, False], [True, True], [False, True]]
    returns = 10 * np.arange(6.0).reshape(3, 2)
    observations, actions, kept = storage.decisions(returns, CPU)
    assert actions.tolist() == [0, 2, 3, 5]
    assert kept.tolist() == [0, 20, 30, 50]
    assert observations[:, 0].tolist() == [0, 8, 12, 20]


def test_reset_steps_count_in_no_loss_and_no_timestep(monkeypatch):
    """What reaches the loss is compared with what the environments were really asked."""
    asked, learnt = [], []

    class Spied(CartPoles):
        def step(self, actions):
            observations = self.observations.copy()
            rewards, dones, decided = super().step(actions)
            asked.append((observations[decided], actions[decided]))
            return rewards, dones, decided

    def spied_losses(network, observations, actions, returns):
        learnt.append((observations.numpy().copy(), actions.numpy().copy()))
        assert len(observations) == len(actions) == len(returns)
        return compute_losses(network, observations, actions, returns)

    monkeypatch.setattr(a2c_cartpole, "CartPoles", Spied)
    monkeypatch.setattr(a2c_cartpole, "compute_losses", spied_losses)
    torch.manual_seed(0)
    args = Args(num_envs=8, num_steps=5, total_timesteps=1000)
    _, _, timesteps = learn(args, ActorCritic(32), CPU, NoWriter())
    for part in (0, 1):
        asked_part = np.concatenate([step[part] for step in asked])
        learnt_part = np.concatenate([update[part] for update in learnt])
        assert np.array_equal(asked_part, learnt_part)
    assert timesteps == len(asked_part) < 8 * len(asked)


def test_returns_in_learning_end_where_an_episode_ends(monkeypatch):
    """The returns given to the loss, against brute force on what the environments gave."""
    seen, expected = [], []

    def spied_losses(network, observations, actions, returns):
        seen.append(returns.clone())
        return compute_losses(network, observations, actions, returns)

    def spied_returns(rewards, masks, last_values, gamma):
        table = np.zeros((20, 8), np.float32)
        for t in range(20):
            for i in range(8):
                of_env = rewards[:, i], masks[:, i], last_values[i]
                table[t, i] = brute_force_return(*of_env, gamma, start=t)
        expected.append(table)
        assert (masks == 0).sum() > 3  # several ends in a rollout
        assert np.array_equal(masks == 0, rewards != 0)
        return compute_returns(rewards, masks, last_values, gamma)

    class Spied(RolloutStorage):
        def decisions(self, returns, device):
            expected[-1] = torch.from_numpy(expected[-1][self.decided])
            return super().decisions(returns, device)

    monkeypatch.setattr(a2c_cartpole, "compute_losses", spied_losses)
    monkeypatch.setattr(a2c_cartpole, "compute_returns", spied_returns)
    monkeypatch.setattr(a2c_cartpole, "RolloutStorage", Spied)
    torch.manual_seed(0)
    learn(Args(num_envs=8, num_steps=20, total_timesteps=400), ActorCritic(32), CPU, NoWriter())
    for ours, brute in zip(seen, expected, strict=True):
        torch.testing.assert_close(ours, brute)


class ScriptedPoles:
    """Episodes of given lengths, one list for each environment, without reset steps."""

    def __init__(self, lengths: list[list[int]]):
        self.lengths, self.num_envs = [iter(of_one) for of_one in lengths], len(lengths)
        self.left = np.array([next(of_one) for of_one in self.lengths])
        self.observations = np.zeros((self.num_envs, 4), np.float32)
        self.steps = np.zeros(self.num_envs, np.int64)
        self.dones = np.zeros(self.num_envs, bool)

    def step(self, actions):
        self.steps[self.dones] = 0
        self.steps += 1
        self.left -= 1
        self.dones = self.left == 0
        for i in np.flatnonzero(self.dones):
            self.left[i] = next(self.lengths[i])
        return book_rewards(self.steps, self.dones), self.dones, np.ones(self.num_envs, bool)


def test_solved_when_the_last_episode_of_every_environment_was_a_success(monkeypatch):
    lengths = [[10, 200, 200, 10**6], [150, 100, 196, 10**6]]  # both have one at step 446
    monkeypatch.setattr(a2c_cartpole, "CartPoles", lambda *args: ScriptedPoles(lengths))
    args = Args(num_envs=2, num_steps=5, total_timesteps=10_000)
    solved_episode, episodes, timesteps = learn(args, ActorCritic(32), CPU, NoWriter())
    assert (solved_episode, episodes) == (2, 3)
    assert timesteps == 2 * 450  # the rollout that was under way is finished


def test_not_solved_within_the_timesteps(monkeypatch):
    lengths = [[200, 10**6], [100, 10**6]]
    monkeypatch.setattr(a2c_cartpole, "CartPoles", lambda *args: ScriptedPoles(lengths))
    args = Args(num_envs=2, num_steps=5, total_timesteps=1000)
    assert learn(args, ActorCritic(32), CPU, NoWriter()) == (None, 1, 1000)


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
    monkeypatch.setattr(a2c_cartpole, "join_weights", joined)
    torch.manual_seed(0)
    network = ActorCritic(32)
    args = Args(num_envs=4, total_timesteps=300, average_decay=decay)
    learn(args, network, CPU, NoWriter())
    average = history[0]
    for weights in history[1:]:
        average = decay * average + (1 - decay) * weights
    assert len(history) > 10
    result = nn.utils.parameters_to_vector(network.parameters())
    torch.testing.assert_close(result, average)


def test_one_environment_and_one_step_can_be_nothing_but_a_reset():
    torch.manual_seed(0)
    network = ActorCritic(32)
    _, _, timesteps = learn(
        Args(num_envs=1, num_steps=1, total_timesteps=100), network, CPU, NoWriter()
    )
    assert timesteps == 100
    assert all(parameter.isfinite().all() for parameter in network.parameters())


@pytest.mark.parametrize("max_grad_norm", [1e-3, 1e3])
def test_the_gradient_is_that_of_the_whole_loss_clipped(monkeypatch, max_grad_norm):
    """What reaches Adam, against the gradient of the three losses put together here."""
    expected, steps, adams_step = [], [], torch.optim.Adam.step

    def spied_losses(network, observations, actions, returns):
        value_loss, policy_loss, entropy = compute_losses(network, observations, actions, returns)
        loss = 0.5 * value_loss + policy_loss - 0.01 * entropy
        gradients = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)
        gradient = torch.cat([gradient.flatten() for gradient in gradients])
        expected.append(gradient * min(1.0, max_grad_norm / gradient.norm().item()))
        return value_loss, policy_loss, entropy

    def spied_step(optimizer):
        steps.append(optimizer.param_groups[0]["params"][0].grad.clone())
        return adams_step(optimizer)

    monkeypatch.setattr(a2c_cartpole, "compute_losses", spied_losses)
    monkeypatch.setattr(torch.optim.Adam, "step", spied_step)
    args = Args(num_envs=2, total_timesteps=50, max_grad_norm=max_grad_norm)
    learn(args, ActorCritic(32), CPU, NoWriter())
    for ours, theirs in zip(steps, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-9)


def test_cartpole_is_learnt():
    """Seed 19 needs about 35,000 timesteps."""
    torch.manual_seed(19)
    solved, _, timesteps = learn(Args(seed=19), ActorCritic(32), CPU, NoWriter())
    assert solved is not None and timesteps < 300_000
