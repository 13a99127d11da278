"""Lets the tests import each script by its name, as a user's own project would after copying it."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# For a2c_breakout.py, set before torch is imported: threads that wait on a busy machine sleep.
os.environ.setdefault("GOMP_SPINCOUNT", "0")
# Only on a CPU is the same seed the same run, to the bit.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
