"""Lets the tests import each script by its name, as a user's own project would after copying it."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("GOMP_SPINCOUNT", "0")  # as a2c_breakout.py does: it must be there before torch is imported
