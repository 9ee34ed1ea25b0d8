"""Rules that some wrong updates cannot move far: by hand, against Flower's own, and under attack."""

import json
import subprocess
import sys
from typing import get_args

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedMedian, FedTrimmedAvg, Krum, MultiKrum
from flwr.serverapp.strategy.multikrum import compute_distances
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from common.errors import StateError
from common.models.weights import Weights
from common.robustness import AggregationConfig, MeanAggregation
from server import robust
from server.aggregation import Explicit, Reply, check
from server.robust import (
    AGGREGATIONS,
    adaptive_bound,
    is_sparse,
    krum_scores,
    norm_bounded_factors,
    robust_mean,
    squared_distances,
)
from server.roster import Roster
from simulations.grid import FIRST_NODE, InProcessGrid
from tests.support import world

ITEMS, DIM, BODY = 5, 2, 3
SIZE = ITEMS * DIM + BODY
KINDS = [get_args(variant.model_fields["kind"].annotation)[0] for variant in get_args(get_args(AggregationConfig)[0])]
ROBUST = [kind for kind in KINDS if kind != "mean"]
SIZES_AND_SEEDS = st.tuples(st.integers(1, 24), st.integers(0, 2**32 - 1))


def config(kind, **settings):
    return TypeAdapter(AggregationConfig).validate_python({"kind": kind, **settings})


def shape(dim=DIM):
    return Weights(torch.zeros(ITEMS, dim), torch.zeros(BODY))


def replies(vectors):
    """One reply a user, of a row of numbers each: the table's, then the body's."""
    vectors = np.asarray(vectors, dtype=np.float32)
    tables, bodies = vectors[:, :-BODY].reshape(len(vectors), ITEMS, -1), vectors[:, -BODY:]
    updates = [Explicit(table, body, None) for table, body in zip(tables, bodies, strict=True)]
    return [Reply(user, user + 1, 0.5, update, 0) for user, update in enumerate(updates)]


def put_together(vectors, kind, importance=None, **settings):
    """A rule's result as one row of numbers."""
    result = robust_mean(config(kind, **settings), replies(vectors), shape(), importance)
    return torch.cat([part.flatten() for part in result]).numpy()


def draws(users, seed=0, spread=1.0):
    return (np.random.default_rng(seed).standard_normal((users, SIZE)) * spread).astype(np.float32)


def each(*values):
    """Users whose numbers are all the same."""
    return np.repeat(np.array(values, dtype=np.float32)[:, None], SIZE, axis=1)


@pytest.fixture(params=[7, 500_000], ids=["many blocks", "one block"])
def _blocks(request, monkeypatch):
    monkeypatch.setattr(robust, "BLOCK", request.param)


# --- by hand -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize(
    ("values", "kind", "settings", "expected"),
    [
        ([3, -1, 100], "median", {}, 3),
        ([3, -1, 100, 4], "median", {}, 3.5),
        ([7], "median", {}, 7),
        ([7, 9], "median", {}, 8),
        ([1, 2, 3, 4, 1000], "trimmed-mean", {"trim": 0.2}, 3),
        ([-1000, 2, 6, 4, 1000, 0], "trimmed-mean", {"trim": 0.34}, 3),
        ([1, 2, 3, 1000], "trimmed-mean", {"trim": 0.2}, 251.5),  # a fifth of four is nobody
        ([5], "trimmed-mean", {}, 5),
        ([1.5, 1, 1.125, 1.25, 50], "krum", {"malicious": 1}, 1.125),
        ([1.5, 1, 1.125, 1.25, 50], "krum", {}, 1.125),  # a tenth of five counts as one
        ([4], "krum", {}, 4),
        ([1, 1.5, 1.25, 1.75, 50, 2], "multi-krum", {"malicious": 1, "keep": 0.5}, 1.5),
        ([1, 2, 3, 40], "mean", {}, 11.5),
    ],
)
def test_by_hand(values, kind, settings, expected):
    assert put_together(each(*values), kind, **settings) == pytest.approx(expected, rel=1e-6)


def test_coordinates_are_taken_one_by_one():
    vectors = np.zeros((3, SIZE))
    vectors[:, 0], vectors[:, 4], vectors[:, -1] = [1, 2, 30], [-9, 5, 0], [8, 7, 6]
    found = put_together(vectors, "median")
    assert [found[0], found[4], found[-1]] == [2, 0, 7]
    assert np.count_nonzero(found) == 2


def test_the_mean_weighs_and_the_others_do_not():
    vectors, importance = each(1, 2, 6), np.array([1, 0, 3], dtype=np.float32)
    assert put_together(vectors, "mean", importance) == pytest.approx(19 / 4)
    for kind in ROBUST:
        assert np.array_equal(put_together(vectors, kind, importance), put_together(vectors, kind))


# --- every kind --------------------------------------------------------------------------------------------------


def test_registry_and_variants_agree():
    assert sorted(AGGREGATIONS) == sorted(KINDS)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("users", [1, 2, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_weights_of_its_own_and_leaves_the_updates_alone(kind, users):
    vectors = draws(users)
    given_, before = replies(vectors), vectors.copy()
    weights = shape()
    result = robust_mean(config(kind), given_, weights)
    assert [part.shape for part in result] == [part.shape for part in weights]
    assert all(part.dtype == torch.float32 and torch.isfinite(part).all() for part in result)
    for part in result:
        part.fill_(5)
    assert np.array_equal(vectors, before)
    assert not any(part.any() for part in weights)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_updates_are_what_comes_out(kind):
    vector = draws(1)
    assert put_together(np.repeat(vector, 7, axis=0), kind) == pytest.approx(vector[0], rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_no_updates_are_refused(kind):
    with pytest.raises(ValueError, match="no updates"):
        robust_mean(config(kind), [], shape())


def test_a_mean_of_no_weight_is_refused():
    with pytest.raises(ValueError, match="no updates"):
        put_together(each(1, 2), "mean", np.zeros(2, dtype=np.float32))


@pytest.mark.parametrize("kind", ROBUST)
def test_sparse_updates_are_refused_by_all_but_the_mean(kind):
    some = replies(each(1, 2, 3))
    update = Explicit(np.ones((2, DIM), dtype=np.float32), np.ones(BODY, dtype=np.float32), np.array([0, 3], np.int32))
    some[1] = some[1]._replace(update=update)
    with pytest.raises(StateError, match=rf"user 1 sent only some rows .* aggregation {kind} .* loss\.kind softmax"):
        robust_mean(config(kind), some, shape())
    assert robust_mean(MeanAggregation(), some, shape()).table[0].tolist() == pytest.approx([5 / 3] * DIM)


@pytest.mark.parametrize("loss", ["softmax", "sampled-softmax"])
@pytest.mark.parametrize("steps", [1, 2])
def test_updates_that_wait_in_this_process_count_like_sent_ones(loss, steps):
    experiment = world.experiment(loss=world.LOSSES[loss], federation={"local": {"lr": 0.3, "steps": steps}})
    histories = world.random_histories([3, 5, 8, 9, 12], items=ITEMS)
    device = world.device(experiment, world.sequences(histories, held_out=False), ITEMS)
    weights = world.weights(experiment.model, ITEMS)
    asked = world.ask("train", experiment, weights, range(len(histories)))
    roster = Roster(range(FIRST_NODE, FIRST_NODE + len(histories)), ITEMS)
    messages = InProcessGrid(device, "vectorized").send_and_receive(asked)
    waiting = [check(message, weights, roster) for message in messages]
    assert not any(isinstance(reply.update, Explicit) for reply in waiting)
    if loss != "softmax":
        assert all(is_sparse(reply) for reply in waiting)
        with pytest.raises(StateError, match="some rows"):
            robust_mean(config("median"), waiting, weights)
        return
    assert not any(is_sparse(reply) for reply in waiting)
    ones = [source.one(i) for source, i in (reply.update for reply in waiting)]
    sent = [
        reply._replace(update=Explicit(one.table.numpy(), one.body.numpy(), None))
        for reply, one in zip(waiting, ones, strict=True)
    ]
    for kind in KINDS:
        here, there = (robust_mean(config(kind), found, weights) for found in (waiting, sent))
        assert world.same(here, there, atol=1e-7), kind
    for rule, reduce in (("median", np.median), ("mean", np.mean)):
        expected = [reduce(np.stack([one[part].numpy() for one in ones]), axis=0) for part in (0, 1)]
        assert world.same(
            robust_mean(config(rule), waiting, weights), Weights(*map(torch.from_numpy, expected)), atol=1e-6
        )


# --- properties --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ROBUST)
@given(SIZES_AND_SEEDS)
@settings(max_examples=40)
def test_the_order_of_users_does_not_matter(kind, drawn):
    users, seed = drawn
    vectors, order = draws(users, seed), np.random.default_rng(seed + 1).permutation(users)
    if kind in {"median", "trimmed-mean"}:
        assert np.array_equal(put_together(vectors, kind), put_together(vectors[order], kind))
    elif users > 4:  # with one nearest other alone, two users who are that to each other tie
        settings = {"malicious": (users - 4) // 3}
        assert put_together(vectors, kind, **settings) == pytest.approx(
            put_together(vectors[order], kind, **settings), abs=1e-6
        )


ATTACKS = st.sampled_from([1e30, -1e30, 1e6, 0.0, 3.0])


@pytest.mark.parametrize("kind", ["median", "trimmed-mean"])
@given(SIZES_AND_SEEDS, st.floats(0.05, 0.49), st.data())
@settings(max_examples=60)
def test_attackers_cannot_leave_the_honest_range(kind, drawn, trim, data):
    users, seed = drawn
    rule = {"kind": kind} | ({"trim": trim} if kind == "trimmed-mean" else {})
    attackers = data.draw(st.integers(0, config(**rule).tolerates(users)))
    vectors = draws(users, seed)
    rows = data.draw(st.permutations(range(users)))[:attackers]
    for row in rows:
        vectors[row] = data.draw(st.lists(ATTACKS, min_size=SIZE, max_size=SIZE))
    honest = np.delete(vectors, rows, axis=0)
    found = put_together(vectors, **rule)
    assert (found >= honest.min(axis=0) - 1e-6).all()
    assert (found <= honest.max(axis=0) + 1e-6).all()


@given(st.integers(0, 6), st.integers(0, 9), st.integers(0, 2**32 - 1), st.sampled_from([1e3, 1e6, 1e30]))
@settings(max_examples=60)
def test_krum_gives_an_honest_update_and_multi_krum_a_mean_of_some(attackers, more, seed, far):
    users = 2 * attackers + 3 + more
    vectors = draws(users, seed)
    rng = np.random.default_rng(seed + 1)
    rows = rng.permutation(users)[:attackers]
    vectors[rows] = far * rng.choice([-1, 1], (attackers, 1)) * (1 + draws(attackers, seed + 2, 0.01))
    honest = np.delete(vectors, rows, axis=0)
    assert config("krum", malicious=attackers).tolerates(users) == attackers
    found = put_together(vectors, "krum", malicious=attackers)
    assert (honest == found).all(axis=1).any()
    found = put_together(vectors, "multi-krum", malicious=attackers, keep=1.0)
    assert (found >= honest.min(axis=0) - 1e-6).all()
    assert (found <= honest.max(axis=0) + 1e-6).all()


def test_one_attacker_carries_the_mean_away():
    vectors = draws(9)
    vectors[4] = 1e6
    assert (put_together(vectors, "mean") > 1e5).all()
    for kind in ROBUST:
        assert (abs(put_together(vectors, kind)) < 4).all()


# --- against Flower ----------------------------------------------------------------------------------------------


def flowers(strategy, vectors):
    """What a strategy of Flower makes of the same updates, every user counting the same."""
    world.identify()
    question = Message(RecordDict(), 1, "train")
    contents = [
        RecordDict({"arrays": ArrayRecord({"all": Array(row)}), "metrics": MetricRecord({"num-examples": 1})})
        for row in vectors
    ]
    arrays, _ = strategy.aggregate_train(1, [Message(content, reply_to=question) for content in contents])
    return arrays["all"].numpy()


@pytest.mark.parametrize("users", [1, 6, 8, 11])  # not where n − f − 2 is one: two nearest users tie then
@pytest.mark.parametrize(
    ("strategy", "rule"),
    [
        (lambda users: FedMedian(), {"kind": "median"}),
        (lambda users: FedTrimmedAvg(beta=0.2), {"kind": "trimmed-mean"}),
        (lambda users: FedTrimmedAvg(beta=0.37), {"kind": "trimmed-mean", "trim": 0.37}),
        (lambda users: Krum(num_malicious_nodes=0), {"kind": "krum", "malicious": 0}),
        (lambda users: Krum(num_malicious_nodes=2), {"kind": "krum", "malicious": 2}),
        (
            lambda users: MultiKrum(
                num_malicious_nodes=1,
                num_nodes_to_select=config("multi-krum", malicious=1, keep=0.6).kept(users),
            ),
            {"kind": "multi-krum", "malicious": 1, "keep": 0.6},
        ),
    ],
    ids=["median", "trimmed", "trimmed more", "krum 0", "krum 2", "multi-krum"],
)
def test_the_same_as_flowers_own(strategy, rule, users):
    for seed in range(5):
        vectors = draws(users, seed)
        expected = flowers(strategy(users), vectors.astype(np.float64))
        assert put_together(vectors, **rule) == pytest.approx(expected, abs=1e-6)


@pytest.mark.usefixtures("_blocks")
def test_distances_are_those_between_the_users():
    vectors = draws(6)
    expected = ((vectors[:, None].astype(np.float64) - vectors) ** 2).sum(-1)
    assert squared_distances(replies(vectors)) == pytest.approx(expected, abs=1e-12)


def test_distances_survive_what_the_updates_share():
    """Flower's own, in single precision, do not: the reason that they are not used."""
    vectors = (1000 + draws(8, spread=1e-2)).astype(np.float32)
    expected = ((vectors[:, None].astype(np.float64) - vectors) ** 2).sum(-1)
    assert squared_distances(replies(vectors)) == pytest.approx(expected, rel=1e-3, abs=1e-7)
    flower = compute_distances([ArrayRecord({"all": Array(row)}) for row in vectors])
    assert abs(flower - expected).max() > expected.max()


def test_scores_sum_the_nearest():
    distances = np.array([[0, 1, 4, 9], [1, 0, 2, 8], [4, 2, 0, 7], [9, 8, 7, 0]], dtype=float)
    assert krum_scores(distances, attackers=0).tolist() == [5, 3, 6, 15]
    assert krum_scores(distances, attackers=1).tolist() == [1, 1, 2, 7]
    assert krum_scores(distances, attackers=9).tolist() == [1, 1, 2, 7]


# --- bounds of norms ---------------------------------------------------------------------------------------------


def test_factors_bound_the_norms():
    norms = np.array([0, 0.5, 2, 8, 1e6, np.inf])
    factors = norm_bounded_factors(norms, 2.0)
    assert factors.dtype == np.float32
    assert factors.tolist() == pytest.approx([1, 1, 1, 0.25, 2e-6, 0], rel=2e-6)
    assert (norms[:-1] * factors[:-1] <= 2).all()


@pytest.mark.parametrize(
    ("norms", "bound"), [([1, 5, 3], 3), ([1, 5, 3, 4], 3.5), ([0, 0, 0, 2], 2), ([0, 0], 0), ([], 0), ([1, 2, 1e6], 2)]
)
def test_the_bound_is_the_median(norms, bound):
    assert adaptive_bound(np.array(norms, dtype=np.float64)) == bound


# --- settings ----------------------------------------------------------------------------------------------------


def test_defaults():
    assert MeanAggregation().kind == "mean"
    assert config("trimmed-mean").trim == 0.2
    assert config("krum").malicious == config("multi-krum").malicious == 0.1


@pytest.mark.parametrize(("text", "value"), [("2", 2), ("0", 0), ("0.25", 0.25), (3, 3), (0.3, 0.3)])
def test_malicious_is_a_count_or_a_share(text, value):
    read = config("krum", malicious=text).malicious
    assert read == value
    assert type(read) is type(value)
    assert config(**json.loads(config("krum", malicious=text).model_dump_json())).malicious == value


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "trimmed-mean", "trim": 0.5},
        {"kind": "trimmed-mean", "trim": 0},
        {"kind": "krum", "malicious": -1},
        {"kind": "krum", "malicious": 0.5},
        {"kind": "krum", "malicious": 1.5},
        {"kind": "multi-krum", "keep": 0},
        {"kind": "multi-krum", "keep": 1.1},
        {"kind": "median", "trim": 0.1},
        {"kind": "bulyan"},
    ],
)
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValidationError):
        config(**wrong)


@pytest.mark.parametrize(
    ("rule", "users", "tolerated"),
    [
        ({"kind": "mean"}, 100, 0),
        ({"kind": "median"}, 7, 3),
        ({"kind": "median"}, 8, 3),
        ({"kind": "median"}, 0, 0),
        ({"kind": "trimmed-mean", "trim": 0.2}, 100, 20),
        ({"kind": "trimmed-mean", "trim": 0.2}, 4, 0),
        ({"kind": "krum", "malicious": 0.07}, 100, 7),
        ({"kind": "krum", "malicious": 4}, 11, 4),
        ({"kind": "krum", "malicious": 4}, 10, 0),
        ({"kind": "multi-krum", "malicious": 0.1}, 5, 1),
        ({"kind": "multi-krum", "malicious": 0.1}, 4, 0),
    ],
)
def test_how_many_are_tolerated(rule, users, tolerated):
    assert config(**rule).tolerates(users) == tolerated


@pytest.mark.parametrize(("users", "kept"), [(100, 80), (10, 7), (5, 2), (1, 1)])
def test_multi_krum_keeps_no_more_than_its_promise_allows(users, kept):
    assert config("multi-krum").kept(users) == kept


def test_the_settings_answer_without_heavy_imports():
    code = "import common.robustness, sys; print({'torch', 'flwr', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
