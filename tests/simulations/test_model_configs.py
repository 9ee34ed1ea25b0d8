"""Every file of configs/models loads, differs from the others in what it says, and trains."""

from pathlib import Path

import numpy as np
import pytest

from client.device import Device
from common.config import Experiment
from common.data.prepare import prepare
from common.loading import load
from common.models.attention import MECHANISMS
from server.rounds import serve
from simulations import bench_attention
from simulations.bench_attention import bench_attention as measure
from simulations.engines import play

FOLDER = Path(__file__).parents[2] / "configs" / "models"
FILES = sorted(FOLDER.glob("*.yaml"))
SIZE = {"dim": 8, "blocks": 1, "heads": 2, "max_length": 12}


@pytest.mark.parametrize("path", sorted(FOLDER.parent.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_that_is_shipped_is_valid(path):
    assert load(str(path)).name


def test_there_is_one_for_each_kind():
    models = [load(str(path)).model for path in FILES]
    assert {model.attention.kind for model in models} == MECHANISMS.keys()
    assert {model.encoder for model in models} == {"attention", "gru-attention", "cnn-attention", "gru"}
    assert {model.head for model in models} == {"dot-product", "target"}
    assert len({(model.encoder, model.attention.kind, model.head) for model in models}) == len(FILES)


def test_they_compare_like_with_like():
    """But for the mechanism, the head and the encoder all are the same experiment."""
    own = {"model": {"attention", "encoder", "head", "kernel"}, "name": True}
    first, *others = (load(str(path)).model_dump(exclude=own) for path in FILES)
    assert all(other == first for other in others)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_trains(path):
    given = load(str(path)).model_dump()
    given["data"] = {"kind": "synthetic", "users": 40, "items": 30, "interests": 5, "mean_length": 9}
    given["model"] |= SIZE
    given["federation"] |= {"rounds": 12, "cohort": 20}
    given["federation"]["optimizer"]["lr"] = 0.01
    given["evaluation"]["every"] = 12
    experiment = Experiment.model_validate(given)
    lines = []
    device = Device.open(experiment, prepare(experiment.data))
    outcome = play(device, lambda grid: serve(grid, experiment, None, lines.append))
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.01
    assert np.isfinite(outcome.test[0]).all()


def test_the_cost_of_attention_is_measured_for_each(monkeypatch):
    monkeypatch.setattr(bench_attention, "LENGTHS", (3, 9))
    said = []
    costs = measure(2, said.append)
    assert [cost["kind"] for cost in costs] == list(MECHANISMS)
    assert all(milliseconds > 0 for cost in costs for milliseconds in cost["milliseconds"].values())
    assert said == ["histories of 3", "histories of 9"]
    monkeypatch.setattr(bench_attention, "ENOUGH", 0.0)
    assert all(cost["milliseconds"][9] is None for cost in measure(1, said.append))
