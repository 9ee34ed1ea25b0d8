"""A deployment on this machine that a test may hurt: its nodes and server are found, signalled, restarted."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from common.loading import load
from simulations.deployment.certificates import write_node
from simulations.deployment.folder import init
from simulations.deployment.processes import PIDS, down, up
from tests.support.leftovers import nobody_left
from tests.support.processes import Finished

HUSHREC = Path(sys.executable).with_name("hushrec")
MARK = "HUSHREC_DEPLOYMENT"
PATIENCE = 240.0
"""Seconds after which nothing is waited for any more; the machine may be busy."""


def free_ports(count: int) -> int:
    """The first of so many free ports in a row, outside of those that the system gives away."""
    for first in range(14_000 + os.getpid() % 400 * 16, 32_000, count):
        with suppress(OSError), ExitStack() as held:
            for port in range(first, first + count):
                held.enter_context(socket.create_server(("127.0.0.1", port)))
            return first
    raise AssertionError("no free ports")


def until(what: str, condition: Callable[[], Any], patience: float = PATIENCE) -> Any:
    """Wait until a condition holds, and give what it gave."""
    end = time.monotonic() + patience
    while not (found := condition()):
        assert time.monotonic() < end, f"{what}: not within {patience:.0f} s"
        time.sleep(0.05)
    return found


def lines(metrics: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of metrics, so far; none where it is not there yet."""
    if not metrics.exists():
        return []
    return [json.loads(line) for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]


class Submitted:
    """A `hushrec run` under way on a deployment."""

    def __init__(self, folder: Path, arguments: list[object], logs: Path):
        self.folder, self._logs = folder, (logs.with_suffix(".out"), logs.with_suffix(".err"))
        with self._logs[0].open("w") as out, self._logs[1].open("w") as err:
            self.process = subprocess.Popen(
                [HUSHREC, *map(str, arguments)], stdin=subprocess.DEVNULL, stdout=out, stderr=err
            )

    def wait(self) -> Finished:
        """Wait for its end."""
        code = self.process.wait(PATIENCE)
        return Finished(code, *(path.read_text() for path in self._logs))


class Deployment:
    """A folder of `hushrec deploy init`, whose processes are up."""

    def __init__(self, folder: Path, port: int, spare: int):
        self.folder, self.address, self.spare = folder, f"127.0.0.1:{port}", spare
        self.authority = folder / "ca" / "ca.crt"
        self._runs: list[Submitted] = []
        self._others: list[subprocess.Popen[bytes]] = []

    # --- runs ---------------------------------------------------------------------------------------------------------

    def submit(self, *arguments: object, superlink: str | None = None, authority: Path | None = None) -> Submitted:
        """Start `hushrec run` with these arguments on this deployment."""
        place = ["--superlink", superlink or self.address, "--ca", authority or self.authority]
        parts = list(arguments)
        folder = Path(str(parts[parts.index("--resume" if "--resume" in parts else "--out") + 1]))
        logs = self.folder.parent / f"run-{len(self._runs)}"
        self._runs.append(Submitted(folder, ["run", *parts, *place], logs))
        return self._runs[-1]

    def metrics(self, run: Submitted) -> Path:
        """Where the server itself writes a run's metrics; known once the run has been taken."""
        place = until("the run is taken", lambda: run.process.poll() is not None or told(run.folder))
        assert place is not True, run.wait().err
        return self.folder / "server" / "runs" / str(place["run"]) / "metrics.jsonl"

    # --- processes ----------------------------------------------------------------------------------------------------

    def home(self, name: str) -> Path:
        """Folder of a node or the server."""
        return self.folder / "server" if name == "superlink" else self.folder / "nodes" / name

    def members(self, name: str) -> list[int]:
        """Ids of the living processes of a node or the server, with all that they started."""
        token, found = json.loads((self.folder / PIDS).read_text())["token"], []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, IndexError):  # others end meanwhile
                if f"{MARK}={token}/{name}".encode() in (process / "environ").read_bytes().split(b"\0"):
                    state = (process / "stat").read_text().rpartition(")")[2].split()[0]
                    found += [int(process.name)] if state not in "ZX" else []
        return sorted(found)

    def send(self, name: str, number: int) -> None:
        """Send a signal to all of them, again to those that were started meanwhile."""
        reached: set[int] = set()
        while new := set(self.members(name)) - reached:
            for process in sorted(new):
                with suppress(ProcessLookupError):
                    os.kill(process, number)
            reached |= new

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """End a node or the server, and see that it is gone."""
        self.send(name, number)
        until(f"{name} ends", lambda: not self.members(name), 30)

    def start(self, name: str, script: str = "start.sh") -> "subprocess.Popen[bytes]":
        """Start a node or the server as a supervisor would."""
        token = json.loads((self.folder / PIDS).read_text())["token"]
        return self._spawn(self.home(name), script, {MARK: f"{token}/{name}"})

    def come_back(self, name: str, script: str = "start.sh") -> None:
        """Start a node that has ended, once the server sees that, and wait until it is online."""
        until(f"the server sees that {name} is gone", lambda: self.nodes().get(name) != "online")
        process = self.start(name, script)
        until(f"{name} comes back", lambda: process.poll() is not None or self.nodes().get(name) == "online")
        assert process.poll() is None, (self.home(name) / "log.txt").read_text()[-2000:]

    def stranger(self, like: str) -> "subprocess.Popen[bytes]":
        """Start a node with a key that the server does not know."""
        folder = self.folder.parent / "stranger"
        shutil.copytree(self.home(like), folder, ignore=shutil.ignore_patterns("key*", "log.txt"))
        write_node(folder, "stranger")
        script = (folder / "start.sh").read_text()
        port = script.rpartition("--port ")[2].split()[0]
        (folder / "start.sh").write_text(script.replace(f"--port {port}", f"--port {self.spare}"))
        return self._spawn(folder, "start.sh", {})

    def nodes(self) -> dict[str, str]:
        """What the server thinks of each node."""
        ids = {
            number: name for name, number in json.loads((self.folder / "server/registered.json").read_text()).items()
        }
        environment = {**os.environ, "FLWR_HOME": str(self.folder / "client"), "FLWR_DISABLE_UPDATE_CHECK": "1"}
        command = [HUSHREC.with_name("flwr"), "supernode", "list", "hushrec", "--format", "json"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return {ids.get(each["node-id"], each["node-id"]): each["status"] for each in json.loads(done.stdout)["nodes"]}

    def receives(self, name: str, round_: int, since: int) -> None:
        """Wait until a node has the message of a round, by what its log says from some byte on."""
        log = self.home(name) / "log.txt"
        until(f"{name} is in round {round_}", lambda: f", ROUND {round_}]".encode() in log.read_bytes()[since:])

    def said(self, name: str) -> int:
        """Bytes that a node's log has."""
        return (self.home(name) / "log.txt").stat().st_size

    def _spawn(self, home: Path, script: str, marks: dict[str, str]) -> "subprocess.Popen[bytes]":
        path = f"{HUSHREC.parent}{os.pathsep}{os.environ['PATH']}"
        with (home / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                [home / script],
                cwd=home,
                env={**os.environ, "PATH": path, **marks},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._others.append(process)
        return process

    def end(self) -> None:
        """Stop everything, also what hangs."""
        for each in [run.process for run in self._runs] + self._others:
            if each.poll() is None:
                each.kill()
        for name in ("superlink", *(path.name for path in (self.folder / "nodes").iterdir())):
            if (self.folder / PIDS).exists():
                self.send(name, signal.SIGCONT)
        down(self.folder)
        for each in self._others:
            each.wait(30)


def told(folder: Path) -> dict[str, Any] | None:
    """What a run directory says of where its run lives; none before the run has been taken."""
    with suppress(OSError, ValueError):
        return dict(json.loads((folder / "deployment.json").read_text()))
    return None


@contextmanager
def deployment(here: Path, config: Path, nodes: int, singles: int) -> Iterator[Deployment]:
    """A deployment that is up; whatever has come of it ends with the block.

    Parameters
    ----------
    here : Path
        An existing folder; the deployment is made in it.
    config : Path
        The experiment's YAML.
    nodes, singles : int
        As for `hushrec deploy init`.
    """
    ports = free_ports(nodes + 2)
    with pytest.MonkeyPatch.context() as patch, nobody_left():
        patch.setenv("OMP_NUM_THREADS", "1")
        init(load(config), here / "deployment", nodes, port=ports, singles=singles, node_port=ports + 1)
        made = Deployment(here / "deployment", ports, ports + nodes + 1)
        try:
            up(made.folder)
            yield made
        finally:
            made.end()
