"""From sequences to the stacked windows that a cohort trains on; all of it vectorised over users."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from client.facts import Facts, facts_at
from common.config import Experiment, LocalConfig
from common.data.sequences import Sequences
from common.models.schema import ModelConfig
from common.seeding import uniform_integers

Ints = NDArray[np.int64]
CHUNK_USERS, CHUNK_EVENTS, CHUNK_BYTES = 128, 2400, 256 * 2**20
"""Bounds on a chunk: enough to fill a core, little enough for its caches and for several workers to share a cohort."""


class Windows(NamedTuple):
    """What C users train on in one round of S local steps."""

    users: Ints
    """Index of each user, ``(C,)``."""
    events: Ints
    """Items in time order, right-padded with 0, ``(C, S, W + 1)``: inputs and, one later, their targets."""
    lengths: Ints
    """Real events in each window, ``(C, S)``; below 2 there is nothing to train in that step."""
    facts: Facts | None = None
    """What else is known of the events, ``(C, S, W + 1)`` each; none where the model looks at items alone."""
    wanted: NDArray[np.bool_] | None = None
    """Whether an event is learnt to be predicted, ``(C, S, W + 1)``; none where all are."""

    @property
    def trained(self) -> Ints:
        """Number of events that are learnt to be predicted in each step, ``(C, S)``."""
        if self.wanted is None:
            return np.maximum(self.lengths - 1, 0)
        count: Ints = self.targets.sum(-1)
        return count

    @property
    def targets(self) -> NDArray[np.bool_]:
        """Whether what comes after each event is learnt to be predicted, ``(C, S, W)``."""
        real: NDArray[np.bool_] = np.arange(1, self.events.shape[2]) < self.lengths[..., None]
        return real if self.wanted is None else real & self.wanted[..., 1:]


def bucket_widths(longest: int) -> Ints:
    """Widths that windows are padded to: powers of two from 8, and `longest`.

    A user's width depends on its own length only, never on its company, so a cohort of one computes the same bits.
    """
    widths = 2 ** np.arange(3, 16)
    return np.append(widths[widths < 0.8 * longest], longest).astype(np.int64)


def pair_bytes(model: ModelConfig, width: int) -> int:
    """Bytes that attention holds of all pairs of positions of one user, for a mechanism that holds any."""
    if not model.attends or model.attention.kind in {"scaled-dot-product", "dot-product", "local", "linear"}:
        return 0
    numbers = model.dim if model.attention.kind == "additive" else 4 * model.heads
    return 4 * width * width * numbers * model.blocks


def pieces(histories: Ints, longest: int) -> Ints:
    """Number of disjoint windows that a history is cut into, so that each event but the first is a target once."""
    count: Ints = np.maximum(1, -(-(histories - 1) // longest))
    return count


def local_steps(local: LocalConfig, histories: Ints, longest: int) -> Ints:
    """Number of local steps of each user: `steps`, or `epochs` times its number of windows; ``(C,)``."""
    if local.epochs is None:
        return np.full_like(histories, local.steps or 1)
    return local.epochs * pieces(histories, longest)


def window_stops(experiment: Experiment, users: Ints, stops: Ints, histories: Ints, steps: Ints, round_: int) -> Ints:
    """Where each step's window ends, ``(C, S)``, S being the largest number of steps in this company."""
    local, longest = experiment.federation.local, experiment.model.max_length
    step = np.arange(steps.max(initial=1))[None, :]  # (1, S)
    back: Ints = np.zeros((len(users), step.shape[1]), dtype=np.int64)  # events left away at the end, (C, S)
    if local.epochs is not None:
        back = step % pieces(histories, longest)[:, None] * longest
    elif local.window == "random":
        slack = np.maximum(0, histories - (longest + 1))[:, None]
        draws = uniform_integers(experiment.seed, "window", round_, users, step.shape[1], 2**31)
        back = draws * (slack + 1) // 2**31
    return stops[:, None] - back


def chunks(
    experiment: Experiment, sequences: Sequences, users: Ints, bytes_per_user: Callable[[int, int], int]
) -> list[Ints]:
    """Split a cohort into chunks of users whose windows are of equal width and whose work fits the memory budget.

    A pure function of the cohort, never of the machine: sums run chunk by chunk, so results don't depend on it either.

    Parameters
    ----------
    experiment : Experiment
        Steps or epochs, the model's longest history.
    sequences : Sequences
        The histories; only lengths are read.
    users : ndarray
        ``(C,)`` int64.
    bytes_per_user : callable
        Working memory of one user, from the width of its windows and its number of steps.
    """
    longest = experiment.model.max_length
    histories = sequences.stops(users, "train")[0] - sequences.starts(users)
    steps = local_steps(experiment.federation.local, histories, longest)
    widths = bucket_widths(longest)
    bucket = np.searchsorted(widths, np.clip(histories - 1, 1, longest))
    parts = []
    for index in np.unique(bucket)[::-1]:  # the longest first, so that workers end together
        here = np.flatnonzero(bucket == index)
        fitting = CHUNK_BYTES // bytes_per_user(int(widths[index]), int(steps[here].max()))
        size = int(np.clip(min(fitting, CHUNK_EVENTS // widths[index]), 1, CHUNK_USERS))
        parts += np.array_split(users[here], -(-len(here) // size))
    return parts


def windows(experiment: Experiment, sequences: Sequences, users: Ints, round_: int) -> Windows:
    """Windows of one chunk.

    Parameters
    ----------
    experiment : Experiment
        Steps or epochs, which window, the model's longest history; with `round_` and each user, the key of draws.
    sequences : Sequences
        The histories; only those of `users` are read.
    users : ndarray
        ``(C,)`` int64, from `chunks`.
    round_ : int
        The round, from 1.
    """
    longest = experiment.model.max_length
    stops, _ = sequences.stops(users, "train")
    histories = stops - sequences.starts(users)
    steps = local_steps(experiment.federation.local, histories, longest)
    width = int(
        bucket_widths(longest)[np.searchsorted(bucket_widths(longest), np.clip(histories.max() - 1, 1, longest))]
    )
    ends = window_stops(experiment, users, stops, histories, steps, round_)
    places, lengths = sequences.places(np.repeat(users, ends.shape[1]), ends.ravel(), width + 1)
    places = places.reshape(*ends.shape, width + 1)
    events = np.where(places < 0, 0, sequences.items[places]).astype(np.int64)
    lengths = lengths.reshape(ends.shape)
    lengths[np.arange(ends.shape[1])[None, :] >= steps[:, None]] = 0
    wanted = None
    if sequences.target >= 0 and experiment.federation.local.predict == "target":
        wanted = sequences.targets(places)
    return Windows(users, events, lengths, facts_at(experiment.model, sequences, places), wanted)
