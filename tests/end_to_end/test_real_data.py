"""The real data sets hold what their documentation says, and one of them is run from end to end."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from common.metrics import summarise
from tests.support.processes import TINY, hushrec

ROOT = Path(__file__).resolve().parents[2]
TMALL = {"user": "user_id", "item": "brand_id", "behaviour": "type", "time": "visit_datetime"}
GAME_TOY = {"user": "user", "item": "item", "time": "order", "domain": "domain"}
SETS = {
    "ml-100k": ({"kind": "movielens", "path": "ml-100k"}, (943, 1682, 100_000)),
    "ml-1m": ({"kind": "pairs", "path": "ml-1m/ml-1m.txt"}, (6040, 3416, 999_611)),
    "ml-latest-small": ({"kind": "movielens", "path": "ml-latest-small"}, (610, 9724, 100_836)),
    "beauty": ({"kind": "sequences", "path": "beauty/Beauty.txt"}, (22_363, 12_101, 198_502)),
    "lastfm": ({"kind": "sequences", "path": "lastfm/LastFM.txt"}, (1090, 3646, 52_551)),
    "tmall-2014": (
        {"kind": "table", "path": "tmall-2014/t_alibaba_data.csv", "columns": TMALL, "time_format": "%m-%d"},
        (884, 9531, 182_880),
    ),
    "game-toy": ({"kind": "table", "path": "game-toy/game_toy.csv", "columns": GAME_TOY}, (7996, 49_603, 197_358)),
}


def experiment(folder, data):
    (folder / "x.yaml").write_text(yaml.safe_dump(yaml.safe_load(TINY) | {"data": data}))


def asked(folder, *argv):
    done = hushrec(folder, *argv, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


@pytest.mark.parametrize(("data", "counts"), SETS.values(), ids=SETS)
def test_described(real_data, fresh, data, counts):
    experiment(fresh, data)
    facts = asked(fresh, "data", "describe", "x.yaml")
    users, items, events = counts
    assert (facts["users"], facts["items"], facts["events"]) == counts
    assert facts["kept"] == {"users": users, "items": items, "events": events}
    assert facts["mean_length"] == pytest.approx(events / users)
    assert facts["density"] == pytest.approx(events / users / items)


def test_films_are_recommended_by_title(real_data, fresh):
    experiment(fresh, SETS["ml-100k"][0])
    result = asked(fresh, "run", "x.yaml", "federation.rounds=2", "--out", "run")
    assert result["users_tested"] == 943

    asked(fresh, "evaluate", "--run", "run", "--ranks", "ranks.csv")
    with (fresh / "ranks.csv").open(newline="") as file:
        ranks = [float(row["rank"]) for row in csv.DictReader(file)]
    figures = summarise(ranks, [5, 10, 20], resamples=100)
    assert {name: figure._asdict() for name, figure in figures.items()} == result["test"]

    films = asked(fresh, "recommend", "--run", "run", "--history", "50,172,181")["items"]
    assert len(films) == 10
    assert not {"50", "172", "181"} & {film["item"] for film in films}
    assert all(film["title"].endswith(")") and film["genres"] for film in films)
    shown = hushrec(fresh, "recommend", "--run", "run", "--history", "50,172,181")
    assert films[0]["title"][:20] in shown.out


def test_explanations_are_faithful(real_data, fresh):
    """On MovieLens, without what they name first, a recommendation loses far more than without as many at random."""
    pytest.importorskip("captum")
    asked(
        fresh,
        "run",
        str(ROOT / "configs" / "ml-100k.yaml"),
        "federation.rounds=60",
        "evaluation.every=60",
        "--out",
        "run",
    )
    found = asked(fresh, "evaluate", "--run", "run", "--explanations", "100")
    deletion, insertion, loss = (found[name] for name in ("deletion", "insertion", "drop"))
    assert found["users"] == 100
    assert {"combined", "gradients"} <= set(found["beats_random"])
    assert found["best"]["deletion"] == found["best"]["insertion"] == "combined"
    assert deletion["combined"] < 2 * deletion["random"] < 0
    assert insertion["combined"] > insertion["random"] + 0.2
    assert all(named > 3 * lost for named, lost in zip(loss["combined"], loss["random"], strict=True))
    assert found["causes"] is None
