"""Multi-head attention over a user's own past, by the mechanism that a model names."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.models import mixing, sparse
from common.models.schema import AttentionConfig


class Setting(NamedTuple):
    """What a mechanism has beside queries, keys and values."""

    config: AttentionConfig
    own: Mapping[str, Any]
    """Parameters of its own, by name, shared or stacked."""
    bias: Tensor | None = None
    """Added to the logits instead of the plain causal mask, ``(L, L)``; causal itself."""
    buckets: Tensor | None = None
    """Bucket of each pair's interval, ``(C, L, L)``, for `time-aware`."""


Mechanism = Callable[[Tensor, Tensor, Tensor, Setting], Tensor]
"""From queries, keys and values ``(C, H, L, K)``; causal."""

MECHANISMS: dict[str, Mechanism] = {
    "scaled-dot-product": lambda q, k, v, s: mixing.scaled_dot_product(q, k, v, s.bias),
    "dot-product": lambda q, k, v, s: mixing.dot_product(q, k, v, s.bias),
    "additive": lambda q, k, v, s: mixing.additive(q, k, v, s.own["vector"], s.bias),
    "time-aware": lambda q, k, v, s: mixing.time_aware(
        q, k, v, _given(s.buckets), s.own["interval_key"], s.own["interval_value"], s.bias
    ),
    "local": lambda q, k, v, s: sparse.local(q, k, v, s.config.window),  # type: ignore[union-attr]
    "top-k": lambda q, k, v, s: sparse.top_k(q, k, v, s.config.k, s.bias),  # type: ignore[union-attr]
    "entmax-1.5": lambda q, k, v, s: sparse.entmax(q, k, v, s.bias),
    "linear": lambda q, k, v, s: mixing.linear_attention(q, k, v),
}
"""Mechanism by ``model.attention.kind``."""


@lru_cache(maxsize=64)
def recency_bias(length: int, slope: float) -> Tensor:
    """Causal mask that falls by `slope` per event between (Press et al., ICLR 2022), ``(L, L)``."""
    back = torch.arange(length).unsqueeze(-1) - torch.arange(length)
    return torch.where(back >= 0, -slope * back.float(), -torch.inf)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """``(C, L, D) → (C, H, L, D/H)``, as a view."""
    parts: Tensor = x.unflatten(-1, (heads, -1)).transpose(-3, -2)
    return parts


def multi_head(qkv: Tensor, heads: int, setting: Setting) -> Tensor:
    """Multi-head self-attention on projected inputs.

    Parameters
    ----------
    qkv : Tensor
        Queries, keys and values side by side, ``(C, L, 3D)``.
    heads : int
        H, divides D.
    setting : Setting
        Which mechanism, and what it needs.

    Returns
    -------
    Tensor
        ``(C, L, D)``, heads side by side, before the output projection.
    """
    c, length, width = qkv.shape
    split = qkv.view(c, length, 3, heads, width // (3 * heads))  # (C, L, 3, H, K)
    query, key, value = split.permute(2, 0, 3, 1, 4)  # each (C, H, L, K)
    mixed = MECHANISMS[setting.config.kind](query, key, value, setting)  # (C, H, L, K)
    merged: Tensor = mixed.transpose(1, 2).reshape(c, length, width // 3)
    return merged


def attention_weights(qkv: Tensor, heads: int, setting: Setting) -> Tensor:
    """What each position takes from where, of any mechanism: what it makes of values that name their position.

    Parameters
    ----------
    qkv, heads, setting
        As in `multi_head`.

    Returns
    -------
    Tensor
        ``(C, H, L, L)``; each row sums to 1, the future has 0.
    """
    c, length, width = qkv.shape
    split = qkv.view(c, length, 3, heads, width // (3 * heads))  # (C, L, 3, H, K)
    query, key, _ = split.permute(2, 0, 3, 1, 4)
    names = torch.eye(length).expand(c, heads, length, length)
    if "interval_value" in setting.own:  # intervals have values too, which name nobody
        buckets = setting.own["interval_value"].shape[-2]
        setting = setting._replace(own={**setting.own, "interval_value": torch.zeros(buckets, length)})
    return MECHANISMS[setting.config.kind](query, key, names, setting)


def _given(buckets: Tensor | None) -> Tensor:
    if buckets is None:
        raise ValueError("attention time-aware wants the times of events")
    return buckets
