"""What a finished run answers: nothing that the user had, the same by user and by history, ranks without loss."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from common.errors import DataError, StateError, UsageError
from common.loading import parse
from common.metrics import coverage
from simulations import inference, rundir
from simulations.inference import Trained, evaluate
from simulations.runner import run
from tests.support.processes import TINY, hushrec

FILMS = {"1": "Heat (1995)", "2": "Up, Up (2009)", "3": "Alien (1979)", "4": "Big (1988)", "5": "Jaws (1975)"}


def made(folder: Path, text: str = TINY, *overrides: str) -> Path:
    experiment = parse(text, overrides=overrides)
    run(experiment, rundir.create(experiment, folder), Console(quiet=True))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture
def trained(folder: Path) -> Trained:
    return Trained(folder)


def history(trained: Trained, user: int) -> list[str]:
    sequences = trained.device.sequences
    ids = trained.device.catalogue.item_ids()
    return [ids[item] for item in sequences.items[sequences.offsets[user] : sequences.offsets[user + 1]]]


def for_user(trained: Trained, user: object, k: int) -> list[dict[str, Any]]:
    return trained.top(trained.known(str(user)), k)


def for_history(trained: Trained, names: list[str], k: int) -> list[dict[str, Any]]:
    return trained.top(trained.stranger(names), k)


@pytest.mark.parametrize("user", [0, 7, 59])
def test_everything_but_what_the_user_had(trained, user):
    items = for_user(trained, user, 1000)
    scores = [item["score"] for item in items]
    assert scores == sorted(scores, reverse=True)
    assert {item["item"] for item in items} == {str(n) for n in range(40)} - set(history(trained, user))
    assert for_user(trained, user, 3) == items[:3]


def test_a_history_gives_what_its_user_gets(trained):
    longest = int(np.argmax(np.diff(trained.device.sequences.offsets)))
    assert len(history(trained, longest)) > 16, "longer than the model looks back, yet all of it is left out"
    for user in (0, 7, longest):
        by_user, by_history = for_user(trained, user, 40), for_history(trained, history(trained, user), 40)
        assert [item["item"] for item in by_user] == [item["item"] for item in by_history]
        assert [item["score"] for item in by_user] == pytest.approx([item["score"] for item in by_history], abs=2e-4)


def test_the_order_of_a_history_counts(trained):
    forward, backward = for_history(trained, ["1", "2", "3"], 5), for_history(trained, ["3", "2", "1"], 5)
    assert forward != backward


def test_lists_are_those_of_each_user(trained):
    users = np.array([3, 0, 59])
    lists = trained.lists(users, trained.device.sequences.offsets[users + 1], 5)
    for user, found in zip(users.tolist(), lists.tolist(), strict=True):
        assert [str(item) for item in found] == [item["item"] for item in for_user(trained, user, 5)]


def test_what_is_unknown_is_named_with_the_nearest(trained):
    with pytest.raises(DataError, match="no user '590'; did you mean '59'"):
        for_user(trained, "590", 3)
    with pytest.raises(DataError, match="no item '390'; did you mean '39'"):
        for_history(trained, ["3", "390"], 3)
    with pytest.raises(UsageError, match="name at least one item"):
        for_history(trained, [], 3)


def test_films_have_titles_and_genres(tmp_path):
    ratings = ["userId,movieId,rating,timestamp"]
    ratings += [f"{user},{1 + (user + step) % 5},4.0,{step}" for user in range(1, 7) for step in range(4)]
    films = ["movieId,title,genres", *(f'{n},"{title}",Crime|Thriller' for n, title in FILMS.items())]
    (tmp_path / "ratings.csv").write_text("\n".join(ratings) + "\n")
    (tmp_path / "movies.csv").write_text("\n".join(films) + "\n")
    text = TINY.replace("{kind: synthetic, users: 60, items: 40, interests: 4, mean_length: 8, max_length: 20}", "%s")
    folder = made(tmp_path / "run", text % f"{{kind: movielens, path: {tmp_path}}}", "federation.rounds=1")
    trained = Trained(folder)
    (only,) = for_user(trained, "1", 10)
    assert only["title"] == FILMS[only["item"]]
    assert only["genres"] == ["Crime", "Thriller"]
    told = hushrec(tmp_path, "recommend", "--run", "run", "--history", "Up, Up (2009), Heat (1995)", "--json")
    assert json.loads(told.out)["items"] == for_history(trained, ["2", "1"], 10)
    assert told.err == ""
    with pytest.raises(DataError, match=r"no item 'x y z'; there are 5, such as"):
        for_history(trained, ["x y z"], 3)


def test_what_is_assumed_of_a_history_is_said(tmp_path):
    rows = [f"u{u},i{(u + t) % 7},{100 * t},{'view' if t % 2 else 'buy'},{t}" for u in range(8) for t in range(5)]
    (tmp_path / "events.csv").write_text("user,item,time,how,stars\n" + "\n".join(rows) + "\n")
    data = f"{{kind: table, path: {tmp_path}/events.csv, target: buy, columns: {{behaviour: how, rating: stars}}}}"
    inputs = "[{kind: hour}, {kind: rating}, {kind: behaviour, names: [view, buy]}]"
    text = TINY.replace("{kind: synthetic, users: 60, items: 40, interests: 4, mean_length: 8, max_length: 20}", data)
    made(tmp_path / "run", text, "federation.rounds=1", f"model.inputs={inputs}")
    told = hushrec(tmp_path, "recommend", "--run", "run", "--history", "i1,i2", "--json")
    assert json.loads(told.out)["items"]
    assert told.err == "assumed of these items: times a second apart, no rating, behaviour 'buy'\n"
    assert hushrec(tmp_path, "recommend", "--run", "run", "--user", "u1").err == ""


def test_evaluation(trained, tmp_path):
    found = evaluate(trained.folder, "test", tmp_path / "ranks.csv")
    assert found["metrics"] == rundir.result(trained.folder)["test"]
    assert (found["split"], found["users"]) == ("test", 60)
    assert all(0 <= found[name] <= 1 for name in ("coverage@10", "long_tail@10", "worst_tenth_ndcg@10"))
    users = np.arange(60)
    stops, _ = trained.device.sequences.stops(users, "test")
    assert found["coverage@10"] == coverage(trained.lists(users, stops, 10), 40)
    with (tmp_path / "ranks.csv").open(newline="") as file:
        assert [row["user"] for row in csv.DictReader(file)] == [str(user) for user in range(60)]


def test_large_and_tied_ranks_keep_every_digit(tmp_path):
    ranks = np.array([1.0, 1234567.5, 2.5])
    new = np.array([np.nan, 3.0, np.nan])
    inference._write_ranks(tmp_path / "ranks.csv", ["a", 'b,"c"', "d"], {"": ranks, "new": new})
    with (tmp_path / "ranks.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["rank"]) for row in rows] == ranks.tolist()
    assert [row["user"] for row in rows] == ["a", 'b,"c"', "d"]
    assert [row["new"] for row in rows] == ["", "3", ""]


def test_a_place_for_ranks_is_looked_at_before_anything_is_ranked(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere" / "ranks.csv"):
        with pytest.raises(UsageError, match="name one in a folder that exists"):
            evaluate(tmp_path / "no run", "test", path)


def test_a_run_that_is_not_finished(tmp_path):
    rundir.create(parse(TINY), tmp_path / "run")
    with pytest.raises(StateError, match="not finished; go on with `hushrec run --resume"):
        evaluate(tmp_path / "run", "test")
