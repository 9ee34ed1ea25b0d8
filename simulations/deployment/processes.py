"""A whole deployment on this machine: its server and nodes as processes that outlive the command which starts them.

Each process carries a mark in its environment, and so does whatever it starts. So all of them are found again, and
never anybody else whom the system gave the number of one that has ended.
"""

import json
import os
import shlex
import signal
import socket
import ssl
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from common.data.catalogue import Catalogue
from common.errors import StateError, UsageError
from common.files import explained, read_json, write_json
from simulations.deployment import flower
from simulations.deployment.folder import guard, nodes_of, server_of

SUPERLINK = "superlink"
"""Name of the server among the processes."""
PIDS, REGISTERED = "pids.json", "server/registered.json"
PATIENCE = 120.0
"""Seconds within which the server must answer, and nodes be there."""
GRACE = 10.0
"""Seconds between a polite request to end and a kill."""
_MARK = "HUSHREC_DEPLOYMENT"


class Status(NamedTuple):
    """What one process of a deployment does."""

    name: str
    """The server's, or a node's."""
    pid: int | None
    """Its number while it runs."""
    state: str
    """running or stopped."""
    users: int
    """How many live there; 0 for the server."""


class _Process(NamedTuple):
    pid: int
    started: int
    """In ticks since boot; with the number it tells a process from all others."""


def up(folder: Path, say: Callable[[str], None] = lambda line: None) -> None:
    """Start the server, make the nodes' keys known to it, start the nodes, and wait until they are there.

    Parameters
    ----------
    folder : Path
        What `simulations.deployment.folder.init` made.
    say : callable, optional
        Told what happens.

    Raises
    ------
    UsageError
        Where the folder is no deployment, or would be open to a network without certificates and keys of nodes.
    StateError
        Where it is up already, was up and not taken down, or something does not start; then nothing is left running.
    """
    folder = folder.absolute()
    host, port = server_of(folder)
    guard(folder)
    if (folder / PIDS).exists():
        raise StateError(f"{folder / PIDS}: {_why_there(folder)}")
    with suppress(OSError), socket.create_connection((host, port), timeout=2):
        raise StateError(
            f"{host}:{port}: somebody else listens there; stop it, or make a deployment with another --port"
        )
    token = uuid.uuid4().hex
    with explained(folder / PIDS), open(folder / PIDS, "x") as file:  # of two that start at once, one fails here
        file.write(json.dumps({"token": token, "processes": {}}))
    try:
        say(f"starting the server at {host}:{port}")
        server = _start(folder, SUPERLINK, token)
        _wait_until_it_answers(folder, server, host, port)
        ids = _register(folder, say)
        _wait_until_forgotten(folder, ids, say)
        say("starting the nodes")
        nodes = {path.name: _start(folder, path.name, token) for path in nodes_of(folder)}
        _wait_until_online(folder, nodes, ids)
    except BaseException:  # an interrupt, too, must leave nothing running
        down(folder)
        raise


def status(folder: Path) -> list[Status]:
    """Tell of the server, then of each node in the folder, whether it runs.

    Raises
    ------
    UsageError
        Where the folder is no deployment.
    DataError
        Where a node's data is damaged.
    """
    server_of(folder)
    known = _recorded(folder)[1]

    def one(name: str, users: int) -> Status:
        process = known.get(name)
        runs = process is not None and _started(process.pid) == process.started
        return Status(name, process.pid if process and runs else None, "running" if runs else "stopped", users)

    nodes = [one(path.name, Catalogue.open(path / "data").users) for path in nodes_of(folder)]
    return [one(SUPERLINK, 0), *nodes]


def down(folder: Path) -> None:
    """Stop nodes, then the server, with whatever they started: politely, after `GRACE` seconds by force.

    Raises
    ------
    UsageError
        Where the folder is no deployment.
    StateError
        Where something cannot be stopped.
    """
    server_of(folder)
    if not (folder / PIDS).exists():
        return
    token, known = _recorded(folder)
    nodes = [name for name in known if name != SUPERLINK]
    _end(token, known, nodes)  # first, so that they can still tell the server that they leave
    _end(token, known, [SUPERLINK])
    with explained(folder / PIDS):
        (folder / PIDS).unlink(missing_ok=True)


# --- starting --------------------------------------------------------------------------------------------------------


def _start(folder: Path, name: str, token: str) -> "subprocess.Popen[bytes]":
    home = folder / "server" if name == SUPERLINK else folder / "nodes" / name
    commands = str(Path(sys.executable).absolute().parent)
    environment = {
        **os.environ,
        _MARK: f"{token}/{name}",
        "PATH": f"{commands}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    with (
        explained(home),
        open(home / "log.txt", "ab", opener=lambda path, flags: os.open(path, flags, 0o600)) as log,
    ):
        os.fchmod(log.fileno(), 0o600)
        process = subprocess.Popen(
            [home / "start.sh"],
            cwd=home,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    kept = read_json(folder / PIDS)
    kept["processes"][name] = {"pid": process.pid, "started": _started(process.pid) or 0}
    write_json(folder / PIDS, kept)
    return process


def _wait_until_it_answers(folder: Path, server: "subprocess.Popen[bytes]", host: str, port: int) -> None:
    context = ssl.create_default_context(cafile=folder / "server" / "ca.crt")
    for _ in _patiently("the server does not answer", folder / "server" / "log.txt"):
        if server.poll() is not None:
            raise _ended(SUPERLINK, folder / "server" / "log.txt")
        try:
            with (
                socket.create_connection((host, port), timeout=5) as plain,
                context.wrap_socket(plain, server_hostname=host),
            ):
                return
        except ssl.SSLCertVerificationError as fault:
            raise StateError(f"{host}:{port}: its certificate is not trusted ({fault.verify_message})") from None
        except OSError:
            continue


def _register(folder: Path, say: Callable[[str], None]) -> dict[str, str]:
    """Make all nodes' keys known, those of nodes elsewhere, too; give their ids by name, as far as they are known."""
    path = folder / REGISTERED
    there, ids = _online(folder), dict(read_json(path)) if path.exists() else {}
    for key in sorted((folder / "server" / "keys").glob("*.pub")):
        if ids.get(key.stem) in there:
            continue
        say(f"registering {key.stem}")
        answer = flower.call(folder / "client", "supernode", "register", str(key), "hushrec", "--name", key.stem)
        if answer.get("success"):
            ids[key.stem] = str(answer["node-id"])
            write_json(path, ids)
        elif "already in use" not in json.dumps(answer):
            raise StateError(f"{key}: the server does not take this key: {answer.get('error-message', answer)}")
    return ids


def _wait_until_forgotten(folder: Path, ids: dict[str, str], say: Callable[[str], None]) -> None:
    """Wait while the server takes nodes that were killed for alive, since it would refuse them."""
    names, told = {ids[path.name]: path.name for path in nodes_of(folder) if path.name in ids}, False
    for _ in _patiently("the server takes nodes for running; stop them", folder / "server" / "log.txt"):
        alive = sorted(names[node] for node, online in _online(folder).items() if online and node in names)
        if not alive:
            return
        if not told:
            say(f"waiting, up to a minute, until the server sees that {', '.join(alive)} stopped")
            told = True
        time.sleep(5)


def _wait_until_online(folder: Path, nodes: dict[str, "subprocess.Popen[bytes]"], ids: dict[str, str]) -> None:
    awaited = {ids[name] for name in nodes if name in ids}
    for _ in _patiently("some nodes don't reach the server", folder / "nodes"):
        for name, process in nodes.items():
            if process.poll() is not None:
                raise _ended(name, folder / "nodes" / name / "log.txt")
        if awaited <= {node for node, online in _online(folder).items() if online}:
            return


def _patiently(why: str, where: Path) -> Iterator[None]:
    """Give a turn again and again, with a pause between, until patience ends."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        yield
        time.sleep(0.3)
    raise StateError(f"{where}: {why} within {PATIENCE:.0f} s; see what it says there")


def _ended(name: str, log: Path) -> StateError:
    with suppress(OSError):
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return StateError(f"{log}: {name} has ended: {lines[-1].strip() if lines else 'it said nothing'}")
    return StateError(f"{log}: {name} has ended")


def _online(folder: Path) -> dict[str, bool]:
    """Ids of the nodes whose keys the server knows, and whether it takes them for running."""
    answer = flower.call(folder / "client", "supernode", "list", "hushrec")
    if not answer.get("success"):
        raise StateError(f"{folder}: the server does not list its nodes: {answer.get('error-message', answer)}")
    return {node["node-id"]: node["status"] == "online" for node in answer["nodes"] if node["status"] != "unregistered"}


# --- what is known of the processes -----------------------------------------------------------------------------------


def _recorded(folder: Path) -> tuple[str, dict[str, _Process]]:
    if not Path("/proc/self/environ").exists():
        raise UsageError(
            "this system has no /proc, by which processes are found again; run the start.sh scripts yourself"
        )
    if not (folder / PIDS).exists():
        return "", {}
    kept = read_json(folder / PIDS)
    try:
        found = {name: _Process(int(each["pid"]), int(each["started"])) for name, each in kept["processes"].items()}
        return str(kept["token"]), found
    except (KeyError, TypeError, AttributeError, ValueError) as fault:
        raise StateError(f"{folder / PIDS}: not what `hushrec deploy up` writes; remove it") from fault


def _why_there(folder: Path) -> str:
    alive = any(each.pid is not None for each in status(folder))
    why = "the deployment is up" if alive else "its processes are gone, as after a crash or a restart of the machine"
    return f"{why}; run `hushrec deploy down {shlex.quote(str(folder))}` first"


# --- processes -------------------------------------------------------------------------------------------------------


def _started(pid: int) -> int | None:
    """When a process started; None where there is none, or it has ended and only waits to be reaped."""
    with suppress(OSError, ValueError, IndexError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else int(fields[18])
    return None


def _marked(mark: str) -> Iterator[_Process]:
    """All processes of that mark: the one that was started with it, and those that came from it."""
    wanted = f"{_MARK}={mark}".encode()
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # others end meanwhile, or are not ours to look at
            started = _started(int(path.name))
            if started is not None and wanted in (path / "environ").read_bytes().split(b"\0"):
                yield _Process(int(path.name), started)


def _signal(process: _Process, number: int) -> None:
    """Signal a process, surely that one and not its successor by number."""
    with suppress(ProcessLookupError):
        handle = os.pidfd_open(process.pid)
        try:
            if _started(process.pid) == process.started:
                signal.pidfd_send_signal(handle, number)
        finally:
            os.close(handle)


def _end(token: str, known: dict[str, _Process], names: list[str]) -> None:
    def left() -> set[_Process]:
        recorded = {known[name] for name in names if name in known and _started(known[name].pid) == known[name].started}
        return recorded.union(*(_marked(f"{token}/{name}") for name in names)) if token else recorded

    for number, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        end, asked = time.monotonic() + seconds, set[_Process]()
        while (processes := left()) and time.monotonic() < end:
            for process in processes - asked:
                _signal(process, number)
            asked |= processes
            time.sleep(0.1)
    if processes:
        raise StateError(f"cannot stop process {min(processes).pid}; stop it by hand, then run this again")
