"""Processes that outlive who started them, such as Ray's and Flower's daemons: told by what environment they got."""

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

MARK = "RAY_TMPDIR"
"""Names a folder of its own to each Ray, so that no test finds the Ray of another one that runs beside it."""


def started_with(folder: str) -> list[int]:
    """Ids of the living processes in whose environment `MARK` was that folder when they were started."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # others end meanwhile, or are not ours to look at
            if f"{MARK}={folder}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found


def left(folder: str, seconds: float) -> list[int]:
    """As `started_with`, once there is nobody or the time is over."""
    end = time.monotonic() + seconds
    while (processes := started_with(folder)) and time.monotonic() < end:
        time.sleep(0.1)
    return processes


def end(processes: list[int], number: int) -> None:
    """Send a signal to all of them."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)


@contextmanager
def nobody_left(*, here: bool = True) -> Iterator[Path]:
    """See that whatever is started with this `MARK` ends with the block; what does not is killed, and that is a fault.

    Parameters
    ----------
    here : bool
        Set it in this process; else it is for whoever is to be watched.

    Yields
    ------
    Path
        The folder that `MARK` names, for Ray's files; removed afterwards. Short, since Ray puts sockets there.
    """
    if not Path("/proc/self/environ").exists():
        pytest.skip("needs /proc to see who is left")
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    try:
        with pytest.MonkeyPatch.context() as patch:
            if here:
                patch.setenv(MARK, folder)
            yield Path(folder)
        assert not left(folder, 20.0)
    finally:
        end(started_with(folder), signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)
