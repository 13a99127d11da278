"""Times three epochs of mnist.py against the same network trained in the usual way.

    python benchmarks/mnist_speed.py --data-dir data/mnist
    python benchmarks/mnist_speed.py --rounds 3 --results trial

The programs take turns, so that a busy moment of the machine meets them all; what counts is the
median over the rounds of the ratio to the usual way in the same round. The usual way is Adam with
its defaults, PyTorch's own choice of threads, and no progress bar or log; mnist.py's epochs are
timed as they are, with both. The programs in between add its parts one by one; all are fed by the
same DataLoader. Each program and round is a row of results/mnist_speed.csv; cpu_seconds is the
time that the program's threads had a core.
"""

import argparse
import csv
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.optim import Adam
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import mnist  # noqa: E402 (it is found only now)

EPOCHS = 3
THREADS = torch.get_num_threads()  # PyTorch's own choice: one for each core
USUAL, SINGLE, FUSED, OURS = "usual", "usual, 1 thread", "+ fused Adam", "mnist.py"


def train_plainly(loader: DataLoader, optimizer_options: dict) -> None:
    """The shortest loop that trains for the epochs."""
    network = mnist.Network(hidden_size=100)
    optimizer = Adam(network.parameters(), lr=0.01, **optimizer_options)
    for _ in range(EPOCHS):
        for images, labels in loader:
            loss = mnist.loss_function(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def train_as_mnist(loader: DataLoader) -> None:
    """The epochs of mnist.py, as its learn calls them."""
    network = mnist.Network(hidden_size=100)
    optimizer = mnist.make_optimizer(network, 0.01)
    scheduler = LinearLR(optimizer, 1.0, 0.0, total_iters=EPOCHS * len(loader))
    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        for epoch in range(1, EPOCHS + 1):
            mnist.train_epoch(network, loader, optimizer, scheduler, writer, epoch)


def run_round(dataset: TensorDataset) -> dict[str, tuple[float, float]]:
    """Wall and core seconds of every program, one after the other, each from the same seed."""
    loader = DataLoader(dataset, batch_size=64, shuffle=True)
    times = {}
    for name, threads, program, *options in [
        (USUAL, THREADS, train_plainly, {}),
        (SINGLE, 1, train_plainly, {}),
        (FUSED, 1, train_plainly, {"fused": True}),
        (OURS, 1, train_as_mnist),
    ]:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        wall, cpu = time.perf_counter(), time.process_time()
        program(loader, *options)
        times[name] = time.perf_counter() - wall, time.process_time() - cpu
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data/mnist"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()

    dataset = mnist.load_images("train", args.data_dir, "cpu")
    rounds = [run_round(dataset) for _ in range(args.rounds)]

    args.results.mkdir(parents=True, exist_ok=True)
    with (args.results / "mnist_speed.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["round", "program", "seconds", "cpu_seconds", "ratio"])
        for number, times in enumerate(rounds):
            for name, (wall, cpu) in times.items():
                ratio = wall / times[USUAL][0]
                writer.writerow([number, name, f"{wall:.3f}", f"{cpu:.3f}", f"{ratio:.3f}"])

    print(f"{EPOCHS} epochs, medians of {args.rounds} rounds, {THREADS} threads by default")
    for name in rounds[0]:
        wall, cpu = (statistics.median(times[name][kind] for times in rounds) for kind in (0, 1))
        ratio = statistics.median(times[name][0] / times[USUAL][0] for times in rounds)
        print(f"{name:26} {wall:6.2f} s, {cpu:6.2f} s of a core, {ratio:.2f} of the usual way")
    for kind, clock in enumerate(["wall clock", "core time"]):
        fused = statistics.median(times[SINGLE][kind] / times[FUSED][kind] for times in rounds)
        ratio = statistics.median(times[OURS][kind] / times[SINGLE][kind] for times in rounds)
        print(f"fused Adam makes the usual way with one thread {fused:.2f} times as fast ({clock})")
        print(f"mnist.py to the usual way with one thread as well: {ratio:.2f} ({clock})")


if __name__ == "__main__":
    main()
