"""Lets the tests import each script by its name, as a user's own project would after copying it."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# For a2c_breakout.py, set before torch is imported: threads that wait on a busy machine sleep.
os.environ.setdefault("GOMP_SPINCOUNT", "0")
# Only on a CPU is the same seed the same run, to the bit.
os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture
def pretend_a_gpu(monkeypatch):
    """Has a script, but not PyTorch itself, believe that there is a GPU; others may be replaced."""
    import torch

    def pretend(script, **others):
        cuda = SimpleNamespace(is_available=lambda: True, device_count=lambda: 1)
        names = vars(torch) | {"cuda": cuda} | others
        monkeypatch.setattr(script, "torch", SimpleNamespace(**names))

    return pretend
