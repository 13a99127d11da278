"""mnist.py on small IDX files, a mirror on 127.0.0.1 and, with MNIST_DIR, the real digits."""

import gzip
import json
import os
import signal
import threading
import time
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer

import cv2
import numpy as np
import pytest
import torch
from launch import wait_for
from short_runs import (
    ARRAYS, CONTENTS, FILES, HASHES, MIRRORS, NAMES, NO_MIRROR, PACKED, TEST_IMAGES, TEST_LABELS,
    TRAIN_IMAGES, curves, make_data, pack_idx, put_digits, source, start,
)  # fmt: skip
from torch.utils.data import TensorDataset

import mnist

GZ, KAGGLE = f"{TRAIN_IMAGES}.gz", TRAIN_IMAGES.replace("-idx", ".idx")
OTHER = pack_idx(make_data(1500, seed=2)[0])  # another data set's file, of the same size
HALF = PACKED[TRAIN_IMAGES][:500_000]


@pytest.fixture(autouse=True)
def small_data_and_no_network(monkeypatch):
    monkeypatch.setattr(mnist, "MIRRORS", [])
    monkeypatch.setattr(mnist, "FILES", HASHES)
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def data_dir(tmp_path) -> Path:
    return put_digits(tmp_path / "data")


class Mirror(StreamRequestHandler):
    """/good/ has every file; any other first part of the path names what is wrong with it."""

    def handle(self):
        path = self.rfile.readline().decode().split()[1]
        while self.rfile.readline().strip():
            pass  # headers
        self.server.requests.append(path)
        _, kind, name = path.split("/")
        packed, ok = PACKED[name.removesuffix(".gz")], b"HTTP/1.0 200 OK\r\n"
        all_of_it = b"Content-Length: %d\r\n\r\n" % len(packed)
        answers = {
            "good": ok + all_of_it + packed,
            "missing": b"HTTP/1.0 404 Not Found\r\n\r\n",
            "other": ok + b"\r\n" + gzip.compress(OTHER),
            "cut": ok + all_of_it + HALF,
            "stops": ok + all_of_it + HALF,
            "chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nFFFFF\r\n" + HALF,
        }
        self.wfile.write(answers[kind])
        if kind == "stops":
            self.server.closing.wait(60)


@pytest.fixture
def mirror(monkeypatch):
    with ThreadingTCPServer(("127.0.0.1", 0), Mirror) as server:
        server.requests, server.closing = [], threading.Event()
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr(mnist, "MIRRORS", [f"{server.url}/good/"])
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.closing.set()
        server.shutdown()


def small_args(tmp_path: Path, **changes) -> mnist.Args:
    """Arguments of a run that takes a second, on data in tmp_path/data."""
    chosen = {"data_dir": tmp_path / "data", "image_index": 20, "epochs": 2, "device": "cpu"}
    return mnist.Args(**{"runs_dir": tmp_path / "runs", **chosen, **changes})


def refused(args: mnist.Args, error=ValueError) -> str:
    """The one line with which train refuses."""
    with pytest.raises(error) as caught:
        mnist.train(args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def weights_in(runs_dir: Path) -> dict[str, torch.Tensor]:
    (path,) = runs_dir.glob("*/weight_end.pth")
    return torch.load(path, weights_only=True)


def count_correct(weights: dict[str, torch.Tensor], data_dir: Path) -> int:
    """What a network with these weights makes of the test images."""
    images, labels = mnist.load_images("t10k", data_dir, "cpu").tensors
    w1, b1, w2, b2, w3, b3 = weights.values()
    scores = ((images @ w1.T + b1).clamp(0) @ w2.T + b2).clamp(0) @ w3.T + b3
    network = mnist.Network(100)
    network.load_state_dict(weights)
    assert torch.allclose(network(images), scores, atol=1e-4)
    return (scores.argmax(1) == labels).sum().item()


# ---- a run ---------------------------------------------------------------------------------


def test_a_run_learns_and_tells_how_well(tmp_path, data_dir, monkeypatch, capsys):
    monkeypatch.delattr(torch, "set_num_threads")  # a caller's process stays as it is
    result = mnist.train(small_args(tmp_path, epochs=4, batch_size=15))  # 4 x 100 updates
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert json.loads((run_dir / "result.json").read_text()) == result
    assert 0 < 4 * result["seconds_per_epoch"] < result["seconds"]

    printed = capsys.readouterr().out
    before, after = (round(result[key] * 200) for key in ("accuracy_before", "accuracy"))
    assert before < 80 and after > 180
    assert count_correct(weights_in(tmp_path / "runs"), data_dir) == after
    assert f"before training: {before}/200 ({before / 200:.2%})" in printed
    assert f"after epoch 4: {after}/200 ({after / 200:.2%})" in printed
    assert f"true {ARRAYS[TEST_LABELS][20]}\n" in printed

    losses, accuracies = (curves(run_dir)[tag] for tag in ("losses/train", "charts/accuracy"))
    assert [step for step, _ in losses] == list(range(0, 400, 50))
    assert losses[0][1] == pytest.approx(np.log(10), abs=0.3) and losses[-1][1] < 0.5
    assert [step for step, _ in accuracies] == [0, 100, 200, 300, 400]
    assert accuracies[0][1] == pytest.approx(before / 200)
    assert accuracies[-1][1] == pytest.approx(after / 200)


def test_same_seed_same_result_another_seed_another(tmp_path, data_dir, pretend_a_gpu):
    pretend_a_gpu(mnist)  # device="cpu" does not ask
    runs = [tmp_path / str(run) for run in range(3)]
    for runs_dir, seed in zip(runs, [5, 5, 2**32 - 1], strict=True):
        mnist.train(small_args(tmp_path, runs_dir=str(runs_dir), seed=seed, epochs=1))
    first, again, other = (weights_in(runs_dir) for runs_dir in runs)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["fc1.weight"], other["fc1.weight"])


@pytest.mark.slow
@pytest.mark.skipif("MNIST_DIR" not in os.environ, reason="MNIST_DIR is not set")
def test_accuracy_on_the_real_digits(tmp_path, monkeypatch):
    monkeypatch.setattr(mnist, "FILES", FILES)
    real_dir = Path(os.environ["MNIST_DIR"]).resolve()
    assert mnist.train(small_args(tmp_path, data_dir=real_dir, epochs=3))["accuracy"] > 0.97


# ---- the four files ------------------------------------------------------------------------


def test_only_what_is_missing_is_downloaded_and_only_once(tmp_path, mirror, capsys):
    assert all(url.startswith("https://") and url.endswith("/") for url in MIRRORS)
    folder = tmp_path / "new" / "data"
    for name in (TRAIN_IMAGES, TEST_LABELS, TRAIN_IMAGES, TEST_LABELS):
        assert np.array_equal(mnist.load_file(name, folder), ARRAYS[name])
    assert mirror.requests == [f"/good/{GZ}", f"/good/{TEST_LABELS}.gz"]
    assert "100%" in capsys.readouterr().err  # the progress bar
    assert {path.name for path in folder.iterdir()} == {GZ, f"{TEST_LABELS}.gz"}


REASONS = {"missing": "Not Found", "chunk": "IncompleteRead", "stops": "timed out"}
REASONS |= {"cut": "damaged", "other": "wrong checksum"}


@pytest.mark.parametrize("kind, reason", REASONS.items())
def test_bad_mirror_is_named_and_the_next_one_is_used(tmp_path, monkeypatch, mirror, kind, reason):
    monkeypatch.setattr(mnist, "TIMEOUT", 1 if kind == "stops" else 30)
    bad = [f"{mirror.url}/{kind}/", NO_MIRROR]
    monkeypatch.setattr(mnist, "MIRRORS", bad)
    message = refused(small_args(tmp_path))
    assert f"{GZ} ({bad[0]}: " in message and reason in message
    assert f"; {bad[1]}: " in message and "refused" in message and "--data-dir" in message
    assert not list((tmp_path / "data").iterdir())

    monkeypatch.setattr(mnist, "MIRRORS", [*bad, f"{mirror.url}/good/"])
    assert np.array_equal(mnist.load_file(TRAIN_IMAGES, tmp_path / "data"), ARRAYS[TRAIN_IMAGES])


def test_killed_download_leaves_nothing(tmp_path, mirror):
    code = source("mnist").replace(NO_MIRROR, f"{mirror.url}/stops/")
    run = start("mnist", tmp_path, code, env={"no_proxy": "*"}, data_dir="data")
    assert wait_for(lambda: mirror.requests)
    time.sleep(0.5)  # half of the file has come, and no more will
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL and not list((tmp_path / "data").iterdir())


@pytest.mark.parametrize("place", [TRAIN_IMAGES, KAGGLE, f"{TRAIN_IMAGES}/{KAGGLE}"])
def test_files_work_offline_however_they_are_packed_and_are_not_touched(data_dir, place):
    path, content = data_dir / place, CONTENTS[TRAIN_IMAGES]
    (data_dir / GZ).unlink()
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)
    before = {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")}
    for name in NAMES:
        assert np.array_equal(mnist.load_file(name, data_dir), ARRAYS[name])
    assert {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")} == before


OTHERS = [(GZ, gzip.compress(OTHER)), (GZ, gzip.compress(b"no digits")), (TRAIN_IMAGES, OTHER)]


@pytest.mark.parametrize("place, content", OTHERS, ids=range(3))
def test_another_data_set_is_left_alone(tmp_path, data_dir, mirror, place, content):
    (data_dir / GZ).unlink()
    (data_dir / place).write_bytes(content)
    message = refused(small_args(tmp_path))
    assert str(data_dir / place) in message and "--data-dir" in message
    assert (data_dir / place).read_bytes() == content and not mirror.requests
    put_digits(tmp_path / "data" / "mnist")  # one in the folder above is not its business
    assert len(mnist.load_file(TRAIN_IMAGES, tmp_path / "data" / "mnist")) == 1500


SCRAMBLED = PACKED[TRAIN_IMAGES][:100] + b"\xff" * 99 + PACKED[TRAIN_IMAGES][199:]
DAMAGED = [(GZ, HALF), (GZ, SCRAMBLED), (GZ, b"<html>log in"), (GZ, b"")]
DAMAGED += [(place, CONTENTS[TRAIN_IMAGES][:1000])
            for place in (TRAIN_IMAGES, f"{TRAIN_IMAGES}/{KAGGLE}")]  # fmt: skip


@pytest.mark.parametrize("place, content", DAMAGED, ids=range(6))
def test_damaged_file_is_set_aside(data_dir, mirror, capsys, place, content):
    path = data_dir / place
    path.parent.mkdir(exist_ok=True)
    for _ in range(2):
        (data_dir / GZ).unlink()
        path.write_bytes(content)
        assert np.array_equal(mnist.load_file(TRAIN_IMAGES, data_dir), ARRAYS[TRAIN_IMAGES])
        assert f"{path} is truncated or damaged" in capsys.readouterr().out
        assert (data_dir / GZ).read_bytes() == PACKED[TRAIN_IMAGES]
    aside = [file.read_bytes() for file in path.parent.glob(f"{path.name}.*.bad")]
    assert aside == [content, content]  # both are kept


def test_what_is_in_the_way_is_named(tmp_path, mirror):
    file = tmp_path / "file"
    file.write_text("not a folder")
    assert str(file) in refused(small_args(tmp_path, data_dir=file), OSError)
    assert str(file) in refused(small_args(tmp_path, runs_dir=file / "runs"), OSError)
    assert not mirror.requests  # it is found out before 11 MB are downloaded


# ---- what is learnt from, and how it ends --------------------------------------------------


def test_loaders_hand_out_each_image_once_and_shuffle_those_of_training_anew():
    train_set, test_set = TensorDataset(torch.arange(150)), TensorDataset(torch.arange(70))
    train_loader, test_loader = mnist.make_loaders(train_set, test_set, 64)
    assert [len(numbers) for (numbers,) in train_loader] == [64, 64, 22]
    loaders = train_loader, train_loader, test_loader
    first, second, test = (torch.cat([x for (x,) in loader]).tolist() for loader in loaders)
    assert sorted(first) == sorted(second) == list(range(150)) and test == list(range(70))
    assert first != second and first != sorted(first)


@pytest.mark.parametrize("anneal_lr, expected", [(True, [0.005, 0]), (False, [0.01, 0.01])])
def test_learning_rate(tmp_path, data_dir, monkeypatch, anneal_lr, expected):
    train_epoch, rates = mnist.train_epoch, []

    def train_and_note_the_rate(network, loader, optimizer, *others):
        train_epoch(network, loader, optimizer, *others)
        rates.append(optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(mnist, "train_epoch", train_and_note_the_rate)
    mnist.train(small_args(tmp_path, batch_size=500, anneal_lr=anneal_lr))
    assert rates == pytest.approx(expected)


def test_pictures_show_the_images_and_the_surest_errors_in_order(tmp_path, data_dir):
    train_set, test_set = (mnist.load_images(part, data_dir, "cpu") for part in ("train", "t10k"))
    images, labels = test_set.tensors
    wrong = (labels + 1) % 10

    def pictures(errors: dict[int, float]) -> list[np.ndarray]:
        """Those of a network that is right but for these: test index -> confidence."""
        probabilities = torch.nn.functional.one_hot(labels) + 1e-9
        for i, confidence in errors.items():
            probabilities[i, [labels[i], wrong[i]]] = torch.tensor([1 - confidence, confidence])
        mnist.save_pictures(lambda _: probabilities.log(), train_set, test_set, 40, tmp_path)
        names = ("first_training_image", "test_image_40", "most_wrong")
        return [cv2.imread(str(tmp_path / f"{name}.png"), cv2.IMREAD_GRAYSCALE) for name in names]

    def error(i: int, percent: int) -> np.ndarray:
        return mnist.draw(images[i], f"predicted {wrong[i]} ({percent}.0%), true {labels[i]}")

    first, right, grid = pictures({i: 0.6 + i / 100 for i in range(30)})
    assert np.array_equal(first, mnist.draw(train_set[0][0], f"label {train_set[0][1]}"))
    text = f"predicted {labels[40]} (100.0%), true {labels[40]}"
    assert np.array_equal(right, mnist.draw(images[40], text))
    enlarged = np.kron(255 - ARRAYS[TEST_IMAGES][40], np.ones((8, 8), np.uint8))  # dark on white
    assert np.array_equal(right[8:232, 8:232], enlarged) and (right[232:] < 128).any()  # the text
    rows = [np.hstack([error(i, 60 + i) for i in range(i, i - 5, -1)]) for i in range(29, 5, -5)]
    assert np.array_equal(grid, np.vstack(rows))  # 25 of the 30
    *_, grid = pictures({7: 0.7})
    assert np.array_equal(grid[:268, :240], error(7, 70)) and (grid[:, 240:] == 255).all()
