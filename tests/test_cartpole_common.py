"""Tests of what the five CartPole scripts promise alike: files, seeds, refusals, weights, film."""

import importlib
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
import tqdm
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
Q_LEARNING = ["dqn_cartpole", "ddqn_cartpole", "dueling_cartpole", "per_cartpole"]
A2C = "a2c_cartpole"
SHORT = {name: {"num_episodes": 6} for name in Q_LEARNING} | {A2C: {"total_timesteps": 4000}}
RESULT = "seed seconds versions solved_episode episodes steps steps_per_second eval_mean eval_std"
TAGS = {"charts/episodic_length", "charts/SPS"}
Q_TAGS = TAGS | {"charts/epsilon", "losses/td_loss", "losses/q_values"}
A2C_TAGS = TAGS | {"losses/value_loss", "losses/policy_loss", "losses/entropy"}

each_script = pytest.mark.parametrize("name", [*Q_LEARNING, A2C])


def flags(**values) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


@pytest.fixture(autouse=True)
def threads():
    """The scripts set PyTorch's number of threads; the other tests shall not notice."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_film(monkeypatch):
    """Leaves the film out, where it is not what is tested."""
    for name in [*Q_LEARNING, A2C]:
        monkeypatch.setattr(importlib.import_module(name), "film", lambda *args: None)


def short_args(name: str, runs_dir: Path, **values):
    script = importlib.import_module(name)
    common = {"runs_dir": runs_dir, "eval_episodes": 2, "device": "cpu"}
    return script.Args(**common | SHORT[name] | values)


def main_in_process(name: str, monkeypatch, *arguments: str) -> SystemExit:
    """Runs the script as its own main program and returns the exit it must end with."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
    return caught.value


@each_script
def test_every_layer_learns(name, tmp_path, no_film):
    script = importlib.import_module(name)
    torch.manual_seed(0)
    network = script.ActorCritic(32) if name == A2C else script.QNetwork(32, True)
    script.train(short_args(name, tmp_path))  # with the same seed
    (path,) = tmp_path.glob("*/weight_end.pth")
    for layer, weights in torch.load(path).items():
        assert not torch.equal(weights, network.state_dict()[layer]), layer


@each_script
def test_a_loss_that_is_not_finite_ends_the_run_in_one_line(name, tmp_path, no_film):
    script = importlib.import_module(name)
    with pytest.raises(script.UserError, match="the loss is not finite"):
        script.train(short_args(name, tmp_path, learning_rate=1e30))


@each_script
def test_a_copy_runs_alone_as_a_user_would(name, tmp_path):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    command = [sys.executable, f"{name}.py", *flags(seed=3, eval_episodes=3, **SHORT[name])]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.py", "runs"}
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(rf"{name}__3__[\d-]+", run_dir.name)
    events = [path.name for path in run_dir.iterdir() if "tfevents" in path.name]
    assert len(events) == 1
    files = {"args.json", "result.json", "weight_end.pth", "film.mp4"}
    assert {path.name for path in run_dir.iterdir()} == files | set(events)

    lines = done.stdout.splitlines()
    network = "ActorCritic(" if name == A2C else "QNetwork("
    assert lines[0] == network
    first_episode = next(line for line in lines if line.startswith("episode"))
    assert re.fullmatch(r"episode 0: \d+ steps, mean of 10 [\d.]+", first_episode)
    assert any(line.startswith("Not solved") for line in lines)
    assert lines[-1] == f"Everything is in {Path('runs') / run_dir.name}"

    result = json.loads((run_dir / "result.json").read_text())
    assert list(result) == RESULT.split()
    assert result["seed"] == 3 and result["solved_episode"] is None
    assert result["steps_per_second"] == pytest.approx(result["steps"] / result["seconds"])
    assert json.loads((run_dir / "args.json").read_text())["eval_episodes"] == 3

    scalars = EventAccumulator(str(run_dir)).Reload()
    assert set(scalars.Tags()["scalars"]) == (A2C_TAGS if name == A2C else Q_TAGS)
    lengths = [event.value for event in scalars.Scalars("charts/episodic_length")]
    assert len(lengths) == result["episodes"]
    if name != A2C:  # A2C counts the episodes of environment 0, and the steps of all
        assert sum(lengths) == result["steps"]

    with imageio.get_reader(run_dir / "film.mp4") as film:
        assert film.get_meta_data()["fps"] == 50
        assert film.get_meta_data()["size"] == (600, 400)
        num_frames = sum(1 for _ in film)
    assert 8 <= num_frames <= 200


@each_script
def test_the_film_shows_the_first_episode_of_the_evaluation(name, tmp_path):
    script = importlib.import_module(name)
    args = short_args(name, tmp_path, eval_only=True, eval_episodes=1)
    network = build(script, args)
    (steps,) = script.evaluate(network, args, torch.device("cpu"))
    script.film(network, tmp_path / "film.mp4", args, torch.device("cpu"))
    with imageio.get_reader(tmp_path / "film.mp4") as film:
        assert sum(1 for _ in film) == steps


def build(script, args) -> torch.nn.Module:
    """A network whose greedy policy is not always the same action."""
    torch.manual_seed(5)
    if hasattr(script, "ActorCritic"):
        return script.ActorCritic(args.hidden_size)
    return script.QNetwork(args.hidden_size, zero_init=False)


def run_once(name: str, runs_dir: Path, **values) -> tuple[dict, dict]:
    script = importlib.import_module(name)
    result = script.train(short_args(name, runs_dir, **values))
    (run_dir,) = runs_dir.iterdir()
    weights = torch.load(run_dir / "weight_end.pth", weights_only=True)
    timeless = {f.name: getattr(result, f.name) for f in fields(result) if "second" not in f.name}
    return timeless, weights


@each_script
def test_same_seed_same_result_to_the_bit(name, tmp_path, no_film):
    extra = {"uniform_episodes": 3} if name == "per_cartpole" else {}
    first, first_weights = run_once(name, tmp_path / "first", seed=4, **extra)
    np.random.seed(1)  # whatever state the global generators are in
    torch.manual_seed(1)
    second, second_weights = run_once(name, tmp_path / "second", seed=4, **extra)
    other, other_weights = run_once(name, tmp_path / "other", seed=5, **extra)
    assert first == second
    assert all(torch.equal(first_weights[key], second_weights[key]) for key in first_weights)
    assert any(not torch.equal(first_weights[key], other_weights[key]) for key in first_weights)


BAD = {
    "seed": [-1, 2**32],
    "learning_rate": [0.0, -1e-4, math.nan, math.inf],
    "gamma": [-0.1, 1.1, math.nan],
    "hidden_size": [0, 10**6],
    "average_decay": [-0.1, 1.0, math.nan],
    "eval_episodes": [0],
}
BAD_Q = BAD | {"num_episodes": [0, -5], "batch_size": [0, 10_001], "memory_size": [0, 10**12]}
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
def test_bad_values_are_refused_and_nothing_is_written(name, tmp_path):
    script = importlib.import_module(name)
    for field, values in BAD_MORE[name].items():
        for value in values:
            with pytest.raises(script.UserError) as caught:
                script.train(short_args(name, tmp_path / "runs", **{field: value}))
            assert f"--{field.replace('_', '-')} must be" in str(caught.value)
            assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@each_script
def test_a_refusal_is_one_line_and_a_failing_exit(name, tmp_path, monkeypatch):
    runs = f"--runs-dir={tmp_path / 'runs'}"
    error = main_in_process(name, monkeypatch, runs, "--gamma=2")
    assert error.code == "error: --gamma must be from 0 to 1, not 2.0"
    error = main_in_process(name, monkeypatch, runs, "--eval-only")
    assert error.code == "error: --eval-only needs --weights"
    if not torch.cuda.is_available():
        error = main_in_process(name, monkeypatch, runs, "--device=cuda")
        assert error.code == "error: --device cuda: PyTorch finds no CUDA device here"
    assert main_in_process(name, monkeypatch, runs, "--gamma=much").code == 2  # from tyro
    assert list(tmp_path.iterdir()) == []


@each_script
def test_a_runs_dir_that_cannot_be_made_is_one_line(name, tmp_path):
    script = importlib.import_module(name)
    (tmp_path / "file").touch()
    with pytest.raises(script.UserError, match="cannot write to .*file"):
        script.train(short_args(name, tmp_path / "file" / "runs"))


class Boom:
    """Pickles as a call that would make a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@each_script
def test_weights_that_are_not_ours_are_refused(name, tmp_path):
    script = importlib.import_module(name)
    good, bad = tmp_path / "good.pth", tmp_path / "bad.pth"
    network = build(script, script.Args())
    torch.save(network.state_dict(), good)

    def refuse():
        args = short_args(name, tmp_path / "runs", weights=bad, eval_only=True)
        with pytest.raises(script.UserError) as caught:
            script.train(args)
        assert str(bad) in str(caught.value) and "\n" not in str(caught.value)

    refuse()  # missing
    for content in (b"", b"noise" * 100, good.read_bytes()[:1000]):
        bad.write_bytes(content)
        refuse()
    narrower = build(script, script.Args(hidden_size=8)).state_dict()
    for foreign in ({}, [1, 2], torch.zeros(3), narrower):
        torch.save(foreign, bad)
        refuse()
    torch.save(Boom(tmp_path / "boom"), bad)
    refuse()
    assert {path.name for path in tmp_path.iterdir()} == {"good.pth", "bad.pth"}


@each_script
def test_eval_only_evaluates_the_given_weights_and_learns_nothing(name, tmp_path, no_film):
    script = importlib.import_module(name)
    args = short_args(name, tmp_path / "runs", eval_only=True, eval_episodes=5)
    network = build(script, args)
    args.weights = tmp_path / "weights.pth"
    torch.save(network.state_dict(), args.weights)
    result = script.train(args)
    assert (result.solved_episode, result.episodes, result.steps) == (None, 0, 0)
    expected = script.evaluate(network, args, torch.device("cpu"))
    assert result.eval_mean == np.mean(expected) and result.eval_std == np.std(expected)
    (run_dir,) = args.runs_dir.iterdir()
    saved = torch.load(run_dir / "weight_end.pth", weights_only=True)
    assert all(torch.equal(saved[key], value) for key, value in network.state_dict().items())


@each_script
def test_training_starts_from_the_given_weights(name, tmp_path, no_film):
    script = importlib.import_module(name)
    args = short_args(name, tmp_path / "runs", learning_rate=1e-30)  # hardly moves
    network = build(script, args)
    args.weights = tmp_path / "weights.pth"
    torch.save(network.state_dict(), args.weights)
    script.train(args)
    (run_dir,) = args.runs_dir.iterdir()
    saved = torch.load(run_dir / "weight_end.pth", weights_only=True)
    for key, value in network.state_dict().items():
        torch.testing.assert_close(saved[key], value)


@each_script
def test_ctrl_c_saves_the_weights_and_exits_with_130(name, tmp_path, monkeypatch, capsys):
    write = tqdm.tqdm.write

    def write_until_episode_2(line):
        if line.startswith("episode 2"):
            raise KeyboardInterrupt
        write(line)

    monkeypatch.setattr(tqdm.tqdm, "write", write_until_episode_2)
    assert main_in_process(name, monkeypatch, f"--runs-dir={tmp_path}").code == 130
    (run_dir,) = tmp_path.iterdir()
    assert torch.load(run_dir / "weight_end.pth", weights_only=True)
    assert not (run_dir / "result.json").exists()
    output = capsys.readouterr()
    assert f"The weights are in {run_dir}" in output.out
    assert output.err.splitlines()[-1] == "Interrupted."


@each_script
def test_an_evaluation_episode_has_200_steps_at_most(name):
    script = importlib.import_module(name)
    args = script.Args(eval_episodes=3)

    def balancing(network, observation, device):
        return int(observation[2] + observation[3] > 0)  # push towards the side it falls to

    original, script.greedy_action = script.greedy_action, balancing
    try:
        assert script.evaluate(None, args, None) == [200, 200, 200]
    finally:
        script.greedy_action = original


@each_script
def test_importing_a_script_does_nothing_else(name, monkeypatch):
    threads = torch.get_num_threads()
    state = torch.get_rng_state()
    module = runpy.run_path(str(ROOT / f"{name}.py"), run_name="imported")
    assert "train" in module
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
