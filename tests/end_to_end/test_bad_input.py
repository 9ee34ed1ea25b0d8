"""Whatever a person may get wrong: an exit code, one clear line with place and mend, and nothing left behind."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save_file

from server.checkpoint import sealed
from tests.support.processes import TINY, Finished, hushrec
from tests.support.runs import tree

EVENTS = "user,item,time\n" + "".join(f"u{u},i{(u + 3 * t) % 9},{t}\n" for u in range(9) for t in range(5))


def refused(folder: Path, code: int, message: str, *argv: object, before: str = "") -> Finished:
    """Run a command that must fail, and see that it changed nothing."""
    untouched = tree(folder)
    cache = f"os.environ['HUSHREC_CACHE'] = {str(folder.parent / 'cache')!r}\n"
    done = hushrec(folder, *argv, before=cache + before)
    assert done.code == code, done.err
    assert all(line.startswith("error: ") for line in done.err.splitlines()), done.err
    assert "Traceback" not in done.err
    assert message in done.err
    assert done.out == ""
    assert tree(folder) == untouched
    assert not list((folder.parent / "cache").glob(".*")), "a half-made data set"
    return done


# --- the configuration: content of x.yaml, what is said ------------------------------------------------------------

CONFIGS = {
    "empty": ("", "x.yaml:1: it is empty; must be lines such as `name: first-try`"),
    "a list": ("[1, 2]", "x.yaml:1: "),
    "unknown key": (TINY + "modle: {dim: 8}\n", "modle: unknown key; did you mean model?"),
    "unknown key in a section": (TINY.replace("dim:", "dmi:"), "x.yaml:4: model.dmi: unknown key; did you mean dim?"),
    "wrong type": (TINY.replace("rounds: 6", "rounds: many"), "x.yaml:5: federation.rounds: many is not allowed"),
    "negative rounds": (TINY.replace("rounds: 6", "rounds: -6"), "-6 is not allowed; must be a whole number ≥ 0"),
    "not a number": (TINY.replace("lr: 0.02", "lr: .nan"), "federation.optimizer.lr: "),
    "a key twice": (TINY + "name: again\n", "name: given twice; first at x.yaml:2"),
    "broken YAML": (TINY + "seed: [1\n", "broken YAML at column "),
    "no data": ("name: x\n", "data: "),
    "unknown kind": (TINY.replace("kind: synthetic", "kind: netflix"), "data.kind: "),
    "two measures": (TINY.replace("cohort: 20", "cohort: 20, local: {steps: 1, epochs: 1}"), "give steps or epochs"),
    "heads": (TINY.replace("dim: 8", "dim: 8, heads: 3"), "heads (3) must divide dim (8)"),
    "bytes": ("name: \udcff\n", "x.yaml:1: not UTF-8: byte 0xff"),
}


@pytest.mark.parametrize(("text", "message"), CONFIGS.values(), ids=CONFIGS)
def test_configuration(fresh, text, message):
    (fresh / "x.yaml").write_bytes(text.encode(errors="surrogateescape"))
    refused(fresh, 2, message, "run", "x.yaml")


def test_all_faults_of_a_configuration_at_once(fresh):
    (fresh / "x.yaml").write_text(TINY.replace("rounds: 6", "rounds: -6").replace("dim:", "dmi:"))
    done = refused(fresh, 2, "override 'seed=x': seed: ", "run", "x.yaml", "seed=x", "evaluation.every=0")
    assert len(done.err.splitlines()) == 4


# --- the command line: arguments, what is said ---------------------------------------------------------------------

COMMANDS = {
    "missing file": ("run tinny.yaml", "tinny.yaml: no such file; did you mean tiny.yaml?"),
    "a folder": ("run .", ".: cannot be read: Is a directory"),
    "override without a value": ("run tiny.yaml federation.rounds", "must look like federation.rounds=5"),
    "override of an unknown key": ("run tiny.yaml rounds=5", "override 'rounds=5': rounds: unknown key"),
    "neither file nor run": ("run", "name an experiment's YAML file, or --resume DIR; one of the two"),
    "both": ("run tiny.yaml --resume runs", "one of the two"),
    "resumed elsewhere": ("run --resume runs --out other", "a resumed run stays in its own directory"),
    "out holds files": ("run tiny.yaml --out .", "holds files already; go on with --resume ., or name another --out"),
    "out is a file": ("run tiny.yaml --out tiny.yaml", "tiny.yaml: a part of the path is a file"),
    "out below a file": ("run tiny.yaml --out tiny.yaml/run", "tiny.yaml/run: a part of the path is a file"),
    "out where nobody writes": ("run tiny.yaml --out /proc/run", "/proc/run: no such file or folder; check the path"),
    "unknown option": (
        "run tiny.yaml --rounds 5",
        "No such option '--rounds'. Did you mean '--out'? (see hushrec run --help)",
    ),
    "unknown verb": ("train tiny.yaml", "No such command 'train' (see hushrec --help)"),
    "missing option": ("recommend --user 3", "Missing option '--run' (see hushrec recommend --help)"),
    "unknown download": ("data download ml-10k", "did you mean 'ml-100k'?"),
}


@pytest.mark.parametrize(("command", "message"), COMMANDS.values(), ids=COMMANDS)
def test_command_line(fresh, command, message):
    refused(fresh, 2, message, *command.split())


NO_RUN = ["run --resume .", "run --resume nowhere", "evaluate --run .", "recommend --run tiny.yaml --user 3"]


@pytest.mark.parametrize("command", NO_RUN)
def test_a_folder_that_is_no_run(fresh, command):
    refused(fresh, 1, "no run directory (it has no config.yaml); name one that `hushrec run` made", *command.split())


def test_no_network(fresh):
    cut = """
import urllib.error, urllib.request
def cut(*args, **kwargs):
    raise urllib.error.URLError(OSError(-2, "Name or service not known"))
urllib.request.urlopen = cut
"""
    done = hushrec(fresh, "data", "download", "ml-100k", "--to", "sets", before=cut)
    assert done.code == 2
    assert "error: cannot download ml-100k to sets: " in done.err
    assert "Name or service not known; try again, or put the files there yourself" in done.err
    assert done.out == ""
    assert list(fresh.rglob("*.*")) == [fresh / "tiny.yaml"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no always-full device")
@pytest.mark.parametrize("verb", ["show", "data describe", "schema"])
def test_output_that_cannot_be_written(fresh, verb):
    argv = [*verb.split(), *(["tiny.yaml"] if verb != "schema" else [])]
    refused(fresh, 1, "standard output: No space left", *argv, before="os.dup2(os.open('/dev/full', os.O_WRONLY), 1)")


# --- the data: content of events.csv, options of the section, what is said -----------------------------------------

DATA = {
    "missing": (None, {}, "data.path: no "),
    "empty": ("", {}, "events.csv is empty"),
    "header only": ("user,item,time\n", {}, "events.csv has no rows"),
    "only bad rows": (
        "user,item,time\nu1\nu2,i2,soon\n",
        {},
        "holds no events: 2 malformed row(s), first on line 2, 3",
    ),
    "bad times, strict": (EVENTS + "u1,i1,soon\n", {"strict": True}, "1 malformed row(s), first on line 47"),
    "missing column": (EVENTS.replace("item", "thing", 1), {}, "no column 'item'"),
    "binary": ("user\0item\n", {}, "events.csv is not a text file"),
    "nothing left": (EVENTS, {"min_user_events": 99}, "data.min_user_events=99 leaves no events; lower it"),
    "no times to split at": (
        EVENTS,
        {"columns": {"time": None}, "split": "global-time"},
        "data.split=global-time needs times, and this source has none",
    ),
}


def table(folder: Path, content: str | None = EVENTS, **options: object) -> None:
    """Let x.yaml train on a table."""
    experiment = yaml.safe_load(TINY) | {"data": {"kind": "table", "path": "events.csv", **options}}
    (folder / "x.yaml").write_text(yaml.safe_dump(experiment))
    if content is not None:
        (folder / "events.csv").write_text(content)


@pytest.mark.parametrize(("content", "options", "message"), DATA.values(), ids=DATA)
def test_data(fresh, content, options, message):
    table(fresh, content, **options)
    refused(fresh, 2, message, "run", "x.yaml", "--out", "run")


def test_a_folder_instead_of_a_file(fresh):
    table(fresh, path=str(fresh))
    refused(fresh, 2, "is a folder, name one of its files (events.csv", "run", "x.yaml")


def test_data_that_changed_since(fresh):
    table(fresh)
    assert hushrec(fresh, "run", "x.yaml", "--out", "run").code == 0
    table(fresh, EVENTS + "u1,i1,9\n")
    refused(fresh, 1, "its data has changed since", "recommend", "--run", "run", "--user", "u1")
    (fresh / "run" / "result.json").unlink()
    refused(fresh, 1, "its data has changed since", "run", "--resume", "run")


# --- a run directory: what is done to it, the command, the exit code, what is said ----------------------------------


def damaged(name: str, content: str | None):
    """Give a file of the run, and copies of it, that content; with None, half of its own."""

    def spoil(run: Path) -> None:
        for path in run.glob(name.replace(".", "*.", 1)):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content is None else content.encode())

    return spoil


def not_a_number(run: Path) -> None:
    weights = load_file(run / "model.safetensors")
    weights["item"] = np.full_like(weights["item"], np.nan)
    tensors = {name: torch.from_numpy(values) for name, values in weights.items()}
    save_file(weights, run / "model.safetensors", metadata={"hushrec": sealed(tensors, {})})


def edited(run: Path) -> None:
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("lr: 0.02", "lr: 0.03"))


def removed(name: str):
    return lambda run: (run / name).unlink()


class Case(NamedTuple):
    spoil: Callable[[Path], object] | None
    command: str
    code: int
    message: str


RESUME, EVALUATE, RECOMMEND = "run --resume run", "evaluate --run run", "recommend --run run"
RUNS = {
    "weights that are no numbers": Case(not_a_number, EVALUATE, 1, "holds numbers that are not finite"),
    "to recommend with, too": Case(not_a_number, f"{RECOMMEND} --user 3", 1, "holds numbers that are not finite"),
    "half a model": Case(damaged("model.safetensors", None), EVALUATE, 1, "truncated"),
    "no model": Case(removed("model.safetensors"), EVALUATE, 1, "model.safetensors: no such file"),
    "a run that is not finished": Case(removed("result.json"), EVALUATE, 1, "go on with `hushrec run --resume run`"),
    "half a result": Case(damaged("result.json", None), RESUME, 1, "result.json: not a JSON file, perhaps truncated"),
    "no result": Case(damaged("result.json", "[]"), RESUME, 1, "result.json: not the result of a run; remove it"),
    "no manifest": Case(removed("manifest.json"), EVALUATE, 1, "manifest.json: no such file"),
    "broken configuration": Case(damaged("config.yaml", "seed: ["), RESUME, 2, "config.yaml:1: broken YAML"),
    "edited configuration": Case(edited, EVALUATE, 1, "config.yaml: has changed since the run began"),
    "unknown user": Case(None, f"{RECOMMEND} --user 590", 2, "no user '590'; did you mean '59'?"),
    "unknown item": Case(None, f"{RECOMMEND} --history 3,390", 2, "no item '390'; did you mean '39'?"),
    "empty history": Case(None, f"{RECOMMEND} --history ,", 2, "--history: name at least one item"),
    "nobody": Case(None, RECOMMEND, 2, "name --user ID, --history ITEM,ITEM"),
    "user and history": Case(None, f"{RECOMMEND} --user 3 --history 3", 2, "one of the three"),
    "k of 0": Case(None, f"{RECOMMEND} --user 3 --k 0", 2, "0 is not in the range"),
    "unknown split": Case(None, f"{EVALUATE} --split train", 2, "--split train: must be validation or test"),
    "ranks in no folder": Case(None, f"{EVALUATE} --ranks nowhere/r.csv", 2, "name one in a folder that exists"),
    "ranks to a folder": Case(None, f"{EVALUATE} --ranks run", 2, "run: cannot be a file"),
    "ranks where nobody writes": Case(None, f"{EVALUATE} --ranks /proc/ranks.csv", 1, "/proc/ranks.csv: "),
}
STOPPED = {
    "half a checkpoint": Case(damaged("checkpoint.safetensors", None), RESUME, 1, "truncated"),
    "a checkpoint of garbage": Case(
        damaged("checkpoint.safetensors", "x" * 99), RESUME, 1, "checkpoint.safetensors: not"
    ),
    "garbage as manifest": Case(damaged("manifest.json", "{"), RESUME, 1, "manifest.json: not a JSON file"),
    "another manifest": Case(damaged("manifest.json", "[]"), RESUME, 1, "not the manifest of a run"),
    "edited configuration": Case(edited, RESUME, 1, "config.yaml: has changed since the run began; restore it"),
    "another experiment": Case(None, f"{RESUME} seed=1", 2, "only runtime.* can be overridden here"),
}


@pytest.mark.parametrize("case", RUNS.values(), ids=RUNS)
def test_finished_run(finished, case):
    if case.spoil:
        case.spoil(finished / "run")
    refused(finished, case.code, case.message, *case.command.split())


@pytest.mark.parametrize("case", STOPPED.values(), ids=STOPPED)
def test_stopped_run(finished, case):
    (finished / "run" / "result.json").unlink()
    if case.spoil:
        case.spoil(finished / "run")
    refused(finished, case.code, case.message, *case.command.split())


def test_a_checkpoint_of_another_experiment(finished):
    """Even where the manifest that would tell is gone."""
    edited(finished / "run")
    for name in ("result.json", "manifest.json"):
        (finished / "run" / name).unlink()
    done = hushrec(finished, "run", "--resume", "run")
    assert (done.code, done.out) == (1, "")
    assert "error: run/checkpoint.safetensors: belongs to another experiment" in done.err


def test_two_processes_in_one_run_directory(finished):
    (finished / "run" / "result.json").unlink()
    held = os.open(finished / "run", os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        refused(
            finished,
            1,
            "run: another hushrec process is running here; wait for it or stop it",
            "run",
            "--resume",
            "run",
        )
    finally:
        os.close(held)
