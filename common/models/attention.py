"""Attention over a user's own past."""

import torch.nn.functional as F
from torch import Tensor


def scaled_dot_product(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal scaled dot-product attention (Vaswani et al., NeurIPS 2017, equation 1), by torch's fused kernel.

    Histories are padded on the right, so the causal mask alone keeps padding out of every real position, and each
    position sees at least itself: no row is ever empty, and nothing turns into NaN.

    Parameters
    ----------
    query, key, value : Tensor
        ``(…, H, L, D/H)`` float32.

    Returns
    -------
    Tensor
        ``(…, H, L, D/H)``.
    """
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def multi_head(qkv: Tensor, heads: int) -> Tensor:
    """Multi-head self-attention on projected inputs.

    Parameters
    ----------
    qkv : Tensor
        Queries, keys and values side by side, ``(C, L, 3D)``.
    heads : int
        H, divides D.

    Returns
    -------
    Tensor
        ``(C, L, D)``, heads side by side, before the output projection.
    """
    c, length, width = qkv.shape
    split = qkv.view(c, length, 3, heads, width // (3 * heads))  # (C, L, 3, H, D/H)
    query, key, value = split.permute(2, 0, 3, 1, 4)  # each (C, H, L, D/H)
    mixed = scaled_dot_product(query, key, value)  # (C, H, L, D/H)
    return mixed.transpose(1, 2).reshape(c, length, width // 3)
