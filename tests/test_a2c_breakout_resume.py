"""What a2c_breakout.py promises about interruptions: it ends as if nothing had been."""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_a2c_breakout import (  # noqa: F401
    SCRIPT, children, gone, one_line, points, run, start, two_workers,
)  # fmt: skip

import a2c_breakout as a2c

FLAGS = ["--num-envs", "4", "--total-timesteps", "1000", "--checkpoint-every", "7",
         "--log-every", "10", "--no-anneal-lr"]  # fmt: skip  # 50 updates
SHORT = ["--num-envs", "4", "--total-timesteps", "400", "--log-every", "3",
         "--max-idle-steps", "20"]  # fmt: skip  # 20 updates, in which many games end


def train(folder: Path, *flags) -> dict:
    return a2c.train(a2c.parse_args([*map(str, flags), "--resume", str(folder)]))


def digest(content) -> str:
    """One number for a state: tensors by their bits, the rest as it prints."""
    if isinstance(content, torch.Tensor):
        content = content.contiguous().numpy().tobytes()
    elif isinstance(content, dict):
        content = {name: digest(part) for name, part in content.items()}
    elif isinstance(content, list):
        content = [digest(part) for part in content]
    return hashlib.sha256(repr(content).encode()).hexdigest()


def update_of(run_dir: Path) -> int:
    return torch.load(run_dir / "checkpoint.pth", weights_only=True)["progress"]["update"]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but TensorBoard's."""
    files = (file for file in folder.iterdir() if "tfevents" not in file.name)
    return {file.name: file.read_bytes() for file in files}


def ending(run_dir: Path) -> dict:
    """All that a run ends with, but for its times: weights, checkpoint, curves, result."""
    checkpoint = torch.load(run_dir / "checkpoint.pth", weights_only=True)
    del checkpoint["progress"]["seconds"]
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    curves = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if tag != "charts/SPS"
    }
    result = json.loads((run_dir / "result.json").read_text())
    weights = torch.load(run_dir / "weight_end.pth", weights_only=True)
    parts = {name: digest(part) for name, part in checkpoint.items()}
    parts |= {"weight_end": digest(weights), "curves": curves}
    return parts | {name: result[name] for name in ("timesteps", "mean_return", "games")}


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


def test_six_interruptions_leave_no_trace(whole, tmp_path):
    run_dir, moments = tmp_path / "interrupted", random.Random(time.time_ns())
    for signum in 2 * [signal.SIGTERM, signal.SIGKILL, signal.SIGINT]:
        process = start(*FLAGS, "--resume", run_dir, until=f"in {run_dir}")
        workers = children(process.pid)
        time.sleep(moments.uniform(0, 0.25))
        process.send_signal(signum)
        output, errors = process.communicate(timeout=60)
        if "Everything is in" not in output or "continue with --resume" in output:
            code = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 0}[signum]
            assert process.returncode == code and len(workers) == 2
        # else it had finished already, which only a much faster machine does
        assert errors == "" and gone(workers)
    assert run("--resume", run_dir).returncode == 0  # its flags are in args.json
    assert ending(run_dir) == ending(whole)


@pytest.mark.parametrize(
    ("call", "number", "update"),
    [("fsync", 11, 14), ("replace", 6, 14), ("fsync", 12, 21)],  # 12: the folder's, behind replace
)
def test_a_kill_while_the_checkpoint_is_written(whole, tmp_path, call, number, update):
    """args.json, weight_0.pth and three checkpoints come before the one of update 21."""
    run_dir = tmp_path / "killed"
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import a2c_breakout as a2c
original, calls = os.{call}, []
def fatal(*arguments):
    calls.append(arguments)
    if len(calls) == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)
os.{call} = fatal
a2c.train(a2c.parse_args({[*FLAGS, "--resume", str(run_dir)]!r}))
"""
    assert run("-c", code, script="-u").returncode == -9
    assert (run_dir / "checkpoint.pth.tmp").exists() == (update == 14)
    assert update_of(run_dir) == update
    train(run_dir)
    assert ending(run_dir) == ending(whole)
    assert not list(run_dir.glob("*.tmp"))


def stop_at(monkeypatch, update: int) -> None:
    """Has Ctrl-C come in the middle of an update, counted from where the run starts."""
    losses, calls = a2c.compute_losses, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == update + 1:
            os.kill(os.getpid(), signal.SIGINT)
        return losses(*arguments)

    monkeypatch.setattr(a2c, "compute_losses", interrupted)


def test_a_falling_rate_goes_on_where_it_was(tmp_path, monkeypatch):
    train(tmp_path / "one_go", *SHORT)
    stop_at(monkeypatch, 12)
    train(tmp_path / "in_two", *SHORT)
    assert update_of(tmp_path / "in_two") == 13
    train(tmp_path / "in_two")
    assert ending(tmp_path / "in_two") == ending(tmp_path / "one_go")
    with pytest.raises(ValueError, match="--total-timesteps: .* while the learning rate falls"):
        train(tmp_path / "in_two", "--total-timesteps", 500)


def test_a_constant_rate_goes_on_as_long_as_one_wants(tmp_path):
    train(tmp_path / "one_go", *SHORT, "--no-anneal-lr")
    train(tmp_path / "longer", *SHORT, "--no-anneal-lr", "--total-timesteps", 300)
    train(tmp_path / "longer", "--total-timesteps", 400)
    assert ending(tmp_path / "longer") == ending(tmp_path / "one_go")
    rates = {rate for _, rate in points(tmp_path / "one_go", "charts/learning_rate")}
    assert [round(rate, 9) for rate in rates] == [7e-4]
    with pytest.raises(ValueError, match="--total-timesteps: .* has done 400 already"):
        train(tmp_path / "longer", "--total-timesteps", 40)


def test_a_run_goes_on_with_another_number_of_workers(tmp_path, monkeypatch, capsys):
    """The same games go on; only the rounding differs, and the run says so."""
    train(tmp_path / "one_go", *SHORT)
    stop_at(monkeypatch, 12)
    train(tmp_path / "in_two", *SHORT)
    assert "not bit for bit" not in capsys.readouterr().out
    torch.set_num_threads(3)
    train(tmp_path / "in_two")
    said = "It ran on cpu, 2 threads, 1 rank(s): it continues, but not bit for bit."
    assert said in capsys.readouterr().out
    one_go, in_two = (
        torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)
        for name in ("one_go", "in_two")
    )
    assert digest(one_go["envs"]) == digest(in_two["envs"])
    for name, weight in one_go["network"].items():
        assert torch.allclose(weight, in_two["network"][name], atol=1e-4)


def test_a_finished_run_stays_as_it_is(copy):
    before = ending(copy)
    assert train(copy)["timesteps"] == 1000
    assert ending(copy) == before


def test_a_run_killed_before_its_first_checkpoint_starts_again(whole, tmp_path):
    shutil.copy(whole / "args.json", tmp_path)
    shutil.copy(whole / "weight_0.pth", tmp_path)
    shutil.copy(whole / "args.json", tmp_path / "checkpoint.pth.tmp")
    assert train(tmp_path, "--total-timesteps", 100)["timesteps"] == 100


def test_a_second_process_in_the_folder_is_refused_and_the_first_goes_on(whole, tmp_path):
    run_dir = tmp_path / "shared"
    run_dir.mkdir()
    (run_dir / "lock").touch()  # of one that was killed before it had begun
    process = start(*FLAGS, "--resume", run_dir)
    process.send_signal(signal.SIGSTOP)
    before = contents(run_dir)
    refused = one_line(run("--resume", run_dir))
    assert refused == f"error: another process is training in {run_dir}"
    assert contents(run_dir) == before
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=120)[1] == "" and process.returncode == 0
    assert ending(run_dir) == ending(whole)


def test_a_killed_process_leaves_no_lock(tmp_path):
    """Though its workers live on for a moment: here they are stopped."""
    process = start(*FLAGS, "--resume", tmp_path / "run")
    workers = children(process.pid)
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    process.kill()
    process.wait()  # communicate() would wait for the workers, too
    assert not gone(workers, seconds=0)
    a2c.lock(tmp_path / "run").close()
    for pid in workers:
        os.kill(pid, signal.SIGCONT)
    assert gone(workers)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--num-envs", 16),  # the default, but given
        ("--num-steps", 6),
        ("--gamma", 0.5),
        ("--seed", 2),
        ("--env-id", "PongNoFrameskip-v4"),
        ("--anneal-lr", None),
        ("--no-clip-rewards", None),
        ("--max-idle-steps", 0),
        ("--average-decay", 0),
        ("--bf16", None),
        ("--learning-rate", 1e-4),
        ("--rmsprop-alpha", 0.9),
        ("--rmsprop-eps", 1e-3),
        ("--value-loss-coef", 1),
        ("--entropy-coef", 0),
        ("--max-grad-norm", 1),
    ],
)
def test_a_flag_that_would_change_the_result_is_refused_by_name(copy, flag, value):
    before = contents(copy)
    with pytest.raises(ValueError, match=flag.replace("--no-", "--") + ": .* began with"):
        train(copy, flag, *([] if value is None else [value]))
    assert contents(copy) == before


def test_intervals_and_the_place_may_change(copy, tmp_path, pretend_a_gpu):
    pretend_a_gpu(a2c)  # --device cpu does not ask
    flags = ["--checkpoint-every", 3, "--log-every", 1, "--save-every", 5, "--device", "cpu"]
    train(copy, *flags, "--runs-dir", tmp_path)
    saved = json.loads((copy / "args.json").read_text())
    assert (saved["checkpoint_every"], saved["log_every"], saved["save_every"]) == (3, 1, 5)


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return self.path.touch, ()


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
        torch.save({"progress": Malicious(folder.parent / "it_ran")}, path)
    elif kind == "weights":
        shutil.copy(folder / "weight_end.pth", path)
    elif kind == "a list":
        torch.save([1, 2], path)
    elif kind == "args":
        (folder / "args.json").write_text('{"seed": ')
    elif kind == "args of another script":
        (folder / "args.json").write_text('{"seed": 0, "num_episodes": 500}')
    elif kind == "missing":  # a new start would overwrite the weights
        path.unlink()
    else:
        checkpoint = torch.load(path, weights_only=True)
        if kind == "another game":
            checkpoint["env_id"] = "PongNoFrameskip-v4"
        elif kind == "more environments":
            checkpoint["envs"] *= 2
        elif kind == "another network":
            del checkpoint["network"]["actor.bias"]
        torch.save(checkpoint, path)


@pytest.mark.parametrize(
    "kind",
    ["truncated", "empty", "noise", "noise in the middle", "code", "weights", "a list", "args",
     "args of another script", "missing", "another game", "more environments", "another network"],
)  # fmt: skip
def test_a_damaged_or_foreign_checkpoint_is_refused_and_kept(copy, kind):
    damage(kind, copy)
    before = contents(copy)
    with pytest.raises(ValueError, match=f"{copy}.* (damaged|missing|of another version)") as error:
        train(copy)
    assert "\n" not in str(error.value)
    assert contents(copy) == before and not (copy.parent / "it_ran").exists()


def test_a_refusal_is_one_line_on_the_command_line(copy):
    damage("noise", copy)
    assert "checkpoint.pth is damaged" in one_line(run("--resume", copy))


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "diary.txt").write_text("not a run")
    with pytest.raises(ValueError, match="neither the folder of a run nor empty"):
        train(tmp_path)
    with pytest.raises(OSError, match="diary.txt"):
        train(tmp_path / "diary.txt")
    assert [file.name for file in tmp_path.iterdir()] == ["diary.txt"]


def test_a_killed_worker_ends_the_run_in_one_line(tmp_path):
    process = start("--num-envs", 4, "--checkpoint-every", 5, "--resume", tmp_path / "run")
    workers = children(process.pid)
    os.kill(workers[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1 and gone(workers, 5)
    assert errors == f"error: worker process {workers[-1]} died; continue with --resume\n"
    assert update_of(tmp_path / "run") % 5 == 0


def test_more_environments_than_files_may_be_open(tmp_path):
    """As 1024 environments under the usual limit: no environment needs a file of its own."""
    most = (96, 96)
    process = run("--num-envs", 96, "--num-steps", 1, "--total-timesteps", 96, "--resume", tmp_path,
                  preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, most))  # fmt: skip
    assert process.returncode == 0, process.stderr


def test_a_full_disk_ends_the_run_in_one_line(copy):
    """A limit on a file's size stands in: the kernel refuses the write in the same place."""
    before = (copy / "checkpoint.pth").read_bytes()
    seconds = json.loads((copy / "result.json").read_text())["seconds"]
    limits = (len(before) // 2, len(before) // 2)
    process = run("--resume", copy, "--total-timesteps", 1200,
                  preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))  # fmt: skip
    assert f"cannot write {copy / 'checkpoint.pth'}" in one_line(process)
    assert (copy / "checkpoint.pth").read_bytes() == before
    assert not list(copy.glob("*.tmp"))
    result = train(copy)
    assert result["timesteps"] == 1200 and result["seconds"] > seconds


def test_a_disk_too_full_for_the_curves_ends_the_run_in_one_line(tmp_path):
    """TensorBoard writes them in a thread of its own, which must not print a traceback."""
    process = start("--num-envs", 4, "--log-every", 1, "--resume", tmp_path / "run")
    workers = children(process.pid)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1000, 1000))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and gone(workers)
    assert errors == "error: [Errno 27] File too large\n"
    assert update_of(tmp_path / "run") == 0


@pytest.mark.parametrize(("begun", "goes_on"), [("cpu", "cpu"), ("auto", "auto"), ("cuda", "auto")])
def test_a_run_stays_on_the_cpu_but_not_on_a_gpu_that_may_be_missing(copy, begun, goes_on):
    flags = json.loads((copy / "args.json").read_text())
    (copy / "args.json").write_text(json.dumps(flags | {"device": begun}))
    assert a2c.parse_args(["--resume", str(copy)]).device == goes_on


def test_a_nan_in_the_loss_leaves_the_last_checkpoint(copy, monkeypatch):
    original = a2c.compute_losses

    def poisoned(*arguments):
        value_loss, policy_loss, entropy = original(*arguments)
        return value_loss * float("nan"), policy_loss, entropy

    files = copy / "checkpoint.pth", copy / "weight_end.pth"
    before = [file.read_bytes() for file in files]
    monkeypatch.setattr(a2c, "compute_losses", poisoned)
    with pytest.raises(ValueError, match="update 50: gradient not finite"):
        train(copy, "--total-timesteps", 2000)
    assert [file.read_bytes() for file in files] == before


def test_an_infinite_loss_ends_the_run_before_anything_is_replaced(tmp_path):
    with pytest.raises(ValueError, match=r"update \d+: gradient not finite"):
        train(tmp_path, *SHORT, "--learning-rate", 1e30)
    assert update_of(tmp_path) == 0 and not (tmp_path / "weight_end.pth").exists()
