"""Replies of strangers: whatever is wrong with one, it is left out and named, and the others count as before."""

import io
import pickle

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict

from common.config import FederationConfig
from common.models.weights import Weights
from common.wire import METRICS, UPDATE
from server.aggregation import Explicit, Reply, weigh, weighted_sum
from server.roster import Roster
from server.shard import Terms, admit
from server.strategy import FederatedRanking
from tests.support import world
from tests.support.world import answer

ITEMS, DIM, BODY, POPULATION = 6, 2, 5, 12
ROSTER = Roster(range(world.NODE, world.NODE + POPULATION), ITEMS)
EXPERIMENT = world.experiment(federation={"optimizer": {"kind": "fedadam", "lr": 0.1}})


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def fresh():
    return Weights(torch.from_numpy(numbers(ITEMS, DIM, seed=1)), torch.from_numpy(numbers(BODY, seed=2)))


def update(user, rows=(1, 4), **changed):
    """A sound reply's arrays and metrics; rows None means the whole table."""
    arrays = {
        "table": numbers(ITEMS if rows is None else len(rows), DIM, seed=user),
        "body": numbers(BODY, seed=user + 9),
    }
    if rows is not None:
        arrays["rows"] = rows if isinstance(rows, np.ndarray) else np.array(rows, dtype=np.int32)
    metrics = {"events": user + 1, "loss": 0.5}
    for name, value in changed.items():
        (metrics if name in metrics else arrays)[name] = value
    return {**arrays, "metrics": metrics}


def reply(user=1, without=(), **changed):
    made = update(user, **changed)
    metrics = {name: value for name, value in made.pop("metrics").items() if name not in without}
    return answer(user, metrics=metrics, **{name: value for name, value in made.items() if name not in without})


def planted(values, place, value):
    values = values.copy()
    values.reshape(-1)[place] = value
    return values


def raw(data, **told):
    """A reply whose table is whatever bytes a stranger sent."""
    message = reply()
    description = {"dtype": "float32", "shape": (2, DIM), "stype": "numpy.ndarray", **told}
    message.content.array_records[UPDATE]["table"] = Array(data=data, **description)
    return message


def saved(values, save=np.save):
    buffer = io.BytesIO()
    save(buffer, values)
    return buffer.getvalue()


def header(text):
    return b"\x93NUMPY\x01\x00v\x00" + text.encode().ljust(117) + b"\n"


def with_metrics(**metrics):
    message = reply()
    message.content.metric_records[METRICS] = MetricRecord(metrics)
    return message


TABLE, WIDE, FLAT = numbers(2, DIM), numbers(ITEMS, DIM), numbers(BODY)
BAD = {
    "no update": lambda: answer(1, metrics={"events": 1, "loss": 0.1}, without=(UPDATE,)),
    "no metrics": lambda: answer(1, without=(METRICS,), **{k: v for k, v in update(1).items() if k != "metrics"}),
    "nothing at all": lambda: Message(RecordDict(), reply_to=reply()),
    "no table": lambda: reply(without=("table",)),
    "no body": lambda: reply(without=("body",)),
    "no events": lambda: reply(without=("events",)),
    "no loss": lambda: reply(without=("loss",)),
    "no user": lambda: with_metrics(events=1, loss=0.1),
    "table in double precision": lambda: reply(table=TABLE.astype(np.float64)),
    "table in half precision": lambda: reply(table=TABLE.astype(np.float16)),
    "table of the other byte order": lambda: reply(table=TABLE.astype(">f4")),
    "body of integers": lambda: reply(body=np.zeros(BODY, dtype=np.int32)),
    "body of complex numbers": lambda: reply(body=FLAT.astype(np.complex64)),
    "body of words": lambda: reply(body=np.array(["x"] * BODY)),
    "body too short": lambda: reply(body=FLAT[:-1]),
    "body too long": lambda: reply(body=np.append(FLAT, np.float32(0))),
    "body in one number": lambda: reply(body=np.float32(3).reshape(())),
    "body as a matrix": lambda: reply(body=FLAT.reshape(1, -1)),
    "table too narrow": lambda: reply(table=TABLE[:, :1]),
    "table flat": lambda: reply(table=TABLE.ravel()),
    "table turned over": lambda: reply(rows=[0, 1, 2], table=numbers(DIM, 3)),
    "table in one number": lambda: reply(table=np.float32(3).reshape(())),
    "more rows than numbers": lambda: reply(rows=[1, 2, 3], table=TABLE),
    "fewer rows than numbers": lambda: reply(rows=[1], table=TABLE),
    "part of the table without rows": lambda: reply(without=("rows",)),
    "more than the whole table": lambda: reply(rows=None, table=numbers(ITEMS + 1, DIM)),
    "row beyond the catalogue": lambda: reply(rows=[1, ITEMS]),
    "negative row": lambda: reply(rows=[-1, 1]),
    "row twice": lambda: reply(rows=[4, 4]),
    "rows as fractions": lambda: reply(rows=np.array([1, 4], dtype=np.float32), table=TABLE),
    "rows in 64 bits": lambda: reply(rows=np.array([1, 4], dtype=np.int64), table=TABLE),
    "rows without a sign": lambda: reply(rows=np.array([1, 4], dtype=np.uint32), table=TABLE),
    "rows as a column": lambda: reply(rows=np.array([[1], [4]], dtype=np.int32), table=TABLE),
    "NaN in the table": lambda: reply(table=planted(TABLE, -1, np.nan)),
    "NaN in the body": lambda: reply(body=planted(FLAT, 0, np.nan)),
    "infinity in the table": lambda: reply(table=planted(TABLE, 0, np.inf)),
    "infinities that cancel": lambda: reply(body=planted(planted(FLAT, 0, np.inf), 1, -np.inf)),
    "minus infinity in a whole table": lambda: reply(rows=None, table=planted(WIDE, -1, -np.inf)),
    "1e30 in the table": lambda: reply(table=planted(TABLE, 0, 1e30)),
    "1e30 in the body": lambda: reply(body=planted(FLAT, 2, 1e30)),
    "numbers beyond any honest step": lambda: reply(body=planted(FLAT, 2, 2e6)),
    "numbers that overflow with their weight": lambda: reply(body=planted(FLAT, 2, 3e38), events=1000),
    "large numbers that cancel": lambda: reply(body=planted(planted(FLAT, 0, 1e20), 1, -1e20)),
    "negative events": lambda: reply(events=-1),
    "events in fractions": lambda: reply(events=1.5),
    "NaN events": lambda: reply(events=float("nan")),
    "a list of events": lambda: reply(events=[1, 2]),
    "no end of events": lambda: reply(events=2**62),
    "events beyond any float": lambda: reply(events=10**400),
    "NaN loss": lambda: reply(loss=float("nan")),
    "infinite loss": lambda: reply(loss=float("inf")),
    "loss beyond any float": lambda: reply(loss=10**400),
    "a list of losses": lambda: reply(loss=[0.1]),
    "user as a fraction": lambda: with_metrics(user=1.0, events=1, loss=0.1),
    "user as a list": lambda: with_metrics(user=[1], events=1, loss=0.1),
    "someone else's user": lambda: with_metrics(user=2, events=1, loss=0.1),
    "nobody's user": lambda: with_metrics(user=POPULATION, events=1, loss=0.1),
    "negative user": lambda: with_metrics(user=-1, events=1, loss=0.1),
    "from another node": lambda: answer(1, node=99, **update(1)),
    "an error": lambda: answer(1, error="no battery"),
    "an error without a reason": lambda: answer(1, error=""),
    "no bytes": lambda: raw(b""),
    "bytes that are no array": lambda: raw(b"hello, I am a table"),
    "half an array": lambda: raw(saved(TABLE)[:-3]),
    "half a header": lambda: raw(saved(TABLE)[:20]),
    "an archive": lambda: raw(saved(TABLE, np.savez)),
    "a broken archive": lambda: raw(b"PK\x03\x04 no archive"),
    "a pickle": lambda: raw(pickle.dumps(TABLE)),
    "an array of objects": lambda: raw(
        saved(np.array([{}, {}], dtype=object), lambda b, v: np.save(b, v, allow_pickle=True))
    ),
    "a header that is no Python": lambda: raw(header("((((((")),
    "a header of a huge array": lambda: raw(header("{'descr': '<f4', 'fortran_order': False, 'shape': (10**15,), }")),
    "a header of a vast array": lambda: raw(
        header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({10**15},), }}")
    ),
    "a header beyond integers": lambda: raw(
        header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({10**30},), }}")
    ),
    "a future format": lambda: raw(b"\x93NUMPY\x09\x00v\x00"),
    "another serialisation": lambda: raw(saved(TABLE), stype="torch.tensor"),
}


def aggregated(messages):
    strategy = FederatedRanking(EXPERIMENT, ROSTER, fresh())
    _, metrics = strategy.aggregate_train(1, messages)
    return strategy.weights, dict(metrics), strategy.rejections


# --- one bad reply ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", BAD)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_bad_reply_is_left_out_and_named_and_the_others_count(fault):
    weights, metrics, rejections = aggregated([reply(0), BAD[fault](), reply(3)])
    alone, expected, none = aggregated([reply(0), reply(3)])
    assert world.same(weights, alone)
    assert none == {}
    assert (metrics.pop("rejected"), expected.pop("rejected")) == (1, 0)
    assert metrics == expected
    ((reason, count),) = rejections.items()
    assert count == 1
    assert len(reason) > 8


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("no table", "malformed: KeyError"),
        ("a broken archive", "malformed: BadZipFile"),
        ("table in double precision", "wrong dtype"),
        ("body too short", "wrong shape"),
        ("row twice", "item rows outside the catalogue or repeated"),
        ("NaN in the body", "not finite"),
        ("1e30 in the body", "too large"),
        ("negative events", "impossible event count or loss"),
        ("someone else's user", "speaks for a user of another node"),
        ("an error", "refused: no battery"),
        ("an error without a reason", "refused: no reason given"),
    ],
)
def test_the_reason_says_what_is_wrong(fault, reason):
    assert reason in next(iter(aggregated([BAD[fault]()])[2]))


@pytest.mark.parametrize("fault", BAD)
def test_with_none_but_a_bad_reply_the_model_stays(fault):
    weights, metrics, _ = aggregated([BAD[fault]()])
    assert world.same(weights, fresh())
    assert metrics == {"clients": 0, "rejected": 1}


def test_a_second_reply_of_one_user_is_left_out():
    weights, metrics, rejections = aggregated([reply(1), reply(2), reply(1, body=2 * FLAT)])
    assert world.same(weights, aggregated([reply(1), reply(2)])[0])
    assert rejections == {"second reply of one user": 1}
    assert metrics["clients"] == 2


def test_reasons_are_counted():
    bad = [BAD["no table"](), BAD["no body"](), BAD["NaN in the body"]()]
    assert sorted(aggregated(bad)[2].values()) == [1, 2]


def test_a_sound_reply_is_read_as_it_was_meant():
    (found,), rejected = admit([reply(2, rows=[5, 0])], Terms(fresh(), ROSTER, FederationConfig()))
    assert not rejected
    assert (found.user, found.events, found.loss, found.update.rows.tolist()) == (2, 3, 0.5, [5, 0])
    np.testing.assert_array_equal(found.update.table, numbers(2, DIM, seed=2))
    np.testing.assert_array_equal(found.update.body, numbers(BODY, seed=11))
    assert found.bytes == 4 * (2 * DIM + BODY + 2)
    (dense,), _ = admit([reply(2, rows=None)], Terms(fresh(), ROSTER, FederationConfig()))
    assert dense.update.rows is None
    assert dense.bytes == 4 * (ITEMS * DIM + BODY)


def test_no_rows_at_all_are_sound():
    (found,), rejected = admit([reply(1, rows=[])], Terms(fresh(), ROSTER, FederationConfig()))
    assert (len(found.update.rows), not rejected) == (0, True)


def test_large_but_possible_updates_pass():
    assert aggregated([reply(1, body=np.full(BODY, 1e4, dtype=np.float32), events=10**6)])[2] == {}


# --- the mean --------------------------------------------------------------------------------------------------------


def made(user, events, table, body, rows=None):
    table, body = np.array(table, dtype=np.float32), np.array(body, dtype=np.float32)
    return Reply(user, events, 0.0, Explicit(table, body, None if rows is None else np.array(rows, dtype=np.int32)), 0)


def test_weights_by_events_or_uniform():
    replies = [made(0, 3, [], []), made(1, 0, [], []), made(2, 7, [], [])]
    assert weigh(replies, FederationConfig(weighting="events")).tolist() == [3, 0, 7]
    assert weigh(replies, FederationConfig(weighting="uniform")).tolist() == [1, 1, 1]
    assert weigh([], FederationConfig()).tolist() == []


def test_a_weighted_sum_by_hand():
    weights = Weights(torch.zeros(3, 1), torch.zeros(2))
    replies = [
        made(0, 1, [[1], [2]], [1, 10], rows=[2, 0]),
        made(1, 3, [[5], [6], [7]], [2, 20]),
        made(2, 2, [[100]], [0, 1], rows=[2]),
    ]
    total = weighted_sum(replies, np.array([1, 3, 2], dtype=np.float32), weights)
    assert total.body.tolist() == [1 + 6, 10 + 60 + 2]
    assert total.table.tolist() == [[2 + 15], [18], [1 + 21 + 200]]
    assert replies[0].update.table.tolist() == [[1], [2]]  # nobody wrote into what arrived


@pytest.mark.parametrize("weighting", ["events", "uniform"])
def test_the_mean_by_hand(weighting):
    experiment = world.experiment(federation={"weighting": weighting, "optimizer": {"kind": "fedavg"}})
    strategy = FederatedRanking(experiment, ROSTER, Weights(torch.zeros(ITEMS, DIM), torch.zeros(BODY)))
    first = reply(
        0, rows=[1], table=np.ones((1, DIM), dtype=np.float32), body=np.ones(BODY, dtype=np.float32), events=1, loss=1.0
    )
    second = reply(
        1,
        rows=[1],
        table=2 * np.ones((1, DIM), dtype=np.float32),
        body=5 * np.ones(BODY, dtype=np.float32),
        events=3,
        loss=2.0,
    )
    _, metrics = strategy.aggregate_train(1, [first, second])
    expected = {"events": (7 / 4, 4.0, 1.75), "uniform": (1.5, 3.0, 1.5)}[weighting]
    assert strategy.weights.table[:, 0].tolist() == [0, expected[0], 0, 0, 0, 0]
    assert strategy.weights.body.tolist() == [expected[1]] * BODY
    assert metrics == {"clients": 2, "rejected": 0, "loss": expected[2], "bytes_up_per_client": 4 * (DIM + BODY + 1)}


def test_sparse_and_dense_replies_mean_the_same():
    weights, importance = fresh(), np.array([2, 1, 4], dtype=np.float32)
    sparse = [
        made(user, 1, numbers(3, DIM, seed=user), numbers(BODY, seed=user), rows=[5, user, 3]) for user in range(3)
    ]
    dense = []
    for each in sparse:
        table = np.zeros((ITEMS, DIM), dtype=np.float32)
        table[each.update.rows] = each.update.table
        dense.append(each._replace(update=Explicit(table, each.update.body, None)))
    expected = weighted_sum(dense, importance, weights)
    for mixed in (sparse, [sparse[0], dense[1], sparse[2]], [dense[0], sparse[1], dense[2]]):
        assert world.gap(weighted_sum(mixed, importance, weights), expected) < 1e-6


@pytest.mark.parametrize("rows", [(1, 4), None])
def test_no_order_of_arrival_changes_a_bit(rows):
    sizes = 10.0 ** (np.arange(POPULATION) % 5)  # so that sums in another order would round otherwise
    replies = [
        reply(user, rows=rows, body=np.float32(sizes[user]) * numbers(BODY, seed=user)) for user in range(POPULATION)
    ]
    expected, metrics, _ = aggregated(replies)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(POPULATION)
        found, same_metrics, _ = aggregated([replies[user] for user in order])
        assert world.same(found, expected)
        assert same_metrics == metrics


def test_replies_without_events_move_nothing():
    weights, metrics, _ = aggregated([reply(0, events=0), reply(1, events=0)])
    assert world.same(weights, fresh())
    assert metrics == {"clients": 2, "rejected": 0}


def test_a_record_that_came_over_a_network_counts_the_same():
    near, far = reply(1), reply(1)
    far.content.array_records[UPDATE] = ArrayRecord(dict(far.content.array_records[UPDATE]))
    assert world.same(aggregated([near])[0], aggregated([far])[0])
