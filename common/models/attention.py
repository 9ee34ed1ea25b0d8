"""Attention over a user's own past."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


@lru_cache(maxsize=64)
def recency_bias(length: int, slope: float) -> Tensor:
    """Causal mask that falls by `slope` per event between (Press et al., ICLR 2022), ``(L, L)``."""
    back = torch.arange(length).unsqueeze(-1) - torch.arange(length)
    return torch.where(back >= 0, -slope * back.float(), -torch.inf)


def scaled_dot_product(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Causal scaled dot-product attention (Vaswani et al., NeurIPS 2017, equation 1), by torch's fused kernel.

    Histories are padded on the right, so the causal mask alone keeps padding out of every real position, and each
    position sees at least itself: no row is ever empty, and nothing turns into NaN.

    Parameters
    ----------
    query, key, value : Tensor
        ``(…, H, L, D/H)`` float32.
    bias : Tensor, optional
        Added to the logits instead of the plain causal mask, ``(L, L)``; causal itself.

    Returns
    -------
    Tensor
        ``(…, H, L, D/H)``.
    """
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, is_causal=bias is None)


def multi_head(qkv: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """Multi-head self-attention on projected inputs.

    Parameters
    ----------
    qkv : Tensor
        Queries, keys and values side by side, ``(C, L, 3D)``.
    heads : int
        H, divides D.
    bias : Tensor, optional
        As in `scaled_dot_product`.

    Returns
    -------
    Tensor
        ``(C, L, D)``, heads side by side, before the output projection.
    """
    c, length, width = qkv.shape
    split = qkv.view(c, length, 3, heads, width // (3 * heads))  # (C, L, 3, H, D/H)
    query, key, value = split.permute(2, 0, 3, 1, 4)  # each (C, H, L, D/H)
    mixed = scaled_dot_product(query, key, value, bias)  # (C, H, L, D/H)
    return mixed.transpose(1, 2).reshape(c, length, width // 3)
