"""What the scripts promise alike, from the flags that they refuse to whatever ends a run."""

import dataclasses
import importlib
import itertools
import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from resource import RLIMIT_FSIZE

import numpy as np
import pytest
import torch
from imageio_ffmpeg import get_ffmpeg_exe
from launch import Process
from short_runs import A2C, CARTPOLE, EVERY, IGNORE_SIGHUP, ROOT, SHORT, flags, source, start

PLAY, A2C_BREAKOUT = "play_breakout", "a2c_breakout"
every_script = pytest.mark.parametrize("name", EVERY)
# The five CartPole scripts end with the same lines: test_diff.py holds them together.
every_ending = pytest.mark.parametrize("name", [A2C, "mnist", A2C_BREAKOUT, PLAY])
NAN, INF = math.nan, math.inf


def run_in(folder: Path) -> tuple[Path, set[str]]:
    """The only run that it holds, and the names of its files but for the curves."""
    [run_dir] = folder.glob("runs/*")
    return run_dir, {path.name for path in run_dir.iterdir() if "tfevents" not in path.name}


# ---- flags -------------------------------------------------------------------------------------

COMMON = dict(learning_rate=[0.0, -1e-4, NAN, INF], seed=[-1, 2**32], device=["cuda", "cuda:0"])
CART = COMMON | dict(gamma=[-0.1, 1.1, NAN], hidden_size=[0, 10**6], average_decay=[-0.1, 1.0, NAN],
                     eval_episodes=[0], weights=["missing.pth", Path("."), ""])  # fmt: skip
DQN = CART | dict(num_episodes=[0, -5, 10**19], batch_size=[0, 10_001], memory_size=[0, 10**12],
                  epsilon=[-0.1, 1.1, NAN])  # fmt: skip
DDQN = DQN | dict(target_interval=[0])
A2C_COEFFICIENTS = dict(value_loss_coef=[-1.0, NAN], entropy_coef=[-1.0, NAN, INF],
                        max_grad_norm=[0.0, NAN])  # fmt: skip
BAD = {
    "dqn_cartpole": DQN,
    "ddqn_cartpole": DDQN,
    "dueling_cartpole": DDQN,
    "per_cartpole": DDQN | dict(uniform_episodes=[-1], alpha=[-0.1, 1.1, NAN],
                                beta=[-0.1, 1.1, NAN]),
    A2C: CART | A2C_COEFFICIENTS | dict(num_envs=[0, 10**9], num_steps=[0, 10**9],
                                        total_timesteps=[0, 159]),
    "mnist": COMMON | dict(epochs=[0], batch_size=[0, 60_001], hidden_size=[0, 4097],
                           image_index=[-1, 10_000]),
    A2C_BREAKOUT: COMMON | A2C_COEFFICIENTS | dict(
        seed=[-1, 2**31], gamma=[-0.1, 1.1, NAN], average_decay=[-0.1, 1.0],
        rmsprop_eps=[0.0, 1e-46, NAN], num_envs=[0, -3], num_steps=[0], total_timesteps=[79],
        max_idle_steps=[-1], sticky_actions=[-0.1, 1.0, NAN], checkpoint_every=[0],
        resume=[__file__]),
    PLAY: dict(seed=[-1, 2**31], device=["cuda", "cuda:0"], target_score=[NAN, INF],
               max_attempts=[0], full_games=[0, -3], sticky_actions=[-0.1, 1.0, NAN]),
}  # fmt: skip


@pytest.mark.parametrize(("name", "field"), [(name, field) for name in BAD for field in BAD[name]])
def test_values_that_make_no_sense_are_refused_in_one_line_that_names_the_flag(name, field):
    for value in BAD[name][field]:
        with pytest.raises(ValueError, match=rf"\A--.*\b{field.replace('_', '-')}\b.*\Z"):
            importlib.import_module(name).Args(**{field: value})


COUNTS = [(name, field) for name in EVERY
          for field, kind in importlib.import_module(name).Args.__annotations__.items()
          if kind in (int, int | None)]  # fmt: skip


@pytest.mark.parametrize(("name", "field"), COUNTS)
def test_what_is_counted_is_whole(name, field):
    for value in (2.5, 1e7 + 0.5, INF, -INF, NAN):
        with pytest.raises(ValueError, match=rf"\A--.*\b{field.replace('_', '-')}\b.*\Z"):
            importlib.import_module(name).Args(**{field: value})


BAD_FLAGS = [(A2C, "gamma", 2), (A2C, "gamma", "much"), (A2C, "weights", "~/missing.pth"),
             ("mnist", "epochs", 0), (A2C_BREAKOUT, "gamma", NAN), (PLAY, "seed", -1)]  # fmt: skip


@pytest.mark.parametrize(("name", "field", "value"), BAD_FLAGS)
def test_a_refusal_is_a_failing_exit_and_nothing_is_written(name, field, value, tmp_path):
    process = start(name, tmp_path, **{field: value})
    assert process.wait() == 2
    assert f"--{field}" in process.stderr and "Traceback" not in process.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["per_cartpole", "mnist", A2C_BREAKOUT, PLAY])
def test_a_folder_that_cannot_be_made_is_one_line(name, tmp_path):
    (tmp_path / "file").write_text("in the way")
    process = start(name, tmp_path, runs_dir="file/runs")
    assert process.wait() == 1 and re.fullmatch("error: .*file/runs.*\n", process.stderr)
    assert (tmp_path / "file").read_text() == "in the way"


@every_script
def test_paths_may_be_strings_and_begin_with_a_tilde_and_args_come_back_from_json(
    name, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    Args = importlib.import_module(name).Args
    paths = [field.name for field in dataclasses.fields(Args) if "Path" in str(field.type)]
    if "weights" in paths:
        (tmp_path / "it").touch()
    args = Args(**dict.fromkeys(paths, "~/it"))
    assert "runs_dir" in paths and {getattr(args, path) for path in paths} == {tmp_path / "it"}
    assert Args(**json.loads(json.dumps(vars(args), default=str))) == args


@pytest.mark.parametrize("name", [name for name in EVERY if name != PLAY])
def test_numbers_may_be_numpys_or_whole_floats(name):
    """Kept as they are, they would make a checkpoint that torch.load refuses."""
    Args = importlib.import_module(name).Args
    kinds = {int: np.float64, float: np.float64, bool: np.bool_}
    numbers = {name: value for name, value in vars(Args()).items() if type(value) in kinds}
    args = vars(Args(**{name: kinds[type(value)](value) for name, value in numbers.items()}))
    assert numbers.items() <= args.items() and len(numbers) > 5
    assert all(type(args[name]) is type(value) for name, value in numbers.items())


@pytest.mark.parametrize("name", [name for name in EVERY if name != A2C_BREAKOUT])
def test_flags_alone_do_not_ask_for_a_gpu(name, monkeypatch):
    """Or the processes of a pool, forked later, could not use it."""
    script = importlib.import_module(name)
    monkeypatch.setattr(script.torch.cuda, "is_available", lambda: pytest.fail("asked"))
    script.Args()


# ---- a run -------------------------------------------------------------------------------------


@every_script
def test_importing_a_script_does_nothing_else(name):
    def settings():
        handlers = (signal.getsignal(signal.SIGINT), threading.excepthook)
        return torch.get_num_threads(), torch.get_rng_state().tolist(), handlers

    torch.set_num_threads(2)  # a script may want one
    before = settings()
    module = runpy.run_path(str(ROOT / f"{name}.py"), run_name="imported")
    assert "Args" in module and settings() == before
    torch.set_num_threads(1)


@every_ending
def test_in_a_notebooks_cell_the_kernels_flags_are_not_those_of_the_script(name, tmp_path):
    code = re.sub(r" (train|play)\(tyro", " print(tyro", source(name))
    kernel = """import codecs, sys
sys.argv = ['/packages/ipykernel_launcher.py', '-f', 'kernel.json']
console = sys.stdout
sys.stdout = codecs.getwriter('utf-8')(console.buffer)  # it has no reconfigure()
import signal; del signal.SIGHUP  # as Windows has none
"""
    process = Process(kernel + code, cwd=tmp_path)
    assert process.wait() == 0 and "Args(" in process.stdout, process.stderr


@every_ending
def test_at_a_prompt_ctrl_c_is_a_keyboard_interrupt_again_after_a_run_that_it_ended(name, tmp_path):
    """As after %run in IPython: a later loop can be ended, and a later thread's error is shown."""
    code = f"""import os, signal, sys, threading, time
sys.ps1, interrupt = "> ", lambda *_: os.kill(os.getpid(), signal.SIGINT)
try:
    exec({re.sub(r" (train|play)[(]tyro", " interrupt(tyro", source(name))!r})
except SystemExit as error:
    print(error)
time.sleep(1.1)
try:
    interrupt()
    time.sleep(9)
except KeyboardInterrupt:
    print("ended")
assert threading.excepthook is threading.__excepthook__
"""
    process = Process(code, cwd=tmp_path)
    assert process.wait() == 0, process.stderr
    assert process.stdout == ("" if name == A2C_BREAKOUT else "130\n") + "ended\n"


@pytest.mark.parametrize(
    ("name", "short"),
    [("dqn_cartpole", "num_episodes=1, eval_episodes=1"),
     (A2C_BREAKOUT, "num_envs=1, num_steps=1, total_timesteps=1"), (PLAY, "random=True")],
)  # fmt: skip
def test_train_leaves_the_process_of_its_caller_as_it_was(name, short, tmp_path):
    """SDL would take SIGTERM, which a Pool sends to its workers: it never came to an end."""
    code = f"""
import multiprocessing, os, signal, sys, threading, torch
sys.path.insert(0, {str(ROOT)!r})
from {name} import Args, {"play as train" if name == PLAY else "train"}
def settings():
    handlers = [signal.getsignal(getattr(signal, name)) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
    return torch.get_num_threads(), handlers, threading.excepthook, dict(os.environ)
before = settings()
train(Args({short}))
assert settings() == before and before[0] == 2
with multiprocessing.get_context("fork").Pool(2) as pool:
    pool.map(abs, [1])
"""
    process = Process(code, cwd=tmp_path, env={"OMP_NUM_THREADS": "2"})
    assert process.wait() == 0, process.stderr


FILES = dict.fromkeys(CARTPOLE, "weight_end.pth film.mp4") | {PLAY: "film.mp4"}
FILES["mnist"] = "weight_end.pth first_training_image.png test_image_20.png most_wrong.png"
FILES[A2C_BREAKOUT] = "weight_0.pth weight_end.pth checkpoint.pth lock"


@every_script
def test_a_run_from_a_notebooks_cell_leaves_its_files_in_a_folder_of_any_name(name, finished):
    """A cell has no __file__. What the console cannot print of the name is escaped."""
    run_dir, process = finished(name)
    assert re.fullmatch(rf"{name}__3__[\d-]+", run_dir.name)
    names = {path.name for path in run_dir.iterdir() if "tfevents" not in path.name}
    assert names == {"args.json", "result.json", *FILES[name].split()}
    assert str(run_dir).replace("つくる", r"\u3064\u304f\u308b") in process.stdout.splitlines()[-1]
    assert process.stderr == "" or name in [*CARTPOLE, "mnist"]  # they have a progress bar

    args = json.loads((run_dir / "args.json").read_text())
    assert args["runs_dir"] == str(run_dir.parent) and SHORT[name].items() <= args.items()
    result = json.loads((run_dir / "result.json").read_text())
    modules = re.findall(r"^import (ale_py|cv2|gymnasium|numpy|torch)\b", source(name), re.M)
    assert result["seed"] == 3 and result["versions"].keys() == {"python", *modules}
    if name in CARTPOLE:
        assert re.search(r"episode 0: \d+ steps, mean of 10 [\d.]+\n", process.stdout)
        assert re.search(r"\n(Not solved|Solved in episode \d+)\.\n", process.stdout)
        assert re.search(r"\nGreedy: [\d.]+ steps an episode\. ", process.stdout)
    if "steps_per_second" in result:
        steps = result.get("steps", result.get("timesteps"))
        assert result["steps_per_second"] == pytest.approx(steps / result["seconds"])


@pytest.mark.parametrize("name", [*CARTPOLE, "mnist"])
def test_a_loss_that_is_not_finite_ends_the_run_and_its_weights_are_kept(name, tmp_path):
    process = start(name, tmp_path, learning_rate=1e30)
    assert process.wait() == 1 and "Traceback" not in process.stderr
    assert re.search("error: .*not finite.*--learning-rate", process.stderr)
    assert run_in(tmp_path)[1] == {"args.json", "weight_end.pth"}


# ---- whatever ends a run, what it learnt is kept; a2c_breakout.py has tests of its own ---------

LONG = {"dqn_cartpole": {"num_episodes": 500}, A2C: {"total_timesteps": 5_120_000},
        "ddqn_cartpole": {"eval_episodes": 1_000_000}, "mnist": {"epochs": 99, "batch_size": 1},
        PLAY: {"max_attempts": 100}}  # fmt: skip
KEPT = {name: {"args.json", "weight_end.pth"} for name in [*CARTPOLE, "mnist"]}
KEPT[PLAY] = {"args.json", "result.json", "film.mp4"}
MOMENTS = [("dqn_cartpole", "INT", "episode 2:"), (A2C, "TERM", "episode 2:"),
           ("ddqn_cartpole", "HUP", "The weights are in"), ("mnist", "INT", "after epoch 1:"),
           ("mnist", "TERM", "after epoch 1:"), ("mnist", "HUP", "after epoch 1:"),
           (PLAY, "INT", "attempt 2:"), (PLAY, "TERM", "attempt 2:"),
           (PLAY, "HUP", "attempt 2:")]  # fmt: skip


@pytest.mark.parametrize(("name", "signum", "words"), MOMENTS)
def test_a_signal_ends_a_run_and_what_it_has_is_kept(name, signum, words, tmp_path):
    process = start(name, tmp_path, **LONG[name]).until(words)
    time.sleep(0.1)  # in the midst of an epoch: of a bar half made tqdm itself complains
    for each in [signum, signum, "TERM", "HUP", signum]:  # as a closed terminal or a logout does
        process.send_signal(signal.Signals[f"SIG{each}"])
        time.sleep(0.002)
    assert process.wait() == 130 and "Traceback" not in process.stderr
    run_dir, names = run_in(tmp_path)
    assert names == KEPT[name]
    if name in CARTPOLE:
        again = start(name, tmp_path / "runs", weights=run_dir / "weight_end.pth")
        assert again.wait() == 0, again.stderr


def test_a_kill_leaves_the_scores_so_far(tmp_path):
    process = start(PLAY, tmp_path, max_attempts=12).until("attempt 2:")
    process.send_signal(signal.SIGKILL)
    process.wait()
    result = json.loads((run_in(tmp_path)[0] / "result.json").read_text())
    assert len(result["scores"]) >= 2


@pytest.mark.parametrize(
    ("name", "words"),
    [("dqn_cartpole", "episode 1:"), (A2C, "episode 1:"), ("mnist", "after epoch 1:"),
     (PLAY, "attempt 2:")],
)  # fmt: skip
def test_under_nohup_a_run_outlives_its_terminal(name, words, tmp_path):
    """Here with `2>&-`, too: there is no stderr to draw a bar on."""
    short = {"mnist": {"epochs": 9}, PLAY: {"max_attempts": 4}}.get(name, {})
    code = IGNORE_SIGHUP + "import sys; sys.stderr = None\n" + source(name)
    process = start(name, tmp_path, code, **short).until(words)
    assert process.returncode is None
    process.send_signal(signal.SIGHUP)
    assert process.wait() == 0, process.stdout


@pytest.mark.parametrize("name", [A2C, PLAY])
def test_a_run_in_the_background_of_a_terminal_is_not_stopped(name, tmp_path):
    """As after `&`, where the shell's terminal stops whatever reads from it or sets it up."""
    _, terminal = os.openpty()
    behind_a_shell = f"""import os
os.dup2(os.open({os.ttyname(terminal)!r}, os.O_RDWR), 0)
if pid := os.fork():
    status = os.waitpid(pid, os.WUNTRACED)[1]
    os._exit(99 if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status))
os.setpgid(0, 0)
"""
    process = start(name, tmp_path, behind_a_shell + source(name))
    assert process.wait() == 0, process.stderr
    assert "film.mp4" in run_in(tmp_path)[1]


@pytest.mark.parametrize(
    ("name", "words", "code", "errors"),
    [("dqn_cartpole", "episode 1:", 1, r".*error: \[Errno 32\] Broken pipe\n"),
     ("mnist", "after epoch 1:", 1, r".*error: \[Errno 32\] Broken pipe\n"),
     (A2C_BREAKOUT, "begins in", 141, "")],
)  # fmt: skip
def test_a_reader_that_goes_away_loses_no_weights(name, words, code, errors, tmp_path):
    """As in `python dqn_cartpole.py | head -9`. At its exit Python would print once more."""
    (tmp_path / "script.py").write_text(source(name), encoding="utf-8")
    command = [sys.executable, "script.py", *flags(name, **LONG.get(name, {}))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=tmp_path, text=True, **pipes)
    assert any(words in line for line in process.stdout)
    process.stdout.close()
    assert re.fullmatch(errors, process.stderr.read(), re.DOTALL) and process.wait() == code
    assert {"args.json", "weight_end.pth"} <= run_in(tmp_path)[1]


@pytest.mark.parametrize(
    ("name", "hidden_size", "room", "kept"),
    [
        ("per_cartpole", 256, 3_000, set()),  # too little for the curves
        ("per_cartpole", 256, 100_000, set()),  # for the weights
        ("mnist", 100, 20_000, set()),
        ("mnist", 1, 20_000, {"weight_end.pth", "result.json"}),  # for a large picture
    ],
)
def test_a_full_disk_is_one_line_and_leaves_no_half_file(name, hidden_size, room, kept, tmp_path):
    """The kernel refuses what is above a limit in the same place as on a disk that is full."""
    long = {"per_cartpole": {"num_episodes": 30}}.get(name, {})
    limits = {RLIMIT_FSIZE: room}
    process = start(name, tmp_path, limits=limits, hidden_size=hidden_size, **long)
    assert process.wait() == 1 and "Traceback" not in process.stderr
    assert re.fullmatch("error: .*File too large.*", process.stderr.splitlines()[-1])
    small = {"first_training_image.png", "test_image_20.png"} if kept else set()
    assert run_in(tmp_path)[1] == {"args.json"} | kept | small


@pytest.mark.parametrize(
    ("name", "ffmpeg", "room"),
    [*itertools.product([A2C, PLAY], ["missing", "failing", "/bin/false"], [None]),
     (PLAY, None, 1_000), (PLAY, None, 5_000)],
)  # fmt: skip
def test_without_a_film_everything_else_is_kept(name, ffmpeg, room, tmp_path):
    failing, real = tmp_path / "failing", get_ffmpeg_exe()  # takes all pictures, and writes noise
    write = """cat > /dev/null; for film; do :; done; echo noise > "$film" """
    failing.write_text(f'#!/bin/sh\ncase "$*" in *.mp4) {write};; *) exec {real} "$@";; esac')
    failing.chmod(0o700)
    env = {"IMAGEIO_FFMPEG_EXE": str(tmp_path / ffmpeg)} if ffmpeg else {}
    process = start(name, tmp_path, env=env, limits={RLIMIT_FSIZE: room} if room else {})
    assert process.wait() == 1 and "Traceback" not in process.stderr
    run_dir, names = run_in(tmp_path)
    error = process.stderr.splitlines()[-1]
    assert re.fullmatch(rf"error: no film: .*{run_dir.name}", error)
    assert len(error.replace(str(tmp_path), "")) < 200
    assert names == (KEPT[name] | {"result.json"}) - {"film.mp4"}
