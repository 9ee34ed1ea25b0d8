from collections import Counter

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data import rules
from common.data.table import Table
from common.errors import DataError
from common.sources import MovieLensData, PairsData

ROWS = st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("uvwxyz"), st.integers(0, 3)), max_size=60)


def events(rows):
    schema = {"user": pl.String, "item": pl.String, "time": pl.Int64}
    return pl.DataFrame([row[:3] for row in rows], schema=schema, orient="row")


def section(**options):
    return PairsData(kind="pairs", path="x", **options)


def test_order_by_hand():
    rows = [("b", "z", 5), ("a", "y", 9), ("b", "y", 5), ("a", "x", 1), ("b", "x", 5), ("b", "w", 4)]
    assert rules.ordered(events(rows)).rows() == [
        ("b", "w", 4),  # b came first in the file; its ties stay in the file's order: z y x
        ("b", "z", 5),
        ("b", "y", 5),
        ("b", "x", 5),
        ("a", "x", 1),
        ("a", "y", 9),
    ]


@settings(deadline=None)
@given(ROWS)
def test_order_is_a_stable_sort(rows):
    users = list(dict.fromkeys(user for user, _, _ in rows))
    expected = sorted(rows, key=lambda row: (users.index(row[0]), row[2]))  # Python's sort is stable
    assert rules.ordered(events(rows)).rows() == expected


@settings(deadline=None)
@given(ROWS)
def test_ids_play_no_part_in_the_order(rows):
    """Renaming all items changes nothing else: no tie is broken by id."""
    renamed = [(user, chr(ord("z") - ord(item) + ord("a")), time) for user, item, time in rows]
    back = pl.col("item").replace_strict({chr(ord("z") - ord(i) + ord("a")): i for i in "uvwxyz"}, default=None)
    assert rules.ordered(events(renamed)).with_columns(back).rows() == rules.ordered(events(rows)).rows()


def naive_core(rows, user_events, item_events):
    while True:
        users, items = Counter(row[0] for row in rows), Counter(row[1] for row in rows)
        kept = [row for row in rows if users[row[0]] >= user_events and items[row[1]] >= item_events]
        if kept == rows:
            return rows
        rows = kept


@settings(deadline=None)
@given(ROWS, st.integers(0, 5), st.integers(0, 5))
def test_k_core_is_the_fixpoint(rows, user_events, item_events):
    kept = rules.k_core(events(rows), user_events, item_events)
    assert kept.rows() == naive_core(rows, user_events, item_events)
    assert rules.k_core(kept, user_events, item_events).equals(kept)


def test_k_core_needs_more_than_one_pass():
    rows = [
        ("a", "x", 0),
        ("a", "y", 0),
        ("b", "y", 0),
        ("b", "z", 0),
        ("c", "z", 0),
    ]  # a chain: every cut makes a new one
    assert rules.k_core(events(rows), 2, 2).is_empty()


@pytest.mark.parametrize(("repeats", "expected"), [("keep", "xyxzx"), ("first", "xyz"), ("last", "yzx")])
def test_repeats(repeats, expected):
    frame = events([("a", item, time) for time, item in enumerate("xyxzx")])
    assert "".join(rules.kept(section(repeats=repeats), frame)["item"]) == expected


def test_repeats_are_collapsed_before_the_core_is_counted():
    frame = events([("a", "x", 0), ("a", "x", 1), ("b", "x", 2), ("b", "y", 3)])
    assert rules.kept(section(repeats="first", min_user_events=2), frame)["user"].to_list() == ["b", "b"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_user_events": 3}, r"data.min_user_events=3 leaves no events"),
        ({"min_item_events": 9}, r"data.min_item_events=9 leaves no events"),
        ({"min_user_events": 2, "min_item_events": 2}, r"data.min_user_events=2 with data.min_item_events=2 leaves"),
    ],
)
def test_nothing_left_names_the_filter(options, message):
    with pytest.raises(DataError, match=message):
        rules.kept(section(**options), events([("a", "x", 0), ("a", "y", 1), ("b", "x", 2)]))


def test_min_rating():
    frame = events([("a", "x", 0), ("a", "y", 1)]).with_columns(rating=pl.Series([3.0, 4.0]))
    config = MovieLensData(kind="movielens", path="x", min_rating=4)
    assert rules.kept(config, frame)["item"].to_list() == ["y"]
    with pytest.raises(DataError, match=r"data.min_rating=6.0 leaves no events"):
        rules.kept(config.model_copy(update={"min_rating": 6.0}), frame)


def test_measure():
    frame = events([("a", "x", 1), ("a", "y", 1), ("b", "x", 1), ("b", "x", 2), ("c", "x", 7)])
    assert rules.measure(Table(frame, timed=True), frame) == {
        "users": 3,
        "items": 2,
        "events": 5,
        "mean_length": 5 / 3,
        "density": 5 / 6,
        "tied_last_pair_share": 0.5,  # c has no pair
    }
    assert rules.measure(Table(frame, timed=False), frame)["tied_last_pair_share"] is None
    alone = frame.tail(1)
    assert rules.measure(Table(alone, timed=True), alone)["tied_last_pair_share"] is None
