"""A device's account in use: paid before anything leaves, kept over restarts, and the end of taking part."""

import os
from dataclasses import replace

import pytest
from flwr.app import Context, RecordDict

from client import accounts as module
from client import device as devices
from client.accounts import ACCOUNTS_FILE, RECORD, STATE_PATH, Accounts, accounts_of
from client.app import app
from client.cohort import train
from client.device import PARTITION
from common.errors import StateError
from common.privacy.devices import settle
from common.wire import REFUSED
from tests.privacy import alone
from tests.support import world
from tests.support.books import opened

ITEMS = alone.ITEMS
HISTORIES = world.random_histories([4, 9, 6], ITEMS)
KINDS = pytest.mark.parametrize("kind", ["local", "example-level"])


def setup(kind="local", most=2, z=2.0):
    return alone.experiment(kind, privacy={"participations": most, "noise_multiplier": z})


def device_of(experiment, path=None, trainer=train):
    made = world.device(experiment, world.sequences(HISTORIES, held_out=False), ITEMS)
    return replace(made, accounts=Accounts(path), trainer=trainer)


def lines(path):
    return [opened(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def path(tmp_path):
    module._open.cache_clear()  # which would be another test's file
    yield tmp_path / ACCOUNTS_FILE
    module._open.cache_clear()


# --- paid before anything leaves -------------------------------------------------------------------------------------


@KINDS
def test_the_line_is_on_the_disk_before_anybody_trains(kind, path, monkeypatch):
    experiment, happened, fsync = setup(kind), [], os.fsync

    def flushed(descriptor):
        fsync(descriptor)
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(path):
            happened.append(("flushed", len(lines(path))))

    def trainer(*given):
        happened.append(("trained", len(lines(path))))
        return train(*given)

    monkeypatch.setattr(os, "fsync", flushed)
    for round_ in (1, 2):
        alone.replies(experiment, device_of(experiment, path, trainer), [0, 2], round_)
    assert happened == [("flushed", 1), ("trained", 1), ("flushed", 2), ("trained", 2)]
    told = settle(experiment).told
    assert lines(path) == [{"round": round_, "users": [0, 2], "terms": told} for round_ in (1, 2)]


def told(reply, why):
    """Whether it says so, and nothing else."""
    return reply.has_error() and not reply.has_content() and why in reply.error.reason


@KINDS
def test_training_that_breaks_off_has_been_paid_for(kind, path):
    """A crash can only over-count."""

    def breaks(*given):
        raise RuntimeError("the battery is empty")

    experiment = setup(kind)
    with pytest.raises(RuntimeError, match="battery"):
        alone.replies(experiment, device_of(experiment, path, breaks), [0, 1])
    assert [line["users"] for line in lines(path)] == [[0, 1]]
    (reply,) = alone.replies(experiment, device_of(experiment, path), [1])
    assert alone.said(reply)["participations"] == 2


@KINDS
@pytest.mark.parametrize("way", ["by hand", "through the app"])
def test_a_full_disk_lets_nothing_leave(kind, way, path, monkeypatch):
    experiment, trained = setup(kind), []
    device = device_of(experiment, path, lambda *given: trained.append(1) or train(*given))
    monkeypatch.setattr(devices, "_open", lambda experiment, path: device)
    monkeypatch.setattr("client.app.alone", lambda device: device.trainer)
    alone.replies(experiment, device, [0])
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    here = context(experiment, path.parent)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        if way == "by hand":
            with pytest.raises(StateError, match=f"{ACCOUNTS_FILE}: the disk is full"):
                alone.replies(experiment, device, [0])
        else:
            assert told(asked(experiment, here), "StateError: …: the disk is full")
    assert path.read_bytes() == before
    assert trained == [1]
    assert alone.said(asked(experiment, here))["participations"] == 2


# --- the end of it ---------------------------------------------------------------------------------------------------


def context(experiment, folder=None, user=0):
    node = {PARTITION: user} | ({} if folder is None else {STATE_PATH: str(folder)})
    return Context(1, 2, node, RecordDict(), {"experiment": experiment.model_dump_json(), "overrides": ""})


def asked(experiment, context, round_=1):
    """One round of one device, through the ClientApp."""
    user = int(context.node_config[PARTITION])
    weights = world.weights(experiment.model, ITEMS)
    return app(world.ask("train", experiment, weights, [user], round_)[0], context)


def refused(reply):
    return reply.has_error() and (reply.error.code, reply.error.reason)


@pytest.fixture
def here(monkeypatch):
    def placed(experiment):
        device = device_of(experiment)
        monkeypatch.setattr(devices, "_open", lambda experiment, path: device)
        return experiment

    return placed


@KINDS
@pytest.mark.parametrize("kept", [True, False])
def test_a_device_refuses_when_its_participations_are_spent(kind, kept, path):
    """Each for itself; the others go on."""
    experiment = setup(kind, 2)
    device = device_of(experiment, path if kept else None)
    rounds = [[0, 1], [0], [0, 1, 2], [2, 0]]
    found = [alone.replies(experiment, device, users, n) for n, users in enumerate(rounds, 1)]
    told = [[refused(reply) or alone.said(reply)["participations"] for reply in replies] for replies in found]
    no = (REFUSED, "took part 2 times, and that was all")
    assert told == [[1, 1], [2], [no, 2, 1], [2, no]]
    assert not kept or [line["users"] for line in lines(path)] == [[0, 1], [0], [1, 2], [2]]


def test_what_another_process_has_spent_is_spent(path):
    experiment = setup(most=2)
    one, other = device_of(experiment, path), device_of(experiment, path)
    for round_ in (1, 2):
        assert not refused(alone.replies(experiment, one, [0], round_)[0])
    assert refused(alone.replies(experiment, other, [0], 3)[0])
    assert not refused(alone.replies(experiment, other, [1], 3)[0])


def test_who_is_refused_for_another_reason_pays_nothing(path):
    experiment = setup()
    device = device_of(experiment, path)
    device.sequences.items[0] = -1
    other = world.ask("train", setup(z=3.0), world.weights(experiment.model, ITEMS), [1])
    replies = alone.replies(experiment, device, [0, 7]) + alone.handle_train(other, [1], device)
    assert all(refused(reply) for reply in replies)
    assert lines(path) == []


def test_without_a_limit_all_rounds_are_counted():
    experiment = setup(most=None)
    device = device_of(experiment)
    found = [alone.said(alone.replies(experiment, device, [1], n)[0])["participations"] for n in range(1, 8)]
    assert found == list(range(1, 8))


@KINDS
def test_through_the_app_the_context_remembers(kind, here):
    experiment = here(setup(kind, 2))
    kept, other = context(experiment), context(experiment, user=1)
    found = [asked(experiment, kept, n) for n in (1, 2, 3, 4)]
    assert [bool(refused(reply)) for reply in found] == [False, False, True, True]
    assert [alone.said(reply)["participations"] for reply in found[:2]] == [1, 2]
    assert not refused(asked(experiment, other))
    assert kept.state.config_records[RECORD]["participations"] == 2
    assert other.state.config_records[RECORD] == {"participations": 1, **settle(experiment).told}


@KINDS
def test_a_restart_forgets_nothing_where_the_device_has_a_folder(kind, here, path):
    experiment = here(setup(kind, 2))
    for round_ in (1, 2):
        module._open.cache_clear()  # as in a new process
        fresh = context(experiment, path.parent)
        assert alone.said(asked(experiment, fresh, round_)) == {"user": 0, "participations": round_}
        assert fresh.state.config_records[RECORD]["participations"] == round_
    for _ in range(2):
        assert refused(asked(experiment, context(experiment, path.parent), 3))
    assert not refused(asked(experiment, context(experiment, path.parent, user=1), 3))


def test_of_folder_and_context_the_larger_count_holds(here, path):
    experiment = here(setup(most=9))
    kept = context(experiment)
    for round_ in (1, 2, 3):
        asked(experiment, kept, round_)
    kept.node_config[STATE_PATH] = str(path.parent)
    assert alone.said(asked(experiment, kept, 4))["participations"] == 4
    assert accounts_of(context(experiment, path.parent), 0).taken(0) == 4


def test_a_damaged_account_lets_nothing_leave_through_the_app(here, path):
    experiment = here(setup())
    alone.replies(experiment, device_of(experiment, path), [0])
    with path.open("a") as file:
        file.write("hello\n")
    for _ in range(2):
        assert told(asked(experiment, context(experiment, path.parent)), "StateError: …:2: ")


def test_an_open_federation_keeps_no_account(path):
    experiment = world.experiment()
    device = replace(device_of(experiment), accounts=Accounts(path))
    (reply,) = alone.replies(experiment, device, [1])
    assert "participations" not in alone.said(reply)
    assert not path.exists()


def test_a_refusal_leaves_the_record_of_the_context(here):
    experiment = here(setup(most=1))
    kept = context(experiment)
    for round_ in (1, 2):
        asked(experiment, kept, round_)
        assert kept.state.config_records[RECORD] == {"participations": 1, **settle(experiment).told}


def test_a_context_of_other_terms_is_refused(here):
    first, other = setup(z=1.0), setup(z=100.0)
    kept = context(here(first))
    asked(first, kept)
    later = Context(1, 2, kept.node_config, kept.state, context(other).run_config)
    here(other)
    assert told(asked(other, later), "other terms")
