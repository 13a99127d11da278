"""Every command of the pages works: those in blocks are run, with flags that make them short.

Those in the text and in tables are parsed by the script's own command line. Installations,
torchrun and the tests themselves are not started, and neither are the benchmarks, which have
requirements of their own.
"""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tyro
from test_readme import PAGES, ROOT, SCRIPTS, blocks, calls, commands, mentions, tables

Q_LEARNING = {"--num-episodes": "3", "--eval-episodes": "2"}
SMALL = {  # flags that are set or replaced
    "mnist.py": {"--epochs": "1"},
    "dqn_cartpole.py": Q_LEARNING,
    "ddqn_cartpole.py": Q_LEARNING,
    "dueling_cartpole.py": Q_LEARNING,
    "per_cartpole.py": Q_LEARNING,
    "a2c_cartpole.py": {"--total-timesteps": "2000", "--eval-episodes": "2"},
    "a2c_breakout.py": {"--total-timesteps": "160"},
    "play_breakout.py": {"--max-attempts": "1"},
}
NOT_STARTED = ("python3 -m venv", "source", "pip install", "python -m pytest", "torchrun")
WRITTEN = [name for name in PAGES if (ROOT / name).exists()]  # test_readme.py demands them all
COMMANDS = sorted({command for name in WRITTEN for command in commands(name)})
MENTIONED = sorted({call for name in WRITTEN for call in calls(mentions(name))})
DIGITS = os.environ.get("MNIST_DIR")  # mnist.py is only run where its files are
STARTED = [command for command in COMMANDS if not command.startswith(NOT_STARTED)
           and (DIGITS or "mnist.py" not in command)]  # fmt: skip
FIRST = ["python a2c_breakout.py --resume runs/long", "python dqn_cartpole.py"]  # others use them


def small(command: str) -> str:
    """The command with each call of a script made small."""

    def shrink(call: re.Match) -> str:
        words = shlex.split(call[0])
        for flag, value in {**SMALL[words[1]], "--full-games": "1"}.items():
            if flag in words:
                words[words.index(flag) + 1] = value
            elif flag != "--full-games":
                words += [flag, value]
        return shlex.join(words)

    return re.sub(r"python \w+\.py[^;&|]*", shrink, command)


def run(folder: Path, command: str) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(["bash", "-c", command], cwd=folder, env=os.environ | {"PATH": path},
                          capture_output=True, text=True, timeout=300)  # fmt: skip


def parse(script: str, arguments: str) -> None:
    """Raises SystemExit if the script's command line refuses the arguments."""
    module = importlib.import_module(script.removesuffix(".py"))
    tyro.cli(module.Args, args=shlex.split(arguments))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a user has who follows the text: the scripts, weights and digits."""
    folder = tmp_path_factory.mktemp("user")
    for script in SCRIPTS:
        shutil.copy(ROOT / script, folder)
    shutil.copytree(ROOT / "pretrained", folder / "pretrained")
    if DIGITS:
        shutil.copytree(DIGITS, folder / "data" / "mnist")
    return folder


@pytest.fixture(scope="module")
def outcomes(folder):
    """{command: its process}, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        done = dict(zip(FIRST, pool.map(lambda c: run(folder, small(c)), FIRST)))
        [example] = folder.glob("runs/dqn_cartpole__*")
        rest = [command for command in STARTED if command not in FIRST]
        lines = [small(command).replace("runs/...", f"runs/{example.name}") for command in rest]
        once = set(lines)  # made small, some are the same
        processes = dict(zip(once, pool.map(lambda line: run(folder, line), once)))
        return done | {command: processes[line] for command, line in zip(rest, lines)}


@pytest.mark.parametrize("command", STARTED)
def test_a_command_in_a_block_works(folder, outcomes, command):
    done = outcomes[command]
    assert done.returncode == (1 if command.startswith("diff") else 0), done.stderr
    assert done.stdout and "Traceback" not in done.stderr
    if "python" in command:
        run_dir = folder / re.findall(r"runs/[\w-]+", done.stdout)[-1]
        assert (run_dir / "result.json").exists()


def test_every_script_has_a_command_in_a_block():
    assert {script for script, _ in calls(COMMANDS)} == set(SCRIPTS)


@pytest.mark.parametrize(("program", "arguments"), [c for c in MENTIONED if c[0] in SCRIPTS])
def test_a_command_in_the_text_is_accepted(program, arguments):
    parse(program, arguments)


@pytest.mark.parametrize("name", ["docs/book.md", "docs/book.ja.md"])
def test_the_map_of_the_book_has_every_script_and_flags_that_it_accepts(name):
    """Rows of section, command, and flags that go back to the book's settings."""
    header, *rows = tables(name)[0]
    assert len(header) == 3 and len(rows) == 9
    found = sum((calls([f"{command} {book}".replace("`", "")]) for _, command, book in rows), [])
    assert len(found) == 9 and {script for script, _ in found} == set(SCRIPTS)
    for script, arguments in found:
        parse(script, arguments)


def test_the_python_example(folder):
    [code] = [content for language, content in blocks("README.md") if language == "python"]
    assert "seed=3" in code
    code = code.replace("seed=3", "seed=3, num_episodes=3, eval_episodes=2")
    (folder / "example.py").write_text(code)
    done = run(folder, "python example.py")
    assert done.returncode == 0, done.stderr
    assert 1 <= float(done.stdout.splitlines()[-1]) <= 200  # steps an episode
