"""How item vectors follow from the table's rows: each is a row of its own, or a fixed weighted sum of several."""

import warnings
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.config import Experiment
from common.data import itemrows
from common.data.holdout import cold_items
from common.seeding import generator


@dataclass(frozen=True, eq=False)
class Mixture:
    """From the table's R rows to the vectors of I items: own rows, if any, come first, then those of the features."""

    forth: Tensor
    """What features make of each item, sparse ``(I, V)``."""
    back: Tensor
    """The same, transposed."""
    own: Tensor | None
    """1 where an item's own row counts, else 0, ``(I, 1)``; none where there are no such rows."""

    @property
    def items(self) -> int:
        """Number of items I."""
        return self.forth.shape[0]

    @property
    def rows(self) -> int:
        """Number of rows R of the table."""
        return self.forth.shape[1] + (0 if self.own is None else self.items)

    def vectors(self, table: Tensor) -> Tensor:
        """Item vectors of a table, ``(R, D) → (I, D)`` or, of each user's own, ``(C, R, D) → (C, I, D)``."""
        if self.own is None:
            built: Tensor = _Times.apply(table, self.forth, self.back)  # type: ignore[no-untyped-call]
            return built
        built = _Times.apply(table[..., self.items :, :], self.forth, self.back)  # type: ignore[no-untyped-call]
        return torch.addcmul(built, table[..., : self.items, :], self.own)

    def gradient(self, of_vectors: Tensor) -> Tensor:
        """Gradient of the table from that of the vectors, ``(…, I, D) → (…, R, D)``."""
        of_features = _times(self.back, of_vectors)
        return of_features if self.own is None else torch.cat([of_vectors * self.own, of_features], dim=-2)


def _times(matrix: Tensor, x: Tensor) -> Tensor:
    if x.dim() == 2:
        return torch.mm(matrix, x)
    c, n, d = x.shape
    beside = x.transpose(0, 1).reshape(n, c * d)
    return torch.mm(matrix, beside).view(-1, c, d).transpose(0, 1).contiguous()


class _Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, transposed: Tensor) -> Tensor:
        ctx.transposed = transposed
        return _times(matrix, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _times(ctx.transposed, gradient), None, None


def mixture_of(experiment: Experiment, folder: Path, round_: int | None = None) -> Mixture | None:
    """What a model's items are made of, from a prepared folder; none where each has a row of its own alone.

    Parameters
    ----------
    experiment : Experiment
        `model.items`, `model.own_dropout`, `data.cold`, seed.
    folder : Path
        The prepared folder.
    round_ : int, optional
        Of training, in which some items' own rows are left away; the same for all users.

    Raises
    ------
    DataError
        Where the folder knows nothing of its items.
    """
    if experiment.model.items == "own":
        return None
    made = _mixture(folder, experiment.data.cold if experiment.model.items == "both" else None)
    if round_ is None or made.own is None or not experiment.model.own_dropout:
        return made
    coins = generator(experiment.seed, "own-rows", round_).random((made.items, 1))
    return replace(made, own=made.own * torch.from_numpy(coins >= experiment.model.own_dropout))


@lru_cache(maxsize=4)
def _mixture(folder: Path, cold: float | None) -> Mixture:
    """With own rows, but for those of so large a share of cold items; or with none."""
    known = itemrows.load(folder)
    if known is None:
        raise itemrows.unknown_features(folder)
    items = len(known.offsets) - 1
    place = torch.from_numpy(np.stack([np.repeat(np.arange(items), np.diff(known.offsets)), known.rows]))
    matrix = torch.sparse_coo_tensor(place, torch.from_numpy(known.weights), (items, known.size), check_invariants=True)
    matrix = matrix.coalesce()
    own = None
    if cold is not None:
        own = torch.ones(items, 1)
        own[torch.tensor(cold_items(items, cold, 0))] = 0  # of which nothing but features will ever be learnt
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support")  # products, all we need, are settled
        return Mixture(matrix.to_sparse_csr(), matrix.t().coalesce().to_sparse_csr(), own)
