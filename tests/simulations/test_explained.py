"""What recommendations say for themselves: on the command line, in pictures, with features; and how far to trust it."""

import json

import numpy as np
import pytest
from rich.console import Console

from common.errors import UsageError
from common.loading import parse
from simulations import explained, rundir
from simulations.explained import draw, reasons, row_names
from simulations.inference import Trained
from simulations.runner import run
from simulations.trust import render, trust
from tests.support.processes import TINY, hushrec

pytest.importorskip("captum")

KINDS = {"importance", "gradients", "attention"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working directory with a finished run in `run`; only to be read."""
    folder = tmp_path_factory.mktemp("explained")
    experiment = parse(TINY)
    run(experiment, rundir.create(experiment, folder / "run"), Console(quiet=True))
    return folder


@pytest.fixture(scope="module", params=["sum", "concatenation", "gate"])
def films(tmp_path_factory, request):
    """A run on items with titles, of one genre or two, whose vectors are made of these and of a year."""
    folder = tmp_path_factory.mktemp("films")
    rng = np.random.default_rng(0)
    lines = [f"{u},{i},{t}" for u in range(30) for t, i in enumerate(rng.choice(12, 6, replace=False))]
    (folder / "events.csv").write_text("user,item,time\n" + "\n".join(lines) + "\n")
    rows = [f"{i},{'Crime|Noir' if i % 3 else 'Western'},{1950 + i}" for i in range(12)]
    (folder / "about.csv").write_text("item,genres,year\n" + "\n".join(rows) + "\n")
    text = f"""
name: films
data:
  kind: table
  path: {folder}/events.csv
  features:
    source: {folder}/about.csv
    columns: [{{kind: categorical, name: genres, separator: "|"}}, {{kind: numeric, name: year}}]
model: {{dim: 8, blocks: 1, heads: 2, max_length: 6, items: both, fusion: {request.param}}}
federation: {{rounds: 2, cohort: 10}}
"""
    experiment = parse(text)
    run(experiment, rundir.create(experiment, folder / "run"), Console(quiet=True))
    return folder


@pytest.fixture(scope="module")
def shops(tmp_path_factory):
    """A run on items of two shops, a third of them in the second."""
    folder = tmp_path_factory.mktemp("shops")
    rng = np.random.default_rng(0)
    lines = [
        f"{u},{i},{t},{'toy' if i % 3 else 'game'}" for u in range(30) for t, i in enumerate(rng.permutation(15)[:7])
    ]
    (folder / "events.csv").write_text("user,item,time,shop\n" + "\n".join(lines) + "\n")
    experiment = parse(f"""
name: shops
data: {{kind: table, path: {folder}/events.csv, columns: {{domain: shop}}}}
model: {{dim: 8, blocks: 1, heads: 2, max_length: 6}}
federation: {{rounds: 2, cohort: 10}}
""")
    run(experiment, rundir.create(experiment, folder / "run"), Console(quiet=True))
    return folder


def test_each_past_event_has_its_say_about_each_item(place):
    trained = Trained(place / "run")
    person = trained.known("7")
    items = trained.top(person, 4)
    told = reasons(trained, person, items)
    assert [{name: item[name] for name in items[0]} for item in told] == items
    length = int(person.past.lengths[0])
    for item in told:
        assert len(item["because"]) == length
        assert all(reason.keys() == {"item", "title"} | KINDS for reason in item["because"])
        assert sum(reason["attention"] for reason in item["because"]) == pytest.approx(1, abs=0.01)
        assert "features" not in item
        assert item["gap"] < 0.01
    columns = np.array([[reason["importance"] for reason in item["because"]] for item in told])
    assert np.ptp(columns, axis=0).max() > 1e-3  # of another item they say something else
    stranger = trained.stranger([reason["item"] for reason in told[0]["because"]])
    again = reasons(trained, stranger, trained.top(stranger, 4))
    assert [item["item"] for item in again] == [item["item"] for item in told]
    ours, theirs = ([reason["importance"] for reason in each[0]["because"]] for each in (told, again))
    assert ours == pytest.approx(theirs, abs=2e-3)


def test_features_have_their_say_by_name(films):
    trained = Trained(films / "run")
    names = row_names(trained.device.catalogue.folder)
    assert sorted(names) == ["genres: Crime", "genres: Noir", "genres: Western", "year", "year"]
    person = trained.known("3")
    (first,) = reasons(trained, person, trained.top(person, 1))
    assert {each["feature"] for each in first["features"]} <= set(names)
    assert any(each["importance"] for each in first["features"])


def test_rivals_are_of_ones_own_domain(shops, monkeypatch):
    trained = Trained(shops / "run")
    person = trained.known("3")
    recommended = trained.top(person, 6)
    apart, same = trained.device.sequences.domains, []
    for who in (person, person._replace(past=person.past._replace(domains=None))):  # as a stranger's is
        same.append(reasons(trained, who, recommended))
    assert same[0] == same[1]
    monkeypatch.setattr("simulations.explained.domains_of", lambda sequences: None)
    assert reasons(trained, person, recommended) != same[0]

    asked = []
    monkeypatch.setattr("simulations.trust.faithfulness", lambda *given: asked.append(given) or {})
    trust(trained, "test", 30)
    _, _, past, first, *_ = asked[0]
    _, goals = trained.device.sequences.stops(np.arange(30), "test")
    assert apart[first].tolist() == apart[goals].tolist()
    assert set(apart[first].tolist()) == {0, 1}
    assert past.domains.tolist() == apart.tolist()
    assert all(item not in history for item, history in zip(first.tolist(), past.items.tolist(), strict=True))


def test_on_the_command_line(place):
    shown = hushrec(place, "recommend", "--run", "run", "--user", "7", "-k", "3", "--explain", "--picture", "why.svg")
    assert shown.code == 0, shown.err
    assert "latest first" in shown.out
    assert "Importance: what an event adds" in shown.out
    assert (place / "why.svg").read_bytes().startswith(b"<?xml")
    told = hushrec(place, "recommend", "--run", "run", "--history", "3,9", "-k", "2", "--explain", "--json")
    assert [len(item["because"]) for item in json.loads(told.out)["items"]] == [2, 2]
    refused = hushrec(place, "recommend", "--run", "run", "--watch", "--explain")
    assert (refused.code, "--watch" in refused.err) == (2, True)
    wrong = hushrec(place, "recommend", "--run", "run", "--user", "7", "--picture", "why.jpg")
    assert (wrong.code, "why.jpg" in wrong.err) == (2, True)
    measured = hushrec(place, "evaluate", "--run", "run", "--explanations", "20", "--json")
    assert json.loads(measured.out)["users"] == 20


@pytest.mark.parametrize("more", [{}, {"features": [{"feature": "year", "importance": 0.25}]}])
def test_a_large_gap_is_warned_of_in_proportion_to_what_is_said(more):
    because = [
        {"title": "Heat", "importance": 1.0, "gradients": 2.0},
        {"title": "Up", "importance": 1, "gradients": -2.0},
    ]
    for gap, warned in {0.19: False, 0.21: True}.items():
        console = Console(record=True, width=300)
        explained.render(console, [{"title": "Big", "because": because, "gap": gap, **more}])
        text = console.export_text()
        assert ("miss 0.210 of 4.000" in text) == warned
        assert ("hence features" in text) == (warned and bool(more))
        assert ("By features of all events: year +0.250" in text) == bool(more)


def test_nothing_recommended_is_nothing_to_draw(tmp_path):
    with pytest.raises(UsageError, match="nothing to draw"):
        draw(tmp_path / "x.png", [])


def test_trust_is_measured_and_told(place):
    found = trust(Trained(place / "run"), "validation", 25)
    assert 20 <= found["users"] <= 25  # who has two events at least
    assert found["deletion"].keys() == {"combined", "gradients", "attention", "recent", "random"}
    console = Console(record=True, width=120)
    render(console, found)
    text = console.export_text()
    assert "attention rollout" in text
    assert "Most faithful" in text
