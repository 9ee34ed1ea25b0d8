"""A file is whole or absent whatever happens, and a fault of the disk is one line with the mend."""

import errno
import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest

from common import files
from common.errors import DataError, StateError
from common.files import append_line, atomic, explained, json_text, read_json, sha256, write_bytes, write_json
from common.metrics import Estimate

needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no always-full device")


@pytest.fixture
def small_disk(tmp_path):
    """A limit of 4 KiB a file: writes first stop short, then fail, as on a disk that fills up."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield tmp_path
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def refuse(code: int):
    def refused(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return refused


def test_the_file_appears_only_when_it_is_whole(tmp_path):
    path = tmp_path / "model.npy"
    path.write_text("old")
    with atomic(path) as temporary:
        assert temporary.parent == path.parent
        assert temporary.suffix == path.suffix  # numpy appends the suffix to a name without it
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["model.npy"]


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt])
def test_whatever_is_raised_leaves_the_old_file_and_no_temporary(tmp_path, fault):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(fault), atomic(path) as temporary:
        temporary.write_text("half")
        raise fault
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("code", "mend"),
    [(errno.ENOSPC, "disk is full"), (errno.EACCES, "permission"), (errno.EROFS, "read-only"), (errno.EIO, "error")],
)
def test_a_fault_of_the_disk_is_one_line_with_path_and_mend(tmp_path, monkeypatch, step, code, mend):
    path = tmp_path / "a.json"
    monkeypatch.setattr(files.os, step, refuse(code))
    with pytest.raises(StateError) as caught:
        write_json(path, {})
    assert str(caught.value).startswith(f"{path}: ")
    assert mend in str(caught.value)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_keeps_the_old_file(small_disk):
    path = small_disk / "model.bin"
    write_bytes(path, b"old")
    with pytest.raises(StateError, match=r"model\.bin"):
        write_bytes(path, bytes(10_000))
    assert path.read_bytes() == b"old"
    assert os.listdir(small_disk) == ["model.bin"]


def test_a_folder_that_cannot_be_flushed_is_no_fault(tmp_path, monkeypatch):
    real = os.fsync
    monkeypatch.setattr(
        files.os, "fsync", lambda fd: refuse(errno.EINVAL)() if os.path.isdir(f"/proc/self/fd/{fd}") else real(fd)
    )
    write_bytes(tmp_path / "a", b"whole")
    assert (tmp_path / "a").read_bytes() == b"whole"


def test_a_missing_folder_names_the_path(tmp_path):
    with pytest.raises(DataError, match=r"missing/a\.json: no such file or folder"):
        write_json(tmp_path / "missing" / "a.json", {}, error=DataError)


def test_only_faults_of_the_file_system_are_explained(tmp_path):
    with pytest.raises(KeyError), explained(tmp_path):
        raise KeyError
    with pytest.raises(StateError, match="is a folder"), explained(tmp_path):
        tmp_path.read_bytes()


def test_json_comes_back(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"ä": [1, 2.5, None], "b": {"c": "d"}})
    assert read_json(path) == {"ä": [1, 2.5, None], "b": {"c": "d"}}
    assert path.read_text().endswith("}\n")


def test_json_is_strict_and_takes_numpy_and_paths():
    value = {
        1: np.float32(0.5),
        "n": np.arange(2),
        "e": Estimate(np.nan, -np.inf, 1.0),
        "p": Path("a/b"),
        "i": np.int64(3),
    }
    assert json_text(value) == '{"1": 0.5, "n": [0, 1], "e": [null, null, 1.0], "p": "a/b", "i": 3}'
    with pytest.raises(TypeError):
        json_text(object())


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe"])
def test_a_truncated_json_file_says_so(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(StateError, match=r"a\.json: not a JSON file"):
        read_json(tmp_path / "a.json")
    with pytest.raises(StateError, match=r"b\.json: no such file"):
        read_json(tmp_path / "b.json")


@pytest.mark.parametrize("sync", [False, True])
def test_lines_are_appended(tmp_path, sync):
    path = tmp_path / "metrics.jsonl"
    for round in range(3):
        append_line(path, json.dumps({"round": round}), sync=sync)
    assert [json.loads(line)["round"] for line in path.read_text().splitlines()] == [0, 1, 2]
    with pytest.raises(ValueError, match="one line"):
        append_line(path, "a\nb")


def test_a_line_that_does_not_fit_is_taken_back(small_disk):
    path = small_disk / "ledger.jsonl"
    append_line(path, "x" * 4000)
    with pytest.raises(StateError, match=r"ledger\.jsonl"):
        append_line(path, "y" * 200)
    assert path.read_text() == "x" * 4000 + "\n"


@needs_dev_full
def test_appending_to_a_full_disk_says_so():
    with pytest.raises(StateError, match="/dev/full: the disk is full"):
        append_line(Path("/dev/full"), "a")


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(DataError, match="no such file"):
        sha256(tmp_path / "b", DataError)
