import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.data.prepare import prepare
from common.data.sequences import Sequences
from common.errors import DataError

HISTORIES = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=7), min_size=1, max_size=6)
SHARED = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def lines(histories):
    return "".join(f"u{user} {' '.join(map(str, items))}\n" for user, items in enumerate(histories))


@pytest.fixture
def small(source):
    """Three users: a with 4 events, b with 2, c with 3; items are numbered x, y, z, zz."""
    return Sequences.open(prepare(source("sequences", "small.txt", "a x y z x\nb y x\nc zz z y\n")))


def users(sequences):
    return np.arange(len(sequences))


def test_layout(small):
    assert len(small) == 3
    assert small.user_ids() == ["a", "b", "c"]
    assert small.items.tolist() == [0, 1, 2, 0, 1, 0, 3, 2, 1]
    assert small.offsets.tolist() == [0, 4, 6, 9]
    assert small.train_end.tolist() == [2, 6, 7]
    assert small.validation.tolist() == [2, -1, 7]
    assert small.test.tolist() == [3, -1, 8]


def test_stops_of_every_split(small):
    stops, targets = small.stops(users(small), "train")
    assert (stops.tolist(), targets.tolist()) == ([2, 6, 7], [-1, -1, -1])
    stops, targets = small.stops(users(small), "validation")
    assert (stops.tolist(), targets.tolist()) == ([2, 4, 7], [2, -1, 2])  # b: nothing held out, empty history
    stops, targets = small.stops(users(small), "test")
    assert (stops.tolist(), targets.tolist()) == ([3, 4, 8], [0, -1, 1])
    assert targets.dtype == stops.dtype == np.int64


def test_events_and_windows_by_hand(small):
    chosen = np.array([2, 1, 0, 2])  # any order, repeats allowed
    stops, _ = small.stops(chosen, "test")
    items, rows = small.events(chosen, stops)
    assert items.tolist() == [3, 2, 0, 1, 2, 3, 2]
    assert rows.tolist() == [0, 0, 2, 2, 2, 3, 3]
    window, lengths = small.windows(chosen, stops, 2)
    assert window.tolist() == [[3, 2], [0, 0], [1, 2], [3, 2]]
    assert lengths.tolist() == [2, 0, 2, 2]
    assert {array.dtype for array in (items, rows, window, lengths)} == {np.dtype(np.int64)}


def test_no_users(small):
    nobody = np.empty(0, dtype=np.int64)
    stops, targets = small.stops(nobody, "test")
    assert len(stops) == len(targets) == 0
    assert len(small.events(nobody, stops)[0]) == 0
    assert small.windows(nobody, stops, 3)[0].shape == (0, 3)


@SHARED
@given(HISTORIES, st.integers(1, 9), st.sampled_from(["train", "validation", "test"]))
def test_same_as_a_naive_loop(source, histories, length, split):
    sequences = Sequences.open(prepare(source("sequences", "any.txt", lines(histories))))
    numbers = {item: number for number, item in enumerate(sorted(set(sum(histories, []))))}
    stops, targets = sequences.stops(users(sequences), split)
    items, rows = sequences.events(users(sequences), stops)
    window, lengths = sequences.windows(users(sequences), stops, length)
    for user, history in enumerate(histories):
        known = [numbers[item] for item in history]
        held_out = len(known) >= 3
        before = {"validation": known[:-2], "test": known[:-1], "train": known[:-2]}[split] if held_out else []
        target = -1 if split == "train" or not held_out else known[-2 if split == "validation" else -1]
        if split == "train" and not held_out:
            before = known
        assert targets[user] == target
        assert items[rows == user].tolist() == before
        assert lengths[user] == len(before[-length:])
        assert window[user].tolist() == before[-length:] + [0] * (length - len(before[-length:]))


@SHARED
@given(HISTORIES)
def test_round_trip(source, histories):
    folder = prepare(source("sequences", "any.txt", lines(histories)))
    sequences = Sequences.open(folder)
    items, rows = sequences.events(users(sequences), sequences.offsets[1:])
    from common.data.catalogue import Catalogue

    ids = Catalogue.open(folder).item_ids()
    assert [[ids[item] for item in items[rows == user]] for user in users(sequences)] == [
        list(map(str, history)) for history in histories
    ]


def test_index_of_names_the_nearest(small):
    assert small.index_of("c") == 2
    with pytest.raises(DataError, match="no user 'q'"):
        small.index_of("q")


def test_optional_arrays(small):
    assert small.optional("ratings") is None


def cut(path):
    path.write_bytes(path.read_bytes()[:-4])


def other_type(path):
    np.save(path, np.load(path).astype(np.float64))


def other_size(path):
    np.save(path, np.load(path)[:-1])


def pickled(path):
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)


@pytest.mark.parametrize("damage", [cut, other_type, other_size, pickled, lambda path: path.unlink()])
@pytest.mark.parametrize("name", ["items", "times", "offsets", "train_end", "validation", "test"])
def test_damage_is_named(small, name, damage):
    damage(small.folder / f"{name}.npy")
    with pytest.raises(DataError, match=rf"damaged \({name}.npy.*delete it"):
        Sequences.open(small.folder)


def test_offsets_that_do_not_fit(small):
    np.save(small.folder / "offsets.npy", np.array([0, 4, 6, 8]))
    with pytest.raises(DataError, match="runs from 0 to 8"):
        Sequences.open(small.folder)


def test_damaged_user_ids(small):
    cut(small.folder / "users.parquet")
    with pytest.raises(DataError, match=r"users.parquet"):
        Sequences.open(small.folder).user_ids()


def test_only_asked_rows_are_read(small):
    """The arrays are views of the files, not copies."""
    assert all(isinstance(getattr(small, name).base, np.memmap) for name in ("items", "offsets", "test"))
