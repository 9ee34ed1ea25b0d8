"""How item vectors follow from the table's rows: each is a row of its own, or a fixed weighted sum of several."""

import warnings
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
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
    groups: tuple[int, ...] = ()
    """Rows of each feature."""
    fusion: str = "sum"
    """As in `ModelConfig.fusion`."""
    parts: tuple[tuple[Tensor, Tensor], ...] = ()
    """`forth` and `back` of each feature, for a gate."""

    @property
    def items(self) -> int:
        """Number of items I."""
        return self.forth.shape[0]

    @property
    def kinds(self) -> int:
        """Number M of vectors that are fused: one a feature and, if there is one, the item's own."""
        return len(self.groups) + (self.own is not None)

    @property
    def rows(self) -> int:
        """Number of rows R of the table."""
        gates = self.kinds if self.fusion == "gate" else 0
        return self.forth.shape[1] + (0 if self.own is None else self.items) + gates

    def vectors(self, table: Tensor) -> Tensor:
        """Item vectors of a table, ``(R, D) → (I, D)`` or, of each user's own, ``(C, R, D) → (C, I, D)``."""
        if self.fusion == "gate":
            each, gates = self._each(table)
            weights = self._weights(each, gates)
            return torch.stack([weight * part for weight, part in zip(weights, each, strict=True)]).sum(0)
        begin = 0 if self.own is None else self.items
        features = table[..., begin:, :]
        if self.fusion == "concatenation":
            features = features * self.columns(table.shape[-1])[begin:]
        built: Tensor = _Times.apply(features, self.forth, self.back)  # type: ignore[no-untyped-call]
        if self.own is None:
            return built
        own = self.own * self.columns(table.shape[-1])[0] if self.fusion == "concatenation" else self.own
        return torch.addcmul(built, table[..., : self.items, :], own)

    def gradient(self, of_vectors: Tensor, table: Tensor) -> Tensor:
        """Gradient of each user's table from that of the vectors, ``(C, I, D) → (C, R, D)``, at one ``(R, D)``."""
        if self.fusion == "gate":
            return self._gate_gradient(of_vectors, table)
        found = _times(self.back, of_vectors)
        if self.own is not None:
            found = torch.cat([of_vectors * self.own, found], dim=-2)
        return found * self.columns(table.shape[-1]) if self.fusion == "concatenation" else found

    def gates(self, table: Tensor) -> Tensor:
        """How much each fused vector counts in each item by a gate, ``(R, D) → (M, I, 1)``; the mean over M is 1."""
        return self._weights(*self._each(table))

    def columns(self, dim: int) -> Tensor:
        """Which columns each row may fill where vectors stand side by side, ``(R, D)`` of 0 and 1."""
        sizes = ([] if self.own is None else [self.items]) + list(self.groups)
        kind = torch.arange(self.kinds).repeat_interleave(torch.tensor(sizes))  # (R,)
        place = torch.arange(dim) * self.kinds // dim  # (D,)
        return (kind.unsqueeze(-1) == place).float()

    def _each(self, table: Tensor) -> tuple[list[Tensor], Tensor]:
        """The vectors to be fused, ``(…, I, D)`` each, and the gates ``(…, M, D)``."""
        sizes = ([] if self.own is None else [self.items]) + list(self.groups)
        *rows, gates = table.split([*sizes, self.kinds], dim=-2)
        own = [] if self.own is None else [rows.pop(0) * self.own]
        made = [_Times.apply(part, *pair) for part, pair in zip(rows, self.parts, strict=True)]  # type: ignore[no-untyped-call]
        return own + made, gates

    def _weights(self, each: list[Tensor], gates: Tensor) -> Tensor:
        """Weight of each vector, ``(M, …, I, 1)``; their mean is 1, so that equal ones make a sum."""
        logits = [(part * gates[..., m, None, :]).sum(-1, keepdim=True) for m, part in enumerate(each)]
        return torch.stack(logits).softmax(0) * self.kinds

    def _gate_gradient(self, of_vectors: Tensor, table: Tensor) -> Tensor:
        """By hand, for many users at once: all of them stand at one table."""
        each, gates = self._each(table)
        weights = self._weights(each, gates)  # (M, I, 1)
        matches = torch.stack([(of_vectors * part).sum(-1, keepdim=True) for part in each])  # (M, C, I, 1)
        mean = (weights.unsqueeze(1) * matches).sum(0) / self.kinds  # (C, I, 1)
        of_rows, of_gates = [], []
        for m, part in enumerate(each):
            of_logit = weights[m] * (matches[m] - mean)  # (C, I, 1)
            of_gates.append((of_logit * part).sum(-2, keepdim=True))  # (C, 1, D)
            of_part = weights[m] * of_vectors + of_logit * gates[m]
            if self.own is not None and m == 0:
                of_rows.append(of_part * self.own)
            else:
                of_rows.append(_times(self.parts[m - (self.own is not None)][1], of_part))
        return torch.cat([*of_rows, *of_gates], dim=-2)


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
        `model.items`, `model.own_dropout`, `data.cold`, `data.cold_seed`, seed.
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
    data = experiment.data
    own = (data.cold, data.cold_seed) if experiment.model.items == "both" else None
    made = _mixture(folder, own, experiment.model.fusion)
    if round_ is None or made.own is None or not experiment.model.own_dropout:
        return made
    coins = generator(experiment.seed, "own-rows", round_).random((made.items, 1))
    return replace(made, own=made.own * torch.from_numpy(coins >= experiment.model.own_dropout))


@lru_cache(maxsize=4)
def _mixture(folder: Path, own_but: tuple[float, int] | None, fusion: str) -> Mixture:
    """With own rows, but for those of cold items (their share and seed); or with none."""
    known = itemrows.load(folder)
    if known is None:
        raise itemrows.unknown_features(folder)
    items, own = len(known.offsets) - 1, None
    if own_but is not None:
        own = torch.ones(items, 1)
        own[torch.tensor(cold_items(items, *own_but))] = 0  # of which nothing but features will ever be learnt
    return _made(known, own, fusion)


def later_vectors(experiment: Experiment, known: itemrows.ItemRows, table: Tensor, items: int) -> Tensor:
    """Vectors of n items that came after training, ``(n, D)``: as cold items, made of their features' rows alone.

    Parameters
    ----------
    experiment : Experiment
        `model.items`, other than `own`, and `model.fusion`.
    known : ItemRows
        What the n items are made of.
    table : Tensor
        As trained, ``(R, D)``.
    items : int
        Size I of the catalogue.
    """
    count = len(known.offsets) - 1
    if experiment.model.items == "features":
        return _made(known, None, experiment.model.fusion).vectors(table)
    rows = torch.cat([table.new_zeros(count, table.shape[1]), table[items:]])  # own ones count nothing
    return _made(known, torch.zeros(count, 1), experiment.model.fusion).vectors(rows)


def _made(known: itemrows.ItemRows, own: Tensor | None, fusion: str) -> Mixture:
    items = len(known.offsets) - 1
    owners, ends = np.repeat(np.arange(items), np.diff(known.offsets)), np.cumsum((0, *known.groups))

    def pair(begin: int, end: int) -> tuple[Tensor, Tensor]:
        here = (known.rows >= begin) & (known.rows < end)
        place = torch.from_numpy(np.stack([owners[here], known.rows[here] - begin]))
        weights = torch.from_numpy(known.weights[here])
        matrix = torch.sparse_coo_tensor(place, weights, (items, end - begin), check_invariants=True).coalesce()
        return matrix.to_sparse_csr(), matrix.t().coalesce().to_sparse_csr()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support")  # products, all we need, are settled
        parts = tuple(pair(*bounds) for bounds in pairwise(ends)) if fusion == "gate" else ()
        return Mixture(*pair(0, known.size), own, known.groups, fusion, parts)
