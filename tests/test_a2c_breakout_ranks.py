"""a2c_breakout.py under torchrun: two ranks on this machine, talking over gloo."""

import os
import signal
import subprocess
import sys
import time

import torch
from test_a2c_breakout import SCRIPT, children, gone, points, started, two_workers  # noqa: F401
from test_a2c_breakout_resume import SHORT, stop_at, train, update_of

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def torchrun(*command):
    command = [*TORCHRUN, *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def test_two_ranks_make_the_run_of_one_process(tmp_path, monkeypatch):
    """Begun by two ranks, gone on with by one process, ended by two: equal up to rounding.

    The first two stop because one of them gets Ctrl-C. Each rank notes the network it ends with.
    """
    (tmp_path / "spy.py").write_text(f"""
import os, signal, sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import torch
import a2c_breakout as a2c
learn, losses, calls = a2c.learn, a2c.compute_losses, []
stop_at, flags = int(sys.argv[1]), sys.argv[2:]
def spied_learn(args, network, *rest):
    learn(args, network, *rest)
    torch.save(network.state_dict(), f"{tmp_path}/rank{{a2c.RANK}}.pth")
def interrupted(*arguments):
    calls.append(arguments)
    if len(calls) == stop_at and a2c.RANK == 1:
        os.kill(os.getpid(), signal.SIGINT)
    return losses(*arguments)
a2c.learn, a2c.compute_losses = spied_learn, interrupted
a2c.train(a2c.parse_args([*flags, "--resume", {str(tmp_path / "run")!r}]))
""")
    first = torchrun(tmp_path / "spy.py", 5, *SHORT)
    assert first.returncode == 0, first.stderr
    assert update_of(tmp_path / "run") == 5
    assert first.stdout.count("continue with --resume") == 1
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        train(tmp_path / "run")
    assert update_of(tmp_path / "run") == 12
    last = torchrun(tmp_path / "spy.py", 8)  # the last update: there is nothing left to go on with
    assert last.returncode == 0, last.stderr
    assert "continue with" not in last.stdout
    assert last.stdout.count("Everything is in") == last.stdout.count("not bit for bit") == 1
    assert update_of(tmp_path / "run") == 20

    train(tmp_path / "one_go", *SHORT)
    expected, checkpoint = (
        torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)
        for name in ("one_go", "run")
    )
    ranks = [torch.load(tmp_path / f"rank{rank}.pth", weights_only=True) for rank in range(2)]
    for name, weight in expected["network"].items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        assert torch.equal(ranks[0][name], checkpoint["network"][name])
        assert torch.allclose(weight, ranks[0][name], atol=1e-4)
    for mine, other in zip(checkpoint["envs"], expected["envs"], strict=True):
        assert mine["frames"] == other["frames"] and mine["game"] == other["game"]
        assert mine["generator"] == other["generator"]
    lengths = [points(tmp_path / name, "charts/episodic_length") for name in ("run", "one_go")]
    assert lengths[0] == lengths[1] != []


def test_the_averaged_gradient_is_that_of_the_joined_batch(tmp_path):
    (tmp_path / "gradient.py").write_text(f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import torch
import a2c_breakout as a2c
a2c.dist.init_process_group("gloo")
torch.manual_seed(0)
network = a2c.ActorCritic(4)
torch.nn.init.normal_(network.actor.weight, std=0.1)
observations = torch.randint(0, 256, (8, 4, 84, 84), dtype=torch.uint8)
actions, returns = torch.randint(0, 4, (8,)), torch.randn(8)
def gradients(share):
    batch = observations[share], actions[share], returns[share]
    value_loss, policy_loss, entropy = a2c.compute_losses(network, *batch)
    loss = 0.5 * value_loss + policy_loss - 0.01 * entropy
    return list(torch.autograd.grad(loss, list(network.parameters())))
means, stop = gradients(slice(4 * a2c.RANK, 4 * a2c.RANK + 4)), torch.tensor(float(a2c.RANK))
a2c.average_over_ranks([stop, *means])
assert stop == 0.5 and a2c.gather("ab"[a2c.RANK]) == ["a", "b"]
for whole, mean in zip(gradients(slice(None)), means):
    assert (whole - mean).norm() <= 1e-5 * mean.norm(), whole.shape
a2c.dist.destroy_process_group()
""")
    process = torchrun(tmp_path / "gradient.py")
    assert process.returncode == 0, process.stderr


def test_environments_that_do_not_divide_are_refused(tmp_path):
    process = torchrun(SCRIPT, "--num-envs", 5, "--runs-dir", tmp_path / "runs")
    assert process.returncode != 0 and not (tmp_path / "runs").exists()
    assert "error: --num-envs must be a multiple of 2, the number of ranks" in process.stderr


def test_one_rank_dying_ends_all_and_the_run_can_go_on(tmp_path):
    flags = ["--num-envs", "4", "--checkpoint-every", "5", "--no-anneal-lr"]
    flags += ["--resume", str(tmp_path / "run")]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([*TORCHRUN, str(SCRIPT), *flags], **quiet)
    started.append(process)
    deadline = time.time() + 120
    while not (tmp_path / "run" / "checkpoint.pth").exists() and time.time() < deadline:
        time.sleep(0.1)
    ranks = children(process.pid)
    workers = [worker for rank in ranks for worker in children(rank)]
    assert len(ranks) == 2 and len(workers) >= 2
    os.kill(ranks[1], signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    assert gone(ranks + workers)
    update = update_of(tmp_path / "run")
    assert update % 5 == 0
    train(tmp_path / "run", "--total-timesteps", 20 * (update + 5))
