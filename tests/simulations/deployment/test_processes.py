"""Starting and stopping a deployment on this machine: nothing is left behind, and nobody else is stopped."""

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from common.errors import StateError, UsageError
from common.files import read_json, write_json
from simulations.deployment import processes as module
from simulations.deployment.folder import init, nodes_of
from simulations.deployment.processes import PIDS, down, status, up
from tests.support import world
from tests.support.leftovers import nobody_left

if not Path("/proc/self/environ").exists():
    pytest.skip("needs /proc", allow_module_level=True)

ONE = world.experiment()
STILL = {"superlink": "stopped", "node-000": "stopped", "node-001": "stopped"}


def free_ports(count):
    """The first of so many free ports in a row."""
    for first in range(20_000 + os.getpid() % 5_000 * 2, 32_000, count):
        with suppress(OSError), ExitStack() as held:
            for port in range(first, first + count):
                held.enter_context(socket.create_server(("127.0.0.1", port)))
            return first
    raise AssertionError("no free ports")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A deployment of two nodes, one of them with a single user; only to be copied."""
    folder = tmp_path_factory.mktemp("made") / "deployment"
    first = free_ports(3)
    init(ONE, folder, 2, port=first + 2, singles=1, node_port=first)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """A deployment; whatever is started with it ends with the test."""
    folder = shutil.copytree(made, tmp_path / "deployment")
    config = folder / "client" / "config.toml"
    config.write_text(config.read_text().replace(str(made), str(folder)))
    with nobody_left():
        try:
            yield folder
        finally:
            down(folder)


def states(folder):
    return {each.name: each.state for each in status(folder)}


def started(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def record(folder, token, **pids):
    kept = {name: {"pid": pid, "started": start} for name, (pid, start) in pids.items()}
    write_json(folder / PIDS, {"token": token, "processes": kept})


@pytest.fixture
def spawn():
    """Start a process of a token; it is killed when the test ends."""
    found = []

    def start(token, code):
        environment = {**os.environ, "HUSHREC_DEPLOYMENT": f"{token}/superlink"}
        found.append(subprocess.Popen(["bash", "-c", code], env=environment, stdout=subprocess.PIPE, text=True))
        return found[-1]

    yield start
    for process in found:
        process.kill()
        process.wait()
        process.stdout.close()


def gone(pid):
    end = time.monotonic() + 10
    while Path(f"/proc/{pid}/stat").exists() and time.monotonic() < end:
        with suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        time.sleep(0.05)
    return not Path(f"/proc/{pid}/stat").exists()


# --- without Flower --------------------------------------------------------------------------------------------------


def test_what_is_down_is_stopped(folder):
    down(folder)
    assert status(folder) == [
        ("superlink", None, "stopped", 0),
        ("node-000", None, "stopped", 1),
        ("node-001", None, "stopped", 11),
    ]


@pytest.mark.parametrize("verb", [up, status, down])
def test_what_is_no_deployment_is_refused(tmp_path, verb):
    with pytest.raises(UsageError, match="no deployment"):
        verb(tmp_path)


def test_a_process_that_took_over_a_number_is_neither_counted_nor_stopped(folder, spawn):
    other = spawn("other", "exec sleep 60")
    record(folder, "mine", superlink=(other.pid, started(other.pid) - 1))
    assert states(folder) == STILL
    with pytest.raises(StateError, match=r"its processes are gone.* run `hushrec deploy down .*` first"):
        up(folder)
    down(folder)
    assert other.poll() is None
    assert not (folder / PIDS).exists()


def test_what_runs_is_not_started_again_and_ends_with_its_children(folder, spawn, monkeypatch):
    monkeypatch.setattr(module, "GRACE", 1.0)
    code = "trap '' TERM; setsid bash -c 'trap \"\" TERM; echo $$; while :; do sleep 1; done' & wait; sleep 60"
    process = spawn("mine", code)
    child = int(process.stdout.readline())
    assert os.getsid(child) != os.getsid(process.pid)
    record(folder, "mine", superlink=(process.pid, started(process.pid)))
    assert states(folder) == STILL | {"superlink": "running"}
    with pytest.raises(StateError, match="the deployment is up"):
        up(folder)
    assert process.poll() is None
    down(folder)
    assert process.wait(5) == -signal.SIGKILL
    assert gone(child)
    down(folder)


def test_whatever_listens_there_already_is_named(folder):
    _, port = module.server_of(folder)
    with socket.create_server(("127.0.0.1", port)), pytest.raises(StateError, match=f"127.0.0.1:{port}: somebody else"):
        up(folder)
    assert not (folder / PIDS).exists()


def test_a_server_that_does_not_start_says_why_and_leaves_nothing(folder):
    (folder / "server" / "start.sh").write_text("#!/bin/sh\necho first\necho 'no such luck'\necho\nexit 3\n")
    with pytest.raises(StateError, match=r"server/log\.txt: superlink has ended: no such luck"):
        up(folder)
    assert not (folder / PIDS).exists()
    assert (folder / "server" / "log.txt").stat().st_mode & 0o777 == 0o600


def test_a_server_that_does_not_answer_is_stopped(folder, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 1.0)
    (folder / "server" / "start.sh").write_text('#!/bin/sh\necho $$ > "$(dirname "$0")/pid"\nexec sleep 60\n')
    with pytest.raises(StateError, match="the server does not answer within 1 s"):
        up(folder)
    assert gone(int((folder / "server" / "pid").read_text()))
    assert not (folder / PIDS).exists()


def test_an_interrupt_leaves_nothing(folder, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_wait_until_it_answers", interrupt)
    (folder / "server" / "start.sh").write_text("#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(KeyboardInterrupt):
        up(folder)
    assert states(folder) == STILL
    assert not (folder / PIDS).exists()


def test_a_network_without_certificates_is_refused(folder):
    config = folder / "client" / "config.toml"
    config.write_text(config.read_text().replace("127.0.0.1", "hub.example"))
    (folder / "server" / "server.key").unlink()
    with pytest.raises(UsageError, match=r"has no server\.key; a port open to a network needs certificates"):
        up(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"token": "a", "processes": {"superlink": {}}}'])
def test_a_damaged_record_is_one_line(folder, text):
    (folder / PIDS).write_text(text)
    for verb in (up, status, down):
        with pytest.raises(StateError, match=PIDS) as caught:
            verb(folder)
        assert "\n" not in str(caught.value)
    (folder / PIDS).unlink()


# --- with Flower -----------------------------------------------------------------------------------------------------


def test_up_status_down(folder):
    said = []
    up(folder, said.append)
    running = status(folder)
    assert [each[2:] for each in running] == [("running", 0), ("running", 1), ("running", 11)]
    assert len({each.pid for each in running}) == len(running)
    assert set(read_json(folder / "server" / "registered.json")) == {"node-000", "node-001"}
    assert sum(line.startswith("registering") for line in said) == len(nodes_of(folder))
    assert (folder / PIDS).exists()
    for log in folder.rglob("log.txt"):
        assert log.stat().st_mode & 0o777 == 0o600
    down(folder)
    assert states(folder) == STILL
    assert all(gone(each.pid) for each in running)
    assert not (folder / PIDS).exists()
