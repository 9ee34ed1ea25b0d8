"""Ranking of the whole catalogue for many users at once; a device calls it with its one user."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from client.batches import bucket_widths, pair_bytes
from client.facts import facts_at, moments
from client.newcomers import lifted, new_items
from client.past import apart, domains_of
from client.rows import Ints
from client.tuning import Personal, personal
from common.config import Experiment
from common.data.sequences import Sequences, Split
from common.metrics import Ranking, Ranks, expected_ranks
from common.models.encoder import encode
from common.models.inputs import Moments
from common.models.items import mixture_of
from common.models.personal import Kept
from common.models.schema import ModelConfig
from common.models.scoring import history, score_last
from common.models.weights import Weights, named
from common.seeding import uniform_integers

_LOTS = 2**40
NOTHING = 256
"""Users ranked at a time of whom nothing is known."""


def final_scores(
    model: ModelConfig, weights: Weights, items: Tensor, lengths: Tensor, known: Moments | None = None
) -> Tensor:
    """Score of every item after the last event of each history.

    Parameters
    ----------
    model : ModelConfig
        The model.
    weights : Weights
        Shared, or a body for each user, ``(B, P)``.
    items : Tensor
        ``(B, L)`` int64, right-padded.
    lengths : Tensor
        ``(B,)`` int64, at least 1.
    known : Moments, optional
        What else is known of the events, where the model looks at it.

    Returns
    -------
    Tensor
        ``(B, I)``.
    """
    parameters = named(model, weights.body)
    hidden = encode(model, parameters, F.embedding(items, weights.table), moments=known)  # (B, L, D)
    return score_last(history(model, parameters, hidden), lengths, weights.table)


def of_items(experiment: Experiment, weights: Weights, sequences: Sequences) -> Weights:
    """Weights whose table holds the items' vectors, ``(I, D)``, made of the rows that are trained."""
    mixture = mixture_of(experiment, sequences.folder)
    return weights if mixture is None else weights._replace(table=mixture.vectors(weights.table))


def scores(
    experiment: Experiment,
    weights: Weights,
    sequences: Sequences,
    users: Ints,
    stops: Ints,
    own: Personal | None = None,
) -> Iterator[tuple[Ints, Tensor]]:
    """Score every item for each user from its events before `stops`, in batches that fit the memory budget.

    Users with no event before their stop are left out. With `own`, each user has numbers of its own in the body.

    Yields
    ------
    tuple
        Positions in `users` ``(B,)`` and scores ``(B, I)`` float32, free to be written to.
    """
    weights = of_items(experiment, weights, sequences)
    longest, catalogue = experiment.model.max_length, len(weights.table)
    histories = stops - sequences.starts(users)
    widths = bucket_widths(longest)
    bucket = np.searchsorted(widths, np.clip(histories, 1, longest))
    per_user = 16 * catalogue + 64 * longest * experiment.model.dim + pair_bytes(experiment.model, longest)
    if experiment.model.head == "target":  # each item's weights over the history, and what they mix
        per_user += 4 * catalogue * (2 * experiment.model.heads * longest + experiment.model.dim)
    per_user += 0 if own is None else 12 * len(weights.body)
    size = max(1, experiment.runtime.memory_mb * 2**20 // per_user)
    for index in np.unique(bucket[histories > 0]):
        members = np.flatnonzero((bucket == index) & (histories > 0))
        for start in range(0, len(members), size):
            here = members[start : start + size]
            places, lengths = sequences.places(users[here], stops[here], int(widths[index]))
            items = torch.from_numpy(np.where(places < 0, 0, sequences.items[places]).astype(np.int64))
            count = torch.from_numpy(lengths)
            known = moments(facts_at(experiment.model, sequences, places), count)
            with torch.no_grad():
                body = weights.body if own is None else own.bodies(experiment, weights.body, users[here])
                yield here, final_scores(experiment.model, weights._replace(body=body), items, count, known)  # (B, I)


def mask_seen(scored: Tensor, sequences: Sequences, users: Ints, stops: Ints) -> Tensor:
    """Set the score of every item that a user had before its stop to −inf, in place; ``(B, I)``."""
    seen, owner = sequences.had(users, stops)
    scored[torch.from_numpy(owner), torch.from_numpy(seen)] = -torch.inf
    return scored


def target_ranks(scored: Tensor, targets: Tensor) -> Ranks:
    """Rank of each row's target, ties at their expectation; ``(B, I), (B,) → (B,)``.

    A target without a finite score ranks last, and a rival whose score is NaN counts as better: a broken model gains
    nothing.
    """
    own = scored.gather(1, targets.unsqueeze(1))  # (B, 1)
    better = scored.shape[1] - (scored <= own).sum(-1)  # NaN is not at most anything
    ranks = expected_ranks(better.numpy(), (scored == own).sum(-1).numpy() - 1)
    return np.where(torch.isfinite(own.squeeze(1)).numpy(), ranks, scored.shape[1])


def held_out_ranks(
    scored: Tensor,
    sequences: Sequences,
    users: Ints,
    stops: Ints,
    targets: Ints,
    placed: Callable[[Tensor], Tensor] | None = None,
) -> Ranks:
    """Rank of each user's held-out item among all of its domain that the user had not before; masks `scored` in place.

    The held-out item itself is never masked, even where the user had it before. `placed` has the last word on scores.
    """
    row, goal = torch.arange(len(users)), torch.from_numpy(targets)
    own = scored[row, goal]
    apart(mask_seen(scored, sequences, users, stops), domains_of(sequences), goal)
    scored[row, goal] = own
    return target_ranks(placed(scored) if placed else scored, goal)


def rank(
    experiment: Experiment,
    weights: Weights,
    sequences: Sequences,
    users: Ints,
    split: Split,
    own: Kept | None = None,
) -> Ranking:
    """Rank each user's held-out item against the catalogue without the user's earlier items.

    Parameters
    ----------
    experiment : Experiment
        Model, seed, `evaluation.sampled`, `evaluation.fine_tune`.
    weights : Weights
        Shared weights.
    sequences : Sequences
        The histories; only those of `users` are read.
    users : ndarray
        ``(C,)`` int64.
    split : str
        ``validation`` or ``test``; the history is everything before the held-out event.
    own : Kept, optional
        What these users have of the parameters that stay on the device.
    """
    stops, targets = sequences.stops(users, split)
    found = Ranking(*(np.full(len(users), np.nan) for _ in Ranking._fields))
    held = np.flatnonzero(targets >= 0)
    placed = partial(lifted, experiment) if split == "test" else None  # in validation nobody's item is new
    for where, scored in scores(experiment, weights, sequences, users[held], stops[held]):
        here = held[where]
        found.full[here] = held_out_ranks(scored, sequences, users[here], stops[here], targets[here], placed)
        if experiment.evaluation.sampled:
            few = _sample(experiment, users[here], split, scored, torch.from_numpy(targets[here]))
            found.sampled[here] = target_ranks(scored.gather(1, few), torch.zeros(len(here), dtype=torch.int64))
    # Of whom nothing is seen before, as `data.only` may have it: all items tie.
    alone = held[stops[held] <= sequences.starts(users[held])]
    items = len(of_items(experiment, weights, sequences).table) if len(alone) else 0
    for start in range(0, len(alone), NOTHING):
        here = alone[start : start + NOTHING]
        equal = torch.zeros(len(here), items)
        found.full[here] = held_out_ranks(equal, sequences, users[here], stops[here], targets[here])
    person = personal(experiment, weights, sequences, users[held], own)
    if person is not None:
        found.personal[alone] = found.full[alone]
        for where, scored in scores(experiment, weights, sequences, users[held], stops[held], person):
            here = held[where]
            found.personal[here] = held_out_ranks(scored, sequences, users[here], stops[here], targets[here], placed)
    return found


def shelf_ranks(experiment: Experiment, weights: Weights, sequences: Sequences, users: Ints) -> Ranks:
    """Rank each user's test item among its domain's items that training never saw, ``(C,)``; NaN where it is none."""
    stops, targets = sequences.stops(users, "test")
    new, ranks = new_items(experiment, len(of_items(experiment, weights, sequences).table)), np.full(len(users), np.nan)
    held = np.flatnonzero(np.isin(targets, new.numpy()))
    for where, scored in scores(experiment, weights, sequences, users[held], stops[held]):
        goal = torch.from_numpy(targets[held[where]])
        shelf = apart(scored, domains_of(sequences), goal)[:, new]
        ranks[held[where]] = target_ranks(shelf, torch.searchsorted(new, goal))
    return ranks


def _sample(experiment: Experiment, users: Ints, split: Split, scored: Tensor, goal: Tensor) -> Tensor:
    """Each user's target, then distinct random items that it never had; catalogue indices ``(B, 1 + n)``.

    Every item draws a number keyed by the user; the n smallest are a uniform sample without replacement. Validation
    takes even numbers and test odd ones, so they never share a negative (unless the catalogue is too small for that).
    The target comes first of all, items that the user had last.
    """
    wanted = min(experiment.evaluation.sampled or 0, scored.shape[1] - 1)
    drawn = torch.from_numpy(uniform_integers(experiment.seed, "sampled", 0, users, scored.shape[1], _LOTS))
    lots = drawn + (drawn % 2 == (split == "validation")) * _LOTS
    lots.masked_fill_(torch.isneginf(scored), 2 * _LOTS).scatter_(1, goal.unsqueeze(1), -1)
    return lots.topk(wanted + 1, largest=False).indices
