"""Every command of README.md and README.ja.md works: each distinct one is run, with flags that make it short.

Installations, uv, pipx, torchrun and servers are only parsed here, and so are the benchmarks, which have requirements
of their own.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXTS = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.ja.md")]
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
SMALLER = {"--full-games": "1", "--anneal-timesteps": "80"}  # replaced where they stand
SHIPPED = (ROOT / "pretrained" / "a2c_breakout.pth").exists()
PARSED_ONLY = ("python3 -m venv", "source", "pip install", "python -m pytest", "python benchmarks/", "uv run",
               "pipx run", "torchrun", "tensorboard", "apt-get")  # fmt: skip
RUN = ("python", "diff", "cp", "until")


def commands() -> list[str]:
    """Each distinct command: the lines of ```sh blocks, taken apart at &&, and the `commands` in the text."""
    found = []
    for text in TEXTS:
        for language, content in re.findall(r"^```(\w+)\n(.*?)^```$", text, flags=re.M | re.S):
            found += content.splitlines() if language == "sh" else []
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
        found += [code for code in re.findall(r"`([^`\n]+)`", prose) if code.startswith((*RUN, *PARSED_ONLY))]
    return list(dict.fromkeys(part for line in found for part in line.split(" && ")))


def small(command: str) -> str:
    """The command with each call of a script of ours made small."""

    def shrink(call: re.Match) -> str:
        words = shlex.split(call[0])
        flags = SMALL[words[1]] | {flag: value for flag, value in SMALLER.items() if flag in words}
        for flag, value in flags.items():
            if flag in words:
                words[words.index(flag) + 1] = value
            else:
                words += [flag, value]
        return shlex.join(words)

    return re.sub(r"python \w+\.py[^;&|]*", shrink, command)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a user has who follows the text: the scripts, the digits, a run and weights."""
    folder = tmp_path_factory.mktemp("user")
    for script in SMALL:
        shutil.copy(ROOT / script, folder)
    (folder / "elsewhere").mkdir()
    if SHIPPED:
        shutil.copytree(ROOT / "pretrained", folder / "pretrained")
    if "MNIST_DIR" in os.environ:
        shutil.copytree(os.environ["MNIST_DIR"], folder / "data" / "mnist")
    for command in ("python a2c_breakout.py --resume runs/long", "python dqn_cartpole.py"):
        assert run(folder, small(command)).returncode == 0
    return folder


@pytest.fixture(scope="module")
def outcomes(folder):
    """What became of each command that is run: {command: process}. Two at a time, as most use one core.

    Those on the run in runs/long, which one process at a time may have, come one after the other.
    """
    [example] = (path.name for path in folder.glob("runs/dqn_cartpole__*"))
    alone = [command for command in commands() if not command.startswith(PARSED_ONLY)]
    if "MNIST_DIR" not in os.environ:
        alone = [command for command in alone if "mnist.py" not in command]
    groups = [[command for command in alone if "runs/long" in command]]
    groups += [[command] for command in alone if "runs/long" not in command]

    def run_all(group: list[str]) -> list[subprocess.CompletedProcess]:
        return [run(folder, small(command).replace("runs/...", f"runs/{example}")) for command in group]

    with ThreadPoolExecutor(2) as pool:
        processes = sum(pool.map(run_all, groups), [])
    return dict(zip(sum(groups, []), processes, strict=True))


def run(folder: Path, command: str) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(["bash", "-c", command], cwd=folder, env=os.environ | {"PATH": path},
                          capture_output=True, text=True, timeout=300)  # fmt: skip


def test_there_are_commands_of_every_script():
    for script in SMALL:
        assert any(command.startswith(f"python {script}") for command in commands()), script


@pytest.mark.parametrize("command", commands())
def test_command(folder, outcomes, command):
    assert command.startswith((*RUN, *PARSED_ONLY)), "a new kind of command: is it to be run or only parsed?"
    for word in shlex.split(command.replace(";", " ")):
        if word.endswith((".py", ".txt")):
            assert (ROOT / word).exists()
    if command.startswith(PARSED_ONLY):
        return
    if "mnist.py" in command and "MNIST_DIR" not in os.environ:
        pytest.skip("needs the digits: MNIST_DIR=folder")
    done = outcomes[command]
    if command == "python play_breakout.py" and not SHIPPED:
        assert done.returncode == 1 and "no policy to play" in done.stderr
        return
    assert done.returncode == (1 if command.startswith("diff") else 0), done.stderr
    assert done.stdout or command.startswith("cp")
    assert "Traceback" not in done.stderr
    if command.startswith("python"):
        run_dir = folder / re.findall(r"runs/\S+", done.stdout)[-1]
        assert (run_dir / "result.json").exists()


def test_the_python_example(folder):
    [code] = set(sum((re.findall(r"^```python\n(.*?)^```$", text, flags=re.M | re.S) for text in TEXTS), []))
    assert "1_000_000" in code
    (folder / "example.py").write_text(code.replace("1_000_000", "160"))
    done = run(folder, "python example.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "None"  # no game has ended yet
