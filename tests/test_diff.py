"""The Q-learning scripts are a lesson told by diff: each step shows the algorithm's change alone."""

import ast
import difflib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def body(name: str) -> list[str]:
    """The lines of a script below its module docstring."""
    text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    return text.splitlines()[ast.parse(text).body[0].end_lineno :]


def changed_lines(old: str, new: str) -> list[str]:
    lines = list(difflib.unified_diff(body(old), body(new), n=0, lineterm=""))[2:]
    return [line for line in lines if line[0] in "+-"]


@pytest.mark.parametrize(
    ("old", "new", "most"),
    [
        ("dqn_cartpole", "ddqn_cartpole", 40),
        ("ddqn_cartpole", "dueling_cartpole", 40),
        ("ddqn_cartpole", "per_cartpole", 120),
    ],
)
def test_a_step_of_the_family_changes_few_lines(old, new, most):
    changed = changed_lines(old, new)
    assert 0 < len(changed) <= most, "\n".join(changed)


@pytest.mark.parametrize("name", ["ddqn_cartpole", "dueling_cartpole", "per_cartpole"])
def test_names_and_their_order_stay_the_same(name):
    """Whatever dqn_cartpole.py defines, the others define too, in that order."""

    def names(script):
        definitions = ast.parse("\n".join(body(script))).body
        return [node.name for node in definitions if hasattr(node, "name")]

    ours = names(name)
    assert [n for n in ours if n in names("dqn_cartpole")] == names("dqn_cartpole")


@pytest.mark.parametrize("name", ["NoopReset", "MaxAndSkip", "EpisodicLife", "Warp", "FrameStack"])
def test_play_breakout_has_the_wrappers_that_were_trained_with(name):
    """All but the two methods that only a checkpoint needs."""

    def wrapper(script):
        definitions = ast.parse("\n".join(body(script))).body
        [found] = [node for node in definitions if getattr(node, "name", None) == name]
        checkpointing = ("state_dict", "load_state_dict")
        found.body = [node for node in found.body if getattr(node, "name", None) not in checkpointing]
        return ast.unparse(found)

    assert wrapper("play_breakout") == wrapper("a2c_breakout")
