"""Tests of what the five CartPole scripts promise alike: curves, seeds, evaluation, weights, film.

test_diff.py holds the ends of the files together, so that one script can be tested for all there.
"""

import importlib
import io
import json
from pathlib import Path
from unittest.mock import patch

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from short_runs import A2C, CARTPOLE, Q_LEARNING, SHORT, Bomb, curves

RESULT = "seed seconds versions solved_episode episodes steps steps_per_second eval_mean eval_std"
TAGS = {"charts/episode", "charts/episodic_length", "charts/SPS"}
Q_TAGS = TAGS | {"charts/epsilon", "losses/td_loss", "losses/q_values"}
A2C_TAGS = TAGS | {"losses/value_loss", "losses/policy_loss", "losses/entropy"}

each_script = pytest.mark.parametrize("name", CARTPOLE)
of_both_kinds = pytest.mark.parametrize("name", ["dueling_cartpole", A2C])


def run_once(name: str, runs_dir: Path, film=False, **values) -> tuple[dict, dict, Path]:
    """A short run; returns its result without the times, its weights and its folder."""
    script = importlib.import_module(name)
    with patch.object(script, "film", script.film if film else lambda *_: b""):
        result = script.train(script.Args(runs_dir=runs_dir, **SHORT[name] | values))
    [run_dir] = runs_dir.iterdir()
    weights = torch.load(run_dir / "weight_end.pth", weights_only=True)
    return {k: v for k, v in result.items() if "second" not in k}, weights, run_dir


def equal(first: dict, second: dict) -> list[bool]:
    """Of each layer, whether two state dicts have the same weights to the bit."""
    return [torch.equal(first[key], second[key]) for key in first]


# ---- a run -------------------------------------------------------------------------------------


@each_script
def test_result_and_curves_count_environment_steps(name, finished):
    run_dir, _ = finished(name)
    result = json.loads((run_dir / "result.json").read_text())
    assert list(result) == RESULT.split() and result["solved_episode"] is None
    shown = curves(run_dir)
    assert set(shown) == (A2C_TAGS if name == A2C else Q_TAGS)
    ends, lengths = zip(*shown["charts/episodic_length"])
    assert shown["charts/episode"] == [*zip(ends, range(result["episodes"]), strict=True)]
    assert 0.1 < shown["charts/SPS"][-1][1] / result["steps_per_second"] < 10
    if name == A2C:  # the steps of 32 environments, of which one's episodes are counted
        assert 3000 < ends[-1] <= result["steps"] <= 4000
    else:
        assert list(ends) == np.cumsum(lengths).tolist() and ends[-1] == result["steps"]
        assert all({step for step, _ in curve} <= set(ends) for curve in shown.values())


@each_script
def test_same_seed_same_result_to_the_bit(name, finished, tmp_path):
    run_dir, _ = finished(name)
    result = json.loads((run_dir / "result.json").read_text())
    weights = torch.load(run_dir / "weight_end.pth", weights_only=True)
    np.random.seed(1)  # whatever state the global generators are in
    torch.manual_seed(1)
    again, same, _ = run_once(name, tmp_path / "again", seed=np.int64(3))
    _, other, _ = run_once(name, tmp_path / "other", seed=4)
    assert again == {key: result[key] for key in again}
    assert all(equal(weights, same)) and not all(equal(weights, other))


@each_script
def test_each_seed_starts_with_other_weights(name, tmp_path):
    still = {"learning_rate": 1e-30} | ({} if name == A2C else {"zero_init": False})
    _, one, _ = run_once(name, tmp_path / "one", **still, seed=1)
    _, two, _ = run_once(name, tmp_path / "two", **still, seed=2)
    assert not any(torch.allclose(one[layer], two[layer]) for layer in one)


@pytest.mark.parametrize("name", ["dqn_cartpole", "dueling_cartpole"])
def test_zero_init_starts_all_values_at_zero(name):
    QNetwork, inputs = importlib.import_module(name).QNetwork, torch.randn(5, 4)
    assert torch.equal(QNetwork(32, zero_init=True)(inputs), torch.zeros(5, 2))
    assert QNetwork(32, zero_init=False)(inputs).abs().min() > 0


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in Q_LEARNING]


@pytest.mark.parametrize("name", [*SLOW, A2C])
def test_the_default_flags_solve_the_task(name, tmp_path):
    script = importlib.import_module(name)
    seed = 7 if name == A2C else 3  # soon solved, on several processors
    result = script.train(script.Args(runs_dir=tmp_path, seed=seed))
    assert result["solved_episode"] is not None and result["eval_mean"] > 150


@pytest.mark.parametrize("name", Q_LEARNING)
def test_agent_environment_and_evaluation_have_streams_of_their_own(name, tmp_path, monkeypatch):
    """gymnasium makes its generator of a seed as default_rng does."""
    seeds, default_rng, reset = [], np.random.default_rng, CartPoleEnv.reset

    def spied_reset(env, *, seed=None, options=None):
        seeds.extend([seed] * (seed is not None))
        return reset(env, seed=seed, options=options)

    spied = lambda seed: seeds.append(seed) or default_rng(seed)  # noqa: E731
    monkeypatch.setattr(np.random, "default_rng", spied)
    monkeypatch.setattr(CartPoleEnv, "reset", spied_reset)
    run_once(name, tmp_path, num_episodes=1)
    assert len({default_rng(seed).random() for seed in seeds}) == len(seeds) == 3


# ---- evaluation --------------------------------------------------------------------------------


@of_both_kinds
def test_the_average_is_what_is_saved_and_evaluated_and_can_be_given(name, tmp_path, pretend_a_gpu):
    script = importlib.import_module(name)
    pretend_a_gpu(script)  # --device cpu does not ask
    ours = {"eval_episodes": 9, "seed": 7}
    _, begin, _ = run_once(name, tmp_path / "still", learning_rate=1e-30, **ours)
    values = {"learning_rate": 0.01, "average_decay": 1 - 1e-9} | ours
    result, kept, run_dir = run_once(name, tmp_path / "learning", **values)
    for layer in begin:
        torch.testing.assert_close(kept[layer], begin[layer])

    given = {"weights": str(run_dir / "weight_end.pth")} | ours
    again, same, run_dir = run_once(name, tmp_path / "given", film=True, **given)
    untrained = {"solved_episode": None, "episodes": 0, "steps": 0}
    assert again == result | untrained and all(equal(same, kept))

    network = script.ActorCritic(32) if name == A2C else script.QNetwork(32, True)
    network.load_state_dict(kept)
    lengths = script.evaluate(network, script.make_env(), seed=7, num_episodes=9)
    assert len(set(lengths)) > 1
    assert result["eval_mean"] == pytest.approx(np.mean(lengths))
    assert result["eval_std"] == pytest.approx(np.std(lengths))
    with imageio.get_reader(run_dir / "film.mp4") as film:  # it shows the first episode
        assert (film.get_meta_data()["fps"], film.get_meta_data()["size"]) == (50, (600, 400))
        assert sum(1 for _ in film) == 1 + lengths[0]


class Balancing:
    def greedy_action(self, state):
        return int(state[2] + state[3] > 0)  # push towards the side it falls to


def test_evaluations_share_no_episode_with_other_seeds_or_training(tmp_path, monkeypatch):
    script, starts, reset = importlib.import_module("dqn_cartpole"), set(), CartPoleEnv.reset

    def spied(self, *, seed=None, options=None):
        state, info = reset(self, seed=seed, options=options)
        starts.add(tuple(state))
        return state, info

    monkeypatch.setattr(CartPoleEnv, "reset", spied)
    for seed in (0, 1, 2**32 - 1):
        script.evaluate(Balancing(), script.make_env(), seed, num_episodes=9)
    assert len(starts) == 3 * 10  # one more to set the seed
    run_once("dqn_cartpole", tmp_path, seed=1)  # 7 in training, none anew in the evaluation
    assert len(starts) == 30 + 7


@of_both_kinds
def test_an_evaluation_episode_has_200_steps_at_most(name):
    script = importlib.import_module(name)
    assert script.evaluate(Balancing(), script.make_env(), 0, num_episodes=3) == [200] * 3


# ---- weights that are not ours -----------------------------------------------------------------


@of_both_kinds
def test_weights_that_are_not_ours_are_refused_with_the_reason(name, finished, tmp_path):
    good = (finished(name)[0] / "weight_end.pth").read_bytes()
    weights = torch.load(io.BytesIO(good), weights_only=True)
    script, bad, runs = importlib.import_module(name), tmp_path / "bad.pth", tmp_path / "runs"
    narrower = script.ActorCritic(8) if name == A2C else script.QNetwork(8, True)

    def refuse(reason):
        with pytest.raises(ValueError, match=f"--weights: {bad} {reason}") as caught:
            run_once(name, runs, weights=bad)
        assert "\n" not in (message := str(caught.value))
        assert "weights_only" not in message  # PyTorch's advice how to load it all the same

    for content in (b"", b"noise" * 100, good[:1000]):
        bad.write_bytes(content)
        refuse("is damaged")
    for foreign in ([1, 2], torch.zeros(3), {"fc1": 1}, Bomb(), narrower):
        torch.save(foreign, bad)
        refuse("is damaged")
    torch.save({layer: weight / 0 for layer, weight in weights.items()}, bad)
    refuse("holds weights that are not finite")
    torch.save(narrower.state_dict(), bad)
    refuse(r"is .* of another network. size mismatch for fc1.weight.*8, 4.*32, 4")
    with pytest.raises(OSError):
        run_once(name, runs, weights="/proc/self/mem")  # not damaged: it cannot be read
    assert not runs.exists() and not Path("bomb").exists()
