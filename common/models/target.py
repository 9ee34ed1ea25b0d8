"""Target attention: each candidate item looks at the history for itself."""

import math

import torch
from torch import Tensor

from common.models.mixing import causal

LIMIT = 30.0
"""Bound of a logit; e^±30 and the quotient of the two, e^60 ≈ 10²⁶, are float32 numbers."""


def target_scores(
    history_keys: Tensor, history_values: Tensor, candidate_queries: Tensor, candidate_values: Tensor
) -> Tensor:
    """Scores of candidates that each look at the history for themselves, after every event of it.

    Target attention after DIN (Zhou et al., KDD 2018, equation 3), with a scaled dot product and a softmax in place of
    the paper's activation unit: the score of n at t is the mean of value_j · candidate_value_n over the past j ≤ t,
    weighted by e^S with S = candidate_query_n · key_j / √K, summed over heads. Sums over the past are running sums, so
    all positions cost what the last one does, L · N · K; several ``(C, H, L, N)`` are held.

    Parameters
    ----------
    history_keys, history_values : Tensor
        ``(C, H, L, K)`` float.
    candidate_queries, candidate_values : Tensor
        Shared ``(N, H, K)`` or stacked ``(C, N, H, K)``.

    Returns
    -------
    Tensor
        ``(C, L, N)``.
    """
    weights = _target_logits(history_keys, candidate_queries).exp()  # (C, H, L, N)
    matches = history_values @ candidate_values.movedim(-3, -1)  # (C, H, L, N)
    return ((weights * matches).cumsum(2) / weights.cumsum(2)).sum(1)


def target_scores_each(history_keys: Tensor, history_values: Tensor, candidates: Tensor) -> Tensor:
    """`target_scores` of one candidate after each event, such as the one that came next.

    Parameters
    ----------
    history_keys, history_values : Tensor
        ``(C, H, L, K)`` float.
    candidates : Tensor
        ``(C, H, L, K)``, one a position, as query and as value.

    Returns
    -------
    Tensor
        ``(C, L)``.
    """
    scores = (candidates / math.sqrt(candidates.shape[-1]) @ history_keys.mT).clamp(-LIMIT, LIMIT)
    mixed = (scores + causal(None, candidates)).softmax(-1) @ history_values  # (C, H, L, K)
    return (mixed * candidates).sum((1, -1))


def target_scores_last(
    history_keys: Tensor,
    history_values: Tensor,
    candidate_queries: Tensor,
    candidate_values: Tensor,
    lengths: Tensor,
) -> Tensor:
    """`target_scores` after the last real event only, for ranking, by a masked softmax.

    Parameters
    ----------
    history_keys, history_values, candidate_queries, candidate_values : Tensor
        As in `target_scores`, whose order of cost this has, with fewer passes over ``(C, H, N, L)``.
    lengths : Tensor
        Real events of each user, ``(C,)`` int64; a user with none gets a finite number without meaning.

    Returns
    -------
    Tensor
        ``(C, N)``.
    """
    real = torch.arange(history_keys.shape[2], device=lengths.device) < lengths.clamp(min=1).unsqueeze(-1)  # (C, L)
    scores = _target_logits(history_keys, candidate_queries).mT  # (C, H, N, L)
    mixed = scores.masked_fill(~real[:, None, None], -torch.inf).softmax(-1) @ history_values  # (C, H, N, K)
    return (mixed * candidate_values.transpose(-3, -2)).sum((1, -1))


def _target_logits(keys: Tensor, queries: Tensor) -> Tensor:
    # Without a softmax's own maximum, which a running sum cannot know beforehand, e^S must be kept from overflow (and
    # from underflow, where a position would have no weight at all) by a bound on S.
    return (keys @ (queries.movedim(-3, -1) / math.sqrt(keys.shape[-1]))).clamp(-LIMIT, LIMIT)  # (C, H, L, N)
