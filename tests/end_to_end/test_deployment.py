"""A server and three nodes as processes of their own, over TLS: a simulation's model, and nobody's events."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

from client.device import Device
from common.data.prepare import prepare
from common.loading import load
from server.rounds import MODEL_FILE, serve
from simulations.deployment.folder import init
from simulations.deployment.processes import down, up
from simulations.grid import InProcessGrid
from tests.end_to_end.test_flwr_run import free_port
from tests.support.runs import metrics

HUSHREC = Path(sys.executable).with_name("hushrec")
CANARY = "canary-item-7f3a"
"""In one device's history only, and in the public catalogue."""
CONFIG = """
name: deployed
data: {kind: pairs, path: pairs.txt, min_user_events: 1, min_item_events: 1}
model: {dim: 8, blocks: 1, heads: 1, dropout: 0.1, max_length: 12}
loss: {kind: sampled-softmax, negatives: 16}
federation: {rounds: 3, cohort: 20, replies: {deadline: 120, wait: 60}}
evaluation: {every: 3}
"""
ETH_P_ALL = 3


def write_data(folder):
    """Forty users; the first one has the canary, in the middle of its history."""
    rng, lines = np.random.default_rng(3), []
    for user in range(40):
        items = [f"item-{i}" for i in rng.choice(30, 8, replace=False)]
        if user == 0:
            items[3] = CANARY
        lines += [f"{user + 1} {item}" for item in items]
    (folder / "pairs.txt").write_text("\n".join(lines) + "\n")
    (folder / "deployed.yaml").write_text(CONFIG)


class Tap:
    """Everything that passes a port of the loopback device, where this process may look at it."""

    def __init__(self, port):
        self.port, self.seen, self._on = port, bytearray(), True
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(ETH_P_ALL))
        self._socket.bind(("lo", 0))
        self._socket.settimeout(0.2)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self):
        while self._on:
            with contextlib.suppress(TimeoutError):
                packet = self._socket.recv(1 << 16)
                ports = {int.from_bytes(packet[34:36], "big"), int.from_bytes(packet[36:38], "big")}
                if packet[12:14] == b"\x08\x00" and packet[23] == 6 and self.port in ports:
                    self.seen += packet[38:]

    def close(self):
        self._on = False
        self._thread.join()
        self._socket.close()


@pytest.fixture(scope="module")
def tap_of():
    """Makes taps; none where raw sockets are not allowed."""
    taps = []

    def make(port):
        try:
            taps.append(Tap(port))
        except (PermissionError, AttributeError, OSError):
            return None
        return taps[-1]

    yield make
    for tap in taps:
        tap.close()


@pytest.fixture(scope="module")
def deployed(tmp_path_factory, tap_of):
    """A finished run on three nodes: one device of one user, two shards."""
    here = tmp_path_factory.mktemp("deployed")
    write_data(here)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HUSHREC_DATA", str(here))
        patch.setenv("OMP_NUM_THREADS", "1")
        experiment = load(here / "deployed.yaml")
        port, folder, out = free_port(), here / "deployment", here / "run"
        init(experiment, folder, nodes=3, port=port, singles=1, node_port=free_port())
        tap = tap_of(port)
        try:
            up(folder)
            command = [HUSHREC, "run", here / "deployed.yaml", "--out", out, "--json"]
            place = ["--superlink", f"127.0.0.1:{port}", "--ca", folder / "ca" / "ca.crt"]
            done = subprocess.run([*command, *place], capture_output=True, text=True, timeout=300, check=False)
        finally:
            down(folder)
        assert done.returncode == 0, done.stderr
        device = Device.open(experiment, prepare(experiment.data))
        twin = here / "twin"
        twin.mkdir()
        outcome = serve(InProcessGrid(device, "vectorized"), experiment, twin, lambda line: None)
        yield SimpleNamespace(
            folder=folder,
            out=out,
            result=json.loads(done.stdout),
            said=done.stderr,
            twin=twin,
            outcome=outcome,
            tap=tap,
            port=port,
            config=here / "deployed.yaml",
            items=device.catalogue.item_ids(),
        )


def test_the_model_is_that_of_one_process(deployed):
    there, here = (load_file(folder / MODEL_FILE) for folder in (deployed.out, deployed.twin))
    assert there.keys() == here.keys()
    for name, values in here.items():
        np.testing.assert_allclose(there[name], values, rtol=0, atol=1e-5, err_msg=name)


def test_so_are_the_figures(deployed):
    assert {name: each["value"] for name, each in deployed.result["test"].items()} == deployed.outcome.figures
    there, here = metrics(deployed.out), metrics(deployed.twin)
    assert [(line["round"], line["kind"]) for line in there] == [(line["round"], line["kind"]) for line in here]
    for line, wanted in zip(there, here, strict=True):
        assert line.get("loss") == pytest.approx(wanted.get("loss"), abs=1e-5)
        assert line.get("clients") == wanted.get("clients")


def test_progress_and_the_privacy_card_came_home(deployed):
    assert "validation HR@10" in deployed.said
    assert json.loads((deployed.out / "privacy.json").read_text())["unit"] == "none"


def test_the_model_can_be_asked_here(deployed, monkeypatch):
    monkeypatch.setenv("HUSHREC_DATA", str(deployed.config.parent))
    command = [HUSHREC, "recommend", "--run", deployed.out, "--history", deployed.items[0], "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["items"]) == 10


def test_no_event_reached_the_server(deployed):
    """The canary stands in its device's own files, so the search can find it, and nowhere with the server."""
    number = deployed.items.index(CANARY)
    device = deployed.folder / "nodes" / "node-000" / "data"
    assert number in np.load(device / "items.npy").tolist()
    others = [np.load(path / "items.npy") for path in sorted(deployed.folder.glob("nodes/*/data"))[1:]]
    assert not any(number in items for items in others)
    assert CANARY.encode() in (device / "catalogue.parquet").read_bytes()
    kept = [path for path in deployed.folder.joinpath("server").rglob("*") if path.is_file()]
    assert any(path.name == "state.db" and path.stat().st_size > 10_000 for path in kept)
    history = np.load(device / "items.npy")
    for path in kept:
        content = path.read_bytes()
        assert CANARY.encode() not in content, path
        for kind in (np.int32, np.int64):
            assert history.astype(kind).tobytes() not in content, path


def test_the_wire_carries_no_plaintext(deployed):
    if deployed.tap is None:
        pytest.skip("raw sockets are not allowed here")
    with (  # what a tap sees of plaintext, to compare with
        socket.create_server(("127.0.0.1", deployed.port)) as server,
        socket.create_connection(("127.0.0.1", deployed.port)) as client,
        server.accept()[0] as accepted,
    ):
        client.sendall(b"HUSHREC-IN-PLAIN")
        accepted.recv(100)
    end = threading.Event()
    end.wait(0.5)
    seen = bytes(deployed.tap.seen)
    assert b"HUSHREC-IN-PLAIN" in seen
    assert len(seen) > 100_000
    model = (deployed.out / MODEL_FILE).read_bytes()
    words = [
        b"hushrec",
        b"sampled-softmax",
        b"partition",
        b"HTTP/1.1 200",
        b"POST /v1",
        b"table",
        b"item-",
        model[-64:],
    ]
    assert [word for word in words if word in seen] == []


def test_secrets_are_their_owners(deployed):
    secret = [path for path in deployed.folder.rglob("*") if path.name in {"key", "ca.key", "server.key"}]
    assert len(secret) == 5
    assert {path.stat().st_mode & 0o077 for path in secret} == {0}
    assert {os.stat(path).st_uid for path in secret} == {os.getuid()}
