"""Items that come after training stand where cold items of the same features do."""

import json

import polars as pl
import pytest
import torch

from client.evaluation import final_scores
from client.newcomers import new_items
from common.errors import DataError, UsageError
from simulations.inference import Trained
from tests.support import shops
from tests.support.processes import hushrec

KINDS = [("both", "sum"), ("both", "gate"), ("both", "concatenation"), ("features", "sum"), ("features", "gate")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return shops.made(tmp_path_factory.mktemp("shops"))


def cold_of(trained):
    return new_items(trained.device.experiment, shops.ITEMS).tolist()


def again(item):
    """Another id in the same domain."""
    return f"{shops.name(item)}-again"


def file_of(path, items, title=False):
    lines = [f"{again(i)},{shops.about(i)}" + (f',"{shops.TITLES[i]}"' if title else "") for i in items]
    path.write_text("item,colour,year" + ",title" * title + "\n" + "\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(("items", "fusion"), KINDS)
def test_a_cold_item_under_another_id_has_its_score_and_place(items, fusion, tmp_path):
    run = shops.made(tmp_path, f"model.items={items}", f"model.fusion={fusion}", domains=fusion != "gate")
    plain = Trained(run)
    cold, ids = cold_of(plain), plain.device.catalogue.item_ids()
    lines = [f"{ids[i]}-again,{shops.about(int(ids[i].split('i')[-1]))}" for i in cold]
    (tmp_path / "new.csv").write_text("item,colour,year\n" + "\n".join(lines) + "\n")
    with_new = Trained(run, new=tmp_path / "new.csv")
    model, people = plain.device.experiment.model, [plain.known(f"u{user}") for user in range(30)]
    people = [person for person in people if not set(person.seen) & set(cold)]  # of whose items none comes again
    assert len(people) > 3
    for person in people:
        past = person.past
        scored = final_scores(model, with_new.offered, past.items, past.lengths, past.moments)[0]
        assert (scored[shops.ITEMS :] - scored[cold]).abs().max() < 1e-6
        assert scored.std() > 1e-3
        before, after = plain.top(person, 100), with_new.top(person, 100)
        assert [each["item"] for each in after if not each["new"]] == [each["item"] for each in before]
        of = {each["item"]: each["score"] for each in after}
        new = [each["item"] for each in after if each["new"]]
        assert len(new) == len(cold)
        assert all(of[item] == pytest.approx(of[item.removesuffix("-again")], abs=2e-4) for item in new)


def test_the_place_is_for_them_too(folder, tmp_path):
    """Among the first two of a domain something is new, be it of the catalogue or of the file."""
    path = file_of(tmp_path / "new.csv", [1, 2])
    trained = Trained(folder, "toy", path)
    scored = torch.linspace(1, 0, shops.ITEMS + 2)
    scored[cold_of(trained)], scored[-2:] = -9.0, torch.tensor([-1.0, -1.001])
    first, second, third, *_ = trained.offer.best(scored, [], 5)
    assert [first["new"], second["item"], third["item"]] == [False, again(1), again(2)]
    assert second["new"]


def test_of_every_form(folder, tmp_path):
    csv = file_of(tmp_path / "new.csv", [1, 20], title=True)
    frame = pl.read_csv(csv)
    frame.write_csv(tmp_path / "new.tsv", separator="\t")
    frame.with_columns(pl.col("colour").str.split("|")).write_parquet(tmp_path / "new.parquet")
    found = [Trained(folder, new=tmp_path / f"new.{kind}").offer.arrivals for kind in ("csv", "tsv", "parquet")]
    for each in found:
        assert each.ids == [again(1), again(20)]
        assert each.titles == [shops.TITLES[1], shops.TITLES[20]]
        assert torch.equal(each.vectors, found[0].vectors)


HEAD = "item,colour,year\n"
BAD = {
    "there is no file": (None, "new.csv: no such file"),
    "nothing in it": ("", "new.csv is empty"),
    "no rows": (HEAD, "new.csv has no rows"),
    "no ids": ("id,colour,year\ntoy/a,red,1\n", "new.csv: no column 'item'"),
    "no such column": ("item,color,year\ntoy/a,red,1\n", "no column 'colour'; new items want colour, year"),
    "no number": (HEAD + "toy/a,red,soon\n", "column 'year', item 'toy/a': "),
    "short rows": (HEAD + "toy/a,red\n", "line 2: 2 fields, expected 3"),
    "twice": (HEAD + "toy/a,red,1\ntoy/a,red,1\n", "item 'toy/a' comes twice"),
    "known already": (HEAD + "toy/i1,red,1\n", "item 'toy/i1' is in the catalogue already; leave it out"),
    "no domain": (HEAD + "a,red,1\n", "item 'a' is of no domain; call it "),
}


@pytest.mark.parametrize(("text", "why"), BAD.values(), ids=BAD)
def test_bad_files_are_named_in_a_line(text, why, folder, tmp_path):
    if text is not None:
        (tmp_path / "new.csv").write_text(text)
    with pytest.raises(DataError) as fault:
        Trained(folder, new=tmp_path / "new.csv").offer  # noqa: B018
    assert why in str(fault.value)
    assert "\n" not in str(fault.value)


def test_of_what_nothing_is_known_nothing_is_said(tmp_path):
    only = "[{kind: categorical, name: colour, separator: '|'}]"
    run = shops.made(tmp_path, f"data.features.columns={only}")
    (tmp_path / "new.csv").write_text("item,colour\ntoy/a,red\ntoy/b,violet\n")
    with pytest.raises(DataError, match="item 'toy/b' has no value that training knew, in colour; leave it out"):
        Trained(run, new=tmp_path / "new.csv").offer  # noqa: B018


def test_a_number_that_is_missing_is_nothing_known(folder, tmp_path):
    (tmp_path / "new.csv").write_text(HEAD + "toy/a,violet,1961\ntoy/b,,\n")
    with pytest.raises(DataError, match="item 'toy/b' has no value that training knew, in colour, year; leave it out"):
        Trained(folder, new=tmp_path / "new.csv").offer  # noqa: B018


def test_items_of_their_own_alone_know_no_new_ones(tmp_path):
    run = shops.made(tmp_path, "model.items=own")
    with pytest.raises(UsageError, match=r"model\.items is own, so a new item has nothing to be known by"):
        Trained(run, new=file_of(tmp_path / "new.csv", [1])).offer  # noqa: B018


def test_on_the_command_line(folder, tmp_path):
    path = file_of(tmp_path / "new.csv", [1, 20], title=True)
    for whom in (["--user", "u3"], ["--history", "toy/i3,game/i14"]):
        ask = ("recommend", "--run", folder, *whom, "-k", "30", "--new", path)
        items = json.loads(hushrec(tmp_path, *ask, "--json").out)["items"]
        assert {item["item"] for item in items if item["new"]} == {again(1), again(20)}
        shown = hushrec(tmp_path, *ask).out
        assert [line.split()[-2] for line in shown.splitlines() if "-again" in line] == ["new", "new"]
    refused = hushrec(tmp_path, *ask, "--explain")
    assert (refused.code, refused.err) == (2, "error: --explain speaks of the catalogue's items; leave --new away\n")
