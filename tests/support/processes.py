"""Real `hushrec` processes that start at once: each is forked from one that has imported torch and Flower already."""

import multiprocessing
import signal
import tempfile
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

_CONTEXT = multiprocessing.get_context("forkserver")
# The last one is what torch imports at an optimiser's first step.
_CONTEXT.set_forkserver_preload(["simulations.cli", "simulations.runner", "simulations.inference", "torch._dynamo"])
_CODE = """
import os, sys
for descriptor, log in ((1, {out!r}), (2, {err!r})):
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), descriptor)
os.chdir({folder!r})
sys.argv = ["hushrec", *{argv!r}]
{before}
from simulations.cli import main
main()
"""
_TIMEOUT = 120

TINY = """
name: tiny
data: {kind: synthetic, users: 60, items: 40, interests: 4, mean_length: 8, max_length: 20}
model: {dim: 8, blocks: 1, max_length: 16}
federation: {rounds: 6, cohort: 20, optimizer: {kind: fedadam, lr: 0.02}}
evaluation: {every: 2, resamples: 100}
runtime: {threads: 1, checkpoint_every: 2}
"""


class Finished(NamedTuple):
    """How a process ended; a negative code is the signal that killed it."""

    code: int
    out: str
    err: str


class Running:
    """A process under way, in a working directory of its own.

    `before` is Python that runs in the process before the command does, such as a fault to be injected.
    """

    def __init__(self, folder: Path, *argv: object, before: str = ""):
        self._logs = tempfile.TemporaryDirectory()
        out, err = (Path(self._logs.name) / name for name in ("out", "err"))
        code = _CODE.format(
            out=str(out), err=str(err), folder=str(folder), argv=[str(part) for part in argv], before=before
        )
        self._files = out, err
        self.process: BaseProcess = _CONTEXT.Process(target=exec, args=(code, {}), daemon=True)
        self.process.start()

    def kill(self) -> None:
        """SIGKILL: no chance to clean up."""
        self.process.kill()

    def wait(self) -> Finished:
        """Wait for the end."""
        self.process.join(_TIMEOUT)
        assert self.process.exitcode is not None, "the process hangs"
        out, err = (file.read_text() if file.exists() else "" for file in self._files)
        self._logs.cleanup()
        return Finished(self.process.exitcode, out, err)


def hushrec(folder: Path, *argv: object, before: str = "") -> Finished:
    """Run a command to its end; arguments as in `Running`."""
    return Running(folder, *argv, before=before).wait()


KILLED = -signal.SIGKILL

DIES_AT_CALL = """
import signal
import simulations.runner as runner
whole, left = runner.run, {moment}
def count(frame, event, arg):
    global left
    left -= event == "call"
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
def mortal(*args):
    sys.setprofile(count)
    return whole(*args)
runner.run = mortal
"""
"""Python to run before a command: the process kills itself at the function call of that number."""
