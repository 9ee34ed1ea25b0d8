"""How items are scored: against the last hidden state and, by `model.head`, each against the whole history, too."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.models.attention import split_heads
from common.models.linear import linear
from common.models.schema import ModelConfig
from common.models.target import target_scores, target_scores_each, target_scores_last


class History(NamedTuple):
    """What items are scored against: hidden states and, for target attention, where items look and what they find."""

    hidden: Tensor
    """``(C, L, D)`` from `common.models.encoder.encode`."""
    keys: Tensor | None
    """``(C, H, L, K)``."""
    values: Tensor | None
    """``(C, H, L, K)``."""


def history(config: ModelConfig, parameters: Mapping[str, Any], hidden: Tensor) -> History:
    """Make it, once in a pass; parameters shared or stacked.

    Keys are √D times as long, which is as good as items that ask so loudly: as events, too, they count √D times. With
    items as they are a softmax over the history would stay nearly flat.
    """
    if config.head == "dot-product":
        return History(hidden, None, None)
    key, value = (linear(hidden, parameters[f"target.{name}.weight"]) for name in ("key", "value"))
    return History(hidden, split_heads(key * config.dim**0.5, config.heads), split_heads(value, config.heads))


def score_all(past: History, items: Any) -> Tensor:
    """Scores of the same items after every event: products with hidden states, plus target attention if there is any.

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
    scores = linear(past.hidden, items)
    if past.keys is None or past.values is None:
        return scores
    split = items.unflatten(-1, (past.keys.shape[1], -1))  # (…, N, H, K)
    return scores + target_scores(past.keys, past.values, split, split)


def score_each(past: History, items: Tensor) -> Tensor:
    """Score of one item after each event, such as the one that came next; items ``(C, L, D) → (C, L)``."""
    scores = (past.hidden * items).sum(-1)
    if past.keys is None or past.values is None:
        return scores
    return scores + target_scores_each(past.keys, past.values, split_heads(items, past.keys.shape[1]))


def score_last(past: History, lengths: Tensor, table: Tensor) -> Tensor:
    """Scores of all items after the last real event, ``(C,), (I, D) → (C, I)``; shared weights."""
    scores = past.hidden[torch.arange(len(lengths)), lengths - 1] @ table.T
    if past.keys is None or past.values is None:
        return scores
    split = table.unflatten(-1, (past.keys.shape[1], -1))
    return scores + target_scores_last(past.keys, past.values, split, split, lengths)
