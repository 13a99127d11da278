"""The defaults are those with which the published results were made, and the book's where kept."""

import importlib

import pytest

Q_LEARNING = dict(num_episodes=500, eval_episodes=100, memory_size=10_000, batch_size=32,
                  hidden_size=32, learning_rate=1e-4, gamma=0.99, epsilon=0.5, zero_init=True,
                  average_decay=0.998, weights=None, seed=0)  # fmt: skip
DEFAULTS = {
    "mnist": dict(epochs=3, learning_rate=0.01, anneal_lr=True, batch_size=64, hidden_size=100,
                  image_index=2020, seed=0),
    "dqn_cartpole": Q_LEARNING,
    "ddqn_cartpole": Q_LEARNING | dict(target_interval=2),
    "dueling_cartpole": Q_LEARNING | dict(target_interval=2),
    "per_cartpole": Q_LEARNING | dict(target_interval=2, uniform_episodes=30, alpha=0.6, beta=0.4),
    "a2c_cartpole": dict(num_envs=32, num_steps=5, total_timesteps=5_120_000, eval_episodes=100,
                         hidden_size=32, learning_rate=0.01, gamma=0.99, value_loss_coef=0.5,
                         entropy_coef=0.01, max_grad_norm=0.5, average_decay=0.975, weights=None,
                         seed=0),
    "a2c_breakout": dict(env_id="BreakoutNoFrameskip-v4", num_envs=16, num_steps=5,
                         total_timesteps=10_000_000, learning_rate=7e-4, anneal_lr=True,
                         rmsprop_eps=1e-5, gamma=0.99, clip_rewards=True, max_idle_steps=400,
                         sticky_actions=0, value_loss_coef=0.25, entropy_coef=0.01,
                         max_grad_norm=0.5, average_decay=0.99, resume=None,
                         checkpoint_every=2000, seed=1),
    "play_breakout": dict(random=False, target_score=400, max_attempts=100, full_games=None,
                          greedy=False, gif=False, env_id="BreakoutNoFrameskip-v4",
                          sticky_actions=0, seed=10_000),
}  # fmt: skip
PLACES = {"runs_dir", "data_dir"}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults(name):
    args = vars(importlib.import_module(name).Args())
    if name == "play_breakout":
        del args["weights"]  # test_pretrained.py looks at them
    expected = DEFAULTS[name] | {"device": "auto"}
    assert {flag: value for flag, value in args.items() if flag not in PLACES} == expected
