"""The shipped policy plays, and is the file that the text beside it describes."""

import hashlib
import json
import re
import runpy
from pathlib import Path

import pytest

import play_breakout

TEXT = play_breakout.PRETRAINED.with_suffix(".md").read_text(encoding="utf-8")


def play(tmp_path: Path, monkeypatch, **flags) -> dict:
    """What the default policy scores; it is not filmed."""
    monkeypatch.setattr(play_breakout, "film", lambda *_, **__: None)
    result = play_breakout.play(play_breakout.Args(runs_dir=tmp_path, **flags))
    [run_dir] = tmp_path.iterdir()
    assert json.loads((run_dir / "result.json").read_text()) == result
    return result


def test_the_readmes_command_finds_a_life_over_400(tmp_path, monkeypatch):
    """The second, with 413; where rounding differs it may be another one."""
    scores = play(tmp_path, monkeypatch)["scores"]
    assert scores[-1] > 400 and max(scores[:-1]) <= 400 and len(scores) <= 20


@pytest.mark.slow
def test_one_of_three_whole_games_reaches_380(tmp_path, monkeypatch):
    """The published mean is 476.2, and 95 of its 100 games reach 380.

    Three of those hundred: 428, 425 and 425, so that no second wall makes a game long.
    """
    result = play(tmp_path, monkeypatch, seed=10_006, full_games=3)
    assert len(result["scores"]) == 3 and result["max"] >= 380 and result["mean"] >= 250


def test_it_is_found_beside_the_script_or_from_a_notebooks_cell_in_the_working_folder(
    tmp_path, monkeypatch
):
    script, here = Path(play_breakout.__file__), play_breakout.PRETRAINED
    monkeypatch.chdir(tmp_path)
    assert runpy.run_path(str(script), run_name="imported")["PRETRAINED"] == here
    monkeypatch.chdir(script.parent)
    exec(script.read_text(encoding="utf-8"), cell := {"__name__": "imported"})
    assert cell["PRETRAINED"] == here and here.exists()


def test_the_file_is_the_one_described_and_small():
    content = play_breakout.PRETRAINED.read_bytes()
    assert len(content) <= 7_000_000
    assert re.findall(r"\b[0-9a-f]{64}\b", TEXT) == [hashlib.sha256(content).hexdigest()]
