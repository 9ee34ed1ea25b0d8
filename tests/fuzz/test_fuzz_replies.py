"""Ten thousand forged replies among honest ones: a round ends as if the honest ones had come alone."""

import resource
import time

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from common.files import json_text
from common.models.weights import Weights
from common.wire import METRICS, NO_METRICS, ROUND, UPDATE, assembled
from server.roster import ABSENT, Answer, Roster
from server.strategy import FederatedRanking
from tests.fuzz.forgery import BODY, DIM, ITEMS, NO_NUMBER, REASONS, Draft, forged, honest
from tests.support import world

POPULATION, COHORT, ROUNDS = 300, 40, 110
rng = np.random.default_rng(7)
NODES = rng.permutation(np.arange(2**40, 2**40 + 2 * POPULATION))[:POPULATION].tolist()
GONE = 250  # users from here on have no node
ROSTER = Roster(NODES[:GONE] + [ABSENT] * (POPULATION - GONE), ITEMS)
BAD_A_ROUND = 96


@pytest.fixture(autouse=True)
def _identity():
    world.identify()


def fresh(**federation):
    chosen = {"cohort": COHORT, "optimizer": {"kind": "fedadam", "lr": 0.1}, **federation}
    first = np.random.default_rng(1)
    weights = (torch.from_numpy(first.standard_normal(shape, dtype=np.float32)) for shape in [(ITEMS, DIM), (BODY,)])
    experiment = world.experiment(federation=chosen, evaluation={"cutoffs": (1, 5), "sampled": 9})
    return FederatedRanking(experiment, ROSTER, Weights(*weights))


def cohort(strategy, round_):
    """Users of a round that have a node."""
    sent = strategy.configure_train(round_, strategy.arrays(), ConfigRecord(), None)
    places = {node: user for user, node in enumerate(ROSTER.nodes) if node != ABSENT}
    return [places[message.metadata.dst_node_id] for message in sent if message.metadata.dst_node_id in places]


def bits(weights):
    return [part.numpy().tobytes() for part in weights]


def shuffled(rng, replies):
    return [replies[i] for i in rng.permutation(len(replies))]


def strangers(rng, round_, users):
    """Bad replies to a round, the duplicates of honest ones apart."""
    others = [user for user in range(POPULATION) if user >= GONE or user not in users]
    bad = []
    for user in rng.choice(users, BAD_A_ROUND - 10).tolist():
        bad.append(forged(honest(rng, user, NODES[user], round_), [o for o in others if o != user]).message())
    unasked = rng.choice([user for user in others if user < GONE], 3, replace=False).tolist()
    bad += [honest(rng, user, NODES[user], round_).message() for user in unasked]
    absent = rng.choice(range(GONE, POPULATION), 3).tolist()
    bad += [honest(rng, user, ABSENT, round_).message() for user in absent]
    return bad


def same_metrics(found, expected):
    """Whether two rounds were told alike, but for the number of replies left out."""
    return found.keys() == expected.keys() and all(found[k] == expected[k] for k in found if k != "rejected")


def test_forged_replies_change_no_bit_of_a_round():
    rng, mixed, alone, total, kinds = np.random.default_rng(0), fresh(), fresh(), 0, set()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for round_ in range(1, ROUNDS + 1):
        users = cohort(mixed, round_)
        assert users == cohort(alone, round_)
        drafts = [honest(rng, user, NODES[user], round_) for user in rng.choice(users, 20, replace=False).tolist()]
        good, bad = [draft.message() for draft in drafts], strangers(rng, round_, users)
        again = rng.choice(drafts, 4).tolist()  # the same once more, or another update of the same user
        twice = [d.message() if i < 2 else honest(rng, d.user, d.node, round_).message() for i, d in enumerate(again)]
        _, found = mixed.aggregate_train(round_, [*shuffled(rng, good + bad), *shuffled(rng, twice)])
        _, expected = alone.aggregate_train(round_, shuffled(rng, good))
        count = len(bad) + len(twice)
        assert bits(mixed.weights) == bits(alone.weights)
        assert all(torch.isfinite(part).all() for part in mixed.weights)
        assert (expected["clients"], expected["rejected"], alone.rejections) == (20, 0, {})
        assert same_metrics(dict(found), dict(expected))
        assert found["rejected"] == count == sum(mixed.rejections.values())
        assert all(_fit_for_a_line(reason) for reason in mixed.rejections)
        assert mixed.rejections["second reply of one user"] >= len(twice)
        total, kinds = total + count, kinds | mixed.rejections.keys()
    assert total >= 10_000
    for reason in ("malformed: ", "refused: ", "wrong dtype", "wrong shape", "not finite", "item rows", "speaks for"):
        assert any(kind.startswith(reason) for kind in kinds), reason
    assert {"of another round", "was not asked in this round", "impossible event count or loss"} <= kinds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 400_000, "kilobytes"


def _fit_for_a_line(reason):
    return len(reason) <= 220 and len(reason.splitlines()) <= 1 and "\n" not in json_text({"reasons": {reason: 1}})


def test_none_but_forged_replies_move_nothing():
    rng = np.random.default_rng(1)
    for _ in range(20):
        strategy, before = fresh(), bits(fresh().weights)
        bad = strangers(rng, 1, cohort(strategy, 1))
        _, told = strategy.aggregate_train(1, bad)
        assert bits(strategy.weights) == before
        assert {k: v for k, v in told.items() if k != "absent"} == {"clients": 0, "rejected": len(bad)}


@pytest.mark.parametrize("text", ["x" * 10**7, "ab " * 3_500_000, "\n" * 10**7, "好" * 3_500_000, "\u2028x" * 10**6])
def test_a_reason_of_megabytes_is_cut(text):
    began, strategy = time.monotonic(), fresh()
    strategy.aggregate_train(1, [reply_of(Error(1, text))])
    ((reason, count),) = strategy.rejections.items()
    assert count == 1
    assert _fit_for_a_line(reason)
    assert time.monotonic() - began < 5


def reply_of(content, user=3, kind="train"):
    return Message(content, reply_to=Message(RecordDict(), NODES[user], kind, group_id="1"))


@pytest.mark.parametrize(
    "reason", ["\x1b[2J\x1b[31mred", "a\0b", "\x7f\x08", "\x9b31m", "\u202egnp.exe", "file \udcff", " \n "]
)
def test_a_reason_can_be_printed_and_written(reason):
    strategy = fresh()
    strategy.aggregate_train(1, [reply_of(Error(1, reason))])
    (told,) = strategy.rejections
    assert told.isprintable()
    assert told.removeprefix("refused: ")
    assert json_text(told).encode()


LIES = [(10**400,), (10**30,), (2**63, 4), (-5, 1), (True, 7), (0,), ()]


@pytest.mark.parametrize("shape", LIES)
@pytest.mark.parametrize("name", ["table", "body"])
def test_what_an_array_says_of_itself_is_not_counted(name, shape):
    """Its bytes are sound, and only the shape told beside them isn't."""
    drafts = [honest(np.random.default_rng(user), user, NODES[user], 1) for user in (3, 4, 5)]
    good = [draft.message() for draft in drafts]
    size = np.mean([sum(array.nbytes for array in draft.arrays.values()) for draft in drafts])
    liar = {name: Array(array) for name, array in drafts[1].arrays.items()}
    liar[name].shape = shape
    good[1] = reply_of(RecordDict({UPDATE: ArrayRecord(liar), METRICS: MetricRecord(drafts[1].metrics)}), 4)
    _, told = fresh().aggregate_train(1, good)
    assert told["clients"] == 2 or told["bytes_up_per_client"] == size


@pytest.mark.parametrize("value", [True, False, [True], "x", b"x", None])
def test_flower_itself_takes_no_such_metric(value):
    with pytest.raises(TypeError):
        MetricRecord({"user": value})


SHARED = {
    "more refusals than users": ({}, {"times": [2**31 - 1], "reasons": ["no battery"]}),
    "events beyond any float": ({"events": [10**400, 1]}, {"times": [], "reasons": []}),
}


@pytest.mark.parametrize(("said", "told"), SHARED.values(), ids=SHARED)
def test_a_node_of_several_users_that_exaggerates(said, told):
    roster = Roster(
        [70, 70, 71],
        ITEMS,
        {70: Answer(70, range(2), 3, ITEMS, "c", ITEMS), 71: Answer(71, range(2, 3), 3, ITEMS, "c", ITEMS)},
    )
    strategy = FederatedRanking(world.experiment(), roster, fresh().weights)
    draft = honest(np.random.default_rng(0), 0, 70, 1)
    draft.metrics = {"user": [0, 1], "events": [3, 4], "loss": [0.1, 0.2], **said}
    draft.records[ROUND] = ConfigRecord(told)
    _, metrics = strategy.aggregate_train(1, [draft.message()])
    assert metrics["clients"] + metrics["rejected"] <= 2


# --- ranks -----------------------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
NO_RANK = [NAN, INF, -INF, 0, 0.0, -0.0, 0.999, -1, -3.5, ITEMS + 1, ITEMS + 1e-9, 1e30, 10**400, *NO_NUMBER]
NO_USER = [-1, -POPULATION, POPULATION, 10**9, 2**63, 10**400, 1.0, NAN, *NO_NUMBER]


def ranked(draft, **said):
    """A reply to a ranking."""
    draft.metrics = {"user": draft.user, "rank": float(draft.rng.integers(1, ITEMS + 1)), **said}
    draft.metrics |= {"rank_sampled": float(draft.rng.integers(1, 10))} if "rank_sampled" not in said else {}
    draft.records = {UPDATE: None} | draft.records
    return draft


def misranked(draft, others):
    """A reply that ranks nothing, of nobody, or of somebody else."""
    rng = draft.rng
    kind = int(rng.integers(7))
    draft = ranked(draft, rank=draft.pick(NO_RANK)) if kind < 2 else ranked(draft)
    if kind == 2:
        draft.metrics["user"] = draft.pick([*NO_USER, float(draft.user), *others])
    if kind == 3:
        draft.node = draft.pick([ABSENT, 0, 10**19, draft.node + 2 * POPULATION])
    if kind == 4:
        draft.error = Error(draft.pick([0, 1, 8, 404]), draft.pick(REASONS))
    if kind == 5:
        draft.records[METRICS] = draft.pick([None, MetricRecord(), ConfigRecord({"user": draft.user}), ArrayRecord()])
    if kind == 6:
        draft.metrics["rank_sampled"] = draft.pick(NO_NUMBER)
        draft.metrics["user" if rng.random() < 0.5 else "rank"] = draft.pick(NO_NUMBER)
    return draft


def test_forged_ranks_change_no_figure():
    rng, total = np.random.default_rng(2), 0
    for round_ in range(1, 31):
        mixed, alone = fresh(), fresh()
        users = rng.choice(GONE, 60, replace=False).tolist()
        good = [ranked(Draft(rng, user, NODES[user], round_)).message("evaluate") for user in users]
        others = [user for user in range(POPULATION) if user not in users]
        drafts = [Draft(rng, user, NODES[user], round_) for user in rng.choice(users, 80).tolist()]
        bad = [misranked(draft, others).message("evaluate") for draft in drafts]
        found = mixed.aggregate_evaluate(round_, shuffled(rng, good + bad))
        assert found == alone.aggregate_evaluate(round_, shuffled(rng, good))
        assert all(np.isfinite(value) for value in found.values())
        assert all(_fit_for_a_line(reason) for reason in mixed.rejections)
        assert mixed.asked == len(good) + len(bad)
        assert fresh().aggregate_evaluate(round_, bad) is None
        total += len(bad)
    assert total >= 2_000


def test_forged_sampled_ranks_leave_the_full_ones():
    strategy, values = fresh(), [value for value in NO_RANK if isinstance(value, int | float)]
    said = [{"user": user, "rank": 2.0, "rank_sampled": value} for user, value in enumerate(values)]
    replies = [
        reply_of(RecordDict({METRICS: assembled(NO_METRICS, facts)}), user, "evaluate")
        for user, facts in enumerate(said)
    ]
    full, sampled, _ = strategy.ranks(replies)
    assert full[: len(said)].tolist() == [2.0] * len(said)
    assert np.isnan(sampled).all()
