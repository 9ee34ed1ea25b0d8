"""Data at the edge of what makes sense is no error; prepared data that was damaged is made anew."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.support.processes import TINY, Finished, hushrec
from tests.support.runs import assert_same_run


def run(folder: Path, sequences: dict[str, str], *overrides: str) -> dict:
    """Run on sequences of items by user, and return the result."""
    lines = [f"{user},{item},{t}" for user, items in sequences.items() for t, item in enumerate(items.split())]
    (folder / "events.csv").write_text("\n".join(["user,item,time", *lines]) + "\n")
    experiment = yaml.safe_load(TINY) | {"data": {"kind": "table", "path": "events.csv"}}
    (folder / "x.yaml").write_text(yaml.safe_dump(experiment))
    done = hushrec(folder, "run", "x.yaml", *overrides, "--out", "run", "--json")
    assert done.code == 0, done.err
    assert "Traceback" not in done.err
    return json.loads(done.out)


def asked(folder: Path, *argv: str) -> dict:
    done = hushrec(folder, argv[0], "--run", "run", *argv[1:], "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


CROWD = {f"u{n}": f"i{n} i{n + 1} i{n + 2} i{n + 3}" for n in range(5)}


def test_users_with_too_few_events_train_and_rank_nothing(fresh):
    result = run(fresh, CROWD | {"once": "i0", "twice": "i1 i2", "thrice": "i1 i2 i3"})
    assert (result["users"], result["users_tested"]) == (8, 6)
    evaluated = asked(fresh, "evaluate", "--ranks", "ranks.csv")
    assert evaluated["users"] == 6
    ranked = {line.split(",")[0] for line in (fresh / "ranks.csv").read_text().splitlines()[1:]}
    assert ranked == {*CROWD, "thrice"}
    assert "i0" not in [found["item"] for found in asked(fresh, "recommend", "--user", "once")["items"]]


def test_nobody_has_anything_to_rank(fresh):
    result = run(fresh, {"a": "i1", "b": "i2", "c": "i1"})
    assert result["users_tested"] == 0
    assert result["test"]["hr@10"] == {"value": None, "low": None, "high": None}
    shown = hushrec(fresh, "run", "--resume", "run")
    assert (shown.code, shown.err) == (0, "")
    assert "nan" not in shown.out
    assert asked(fresh, "evaluate")["metrics"]["mrr"]["value"] is None
    assert hushrec(fresh, "evaluate", "--run", "run").code == 0


@pytest.mark.parametrize("loss", ["softmax", "gbce", "sampled-softmax", "bce"])
def test_a_catalogue_of_one_item(fresh, loss):
    result = run(fresh, {f"u{n}": "i i i i" for n in range(4)}, f"loss.kind={loss}", "evaluation.sampled=99")
    assert result["items"] == 1
    assert result["test"]["hr@10"]["value"] == 1, "there is nothing else to rank"
    assert asked(fresh, "recommend", "--user", "u0")["items"] == []


@pytest.mark.parametrize("loss", ["gbce", "sampled-softmax"])
def test_fewer_items_than_negatives(fresh, loss):
    result = run(fresh, CROWD, f"loss={{kind: {loss}, negatives: 500}}", "evaluation.sampled=500")
    assert result["items"] == 8
    assert result["test"]["hr@10|s500"] == result["test"]["hr@10"]


def test_a_cohort_larger_than_the_population(fresh):
    run(fresh, CROWD, "federation.cohort=1000")
    lines = [json.loads(line) for line in (fresh / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {line["clients"] for line in lines if line["kind"] == "train"} == {5}


def test_no_rounds_at_all(fresh):
    result = run(fresh, CROWD, "federation.rounds=0")
    assert (result["rounds"], result["best_round"]) == (0, 0)
    assert asked(fresh, "evaluate")["metrics"] == result["test"]


# --- the cache of prepared data -------------------------------------------------------------------------------------


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def outside(path: Path) -> None:
    items = np.load(path)
    items[7] = 40  # the catalogue ends at 39
    np.save(path, items)


def negative(path: Path) -> None:
    items = np.load(path)
    items[7] = -1
    np.save(path, items)


def run_on(cache: Path, folder: Path) -> Finished:
    before = f"os.environ['HUSHREC_CACHE'] = {str(cache)!r}"
    return hushrec(folder, "run", "tiny.yaml", "--out", "run", before=before)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("items.npy", truncated),
        ("items.npy", outside),
        ("items.npy", negative),
        ("offsets.npy", Path.unlink),
        ("users.parquet", truncated),
        ("catalogue.parquet", truncated),
        ("manifest.json", truncated),
    ],
)
def test_damaged_prepared_data_is_made_anew(fresh, undisturbed, tmp_path, name, damage):
    cache = tmp_path / "cache"
    prepare = f"os.environ['HUSHREC_CACHE'] = {str(cache)!r}"
    prepared = Path(hushrec(fresh, "data", "prepare", "tiny.yaml", before=prepare).out.strip())
    damage(prepared / name)
    done = run_on(cache, fresh)
    assert done.code == 0, done.err
    assert_same_run(fresh / "run", undisturbed / "run")
    assert [path.name for path in cache.iterdir()] == [prepared.name]
