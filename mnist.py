# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "numpy==2.4.6", "opencv-python==5.0.0.93", "tensorboard==2.21.0", "torch==2.13.0",
#     "tqdm==4.70.1", "tyro==1.0.17",
# ]
# ///
"""Handwritten digits (MNIST) with a small fully connected network: the PyTorch warm-up.

Each of the 70,000 images has 28 x 28 gray pixels and a label, the digit that it shows. The network
turns the 784 pixels x into ten scores z, one for each label. Softmax makes probabilities of them,
and the loss, the cross-entropy, is large where the true label y has a low p:

    p(k | x) = exp(z_k) / sum_j exp(z_j),    loss = -log p(y | x)

To learn is to change the weights w, the numbers in the network, so that the mean loss of a batch
of 64 images falls a little, then that of the next batch; an epoch takes each training image once.
The gradient g of a weight says how the loss grows with it. Adam moves each weight against m /
sqrt(v): m and v are moving means, of g and g^2; lr, the learning rate, sets the size of its steps:

    m <- 0.9 m + 0.1 g,    v <- 0.999 v + 0.001 g^2,    w <- w - lr * m / (sqrt(v) + 1e-8)

with m and v divided by 1 - 0.9^t and 1 - 0.999^t at step t = 1, 2, ..., as both start from zero.

LeCun et al., "Gradient-based learning applied to document recognition", Proc. IEEE 86, 1998.
Kingma and Ba, "Adam: a method for stochastic optimization", ICLR 2015, algorithm 1.

    python mnist.py                             # downloads 11 MB once; trains for some seconds
    python mnist.py --image-index 7 --epochs 10
    python mnist.py --data-dir FOLDER           # no download if the four files are in FOLDER

Differs from the book (Yutaro Ogawa, つくりながら学ぶ！深層強化学習, 2018):
- The 60,000 training and 10,000 test images are the data set's own, so that results compare. The
  book splits all 70,000 at random: image 2020 (see --image-index) is another one there.
- The learning rate falls linearly from 0.01 to 0 (--no-anneal-lr for the book's constant rate,
  whose last steps are still long). Mean accuracy over 20 seeds: 97.9% instead of 96.0%.
"""

import gzip
import hashlib
import io
import json
import os
import signal
import sys
import threading
import time
import zlib
from dataclasses import asdict, dataclass
from datetime import datetime
from http.client import HTTPException
from pathlib import Path
from typing import Literal
from urllib.request import urlopen

import cv2
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


# ---- step 1: prepare the data ----------------------------------------------------


def load_images(part: str, data_dir: Path, device: str) -> TensorDataset:
    """The images (n, 784), from 0 to 1, and labels (n,) of "train" or of "t10k", the test set."""
    images = load_file(f"{part}-images-idx3-ubyte", data_dir)  # (n, 28, 28), from 0 to 255
    labels = load_file(f"{part}-labels-idx1-ubyte", data_dir)  # (n,), from 0 to 9
    pixels = torch.tensor(images.reshape(-1, 784), dtype=torch.float32, device=device)
    return TensorDataset(pixels.div_(255), torch.tensor(labels, dtype=torch.int64, device=device))


# ---- step 2: make the loaders ----------------------------------------------------


def make_loaders(train_set, test_set, batch_size: int) -> tuple[DataLoader, DataLoader]:
    """Batches of images (batch, 784) and labels (batch,); the last one may be smaller."""
    train_loader = DataLoader(train_set, batch_size, shuffle=True)  # in a new order each epoch
    # A run learns nothing from the test images, and chooses nothing by them, not even its end:
    # only so do they show how well the network reads digits that are new to it.
    return train_loader, DataLoader(test_set, batch_size)


# ---- step 3: build the network ---------------------------------------------------


class Network(nn.Module):
    """The score of each label for each image: (batch, 784) -> (batch, 10)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.fc1 = nn.Linear(784, hidden_size)  # fully connected: each unit sees all inputs
        self.fc2 = nn.Linear(hidden_size, hidden_size)
        self.fc3 = nn.Linear(hidden_size, 10)

    def forward(self, images: Tensor) -> Tensor:
        # relu, the activation function, makes negative sums 0. Without it, three layers could do
        # no more than one: weighted sums of weighted sums are weighted sums.
        hidden = torch.relu(self.fc1(images))  # (batch, hidden_size)
        hidden = torch.relu(self.fc2(hidden))  # (batch, hidden_size)
        return self.fc3(hidden)  # (batch, 10)


# ---- step 4: choose the loss and the optimiser -----------------------------------

loss_function = nn.CrossEntropyLoss()  # how wrong the scores are; softmax is part of it


def make_optimizer(network: nn.Module, learning_rate: float) -> torch.optim.Adam:
    """Adam on all weights; `fused` is a C++ loop in place of Python's: epochs 1.2 times as fast."""
    return torch.optim.Adam(network.parameters(), lr=learning_rate, fused=True)


# ---- step 5: define train and test -----------------------------------------------


def train_epoch(network, loader, optimizer, scheduler, writer: SummaryWriter, epoch: int) -> None:
    """Trains for one epoch; raises ValueError if the loss is not finite at its end."""
    bar = tqdm(loader, f"epoch {epoch}", unit="batch", disable=not sys.stderr)
    for index, (images, labels) in enumerate(bar):
        scores = network(images)  # (batch, 784) -> (batch, 10)
        loss = loss_function(scores, labels)  # (), the mean over the batch

        optimizer.zero_grad()  # forget the gradients of the last batch, each weight's .grad
        loss.backward()  # backpropagation: each .grad now says how the loss changes with its weight
        optimizer.step()  # move each weight a little, by its .grad, to lower the loss
        scheduler.step()  # sets the learning rate of the next update

        if index % 50 == 0:
            writer.add_scalar("losses/train", loss.item(), (epoch - 1) * len(loader) + index)
    if not loss.isfinite():
        raise ValueError(f"epoch {epoch}: the loss is not finite; lower --learning-rate")


@torch.no_grad()  # nothing is learnt here: no gradients
def test(network: nn.Module, loader: DataLoader) -> int:
    """The number of images whose label has the highest score."""
    correct = 0
    for images, labels in loader:
        predicted = network(images).argmax(dim=1)  # (batch, 784) -> (batch,)
        correct += (predicted == labels).sum().item()
    return correct


# ---- step 6: run -----------------------------------------------------------------


@dataclass  # tyro makes flags of the fields, and help of their comments
class Args:
    """Train a small network on the handwritten digits of MNIST."""

    seed: int = 0  # seed of PyTorch (first weights, order of the images), from 0 to 2**32 - 1
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes CUDA where there is one
    runs_dir: Path = Path("runs")  # folder in which the run's own folder is made
    data_dir: Path = Path("data/mnist")  # folder of the four files; what is missing is downloaded
    epochs: int = 3  # passes over the training images, from 1
    learning_rate: float = 0.01  # step size of Adam, above 0
    anneal_lr: bool = True  # let the learning rate fall linearly to 0; the book's is constant
    batch_size: int = 64  # images in an update, from 1 to 60000
    hidden_size: int = 100  # units in each of the two hidden layers, from 1 to 4096
    image_index: int = 2020  # the test image to classify and draw at the end, from 0 to 9999

    def __post_init__(self):  # tyro shows the error; a NaN fails every comparison
        for name, kind in Args.__annotations__.items():
            value = getattr(self, name)
            if kind is int and value % 1 != 0:
                raise ValueError(f"--{name.replace('_', '-')} must be a whole number, not {value}")
            if kind in (bool, int, float):  # a caller may give NumPy's, or whole floats such as 1e4
                setattr(self, name, kind(value))
        self.runs_dir = Path(os.path.expanduser(self.runs_dir))
        self.data_dir = Path(os.path.expanduser(self.data_dir))
        for good, rule in [
            (0 <= self.seed < 2**32, "--seed must be from 0 to 2**32 - 1"),
            (1 <= self.epochs <= 10**9, "--epochs must be from 1 to 10**9"),
            (0 < self.learning_rate < float("inf"), "--learning-rate must be above 0 and finite"),
            (1 <= self.batch_size <= 60_000, "--batch-size must be from 1 to 60000"),
            (1 <= self.hidden_size <= 4096, "--hidden-size must be from 1 to 4096"),
            (0 <= self.image_index < 10_000, "--image-index must be from 0 to 9999"),
            (self.device in ("auto", "cpu", "cuda"), "--device must be auto, cpu or cuda"),
            (self.device != "cuda" or torch.cuda.is_available(), "--device cuda: there is no GPU"),
        ]:
            if not good:
                raise ValueError(rule)


def learn(args: Args, network: nn.Module, train_set, test_set, writer: SummaryWriter) -> dict:
    """Trains and tests, epoch by epoch; returns its part of result.json."""
    train_loader, test_loader = make_loaders(train_set, test_set, args.batch_size)
    optimizer = make_optimizer(network, args.learning_rate)
    scheduler = torch.optim.lr_scheduler.LinearLR(
        optimizer, 1.0, 0.0 if args.anneal_lr else 1.0, total_iters=args.epochs * len(train_loader)
    )
    accuracies, seconds = [], 0.0
    for epoch in range(args.epochs + 1):
        if epoch > 0:  # epoch 0 only tests the untrained network
            start = time.perf_counter()
            train_epoch(network, train_loader, optimizer, scheduler, writer, epoch)
            seconds += time.perf_counter() - start
        correct = test(network, test_loader)
        accuracies.append(correct / len(test_set))
        when = f"after epoch {epoch}" if epoch > 0 else "before training"
        print(f"{when}: {correct}/{len(test_set)} ({accuracies[-1]:.2%}) correct")
        writer.add_scalar("charts/accuracy", accuracies[-1], epoch * len(train_loader))
    outcome = {"accuracy_before": accuracies[0], "accuracy": accuracies[-1]}
    return outcome | {"seconds_per_epoch": seconds / args.epochs}


def save(path: Path, content: bytes) -> None:
    """Writes a .part file, then renames it: a full disk or a kill leaves no half file."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def train(args: Args) -> dict:
    """A run: args.json, curves, weight_end.pth, result.json and pictures in a folder of its own."""
    run_dir = args.runs_dir / f"mnist__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    run_dir.mkdir(parents=True)  # if it cannot be made, nothing is downloaded
    save(run_dir / "args.json", json.dumps(asdict(args), indent=2, default=str).encode())
    torch.manual_seed(args.seed)
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    train_set = load_images("train", args.data_dir, device)
    test_set = load_images("t10k", args.data_dir, device)
    start = time.perf_counter()
    network = Network(args.hidden_size).to(device)
    print(f"{network}\nThe run's folder is {run_dir}")
    writer = SummaryWriter(run_dir, flush_secs=1)
    try:
        outcome = learn(args, network, train_set, test_set, writer)
        writer.close()  # not after Ctrl-C: it may hold a lock then, and hang
    finally:  # Ctrl-C keeps what was learnt
        content = io.BytesIO()  # torch.save's own error on a full disk is no OSError
        torch.save(network.state_dict(), content)
        save(run_dir / "weight_end.pth", content.getvalue())
    versions = {module.__name__: module.__version__ for module in (torch, np, cv2)}
    versions["python"] = sys.version.split()[0]
    seconds = time.perf_counter() - start
    result = {"seed": args.seed, "seconds": seconds, "versions": versions, **outcome}
    save(run_dir / "result.json", json.dumps(result, indent=2).encode())
    save_pictures(network, train_set, test_set, args.image_index, run_dir)
    print(f"Everything is in {run_dir}")
    return result


# ---- pictures --------------------------------------------------------------------


def draw(image: Tensor, text: str) -> np.ndarray:
    """An image (784,) enlarged, dark on white, above a line of text: (268, 240), uint8."""
    pixels = (255 - 255 * image).round().byte().reshape(28, 28).cpu().numpy()
    picture = cv2.resize(pixels, (224, 224), interpolation=cv2.INTER_NEAREST)
    picture = cv2.copyMakeBorder(picture, 8, 36, 8, 8, cv2.BORDER_CONSTANT, value=255)
    return cv2.putText(picture, text, (8, 254), cv2.FONT_HERSHEY_SIMPLEX, 0.45, 0, 1, cv2.LINE_AA)


@torch.no_grad()
def save_pictures(network, train_set, test_set, image_index: int, run_dir: Path) -> None:
    """Draws the first training image, one test image, and the 25 most confident errors."""
    images, labels = test_set.tensors  # (10000, 784), (10000,)
    confidence, predicted = network(images).softmax(dim=1).max(dim=1)  # both (10000,)
    texts = [f"predicted {k} ({p:.1%}), true {y}" for k, p, y in zip(predicted, confidence, labels)]
    errors = (predicted != labels).nonzero().flatten()
    errors = errors[confidence[errors].argsort(descending=True, stable=True)][:25]
    tiles = [draw(images[i], texts[i]) for i in errors]
    tiles += [np.full((268, 240), 255, np.uint8)] * (25 - len(tiles))  # white
    first_image, label = train_set[0]
    for name, picture in {
        "first_training_image": draw(first_image, f"label {label}"),
        f"test_image_{image_index}": draw(images[image_index], texts[image_index]),
        "most_wrong": np.vstack([np.hstack(tiles[i : i + 5]) for i in range(0, 25, 5)]),
    }.items():  # cv2.imwrite fails on Windows in a folder whose name is not ASCII
        save(run_dir / f"{name}.png", cv2.imencode(".png", picture)[1].tobytes())
    print(f"test image {image_index}: {texts[image_index]}")


# ---- the files of step 1 ---------------------------------------------------------

MIRRORS = [  # tried in this order
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://raw.githubusercontent.com/fgnt/mnist/master/",
]
TIMEOUT = 10  # seconds without a byte before the next mirror is tried
FILES = {  # SHA-256 of the unpacked content: it is the same however the file was packed
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


def read_idx(content: bytes) -> np.ndarray:
    """IDX: 0, 0, 8 for bytes, the number of dimensions, their sizes in 4 bytes each, the values."""
    shape = np.frombuffer(content, ">i4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def unpack(content: bytes, name: str) -> np.ndarray:
    """The array in a file, gzipped or not; EOFError if damaged, ValueError if not MNIST's."""
    try:
        if content.startswith(b"\x1f\x8b"):  # as every gzip file does
            content = gzip.decompress(content)
        else:
            read_idx(content)
    except (OSError, EOFError, zlib.error, IndexError, ValueError):
        raise EOFError("truncated or damaged") from None
    if hashlib.sha256(content).hexdigest() != FILES[name]:
        raise ValueError(f"not {name} of MNIST: wrong checksum")
    return read_idx(content)


def load_file(name: str, data_dir: Path) -> np.ndarray:
    """The array in one of FILES, from data_dir or else from the first mirror that has it whole.

    A damaged file is renamed; that of another data set is left alone, and is a ValueError.
    """
    wanted = name.replace("-idx", "[-.]idx")  # Kaggle's are called train-images.idx3-ubyte
    patterns = [wanted, f"{wanted}.gz", f"{wanted}/{wanted}"]  # each in a folder of its name, too
    paths = [path for pattern in patterns for path in sorted(data_dir.glob(pattern))]
    for path in filter(Path.is_file, paths):
        try:
            return unpack(path.read_bytes(), name)
        except EOFError as error:
            aside = path.with_name(f"{path.name}.{time.time_ns()}.bad")
            path.rename(aside)
            print(f"{path} is {error}: it is now {aside.name}")
        except ValueError as error:
            raise ValueError(f"{path} is {error}; choose another --data-dir") from None
    data_dir.mkdir(parents=True, exist_ok=True)
    packed, failures = data_dir / f"{name}.gz", []
    for mirror in MIRRORS:
        print(f"downloading {mirror}{packed.name}")
        try:
            with urlopen(mirror + packed.name, timeout=TIMEOUT) as response:
                bar = {"total": response.length, "disable": not sys.stderr}
                with tqdm.wrapattr(response, "read", **bar) as body:
                    content = b"".join(iter(lambda: body.read(2**16), b""))
            array = unpack(content, name)
        except (OSError, HTTPException, EOFError, ValueError) as error:
            failures.append(f"{mirror}: {error}")
        else:
            save(packed, content)
            return array
    advice = "put the four MNIST files there, or name their folder with --data-dir"
    raise ValueError(f"cannot download {packed} ({'; '.join(failures)}): {advice}")


if __name__ == "__main__":
    torch.set_num_threads(1)  # these matrices are too small for more
    if hasattr(sys.stdout, "reconfigure") and not hasattr(sys, "ps1"):  # not at a prompt
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)  # any name, at once
        threading.excepthook = lambda _: None  # else TensorBoard's thread prints its error, too
    first = {}  # when the first signal to stop came

    def stop(*_):
        now = time.monotonic()
        if not 0 < now - first.setdefault("time", now) < 1:  # `timeout` and others send two at once
            raise KeyboardInterrupt  # the weights are saved all the same

    for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)}:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup has SIGHUP ignored
            signal.signal(number, stop)
    try:  # in a notebook, argv is the kernel's
        train(tyro.cli(Args, args=[] if sys.argv[0].endswith("kernel_launcher.py") else None))
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # nobody reads on (`| head`)
            sys.stdout = None  # else Python's exit would print into the pipe once more
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
