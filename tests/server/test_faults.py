"""Nodes that are late, lost, gone or broken: what a round, a run and a privacy account make of it."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from client.device import CATALOGUE
from common.config import experiment_hash
from common.errors import TooFewNodes
from server.checkpoint import load
from server.exchange import SLOWEST_POLL
from server.journal import read
from server.ledger import Ledger
from server.roster import Roster
from server.rounds import CHECKPOINT_FILE, MODEL_FILE, serve
from tests.support import world
from tests.support.network import FOREVER, SHARDS, Clock, Dies, Late, Network

DEADLINE, WAIT = 30.0, 60.0
SINGLES = tuple(range(user, user + 1) for user in range(12))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("nodes")


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    return Clock.put(monkeypatch)


def experiment(*, federation=None, evaluation=None, quorum=0.9, **sections):
    replies = {"deadline": DEADLINE, "wait": WAIT, "quorum": quorum}
    adam = {"kind": "fedadam", "lr": 0.02}
    return world.experiment(
        federation={"rounds": 4, "cohort": 12, "optimizer": adam, "replies": replies, **(federation or {})},
        evaluation={"every": 2, **(evaluation or {})},
        **sections,
    )


def run(given, folder, trouble=None, *, shards=SHARDS, clock=None, out=None, **options):
    """A run in which a node's n-th question of a round may be in trouble: ``trouble(place, round, attempt)``."""
    network, lines, asked = Network(given, folder, shards, clock), [], {}

    def happens(place, message):
        if message.metadata.message_type != "train":
            return None
        key = place, int(message.metadata.group_id)
        asked[key] = asked.get(key, 0) + 1
        return trouble(*key, asked[key]) if trouble else None

    network.trouble = happens
    outcome = serve(network, given, out, lines.append, **options)
    return SimpleNamespace(outcome=outcome, lines=lines, network=network, asked=asked)


def lines_of(lines, kind):
    return [line for line in lines if line["kind"] == kind]


def once(what, *, place=2, round_=2, attempts=1):
    """Trouble of one node in one round, the first times it is asked."""
    return lambda where, when, attempt: what if (where, when) == (place, round_) and attempt <= attempts else None


LOST = {
    "never": "silent",
    "late": Late(DEADLINE + 5),
    "unavailable message": 3,
    "unavailable reply": 4,
    "unavailable node": 5,
    "crashed": 8,
    "gone": Dies(1),
    "gone, and Flower says so": Dies(1, answered=True),
}
EACH_LOSS = pytest.mark.parametrize("what", LOST.values(), ids=LOST)


# --- a round ----------------------------------------------------------------------------------------------------------


@EACH_LOSS
def test_a_reply_that_is_lost_within_the_quorum_is_left_out_and_counted(folder, what):
    """The model is that of a cohort without the user, whatever became of the reply."""
    given = experiment()
    got = run(given, folder, once(what, place=5), shards=SINGLES)
    told = [(line["clients"], line.get("lost")) for line in lines_of(got.lines, "train")]
    assert told == [(12, None), (11, 1), (12, None), (12, None)]
    without = run(given, folder, once("raises", place=5), shards=SINGLES)
    assert world.same(got.outcome.weights, without.outcome.weights)
    assert lines_of(without.lines, "train")[1]["reasons"] == {"refused: <class 'OSError'>:<'bad disk'>": 1}


@EACH_LOSS
def test_a_round_below_the_quorum_is_repeated_to_the_same_bits(folder, tmp_path, what):
    given = experiment()
    calm, got = run(given, folder), run(given, folder, once(what, attempts=2), out=tmp_path)
    assert [line["kind"] for line in got.lines] == [
        *("train", "void"),
        *(("train",) if isinstance(what, Dies) else ("void", "train")),
        *("validation", "train", "train", "validation"),
    ] or isinstance(what, Dies)
    for line in lines_of(read(tmp_path), "void"):
        assert (line["round"], line["void"], line["lost"]) == (2, 1, 1)
        assert "clients" not in line
    assert lines_of(got.lines, "void")
    questions = [m for m in got.network.sent if (m.metadata.message_type, m.metadata.group_id) == ("train", "2")]
    assert len(questions) > 3
    named = {tuple(m.content["round"]["users"]) for m in questions if "users" in m.content["round"]}
    assert named == {tuple(users) for users in SHARDS[1:]}
    assert world.same(got.outcome.weights, calm.outcome.weights)
    np.testing.assert_array_equal(got.outcome.test[0], calm.outcome.test[0])
    assert got.outcome.best_round == calm.outcome.best_round


def test_a_second_reply_and_one_of_another_round_change_nothing(folder):
    given = experiment()
    calm, twice = (run(given, folder, lambda place, *_, what=what: what) for what in (None, "twice"))
    assert world.same(twice.outcome.weights, calm.outcome.weights)

    def stale(reply):
        reply.metadata.__dict__["_group_id"] = "1"
        return reply

    got, without = (run(given, folder, once(what, place=0)) for what in (stale, "raises"))
    assert world.same(got.outcome.weights, without.outcome.weights)
    assert lines_of(got.lines, "train")[1]["reasons"] == {"of another round": 1}


def test_a_round_takes_no_longer_than_its_deadline(folder, clock):
    given = experiment(quorum=0.1)
    before = []

    def trouble(place, round_, attempt):
        before.append((round_, clock.now))
        return Late(DEADLINE - 1) if place == 0 else "silent"

    got = run(given, folder, trouble, clock=clock)
    starts = dict(reversed(before))
    assert [starts[n + 1] - starts[n] for n in (1, 2, 3)] == pytest.approx([DEADLINE] * 3)
    assert [(line["clients"], line["lost"]) for line in lines_of(got.lines, "train")] == [(1, 2)] * 4
    assert max(clock.slept) <= max(SLOWEST_POLL, 0.5)


@pytest.mark.parametrize("jumps", [[0.0, 10**10], [10**10, -(10**10), 0.0], [-1.0]])
def test_the_time_of_day_does_not_matter(folder, monkeypatch, jumps):
    given = experiment()
    calm = run(given, folder, once(Late(20)))
    calls = iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: jumps[next(calls) % len(jumps)])
    got = run(given, folder, once(Late(20)))
    assert world.same(got.outcome.weights, calm.outcome.weights)
    assert not any("lost" in line for line in got.lines)


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["silent", Dies(FOREVER)], ids=["silent", "gone"])
def test_nodes_that_are_missing_for_too_long_end_the_run_and_a_resume_has_the_same_bits(folder, tmp_path, clock, what):
    given = experiment()
    calm_folder, half = tmp_path / "calm", tmp_path / "half"
    calm_folder.mkdir(), half.mkdir()
    calm = run(given, folder, out=calm_folder)
    began = clock.now
    with pytest.raises(TooFewNodes) as caught:
        run(given, folder, once(what, round_=3, attempts=FOREVER), out=half, clock=clock)
    assert caught.value.exit_code == 4
    assert clock.now - began < 10 + 2 * WAIT + 2 * DEADLINE
    assert load(half / CHECKPOINT_FILE, given).round == 2
    assert not (half / MODEL_FILE).exists()
    got = run(given, folder, out=half, resume=True)
    assert world.same(got.outcome.weights, calm.outcome.weights)
    assert (half / CHECKPOINT_FILE).read_bytes() == (calm_folder / CHECKPOINT_FILE).read_bytes()
    assert (half / MODEL_FILE).read_bytes() == (calm_folder / MODEL_FILE).read_bytes()
    assert [(line["kind"], line["round"]) for line in read(half)] == [
        (line["kind"], line["round"]) for line in read(calm_folder)
    ]


def test_a_node_that_comes_back_takes_part_again(folder):
    given = experiment(quorum=0.5)
    got = run(given, folder, once(Dies(1), place=1, round_=1), shards=SHARDS)
    told = [(line["clients"], line.get("lost"), line.get("absent")) for line in lines_of(got.lines, "train")]
    assert told == [(9, 1, None), (9, None, 3), (12, None, None), (12, None, None)]


@pytest.mark.parametrize("code", [3, 4, 5, 8])
def test_a_node_that_is_lost_while_it_is_asked_who_lives_there_is_asked_again(folder, code):
    given = experiment()
    network, asked = Network(given, folder), []

    def trouble(place, message):
        asked.append(place)
        return code if place == 2 and asked.count(2) == 1 else None

    network.trouble = trouble
    roster = Roster.discover(network, experiment_hash(given), quorum=0.9)
    assert (roster.share, roster.refused) == (1.0, {})


# --- a privacy account ------------------------------------------------------------------------------------------------


def private(z=0.0, **federation):
    return experiment(
        federation={
            "sampling": "poisson",
            "weighting": "uniform",
            "rounds": 3,
            "optimizer": {"kind": "fedavg"},
            **federation,
        },
        privacy={"kind": "user-level", "noise_multiplier": z, "clipping_norm": 0.5, "rng": "reproducible"},
        evaluation={"privacy": "unaccounted", "every": 1},
    )


@pytest.mark.parametrize("what", [None, "silent", 5, "raises", Dies(1)], ids=str)
def test_a_private_round_is_released_whatever_is_lost(folder, tmp_path, what):
    got = run(private(1.0), folder, lambda place, *_: what if place == 2 else None, out=tmp_path)
    paid = Ledger(tmp_path).lines
    assert [(line["what"], line["round"], line["attempt"]) for line in paid] == [("update", n, 0) for n in (1, 2, 3)]
    assert [line["round"] for line in lines_of(got.lines, "train")] == [1, 2, 3]
    assert not lines_of(got.lines, "void")


@pytest.mark.parametrize("shards", ["sum", "users"])
@pytest.mark.parametrize("z", [0.0, 1.0])
def test_the_denominator_and_the_noise_do_not_hang_on_who_answers(folder, shards, z):
    """Of one round, where everybody is asked: what is lost is missing in the sum and nowhere else."""
    given = private(z, rounds=1, shards=shards)
    whole, noise = (run(given, folder, lambda *_, what=what: what).outcome.weights for what in (None, "silent"))
    parts = [
        run(given, folder, lambda place, *_, there=there: None if place in there else "silent").outcome.weights
        for there in ({2}, {0, 1})
    ]
    for all_, none, *some in zip(whole, noise, *parts, strict=True):
        assert torch.allclose(sum(some) - none, all_, atol=1e-6)
    assert world.gap(whole, parts[0]) > 1e-4


# --- a validation -----------------------------------------------------------------------------------------------------


def test_a_validation_that_too_few_nodes_answered_chooses_nothing(folder):
    """The first of two is half lost, and would have been the better one: the model is the last round's."""
    given = experiment(evaluation={"every": 2, "patience": 1})
    network, lines = Network(given, folder), []
    network.trouble = lambda place, message: (
        "silent" if place and (message.metadata.message_type, message.metadata.group_id) == ("evaluate", "2") else None
    )
    outcome = serve(network, given, None, lines.append)
    first, second = lines_of(lines, "validation")
    assert first["lost_share"] == pytest.approx(1 - 1 / len(SHARDS))
    assert "lost_share" not in second
    assert (outcome.rounds, outcome.best_round) == (4, 4)


def test_nodes_that_stay_out_are_named_by_their_reason(folder):
    given = experiment(quorum=0.5)
    network, lines = Network(given, folder), []
    network.configs[0][CATALOGUE] = "another"
    network.restart()
    serve(network, given, None, lines.append)
    for line in lines_of(lines, "train"):
        (reason,), counts = line["refused_nodes"], [*line["refused_nodes"].values()]
        assert "its catalogue is not version another" in reason
        assert counts == [1]
        assert str(folder) not in reason
