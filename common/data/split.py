"""Which events are held out: training, validation and test as places in the flat array of events."""

from typing import NamedTuple

import numpy as np

from common.data.sequences import Ints
from common.errors import DataError
from common.sources import DataConfig


class Split(NamedTuple):
    """Places in the flat array of events, per user; see `common.data.sequences.Sequences`.

    Attributes
    ----------
    train_end : (U,) int64
        End of the training events.
    validation, test : (U,) int64
        Place of the held-out event, or -1.
    """

    train_end: Ints
    validation: Ints
    test: Ints


def split(config: DataConfig, offsets: Ints, times: Ints, places: Ints | None = None) -> Split:
    """Hold events out, as the section says.

    Parameters
    ----------
    config : DataConfig
        The data section.
    offsets : (U+1,) int64
        Bounds of the users' events.
    times : (E,) int64
        Times of all events, ascending in every user.
    places : (T,) int64, optional
        Of the events that may be held out, ascending; by default all may.
    """
    if config.split == "leave-one-out":
        return leave_one_out(offsets, places)
    return global_time(offsets, times, config.validation_from, config.test_from, places)


def leave_one_out(offsets: Ints, places: Ints | None = None) -> Split:
    """Hold out each user's last event (test) and the one before (validation), of those that may be.

    Users with fewer than two of them, or with no event before these, only train.
    """
    starts, ends = offsets[:-1], offsets[1:]
    before = offsets if places is None else np.searchsorted(places, offsets)  # events that may be, of earlier users
    validation, test = (_place(before[1:] - back, places) for back in (2, 1))
    enough = (np.diff(before) >= 2) & (validation > starts)
    return Split(np.where(enough, validation, ends), np.where(enough, validation, -1), np.where(enough, test, -1))


def global_time(
    offsets: Ints, times: Ints, validation_from: float, test_from: float, places: Ints | None = None
) -> Split:
    """Hold out each user's first event from either of two points in time on, of those that may be.

    The points are the same for all users, quantiles of all event times. Training events lie before the first point. A
    user whose first event from the first point on lies beyond the second, too, has it in test only. Who has no earlier
    event is not evaluated.

    Raises
    ------
    DataError
        If the two points fall on the same time, so that no validation is left.
    """
    ranks = [int(share * len(times)) for share in (validation_from, test_from)]
    points = np.partition(times, ranks)[ranks]
    if points[0] == points[1]:
        raise DataError(
            f"data.validation_from={validation_from} and data.test_from={test_from} fall on the same time ({points[0]})"
        )
    starts, ends = offsets[:-1], offsets[1:]
    # Number of each user's events before each point; every user has events, so that reduceat sees no empty slice.
    first, second = (starts + np.add.reduceat(times < point, starts, dtype=np.int64) for point in points)
    validation, test = first, second
    if places is not None:
        validation, test = (_place(np.searchsorted(places, each), places) for each in (first, second))
    return Split(
        first,
        np.where((first > starts) & (validation < second), validation, -1),
        np.where((second > starts) & (test >= second) & (test < ends), test, -1),
    )


def _place(numbers: Ints, places: Ints | None) -> Ints:
    """Places of events by their numbers among those that may be held out; past the last one, the end."""
    return numbers if places is None else np.append(places, np.iinfo(np.int64).max)[numbers]
