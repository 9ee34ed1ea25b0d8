"""The Flower ServerApp: never opens a data set; what it knows of users and items, the clients tell it.

Whoever submitted the run reads what it says: each line of its log that begins with `TOLD` is one JSON object, those of
`metrics.jsonl` first, then the files and the outcome. Flower's log is the one way from a run to its submitter.
"""

import base64
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.errors import BudgetSpent, HushrecError, UsageError
from common.files import json_text, locked
from common.run_config import experiment_of
from server.journal import METRICS_FILE
from server.rounds import CARD_FILE, CHECKPOINT_FILE, MODEL_FILE, Outcome, serve

TOLD = "hushrec: "
OUT = "HUSHREC_OUT"
"""Environment variable of the folder that runs are written into."""
PART = 48 * 1024
"""Bytes of a file in one line."""
TAKEOVER = 30.0
"""Seconds that a run which was stopped is waited for, before another one goes on in its folder."""
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment that the run config names.

    Into the folder $HUSHREC_OUT where that is set, or its subfolder `run` where the run config says one; with `resume`
    it goes on from the checkpoint there; with `fetch` the files are told, too.
    """
    folder, config = None, context.run_config
    try:
        folder = folder_of(context)
        resume = bool(config.get("resume", False))
        if folder and not resume and config.get("run") and (folder / CHECKPOINT_FILE).exists():
            raise UsageError(f"{folder}: holds a run already; resume it, or give this one another name")
        with locked(folder, TAKEOVER) if folder else nullcontext():
            outcome = serve(grid, experiment_of(context), folder, tell, resume=resume)
            _deliver(folder, config)
        tell(ended(outcome))
    except HushrecError as fault:
        if isinstance(fault, BudgetSpent):  # the last paid model is a result
            _deliver(folder, config)
        tell({"kind": "fault", "exit_code": fault.exit_code, "error": str(fault)})
        raise


def _deliver(folder: Path | None, config: Mapping[str, object]) -> None:
    for line in files(folder) if folder and config.get("fetch") else ():
        tell(line)


def folder_of(context: Context) -> Path | None:
    """Where this run is written; none where nobody said.

    Raises
    ------
    UsageError
        Where the run's name could be a path to elsewhere, or there is no folder for runs.
    """
    out, run = os.environ.get(OUT), str(context.run_config.get("run", ""))
    if run and not _NAME.fullmatch(run):
        raise UsageError(f"run {run!r}: must be small letters, digits, dots, hyphens")
    if run and not out:
        raise UsageError(f"the server has no ${OUT}, a folder for its runs; set it where the SuperLink starts")
    if not out:
        return None
    folder = Path(out) / run
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def files(folder: Path) -> Iterator[dict[str, Any]]:
    """What a submitter gets of a run's files: the model, the privacy card and all metrics, in parts that fit a line."""
    for name in (MODEL_FILE, CARD_FILE, METRICS_FILE):
        content = (folder / name).read_bytes()
        for start in range(0, len(content), PART):
            part = base64.b64encode(content[start : start + PART]).decode()
            yield {"kind": "file", "name": name, "start": start, "size": len(content), "data": part}


def ended(outcome: Outcome) -> dict[str, Any]:
    """The outcome as it may be told."""
    return {
        "kind": "test",
        "rounds": outcome.rounds,
        "best_round": outcome.best_round,
        "users": len(outcome.test[0]),
        "items": len(outcome.weights.table),
        "catalogue": outcome.catalogue,
        "users_tested": outcome.tested,
        "bytes_down": outcome.bytes_down,
        "figures": outcome.figures,
        "privacy": outcome.card,
    }


def tell(line: dict[str, Any]) -> None:
    """One line of the log."""
    print(f"{TOLD}{json_text(line)}", flush=True)
