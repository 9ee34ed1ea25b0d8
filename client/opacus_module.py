"""The model as a torch module that Opacus' hooks see through.

Opacus is silently wrong on many ways of tying the item table to the output: `F.linear` with its weight, a root module
that owns a Parameter, positions without a batch dimension. Here the table is an embedding, the output a linear layer of
the same Parameter or further gathers, and positions are an embedding of ids ``(B, L)``; `client.gradcheck` checks it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.models.attention import Setting, multi_head, recency_bias
from common.models.losses import Candidates
from common.models.schema import ModelConfig, ScaledDotProduct
from common.models.shapes import ITEM_TABLE, parameter_shapes
from common.models.weights import Weights


class Block(nn.Module):
    """One pre-LN block; names as in `common.models.shapes`."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        d, hidden = model.dim, model.dim * model.ffn
        self.norm1 = nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d)
        self.heads, self.feeds = model.heads, hidden > 0
        if self.feeds:
            self.norm2 = nn.LayerNorm(d)
            self.up, self.down = nn.Linear(d, hidden), nn.Linear(hidden, d)

    def forward(self, x: Tensor, bias: Tensor | None, first: Tensor | None, second: Tensor | None) -> Tensor:
        """``(B, L, D) → (B, L, D)``; the attention's bias, and dropout masks of both sublayers, or none."""
        y = self.out(multi_head(self.qkv(self.norm1(x)), self.heads, Setting(ScaledDotProduct(), {}, bias)))
        x = x + (y if first is None else y * first)
        if not self.feeds:
            return x
        y = self.down(F.gelu(self.up(self.norm2(x))))
        return torch.add(x, y if second is None else y * second)


class TiedSASRec(nn.Module):
    """SASRec for `B` segments, each scored against candidates of its own."""

    def __init__(self, model: ModelConfig, items: int, softmax: bool):
        super().__init__()
        self.scale = model.dim**0.5
        self.item = nn.Embedding(items, model.dim)
        self.fall = model.recency
        self.position = nn.Embedding(model.max_length, model.dim) if model.position == "learned" else None
        self.blocks = nn.ModuleList(Block(model) for _ in range(model.blocks))
        self.norm = nn.LayerNorm(model.dim)
        self.output = nn.Linear(model.dim, items, bias=False) if softmax else None
        if self.output is not None:
            self.output.weight = self.item.weight

    def forward(self, events: Tensor, negatives: Tensor, private: bool, masks: Tensor | None) -> Candidates:
        """Scores of the next event and of others.

        Parameters
        ----------
        events : Tensor
            ``(B, W + 1)`` int64.
        negatives : Tensor
            Catalogue indices ``(B, N)``, one set for all positions, or ``(B, W)``, one per position; not looked at
            under full softmax.
        private : bool
            Whether there is one negative per position.
        masks : Tensor, optional
            ``(B, W, sites, D)``.
        """
        batch, width = len(events), events.shape[1] - 1
        x = self.item(events[:, :-1].contiguous()) * self.scale  # (B, W, D)
        bias = None
        if self.position is None:
            bias = recency_bias(width, self.fall)
        else:
            x = self.position(torch.arange(width).expand(batch, -1).contiguous()) + x
        x = x if masks is None else x * masks[:, :, 0]
        for i, block in enumerate(self.blocks):
            pair = (None, None) if masks is None else (masks[:, :, 2 * i + 1], masks[:, :, 2 * i + 2])
            x = block(x, bias, *pair)
        hidden = self.norm(x)
        if self.output is not None:
            logits = self.output(hidden)  # (B, W, I)
            return Candidates(logits.gather(-1, events[:, 1:, None]).squeeze(-1), logits)
        positive = (hidden * self.item(events[:, 1:].contiguous())).sum(-1)  # (B, W)
        other = self.item(negatives)  # (B, N, D) or (B, W, D)
        return Candidates(positive, (hidden * other).sum(-1, keepdim=True) if private else hidden @ other.mT)

    def ordered(self) -> list[nn.Parameter]:
        """Parameters in the order in which weights travel."""
        mine = dict(self.named_parameters())
        return [mine[f"{name}.weight" if name in {ITEM_TABLE, "position"} else name] for name in self._names]

    def load(self, model: ModelConfig, weights: Weights) -> None:
        """Stand at some weights."""
        self._names = list(parameter_shapes(model, len(weights.table)))
        flat, begin = weights.body, 0
        with torch.no_grad():
            table, *others = self.ordered()
            table.copy_(weights.table)
            for parameter in others:
                parameter.copy_(flat[begin : begin + parameter.numel()].view(parameter.shape))
                begin += parameter.numel()
