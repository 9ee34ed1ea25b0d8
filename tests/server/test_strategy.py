"""What the server says, and what it makes of ranks; aggregation has a file of its own."""

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from common.config import experiment_hash
from common.metrics import Ranking, point
from common.wire import METRICS, MODEL, ROUND, unpack
from server.roster import Roster
from server.sampling import cohort, some_users
from server.strategy import FederatedRanking
from tests.support import world

ITEMS, POPULATION = 9, 12
ROSTER = Roster([100 - user for user in range(POPULATION)], ITEMS)


@pytest.fixture(autouse=True)
def _identity():
    world.identify()


def made(**sections):
    experiment = world.experiment(**{"federation": {"cohort": 5}, **sections})
    return FederatedRanking(experiment, ROSTER, world.weights(experiment.model, ITEMS))


def rank_reply(user, node=None, **said):
    question = Message(RecordDict(), ROSTER.nodes[user] if node is None else node, "evaluate")
    return Message(RecordDict({METRICS: MetricRecord({"user": user, **said})}), reply_to=question)


# --- what it says ----------------------------------------------------------------------------------------------------


def test_a_round_addresses_its_cohort():
    strategy = made()
    sent = list(strategy.configure_train(7, strategy.arrays(), ConfigRecord(), None))
    users = cohort(strategy.experiment.federation, POPULATION, strategy.experiment.seed, 7)
    assert [message.metadata.dst_node_id for message in sent] == [100 - user for user in users]
    content = sent[0].content
    assert all(message.content is content for message in sent)
    assert content.config_records[ROUND] == {"round": 7, "experiment": experiment_hash(strategy.experiment)}
    assert world.same(unpack(content.array_records[MODEL]), strategy.weights)
    assert list(content.array_records[MODEL]) == ["table", "body"]


def test_weights_travel_as_they_are_now():
    strategy = made()
    strategy.arrays()["body"].data  # noqa: B018 - serialised once, which must not be what travels later
    strategy.weights.body[0] = 42
    assert float(unpack(strategy.arrays()).body[0]) == 42


@pytest.mark.parametrize("users", [None, 4, 12, 50])
def test_validation_and_test_may_ask_a_part(users):
    strategy = made(evaluation={"users": users, "test_users": users and users + 1})

    def asked(round_, split):
        config = ConfigRecord({"split": split})
        sent = list(strategy.configure_evaluate(round_, strategy.arrays(), config, None))
        assert all(message.content.config_records[ROUND]["split"] == split for message in sent)
        return [100 - message.metadata.dst_node_id for message in sent]

    wanted = some_users(users and users + 1, POPULATION, strategy.experiment.seed, "test-users", 0).tolist()
    assert asked(3, "test") == asked(4, "test") == wanted
    assert (
        asked(3, "validation")
        == some_users(users, POPULATION, strategy.experiment.seed, "validation-users", 3).tolist()
    )
    assert len(asked(3, "validation")) == min(users or POPULATION, POPULATION)


def test_what_a_round_costs_a_client():
    strategy = made()
    assert strategy.bytes_down() == 4 * (ITEMS * 8 + len(strategy.weights.body))


# --- ranks -----------------------------------------------------------------------------------------------------------


def test_ranks_by_user():
    strategy = made(evaluation={"sampled": 5})
    first = rank_reply(0, rank=9.0, rank_personal=4.0)
    replies = [rank_reply(3, rank=2.5, rank_sampled=1.0), first, rank_reply(1), rank_reply(2, rank=1)]
    full, sampled, personal = strategy.ranks(replies)
    np.testing.assert_array_equal(full, [9, np.nan, 1, 2.5] + [np.nan] * 8)
    np.testing.assert_array_equal(sampled, [np.nan] * 3 + [1] + [np.nan] * 8)
    np.testing.assert_array_equal(personal, [4] + [np.nan] * 11)


BAD = {
    "error": lambda: Message(world.answer(5, error="no").error, reply_to=rank_reply(5)),
    "someone else's user": lambda: rank_reply(5, node=100, rank=1.0, rank_sampled=1.0),
    "nobody": lambda: rank_reply(5, node=88, rank=1.0),
    "rank 0": lambda: rank_reply(5, rank=0.0, rank_sampled=1.0),
    "negative rank": lambda: rank_reply(5, rank=-3.0, rank_sampled=1.0),
    "rank beyond the catalogue": lambda: rank_reply(5, rank=ITEMS + 1.0, rank_sampled=1.0),
    "NaN rank": lambda: rank_reply(5, rank=float("nan"), rank_sampled=1.0),
    "infinite rank": lambda: rank_reply(5, rank=float("inf"), rank_sampled=1.0),
    "list": lambda: rank_reply(5, rank=[1.0], rank_sampled=1.0),
    "nothing": lambda: Message(RecordDict(), reply_to=rank_reply(5)),
    "no user": lambda: Message(RecordDict({METRICS: MetricRecord({"rank": 1.0})}), reply_to=rank_reply(5)),
    "user as a fraction": lambda: rank_reply(5.0, node=95, rank=1.0),
}


@pytest.mark.parametrize("fault", BAD)
def test_an_impossible_reply_is_no_rank(fault):
    strategy = made(evaluation={"sampled": 5})
    full, sampled, personal = strategy.ranks([rank_reply(0, rank=2.0, rank_sampled=2.0), BAD[fault]()])
    np.testing.assert_array_equal(full, [2] + [np.nan] * 11)
    np.testing.assert_array_equal(sampled, [2] + [np.nan] * 11)
    assert np.isnan(personal).all()


@pytest.mark.parametrize("value", [0.5, -1.0, 0, float("nan"), float("inf"), ITEMS + 1.0, [1.0]])
def test_an_impossible_sampled_rank_does_not_end_the_run(value):
    strategy = made(evaluation={"sampled": 5})
    ranks = strategy.ranks([rank_reply(0, rank=2.0, rank_sampled=value, rank_personal=value)])
    assert ranks.full[0] == 2
    assert np.isnan(ranks.sampled).all()
    assert np.isnan(ranks.personal).all()
    assert np.isnan(strategy.quality(ranks, 1)["hr@10|s5"])


def test_quality():
    strategy = made(evaluation={"cutoffs": (1, 3), "sampled": 5})
    full, sampled, none = np.array([1.0, 2.0, np.nan]), np.array([1.0, 1.0, np.nan]), np.full(3, np.nan)
    figures = strategy.quality(Ranking(full, sampled, none), 1)
    assert figures == point(full, [1, 3, 10]) | {f"{k}|s5": v for k, v in point(sampled, [1, 3, 10]).items()}
    assert (figures["hr@1"], figures["hr@1|s5"]) == (0.5, 1)
    assert "hr@10|s5" not in made().quality(Ranking(full, sampled, none), 1)
    personal = strategy.quality(Ranking(full, sampled, sampled), 1)
    assert personal == figures | {f"{k}|personal": v for k, v in point(sampled, [1, 3, 10]).items()}


def test_evaluation_without_ranks_says_nothing():
    strategy = made()
    assert strategy.aggregate_evaluate(1, []) is None
    assert strategy.aggregate_evaluate(1, [rank_reply(2)]) is None
    assert strategy.aggregate_evaluate(1, [rank_reply(2, rank=1.0)])["hr@10"] == 1
