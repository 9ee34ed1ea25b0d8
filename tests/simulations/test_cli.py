"""Every verb as a person or a program would use it; what they may do wrong is in `end_to_end/test_bad_input.py`."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import TINY, hushrec
from tests.support.runs import tree


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A working directory with `tiny.yaml`."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a finished run in `run`; only to be read."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(TINY)
    done = hushrec(folder, "run", "tiny.yaml", "--out", "run")
    assert done.code == 0, done.err
    return folder


def said(folder: Path, *argv: object, before: str = "") -> str:
    done = hushrec(folder, *argv, before=before)
    assert (done.code, done.err) == (0, ""), done.err
    return done.out


def asked(folder: Path, *argv: object) -> dict:
    return json.loads(said(folder, *argv, "--json"))


def test_light_verbs_import_neither_torch_nor_flower(place):
    verbs = ["--help", "run --help", "validate tiny.yaml", "show tiny.yaml", "show tiny.yaml --json", "schema"]
    code = f"""
import sys
from simulations.cli import main
for verb in {verbs}:
    sys.argv = ["hushrec", *verb.split()]
    try:
        main()
    except SystemExit as end:
        assert end.code == 0, verb
    heavy = {{"torch", "flwr", "opacus"}} & sys.modules.keys()
    assert not heavy, (verb, heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_names_every_verb_and_the_exit_codes(place):
    text = said(place, "--help")
    for word in ("run", "show", "validate", "schema", "evaluate", "recommend", "data", "130 stopped and resumable"):
        assert word in " ".join(text.split())
    for verb in ("run", "show", "evaluate", "recommend", "data describe", "data download"):
        assert "Usage: hushrec " + verb in " ".join(said(place, *verb.split(), "--help").split())


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--engine", "deployment"], "--superlink HOST:PORT"),
        (["--engine", "ray", "--superlink", "localhost:1"], "leave one of them away"),
    ],
)
def test_an_engine_and_a_place_that_do_not_go_together(place, options, why):
    done = hushrec(place, "run", "tiny.yaml", *options)
    assert done.code == 2
    assert why in " ".join(done.err.split())


def test_an_engine_is_an_override(place):
    said(place, "run", "tiny.yaml", "federation.rounds=1", "-q", "--engine", "sequential", "--out", "by-option")
    assert "engine: sequential" in (place / "by-option" / "config.yaml").read_text()


def test_without_a_verb_there_is_help(place):
    done = hushrec(place)
    assert done.code == 2
    assert "Usage: hushrec" in done.err + done.out


def test_validate(place):
    assert said(place, "validate", "tiny.yaml", "seed=3") == "tiny.yaml: a valid experiment, 'tiny'\n"


def test_show(place):
    before = tree(place)
    text = said(place, "show", "tiny.yaml", "model.dim=16")
    assert "dim: 16" in text
    assert "Forecast" in text
    facts = asked(place, "show", "tiny.yaml", "model.dim=16")
    assert facts["experiment"]["model"]["dim"] == 16
    assert facts["forecast"]["users"] == 60
    assert tree(place) == before, "nothing is trained"


def test_schema(place):
    schema = json.loads(said(place, "schema"))
    assert {"name", "data", "federation"} <= schema["properties"].keys()


def test_prepare_and_describe(place):
    folder = Path(said(place, "data", "prepare", "tiny.yaml").strip())
    assert (folder / "manifest.json").exists()
    facts = asked(place, "data", "describe", "tiny.yaml")
    assert list(facts) == ["users", "items", "events", "mean_length", "density", "tied_last_pair_share", "kept"]
    assert (facts["users"], facts["items"]) == (60, 40)
    assert facts["kept"] == {name: facts[name] for name in ("users", "items", "events")}
    assert f"{facts['events']:,}" in said(place, "data", "describe", "tiny.yaml")


def test_describe_tells_how_many_items_a_feature_knows(tmp_path):
    (tmp_path / "events.txt").write_text("1 a\n1 b\n2 c\n")
    (tmp_path / "about.csv").write_text("item,price\na,1\nc,\n")
    about = "{source: about.csv, columns: [{kind: numeric, name: price}]}"
    (tmp_path / "shop.yaml").write_text(f"name: shop\ndata: {{kind: pairs, path: events.txt, features: {about}}}\n")
    assert asked(tmp_path, "data", "describe", "shop.yaml")["features"] == {"price": 1}
    assert "feature price: known of 1 of 3 items" in said(tmp_path, "data", "describe", "shop.yaml")


# --- run ------------------------------------------------------------------------------------------------------------

FIGURE = {"value", "low", "high"}


def test_run_prints_one_json_object_whatever_else_is_said(place):
    noise = """
import logging, warnings, simulations.runner as runner
whole = runner.run
def noisy(*args):
    warnings.warn("beware")
    logging.getLogger("flwr").warning("look out")
    return whole(*args)
runner.run = noisy
"""
    done = hushrec(place, "run", "tiny.yaml", "--out", "run", "--json", before=noise)
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result == json.loads((place / "run" / "result.json").read_text())
    assert (result["run_dir"], result["status"], result["rounds"]) == ("run", "done", 6)
    assert result["best_round"] in {2, 4, 6}
    assert result["baselines"].keys() == {"popularity", "random", "ceiling"}
    for figures in (result["test"], *result["baselines"].values()):
        assert {"hr@10", "ndcg@10", "mrr"} <= figures.keys()
        assert all(figure.keys() == FIGURE for figure in figures.values())
        assert all(figure["low"] <= figure["value"] <= figure["high"] for figure in figures.values())
    for name in ("seconds", "clients_per_second", "peak_rss_mb", "bytes_up_per_client", "bytes_down_per_client"):
        assert result[name] > 0
    assert "beware" in done.err
    assert "look out" in done.err
    assert "round 6/6" in done.err, "progress goes to stderr"


def test_run_prints_a_table_and_quiet_no_progress(place):
    assert "hushrec recommend --run run --user ID" in said(place, "run", "tiny.yaml", "--out", "run", "--quiet")


def test_a_run_directory_holds_everything(trained):
    names = {
        "config.yaml",
        "manifest.json",
        "metrics.jsonl",
        "model.safetensors",
        "checkpoint.safetensors",
        "checkpoint.1.safetensors",
        "result.json",
        "privacy.json",
    }
    assert {path.name for path in (trained / "run").iterdir()} == names
    manifest = json.loads((trained / "run" / "manifest.json").read_text())
    assert manifest.keys() >= {"git_commit", "versions", "machine", "data", "seeds", "command", "started"}
    assert manifest["seeds"] == {"experiment": 0, "data": 0}
    assert manifest["versions"]["torch"]


def test_without_out_a_run_gets_a_directory_with_its_name(place):
    said(place, "run", "tiny.yaml", "federation.rounds=1", "-q")
    assert [path.name[:5] for path in (place / "runs").iterdir()] == ["tiny-"]


def test_a_reader_that_leaves_early_does_not_stop_the_run(place):
    """As in `hushrec run tiny.yaml 2>&1 | head`: the pipe's other end is closed from the start."""
    gone = "ends = os.pipe()\nos.close(ends[0])\nos.dup2(ends[1], 1)\nos.dup2(ends[1], 2)"
    assert hushrec(place, "run", "tiny.yaml", "--out", "run", before=gone).code == 0
    assert (place / "run" / "result.json").exists()
    assert hushrec(place, "show", "tiny.yaml", before=gone).code == 0


# --- a finished run -------------------------------------------------------------------------------------------------


def test_ranks_give_the_figures_of_the_run(trained, tmp_path):
    ranks = tmp_path / "ranks.csv"
    evaluated = asked(trained, "evaluate", "--run", "run", "--ranks", ranks)
    expected = json.loads((trained / "run" / "result.json").read_text())["test"]
    assert evaluated["metrics"] == expected
    with ranks.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["user"] for row in rows}) == 60
    places = [float(row["rank"]) for row in rows]
    assert sum(rank <= 10 for rank in places) / 60 == expected["hr@10"]["value"]
    gains = [1 / math.log2(rank + 1) if rank <= 10 else 0 for rank in places]
    assert sum(gains) / 60 == pytest.approx(expected["ndcg@10"]["value"], rel=1e-12)
    assert sum(1 / rank for rank in places) / 60 == pytest.approx(expected["mrr"]["value"], rel=1e-12)


def test_validation_can_be_measured_again(trained):
    lines = [json.loads(line) for line in (trained / "run" / "metrics.jsonl").read_text().splitlines()]
    best = json.loads((trained / "run" / "result.json").read_text())["best_round"]
    line = next(line for line in lines if line["kind"] == "validation" and line["round"] == best)
    evaluated = asked(trained, "evaluate", "--run", "run", "--split", "validation")
    assert evaluated["split"] == "validation"
    assert evaluated["metrics"]["ndcg@10"]["value"] == line["ndcg@10"]
    assert "Validation: the held-out items of 60 users" in said(
        trained, "evaluate", "--run", "run", "--split", "validation"
    )


def test_recommend(trained):
    answer = asked(trained, "recommend", "--run", "run", "--user", "3")
    assert answer["user"] == "3"
    assert len(answer["items"]) == 10
    scores = [item["score"] for item in answer["items"]]
    assert scores == sorted(scores, reverse=True)
    assert answer["items"][0]["item"] in said(trained, "recommend", "--run", "run", "--user", "3")
    few = asked(trained, "recommend", "--run", "run", "--user", "3", "--k", "2")["items"]
    assert few == answer["items"][:2]


def test_recommend_to_a_stranger(trained):
    answer = asked(trained, "recommend", "--run", "run", "--history", " 5, 7,5 ", "--k", "1000000")
    assert answer["user"] is None
    assert {item["item"] for item in answer["items"]} == {str(n) for n in range(40)} - {"5", "7"}


def test_download_says_its_terms(place):
    fake = "import simulations.download as d\nd.download = lambda name, to: to / name"
    done = hushrec(place, "data", "download", "ml-100k", "--to", "sets", before=fake)
    assert (done.code, done.out) == (0, "sets/ml-100k\n")
    assert "No redistribution" in done.err
