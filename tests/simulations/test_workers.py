"""Worker processes: the same bits for any number of them, what one process computes but for rounding, and no one left.

What needs real processes is heard once, from pools of 1, 2 and 3; the rest is asked of a pool that works here.
"""

import os
import pickle
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from client import batches, gradients, training
from client.cohort import train
from client.device import Device
from client.evaluation import rank
from common.data.prepare import prepare
from common.wire import METRICS, UPDATE
from server.rounds import serve
from simulations import workers
from simulations.grid import InProcessGrid
from simulations.workers import ProcessPool, Team, Worker
from tests.support import records, world

COUNTS = (1, 2, 3)
DATA = {"kind": "synthetic", "users": 40, "items": 30, "interests": 4, "mean_length": 9, "max_length": 30}
USERS = np.arange(40)


class Inline:
    """A pool that works in this process; what crosses is pickled, as between processes."""

    def __init__(self, device):
        self._worker = Worker(device.experiment.model_dump_json(), str(device.catalogue.folder))
        self.loads, self.tasks = 0, []

    def load(self, weights):
        self.loads += 1
        self._weights = type(weights)(*(part.clone() for part in weights))

    def submit(self, task, *arguments):
        self.tasks.append(task)
        answer = Future()
        arguments = pickle.loads(pickle.dumps(arguments))
        answer.set_result(pickle.loads(pickle.dumps(getattr(self._worker, task)(self._weights, *arguments))))
        return answer

    def close(self):
        raise AssertionError("the pool is closed by whom it belongs to")


def placed(loss="sampled-softmax", seed=0, **federation):
    experiment = world.experiment(
        data=DATA,
        loss=world.LOSSES[loss],
        model={"dropout": 0.2, "max_length": 11},
        federation={"rounds": 2, "cohort": 30, "local": {"lr": 0.3}, **federation},
        evaluation={"every": 2, "sampled": 5},
    )
    device = Device.open(experiment, prepare(experiment.data))
    weights = world.weights(experiment.model, device.catalogue.items, seed)
    return SimpleNamespace(experiment=experiment, device=device, weights=weights, items=device.catalogue.items)


def asked(here, trainer, round_=1):
    return list(trainer(here.experiment, here.weights, here.device.sequences, USERS, round_))


def sums(here, chunks, importance=lambda updates: updates.facts["events"]):
    return [records.dense(*updates.summed(importance(updates).astype(np.float32)), here.items) for updates in chunks]


def some(updates):
    """Other weights than the server was expected to give; every third user is left out."""
    return np.where(updates.users % 3, updates.users + 0.5, 0)


def ranked(here, ranker):
    return ranker(here.experiment, here.weights, here.device.sequences, USERS, "test")


def played(here, **helpers):
    """A whole run's outcome."""
    grid = InProcessGrid(replace(here.device, **helpers), "vectorized")
    return serve(grid, here.experiment, None, lambda line: None)


@pytest.fixture
def _small(monkeypatch):
    """Chunks and slices small enough that there are several; only who plans looks at these."""
    monkeypatch.setattr(batches, "CHUNK_USERS", 8)
    monkeypatch.setattr(workers, "RANK_USERS", 15)


# --- processes -------------------------------------------------------------------------------------------------------


def alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def hear(here, count):
    """Everything that a pool of so many processes says, and which of them are left when it is closed."""
    pool = ProcessPool(here.experiment, here.device.catalogue.folder, here.items, count)
    try:
        team = Team(pool)
        chunks = asked(here, team.train)
        said = SimpleNamespace(
            chunks=len(chunks),
            losses=np.concatenate([updates.facts["loss"] for updates in chunks]).tolist(),
            sums=sums(here, chunks),
            others=sums(here, chunks, some),
            singles=[(updates.rows(2).tolist(), updates.one(2)) for updates in chunks[-2:]],
            ranks=ranked(here, team.rank),
            outcome=played(here, trainer=team.train, ranker=team.rank),
            processes=list(pool._executor._processes),
        )
    finally:
        pool.close()
    said.left = [process for process in said.processes if alive(process)]
    return said


@pytest.fixture(scope="module")
def heard():
    here = placed()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "CHUNK_USERS", 8)
        patch.setattr(workers, "RANK_USERS", 15)
        by_count = {count: hear(here, count) for count in COUNTS}
        chunks = asked(here, train)
        near = SimpleNamespace(
            chunks=len(chunks),
            sums=sums(here, chunks),
            others=sums(here, chunks, some),
            singles=[(updates.rows(2).tolist(), updates.one(2)) for updates in chunks[-2:]],
            ranks=ranked(here, rank),
            outcome=played(here),
        )
    return by_count, near


def test_any_number_of_processes_gives_the_same_bits(heard):
    first, *others = heard[0].values()
    assert first.chunks > 3
    for other in others:
        assert other.losses == first.losses
        for one, two in zip([*first.sums, *first.others], [*other.sums, *other.others], strict=True):
            assert world.same(one, two)
        for (rows, one), (same_rows, two) in zip(first.singles, other.singles, strict=True):
            assert rows == same_rows
            assert world.same(one, two)
        for one, two in zip([*first.ranks, *first.outcome.test], [*other.ranks, *other.outcome.test], strict=True):
            np.testing.assert_array_equal(one, two)
        assert world.same(first.outcome.weights, other.outcome.weights)


def test_processes_compute_what_one_process_computes(heard):
    by_count, near = heard
    for far in by_count.values():
        assert far.chunks == near.chunks
        for one, two in zip([*far.sums, *far.others], [*near.sums, *near.others], strict=True):
            assert world.gap(one, two) < 1e-6
        for (rows, one), (same_rows, two) in zip(far.singles, near.singles, strict=True):
            assert rows == same_rows
            assert world.gap(one, two) < 1e-6
        for one, two in zip([*far.ranks, *far.outcome.test], [*near.ranks, *near.outcome.test], strict=True):
            np.testing.assert_array_equal(one, two)
        assert world.gap(far.outcome.weights, near.outcome.weights) < 1e-6
        assert min(float(part.abs().max()) for part in near.sums[0]) > 1e-2


def test_no_process_is_left(heard):
    for count, said in heard[0].items():
        assert len(set(said.processes)) == count
        assert said.left == []


# --- what a team makes of its workers' answers -----------------------------------------------------------------------


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("loss", world.LOSSES)
@pytest.mark.parametrize("local", [{"steps": 1}, {"epochs": 2}])
@pytest.mark.parametrize("weighting", ["events", "uniform"])
def test_a_team_answers_as_one_process_does(loss, local, weighting):
    here = placed(loss, weighting=weighting, local={"lr": 0.3, **local})
    pool = Inline(here.device)
    far, near = asked(here, Team(pool).train), asked(here, train)
    for there, updates in zip(far, near, strict=True):
        assert len(there) == len(updates)
        assert there.whole == updates.whole == (loss == "softmax")
        np.testing.assert_equal(there.facts, updates.facts)
        for name in ("users", "sound", "counts"):
            np.testing.assert_array_equal(getattr(there, name), getattr(updates, name))
        assert there.rows(1).tolist() == updates.rows(1).tolist()
        assert world.same(there.one(1), updates.one(1))
        for importance in (updates.expected, some(updates).astype(np.float32)):
            found, wanted = (records.dense(*each.summed(importance), here.items) for each in (there, updates))
            assert world.gap(found, wanted) < 1e-6
    one, other = played(here), played(here, trainer=Team(Inline(here.device)).train)
    assert world.gap(one.weights, other.weights) < 1e-6


@pytest.mark.usefixtures("_small")
def test_the_expected_sum_is_computed_once():
    here = placed()
    pool = Inline(here.device)
    chunks = asked(here, Team(pool).train)
    assert pool.tasks == ["solve"] * len(chunks)
    sums(here, chunks)
    assert pool.tasks == ["solve"] * len(chunks)
    assert pool.loads == 1
    sums(here, chunks, some)
    assert pool.tasks == ["solve"] * 2 * len(chunks)
    assert pool.loads == 1


@pytest.mark.usefixtures("_small")
def test_updates_of_an_earlier_round_are_of_its_weights():
    here, later = placed(), placed(seed=1)
    team = Team(Inline(here.device))
    first, expected = asked(here, team.train)[-1], asked(here, train)[-1]
    second, wanted = asked(later, team.train, round_=2)[-1], asked(later, train, round_=2)[-1]
    for there, updates in ((first, expected), (second, wanted), (first, expected)):
        assert world.same(there.one(0), updates.one(0))
    assert (first.one(0).body - second.one(0).body).abs().max() > 1e-3


@pytest.mark.usefixtures("_small")
def test_a_user_in_trouble_is_refused_and_the_others_count(monkeypatch):
    here, loss = placed(), training.step_loss

    def broken(experiment, table, parameters, problem, step, round_):
        factor = np.where(problem.windows.users == 5, np.nan, 1).astype(np.float32)
        return loss(experiment, table, parameters, problem, step, round_) * torch.from_numpy(factor)

    for module in (training, gradients):
        monkeypatch.setattr(module, "step_loss", broken)
    pool = Inline(here.device)
    messages = world.ask("train", here.experiment, here.weights, USERS.tolist())
    far, near = (
        InProcessGrid(device, "vectorized").send_and_receive(messages)
        for device in (replace(here.device, trainer=Team(pool).train), here.device)
    )
    assert [reply.has_error() for reply in far] == [user == 5 for user in USERS]
    for there, reply in zip(far, near, strict=True):
        if not there.has_error():
            assert there.content.metric_records[METRICS] == reply.content.metric_records[METRICS]
            one, two = (each.content.array_records[UPDATE] for each in (there, reply))
            np.testing.assert_array_equal(one["rows"].numpy(), two["rows"].numpy())
            np.testing.assert_allclose(one["body"].numpy(), two["body"].numpy(), atol=1e-6)
    outcomes = [played(here, trainer=trainer).weights for trainer in (Team(pool).train, train)]
    assert all(torch.isfinite(part).all() for part in outcomes[0])
    assert world.gap(*outcomes) < 1e-6


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("split", ["validation", "test"])
def test_ranks_are_those_of_one_process(split):
    here = placed()
    pool = Inline(here.device)
    users = USERS[::-1]
    found = Team(pool).rank(here.experiment, here.weights, here.device.sequences, users, split)
    wanted = rank(here.experiment, here.weights, here.device.sequences, users, split)
    assert pool.tasks == ["rank"] * 3
    for one, two in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, two)
    assert np.isfinite(found.full).any()
    assert np.isfinite(found.sampled).any()
