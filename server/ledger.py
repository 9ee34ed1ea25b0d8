"""`ledger.jsonl`: what a private run has released, one line each, on the disk *before* the release leaves the server.

A crash between the two can only over-count. Lines are never taken back; a round that is run again after a crash draws
new noise and pays again.
"""

from pathlib import Path
from typing import Any

from common.privacy import lines

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
        self.lines: list[dict[str, Any]] = lines.read(self._path, _is_release)[0] if self._path else []
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
            lines.write(self._path, line)
        self.lines.append(line)
        return attempt

    def attempts(self, what: str, round_: int) -> int:
        """How often a round has paid for such a release."""
        return len([line for line in self.lines if (line["what"], line["round"]) == (what, round_)])

    def count(self, what: str) -> int:
        """Releases of a kind so far."""
        return len([line for line in self.lines if line["what"] == what])

    @property
    def busiest(self) -> int:
        """Participations of the device that has taken part most often, where devices keep accounts."""
        return max((line.get("participations", 0) for line in self.lines), default=0)


def _is_release(line: Any) -> bool:
    whole = [line["round"], line.get("participations", 0)]
    return line["what"] in {UPDATE, RANKING} and all(type(number) is int for number in whole)
