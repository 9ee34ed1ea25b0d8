"""A device's own file, of data with behaviours, ratings and domains: it trains and ranks as its user does among all."""

import numpy as np
import pytest

from client.device import Device
from client.evaluation import rank
from common.data.extract import extract
from common.data.prepare import prepare
from common.data.sequences import Sequences
from tests.support import records, world

COLUMNS = {"behaviour": "how", "domain": "shop", "rating": "stars"}
TEXT = """user,item,time,how,shop,stars
ann,a,1,view,toy,1.0
ann,b,2,buy,toy,2.0
bob,c,1,buy,game,3.0
ann,c,3,view,game,4.0
ann,c,4,buy,game,5.0
ann,d,5,view,toy,1.5
ann,a,6,buy,toy,2.5
ann,b,7,view,toy,3.5
bob,a,3,buy,toy,4.5
bob,b,2,view,toy,1.0
cat,b,1,buy,toy,2.0
cat,a,2,view,toy,3.0
dan,a,5,view,toy,4.0
dan,c,6,buy,game,5.0
dan,d,7,buy,toy,1.0
"""
COMBINATIONS = [
    {},
    {"target": "buy"},
    {"target": "view", "only": {"domains": ["toy"]}},
    {"target": "buy", "only": {"behaviours": ["buy"]}},
]


def placed(source, **options):
    """An experiment that looks at all that is known, and its devices."""
    path = source("table", "t.csv", TEXT).path
    inputs = [{"kind": "behaviour", "names": ["buy", "view"]}, {"kind": "rating"}, {"kind": "interval"}]
    experiment = world.experiment(
        data={"kind": "table", "path": path, "columns": COLUMNS, **options},
        model={"inputs": inputs, "dropout": 0.3},
        loss=world.LOSSES["sampled-softmax"],
        federation={"local": {"steps": 2, "lr": 0.5}},
    )
    return experiment, prepare(experiment.data)


def assert_alike(experiment, own, whole, users):
    """What these users' devices hold, train and rank."""
    one, many = (Device.open(experiment, folder).sequences for folder in (own, whole))
    mine, theirs = slice(int(one.offsets[0]), int(one.offsets[-1])), slice(*many.offsets[[users[0], users[-1] + 1]])
    for name in ("items", "times", "behaviours", "ratings"):
        assert np.array_equal(getattr(one, name)[mine], getattr(many, name)[theirs])
    assert np.array_equal(one.domains, many.domains)
    for name in ("target", "behaviour_names", "domain_names", "per_second"):
        assert getattr(one, name) == getattr(many, name)
    weights, cohort = world.weights(experiment.model, 4), np.array(users)
    here, there = ([*records.trained(experiment, weights, each, cohort, 3)] for each in (one, many))
    assert [record.user for record in here] == [record.user for record in there]
    for a, b in zip(here, there, strict=True):
        assert np.array_equal(a.rows, b.rows)
        assert world.same(a.weights, b.weights)
        assert (a.events, a.loss) == (b.events, b.loss)
    for split in ("validation", "test"):
        for a, b in zip(*(rank(experiment, weights, each, cohort, split) for each in (one, many)), strict=True):
            np.testing.assert_array_equal(a, b)
    return here


@pytest.mark.parametrize("options", COMBINATIONS)
def test_a_users_own_file_says_the_same(source, options, tmp_path):
    experiment, whole = placed(source, **options)
    moved = 0
    for users in (range(1), range(2, 3), range(1, 4)):
        own = extract(whole, users, tmp_path / f"{users}")
        moved += sum(float(one.weights.body.abs().sum()) > 0 for one in assert_alike(experiment, own, whole, users))
    assert moved


def test_a_user_of_whom_nothing_is_seen_trains_on_nothing(source, tmp_path):
    """Bob and cat have no views of games; among all they are no trouble, nor on devices of their own."""
    experiment, whole = placed(source, target="view", only={"behaviours": ["view"], "domains": ["game"]})
    sequences, weights = Sequences.open(whole), world.weights(experiment.model, 4)
    assert sequences.offsets.tolist() == [0, 1, 1, 1, 1]
    for one in records.trained(experiment, weights, sequences, np.arange(4), 1):
        assert float(one.weights.body.abs().sum()) == one.events == 0
    for users in (range(1), range(2, 3)):
        assert_alike(experiment, extract(whole, users, tmp_path / f"{users}"), whole, users)
