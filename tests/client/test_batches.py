"""Windows of a cohort: by hand, then that every event is trained on once an epoch and that company changes nothing.

And the chunks that a cohort is cut into: of one width each, no larger than told, each user in one of them.
"""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client import batches
from client.batches import bucket_widths, chunks, local_steps, pieces, windows
from common.config import LocalConfig
from tests.support import world

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any)


def planned(experiment, data, users, round_=1):
    """Windows of each chunk of a cohort."""
    users = np.array(users, dtype=np.int64)
    return [windows(experiment, data, chunk, round_) for chunk in chunks(experiment, data, users, lambda *_: 1)]


def cut(histories, users=None, round_=1, longest=6, **local):
    """Each user's windows as lists of its real events, one list a local step; inactive steps are left out."""
    experiment = world.experiment(model={"max_length": longest}, federation={"local": local})
    data = world.sequences(histories, held_out=False)
    users = np.arange(len(histories)) if users is None else np.array(users)
    found = {}
    for bucket in planned(experiment, data, users, round_):
        for user, events, lengths in zip(*bucket[:3], strict=True):
            assert int(user) not in found
            found[int(user)] = [row[:n].tolist() for row, n in zip(events, lengths, strict=True) if n]
    return found


def numbered(lengths):
    """Histories whose events are their own places."""
    return [list(range(length)) for length in lengths]


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_widths_by_hand():
    assert bucket_widths(50).tolist() == [8, 16, 32, 50]
    assert bucket_widths(200).tolist() == [8, 16, 32, 64, 128, 200]
    assert [bucket_widths(longest).tolist() for longest in (1, 8, 11)] == [[1], [8], [8, 11]]


@given(st.integers(1, 3000))
def test_widths_waste_little(longest):
    widths = bucket_widths(longest)
    assert widths[-1] == longest
    assert (np.diff(widths) > 0).all()
    assert (widths[1:] < 2.6 * widths[:-1]).all()


def test_steps_by_hand():
    histories = np.array([0, 1, 2, 7, 8, 13, 14])
    assert pieces(histories, 6).tolist() == [1, 1, 1, 1, 2, 2, 3]
    assert local_steps(LocalConfig(), histories, 6).tolist() == [1] * 7
    assert local_steps(LocalConfig(steps=3), histories, 6).tolist() == [3] * 7
    assert local_steps(LocalConfig(epochs=2), histories, 6).tolist() == [2, 2, 2, 2, 4, 4, 6]


def test_the_last_window():
    assert cut(numbered([10, 7, 3]), steps=2) == {
        0: [[3, 4, 5, 6, 7, 8, 9]] * 2,
        1: [[0, 1, 2, 3, 4, 5, 6]] * 2,
        2: [[0, 1, 2]] * 2,
    }


def test_epochs_by_hand():
    assert cut(numbered([14, 8, 2]), epochs=2) == {
        0: [[7, 8, 9, 10, 11, 12, 13], [1, 2, 3, 4, 5, 6, 7], [0, 1]] * 2,
        1: [[1, 2, 3, 4, 5, 6, 7], [0, 1]] * 2,
        2: [[0, 1]] * 2,
    }


def test_shapes_padding_and_inactive_steps():
    experiment = world.experiment(federation={"local": {"epochs": 1}})
    data = world.sequences([[5, 6, 7], list(range(20, 34))], held_out=False)
    (bucket,) = planned(experiment, data, [1, 0])
    assert bucket.users.tolist() == [1, 0]
    assert bucket.events.shape == (2, 3, 7)  # (C, S, W + 1)
    assert bucket.lengths.tolist() == [[7, 7, 2], [3, 0, 0]]
    assert bucket.events[1, 0].tolist() == [5, 6, 7, 0, 0, 0, 0]


@pytest.mark.parametrize("local", [{"steps": 1}, {"steps": 2}, {"epochs": 2}, {"steps": 2, "window": "random"}])
def test_too_short_a_history_trains_nothing(local):
    experiment = world.experiment(federation={"local": local})
    data = world.sequences([[4], [], [1, 2, 3]], held_out=False)
    for bucket in planned(experiment, data, range(3)):
        for user, lengths in zip(bucket.users, bucket.lengths, strict=True):
            assert (lengths.max() >= 2) == (user == 2)


def test_only_training_events_are_cut():
    experiment = world.experiment()
    (bucket,) = planned(experiment, world.sequences([[1, 2, 3, 4, 5]]), [0])
    assert bucket.events[0, 0, : bucket.lengths[0, 0]].tolist() == [1, 2, 3]


# --- properties ------------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(LENGTHS, st.integers(1, 17), st.integers(1, 3))
def test_an_epoch_has_every_event_but_the_first_as_a_target_once(lengths, longest, epochs):
    found = cut(numbered(lengths), longest=longest, epochs=epochs)
    for user, length in enumerate(lengths):
        targets = Counter(event for window in found[user] for event in window[1:])
        assert targets == dict.fromkeys(range(1, length), epochs)
        assert all(window == list(range(window[0], window[0] + len(window))) for window in found[user])


@settings(max_examples=50)
@given(LENGTHS, st.sampled_from([{"steps": 2}, {"epochs": 2}, {"steps": 3, "window": "random"}]), st.data())
def test_company_changes_nothing(lengths, local, data):
    together = cut(numbered(lengths), longest=9, **local)
    for user in range(len(lengths)):
        assert cut(numbered(lengths), [user], longest=9, **local)[user] == together[user]
    some = data.draw(st.permutations(range(len(lengths))))
    assert cut(numbered(lengths), some, longest=9, **local) == together


@settings(max_examples=50)
@given(LENGTHS, st.integers(1, 40))
def test_the_width_depends_on_the_user_alone(lengths, longest):
    experiment, data = (
        world.experiment(model={"max_length": longest}),
        world.sequences(numbered(lengths), held_out=False),
    )

    def widths(users):
        return {int(u): b.events.shape[2] for b in planned(experiment, data, users) for u in b.users}

    together = widths(range(len(lengths)))
    for user, length in enumerate(lengths):
        assert widths([user]) == {user: together[user]}
        inputs = min(max(length - 1, 1), longest)
        assert together[user] - 1 == min(width for width in bucket_widths(longest).tolist() if width >= inputs)


def test_random_windows_are_full_uniform_and_keyed():
    steps, history = 400, [list(range(11))] * 2
    found = cut(history, steps=steps, window="random")
    starts = Counter(window[0] for window in found[0])
    assert all(len(window) == 7 for window in found[0])
    assert sorted(starts) == [0, 1, 2, 3, 4]
    assert min(starts.values()) > 50  # 80 expected, standard deviation 8
    assert found[0] != found[1]
    assert found == cut(history, steps=steps, window="random")
    assert found != cut(history, steps=steps, window="random", round_=2)
    assert cut(history, steps=3, window="random")[0] == found[0][:3]


def test_a_short_history_has_one_window():
    assert cut(numbered([5]), steps=3, window="random") == {0: [[0, 1, 2, 3, 4]] * 3}


# --- chunks ----------------------------------------------------------------------------------------------------------


def chunked(lengths, users=None, cost=lambda width, steps: 1, longest=11, **local):
    experiment = world.experiment(model={"max_length": longest}, federation={"local": local})
    data = world.sequences(numbered(lengths), held_out=False)
    users = np.array(range(len(lengths)) if users is None else users, dtype=np.int64)
    return [chunk.tolist() for chunk in chunks(experiment, data, users, cost)]


def test_chunks_by_hand(monkeypatch):
    # Inputs 1, 8, 11 and 11, 0, 8: of the widths 8 and 11; users of a width stay in the order of the cohort.
    # The widest come first, and a width's chunks are of nearly one size.
    lengths = [2, 9, 12, 30, 1, 9]
    assert chunked(lengths) == [[2, 3], [0, 1, 4, 5]]
    assert chunked(lengths, [5, 3, 1, 0]) == [[3], [5, 1, 0]]
    assert chunked(lengths, []) == []
    monkeypatch.setattr(batches, "CHUNK_USERS", 3)
    assert chunked(lengths) == [[2, 3], [0, 1], [4, 5]]
    monkeypatch.setattr(batches, "CHUNK_EVENTS", 11)
    assert chunked(lengths) == [[2], [3], [0], [1], [4], [5]]


def test_a_chunk_fits_its_bytes(monkeypatch):
    monkeypatch.setattr(batches, "CHUNK_BYTES", 100)
    asked = []

    def cost(width, steps):
        asked.append((width, steps))
        return 5 * width * steps

    lengths = [2, 9, 12, 30, 1, 9]
    assert chunked(lengths, cost=cost) == [[2], [3], [0, 1], [4, 5]]  # 100 // 55 and 100 // 40
    assert chunked(lengths, cost=cost, epochs=1) == [[2], [3], [0, 1], [4, 5]]
    assert asked == [(11, 1), (8, 1), (11, 3), (8, 1)]  # the longest of the chunk's users sets its steps
    assert chunked(lengths, cost=lambda width, steps: 10**9) == [[user] for user in (2, 3, 0, 1, 4, 5)]


def test_nothing_but_three_constants_bounds_a_chunk():
    """No setting and no machine: sums run chunk by chunk, so another chunking would be another result."""
    assert (batches.CHUNK_USERS, batches.CHUNK_EVENTS, batches.CHUNK_BYTES) == (128, 2400, 256 * 2**20)
    lengths, plans = [5] * 200, []
    for runtime in ({}, {"memory_mb": 64, "threads": 7, "engine": "sequential"}):
        experiment, data = world.experiment(runtime=runtime), world.sequences(numbered(lengths), held_out=False)
        plans.append([len(chunk) for chunk in chunks(experiment, data, np.arange(200), lambda *_: 2**22)])
    assert plans == [[50, 50, 50, 50]] * 2


@settings(max_examples=50)
@given(LENGTHS, st.integers(1, 40), st.integers(1, 4), st.data())
def test_each_user_is_in_one_chunk_of_its_own_width(lengths, longest, most, data):
    users = data.draw(st.permutations(range(len(lengths))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "CHUNK_USERS", most)
        found = chunked(lengths, users, longest=longest)
    assert sorted(user for chunk in found for user in chunk) == sorted(users)
    assert all(1 <= len(chunk) <= most for chunk in found)
    widths = bucket_widths(longest).tolist()
    for chunk in found:
        inputs = [min(max(lengths[user] - 1, 1), longest) for user in chunk]
        assert len({min(width for width in widths if width >= n) for n in inputs}) == 1
