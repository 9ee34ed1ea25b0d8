"""The server never reads a user's events: watched while it serves, and read off its imports."""

import ast
import builtins
import io
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from flwr.serverapp import Grid

from client.device import Device
from common.data.prepare import prepare
from common.data.sequences import Sequences
from server import curator
from server.rounds import serve
from simulations.grid import FIRST_NODE, InProcessGrid
from tests.support import world

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted((ROOT / "server").glob("*.py"))
FORBIDDEN = ("common.data.sequences", "common.data.readers", "common.data.prepare", "common.data.synthetic")


class PeekError(BaseException):
    """The server looked at events; nobody catches it by chance."""


class Elsewhere(Grid):
    """Carries messages to clients that live in another thread, as if on another machine."""

    def __init__(self, experiment, folder, users):
        self._nodes = range(FIRST_NODE, FIRST_NODE + users)
        self._thread = ThreadPoolExecutor(1)
        self._inner = self._there(lambda: InProcessGrid(Device.open(experiment, folder), "vectorized"))

    def _there(self, call):
        return self._thread.submit(call).result()

    def send_and_receive(self, messages, *, timeout=None):
        return self._there(lambda: self._inner.send_and_receive(messages))

    def get_node_ids(self):
        return self._nodes

    def create_message(self, *arguments, **more):
        raise NotImplementedError

    push_messages = pull_messages = set_run = create_message

    @property
    def run(self):
        return self._inner.run


@pytest.fixture
def watched(monkeypatch):
    """A prepared folder whose events nobody may open, read or ask for from this thread, which is the server's."""
    experiment = world.experiment(federation={"rounds": 3, "cohort": 4}, evaluation={"every": 1})
    folder = prepare(experiment.data)
    server, touched = threading.get_ident(), []

    def guard(path):
        if isinstance(path, str | os.PathLike) and Path(path).parent == folder:
            (touched.append(path) if threading.get_ident() != server else refuse(path))

    def refuse(what):
        raise PeekError(f"the server read {what}")

    def guarded(module, name):
        original = getattr(module, name)

        def call(path, *arguments, **more):
            guard(path)
            return original(path, *arguments, **more)

        monkeypatch.setattr(module, name, call)

    for module, name in ((builtins, "open"), (io, "open"), (os, "open"), (np, "load"), (np, "memmap")):
        guarded(module, name)

    def attribute(self, name):
        if threading.get_ident() == server:
            refuse(f"Sequences.{name}")
        return object.__getattribute__(self, name)

    monkeypatch.setattr(Sequences, "__getattribute__", attribute)
    return experiment, folder, touched


def test_a_run_is_served_without_a_look_at_events(watched, tmp_path):
    experiment, folder, touched = watched
    lines = []
    outcome = serve(Elsewhere(experiment, folder, 12), experiment, tmp_path, lines.append)
    assert outcome.rounds == 3
    assert np.isfinite(outcome.test[0]).all()
    assert any("items.npy" in str(path) for path in touched)  # the clients did


PEEKS = {
    "opens": Sequences.open,
    "loads": lambda folder: np.load(folder / "items.npy"),
    "maps": lambda folder: np.load(folder / "times.npy", mmap_mode="r"),
    "reads": lambda folder: (folder / "items.npy").read_bytes(),
    "descends": lambda folder: os.open(str(folder / "items.npy"), os.O_RDONLY),
}


@pytest.mark.parametrize("how", PEEKS)
def test_a_peek_would_be_caught(watched, how, monkeypatch):
    """Planted into the sampling of a round."""
    experiment, folder, _ = watched
    original = curator.cohort

    def curious(*arguments):
        PEEKS[how](folder)
        return original(*arguments)

    monkeypatch.setattr(curator, "cohort", curious)
    with pytest.raises(PeekError):
        serve(Elsewhere(experiment, folder, 12), experiment, None, lambda line: None)


def test_a_look_at_open_sequences_would_be_caught(watched):
    experiment, folder, _ = watched
    grid = Elsewhere(experiment, folder, 12)
    with pytest.raises(PeekError, match=r"Sequences\.items"):
        grid._inner._device.sequences.items  # noqa: B018


# --- imports ---------------------------------------------------------------------------------------------------------


def imports(source):
    """Every module that a source names in an import, at whatever depth of indentation."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def forbidden(name):
    return name.startswith(("client", "simulations", *FORBIDDEN))


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.name)
def test_no_module_of_the_server_imports_what_reads_events(module):
    assert [name for name in imports(module.read_text()) if forbidden(name)] == []


def test_such_imports_would_be_found():
    assert len(MODULES) >= 10
    sources = ["from common.data.sequences import Sequences", "from common.data import readers", "import client.device"]
    sources += ["def f():\n    from common.data.prepare import prepare", "if True:\n    import simulations"]
    for source in sources:
        assert any(map(forbidden, imports(source)))
    assert not any(map(forbidden, imports("from common.data.catalogue import Catalogue\nimport torch")))
