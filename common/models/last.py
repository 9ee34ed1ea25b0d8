"""The last row of attention: what the newest event takes from where, for one person and without the rows before it."""

import math

import torch
from torch import Tensor

from common.models.mixing import bucketed
from common.models.schema import AttentionConfig, Entmax, TimeAware, TopK
from common.models.sparse import entmax15


def weights_of_last(
    kind: AttentionConfig, query: Tensor, keys: Tensor, bias: Tensor | None = None, vector: Tensor | None = None
) -> Tensor:
    """What the newest event takes from where: the last row of a mechanism of `common.models.attention`.

    Parameters
    ----------
    kind : AttentionConfig
        Any but `linear`, whose past is a sum. `local` is given what it sees and nothing else; `time-aware` is given
        keys to which those of the intervals have been added (Li et al., WSDM 2020, equation 7).
    query : Tensor
        ``(H, K)`` float.
    keys : Tensor
        Of the past, the newest event last, ``(H, L, K)``.
    bias : Tensor, optional
        Added to the logits, ``(L,)``.
    vector : Tensor, optional
        Of `additive`, ``(H, K)``.

    Returns
    -------
    Tensor
        ``(H, L)``; each row sums to 1.
    """
    if vector is not None:
        scores = ((query.unsqueeze(1) + keys).tanh_() @ vector.unsqueeze(-1)).squeeze(-1)  # (H, L)
    else:
        scale = 1.0 if kind.kind == "dot-product" else 1 / math.sqrt(query.shape[-1])
        scores = (keys @ (query * scale).unsqueeze(-1)).squeeze(-1)
    scores = scores if bias is None else scores + bias
    if isinstance(kind, TopK) and kind.k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(kind.k).values[:, -1:], -torch.inf)  # ties with the k-th stay
    return entmax15(scores) if isinstance(kind, Entmax) else scores.softmax(-1)


def buckets_of_last(times: Tensor, kind: TimeAware) -> Tensor:
    """Buckets of the intervals from each event to the last, as in `common.models.mixing.interval_buckets`.

    Parameters
    ----------
    times : Tensor
        Seconds, ``(L,)`` int64.
    kind : TimeAware
        How many, on which scale.

    Returns
    -------
    Tensor
        ``(L,)`` int64, the last of them 0.
    """
    gaps = times.diff()
    gaps = gaps[gaps > 0]
    r = (times[-1] - times).clamp(min=0) // (gaps.min() if len(gaps) else 1)
    return bucketed(r, kind.buckets, kind.scale)
