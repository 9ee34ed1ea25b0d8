"""One local step is one pass with shared weights: its sum must be that of the single updates, and trouble must show."""

import numpy as np
import pytest
import torch

from client import gradients, training
from client.cohort import train
from common.wire import LARGEST
from tests.support import records, world

ITEMS, LONGEST, ROUND = 20, 11, 3  # two widths of windows, 8 and 11; a third of the items is among the negatives
LENGTHS = [1, 2, 3, 0, 9, 10, 12, 13, 23, 30, 30]  # the longer ones repeat items; the first and fourth have no target
HISTORIES = [[item % ITEMS for item in history] for history in world.random_histories(LENGTHS, 2 * ITEMS)]
DATA = world.sequences(HISTORIES, held_out=False)
EVERYBODY = np.arange(len(HISTORIES))
BROKEN = 6
CASES = pytest.mark.parametrize(
    ("loss", "weighting", "dropout"),
    [
        (loss, weighting, dropout)
        for loss in world.LOSSES
        for weighting in ("events", "uniform")
        for dropout in (0, 0.3)
    ],
)
EACH_LOSS = pytest.mark.parametrize("loss", world.LOSSES)


def case(loss, weighting="events", dropout=0.0, **local):
    return world.experiment(
        loss=world.LOSSES[loss],
        model={"dropout": dropout, "blocks": 2, "max_length": LONGEST},
        federation={"weighting": weighting, "local": {"lr": 0.1, **local}},
    )


def trained(experiment, users=EVERYBODY):
    return list(train(experiment, world.weights(experiment.model, ITEMS), DATA, np.asarray(users), ROUND))


def is_shared(updates):
    """Whether the pass with shared weights served, so that nobody's single update has been computed."""
    return "_stacked" not in updates.__dict__


def summed(updates, importance):
    return records.dense(*updates.summed(importance.astype(np.float32)), ITEMS)


def off(updates, importance):
    """Distance between a sum and that of the single updates, as part of the weighted mean that it is made for.

    A single update is the difference of two float32 weights, so its own rounding counts as often as its user.
    """
    gap = world.gap(summed(updates, importance), records.added(updates, importance, ITEMS))
    return gap / max(1.0, float(importance.sum()))


def singles(chunks):
    return {
        user: (updates.sound[i], records.dense(None if updates.whole else updates.rows(i), updates.one(i), ITEMS))
        for updates in chunks
        for i, user in enumerate(updates.users.tolist())
    }


# --- the sum ---------------------------------------------------------------------------------------------------------


@CASES
def test_the_shared_step_is_the_sum_of_its_users(loss, weighting, dropout):
    chunks = trained(case(loss, weighting, dropout))
    assert len(chunks) == 2
    for updates in chunks:
        total, losses = summed(updates, updates.expected), updates.losses.copy()
        assert updates.sound.all()
        assert is_shared(updates)
        assert off(updates, updates.expected) < 1e-6
        assert min(float(part.abs().max()) for part in total) > 1e-2
        np.testing.assert_allclose(losses, updates._stacked[1], atol=1e-5)
        wanted = updates.events if weighting == "events" else np.ones(len(updates))
        np.testing.assert_array_equal(updates.expected, wanted)


@CASES
def test_any_other_sum_is_that_of_its_users(loss, weighting, dropout):
    rng = np.random.default_rng(0)
    for updates in trained(case(loss, weighting, dropout)):
        without = updates.expected.copy()
        without[np.isin(updates.users, [4, 5])] = 0  # one in each chunk
        mixed = rng.random(len(updates)).astype(np.float32)
        mixed[::2] = 0
        for importance in (without, mixed, 2 * updates.expected):
            assert off(updates, importance) < 1e-6
        assert world.gap(summed(updates, without), summed(updates, updates.expected)) > 1e-3
        nothing = summed(updates, np.zeros(len(updates)))
        assert not any(part.any() for part in nothing)


@EACH_LOSS
@pytest.mark.parametrize("local", [{"steps": 3}, {"epochs": 2}])
def test_several_steps_are_summed_too(loss, local):
    for updates in trained(case(loss, **local)):
        assert not is_shared(updates)
        for importance in (updates.expected, np.arange(len(updates), dtype=np.float32)):
            assert off(updates, importance) < 1e-6


@EACH_LOSS
@pytest.mark.parametrize("weighting", ["events", "uniform"])
def test_users_without_a_target_add_nothing(loss, weighting):
    for users in ([3], [0, 3], [0]):
        (updates,) = trained(case(loss, weighting, 0.3), users)
        assert updates.sound.all()
        assert not updates.losses.any()
        assert not any(part.any() for part in summed(updates, updates.expected))
    (alone,) = trained(case(loss, weighting, 0.3), [4])
    (company,) = trained(case(loss, weighting, 0.3), [0, 4, 3])
    assert world.gap(summed(alone, alone.expected), summed(company, company.expected)) < 1e-6


@EACH_LOSS
def test_neither_chunks_nor_order_change_the_sum(loss, monkeypatch):
    experiment = case(loss, dropout=0.3)

    def whole(users):
        parts = [summed(updates, updates.expected) for updates in trained(experiment, users)]
        return [sum(each) for each in zip(*parts, strict=True)]

    together = whole(EVERYBODY)
    for size in (1, 3):
        monkeypatch.setattr("client.batches.CHUNK_USERS", size)
        assert world.gap(whole(EVERYBODY[::-1]), together) < 2e-6


@EACH_LOSS
def test_the_same_twice_is_the_same_bits(loss):
    experiment = case(loss, dropout=0.3)
    for one, other in zip(trained(experiment), trained(experiment), strict=True):
        assert world.same(summed(one, one.expected), summed(other, other.expected))
        assert one.losses.tolist() == other.losses.tolist()


# --- trouble ---------------------------------------------------------------------------------------------------------


def times(factor):
    return lambda losses, hit: losses * torch.where(hit, factor, 1.0)


def broken_gradient(losses, hit):
    """Finite losses, some of them with a gradient that is not a number."""
    losses = losses.clone()
    losses[hit] = losses[hit] + (losses[hit] - losses[hit].detach()).sqrt()
    return losses


TROUBLE = {
    "a loss that is NaN": times(np.nan),
    "an infinite loss": times(np.inf),
    "an infinite loss with a finite gradient": lambda losses, hit: losses + torch.where(hit, np.inf, 0.0),
    "a gradient that is NaN": broken_gradient,
    "numbers whose squares overflow": times(1e35),
    "an update that is too large": times(1e9),
}


def plant(monkeypatch, change, users=(BROKEN,)):
    """Change the loss of some users, in either pass."""
    loss = training.step_loss

    def changed(experiment, table, parameters, problem, step, round_):
        losses = loss(experiment, table, parameters, problem, step, round_)
        return change(losses, torch.from_numpy(np.isin(problem.windows.users, users)))

    for module in (training, gradients):
        monkeypatch.setattr(module, "step_loss", changed)


@pytest.mark.parametrize("trouble", TROUBLE)
@EACH_LOSS
def test_one_users_trouble_is_its_own(loss, trouble, monkeypatch):
    experiment = case(loss, dropout=0.3)
    sound = singles(trained(experiment))
    plant(monkeypatch, TROUBLE[trouble])
    chunks = trained(experiment)
    for user, (healthy, change) in singles(chunks).items():
        assert healthy == (user != BROKEN)
        if healthy:
            assert world.gap(change, sound[user][1]) < 1e-6
    for updates in chunks:
        importance = np.where(updates.sound, updates.expected, 0).astype(np.float32)
        assert off(updates, importance) < 1e-6
        assert np.isfinite(updates.losses[updates.sound]).all()
        assert updates.events[updates.users == BROKEN].all()


@EACH_LOSS
def test_only_the_chunk_in_trouble_falls_back(loss, monkeypatch):
    plant(monkeypatch, TROUBLE["a loss that is NaN"])
    for updates in trained(case(loss)):
        updates.summed(np.where(updates.sound, updates.expected, 0).astype(np.float32))
        assert is_shared(updates) == (BROKEN not in updates.users)


@EACH_LOSS
def test_a_sum_too_large_of_updates_that_are_not_refuses_nobody(loss, monkeypatch):
    experiment = case(loss)
    (small,) = trained(experiment, [6, 7, 8, 9, 10])
    largest = max(float(torch.hypot(*map(torch.linalg.vector_norm, small.one(i)))) for i in range(5))
    scale = 0.9 * LARGEST / largest
    plant(monkeypatch, lambda losses, hit: losses * scale)
    (updates,) = trained(experiment, [6, 7, 8, 9, 10])
    assert updates.sound.all()
    total = summed(updates, updates.expected)
    assert float(torch.hypot(*map(torch.linalg.vector_norm, total))) > LARGEST
    expected = [scale * part for part in records.added(small, small.expected, ITEMS)]
    assert world.gap(total, expected) / scale / updates.expected.sum() < 1e-6


@pytest.mark.parametrize(("share", "healthy"), [(0.9, True), (1.1, False)])
@EACH_LOSS
def test_the_bound_of_an_update(loss, share, healthy, monkeypatch):
    (small,) = trained(case(loss, "uniform"), [BROKEN])
    norm = float(torch.hypot(*map(torch.linalg.vector_norm, small.one(0))))
    plant(monkeypatch, lambda losses, hit: losses * (share * LARGEST / norm))
    (updates,) = trained(case(loss, "uniform"), [BROKEN])
    assert updates.sound.tolist() == [healthy]


@EACH_LOSS
@pytest.mark.parametrize("local", [{"steps": 1}, {"steps": 2}])
def test_who_counts_nothing_may_hold_anything(loss, local, monkeypatch):
    plant(monkeypatch, TROUBLE["a loss that is NaN"])
    (updates,) = trained(case(loss, **local), [BROKEN, 7])
    importance = np.array([0, 2], dtype=np.float32)
    assert torch.isnan(updates.one(0).body).any()
    total = summed(updates, importance)
    assert all(torch.isfinite(part).all() for part in total)
    assert off(updates, importance) < 1e-6
