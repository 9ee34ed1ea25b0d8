"""What one user can move: through the real strategy, never more than the noise is made for.

Weights start at nought and the server adds the mean update, so the weights afterwards are the release.
"""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from client import step
from common.wire import LARGEST, UPDATE
from server.ledger import UPDATE as UPDATES
from simulations.grid import InProcessGrid
from tests.privacy import private
from tests.support import world

ITEMS, MEAN_COHORT, BOUND = private.ITEMS, 5, 0.1
LIMIT = BOUND / MEAN_COHORT
SLACK = 1 + 1e-5
HEAVY = 9  # a user with fifty times as many events as user 2
HISTORIES = world.random_histories([1, 3, 4, 6, 8, 9, 11, 14, 20, 200], ITEMS - 5)  # some items are left as negatives
USERS = list(range(len(HISTORIES)))
LOCALS = {"one step": {"steps": 1}, "three steps": {"steps": 3}, "epochs": {"epochs": 1}}
EACH = pytest.mark.parametrize(
    ("loss", "local"), [pytest.param(a, b, id=f"{a}-{b}") for a in world.LOSSES for b in LOCALS]
)


def setup(loss="softmax", local="one step", **privacy):
    return private.experiment(
        loss=world.LOSSES[loss],
        model={"dropout": 0.2, "max_length": 11},
        privacy={"noise_multiplier": 0.0, "clipping_norm": BOUND, **privacy},
        federation={"cohort": MEAN_COHORT, "local": {"lr": 0.3, **LOCALS[local]}},
    )


def trained(experiment, histories=HISTORIES, users=USERS, clip=BOUND, engine="vectorized"):
    """What the users of one process answer."""
    device = world.device(experiment, world.sequences(histories, held_out=False), ITEMS)
    weights = world.weights(experiment.model, ITEMS)
    return InProcessGrid(device, engine).send_and_receive(private.asked(experiment, weights, users, clip))


def travelled(message):
    """The same reply as it arrives over a network: nothing but numbers."""
    record = message.content.array_records[UPDATE]
    message.content.array_records[UPDATE] = ArrayRecord({name: Array(array.numpy()) for name, array in record.items()})
    return message


def released(experiment, messages):
    return private.flat(private.released(experiment, messages, len(USERS)))


def gap(experiment, one, other):
    return float(np.linalg.norm(released(experiment, one) - released(experiment, other)))


# --- add or remove one -----------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("way", ["here", "travelled", "never asked"])
def test_leaving_one_user_out_moves_the_mean_by_no_more_than_the_bound(loss, local, way):
    """Its reply is left out of those that wait in this process or came from elsewhere, or it never trained."""
    experiment = setup(loss, local)
    whole = trained(experiment)
    if way == "travelled":
        whole = [travelled(reply) for reply in whole]
    left_out = USERS if way != "never asked" else [2, HEAVY]
    moved = {}
    for user in left_out:
        others = [other for other in USERS if other != user]
        rest = trained(experiment, users=others) if way == "never asked" else [whole[other] for other in others]
        moved[user] = gap(experiment, whole, rest)
    assert max(moved.values()) <= LIMIT * SLACK
    assert moved.get(0, 0) < 1e-6 * LIMIT  # nothing to train on; sums in another order
    clipped = [user for user, each in moved.items() if each >= LIMIT * 0.9999]
    assert HEAVY in clipped
    assert len(clipped) >= 0.6 * len(left_out)  # the bound is not loose: all these are clipped to it


@EACH
def test_another_history_moves_the_mean_by_no_more_than_twice_the_bound(loss, local):
    experiment = setup(loss, local)
    whole = released(experiment, trained(experiment))
    for user in (0, 2, 6, HEAVY):
        for length in (1, 300):
            other = list(HISTORIES)
            other[user] = world.random_histories([length], ITEMS, seed=user + 100)[0]
            moved = np.linalg.norm(released(experiment, trained(experiment, other)) - whole)
            assert moved <= 2 * LIMIT * SLACK


def test_opposite_updates_reach_twice_the_bound():
    experiment = setup()
    others = [private.message(user, *private.numbers(experiment, user, 3.0)) for user in (0, 1)]
    table, body = private.numbers(experiment, 7, 30.0)
    found = gap(experiment, [*others, private.message(5, table, body)], [*others, private.message(5, -table, -body)])
    assert found == pytest.approx(2 * LIMIT, rel=1e-5)


@pytest.mark.parametrize("events", [0, 1, 50, 2**31 - 1])
def test_the_number_of_events_weighs_nothing(events):
    experiment = setup()
    update = private.numbers(experiment, 1, 1.0)
    one, other = (released(experiment, [private.message(4, *update, events=n)]) for n in (1, events))
    np.testing.assert_array_equal(one, other)
    assert np.linalg.norm(other) == pytest.approx(LIMIT, rel=1e-5)


def test_without_a_clip_the_bound_would_not_hold(monkeypatch):
    """So the tests above can fail: the device clips, and the server does for those who do not."""
    experiment = setup()
    monkeypatch.setattr("client.training.clip_factors", lambda norms, bound: norms * 0 + 1)
    without_heavy = [user for user in USERS if user != HEAVY]
    found = gap(experiment, trained(experiment), trained(experiment, users=without_heavy))
    assert found > 1.5 * LIMIT


# --- strangers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1e-3, 0.999, 1.001, 2, 1000, 1e5])
@pytest.mark.parametrize("rows", [None, [3, 0, 7]])
def test_the_server_clips_what_comes_from_elsewhere(factor, rows):
    experiment = setup()
    update = private.numbers(experiment, 1, factor * BOUND, rows)
    near = trained(experiment, users=[0, 1, 2, 3])
    found = gap(experiment, [*near, private.message(6, *update, rows)], near)
    assert found <= LIMIT * SLACK
    assert found == pytest.approx(min(1, factor) * LIMIT, rel=1e-5)


def test_a_client_that_does_not_clip_is_clipped():
    """As from a device that was told no bound, or does not keep to it."""
    experiment = setup()
    kept, loose = ([travelled(reply) for reply in trained(experiment, clip=clip)] for clip in (BOUND, None))
    assert max(private.norm([a.numpy() for a in m.content.array_records[UPDATE].values()]) for m in loose) > 2 * BOUND
    np.testing.assert_allclose(released(experiment, loose), released(experiment, kept), atol=1e-6 * LIMIT)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, 3 * LARGEST])
@pytest.mark.parametrize("part", ["table", "body"])
def test_what_is_not_finite_contributes_exactly_nothing(value, part):
    experiment = setup()
    near = [travelled(reply) for reply in trained(experiment, users=[0, 1, 2, 3])]
    table, body = private.numbers(experiment, 1, 1.0)
    (table if part == "table" else body).reshape(-1)[-1] = value
    found = released(experiment, [*near, private.message(6, table, body)])
    np.testing.assert_array_equal(found, released(experiment, near))
    assert np.isfinite(found).all()


@pytest.mark.parametrize("engine", ["vectorized", "sequential"])
@pytest.mark.parametrize("local", LOCALS)
def test_a_device_in_trouble_contributes_exactly_nothing(engine, local, monkeypatch):
    experiment = setup("sampled-softmax", local)
    device = world.device(experiment, world.sequences(HISTORIES, held_out=False), ITEMS)
    monkeypatch.setattr("client.device._open", lambda *_: device)
    expected = released(experiment, trained(experiment, users=[u for u in USERS if u != 8], engine=engine))
    keep, bits, seen = step.keep_mask, step.uniform_bits, []
    monkeypatch.setattr(step, "uniform_bits", lambda *given: seen.append(given[3]) or bits(*given))

    def poisoned(drawn, share):
        mask = keep(drawn, share)
        mask[np.asarray(seen.pop()) == 8] = np.nan
        return mask

    monkeypatch.setattr(step, "keep_mask", poisoned)
    replies = trained(experiment, engine=engine)
    assert [reply.has_error() for reply in replies] == [user == 8 for user in USERS]
    np.testing.assert_allclose(released(experiment, replies), expected, atol=1e-6 * LIMIT)


def test_a_second_reply_of_one_user_counts_for_nothing():
    experiment = setup()
    first, second = (private.message(4, *private.numbers(experiment, seed, 1.0)) for seed in (1, 2))
    again = private.message(4, *private.numbers(experiment, 1, 1.0))
    np.testing.assert_array_equal(released(experiment, [first, second]), released(experiment, [again]))


@given(
    st.lists(
        st.tuples(
            st.floats(0, 1e5), st.sampled_from([None, [], [2], [19, 0, 4]]), st.sampled_from([0.0, np.nan, np.inf])
        ),
        min_size=1,
        max_size=6,
    ),
    st.data(),
)
@settings(max_examples=60)
def test_any_cohort_of_strangers_keeps_the_bound(cohort, data):
    experiment = setup()

    def answers(without=None):
        made = []
        for user, (norm, rows, poison) in enumerate(cohort):
            table, body = private.numbers(experiment, user, norm, rows)
            body[0] += np.float32(poison)
            if user != without:
                made.append(private.message(user, table, body, rows))
        return made

    gone = data.draw(st.integers(0, len(cohort) - 1))
    whole = private.released(experiment, answers())
    found = private.norm([a - b for a, b in zip(whole, private.released(experiment, answers(gone)), strict=True)])
    norm, _, poison = cohort[gone]
    assert found <= LIMIT * SLACK
    assert found == pytest.approx(min(norm, BOUND) / MEAN_COHORT if poison == 0 else 0, abs=2e-5 * LIMIT)


# A catalogue of 3,000 items; what single precision loses grows with it.
SPIKE = {"constant": (0.1, 0.1), "a few large ones": (1.0, 2e-4)}


@pytest.mark.parametrize("numbers", SPIKE)
def test_the_server_measures_large_updates_well_enough(numbers):
    items = 3000
    experiment = private.experiment(model={"dim": 64}, privacy={"noise_multiplier": 0.0}, federation={"cohort": 5})
    table = np.full((items, 64), SPIKE[numbers][1], dtype=np.float32)
    table[0] = SPIKE[numbers][0]
    body = np.zeros(len(private.zeros(experiment, 1).body), dtype=np.float32)
    update, _ = private.curator(experiment, 10, items).mean(
        1, [private.reply(1, table, body)], private.zeros(experiment, items)
    )
    assert private.norm(update) <= 1 / 5 * SLACK


# --- the denominator -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("users", [[3], [3, 4, 5], [1, 2, 3, 4, 5, 6, 7, 8, 9]])
def test_the_sum_is_divided_by_the_mean_cohort_whoever_came(users):
    experiment = setup()
    single = sum(released(experiment, trained(experiment, users=[user])) for user in users)
    np.testing.assert_allclose(released(experiment, trained(experiment, users=users)), single, atol=1e-6 * LIMIT)
    assert np.linalg.norm(released(experiment, trained(experiment, users=[3]))) == pytest.approx(LIMIT, rel=1e-5)


@pytest.mark.parametrize(("cohort", "population"), [(5, 10), (2, 10), (8, 10), (20, 10)])
def test_the_denominator_is_rate_times_users(cohort, population):
    experiment = private.experiment(privacy={"noise_multiplier": 0.0}, federation={"cohort": cohort})
    messages = [private.message(1, *private.numbers(experiment, 1, 50.0))]
    assert private.norm(private.released(experiment, messages, population)) == pytest.approx(
        1 / min(cohort, population), rel=1e-5
    )


def test_an_empty_round_is_noised_and_paid_for():
    experiment = private.experiment()
    strategy = private.strategy(experiment)
    assert strategy.curator.card(100)["epsilon"] == 0
    strategy.aggregate_train(1, [])
    assert all((part != 0).all() for part in strategy.weights)
    assert strategy.curator.ledger.count(UPDATES) == 1
    assert strategy.curator.card(100)["epsilon"] > 0
    assert strategy.curator.card(100)["rounds"] == 1
