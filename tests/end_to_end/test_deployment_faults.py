"""Nodes that hang, die or are strangers, and a server that dies: a deployed run goes on, or stops so that it can."""

import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

from common.loading import load
from server.rounds import CHECKPOINT_FILE, MODEL_FILE
from simulations.deployment.folder import init
from tests.support.deployed import HUSHREC, deployment, lines, told, until

if not Path("/proc/self/environ").exists():
    pytest.skip("needs /proc", allow_module_level=True)

DEADLINE = 30
SLACK = 15
"""Seconds that a round on a busy machine may take beyond its deadline."""
CONFIG = f"""
name: tiny
data: {{kind: synthetic, users: 60, items: 40, interests: 4, mean_length: 8, max_length: 20}}
model: {{dim: 8, blocks: 1, max_length: 16}}
loss: {{kind: sampled-softmax, negatives: 16}}
federation: {{rounds: 2, cohort: 20, replies: {{deadline: {DEADLINE}, quorum: 0.5, wait: 10}}}}
evaluation: {{every: 100, resamples: 100}}
runtime: {{threads: 1, checkpoint_every: 1}}
"""
STRICT = ["federation.replies.quorum=0.9", "federation.replies.wait=5"]
"""So that a run stops where a shard is missing."""
HOSTS = {"node-000": 1, "node-001": 29, "node-002": 30}


def hushrec(*arguments):
    """Run a command to its end; no process of it stays, which the forked ones of `tests.support.processes` would."""
    return subprocess.run([HUSHREC, *map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    """Three nodes that are up: a device of one user, two shards."""
    here = tmp_path_factory.mktemp("faults")
    (here / "tiny.yaml").write_text(CONFIG)
    with deployment(here, here / "tiny.yaml", 3, 1) as up:
        yield SimpleNamespace(up=up, here=here, config=here / "tiny.yaml")


# --- what is refused --------------------------------------------------------------------------------------------------


def errors(text):
    return [line for line in text.splitlines() if line.startswith("error: ")]


def test_a_server_of_another_authority_is_refused_in_one_line(deployed, tmp_path):
    init(load(deployed.config), tmp_path / "other", 1)
    ended = deployed.up.submit(
        deployed.config, "--out", tmp_path / "run", authority=tmp_path / "other/ca/ca.crt"
    ).wait()
    assert ended.code == 1
    assert len(errors(ended.err)) == 1, ended.err
    assert "certificate" in ended.err


def test_another_machine_is_not_called_without_an_authority(tmp_path):
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    ended = hushrec("run", tmp_path / "tiny.yaml", "--superlink", "10.1.2.3:9443", "--out", tmp_path / "run")
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: --superlink 10.1.2.3:9443: name --ca")
    assert len(ended.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


# --- a run that goes on -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def disturbed(deployed):
    """A run in whose first round one node hangs, in whose second another one is killed; a stranger knocks meanwhile."""
    up = deployed.up
    since = {name: up.said(name) for name in HOSTS}
    run = up.submit(deployed.config, "--out", deployed.here / "disturbed")
    metrics = up.metrics(run)
    up.receives("node-002", 1, since["node-002"])
    up.send("node-002", signal.SIGSTOP)
    stranger = up.stranger("node-001")
    until("round 1 ends", lambda: lines(metrics) or run.process.poll() is not None)
    up.send("node-002", signal.SIGCONT)
    up.receives("node-001", 2, since["node-001"])
    up.kill("node-001")
    ended = run.wait()
    return SimpleNamespace(ended=ended, lines=lines(run.folder / "metrics.jsonl"), stranger=stranger)


def test_a_run_ends_well_though_nodes_hang_and_die(disturbed):
    assert disturbed.ended.code == 0, disturbed.ended.err
    assert [(line["round"], line["kind"]) for line in disturbed.lines] == [
        (1, "train"),
        (2, "train"),
        (2, "validation"),
    ]


def test_a_node_that_hangs_is_left_out_at_the_deadline(disturbed):
    line = disturbed.lines[0]
    assert line["lost"] == 1
    assert 0 < line["clients"] < 20
    assert DEADLINE <= line["seconds"] < DEADLINE + SLACK


def test_a_killed_node_is_lost_and_holds_nobody_up_while_the_one_that_hung_is_there_again(disturbed):
    _, line, validation = disturbed.lines
    assert line["lost"] == 1
    assert 0 < line["clients"] < 20
    assert line["seconds"] < DEADLINE + SLACK
    assert validation["users"] == HOSTS["node-000"] + HOSTS["node-002"]
    assert validation["seconds"] < DEADLINE + SLACK


def test_a_node_whose_key_nobody_knows_ends_with_an_error(deployed, disturbed):
    assert disturbed.stranger.wait(30) not in {0, None}
    assert "Failed to activate SuperNode" in (deployed.here / "stranger" / "log.txt").read_text()


# --- a run that stops -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(deployed, disturbed):
    """A run that cannot begin: one node is dead, another has a stranger's catalogue and its check is taken out."""
    up = deployed.up
    up.kill("node-000", signal.SIGTERM)
    home, other = up.home("node-000"), deployed.here / "other"
    init(load(deployed.config, ["data.items=37"]), other, 3, singles=1)
    (home / "data").rename(home / "kept")
    shutil.copytree(other / "nodes" / "node-000" / "data", home / "data")
    checked = up.start("node-000").wait(60), (home / "log.txt").read_text()
    script = (home / "start.sh").read_text().splitlines(keepends=True)
    (home / "unchecked.sh").write_text("".join(line for line in script if "deploy check" not in line))
    (home / "unchecked.sh").chmod(0o700)
    up.come_back("node-000", "unchecked.sh")
    ended = up.submit(deployed.config, *STRICT, "--out", deployed.here / "strict").wait()
    up.kill("node-000", signal.SIGTERM)
    shutil.rmtree(home / "data")
    (home / "kept").rename(home / "data")
    return SimpleNamespace(ended=ended, checked=checked)


def test_a_node_checks_its_catalogue_before_it_starts(stopped):
    code, log = stopped.checked
    assert code == 2
    assert "its catalogue is " in log.splitlines()[-1]
    assert "that of the deployment is " in log.splitlines()[-1]


def test_with_too_few_nodes_the_run_stops_and_says_how_to_go_on(deployed, stopped):
    assert stopped.ended.code == 4
    text = stopped.ended.err
    assert "nodes of 50% of the users came within 5 s, not 90%" in text
    assert f"go on with: hushrec run --resume {deployed.here / 'strict'} --superlink {deployed.up.address}" in text
    assert "Traceback" not in text


def test_a_node_with_another_catalogue_is_left_out_with_its_reason(stopped):
    assert "left out: " in stopped.ended.err
    assert "its catalogue is not version" in stopped.ended.err


@pytest.fixture(scope="module")
def resumed(deployed, stopped):
    """The same run with all its nodes. Whoever submitted it is killed, then the server; both times it is resumed."""
    up, run = deployed.up, deployed.here / "strict"
    for name in ("node-000", "node-001"):
        up.come_back(name)
    before, first = told(run), up.submit("--resume", run)
    until("the run is under way", lambda: told(run) != before and serving(up))
    first.process.kill()
    again = up.submit("--resume", run)
    place = up.metrics(again).parent
    until("round 1 is kept", lambda: (place / CHECKPOINT_FILE).exists() or again.process.poll() is not None)
    writing = serving(up)
    up.kill("superlink")
    killed = again.wait()
    for verb in ("down", "up"):
        done = hushrec("deploy", verb, up.folder)
        assert done.returncode == 0, done.stderr
    ended = up.submit("--resume", run).wait()
    whole = hushrec("run", deployed.config, *STRICT, "--out", deployed.here / "whole")
    assert whole.returncode == 0, whole.stderr
    whole = deployed.here / "whole"
    return SimpleNamespace(killed=killed, ended=ended, run=run, whole=whole, writing=writing, place=place)


def serving(up):
    """Processes of the server that lead a run."""
    commands = [Path(f"/proc/{process}/cmdline") for process in up.members("superlink")]
    return [path for path in commands if path.exists() and b"flwr-serverapp" in path.read_bytes()]


def test_resumed_after_its_submitter_was_killed_a_run_is_led_by_one_process_only(resumed):
    assert len(resumed.writing) == 1


def test_a_killed_server_ends_the_run_and_its_last_line_says_how_to_go_on(deployed, resumed):
    assert resumed.killed.code == 1
    assert len(errors(resumed.killed.err)) == 1, resumed.killed.err
    assert f"hushrec run --resume {resumed.run} --superlink {deployed.up.address}" in resumed.killed.err


def test_resumed_it_ends_with_the_model_of_a_run_that_nothing_disturbed(resumed):
    """So the nodes that were killed and kept out took part again: without them the model is another."""
    assert resumed.ended.code == 0, resumed.ended.err
    there, here = (load_file(folder / MODEL_FILE) for folder in (resumed.run, resumed.whole))
    assert there.keys() == here.keys()
    for name, values in here.items():
        np.testing.assert_allclose(there[name], values, rtol=0, atol=1e-6, err_msg=name)


def test_and_with_its_metrics(resumed):
    server, there, here = (lines(at / "metrics.jsonl") for at in (resumed.place, resumed.run, resumed.whole))
    assert there == server
    assert [(line["round"], line["kind"]) for line in there] == [(line["round"], line["kind"]) for line in here]
    assert [line.get("clients") for line in there] == [line.get("clients") for line in here]
