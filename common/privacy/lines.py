"""Append-only files of what has been spent: a line is on the disk before the release, and none is ever taken back."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common.errors import StateError
from common.files import append_line, explained, json_text

CHECK = "check"
"""Key of a line's checksum."""


def write(path: Path, line: Mapping[str, Any]) -> None:
    """Append a line and wait until the disk has it.

    Raises
    ------
    StateError
        Where that fails; nothing may be released then.
    """
    append_line(path, sealed(line), sync=True)


def sealed(line: Mapping[str, Any]) -> str:
    """A line as it is written: with a checksum, so that a flipped bit is not taken for another release."""
    text = json_text(line)
    return json_text({**json.loads(text), CHECK: _digest(text)})


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read(path: Path, valid: Callable[[Any], bool], start: int = 0, before: int = 0) -> tuple[list[dict[str, Any]], int]:
    """All lines, or those from some place on.

    Parameters
    ----------
    path : Path
        The file; one that is missing has no lines.
    valid : callable
        Whether something is a line of this file; it may raise KeyError or TypeError instead.
    start : int
        Bytes to pass over, from an earlier call.
    before : int
        Lines to pass over, for messages.

    Returns
    -------
    lines : list of dict
    end : int
        Bytes read so far.

    Raises
    ------
    StateError
        Where a line cannot be read: what was spent is then unknown.
    """
    if not path.exists() and not start:
        return [], 0
    with explained(path), path.open("rb") as file:
        if file.seek(0, os.SEEK_END) < start:
            raise StateError(f"{path}: has lost lines, so what was spent is unknown; restore the file")
        file.seek(start)
        content = file.read()
    lines = []
    for number, row in enumerate(content.splitlines(), before + 1):
        try:
            line = json.loads(row)
            if line.pop(CHECK) != _digest(json_text(line)) or not valid(line):
                raise ValueError("something else")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as fault:
            raise StateError(
                f"{path}:{number}: not a line of a privacy ledger, so what was spent is unknown; restore the file"
            ) from fault
        lines.append(line)
    if content and not content.endswith(b"\n"):
        raise StateError(f"{path}: the last line is cut off, so what was spent is unknown; restore the file")
    return lines, start + len(content)
