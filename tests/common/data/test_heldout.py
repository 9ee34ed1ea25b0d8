"""A target behaviour, and what is taken away after the split: by hand, and by another program."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from common.data.catalogue import Catalogue
from common.data.prepare import intact, prepare
from common.data.sequences import Sequences
from common.errors import DataError

COLUMNS = {"behaviour": "how", "domain": "shop", "rating": "stars"}
ROWS = [  # user, item, time, how, shop, stars
    ("ann", "a", 1, "view", "toy", 1.0),
    ("ann", "b", 2, "buy", "toy", 2.0),
    ("bob", "c", 1, "buy", "game", 3.0),
    ("ann", "c", 3, "view", "game", 4.0),
    ("ann", "c", 4, "buy", "game", 5.0),
    ("ann", "d", 5, "view", "toy", 1.5),
    ("ann", "a", 6, "buy", "toy", 2.5),
    ("ann", "b", 7, "view", "toy", 3.5),
    ("bob", "a", 3, "buy", "toy", 4.5),
    ("bob", "b", 2, "view", "toy", 1.0),
    ("cat", "b", 1, "buy", "toy", 2.0),
    ("cat", "a", 2, "view", "toy", 3.0),
    ("dan", "a", 5, "view", "toy", 4.0),
    ("dan", "c", 6, "buy", "game", 5.0),
    ("dan", "d", 7, "buy", "toy", 1.0),
]
HOW = {"v": "view", "b": "buy"}
COMBINATIONS = [
    {},
    {"target": "buy"},
    {"target": "view", "only": {"domains": ["toy"]}},
    {"target": "buy", "only": {"behaviours": ["buy"]}},
    {"target": "buy", "only": {"behaviours": ["view", "buy"], "domains": ["game", "toy"]}},
]


def text(rows):
    return "user,item,time,how,shop,stars\n" + "".join(",".join(map(str, row)) + "\n" for row in rows)


@pytest.fixture
def made(source):
    """Prepare some rows with options."""

    def make(rows=ROWS, columns=COLUMNS, **options):
        return prepare(source("table", "t.csv", text(rows), columns=columns, **options))

    return make


def told(folder):
    """By user: events in words, number of training events, places of both held-out events among the user's own."""
    sequences, names = Sequences.open(folder), Catalogue.open(folder).item_ids()
    found = {}
    for user, name in enumerate(sequences.user_ids()):
        start, stop = sequences.offsets[user : user + 2]
        held = [
            int(place[user] - start) if place[user] >= 0 else None for place in (sequences.validation, sequences.test)
        ]
        events = [
            (names[sequences.items[at]], int(sequences.times[at]), sequences.behaviour_names[sequences.behaviours[at]])
            for at in range(start, stop)
        ]
        found[name] = (events, int(sequences.train_end[user] - start), *held)
    return found


def held_out(folder):
    """By user: what is trained on, and both held-out events."""
    return {
        user: ([event[0] for event in events[:end]], *(None if at is None else events[at][0] for at in held))
        for user, (events, end, *held) in told(folder).items()
    }


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_the_last_two_targets_are_held_out(made):
    """Bob's first purchase has nothing before it; cat has bought once only."""
    assert held_out(made(target="buy")) == {
        "ann": (["toy/a", "toy/b", "game/c"], "game/c", "toy/a"),
        "bob": (["game/c", "toy/b", "toy/a"], None, None),
        "cat": (["toy/b", "toy/a"], None, None),
        "dan": (["toy/a"], "game/c", "toy/d"),
    }
    assert held_out(made())["ann"] == (["toy/a", "toy/b", "game/c", "game/c", "toy/d"], "toy/a", "toy/b")


def test_the_target_is_written_down(made):
    folder = made(target="buy")
    facts, sequences = json.loads((folder / "manifest.json").read_text()), Sequences.open(folder)
    assert (facts["behaviours"], facts["domains"], facts["target"]) == (["buy", "view"], ["game", "toy"], 0)
    assert (sequences.behaviour_names, sequences.target, sequences.domain_names) == (
        ("buy", "view"),
        0,
        ("game", "toy"),
    )
    assert sequences.targets(np.array([[0, 1], [-1, 2]])).tolist() == [[False, True], [False, False]]
    assert sequences.domains.tolist() == [0, 1, 1, 1]
    assert sequences.ratings[:6].tolist() == [1.0, 2.0, 4.0, 5.0, 1.5, 2.5]
    assert Sequences.open(made()).target == -1


def test_from_two_points_in_time_the_first_targets_are_held_out(made):
    """Of fifteen times the points are those numbered 9 and 12: 5 and 6."""
    found = held_out(made(target="buy", split="global-time", validation_from=0.6, test_from=0.8))
    assert found == {
        "ann": (["toy/a", "toy/b", "game/c", "game/c"], None, "toy/a"),  # 6 lies beyond the second point
        "bob": (["game/c", "toy/b", "toy/a"], None, None),
        "cat": (["toy/b", "toy/a"], None, None),
        "dan": ([], None, "game/c"),  # the view of 5 is before the second point
    }
    found = held_out(made(target="view", split="global-time", validation_from=0.6, test_from=0.8))
    assert found["ann"][1:] == ("toy/d", "toy/b")
    assert found["dan"] == ([], None, None)


def test_a_targets_history_are_events_of_all_sorts(made):
    sequences = Sequences.open(made(target="buy"))
    users = np.arange(4)
    stops, _ = sequences.stops(users, "test")
    assert [(stop - start).item() for stop, start in zip(stops, sequences.starts(users), strict=True)] == [5, 0, 0, 2]
    items, rows = sequences.had(users, stops)  # bought before: b, c by ann and c by dan
    assert (items.tolist(), rows.tolist()) == ([2, 0, 0], [0, 0, 3])


def test_what_is_not_seen_vanishes_after_the_split(made):
    """What is held out is the same, or nothing; the catalogue is the same in any case."""
    assert held_out(made(target="buy", only={"behaviours": ["buy"]})) == {
        "ann": (["toy/b"], "game/c", "toy/a"),
        "bob": (["game/c", "toy/a"], None, None),
        "cat": (["toy/b"], None, None),
        "dan": ([], "game/c", "toy/d"),
    }
    assert held_out(made(target="buy", only={"domains": ["toy"]})) == {
        "ann": (["toy/a", "toy/b"], None, "toy/a"),
        "bob": (["toy/b", "toy/a"], None, None),
        "cat": (["toy/b", "toy/a"], None, None),
        "dan": (["toy/a"], None, "toy/d"),
    }
    assert held_out(made(only={"domains": ["game"]})) == {
        "ann": (["game/c", "game/c"], None, None),
        "bob": (["game/c"], None, None),
        "cat": ([], None, None),
        "dan": ([], "game/c", None),
    }


@pytest.mark.parametrize("options", COMBINATIONS)
def test_the_rest_of_the_folder_follows(made, options):
    folder, whole = made(**options), made(**{name: value for name, value in options.items() if name != "only"})
    few, all_ = Sequences.open(folder), Sequences.open(whole)
    assert Catalogue.open(folder).item_ids() == Catalogue.open(whole).item_ids()
    assert few.user_ids() == all_.user_ids()
    assert intact(folder)
    kept = json.loads((folder / "manifest.json").read_text())["kept"]
    assert kept == {"users": 4, "items": 4, "events": len(few.items)}
    assert len(few.times) == len(few.behaviours) == len(few.ratings) == len(few.items)
    rows = {(u, f"{shop}/{item}", time, how): stars for u, item, time, how, shop, stars in ROWS}
    flat = [(user, *event) for user, (events, *_) in told(folder).items() for event in events]
    assert few.ratings.tolist() == [rows[event] for event in flat]


def test_a_moments_targets_come_first(made):
    rows = [
        ("ann", item, int(time), HOW[how], "toy", 1)
        for item, time, how in ("a1v", "b2v", "c2b", "d2v", "e2b", "f3v", "g2v")
    ]
    file, first = (made(rows, target="buy", ties=ties) for ties in ("file", "target-first"))
    assert [event[0][-1] for event in told(file)["ann"][0]] == [*"abcdegf"]
    assert [event[0][-1] for event in told(first)["ann"][0]] == [*"acebdgf"]
    assert held_out(file)["ann"] == (["toy/a", "toy/b"], "toy/c", "toy/e")
    assert held_out(first)["ann"] == (["toy/a"], "toy/c", "toy/e")


def test_repeats_are_of_one_behaviour_in_one_domain(made):
    rows = [("ann", item, time, HOW[how], "toy", 1) for time, (item, how) in enumerate(["av", "ab", "bv", "av", "ab"])]
    rows.append(("ann", "a", 9, "view", "game", 1))
    first, last = (told(made(rows, repeats=repeats))["ann"][0] for repeats in ("first", "last"))
    assert [event[1:] for event in first] == [(0, "view"), (1, "buy"), (2, "view"), (9, "view")]
    assert [event[1:] for event in last] == [(2, "view"), (3, "view"), (4, "buy"), (9, "view")]


@pytest.mark.parametrize("harm", ["gone", "cut", "short"])
def test_damaged_domains_are_made_anew(made, harm):
    path = made() / "domains.npy"
    content, domains = path.read_bytes(), np.load(path)
    if harm == "short":
        np.save(path, domains[:-1])
    else:
        path.unlink() if harm == "gone" else path.write_bytes(content[:-2])
    assert made() / "domains.npy" == path
    assert path.read_bytes() == content


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target": "by"}, "data.target: .*'by'.*buy"),
        ({"only": {"behaviours": ["buy", "viewed"]}}, "data.only.behaviours: .*'viewed'.*view"),
        ({"only": {"domains": ["toys"]}}, "data.only.domains: .*'toys'.*toy"),
    ],
)
def test_an_unknown_name_is_told_the_nearest(made, options, said):
    with pytest.raises(DataError, match=said):
        made(**options)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"target": "buy"}, "data.target: .* no behaviour .*data.columns.behaviour"),
        ({"target": "buy", "ties": "target-first"}, "data.target: .* no behaviour .*data.columns.behaviour"),
        ({"only": {"behaviours": ["buy"]}}, "data.only.behaviours: .*data.columns.behaviour"),
        ({"only": {"domains": ["toy"]}}, "data.only.domains: .* no domain .*data.columns.domain"),
    ],
)
def test_a_source_that_does_not_tell_is_refused(made, cache, options, key):
    with pytest.raises(DataError, match=key):
        made(columns={}, **options)
    assert not any(cache.iterdir()), "nothing half-made"


def test_nothing_that_is_seen_is_refused(made):
    with pytest.raises(DataError, match="leaves no events"):
        made([row for row in ROWS if row[3:5] != ("buy", "game")], only={"behaviours": ["buy"], "domains": ["game"]})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cold": 0.1, "target": "buy"}, "cold goes with neither target nor only"),
        ({"cold": 0.1, "only": {"domains": ["toy"]}}, "cold goes with neither target nor only"),
        ({"ties": "target-first"}, "ties: target-first needs a target"),
        ({"only": {"domains": []}}, "only.domains"),
    ],
)
def test_what_does_not_go_together(source, options, said):
    with pytest.raises(ValueError, match=said):
        source("table", "t.csv", "", **options)


# --- against another program -----------------------------------------------------------------------------------------

EVENT = st.tuples(
    st.sampled_from(["ann", "bob", "cat"]),
    st.sampled_from("abc"),
    st.integers(0, 6),
    st.sampled_from(["view", "buy"]),
    st.sampled_from(["toy", "game"]),
    st.just(1),
)


def naive(rows, target=None, ties="file", repeats="keep", only=None, points=None):
    """One user after the other, in words."""
    only, found = only or {}, {}
    for user in dict.fromkeys(row[0] for row in rows):
        events = [(f"{shop}/{item}", time, how) for who, item, time, how, shop, _ in rows if who == user]
        events.sort(key=lambda event: (event[1], ties == "target-first" and event[2] != target))
        if repeats != "keep":
            once = {}
            for event in events if repeats == "last" else reversed(events):
                once[event[0], event[2]] = event
            events = [event for event in events if any(event is kept for kept in once.values())]
        may = [at for at, event in enumerate(events) if target in {None, event[2]}]
        if points is None:
            end, held = len(events), [None, None]
            if len(may) > 1 and may[-2] > 0:
                end, held = may[-2], may[-2:]
        else:
            first, second = (sum(event[1] < point for event in events) for point in points)
            end = first
            held = [
                next((at for at in may if first <= at < second), None) if first else None,
                next((at for at in may if at >= second), None) if second else None,
            ]
        seen = [
            event[2] in (only.get("behaviours") or [event[2]])
            and event[0].partition("/")[0] in (only.get("domains") or [event[0].partition("/")[0]])
            for event in events
        ]
        moved = [None if at is None or not seen[at] else sum(seen[:at]) for at in held]
        found[user] = ([event for event, stays in zip(events, seen, strict=True) if stays], sum(seen[:end]), *moved)
    return found


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(EVENT, min_size=1, max_size=25),
    st.sampled_from([None, "view", "buy"]),
    st.sampled_from(["file", "target-first"]),
    st.sampled_from(["keep", "first", "last"]),
    st.sampled_from([None, ["view"], ["buy"], ["view", "buy"]]),
    st.sampled_from([None, ["toy"], ["game"]]),
    st.booleans(),
)
@example([(*row[:5], 1) for row in ROWS], "buy", "target-first", "keep", ["buy"], ["toy"], True)
def test_it_is_what_another_program_says(made, rows, target, ties, repeats, behaviours, domains, by_time):
    assume(ties == "file" or target)
    assume({target, *(behaviours or ())} <= {None, *(row[3] for row in rows)})
    assume(set(domains or ()) <= {row[4] for row in rows})
    assume(not target or target in (behaviours or [target]))
    only = {"behaviours": behaviours, "domains": domains}
    points, options = None, {}
    if by_time:
        times = sorted(event[1] for events, *_ in naive(rows, target, ties, repeats).values() for event in events)
        points = [times[int(share * len(times))] for share in (0.5, 0.8)]
        assume(points[0] < points[1])
        options = {"split": "global-time", "validation_from": 0.5, "test_from": 0.8}
    wanted = naive(rows, target, ties, repeats, only, points)
    assume(any(events for events, *_ in wanted.values()))
    folder = made(rows, target=target, ties=ties, repeats=repeats, only=only, **options)
    assert told(folder) == wanted
    assert intact(folder)


def test_what_is_predicted_must_be_seen(made):
    with pytest.raises(DataError, match=r"data\.only\.behaviours leaves out data\.target=buy"):
        made(ROWS, target="buy", only={"behaviours": ["view"]})
