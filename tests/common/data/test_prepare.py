import json
import os
from pathlib import Path

import numpy as np
import pytest

from common.data import prepare as module
from common.data.catalogue import Catalogue
from common.data.prepare import describe, prepare
from common.data.sequences import Sequences
from common.errors import DataError
from common.sources import Columns, MovieLensData, PairsData, SequencesData, SyntheticData, TableData

PAIRS = "a x\nb y\na y\na z\nb x\n"


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def test_manifest(source, cache):
    folder = prepare(source("pairs", "my pairs.txt", PAIRS + "broken\n"))
    facts = manifest(folder)
    assert folder.parent == cache
    assert folder.name == f"my_pairs-{facts['digest']}"
    assert facts["format"] == 2
    assert facts["source"]["kind"] == "pairs"
    assert list(facts["source"]["files"]) == ["my pairs.txt"]
    assert facts["options"]["split"] == "leave-one-out"
    assert facts["bad_rows"] == {"count": 1, "first_lines": [6]}
    assert facts["kept"] == {"users": 2, "items": 3, "events": 5}


def test_describe(source):
    assert describe(source("pairs", "p.txt", PAIRS, min_user_events=3)) == {
        "users": 2,
        "items": 3,
        "events": 5,
        "mean_length": 2.5,
        "density": 5 / 6,
        "tied_last_pair_share": None,
        "kept": {"users": 1, "items": 3, "events": 3},
    }


def test_ratings_and_behaviours(source):
    content = "user,item,time,how,stars\na,x,2,buy,1.5\na,y,1,view,2\na,z,3,view,3\n"
    folder = prepare(source("table", "t.csv", content, columns=Columns(behaviour="how", rating="stars")))
    sequences = Sequences.open(folder)
    assert manifest(folder)["behaviours"] == ["buy", "view"]
    assert sequences.optional("behaviours").tolist() == [1, 0, 1]
    assert sequences.optional("ratings").tolist() == [2.0, 1.5, 3.0]
    assert sequences.times.tolist() == [1, 2, 3]


def test_an_event_without_rating_is_one(source):
    content = "user,item,time,stars\na,x,1,\na,y,2,2\na,z,3,many\n"
    columns = Columns(rating="stars")
    folder = prepare(source("table", "t.csv", content, columns=columns))
    assert np.isnan(Sequences.open(folder).ratings).tolist() == [True, False]  # "many" is malformed


def test_too_many_behaviours(source):
    content = "user,item,time,how\n" + "".join(f"a,x,{n},{n}\n" for n in range(200))
    with pytest.raises(DataError, match="200 different behaviours"):
        prepare(source("table", "t.csv", content, columns=Columns(behaviour="how")))


def test_domains_are_part_of_the_item(source):
    content = "user,item,time,shop\na,1,1,toy\na,1,2,game\n"
    folder = prepare(source("table", "t.csv", content, columns=Columns(domain="shop")))
    assert Catalogue.open(folder).item_ids() == ["game/1", "toy/1"]


def test_the_order_of_items_tells_nothing_of_events(source):
    """The catalogue travels to everybody: in the order of the events it would be the first user's history."""
    histories = ["a 9 10 b 2 1", "c 3 b 9 aa"]
    found = {
        tuple(Catalogue.open(prepare(source("sequences", f"{n}.txt", "\n".join(lines) + "\n"))).item_ids())
        for n, lines in enumerate((histories, histories[::-1], ["a aa b 1 2 3", "d 9 10 1"]))
    }
    assert found == {("1", "2", "3", "9", "10", "aa", "b")}


def test_global_time_needs_times(source):
    with pytest.raises(DataError, match="needs times"):
        prepare(source("pairs", "p.txt", PAIRS, split="global-time"))


def test_reused_while_nothing_changes(source, monkeypatch):
    config = source("pairs", "p.txt", PAIRS)
    folder = prepare(config)
    monkeypatch.setattr(module, "_write", None)  # a second writing would fail
    assert prepare(config) == folder


def test_another_place_is_the_same_data(source, tmp_path):
    config = source("pairs", "p.txt", PAIRS)
    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere" / "p.txt"
    moved.write_text(PAIRS)
    assert prepare(config.model_copy(update={"path": str(moved)})) == prepare(config)


def test_made_anew_when_content_or_options_change(source):
    first = prepare(source("pairs", "p.txt", PAIRS))
    assert prepare(source("pairs", "p.txt", PAIRS, min_user_events=3)) != first
    assert prepare(source("pairs", "p.txt", PAIRS, strict=True)) != first
    assert prepare(source("pairs", "p.txt", PAIRS + "c x\n")) != first


FILES = [
    "manifest.json",
    "items.npy",
    "times.npy",
    "offsets.npy",
    "train_end.npy",
    "validation.npy",
    "test.npy",
    "ratings.npy",
    "users.parquet",
    "catalogue.parquet",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [None, 0, 0.9])
def test_a_damaged_folder_is_made_anew(source, name, share):
    config = source("movielens", "u.data", "1\t10\t4\t1\n1\t11\t3\t2\n1\t12\t5\t3\n")
    folder = prepare(config)
    path = folder / name
    content = path.read_bytes()
    if share is None:
        path.unlink()
    else:
        path.write_bytes(content[: int(share * len(content))])
    assert prepare(config) == folder
    assert path.read_bytes() == content


def test_an_interrupt_leaves_nothing(source, cache, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "hold_out", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(source("pairs", "p.txt", PAIRS))
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HUSHREC_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/hushrec"),
        ({}, "/home/me/.cache/hushrec"),
        ({"HUSHREC_CACHE": "", "XDG_CACHE_HOME": ""}, "/home/me/.cache/hushrec"),
    ],
)
def test_place_of_the_cache(variables, expected, monkeypatch):
    for name in ("HUSHREC_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert module._cache() == Path(expected)


def test_no_cache_no_traceback(source, monkeypatch, tmp_path):
    config = source("pairs", "p.txt", PAIRS)
    monkeypatch.setenv("HUSHREC_CACHE", config.path)  # a file
    with pytest.raises(DataError, match="HUSHREC_CACHE"):
        prepare(config)


# --- real data: the counts of the publishers ------------------------------------------------------------------------

TMALL = Columns(user="user_id", item="brand_id", time="visit_datetime", behaviour="type")
GAMES = Columns(time="order", domain="domain")
REAL = [
    (MovieLensData(kind="movielens", path="ml-100k"), (943, 1682, 100_000), 0.44),
    (MovieLensData(kind="movielens", path="ml-latest-small"), (610, 9724, 100_836), 0.15),
    (PairsData(kind="pairs", path="ml-1m/ml-1m.txt"), (6040, 3416, 999_611), None),
    (SequencesData(kind="sequences", path="beauty/Beauty.txt"), (22_363, 12_101, 198_502), None),
    (SequencesData(kind="sequences", path="lastfm/LastFM.txt"), (1090, 3646, 52_551), None),
    (
        TableData(kind="table", path="tmall-2014/t_alibaba_data.csv", columns=TMALL, time_format="%m-%d"),
        (884, 9531, 182_880),
        0.67,
    ),
    (TableData(kind="table", path="game-toy/game_toy.csv", columns=GAMES), (7996, 11_735 + 37_868, 197_358), 0.0),
]


@pytest.mark.skipif("HUSHREC_DATA" not in os.environ, reason="HUSHREC_DATA does not name a folder with real data")
@pytest.mark.parametrize(("config", "counts", "tied"), REAL, ids=lambda value: getattr(value, "path", ""))
def test_real_data(config, counts, tied):
    found = describe(config)
    assert (found["users"], found["items"], found["events"]) == counts
    assert tuple(found["kept"].values()) == counts
    assert found["tied_last_pair_share"] == (None if tied is None else pytest.approx(tied, abs=0.005))
    folder = prepare(config)
    assert manifest(folder)["bad_rows"]["count"] == 0
    assert len(set(Catalogue.open(folder).item_ids())) == counts[1]
    sequences = Sequences.open(folder)
    ends = np.asarray(sequences.offsets[1:-1])
    rising = np.diff(sequences.times) >= 0
    rising[ends - 1] = True  # between two users
    assert rising.all()


@pytest.mark.skipif("HUSHREC_DATA" not in os.environ, reason="HUSHREC_DATA does not name a folder with real data")
def test_real_order_is_a_stable_sort():
    config = MovieLensData(kind="movielens", path="ml-100k")
    histories = {}
    for line in (Path(os.environ["HUSHREC_DATA"]) / "ml-100k" / "u.data").read_text().splitlines():
        user, item, _, time = line.split("\t")
        histories.setdefault(user, []).append((int(time), item))
    folder = prepare(config)
    sequences, ids = Sequences.open(folder), Catalogue.open(folder).item_ids()
    assert sequences.user_ids() == list(histories)
    for user, history in enumerate(histories.values()):
        mine = sequences.items[sequences.offsets[user] : sequences.offsets[user + 1]]
        assert [ids[item] for item in mine] == [item for _, item in sorted(history, key=lambda event: event[0])]


@pytest.mark.skipif("HUSHREC_DATA" not in os.environ, reason="HUSHREC_DATA does not name a folder with real data")
def test_real_titles():
    for path, item, title, genres in [
        ("ml-100k", "1", "Toy Story (1995)", ["Animation", "Children's", "Comedy"]),
        ("ml-100k", "543", "Misérables, Les (1995)", ["Drama", "Musical"]),
        ("ml-latest-small", "11", "American President, The (1995)", ["Comedy", "Drama", "Romance"]),
    ]:
        catalogue = Catalogue.open(prepare(MovieLensData(kind="movielens", path=path)))
        number = catalogue.index_of(item)
        assert (catalogue.titles()[number], catalogue.genres()[number]) == (title, genres)


def test_filtered_synthetic_data_goes_the_common_way():
    config = SyntheticData(kind="synthetic", users=50, items=30, mean_length=6, interests=3)
    whole = Sequences.open(prepare(config))
    same = Sequences.open(prepare(config.model_copy(update={"min_user_events": 2})))
    assert np.array_equal(whole.offsets, same.offsets)
    few = describe(config.model_copy(update={"min_item_events": 15}))
    assert few["kept"]["items"] < few["items"]
