"""A whole run on this machine: data, clients, server, baselines, result."""

import math
import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from rich.console import Console

from client.device import Device
from client.own import OWN_FILE
from common.config import Experiment
from common.data.prepare import bad_rows, prepare
from common.errors import StateError
from common.files import locked, write_json
from common.memory import keep_freed_memory
from common.metrics import Estimate
from server.checkpoint import found
from server.journal import read
from server.rounds import CHECKPOINT_FILE, Outcome, serve
from simulations import rundir
from simulations.baselines import baseline_ranks
from simulations.engines import play
from simulations.figures import domain_names, figures, marked
from simulations.progress import watching


def run(experiment: Experiment, folder: Path, console: Console, resume: bool = False) -> dict[str, Any]:
    """Run an experiment into its run directory.

    Parameters
    ----------
    experiment : Experiment
        What to run.
    folder : Path
        Its run directory, from `rundir.create` or of an earlier run.
    console : Console
        Where progress goes.
    resume : bool
        Go on from the directory's checkpoint.

    Returns
    -------
    dict
        The result as in `result.json`.

    Raises
    ------
    Interrupted
        Where the user stopped the run; it can be resumed.
    HushrecError
        Where data, checkpoint or disk do not allow it.
    """
    keep_freed_memory()
    if experiment.runtime.threads:
        torch.set_num_threads(experiment.runtime.threads)
    with locked(folder):
        began = time.perf_counter()
        data = prepare(experiment.data)
        device = Device.open(experiment, data, folder)
        if resume and experiment.runtime.engine != "ray" and found(folder / CHECKPOINT_FILE):  # Flower keeps Ray's
            _require_devices(device, folder)
        if left_out := bad_rows(data):
            console.print(left_out, highlight=False)
        if resume and (folder / rundir.MANIFEST).exists():
            rundir.check_manifest(folder, experiment, data)
        else:
            rundir.write_manifest(folder, experiment, data)
        spent = sum(line.get("seconds", 0.0) for line in read(folder))  # by the processes that were stopped
        with watching(console, experiment.federation.rounds) as observe, _stoppable() as stopping:
            serving = partial(
                serve, experiment=experiment, folder=folder, observe=observe, resume=resume, stopping=stopping
            )
            outcome = play(device, serving)
        result = _result(experiment, folder, device, outcome, spent + time.perf_counter() - began)
        write_json(folder / rundir.RESULT, result)
    return rundir.result(folder) or {}


def _require_devices(device: Device, folder: Path) -> None:
    """Refuse to go on where devices would have forgotten what they had, or what they had spent."""
    path = device.accounts.path
    if device.own is not None and not (folder / OWN_FILE).exists():
        raise StateError(f"{folder / OWN_FILE}: is gone, and with it what stays with users; start a new run")
    if path is not None and not path.exists():
        raise StateError(f"{path}: is gone, and with it what users have spent; restore it or start a new run")


def _result(experiment: Experiment, folder: Path, device: Device, outcome: Outcome, seconds: float) -> dict[str, Any]:
    if experiment.told_as_is:
        test = figures(device, marked(device, outcome.weights, outcome.test, "test"))
        tested = np.flatnonzero(np.isfinite(outcome.test.full))
        ranks = baseline_ranks(experiment, device.sequences, device.catalogue.items, tested)
        users_tested = len(tested)
    else:  # one noised release is all that may be known; rankers on the raw events would be another
        test = {name: Estimate(value, math.nan, math.nan)._asdict() for name, value in outcome.figures.items()}
        ranks, users_tested = {}, outcome.tested
    trained = [line for line in read(folder) if line["kind"] == "train"]
    return {
        "run_dir": str(folder),
        "status": "done",
        "rounds": outcome.rounds,
        "best_round": outcome.best_round,
        "users": len(device.sequences),
        "items": device.catalogue.items,
        "users_tested": users_tested,
        "domains": domain_names(device),
        "test": test,
        "baselines": {name: figures(device, {"": baseline}) for name, baseline in ranks.items()},
        "seconds": seconds,
        "clients_per_second": _ratio(sum(r["clients"] for r in trained), sum(r.get("seconds", 0.0) for r in trained)),
        "peak_rss_mb": peak_memory_mb(),
        "bytes_up_per_client": _ratio(sum(r.get("bytes_up_per_client", 0) for r in trained), len(trained)),
        "bytes_down_per_client": outcome.bytes_down,
        "phases": _phases(trained),
        "privacy": outcome.card,
    }


def _phases(trained: list[dict[str, Any]]) -> dict[str, float]:
    """Mean seconds of a round by phase, the slowest first; `rest` is what no phase claims. None where not told."""
    totals: Counter[str] = Counter()
    for line in trained:
        if "phases" in line:
            totals.update(line["phases"])
            totals["rest"] += line["seconds"] - sum(line["phases"].values())
    return {name: seconds / len(trained) for name, seconds in totals.most_common()}


def peak_memory_mb() -> float:
    """Peak memory of this process and of the largest of its children."""
    scale = 2**20 if sys.platform == "darwin" else 2**10
    return sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / scale


def _ratio(total: float, count: float) -> float:
    return total / count if count else 0.0


@contextmanager
def _stoppable() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C, or a polite kill, end the run after the round that is under way; a second one ends it at once.

    Either way nothing is lost: what the last checkpoint holds can be resumed, and the rounds since are run again.
    """
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        os.write(2, b"\nstopping after this round (once more: at once)\n")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
