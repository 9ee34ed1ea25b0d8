"""`ledger.jsonl`: what a private run has released, one line each, on the disk *before* the release leaves the server.

A crash between the two can only over-count. Lines are never taken back; a round that is run again after a crash draws
new noise and pays again.
"""

import json
from pathlib import Path
from typing import Any

from common.errors import StateError
from common.files import append_line, explained, json_text

LEDGER_FILE = "ledger.jsonl"
UPDATE, RANKING = "update", "ranking"
"""Kinds of release: one round's noised sum, one noised histogram of ranks."""


class Ledger:
    """An append-only account.

    Parameters
    ----------
    folder : Path, optional
        The run directory, whose ledger is replayed; without one the account lives in memory.

    Raises
    ------
    StateError
        Where a line cannot be read: what was spent is then unknown.
    """

    def __init__(self, folder: Path | None):
        self._path = folder / LEDGER_FILE if folder else None
        self.lines: list[dict[str, Any]] = _replay(self._path) if self._path and self._path.exists() else []
        """All releases, oldest first."""

    def pay(self, what: str, round_: int, **terms: Any) -> int:
        """Enter a release; only afterwards may it be made.

        Returns
        -------
        int
            How often this round has paid for such a release before: part of the key of its noise.

        Raises
        ------
        StateError
            Where the line cannot be written; nothing may be released then.
        """
        attempt = self.attempts(what, round_)
        line = {"what": what, "round": round_, "attempt": attempt, **terms}
        if self._path:
            append_line(self._path, json_text(line), sync=True)
        self.lines.append(line)
        return attempt

    def attempts(self, what: str, round_: int) -> int:
        """How often a round has paid for such a release."""
        return len([line for line in self.lines if (line["what"], line["round"]) == (what, round_)])

    def count(self, what: str) -> int:
        """Releases of a kind so far."""
        return len([line for line in self.lines if line["what"] == what])


def _replay(path: Path) -> list[dict[str, Any]]:
    with explained(path):
        text = path.read_text(encoding="utf-8", errors="replace")
    lines = []
    for number, row in enumerate(text.splitlines(), 1):
        try:
            line = json.loads(row)
            if line["what"] not in {UPDATE, RANKING} or not isinstance(line["round"], int):
                raise ValueError("no release")
        except (ValueError, KeyError, TypeError) as fault:
            raise StateError(
                f"{path}:{number}: not a line of a privacy ledger, so what was spent is unknown; restore the file"
            ) from fault
        lines.append(line)
    if text and not text.endswith("\n"):
        raise StateError(f"{path}: the last line is cut off, so what was spent is unknown; restore the file")
    return lines
