"""SASRec trained as everybody else does: one process that sees all data, mini-batches, Adam. No federated code in here.

It is the reference that the federated run must equal (`hushrec certify`) and the floor that its speed is measured
against (`hushrec bench`). What it shares with the rest are the schema, the data and the keyed draws: the same
initial weights, users of a batch, negatives and dropout masks can only come from the same seeds.
"""

from collections.abc import Iterable
from math import sqrt

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from common.config import Experiment
from common.data.sequences import Ints, Sequences
from common.models.schema import ModelConfig
from common.seeding import generator, keep_mask, uniform_bits, uniform_integers

LOSSES = ("softmax", "sampled-softmax")
"""Values of `loss.kind` that are known here."""


class Block(nn.Module):
    """One pre-LN attention block."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d = config.dim
        self.heads = config.heads
        self.fall = config.recency if config.position == "recency" else 0.0
        self.fed = config.ffn > 0
        self.norm1 = nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d)
        if self.fed:
            self.norm2 = nn.LayerNorm(d)
            self.up, self.down = nn.Linear(d, d * config.ffn), nn.Linear(d * config.ffn, d)

    def forward(self, x: Tensor, masks: Tensor | None) -> Tensor:
        """``(B, L, D) → (B, L, D)``; `masks` are the two scaled dropout masks ``(B, L, 2, D)``."""
        attended = self.out(self.attend(self.norm1(x)))
        x = x + (attended if masks is None else attended * masks[:, :, 0])
        if not self.fed:
            return x
        fed = self.down(F.gelu(self.up(self.norm2(x))))
        return x.add(fed if masks is None else fed * masks[:, :, 1])

    def attend(self, x: Tensor) -> Tensor:
        """Softmax attention by the book, the future masked out."""
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        logits = (query @ key.transpose(-1, -2) / sqrt(query.shape[-1])).masked_fill(future, -torch.inf)
        place = torch.arange(x.shape[1])
        logits = logits - self.fall * (place.unsqueeze(-1) - place)
        mixed: Tensor = logits.softmax(-1) @ value  # (B, H, L, D/H)
        return mixed.transpose(1, 2).flatten(2)


class SASRec(nn.Module):
    """Kang & McAuley, ICDM 2018; pre-LN, tied embeddings."""

    def __init__(self, config: ModelConfig, items: int):
        super().__init__()
        self.scale = sqrt(config.dim)
        self.item = nn.Embedding(items, config.dim)
        self.longest = config.max_length
        self.position = nn.Embedding(config.max_length, config.dim) if config.position == "learned" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, items: Tensor, masks: Tensor | None = None) -> Tensor:
        """Hidden states ``(B, L, D)`` of right-padded histories ``(B, L)``."""
        x = self.item(items) * self.scale
        x = x if self.position is None else x + self.position.weight[: items.shape[1]]
        x = x if masks is None else x * masks[:, :, 0]
        for i, block in enumerate(self.blocks):
            x = block(x, None if masks is None else masks[:, :, 2 * i + 1 : 2 * i + 3])
        hidden: Tensor = self.norm(x)
        return hidden

    def load_named(self, parameters: dict[str, Tensor]) -> None:
        """Take weights by the names of `model.safetensors`."""
        self.load_state_dict(
            {
                f"{name}.weight" if name in {"item", "position"} else name: value.clone()
                for name, value in parameters.items()
            }
        )

    def named(self) -> dict[str, Tensor]:
        """Weights by the names of `model.safetensors`."""
        short = {"item.weight": "item", "position.weight": "position"}
        return {short.get(name, name): value.detach() for name, value in self.named_parameters()}


def train(experiment: Experiment, model: SASRec, sequences: Sequences, batches: Iterable[tuple[int, Ints]]) -> None:
    """Mini-batch training in place: token-mean loss, torch.optim.Adam with the server optimiser's settings.

    Parameters
    ----------
    experiment : Experiment
        `loss.kind` softmax or sampled-softmax; `federation.optimizer.kind` fedadam.
    model : SASRec
        Trained in place.
    sequences : Sequences
        Everybody's data.
    batches : iterable
        Pairs of a step's number, from 1, and its users ``(B,)``.
    """
    optimizer = adam(experiment, model)
    for step, users in batches:
        train_step(experiment, model, optimizer, sequences, users, step)


def train_step(
    experiment: Experiment,
    model: SASRec,
    optimizer: torch.optim.Optimizer,
    sequences: Sequences,
    users: Ints,
    step: int,
) -> None:
    """One mini-batch; with no token in it no step, as the server makes none either."""
    if (sequences.stops(users, "train")[0] - sequences.offsets[users] > 1).any():
        optimizer.zero_grad()
        loss(experiment, model, sequences, users, step).backward()
        optimizer.step()


def adam(experiment: Experiment, model: SASRec) -> torch.optim.Adam:
    """torch.optim.Adam with the server optimiser's settings.

    Raises
    ------
    ValueError
        Where that is no Adam.
    """
    config = experiment.federation.optimizer
    if config.kind != "fedadam":
        raise ValueError("the centralised loop steps with Adam; set federation.optimizer.kind=fedadam")
    return torch.optim.Adam(model.parameters(), lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)


def loss(experiment: Experiment, model: SASRec, sequences: Sequences, users: Ints, step: int) -> Tensor:
    """Mean over all tokens of a batch, a scalar.

    Raises
    ------
    ValueError
        Where `loss.kind` is neither softmax nor sampled-softmax.
    """
    config = experiment.model
    stops, _ = sequences.stops(users, "train")
    histories = stops - sequences.offsets[users]
    width = int(np.clip(histories.max() - 1, 1, config.max_length))
    ends = stops
    if experiment.federation.local.window == "random":
        starts = np.maximum(0, histories - (config.max_length + 1)) + 1  # places where a whole window may begin
        ends = stops - uniform_integers(experiment.seed, "window", step, users, 1, 2**31)[:, 0] * starts // 2**31
    events, lengths = sequences.windows(users, ends, width + 1)
    real = torch.from_numpy(np.arange(1, width + 1) < lengths[:, None])  # (B, L)
    window = torch.from_numpy(events)
    masks = None
    if config.dropout:
        shape = (len(users), width, 1 + 2 * config.blocks, config.dim)
        bits = uniform_bits(experiment.seed, "dropout-0", step, users, int(np.prod(shape[1:])))
        masks = torch.from_numpy(keep_mask(bits, config.dropout)).view(shape)
    hidden = model(window[:, :-1], masks)[real]  # (T, D), real tokens only
    targets = window[:, 1:][real]
    if experiment.loss.kind not in LOSSES:
        raise ValueError(f"the centralised loop knows {' and '.join(LOSSES)}, not {experiment.loss.kind}")
    if experiment.loss.kind == "softmax":
        return F.cross_entropy(hidden @ model.item.weight.T, targets)
    items = model.item.num_embeddings
    wanted = min(getattr(experiment.loss, "negatives", 0), items)
    negatives = np.sort(generator(experiment.seed, "negatives", step).choice(items, wanted, replace=False))
    owned, owner = sequences.events(users, stops)
    known = np.zeros((len(users), items), dtype=bool)
    known[owner, owned] = True
    allowed = torch.from_numpy(~known[:, negatives]).unsqueeze(1).expand(-1, width, -1)[real]  # (T, N)
    positive = (hidden * model.item(targets)).sum(-1, keepdim=True)
    negative = (hidden @ model.item(torch.from_numpy(negatives)).T).masked_fill(~allowed, -torch.inf)
    return F.cross_entropy(torch.cat([positive, negative], -1), torch.zeros(len(targets), dtype=torch.int64))


def test_ranks(model: SASRec, sequences: Sequences) -> NDArray[np.float64]:
    """Rank of every user's test item, one user at a time, NaN where there is none; ties at their expectation."""
    ranks = np.full(len(sequences), np.nan)
    with torch.no_grad():
        for user in range(len(sequences)):
            place, start = int(sequences.test[user]), int(sequences.offsets[user])
            if place <= start:
                continue
            history = torch.from_numpy(sequences.items[start:place].astype(np.int64))
            window = history[-model.longest :]
            scores = model(window[None])[0, -1] @ model.item.weight.T  # (I,)
            target = int(sequences.items[place])
            others = torch.ones(len(scores), dtype=torch.bool)
            others[history] = False
            others[target] = False
            better, equal = (scores[others] > scores[target]).sum(), (scores[others] == scores[target]).sum()
            ranks[user] = 1 + int(better) + int(equal) / 2
    return ranks
