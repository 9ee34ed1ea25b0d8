"""The run directory: made once, for one experiment, held by one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common import files
from common.data.prepare import prepare
from common.errors import ConfigError, DataError, StateError, UsageError
from common.loading import parse
from simulations import rundir
from tests.support.processes import TINY
from tests.support.runs import tree


@pytest.fixture
def experiment():
    return parse(TINY)


@pytest.fixture
def folder(tmp_path: Path, experiment) -> Path:
    made = rundir.create(experiment, tmp_path / "run")
    rundir.write_manifest(made, experiment, prepare(experiment.data))
    return made


def test_the_experiment_comes_back(tmp_path, experiment):
    folder = rundir.create(experiment, tmp_path / "a" / "b")
    assert folder == tmp_path / "a" / "b"
    assert os.listdir(folder) == ["config.yaml"]
    assert rundir.reopen(folder) == experiment


def test_an_empty_folder_may_be_there_already(tmp_path, experiment):
    assert rundir.create(experiment, tmp_path) == tmp_path


def test_without_a_place_it_is_named_after_experiment_and_time(tmp_path, experiment, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = rundir.create(experiment, None)
    assert folder.parent == Path("runs")
    assert folder.name.startswith("tiny-2")
    assert (tmp_path / folder / "config.yaml").exists()


def test_a_folder_with_files_is_refused(folder, experiment):
    before = tree(folder)
    with pytest.raises(UsageError, match="holds files already; go on with --resume"):
        rundir.create(experiment, folder)
    assert tree(folder) == before


@pytest.mark.parametrize("name", ["file", "file/run", "x" * 300])
def test_a_folder_that_cannot_be_made_is_bad_use(tmp_path, experiment, name):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError):
        rundir.create(experiment, tmp_path / name)
    assert os.listdir(tmp_path) == ["file"]


def test_unusable_data_leaves_no_folder(tmp_path):
    experiment = parse("name: x\ndata: {kind: pairs, path: nowhere.txt}")
    with pytest.raises(DataError):
        rundir.create(experiment, tmp_path / "run")
    assert os.listdir(tmp_path) == []


def test_what_is_no_run_is_not_opened(tmp_path):
    (tmp_path / "file").touch()
    for name in (".", "nowhere", "file", "file/run"):
        with pytest.raises(StateError, match=r"no run directory \(it has no config.yaml\)"):
            rundir.reopen(tmp_path / name)
    (tmp_path / "config.yaml").write_text("seed: [")
    with pytest.raises(ConfigError, match=r"config\.yaml:1"):
        rundir.reopen(tmp_path)


def test_only_the_runtime_can_be_overridden(folder):
    assert rundir.reopen(folder, ["runtime.threads=2"]).runtime.threads == 2
    with pytest.raises(UsageError, match=r"only runtime\.\* can be overridden here"):
        rundir.reopen(folder, ["runtime.threads=2", "federation.rounds=7"])
    with pytest.raises(ConfigError):
        rundir.reopen(folder, ["runtime.treads=2"])


def test_two_processes_never_hold_one_folder(folder):
    code = """
import sys
from pathlib import Path
from common import files
with files.locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(StateError, match="another hushrec process is running here"), files.locked(folder):
            pass
        other.kill()
        other.wait()
    with files.locked(folder):  # the lock died with its process
        pass
    with files.locked(folder):
        pass


def test_half_written_files_are_removed_by_the_next_one(folder):
    half = folder / ".0123456789ab.checkpoint.safetensors"
    others = [folder / name for name in (".gitignore", "notes.txt", ".0123456789ab")]
    for path in (half, *others):
        path.touch()
    with files.locked(folder):
        assert not half.exists()
    assert all(path.exists() for path in others)


def test_the_manifest_says_what_a_result_may_depend_on(folder):
    facts = json.loads((folder / "manifest.json").read_text())
    assert facts["seeds"] == {"experiment": 0, "data": 0}
    assert facts["data"]["kept"]["users"] == 60
    assert facts["versions"].keys() >= {"hushrec", "torch", "flwr", "numpy"}
    assert facts["git_commit"] is None or len(facts["git_commit"].rstrip("+")) == 40


def test_files_are_known_by_their_checksum(tmp_path):
    (tmp_path / "pairs.txt").write_text("u i\nu j\n")
    experiment = parse(f"name: x\ndata: {{kind: pairs, path: {tmp_path / 'pairs.txt'}}}")
    folder = rundir.create(experiment, tmp_path / "run")
    rundir.write_manifest(folder, experiment, prepare(experiment.data))
    facts = json.loads((folder / "manifest.json").read_text())
    ((name, sha256),) = facts["data"]["source"]["files"].items()
    assert name == "pairs.txt"
    assert len(sha256) == 64
    assert facts["seeds"] == {"experiment": 0}


@pytest.mark.parametrize(
    ("status", "commit"),
    [
        ("# branch.oid 0123abc\n# branch.head main\n", "0123abc"),
        ("# branch.oid 0123abc\n# branch.head main\n1 .M N... 100644 100644 100644 a b cli.py\n", "0123abc+"),
        ("", None),
        (FileNotFoundError("git"), None),
        (subprocess.TimeoutExpired("git", 10), None),
    ],
)
def test_the_commit_and_whether_the_code_was_changed_since(folder, experiment, monkeypatch, status, commit):
    def git(*_, **__):
        if isinstance(status, Exception):
            raise status
        return subprocess.CompletedProcess([], 0, status, "")

    monkeypatch.setattr(rundir.subprocess, "run", git)
    monkeypatch.setattr(rundir.Path, "exists", lambda path: True)
    rundir.write_manifest(folder, experiment, prepare(experiment.data))
    assert json.loads((folder / "manifest.json").read_text())["git_commit"] == commit


def test_a_run_is_held_against_its_manifest(folder, experiment):
    data = prepare(experiment.data)
    rundir.check_manifest(folder, experiment, data)
    rundir.check_manifest(folder, parse(TINY, overrides=["runtime.memory_mb=64"]), data)
    with pytest.raises(StateError, match=r"config\.yaml: has changed since the run began"):
        rundir.check_manifest(folder, parse(TINY, overrides=["seed=1"]), data)
    with pytest.raises(StateError, match="its data has changed since"):
        rundir.check_manifest(folder, experiment, prepare(parse(TINY, overrides=["data.seed=1"]).data))


@pytest.mark.parametrize("content", ["[]", "{}", '{"experiment": 1}', '{"experiment": 1, "data": 2}', "null"])
def test_a_manifest_of_something_else(folder, experiment, content):
    (folder / "manifest.json").write_text(content)
    with pytest.raises(StateError, match="not the manifest of a run"):
        rundir.check_manifest(folder, experiment, prepare(experiment.data))


def test_a_run_has_a_result_once_it_is_finished(folder):
    assert rundir.result(folder) is None
    (folder / "result.json").write_text('{"test": {}}')
    assert rundir.result(folder) == {"test": {}}
    for content in ("[]", "{}", "3"):
        (folder / "result.json").write_text(content)
        with pytest.raises(StateError, match="not the result of a run"):
            rundir.result(folder)
