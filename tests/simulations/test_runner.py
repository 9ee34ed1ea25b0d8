"""One run on this machine, called as a function."""

import json
import shutil
import signal
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from common import files
from common.data.prepare import prepare
from common.errors import Interrupted, StateError
from common.loading import parse
from server import journal
from simulations import rundir, runner
from simulations.runner import run
from tests.support.processes import TINY
from tests.support.runs import assert_same_run, metrics, weights

HANDLED = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture
def start(tmp_path):
    """Run TINY with overrides in a folder of that name, and return its result."""

    def started(*overrides: str, name: str = "run") -> dict:
        experiment = parse(TINY, overrides=overrides)
        return run(experiment, rundir.create(experiment, tmp_path / name), Console(quiet=True))

    return started


@pytest.fixture
def signalled(monkeypatch):
    """Let signals arrive after a line of metrics."""

    def arrive(at: int, *numbers: int) -> None:
        whole, lines = journal.append_line, []

        def append(path: Path, text: str) -> None:
            whole(path, text)
            lines.append(text)
            if len(lines) == at:
                for number in numbers:
                    signal.raise_signal(number)

        monkeypatch.setattr(journal, "append_line", append)

    return arrive


def test_the_result_is_what_the_file_says(start, tmp_path):
    result = start()
    assert result == json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["run_dir"] == str(tmp_path / "run")
    assert (result["users"], result["items"], result["users_tested"]) == (60, 40, 60)
    trained = [line for line in journal.read(tmp_path / "run") if line["kind"] == "train"]
    assert result["clients_per_second"] == pytest.approx(6 * 20 / sum(line["seconds"] for line in trained))
    assert result["bytes_up_per_client"] == result["bytes_down_per_client"], "softmax moves everything both ways"
    assert result["test"].keys() == {"hr@5", "ndcg@5", "hr@10", "ndcg@10", "hr@20", "ndcg@20", "mrr"}


def test_the_chosen_round_is_the_best_validation(start, tmp_path):
    result = start("evaluation.every=1")
    values = {line["round"]: line["ndcg@10"] for line in metrics(tmp_path / "run") if line["kind"] == "validation"}
    assert len(values) == 6
    assert result["best_round"] == max(values, key=values.get)


def test_patience_stops_early(start):
    result = start("evaluation={every: 1, patience: 1}", "federation.optimizer.lr=1e-9", "federation.rounds=50")
    assert result["rounds"] < 50
    assert result["best_round"] == 1


def test_sampled_figures_have_names_of_their_own(start):
    test = start("evaluation={sampled: 9, cutoffs: [3]}")["test"]
    assert test.keys() >= {"hr@3", "hr@10", "mrr", "hr@3|s9", "ndcg@10|s9", "mrr|s9"}
    assert test["hr@3|s9"]["value"] > test["hr@3"]["value"]


def test_rounds_that_nobody_joins_change_nothing(start, tmp_path):
    result = start("federation={sampling: poisson, cohort: 1}", "federation.rounds=4")
    clients = [line["clients"] for line in metrics(tmp_path / "run") if line["kind"] == "train"]
    assert 0 in clients
    assert result["rounds"] == 4


def test_threads_are_those_of_the_experiment(start):
    before = torch.get_num_threads()
    try:
        start("runtime.threads=2", "federation.rounds=1")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("number", HANDLED)
def test_a_signal_stops_after_the_round_and_handlers_come_back(start, signalled, tmp_path, number):
    handlers = [signal.getsignal(number) for number in HANDLED]
    signalled(2, number)
    with pytest.raises(Interrupted, match="stopped after round 2 of 6"):
        start()
    assert [signal.getsignal(number) for number in HANDLED] == handlers
    assert (tmp_path / "run" / "checkpoint.safetensors").exists()
    assert rundir.result(tmp_path / "run") is None


def test_a_second_signal_stops_at_once(start, signalled, tmp_path):
    signalled(1, signal.SIGINT, signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        start()
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()
    with files.locked(tmp_path / "run"):
        pass


def test_a_signal_in_the_last_round_changes_nothing(start, signalled, tmp_path):
    whole = start(name="whole")
    signalled(8, signal.SIGINT)  # six rounds and the second of three validations: the last round is under way
    assert start()["test"] == whole["test"]
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_without_a_checkpoint_a_resumed_run_begins_anew(start, tmp_path):
    start(name="whole")
    experiment = parse(TINY)
    folder = rundir.create(experiment, tmp_path / "run")
    run(experiment, folder, Console(quiet=True), resume=True)
    assert weights(folder) == weights(tmp_path / "whole")
    assert (folder / "manifest.json").exists()


def test_a_resumed_run_refuses_another_experiment(start, tmp_path):
    start()
    with pytest.raises(StateError, match="has changed since the run began"):
        run(parse(TINY, overrides=["seed=1"]), tmp_path / "run", Console(quiet=True), resume=True)


LOCAL = (
    "federation.weighting=uniform",
    "privacy={kind: local, noise_multiplier: 1, clipping_norm: 0.5}",
    "evaluation.privacy=public-holdout",
)


def test_a_resumed_run_refuses_devices_that_have_forgotten_what_they_spent(start, tmp_path):
    start(*LOCAL)
    shutil.rmtree(tmp_path / "run" / "devices")
    with pytest.raises(StateError, match=r"devices.jsonl: is gone, and with it what users have spent"):
        run(parse(TINY, overrides=LOCAL), tmp_path / "run", Console(quiet=True), resume=True)


def test_what_a_private_run_shows_tells_no_hash_of_its_data(start, tmp_path):
    start(*LOCAL)
    start(name="plain")
    private, plain = (json.loads((tmp_path / name / "manifest.json").read_text())["data"] for name in ("run", "plain"))
    assert private == {"kept": {"users": 60, "items": 40}}
    assert json.loads((tmp_path / "run" / "devices" / "data.json").read_text()) == plain
    (tmp_path / "run" / "devices" / "data.json").write_text(json.dumps(plain | {"digest": "another"}))
    with pytest.raises(StateError, match="its data has changed"):
        rundir.check_manifest(tmp_path / "run", parse(TINY, overrides=LOCAL), prepare(parse(TINY).data))


def test_progress_goes_to_the_console(tmp_path):
    console = Console(file=StringIO(), width=80)
    experiment = parse(TINY)
    run(experiment, rundir.create(experiment, tmp_path / "run"), console)
    assert [line.split()[1] for line in console.file.getvalue().splitlines()] == ["2/6", "4/6", "6/6"]


def test_memory_is_reported_in_megabytes(start, monkeypatch):
    class Usage:
        ru_maxrss = 300 * 1024

    monkeypatch.setattr(runner.resource, "getrusage", lambda who: Usage)
    assert start("federation.rounds=0")["peak_rss_mb"] == 600  # its own and its largest child's
