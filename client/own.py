"""What devices keep to themselves (`federation.on_device`): each user's own parameters, round by round.

A round may be run again, or a chunk of it to weigh its updates differently, and the test is ranked with an earlier one.
So a user's numbers are looked up by round, never merely the latest; a resume forgets what abandoned rounds had left.
"""

import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord, Context
from numpy.typing import NDArray
from torch import Tensor

from client.room import ROOM, room
from common.config import Experiment
from common.errors import StateError
from common.models.personal import Ints, Kept, kept_columns
from common.models.weights import initialise
from common.wire import arrays

OWN_FILE = f"{ROOM}/on-device.bin"
"""In a run directory: all users' own parameters, of a simulation."""
RECORD = "on-device"
"""Record of a Flower context's state."""


class Own:
    """Users' own parameters.

    Parameters
    ----------
    fresh : Tensor
        What everybody begins with, ``(K,)`` float32.
    first, users : int
        Numbers of the users who live here.
    path : Path, optional
        A file that is appended to and read on opening, in a folder of its own; without one all stays in memory.

    Raises
    ------
    StateError
        Where the file holds something else, or cannot be read.
    """

    def __init__(self, fresh: Tensor, first: int, users: int, path: Path | None = None):
        self._fresh, self._first, self._path = fresh.numpy(), first, path
        self._kind = np.dtype([("user", "<i8"), ("round", "<i8"), ("values", "<f4", (len(fresh),))])
        self._last = np.full(users, -1, dtype=np.int64)  # each user's newest entry
        self._log = np.zeros(0, dtype=self._kind)
        self._before = np.zeros(0, dtype=np.int64)  # the entry before each that an earlier round has left, or -1
        self._count, self._reopened = 0, False
        if path is not None and path.exists():
            self._read(path)

    def before(self, users: Ints, round_: int) -> Kept:
        """What users had when a round began."""
        entries = self._entries(users, round_)
        values = np.where(entries[:, None] >= 0, self._values(entries), self._fresh)
        return Kept(users, torch.from_numpy(values))

    def begin(self, round_: int) -> None:
        """Forget, after a resume, what this round and later ones have left: they are run again, maybe by others."""
        if not self._reopened:
            return
        kept = self._log[: int(np.searchsorted(self._log["round"][: self._count], round_))].copy()
        self._last[:], self._count, self._reopened = -1, 0, False
        self._enter_all(kept)
        if self._path is not None:
            os.truncate(self._path, len(kept) * self._kind.itemsize)

    def keep(self, users: Ints, round_: int, values: Tensor) -> None:
        """Enter what a round has left.

        Parameters
        ----------
        users : ndarray
            ``(C,)`` int64, distinct.
        round_ : int
            The round.
        values : Tensor
            ``(C, K)`` float32.

        Raises
        ------
        StateError
            Where the file cannot be written.
        """
        new = np.zeros(len(users), dtype=self._kind)
        new["user"], new["round"], new["values"] = users, round_, values.numpy()
        try:
            self.begin(round_)
            self._enter(new)
            if self._path is not None:
                room(self._path.parent.parent)
                with open(self._path, "ab", opener=partial(os.open, mode=0o600)) as file:
                    file.write(new.tobytes())
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as fault:
            raise StateError(f"{self._path}: {fault.strerror}") from fault

    def alone(self, users: range) -> "Own":
        """The same for some users who have not trained yet, in memory."""
        return Own(torch.from_numpy(self._fresh), users.start, len(users))

    def record(self, users: range) -> ArrayRecord:
        """What a Flower context's state shall hold of users: all of it, since the round that is chosen may be any."""
        log = self._log[: self._count]
        mine = np.flatnonzero((log["user"] >= users.start) & (log["user"] < users.stop))
        return arrays(**{name: np.ascontiguousarray(log[name][mine]) for name in ("user", "round", "values")})

    def take_over(self, other: "Own") -> None:
        """Enter what others have entered last, where it is new."""
        newest = other._last[other._last >= 0]
        for entry in other._log[newest]:
            mine = self._last[entry["user"] - self._first]
            if mine < 0 or self._log[mine] != entry:
                self.keep(np.array([entry["user"]]), int(entry["round"]), torch.tensor(entry["values"][None]))

    def recall(self, record: ArrayRecord) -> None:
        """Take in what `record` gave.

        Raises
        ------
        StateError
            Where it is of another model.
        """
        found = {name: record[name].numpy() for name in ("user", "round", "values")}
        if found["values"].shape[1:] != self._fresh.shape:
            raise StateError("this device's own parameters are of another model; they cannot be used")
        new = np.zeros(len(found["user"]), dtype=self._kind)
        for name, values in found.items():
            new[name] = values
        self._enter_all(new)

    def _values(self, entries: Ints) -> NDArray[np.float32]:
        if not self._count:
            return np.zeros((len(entries), len(self._fresh)), dtype=np.float32)
        values: NDArray[np.float32] = self._log["values"][np.maximum(entries, 0)]
        return values

    def _entries(self, users: Ints, round_: int) -> Ints:
        """The newest entry of each user of an earlier round, or -1."""
        entries: Ints = self._last[users - self._first].copy()
        while (late := (entries >= 0) & (self._rounds(entries) >= round_)).any():
            entries[late] = self._before[entries[late]]
        return entries

    def _rounds(self, entries: Ints) -> Ints:
        if not self._count:
            return np.zeros(len(entries), dtype=np.int64)
        rounds: Ints = self._log["round"][np.maximum(entries, 0)]
        return rounds

    def _enter(self, new: NDArray[np.void]) -> None:
        """Entries of one round."""
        if not len(new):
            return
        if self._count + len(new) > len(self._log):
            room = max(2 * len(self._log), self._count + len(new), 64)
            self._log = np.concatenate([self._log, np.zeros(room - len(self._log), dtype=self._kind)])
            self._before = np.concatenate([self._before, np.full(room - len(self._before), -1)])
        places = np.arange(self._count, self._count + len(new))
        self._before[places] = self._entries(new["user"], int(new["round"][0]))
        self._log[places] = new
        self._last[new["user"] - self._first] = places
        self._count += len(new)

    def _enter_all(self, new: NDArray[np.void]) -> None:
        inside = (new["user"] >= self._first) & (new["user"] < self._first + len(self._last))
        if not inside.all() or not np.isfinite(new["values"]).all():
            raise StateError(f"{self._path or 'a device'}: own parameters of users who do not live here, or damaged")
        # Of one round, and of no user twice: a round that was run again may follow itself.
        cuts = np.flatnonzero(np.diff(new["round"])) + 1
        for part in np.split(new, cuts):
            seen: set[int] = set()
            begin = 0
            for i, user in enumerate(part["user"].tolist()):
                if user in seen:
                    self._enter(part[begin:i])
                    begin, seen = i, set()
                seen.add(user)
            self._enter(part[begin:])

    def _read(self, path: Path) -> None:
        try:
            data = path.read_bytes()
        except OSError as fault:
            raise StateError(f"{path}: {fault.strerror}") from fault
        whole = len(data) // self._kind.itemsize * self._kind.itemsize  # killed while it wrote, the last may be cut
        self._enter_all(np.frombuffer(data[:whole], dtype=self._kind))
        self._reopened = True


def recalled(device_own: Own, context: Context, users: range) -> Own:
    """What a Flower context's state holds of its node's users."""
    own = device_own.alone(users)
    if RECORD in context.state:
        own.recall(context.state.array_records[RECORD])
    return own


def remember(own: Own, context: Context, users: range) -> None:
    """Write it into the context's state, which Flower keeps from round to round."""
    context.state[RECORD] = own.record(users)


def own_of(experiment: Experiment, first: int, users: int, rows: int, path: Path | None = None) -> Own | None:
    """What devices of so many users keep; none where nothing stays with them. A table of so many rows."""
    patterns = experiment.federation.on_device
    if not patterns:
        return None
    columns = kept_columns(experiment.model, patterns)
    return Own(initialise(experiment.model, rows, experiment.seed).body[columns], first, users, path)
