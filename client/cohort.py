"""Local training of a cohort, chunk by chunk, as the experiment's privacy mode asks for it."""

from collections.abc import Iterator

import numpy as np

from client.batches import chunks, pair_bytes, windows
from client.examples import train_examples
from client.gradcheck import stacked_is_right
from client.noised import Noised, noised_locally
from client.problem import pose
from client.rows import Ints
from client.training import Updates
from common.config import Experiment
from common.data.sequences import Sequences
from common.models.items import mixture_of
from common.models.personal import Kept
from common.models.weights import Weights, body_size
from common.privacy.schema import ExampleLevel, Local, on_device

SEGMENT_BYTES = 64 * 2**20
"""Bound on a chunk of segments, below `CHUNK_BYTES`: whole tables of noise leave the caches sooner."""


def train(
    experiment: Experiment,
    weights: Weights,
    sequences: Sequences,
    users: Ints,
    round_: int,
    clip: float | None = None,
    own: Kept | None = None,
) -> Iterator[Updates | Noised]:
    """Train a cohort from the same global weights.

    Parameters
    ----------
    experiment : Experiment
        Model, loss, local training, seed.
    weights : Weights
        The global weights, shared; left untouched.
    sequences : Sequences
        The histories; only those of `users` are read.
    users : ndarray
        ``(C,)`` int64, distinct.
    round_ : int
        From 1; with the seed and each user, the key of all draws.
    clip : float, optional
        Bound on the L2 norm of each whole update.
    own : Kept, optional
        What these users have of the parameters that stay on the device.

    Yields
    ------
    Updates or Noised
        Of one chunk of users; each user is in one chunk.
    """
    for chunk in plan(experiment, sequences, users, len(weights.table)):
        yield train_chunk(experiment, weights, sequences, chunk, round_, clip, own.of(chunk) if own else None)


def plan(experiment: Experiment, sequences: Sequences, users: Ints, catalogue: int) -> list[Ints]:
    """Users of each chunk that a cohort is trained in."""

    def bytes_per_user(width: int, steps: int) -> int:
        """An estimate: weights with gradients, activations, logits and masks, as stacked training needs them."""
        model, loss = experiment.model, experiment.loss
        scored = items if loss.kind == "softmax" else getattr(loss, "negatives", 1)
        rows = catalogue if loss.kind == "softmax" else scored + 2 * width * steps
        if model.items != "own":
            rows = catalogue + 2 * items
        body, activations = 12 * model.blocks * model.dim**2, width * model.dim * (12 + 2 * model.ffn) * model.blocks
        sent = 2 * catalogue * model.dim if isinstance(device, Local) else 0
        heads = 1 if model.head == "dot-product" else 6 * model.heads  # target attention weighs each for itself
        numbers = 3 * rows * model.dim + 3 * body + 2 * activations + 3 * width * scored * heads + sent
        return 4 * numbers + 2 * pair_bytes(model, width)

    device, mixture = on_device(experiment.privacy), mixture_of(experiment, sequences.folder)
    items = catalogue if mixture is None else mixture.items
    if isinstance(device, ExampleLevel):
        return _by_segments(experiment, device, sequences, users, catalogue)
    return chunks(experiment, sequences, users, bytes_per_user)


def train_chunk(
    experiment: Experiment,
    weights: Weights,
    sequences: Sequences,
    users: Ints,
    round_: int,
    clip: float | None = None,
    own: Kept | None = None,
) -> Updates | Noised:
    """Train one chunk of a plan; arguments as in `train`, `own` in the order of `users`."""
    mixture, device = mixture_of(experiment, sequences.folder, round_), on_device(experiment.privacy)
    catalogue = len(weights.table) if mixture is None else mixture.items
    if isinstance(device, ExampleLevel):
        stacked_is_right(experiment)
        return train_examples(experiment, weights, sequences, users, round_, clip)
    chunk = windows(experiment, sequences, users, round_)
    problems = pose(experiment, sequences, chunk, round_, catalogue, mixture=mixture)
    updates = Updates(experiment, weights, problems, round_, device.clipping_norm if device else clip, own)
    return noised_locally(experiment, updates, len(weights.table), round_) if device else updates


def _by_segments(
    experiment: Experiment, privacy: ExampleLevel, sequences: Sequences, users: Ints, catalogue: int
) -> list[Ints]:
    """Chunks whose tables, and gradients of so many segments as are expected, fit the memory budget."""
    model, loss = experiment.model, experiment.loss
    histories = sequences.stops(users, "train")[0] - sequences.starts(users)
    segments = privacy.sampling_rate * np.ceil(histories / privacy.segment)
    rows = catalogue if loss.kind == "softmax" else getattr(loss, "negatives", 0) + 2 * privacy.segment
    table, body = catalogue * model.dim, body_size(model)
    numbers = 2 * (table + body) + segments * 3 * (rows * model.dim + body)  # (C,)
    chunk = np.cumsum(4 * numbers) // SEGMENT_BYTES
    return np.split(users, np.flatnonzero(np.diff(chunk)) + 1) if len(users) else []
