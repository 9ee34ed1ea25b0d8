"""Killed at any moment between account, noise and checkpoint, a private run never holds less than what it released.

Each process writes down, unbuffered and beside the product, what it is about to let go: noised sums and rankings on a
server, updates on a device.
"""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from tests.end_to_end.conftest import COUNTED
from tests.support.processes import DIES_AT_CALL, KILLED, TINY, hushrec

SERVER = (
    TINY
    + """
privacy: {kind: user-level, noise_multiplier: 1.0, rng: secure}
"""
)
DEVICES = (
    TINY
    + """
privacy: {kind: example-level, noise_multiplier: 1.0, segment: 4, participations: 5}
"""
)
MODES = {
    "server": SERVER.replace("cohort: 20,", "cohort: 20, sampling: poisson, weighting: uniform,"),
    "devices": DEVICES.replace("cohort: 20,", "cohort: 20, weighting: uniform,").replace(
        "{every: 2,", "{every: 2, privacy: unaccounted,"
    ),
}
WITNESS = """
import signal
import client.handlers as handlers
import server.curator as curator
released = os.open("released", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def seen(module, name, say):
    whole = getattr(module, name)
    def witnessed(*args, **kwargs):
        result = whole(*args, **kwargs)
        os.write(released, (say(*args) + "\\n").encode())
        return result
    setattr(module, name, witnessed)
seen(curator, "add_noise", lambda total, std, source, purpose, *keys: f"update {keys[0]}")
seen(curator, "noised_histogram", lambda *args: f"ranking {args[-2]}")
seen(handlers, "_update_reply", lambda message, updates, i, *rest: f"user {updates.users[i]}")
"""
DIES = """
import {module} as module
whole, left = module.{name}, {count}
def mortal(*args, **kwargs):
    global left
    left -= 1
    if {before} and not left:
        os.kill(os.getpid(), signal.SIGKILL)
    result = whole(*args, **kwargs)
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
module.{name} = mortal
"""
MOMENTS = {
    "server": [
        ("common.privacy.lines", "write"),
        ("server.curator", "add_noise"),
        ("server.curator", "noised_histogram"),
        ("server.curator", "mean_of"),
        ("server.journal", "append_line"),
        ("server.checkpoint", "save_file"),
        ("server.checkpoint", "save"),
    ],
    "devices": [
        ("common.privacy.lines", "write"),
        ("client.cohort", "train_examples"),
        ("client.handlers", "_update_reply"),
        ("server.checkpoint", "save"),
    ],
}
CASES = [(mode, *moment, before) for mode, moments in MOMENTS.items() for moment in moments for before in (True, False)]


def begun(folder: Path, mode: str) -> None:
    (folder / "tiny.yaml").write_text(MODES[mode])


def run(folder: Path, before: str):
    return hushrec(folder, "run", "tiny.yaml", "--out", "run", "--json", before=WITNESS + before)


def lines(path: Path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def accounted(folder: Path, mode: str):
    """How often each thing has been paid for."""
    if mode == "devices":
        accounts = lines(folder / "run" / "devices" / "devices.jsonl")
        return Counter(f"user {user}" for line in accounts for user in line["users"])
    return Counter(f"{line['what']} {line['round']}" for line in lines(folder / "run" / "ledger.jsonl"))


def released(folder: Path, mode: str):
    said = (folder / "released").read_text().splitlines() if (folder / "released").exists() else []
    return Counter(line for line in said if line.startswith("user") == (mode == "devices"))


def holds(folder: Path, mode: str) -> None:
    """Nothing has been released that is not in the account."""
    assert released(folder, mode) <= accounted(folder, mode)
    if mode == "server":
        told = {line["round"] for line in lines(folder / "run" / "metrics.jsonl") if line["kind"] == "train"}
        assert {f"update {round_}" for round_ in told} <= accounted(folder, mode).keys()


def ends_well(folder: Path, mode: str) -> None:
    """Resumed, the run comes to its end, and its card counts all that it ever paid for."""
    done = hushrec(folder, "run", "--resume", "run", "--json", before=WITNESS)
    assert done.code == 0, done.err
    holds(folder, mode)
    card, paid = json.loads((folder / "run" / "privacy.json").read_text()), accounted(folder, mode)
    if mode == "devices":
        assert card["participations"] <= max(paid.values()) <= 5
    else:
        assert card["rounds"] == sum(count for name, count in paid.items() if name.startswith("update")) >= 6


@pytest.mark.parametrize(("mode", "module", "name", "before"), CASES)
def test_killed_at_a_named_moment(tmp_path, mode, module, name, before):
    begun(tmp_path, mode)
    dies = DIES.format(module=module, name=name, count=3, before=before)
    assert run(tmp_path, dies).code == KILLED
    holds(tmp_path, mode)
    ends_well(tmp_path, mode)


@pytest.mark.parametrize("mode", MODES)
def test_killed_again_and_again_at_random_moments(tmp_path, mode):
    begun(tmp_path, mode)
    assert run(tmp_path, COUNTED).code == 0
    calls = int((tmp_path / "calls").read_text())
    for attempt in range(4):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        begun(folder, mode)
        moment = int(random.Random(attempt).uniform(0.3, 0.99) * calls)
        dies = DIES_AT_CALL.format(moment=moment)
        assert run(folder, dies).code == KILLED
        holds(folder, mode)
        ends_well(folder, mode)
