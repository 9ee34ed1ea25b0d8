"""DP-SGD on devices: what an example is, what one of them can move, and the noise; all of it through real training."""

from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client import examples
from client.problem import shared_negatives
from common.seeding import uniform_integers
from tests.privacy import alone
from tests.support import world

ITEMS, SEGMENTS = alone.ITEMS, 2**20
BOUND, LR, EXAMPLES = 0.1, 0.3, 2
LIMIT, SLACK = LR * BOUND / EXAMPLES, 1 + 1e-5
HEAVY = 4  # a user with fifty times as many events as user 2
HISTORIES = world.random_histories([0, 1, 4, 11, 200, 9], ITEMS - 5)  # some items are left as negatives
EACH_LOSS = pytest.mark.parametrize("loss", world.LOSSES)
ADDED = {"noise_multiplier": 1.5}


def drawn(experiment, histories, users=None, round_=1, step=0, held_out=False):
    """Events of each segment of a step by (user, place)."""
    users = np.arange(len(histories)) if users is None else np.array(users)
    data = world.sequences(histories, held_out)
    owner, problem = examples.draw(experiment, data, users, ITEMS, round_, step)
    names, events, lengths, *_ = problem.windows
    places = names // (experiment.federation.local.steps or 1) - users[owner] * SEGMENTS
    found = zip(users[owner].tolist(), places.tolist(), events[:, 0].tolist(), lengths[:, 0].tolist(), strict=True)
    return {(user, place): row[:length] for user, place, row, length in found}


# --- segments --------------------------------------------------------------------------------------------------------


def test_segments_by_hand():
    experiment = alone.experiment(privacy={"segment": 3})
    found = drawn(experiment, [[5, 6, 7, 8, 9, 10, 11], [], [3], [1, 2, 3]])
    assert found == {(0, 0): [5, 6, 7], (0, 1): [8, 9, 10], (0, 2): [11], (2, 0): [3], (3, 0): [1, 2, 3]}
    found = drawn(experiment, [[5, 6, 7, 8, 9, 10, 11], [], [3], [1, 2, 3]], held_out=True)
    assert found == {(0, 0): [5, 6, 7], (0, 1): [8, 9], (2, 0): [3], (3, 0): [1]}


@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(2, 7), st.booleans(), st.integers(0, 99))
def test_segments_tile_the_training_history(lengths, segment, held_out, seed):
    """Each event lies in exactly one, counted from the start, and held-out ones in none."""
    experiment = alone.experiment(privacy={"segment": segment})
    histories = world.random_histories(lengths, ITEMS, seed)
    data, found = world.sequences(histories, held_out), drawn(experiment, histories, held_out=held_out)
    assert list(found) == sorted(found)
    for user, history in enumerate(histories):
        mine = [events for (owner, _), events in found.items() if owner == user]
        training = history[: data.train_end[user] - data.offsets[user]]
        assert mine == [training[i : i + segment] for i in range(0, len(training), segment)]


def test_each_segment_has_its_own_coin_in_each_step_and_round():
    experiment = alone.experiment(privacy={"sampling_rate": 0.3}, federation={"local": {"steps": 3}})
    histories = world.random_histories([4 * 400] * 5, ITEMS)
    taken = {(r, s): set(drawn(experiment, histories, None, r, s)) for r in (1, 2) for s in (0, 1, 2)}
    n = 5 * 400
    for key, these in taken.items():
        assert abs(len(these) - 0.3 * n) < 5 * sqrt(n * 0.3 * 0.7)
        for other in [other for other in taken if other > key]:
            assert abs(len(these & taken[other]) - 0.09 * n) < 5 * sqrt(n * 0.09 * 0.91)
    by_user = [{place for user, place in taken[1, 0] if user == u} for u in range(5)]
    assert len({frozenset(places) for places in by_user}) == 5
    assert set(drawn(experiment, histories, [3], 1, 0)) == {key for key in taken[1, 0] if key[0] == 3}


def test_secret_coins_are_never_the_same():
    histories = world.random_histories([400], ITEMS)
    for rng, count in (("secure", 2), ("reproducible", 1)):
        experiment = alone.experiment(privacy={"sampling_rate": 0.5, "rng": rng})
        assert len({frozenset(drawn(experiment, histories)) for _ in range(2)}) == count


@EACH_LOSS
def test_what_has_nothing_to_train_on_adds_nothing(loss):
    experiment = alone.experiment(loss=loss, model={"dropout": 0.2})
    four, five = HISTORIES[2], [*HISTORIES[2], 7]
    found = alone.updates(experiment, [[], [3], four])
    assert not found[0].any()
    assert not found[1].any()
    assert found[2].any()
    np.testing.assert_array_equal(alone.updates(experiment, [[], [3], five])[2], found[2])


@EACH_LOSS
def test_held_out_events_change_nothing(loss):
    experiment = alone.experiment(loss=loss)
    one, other = ([HISTORIES[3][:9] + held_out] for held_out in ([1, 2], [8, 9]))
    one, other = (alone.updates(experiment, histories, held_out=True)[0] for histories in (one, other))
    assert one.any()
    np.testing.assert_array_equal(one, other)


# --- what one segment can move ---------------------------------------------------------------------------------------


@pytest.fixture
def leave_out(monkeypatch):
    """Makes coins of some segments of a user fall the other way; all else is as ever."""

    def without(user, places):
        def coins(seed, purpose, round_, users, n, high):
            tossed = uniform_integers(seed, purpose, round_, users, n, high)
            rows = np.flatnonzero(np.asarray(users) == user)
            tossed[np.ix_(rows, [place for place in places if place < n])] = high
            return tossed

        monkeypatch.setattr(examples, "uniform_integers", coins)

    return without


def changed(history, place, items, segment=4):
    """The same history with other events in one segment."""
    return [*history[: place * segment], *items[: len(history) - place * segment], *history[(place + 1) * segment :]]


@EACH_LOSS
@pytest.mark.parametrize("user", [2, 3, HEAVY])
def test_one_segment_moves_its_user_by_no_more_than_the_bound(loss, user, leave_out):
    experiment, moved = alone.experiment(loss=loss, model={"dropout": 0.2}), []
    whole = alone.updates(experiment, HISTORIES)
    for place in {0, (len(HISTORIES[user]) - 1) // 4, min(2, (len(HISTORIES[user]) - 1) // 4)}:
        leave_out(user, [place])
        rest = alone.updates(experiment, HISTORIES)
        moved.append(np.linalg.norm(whole[user] - rest[user]))
        np.testing.assert_array_equal(rest[5], whole[5])
    assert max(moved) <= LIMIT * SLACK
    assert min(moved) >= LIMIT * 0.999  # the bound is not loose: all of these are clipped to it


@EACH_LOSS
@pytest.mark.parametrize("user", [2, 3, HEAVY])
def test_another_segment_moves_its_user_by_no_more_than_twice_the_bound(loss, user):
    experiment = alone.experiment(loss=loss, model={"dropout": 0.2})
    whole = alone.updates(experiment, HISTORIES)[user]
    for place in {0, (len(HISTORIES[user]) - 1) // 4}:
        for items in ([15, 16, 17, 18], [19] * 4):
            other = [changed(h, place, items) if u == user else h for u, h in enumerate(HISTORIES)]
            moved = np.linalg.norm(alone.updates(experiment, other)[user] - whole)
            assert 0.1 * LIMIT < moved <= 2 * LIMIT * SLACK


@EACH_LOSS
@pytest.mark.parametrize("round_", range(1, 6))
def test_a_segment_trains_the_same_whatever_the_others_hold(loss, round_, leave_out):
    """What is a negative for one segment must not hang on another's items."""
    experiment = alone.experiment(loss=loss, model={"dropout": 0.2})
    history = world.random_histories([12], ITEMS)[0]
    leave_out(0, [0, 2])
    alone_ = alone.updates(experiment, [history], round_=round_)[0]
    assert alone_.any()
    for other in ([*range(20)] * 2, [history[5]] * 4, [0, 1, 2, 3], [19, 18, 17, 16]):
        beside = changed(changed(history, 0, other[:4]), 2, other[-4:])
        np.testing.assert_array_equal(alone.updates(experiment, [beside], round_=round_)[0], alone_)


@EACH_LOSS
@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), place=st.integers(0, 2), rate=st.sampled_from([0.4, 1.0]))
def test_any_change_of_a_segment_is_bounded(loss, seed, place, rate):
    experiment = alone.experiment(loss=loss, privacy={"sampling_rate": rate}, federation={"local": {"lr": 5.0}})
    before, after = world.random_histories([12, 4], ITEMS, seed)
    histories = [before, changed(before, place, after)]
    found = [alone.updates(experiment, [history], round_=seed + 1)[0] for history in histories]
    assert np.linalg.norm(found[0] - found[1]) <= 2 * 5.0 * BOUND / EXAMPLES * SLACK


# --- one user's trouble is its own -----------------------------------------------------------------------------------


@EACH_LOSS
@pytest.mark.parametrize("steps", [1, 3])
def test_another_user_changes_no_bit(loss, steps):
    """Or the last one, where it has more or fewer segments: sums over batches of another size."""
    privacy, local = {"sampling_rate": 0.7, **ADDED}, {"local": {"steps": steps}}
    experiment = alone.experiment(loss=loss, privacy=privacy, model={"dropout": 0.2}, federation=local)
    first = alone.chunks(experiment, HISTORIES)
    assert len(first) == 1
    for length, tolerance in ((11, 0), (0, 2e-7), (90, 2e-7)):
        other = world.random_histories([length], ITEMS, 8)[0]
        second = alone.updates(experiment, [other if user == 3 else h for user, h in enumerate(HISTORIES)])
        for user, update in alone.each(first).items():
            assert (np.abs(second[user] - update).max() > tolerance) == (user == 3)


@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("loss", ["sampled-softmax", "gbce", "bce"])
@pytest.mark.parametrize("steps", [1, 3])
def test_broken_numbers_are_worth_nothing_and_the_others_stay(loss, steps, value):
    local, item = {"local": {"steps": steps}}, 7
    histories = [[1, 2, 3], [5, 6, item, 8], [1, 3, 4]]
    noisy, plain = (alone.experiment(loss=loss, privacy=price, federation=local) for price in (ADDED, {}))
    sound, broken = (world.weights(noisy.model, ITEMS) for _ in range(2))
    broken.table[item] = value
    for round_ in range(1, 99):  # until one in which the item is not by chance a negative of the others
        before, after = (alone.updates(plain, histories, round_=round_, weights=here) for here in (sound, broken))
        if all(np.array_equal(before[user], after[user]) for user in (0, 2)):
            break
    else:
        pytest.fail("one user's numbers have changed the others'")
    assert before[1].any()
    assert not after[1].any()
    found, noise = (alone.updates(noisy, told, round_=round_, weights=broken) for told in (histories, [[], [], []]))
    np.testing.assert_array_equal(found[1], noise[1])
    whole = alone.updates(noisy, histories, round_=round_, weights=sound)
    for user in (0, 2):
        assert after[user].any()
        np.testing.assert_array_equal(found[user], whole[user])


def test_of_a_user_with_one_broken_segment_the_others_count(leave_out):
    experiment = alone.experiment(loss="sampled-softmax", privacy=ADDED)
    broken, histories = world.weights(experiment.model, ITEMS), [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]
    broken.table[6] = np.nan
    round_ = next(r for r in range(1, 60) if 6 not in shared_negatives(experiment.loss, 0, r, ITEMS))
    found = alone.updates(experiment, histories, round_=round_, weights=broken)[0]
    leave_out(0, [1])
    rest = alone.updates(experiment, histories, round_=round_)[0]
    np.testing.assert_allclose(found, rest, rtol=0, atol=2e-7)
