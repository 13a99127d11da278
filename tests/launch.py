"""Starts a script as a user does, in a process of its own, but with PyTorch imported already.

A server, which multiprocessing calls forkserver, imports it once and forks for each start.
"""

import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
PACKAGES = "pytest torch torch._dynamo torch.utils.tensorboard cv2 gymnasium ale_py imageio.v2 tyro"
CONTEXT.set_forkserver_preload([*PACKAGES.split(), "tqdm", "pygame"])


def main(script, flags, cwd, env, limits, outputs) -> None:
    """The new process: its output goes to files, its exit is that of the script."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # not so in a background job
    os.setsid()  # a terminal that it opens for reading, too, becomes its own
    for name, descriptor, output in zip(("stdout", "stderr"), (1, 2), outputs):
        mode = os.O_RDWR if output.startswith("/dev/") else os.O_WRONLY | os.O_APPEND
        os.dup2(os.open(output, mode), descriptor)
        encoding, lines = env.get("PYTHONIOENCODING"), -1 if name == "stdout" else 1
        setattr(sys, name, open(descriptor, "w", lines, encoding, closefd=False))  # as Python does
    os.chdir(cwd)
    os.environ.update(env)
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    sys.argv = ["script.py", *flags]
    if isinstance(script, str):
        exec(compile(script, "code", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(str(script), run_name="__main__")


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def state(pid: int) -> str:
    """S: it sleeps, T: it was stopped, Z: it has ended ..."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def wait_for(condition, seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


def gone(pids: list[int]) -> bool:
    """Whether all these processes end in time."""
    return wait_for(lambda: all(state(pid) == "Z" for pid in pids))


started: list["Process"] = []


def end_all() -> None:
    """Ends what still runs. A worker of a2c_breakout.py ends with its parent."""
    for process in started:
        process.send_signal(signal.SIGKILL)
    started.clear()


class Process:
    """Like subprocess.Popen; the script is a Path, or code, the limits those of resource.

    It prints to files, or to a FIFO or terminal, named by its path as output.
    """

    def __init__(self, script: Path | str, *flags, cwd=".", env={}, limits={}, output=None):
        self.folder = Path(tempfile.mkdtemp())
        for name in ("stdout", "stderr"):
            (self.folder / name).touch()
        env = {"OMP_NUM_THREADS": "1"} | env
        outputs = str(output or self.folder / "stdout"), str(self.folder / "stderr")
        args = (script, [str(flag) for flag in flags], str(cwd), env, limits, outputs)
        self.process = CONTEXT.Process(target=main, args=args)
        self.process.start()
        self.pid = self.process.pid
        started.append(self)

    stdout = property(lambda self: (self.folder / "stdout").read_text())
    stderr = property(lambda self: (self.folder / "stderr").read_text())
    returncode = property(lambda self: self.process.exitcode)

    def until(self, words: str) -> "Process":
        """Waits until it has printed something."""
        assert wait_for(lambda: words in self.stdout or self.returncode is not None, 120)
        assert words in self.stdout, self.stderr
        return self

    def send_signal(self, signum: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, signum)

    def wait(self, timeout: float = 120) -> int:
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("script", timeout)
        return self.returncode
