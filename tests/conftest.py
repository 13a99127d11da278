"""Lets the tests import each script by its name, as a user's own project would after copying it.

Tests marked slow are skipped unless pytest is given --slow.
"""

import faulthandler
import functools
import os
import signal
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import launch
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# Set before torch is imported. One thread, and with it one worker of a2c_breakout.py, where a test
# does not want more: starts are faster so. Threads that wait on a busy machine sleep.
os.environ |= {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0"}
os.environ.pop("PYTHONUNBUFFERED", None)  # as most users have it: what is printed waits in a buffer
for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GLOO_SOCKET_IFNAME"):  # of a batch system
    os.environ.pop(name, None)
# Started in the background, or by nohup, Python would ignore these, and its children too.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Only on a CPU is the same seed the same run, to the bit.
os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests, too")


def pytest_configure(config):
    config.stderr = os.dup(2)  # in a test pytest has it captured
    config.addinivalue_line("markers", "slow: takes long; only with --slow")


def pytest_collection_modifyitems(config, items):
    for item in items if not config.getoption("--slow") else ():
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: give --slow"))


@pytest.fixture(autouse=True)
def nothing_goes_on(pytestconfig):
    """What a test has started ends with it. One that hangs says where, and ends all tests."""
    faulthandler.dump_traceback_later(1800, exit=True, file=pytestconfig.stderr)
    yield
    faulthandler.cancel_dump_traceback_later()
    launch.end_all()


@pytest.fixture(autouse=True, scope="session")
def no_litter(tmp_path_factory):
    """What is written beside the folders of the tests goes where pytest tidies up."""
    tempfile.tempdir = str(tmp_path_factory.mktemp("tmp"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A short run of a script, the same one for all tests: its folder, and its process.

    Its folder is in another home, its console knows no Japanese, its desktop is none for pygame.
    """
    from short_runs import start

    @functools.cache
    def finish(name):
        home = tmp_path_factory.mktemp("home")
        env = {"HOME": str(home), "SDL_VIDEODRIVER": "wayland", "PYTHONIOENCODING": "cp1252"}
        process = start(name, home, env=env, runs_dir="~/つくる")
        assert process.wait() == 0, process.stderr
        [run_dir] = home.glob("つくる/*")
        assert [path.name for path in home.iterdir()] == ["つくる"]
        return run_dir, process

    return finish


@pytest.fixture
def pretend_a_gpu(monkeypatch):
    """Has a script, but not PyTorch itself, believe that there is a GPU; others may be replaced."""
    import torch

    def pretend(script, **others):
        cuda = SimpleNamespace(is_available=lambda: True, device_count=lambda: 1)
        names = vars(torch) | {"cuda": cuda} | others
        monkeypatch.setattr(script, "torch", SimpleNamespace(**names))

    return pretend
