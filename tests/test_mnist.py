"""mnist.py on small IDX files drawn here and a mirror on 127.0.0.1: no test needs the internet."""

import errno
import gzip
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, TensorDataset

import mnist

NAMES = list(mnist.FILES)  # the canonical four
TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = NAMES
REAL_FILES = dict(mnist.FILES)
REAL_MIRRORS = list(mnist.MIRRORS)
CPU = torch.device("cpu")

# ---- small data and a small mirror --------------------------------------------


@pytest.fixture(autouse=True)
def threads():
    """The script sets PyTorch's number of threads; the other tests shall not notice."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def draw_digits(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Digits of varied place and size: pictures (count, 28, 28) and labels (count,)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(10, size=count).astype(np.uint8)
    images = np.zeros((count, 28, 28), np.uint8)
    for image, label in zip(images, labels, strict=True):
        corner = (int(rng.integers(4, 9)), int(rng.integers(20, 25)))
        scale = rng.uniform(0.6, 0.8)
        cv2.putText(image, str(label), corner, cv2.FONT_HERSHEY_SIMPLEX, scale, 255, 2)
    return images, labels


def pack_idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def make_contents() -> dict[str, bytes]:
    train_images, train_labels = draw_digits(1500, seed=0)
    test_images, test_labels = draw_digits(200, seed=1)
    arrays = [train_images, train_labels, test_images, test_labels]
    return {name: pack_idx(array) for name, array in zip(NAMES, arrays, strict=True)}


CONTENTS = make_contents()  # what FILES names, in small
PACKED = {name: gzip.compress(content) for name, content in CONTENTS.items()}


def expect(monkeypatch: pytest.MonkeyPatch, name: str, content: bytes) -> None:
    """Makes this content the right one for this file."""
    monkeypatch.setitem(mnist.FILES, name, hashlib.sha256(content).hexdigest())


@pytest.fixture(autouse=True)
def small_data_and_no_network(monkeypatch):
    monkeypatch.setattr(mnist, "MIRRORS", [])
    for name, content in CONTENTS.items():
        expect(monkeypatch, name, content)
    monkeypatch.setenv("no_proxy", "*")


def fill(data_dir: Path, leave_out: str = "") -> Path:
    data_dir.mkdir(parents=True, exist_ok=True)
    for name, packed in PACKED.items():
        if name != leave_out:
            (data_dir / f"{name}.gz").write_bytes(packed)
    return data_dir


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


class Mirror(BaseHTTPRequestHandler):
    """/good/ has every file; any other first part of the path names what is wrong with it."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.requests.append(self.path)
        _, kind, file_name = self.path.split("/")
        packed = PACKED[file_name.removesuffix(".gz")]
        if kind == "missing":
            return self.send_error(404)
        if kind == "silent":
            return self.server.closing.wait(60)
        body = {
            "good": packed,
            "other": gzip.compress(b"\0" * 100),  # well packed, another content
            "page": b"<html>please log in</html>",
            "truncated": packed[: len(packed) // 2],
            "scrambled": packed[:100] + b"noise" + packed[105:],
            "bomb": gzip.compress(b"\0" * 2**23),
            "cut off": packed[: len(packed) // 2],
            "empty": b"",
            "endless": packed + b"\0" * 2**23,
            "drip": packed,
        }[kind.replace("%20", " ")]
        self.send_response(200)
        if kind != "endless":
            self.send_header("Content-Length", str(len(packed if "cut" in kind else body)))
        self.end_headers()
        try:
            if kind == "drip":
                for byte in body[:300]:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.05)
            else:
                self.wfile.write(body)
        except OSError:
            pass  # the other side had enough


@pytest.fixture
def mirror():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    server.requests = []
    server.closing = threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


def small_args(tmp_path: Path, **changes) -> mnist.Args:
    """Arguments of a run that takes a second, on data in tmp_path/data."""
    chosen = {"data_dir": tmp_path / "data", "image_index": 20, "epochs": 2, "device": "cpu"}
    return mnist.Args(runs_dir=tmp_path / "runs", **{**chosen, **changes})


def refused(args: mnist.Args) -> str:
    """The one line with which train refuses; nothing may have been written to runs."""
    with pytest.raises(mnist.UserError) as caught:
        mnist.train(args)
    message = str(caught.value)
    assert message and "\n" not in message
    assert not args.runs_dir.is_dir()
    return message


# ---- a run --------------------------------------------------------------------


def test_run_learns_and_leaves_everything_in_its_folder(tmp_path, capsys):
    fill(tmp_path / "data")
    result = mnist.train(small_args(tmp_path, seed=3, epochs=4))
    assert result.accuracy_before < 0.4
    assert result.accuracy > 0.9

    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name.startswith("mnist__3__")
    assert {path.name for path in run_dir.iterdir() if "tfevents" not in path.name} == {
        "args.json",
        "result.json",
        "weight_end.pth",
        "first_training_image.png",
        "test_image_20.png",
        "most_wrong.png",
    }
    assert json.loads((run_dir / "args.json").read_text())["epochs"] == 4
    saved = json.loads((run_dir / "result.json").read_text())
    assert set(saved) == {
        "seed", "seconds", "versions", "accuracy_before", "accuracy", "seconds_per_epoch",
    }  # fmt: skip
    assert saved["seed"] == 3 and saved["accuracy"] == result.accuracy
    assert saved["versions"]["torch"] == torch.__version__
    assert 0 < saved["seconds_per_epoch"] * 4 < saved["seconds"]

    for name, images, index in [
        ("first_training_image.png", CONTENTS[TRAIN_IMAGES], 0),
        ("test_image_20.png", CONTENTS[TEST_IMAGES], 20),
    ]:
        image = np.frombuffer(images[16 + index * 784 :][:784], np.uint8).reshape(28, 28)
        enlarged = np.kron(255 - image, np.ones((12, 12), np.uint8))
        drawn = cv2.imread(str(run_dir / name), cv2.IMREAD_GRAYSCALE)[12:348, 12:348]
        assert np.array_equal(drawn, enlarged), name
    assert cv2.imread(str(run_dir / "most_wrong.png")) is not None

    printed = capsys.readouterr().out
    label = CONTENTS[TRAIN_LABELS][8]
    true = CONTENTS[TEST_LABELS][8 + 20]
    assert f"is a {label}." in printed
    assert "Linear(in_features=784, out_features=100" in printed
    assert f"true {true}." in printed
    assert printed.rstrip().endswith(f"Everything is in {run_dir}")


def test_saved_weights_are_those_of_the_result(tmp_path):
    fill(tmp_path / "data")
    result = mnist.train(small_args(tmp_path))
    (weights,) = (tmp_path / "runs").glob("*/weight_end.pth")
    network = mnist.make_network(100)
    network.load_state_dict(torch.load(weights, weights_only=True))
    images, labels = mnist.load_part("t10k", tmp_path / "data")
    loader = mnist.make_loader(mnist.Digits(images, labels, CPU), 64, shuffle=False)
    assert mnist.test(network, loader)[0] == result.accuracy


def test_tensorboard_has_the_loss_and_the_accuracy(tmp_path):
    fill(tmp_path / "data")
    result = mnist.train(small_args(tmp_path, batch_size=15))  # 100 batches an epoch
    (run_dir,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(run_dir)).Reload()
    losses = events.Scalars("losses/train")
    assert [event.step for event in losses] == [0, 50, 100, 150]
    assert losses[-1].value < losses[0].value
    accuracies = events.Scalars("charts/accuracy")
    assert [event.step for event in accuracies] == [0, 100, 200]
    assert accuracies[0].value == pytest.approx(result.accuracy_before)
    assert accuracies[-1].value == pytest.approx(result.accuracy)


def test_same_seed_same_result_another_seed_another(tmp_path):
    fill(tmp_path / "data")
    weights = []
    for run, seed in enumerate([5, 5, 6]):
        args = small_args(tmp_path / str(run), seed=seed, data_dir=tmp_path / "data", epochs=1)
        mnist.train(args)
        (path,) = args.runs_dir.glob("*/weight_end.pth")
        weights.append(torch.load(path, weights_only=True))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not torch.equal(weights[0]["fc1.weight"], weights[2]["fc1.weight"])


def test_interrupt_keeps_the_weights(tmp_path, monkeypatch, capsys):
    fill(tmp_path / "data")
    real_epoch = mnist.train_epoch

    def train_epoch(epoch, *rest):
        if epoch == 2:
            raise KeyboardInterrupt
        real_epoch(epoch, *rest)

    monkeypatch.setattr(mnist, "train_epoch", train_epoch)
    with pytest.raises(KeyboardInterrupt):
        mnist.train(small_args(tmp_path, epochs=3))
    (run_dir,) = (tmp_path / "runs").iterdir()
    torch.load(run_dir / "weight_end.pth", weights_only=True)
    assert not (run_dir / "result.json").exists()
    assert f"The weights are in {run_dir}" in capsys.readouterr().out


@pytest.mark.skipif("MNIST_DIR" not in os.environ, reason="MNIST_DIR names the real files")
def test_real_mnist(tmp_path, monkeypatch):
    for name, checksum in REAL_FILES.items():
        monkeypatch.setitem(mnist.FILES, name, checksum)
    before = snapshot(Path(os.environ["MNIST_DIR"]))
    args = small_args(tmp_path, data_dir=Path(os.environ["MNIST_DIR"]), epochs=1)
    result = mnist.train(args)
    assert 0.02 < result.accuracy_before < 0.25
    assert result.accuracy > 0.96
    assert snapshot(Path(os.environ["MNIST_DIR"])) == before


# ---- the download -------------------------------------------------------------


def test_mirrors_are_https_and_end_in_a_slash():
    assert len(REAL_MIRRORS) >= 3
    assert all(url.startswith("https://") and url.endswith("/") for url in REAL_MIRRORS)


def test_download_goes_to_the_data_dir_and_happens_once(tmp_path, monkeypatch, mirror, capsys):
    monkeypatch.setattr(mnist, "MIRRORS", [f"{mirror.url}/good/"])
    images, labels = mnist.load_part("train", tmp_path / "new" / "data")
    assert pack_idx(images) == CONTENTS[TRAIN_IMAGES]
    assert pack_idx(labels) == CONTENTS[TRAIN_LABELS]
    assert len(mirror.requests) == 2
    assert f"{TRAIN_IMAGES}.gz: 100%" in capsys.readouterr().err  # the progress bar

    kept = snapshot(tmp_path / "new" / "data")
    assert set(kept) == {f"{TRAIN_IMAGES}.gz", f"{TRAIN_LABELS}.gz"}
    mnist.load_part("train", tmp_path / "new" / "data")
    assert len(mirror.requests) == 2
    assert snapshot(tmp_path / "new" / "data") == kept


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("missing", "Not Found"),
        ("other", "wrong checksum"),
        ("page", "wrong checksum"),
        ("empty", "wrong checksum"),
        ("truncated", "truncated or damaged"),
        ("cut%20off", "truncated or damaged"),
        ("scrambled", "truncated or damaged"),
        ("bomb", "larger than"),
        ("endless", "larger than"),
        ("silent", "timed out"),
        ("drip", "took longer than"),
    ],
)
def test_bad_mirror_is_named_and_the_next_one_is_used(tmp_path, monkeypatch, mirror, kind, reason):
    monkeypatch.setattr(mnist, "MAX_BYTES", 2**22)
    if kind == "silent":
        monkeypatch.setattr(mnist, "SILENCE_LIMIT", 1)
    if kind == "drip":  # 15 s in all, a byte every 0.05 s
        monkeypatch.setattr(mnist, "DOWNLOAD_LIMIT", 1)
    monkeypatch.setattr(mnist, "MIRRORS", [f"{mirror.url}/{kind}/"])
    path = tmp_path / f"{TRAIN_IMAGES}.gz"
    with pytest.raises(mnist.UserError, match=f"127.0.0.1: .*{reason}.*--data-dir") as caught:
        mnist.download(TRAIN_IMAGES, path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())

    monkeypatch.setattr(mnist, "MIRRORS", [f"{mirror.url}/{kind}/", f"{mirror.url}/good/"])
    assert mnist.download(TRAIN_IMAGES, path) == CONTENTS[TRAIN_IMAGES]
    assert [path.name for path in tmp_path.iterdir()] == [f"{TRAIN_IMAGES}.gz"]


def test_bomb_is_never_unpacked_beyond_the_limit(monkeypatch):
    monkeypatch.setattr(mnist, "MAX_BYTES", 2**16)
    asked = []
    real_read = gzip.GzipFile.read

    def read(self, size=-1):
        asked.append(size)
        return real_read(self, size)

    monkeypatch.setattr(gzip.GzipFile, "read", read)
    with pytest.raises(ValueError, match="larger than 65536 bytes"):
        mnist.unpack(gzip.compress(b"\0" * 2**20), TRAIN_IMAGES)
    assert asked == [2**16 + 1]


def test_unreachable_mirrors_and_no_files_is_one_line_that_says_what_to_do(tmp_path, monkeypatch):
    closed = ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    closed.server_close()  # its port refuses from now on
    monkeypatch.setattr(mnist, "MIRRORS", [f"http://127.0.0.1:{closed.server_port}/good/"] * 2)
    message = refused(small_args(tmp_path))
    assert message.count("refused") == 2
    assert f"{TRAIN_IMAGES}.gz" in message and "--data-dir" in message


# ---- files that are there already ---------------------------------------------


def test_good_files_work_offline_and_are_not_touched(tmp_path, monkeypatch):
    data_dir = fill(tmp_path / "data")
    before = snapshot(data_dir)
    data_dir.chmod(0o555)
    monkeypatch.setattr(mnist, "save", None)  # even root, for whom 0o555 means nothing
    mnist.train(small_args(tmp_path, epochs=1))
    data_dir.chmod(0o755)
    assert snapshot(data_dir) == before


def test_unpacked_files_work_too(tmp_path):
    for name, content in CONTENTS.items():
        (tmp_path / name).write_bytes(content)
    images, labels = mnist.load_part("t10k", tmp_path)
    assert pack_idx(images) == CONTENTS[TEST_IMAGES] and len(labels) == 200


def test_good_unpacked_file_serves_where_the_packed_one_is_damaged(tmp_path):
    (tmp_path / f"{TEST_LABELS}.gz").write_bytes(b"\x1f\x8bnoise")
    (tmp_path / TEST_LABELS).write_bytes(CONTENTS[TEST_LABELS])
    assert mnist.load_file(TEST_LABELS, tmp_path) == CONTENTS[TEST_LABELS]


def test_only_the_missing_file_is_downloaded(tmp_path, monkeypatch, mirror):
    data_dir = fill(tmp_path / "data", leave_out=TEST_LABELS)
    before = snapshot(data_dir)
    monkeypatch.setattr(mnist, "MIRRORS", [f"{mirror.url}/good/"])
    mnist.train(small_args(tmp_path, epochs=1))
    assert mirror.requests == [f"/good/{TEST_LABELS}.gz"]
    after = snapshot(data_dir)
    assert after.pop(f"{TEST_LABELS}.gz")[0] == PACKED[TEST_LABELS]
    assert after == before


def test_damaged_file_is_replaced_and_set_aside(tmp_path, monkeypatch, mirror, capsys):
    data_dir = fill(tmp_path / "data")
    damaged = PACKED[TRAIN_IMAGES][:1000]
    (data_dir / f"{TRAIN_IMAGES}.gz").write_bytes(damaged)
    monkeypatch.setattr(mnist, "MIRRORS", [f"{mirror.url}/truncated/", f"{mirror.url}/good/"])
    assert mnist.load_file(TRAIN_IMAGES, data_dir) == CONTENTS[TRAIN_IMAGES]
    assert f"{TRAIN_IMAGES}.gz is not the file of MNIST" in capsys.readouterr().out
    assert (data_dir / f"{TRAIN_IMAGES}.gz").read_bytes() == PACKED[TRAIN_IMAGES]
    assert (data_dir / f"{TRAIN_IMAGES}.gz.bad").read_bytes() == damaged
    assert len(list(data_dir.iterdir())) == 5


def test_damaged_file_stays_where_no_mirror_helps(tmp_path):
    data_dir = fill(tmp_path / "data")
    (data_dir / f"{TEST_IMAGES}.gz").write_bytes(b"noise")
    before = snapshot(data_dir)
    assert f"{TEST_IMAGES}.gz" in refused(small_args(tmp_path))
    assert snapshot(data_dir) == before


def test_full_disk_leaves_the_previous_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "file.gz"
    path.write_bytes(b"before")

    def fsync(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(mnist.UserError, match="cannot write to .*: No space left on device"):
        mnist.save(path, b"after")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file.gz", b"before")]


def test_folder_in_place_of_a_file(tmp_path):
    data_dir = fill(tmp_path / "data", leave_out=TRAIN_LABELS)
    (data_dir / f"{TRAIN_LABELS}.gz").mkdir()
    assert refused(small_args(tmp_path)).startswith("cannot read")


def test_data_dir_that_cannot_be_made(tmp_path, monkeypatch, mirror):
    (tmp_path / "data").write_text("a file is in the way")
    monkeypatch.setattr(mnist, "MIRRORS", [f"{mirror.url}/good/"])
    assert "cannot make the folder" in refused(small_args(tmp_path))
    assert not mirror.requests  # it is found out before 10 MB are downloaded


# ---- IDX ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, content, reason",
    [
        (TRAIN_IMAGES, CONTENTS[TRAIN_LABELS], "magic number 00000801, not 00000803"),
        (TRAIN_LABELS, b"\0\0\x0d\x01" + CONTENTS[TRAIN_LABELS][4:], "magic number 00000d01"),
        (TRAIN_IMAGES, b"", "magic number , not"),
        (TRAIN_IMAGES, CONTENTS[TRAIN_IMAGES][:-1], "header says"),
        (TRAIN_IMAGES, CONTENTS[TRAIN_IMAGES] + b"\0", "header says"),
        (TRAIN_IMAGES, CONTENTS[TRAIN_IMAGES][:9], "header says"),
        (TRAIN_LABELS, pack_idx(np.zeros(1499, np.uint8)), "does not fit 1499 labels"),
        (TRAIN_IMAGES, pack_idx(np.zeros((1500, 28, 27), np.uint8)), "does not fit 1500 labels"),
    ],
)
def test_wrong_idx_is_refused(tmp_path, monkeypatch, name, content, reason):
    (fill(tmp_path / "data") / f"{name}.gz").write_bytes(gzip.compress(content))
    expect(monkeypatch, name, content)
    assert reason in refused(small_args(tmp_path))


# ---- loaders, optimiser -------------------------------------------------------


def test_loader_hands_out_what_the_usual_one_would():
    images, labels = draw_digits(150, seed=2)
    flat = torch.from_numpy(images).float().reshape(-1, 784) / 255
    usual = DataLoader(TensorDataset(flat, torch.from_numpy(labels).long()), batch_size=64)
    ours = mnist.make_loader(mnist.Digits(images, labels, CPU), 64, shuffle=False)
    assert len(ours) == len(usual) == 3
    for (our_images, our_labels), (images, labels) in zip(ours, usual, strict=True):
        assert our_images.dtype == torch.float32 and our_labels.dtype == torch.int64
        assert torch.equal(our_images, images) and torch.equal(our_labels, labels)


def test_shuffled_loader_shows_each_picture_once_in_a_new_order_each_epoch():
    images = np.zeros((150, 28, 28), np.uint8)
    dataset = mnist.Digits(images, np.arange(150, dtype=np.uint8), CPU)
    loader = mnist.make_loader(dataset, 64, shuffle=True)
    first, second = (torch.cat([labels for _, labels in loader]).tolist() for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(150))
    assert first != second and first != sorted(first)


@pytest.mark.parametrize("anneal_lr, rates", [(True, [0.1, 0.05, 0.0]), (False, [0.1] * 3)])
def test_learning_rate_falls_to_zero_or_stays(anneal_lr, rates):
    network = mnist.make_network(4)
    args = mnist.Args(learning_rate=0.1, anneal_lr=anneal_lr)
    _, optimizer, scheduler = mnist.choose_loss_and_optimizer(network, args, num_updates=10)
    seen = []
    for update in range(11):
        if update in (0, 5, 10):
            seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert seen == pytest.approx(rates)


def test_schedule_ends_with_the_training(tmp_path, monkeypatch):
    fill(tmp_path / "data")
    learners = []
    real_choice = mnist.choose_loss_and_optimizer

    def choose(*arguments):
        learners.append(real_choice(*arguments))
        return learners[0]

    monkeypatch.setattr(mnist, "choose_loss_and_optimizer", choose)
    mnist.train(small_args(tmp_path, batch_size=500))
    assert learners[0][2].last_epoch == 6  # 2 epochs of 3 updates
    assert learners[0][1].param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


# ---- pictures -----------------------------------------------------------------


def test_most_wrong_are_the_surest_errors_in_order():
    images, _ = draw_digits(40, seed=3)
    labels = np.zeros(40, np.uint8)
    probabilities = torch.zeros(40, 10)
    probabilities[:, 0] = 1.0  # all right, and surer than any of the wrong ones
    for wrong, confidence in [(7, 0.6), (30, 0.9), (2, 0.7)]:
        probabilities[wrong, 0], probabilities[wrong, 4] = 1 - confidence, confidence
    grid = mnist.draw_most_wrong(images, labels, probabilities)
    expected = [mnist.draw_test_image(images[i], 0, probabilities[i], zoom=6) for i in (30, 2, 7)]
    height, width = expected[0].shape[:2]
    assert grid.shape == (5 * height, 5 * width, 3)
    assert np.array_equal(grid[:height, : 3 * width], np.hstack(expected))
    assert (grid[:height, 3 * width :] == 255).all() and (grid[height:] == 255).all()


def test_most_wrong_shows_25_at_most_and_none_where_all_is_right():
    images, _ = draw_digits(40, seed=3)
    labels = np.zeros(40, np.uint8)
    all_wrong = torch.zeros(40, 10)
    all_wrong[:, 4] = torch.linspace(0.99, 0.6, 40)
    full = mnist.draw_most_wrong(images, labels, all_wrong)
    last = mnist.draw_test_image(images[24], 0, all_wrong[24], zoom=6)
    assert np.array_equal(full[-last.shape[0] :, -last.shape[1] :], last)
    all_right = torch.eye(10)[torch.zeros(40, dtype=torch.int64)]
    blank = mnist.draw_most_wrong(images, labels, all_right)
    assert blank.shape == full.shape and (blank == 255).all()


def test_test_image_says_right_and_wrong(monkeypatch):
    drawn = []
    monkeypatch.setattr(mnist, "draw_digit", lambda _, lines, *rest: drawn.append((lines, rest)))
    probabilities = torch.tensor([0.0, 0, 0, 0.75, 0, 0, 0, 0, 0.25, 0])
    image = np.zeros((28, 28), np.uint8)
    mnist.draw_test_image(image, 3, probabilities)
    mnist.draw_test_image(image, 8, probabilities)
    assert drawn[0] == (["predicted 3 (75.0%)", "true 3"], (mnist.GREEN, 12))
    assert drawn[1] == (["predicted 3 (75.0%)", "true 8"], (mnist.RED, 12))


def test_drawn_digit_is_dark_on_white_and_enlarged():
    image = np.zeros((28, 28), np.uint8)
    image[0, 27] = 255
    picture = mnist.draw_digit(image, ["text"], (0, 0, 255), zoom=10)
    margin = picture[10:290, 10:290]
    assert (margin[:10, 270:] == 0).all() and (margin[10:] == 255).all()
    assert (picture[290:] != 255).any()  # the text


# ---- bad input ----------------------------------------------------------------


@pytest.mark.parametrize(
    "field, value",
    [
        ("seed", -1),
        ("seed", 2**32),
        ("epochs", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("batch_size", 0),
        ("batch_size", 60_001),
        ("hidden_size", 0),
        ("hidden_size", 4097),
        ("image_index", -1),
        ("image_index", 10_000),
    ],
)
def test_values_out_of_range(tmp_path, field, value):
    fill(tmp_path / "data")
    message = refused(small_args(tmp_path, **{field: value}))
    assert f"--{field.replace('_', '-')} must be" in message and str(value) in message


def test_largest_values_are_accepted(tmp_path):
    fill(tmp_path / "data")
    mnist.train(
        small_args(tmp_path, seed=2**32 - 1, batch_size=60_000, hidden_size=1, image_index=199)
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(tmp_path):
    assert "--device cuda" in refused(small_args(tmp_path, device="cuda"))


def test_runs_dir_that_cannot_be_made(tmp_path):
    fill(tmp_path / "data")
    (tmp_path / "runs").write_text("a file is in the way")
    assert "cannot write to" in refused(small_args(tmp_path))


def test_command_line_shows_one_line_and_fails(tmp_path):
    done = subprocess.run(
        [sys.executable, mnist.__file__, "--epochs", "0"],
        cwd=tmp_path,
        env={**os.environ, "https_proxy": "http://127.0.0.1:9"},  # should it try to download
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == "error: --epochs must be 1 or more, not 0\n"
    assert not list(tmp_path.iterdir())
