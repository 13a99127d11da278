"""Tests of what the five CartPole scripts promise alike: files, seeds, refusals, weights, film."""

import importlib
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
import tqdm
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
Q_LEARNING = ["dqn_cartpole", "ddqn_cartpole", "dueling_cartpole", "per_cartpole"]
A2C = "a2c_cartpole"
SHORT = {name: {"num_episodes": 6} for name in Q_LEARNING} | {A2C: {"total_timesteps": 4000}}
SHORT["per_cartpole"]["uniform_episodes"] = 3
RESULT = "seed seconds versions solved_episode episodes steps steps_per_second eval_mean eval_std"
TAGS = {"charts/episodic_length", "charts/SPS"}
Q_TAGS = TAGS | {"charts/epsilon", "losses/td_loss", "losses/q_values"}
A2C_TAGS = TAGS | {"losses/value_loss", "losses/policy_loss", "losses/entropy"}

each_script = pytest.mark.parametrize("name", [*Q_LEARNING, A2C])


@pytest.fixture(autouse=True)
def threads():
    """The scripts set PyTorch's number of threads; the other tests shall not notice."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def short_args(name: str, runs_dir: Path, **values):
    common = {"runs_dir": runs_dir, "eval_episodes": 2, "device": "cpu"}
    return importlib.import_module(name).Args(**common | SHORT[name] | values)


def run_once(name: str, runs_dir: Path, **values) -> tuple[dict, dict, Path]:
    """A short run; returns its result without the times, its weights and its folder."""
    result = importlib.import_module(name).train(short_args(name, runs_dir, **values))
    [run_dir] = runs_dir.iterdir()
    assert json.loads((run_dir / "result.json").read_text()) == result
    weights = torch.load(run_dir / "weight_end.pth", weights_only=True)
    return {k: v for k, v in result.items() if "second" not in k}, weights, run_dir


def equal(first: dict, second: dict) -> list[bool]:
    """Of each layer, whether two state dicts have the same weights to the bit."""
    return [torch.equal(first[key], second[key]) for key in first]


def main_in_process(name: str, monkeypatch, *arguments: str) -> SystemExit:
    """Runs the script as its own main program and returns the exit it must end with."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
    return caught.value


# ---- a run -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", Q_LEARNING[1:])  # that of dqn_cartpole.py takes twice as long
def test_a_run_of_the_default_flags_solves_the_task(name, tmp_path):
    script = importlib.import_module(name)
    result = script.train(script.Args(runs_dir=tmp_path))
    assert result["solved_episode"] < 500 and result["eval_mean"] > 150


@each_script
def test_a_copy_runs_alone_as_a_user_would(name, tmp_path):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    values = {"seed": 3, "eval_episodes": 3} | SHORT[name]
    flags = [f"--{field.replace('_', '-')}={value}" for field, value in values.items()]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, f"{name}.py", *flags], cwd=tmp_path, env=environment,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr

    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.py", "runs"}
    [run_dir] = (tmp_path / "runs").iterdir()
    assert re.fullmatch(rf"{name}__3__[\d-]+", run_dir.name)
    [events] = [path.name for path in run_dir.iterdir() if "tfevents" in path.name]
    files = {"args.json", "result.json", "weight_end.pth", "film.mp4", events}
    assert {path.name for path in run_dir.iterdir()} == files

    lines = done.stdout.splitlines()
    assert lines[0] == ("ActorCritic(" if name == A2C else "QNetwork(")
    first_episode = next(line for line in lines if line.startswith("episode"))
    assert re.fullmatch(r"episode 0: \d+ steps, mean of 10 [\d.]+", first_episode)
    assert any(line.startswith("Not solved") for line in lines)
    assert lines[-1].endswith(f"Everything is in {Path('runs') / run_dir.name}")

    result = json.loads((run_dir / "result.json").read_text())
    assert list(result) == RESULT.split()
    assert set(result["versions"]) == {"python", "torch", "gymnasium", "numpy"}
    assert result["seed"] == 3 and result["solved_episode"] is None
    assert result["steps_per_second"] == pytest.approx(result["steps"] / result["seconds"])
    assert json.loads((run_dir / "args.json").read_text())["eval_episodes"] == 3

    scalars = EventAccumulator(str(run_dir)).Reload()
    assert set(scalars.Tags()["scalars"]) == (A2C_TAGS if name == A2C else Q_TAGS)
    lengths = [event.value for event in scalars.Scalars("charts/episodic_length")]
    assert len(lengths) == result["episodes"]
    if name != A2C:  # A2C counts the episodes of environment 0, and the steps of all
        assert sum(lengths) == result["steps"]


@each_script
def test_same_seed_same_result_to_the_bit(name, tmp_path):
    first, first_weights, _ = run_once(name, tmp_path / "first", seed=4)
    np.random.seed(1)  # whatever state the global generators are in
    torch.manual_seed(1)
    second, second_weights, _ = run_once(name, tmp_path / "second", seed=4)
    _, other_weights, _ = run_once(name, tmp_path / "other", seed=5)
    assert first == second
    assert all(equal(first_weights, second_weights))
    assert not all(equal(first_weights, other_weights))


@each_script
def test_every_layer_learns(name, tmp_path):
    _, start, _ = run_once(name, tmp_path / "still", learning_rate=1e-30)  # hardly moves
    _, end, _ = run_once(name, tmp_path / "learning")
    assert not any(equal(start, end))


@each_script
def test_another_seed_starts_from_other_weights(name, tmp_path):
    flags = {"learning_rate": 1e-30} | ({} if name == A2C else {"zero_init": False})
    _, one, _ = run_once(name, tmp_path / "one", seed=1, **flags)
    _, two, _ = run_once(name, tmp_path / "two", seed=2, **flags)
    assert not any(torch.allclose(one[layer], two[layer]) for layer in one)


@each_script
def test_the_average_is_what_is_saved_and_evaluated(name, tmp_path):
    _, start, _ = run_once(name, tmp_path / "still", learning_rate=1e-30)
    values = {"learning_rate": 0.01, "average_decay": 1 - 1e-9, "eval_episodes": 20}
    result, kept, run_dir = run_once(name, tmp_path / "learning", **values)
    for layer in start:
        torch.testing.assert_close(kept[layer], start[layer])
    given = {"weights": run_dir / "weight_end.pth", "eval_episodes": 20}
    again, _, _ = run_once(name, tmp_path / "again", **given)
    assert result["eval_mean"] == again["eval_mean"] and result["eval_std"] == again["eval_std"]


@each_script
def test_ctrl_c_saves_what_was_learnt_and_exits_with_130(name, tmp_path, monkeypatch, capsys):
    write = tqdm.tqdm.write

    def press_ctrl_c_in_episode_2(line):
        write(line)
        if line.startswith("episode 2:"):
            raise KeyboardInterrupt

    monkeypatch.setattr(tqdm.tqdm, "write", press_ctrl_c_in_episode_2)
    runs = [f"--runs-dir={tmp_path}", "--device=cpu"]
    assert main_in_process(name, monkeypatch, *runs).code == 130
    [run_dir] = tmp_path.iterdir()
    assert str(run_dir) in capsys.readouterr().out
    assert not (run_dir / "result.json").exists()
    weights = run_dir / "weight_end.pth"
    importlib.import_module(name).train(short_args(name, tmp_path / "again", weights=weights))


@each_script
def test_a_loss_that_is_not_finite_ends_the_run(name, tmp_path, monkeypatch):
    flags = ["--learning-rate=1e30", "--device=cpu", f"--runs-dir={tmp_path}"]
    code = main_in_process(name, monkeypatch, *flags).code
    assert re.fullmatch("error: .*not finite.*", code)


# ---- evaluation --------------------------------------------------------------------------------


@each_script
def test_given_weights_are_evaluated_and_filmed_and_not_trained(name, tmp_path, pretend_a_gpu):
    pretend_a_gpu(importlib.import_module(name))  # --device cpu does not ask
    _, weights, run_dir = run_once(name, tmp_path / "training", average_decay=0)
    given = {"weights": run_dir / "weight_end.pth"}
    result, same, run_dir = run_once(name, tmp_path / "one", eval_episodes=1, **given)
    assert (result["solved_episode"], result["episodes"], result["steps"]) == (None, 0, 0)
    assert all(equal(weights, same))
    _, _, longer = run_once(name, tmp_path / "four", eval_episodes=4, **given)
    for path in (run_dir / "film.mp4", longer / "film.mp4"):  # both show the first episode
        with imageio.get_reader(path) as film:
            assert film.get_meta_data()["fps"] == 50
            assert film.get_meta_data()["size"] == (600, 400)
            assert sum(1 for _ in film) == result["eval_mean"]


@each_script
def test_evaluations_share_no_episode_with_other_seeds_or_training(name, tmp_path, monkeypatch):
    starts, reset = [], CartPoleEnv.reset

    def spied(self, *, seed=None, options=None):
        state, info = reset(self, seed=seed, options=options)
        starts.append(tuple(state.tolist()))
        return state, info

    monkeypatch.setattr(CartPoleEnv, "reset", spied)
    _, _, run_dir = run_once(name, tmp_path / "training", seed=1)
    seen = set() if name == A2C else set(starts[:6])  # of the training (A2C's come from elsewhere)
    given = {"weights": run_dir / "weight_end.pth", "eval_episodes": 30}
    for seed in (0, 1, 2**32 - 1):
        starts.clear()
        run_once(name, tmp_path / str(seed), seed=seed, **given)
        assert len(set(starts)) >= 30 and seen.isdisjoint(starts)
        seen |= set(starts)


@pytest.mark.parametrize("name", Q_LEARNING)
def test_an_evaluation_episode_has_200_steps_at_most(name, tmp_path):
    class Balancing:
        def greedy_action(self, state):
            return int(state[2] + state[3] > 0)  # push towards the side it falls to

    script = importlib.import_module(name)
    expected = {"eval_mean": 200, "eval_std": 0}
    args = script.Args(eval_episodes=3)
    assert script.evaluate(Balancing(), args, tmp_path / "film.mp4") == expected


# ---- refusals ----------------------------------------------------------------------------------


BAD = {
    "seed": [-1, 2**32],
    "learning_rate": [0.0, -1e-4, math.nan, math.inf],
    "gamma": [-0.1, 1.1, math.nan],
    "hidden_size": [0, 10**6],
    "average_decay": [-0.1, 1.0, math.nan],
    "eval_episodes": [0],
    "weights": [Path("missing.pth"), Path(".")],
}
BAD_Q = BAD | {"num_episodes": [0, -5], "batch_size": [0, 10_001], "memory_size": [0, 10**12]}
BAD_Q["epsilon"] = [-0.1, 1.1, math.nan]
BAD_MORE = {
    "dqn_cartpole": BAD_Q,
    "ddqn_cartpole": BAD_Q | {"target_interval": [0]},
    "dueling_cartpole": BAD_Q | {"target_interval": [0]},
    "per_cartpole": BAD_Q
    | {"uniform_episodes": [-1], "alpha": [-0.1, 1.1, math.nan], "beta": [-0.1, 1.1, math.nan]},
    A2C: BAD
    | {"num_envs": [0, 10**9], "num_steps": [0, 10**9], "total_timesteps": [0]}
    | {"value_loss_coef": [-1.0, math.nan], "entropy_coef": [-1.0, math.nan, math.inf]}
    | {"max_grad_norm": [0.0, math.nan]},
}


@each_script
def test_bad_values_are_refused_in_one_line_that_names_the_flag(name):
    script = importlib.import_module(name)
    for field, values in BAD_MORE[name].items():
        for value in values:
            with pytest.raises(ValueError) as caught:
                script.Args(**{field: value})
            assert f"--{field.replace('_', '-')}" in str(caught.value), value
            assert "\n" not in str(caught.value)


@each_script
def test_a_refusal_is_a_failing_exit_and_nothing_is_written(name, tmp_path, monkeypatch, capsys):
    refused = ["--gamma=2", "--weights=missing.pth", "--gamma=much"]
    refused += [] if torch.cuda.is_available() else ["--device=cuda"]
    for flag in refused:
        assert main_in_process(name, monkeypatch, f"--runs-dir={tmp_path / 'runs'}", flag).code == 2
        output = capsys.readouterr()
        assert flag.split("=")[0] in output.out + output.err
        assert "Traceback" not in output.out + output.err
    assert list(tmp_path.iterdir()) == []


@each_script
def test_a_runs_dir_that_cannot_be_made_is_one_line(name, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    flags = [f"--runs-dir={tmp_path / 'file' / 'runs'}", "--device=cpu"]
    assert re.fullmatch("error: .*file/runs.*", main_in_process(name, monkeypatch, *flags).code)


class Boom:
    """Pickles as a call that would make a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@each_script
def test_weights_that_are_not_ours_are_refused(name, tmp_path):
    script = importlib.import_module(name)
    _, weights, run_dir = run_once(name, tmp_path / "training")
    _, narrower, _ = run_once(name, tmp_path / "narrower", hidden_size=8)
    bad, runs = tmp_path / "bad.pth", tmp_path / "runs"

    def refuse():
        with pytest.raises(ValueError) as caught:
            script.train(short_args(name, runs, weights=bad))
        assert str(bad) in str(caught.value) and "\n" not in str(caught.value)

    for content in (b"", b"noise" * 100, (run_dir / "weight_end.pth").read_bytes()[:1000]):
        bad.write_bytes(content)
        refuse()
    for foreign in ({}, [1, 2], torch.zeros(3), narrower, Boom(tmp_path / "boom")):
        torch.save(foreign, bad)
        refuse()
    assert not runs.exists() and not (tmp_path / "boom").exists()
    torch.save(weights, bad)
    script.train(short_args(name, runs, weights=bad))  # now it is good


@pytest.mark.parametrize("name", [*Q_LEARNING, A2C, "mnist", "a2c_breakout", "play_breakout"])
def test_importing_a_script_does_nothing_else(name):
    def settings():
        handlers = (signal.getsignal(signal.SIGINT), threading.excepthook)
        return torch.get_num_threads(), torch.get_rng_state().tolist(), handlers

    before = settings()
    module = runpy.run_path(str(ROOT / f"{name}.py"), run_name="imported")
    assert "Args" in module and settings() == before
