"""How often each device has taken part: its own privacy account, which no server is asked about.

A line is on the disk *before* an update leaves, so a crash can only over-count. Lines are never taken back.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context

from common.errors import StateError, UsageError
from common.privacy import lines

ACCOUNTS_FILE = "devices.jsonl"
RECORD = "privacy"
"""Record of a Flower context's state that holds a device's count."""
STATE_PATH = "state-path"
"""Key in Flower's node config: a folder of the device where its account is kept."""


class Accounts:
    """Participations of the users that a process plays, of one user on a device.

    Parameters
    ----------
    path : Path, optional
        The file, which other processes of this machine may write into, too; without one the account lives in memory.
    ready : callable, optional
        Called before a line is written, such as to make the file's folder.

    Raises
    ------
    StateError
        Where the file is damaged: what was spent is then unknown. No device takes part then.
    """

    def __init__(self, path: Path | None = None, ready: Callable[[], object] = lambda: None):
        self.path, self._ready = path, ready
        self._taken: Counter[int] = Counter()
        self.terms: Mapping[str, Any] = {}
        """What one participation costs, once there was one."""
        self._bytes, self._lines = 0, 0  # read so far
        self.refresh()

    def taken(self, user: int) -> int:
        """Rounds that a user has taken part in."""
        return self._taken[user]

    def refresh(self) -> None:
        """Read what has been written since the last look."""
        if self.path:
            new, end = lines.read(self.path, _is_participation, self._bytes, self._lines)
            for line in new:
                self._agree(line["terms"])
                self.terms = line["terms"]
            for line in new:
                self._taken.update(line["users"])
            self._bytes, self._lines = end, self._lines + len(new)

    def pay(self, users: Sequence[int], round_: int, terms: Mapping[str, Any]) -> None:
        """Enter one participation of each user; only afterwards may their updates leave.

        Parameters
        ----------
        users : sequence of int
            Who takes part.
        round_ : int
            In which round.
        terms : mapping
            What a participation costs; an account is of one experiment.

        Raises
        ------
        StateError
            Where the account is of other terms, or the line cannot be written; nothing may leave then.
        """
        self._agree(terms)
        if self.path:
            self._ready()
            lines.write(self.path, {"round": round_, "users": users, "terms": terms})
            self.refresh()
        else:
            self.terms = terms
            self._taken.update(users)

    def remember(self, user: int, taken: int, terms: Mapping[str, Any]) -> None:
        """What is known from elsewhere, such as a Flower context's state."""
        self._agree(terms)
        self.terms, self._taken[user] = terms, max(self._taken[user], taken)

    def _agree(self, terms: Mapping[str, Any]) -> None:
        if self.terms and self.terms != terms:
            raise StateError(f"{self.path}: the account holds participations of other terms; it is of one experiment")


def _is_participation(line: Any) -> bool:
    return (
        bool(line["terms"]) and isinstance(line["terms"], dict) and all(isinstance(user, int) for user in line["users"])
    )


def accounts_of(context: Context, user: int) -> Accounts:
    """The account of the one user of a Flower context: in its node's `state-path`, and in any case in its state."""
    folder = str(context.node_config.get(STATE_PATH, ""))
    accounts = kept_by(context) if folder else Accounts()
    if RECORD in context.state:
        terms = dict(context.state.config_records[RECORD])
        accounts.remember(user, int(str(terms.pop("participations"))), terms)
    return accounts


def kept_by(context: Context) -> Accounts:
    """The accounts that a node keeps in its `state-path`.

    Raises
    ------
    UsageError
        Where it has none: what several users have spent would be forgotten from round to round.
    """
    folder = str(context.node_config.get(STATE_PATH, ""))
    if not folder:
        raise UsageError(f"this node has no {STATE_PATH!r} in its node config, where its users' accounts are kept")
    return _open(Path(folder) / ACCOUNTS_FILE)


def store(accounts: Accounts, context: Context, user: int) -> None:
    """Write a user's account into its Flower context's state, which Flower keeps from round to round."""
    if accounts.terms:
        context.state[RECORD] = ConfigRecord({"participations": accounts.taken(user), **accounts.terms})


@lru_cache(maxsize=4)
def _open(path: Path) -> Accounts:
    """One for all users whose devices this process plays."""
    return Accounts(path)
