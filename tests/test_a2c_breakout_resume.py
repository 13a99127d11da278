"""What a2c_breakout.py promises about interruptions: it ends as if nothing had been."""

import hashlib
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from launch import Process, children, gone, state, wait_for
from short_runs import Bomb, curves
from test_a2c_breakout import PONG, SCRIPT, SOURCE, a2c, at, load, one_line, slow, train

FLAGS = {"num_envs": 2, "num_steps": 4, "total_timesteps": 160, "checkpoint_every": 3,
         "max_idle_steps": 10, "sticky_actions": 0.25}  # fmt: skip  # 20 updates, many games
SELF, WORKER = "os.getpid()", "torch.multiprocessing.active_children()[0]"
CTRL_C = f"os.kill({SELF}, signal.SIGINT)"


def begin(run_dir: Path, script: Path | str = SCRIPT, output=None, limits={}, env={}, **changes):
    """Begins the run of FLAGS, or goes on with it, in a process of its own."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in (FLAGS | changes).items()]
    return Process(script, *flags, "--resume", run_dir, output=output, limits=limits, env=env)


def digest(content) -> bytes:
    """One number for a state: tensors by their bits, the rest as it prints."""
    if isinstance(content, torch.Tensor):
        content = content.contiguous().numpy().tobytes()
    elif isinstance(content, dict):
        content = {name: digest(part) for name, part in content.items()}
    elif isinstance(content, (list, tuple)):
        content = [digest(part) for part in content]
    content = content if isinstance(content, bytes) else repr(content).encode()
    return hashlib.sha256(content).digest()


def updates(run_dir: Path) -> int:
    return load(run_dir / "checkpoint.pth")["progress"]["timesteps"] // 8


def learnt(run_dir: Path, name: str = "checkpoint.pth") -> tuple:
    """How many updates a checkpoint holds, and the bits of all that the next ones need."""
    content = load(run_dir / name)
    parts = [content[part] for part in ("network", "averaged", "envs")]
    parts += [content["optimizer"]["state"]]  # its rate is set in each update
    return content["progress"]["timesteps"] // 8, digest(parts)


def ending(run_dir: Path) -> dict:
    """All that a run ends with, but for its times: checkpoint, weights, curves, result."""
    result, shown = json.loads((run_dir / "result.json").read_text()), curves(run_dir)
    assert len(shown["charts/episodic_return"]) == result["games"] > 10
    parts = {name: result[name] for name in ("timesteps", "mean_return", "games", "last_scores")}
    weights = digest(load(run_dir / "weight_end.pth"))
    return parts | {"checkpoint": learnt(run_dir), "weights": weights, "curves": shown}


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*[!0-9]")}  # no curves


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of the run that nobody interrupts; five.pth is its checkpoint of five updates."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    copy = "import shutil; shutil.copy(run_dir / 'checkpoint.pth', run_dir / 'five.pth')"
    process = begin(run_dir, at(5, copy), checkpoint_every=5)
    assert process.wait() == 0, process.stderr
    return run_dir


@pytest.fixture
def five(whole) -> tuple:
    return learnt(whole, "five.pth")


@pytest.fixture
def copied(whole, tmp_path) -> Path:
    """A finished run to go on with, or to damage."""
    (tmp_path / "copied").mkdir()
    for name in ("args.json", "checkpoint.pth", "weight_end.pth"):
        shutil.copy(whole / name, tmp_path / "copied")
    return tmp_path / "copied"


# ---- whatever ends a run, what it learnt is kept ----


@pytest.mark.parametrize(("signum", "code"), [("INT", 0), ("HUP", 129)])
def test_a_stop_request_saves_the_update_that_is_under_way(tmp_path, five, signum, code):
    """A terminal sends it to the worker, too, and the same may come twice within a second."""
    everybody = f"({WORKER}.pid, {SELF}, {SELF})"
    kill = f"for pid in {everybody}: os.kill(pid, signal.SIG{signum}); time.sleep(0.05)"
    process = begin(tmp_path, at(4, kill))
    assert process.wait() == code and process.stderr == ""
    assert learnt(tmp_path) == five
    assert f'40 timesteps are done; go on with --resume "{tmp_path}". Everything' in process.stdout
    assert {"weight_end.pth", "result.json"} <= set(os.listdir(tmp_path))


@pytest.mark.parametrize(("ctrl_c", "code"), [(False, 141), (True, 0)])
def test_output_that_nobody_reads_any_more_is_a_stop_request(tmp_path, five, ctrl_c, code):
    """As with `| head`, and with `| tee`, of which Ctrl-C ends the tee, too."""
    os.mkfifo(tmp_path / "pipe")
    script = at(4, CTRL_C) if ctrl_c else at(3, f"os.kill({SELF}, signal.SIGSTOP)")
    process = begin(tmp_path, script, output=tmp_path / "pipe", checkpoint_every=4 + ctrl_c)
    with open(tmp_path / "pipe") as head:
        assert any("begins in" in line for line in head)
        assert ctrl_c or wait_for(lambda: state(process.pid) == "T")  # before its next line
    process.send_signal(signal.SIGCONT)
    assert process.wait() == code and process.stderr == ""
    assert learnt(tmp_path) == five


@pytest.mark.parametrize(("nohup", "code"), [(False, 129), (True, 141)])
def test_a_terminal_that_is_closed_is_a_stop_request(tmp_path, five, nohup, code):
    """Where SIGHUP is ignored, the next line that cannot be printed is."""
    ours, theirs = os.openpty()
    script = at(4 - nohup, f"os.kill({SELF}, signal.SIGSTOP)")  # until the terminal is closed
    if nohup:
        script = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + script
    process = begin(tmp_path, script, output=os.ttyname(theirs), checkpoint_every=4)
    with open(ours, "rb") as terminal:
        while b"begins in" not in terminal.readline():
            pass
        os.close(theirs)
        assert wait_for(lambda: state(process.pid) == "T")
    assert process.wait() == code and process.stderr == ""
    assert learnt(tmp_path) == five


@pytest.mark.parametrize("number", [1, 2])
def test_a_worker_that_dies_ends_the_run_in_one_line_and_nothing_is_lost(tmp_path, five, number):
    """With two, the learner has two threads and rounds otherwise."""
    pids = "print('pids', *[x.pid for x in torch.multiprocessing.active_children()])"
    kill = at(4, f"{pids}; {WORKER}.kill()")
    process = begin(tmp_path, kill, env={"OMP_NUM_THREADS": f"{number}"})
    line = f'error: a worker process died or was interrupted; go on with --resume "{tmp_path}"'
    assert one_line(process) == line
    workers = [int(pid) for pid in process.stdout.partition("pids ")[2].split()]
    assert len(workers) == number and gone(workers)
    assert (learnt(tmp_path) == five if number == 1 else updates(tmp_path) == 5)
    assert "result.json" not in files(tmp_path)
    averaged = load(tmp_path / "checkpoint.pth")["averaged"]
    assert digest(load(tmp_path / "weight_end.pth")) == digest(averaged)


def test_a_second_ctrl_c_ends_a_run_whose_worker_hangs_and_nothing_is_lost(tmp_path, five):
    hang = f"print('hangs', flush=True); os.kill({WORKER}.pid, signal.SIGSTOP)"
    process = begin(tmp_path, at(4, hang, step=5)).until("hangs")
    workers = children(process.pid)
    process.send_signal(signal.SIGINT)
    time.sleep(1.5)
    assert process.returncode is None
    process.send_signal(signal.SIGINT)
    assert "died" in one_line(process) and gone(workers)
    assert learnt(tmp_path) == five


@pytest.mark.parametrize("size", [10**7, 100])
def test_a_full_disk_leaves_the_old_checkpoint_and_weights_where_there_is_room(tmp_path, size):
    """The kernel refuses what is above a limit in the same place as on a disk that is full.

    A checkpoint has 27 MB, weights have 7. TensorBoard writes the curves in a thread of its own.
    """
    full = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"
    often = at(4, full).replace("max(1000,", "max(1,")  # weights after a tenth, however short
    process = begin(tmp_path, often, average_decay=0)
    assert one_line(process) == "error: [Errno 27] File too large"
    assert updates(tmp_path) == 3 and not list(tmp_path.glob("*.part"))
    weights = {path.name: digest(load(path)) for path in tmp_path.glob("weight*.pth")}
    assert weights.keys() == {f"weight_{x}.pth" for x in (0, 2, 4, *["end"] * (size > 100))}
    assert len({*weights.values()}) == len(weights)  # they are those of six updates at the end


def test_a_gradient_that_is_not_finite_makes_no_update(tmp_path):
    process = begin(tmp_path, at(5, "loss = loss * float('nan')"))
    line = "error: update 5: gradient not finite: lower --learning-rate"
    assert one_line(process) == line and updates(tmp_path) == 5
    assert all(weight.isfinite().all() for weight in load(tmp_path / "weight_end.pth").values())


@pytest.mark.parametrize(("line", "saved"), [("optimizer.zero_grad()", 4), ("if update % 10", 3)])
def test_ctrl_c_in_a_notebook_raises_and_saves(tmp_path, whole, line, saved):
    """There, nobody has replaced Python's own handler. Half an update is not saved."""
    code = SOURCE.replace(line, f"if update == 4: {CTRL_C}\n            {line}")
    process = begin(tmp_path, code.replace("signal.signal(signum, request_stop)", "pass"))
    assert process.wait() != 0 and process.stderr.endswith("KeyboardInterrupt\n")
    assert updates(tmp_path) == saved
    assert begin(tmp_path).wait() == 0 and learnt(tmp_path) == learnt(whole)


def test_in_a_notebook_a_stop_request_is_not_one_to_the_next_run(tmp_path, whole):
    process = begin(tmp_path, at(4, CTRL_C) + f"    train(Args(resume={str(tmp_path)!r}))\n")
    assert process.wait() == 0 and "goes on at timestep 40" in process.stdout
    assert ending(tmp_path) == ending(whole)


def test_output_that_nobody_read_is_no_stop_request_to_the_next_run(tmp_path):
    """In a program with several of them, `| head` ends the first."""
    a2c.stop_requests[13] = time.monotonic()  # as say() leaves it
    train(tmp_path)
    assert load(tmp_path / "checkpoint.pth")["progress"]["timesteps"] == 20


# ---- a run that goes on ends as if nothing had been ----


def test_a_run_that_is_ended_again_and_again_leaves_no_trace(whole, tmp_path):
    """Behind a SIGKILL the worker hangs here: it keeps no lock, and ends when it wakes."""
    hang = f"worker = {WORKER}.pid; print('hangs', worker, flush=True); os.kill(worker, 19)"
    fsync = "os.fsync(file.fileno())"
    fatal = f"{fsync}\n            if path.name == 'checkpoint.pth': os.kill({SELF}, 9)"
    endings = [  # program, exit code, where it begins, updates saved then
        (at(2, f"{hang}; os.kill({SELF}, 9)"), -9, "begins", None),
        (at(4, f"os.kill({SELF}, signal.SIGTERM)"), 143, "begins", 5),
        (SOURCE.replace(fsync, fatal), -9, "goes on at timestep 40", 5),  # as it saves the sixth
        (at(10, f"{WORKER}.kill()"), 1, "goes on at timestep 40", 11),
        (SCRIPT, 0, "goes on at timestep 88", 20),
        (SCRIPT, 0, "goes on at timestep 160", 20),
    ]
    hanging = []
    for script, code, begins, saved in endings:
        process = begin(tmp_path, script)  # by the same command
        assert process.wait() == code, process.stderr
        assert f"{begins} in {tmp_path}" in process.stdout
        assert saved is None or updates(tmp_path) == saved
        assert (tmp_path / "checkpoint.pth.part").exists() == (fatal in str(script))
        hanging += [int(line.split()[1]) for line in process.stdout.splitlines() if "hangs" in line]
    assert "go on with" not in process.stdout and state(hanging[0]) == "T"
    os.kill(hanging[0], signal.SIGCONT)
    assert gone(hanging) and ending(tmp_path) == ending(whole)


def test_its_curves_of_losses_go_on_and_the_time_between_its_starts_does_not_count(tmp_path):
    often = lambda code: code.replace("% 100 == 0", "% 4 == 0")  # noqa: E731
    one, two = tmp_path / "one", tmp_path / "two"
    assert begin(one, often(SOURCE)).wait() == begin(two, often(at(9, CTRL_C))).wait() == 0
    content = load(two / "checkpoint.pth")
    content["progress"]["seconds"] = 1000.0
    torch.save(content, two / "checkpoint.pth")
    assert begin(two, often(SOURCE)).wait() == 0
    shown = curves(one), curves(two)
    speeds = [each.pop("charts/SPS")[-1][1] for each in shown]
    assert shown[0] == shown[1] and len(shown[0]["losses/entropy"]) == 5
    assert speeds[1] == pytest.approx(160 / 1000, rel=0.1) and speeds[0] > 1


@slow
def test_spawned_workers_make_the_run_of_forked_ones(whole, tmp_path):
    (tmp_path / "spawn.py").write_text(SOURCE.replace('"fork" if', '"spawn" if'))
    process = begin(tmp_path / "run", tmp_path / "spawn.py")
    assert process.wait() == 0, process.stderr
    assert ending(tmp_path / "run") == ending(whole)


@slow
def test_a_run_goes_on_with_another_number_of_workers(whole, tmp_path):
    """The same games go on; only the rounding differs."""
    begin(tmp_path, at(9, CTRL_C)).wait()
    assert begin(tmp_path, env={"OMP_NUM_THREADS": "2"}).wait() == 0
    one, other = (load(folder / "checkpoint.pth")["envs"] for folder in (whole, tmp_path))
    assert digest(one) == digest(other)


@slow
def test_a_longer_run_in_args_json_makes_the_run_longer(tmp_path):
    """With a constant learning rate it is the run that was longer from its beginning."""
    one, two = tmp_path / "one", tmp_path / "two"
    train(one, anneal_lr=False)
    train(two, anneal_lr=False, total_timesteps=10)
    flags = json.loads((two / "args.json").read_text())
    (two / "args.json").write_text(json.dumps(flags | {"total_timesteps": 20}))
    a2c.train(a2c.Args(resume=two))
    assert learnt(one) == learnt(two)


def test_a_second_process_in_the_folder_is_refused_and_the_first_goes_on(tmp_path):
    (tmp_path / "lock").touch()  # of one that was killed before it had begun
    first = begin(tmp_path, at(2, f"os.kill({SELF}, signal.SIGSTOP)"), total_timesteps=32)
    assert wait_for(lambda: state(first.pid) == "T")
    before, second = files(tmp_path), Process(SCRIPT, "--resume", tmp_path)
    assert one_line(second) == f"error: another process is training in {tmp_path}"
    assert files(tmp_path) == before
    first.send_signal(signal.SIGCONT)
    assert first.wait() == 0 and first.stderr == "" and updates(tmp_path) == 4


# ---- what is refused ----


def test_another_value_of_a_flag_is_refused_by_name(copied):
    before = files(copied)
    changes = dict(num_envs=4, num_steps=6, total_timesteps=300, gamma=0.5, seed=2, env_id=PONG,
                   anneal_lr=False, clip_rewards=False, max_idle_steps=0, average_decay=0.0,
                   sticky_actions=0.5, learning_rate=1e-4, rmsprop_eps=1e-3, value_loss_coef=1.0,
                   entropy_coef=0.0, max_grad_norm=1.0, device="cpu",
                   checkpoint_every=3)  # fmt: skip
    assert changes.keys() | {"resume", "runs_dir"} == vars(a2c.Args()).keys()
    for name, value in changes.items():
        why = f"^--{name.replace('_', '-')}: {copied} has .*, not {value}$"
        with pytest.raises(ValueError, match=why):
            a2c.train(a2c.Args(resume=copied, **FLAGS | {"checkpoint_every": 5} | {name: value}))
    assert files(copied) == before


def test_what_was_not_given_is_not_refused(tmp_path):
    """The game's name sets the default of another flag."""
    a2c.train(a2c.Args(PONG, num_envs=1, total_timesteps=5, max_idle_steps=9, resume=tmp_path))
    for flags in ({}, {"env_id": PONG}):
        a2c.train(a2c.Args(**flags, resume=tmp_path))
        assert json.loads((tmp_path / "args.json").read_text())["max_idle_steps"] == 9


def test_a_damaged_or_foreign_run_is_refused_and_kept(copied, monkeypatch):
    monkeypatch.chdir(copied)
    path, args = copied / "checkpoint.pth", copied / "args.json"
    content, flags, good = load(path), json.loads(args.read_text()), path.read_bytes()
    damage = [(path, b""), (path, good[: len(good) // 2]), (path, os.urandom(len(good))),
              (path, (copied / "weight_end.pth").read_bytes()), (args, b'{"seed": '),
              (args, b'{"seed": 0, "num_episodes": 500}'),  # of another script
              (args, json.dumps(flags | {"bf16": False}).encode())]  # fmt: skip  # of version 0.2
    for other in (Bomb(), [1, 2], *({"env_id": PONG}, {"envs": [1, 2, 3]})):
        torch.save(content | other if isinstance(other, dict) else other, copied / "other.pth")
        damage.append((path, (copied / "other.pth").read_bytes()))
    for path, damaged in damage:
        before = path.read_bytes()
        path.write_bytes(damaged)
        everything, why = files(copied), f"^{path} is damaged, or does not fit here: .+$"
        with pytest.raises(ValueError, match=why):
            a2c.train(a2c.Args(resume=copied))
        assert files(copied) == everything  # and no folder bomb
        path.write_bytes(before)
    args.unlink()
    everything = files(copied)
    with pytest.raises(ValueError, match=f"^{args} is damaged.*No such file"):
        a2c.train(a2c.Args(resume=copied))
    assert files(copied) == everything  # no new run was begun over the checkpoint
