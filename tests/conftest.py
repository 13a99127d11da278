"""Lets the tests import each script by its name, as a user's own project would after copying it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
