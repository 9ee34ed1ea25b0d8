"""Messages in, replies out: who is refused and why, order, and that the ClientApp does the same one by one."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict

from client import device as devices
from client import training
from client.app import app
from client.cohort import train
from client.device import PARTITION, Device, user_of
from client.evaluation import rank
from client.handlers import HANDLERS, handle_evaluate, handle_query, handle_train
from client.training import Updates
from common.data.prepare import prepare
from common.errors import DataError, UsageError
from common.models.weights import Weights
from common.wire import METRICS, REFUSED, ROUND, UPDATE, pending_of
from tests.support import records, world

ITEMS = 20
HISTORIES = world.random_histories([1, 4, 6, 9, 12], ITEMS)
USERS = list(range(len(HISTORIES)))


@pytest.fixture
def here():
    """An experiment, weights, and a device that plays all users."""
    return placed()


def placed(histories=HISTORIES, **sections):
    experiment = world.experiment(loss=world.LOSSES["sampled-softmax"], **sections)
    device = world.device(experiment, world.sequences(histories), ITEMS)
    return SimpleNamespace(experiment=experiment, weights=world.weights(experiment.model, ITEMS), device=device)


def ask(here, kind, users=USERS, **config):
    if kind == "evaluate":
        config = {"split": "test", **config}
    return world.ask(kind, here.experiment, here.weights, users, **config)


def said(reply):
    """What a reply says, in comparable form."""
    if reply.has_error():
        return reply.error.code, reply.error.reason
    arrays = reply.content.array_records.get(UPDATE, {})
    return dict(reply.content.metric_records[METRICS]), {name: value.numpy().tolist() for name, value in arrays.items()}


# --- what is answered ------------------------------------------------------------------------------------------------


def test_train_replies_with_the_update(here):
    expected = {
        update.user: update
        for update in records.trained(here.experiment, here.weights, here.device.sequences, np.array(USERS), 1)
    }
    for user, reply in zip(USERS, handle_train(ask(here, "train"), USERS, here.device), strict=True):
        metrics, update = reply.content.metric_records[METRICS], reply.content.array_records[UPDATE]
        assert metrics == {"user": user, "events": expected[user].events, "loss": expected[user].loss}
        assert list(update) == ["rows", "table", "body"]
        np.testing.assert_array_equal(update["table"].numpy(), expected[user].weights.table)
        np.testing.assert_array_equal(update["body"].numpy(), expected[user].weights.body)
        np.testing.assert_array_equal(update["rows"].numpy(), expected[user].rows)


def test_the_full_softmax_sends_no_rows():
    experiment = world.experiment()
    device, weights = (
        world.device(experiment, world.sequences(HISTORIES), ITEMS),
        world.weights(experiment.model, ITEMS),
    )
    (reply,) = handle_train(world.ask("train", experiment, weights, [2]), [2], device)
    assert {name: value.shape for name, value in reply.content.array_records[UPDATE].items()} == {
        "table": (ITEMS, 8),
        "body": tuple(weights.body.shape),
    }


def test_updates_wait_until_somebody_asks(here, monkeypatch):
    replies = handle_train(ask(here, "train"), USERS, here.device)
    sources = [pending_of(reply.content.array_records[UPDATE]) for reply in replies]
    assert [int(updates.users[i]) for updates, i in sources] == USERS
    assert len({updates for updates, _ in sources}) == 1  # all of one width, hence of one chunk
    asked = []
    monkeypatch.setattr(Updates, "one", lambda self, i: asked.append(i) or here.weights)
    monkeypatch.setattr(Updates, "rows", lambda self, i: asked.append(i))
    handle_train(ask(here, "train"), USERS, here.device)
    assert asked == []


def test_who_trains_and_who_ranks_may_be_somebody_else(here):
    """Where a simulation puts its worker processes."""
    called = []

    def trainer(*arguments):
        called.append("train")
        return train(*arguments)

    def ranker(*arguments):
        called.append("rank")
        return rank(*arguments)

    other = replace(here.device, trainer=trainer, ranker=ranker)
    for kind in ("train", "evaluate"):
        replies = (HANDLERS[kind](ask(here, kind), USERS, device) for device in (other, here.device))
        assert [said(reply) for reply in next(replies)] == [said(reply) for reply in next(replies)]
    assert called == ["train", "rank"]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_evaluate_replies_with_the_rank_and_nothing_else(split):
    here = placed(evaluation={"sampled": 3})
    expected = rank(here.experiment, here.weights, here.device.sequences, np.array(USERS), split)
    for user, reply in zip(USERS, handle_evaluate(ask(here, "evaluate", split=split), USERS, here.device), strict=True):
        held_out = (
            {"rank": expected.full[user], "rank_sampled": expected.sampled[user]} if user else {}
        )  # user 0 has one event
        assert said(reply) == ({"user": user, **held_out}, {})


def test_no_sampled_rank_unless_asked_for(here):
    replies = handle_evaluate(ask(here, "evaluate"), USERS, here.device)
    assert [sorted(reply.content.metric_records[METRICS]) for reply in replies] == [["user"]] + [["rank", "user"]] * 4


def test_query_replies_with_user_and_catalogue(here):
    replies = handle_query(ask(here, "query"), USERS, here.device)
    assert [dict(reply.content.metric_records[METRICS]) for reply in replies] == [
        {"first": user, "users": 1, "population": len(USERS), "items": ITEMS, "rows": ITEMS} for user in USERS
    ]
    assert {reply.content.config_records[ROUND]["catalogue"] for reply in replies} == {here.device.catalogue.version}


@pytest.mark.parametrize("kind", HANDLERS)
def test_replies_come_in_the_order_of_the_messages(here, kind):
    users = [3, 0, 4, 1, 2]
    replies = HANDLERS[kind](ask(here, kind, users), users, here.device)
    name = "first" if kind == "query" else "user"
    assert [reply.content.metric_records[METRICS][name] for reply in replies] == users
    assert [reply.metadata.src_node_id for reply in replies] == [world.NODE + user for user in users]
    assert all(reply.metadata.message_type == kind for reply in replies)


def test_training_leaves_what_arrived_alone(here):
    before = Weights(*(part.clone() for part in here.weights))
    for kind in HANDLERS:
        HANDLERS[kind](ask(here, kind), USERS, here.device)
    assert world.same(here.weights, before)


@pytest.mark.parametrize("kind", HANDLERS)
def test_no_message_no_reply(here, kind):
    assert HANDLERS[kind]([], [], here.device) == []


# --- who is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HANDLERS)
def test_another_experiment_is_refused(here, kind):
    other = here.experiment.model_copy(update={"seed": 99})
    messages = ask(here, kind, [1]) + world.ask(kind, other, here.weights, [2], split="test") + ask(here, kind, [3])
    replies = HANDLERS[kind](messages, [1, 2, 3], here.device)
    assert [reply.has_error() for reply in replies] == [False, True, False]
    assert replies[1].error.code == REFUSED
    assert "is not the one that runs here" in replies[1].error.reason


@pytest.mark.parametrize("kind", HANDLERS)
@pytest.mark.parametrize("user", [-1, 5, 10**6])
def test_an_unknown_user_is_refused(here, kind, user):
    replies = HANDLERS[kind](ask(here, kind, [1, 2]), [1, user], here.device)
    assert not replies[0].has_error()
    assert said(replies[1]) == (REFUSED, f"user {user} does not live here")


@pytest.mark.parametrize("loss", world.LOSSES)
@pytest.mark.parametrize("kind", ["train", "evaluate"])
@pytest.mark.parametrize("item", [ITEMS, 2**31 - 1, -1])
def test_a_user_with_damaged_events_is_refused_and_the_others_served(loss, kind, item):
    experiment = world.experiment(loss=world.LOSSES[loss])
    weights = world.weights(experiment.model, ITEMS)
    damaged = [list(history) for history in HISTORIES]
    damaged[3][2] = item
    sound, broken = (world.device(experiment, world.sequences(histories), ITEMS) for histories in (HISTORIES, damaged))
    messages = world.ask(kind, experiment, weights, USERS, split="test")
    expected, found = (list(map(said, HANDLERS[kind](messages, USERS, device))) for device in (sound, broken))
    assert found[3] == (REFUSED, "events on items outside the catalogue")
    for user in (0, 1, 2, 4):
        assert found[user][0] == pytest.approx(expected[user][0], abs=1e-5)


def test_damage_does_not_hide_who_lives_here(here):
    here.device.sequences.items[0] = -5
    assert not handle_query(ask(here, "query"), USERS, here.device)[0].has_error()


def test_an_update_that_is_not_finite_is_kept_back(here):
    free = set(range(ITEMS)) - set(sum((HISTORIES[user] for user in (0, 1, 2, 3)), []))
    negatives = {
        row
        for update in records.trained(here.experiment, here.weights, here.device.sequences, np.array([0]), 1)
        for row in update.rows
    }
    item = next(item for item in HISTORIES[4][:-2] if item in free - negatives)
    here.weights.table[item] = torch.nan
    replies = handle_train(ask(here, "train"), USERS, here.device)
    assert [reply.has_error() for reply in replies] == [False] * 4 + [True]
    assert "not finite" in replies[4].error.reason


def test_an_update_that_is_too_large_is_kept_back(here, monkeypatch):
    monkeypatch.setattr(training, "LARGEST", 0.0)
    replies = handle_train(ask(here, "train"), USERS, here.device)
    assert [reply.has_error() for reply in replies] == [False] + [True] * 4  # the first has nothing to train on
    assert "too large" in replies[4].error.reason


def test_a_user_that_the_trainer_forgets_is_told_so(here):
    forgetful = replace(here.device, trainer=lambda *arguments: iter(()))
    assert [said(reply) for reply in handle_train(ask(here, "train"), USERS, forgetful)] == [
        (REFUSED, "no result")
    ] * len(USERS)


# --- the ClientApp ---------------------------------------------------------------------------------------------------


def context(here, **config):
    run = {"experiment": here.experiment.model_dump_json(), "overrides": ""}
    return Context(1, 2, config, RecordDict(), run)


@pytest.mark.parametrize("kind", HANDLERS)
def test_one_by_one_through_the_app_is_all_at_once(here, kind, monkeypatch):
    monkeypatch.setattr(devices, "_open", lambda experiment, path: here.device)
    for message, expected in zip(ask(here, kind), HANDLERS[kind](ask(here, kind), USERS, here.device), strict=True):
        user = message.metadata.dst_node_id - world.NODE
        found, wanted = said(app(message, context(here, **{PARTITION: user}))), said(expected)
        assert found[0] == pytest.approx(wanted[0], abs=1e-5)
        assert found[1].keys() == wanted[1].keys()
        for name, value in wanted[1].items():
            np.testing.assert_allclose(found[1][name], value, atol=1e-6)


def test_a_node_that_was_not_told_its_user_says_so(here):
    reply = app(ask(here, "train", [1])[0], context(here))
    assert "'partition-id'" in reply.error.reason


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (DataError("/home/ann/secret/items.npy: truncated"), "DataError: …: truncated"),
        (OSError(2, "No such file", "/data/users/ann"), "FileNotFoundError"),
        (DataError("~/ann and C:\\ann\\x and ../ann/x, 3/4 of it"), "DataError: … and … and …, 3/4 of it"),
        (ValueError("event 17 of ann"), "ValueError"),
    ],
)
def test_a_node_in_trouble_names_none_of_its_folders(here, fault, said, monkeypatch, caplog):
    def breaks(*given):
        raise fault

    monkeypatch.setattr(sys.modules["client.app"], "handle_train", breaks)
    reply = app(ask(here, "train", [1])[0], context(here, **{PARTITION: 1}))
    assert reply.error.reason == said
    assert "ann" in caplog.text


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (DataError("offsets.npy runs from 0 to 137, expected 0 to 140"), "DataError"),
        (UsageError("no 'state-path' in the node config"), "UsageError: no 'state-path' in the node config"),
    ],
)
def test_a_node_that_trusts_nobody_counts_no_events_in_its_troubles(fault, said, monkeypatch):
    sections = {"privacy": {"kind": "local", "noise_multiplier": 1.0, "rng": "reproducible"}}
    sections |= {"federation": {"weighting": "uniform"}, "evaluation": {"privacy": "unaccounted"}}
    experiment = world.experiment(**sections)
    there = SimpleNamespace(experiment=experiment, weights=world.weights(experiment.model, ITEMS))

    def breaks(*given):
        raise fault

    monkeypatch.setattr(sys.modules["client.app"], "user_of", breaks)
    reply = app(ask(there, "train", [1])[0], context(there, **{PARTITION: 1}))
    assert reply.error.reason == said


def test_the_user_of_a_node(here):
    assert user_of(context(here, **{PARTITION: 3})) == 3
    assert user_of(context(here, **{PARTITION: "3"})) == 3


def test_a_device_is_opened_once_and_from_where_it_is_told(here):
    experiment = here.experiment
    folder = prepare(experiment.data)
    there = context(here, **{"data-path": str(folder)})
    first, again, prepared = Device.of(there), Device.of(there), Device.of(context(here))
    assert first is again
    assert first.experiment == prepared.experiment == experiment
    assert (len(first.sequences), first.catalogue.items) == (12, 20)
    np.testing.assert_array_equal(first.sequences.items, prepared.sequences.items)
    assert prepared.sequences.folder == folder
