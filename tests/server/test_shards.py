"""Nodes that host several users give what one process gives, and none of their replies is taken at its word."""

import json
import shutil
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from client.accounts import ACCOUNTS_FILE, STATE_PATH
from client.device import CATALOGUE, Device
from common.config import experiment_hash
from common.data.prepare import prepare
from common.errors import Interrupted, TooFewNodes
from common.wire import METRICS, ROUND, UPDATE, arrays
from server.journal import read
from server.roster import Roster
from server.rounds import serve
from server.strategy import FederatedRanking
from simulations.grid import InProcessGrid
from tests.support import world
from tests.support.network import SHARDS, Clock, Network

LARGE = 2
"""Place of the node with eight users, 4 … 11."""
SILENT = {"replies": {"quorum": 0.3, "deadline": 20}}
LOCAL = {"kind": "local", "noise_multiplier": 1.0, "rng": "reproducible"}
EXAMPLES = {"kind": "example-level", "noise_multiplier": 1.0, "rng": "reproducible", "segment": 3}
USERS = {"kind": "user-level", "noise_multiplier": 0.5, "clipping_norm": 0.3, "rng": "reproducible"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the nodes' files are; no test that uses it leaves anything there."""
    return tmp_path_factory.mktemp("nodes")


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    return Clock.put(monkeypatch)


def experiment(*, federation=None, evaluation=None, **sections):
    return world.experiment(
        federation={"rounds": 4, "cohort": 5, "optimizer": {"kind": "fedadam", "lr": 0.02}, **(federation or {})},
        evaluation={"every": 2, **(evaluation or {})},
        **sections,
    )


def private(privacy, federation=None, **sections):
    sampling = {"sampling": "poisson"} if privacy["kind"] == "user-level" else {}
    return experiment(
        privacy=privacy,
        federation={"weighting": "uniform", **sampling, **(federation or {})},
        evaluation={"privacy": "unaccounted"},
        **sections,
    )


def run(experiment, grid, folder=None, **options):
    """A run's outcome, its lines, and all ranks that the server looked at."""
    lines, ranks, quality = [], [], FederatedRanking.quality
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            FederatedRanking, "quality", lambda self, *given: (ranks.append(given[0]), quality(self, *given))[1]
        )
        outcome = serve(grid, experiment, folder, lines.append, **options)
    return SimpleNamespace(outcome=outcome, lines=lines, ranks=ranks)


@cache
def alone(experiment, prepared=None):
    """The same in one process, which knows no shards."""
    return run(experiment, InProcessGrid(Device.open(experiment, prepared or prepare(experiment.data)), "vectorized"))


def unsharded(given):
    federation = given.federation.model_copy(update={"shards": "sum"})
    return given.model_copy(update={"federation": federation})


def same(got, expected, bound=1e-5):
    assert world.gap(got.outcome.weights, expected.outcome.weights) < bound
    assert (got.outcome.best_round, got.outcome.tested) == (expected.outcome.best_round, expected.outcome.tested)
    assert np.isfinite(got.outcome.test[0]).any()
    assert len(got.ranks) == len(expected.ranks) == 3
    for one, other in zip(got.ranks, expected.ranks, strict=True):
        np.testing.assert_array_equal(one, other)


def train_lines(lines):
    return [line for line in lines if line["kind"] == "train"]


# --- the same as in one process --------------------------------------------------------------------------------------


@pytest.mark.parametrize("local", [{"steps": 1}, {"steps": 3, "lr": 0.3, "window": "random"}], ids=["one", "several"])
@pytest.mark.parametrize("weighting", ["events", "uniform"])
@pytest.mark.parametrize("shards", ["sum", "users"])
@pytest.mark.parametrize("loss", world.LOSSES)
def test_shards_train_the_model_of_one_process(folder, loss, shards, weighting, local):
    federation = {"shards": shards, "weighting": weighting, "local": local}
    given = experiment(loss=world.LOSSES[loss], federation=federation, model={"dropout": 0.2})
    same(run(given, Network(given, folder)), alone(unsharded(given)))


@pytest.mark.parametrize("shards", ["sum", "users"])
@pytest.mark.parametrize("privacy", [LOCAL, EXAMPLES, USERS, {**USERS, "on_device": EXAMPLES}])
def test_private_shards_train_the_model_of_one_process(tmp_path, privacy, shards):
    given = private(privacy, {"shards": shards})
    got, expected = run(given, Network(given, tmp_path)), alone(unsharded(given))
    same(got, expected)
    told = [[line["clients"] for line in train_lines(each.lines)] for each in (got, expected)]
    assert told[0] == told[1]


def test_norms_of_shards_are_bounded(folder):
    given = experiment(federation={"shards": "users", "norm_bound": "median"})
    same(run(given, Network(given, folder)), alone(unsharded(given)))


# --- what a node does for its users -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["train", "evaluate"])
@pytest.mark.parametrize(
    ("named", "why"), [([4, 1], "do not live here"), ([12], "do not live here"), (None, "hosts 8 users: name some")]
)
def test_a_node_answers_for_its_own_users_only(folder, kind, named, why):
    given = experiment()
    network = Network(given, folder)
    (asked,) = world.ask(kind, given, world.weights(given.model, 20), split="test")
    if named is not None:
        asked.content[ROUND]["users"] = named
    message = Message(asked.content, network.ids[LARGE], kind)
    (reply,) = network.pull_messages(network.push_messages([message]))
    assert why in reply.error.reason


@pytest.mark.parametrize("shards", ["sum", "users"])
def test_one_users_trouble_costs_only_that_user(tmp_path, shards):
    given = experiment(federation={"shards": shards, "cohort": 12})
    whole = shutil.copytree(prepare(given.data), tmp_path / "whole")
    network = Network(given, tmp_path)
    for place, first in ((whole, 0), (tmp_path / "users-4-12", 4)):
        items, offsets = (np.load(place / f"{name}.npy") for name in ("items", "offsets"))
        items[offsets[6 - first]] = 999
        np.save(place / "items.npy", items)
    (tmp_path / "run").mkdir()
    got, expected = run(given, network, tmp_path / "run"), alone(given, whole)
    assert world.gap(got.outcome.weights, expected.outcome.weights) < 1e-5
    for line in train_lines(read(tmp_path / "run")):
        assert (line["clients"], line["rejected"]) == (11, 1)
        assert line["reasons"] == {"refused: events on items outside the catalogue": 1}
    assert np.flatnonzero(np.isnan(got.outcome.test[0])).tolist() == [6]


@pytest.mark.parametrize("privacy", [LOCAL, EXAMPLES])
def test_a_node_counts_for_each_of_its_users_across_a_restart(tmp_path, privacy):
    given = private({**privacy, "participations": 2}, {"cohort": 12})
    network = Network(given, tmp_path)
    (tmp_path / "run").mkdir()
    with pytest.raises(Interrupted):
        run(given, network, tmp_path / "run", stopping=lambda: True)
    network.restart()
    run(given, network, tmp_path / "run", resume=True)
    for users, config in zip(SHARDS, network.configs, strict=True):
        text = (tmp_path / f"state-{users.start}" / ACCOUNTS_FILE).read_text()
        paid = [json.loads(line) for line in text.splitlines()]
        assert [(line["round"], line["users"]) for line in paid] == [(1, [*users]), (2, [*users])]
        assert config[STATE_PATH] == str(tmp_path / f"state-{users.start}")
    lines = train_lines(read(tmp_path / "run"))
    assert [line["clients"] for line in lines] == [12, 12, 0, 0]
    assert lines[-1]["reasons"] == {"refused: took part 2 times, and that was all": 12}


def test_a_node_without_a_place_for_accounts_does_not_train(tmp_path):
    given = private(LOCAL)
    network = Network(given, tmp_path)
    del network.configs[LARGE][STATE_PATH]
    network.restart()
    lines = train_lines(run(given, network).lines)
    assert all("no 'state-path'" in str(line["reasons"]) for line in lines)


def test_a_node_with_another_catalogue_stays_out(folder):
    given = experiment()
    network = Network(given, folder)
    network.configs[0][CATALOGUE] = "another"
    network.restart()
    roster = Roster.discover(network, experiment_hash(given), quorum=0.9)
    assert roster.present(np.arange(12)).tolist() == list(range(1, 12))
    assert list(roster.refused) == [network.ids[0]]
    assert "its catalogue is not version another" in roster.refused[network.ids[0]]
    network.configs[LARGE][CATALOGUE] = "another"
    network.restart()
    with pytest.raises(TooFewNodes, match=r"25% of the users.*its catalogue is not version another"):
        Roster.discover(network, experiment_hash(given), quorum=0.9)


# --- replies that are worth nothing ----------------------------------------------------------------------------------


def metrics(**changed):
    """Replace columns of what a node says; a function gets the column."""

    def change(reply):
        said = dict(reply.content[METRICS])
        for name, new in changed.items():
            said[name] = new(list(said.get(name, [])))
        return with_records(reply, {METRICS: MetricRecord(said)})

    return change


def with_records(reply, records, without=()):
    kept = {name: each for name, each in reply.content.items() if not name.startswith(tuple(without) or ("no",))}
    reply.content = RecordDict({**kept, **records})
    return reply


def numbers(**changed):
    """Replace arrays of the first update."""

    def change(reply):
        name = next(name for name in reply.content if name.startswith(UPDATE))
        update = {part: array.numpy() for part, array in reply.content[name].items()}
        update |= {part: new(update[part].copy()) for part, new in changed.items()}
        return with_records(reply, {name: arrays(**update)})

    return change


def told(**values):
    return lambda reply: with_records(reply, {ROUND: ConfigRecord({**reply.content[ROUND], **values})})


def of_round(name):
    def change(reply):
        reply.metadata.__dict__["_group_id"] = name
        return reply

    return change


WHOLE = {
    "lists of different lengths": metrics(loss=lambda column: column[:-1]),
    "a list too long": metrics(events=lambda column: [*column, 1]),
    "a user twice": metrics(user=lambda column: [column[0]] * len(column)),
    "one number for all": metrics(user=lambda column: column[0]),
    "users that are no whole numbers": metrics(user=lambda column: [user + 0.5 for user in column]),
    "a negative user": metrics(user=lambda column: [-1, *column[1:]]),
    "no losses": lambda reply: with_records(reply, {METRICS: MetricRecord({"user": reply.content[METRICS]["user"]})}),
    "no update": lambda reply: with_records(reply, {}, [UPDATE]),
    "an update of strings": lambda reply: with_records(reply, {UPDATE: ConfigRecord({"table": "x"})}, [UPDATE]),
    "nothing said": lambda reply: with_records(reply, {}, [METRICS]),
    "strings said": lambda reply: with_records(reply, {METRICS: ConfigRecord({"user": ["4", "5"]})}),
    "no refusals": lambda reply: with_records(reply, {}, [ROUND]),
    "negative refusals": told(reasons=["no"], times=[-3]),
    "refusals in words": told(reasons=["no"], times=["many"]),
    "reasons that are no list": told(reasons="because"),
    "another round": of_round("77"),
    "no round": of_round(""),
    "no table": lambda reply: with_records(reply, {UPDATE: ArrayRecord()}, [UPDATE]),
    "nothing": lambda reply: Message(RecordDict(), reply_to=reply),
    "a flood of bytes": lambda reply: with_records(reply, {"x": ConfigRecord({"x": b"x" * 10**6})}),
    "a flood of words": told(reasons=["x" * 10**6], times=[1]),
    "a flood of reasons": told(reasons=["x" * 10] * 10**5, times=[0] * 10**5),
    "a flood of numbers": metrics(more=lambda column: [0.5] * 10**6),
}
IN_PART = {
    "NaN": numbers(table=lambda table: table * np.float32("nan")),
    "infinity": numbers(body=lambda body: body + np.float32("inf")),
    "too large": numbers(body=lambda body: body + np.float32(1e7)),
    "another shape": numbers(table=lambda table: table[:, :-1]),
    "another type": numbers(table=lambda table: table.astype(np.float64)),
    "a user of another node": metrics(user=lambda column: [0, *column[1:]]),
    "negative counts": metrics(events=lambda column: [-1, *column[1:]]),
    "a loss that is none": metrics(loss=lambda column: [float("nan"), *column[1:]]),
}
CASES = [("sum", name) for name in {**WHOLE, **IN_PART}] + [("users", name) for name in WHOLE]


@cache
def disturbed(experiment, folder, trouble, kind="train"):
    network = Network(experiment, folder)
    network.trouble = lambda place, message: (
        trouble if (place, message.metadata.message_type) == (LARGE, kind) else None
    )
    return run(experiment, network)


@pytest.mark.parametrize(("shards", "name"), CASES)
def test_a_reply_that_makes_no_sense_changes_nothing(folder, shards, name):
    given = experiment(federation={"shards": shards, "cohort": 9, "rounds": 2, **SILENT})
    got, without = (disturbed(given, folder, trouble) for trouble in ({**WHOLE, **IN_PART}[name], "silent"))
    assert world.same(got.outcome.weights, without.outcome.weights)
    assert all(line["rejected"] == 1 and "lost" not in line for line in train_lines(got.lines))
    assert all(line["clients"] <= 4 for line in train_lines(got.lines))


def test_a_flood_is_not_even_read(folder):
    given = experiment(federation={"cohort": 9, "rounds": 2, **SILENT})
    for name in (name for name in WHOLE if name.startswith("a flood")):
        lines = train_lines(disturbed(given, folder, WHOLE[name]).lines)
        assert [line["reasons"] for line in lines] == [{"more bytes than its users could have to say": 1}] * 2


FLOODS = {"x": ConfigRecord({"x": b"x" * 10**6})}


def test_a_flood_of_ranks_is_not_read(folder):
    """The node is left out of the ranking, and the others are ranked as ever."""
    given = experiment(federation=SILENT)
    calm = run(given, Network(given, folder))
    network = Network(given, folder)
    network.trouble = lambda place, message: (
        (lambda reply: with_records(reply, FLOODS))
        if (place, message.metadata.message_type) == (LARGE, "evaluate")
        else None
    )
    got = run(given, network)
    for seen, whole in zip(got.ranks, calm.ranks, strict=True):
        assert np.isnan(seen[0][4:]).all()
        np.testing.assert_array_equal(seen[0][:4], whole[0][:4])
    assert all(line["reasons"] == {"more bytes than its users could have to say": 1} for line in validations(got.lines))


def validations(lines):
    return [line for line in lines if line["kind"] == "validation"]


def test_a_flood_for_an_introduction_is_not_read(folder):
    given = experiment(federation=SILENT)
    network = Network(given, folder)
    network.trouble = lambda place, message: (
        (lambda reply: with_records(reply, FLOODS)) if (place, message.metadata.message_type) == (0, "query") else None
    )
    roster = Roster.discover(network, experiment_hash(given), quorum=0.9)
    assert roster.refused == {network.ids[0]: "more bytes than its users could have to say"}
    assert roster.present(np.arange(12)).tolist() == list(range(1, 12))
