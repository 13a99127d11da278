"""Tests of what the five CartPole scripts promise alike: files, seeds, refusals, weights, film.

test_diff.py holds the ends of the files together, so that one script can be tested for all there.
"""

import importlib
import json
import math
import os
import re
import runpy
import signal
import threading
from pathlib import Path
from resource import RLIMIT_FSIZE
from unittest.mock import patch

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from imageio_ffmpeg import get_ffmpeg_exe
from launch import Process
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
Q_LEARNING = ["dqn_cartpole", "ddqn_cartpole", "dueling_cartpole", "per_cartpole"]
A2C = "a2c_cartpole"
SHORT = {name: {"num_episodes": 6} for name in Q_LEARNING} | {A2C: {"total_timesteps": 4000}}
SHORT["per_cartpole"]["uniform_episodes"] = 3
SHORT = {name: {"seed": 3, "eval_episodes": 3} | values for name, values in SHORT.items()}
RESULT = "seed seconds versions solved_episode episodes steps steps_per_second eval_mean eval_std"
TAGS = {"charts/episode", "charts/episodic_length", "charts/SPS"}
Q_TAGS = TAGS | {"charts/epsilon", "losses/td_loss", "losses/q_values"}
A2C_TAGS = TAGS | {"losses/value_loss", "losses/policy_loss", "losses/entropy"}
RUN_DQN = f"runpy.run_path({str(ROOT / 'dqn_cartpole.py')!r}, run_name='__main__')"

each_script = pytest.mark.parametrize("name", [*Q_LEARNING, A2C])
of_both_kinds = pytest.mark.parametrize("name", ["dueling_cartpole", A2C])


def start(name: str, cwd: Path, script: Path | str | None = None, env={}, limits={}, **values):
    """A short run in a process of its own."""
    values = {"device": "cpu"} | SHORT[name] | values
    flags = [f"--{field.replace('_', '-')}={value}" for field, value in values.items()]
    return Process(script or ROOT / f"{name}.py", *flags, cwd=cwd, env=env, limits=limits)


def run_once(name: str, runs_dir: Path, film=False, **values) -> tuple[dict, dict, Path]:
    """A short run; returns its result without the times, its weights and its folder."""
    script = importlib.import_module(name)
    with patch.object(script, "film", script.film if film else print):
        result = script.train(script.Args(runs_dir=runs_dir, device="cpu", **SHORT[name] | values))
    [run_dir] = runs_dir.iterdir()
    weights = torch.load(run_dir / "weight_end.pth", weights_only=True)
    return {k: v for k, v in result.items() if "second" not in k}, weights, run_dir


def equal(first: dict, second: dict) -> list[bool]:
    """Of each layer, whether two state dicts have the same weights to the bit."""
    return [torch.equal(first[key], second[key]) for key in first]


# ---- a run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[*Q_LEARNING, A2C])
def run(request, tmp_path_factory) -> tuple[str, Path, str]:
    """Its script, its folder, its output: pasted code, and a desktop that pygame cannot open."""
    name, home = request.param, tmp_path_factory.mktemp("home")
    alone = f"import sys; sys.path[:] = [p for p in sys.path if p != {str(ROOT)!r}]\n"
    code = alone + (ROOT / f"{name}.py").read_text(encoding="utf-8")
    env = {"HOME": str(home), "SDL_VIDEODRIVER": "wayland"}
    process = start(name, home, code, env, runs_dir="~/runs")
    assert process.wait() == 0, process.stderr
    assert [path.name for path in home.iterdir()] == ["runs"]
    [run_dir] = (home / "runs").iterdir()
    return name, run_dir, process.stdout


def test_a_run_leaves_its_files_and_says_what_it_does(run):
    name, run_dir, output = run
    assert re.fullmatch(rf"{name}__3__[\d-]+", run_dir.name)
    [events] = [path.name for path in run_dir.iterdir() if "tfevents" in path.name]
    files = {"args.json", "result.json", "weight_end.pth", "film.mp4", events}
    assert {path.name for path in run_dir.iterdir()} == files

    lines = output.splitlines()
    assert lines[0] == ("ActorCritic(" if name == A2C else "QNetwork(")
    first_episode = next(line for line in lines if line.startswith("episode"))
    assert re.fullmatch(r"episode 0: \d+ steps, mean of 10 [\d.]+", first_episode)
    assert any(line.startswith("Not solved") for line in lines)
    assert lines[-1] == f"Everything is in {run_dir}"

    result = json.loads((run_dir / "result.json").read_text())
    assert list(result) == RESULT.split()
    assert set(result["versions"]) == {"python", "torch", "gymnasium", "numpy"}
    assert result["seed"] == 3 and result["solved_episode"] is None
    assert result["steps_per_second"] == pytest.approx(result["steps"] / result["seconds"])


def test_all_curves_count_environment_steps(run):
    name, run_dir, _ = run
    result = json.loads((run_dir / "result.json").read_text())
    scalars = EventAccumulator(str(run_dir)).Reload()
    assert set(scalars.Tags()["scalars"]) == (A2C_TAGS if name == A2C else Q_TAGS)
    curves = {tag: scalars.Scalars(tag) for tag in (A2C_TAGS if name == A2C else Q_TAGS)}
    episodes, lengths = curves["charts/episode"], curves["charts/episodic_length"]
    assert [event.value for event in episodes] == list(range(result["episodes"]))
    ends = [event.step for event in episodes]
    assert ends == [event.step for event in lengths]
    assert 0.1 < curves["charts/SPS"][-1].value / result["steps_per_second"] < 10
    if name == A2C:  # the steps of 32 environments, of which one's episodes are counted
        assert 3000 < ends[-1] <= result["steps"] <= 4000
    else:
        assert ends == np.cumsum([event.value for event in lengths]).tolist()
        assert ends[-1] == result["steps"]
        assert all({event.step for event in curve} <= set(ends) for curve in curves.values())


def test_same_seed_same_result_to_the_bit(run, tmp_path):
    name, run_dir, _ = run
    result = json.loads((run_dir / "result.json").read_text())
    weights = torch.load(run_dir / "weight_end.pth", weights_only=True)
    np.random.seed(1)  # whatever state the global generators are in
    torch.manual_seed(1)
    again, same, _ = run_once(name, tmp_path / "again")
    _, other, _ = run_once(name, tmp_path / "other", seed=4)
    assert again == {key: result[key] for key in again}
    assert all(equal(weights, same)) and not all(equal(weights, other))


def test_every_layer_learns_and_each_seed_starts_elsewhere(run, tmp_path):
    name, run_dir, _ = run
    end = torch.load(run_dir / "weight_end.pth", weights_only=True)
    still = {"learning_rate": 1e-30} | ({} if name == A2C else {"num_episodes": 1})
    _, begin, _ = run_once(name, tmp_path / "begin", **still)
    assert not any(equal(begin, end))
    still |= {} if name == A2C else {"zero_init": False}
    _, one, _ = run_once(name, tmp_path / "one", **still, seed=1)
    _, two, _ = run_once(name, tmp_path / "two", **still, seed=2)
    assert not any(torch.allclose(one[layer], two[layer]) for layer in one)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in Q_LEARNING]


@pytest.mark.parametrize("name", [*SLOW, A2C])
def test_the_default_flags_solve_the_task(name, tmp_path):
    script = importlib.import_module(name)
    result = script.train(script.Args(runs_dir=tmp_path, seed=3))  # soon solved by A2C
    assert result["solved_episode"] is not None and result["eval_mean"] > 150


@pytest.mark.parametrize("name", Q_LEARNING)
def test_the_agent_and_the_environment_draw_from_different_streams(name, tmp_path, monkeypatch):
    """gymnasium makes its generator as default_rng(seed) does, and draws the first state first."""
    seeds, default_rng = [], np.random.default_rng
    spied = lambda seed: seeds.append(seed) or default_rng(seed)  # noqa: E731
    monkeypatch.setattr(np.random, "default_rng", spied)
    run_once(name, tmp_path, num_episodes=1)
    start, _ = importlib.import_module(name).make_env().reset(seed=3)
    [seed] = seeds
    assert not np.isclose(start, default_rng(seed).uniform(-0.05, 0.05, 4)).any()


# ---- how a run ends ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "signum", "words", "long"),
    [
        ("dqn_cartpole", signal.SIGINT, "episode 2:", {"num_episodes": 500}),
        (A2C, signal.SIGTERM, "episode 2:", {"total_timesteps": 5_120_000}),
        ("ddqn_cartpole", signal.SIGHUP, "The weights are in", {"eval_episodes": 1_000_000}),
    ],
)
def test_a_signal_keeps_what_was_learnt(name, signum, words, long, tmp_path):
    process = start(name, tmp_path, **long).until(words)
    process.send_signal(signum)
    assert process.wait(20) == 130 and "Traceback" not in process.stderr
    [run_dir] = tmp_path.glob("runs/*")
    assert f"The weights are in {run_dir.relative_to(tmp_path)}" in process.stdout
    assert not (run_dir / "result.json").exists()
    run_once(name, tmp_path / "again", weights=run_dir / "weight_end.pth")


def test_nohup_stays_deaf_to_a_lost_terminal(tmp_path):
    """nohup starts a program with SIGHUP ignored."""
    code = f"import signal, runpy\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n{RUN_DQN}"
    process = start("dqn_cartpole", tmp_path, code).until("episode 1:")
    process.send_signal(signal.SIGHUP)
    assert process.wait() == 0, process.stderr


def test_a_reader_that_goes_away_loses_no_weights(tmp_path):
    """As in `python dqn_cartpole.py | head -9`."""
    os.mkfifo(tmp_path / "pipe")
    code = f"import runpy, sys\nsys.stdout = open('pipe', 'w', buffering=1)\n{RUN_DQN}"
    process = start("dqn_cartpole", tmp_path, code, num_episodes=500)
    with open(tmp_path / "pipe") as pipe:
        assert any("episode 1:" in line for line in pipe)
    assert process.wait() == 1
    assert "error: [Errno 32] Broken pipe\n" in process.stderr
    assert len(list(tmp_path.glob("runs/*/weight_end.pth"))) == 1


def test_a_folder_that_the_console_cannot_print_loses_nothing(tmp_path):
    env = {"PYTHONIOENCODING": "cp1252"}
    process = start("dqn_cartpole", tmp_path, env=env, runs_dir="つくる")
    assert process.wait() == 0, process.stderr
    assert r"Everything is in \u3064\u304f\u308b/dqn_cartpole__3" in process.stdout


@pytest.mark.parametrize("room", [3000, 100_000])  # too little for the curves; for the weights
def test_a_full_disk_is_one_line_and_leaves_no_half_file(room, tmp_path):
    long = {"num_episodes": 30, "hidden_size": 256}
    process = start("per_cartpole", tmp_path, limits={RLIMIT_FSIZE: room}, **long)
    assert process.wait() == 1
    assert re.fullmatch(r"error: .*File too large.*", process.stderr.splitlines()[-1])
    assert "Traceback" not in process.stderr
    [run_dir] = tmp_path.glob("runs/*")
    assert [path.name for path in run_dir.iterdir() if "tfevents" not in path.name] == ["args.json"]


@pytest.mark.parametrize("ffmpeg", ["missing", "failing", "/bin/false"])
def test_without_a_film_everything_else_is_kept(ffmpeg, tmp_path):
    failing, real = tmp_path / "failing", get_ffmpeg_exe()  # takes all pictures, and writes noise
    write = """cat > /dev/null; for film; do :; done; echo noise > "$film" """
    failing.write_text(f'#!/bin/sh\ncase "$*" in *.mp4) {write};; *) exec {real} "$@";; esac')
    failing.chmod(0o700)
    process = start(A2C, tmp_path, env={"IMAGEIO_FFMPEG_EXE": str(tmp_path / ffmpeg)})
    assert process.wait() == 1
    [run_dir] = tmp_path.glob("runs/*")
    error = process.stderr.splitlines()[-1]
    assert re.fullmatch(rf"error: no film: .*{run_dir.name}", error) and len(error) < 250
    assert "Traceback" not in process.stderr
    assert list(json.loads((run_dir / "result.json").read_text())) == RESULT.split()
    assert not list(run_dir.glob("*.mp4"))


def test_train_leaves_the_process_of_its_caller_as_it_was(tmp_path):
    """SDL would take SIGTERM, which a Pool sends to its workers: it never came to an end."""
    code = f"""
import multiprocessing, os, signal, sys, torch
sys.path.insert(0, {str(ROOT)!r})
from dqn_cartpole import Args, train
def settings():
    return torch.get_num_threads(), signal.getsignal(signal.SIGTERM), dict(os.environ)
before = settings()
train(Args(runs_dir="runs", num_episodes=1, eval_episodes=1))
assert settings() == before and before[0] == 2
with multiprocessing.get_context("fork").Pool(2) as pool:
    pool.map(abs, [1])
"""
    process = Process(code, cwd=tmp_path)
    assert process.wait(30) == 0, process.stderr


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
    env = script.make_env()
    env.reset(seed=2**32 + 7)
    lengths = [sum(1 for _ in script.play(network, env)) for _ in range(9)]
    assert len(set(lengths)) > 1
    assert result["eval_mean"] == pytest.approx(np.mean(lengths))
    assert result["eval_std"] == pytest.approx(np.std(lengths))
    with imageio.get_reader(run_dir / "film.mp4") as film:  # it shows the first episode
        assert (film.get_meta_data()["fps"], film.get_meta_data()["size"]) == (50, (600, 400))
        assert sum(1 for _ in film) == lengths[0]


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
        script.evaluate(Balancing(), script.Args(seed=seed, eval_episodes=9))
    assert len(starts) == 3 * 10  # one more to set the seed
    run_once("dqn_cartpole", tmp_path, seed=1)  # 7 in training, none anew in the evaluation
    assert len(starts) == 30 + 7


@of_both_kinds
def test_an_evaluation_episode_has_200_steps_at_most(name):
    script = importlib.import_module(name)
    expected = {"eval_mean": 200, "eval_std": 0}
    assert script.evaluate(Balancing(), script.Args(eval_episodes=3)) == expected


# ---- refusals ----------------------------------------------------------------------------------


NAN = math.nan
BAD = dict(seed=[-1, 2**32], learning_rate=[0.0, -1e-4, NAN, math.inf], gamma=[-0.1, 1.1, NAN],
           hidden_size=[0, 10**6], average_decay=[-0.1, 1.0, NAN], eval_episodes=[0],
           weights=["missing.pth", Path("."), ""])  # fmt: skip
BAD_Q = BAD | dict(num_episodes=[0, -5], batch_size=[0, 10_001], memory_size=[0, 10**12],
                   epsilon=[-0.1, 1.1, NAN])  # fmt: skip
BAD_DOUBLE = BAD_Q | dict(target_interval=[0])
BAD_MORE = {
    "dqn_cartpole": BAD_Q,
    "ddqn_cartpole": BAD_DOUBLE,
    "dueling_cartpole": BAD_DOUBLE,
    "per_cartpole": BAD_DOUBLE
    | dict(uniform_episodes=[-1], alpha=[-0.1, 1.1, NAN], beta=[-0.1, 1.1, NAN]),
    A2C: BAD
    | dict(num_envs=[0, 10**9], num_steps=[0, 10**9], total_timesteps=[0, 159])
    | dict(value_loss_coef=[-1.0, NAN], entropy_coef=[-1.0, NAN, math.inf])
    | dict(max_grad_norm=[0.0, NAN]),
}


@pytest.mark.parametrize(("name", "field"), [(n, field) for n in BAD_MORE for field in BAD_MORE[n]])
def test_bad_values_are_refused_in_one_line_that_names_the_flag(name, field):
    flag = f"--{field.replace('_', '-')}"
    for value in BAD_MORE[name][field]:
        with pytest.raises(ValueError, match=flag + r".*\Z"):
            importlib.import_module(name).Args(**{field: value})


@each_script
def test_a_loss_that_is_not_finite_ends_the_run(name, tmp_path):
    with pytest.raises(ValueError, match="not finite.*--learning-rate"):
        run_once(name, tmp_path, learning_rate=1e30)


@each_script
def test_args_take_strings_and_their_own_json_and_know_the_home_folder(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "weights").touch()
    script = importlib.import_module(name)
    args = script.Args(runs_dir="~/out", weights="~/weights")
    assert (args.runs_dir, args.weights) == (tmp_path / "out", tmp_path / "weights")
    assert script.Args(**json.loads(json.dumps(vars(args), default=str))) == args


@pytest.mark.parametrize("bad", [{"gamma": 2}, {"gamma": "much"}, {"weights": "~/missing.pth"}])
def test_a_refusal_is_a_failing_exit_and_nothing_is_written(bad, tmp_path):
    process = start(A2C, tmp_path, **bad)
    assert process.wait() == 2
    output = process.stdout + process.stderr
    assert f"--{[*bad][0]}" in output and "Traceback" not in output
    assert list(tmp_path.iterdir()) == []


def test_a_runs_dir_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    process = start("per_cartpole", tmp_path, runs_dir="file/runs")
    assert process.wait() == 1
    assert re.fullmatch("error: .*file/runs.*\n", process.stderr)


class Boom:
    """Pickles as a call that would make a folder."""

    __reduce__ = lambda self: (os.mkdir, ("boom",))  # noqa: E731


@of_both_kinds
def test_weights_that_are_not_ours_are_refused_with_the_reason(name, tmp_path):
    _, weights, run_dir = run_once(name, tmp_path / "training")
    _, narrower, _ = run_once(name, tmp_path / "narrower", hidden_size=8)
    bad, runs = tmp_path / "bad.pth", tmp_path / "runs"

    def refuse(reason):
        with pytest.raises(ValueError, match=f"--weights: {bad} {reason}") as caught:
            run_once(name, runs, weights=bad)
        assert "\n" not in str(caught.value)

    for content in (b"", b"noise" * 100, (run_dir / "weight_end.pth").read_bytes()[:1000]):
        bad.write_bytes(content)
        refuse("is damaged")
    for foreign in ([1, 2], torch.zeros(3), {"fc1": 1}, Boom()):
        torch.save(foreign, bad)
        refuse("is damaged or holds no weights")
    endless = {layer: weight / 0 for layer, weight in weights.items()}
    torch.save(endless, bad)
    refuse("holds weights that are not finite")
    torch.save(narrower, bad)
    refuse(r"holds layers of .*'fc1.weight': \(8, 4\).* not of .*'fc1.weight': \(32, 4\)")
    assert not runs.exists() and not Path("boom").exists()


@pytest.mark.parametrize("name", [*Q_LEARNING, A2C, "mnist", "a2c_breakout", "play_breakout"])
def test_importing_a_script_does_nothing_else(name):
    def settings():
        handlers = (signal.getsignal(signal.SIGINT), threading.excepthook)
        return torch.get_num_threads(), torch.get_rng_state().tolist(), handlers

    before = settings()
    module = runpy.run_path(str(ROOT / f"{name}.py"), run_name="imported")
    assert "Args" in module and settings() == before
