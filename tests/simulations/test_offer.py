"""What is recommended where items are new and domains several: as in the test, by every way to ask."""

import csv
import io
import json

import numpy as np
import pytest
import torch

from client.evaluation import scores, shelf_ranks
from client.newcomers import new_items
from common.errors import DataError
from simulations import rundir
from simulations.inference import Trained, evaluate
from simulations.watching import watch
from tests.support import shops
from tests.support.processes import hushrec


@pytest.fixture(scope="module", params=[True, False], ids=["two domains", "one"])
def folder(request, tmp_path_factory):
    return shops.made(tmp_path_factory.mktemp("shops"), domains=request.param)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return shops.made(tmp_path_factory.mktemp("two"))


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def watched(trained, history, k):
    out = io.StringIO()
    watch(trained, [json.dumps({"item": item}) for item in history], k, out)
    return json.loads(out.getvalue().splitlines()[-1])["items"]


def new_ids(trained):
    ids = trained.device.catalogue.item_ids()
    return {ids[item] for item in new_items(trained.device.experiment, len(ids)).tolist()}


def test_watching_recommends_what_a_history_does_new_items_included(folder):
    trained, lifted = Trained(folder), 0
    ids = [item for item in trained.device.catalogue.item_ids() if item not in new_ids(trained)]
    for start in range(len(ids) - 4):
        history = ids[start : start + 4]
        one, other = watched(trained, history, 4), trained.top(trained.stranger(history), 4)
        assert [each["item"] for each in one] == [each["item"] for each in other]
        assert [each["score"] for each in one] == pytest.approx([each["score"] for each in other], abs=2e-4)
        lifted += other[1]["item"] in new_ids(trained)
        assert {each["item"] for each in other[:2]} & new_ids(trained)  # at place 2 at the latest
    assert lifted


def test_each_domain_has_a_list_of_its_own(two):
    trained = Trained(two)
    person = trained.known("u3")
    items = trained.top(person, 3)
    assert [item["domain"] for item in items] == [item["item"].split("/")[0] for item in items]
    names = trained.device.sequences.domain_names
    assert [item["domain"] for item in items] == [name for name in names for _ in range(3)]
    for number, name in enumerate(names):
        assert Trained(two, name).top(person, 3) == items[3 * number :][:3]
        history, here = ["toy/i1", "game/i20"], Trained(two, name)
        found, wanted = watched(here, history, 3), here.top(here.stranger(history), 3)
        assert [each["item"] for each in found] == [each["item"] for each in wanted]
        assert [each["score"] for each in found] == pytest.approx([each["score"] for each in wanted], abs=2e-4)
    with pytest.raises(DataError, match="no domain 'toys'; did you mean 'toy'"):
        Trained(two, "toys").top(person, 3)
    with pytest.raises(DataError, match="no domain 'toys'"):  # before any line is read
        watched(Trained(two, "toys"), ["toy/i1"], 3)


def test_a_model_of_one_domain_recommends_of_that_alone(tmp_path):
    trained = Trained(shops.made(tmp_path, "data.only.domains=[game]", "data.cold=0", "evaluation.new_place=null"))
    person = trained.known(trained.device.sequences.user_ids()[0])
    assert {item["domain"] for item in trained.top(person, 5)} == {"game"}
    with pytest.raises(DataError, match="no domain 'toy'; there are 1, such as 'game'"):
        Trained(trained.folder, "toy").top(person, 5)


def test_lists_of_many_are_those_of_each(folder):
    trained = Trained(folder)
    users, ids = np.arange(60), np.array(trained.device.catalogue.item_ids())
    stops = trained.device.sequences.offsets[users + 1]
    lists = trained.lists(users, stops, 3)
    for user, found in zip(users, lists, strict=True):
        name = trained.device.sequences.user_ids()[user]
        assert ids[found].tolist() == [item["item"] for item in trained.top(trained.known(name), 3)]
    assert (trained.lists(users[:2], stops[:2], 100) == -1).any(1).all()


def test_a_place_in_the_list_is_the_rank(two, tmp_path):
    """The test's figures are of what is recommended: each user's item stands at its rank in its domain's list."""
    trained = Trained(two)
    sequences, everybody = trained.device.sequences, np.arange(60)
    stops, goals = sequences.stops(everybody, "test")
    lists = trained.lists(everybody, stops, 3).reshape(60, 2, 3)
    inside = [goals[user] in lists[user, sequences.domains[goals[user]]] for user in everybody]
    evaluate(two, "test", tmp_path / "ranks.csv")
    assert [float(row["rank"]) <= 3 for row in rows(tmp_path / "ranks.csv")] == inside
    assert any(inside)


def test_evaluating_gives_all_figures_of_the_run_and_the_ranks_behind_them(two, tmp_path):
    expected, found = rundir.result(two), evaluate(two, "test", tmp_path / "ranks.csv")
    assert found["metrics"] == expected["test"]
    marks = {name.partition("|")[2] for name in found["metrics"]}
    assert marks == {"", "s5", "cold", "warm", "new", "toy", "game"}
    table = rows(tmp_path / "ranks.csv")
    assert table[0].keys() == {"user", "rank"} | marks - {""}
    for mark in marks:
        ranks = [float(row[mark or "rank"]) for row in table if row[mark or "rank"]]
        name = f"mrr|{mark}" if mark else "mrr"
        assert np.mean([1 / rank for rank in ranks]) == pytest.approx(found["metrics"][name]["value"], rel=1e-12)
    in_validation = evaluate(two, "validation")["metrics"]
    assert {name.partition("|")[2] for name in in_validation} == {"", "s5", "toy", "game"}  # when nothing is new
    assert in_validation["mrr|toy"] != found["metrics"]["mrr|toy"]


def test_figures_are_of_those_who_were_tested(tmp_path):
    run = shops.made(tmp_path, "evaluation.test_users=20")
    evaluate(run, "test", tmp_path / "ranks.csv")
    table = rows(tmp_path / "ranks.csv")
    assert len(table) == 20
    assert [bool(row["cold"]) for row in table] == [bool(row["new"]) for row in table]
    shelf = [1 / float(row["new"]) for row in table if row["new"]]
    assert np.mean(shelf) == pytest.approx(rundir.result(run)["test"]["mrr|new"]["value"])


def test_a_shelf_is_of_one_domain(two):
    trained = Trained(two)
    sequences, users = trained.device.sequences, np.arange(60)
    found = shelf_ranks(trained.device.experiment, trained.weights, sequences, users)
    stops, goals = sequences.stops(users, "test")
    new = new_items(trained.device.experiment, shops.ITEMS).numpy()
    for where, scored in scores(trained.device.experiment, trained.weights, sequences, users, stops):
        for user, row in zip(where, scored, strict=True):
            rivals = new[sequences.domains[new] == sequences.domains[goals[user]]]
            rank = 1 + (row[torch.from_numpy(rivals)] > row[goals[user]]).sum() if goals[user] in new else np.nan
            assert found[user] == pytest.approx(rank, nan_ok=True)
    assert np.isfinite(found).sum() > 3


def test_on_the_command_line(two):
    ask = ("recommend", "--run", two, "--user", "u3", "-k", "2")
    told = json.loads(hushrec(two.parent, *ask, "--json").out)["items"]
    assert len(told) == 4
    shown = hushrec(two.parent, *ask).out
    assert all(item["item"] in shown for item in told)
    assert [line.split()[0] for line in shown.splitlines() if "/i" in line] == ["1", "2", "1", "2"]
    assert json.loads(hushrec(two.parent, *ask, "--json", "--domain", "game").out)["items"] == [
        item for item in told if item["domain"] == "game"
    ]
    wrong = hushrec(two.parent, *ask, "--domain", "Game")
    assert (wrong.code, wrong.err) == (2, "error: no domain 'Game'; did you mean 'game'?\n")
    evaluated = hushrec(two.parent, "evaluate", "--run", two).out
    assert "ranked against its domain's catalogue" in evaluated
    assert "Users whose last item is one of toy, ranked among these" in evaluated


def test_where_there_are_no_domains_none_can_be_named(tmp_path):
    run = shops.made(tmp_path, domains=False)
    refused = hushrec(tmp_path, "recommend", "--run", run, "--user", "u3", "--domain", "toy")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "no domain 'toy': the run's data has none (data.columns.domain); leave it away" in refused.err
    assert "ranked against the whole catalogue" in hushrec(tmp_path, "evaluate", "--run", run).out
