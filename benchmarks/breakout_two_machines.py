"""Tries a2c_breakout.py on two machines: network namespaces, joined by a virtual cable.

    python benchmarks/breakout_two_machines.py                     # Linux, as root; 20 minutes
    python benchmarks/breakout_two_machines.py killed_rank ctrl_c  # these checks alone

Each machine has a loopback interface and one end of the cable, eth0 (`ip`, of Debian's iproute2);
torchrun starts one rank on each. The checks are the functions of CHECKS: what two machines should
do, and the ways in which they were seen to hang. Most of the time goes into waiting for time-outs.
Each check prints a line, and one for each machine. If one fails, the exit code is 1, and the
folder with the logs stays.

A row for each machine of a check in benchmarks/results/breakout_two_machines.csv: how many seconds
its rank and torchrun lived on, counted from the start or from what happened to them; torchrun's
exit code (none if it had to be killed); and what the rank wrote to stderr.
"""

import argparse
import csv
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
NAMESPACES = [f"breakout{node}-{os.getpid()}" for node in range(2)]
ADDRESSES = ["10.99.0.1", "10.99.0.2"]
STATIC = [f"--node-rank {node} --master-addr {ADDRESSES[0]}".split() for node in range(2)]
MINUTE = [[*static, "--rdzv-conf", "timeout=60"] for static in STATIC]  # 900 seconds else
C10D = [
    f"--rdzv-backend c10d --rdzv-endpoint {ADDRESSES[0]} --rdzv-id 1 "
    f"--rdzv-conf is_host={1 - node} --local-addr {ADDRESSES[node]}".split()
    for node in range(2)
]
FLAGS = "--num-envs 4 --total-timesteps 1000 --checkpoint-every 10 --device cpu".split()
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
SOON, TIME_OUT, PATIENCE = 150, 450, 600  # seconds: a minute; five, on a busy machine; it hangs


# ---- two machines --------------------------------------------------------------


def ip(*words) -> str:
    command = ["ip", *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def lay_cable() -> None:
    for namespace in NAMESPACES:
        ip("netns", "add", namespace)
    one, other = NAMESPACES
    ip("link", "add", "eth0", "netns", one, "type", "veth", "peer", "eth0", "netns", other)
    for namespace, address in zip(NAMESPACES, ADDRESSES):
        # Docker's bridge has the same address on each machine, and leads to no other.
        ip("-n", namespace, "link", "add", "docker0", "type", "bridge")
        for interface, its in ("eth0", address), ("docker0", "172.17.0.1"), ("lo", None):
            ip("-n", namespace, "link", "set", interface, "up")
            if its:
                ip("-n", namespace, "address", "add", f"{its}/24", "dev", interface)


class Machine:
    """What runs on one of the two: torchrun, below it the rank, below that its worker."""

    def __init__(self, node: int, folder: Path, *flags, form=STATIC, interface="eth0", loop=False):
        self.node = node
        self.logs = Path(tempfile.mkdtemp(prefix=f"node{node}-", dir=folder))
        command = ["bash", "-c", 'until "$@"; do sleep 2; done', "-"] if loop else []
        command += [sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, *form[node]]
        command += ["--log-dir", self.logs, "--redirects", 3]  # the rank's stdout and stderr
        command += [ROOT / "a2c_breakout.py", *FLAGS, *flags]
        command = ["ip", "netns", "exec", NAMESPACES[node], *map(str, command)]
        environment = ENVIRONMENT | ({"GLOO_SOCKET_IFNAME": interface} if interface else {})
        with open(self.logs / "torchrun.log", "w") as log:
            self.torchrun = subprocess.Popen(  # a session is a terminal, for Ctrl-C
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        self.rank_seconds = self.torchrun_seconds = 0.0  # when they were last seen: see wait

    def processes(self) -> list[int]:
        """Its processes, a parent before its child."""
        return sorted(int(pid) for pid in ip("netns", "pids", NAMESPACES[self.node]).split())

    def stderr(self) -> str:
        """What the rank wrote, without what its libraries log: [W1128 21:48:58 socket.cpp ..."""
        files = self.logs.glob("*/attempt_0/0/stderr.log")
        lines = [line for file in files for line in file.read_text().splitlines()]
        return "\n".join(x.replace(f"{ROOT}/", "") for x in lines if not x.startswith("["))


def start(folder: Path, *flags, flags_of_1=(), **settings) -> list[Machine]:
    """Starts both; what flags_of_1 says holds on node 1 alone."""
    extra = (), flags_of_1
    return [Machine(node, folder, *flags, *extra[node], **settings) for node in range(2)]


def start_training(folder: Path, **settings) -> list[Machine]:
    """Starts both, with one disk, and returns behind the first checkpoint."""
    machines = start(folder, "--resume", folder / "run", **settings)
    while not (folder / "run" / "checkpoint.pth").exists():
        assert all(machine.torchrun.poll() is None for machine in machines), folder
        time.sleep(0.1)
    return machines


def wait(machines: list[Machine]) -> list[Machine]:
    """Waits for the end of all processes, and notes until when the machines were busy."""
    started, busy = time.monotonic(), machines
    while busy and (seconds := time.monotonic() - started) < PATIENCE:
        time.sleep(0.2)
        busy = [m for m in machines if m.torchrun.poll() is None or m.processes()]
        for machine in busy:
            machine.torchrun_seconds = seconds
            if len(machine.processes()) > 1:
                machine.rank_seconds = seconds
    return machines


def kill_all() -> None:
    for namespace in NAMESPACES:
        for pid in ip("netns", "pids", namespace).split():
            os.kill(int(pid), signal.SIGKILL)


# ---- what is checked: each returns its machines, and whether the promise holds ----


def told(machines: list[Machine], words: str = "", within: float = SOON) -> bool:
    """Whether each rank ended with one line, which has these words."""
    lines = [machine.stderr() for machine in machines]
    one_line = all(line.startswith("error: rank ") and "\n" not in line for line in lines)
    soon = all(m.torchrun.poll() == 1 and m.torchrun_seconds < within for m in machines)
    return one_line and soon and all(words in line for line in lines)


def same_run(run_dir: Path) -> bool:
    """Whether a run has the weights and games of one process with all environments."""
    alone = run_dir.parent.parent / "alone"
    if not alone.exists():
        command = [sys.executable, ROOT / "a2c_breakout.py", *FLAGS, "--resume", alone]
        subprocess.run(command, env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
    ours, theirs = (
        torch.load(folder / "checkpoint.pth", weights_only=True) for folder in (run_dir, alone)
    )
    scores, expected_scores = (run["progress"]["last_scores"] for run in (ours, theirs))
    start = torch.load(alone / "weight_0.pth", weights_only=True)
    mine, expected, start = (
        torch.cat([weight.flatten() for weight in weights.values()])
        for weights in (ours["network"], theirs["network"], start)
    )
    # Rounding alone makes 3% of the way from the start, an entropy coefficient of 0.011 makes 25%.
    near = (mine - expected).norm() < 0.1 * (expected - start).norm()
    return scores == expected_scores != [] and bool(near)


def trained(machines: list[Machine]) -> bool:
    """Whether both came to the end without an error."""
    return all(machine.torchrun.poll() == 0 and not machine.stderr() for machine in machines)


def goes_on(folder: Path) -> bool:
    return trained(wait(start(folder, "--resume", folder / "run"))) and same_run(folder / "run")


def no_interface(folder: Path):
    """Without GLOO_SOCKET_IFNAME both are told to set it"""
    machines = wait(start(folder, "--runs-dir", folder, interface=None))
    return machines, told(machines, "set GLOO_SOCKET_IFNAME")


def one_run(folder: Path):
    """With disks of their own node 0 writes, and the run is that of one process"""
    disks = folder / "disk0", folder / "disk1"
    flags = ["--runs-dir", disks[1]]  # of the two --runs-dir the last one holds
    machines = wait(start(folder, "--runs-dir", disks[0], flags_of_1=flags))
    (run_dir,) = disks[0].iterdir()
    one_writer = len([*run_dir.glob("events.*")]) == 1 and not disks[1].exists()
    return machines, one_writer and trained(machines) and same_run(run_dir)


def c10d(folder: Path):
    """The c10d form with one disk: the same run"""
    machines = wait(start(folder, "--resume", folder / "run", form=C10D))
    return machines, trained(machines) and same_run(folder / "run")


def other_seed(folder: Path):
    """Another --seed on node 1 is refused"""
    machines = wait(start(folder, "--runs-dir", folder, flags_of_1=["--seed", 2]))
    return machines, told(machines, "different flags")


def other_interval(folder: Path):
    """Another --checkpoint-every on node 1 is refused"""
    flags = ["--checkpoint-every", 20]
    machines = wait(start(folder, "--runs-dir", folder, flags_of_1=flags))
    return machines, told(machines, "different flags")


def other_disk(folder: Path):
    """A run that node 1 cannot see does not go on"""
    wait(start_training(folder))
    flags = ["--resume", folder / "none"]
    machines = wait(start(folder, "--resume", folder / "run", flags_of_1=flags))
    return machines, told(machines, "different checkpoints")


def killed_rank(folder: Path):
    """SIGKILL to the rank on node 1 ends node 0, and the run goes on when started again"""
    machines = start_training(folder)
    os.kill(machines[1].processes()[-2], signal.SIGKILL)  # torchrun, the rank, its worker
    return wait(machines), told(machines[:1]) and goes_on(folder)


def in_a_loop(folder: Path):
    """SIGKILL to the rank on node 1: a loop on each machine brings the run to its end"""
    machines = start_training(folder, loop=True)
    os.kill(machines[1].processes()[-2], signal.SIGKILL)
    return wait(machines), same_run(folder / "run")


def ctrl_c(folder: Path):
    """Ctrl-C on node 0 has both save and stop, and the run goes on when started again"""
    machines = start_training(folder)
    os.killpg(machines[0].torchrun.pid, signal.SIGINT)
    wait(machines)
    soon = all(m.torchrun_seconds < SOON and not m.stderr() for m in machines)
    return machines, soon and goes_on(folder)


def ctrl_c_on_node_1(folder: Path):
    """Ctrl-C on node 1 does the same, but torchrun on node 0 waits for five minutes"""
    machines = start_training(folder)
    os.killpg(machines[1].torchrun.pid, signal.SIGINT)
    wait(machines)
    soon = all(m.rank_seconds < SOON and not m.stderr() for m in machines)
    return machines, soon and machines[0].torchrun_seconds < TIME_OUT and goes_on(folder)


def plugged_in_again(folder: Path):
    """A cable that is out for twenty seconds costs this time alone"""
    machines = start_training(folder)
    ip("-n", NAMESPACES[1], "link", "set", "eth0", "down")
    time.sleep(20)
    ip("-n", NAMESPACES[1], "link", "set", "eth0", "up")
    return wait(machines), trained(machines) and same_run(folder / "run")


def cut_cable(folder: Path):
    """A cable that stays out ends both ranks after a minute"""
    machines = start_training(folder)
    ip("-n", NAMESPACES[1], "link", "set", "eth0", "down")
    wait(machines)
    ip("-n", NAMESPACES[1], "link", "set", "eth0", "up")
    return machines, told(machines) and goes_on(folder)


def wrong_flag(folder: Path):
    """A flag that node 1 refuses ends node 0 as well, after a minute"""
    machines = wait(start(folder, "--runs-dir", folder, flags_of_1=["--gamma", 2]))
    return machines, told(machines[:1])


def wrong_interface(folder: Path):
    """An interface to somewhere else ends both, after five minutes at most"""
    machines = wait(start(folder, "--runs-dir", folder, interface="docker0"))
    return machines, told(machines, within=TIME_OUT)


def absent_node_1(folder: Path):
    """Node 1 never comes: torchrun on node 0 ends after the minute that it is given"""
    machines = wait([Machine(0, folder, "--runs-dir", folder, form=MINUTE)])
    return machines, machines[0].torchrun.poll() == 1


def absent_node_0(folder: Path):
    """Node 0 never comes: torchrun on node 1 tries twice for the minute that it is given"""
    machines = wait([Machine(1, folder, "--runs-dir", folder, form=MINUTE)])
    return machines, machines[0].torchrun.poll() == 1


CHECKS = [
    no_interface, one_run, c10d, other_seed, other_interval, other_disk, killed_rank, in_a_loop,
    ctrl_c, ctrl_c_on_node_1, plugged_in_again, cut_cable, wrong_flag, wrong_interface,
    absent_node_1, absent_node_0,
]  # fmt: skip


def main() -> None:
    checks = {check.__name__: check for check in CHECKS}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checks", nargs="*", default=[*checks], help=f"of {', '.join(checks)}")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    # Both end the machines. Behind a shell's & SIGINT would be ignored, and so by the machines.
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.default_int_handler)
    folder, rows, failed = Path(tempfile.mkdtemp()), [], []
    lay_cable()
    try:
        for name in args.checks:
            print(f"{name}: {checks[name].__doc__} ... ", end="", flush=True)
            (folder / name).mkdir()
            machines, good = checks[name](folder / name)
            kill_all()
            failed += [] if good else [name]
            print("ok" if good else "FAILED")
            for machine in machines:
                ending = {
                    "node": machine.node,
                    "rank_seconds": f"{machine.rank_seconds:.1f}",
                    "torchrun_seconds": f"{machine.torchrun_seconds:.1f}",
                    "exit_code": machine.torchrun.poll(),
                    "stderr": machine.stderr(),
                }
                rows.append({"check": name} | ending)
                print("    " + ", ".join(f"{key} {value}" for key, value in ending.items()))
    finally:
        kill_all()
        for namespace in NAMESPACES:
            ip("netns", "delete", namespace)

    args.results.mkdir(parents=True, exist_ok=True)
    with (args.results / "breakout_two_machines.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    if failed:
        sys.exit(f"FAILED: {', '.join(failed)} ({folder} has the logs)")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
