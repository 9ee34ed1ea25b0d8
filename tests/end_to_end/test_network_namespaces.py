"""Four machines, as network namespaces around a bridge: a server, two nodes, and a desk that submits a run."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from server.rounds import MODEL_FILE
from tests.support.leftovers import left, nobody_left

BIN = Path(sys.executable).parent
SERVER, PORT = "10.213.7.1", 9443
MACHINES = {"server": SERVER, "node-000": "10.213.7.2", "node-001": "10.213.7.3", "desk": "10.213.7.4"}
PATIENCE = 180
CONFIG = """
name: apart
data: {kind: synthetic, users: 60, items: 40, interests: 4, mean_length: 8, max_length: 20}
model: {dim: 8, blocks: 1, max_length: 16}
loss: {kind: sampled-softmax, negatives: 16}
federation: {rounds: 2, cohort: 20, replies: {deadline: 120, wait: 30}}
evaluation: {every: 2, resamples: 100}
runtime: {threads: 1}
"""


def ip(*arguments):
    """Flags and words of `ip`; what it complains about is an error."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=30)


class Network:
    """Namespaces with a link each to one that holds a bridge; nothing of it is seen from outside."""

    def __init__(self):
        self._tag, self._made, self.processes = f"hushrec-{os.getpid()}", [], []

    def build(self):
        switch = self._add("switch")
        ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", switch, "link", "set", "bridge", "up")
        for number, (machine, address) in enumerate(MACHINES.items()):
            own, port = self._add(machine), f"port{number}"
            ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", own)
            ip("-n", switch, "link", "set", port, "master", "bridge", "up")
            ip("-n", own, "address", "add", f"{address}/24", "dev", "eth0")
            ip("-n", own, "link", "set", "eth0", "up")
            ip("-n", own, "link", "set", "lo", "up")

    def _add(self, name):
        ip("netns", "add", f"{self._tag}-{name}")
        self._made.append(f"{self._tag}-{name}")
        return self._made[-1]

    def _command(self, machine, command):
        return ["ip", "netns", "exec", f"{self._tag}-{machine}", *map(str, command)]

    def start(self, machine, home):
        """Run the start script of a folder on a machine."""
        with (home / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                self._command(machine, [home / "start.sh"]),
                cwd=home,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.processes.append(process)

    def call(self, machine, *command, **more):
        """Run a command on a machine to its end."""
        whole = self._command(machine, command)
        return subprocess.run(
            whole, env=environment(**more), capture_output=True, text=True, timeout=PATIENCE, check=False
        )

    def close(self):
        """End everybody, nodes first, and take the namespaces away."""
        for process in reversed(self.processes):
            process.terminate()
        for process in reversed(self.processes):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
        for name in self._made:
            found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
            for process in map(int, found.stdout.split()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        for name in reversed(self._made):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def environment(**more):
    return {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", **more}


@pytest.fixture
def network():
    """Machines of their own; skipped where this machine lets nobody make them."""
    if shutil.which("ip") is None:
        pytest.skip("needs the command `ip` (iproute2)")
    made = Network()
    with nobody_left() as folder:
        try:
            try:
                made.build()
            except subprocess.CalledProcessError as fault:
                pytest.skip(f"network namespaces are not to be had here: {' '.join(fault.stderr.split())}")
            yield made
        finally:
            made.close()
            left(str(folder), 10.0)


def until(condition, what):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"{what} takes too long"
        time.sleep(0.3)


def test_a_run_over_a_network_ends_with_the_model_of_one_process(network, tmp_path):
    (tmp_path / "apart.yaml").write_text(CONFIG)
    made, home = tmp_path / "deployment", str(tmp_path / "deployment" / "client")
    where = ["--host", SERVER, "--port", str(PORT), "--nodes", "2", "--singles", "1", "--out", made]
    initialised = network.call("desk", BIN / "hushrec", "deploy", "init", tmp_path / "apart.yaml", *where)
    assert initialised.returncode == 0, initialised.stderr

    def supernode(*arguments):
        told = network.call("desk", BIN / "flwr", "supernode", *arguments, "--format", "json", FLWR_HOME=home)
        return json.loads(told.stdout) if told.stdout.startswith("{") else {}

    network.start("server", made / "server")
    until(lambda: supernode("list", "hushrec").get("success"), "the server")
    for name in ("node-000", "node-001"):
        key = str(made / "server" / "keys" / f"{name}.pub")
        assert supernode("register", key, "hushrec", "--name", name).get("success")
        moved = shutil.move(made / "nodes" / name, tmp_path / f"machine-of-{name}")
        network.start(name, Path(moved))
    online = lambda: [node["status"] for node in supernode("list", "hushrec").get("nodes", [])]  # noqa: E731
    until(lambda: online() == ["online", "online"], "one of the nodes")

    place = ["--superlink", f"{SERVER}:{PORT}", "--ca", made / "ca" / "ca.crt"]
    run = network.call("desk", BIN / "hushrec", "run", tmp_path / "apart.yaml", *place, "--out", tmp_path / "run")
    assert run.returncode == 0, run.stderr
    whole = network.call("desk", BIN / "hushrec", "run", tmp_path / "apart.yaml", "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    there, here = (load_file(tmp_path / name / MODEL_FILE) for name in ("run", "whole"))
    assert there.keys() == here.keys()
    for name, values in here.items():
        np.testing.assert_allclose(there[name], values, rtol=0, atol=1e-5, err_msg=name)
    figures = [json.loads((tmp_path / name / "result.json").read_text())["test"] for name in ("run", "whole")]
    assert {name: each["value"] for name, each in figures[0].items()} == {
        name: pytest.approx(each["value"]) for name, each in figures[1].items()
    }
