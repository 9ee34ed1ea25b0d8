"""Training on one pool is the federated run in parity mode, chosen by validation in the same way."""

import json
import sys

import numpy as np
import pytest

from client.device import Device
from client.evaluation import Ranking
from common.data.prepare import prepare
from common.errors import UsageError
from common.metrics import point
from server.rounds import serve
from simulations import certify, cli, pooled
from simulations.engines import play
from tests.support import world

DATA = {"kind": "synthetic", "users": 40, "items": 30, "interests": 4, "mean_length": 14, "max_length": 30}


def setup(window="last", **evaluation):
    return world.experiment(
        data=DATA,
        model={"dim": 8, "heads": 2, "blocks": 2, "dropout": 0.2, "max_length": 9},
        federation={"rounds": 8, "cohort": 12, "weighting": "events", "local": {"steps": 1, "window": window}},
        evaluation={"every": 4} | evaluation,
    )


@pytest.mark.parametrize("window", ["last", "random"])
def test_it_is_the_federated_run(window):
    """Two blocks and two heads, so that no two orders of the parameters agree by chance."""
    experiment = setup(window)
    device = Device.open(experiment, prepare(experiment.data))
    lines = []
    outcome = play(device, lambda grid: serve(grid, experiment, None, lines.append))
    result = pooled.train(experiment)
    assert (result["steps"], result["best_step"]) == (8, outcome.best_round)
    found = [line["ndcg@10"] for line in lines if line["kind"] == "validation"]
    assert result["validation"] == pytest.approx(max(found), abs=1e-9)
    assert result["test"] == pytest.approx(point(outcome.test[0], [10]), abs=1e-9)


def test_parity_mode_keeps_the_window():
    assert certify.parity_mode(setup("random")).federation.local.window == "random"


@pytest.mark.parametrize(("ranks", "steps", "best"), [([9, 5, 7, 7, 7], 5, 2), ([9, 8, 7, 6, 5], 8, 8)])
def test_validation_chooses_and_patience_ends_it(monkeypatch, ranks, steps, best):
    found = iter([*ranks, *[1] * 9])

    def ranker(experiment, weights, sequences, users, split):
        none = np.full(len(users), np.nan)
        return Ranking(np.full(len(users), float(next(found))), none, none)

    monkeypatch.setattr(pooled, "rank", ranker)
    result = pooled.train(setup(every=1 if steps < 8 else 2, patience=3))
    assert (result["steps"], result["best_step"]) == (steps, best)


def test_a_loss_that_the_loop_does_not_know_is_refused():
    with pytest.raises(UsageError, match=r"loss\.kind=gbce"):
        pooled.train(world.experiment(data=DATA, loss={"kind": "gbce", "negatives": 4}))


@pytest.mark.parametrize("as_json", [True, False])
def test_the_command(as_json, tmp_path, monkeypatch, capsys):
    path = tmp_path / "x.yaml"
    path.write_text(
        f"name: x\ndata: {json.dumps(DATA)}\nfederation: {{rounds: 2, cohort: 5}}\nevaluation: {{every: 2}}\n"
    )
    monkeypatch.setattr(sys, "argv", ["hushrec", "pooled", str(path), *["--json"] * as_json])
    assert cli._exit_code() == 0
    out, err = capsys.readouterr()
    assert "step 2/2" in err
    if as_json:
        assert json.loads(out).keys() == {"steps", "best_step", "validation", "test"}
    else:
        assert "NDCG@10" in out
