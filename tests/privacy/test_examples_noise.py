"""The noise of DP-SGD on devices, its several steps against a slow loop, and what the server is told."""

from math import sqrt

import numpy as np
import pytest
import torch

from client import cohort
from client.examples import train_examples
from common.config import LocalConfig
from common.privacy.noise import Reproducible
from common.seeding import uniform_integers
from tests.privacy import alone, private
from tests.support import reference, world

ITEMS = alone.ITEMS
Z, LR, BOUND, EXAMPLES = 1.5, 0.3, 0.1, 2
STD = LR * Z * BOUND / EXAMPLES
RNGS = ["reproducible", "secure"]
WIDE = {"dim": 32}
MANY = 100  # items, so that an update has about ten thousand numbers
HISTORIES = world.random_histories([9, 0, 5, 14], ITEMS - 5)
EACH_LOSS = pytest.mark.parametrize("loss", world.LOSSES)


def noisy(loss="softmax", steps=1, model=None, federation=None, **privacy):
    return alone.experiment(
        loss=loss,
        privacy={"noise_multiplier": Z, **privacy},
        federation={"local": {"steps": steps, "lr": LR}, **(federation or {})},
        model=model or {},
    )


def of_nobody(experiment, users=2, round_=1):
    """Updates of users without any events, which are noise alone."""
    return alone.updates(experiment, [[]] * users, round_=round_, items=MANY)


# --- the noise -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rng", RNGS)
@pytest.mark.parametrize("steps", [1, 4])
def test_the_noise_is_as_large_as_is_accounted_for_on_every_coordinate(rng, steps):
    """Over several steps its variance adds up, so no step's noise is another's."""
    experiment = noisy(steps=steps, model=WIDE, rng=rng)
    (chunk,) = alone.chunks(experiment, [[], []], items=MANY)
    tables = [chunk.one(i).table for i in (0, 1)]
    assert all((table.abs().sum(-1) > 0).all() for table in tables)
    for update in alone.each([chunk]).values():
        std = STD * sqrt(steps)
        assert (update != 0).mean() > 0.9999
        assert private.fits(update, std) > 1e-6
        assert private.fits(update, std * 2 / 3) < 1e-6
        assert private.fits(update, std * 3 / 2) < 1e-6
        assert abs(update.std() / std - 1) < 5 / sqrt(2 * len(update))


@EACH_LOSS
def test_all_rows_move_whatever_a_user_has_seen(loss):
    (chunk,) = alone.chunks(noisy(loss), HISTORIES)
    assert chunk.whole
    for i in range(len(HISTORIES)):
        assert (chunk.one(i).table.abs().sum(-1) > 0).all()
        assert chunk.rows(i).tolist() == list(range(ITEMS))
        assert chunk.counts[i] == ITEMS


@EACH_LOSS
def test_the_same_noise_lies_on_an_update_as_on_none(loss):
    """The noise of a user hangs on nothing but its key."""
    plain, whole = (alone.updates(noisy(loss, noise_multiplier=z), HISTORIES) for z in (0.0, Z))
    noise = alone.updates(noisy(loss), [[] for _ in HISTORIES])
    for user in range(len(HISTORIES)):
        np.testing.assert_allclose(whole[user], plain[user] + noise[user], rtol=0, atol=2e-7)


@pytest.mark.parametrize("rng", RNGS)
def test_no_noise_is_drawn_twice(rng):
    experiment = noisy(model=WIDE, rng=rng)
    drawn = [update for round_ in (1, 2, 3) for update in of_nobody(experiment, 3, round_).values()]
    table = np.corrcoef(drawn) - np.eye(len(drawn))
    assert np.abs(table).max() < 6 / sqrt(len(drawn[0]))


@pytest.mark.parametrize(("rng", "same"), [("reproducible", True), ("secure", False)])
def test_the_same_key_gives_the_same_bits_unless_the_noise_is_secure(rng, same):
    experiment = noisy(rng=rng, sampling_rate=0.5)
    one, other = (alone.updates(experiment, HISTORIES) for _ in range(2))
    for user in range(len(HISTORIES)):
        assert np.array_equal(one[user], other[user]) == same
        assert same or abs(np.corrcoef(one[1], other[1])[0, 1]) < 6 / sqrt(len(one[1]))


# --- several steps, against a slow loop ------------------------------------------------------------------------------


def slow(experiment, weights, history, user, round_):
    """One user's change in double precision: segment by segment, each clipped, added up, noised."""
    privacy, steps = experiment.privacy, experiment.federation.local.steps
    plain = experiment.federation.model_copy(update={"local": LocalConfig(steps=1, lr=1.0)})
    one_step = experiment.model_copy(update={"federation": plain})  # whose update is minus the gradient
    here = [part.double() for part in weights]
    segments = [history[i : i + privacy.segment] for i in range(0, len(history), privacy.segment)]
    for step in range(steps):
        total = [torch.zeros_like(part) for part in here]
        coins = uniform_integers(experiment.seed, f"segments-{step}", round_, [user], len(segments), 2**31)[0]
        for place, segment in enumerate(segments):
            if coins[place] / 2**31 < privacy.sampling_rate:
                name = (user * 2**20 + place) * steps + step
                minus, _ = reference.train(one_step, type(weights)(*here), segment, name, round_)
                norm = sqrt(sum(float(part.square().sum()) for part in minus))
                factor = min(1.0, privacy.clipping_norm / norm) if norm else 0.0
                total = [a - factor * b for a, b in zip(total, minus, strict=True)]
        sizes = [part.numel() for part in here]
        drawn = Reproducible(experiment.seed).many(sum(sizes), "device-noise", round_, step, user).double()
        std = privacy.noise_multiplier * privacy.clipping_norm
        noise = [part.view_as(like) for part, like in zip(drawn.split(sizes), here, strict=True)]
        rate = experiment.federation.local.lr / privacy.examples
        here = [w - rate * (g + std * n) for w, g, n in zip(here, total, noise, strict=True)]
    return private.flat(here) - private.flat(weights)


@EACH_LOSS
@pytest.mark.parametrize(("steps", "z", "bound", "lr"), [(1, 0.0, 0.3, 1.0), (3, 0.0, 100.0, 0.5), (3, 0.7, 0.3, 1.0)])
def test_training_is_what_a_slow_loop_makes(loss, steps, z, bound, lr):
    """Clipped or not, with noise or without, with dropout; with one user whose coins may all fall the other way."""
    experiment = noisy(
        loss,
        model={"dropout": 0.2},
        federation={"local": {"steps": steps, "lr": lr}},
        noise_multiplier=z,
        clipping_norm=bound,
        sampling_rate=0.6,
    )
    weights = world.weights(experiment.model, ITEMS)
    found = alone.updates(experiment, HISTORIES, round_=2)
    for user, history in enumerate(HISTORIES):
        assert np.abs(found[user] - slow(experiment, weights, history, user, 2)).max() < 1e-5


# --- chunks and sums -------------------------------------------------------------------------------------------------


@EACH_LOSS
def test_chunks_of_any_size_give_the_same(loss, monkeypatch):
    experiment = noisy(loss, steps=2, model={"dropout": 0.2}, sampling_rate=0.7)
    whole = alone.chunks(experiment, HISTORIES)
    monkeypatch.setattr(cohort, "SEGMENT_BYTES", 4000)
    single = alone.chunks(experiment, HISTORIES)
    assert len(whole) == 1
    assert len(single) >= 3
    one, other = alone.each(whole), alone.each(single)
    assert sorted(one) == sorted(other) == list(range(len(HISTORIES)))
    for user, update in one.items():
        np.testing.assert_allclose(other[user], update, rtol=0, atol=1e-6)


def test_a_sum_is_the_sum_of_single_updates():
    (chunk,) = alone.chunks(noisy(), HISTORIES)
    updates = alone.each([chunk])
    for importance in ([1, 1, 1, 1], [1, 0, 0, 1], [0, 2, 0.5, 0]):
        rows, total = chunk.summed(np.array(importance, dtype=np.float32))
        assert rows is None
        expected = sum(scale * updates[user] for user, scale in enumerate(importance))
        np.testing.assert_allclose(private.flat(total), expected, rtol=0, atol=1e-6)


def test_an_empty_cohort_trains_nobody():
    assert alone.chunks(noisy(), HISTORIES, users=np.zeros(0, dtype=np.int64)) == []


def test_training_leaves_the_global_weights_alone():
    experiment = noisy(steps=2)
    weights, before = (world.weights(experiment.model, ITEMS) for _ in range(2))
    train_examples(experiment, weights, world.sequences(HISTORIES, held_out=False), np.arange(4), 1)
    assert world.same(weights, before)


# --- what the server hears -------------------------------------------------------------------------------------------


def device_of(experiment, histories=HISTORIES):
    return world.device(experiment, world.sequences(histories, held_out=False), ITEMS)


def test_a_reply_tells_nothing_that_is_not_noised():
    experiment = noisy()
    for user, reply in enumerate(alone.replies(experiment, device_of(experiment), range(4))):
        assert alone.said(reply) == {"user": user, "participations": 1}
        assert alone.sent(reply).shape == (8 * ITEMS + len(world.weights(experiment.model, 1).body),)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("share", [0.5, 1.0001, 3.0])
def test_on_top_of_it_the_whole_noised_update_is_clipped_for_the_server(steps, share):
    on_device = {"kind": "example-level", "rng": "reproducible", "noise_multiplier": Z, "clipping_norm": BOUND}
    on_device |= {"segment": 4, "sampling_rate": 0.7, "examples": EXAMPLES}
    experiment = private.experiment(privacy={"on_device": on_device}, federation={"local": {"lr": LR, "steps": steps}})
    free = {
        user: np.linalg.norm(u) for user, u in alone.updates(noisy(steps=steps, sampling_rate=0.7), HISTORIES).items()
    }
    clip = share * free[0]
    device = device_of(experiment)
    plain = [alone.sent(reply) for reply in alone.replies(experiment, device, range(4), clip=1e9)]
    told = alone.replies(experiment, device, range(4), clip=clip)
    for user, reply in enumerate(told):
        norm, update = np.linalg.norm(plain[user]), alone.sent(reply)
        assert norm == pytest.approx(free[user], rel=1e-5)
        assert alone.said(reply) == {"user": user, "participations": 2, "below": int(norm <= clip)}
        assert np.linalg.norm(update) <= clip * (1 + 1e-6)
        np.testing.assert_allclose(update, plain[user] * min(1, clip / norm), rtol=0, atol=1e-6)
    assert {alone.said(reply)["below"] for reply in told} <= ({0, 1} if share < 3 else {1})
