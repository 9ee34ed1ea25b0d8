"""metrics.jsonl across kills and resumes."""

import pytest

from common.errors import StateError
from server.journal import METRICS_FILE, journal, read

LINES = [{"round": 1, "kind": "train"}, {"round": 2, "kind": "train"}, {"round": 2, "kind": "validation", "hr@10": 0.5}]


def ignore(line):
    pass


def test_lines_are_written_and_passed_on(tmp_path):
    seen = []
    record = journal(tmp_path, seen.append, 0)
    for line in LINES:
        record(line)
    assert read(tmp_path) == seen == LINES
    assert (tmp_path / METRICS_FILE).read_text().count("\n") == 3


def test_without_a_folder_nothing_is_written(tmp_path):
    seen = []
    journal(None, seen.append, 0)(LINES[0])
    assert seen == LINES[:1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("done", "kept"), [(0, 0), (1, 1), (2, 3), (9, 3)])
def test_lines_of_rounds_that_run_again_are_dropped(tmp_path, done, kept):
    record = journal(tmp_path, ignore, 0)
    for line in LINES:
        record(line)
    again = journal(tmp_path, ignore, done)
    assert read(tmp_path) == LINES[:kept]
    again({"round": done + 1, "kind": "train"})
    assert read(tmp_path) == [*LINES[:kept], {"round": done + 1, "kind": "train"}]


@pytest.mark.parametrize("rest", ['{"round": 3, "ki', "\x00\x00\x00", '"round"', "[1]", '{"round": null}', "{}", "3"])
def test_what_is_no_line_is_passed_over(tmp_path, rest):
    record = journal(tmp_path, ignore, 0)
    for line in LINES:
        record(line)
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write(rest)
    assert read(tmp_path) == LINES
    journal(tmp_path, ignore, 2)({"round": 3})
    assert read(tmp_path) == [*LINES, {"round": 3}]
    assert rest not in (tmp_path / METRICS_FILE).read_text().splitlines()


def test_bytes_that_are_no_text_are_passed_over(tmp_path):
    (tmp_path / METRICS_FILE).write_bytes(b'{"round": 1}\n\xff\xfe\n{"round": 2}\n')
    assert read(tmp_path) == [{"round": 1}, {"round": 2}]


def test_no_file_no_lines(tmp_path):
    assert read(tmp_path) == []


def test_what_is_not_finite_becomes_null(tmp_path):
    journal(tmp_path, ignore, 0)({"round": 1, "loss": float("nan")})
    assert read(tmp_path) == [{"round": 1, "loss": None}]


def test_no_folder_is_an_error(tmp_path):
    with pytest.raises(StateError, match="no such file or folder"):
        journal(tmp_path / "none", ignore, 0)
