"""`metrics.jsonl`: one line per round and per validation, also across a kill and a resume."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.files import append_line, explained, json_text, write_bytes

METRICS_FILE = "metrics.jsonl"
Observer = Callable[[dict[str, Any]], None]
"""Who wants to know how the run goes; takes one line of `metrics.jsonl` after each round and each validation."""


def journal(folder: Path | None, observe: Observer, done: int) -> Observer:
    """An observer that writes each line to the run's folder and passes it on.

    Parameters
    ----------
    folder : Path, optional
        The run directory; without one nothing is written.
    observe : Observer
        Where lines are passed on to.
    done : int
        Rounds that the run starts from. Lines of later rounds, left by a process that was killed, are dropped, since
        these rounds will be run again.
    """
    if folder is None:
        return observe
    path = folder / METRICS_FILE
    kept = [line for line in read(folder) if line["round"] <= done]
    write_bytes(path, "".join(json_text(line) + "\n" for line in kept).encode())

    def record(line: dict[str, Any]) -> None:
        append_line(path, json_text(line))
        observe(line)

    return record


def read(folder: Path) -> list[dict[str, Any]]:
    """All whole lines of a run's metrics; half a line at the end, which a kill may leave, is passed over."""
    path = folder / METRICS_FILE
    if not path.exists():
        return []
    with explained(path):
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    lines = []
    for text in texts:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("round"), int):
            lines.append(line)
    return lines
