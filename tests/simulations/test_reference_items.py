"""Items built from features a second time, by whole matrices; and what certifies that training builds the same."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from client import problem
from common.data import itemrows
from common.data.holdout import cold_of
from common.data.prepare import prepare
from common.errors import UsageError
from common.loading import parse
from common.models import items as built
from common.models.items import Mixture, mixture_of
from simulations import certify, pooled, reference_items
from simulations.reference_items import Items
from tests.support.certifying import few

ROUNDS, FUSIONS = 5, ("sum", "concatenation", "gate")
SGD = "weights after one step of plain SGD: federated = centralised"
RANKS = "test ndcg@10: federated = centralised"
CASES = [("features", fusion) for fusion in FUSIONS] + [("both", fusion) for fusion in FUSIONS]
EACH = pytest.mark.parametrize(("items", "fusion"), CASES)


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Items of one genre or two, some of none, with a year."""
    folder = tmp_path_factory.mktemp("films")
    rng = np.random.default_rng(0)
    lines = [f"{u},{i},{t}" for u in range(40) for t, i in enumerate(rng.choice(20, rng.integers(3, 12), False))]
    (folder / "events.csv").write_text("user,item,time\n" + "\n".join(lines) + "\n")
    rows = [f"{i},{('Crime|Noir', 'Western', '')[i % 3]},{1950 + i}" for i in range(20)]
    (folder / "about.csv").write_text("item,genres,year\n" + "\n".join(rows) + "\n")
    return folder


def setup(films, items, fusion, cold=0.0, loss="softmax"):
    return parse(f"""
name: films
data:
  kind: table
  path: {films}/events.csv
  cold: {cold}
  cold_seed: 3
  features:
    source: {films}/about.csv
    columns: [{{kind: categorical, name: genres, separator: "|"}}, {{kind: numeric, name: year}}]
model: {{dim: 8, blocks: 1, heads: 2, max_length: 6, dropout: 0.2, items: {items}, fusion: {fusion}}}
loss: {json.dumps({"kind": loss} | ({"negatives": 7} if loss == "sampled-softmax" else {}))}
federation: {{cohort: 20, optimizer: {{kind: fedadam, lr: 0.003}}}}
""")


def certified(monkeypatch, experiment):
    few(monkeypatch, ROUNDS, 10)
    return {check.name: check for check in certify.certify(experiment)}


@EACH
def test_the_same_vectors(films, items, fusion):
    experiment = setup(films, items, fusion, cold=0.2)
    folder = prepare(experiment.data)
    mixture = mixture_of(experiment, folder)
    other = Items(experiment.model, 20, itemrows.load(folder), cold_of(experiment.data, 20))
    assert other.weight.shape == (mixture.rows, 8)
    table = torch.randn(mixture.rows, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        other.weight.copy_(table)
        torch.testing.assert_close(other(), mixture.vectors(table), rtol=1e-5, atol=1e-6)


@EACH
@pytest.mark.parametrize("loss", ["softmax", "sampled-softmax"])
def test_the_certificate_holds(films, items, fusion, loss, monkeypatch):
    checks = certified(monkeypatch, setup(films, items, fusion, cold=0.2 if loss == "softmax" else 0.0, loss=loss))
    assert [name for name, check in checks.items() if not check.passed] == []


def test_new_items_are_no_negatives_in_either(films, monkeypatch):
    checks = certified(monkeypatch, setup(films, "both", "sum", cold=0.3, loss="sampled-softmax"))
    assert [name for name, check in checks.items() if not check.passed] == []


BUGS = {
    "half a gradient": (
        built._Times,
        "backward",
        lambda whole: staticmethod(lambda ctx, x: (whole(ctx, x)[0] / 2, None, None)),
        "sum",
    ),
    "columns of others": (
        Mixture,
        "columns",
        lambda whole: lambda self, dim: whole(self, dim).flip(1),
        "concatenation",
    ),
    "gates of others": (
        Mixture,
        "_weights",
        lambda whole: lambda self, x, gates: whole(self, x, gates.flip(0)),
        "gate",
    ),
    "new items' own rows": (built, "cold_items", lambda whole: lambda size, *_: whole(size, 0.0, 0), "sum"),
    "new items as rivals": (problem, "cold_of", lambda whole: lambda data, size: np.zeros(0, dtype=np.int64), "sum"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_seen(films, bug, monkeypatch):
    """All engines have it, so that no comparison of theirs would tell."""
    owner, name, other, fusion = BUGS[bug]
    monkeypatch.setattr(owner, name, other(getattr(owner, name)))
    built._mixture.cache_clear()
    try:
        checks = certified(monkeypatch, setup(films, "both", fusion, cold=0.2))
        assert not checks[RANKS if bug == "new items' own rows" else SGD].passed  # no training ever touches these
    finally:
        built._mixture.cache_clear()


def test_nothing_of_what_it_judges_is_in_it():
    names = {
        node.module
        for node in ast.walk(ast.parse(Path(reference_items.__file__).read_text()))
        if isinstance(node, ast.ImportFrom)
    }
    ours = {name for name in names if name.split(".")[0] in {"client", "common", "server", "simulations"}}
    assert ours == {"common.data.itemrows", "common.models.schema"}


def test_rows_that_are_left_away_are_refused(films):
    experiment = setup(films, "both", "sum")
    dropping = experiment.model_copy(update={"model": experiment.model.model_copy(update={"own_dropout": 0.5})})
    for command in (certify.certify, pooled.train):
        with pytest.raises(UsageError, match=r"model\.own_dropout"):
            command(dropping)


def test_pooled_training_of_built_items(films):
    experiment = setup(films, "both", "sum").model_copy(deep=True)
    found = pooled.train(certify.altered(experiment, federation={"rounds": 2}, evaluation={"every": 1}))
    assert found["steps"] == 2
