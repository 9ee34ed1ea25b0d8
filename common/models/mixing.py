"""Ways for a user's events to mix: each position takes a weighted mean of the values of its own past.

Written once for a cohort: queries, keys, values and results are ``(C, H, L, K)`` for C users, H heads, L positions and
K = D/H numbers a head, and nobody sees another's. Histories are padded on the right, so causality alone keeps padding
out of every real position; padding positions hold finite numbers without meaning. The sparse kinds are in
`common.models.sparse`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_BYTES = 2**24
"""What `additive` may hold at a time: pairs of positions times K, 16 MB, which is also the fastest size."""

OCTAVES = 28
"""Doublings that `interval_buckets` spreads its buckets over; 2²⁸ seconds are eight years and a half."""

FLOOR = 1e-6
"""Least denominator of `linear_attention`, whose features all vanish where an input is very negative."""


def causal(bias: Tensor | None, like: Tensor) -> Tensor:
    """What is added to the logits: `bias`, or else 0 for the past and −inf for the future, ``(L, L)``.

    Parameters
    ----------
    bias : Tensor, optional
        As in `scaled_dot_product`.
    like : Tensor
        Queries ``(…, L, K)``, of whose type the result is.
    """
    if bias is not None:
        return bias.to(like.dtype)
    return like.new_full((like.shape[-2], like.shape[-2]), -torch.inf).triu(1)


def logits(query: Tensor, key: Tensor, bias: Tensor | None = None) -> Tensor:
    """Causal logits of scaled dot-product attention for kinds that need to see them, ``(C, H, L, L)``."""
    return query / math.sqrt(query.shape[-1]) @ key.mT + causal(bias, query)


def scaled_dot_product(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax of query · key / √K (Vaswani et al., NeurIPS 2017, equation 1), by torch's fused kernel.

    Costs L² · K; the kernel holds no more than blocks of the L² weights.

    Parameters
    ----------
    query, key, value : Tensor
        ``(C, H, L, K)`` float.
    bias : Tensor, optional
        Added to the logits instead of the plain causal mask: ``(L, L)``, or what broadcasts to ``(C, H, L, L)`` but for
        the last two dimensions. Causal itself, −inf in the future and finite on the diagonal.

    Returns
    -------
    Tensor
        ``(C, H, L, K)``.
    """
    mask = None if bias is None else bias.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)


def dot_product(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax of query · key, unscaled (Luong et al., EMNLP 2015, section 3.1, score `dot`).

    Arguments, result and cost as in `scaled_dot_product`.
    """
    mask = None if bias is None else bias.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=1.0)


def additive(query: Tensor, key: Tensor, value: Tensor, vector: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax of vectorᵀ tanh(query + key) (Bahdanau et al., ICLR 2015, section 3.1 and appendix A.1.2).

    Costs L² · K of tanh, far dearer than products. Rows of queries are taken in blocks of `BLOCK_BYTES`, or of one row
    where that alone is more. This bounds the memory without gradients only: with them autograd keeps all blocks, half
    of ``(C, H, L, L, K)``.

    Parameters
    ----------
    query, key, value, bias : Tensor
        As in `scaled_dot_product`.
    vector : Tensor
        Shared ``(H, K)`` or stacked ``(C, H, K)``.

    Returns
    -------
    Tensor
        ``(C, H, L, K)``.
    """
    c, heads, length, width = query.shape
    bias, column = causal(bias, query), vector.unsqueeze(-1)  # (…, L, L), (…, H, K, 1)
    rows = max(1, BLOCK_BYTES // (c * heads * length * width * query.element_size()))
    mixed = []
    for start in range(0, length, rows):
        stop = min(start + rows, length)  # later keys are the future of the whole block
        pairs = query[:, :, start:stop].unsqueeze(-2) + key[:, :, None, :stop]  # (C, H, R, stop, K)
        scores = (pairs.tanh_().flatten(2, 3) @ column).view(c, heads, stop - start, stop)
        weights = (scores + bias[..., start:stop, :stop]).softmax(-1)
        mixed.append(weights @ value[:, :, :stop])
        del pairs  # before the next block is made
    return torch.cat(mixed, dim=2)


def time_aware(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    buckets: Tensor,
    key_table: Tensor,
    value_table: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention to what happened and how long before (TiSASRec: Li et al., WSDM 2020, section 3.4).

    The interval of a pair has a key and a value of its own, which are added to the event's: weights are the softmax of
    query_i · (key_j + key_table[bucket_ij]) / √K, results their sums of value_j + value_table[bucket_ij]. Neither
    addition is made: queries meet each bucket once, and the weights of a row are first summed by bucket. Hence
    L² + L · B numbers a head, not L² · K, and a cost of (L² + L · B) · K.

    Parameters
    ----------
    query, key, value, bias : Tensor
        As in `scaled_dot_product`.
    buckets : Tensor
        Bucket of each pair's interval, in [0, B), ``(C, L, L)`` int64, as from `interval_buckets`.
    key_table, value_table : Tensor
        One row per bucket for all heads, shared ``(B, K)`` or stacked ``(C, B, K)``.

    Returns
    -------
    Tensor
        ``(C, H, L, K)``.
    """
    heads, count = query.shape[1], key_table.shape[-2]
    places = buckets.unsqueeze(1).expand(-1, heads, -1, -1)  # (C, H, L, L)
    scaled = query / math.sqrt(query.shape[-1])
    by_bucket = scaled @ key_table.unsqueeze(-3).mT  # (C, H, L, B)
    weights = (scaled @ key.mT + by_bucket.gather(-1, places) + causal(bias, query)).softmax(-1)
    sums = weights.new_zeros(*weights.shape[:-1], count).scatter_add(-1, places, weights)  # (C, H, L, B)
    return weights @ value + sums @ value_table.unsqueeze(-3)


def interval_buckets(times: Tensor, lengths: Tensor, buckets: int, scale: str = "log") -> Tensor:
    """Buckets of the intervals between a user's events, in the user's own unit (Li et al., WSDM 2020, section 3.2).

    The unit is the user's smallest positive difference between consecutive events, or a second if there is none;
    r = ⌊|t_i − t_j| / unit⌋. The paper takes that of the whole window, which tells earlier positions of later events;
    here position i has the smallest until then. At the last position both are the same. Costs L².

    Parameters
    ----------
    times : Tensor
        Seconds in order of time, right-padded, ``(C, L)`` int64.
    lengths : Tensor
        Real events of each user, ``(C,)`` int64.
    buckets : int
        B, at least 1.
    scale : {"log", "linear"}
        ``linear`` is the paper's min(r, B − 1). But real intervals span seconds to years: in a unit of seconds nearly
        all would be clipped. ``log`` is min(⌊n · log2(1 + r)⌋, B − 1) with n = max(1, ⌊B / `OCTAVES`⌋) buckets a
        doubling: ties are bucket 0, short intervals are told apart finely, and years still differ. A bucket means
        the same number of units for everybody.

    Returns
    -------
    Tensor
        ``(C, L, L)`` int64 in [0, B), row i looking back; 0 in the future, and where either event is padding.

    Raises
    ------
    ValueError
        If the scale is neither.
    """
    if scale not in {"log", "linear"}:
        raise ValueError(f"scale is 'log' or 'linear', not {scale!r}")
    real = torch.arange(times.shape[1], device=times.device) < lengths.unsqueeze(-1)  # (C, L)
    gaps, never = times.diff(dim=-1, prepend=times[:, :1]), torch.iinfo(times.dtype).max  # (C, L), 0 at the first
    unit = gaps.masked_fill(~real | (gaps <= 0), never).cummin(-1).values  # (C, L)
    unit = unit.masked_fill(unit == never, 1)
    times = times.masked_fill(~real, 0)
    r = (times.unsqueeze(-1) - times.unsqueeze(-2)).clamp(min=0) // unit.unsqueeze(-1)  # (C, L, L)
    return bucketed(r, buckets, scale).masked_fill(~(real.unsqueeze(-1) & real.unsqueeze(-2)), 0)


def bucketed(r: Tensor, buckets: int, scale: str) -> Tensor:
    """Buckets of intervals that are r units long, int64 of any shape; as in `interval_buckets`."""
    if scale == "log":
        r = (max(1, buckets // OCTAVES) * (1 + r.double()).log2()).long()
    return r.clamp(max=buckets - 1)


def linear_attention(query: Tensor, key: Tensor, value: Tensor, chunk: int = 64) -> Tensor:
    """Weights φ(query) · φ(key) over their sum, φ = elu + 1 (Katharopoulos et al., ICML 2020, equations 7 to 12).

    Pairs of positions meet inside a chunk only; all earlier chunks come as one running sum of φ(key) valueᵀ. Costs
    L · K · (chunk + K), linear in L. Denominators are no less than `FLOOR`: where all features vanish, so does the
    result.

    Parameters
    ----------
    query, key, value : Tensor
        As in `scaled_dot_product`.
    chunk : int
        Positions a chunk; it does not change the result.

    Returns
    -------
    Tensor
        ``(C, H, L, K)``.
    """
    length = query.shape[-2]
    chunk = min(chunk, length)

    def fold(x: Tensor) -> Tensor:  # (C, H, L, …) → (C, H, chunks, chunk, …), filled with zeros
        return F.pad(x, (0, 0, 0, -length % chunk)).reshape(*x.shape[:2], -1, chunk, x.shape[-1])

    q, k = fold(F.elu(query) + 1), fold(F.elu(key) + 1)
    v = fold(F.pad(value, (0, 1), value=1.0))  # (C, H, N, chunk, K + 1); the last sums the weights
    states = F.pad((k.mT @ v).cumsum(2), (0, 0, 0, 0, 1, 0))[:, :, :-1]  # (C, H, N, K, K + 1), before each chunk
    sums = ((q @ k.mT).tril() @ v + q @ states).flatten(2, 3)[:, :, :length]
    mixed: Tensor = sums[..., :-1] / sums[..., -1:].clamp(min=FLOOR)
    return mixed
