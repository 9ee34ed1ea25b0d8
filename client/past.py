"""Histories that are asked about, in which events may be missing, and what a model makes of them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from client.facts import facts_at
from client.rows import Ints
from common.data.sequences import Sequences
from common.models.encoder import encode
from common.models.inputs import Moments
from common.models.schema import ModelConfig
from common.models.scoring import history, score_last
from common.models.weights import Weights, named

ROWS, SCORES = 512, 2**26
"""Histories, and scores, that are held at a time: some hundred MB."""


class Past(NamedTuple):
    """Histories of C users; or of one user C times, once for each item to be explained."""

    items: Tensor
    """Catalogue indices, right-padded, ``(C, L)`` int64, L ≤ `model.max_length`."""
    lengths: Tensor
    """Real events, at least 1, ``(C,)`` int64."""
    facts: dict[str, Tensor] | None = None
    """What else is known, by the fields of `common.models.inputs.Moments`, ``(C, L)`` each, where the model asks."""
    domains: Tensor | None = None
    """Domain of each item of the catalogue, ``(I,)``: rivals are of one's own only. None where there is one."""

    @property
    def moments(self) -> Moments | None:
        """The same, as models take it."""
        return None if self.facts is None else Moments(lengths=self.lengths, **self.facts)

    @property
    def real(self) -> Tensor:
        """Where there are events, ``(C, L)`` bool."""
        return torch.arange(self.items.shape[1]) < self.lengths.unsqueeze(1)

    def only(self, keep: Tensor) -> "Past":
        """Shorter histories: what `keep` ``(C, L)`` bool leaves away has never been."""
        keep = keep & self.real
        order, lengths = (~keep).int().argsort(dim=1, stable=True), keep.sum(1)
        order = order[:, : int(lengths.max())] if len(lengths) else order
        return self._each(lambda x: x.gather(1, order))._replace(lengths=lengths)

    def pick(self, rows: Any) -> "Past":
        """Some of the histories, by a mask, a slice or numbers; a number may come several times."""
        return self._each(lambda x: x[rows])._replace(lengths=self.lengths[rows])

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Past":
        facts = None if self.facts is None else {name: change(values) for name, values in self.facts.items()}
        return self._replace(items=change(self.items), facts=facts)


def past_of(model: ModelConfig, sequences: Sequences, users: Ints, stops: Ints) -> Past:
    """Histories of users with any event before their stops, both ``(C,)`` int64; the most recent `max_length`."""
    longest = max(1, min(model.max_length, int((stops - sequences.starts(users)).max(initial=1))))
    places, lengths = sequences.places(users, stops, longest)
    items = torch.from_numpy(np.where(places < 0, 0, sequences.items[places]).astype(np.int64))
    facts = facts_at(model, sequences, places)
    known = None if facts is None else {name: torch.from_numpy(values) for name, values in facts.items()}
    return Past(items, torch.from_numpy(lengths), known, domains_of(sequences))


def domains_of(sequences: Sequences) -> Tensor | None:
    """`Past.domains` of some data."""
    return None if sequences.domains is None else torch.tensor(sequences.domains)


@torch.no_grad()
def log_probability(
    model: ModelConfig, weights: Weights, past: Past, targets: Tensor, vectors: Tensor | None = None
) -> Tensor:
    """`log_softmax` of the targets after each history, ``(C,)``; some histories of like lengths at a time.

    Parameters
    ----------
    model : ModelConfig
        Any kind of model.
    weights : Weights
        Shared, with the table of the items' vectors, ``(I, D)``.
    past : Past
        C histories.
    targets : Tensor
        ``(C,)`` int64.
    vectors : Tensor, optional
        What the histories' items are, if not the table's, ``(N, D)``.
    """
    parameters, found = named(model, weights.body), torch.zeros(len(targets))
    order = past.lengths.argsort()
    size = max(1, min(ROWS, SCORES // len(weights.table)))
    for start in range(0, len(order), size):
        here = order[start : start + size]
        some = past.pick(here)
        some = some.only(some.real)  # no wider than they need
        x = (weights.table if vectors is None else vectors)[some.items]
        found[here] = log_softmax(model, parameters, weights.table, x, some, targets[here])
    return found


def log_softmax(
    model: ModelConfig, parameters: Mapping[str, Tensor], table: Tensor, x: Tensor, past: Past, targets: Tensor
) -> Tensor:
    """Of the targets' scores among all of their domain, after events with vectors `x` ``(C, L, D)``, ``(C,)``.

    Of `past`, its items are not looked at.
    """
    hidden = encode(model, parameters, x, moments=past.moments)
    scored = score_last(history(model, parameters, hidden), past.lengths, table)
    return apart(scored, past.domains, targets).log_softmax(1).gather(1, targets.unsqueeze(1)).squeeze(1)


def apart(scored: Tensor, domains: Tensor | None, targets: Tensor) -> Tensor:
    """Bar all items of other domains than the target's, in place; ``(C, I), (I,), (C,)``."""
    return scored if domains is None else scored.masked_fill_(domains != domains[targets].unsqueeze(1), -torch.inf)
