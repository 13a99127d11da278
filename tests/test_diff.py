"""The scripts are read side by side: what they do alike stands there alike."""

import ast
import difflib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def source(name: str) -> str:
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


def body(name: str) -> list[str]:
    """The lines of a script below its module docstring."""
    return source(name).splitlines()[ast.parse(source(name)).body[0].end_lineno :]


def definition(script: str, name: str) -> str:
    """A class or function of a script, word for word."""
    [found] = [x for x in ast.parse(source(script)).body if getattr(x, "name", None) == name]
    return ast.get_source_segment(source(script), found)


# ---- the Q-learning scripts: each step shows the algorithm's change alone ----------------------


def changed_lines(old: str, new: str) -> list[str]:
    lines = list(difflib.unified_diff(body(old), body(new), n=0, lineterm=""))[2:]
    return [line for line in lines if line[0] in "+-"]


@pytest.mark.parametrize(
    ("old", "new", "number"),
    [
        ("dqn_cartpole", "ddqn_cartpole", 22),
        ("ddqn_cartpole", "dueling_cartpole", 16),
        ("ddqn_cartpole", "per_cartpole", 66),
    ],
)
def test_a_step_of_the_family_changes_these_lines_and_no_other(old, new, number):
    """test_dqn_cartpole.py looks at the loop of one of them: the others must have the same."""
    changed = changed_lines(old, new)
    assert len(changed) == number, "\n".join(changed)


def test_a2c_ends_like_the_q_learning_scripts():
    """Evaluation, film, weights, files, the run and the main guard."""
    end = source("dqn_cartpole").split("def evaluate(")[1]
    for ours, theirs in [("dqn_", "a2c_"), ("QNetwork", "ActorCritic"), (", args.zero_init", "")]:
        end = end.replace(ours, theirs)
    assert source("a2c_cartpole").endswith(end)


# ---- A2C: the same loop for poles and for pixels -----------------------------------------------

A2C = ["a2c_cartpole", "a2c_breakout"]


def test_the_loops_of_a2c_have_the_same_steps():
    names = [re.findall(r"^ +# (\d\. \w+)", definition(name, "learn"), re.M) for name in A2C]
    assert names == [["1. rollout", "2. returns", "3. loss", "4. update", "5. log"]] * 2


@pytest.mark.parametrize("name", ["compute_returns", "compute_losses"])
def test_returns_and_losses_of_a2c_are_the_same(name):
    def code(script):
        function = ast.parse(definition(script, name).replace("observations", "states")).body[0]
        return ast.unparse(function.args), [ast.unparse(line) for line in function.body[1:]]

    assert code(A2C[0]) == code(A2C[1])


# ---- Breakout: play as it was trained ----------------------------------------------------------


@pytest.mark.parametrize("name", ["NoopReset", "MaxAndSkip", "EpisodicLife", "Warp", "FrameStack"])
def test_play_breakout_has_the_wrappers_that_were_trained_with(name):
    assert definition("play_breakout", name) == definition("a2c_breakout", name)
