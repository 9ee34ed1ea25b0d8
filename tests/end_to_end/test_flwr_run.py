"""`flwr run .` from the project's folder, as a Flower user types it: what is shipped is enough, the run is the same."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

from client.device import Device
from common.data.prepare import prepare
from common.loading import load
from server.rounds import CHECKPOINT_FILE, MODEL_FILE, serve
from simulations.engines import play
from tests.support.leftovers import MARK, end, left, nobody_left, started_with
from tests.support.runs import metrics

pytest.importorskip("ray")

PROJECT = Path(__file__).parents[2]
SHIPPED = ("pyproject.toml", "README.md", "LICENSE", "server", "client", "common", "configs")
NODES = 12
OVERRIDES = [
    f"data.users={NODES}",
    "data.items=30",
    "data.interests=4",
    "data.mean_length=6",
    "model.dim=8",
    "federation.rounds=2",
    "federation.cohort=6",
    "evaluation.every=2",
]
WHERE = """
(Path(os.environ["HUSHREC_OUT"]) / "where").write_text(__file__)
"""


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def stop(folder):
    """End Flower's daemons, politely where that is enough; they started everybody else and take them along."""
    end(started_with(folder), signal.SIGTERM)
    end(left(folder, 15.0), signal.SIGKILL)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished `flwr run .`: its folder of results, what it says, and its status."""
    here, out = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("out")
    for name in SHIPPED:
        copy = shutil.copytree if (PROJECT / name).is_dir() else shutil.copy
        copy(PROJECT / name, here / name)
    with (here / "server" / "app.py").open("a") as app:
        app.write(WHERE)
    command = [Path(sys.executable).with_name("flwr")]
    nodes = f"num-supernodes={NODES} client-resources-num-cpus=1 init-args-num-cpus=2"
    with nobody_left(here=False) as folder:
        environment = {
            **os.environ,
            MARK: str(folder),
            "FLWR_HOME": str(tmp_path_factory.mktemp("flwr-home")),
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "HUSHREC_OUT": str(out),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        environment.pop("PYTHONPATH", None)
        call = partial(subprocess.run, cwd=here, env=environment, capture_output=True, text=True, check=False)
        told = f'overrides="{" ".join(OVERRIDES)}"'
        try:
            options = ["--stream", "--federation-config", nodes, "--run-config", told]
            done = call([*command, "run", ".", *options], timeout=240)
            listed = call([*command, "ls", "--format", "json"], timeout=60)
        finally:
            stop(str(folder))
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return SimpleNamespace(out=out, said=said, runs=json.loads(listed.stdout)["runs"], home=environment["FLWR_HOME"])


@pytest.fixture(scope="module")
def in_process(tmp_path_factory):
    """Folder of results of the same experiment with the engine of this process."""
    experiment, folder = load(PROJECT / "configs" / "quickstart.yaml", OVERRIDES), tmp_path_factory.mktemp("in-process")
    device = Device.open(experiment, prepare(experiment.data))
    play(device, partial(serve, experiment=experiment, folder=folder, observe=lambda line: None))
    return folder


def test_flower_says_that_it_is_done(run):
    assert [each["status"] for each in run.runs] == ["finished:completed"], run.said


def test_what_ran_is_what_was_shipped(run):
    app = Path((run.out / "where").read_text())
    assert app.is_relative_to(run.home)
    package = app.parents[1]
    assert {path.name for path in package.iterdir() if path.is_dir()} >= {"server", "client", "common", "configs"}
    assert not (package / "simulations").exists()


def test_it_leaves_what_a_run_leaves(run, in_process):
    assert {path.name for path in run.out.iterdir()} == {path.name for path in in_process.iterdir()} | {"where"}
    assert {MODEL_FILE, CHECKPOINT_FILE} <= {path.name for path in in_process.iterdir()}


def test_the_model_is_that_of_the_in_process_engine(run, in_process):
    there, here = (load_file(folder / MODEL_FILE) for folder in (run.out, in_process))
    assert there.keys() == here.keys()
    for name, values in here.items():
        np.testing.assert_allclose(there[name], values, rtol=0, atol=1e-5, err_msg=name)


def test_so_are_the_metrics(run, in_process):
    there, here = metrics(run.out), metrics(in_process)
    assert [(line["round"], line["kind"]) for line in here] == [(1, "train"), (2, "train"), (2, "validation")]
    for line, wanted in zip(there, here, strict=True):
        assert line.keys() == wanted.keys()
        assert line == {name: pytest.approx(value, abs=1e-5) for name, value in wanted.items() if name != "kind"} | {
            "kind": wanted["kind"]
        }


def test_people_see_the_rounds_and_the_test(run):
    for kind in ("train", "validation", "test"):
        assert f'"kind": "{kind}"' in run.said
