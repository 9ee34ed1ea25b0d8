"""Sequences drawn from `common.data.law.Law`, in chunks of users, so that a million of them need little memory.

Every chunk has its own generator, keyed by the data's seed and the chunk's number.
"""

from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from common.data import folder as disk
from common.data import rules
from common.data.law import Floats, Ints, Law, generator
from common.data.table import Table
from common.sources import SyntheticData

__all__ = ["CHUNK", "Chunk", "Law", "generate", "table", "write"]

CHUNK = 8192
"""Users per chunk; a constant, since the sequences hang on it."""
_REDRAWS = 100
_YEAR = 365 * 24 * 3600  # seconds


class Chunk(NamedTuple):
    """Sequences of some consecutive users, one after another.

    Attributes
    ----------
    lengths : (n,) int64
        Events of each user.
    items : (m,) int32
        Items of all events.
    times : (m,) int64
        Times of all events in seconds; every user's events are spread evenly over one year.
    causes : (m,) int32
        For every event the place of its cause in the user's sequence; -1 for noise and for the first event.
    """

    lengths: Ints
    items: NDArray[np.int32]
    times: Ints
    causes: NDArray[np.int32]


def generate(config: SyntheticData, law: Law | None = None) -> Iterator[Chunk]:
    """Draw all users' sequences, chunk by chunk."""
    sampler = _Sampler.of(law or Law.of(config))
    for number, first in enumerate(range(0, config.users, CHUNK)):
        yield sampler.chunk(min(CHUNK, config.users - first), generator(config.seed, 1, number))


def table(config: SyntheticData, found: list[Path]) -> Table:
    """Draw all users' sequences into one table, for filters that need to see them at once; `found` is not used."""
    frames, users = [], 0
    for chunk in generate(config):
        names = np.repeat(np.arange(users, users + len(chunk.lengths)), chunk.lengths)
        frames.append(pl.DataFrame({"user": names, "item": chunk.items, "time": chunk.times}))
        users += len(chunk.lengths)
    return Table(pl.concat(frames).with_columns(pl.col("user", "item").cast(pl.String)), timed=True)


def write(config: SyntheticData, draft: Path) -> dict[str, Any]:
    """Draw all users' sequences straight to disk; an item's number is its number in the law.

    Returns
    -------
    dict
        Facts for the manifest: what was read, what was kept.
    """
    lengths = []
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(closing(disk.Appender(draft, name))) for name in ("items", "times", "causes")
        }
        for chunk in generate(config):
            lengths.append(chunk.lengths)
            for name, file in files.items():
                file.append(getattr(chunk, name))
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    np.save(draft / "offsets.npy", offsets)
    for name, column, size in ((disk.USERS, "user", config.users), (disk.CATALOGUE, "item", config.items)):
        pl.select(pl.int_range(size).cast(pl.String).alias(column)).write_parquet(draft / name)
    counts = {"users": config.users, "items": config.items, "events": int(offsets[-1])}
    return {
        "read": rules.figures(**counts, tied=0.0),
        "kept": counts,
        "bad_rows": {"count": 0, "first_lines": []},
        "extras": ["causes"],
    }


@dataclass(frozen=True, eq=False)
class _Sampler:
    """The law, rearranged for drawing by inversion."""

    law: Law
    overall: Floats  # (I,) cumulated popularity
    order: Ints  # (I,) items, sorted by interest
    start: Ints  # (G + 1,) of each interest in `order`
    within: Floats  # (I,) popularity inside the interest, cumulated over `order`: interest g spans (g, g + 1]
    successor: Floats  # (I, S) cumulated weights
    recency: Floats  # (reach,) cumulated weights of 1, 2, … steps back

    @classmethod
    def of(cls, law: Law) -> "_Sampler":
        order = np.argsort(law.interest, kind="stable")
        size = np.bincount(law.interest)
        return cls(
            law,
            np.cumsum(law.popularity),
            order,
            np.concatenate([[0], np.cumsum(size)]),
            np.cumsum(law.inside[order]),
            np.cumsum(law.weights, axis=1),
            np.cumsum(law.config.recency ** np.arange(law.reach, dtype=np.float64)),
        )

    def chunk(self, users: int, rng: np.random.Generator) -> Chunk:
        """Draw the sequences of some users, all at once, event by event."""
        config = self.law.config
        wanted = _lengths(config, users, rng)
        items = np.full((users, int(wanted.max())), -1, dtype=np.int32)
        causes = np.full_like(items, -1)
        phase = rng.random(users)
        lengths = wanted.copy()
        for step in range(items.shape[1]):
            pending = np.flatnonzero(lengths > step)
            for _ in range(_REDRAWS):
                if not len(pending):
                    break
                drawn, cause = self._draw(items[pending, :step], rng)
                fresh = (items[pending, :step] != drawn[:, None]).all(axis=1)
                items[pending[fresh], step] = drawn[fresh]
                causes[pending[fresh], step] = cause[fresh]
                pending = pending[~fresh]
            lengths[pending] = step  # nothing new to be had: the sequence ends here
        steps = np.arange(items.shape[1])
        inside = steps < lengths[:, None]
        times = ((steps + phase[:, None]) * (_YEAR / lengths[:, None])).astype(np.int64)
        return Chunk(lengths, items[inside], times[inside], causes[inside])

    def _draw(self, history: NDArray[np.int32], rng: np.random.Generator) -> tuple[Ints, Ints]:
        """One draw per row of `history` (n, t), seen or not: items (n,) and places of their causes (n,)."""
        rows, length = history.shape
        config, law = self.law.config, self.law
        noisy, kind, where = rng.random((3, rows))
        drawn = np.minimum(np.searchsorted(self.overall, where, side="right"), len(self.overall) - 1)
        if length == 0:
            return drawn, np.full(rows, -1)
        caused = np.flatnonzero(noisy >= config.noise)
        where, kind = where[caused], kind[caused]

        weights = self.recency[: min(length, law.reach)]
        back = np.searchsorted(weights, rng.random(len(caused)) * weights[-1], side="right")
        place = length - 1 - np.minimum(back, len(weights) - 1)
        cause = history[caused, place]
        group = law.interest[cause]
        popular = np.searchsorted(self.within, group + where, side="right")
        popular = self.order[np.clip(popular, self.start[group], self.start[group + 1] - 1)]
        chosen = (self.successor[cause] <= where[:, None]).sum(axis=1)
        following = law.successors[cause, np.minimum(chosen, law.successors.shape[1] - 1)]
        drawn[caused] = np.where(kind < config.follow, following, popular)
        causes = np.full(rows, -1)
        causes[caused] = place
        return drawn, causes


def _lengths(config: SyntheticData, users: int, rng: np.random.Generator) -> Ints:
    """Numbers of events: 3 + geometric, cut at the largest length, with the mean asked for in spite of the cut."""
    largest = min(config.max_length, config.items)
    mean, span = min(config.mean_length, largest) - 3, largest - 3
    # E[min(geometric, span)] = sum of ratio ** k for k = 1 … span, which grows with the ratio.
    low, high = 0.0, 1.0
    powers = np.arange(1, span + 1)
    for _ in range(60):
        ratio = (low + high) / 2
        low, high = (ratio, high) if (ratio**powers).sum() < mean else (low, ratio)
    if high == 1.0 or low == 0.0:  # no freedom: all sequences are as long as can be, or as short
        return np.full(users, largest if mean > 0 else 3, dtype=np.int64)
    with np.errstate(divide="ignore"):
        steps = np.floor(np.log(1 - rng.random(users)) / np.log(ratio))
    lengths: Ints = 3 + np.minimum(steps, span).astype(np.int64)
    return lengths
