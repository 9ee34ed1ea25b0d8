"""The ServerApp: thin, so that the run config and the environment are all there is to see."""

import base64
import json
from unittest.mock import ANY

import pytest
from flwr.app import Context, RecordDict

from client.device import Device
from common.data.prepare import prepare
from common.errors import ConfigError, UsageError
from common.metrics import point
from server import app as module
from server.app import TOLD, app
from server.journal import METRICS_FILE, read
from server.rounds import CARD_FILE, MODEL_FILE, serve
from simulations.grid import InProcessGrid
from tests.support import world

EXPERIMENT = world.experiment(federation={"rounds": 2, "cohort": 4})


def context(experiment=None, overrides="", **config):
    text = EXPERIMENT.model_dump_json() if experiment is None else experiment
    return Context(1, 1, {}, RecordDict(), {"experiment": text, "overrides": overrides, **config})


@pytest.fixture
def grid():
    return InProcessGrid(Device.open(EXPERIMENT, prepare(EXPERIMENT.data)), "vectorized")


def test_a_run_into_the_folder_that_the_environment_names(grid, tmp_path, monkeypatch):
    monkeypatch.setenv("HUSHREC_OUT", str(tmp_path))
    app(grid, context())
    assert [line["kind"] for line in read(tmp_path)] == ["train", "train", "validation"]
    assert (tmp_path / MODEL_FILE).exists()


def told(capsys):
    """What a submitter reads."""
    lines = capsys.readouterr().out.splitlines()
    return [json.loads(line.removeprefix(TOLD)) for line in lines if line.startswith(TOLD)]


def test_without_a_folder_it_only_tells(grid, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HUSHREC_OUT", raising=False)
    monkeypatch.chdir(tmp_path)
    app(grid, context(fetch=True))
    assert not list(tmp_path.iterdir())
    said = told(capsys)
    assert [(line.get("round"), line["kind"]) for line in said] == [
        (1, "train"),
        (2, "train"),
        (2, "validation"),
        (None, "test"),
    ]
    assert 0 <= said[-1]["figures"]["ndcg@10"] <= said[-1]["figures"]["hr@10"] <= 1
    assert (said[-1]["rounds"], said[-1]["users"], said[-1]["privacy"]["unit"]) == (2, 12, "none")


def test_under_noise_nothing_else_is_told(tmp_path, capsys):
    federation = {"rounds": 1, "cohort": 4, "sampling": "poisson", "weighting": "uniform"}
    privacy = {"kind": "user-level", "noise_multiplier": 1.0, "rng": "reproducible"}
    private = world.experiment(federation=federation, privacy=privacy, evaluation={"noise": 0.1})
    app(InProcessGrid(Device.open(private, prepare(private.data)), "vectorized"), context(private.model_dump_json()))
    said = told(capsys)
    spent = said[-1]["privacy"]["epsilon_metrics"]
    assert spent > 0
    assert not {"loss", "seconds", "phases", "reasons"} & {name for line in said for name in line}
    full = serve(InProcessGrid(Device.open(private, prepare(private.data)), "vectorized"), private, None, print).test[0]
    assert said[-1]["figures"]["hr@10"] != point(full, [10])["hr@10"]


def test_the_files_come_in_parts(grid, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HUSHREC_OUT", str(tmp_path))
    monkeypatch.setattr(module, "PART", 1000)
    app(grid, context(run="a.run-1", fetch=True))
    content = {}
    for line in told(capsys):
        if line["kind"] == "file":
            assert len(content.setdefault(line["name"], b"")) == line["start"]
            content[line["name"]] += base64.b64decode(line["data"])
    here = tmp_path / "a.run-1"
    assert content == {name: (here / name).read_bytes() for name in (MODEL_FILE, CARD_FILE, METRICS_FILE)}
    assert here.stat().st_mode & 0o777 == 0o700


def test_a_folder_with_a_run_is_resumed_or_left_alone(grid, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HUSHREC_OUT", str(tmp_path))
    app(grid, context(run="r"))
    before = (tmp_path / "r" / MODEL_FILE).read_bytes()
    with pytest.raises(UsageError, match="holds a run already"):
        app(grid, context(run="r"))
    assert told(capsys)[-1] == {"kind": "fault", "exit_code": 2, "error": ANY}
    app(grid, context(run="r", resume=True))
    assert (tmp_path / "r" / MODEL_FILE).read_bytes() == before


@pytest.mark.parametrize("name", ["../x", "/elsewhere/x", "a/b", ".hidden", "A", "x" * 200, "a\nb"])
def test_a_name_is_no_path(name, grid, tmp_path, monkeypatch):
    monkeypatch.setenv("HUSHREC_OUT", str(tmp_path))
    with pytest.raises(UsageError, match="must be small letters"):
        app(grid, context(run=name))
    assert not list(tmp_path.iterdir())


def test_a_named_run_wants_a_folder_for_runs(grid, monkeypatch):
    monkeypatch.delenv("HUSHREC_OUT", raising=False)
    with pytest.raises(UsageError, match="HUSHREC_OUT"):
        app(grid, context(run="r"))


def test_overrides_count(tmp_path, monkeypatch):
    monkeypatch.setenv("HUSHREC_OUT", str(tmp_path))
    experiment = EXPERIMENT.model_copy(update={"federation": EXPERIMENT.federation.model_copy(update={"rounds": 1})})
    same = InProcessGrid(Device.open(experiment, prepare(experiment.data)), "vectorized")
    app(same, context(overrides="federation.rounds=1"))
    assert [line["round"] for line in read(tmp_path)] == [1, 1]


def test_a_bad_experiment_never_starts(grid):
    with pytest.raises(ConfigError):
        app(grid, context('{"name": "x"}'))
