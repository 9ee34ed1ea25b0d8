"""What devices keep to themselves (`federation.on_device`): each user's own parameters, round by round.

A round may be run again after a resume, or a chunk of it to weigh its updates differently. So a user's numbers before a
round are looked up by that round, never merely the latest; what a round that is run again had left is passed over.
"""

import os
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord, Context
from numpy.typing import NDArray
from torch import Tensor

from common.config import Experiment
from common.errors import StateError
from common.models.personal import Ints, Kept, kept_columns
from common.models.weights import initialise
from common.wire import arrays

OWN_FILE = "on-device.bin"
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
        A file that is appended to and read on opening; without one all stays in memory.

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
        self._count = 0
        if path is not None and path.exists():
            self._read(path)

    def before(self, users: Ints, round_: int) -> Kept:
        """What users had when a round began."""
        entries = self._entries(users, round_)
        values = np.where(entries[:, None] >= 0, self._values(entries), self._fresh)
        return Kept(users, torch.from_numpy(values))

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
        self._enter(new)
        if self._path is not None:
            try:
                with self._path.open("ab") as file:
                    file.write(new.tobytes())
            except OSError as fault:
                raise StateError(f"{self._path}: {fault.strerror}") from fault

    def alone(self, users: range) -> "Own":
        """The same for some users who have not trained yet, in memory."""
        return Own(torch.from_numpy(self._fresh), users.start, len(users))

    def record(self, users: range, rounds: int) -> ArrayRecord:
        """What a Flower context's state shall hold of users: what the last so many rounds left, and one before."""
        log = self._log[: self._count]
        mine = np.flatnonzero((log["user"] >= users.start) & (log["user"] < users.stop))
        horizon = int(log["round"][mine].max(initial=0)) - rounds
        needed = mine[self._needed(mine, horizon)]
        return arrays(**{name: np.ascontiguousarray(log[name][needed]) for name in ("user", "round", "values")})

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

    def _needed(self, entries: Ints, horizon: int) -> NDArray[np.bool_]:
        """Entries after the horizon, and of each user the newest until then."""
        late = self._log["round"][entries] > horizon
        early = np.flatnonzero(~late)[::-1]
        _, first = np.unique(self._log["user"][entries[early]], return_index=True)
        late[early[first]] = True
        return late

    def _read(self, path: Path) -> None:
        try:
            data = path.read_bytes()
        except OSError as fault:
            raise StateError(f"{path}: {fault.strerror}") from fault
        whole = len(data) // self._kind.itemsize * self._kind.itemsize
        if whole < len(data):  # killed while it wrote
            os.truncate(path, whole)
        self._enter_all(np.frombuffer(data[:whole], dtype=self._kind))


def recalled(device_own: Own, context: Context, users: range) -> Own:
    """What a Flower context's state holds of its node's users."""
    own = device_own.alone(users)
    if RECORD in context.state:
        own.recall(context.state.array_records[RECORD])
    return own


def remember(own: Own, context: Context, users: range, experiment: Experiment) -> None:
    """Write it into the context's state, which Flower keeps from round to round; as far back as a resume may reach."""
    runtime = experiment.runtime
    context.state[RECORD] = own.record(users, runtime.checkpoint_every * (runtime.checkpoints + 1))


def own_of(experiment: Experiment, first: int, users: int, rows: int, path: Path | None = None) -> Own | None:
    """What devices of so many users keep; none where nothing stays with them. A table of so many rows."""
    patterns = experiment.federation.on_device
    if not patterns:
        return None
    columns = kept_columns(experiment.model, patterns)
    return Own(initialise(experiment.model, rows, experiment.seed).body[columns], first, users, path)
