"""Times three epochs of mnist.py against the same network trained in the usual way.

    python benchmarks/mnist_speed.py --data-dir data/mnist
    python benchmarks/mnist_speed.py --rounds 3 --results trial

The programs take turns, so that a busy moment of the machine meets them all; what counts is the
median over the rounds of the ratio to the usual way in the same round. The usual way is
DataLoader(TensorDataset, batch_size=64, shuffle=True) with Adam's defaults, PyTorch's own choice of
threads, and no progress bar or log; mnist.py's loop is timed as it is, with both. The programs in
between add its tricks one by one. Each program and round is a row of results/mnist_speed.csv.

cpu_seconds is the time that the program's threads had a core. For one thread it is what the wall
clock would show on an idle machine, or nearly so; with more, waiting for each other counts as well.
"""

import argparse
import csv
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.optim import Adam
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import mnist  # noqa: E402 (it is found only now)

EPOCHS = 3
THREADS = torch.get_num_threads()  # PyTorch's own choice: one for each core
USUAL, ONE_THREAD, OURS = "usual", "usual, 1 thread", "mnist.py"
PROGRAMS = {  # name: (threads, a batch in one operation, fused Adam)
    USUAL: (THREADS, False, False),
    ONE_THREAD: (1, False, False),
    "+ batch in one operation": (1, True, False),
    "+ fused Adam": (1, True, True),
}


class Stopwatch:
    """Seconds since it was made, by the wall clock and of a core."""

    def __init__(self):
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self.wall, time.process_time() - self.cpu


def time_plain_loop(loader: DataLoader, fused: bool | None) -> tuple[float, float]:
    """Time for the epochs in the shortest loop that trains."""
    network = mnist.make_network(100)
    loss_function = nn.CrossEntropyLoss()
    optimizer = Adam(network.parameters(), lr=0.01, fused=fused)
    stopwatch = Stopwatch()
    for _ in range(EPOCHS):
        for images, labels in loader:
            loss = loss_function(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return stopwatch.read()


def time_mnist(loader: DataLoader) -> tuple[float, float]:
    """Time for the epochs in the functions of mnist.py, as its train calls them."""
    network = mnist.make_network(100)
    learner = mnist.choose_loss_and_optimizer(network, mnist.Args(), EPOCHS * len(loader))
    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        stopwatch = Stopwatch()
        for epoch in range(1, EPOCHS + 1):
            mnist.train_epoch(epoch, network, loader, *learner, writer)
        return stopwatch.read()


def run_round(batch_loader: DataLoader) -> dict[str, tuple[float, float]]:
    """Wall and core time of every program, one after the other, each from the same seed."""
    tensors = TensorDataset(batch_loader.dataset.images, batch_loader.dataset.labels)
    single_loader = DataLoader(tensors, batch_size=64, shuffle=True)
    times = {}
    for name, (threads, in_one, fused) in PROGRAMS.items():
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        loader = batch_loader if in_one else single_loader
        times[name] = time_plain_loop(loader, fused or None)  # None: PyTorch's default
    torch.set_num_threads(1)
    torch.manual_seed(0)
    times[OURS] = time_mnist(batch_loader)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data/mnist"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()

    images, labels = mnist.load_part("train", args.data_dir)
    dataset = mnist.Digits(images, labels, torch.device("cpu"))
    loader = mnist.make_loader(dataset, batch_size=64, shuffle=True)
    rounds = [run_round(loader) for _ in range(args.rounds)]

    args.results.mkdir(parents=True, exist_ok=True)
    with (args.results / "mnist_speed.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["round", "program", "seconds", "cpu_seconds", "ratio"])
        for number, times in enumerate(rounds):
            for name, (wall, cpu) in times.items():
                ratio = wall / times[USUAL][0]
                writer.writerow([number, name, f"{wall:.3f}", f"{cpu:.3f}", f"{ratio:.3f}"])

    print(f"{EPOCHS} epochs, {args.rounds} rounds, {THREADS} threads by default")
    for name in rounds[0]:
        wall, cpu = (statistics.median(row[name][kind] for row in rounds) for kind in (0, 1))
        ratio = statistics.median(row[name][0] / row[USUAL][0] for row in rounds)
        print(f"{name:26} {wall:6.2f} s, {cpu:6.2f} s of a core, {ratio:.2f} of the usual way")
    for kind, clock in enumerate(["wall clock", "core time"]):
        ratio = statistics.median(row[OURS][kind] / row[ONE_THREAD][kind] for row in rounds)
        print(f"mnist.py to the usual way with one thread as well: {ratio:.2f} ({clock})")


if __name__ == "__main__":
    main()
