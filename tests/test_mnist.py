"""mnist.py on small IDX files, a mirror on 127.0.0.1 and, with MNIST_DIR, the real digits."""

import gzip
import hashlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, TensorDataset

import mnist

NAMES = TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = list(mnist.FILES)
REAL_FILES, REAL_MIRRORS = dict(mnist.FILES), list(mnist.MIRRORS)
REAL_DIR = Path(os.environ.get("MNIST_DIR", "")).resolve()
real_digits = pytest.mark.skipif("MNIST_DIR" not in os.environ, reason="MNIST_DIR is not set")

# ---- small data and a small mirror --------------------------------------------


def make_data(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise with a brighter row, whose number is the label: (count, 28, 28) and (count,), uint8."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(10, size=count, dtype=np.uint8)
    images = rng.integers(100, size=(count, 28, 28), dtype=np.uint8)
    images[range(count), labels] += 150
    return images, labels


def pack_idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


ARRAYS = dict(zip(NAMES, [*make_data(1500, seed=0), *make_data(200, seed=1)], strict=True))
CONTENTS = {name: pack_idx(array) for name, array in ARRAYS.items()}
PACKED = {name: gzip.compress(content) for name, content in CONTENTS.items()}


@pytest.fixture(autouse=True)
def small_data_and_no_network(monkeypatch):
    monkeypatch.setattr(mnist, "MIRRORS", [])
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENTS.items()}
    monkeypatch.setattr(mnist, "FILES", hashes)
    monkeypatch.setenv("no_proxy", "*")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def fill(data_dir: Path, leave_out: str = "") -> Path:
    data_dir.mkdir(parents=True, exist_ok=True)
    for name in set(NAMES) - {leave_out}:
        (data_dir / f"{name}.gz").write_bytes(PACKED[name])
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
        bodies = {"other": gzip.compress(b"\0" * 100), "page": b"<html>log in</html>", "empty": b""}
        bodies["scrambled"] = packed[:100] + b"\xff" * 99 + packed[199:]
        if kind in ("truncated", "cut", "stops", "chunk"):
            bodies[kind] = packed[: len(packed) // 2]
        body = bodies.get(kind, packed)
        self.send_response(200)
        if kind == "chunk":  # breaks off in the middle of one
            self.send_header("Transfer-Encoding", "chunked")
            body = b"%x\r\n" % len(packed) + body
        else:  # "cut" and "stops" announce all of the file
            self.send_header("Content-Length", len(body if kind == "truncated" else packed))
        self.end_headers()
        self.wfile.write(body)
        if kind == "stops":
            self.server.closing.wait(60)


@pytest.fixture
def mirror():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    server.requests, server.closing = [], threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


def small_args(tmp_path: Path, **changes) -> mnist.Args:
    """Arguments of a run that takes a second, on data in tmp_path/data."""
    chosen = {"data_dir": tmp_path / "data", "image_index": 20, "epochs": 2, "device": "cpu"}
    return mnist.Args(**{"runs_dir": tmp_path / "runs", **chosen, **changes})


def refused(args: mnist.Args, error=ValueError) -> str:
    """The one line with which train refuses; nothing may have been written to runs."""
    with pytest.raises(error) as caught:
        mnist.train(args)
    assert str(caught.value) and "\n" not in str(caught.value)
    assert not args.runs_dir.is_dir()
    return str(caught.value)


def command_line(folder: Path, *flags: str) -> subprocess.Popen:
    """A real run in that folder; should it try to download, it finds no mirror."""
    env = {**os.environ, "https_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    command = [sys.executable, "-u", mnist.__file__, "--device", "cpu", *flags]
    return subprocess.Popen(
        command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # Tests that were started in the background ignore SIGINT, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def count_correct(weights: Path, data_dir: Path) -> int:
    """What a network with these weights makes of the test images."""
    network = mnist.Network(100)
    network.load_state_dict(torch.load(weights, weights_only=True))
    test_set = mnist.load_images("t10k", data_dir, "cpu")
    x = test_set.tensors[0]
    with torch.no_grad():
        logits = network.fc3(network.fc2(network.fc1(x).clamp(min=0)).clamp(min=0))
        assert torch.equal(network(x), logits)
    return mnist.test(network, mnist.make_loader(test_set, 64, shuffle=False))


# ---- a run --------------------------------------------------------------------


def test_run_learns_and_leaves_everything_in_its_folder(tmp_path, capsys):
    fill(tmp_path / "data")
    result = mnist.train(small_args(tmp_path, seed=3, epochs=4, batch_size=15))  # 4 x 100 updates
    assert result["accuracy_before"] < 0.4 and result["accuracy"] > 0.9

    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name.startswith("mnist__3__")
    assert {path.name for path in run_dir.iterdir() if "tfevents" not in path.name} == {
        "args.json", "result.json", "weight_end.pth",
        "first_training_image.png", "test_image_20.png", "most_wrong.png",
    }  # fmt: skip
    assert json.loads((run_dir / "args.json").read_text())["epochs"] == 4
    assert json.loads((run_dir / "result.json").read_text()) == result
    keys = {"seed", "seconds", "versions", "accuracy_before", "accuracy", "seconds_per_epoch"}
    assert set(result) == keys
    assert result["seed"] == 3 and set(result["versions"]) == {"python", "torch", "numpy", "cv2"}

    printed = capsys.readouterr().out
    assert "Linear(in_features=784, out_features=100" in printed
    before, after = (round(result[key] * 200) for key in ("accuracy_before", "accuracy"))
    assert f"before training: {before}/200 ({before / 200:.2%})" in printed
    assert f"after epoch 4: {after}/200 ({after / 200:.2%})" in printed
    assert f"true {ARRAYS[TEST_LABELS][20]}\n" in printed
    assert printed.endswith(f"Everything is in {run_dir}\n")
    assert count_correct(run_dir / "weight_end.pth", tmp_path / "data") == after

    events = EventAccumulator(str(run_dir)).Reload()
    losses, accuracies = events.Scalars("losses/train"), events.Scalars("charts/accuracy")
    assert [event.step for event in losses] == list(range(0, 400, 50))
    assert losses[-1].value < losses[0].value
    assert [event.step for event in accuracies] == [0, 100, 200, 300, 400]
    assert accuracies[0].value == pytest.approx(result["accuracy_before"])
    assert accuracies[-1].value == pytest.approx(result["accuracy"])


def test_same_seed_same_result_another_seed_another(tmp_path, pretend_a_gpu):
    fill(tmp_path / "data")
    pretend_a_gpu(mnist)  # device="cpu" does not ask
    weights = []
    for run, seed in enumerate([5, 5, 6]):
        args = small_args(tmp_path / str(run), seed=seed, data_dir=tmp_path / "data", epochs=1)
        mnist.train(args)
        (path,) = args.runs_dir.glob("*/weight_end.pth")
        weights.append(torch.load(path, weights_only=True))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not torch.equal(weights[0]["fc1.weight"], weights[2]["fc1.weight"])


@real_digits
def test_accuracy_on_the_real_digits(tmp_path, monkeypatch):
    monkeypatch.setattr(mnist, "FILES", REAL_FILES)
    before = snapshot(REAL_DIR)
    assert mnist.train(small_args(tmp_path, data_dir=REAL_DIR, epochs=3))["accuracy"] > 0.97
    assert snapshot(REAL_DIR) == before


@real_digits
def test_ctrl_c_keeps_what_was_learnt(tmp_path, monkeypatch):
    run = command_line(tmp_path, "--data-dir", str(REAL_DIR), "--epochs", "30")
    threading.Thread(target=run.stderr.read, daemon=True).start()  # progress bars
    for line in run.stdout:
        if "after epoch 1:" in line:
            time.sleep(0.3)  # into the next epoch
            run.send_signal(signal.SIGINT)
    assert run.wait(30) == 130
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert not (run_dir / "result.json").exists()
    monkeypatch.setattr(mnist, "FILES", REAL_FILES)
    assert count_correct(run_dir / "weight_end.pth", REAL_DIR) > 9000


def test_loss_that_is_not_finite(tmp_path):
    fill(tmp_path / "data")
    with pytest.raises(ValueError, match="epoch 1: the loss is not finite; lower --learning-rate"):
        mnist.train(small_args(tmp_path, learning_rate=1e30))
    assert not list(tmp_path.glob("runs/*/result.json"))


# ---- the download -------------------------------------------------------------


def test_only_what_is_missing_is_downloaded_and_only_once(tmp_path, monkeypatch, mirror, capsys):
    assert all(url.startswith("https://") and url.endswith("/") for url in REAL_MIRRORS)
    monkeypatch.setattr(mnist, "MIRRORS", [f"{mirror.url}/good/"])
    data_dir = tmp_path / "new" / "data"
    for name in (TRAIN_IMAGES, TEST_LABELS, TRAIN_IMAGES, TEST_LABELS):
        assert np.array_equal(mnist.load_file(name, data_dir), ARRAYS[name])
    assert mirror.requests == [f"/good/{TRAIN_IMAGES}.gz", f"/good/{TEST_LABELS}.gz"]
    assert "100%" in capsys.readouterr().err  # the progress bar
    assert {path.name for path in data_dir.iterdir()} == {f"{TRAIN_IMAGES}.gz", f"{TEST_LABELS}.gz"}


REASONS = {"missing": "Not Found", "chunk": "IncompleteRead", "down": "refused"}
REASONS |= dict.fromkeys(["other", "page", "empty"], "wrong checksum")
REASONS |= dict.fromkeys(["truncated", "cut", "scrambled"], "truncated or damaged")
REASONS |= dict.fromkeys(["silent", "stops"], "timed out")


@pytest.mark.parametrize("kind, reason", REASONS.items())
def test_bad_mirror_is_named_and_the_next_one_is_used(tmp_path, monkeypatch, mirror, kind, reason):
    if kind in ("silent", "stops"):
        monkeypatch.setattr(mnist, "TIMEOUT", 0.5)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # nobody listens at this port
        port = unused.getsockname()[1] if kind == "down" else mirror.server_port
        bad = f"http://127.0.0.1:{port}/{kind}/"
        monkeypatch.setattr(mnist, "MIRRORS", [bad])
        message = refused(small_args(tmp_path))
        assert f"{TRAIN_IMAGES}.gz ({bad}: " in message and reason in message
        assert "--data-dir" in message
        assert not list((tmp_path / "data").iterdir())

        monkeypatch.setattr(mnist, "MIRRORS", [bad, f"{mirror.url}/good/"])
        array = mnist.load_file(TRAIN_IMAGES, tmp_path / "data")
    assert np.array_equal(array, ARRAYS[TRAIN_IMAGES])
    assert [path.name for path in (tmp_path / "data").iterdir()] == [f"{TRAIN_IMAGES}.gz"]
    assert socket.getdefaulttimeout() is None


def test_killed_download_leaves_nothing_that_is_used(tmp_path, monkeypatch, mirror):
    code = f"import mnist, pathlib; mnist.MIRRORS = ['{mirror.url}/stops/']; "
    code += f"mnist.load_file({TRAIN_IMAGES!r}, pathlib.Path({str(tmp_path)!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(mnist.__file__).parent)
    deadline = time.monotonic() + 60
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert list(tmp_path.iterdir()) and not (tmp_path / f"{TRAIN_IMAGES}.gz").exists()
    monkeypatch.setattr(mnist, "MIRRORS", [f"{mirror.url}/good/"])
    assert np.array_equal(mnist.load_file(TRAIN_IMAGES, tmp_path), ARRAYS[TRAIN_IMAGES])


# ---- files that are there already ---------------------------------------------


def test_files_work_offline_however_they_are_packed_and_are_not_touched(tmp_path):
    fill(tmp_path, leave_out=TEST_IMAGES)
    (tmp_path / TEST_IMAGES).write_bytes(CONTENTS[TEST_IMAGES])
    (tmp_path / f"{TEST_LABELS}.gz").write_bytes(gzip.compress(CONTENTS[TEST_LABELS], 1))
    before = snapshot(tmp_path)
    for name in NAMES:
        assert np.array_equal(mnist.load_file(name, tmp_path), ARRAYS[name])
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("damaged", [PACKED[TRAIN_IMAGES][:1000], PACKED[TEST_IMAGES]])
def test_damaged_file_is_set_aside_with_a_word(tmp_path, monkeypatch, mirror, capsys, damaged):
    data_dir = fill(tmp_path / "data")
    path = data_dir / f"{TRAIN_IMAGES}.gz"
    monkeypatch.setattr(mnist, "MIRRORS", [f"{mirror.url}/truncated/"])
    for content in (damaged, b"another one"):
        path.write_bytes(content)
        assert str(path) in refused(small_args(tmp_path))
        assert f"{path} is not the file of MNIST" in capsys.readouterr().out
        assert not path.exists()

    monkeypatch.setattr(mnist, "MIRRORS", [f"{mirror.url}/good/"])
    assert np.array_equal(mnist.load_file(TRAIN_IMAGES, data_dir), ARRAYS[TRAIN_IMAGES])
    assert path.read_bytes() == PACKED[TRAIN_IMAGES]
    aside = [file.read_bytes() for file in sorted(data_dir.glob(f"{path.name}.*.bad"))]
    assert aside == [damaged, b"another one"]  # both are kept


def test_what_is_in_the_way_is_named(tmp_path, monkeypatch, mirror):
    monkeypatch.setattr(mnist, "MIRRORS", [f"{mirror.url}/good/"])
    file, folder = tmp_path / "file", tmp_path / "data" / f"{TRAIN_LABELS}.gz"
    file.write_text("not a folder")
    assert str(file) in refused(small_args(tmp_path, data_dir=file), OSError)
    assert not mirror.requests  # it is found out before 10 MB are downloaded
    fill(tmp_path / "data")
    assert str(file) in refused(small_args(tmp_path, runs_dir=file / "runs"), OSError)
    folder.unlink()
    folder.mkdir()
    assert str(folder) in refused(small_args(tmp_path), OSError)


# ---- loaders, learning rate, pictures -----------------------------------------


def test_loader_hands_out_what_the_usual_one_would_and_shuffles_anew_each_epoch(tmp_path):
    train_set = mnist.load_images("train", fill(tmp_path), "cpu")
    images = torch.from_numpy(ARRAYS[TRAIN_IMAGES]).float().reshape(-1, 784) / 255
    usual_set = TensorDataset(images, torch.from_numpy(ARRAYS[TRAIN_LABELS]).long())
    ours = mnist.make_loader(train_set, 64, shuffle=False)
    usual = DataLoader(usual_set, batch_size=64)
    assert len(ours) == len(usual) == 24  # the last batch has 28
    for our_batch, usual_batch in zip(ours, usual, strict=True):
        for our_tensor, usual_tensor in zip(our_batch, usual_batch, strict=True):
            assert our_tensor.dtype == usual_tensor.dtype
            assert torch.equal(our_tensor, usual_tensor)

    loader = mnist.make_loader(TensorDataset(torch.arange(150)), 64, shuffle=True)
    first, second = (torch.cat([numbers for (numbers,) in loader]).tolist() for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(150))
    assert first != second and first != sorted(first)


@pytest.mark.parametrize("anneal_lr, end", [(True, 0.0), (False, 0.01)])
def test_learning_rate_and_seconds_per_epoch(tmp_path, monkeypatch, anneal_lr, end):
    fill(tmp_path / "data")
    make, test, made, rates = mnist.make_optimizer, mnist.test, [], []
    monkeypatch.setattr(mnist, "make_optimizer", lambda *args: made.append(make(*args)) or made[0])

    def test_and_note_the_rate(*args):
        rates.append(made[0].param_groups[0]["lr"])
        return test(*args)

    make_loader, loaders = mnist.make_loader, []

    def make_and_note_the_loader(dataset, batch_size, shuffle):
        loaders.append((len(dataset), batch_size, shuffle))
        return make_loader(dataset, batch_size, shuffle)

    monkeypatch.setattr(mnist, "make_loader", make_and_note_the_loader)
    monkeypatch.setattr(mnist, "test", test_and_note_the_rate)
    monkeypatch.setattr(mnist, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    result = mnist.train(small_args(tmp_path, batch_size=500, anneal_lr=anneal_lr))
    assert result["seconds_per_epoch"] == 1  # the clock was read before and after each epoch
    assert rates == pytest.approx([0.01, (0.01 + end) / 2, end])
    assert loaders == [(1500, 500, True), (200, 500, False)]
    assert type(made[0]) is torch.optim.Adam and len(made[0].param_groups[0]["params"]) == 6


def test_pictures_show_the_images_and_the_surest_errors_in_order(tmp_path):
    train_set = mnist.load_images("train", fill(tmp_path), "cpu")
    test_set = mnist.load_images("t10k", tmp_path, "cpu")
    images, labels = test_set.tensors

    def draw_all(errors: dict[int, float]) -> list[np.ndarray]:
        """The pictures of a network that is right but for these: test index -> confidence."""
        probabilities = torch.full((200, 10), 1e-9)
        probabilities[range(200), labels] = 1.0
        for index, confidence in errors.items():
            probabilities[index, labels[index]] = 1 - confidence
            probabilities[index, (labels[index] + 1) % 10] = confidence
        mnist.save_pictures(lambda _: probabilities.log(), train_set, test_set, 20, tmp_path)
        names = ("first_training_image", "test_image_20", "most_wrong")
        return [cv2.imread(str(tmp_path / f"{name}.png"), cv2.IMREAD_GRAYSCALE) for name in names]

    def error(index: int, percent: str) -> np.ndarray:
        text = f"predicted {(labels[index] + 1) % 10} ({percent}%), true {labels[index]}"
        return mnist.draw(images[index], text)

    first, right, grid = draw_all({7: 0.6, 30: 0.9, 2: 0.7})
    assert np.array_equal(first, mnist.draw(train_set[0][0], f"label {train_set[0][1]}"))
    text = f"predicted {labels[20]} (100.0%), true {labels[20]}"
    assert np.array_equal(right, mnist.draw(images[20], text))
    enlarged = np.kron(255 - ARRAYS[TEST_IMAGES][20], np.ones((8, 8), np.uint8))  # dark on white
    assert np.array_equal(right[8:232, 8:232], enlarged)
    assert (right[232:] < 128).any()  # the text
    row = np.hstack([error(30, "90.0"), error(2, "70.0"), error(7, "60.0")])
    assert grid.shape == (5 * 268, 5 * 240) and np.array_equal(grid[:268, :720], row)
    assert (grid[:268, 720:] == 255).all() and (grid[268:] == 255).all()
    *_, grid = draw_all({index: 0.99 - index / 100 for index in range(40)})  # 25 of them are drawn
    assert grid.shape == (5 * 268, 5 * 240)
    assert np.array_equal(grid[-268:, -240:], error(24, "75.0"))


# ---- bad input ----------------------------------------------------------------

BAD = {"seed": [-1, 2**32], "epochs": [0], "learning_rate": [0.0, float("nan"), float("inf")]}
BAD |= {"batch_size": [0, 60_001], "hidden_size": [0, 4097], "image_index": [-1, 10_000]}
BAD |= {} if torch.cuda.is_available() else {"device": ["cuda"]}


@pytest.mark.parametrize("field", BAD)
def test_values_out_of_range(field):
    for value in BAD[field]:
        with pytest.raises(ValueError, match=field.replace("_", "-")):
            mnist.Args(**{field: value})


def test_largest_values_are_accepted(tmp_path):
    fill(tmp_path / "data")
    largest = {"seed": 2**32 - 1, "batch_size": 60_000, "hidden_size": 4096, "image_index": 199}
    mnist.train(small_args(tmp_path, **largest, epochs=1))
    (path,) = tmp_path.glob("runs/*/weight_end.pth")
    assert torch.load(path, weights_only=True)["fc2.weight"].shape == (4096, 4096)


def test_command_line_shows_one_message_and_fails(tmp_path):
    run = command_line(tmp_path, "--epochs", "0")
    _, error = run.communicate(timeout=60)
    assert run.returncode == 2 and "--epochs must be 1 or more" in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())
    run = command_line(tmp_path)
    _, error = run.communicate(timeout=60)
    assert run.returncode == 1 and error.startswith("error: cannot download data/mnist/train-imag")
    assert error.count("\n") == 1 and not (tmp_path / "runs").exists()
