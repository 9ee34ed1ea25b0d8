"""The private side of a prepared data set: every user's events, memory-mapped. Only a client's side may open it.

Only the rows of the users that are asked for are touched, so memory grows with the cohort and not with the population.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from common.data import folder as disk
from common.data.names import unknown

Split = Literal["train", "validation", "test"]
Extra = Literal["behaviours", "ratings", "causes"]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Sequences:
    """All users' events in time order, one user after another (CSR).

    Attributes
    ----------
    folder : Path
        The prepared folder.
    items : (E,) int32
        Items of all events.
    times : (E,) int64
        Times of all events.
    offsets : (U+1,) int64
        Events of user u are ``[offsets[u], offsets[u+1])``.
    train_end : (U,) int64
        Training events of u are ``[offsets[u], train_end[u])``.
    validation, test : (U,) int64
        Place of the held-out event in `items`, or -1. Its history is everything of the user before it.
    first : int
        Number of the first user here: 0, or a later one in a device's own file, which holds few users of many.
    population : int
        Number of all users; 0 means that they are all here.
    target : int
        Behaviour that is predicted; -1 means all.
    behaviour_names : tuple of str
        Names of the behaviours, by their numbers.
    domain_names : tuple of str
        Names of the domains, by their numbers.
    per_second : int
        Units of `times` in a second.
    """

    folder: Path
    items: NDArray[np.int32]
    times: Ints
    offsets: Ints
    train_end: Ints
    validation: Ints
    test: Ints
    first: int = 0
    population: int = 0
    target: int = -1
    behaviour_names: tuple[str, ...] = ()
    domain_names: tuple[str, ...] = ()
    per_second: int = 1

    @classmethod
    def open(cls, folder: Path) -> "Sequences":
        """Memory-map a prepared folder.

        Raises
        ------
        DataError
            If the folder is not a prepared data set, or if its arrays are missing, truncated, of a wrong type, or
            disagree with one another or with the manifest.
        """
        manifest = disk.read_manifest(folder)
        users, events = manifest["kept"]["users"], manifest["kept"]["events"]
        sizes = {"items": events, "times": events, "offsets": users + 1}
        arrays = {name: disk.load_array(folder, name, sizes.get(name, users)) for name in disk.ARRAYS}
        if not events:  # of a user of whom nothing is seen; what is said of padding is looked up there
            arrays |= {name: np.zeros(1, dtype=disk.ARRAYS[name]) for name in ("items", "times")}
        ends = arrays["offsets"]
        if ends[0] != 0 or ends[-1] != events:
            raise disk.damaged(folder, f"offsets.npy runs from {ends[0]} to {ends[-1]}, expected 0 to {events}")
        return cls(
            folder,
            **arrays,
            behaviour_names=tuple(manifest.get("behaviours", ())),
            domain_names=tuple(manifest.get("domains", ())),
            first=manifest.get("first_user", 0),
            population=manifest.get("population", 0),
            target=manifest.get("target", -1),
            per_second=manifest.get("per_second", 1),
        )

    def __len__(self) -> int:
        return len(self.train_end)

    def __contains__(self, user: int) -> bool:
        return self.first <= user < self.first + len(self)

    def ordered(self) -> bool:
        """Whether every place in `items` lies where it must; looks at all users."""
        begin, end = self.offsets[:-1], self.offsets[1:]
        held_out = [(place < 0) | ((place >= begin) & (place < end)) for place in (self.validation, self.test)]
        sound = (begin <= end) & (begin <= self.train_end) & (self.train_end <= end)
        return bool(sound.all() and all(each.all() for each in held_out))

    def starts(self, users: Ints) -> Ints:
        """Places in `items` where the users' events begin, (n,) int64."""
        return self.offsets[users - self.first]

    def ends(self, users: Ints) -> Ints:
        """Places in `items` behind the users' last events, (n,) int64."""
        return self.offsets[users - self.first + 1]

    @cached_property
    def _ids(self) -> list[str]:
        import polars as pl

        try:
            ids: list[str] = pl.read_parquet(self.folder / disk.USERS)["user"].to_list()
        except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
            raise disk.damaged(self.folder, f"{disk.USERS}: {error}") from None
        if len(ids) != len(self):
            raise disk.damaged(self.folder, f"{disk.USERS} has {len(ids)} rows, expected {len(self)}")
        return ids

    def user_ids(self) -> list[str]:
        """Ids of all users, as in the source, in the order of their numbers."""
        return list(self._ids)

    def index_of(self, user_id: str) -> int:
        """Find the number of the user with that id.

        Raises
        ------
        DataError
            If there is none; it names the nearest spelling.
        """
        try:
            return self._ids.index(user_id)
        except ValueError:
            raise unknown("user", user_id, self._ids) from None

    def optional(self, name: Extra) -> NDArray[Any] | None:
        """Memory-map an optional array (E,) of the folder; None where the source has no such thing."""
        if not (self.folder / f"{name}.npy").exists():
            return None
        events = int(self.offsets[-1])
        array = disk.load_array(self.folder, name, events)
        return array if events else np.zeros(1, dtype=array.dtype)

    @cached_property
    def behaviours(self) -> NDArray[np.int8] | None:
        """What sort of event each is, (E,) int8, numbers of `behaviour_names`; None where the source does not say."""
        return self.optional("behaviours")

    @cached_property
    def ratings(self) -> NDArray[np.float32] | None:
        """Rating of each event, (E,) float32; None where the source has none."""
        return self.optional("ratings")

    @cached_property
    def domains(self) -> NDArray[np.int8] | None:
        """Domain of each item, (I,) int8, numbers of `domain_names`; None where there is only one."""
        return disk.load_array(self.folder, disk.DOMAINS) if len(self.domain_names) > 1 else None

    def targets(self, places: Ints) -> NDArray[np.bool_]:
        """Tell which events are of the behaviour that is predicted; any shape, negative places are not."""
        if self.behaviours is None or self.target < 0:
            return places >= 0
        found: NDArray[np.bool_] = (places >= 0) & (self.behaviours[places] == self.target)
        return found

    def had(self, users: Ints, stops: Ints) -> tuple[Ints, Ints]:
        """As `events`, of the behaviour that is predicted only: items that need not be recommended again."""
        items, rows = self.events(users, stops)
        if self.target < 0:
            return items, rows
        starts = self.starts(users)
        counts = stops - starts
        chosen = self.targets(np.arange(len(rows)) + (starts - (np.cumsum(counts) - counts))[rows])
        return items[chosen], rows[chosen]

    def stops(self, users: Ints, split: Split) -> tuple[Ints, Ints]:
        """Find where the users' histories end in a split, and what comes next.

        Parameters
        ----------
        users : (n,) int64
            Users.
        split : {"train", "validation", "test"}
            For ``train`` the history is all training events, and nothing is held out.

        Returns
        -------
        stops : (n,) int64
            The history of user u is the events ``[offsets[u], stop)``; it is empty where nothing is held out.
        targets : (n,) int64
            The held-out items, or -1 where there is none.
        """
        if split == "train":
            return self.train_end[users - self.first], np.full(len(users), -1, dtype=np.int64)
        places = (self.validation if split == "validation" else self.test)[users - self.first]
        held_out = places >= 0
        targets = np.where(held_out, self.items[np.maximum(places, 0)], -1).astype(np.int64)
        return np.where(held_out, places, self.starts(users)), targets

    def events(self, users: Ints, stops: Ints) -> tuple[Ints, Ints]:
        """Gather all events of each user before its stop.

        Parameters
        ----------
        users, stops : (n,) int64
            Users, and places in `items` from `stops`.

        Returns
        -------
        items : (m,) int64
            The users' events one after another, each user's in time order.
        rows : (m,) int64
            For every event the index into `users`.
        """
        starts = self.starts(users)
        counts = stops - starts
        rows = np.repeat(np.arange(len(users), dtype=np.int64), counts)
        # Place in `items` = start of the user + (running number - number of events of the users before).
        shift = starts - (np.cumsum(counts) - counts)
        return self.items[np.arange(len(rows)) + shift[rows]].astype(np.int64), rows

    def windows(self, users: Ints, stops: Ints, length: int) -> tuple[Ints, Ints]:
        """Cut the last events of each user before its stop, in time order.

        Parameters
        ----------
        users, stops : (n,) int64
            Users, and places in `items` from `stops`.
        length : int
            Width of the window.

        Returns
        -------
        items : (n, length) int64
            Padded with 0 on the right.
        lengths : (n,) int64
            Number of events in each window.
        """
        places, lengths = self.places(users, stops, length)
        return np.where(places < 0, 0, self.items[places]).astype(np.int64), lengths

    def places(self, users: Ints, stops: Ints, length: int) -> tuple[Ints, Ints]:
        """As `windows`, with the places of the events in `items`, `times` and all extras, and -1 at padding."""
        lengths = np.minimum(stops - self.starts(users), length)
        steps = np.arange(length, dtype=np.int64)
        return np.where(steps < lengths[:, None], (stops - lengths)[:, None] + steps, -1), lengths
