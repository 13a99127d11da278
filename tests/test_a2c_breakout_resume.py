"""Tests of what a2c_breakout.py promises about interruptions: killed at any moment, it ends as if nothing had been."""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_a2c_breakout import children, gone, one_line, run

import a2c_breakout as a2c

SCRIPT = Path(a2c.__file__)
FLAGS = ["--num-envs", "4", "--total-timesteps", "1500", "--checkpoint-every", "7", "--log-every", "10"]  # 75 updates


def start(*flags) -> subprocess.Popen:
    """Starts the script and returns when its first update is about to begin."""
    command = [sys.executable, "-u", str(SCRIPT), *map(str, flags)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "The run's folder is" in line:
            return process
    raise AssertionError(process.stderr.read())


def digest(run_dir: Path) -> str:
    weights = torch.load(run_dir / "weight_end.pth", weights_only=True)
    return hashlib.sha256(b"".join(weight.contiguous().numpy().tobytes() for weight in weights.values())).hexdigest()


def curves(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """All that is logged except the speed, as TensorBoard shows it."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag != "charts/SPS"]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of the run that nobody interrupts."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    assert run(*FLAGS, "--resume", run_dir, timeout=300).returncode == 0
    return run_dir


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """A finished run to go on with, or to damage."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def test_three_interruptions_leave_no_trace(whole, tmp_path):
    run_dir, moments = tmp_path / "interrupted", random.Random(time.time_ns())
    for signum in (signal.SIGTERM, signal.SIGKILL, signal.SIGINT):
        process = start(*FLAGS, "--resume", run_dir)
        workers = children(process.pid)
        time.sleep(moments.uniform(0, 0.8))
        process.send_signal(signum)
        _, errors = process.communicate(timeout=60)
        # 0: it had finished already, which only a much faster machine does
        assert process.returncode in {signal.SIGKILL: (-9, 0), signal.SIGTERM: (143, 0), signal.SIGINT: (0,)}[signum]
        assert errors == "" and gone(workers)
    assert run("--resume", run_dir).returncode == 0  # its flags are in args.json
    assert digest(run_dir) == digest(whole)
    assert curves(run_dir) == curves(whole)
    expected, result = (json.loads((folder / "result.json").read_text()) for folder in (whole, run_dir))
    assert all(result[name] == expected[name] for name in ("timesteps", "mean_return", "games"))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_kill_while_the_checkpoint_is_written(whole, tmp_path, call):
    """The process kills itself just before the call that would complete its third checkpoint."""
    run_dir = tmp_path / "killed"
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import a2c_breakout as a2c
original, calls = os.{call}, []
def fatal(*arguments):
    calls.append(arguments)
    if len(calls) == 6:  # args.json, weight_0.pth and the checkpoint at the start come first
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)
os.{call} = fatal
a2c.train(a2c.parse_args({[*FLAGS, "--resume", str(run_dir)]!r}))
"""
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, timeout=120).returncode == -9
    [beside] = run_dir.glob("checkpoint.pth.*.tmp")
    assert torch.load(run_dir / "checkpoint.pth", weights_only=True)["progress"]["update"] == 14
    assert run(*FLAGS, "--resume", run_dir, timeout=300).returncode == 0
    assert digest(run_dir) == digest(whole)
    assert not beside.exists()


def test_a_finished_run_can_be_made_longer(whole, tmp_path):
    run_dir = tmp_path / "longer"
    a2c.train(a2c.parse_args(["--num-envs", "4", "--total-timesteps", "600", "--log-every", "10", "--resume", str(run_dir)]))
    # As if it came from a version that did not have all the flags: they had their defaults then.
    checkpoint = torch.load(run_dir / "checkpoint.pth", weights_only=True)
    arguments = json.loads((run_dir / "args.json").read_text())
    for flag in ("anneal_timesteps", "bf16"):
        del checkpoint["args"][flag], arguments[flag]
    torch.save(checkpoint, run_dir / "checkpoint.pth")
    (run_dir / "args.json").write_text(json.dumps(arguments))
    a2c.train(a2c.parse_args(["--total-timesteps", "1500", "--resume", str(run_dir)]))
    assert digest(run_dir) == digest(whole)
    assert curves(run_dir) == curves(whole)


def test_a_finished_run_stays_as_it_is(copy):
    before = digest(copy), curves(copy)
    assert a2c.train(a2c.parse_args(["--resume", str(copy)])).timesteps == 1500
    assert (digest(copy), curves(copy)) == before


def test_a_run_killed_before_its_first_checkpoint_starts_again(whole, tmp_path):
    run_dir = tmp_path / "early"
    run_dir.mkdir()
    shutil.copy(whole / "args.json", run_dir)
    shutil.copy(whole / "args.json", run_dir / "weight_0.pth.123.tmp")
    args = a2c.parse_args(["--total-timesteps", "100", "--resume", str(run_dir)])
    assert args.num_envs == 4 and a2c.train(args).timesteps == 100


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-envs", "16"], "--num-envs 16"),  # the default, but given
        (["--gamma", "0.5"], "--gamma 0.5"),
        (["--seed", "2"], "--seed 2"),
        (["--env-id", "PongNoFrameskip-v4"], "--env-id PongNoFrameskip-v4"),
        (["--anneal-lr"], "--anneal-lr True"),
        (["--total-timesteps", "1000"], "--total-timesteps 1000"),
    ],
)
def test_a_flag_that_would_change_the_result_is_refused_by_name(copy, flags, message):
    with pytest.raises(a2c.UserError, match=message):
        a2c.train(a2c.parse_args([*flags, "--resume", str(copy)]))


def test_an_annealed_run_keeps_its_length(tmp_path):
    flags = ["--num-envs", "4", "--anneal-lr", "--resume", str(tmp_path / "run")]
    a2c.train(a2c.parse_args([*flags, "--total-timesteps", "100"]))
    with pytest.raises(a2c.UserError, match="--total-timesteps 200"):
        a2c.train(a2c.parse_args([*flags, "--total-timesteps", "200"]))


def test_a_constant_rate_may_begin_to_fall(tmp_path):
    """50 updates of which the last 10 anneal: in one go, and decided on after 40 updates."""
    annealing = ["--total-timesteps", "1000", "--anneal-lr", "--anneal-timesteps", "200"]
    one_go, in_two = tmp_path / "one_go", tmp_path / "in_two"
    a2c.train(a2c.parse_args(["--num-envs", "4", *annealing, "--resume", str(one_go)]))
    a2c.train(a2c.parse_args(["--num-envs", "4", "--total-timesteps", "800", "--resume", str(in_two)]))
    a2c.train(a2c.parse_args([*annealing, "--resume", str(in_two)]))
    assert digest(in_two) == digest(one_go)
    with pytest.raises(a2c.UserError, match="--anneal-timesteps 400: .* update 31 would"):
        a2c.train(a2c.parse_args(["--anneal-timesteps", "400", "--resume", str(in_two)]))


def test_intervals_may_change(copy):
    flags = ["--checkpoint-every", "3", "--log-every", "1", "--save-every", "5", "--resume", str(copy)]
    assert a2c.parse_args(flags).checkpoint_every == 3


class Malicious:
    def __reduce__(self):
        return (os.system, ("touch /tmp/this-must-never-run",))


def damage(kind: str, folder: Path) -> None:
    path = folder / "checkpoint.pth"
    content = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "noise":
        path.write_bytes(os.urandom(len(content)))
    elif kind == "noise in the middle":
        path.write_bytes(content[:3_000_000] + os.urandom(100_000) + content[3_100_000:])
    elif kind == "code":
        torch.save({"progress": Malicious()}, path)
    elif kind == "weights":
        shutil.copy(folder / "weight_end.pth", path)
    elif kind == "a list":
        torch.save([1, 2], path)
    elif kind == "args":
        (folder / "args.json").write_text('{"seed": ')
    elif kind == "args of another script":
        (folder / "args.json").write_text('{"seed": 0, "num_episodes": 500}')
    elif kind in ("env_id", "num_envs", "ranks"):
        checkpoint = torch.load(path, weights_only=True)
        if kind == "ranks":
            checkpoint["ranks"] *= 2
        else:
            checkpoint["args"][kind] = {"env_id": "PongNoFrameskip-v4", "num_envs": 8}[kind]
        torch.save(checkpoint, path)


@pytest.mark.parametrize(
    "kind",
    ["truncated", "empty", "noise", "noise in the middle", "code", "weights", "a list", "args",
     "args of another script", "env_id", "num_envs", "ranks"],
)  # fmt: skip
def test_a_damaged_or_foreign_checkpoint_is_refused_and_kept(copy, kind):
    damage(kind, copy)
    before = {file.name: file.read_bytes() for file in copy.iterdir()}
    with pytest.raises(a2c.UserError, match="cannot resume") as error:
        a2c.train(a2c.parse_args(["--resume", str(copy)]))
    assert "\n" not in str(error.value)
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == before
    assert not Path("/tmp/this-must-never-run").exists()


def test_a_refusal_is_one_line_on_the_command_line(copy):
    damage("noise", copy)
    assert "cannot resume" in one_line(run("--resume", copy))


def test_a_run_that_has_lost_its_checkpoint_is_not_started_again_over_its_weights(copy):
    (copy / "checkpoint.pth").unlink()
    before = {file.name: file.read_bytes() for file in copy.iterdir()}
    with pytest.raises(a2c.UserError, match="checkpoint.pth is missing"):
        a2c.train(a2c.parse_args(["--resume", str(copy)]))
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there auto is CUDA")
def test_a_run_keeps_the_device_it_was_started_on(whole):
    assert json.loads((whole / "args.json").read_text())["device"] == "cpu"
    assert a2c.parse_args(["--resume", str(whole)]).device == "cpu"


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "diary.txt").write_text("not a run")
    with pytest.raises(a2c.UserError, match="neither the folder of a run nor empty"):
        a2c.train(a2c.Args(resume=tmp_path))
    with pytest.raises(a2c.UserError, match="cannot make|cannot resume"):
        a2c.train(a2c.Args(resume=tmp_path / "diary.txt"))
    assert [file.name for file in tmp_path.iterdir()] == ["diary.txt"]


def test_a_killed_worker_ends_the_run_in_one_line(tmp_path):
    process = start("--num-envs", 4, "--checkpoint-every", 5, "--resume", tmp_path / "run")
    workers = children(process.pid)
    while not (tmp_path / "run" / "checkpoint.pth").exists():
        time.sleep(0.05)
    os.kill(workers[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1 and gone(workers, 5)
    assert len(errors.splitlines()) == 1 and f"worker process {workers[-1]} died" in errors
    assert torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)["progress"]["update"] % 5 == 0


def test_a_full_disk_ends_the_run_in_one_line(copy):
    """A limit on the size of a file stands in for the full disk: the kernel refuses the write in the same place."""
    before = (copy / "checkpoint.pth").read_bytes()
    limit = len(before) // 2
    process = run("--resume", copy, "--total-timesteps", 1700,
                  preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))  # fmt: skip
    assert "cannot write" in one_line(process) and "checkpoint.pth" in process.stderr
    assert (copy / "checkpoint.pth").read_bytes() == before
    assert not list(copy.glob("*.tmp"))
    assert run("--resume", copy).returncode == 0


def test_an_infinite_loss_ends_the_run_before_anything_is_replaced(tmp_path):
    with pytest.raises(a2c.UserError, match=r"update \d+: the loss or its gradient is not finite"):
        a2c.train(a2c.Args(num_envs=4, learning_rate=1e30, log_every=5, resume=tmp_path / "run"))
    assert torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)["progress"]["update"] == 0
    assert not (tmp_path / "run" / "weight_end.pth").exists()


def test_a_nan_in_the_loss_leaves_the_last_checkpoint(copy, monkeypatch):
    original = a2c.compute_losses

    def poisoned(*arguments):
        value_loss, policy_loss, entropy = original(*arguments)
        return value_loss * float("nan"), policy_loss, entropy

    before = (copy / "checkpoint.pth").read_bytes(), digest(copy)
    monkeypatch.setattr(a2c, "compute_losses", poisoned)
    with pytest.raises(a2c.UserError, match="update 76"):  # the first with a checkpoint behind it
        a2c.train(a2c.parse_args(["--total-timesteps", "2000", "--log-every", "100", "--resume", str(copy)]))
    assert ((copy / "checkpoint.pth").read_bytes(), digest(copy)) == before
