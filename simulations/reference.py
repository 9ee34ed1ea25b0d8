"""The models as a book would write them: torch's own layers and whole matrices of scores. No federated code in here.

Every encoder, attention and head of the schema is here a second time, by its simplest formulation and not its fastest,
so that `hushrec certify` compares two programs and not one with itself. What they share are the schema and the names
of parameters.
"""

from datetime import UTC, datetime
from itertools import pairwise
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.models.schema import (
    Additive,
    BehaviourInput,
    InputConfig,
    IntervalInput,
    Local,
    ModelConfig,
    RatingInput,
    TimeAware,
    TopK,
)
from simulations.reference_items import Items

_GRU = {"weight": "weight_ih_l0", "bias": "bias_ih_l0", "recurrent": "weight_hh_l0", "recurrent_bias": "bias_hh_l0"}
"""Names that torch.nn.GRU has for the parameters of a front."""


def intervals(times: Tensor, config: TimeAware) -> Tensor:
    """Buckets of the intervals from each event back to those before it, one by one and in whole numbers.

    The unit of an event is the smallest positive gap between neighbours until then; with none yet, a second.

    Parameters
    ----------
    times : Tensor
        Seconds, right-padded with anything, ``(B, L)`` int64.
    config : TimeAware
        Number of buckets and their scale; `log` has ⌊buckets / 28⌋ a doubling, or one.

    Returns
    -------
    Tensor
        ``(B, L, L)`` int64, 0 in the future; rows of padding have no meaning.
    """
    doubling, last = max(1, config.buckets // 28), config.buckets - 1
    found = []
    for moments in times.tolist():
        unit, rows = None, []
        for place, now in enumerate(moments):
            gap = now - moments[place - 1] if place else 0
            if gap > 0:
                unit = gap if unit is None else min(unit, gap)
            units = [max(0, now - then) // (unit or 1) for then in moments[: place + 1]]
            if config.scale == "log":
                units = [((1 + r) ** doubling).bit_length() - 1 for r in units]  # ⌊doubling · log2(1 + r)⌋, exactly
            rows.append([min(r, last) for r in units] + [0] * (len(moments) - place - 1))
        found.append(rows)
    return torch.tensor(found)


def inputs(config: ModelConfig, table: nn.ModuleDict, known: dict[str, Tensor]) -> Tensor:
    """Vectors of what is known of events beside their items, one event after another, ``(B, L, D)``."""
    total = torch.zeros(())
    for each in config.inputs:
        rows = table[each.kind]
        if isinstance(each, RatingInput):
            low, high = rows(torch.tensor([0, 1]))
            place = ((known["ratings"] - each.low) / (each.high - each.low)).clamp(0, 1).unsqueeze(-1)
            vectors = torch.where(place.isnan(), 0.0, low + place.nan_to_num() * (high - low))
        elif each.kind == "behaviour":
            vectors = rows(known["behaviours"])
        elif isinstance(each, IntervalInput):
            gaps = [[b - a for a, b in pairwise([moments[0], *moments])] for moments in known["times"].tolist()]
            most = each.buckets - 1
            vectors = rows(torch.tensor([[min((1 + max(0, g)).bit_length() - 1, most) for g in row] for row in gaps]))
        else:
            dates = [[datetime.fromtimestamp(t, UTC) for t in row] for row in known["times"].tolist()]
            hour = each.kind == "hour"
            vectors = rows(torch.tensor([[date.hour if hour else date.weekday() for date in row] for row in dates]))
        total = total + vectors
    return total


def _values(config: InputConfig) -> int:
    if isinstance(config, BehaviourInput):
        return len(config.names)
    if isinstance(config, IntervalInput):
        return config.buckets
    return {"rating": 2, "hour": 24, "weekday": 7}[config.kind]


def entmax(scores: Tensor) -> Tensor:
    """1.5-entmax along the last dimension: (score / 2 − τ)₊² that sum to 1 (Peters et al., ACL 2019).

    Bisection finds which scores exceed τ. Of these alone τ is a closed form, which autograd differentiates.
    """
    with torch.no_grad():
        exact = scores.double() / 2
        high = exact.amax(-1, keepdim=True)
        low = high - 1
        for _ in range(50):
            middle = (low + high) / 2
            heavy = (exact - middle).relu().square().sum(-1, keepdim=True) > 1
            low, high = torch.where(heavy, middle, low), torch.where(heavy, high, middle)
        support = exact > high
    half, size = (scores / 2).masked_fill(~support, 0), support.sum(-1, keepdim=True)
    mean = half.sum(-1, keepdim=True) / size
    spread = (half - mean).masked_fill(~support, 0).square().sum(-1, keepdim=True)
    threshold = mean - ((1 - spread) / size).sqrt()
    return (half - threshold).relu().square().masked_fill(~support, 0)


class Front(nn.Module):
    """What stands before the blocks: torch.nn.GRU, or torch.nn.Conv1d over the past and a GELU; pre-LN."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d = config.dim
        self.norm = nn.LayerNorm(d)
        self.kernel = config.kernel if config.encoder == "cnn-attention" else 0
        self.layer = nn.Conv1d(d, d, self.kernel) if self.kernel else nn.GRU(d, d, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, L, D) → (B, L, D)``."""
        x = self.norm(x)
        if not self.kernel:
            states: Tensor = self.layer(x)[0]
            return states
        return F.gelu(self.layer(F.pad(x.mT, (self.kernel - 1, 0)))).mT


class Block(nn.Module):
    """One pre-LN attention block."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, width = config.dim, config.dim // config.heads
        self.heads, self.kind = config.heads, config.attention
        self.fall = config.recency if config.position == "recency" else 0.0
        self.fed = config.ffn > 0
        self.norm1 = nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d)
        if isinstance(self.kind, Additive):
            self.vector = nn.Parameter(torch.zeros(config.heads, width))
        if isinstance(self.kind, TimeAware):
            self.interval_key = nn.Parameter(torch.zeros(self.kind.buckets, width))
            self.interval_value = nn.Parameter(torch.zeros(self.kind.buckets, width))
        if self.fed:
            self.norm2 = nn.LayerNorm(d)
            self.up, self.down = nn.Linear(d, d * config.ffn), nn.Linear(d * config.ffn, d)

    def forward(self, x: Tensor, masks: Tensor | None, buckets: Tensor | None) -> Tensor:
        """``(B, L, D) → (B, L, D)``; two scaled dropout masks ``(B, L, 2, D)``, buckets of `intervals`."""
        attended = self.out(self.attend(self.norm1(x), buckets))
        x = x + (attended if masks is None else attended * masks[:, :, 0])
        if not self.fed:
            return x
        fed = self.down(F.gelu(self.up(self.norm2(x))))
        return x.add(fed if masks is None else fed * masks[:, :, 1])

    def attend(self, x: Tensor, buckets: Tensor | None) -> Tensor:
        """Attention by the book: scores of all pairs, the future masked out, and a mean by weights."""
        query, key, value = (split(part, self.heads) for part in self.qkv(x).chunk(3, -1))
        place = torch.arange(x.shape[1])
        back = place.unsqueeze(-1) - place
        weights = self.weights(self.scores(query, key, buckets), back)  # (B, H, L, L)
        mixed: Tensor = weights @ value  # (B, H, L, K)
        if buckets is not None:
            mixed = mixed + torch.einsum("bhij,bijk->bhik", weights, self.interval_value[buckets])
        return mixed.transpose(1, 2).flatten(2)

    def scores(self, query: Tensor, key: Tensor, buckets: Tensor | None) -> Tensor:
        """Scores of all pairs, ``(B, H, L, L)``."""
        if self.kind.kind == "additive":
            return (query.unsqueeze(-2) + key.unsqueeze(-3)).tanh().mul(self.vector[:, None, None]).sum(-1)
        if self.kind.kind == "linear":
            return (F.elu(query) + 1) @ (F.elu(key) + 1).mT
        products = query @ key.mT
        if buckets is not None:
            products = products + torch.einsum("bhik,bijk->bhij", query, self.interval_key[buckets])
        return products if self.kind.kind == "dot-product" else products / sqrt(query.shape[-1])

    def weights(self, scores: Tensor, back: Tensor) -> Tensor:
        """What each position takes from where, ``(B, H, L, L)``; `back` are the events between, ``(L, L)``."""
        hidden = back < 0
        if self.kind.kind == "linear":
            seen = scores.masked_fill(hidden, 0)
            return seen / seen.sum(-1, keepdim=True)
        if isinstance(self.kind, Local):
            hidden = hidden | (back >= self.kind.window)
        scores = scores.masked_fill(hidden, -torch.inf) - self.fall * back
        if isinstance(self.kind, TopK) and self.kind.k < len(back):
            least = scores.sort(-1, descending=True).values[..., self.kind.k - 1, None]
            scores = scores.masked_fill(scores < least, -torch.inf)
        return entmax(scores) if self.kind.kind == "entmax-1.5" else scores.softmax(-1)


class SASRec(nn.Module):
    """Kang & McAuley, ICDM 2018, pre-LN, tied embeddings; with whatever a configuration has in place of its parts."""

    def __init__(self, config: ModelConfig, items: int | Items):
        super().__init__()
        d, learned = config.dim, config.position == "learned" and config.encoder != "gru"
        self.scale, self.heads, self.longest = sqrt(d), config.heads, config.max_length
        self.config = config
        self.timed = config.attention if config.intervals and isinstance(config.attention, TimeAware) else None
        self.inputs = nn.ModuleDict({each.kind: nn.Embedding(_values(each), d) for each in config.inputs})
        self.item = Items(config, items) if isinstance(items, int) else items
        self.position = nn.Embedding(config.max_length, d) if learned else None
        self.front = None if config.encoder == "attention" else Front(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(0 if config.encoder == "gru" else config.blocks))
        self.norm = nn.LayerNorm(d)
        self.target = None
        if config.head == "target":
            self.target = nn.ModuleDict({name: nn.Linear(d, d, bias=False) for name in ("key", "value")})
        self.sites = 1 + 2 * len(self.blocks) + (self.front is not None)
        """Dropout masks of one pass."""

    def forward(
        self,
        items: Tensor,
        masks: Tensor | None = None,
        known: dict[str, Tensor] | None = None,
        table: Tensor | None = None,
    ) -> Tensor:
        """Hidden states ``(B, L, D)`` of right-padded histories ``(B, L)``; masks ``(B, L, sites, D)``.

        What is known of events is by names: `times`, `behaviours`, `ratings`, ``(B, L)`` each. The items' vectors
        ``(I, D)`` may be at hand already.
        """
        x = F.embedding(items, self.item() if table is None else table) * self.scale
        x = x if self.position is None else x + self.position.weight[: items.shape[1]]
        x = x + inputs(self.config, self.inputs, known or {}) if self.inputs else x
        x = x if masks is None else x * masks[:, :, 0]
        if self.front is not None:
            begun = self.front(x)
            x = x + (begun if masks is None else begun * masks[:, :, -1])
        buckets = None if self.timed is None else intervals((known or {})["times"], self.timed)
        for i, block in enumerate(self.blocks):
            x = block(x, None if masks is None else masks[:, :, 2 * i + 1 : 2 * i + 3], buckets)
        hidden: Tensor = self.norm(x)
        return hidden

    def score_each(self, hidden: Tensor, real: Tensor, items: Tensor) -> Tensor:
        """Score of one item after each real event, ``(B, L, D), (B, L), (B, L, D) → (T,)``."""
        scores: Tensor = (hidden[real] * items[real]).sum(-1)
        if self.target is None:
            return scores
        logits, matches = self._asked(hidden, split(items, self.heads))  # (B, H, L, L), an item and an event
        future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        return scores + (logits.masked_fill(future, -torch.inf).softmax(-1) * matches).sum((1, -1))[real]

    def score_all(self, hidden: Tensor, real: Tensor, items: Tensor) -> Tensor:
        """Scores of the same items after each real event, ``(B, L, D), (B, L), (N, D) → (T, N)``."""
        scores = hidden[real] @ items.T
        if self.target is None:
            return scores
        logits, matches = self._asked(hidden, split(items, self.heads))  # (B, H, N, L)
        pasts = (slice(end) for end in range(1, hidden.shape[1] + 1))
        return (
            scores + torch.stack([(logits[..., p].softmax(-1) * matches[..., p]).sum((1, -1)) for p in pasts], 1)[real]
        )

    def score_last(self, hidden: Tensor, items: Tensor) -> Tensor:
        """Scores of items after the last event of one history, ``(L, D), (N, D) → (N,)``."""
        scores = hidden[-1] @ items.T
        if self.target is None:
            return scores
        logits, matches = self._asked(hidden, split(items, self.heads))  # (H, N, L)
        return scores + (logits.softmax(-1) * matches).sum((0, -1))

    def _asked(self, hidden: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
        """How much items, times √D, look at events, and how they match what these hold; both ``(…, H, N, L)``."""
        if self.target is None:
            raise ValueError("no target attention here")
        keys, values = (split(self.target[name](hidden), self.heads) for name in ("key", "value"))
        return asked * self.scale @ keys.mT / sqrt(asked.shape[-1]), asked @ values.mT

    def load_named(self, parameters: dict[str, Tensor]) -> None:
        """Take weights by the names of `model.safetensors`."""
        state = {self._theirs(name): value.clone() for name, value in parameters.items()}
        if self.front is not None and self.front.kernel and "front.layer.weight" in state:
            flat = state["front.layer.weight"]  # (D, kernel · D), the oldest event first
            state["front.layer.weight"] = flat.unflatten(1, (self.front.kernel, -1)).mT
        self.load_state_dict(state)

    def named(self) -> dict[str, Tensor]:
        """Weights by the names of `model.safetensors`."""
        state = {name: value.detach() for name, value in self.named_parameters()}
        if self.front is not None and self.front.kernel:
            state["front.layer.weight"] = state["front.layer.weight"].mT.flatten(1)
        ours = "item", "position", *(f"front.{each}" for each in _GRU), *(f"inputs.{each}" for each in self.inputs)
        short = {self._theirs(name): name for name in ours}
        return {short.get(name, name): value for name, value in state.items()}

    def _theirs(self, name: str) -> str:
        """What torch's layers call a parameter."""
        place, _, own = name.rpartition(".")
        if name in {"item", "position"} or place == "inputs":
            return f"{name}.weight"
        if place == "front" and self.front is not None:
            return f"front.layer.{own if self.front.kernel else _GRU.get(own, own)}"
        return name


def split(x: Tensor, heads: int) -> Tensor:
    """``(…, L, D) → (…, H, L, D/H)``."""
    parts: Tensor = x.unflatten(-1, (heads, -1)).transpose(-3, -2)
    return parts
