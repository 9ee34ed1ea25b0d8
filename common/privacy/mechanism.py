"""The Gaussian mechanism on whole updates: the clip is one function of one user's numbers, the noise falls on all."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.models.alike import Outer
from common.models.weights import Weights
from common.privacy.noise import NoiseSource


def norms(*parts: Tensor | Outer) -> Tensor:
    """L2 norm of each of C updates over all its parts ``(C, …)``; ``(C,)`` float64.

    Squares are summed in double precision beyond one parameter, so that many small numbers do not spoil it.
    """
    squares, rows = [], []
    for part in parts:
        if isinstance(part, Outer):
            squares.append(part.squares())
            continue
        along = -2 if part.dim() > 2 and part.mT.is_contiguous() else -1  # as the numbers lie in memory
        rows.append(torch.linalg.vector_norm(part, dim=along).view(len(part), -1 if len(part) else 0))
    squares += [torch.cat(rows, dim=1).double().square().sum(1)] if rows else []
    total = torch.stack(squares).sum(0)
    return total.sqrt()


def clip_factors(norms: Tensor, bound: float) -> Tensor:
    """What each update is multiplied with so that its norm is at most the bound: min(1, C / norm).

    A millionth is kept back, for what single precision makes of norm and product.

    Parameters
    ----------
    norms : Tensor
        ``(C,)`` float64.
    bound : float
        C, positive.

    Returns
    -------
    Tensor
        ``(C,)`` float64; 0 where a norm is not finite, or so large that single precision cannot hold the factor with
        all its digits: a broken update is worth nothing.
    """
    factors = (bound * (1 - 1e-6) / norms.clamp(min=torch.finfo(torch.float64).tiny)).clamp(max=1.0)
    return torch.where(torch.isfinite(norms) & (factors > 1e-37), factors, 0.0)


def add_noise(total: Weights, std: float, source: NoiseSource, purpose: str, *keys: int) -> Weights:
    """A sum with independent Gaussian noise on **every** coordinate, also of item rows that nobody touched.

    Noise on touched rows only would tell, whatever its scale, which rows these are.

    Parameters
    ----------
    total : Weights
        Shared shapes, ``(I, D)`` and ``(P,)``.
    std : float
        Standard deviation.
    source, purpose, *keys
        Where from; each key is used once.
    """
    sizes = [part.numel() for part in total]
    drawn = torch.from_numpy(source.normal(sum(sizes), purpose, *keys)).mul_(std).split(sizes)
    return Weights(*(noise.view(part.shape).add_(part).float() for part, noise in zip(total, drawn, strict=True)))


def noised_histogram(
    ranks: NDArray[np.float64], exact: int, items: int, std: float, source: NoiseSource, *keys: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How many users found their item at which rank, with noise on each count.

    A user adds one to one count, so adding or removing one moves the histogram by 1 in L2. All of HR, NDCG and MRR
    follow from one such release.

    Parameters
    ----------
    ranks : ndarray
        ``(N,)`` from 1; NaN where a user has none, who then counts nowhere.
    exact : int
        Ranks up to this have a count of their own; beyond it counts double in width.
    items : int
        Size of the catalogue, the last rank.
    std : float
        Standard deviation of the noise.
    source, *keys
        Where from; each key is used once.

    Returns
    -------
    edges : (B,) float64
        Largest rank of each bin.
    counts : (B,) float64
        Noised; may be negative.
    """
    edges = [float(rank) for rank in range(1, min(exact, items) + 1)]
    while edges[-1] < items:
        edges.append(min(2 * edges[-1], float(items)))
    bounds = np.array(edges)
    held = ranks[np.isfinite(ranks)]
    counts = np.bincount(np.searchsorted(bounds, held), minlength=len(bounds)).astype(np.float64)
    return bounds, counts + std * source.normal(len(bounds), "metrics-noise", *keys)
