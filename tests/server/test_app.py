"""The ServerApp: thin, so that the run config and the environment are all there is to see."""

import ast
import logging

import pytest
from flwr.app import Context, RecordDict

from client.device import Device
from common.data.prepare import prepare
from common.errors import ConfigError
from server import app as module
from server.app import app
from server.journal import read
from server.rounds import MODEL_FILE
from simulations.grid import InProcessGrid
from tests.support import world

EXPERIMENT = world.experiment(federation={"rounds": 2, "cohort": 4})


def context(experiment=None, overrides=""):
    text = EXPERIMENT.model_dump_json() if experiment is None else experiment
    return Context(1, 1, {}, RecordDict(), {"experiment": text, "overrides": overrides})


@pytest.fixture
def grid():
    return InProcessGrid(Device.open(EXPERIMENT, prepare(EXPERIMENT.data)), "vectorized")


def test_a_run_into_the_folder_that_the_environment_names(grid, tmp_path, monkeypatch):
    monkeypatch.setenv("HUSHREC_OUT", str(tmp_path))
    app(grid, context())
    assert [line["kind"] for line in read(tmp_path)] == ["train", "train", "validation"]
    assert (tmp_path / MODEL_FILE).exists()


def test_without_a_folder_it_only_logs(grid, tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("HUSHREC_OUT", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="flwr"):
        app(grid, context())
    assert not list(tmp_path.iterdir())
    said = [ast.literal_eval(text) for text in caplog.messages if text.startswith("{")]
    assert [(line["round"], line["kind"]) for line in said] == [
        (1, "train"),
        (2, "train"),
        (2, "validation"),
        (2, "test"),
    ]
    assert 0 <= said[-1]["ndcg@10"] <= said[-1]["hr@10"] <= 1


def test_overrides_count(tmp_path, monkeypatch):
    monkeypatch.setenv("HUSHREC_OUT", str(tmp_path))
    experiment = EXPERIMENT.model_copy(update={"federation": EXPERIMENT.federation.model_copy(update={"rounds": 1})})
    same = InProcessGrid(Device.open(experiment, prepare(experiment.data)), "vectorized")
    app(same, context(overrides="federation.rounds=1"))
    assert [line["round"] for line in read(tmp_path)] == [1, 1]


def test_a_bad_experiment_never_starts(grid):
    with pytest.raises(ConfigError):
        app(grid, context('{"name": "x"}'))


def test_each_record_is_one_line_of_the_log(grid, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    serve = module.serve

    def talkative(grid, experiment, folder, observe):
        observe({"round": 1, "note": "100 %"})
        return serve(grid, experiment, folder, lambda line: None)

    monkeypatch.setattr(module, "serve", talkative)
    with caplog.at_level(logging.INFO, logger="flwr"):
        app(grid, context())
    assert "{'round': 1, 'note': '100 %'}" in caplog.messages
