"""Tests of a2c_breakout.py under torchrun: two ranks on this machine, talking over gloo."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from test_a2c_breakout import children, gone

import a2c_breakout as a2c

SCRIPT = Path(a2c.__file__)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def torchrun(*command, timeout=200):
    return subprocess.run([*TORCHRUN, *map(str, command)], capture_output=True, text=True, timeout=timeout)


def test_two_ranks_keep_the_same_parameters(tmp_path):
    """Every rank writes down the network it ends with."""
    (tmp_path / "spy.py").write_text(f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import torch
import a2c_breakout as a2c
networks = []
class Spy(a2c.ActorCritic):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        networks.append(self)
a2c.ActorCritic = Spy
result = a2c.train(a2c.parse_args(["--num-envs", "6", "--total-timesteps", "600", "--resume", {str(tmp_path / "run")!r}]))
torch.save(networks[0].state_dict(), f"{tmp_path}/rank{{a2c.RANK}}.pth")
""")
    process = torchrun(tmp_path / "spy.py")
    assert process.returncode == 0, process.stderr
    ranks = [torch.load(tmp_path / f"rank{rank}.pth", weights_only=True) for rank in range(2)]
    saved = torch.load(tmp_path / "run" / "weight_end.pth", weights_only=True)
    start = torch.load(tmp_path / "run" / "weight_0.pth", weights_only=True)
    for name in saved:
        assert torch.equal(ranks[0][name], ranks[1][name]) and torch.equal(ranks[0][name], saved[name])
    assert not torch.equal(saved["actor.weight"], start["actor.weight"])
    assert process.stdout.count("finished timesteps") == 1 and process.stdout.count("Everything is in") == 1
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)
    first, second = checkpoint["ranks"]
    assert len(first["envs"]) == len(second["envs"]) == 3
    states = [env["noop_generator"]["state"]["state"] for env in first["envs"] + second["envs"]]
    assert len(set(states)) == 6  # six environments, six seeds
    assert not torch.equal(first["generator"], second["generator"])

    again = subprocess.run([sys.executable, str(SCRIPT), "--resume", str(tmp_path / "run")], capture_output=True, text=True)
    assert again.returncode == 1 and "2 ranks, not of 1" in again.stderr


def test_the_averaged_gradient_is_that_of_the_joined_batch(tmp_path):
    (tmp_path / "gradient.py").write_text(f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import torch
import a2c_breakout as a2c
a2c.dist.init_process_group()
torch.manual_seed(0)
network = a2c.ActorCritic(4)
torch.nn.init.normal_(network.actor.weight, std=0.1)
observations = torch.randint(0, 256, (8, 84, 84, 4), dtype=torch.uint8)
actions, returns = torch.randint(0, 4, (8,)), torch.randn(8)
def gradients(share):
    network.zero_grad()
    value_loss, policy_loss, entropy = a2c.compute_losses(network, observations[share], actions[share], returns[share])
    (0.5 * value_loss + policy_loss - 0.01 * entropy).backward()
parameters = list(network.parameters())
gradients(slice(4 * a2c.RANK, 4 * a2c.RANK + 4))
assert a2c.average_gradients(parameters, stop=a2c.RANK == 1) is True  # one rank was asked to stop: both know
averaged = [parameter.grad.clone() for parameter in parameters]
gradients(slice(None))
for parameter, mean in zip(parameters, averaged):
    assert (parameter.grad - mean).norm() <= 1e-5 * mean.norm(), parameter.shape
assert a2c.average_gradients(parameters, stop=False) is False
a2c.dist.destroy_process_group()
""")
    process = torchrun(tmp_path / "gradient.py")
    assert process.returncode == 0, process.stderr


def test_environments_that_do_not_divide_are_refused(tmp_path):
    process = torchrun(SCRIPT, "--num-envs", 5, "--runs-dir", tmp_path / "runs")
    assert process.returncode != 0 and "--num-envs must be a multiple of 2, the number of ranks, not 5" in process.stderr
    assert not (tmp_path / "runs").exists()


def test_one_rank_dying_ends_all_and_the_run_can_go_on(tmp_path):
    flags = ["--num-envs", "4", "--checkpoint-every", "5", "--resume", str(tmp_path / "run")]
    process = subprocess.Popen([*TORCHRUN, str(SCRIPT), *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (tmp_path / "run" / "checkpoint.pth").exists() and time.time() < deadline:
        time.sleep(0.1)
    ranks = children(process.pid)
    workers = [worker for rank in ranks for worker in children(rank)]
    assert len(ranks) == 2 and len(workers) >= 2
    os.kill(ranks[1], signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    assert gone(ranks + workers)
    update = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)["progress"]["update"]
    assert update % 5 == 0
    assert torchrun(SCRIPT, *flags, "--total-timesteps", 20 * (update + 5)).returncode == 0
