"""From sequences to the stacked windows that a cohort trains on; all of it vectorised over users."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.config import LocalConfig
from common.data.sequences import Sequences
from common.seeding import uniform_integers

Ints = NDArray[np.int64]


class Windows(NamedTuple):
    """What C users train on in one round of S local steps."""

    users: Ints
    """Index of each user, ``(C,)``."""
    events: Ints
    """Items in time order, right-padded with 0, ``(C, S, W + 1)``: inputs and, one later, their targets."""
    lengths: Ints
    """Real events in each window, ``(C, S)``; below 2 there is nothing to train in that step."""


def bucket_widths(longest: int) -> Ints:
    """Widths that windows are padded to: 8, 12, 16, 24, 32, 48 … and `longest`.

    A user's width depends on its own length only, never on its company, so a cohort of one computes the same bits.
    """
    powers = 2 ** np.arange(3, 16)
    widths = np.sort(np.concatenate([powers, powers // 2 * 3]))
    return np.append(widths[widths < 0.8 * longest], longest).astype(np.int64)


def local_steps(local: LocalConfig, histories: Ints, longest: int) -> Ints:
    """Number of local steps of each user: `steps`, or `epochs` times its number of disjoint windows, ``(C,)``."""
    if local.epochs is None:
        return np.full_like(histories, local.steps or 1)
    passes: Ints = np.maximum(1, -(-(histories - 1) // longest))
    return local.epochs * passes


def window_stops(
    local: LocalConfig, longest: int, stops: Ints, histories: Ints, steps: Ints, seed: int, round_: int, users: Ints
) -> Ints:
    """Where each step's window ends, ``(C, S)``, S being the largest number of steps in this company."""
    step = np.arange(steps.max(initial=1))[None, :]  # (1, S)
    if local.epochs is not None:  # disjoint windows from the end backwards, so each event is a target once a pass
        pieces: Ints = np.maximum(1, -(-(histories - 1) // longest))
        ends: Ints = stops[:, None] - step % pieces[:, None] * longest
        return ends
    if local.window == "last":
        return np.repeat(stops[:, None], step.shape[1], axis=1)
    slack = np.maximum(0, histories - (longest + 1))[:, None]
    draws = uniform_integers(seed, "window", round_, users, step.shape[1], 2**31)
    return stops[:, None] - draws * (slack + 1) // 2**31


def windows(
    sequences: Sequences, users: Ints, local: LocalConfig, longest: int, seed: int, round_: int
) -> Iterator[tuple[Ints, Windows]]:
    """Windows of a cohort, one bucket of equal width at a time.

    Parameters
    ----------
    sequences : Sequences
        The histories; only those of `users` are read.
    users : ndarray
        ``(C,)`` int64.
    local : LocalConfig
        Steps or epochs, and which window.
    longest : int
        The model's longest history.
    seed, round_ : int
        Key of the random windows, together with each user.

    Yields
    ------
    tuple
        Positions in `users` of this bucket's users, and their `Windows`.
    """
    stops, _ = sequences.stops(users, "train")
    histories = stops - sequences.offsets[users]
    steps = local_steps(local, histories, longest)
    widths = bucket_widths(longest)
    bucket = np.searchsorted(widths, np.clip(histories - 1, 1, longest))
    for index in np.unique(bucket):
        here = np.flatnonzero(bucket == index)
        ends = window_stops(local, longest, stops[here], histories[here], steps[here], seed, round_, users[here])
        width = int(widths[index]) + 1
        flat, lengths = sequences.windows(np.repeat(users[here], ends.shape[1]), ends.ravel(), width)
        lengths = lengths.reshape(ends.shape)
        lengths[np.arange(ends.shape[1])[None, :] >= steps[here][:, None]] = 0
        yield here, Windows(users[here], flat.reshape(*ends.shape, width), lengths)
