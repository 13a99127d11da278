# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "numpy==2.4.6",
#     "opencv-python==5.0.0.93",
#     "tensorboard==2.21.0",
#     "torch==2.13.0",
#     "tqdm==4.70.1",
#     "tyro==1.0.17",
# ]
# ///
"""Handwritten digits (MNIST) with a small fully connected network: the PyTorch warm-up.

The data set holds 70,000 pictures of digits, 28 x 28 gray pixels each, and the digit every one of
them shows. The network turns the 784 pixels x of a picture into ten scores z, one for each digit;
softmax makes probabilities of them. Training lowers the cross-entropy, which is large where the
true digit y was given a small probability,

    loss = -log p(y | x),    p(k | x) = exp(z_k) / sum_j exp(z_j)

by steps of Adam: each weight w moves against m, the running mean of its gradients g, in units of
their size,

    m <- 0.9 m + 0.1 g,    v <- 0.999 v + 0.001 g^2,    w <- w - lr * m / (sqrt(v) + 1e-8)

with m and v divided by 1 - 0.9^t and 1 - 0.999^t at step t, as both start from zero.

The file has six steps, in this order: prepare the data, make the loaders, build the network, choose
the loss and the optimiser, define train and test, run.

Data: LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document recognition",
Proceedings of the IEEE 86, 1998. Adam: Kingma and Ba, ICLR 2015, algorithm 1.

Run it:

    python mnist.py                             # downloads 11 MB once; 3 epochs, some 10 seconds
    python mnist.py --image-index 7 --epochs 10
    python mnist.py --data-dir FOLDER           # no download if the four files are in FOLDER
    tensorboard --logdir runs

Differs from the book (the Japanese textbook series whose programs this collection rebuilds):
- The data set's own division into 60,000 pictures for training and 10,000 for the test, so that
  results compare with anyone's. The book draws its 6:1 at random: its picture 2020 is another one.
- The learning rate falls in a straight line from 0.01 to 0. Kept at 0.01, as in the book, the last
  steps are still long, and where they end is luck: 20 seeds gave 95.1 to 96.7% correct, mean 96.0%.
  With the fall it was 97.6 to 98.0%, mean 97.8%. --no-anneal-lr is the book's recipe.
- A batch is cut out of the data in one operation, not put together from 64 single pictures; Adam is
  the fused one; one thread. Together they take 0.43 of the time of the plain loader and Adam.
"""

import gzip
import hashlib
import http.client
import io
import json
import math
import os
import platform
import sys
import time
import urllib.request
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import cv2
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

MIRRORS = [  # tried in this order
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://raw.githubusercontent.com/fgnt/mnist/master/",
]
FILES = {  # SHA-256 of the content, unpacked: the same for everyone, however it was packed
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
MAX_BYTES = 64 * 2**20  # of a file, packed or unpacked; the largest one unpacks to 47 MB
SILENCE_LIMIT = 10  # seconds without a byte before the next mirror is tried
DOWNLOAD_LIMIT = 600  # seconds for one file

GREEN, RED, BLACK, WHITE = (60, 130, 0), (40, 40, 200), (40, 40, 40), (255, 255, 255)  # B, G, R


# ---- arguments and result -----------------------------------------------------


@dataclass
class Args:
    """Train a small network on the handwritten digits of MNIST."""

    seed: int = 0
    """seed of PyTorch's random generator (first weights, order of the pictures), 0 to 2**32 - 1"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the network lives; auto takes CUDA when there is one"""
    runs_dir: Path = Path("runs")
    """folder in which the run's own folder is made"""
    data_dir: Path = Path("data/mnist")
    """folder of the four MNIST files; what is missing there is downloaded"""
    epochs: int = 3
    """passes over the 60,000 training pictures, 1 or more"""
    learning_rate: float = 0.01
    """step size of Adam, greater than 0"""
    anneal_lr: bool = True
    """let the learning rate fall in a straight line to 0; the book keeps it"""
    batch_size: int = 64
    """pictures in one update, 1 to 60000"""
    hidden_size: int = 100
    """units in each of the two hidden layers, 1 to 4096"""
    image_index: int = 2020
    """the test picture that is named and drawn at the end, 0 to 9999"""


@dataclass
class Result:
    """What a run leaves in result.json."""

    seed: int
    seconds: float  # of the whole run, without the download
    versions: dict[str, str]
    accuracy_before: float  # share of the test pictures recognised, 0 to 1, before training
    accuracy: float  # and after it
    seconds_per_epoch: float  # of training, without the tests


class UserError(Exception):
    """Something the user can put right: shown as one line, without a traceback."""


def check(args: Args) -> None:
    """Refuses values that make no sense (a NaN fails every comparison, so it is refused too)."""
    for flag, good, meaning in [
        ("--seed", 0 <= args.seed < 2**32, "from 0 to 2**32 - 1"),
        ("--epochs", args.epochs >= 1, "1 or more"),
        ("--learning-rate", 0 < args.learning_rate < math.inf, "greater than 0 and finite"),
        ("--batch-size", 1 <= args.batch_size <= 60_000, "from 1 to 60000"),
        ("--hidden-size", 1 <= args.hidden_size <= 4096, "from 1 to 4096"),
        ("--image-index", 0 <= args.image_index < 10_000, "from 0 to 9999"),
    ]:
        if not good:
            value = getattr(args, flag[2:].replace("-", "_"))
            raise UserError(f"{flag} must be {meaning}, not {value}")


# ---- step 1: prepare the data -------------------------------------------------


def unpack(packed: bytes, name: str) -> bytes:
    """The content of a file, gzipped or not; raises ValueError unless it is the one of FILES."""
    content = packed
    if packed.startswith(b"\x1f\x8b"):  # every gzip file does; an IDX file starts with two zeros
        try:
            # Never more than the limit: a few kilobytes could unpack to fill the memory.
            content = gzip.GzipFile(fileobj=io.BytesIO(packed)).read(MAX_BYTES + 1)
        except (OSError, EOFError, zlib.error):
            raise ValueError("truncated or damaged") from None
    if len(content) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES} bytes")
    if hashlib.sha256(content).hexdigest() != FILES[name]:
        raise ValueError("wrong checksum")
    return content


def fetch(url: str) -> bytes:
    """The bytes behind a URL, with a progress bar and limits of time and size."""
    deadline = time.monotonic() + DOWNLOAD_LIMIT
    packed = bytearray()
    with (
        urllib.request.urlopen(url, timeout=SILENCE_LIMIT) as response,
        tqdm(total=response.length, desc=Path(url).name, unit="B", unit_scale=True) as bar,
    ):
        while chunk := response.read1(2**16):
            packed += chunk
            bar.update(len(chunk))
            if len(packed) > MAX_BYTES:
                raise ValueError(f"larger than {MAX_BYTES} bytes")
            if time.monotonic() > deadline:
                raise TimeoutError(f"took longer than {DOWNLOAD_LIMIT} s")
    return bytes(packed)


def save(path: Path, packed: bytes) -> None:
    """Writes a file beside its place and moves it there: whoever looks sees all of it or nothing.

    A damaged file in that place is set aside, not lost: it may be another data set of that name.
    """
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(packed)
            file.flush()
            os.fsync(file.fileno())  # on the disk before it gets its name
        if path.exists():
            path.replace(path.with_name(f"{path.name}.bad"))
        beside.replace(path)
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}") from None
    finally:
        beside.unlink(missing_ok=True)


def download(name: str, path: Path) -> bytes:
    """Keeps the first good copy that a mirror has at `path` and returns its content."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path.parent}: {error.strerror}") from None
    failures = []
    for mirror in MIRRORS:
        try:
            packed = fetch(f"{mirror}{name}.gz")
            content = unpack(packed, name)
        except (OSError, http.client.HTTPException, ValueError) as error:
            failures.append(f"{urlsplit(mirror).hostname}: {getattr(error, 'reason', error)}")
        else:
            save(path, packed)
            return content
    raise UserError(
        f"cannot download {path.name} ({'; '.join(failures)}): put the four MNIST files into "
        f"{path.parent}, or name the folder where they are with --data-dir"
    )


def load_file(name: str, data_dir: Path) -> bytes:
    """The content of one of FILES: from data_dir where it has a good copy, else from a mirror."""
    packed_path = data_dir / f"{name}.gz"
    for path in (packed_path, data_dir / name):
        if not os.path.exists(path):
            continue
        try:
            with path.open("rb") as file:
                return unpack(file.read(MAX_BYTES + 1), name)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        except ValueError as error:
            tqdm.write(f"{path} is not the file of MNIST ({error}): looking for a good one")
    return download(name, packed_path)


def parse_idx(content: bytes, name: str) -> np.ndarray:
    """Reads IDX: 0, 0, 8 (for unsigned bytes), the number of dimensions, their sizes, the values.

    The sizes are 4 bytes each, the most significant one first. (n, 28, 28) or (n,), uint8.
    """
    dimensions = 3 if "idx3" in name else 1
    magic = bytes([0, 0, 8, dimensions])
    if content[:4] != magic:
        raise UserError(f"{name} has the magic number {content[:4].hex()}, not {magic.hex()}")
    start = 4 + 4 * dimensions
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    if len(content) != start + math.prod(shape):
        raise UserError(f"{name} has {len(content)} bytes, its header says {shape} values")
    return np.frombuffer(content[start:], np.uint8).reshape(shape)


def load_part(part: str, data_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """The pictures (n, 28, 28) and the digits (n,) they show, of "train" or "t10k" (the test)."""
    images_name, labels_name = f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"
    images = parse_idx(load_file(images_name, data_dir), images_name)
    labels = parse_idx(load_file(labels_name, data_dir), labels_name)
    if images.shape != (len(labels), 28, 28):
        raise UserError(f"{images_name} of shape {images.shape} does not fit {len(labels)} labels")
    return images, labels


# ---- step 2: make the loaders -------------------------------------------------


class Digits(Dataset):
    """The pictures, as floats from 0 to 1, and the digits they show."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, device: torch.device):
        pixels = torch.tensor(images.reshape(-1, 784), dtype=torch.float32, device=device)
        self.images = pixels.div_(255)  # (n, 784)
        self.labels = torch.tensor(labels, dtype=torch.int64, device=device)  # (n,)

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The pictures (batch, 784) and digits (batch,) at these indices (batch,)."""
        indices = indices.to(self.labels.device)
        return self.images.index_select(0, indices), self.labels.index_select(0, indices)


class Batches(Sampler):
    """The indices 0 to n - 1, batch by batch, in order or shuffled anew each epoch."""

    def __init__(self, n: int, batch_size: int, shuffle: bool):
        self.n, self.batch_size, self.shuffle = n, batch_size, shuffle

    def __len__(self) -> int:
        return math.ceil(self.n / self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        indices = torch.randperm(self.n) if self.shuffle else torch.arange(self.n)
        return iter(indices.split(self.batch_size))  # the last batch may be smaller


def make_loader(dataset: Digits, batch_size: int, shuffle: bool) -> DataLoader:
    """Goes through the dataset once for each `for images, labels in loader`.

    DataLoader(dataset, batch_size=64, shuffle=True) would fetch 64 single pictures and stack them.
    Here batch_size=None says that each item is a whole batch already: the sampler hands over 64
    indices, and the dataset answers with one operation. That takes an eighth of the time.
    """
    batches = Batches(len(dataset.labels), batch_size, shuffle)
    return DataLoader(dataset, sampler=batches, batch_size=None)


# ---- step 3: build the network ------------------------------------------------


def make_network(hidden_size: int) -> nn.Sequential:
    """784 pixels -> two hidden layers -> 10 scores, one for each digit."""
    return nn.Sequential(
        OrderedDict(
            fc1=nn.Linear(784, hidden_size),  # (batch, 784) -> (batch, hidden_size)
            relu1=nn.ReLU(),
            fc2=nn.Linear(hidden_size, hidden_size),
            relu2=nn.ReLU(),
            fc3=nn.Linear(hidden_size, 10),  # -> (batch, 10)
        )
    )


# ---- step 4: choose the loss and the optimiser --------------------------------


def choose_loss_and_optimizer(
    network: nn.Module, args: Args, num_updates: int
) -> tuple[nn.CrossEntropyLoss, Adam, LinearLR]:
    """Cross-entropy, Adam, and the schedule of its learning rate over all updates."""
    loss_function = nn.CrossEntropyLoss()  # takes the scores themselves: softmax is part of it
    # fused: all weights in one C++ loop. The default, a Python loop, takes four times as long here.
    optimizer = Adam(network.parameters(), lr=args.learning_rate, fused=True)
    last_factor = 0.0 if args.anneal_lr else 1.0
    scheduler = LinearLR(optimizer, 1.0, last_factor, total_iters=num_updates)
    return loss_function, optimizer, scheduler


# ---- step 5: define train and test --------------------------------------------


def train_epoch(
    epoch: int,
    network: nn.Module,
    loader: DataLoader,
    loss_function: nn.Module,
    optimizer: Optimizer,
    scheduler: LinearLR,
    writer: SummaryWriter,
) -> None:
    """Shows the network every training picture once."""
    network.train()
    bar = tqdm(loader, desc=f"epoch {epoch}", unit="batch")
    for batch, (images, labels) in enumerate(bar):  # (64, 784), (64,)
        scores = network(images)  # (64, 10)
        loss = loss_function(scores, labels)  # (), the mean over the batch

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()

        if batch % 50 == 0:
            writer.add_scalar("losses/train", loss.item(), (epoch - 1) * len(loader) + batch)
    if not loss.isfinite():
        raise UserError(f"epoch {epoch}: the loss is not finite, lower --learning-rate")


@torch.no_grad()
def test(network: nn.Module, loader: DataLoader) -> tuple[float, Tensor]:
    """The share of the test pictures recognised, and the probability of each digit (10000, 10)."""
    network.eval()
    probabilities, correct = [], 0
    for images, labels in loader:  # (64, 784), (64,)
        probabilities.append(network(images).softmax(dim=1))  # (64, 10)
        correct += (probabilities[-1].argmax(dim=1) == labels).sum().item()
    probabilities = torch.cat(probabilities)
    return correct / len(probabilities), probabilities


# ---- pictures -----------------------------------------------------------------


def draw_digit(image: np.ndarray, lines: list[str], color: tuple, zoom: int = 12) -> np.ndarray:
    """A digit (28, 28) enlarged, dark on white, with lines of text below: (height, width, 3)."""
    size, line_height = 28 * zoom, 3 * zoom
    digit = cv2.resize(255 - image, (size, size), interpolation=cv2.INTER_NEAREST)
    picture = cv2.cvtColor(digit, cv2.COLOR_GRAY2BGR)
    below = line_height * len(lines) + zoom
    picture = cv2.copyMakeBorder(
        picture, zoom, below, zoom, zoom, cv2.BORDER_CONSTANT, value=WHITE
    )
    for row, text in enumerate(lines, start=1):
        font, scale = cv2.FONT_HERSHEY_SIMPLEX, zoom / 14
        (width, _), _ = cv2.getTextSize(text, font, scale, 1)
        corner = ((picture.shape[1] - width) // 2, zoom + size + row * line_height - zoom // 2)
        cv2.putText(picture, text, corner, font, scale, color, 1, cv2.LINE_AA)
    return picture


def draw_test_image(
    image: np.ndarray, label: int, probabilities: Tensor, zoom: int = 12
) -> np.ndarray:
    """A test picture with the digit the network sees, its probability, and the true digit."""
    predicted = int(probabilities.argmax())
    lines = [f"predicted {predicted} ({probabilities[predicted]:.1%})", f"true {label}"]
    return draw_digit(image, lines, GREEN if predicted == label else RED, zoom)


def draw_most_wrong(images: np.ndarray, labels: np.ndarray, probabilities: Tensor) -> np.ndarray:
    """The 25 test pictures, or fewer, in which the network was surest of a wrong digit."""
    confidence, predicted = probabilities.max(dim=1)  # both (10000,)
    confidence[predicted == torch.tensor(labels)] = -1.0  # the right ones go to the end
    worst = confidence.argsort(descending=True, stable=True)[:25]
    tiles = [
        draw_test_image(images[i], int(labels[i]), probabilities[i], zoom=6)
        for i in worst
        if confidence[i] >= 0
    ]
    blank = np.full_like(draw_digit(images[0], ["", ""], BLACK, zoom=6), 255)
    tiles += [blank] * (25 - len(tiles))
    return np.vstack([np.hstack(tiles[row : row + 5]) for row in range(0, 25, 5)])


def save_picture(path: Path, picture: np.ndarray) -> None:
    """Writes a PNG (cv2.imwrite cannot do it in every folder: on Windows it takes ASCII alone)."""
    path.write_bytes(cv2.imencode(".png", picture)[1].tobytes())


# ---- files --------------------------------------------------------------------


def choose_device(name: str) -> torch.device:
    """The device for auto, cpu or cuda; raises UserError for cuda where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device here")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def make_run_dir(args: Args) -> Path:
    """Makes runs/<script>__<seed>__<time>, writes args.json into it and returns its path."""
    name = f"{Path(__file__).stem}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    run_dir = args.runs_dir / name
    try:
        run_dir.mkdir(parents=True)
        (run_dir / "args.json").write_text(json.dumps(asdict(args), indent=2, default=str))
    except OSError as error:
        raise UserError(f"cannot write to {run_dir}: {error.strerror}") from None
    return run_dir


def versions() -> dict[str, str]:
    """The versions a result depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "opencv": cv2.__version__,
    }


# ---- step 6: run --------------------------------------------------------------


def train(args: Args) -> Result:
    """The six steps, one after the other; what they produce goes into the run's folder."""
    check(args)
    device = choose_device(args.device)
    # These matrices are too small to share: with the usual loader, one thread takes a quarter less
    # time than two (median of 5), and it never waits for a core that another program has taken.
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    # 1. prepare the data
    train_images, train_labels = load_part("train", args.data_dir)  # (60000, 28, 28), (60000,)
    test_images, test_labels = load_part("t10k", args.data_dir)  # (10000, 28, 28), (10000,)
    started = time.perf_counter()
    run_dir = make_run_dir(args)
    tqdm.write(f"The first of {len(train_labels)} training pictures is a {train_labels[0]}.")
    first = draw_digit(train_images[0], [f"label {train_labels[0]}"], BLACK)
    save_picture(run_dir / "first_training_image.png", first)

    # 2. make the loaders
    train_set = Digits(train_images, train_labels, device)
    test_set = Digits(test_images, test_labels, device)
    train_loader = make_loader(train_set, args.batch_size, shuffle=True)
    test_loader = make_loader(test_set, args.batch_size, shuffle=False)

    # 3. build the network
    network = make_network(args.hidden_size).to(device)
    tqdm.write(str(network))

    # 4. choose the loss and the optimiser
    num_updates = args.epochs * len(train_loader)
    loss_function, optimizer, scheduler = choose_loss_and_optimizer(network, args, num_updates)

    # 5. train and test are defined above

    # 6. run
    writer = SummaryWriter(run_dir)
    training_seconds = 0.0
    try:
        accuracy_before, probabilities = test(network, test_loader)
        tqdm.write(f"Before training: {accuracy_before:.2%} of the test pictures are recognised.")
        writer.add_scalar("charts/accuracy", accuracy_before, 0)
        for epoch in range(1, args.epochs + 1):
            epoch_started = time.perf_counter()
            train_epoch(
                epoch, network, train_loader, loss_function, optimizer, scheduler, writer
            )
            training_seconds += time.perf_counter() - epoch_started
            accuracy, probabilities = test(network, test_loader)
            tqdm.write(f"After epoch {epoch}: {accuracy:.2%}")
            writer.add_scalar("charts/accuracy", accuracy, epoch * len(train_loader))
    finally:  # after Ctrl-C as well
        writer.close()
        torch.save(network.state_dict(), run_dir / "weight_end.pth")
        tqdm.write(f"The weights are in {run_dir}")

    # look at what it has learnt
    predicted = int(probabilities[args.image_index].argmax())
    label = int(test_labels[args.image_index])
    tqdm.write(f"Test picture {args.image_index}: predicted {predicted}, true {label}.")
    picture = draw_test_image(test_images[args.image_index], label, probabilities[args.image_index])
    save_picture(run_dir / f"test_image_{args.image_index}.png", picture)
    save_picture(
        run_dir / "most_wrong.png", draw_most_wrong(test_images, test_labels, probabilities.cpu())
    )
    result = Result(
        seed=args.seed,
        seconds=time.perf_counter() - started,
        versions=versions(),
        accuracy_before=accuracy_before,
        accuracy=accuracy,
        seconds_per_epoch=training_seconds / args.epochs,
    )
    (run_dir / "result.json").write_text(json.dumps(asdict(result), indent=2))
    tqdm.write(f"Everything is in {run_dir}")
    return result


if __name__ == "__main__":
    try:
        train(tyro.cli(Args))
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(130)
