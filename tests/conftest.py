"""Lets the tests import each script by its name, as a user's own project would after copying it."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("GOMP_SPINCOUNT", "0")  # for a2c_breakout.py, before torch is imported: a test machine is busy
