"""The commands of the pages work: those of the front page are run, with flags that make them short.

Those of the other pages are run by --slow. All calls of a script, those in the text too, are parsed
by its own command line.
"""

import importlib
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import launch
import pytest
import tyro
from test_readme import ENGLISH, PAGES, ROOT, SCRIPTS, blocks, calls, commands, mentions, rows

SHORT = dict.fromkeys(SCRIPTS, "--num-episodes 3 --eval-episodes 2")  # the last value counts
SHORT["mnist.py"] = "--epochs 1"
SHORT["a2c_cartpole.py"] = "--total-timesteps 2000 --eval-episodes 2"
SHORT["a2c_breakout.py"] = "--total-timesteps 160"
SHORT["play_breakout.py"] = "--max-attempts 1"
DIGITS = os.environ.get("MNIST_DIR")  # mnist.py is only run where its files are
CALLS = {call for name in PAGES for call in calls(commands(name) + mentions(name))
         if call[0] in SCRIPTS and "runs/..." not in call[1]}  # fmt: skip  # a file must exist


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


def run(folder: Path, command: str) -> None:
    """Does what a line of a shell does: checks its form, runs diff and the scripts it calls."""
    subprocess.run(["bash", "-nc", command], check=True)
    if command.startswith("diff "):
        done = subprocess.run(shlex.split(command), cwd=folder, capture_output=True)
        assert done.returncode == 1 and done.stdout
    for script, arguments in calls([command]) if "torchrun" not in command else ():
        if script in SCRIPTS and (script != "mnist.py" or DIGITS):
            if "runs/..." in arguments:  # the folder of an earlier run
                earlier = next(folder.glob("runs/dqn_cartpole__*")).name
                arguments = arguments.replace("runs/...", f"runs/{earlier}")
            arguments = re.sub(r"--full-games \d+", "--full-games 1", arguments)
            flags = shlex.split(f"{arguments} {SHORT[script]}")
            done = launch.Process(folder / script, *flags, cwd=folder)
            assert done.wait() == 0 and "Traceback" not in done.stderr, done.stderr
            run_dir = folder / re.findall(r"runs/[\w-]+", done.stdout)[-1]
            assert (run_dir / "result.json").exists()


@pytest.mark.parametrize("command", commands("README.md"))
def test_a_command_of_the_front_page_works(folder, command):
    run(folder, command)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGLISH[1:])  # test_readme.py: the Japanese pages have the same
def test_the_commands_of_a_page_work(folder, name):
    for earlier in ("python dqn_cartpole.py", "python a2c_breakout.py --resume runs/long"):
        run(folder, earlier)  # the pages come back to these
    for command in commands(name):
        run(folder, command)


def parse(script: str, arguments: str) -> None:
    """Raises SystemExit if the script's command line refuses the arguments."""
    module = importlib.import_module(script.removesuffix(".py"))
    tyro.cli(module.Args, args=shlex.split(arguments))


@pytest.mark.parametrize(("script", "arguments"), sorted(CALLS))
def test_a_call_is_accepted(script, arguments):
    parse(script, arguments)


@pytest.mark.parametrize("name", ["docs/book.md", "docs/book.ja.md"])
def test_the_map_of_the_book_has_every_script_and_flags_that_it_accepts(name):
    """Rows of section, command, and flags that go back to the book's settings."""
    found = set().union(*[calls([" ".join(row[1:]).replace("`", "")]) for row in rows(name)])
    assert {script for script, _ in found} == set(SCRIPTS)
    for script, arguments in found:
        parse(script, arguments)


def test_the_python_example(folder):
    [code] = [content for language, content in blocks("README.md") if language == "python"]
    code = code.replace("seed=3", "seed=3, num_episodes=3, eval_episodes=2")
    done = launch.Process(code, cwd=folder)
    assert done.wait() == 0, done.stderr
    assert 1 <= float(done.stdout.splitlines()[-1]) <= 200  # steps an episode
