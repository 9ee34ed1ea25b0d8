"""The disk fills up while a run writes: one line says so, and with space again the run goes on to the same end."""

import pytest

from tests.support.processes import hushrec
from tests.support.runs import assert_same_run, metrics

FULL = """
import common.files as files, errno, os, server.journal, server.rounds
def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
def full_for(name, time):
    whole, seen = os.replace, 0
    def replace(source, target):
        nonlocal seen
        seen += os.path.basename(target) == name
        (full if os.path.basename(target) == name and seen == time else whole)(source, target)
    os.replace = replace
"""


def assert_goes_on(folder, undisturbed):
    done = hushrec(folder, "run", "--resume", "run")
    assert done.code == 0, done.err
    assert_same_run(folder / "run", undisturbed / "run")


@pytest.mark.parametrize(
    ("name", "time"),
    [
        ("manifest.json", 1),
        ("metrics.jsonl", 1),
        ("checkpoint.safetensors", 1),
        ("checkpoint.safetensors", 2),
        ("model.safetensors", 1),
        ("result.json", 1),
    ],
)
def test_while_a_file_is_written(fresh, undisturbed, name, time):
    failed = hushrec(fresh, "run", "tiny.yaml", "--out", "run", "-q", before=f"{FULL}full_for({name!r}, {time})")
    assert (failed.code, failed.out) == (1, "")
    assert failed.err == f"error: run/{name}: the disk is full; free some space or choose another folder\n"
    assert not list((fresh / "run").glob(".*")), "no half of a file"
    assert (fresh / "run" / name).exists() == (time > 1), "the one before stays"
    assert_goes_on(fresh, undisturbed)


def test_before_there_is_anything(fresh):
    failed = hushrec(fresh, "run", "tiny.yaml", "--out", "run", before=f"{FULL}full_for('config.yaml', 1)")
    assert (failed.code, failed.out) == (1, "")
    assert failed.err == "error: run/config.yaml: the disk is full; free some space or choose another folder\n"
    assert not any((fresh / "run").iterdir())
    assert hushrec(fresh, "run", "tiny.yaml", "--out", "run").code == 0, "the empty folder is no obstacle"


def test_while_a_line_of_metrics_is_written(fresh, undisturbed):
    third = """
whole, lines = server.journal.append_line, 0
def append(path, text):
    global lines
    lines += 1
    if lines == 3:
        files.open = full
    whole(path, text)
server.journal.append_line = append
"""
    failed = hushrec(fresh, "run", "tiny.yaml", "--out", "run", "-q", before=FULL + third)
    assert (failed.code, failed.out) == (1, "")
    assert failed.err == "error: run/metrics.jsonl: the disk is full; free some space or choose another folder\n"
    assert metrics(fresh / "run") == metrics(undisturbed / "run")[:2]
    assert_goes_on(fresh, undisturbed)


def test_a_file_that_may_not_grow(fresh, undisturbed):
    """A limit that the system itself keeps; safetensors writes from Rust, so its errors are of another kind."""
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))"
    failed = hushrec(fresh, "run", "tiny.yaml", "--out", "run", "-q", before=limit)
    assert (failed.code, failed.out) == (1, "")
    assert len(failed.err.splitlines()) == 1
    assert failed.err.startswith("error: run/checkpoint.safetensors: ")
    assert "free some space or choose another folder" in failed.err
    assert not list((fresh / "run").glob(".*"))
    assert_goes_on(fresh, undisturbed)
