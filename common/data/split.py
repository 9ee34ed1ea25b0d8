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


def split(config: DataConfig, offsets: Ints, times: Ints) -> Split:
    """Hold events out, as the section says.

    Parameters
    ----------
    config : DataConfig
        The data section.
    offsets : (U+1,) int64
        Bounds of the users' events.
    times : (E,) int64
        Times of all events, ascending in every user.
    """
    if config.split == "leave-one-out":
        return leave_one_out(offsets)
    return global_time(offsets, times, config.validation_from, config.test_from)


def leave_one_out(offsets: Ints) -> Split:
    """Hold out each user's last event (test) and the one before (validation).

    Users with fewer than 3 events only train.
    """
    ends = offsets[1:]
    enough = np.diff(offsets) >= 3
    return Split(np.where(enough, ends - 2, ends), np.where(enough, ends - 2, -1), np.where(enough, ends - 1, -1))


def global_time(offsets: Ints, times: Ints, validation_from: float, test_from: float) -> Split:
    """Hold out each user's first event from either of two points in time on, the same for all users.

    The points are quantiles of all event times. Training events lie before the first point. A user whose first event
    from the first point on lies beyond the second, too, has it in test only. Who has no earlier event is not evaluated.

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
    return Split(
        first,
        np.where((first > starts) & (first < second), first, -1),
        np.where((second > starts) & (second < ends), second, -1),
    )
