"""Ways to mix in which a position takes nothing from most of its past; shapes as in `common.models.mixing`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.models.mixing import logits, scaled_dot_product

BLOCK = 64
"""Positions of `local` that are mixed together at least; smaller products cost more than what they leave out."""


def local(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """Scaled dot-product attention to oneself and the `window` − 1 events before (Beltagy et al., arXiv 2004.05150).

    Positions are folded into blocks of `BLOCK` or, if it is more, `window`, each of which looks at itself and the block
    before it; a window as long as the history is `scaled_dot_product`. Costs 2 · L · block · K.

    Parameters
    ----------
    query, key, value : Tensor
        ``(C, H, L, K)`` float.
    window : int
        Events that a position sees, at least 1.

    Returns
    -------
    Tensor
        ``(C, H, L, K)``.
    """
    c, heads, length, _ = query.shape
    if window >= length:
        return scaled_dot_product(query, key, value)
    block = max(window, BLOCK)
    if length <= block:
        return scaled_dot_product(query, key, value, torch.where(_near(length, 0, window), 0.0, -torch.inf))
    blocks = -(-length // block)

    def fold(x: Tensor) -> Tensor:  # (C, H, L, K) → (C · H, blocks, block, K)
        return F.pad(x, (0, 0, 0, blocks * block - length)).reshape(c * heads, blocks, block, -1)

    def paired(x: Tensor) -> Tensor:  # (C · H, blocks, 2 · block, K); zeros are before the first block
        x = fold(x)
        return torch.cat([F.pad(x, (0, 0, 0, 0, 1, 0))[:, :-1], x], dim=2)

    seen = _near(block, block, window).repeat(blocks, 1, 1)  # (blocks, block, 2 · block)
    seen[0, :, :block] = False
    mixed = F.scaled_dot_product_attention(fold(query), paired(key), paired(value), attn_mask=seen.unsqueeze(0))
    return mixed.reshape(c, heads, blocks * block, -1)[:, :, :length]


def _near(rows: int, before: int, window: int) -> Tensor:
    """Which of `before` earlier events and its own block's each row sees, ``(rows, before + rows)`` bool."""
    back = torch.arange(rows).unsqueeze(-1) + before - torch.arange(before + rows)
    return (back >= 0) & (back < window)


def top_k(query: Tensor, key: Tensor, value: Tensor, k: int, bias: Tensor | None = None) -> Tensor:
    """Softmax over the k largest of a position's logits (Explicit Sparse Transformer: Zhao et al., arXiv 1912.11637).

    Logits are those of `scaled_dot_product`. All that tie with the k-th stay, so that the order of equals is of no
    consequence; a position with no more than k events sees all of them. Costs L² · K, and L² weights are held.

    Parameters
    ----------
    query, key, value, bias : Tensor
        As in `common.models.mixing.scaled_dot_product`.
    k : int
        At least 1.

    Returns
    -------
    Tensor
        ``(C, H, L, K)``.
    """
    scores = logits(query, key, bias)  # (C, H, L, L)
    least = scores.detach().topk(min(k, scores.shape[-1]), dim=-1).values[..., -1:]  # −inf where the past is shorter
    return scores.masked_fill(scores < least, -torch.inf).softmax(-1) @ value


class _Entmax15(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        # Half of the scores, the largest at 0. The threshold is never below −1, so what is below has no weight, −inf
        # included: at −2 it spoils no sums and is still far from the threshold, and only as many need to be sorted
        # as some row has above −1.
        z = (scores - scores.amax(-1, keepdim=True)).div_(2).clamp_(min=-2)
        ordered = z.topk(max(1, int((z > -1).sum(-1).amax())), dim=-1).values
        size = torch.arange(1, ordered.shape[-1] + 1, dtype=z.dtype, device=z.device)
        mean = ordered.cumsum(-1).div_(size)
        spread = ordered.square().cumsum(-1).addcmul_(mean * size, mean, value=-1)  # squared deviations, summed
        thresholds = mean - (1 - spread).div_(size).clamp_(min=0).sqrt_()  # if the first 1, 2, … were the support
        support = (thresholds <= ordered).sum(-1, keepdim=True).clamp(min=1)  # of a NaN, too
        weights = (z - thresholds.gather(-1, support - 1)).clamp_(min=0).square_()
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (weights,) = ctx.saved_tensors
        root = weights.sqrt()
        of_scores: Tensor = gradient * root
        return of_scores.addcmul_(root, of_scores.sum(-1, keepdim=True) / root.sum(-1, keepdim=True), value=-1)


def entmax15(scores: Tensor, dim: int = -1) -> Tensor:
    """Weights between softmax and sparsemax, exactly 0 for low scores (Peters et al., ACL 2019).

    1.5-entmax: (score / 2 − τ)₊², with the τ for which they sum to 1. It is found exactly, by sorting, and the Jacobian
    is the paper's closed form diag(s) − s sᵀ / Σ s, s being the weights' roots. A row of n costs n log n.

    Parameters
    ----------
    scores : Tensor
        Float, any shape; −inf is allowed and gets 0, but some number of each row is finite.
    dim : int
        Along which they sum to 1.

    Returns
    -------
    Tensor
        Shaped as the scores.
    """
    weights: Tensor = _Entmax15.apply(scores.movedim(dim, -1))  # type: ignore[no-untyped-call]
    return weights.movedim(-1, dim)


def entmax(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention with `entmax15` for the softmax (Peters et al., ACL 2019).

    Arguments and result as in `common.models.mixing.scaled_dot_product`. Costs L² · (K + log L), and L² weights are
    held.
    """
    return entmax15(logits(query, key, bias)) @ value
