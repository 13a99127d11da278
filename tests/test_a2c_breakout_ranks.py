"""a2c_breakout.py on several ranks, which talk over gloo: two processes on this machine."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
from launch import Process, children, gone, wait_for
from short_runs import curves
from test_a2c_breakout import SCRIPT, SOURCE, at, load, one_line, slow
from test_a2c_breakout_resume import CTRL_C, FLAGS, begin, digest


def ranks(run_dir, *scripts, folders=None, **changes) -> list:
    """Begins a run as torchrun does, a script for each rank, in one folder or in several."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    env |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    return [
        begin(folder, script, env=env | {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}, **changes)
        for rank, (script, folder) in enumerate(zip(scripts, folders or [run_dir] * 2))
    ]


@slow
def test_two_ranks_make_the_run_of_one_process(tmp_path):
    """Both stop as one of them gets Ctrl-C; equal up to rounding. One process ends their run.

    Later the weights may part: RMSprop's first step of a weight is large, however small its
    gradient is. The games stay the same.
    """
    flags = {"num_envs": 4, "num_steps": 5, "max_idle_steps": 12, "total_timesteps": 160}
    stopping = "            if stopping:\n"
    note = "torch.save(network.state_dict(), run_dir / f'rank{RANK}.pth')"
    note = f"{stopping}                {note}\n{stopping}"  # the network that the rank ends with
    programs = SOURCE, at(4, CTRL_C)
    two, one = tmp_path / "two", tmp_path / "one"
    first, second = ranks(two, *(code.replace(stopping, note) for code in programs), **flags)
    assert (first.wait(), second.wait()) == (0, 0), first.stderr + second.stderr
    assert "100 timesteps are done; go on with" in first.stdout and second.stdout == ""
    networks = [load(two / f"rank{rank}.pth") for rank in (0, 1)]
    networks.append(load(two / "checkpoint.pth")["network"])
    assert digest(networks[0]) == digest(networks[1]) == digest(networks[2])
    begin(one, programs[1], **flags).wait()
    for name, weight in load(one / "checkpoint.pth")["network"].items():
        assert torch.allclose(weight, networks[0][name], rtol=0, atol=2e-5)
    for folder in (one, two):
        assert begin(folder, **flags).wait() == 0
    envs = [load(folder / "checkpoint.pth")["envs"] for folder in (one, two)]
    assert digest(envs[0]) == digest(envs[1])
    lengths = [curves(folder)["charts/episodic_length"] for folder in (one, two)]
    assert lengths[0] == lengths[1] != []


@pytest.mark.parametrize("what", ["flags", "checkpoints"])
def test_ranks_with_different_flags_or_checkpoints_are_refused_in_a_line_each(what, tmp_path):
    other, folders = SOURCE, None
    if what == "flags":
        other = SOURCE.replace("entropy_coef: float = 0.01", "entropy_coef: float = 0.02")
    else:  # node 1 does not see the folder in which node 0 goes on
        folders = tmp_path / "run", tmp_path / "empty"
        assert begin(folders[0], at(4, CTRL_C)).wait() == 0
    pair = ranks(tmp_path, SOURCE, other, folders=folders)
    for rank, process in enumerate(pair):
        line = "the ranks were given different flags, or see different checkpoints"
        assert one_line(process) == f"error: rank {rank}: {line}"


def test_environments_must_divide_among_the_ranks_and_several_hosts_name_their_network(tmp_path):
    env = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "1"}
    process = begin(tmp_path / "run", env=env)
    assert "rank 0: --num-envs must be a multiple of 3, the number of ranks" in one_line(process)
    assert not (tmp_path / "run").exists()
    (tmp_path / "args.json").write_text(json.dumps(FLAGS | {"num_envs": 6}))  # they are counted
    process = begin(tmp_path, env=env, num_envs=6)
    assert "rank 0: set GLOO_SOCKET_IFNAME to the network interface" in one_line(process)


@slow
def test_a_rank_that_is_missing_ends_the_others_in_one_line(tmp_path):
    """After a minute; here, two seconds."""
    [alone] = ranks(tmp_path, SOURCE.replace("minutes=1", "seconds=2"))
    assert one_line(alone).startswith("error: rank 0: ")


@slow
def test_torchrun_ends_all_ranks_when_one_dies_and_the_run_goes_on(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    flags = ["--num-envs", "4", "--checkpoint-every", "5", "--resume", str(tmp_path)]
    flags += ["--total-timesteps", "40000"]  # should this test fail, they end soon
    process = subprocess.Popen([*command, SCRIPT, *flags], stderr=subprocess.PIPE, text=True)
    assert wait_for((tmp_path / "checkpoint.pth").exists, 120)
    [zero, one] = children(process.pid)
    workers = [worker for rank in (zero, one) for worker in children(rank)]
    os.kill(one, signal.SIGKILL)
    assert process.wait(60) != 0 and gone([zero, one, *workers]) and len(workers) >= 2
    errors = [line for line in process.stderr if line.startswith("error: ")]
    assert len(errors) <= 1 and all(line.startswith("error: rank 0: ") for line in errors)
    saved = load(tmp_path / "checkpoint.pth")["progress"]["timesteps"]
    assert saved > 0 and saved % 100 == 0
    assert Process(at(saved // 20 + 3, CTRL_C), "--resume", tmp_path).wait() == 0
