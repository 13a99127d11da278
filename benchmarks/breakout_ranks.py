"""Times a2c_breakout.py under torchrun with 1 and 2 ranks, and works out what more would give.

    python benchmarks/breakout_ranks.py                              # 5 rounds, some 8 minutes
    python benchmarks/breakout_ranks.py --rounds 1 --updates 20 --results trial

First part, measured: 16 environments on this machine, owned by one rank or shared by two (gloo),
with the same cores in all. The averaging costs time; but one rank's emulators can use a core
while the other rank's network does not. The two take turns; what counts is the median over the
rounds of the ratio within a round.

Second part, on paper: n machines with one rank each, 16 environments a rank, the gradients
averaged by a ring all-reduce. The time of one update is

    T(n) = slowest(n) + packing + 2(n-1)/n (local + bytes/bandwidth) + 2(n-1) latency

    slowest     rollout and update, measured here by one rank with all cores; all ranks wait for the
                slowest: the expected maximum of n draws from the measured times. Games that start
                anew make some rollouts longer; a noisy machine makes this term too large.
    packing     measured: the gradients into one tensor and back out of it
    local       measured: all-reducing that tensor between two ranks of this machine, where
                2(n-1)/n is 1: the memory traffic and gloo's own work, added to the network's time
                though in part the two would overlap
    bandwidth   10 or 100 Gbit/s, of which nothing is lost
    latency     of each of the ring's 2(n-1) messages, 50 microseconds unless --latency says so

More ranks bring more timesteps a second, but less and less: the latency alone bounds them to 16 *
5 timesteps in 2 latency. Adding ranks is taken to stop paying at the n from which twice the ranks
bring less than 1.5 times the timesteps a second; n is at least 8, as the step from one rank to a
few pays for the whole averaging. That is speed alone: n ranks still make one gradient step of all
their transitions, so what the agent learns per timestep begins to fall much earlier.

Raw measurements in benchmarks/results/breakout_ranks.csv: seconds of one update of a training
run, or of one rollout, update, all-reduce or averaging (packing and all-reduce together).
"""

import argparse
import csv
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
ENV_ID, NUM_ENVS, NUM_STEPS = "BreakoutNoFrameskip-v4", 16, 5
CORES = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
PARAMETERS = 1_686_693  # of the network with Breakout's 4 actions
NETWORKS = {"10 Gbit/s": 10e9 / 8, "100 Gbit/s": 100e9 / 8}  # bytes a second
WARM_UP = 3  # of everything that is timed, not counted


# ---- what is timed: each of these runs in processes of its own ---------------------------------


def time_pieces(updates: int) -> dict[str, list[float]]:
    """Seconds of each rollout and of each update, as a2c_breakout does them."""
    import a2c_breakout
    import torch

    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(1)
    storage = a2c_breakout.RolloutStorage(NUM_STEPS, NUM_ENVS)
    seconds = {"rollout": [], "update": []}
    with a2c_breakout.ParallelEnvs(storage, ENV_ID, 1, CORES) as envs:
        envs.wait()
        network = a2c_breakout.ActorCritic(4)
        optimizer = torch.optim.RMSprop(network.parameters(), 7e-4, 0.99, 1e-5)
        for _ in range(updates + WARM_UP):
            started = time.perf_counter()
            for t in range(NUM_STEPS):
                storage.actions[t] = a2c_breakout.act(network, storage.observations[t], generator)
                envs.step(t)
            with torch.no_grad():
                last_values, _ = network(storage.observations[-1])
            returns = a2c_breakout.compute_returns(
                storage.rewards, storage.masks, last_values, 0.99
            )
            seconds["rollout"].append(time.perf_counter() - started)

            started = time.perf_counter()
            value_loss, policy_loss, entropy = a2c_breakout.compute_losses(
                network,
                storage.observations[:-1].flatten(0, 1),
                storage.actions.flatten(),
                returns.flatten(),
            )
            optimizer.zero_grad()
            (0.5 * value_loss + policy_loss - 0.01 * entropy).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
            optimizer.step()
            storage.observations[0] = storage.observations[-1]
            seconds["update"].append(time.perf_counter() - started)
    return seconds


def time_averaging(updates: int) -> dict[str, list[float]]:
    """Seconds of each all-reduce, and of each averaging of the gradients. Runs in every rank."""
    import a2c_breakout
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    parameters = list(a2c_breakout.ActorCritic(4).parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    assert sum(parameter.numel() for parameter in parameters) == PARAMETERS
    everything = torch.zeros(PARAMETERS + 1)  # as average_gradients sends it, with one number more
    seconds = {"all-reduce": [], "averaging": []}
    for _ in range(updates + WARM_UP):
        for what, function, arguments in [
            ("all-reduce", dist.all_reduce, [everything]),
            ("averaging", a2c_breakout.average_gradients, [parameters, False]),
        ]:
            dist.barrier()
            started = time.perf_counter()
            function(*arguments)
            seconds[what].append(time.perf_counter() - started)
    dist.destroy_process_group()
    return seconds


MEASURED = {"pieces": time_pieces, "averaging": time_averaging}


# ---- the rounds --------------------------------------------------------------------------------


def torchrun(ranks: int, *command) -> None:
    """Runs a script in so many ranks, which share the cores."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        ranks,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, CORES // ranks))}
    command = [str(word) for word in (*launcher, *command)]
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)


def time_training(ranks: int, updates: int) -> float:
    """Seconds of one update of a2c_breakout.py, without its start-up."""
    with tempfile.TemporaryDirectory() as folder:
        timesteps = updates * NUM_ENVS * NUM_STEPS
        flags = [
            "--num-envs",
            NUM_ENVS,
            "--total-timesteps",
            timesteps,
            "--device",
            "cpu",
            "--runs-dir",
            folder,
        ]
        torchrun(ranks, ROOT / "a2c_breakout.py", *flags)
        (result,) = Path(folder).glob("*/result.json")
        return NUM_ENVS * NUM_STEPS / json.loads(result.read_text())["steps_per_second"]


def measure(what: str, ranks: int, updates: int) -> dict[str, list[float]]:
    """Calls one of MEASURED in fresh processes. Rank 0 writes what it has measured into a file."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "seconds.json"
        torchrun(ranks, __file__, "--measure", what, "--updates", updates, "--results", file)
        return json.loads(file.read_text())


def run_rounds(args: argparse.Namespace) -> list[tuple[int, str, int, float]]:
    """All rounds: (round, what, ranks, seconds) of everything measured."""
    rows = []
    for number in range(args.rounds):
        for ranks in (1, 2):
            seconds = time_training(ranks, args.updates)
            rows.append((number, "training", ranks, seconds))
            print(
                f"round {number}: {ranks} rank{'s' * (ranks > 1)}, {1 / seconds:.2f} updates/s",
                flush=True,
            )
        for ranks, what in enumerate(MEASURED, start=1):
            for name, times in measure(what, ranks, args.updates).items():
                rows += [(number, name, ranks, seconds) for seconds in times[WARM_UP:]]
    return rows


# ---- on paper ----------------------------------------------------------------------------------


def expected_maximum(times: list[float], n: int) -> float:
    """The mean of the largest of n draws (with replacement) from the times."""
    m = len(times)
    return sum(x * (((i + 1) / m) ** n - (i / m) ** n) for i, x in enumerate(sorted(times)))


def update_seconds(
    n: int, bandwidth: float, latency: float, times: dict[str, list[float]]
) -> float:
    """T(n) of the module docstring."""
    own_work = [rollout + update for rollout, update in zip(times["rollout"], times["update"])]
    slowest = expected_maximum(own_work, n)
    if n == 1:
        return slowest
    local = statistics.median(times["all-reduce"])
    packing = max(0.0, statistics.median(times["averaging"]) - local)
    transfer = local + 4 * PARAMETERS / bandwidth
    return slowest + packing + 2 * (n - 1) / n * transfer + 2 * (n - 1) * latency


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=200, help="in each measurement")
    parser.add_argument(
        "--latency", type=float, default=50e-6, help="seconds for each message of the ring"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--measure", choices=MEASURED, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        seconds = MEASURED[args.measure](args.updates)
        if os.environ["RANK"] == "0":
            args.results.write_text(json.dumps(seconds))
        return

    rows = run_rounds(args)
    args.results.mkdir(parents=True, exist_ok=True)
    with (args.results / "breakout_ranks.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["round", "what", "ranks", "seconds"])
        writer.writerows((*row, f"{seconds:.6f}") for *row, seconds in rows)

    training = {
        (number, ranks): seconds for number, what, ranks, seconds in rows if what == "training"
    }
    print(f"\nMeasured: {NUM_ENVS} environments, {CORES} cores, medians over rounds: {args.rounds}")
    for ranks in (1, 2):
        seconds = statistics.median(training[number, ranks] for number in range(args.rounds))
        print(f"  {ranks} rank{'s' * (ranks > 1):1}  {1 / seconds:6.2f} updates/s")
    ratio = statistics.median(
        training[number, 1] / training[number, 2] for number in range(args.rounds)
    )
    print(f"  2 ranks reach {ratio:.2f} of the updates/s of 1")
    times = defaultdict(list)
    for _, what, _, seconds in rows:
        times[what].append(seconds)
    for what in ("rollout", "update", "all-reduce", "averaging"):
        print(f"  {what:10} {1000 * statistics.median(times[what]):7.2f} ms")

    print(f"\nOn paper: {NUM_ENVS} environments and a machine of {CORES} cores for each rank,")
    print(f"{4 * PARAMETERS / 1e6:.2f} MB of gradients, {args.latency * 1e6:.0f} us a message")
    for network, bandwidth in NETWORKS.items():
        T = {n: update_seconds(n, bandwidth, args.latency, times) for n in (1, 2, 8, 64, 512)}
        for n, seconds in T.items():
            speed = n * NUM_ENVS * NUM_STEPS / seconds
            print(f"  {network:10}  n = {n:3}: {1000 * seconds:7.1f} ms an update, "
                  f"{speed:9,.0f} steps/s, {T[1] / seconds:4.0%} of n times one rank")  # fmt: skip
        # Twice the ranks do 2 T(n) / T(2n) times as many timesteps a second.
        enough = next(n for n in itertools.count(8)
                      if 2 * update_seconds(n, bandwidth, args.latency, times)
                      < 1.5 * update_seconds(2 * n, bandwidth, args.latency, times))  # fmt: skip
        print(f"  {network:10}  from n = {enough} on, twice the ranks bring less than 1.5 times")


if __name__ == "__main__":
    main()
