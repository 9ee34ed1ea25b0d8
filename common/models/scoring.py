"""How items are scored: against the last hidden state, or each against the whole history (``model.head``)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from common.models.attention import split_heads
from common.models.linear import linear
from common.models.mixing import scaled_dot_product, target_scores, target_scores_last
from common.models.schema import ModelConfig


def score_all(config: ModelConfig, parameters: Mapping[str, Any], hidden: Tensor, items: Any) -> Tensor:
    """Scores of the same items after every event.

    Parameters
    ----------
    config : ModelConfig
        The model.
    parameters : Mapping of str to Tensor
        Shared or stacked.
    hidden : Tensor
        ``(C, L, D)`` from `common.models.encoder.encode`.
    items : Tensor or Tap
        Item vectors, shared ``(N, D)`` or stacked ``(C, N, D)``.

    Returns
    -------
    Tensor
        ``(C, L, N)``.
    """
    if config.head == "dot-product":
        return linear(hidden, items)
    split = items.unflatten(-1, (config.heads, -1))  # (…, N, H, K)
    return target_scores(*_history(config, parameters, hidden), split, split)


def score_each(config: ModelConfig, parameters: Mapping[str, Any], hidden: Tensor, items: Tensor) -> Tensor:
    """Score of one item after each event, such as the one that came next; ``(C, L, D), (C, L, D) → (C, L)``."""
    if config.head == "dot-product":
        return (hidden * items).sum(-1)
    keys, values = _history(config, parameters, hidden)
    asked = split_heads(items, config.heads)  # (C, H, L, K)
    return (scaled_dot_product(asked, keys, values) * asked).sum((1, -1))


def score_last(
    config: ModelConfig, parameters: Mapping[str, Any], hidden: Tensor, lengths: Tensor, table: Tensor
) -> Tensor:
    """Scores of all items after the last real event, ``(C, L, D), (C,), (I, D) → (C, I)``; shared weights."""
    if config.head == "dot-product":
        return hidden[torch.arange(len(hidden)), lengths - 1] @ table.T
    split = table.unflatten(-1, (config.heads, -1))
    return target_scores_last(*_history(config, parameters, hidden), split, split, lengths)


def _history(config: ModelConfig, parameters: Mapping[str, Any], hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of events, ``(C, H, L, K)`` each."""
    key, value = (linear(hidden, parameters[f"target.{name}.weight"]) for name in ("key", "value"))
    return split_heads(key, config.heads), split_heads(value, config.heads)
