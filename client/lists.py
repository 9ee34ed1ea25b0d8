"""From scores to what is recommended: the same for one person, for many at once, and while events come in."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from client.newcomers import lifted
from client.rows import Ints
from common.config import Experiment


class Best(NamedTuple):
    """Lists of the best items, one after another; ``(B, n·k)`` for n lists."""

    items: Tensor
    """Their numbers, int64; −1 where a list has no more."""
    scores: Tensor
    """As they were ranked by; −inf where a list has no more."""


def best(
    experiment: Experiment,
    scored: Tensor,
    rows: Ints,
    seen: Ints,
    k: int,
    domains: Sequence[Tensor] = (),
    later: int = 0,
) -> Best:
    """Leave out what a person had, give new items their place, and take the best of what is left.

    Parameters
    ----------
    experiment : Experiment
        As `client.newcomers.lifted` takes it.
    scored : Tensor
        Scores of all items, ``(B, I)``; written to.
    rows, seen : ndarray
        Item `seen` is not recommended to the person in row `rows` of `scored`; ``(n,)`` int64 both.
    k : int
        Items in a list.
    domains : sequence of Tensor
        One list for each: the items that stand in it, ``(I,)`` bool. Without any there is one list, of all items.
    later : int
        How many of the items, the last ones, came after training.
    """
    scored[torch.from_numpy(rows), torch.from_numpy(seen)] = -torch.inf
    apart = (scored.where(inside, -torch.inf) for inside in domains)  # one at a time
    found = []
    for own in apart if domains else [scored]:
        values, items = lifted(experiment, own, later).topk(min(k, scored.shape[1]))
        found.append(Best(items.masked_fill(values == -torch.inf, -1), values))
    return Best(*(torch.cat(parts, 1) for parts in zip(*found, strict=True)))
