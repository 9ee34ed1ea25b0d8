"""What items are made of, as a book would write it: whole matrices, and no federated code in here either."""

from math import ceil

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common.data.itemrows import ItemRows
from common.models.schema import ModelConfig


class Items(nn.Module):
    """Vectors of all items, fused from rows of their own and from those of their features.

    Parameters
    ----------
    config : ModelConfig
        `items`, `fusion`, `dim`.
    count : int
        Number of items I.
    known : ItemRows, optional
        What features make of each item; needed unless `items` is own.
    cold : (n,) int64, optional
        Items whose own row counts for nothing where there are features.
    """

    def __init__(
        self, config: ModelConfig, count: int, known: ItemRows | None = None, cold: NDArray[np.int64] | None = None
    ):
        super().__init__()
        self.count, self.fusion = count, config.fusion
        self.matrices: list[Tensor] = []
        """Of each feature, ``(I, rows)``."""
        if known is not None:
            whole = torch.zeros(count, known.size)
            for item, (begin, end) in enumerate(zip(known.offsets[:-1], known.offsets[1:], strict=True)):
                for row, weight in zip(known.rows[begin:end], known.weights[begin:end], strict=True):
                    whole[item, row] += float(weight)
            self.matrices = list(whole.split(known.groups, dim=1))
        self.own = None if config.items == "features" else torch.ones(count, 1)
        if self.own is not None and self.matrices and cold is not None:
            self.own[torch.tensor(cold)] = 0
        sizes = [count] * (self.own is not None) + [matrix.shape[1] for matrix in self.matrices]
        self.sizes = [*sizes, len(sizes)] if self.matrices and self.fusion == "gate" else sizes
        self.weight = nn.Parameter(torch.empty(sum(self.sizes), config.dim))

    def forward(self) -> Tensor:
        """``(I, D)``."""
        if not self.matrices:
            return self.weight
        rows = list(self.weight.split(self.sizes))
        gates = rows.pop() if self.fusion == "gate" else None
        own = [] if self.own is None else [self.own * rows.pop(0)]
        each = own + [matrix @ part for matrix, part in zip(self.matrices, rows, strict=True)]
        if gates is not None:
            matches = torch.stack([(part * gate).sum(-1) for part, gate in zip(each, gates, strict=True)])  # (M, I)
            shares = matches.softmax(0) * len(each)
            each = [share.unsqueeze(-1) * part for share, part in zip(shares, each, strict=True)]
        elif self.fusion == "concatenation":
            ends = [ceil(m * self.weight.shape[1] / len(each)) for m in range(len(each) + 1)]
            return torch.cat([part[:, ends[m] : ends[m + 1]] for m, part in enumerate(each)], 1)
        return torch.stack(each).sum(0)
