"""The shipped policy plays, and is the file that the text beside it describes."""

import hashlib
import json
import re
from pathlib import Path

import play_breakout

TEXT = play_breakout.PRETRAINED.with_suffix(".md").read_text(encoding="utf-8")


def test_one_of_three_whole_games_reaches_380(tmp_path):
    """The published mean is 476.2, and 95 of its 100 games reach 380.

    Three of those hundred: 428, 425 and 425, so that no second wall makes a game long.
    """
    args = play_breakout.Args(full_games=3, seed=10_006, runs_dir=tmp_path)
    result = play_breakout.play(args)
    assert len(result["scores"]) == 3 and max(result["scores"]) >= 380
    assert result["mean"] >= 250
    [run_dir] = Path(tmp_path).iterdir()
    assert json.loads((run_dir / "result.json").read_text())["scores"] == result["scores"]


def test_the_file_is_the_one_described_and_small():
    content = play_breakout.PRETRAINED.read_bytes()
    assert len(content) <= 7_000_000
    assert re.findall(r"\b[0-9a-f]{64}\b", TEXT) == [hashlib.sha256(content).hexdigest()]
