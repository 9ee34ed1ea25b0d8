"""A run may be stopped or killed at any moment; resumed, it ends as if nothing had been, to the bit."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.processes import DIES_AT_CALL, KILLED, Finished, Running, hushrec
from tests.support.runs import assert_same_run, metrics, tree

DIES_WHILE_WRITING = """
import signal
import server.checkpoint as checkpoint
whole, written = checkpoint.save_file, 0
def torn(tensors, path, metadata):
    global written
    written += 1
    whole(tensors, path, metadata=metadata)
    if written == 2:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save_file = torn
"""
SIGNALLED = """
import signal
import server.journal as journal
whole, lines = journal.append_line, 0
def signalled(path, text):
    global lines
    lines += 1
    whole(path, text)
    for number in {signals} if lines == {line} else ():
        signal.raise_signal(number)
journal.append_line = signalled
"""
NO_TRAINING = "sys.modules['simulations.runner'] = sys.modules['server.rounds'] = None"


def resumed(folder: Path) -> Finished:
    done = hushrec(folder, "run", "--resume", "run", "--json")
    assert done.code == 0, done.err
    return done


def run(folder: Path, before: str = "") -> Finished:
    return hushrec(folder, "run", "tiny.yaml", "--out", "run", "--json", before=before)


# Five moments of the whole run, each drawn from a fifth of it.
@pytest.mark.parametrize("part", range(5))
def test_killed_at_a_random_moment(fresh, undisturbed, part):
    calls = int((undisturbed / "calls").read_text())
    moment = int(random.Random(part).uniform(0.19 * part, 0.19 * (part + 1)) * calls) + 1
    assert run(fresh, DIES_AT_CALL.format(moment=moment)).code == KILLED
    resumed(fresh)
    assert_same_run(fresh / "run", undisturbed / "run")


def test_killed_from_outside_soon_after_the_first_checkpoint(fresh, undisturbed):
    # The process waits after its first checkpoint, so that the blow meets it there on the slowest of machines.
    wait = "import time, server.checkpoint as c\nwhole = c.save\nc.save = lambda *a: (whole(*a), time.sleep(60))"
    process = Running(fresh, "run", "tiny.yaml", "--out", "run", before=wait)
    while not (fresh / "run" / "checkpoint.safetensors").exists():
        time.sleep(0.01)
    process.kill()
    assert process.wait().code == KILLED
    resumed(fresh)
    assert_same_run(fresh / "run", undisturbed / "run")


def test_killed_during_the_write_of_a_checkpoint(fresh, undisturbed):
    assert run(fresh, DIES_WHILE_WRITING).code == KILLED
    assert [path.name[13:] for path in (fresh / "run").glob(".*")] == [".checkpoint.safetensors"], (
        "half a file lies there"
    )
    resumed(fresh)
    assert_same_run(fresh / "run", undisturbed / "run")


def test_killed_again_and_again(fresh, undisturbed):
    calls = int((undisturbed / "calls").read_text())
    assert run(fresh, DIES_AT_CALL.format(moment=calls // 2)).code == KILLED
    again = DIES_AT_CALL.format(moment=calls // 4)
    assert hushrec(fresh, "run", "--resume", "run", before=again).code == KILLED
    assert hushrec(fresh, "run", "--resume", "run", before=DIES_WHILE_WRITING.replace("== 2", "== 1")).code == KILLED
    resumed(fresh)
    assert_same_run(fresh / "run", undisturbed / "run")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_politely(fresh, undisturbed, number):
    stopped = run(fresh, SIGNALLED.format(signals=[int(number)], line=1))
    assert stopped.code == 130
    assert "stopped after round 1 of 6; go on with: hushrec run --resume run" in stopped.err
    assert "Traceback" not in stopped.err
    assert json.loads(stopped.out) == {"run_dir": "run", "status": "stopped"}
    assert [line["round"] for line in metrics(fresh / "run")] == [1]
    resumed(fresh)
    assert_same_run(fresh / "run", undisturbed / "run")


def test_each_engine_goes_on_to_its_own_bits(fresh):
    """Engines agree but for rounding, so a resumed run is held against a whole one of its own engine."""
    whole = hushrec(fresh, "run", "tiny.yaml", "runtime.engine=sequential", "--out", "whole")
    assert whole.code == 0, whole.err
    stop = SIGNALLED.format(signals=[2], line=4)
    assert hushrec(fresh, "run", "tiny.yaml", "runtime.engine=sequential", "--out", "run", before=stop).code == 130
    assert len(metrics(fresh / "run")) < len(metrics(fresh / "whole"))
    resumed(fresh)
    assert_same_run(fresh / "run", fresh / "whole")


def test_the_second_signal_stops_at_once(fresh, undisturbed):
    stopped = run(fresh, SIGNALLED.format(signals=[2, 2], line=5))
    assert stopped.code == 130
    assert "stopped at once; go on with: hushrec run --resume run" in stopped.err
    assert "Traceback" not in stopped.err
    assert len(metrics(fresh / "run")) == 5
    resumed(fresh)
    assert_same_run(fresh / "run", undisturbed / "run")


def test_stopped_before_it_began_leaves_nothing(fresh):
    before = tree(fresh)
    early = "import signal, simulations.rundir as r\nr.prepare = lambda data: signal.raise_signal(signal.SIGTERM)"
    stopped = run(fresh, early)
    assert (stopped.code, stopped.out) == (130, "")
    assert "Traceback" not in stopped.err
    assert tree(fresh) == before


def test_the_command_itself_stops_on_ctrl_c(fresh):
    command = [sys.executable, "-c", "from simulations.cli import main; main()", "run", "tiny.yaml", "--out", "run"]
    process = subprocess.Popen([*command, "federation.rounds=100000"], cwd=fresh, stderr=subprocess.PIPE, text=True)
    while not (fresh / "run" / "metrics.jsonl").exists() or not metrics(fresh / "run"):
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopping after this round (once more: at once)" in err
    assert "go on with: hushrec run --resume run" in err
    assert (fresh / "run" / "checkpoint.safetensors").exists()


def test_a_finished_run_says_the_same_again_and_trains_nothing(finished):
    before = tree(finished)
    again = hushrec(finished, "run", "--resume", "run", "--json", before=NO_TRAINING)
    assert (again.code, again.err) == (0, "")
    assert again.out == (finished / "printed").read_text()
    assert tree(finished) == before


def test_seconds_are_those_of_all_processes(finished):
    (finished / "run" / "result.json").unlink()
    lines = (finished / "run" / "metrics.jsonl").read_text().splitlines()
    edited = [json.dumps(json.loads(line) | {"seconds": 1000.0}) + "\n" for line in lines]
    (finished / "run" / "metrics.jsonl").write_text("".join(edited))
    assert json.loads(resumed(finished).out)["seconds"] > 1000 * len(lines)
