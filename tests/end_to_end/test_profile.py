"""Where a round's time went: `run --profile` shows it, and the run directory keeps it whether shown or not."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import TINY, Finished, hushrec

HEADING = "Where a round's time went"
PHASES = {"asking", "training", "answering", "checking", "summing", "stepping"}
ROW = re.compile(r" *(?P<name>[a-z ]+?) +(?P<ms>[\d,]+\.\d\d) ms +(?:(?P<share>[\d.]+)%)? +\S.*")
ROUNDING = 1e-6
"""Seconds that sums of clock readings may be off."""
SETTINGS = {
    "vectorized": (),
    "sequential": ("runtime.engine=sequential",),
    "some rounds without anybody": ("federation.sampling=poisson", "federation.cohort=1", "federation.rounds=12"),
    "few rows travel": ("loss={kind: gbce, negatives: 4}", "evaluation.every=1"),
}


def ran(folder: Path, *argv: str) -> Finished:
    done = hushrec(folder, "run", *argv)
    assert (done.code, done.err) == (0, ""), done.err
    return done


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run" / "result.json").read_text())
    return found


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def rows(text: str) -> dict[str, re.Match[str]]:
    """Rows of the table of phases by name, in their order; of a row that explains nothing, none."""
    table = text.partition(HEADING)[2]
    return {row["name"]: row for line in table.splitlines() if (row := ROW.fullmatch(line.rstrip()))}


@pytest.fixture(scope="module", params=SETTINGS.values(), ids=list(SETTINGS))
def profiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a finished run in `run`, and what that printed in `printed`; only to be read."""
    folder = tmp_path_factory.mktemp("profiled")
    (folder / "tiny.yaml").write_text(TINY)
    done = ran(folder, "tiny.yaml", *request.param, "--out", "run", "--profile", "--quiet")
    (folder / "printed").write_text(done.out)
    return folder


def test_the_table_shows_the_phases_of_the_result(profiled: Path) -> None:
    printed, phases = (profiled / "printed").read_text(), result(profiled)["phases"]
    assert printed.count(HEADING) == 1
    shown, total = rows(printed), sum(phases.values())
    assert list(shown) == [*phases, "whole round"]
    for name, seconds in phases.items():
        assert shown[name]["ms"] == f"{seconds * 1e3:,.2f}"
        assert float(shown[name]["share"]) == pytest.approx(100 * seconds / total, abs=0.051)
    assert shown["whole round"]["ms"] == f"{total * 1e3:,.2f}"
    assert sum(float(row["share"] or 0) for row in shown.values()) == pytest.approx(100, abs=0.5)


def test_every_round_has_phases_that_fit_into_it(profiled: Path) -> None:
    trained = [line for line in lines(profiled) if line["kind"] == "train"]
    assert len(trained) == result(profiled)["rounds"] > 0
    for line in trained:
        learnt = "loss" in line
        assert line["phases"].keys() == PHASES if learnt else line["phases"].keys() <= PHASES - {"stepping"}
        assert all(seconds >= 0 for seconds in line["phases"].values())
        assert sum(line["phases"].values()) <= line["seconds"] + ROUNDING
    assert not any("phases" in line for line in lines(profiled) if line["kind"] != "train")


def test_the_result_has_the_mean_of_the_rounds(profiled: Path) -> None:
    trained = [line for line in lines(profiled) if line["kind"] == "train"]
    phases = result(profiled)["phases"]
    assert phases.keys() == PHASES | {"rest"}
    for name in PHASES:
        mean = sum(line["phases"].get(name, 0.0) for line in trained) / len(trained)
        assert phases[name] == pytest.approx(mean, abs=ROUNDING)
    assert sum(phases.values()) == pytest.approx(sum(line["seconds"] for line in trained) / len(trained), abs=ROUNDING)
    assert phases["rest"] >= -ROUNDING
    assert list(phases.values()) == sorted(phases.values(), reverse=True), "the slowest first"


def test_without_profile_there_is_no_table_but_the_figures_are_kept(fresh: Path) -> None:
    plain = ran(fresh, "tiny.yaml", "--out", "run", "--quiet").out
    assert "Test: each user's last item" in plain
    assert HEADING not in plain
    assert "whole round" not in plain
    assert result(fresh)["phases"].keys() == PHASES | {"rest"}
    later = ran(fresh, "--resume", "run", "--profile").out
    assert list(rows(later)) == [*result(fresh)["phases"], "whole round"], "a finished run can still be asked"


def test_with_json_the_phases_stand_in_the_object_only(finished: Path) -> None:
    done = ran(finished, "--resume", "run", "--profile", "--json")
    assert json.loads(done.out)["phases"] == result(finished)["phases"]


def test_a_run_without_rounds_has_an_empty_table(fresh: Path) -> None:
    printed = ran(fresh, "tiny.yaml", "federation.rounds=0", "--out", "run", "--profile", "--quiet").out
    assert result(fresh)["phases"] == {}
    assert {name: row["ms"] for name, row in rows(printed).items()} == {"whole round": "0.00"}
