"""Local privacy: what a device sends is its clipped update and noise on every coordinate, whatever befalls it."""

from math import exp, sqrt

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, MetricRecord
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm as normal

from client import device as devices
from client import training
from client.handlers import handle_evaluate
from client.noised import noised_locally
from common.errors import UsageError
from common.privacy.devices import settle
from common.wire import METRICS, UPDATE
from server.curator import curator
from server.roster import Roster
from server.strategy import FederatedRanking
from simulations.grid import InProcessGrid
from tests.privacy import alone, private
from tests.support import world

ITEMS, BOUND, Z, HEAVY = alone.ITEMS, 0.1, 1.5, 4
HISTORIES = world.random_histories([0, 1, 4, 11, 200, 9], ITEMS - 5)
NOBODY = [[0]] * len(HISTORIES)  # one event each, which is nothing to train on
USERS = range(len(HISTORIES))
LOCALS = {"one step": {"steps": 1}, "three steps": {"steps": 3, "prox": 0.3}, "epochs": {"epochs": 2}}
EACH_LOSS = pytest.mark.parametrize("loss", world.LOSSES)
EACH = pytest.mark.parametrize(
    ("loss", "local"), [pytest.param(a, b, id=f"{a}-{b}") for a in world.LOSSES for b in LOCALS]
)
RNGS = ["reproducible", "secure"]


def setup(loss="softmax", local="one step", z=Z, lr=0.3, model=None, **privacy):
    return alone.experiment(
        "local",
        loss,
        privacy={"noise_multiplier": z, "clipping_norm": BOUND, **privacy},
        federation={"local": {**LOCALS[local], "lr": lr}, "cohort": 3},
        model={"dropout": 0.2, **(model or {})},
    )


def device_of(experiment, histories=HISTORIES):
    return world.device(experiment, world.sequences(histories, held_out=False), ITEMS)


def answers(experiment, engine, monkeypatch, weights=None, **config):
    device = device_of(experiment)
    monkeypatch.setattr(devices, "_open", lambda experiment, path: device)
    weights = world.weights(experiment.model, ITEMS) if weights is None else weights
    return InProcessGrid(device, engine).send_and_receive(world.ask("train", experiment, weights, USERS, **config))


ENGINES = pytest.mark.parametrize("engine", ["vectorized", "sequential"])


# --- the update ------------------------------------------------------------------------------------------------------


@EACH
def test_without_noise_it_is_the_clipped_update(loss, local):
    """Of a device in an open federation, scaled down to the bound where it is longer, in all rows of the table."""
    clipped = 0
    plain = world.experiment(
        loss=world.LOSSES[loss], model={"dropout": 0.2}, federation={"local": {**LOCALS[local], "lr": 0.3}}
    )
    for lr_scale in (1.0, 0.02):
        experiment, free = setup(loss, local, 0.0, 0.3 * lr_scale), plain
        free = plain.model_copy(update={"federation": experiment.federation})
        found = alone.updates(experiment, HISTORIES)
        for chunk in alone.chunks(free, HISTORIES):
            for i, user in enumerate(chunk.users.tolist()):
                table = torch.zeros(ITEMS, 8)
                table[chunk.rows(i)] = chunk.one(i).table
                whole = private.flat([table, chunk.one(i).body])
                length = np.linalg.norm(whole)
                expected = whole * min(1, BOUND / length) if length else whole
                np.testing.assert_allclose(found[user], expected, rtol=0, atol=1e-6)
                clipped += length > BOUND
    assert 0 < clipped < 2 * len(HISTORIES)


@pytest.mark.parametrize("rng", RNGS)
@pytest.mark.parametrize("loss", ["softmax", "bce"])
def test_the_noise_is_as_large_as_the_bound_asks_on_every_coordinate(rng, loss):
    """Not as the learning rate or the number of steps would have it."""
    plain, experiment = (setup(loss, "three steps", z, model={"dim": 32}, rng=rng) for z in (0.0, Z))
    before = alone.updates(plain, HISTORIES, items=100)
    chunks = alone.chunks(experiment, HISTORIES, items=100)
    for user, update in alone.each(chunks).items():
        noise = update - before[user]
        assert private.fits(noise, Z * BOUND) > 1e-6
        assert private.fits(noise, Z * BOUND * 2 / 3) < 1e-6
        assert private.fits(noise, Z * BOUND * 3 / 2) < 1e-6
        assert (np.abs(noise[: 100 * 32].reshape(100, 32)).sum(-1) > 0).all()
    assert all(chunk.whole for chunk in chunks)


@pytest.mark.parametrize("rng", RNGS)
def test_no_noise_is_drawn_twice(rng):
    experiment = setup(model={"dim": 32}, rng=rng)
    drawn = [update for round_ in (1, 2, 3) for update in alone.updates(experiment, NOBODY[:3], round_=round_).values()]
    table = np.corrcoef(drawn) - np.eye(9)
    assert np.abs(table).max() < 6 / sqrt(len(drawn[0]))


@pytest.mark.parametrize(("rng", "same"), [("reproducible", True), ("secure", False)])
def test_the_same_key_gives_the_same_bits_unless_the_noise_is_secure(rng, same):
    one, other = (alone.updates(setup(rng=rng), HISTORIES) for _ in range(2))
    assert [np.array_equal(one[user], other[user]) for user in USERS] == [same] * len(HISTORIES)


def test_another_mode_has_no_local_noise():
    with pytest.raises(UsageError, match="example-level is not local"):
        noised_locally(alone.experiment(), [], ITEMS, 1)


# --- what a user can move --------------------------------------------------------------------------------------------


@EACH
def test_another_history_moves_an_update_by_no_more_than_twice_the_bound(loss, local):
    experiment = setup(loss, local, 0.0)
    whole = alone.updates(experiment, HISTORIES)
    assert np.linalg.norm(whole[HEAVY]) == pytest.approx(BOUND, rel=1e-5)
    for user in (0, 2, HEAVY):
        for length in (1, 12, 300):
            other = list(HISTORIES)
            other[user] = world.random_histories([length], ITEMS, seed=user + 100)[0]
            found = alone.updates(experiment, other)
            assert np.linalg.norm(found[user] - whole[user]) <= 2 * BOUND * (1 + 1e-5)
            assert all(np.abs(found[u] - whole[u]).max() < 2e-7 for u in USERS if u != user)


@EACH_LOSS
@settings(max_examples=10)
@given(seed=st.integers(0, 10**6), lengths=st.tuples(st.integers(1, 30), st.integers(1, 30)))
def test_any_two_histories_are_within_twice_the_bound(loss, seed, lengths):
    experiment = setup(loss, z=0.0, lr=20.0)
    found = [alone.updates(experiment, [h])[0] for h in world.random_histories(lengths, ITEMS, seed)]
    assert np.linalg.norm(found[0] - found[1]) <= 2 * BOUND * (1 + 1e-5)


# --- trouble tells nothing -------------------------------------------------------------------------------------------


@ENGINES
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e38])
def test_an_update_that_is_not_finite_is_noise_alone_and_no_refusal(engine, value, monkeypatch):
    experiment = setup()
    broken = world.weights(experiment.model, ITEMS)
    broken.table[:] = value  # under full softmax everybody's
    noise = alone.updates(experiment, NOBODY)
    for user, reply in enumerate(answers(experiment, engine, monkeypatch, broken)):
        assert alone.said(reply) == {"user": user, "participations": 1}
        np.testing.assert_array_equal(alone.sent(reply), noise[user])


@EACH_LOSS
def test_one_user_whose_numbers_break_does_not_change_the_others(loss, monkeypatch):
    experiment = setup(loss)
    whole, noise = alone.updates(experiment, HISTORIES), alone.updates(experiment, NOBODY)
    real = training.own_gradients

    def wrong(*given, **more):
        tables, parts, losses = real(*given, **more)
        for table in tables:
            table[given[3].windows.users == 3] = torch.nan
        return tables, parts, losses

    monkeypatch.setattr(training, "own_gradients", wrong)
    found = alone.updates(experiment, HISTORIES)
    np.testing.assert_array_equal(found[3], noise[3])
    for user in (0, 1, 2, HEAVY, 5):
        np.testing.assert_array_equal(found[user], whole[user])


def test_an_update_that_is_too_large_is_noise_alone(monkeypatch):
    experiment = setup()
    noise = alone.updates(experiment, NOBODY)
    monkeypatch.setattr(training, "LARGEST", 0.0)
    found = alone.updates(experiment, HISTORIES)
    for user in USERS:
        np.testing.assert_array_equal(found[user], noise[user])


# --- what the server hears -------------------------------------------------------------------------------------------


@ENGINES
@EACH_LOSS
def test_a_reply_tells_nothing_that_is_not_noised(engine, loss, monkeypatch):
    """Neither rows, which would tell of items, nor losses nor counts; nor does it heed a bound of the server's."""
    experiment = setup(loss)
    found = answers(experiment, engine, monkeypatch, clip=1e-6)
    expected = alone.updates(experiment, HISTORIES)
    for user, reply in enumerate(found):
        assert alone.said(reply) == {"user": user, "participations": 1}
        shapes = {name: array.shape for name, array in reply.content.array_records[UPDATE].items()}
        assert shapes == {"table": (ITEMS, 8), "body": (len(world.weights(experiment.model, 1).body),)}
        assert set(reply.content) == {UPDATE, METRICS}
        np.testing.assert_allclose(alone.sent(reply), expected[user], rtol=0, atol=2e-7)


@pytest.mark.parametrize("travelled", [False, True])
def test_the_server_takes_the_plain_mean(travelled):
    experiment = setup()
    replies = alone.replies(experiment, device_of(experiment), USERS)
    sent = [alone.sent(reply) for reply in replies]
    for reply in replies if travelled else []:
        record = reply.content.array_records[UPDATE]
        reply.content.array_records[UPDATE] = ArrayRecord({name: Array(a.numpy()) for name, a in record.items()})
    world.identify()
    roster = Roster(range(world.NODE, world.NODE + len(HISTORIES)), ITEMS)
    made = FederatedRanking(experiment, roster, private.zeros(experiment))
    _, told = made.aggregate_train(1, replies)
    np.testing.assert_allclose(private.flat(made.weights), np.mean(sent, axis=0), rtol=0, atol=1e-6)
    assert set(told) == {"clients", "bytes_up_per_client", "rejected"}
    assert (told["clients"], told["rejected"]) == (len(HISTORIES), 0)
    assert made.curator.card(1)["epsilon"] == settle(experiment).cost(1, made.curator.card(1)["delta"])


def test_the_server_takes_no_reply_without_an_account():
    experiment = setup()
    replies = alone.replies(experiment, device_of(experiment), [2, 3])
    replies[0].content[METRICS] = MetricRecord({"user": 2, "events": 3, "loss": 0.5})
    world.identify()
    made = FederatedRanking(
        experiment, Roster(range(world.NODE, world.NODE + len(HISTORIES)), ITEMS), private.zeros(experiment)
    )
    _, told = made.aggregate_train(1, replies)
    assert (told["clients"], told["rejected"]) == (1, 1)


# --- the account -----------------------------------------------------------------------------------------------------


def gaussian(mu, delta):
    """ε at δ of telling N(0, 1) from N(µ, 1) (Balle & Wang, ICML 2018)."""

    def excess(epsilon):
        return normal.cdf(mu / 2 - epsilon / mu) - exp(epsilon + normal.logcdf(-mu / 2 - epsilon / mu)) - delta

    return brentq(excess, 0, 500)


@pytest.mark.parametrize(
    ("z", "k", "delta"), [(1, 1, 1e-5), (2, 1, 1e-6), (4, 10, 1e-5), (10, 50, 1e-7), (30, 3, 1e-3)]
)
def test_epsilon_of_all_participations_is_that_of_one_gaussian(z, k, delta):
    """Replaced as a whole, each update moves by twice the bound; nothing is amplified."""
    experiment = setup(z=float(z))
    assert settle(experiment).cost(k, delta) == pytest.approx(gaussian(2 * sqrt(k) / z, delta), rel=0.01)


# --- ranks -----------------------------------------------------------------------------------------------------------


def test_ranks_of_users_who_are_not_public_stay_on_the_device():
    """The server, which is the adversary here, sees ranks as they are; only those of public users are free."""
    held_out = {"privacy": "public-holdout", "holdout": 0.2}
    experiment = alone.experiment("local", evaluation=held_out, privacy={"noise_multiplier": Z})
    device = world.device(experiment, world.sequences(HISTORIES), ITEMS)
    public = curator(experiment, len(HISTORIES), ITEMS).judges("test", 0).tolist()
    asked = world.ask("evaluate", experiment, world.weights(experiment.model, ITEMS), USERS, split="test")
    replies = handle_evaluate(asked, USERS, device)
    told = [user for user in USERS if not replies[user].has_error() and "rank" in alone.said(replies[user])]
    assert set(told) <= set(public)
