"""How items are scored: against the last hidden state, or each against the whole history (``model.head``)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.models.attention import split_heads
from common.models.linear import linear
from common.models.mixing import target_scores, target_scores_each, target_scores_last
from common.models.schema import ModelConfig


class History(NamedTuple):
    """What items are scored against: hidden states or, for target attention, what they look for and what they find."""

    hidden: Tensor
    """``(C, L, D)`` from `common.models.encoder.encode`."""
    keys: Tensor | None
    """``(C, H, L, K)``."""
    values: Tensor | None
    """``(C, H, L, K)``."""


def history(config: ModelConfig, parameters: Mapping[str, Any], hidden: Tensor) -> History:
    """Make it, once in a pass; parameters shared or stacked."""
    if config.head == "dot-product":
        return History(hidden, None, None)
    key, value = (linear(hidden, parameters[f"target.{name}.weight"]) for name in ("key", "value"))
    return History(hidden, split_heads(key, config.heads), split_heads(value, config.heads))


def score_all(past: History, items: Any) -> Tensor:
    """Scores of the same items after every event.

    Parameters
    ----------
    past : History
        Of C users.
    items : Tensor or Tap
        Item vectors, shared ``(N, D)`` or stacked ``(C, N, D)``.

    Returns
    -------
    Tensor
        ``(C, L, N)``.
    """
    if past.keys is None or past.values is None:
        return linear(past.hidden, items)
    split = items.unflatten(-1, (past.keys.shape[1], -1))  # (…, N, H, K)
    return target_scores(past.keys, past.values, split, split)


def score_each(past: History, items: Tensor) -> Tensor:
    """Score of one item after each event, such as the one that came next; items ``(C, L, D) → (C, L)``."""
    if past.keys is None or past.values is None:
        return (past.hidden * items).sum(-1)
    return target_scores_each(past.keys, past.values, split_heads(items, past.keys.shape[1]))


def score_last(past: History, lengths: Tensor, table: Tensor) -> Tensor:
    """Scores of all items after the last real event, ``(C,), (I, D) → (C, I)``; shared weights."""
    if past.keys is None or past.values is None:
        return past.hidden[torch.arange(len(lengths)), lengths - 1] @ table.T
    split = table.unflatten(-1, (past.keys.shape[1], -1))
    return target_scores_last(past.keys, past.values, split, split, lengths)
