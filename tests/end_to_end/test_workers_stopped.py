"""A run with worker processes that is stopped, or loses one or all of its processes, goes on to the same bits."""

import os
import time
from pathlib import Path

import pytest

from tests.support.processes import KILLED, TINY, Running, hushrec
from tests.support.runs import assert_same_run

WORKERS = ("runtime.workers=2",)
# The processes of the tests are daemons, which may have no children of their own.
PARENT = "import multiprocessing\nmultiprocessing.current_process()._config['daemon'] = False\n"
# Called with the run's workers after the first checkpoint.
THEN = """
import os, signal, server.checkpoint as checkpoint, simulations.workers as workers
whole, pools, saved = checkpoint.save, [], []
class Pool(workers.ProcessPool):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        pools.append(self)
import simulations.engines as engines
engines.ProcessPool = Pool
def save(*arguments):
    whole(*arguments)
    saved.append(1)
    if len(saved) == 1:
        processes = list(pools[0]._executor._processes)
        open("workers", "w").write(" ".join(map(str, processes)))
        {what}
checkpoint.save = save
"""
ENDS = {
    "stopped": ("signal.raise_signal(signal.SIGINT)", 130),
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", KILLED),
    "a worker killed": ("os.kill(processes[0], signal.SIGKILL)", 1),
}


def gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    (folder / "tiny.yaml").write_text(TINY)
    done = hushrec(folder, "run", "tiny.yaml", *WORKERS, "--out", "run", "--json", before=PARENT)
    assert done.code == 0, done.err
    return folder


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
@pytest.mark.parametrize("how", ENDS)
def test_it_ends_without_leftovers_and_goes_on_to_the_same_bits(how, whole, tmp_path):
    what, code = ENDS[how]
    (tmp_path / "tiny.yaml").write_text((whole / "tiny.yaml").read_text())
    done = Running(
        tmp_path, "run", "tiny.yaml", *WORKERS, "--out", "run", before=PARENT + THEN.format(what=what)
    ).wait()
    assert done.code == code, done.err
    assert "Traceback" not in done.err
    if how == "a worker killed":
        assert "a worker process died" in done.err
    workers = [int(process) for process in (tmp_path / "workers").read_text().split()]
    assert len(workers) == 2
    assert os.getpid() not in workers
    until = time.monotonic() + 30
    while not all(map(gone, workers)) and time.monotonic() < until:
        time.sleep(0.1)
    assert all(map(gone, workers)), "workers outlive the run"
    resumed = hushrec(tmp_path, "run", "--resume", "run", "--json", before=PARENT)
    assert resumed.code == 0, resumed.err
    assert_same_run(tmp_path / "run", whole / "run")
