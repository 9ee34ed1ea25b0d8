"""Recommending while events come in: a device encodes the new event only, and remembers what the past made of itself.

Attention is causal and positions count from the start of the window, so nothing that an earlier position computed ever
changes until the window is full.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.models.attention import Setting, multi_head, recency_bias, split_heads
from common.models.fronts import convolved
from common.models.inputs import Moments, embedded
from common.models.last import buckets_of_last, weights_of_last
from common.models.linear import layer_norm, linear
from common.models.mixing import FLOOR, interval_buckets
from common.models.personal import personalised
from common.models.schema import BehaviourInput, Linear, Local, ModelConfig, TimeAware
from common.models.target import LIMIT
from common.models.weights import Weights, named

STRIDE = 8
"""Events whose weights on all items are held at a time, where many come at once and `model.head` is `target`."""


class Session:
    """One person's history, and scores of all items after each of its events.

    They are those of `client.evaluation.final_scores` on the last ``model.max_length`` events, but for rounding. While
    the window has room an event costs one position: keys and values of each block are kept, running sums of `linear`
    attention, the state of a recurrent layer, the last inputs of a convolution, and, with ``head: target``, running
    sums per item. Once it is full it slides: every event has another position, and what the dropped event told the
    others must be forgotten, so the window is encoded anew, but for what the last block would make of the events before
    the newest.

    Parameters
    ----------
    model : ModelConfig
        The model.
    weights : Weights
        Shared; the table holds a vector per item, ``(I, D)`` (see `client.evaluation.of_items`).
    """

    def __init__(self, model: ModelConfig, weights: Weights):
        if weights.table.dim() != 2 or weights.body.dim() != 1:
            raise ValueError("a session wants one set of weights, not a stack of them")
        self.model = model
        self._table, p = weights.table.detach(), named(model, weights.body.detach())

        def of(place: str) -> dict[str, Tensor]:
            return {name.removeprefix(place): part for name, part in p.items() if name.startswith(place)}

        self._front, self._target = of("front."), of("target.")
        self._parameters, self._wanted = p, _wanted(model)
        self._blocks = [of(f"blocks.{block}.") for block in range(model.attends)]
        self._position, self._norm = p.get("position"), (p["norm.weight"], p["norm.bias"])
        self._falls = -model.recency * torch.arange(model.max_length - 1.0, -1, -1) if self._biased else None
        if model.head == "target":
            self._candidates = self._table.view(-1, model.heads, model.dim // model.heads).permute(1, 2, 0).contiguous()
        self.reset()

    @property
    def _biased(self) -> bool:
        return self.model.position == "recency"

    def reset(self) -> None:
        """Forget everything."""
        m, width = self.model, self.model.dim // self.model.heads
        shape = (m.heads, width, width + 1) if isinstance(m.attention, Linear) else (2, m.heads, m.max_length, width)
        self._past = [torch.zeros(shape) for _ in range(m.attends)]
        self._vectors = torch.empty(m.max_length, m.dim)
        self._facts = {name: torch.zeros(m.max_length, dtype=kind) for name, kind in self._wanted.items()}
        self._state = torch.zeros(1, m.kernel - 1 if m.encoder == "cnn-attention" else 1, m.dim)  # of what is in front
        self._hidden = torch.zeros(m.dim)
        self._sums = torch.zeros(2, m.heads, len(self._table)) if m.head == "target" else torch.zeros(0)
        self._length = 0
        self.seen: set[int] = set()
        """Items in the history, also those that have left the window."""

    def fresh(self) -> "Session":
        """Another person's, of the same weights, which are read and held once."""
        other = copy.copy(self)
        other.reset()
        return other

    @property
    def nbytes(self) -> int:
        """Memory of this person alone, the weights left out."""
        own = [*self._past, self._vectors, *self._facts.values(), self._state, self._hidden, self._sums]
        return sum(part.nbytes for part in own)

    def append(
        self, item: int, time: int | None = None, behaviour: int | None = None, rating: float | None = None
    ) -> Tensor:
        """Take one event and score every item after it, ``(I,)`` float32; arguments and errors as in `extend`."""
        told: dict[str, list[Any]] = {"ratings": [math.nan if rating is None else rating]}
        told |= {} if time is None else {"times": [time]}
        self.extend([item], told if behaviour is None else told | {"behaviours": [behaviour]})
        return self.scores()

    def extend(self, items: Sequence[int], facts: Mapping[str, Any] | None = None) -> None:
        """Take events in order of time; many at once are one pass.

        Parameters
        ----------
        items : sequence of int
            Catalogue indices.
        facts : mapping, optional
            What else the model looks at, one value an event, by the fields of `common.models.inputs.Moments`:
            ``times`` in seconds, ``behaviours`` by their places among the model's names, ``ratings``, NaN where none.

        Raises
        ------
        IndexError
            Where an item is not in the table, or a behaviour not among the names; nothing is taken then.
        ValueError
            Where something is not told that the model looks at; likewise.
        """
        if not all(0 <= item < len(self._table) for item in items):
            raise IndexError(f"items are numbers from 0 to {len(self._table) - 1}")
        self.take(self._table[torch.tensor(items, dtype=torch.int64)], facts)
        self.seen.update(items)

    @torch.inference_mode()
    def take(self, vectors: Tensor, facts: Mapping[str, Any] | None = None) -> None:
        """Take events by their items' vectors, ``(n, D)`` float32: what `extend` does, once it has looked them up."""
        told = self._checked(facts or {}, len(vectors))
        room, n = self.model.max_length, min(len(vectors), self.model.max_length)
        if not n:
            return
        kept = min(self._length, room - n)
        slid = kept < self._length
        for past in (self._vectors, *self._facts.values()) if slid else ():
            past[:kept] = past[self._length - kept : self._length].clone()
        self._vectors[kept : kept + n] = vectors[-n:]
        for name, values in told.items():
            self._facts[name][kept : kept + n] = values[-n:]
        self._length = kept + n
        self._encode(kept if n == 1 and not slid else 0)

    def _checked(self, facts: Mapping[str, Any], n: int) -> dict[str, Tensor]:
        """What the model looks at, as tensors."""
        told = {name: torch.as_tensor(facts.get(name, ()), dtype=kind) for name, kind in self._wanted.items()}
        for name, values in told.items():
            if len(values) != n:
                raise ValueError(f"this model wants the {name} of events, one each")
        for each in self.model.inputs:
            if isinstance(each, BehaviourInput) and not all(0 <= b < len(each.names) for b in told["behaviours"]):
                raise IndexError(f"behaviours are numbers from 0 to {len(each.names) - 1}")
        return told

    @torch.no_grad()
    def scores(self) -> Tensor:
        """Score of every item after the last event, ``(I,)`` float32, free to be written to.

        Raises
        ------
        ValueError
            Where there is no event yet.
        """
        if not self._length:
            raise ValueError("no event yet, hence no scores")
        scores = self._table @ self._hidden
        return scores + (self._sums[0] / self._sums[1]).sum(0) if self.model.head == "target" else scores

    def _encode(self, first: int) -> None:
        """`common.models.encoder.encode` of the last position alone or, from `first` 0, of all of them."""
        m, length = self.model, self._length
        if not first:  # sums and states are of nothing yet
            for part in (*(self._past if isinstance(m.attention, Linear) else ()), self._state, self._sums):
                part.zero_()
        x = self._vectors[None, first:length] * m.dim**0.5  # (1, n, D)
        if self._position is not None:
            x = x + self._position[first:length]
        if m.inputs:
            x = x + self._embedded(first)
        if m.encoder != "attention":
            x = x + self._in_front(layer_norm(x, self._front["norm.weight"], self._front["norm.bias"]))
        buckets = None
        if m.attends and isinstance(m.attention, TimeAware):
            buckets = buckets_of_last(self._facts["times"][:length], m.attention)
        for block, p in enumerate(self._blocks):
            qkv = linear(layer_norm(x, p["norm1.weight"], p["norm1.bias"]), p["qkv.weight"])  # (1, n, 3D)
            self._keep(block, qkv, first)
            if x.shape[1] > 1 and (m.head == "target" or block + 1 < m.attends):
                mixed = multi_head(qkv, m.heads, self._setting(p))
            else:  # nobody will ask for the others
                x, mixed = x[:, -1:], self._mixed(block, qkv[0, -1], buckets)
            x = x + linear(mixed, p["out.weight"], p["out.bias"])
            if m.ffn:
                h = layer_norm(x, p["norm2.weight"], p["norm2.bias"])
                x = x + linear(F.gelu(linear(h, p["up.weight"], p["up.bias"])), p["down.weight"], p["down.bias"])
        hidden = layer_norm(x, *self._norm)
        hidden = personalised(m, self._parameters, hidden) if m.personal else hidden
        self._hidden = hidden[0, -1].clone()
        if m.head == "target":
            self._look(hidden)

    def _embedded(self, first: int) -> Tensor:
        """What `model.inputs` add from a position on, ``(1, n, D)``; an interval is one to the event before."""
        start = max(0, first - 1)
        facts = {name: values[None, start : self._length] for name, values in self._facts.items()}
        facts.setdefault("times", torch.zeros(1, self._length - start, dtype=torch.int64))
        lengths = torch.tensor([self._length - start])
        return embedded(self.model, self._parameters, Moments(lengths=lengths, **facts))[:, first - start :]

    def _in_front(self, x: Tensor) -> Tensor:
        """`common.models.fronts.front`, from the state on at which it stopped; ``(1, n, D)``."""
        p = self._front
        if self.model.encoder == "cnn-attention":
            wide, before = torch.cat([self._state, x], dim=1), self._state.shape[1]
            self._state = wide[:, wide.shape[1] - before :].clone()
            return convolved(wide, p["weight"], p["bias"], self.model.kernel)[:, before:]
        recurrent = [p["weight"], p["recurrent"], p["bias"], p["recurrent_bias"]]
        states, self._state = torch.gru(x, self._state, recurrent, True, 1, 0.0, False, False, True)
        return states

    def _setting(self, p: dict[str, Tensor]) -> Setting:
        """What a whole window's attention wants."""
        kind, bias, buckets = self.model.attention, None, None
        if self._biased:
            bias = recency_bias(self._length, self.model.recency)
        if isinstance(kind, TimeAware):
            times = self._facts["times"][None, : self._length]
            buckets = interval_buckets(times, torch.tensor([self._length]), kind.buckets, kind.scale)
        return Setting(kind, p, bias, buckets)

    def _keep(self, block: int, qkv: Tensor, first: int) -> None:
        """Remember keys and values of new positions, ``(1, n, 3D)``."""
        split = qkv.view(qkv.shape[1], 3, self.model.heads, -1).permute(1, 2, 0, 3)  # (3, H, n, K)
        if isinstance(self.model.attention, Linear):
            self._past[block] += (F.elu(split[1]) + 1).mT @ F.pad(split[2], (0, 1), value=1.0)  # (H, K, K + 1)
        else:
            self._past[block][:, :, first : self._length] = split[1:]

    def _mixed(self, block: int, qkv: Tensor, buckets: Tensor | None) -> Tensor:
        """What the last position takes from the past, ``(3D,) → (1, 1, D)``."""
        kind, p, past = self.model.attention, self._blocks[block], self._past[block]
        query = qkv.view(3, self.model.heads, -1)[0]  # (H, K)
        if isinstance(kind, Linear):
            sums = (F.elu(query) + 1).unsqueeze(1) @ past  # (H, 1, K + 1)
            return (sums[..., :-1] / sums[..., -1:].clamp(min=FLOOR)).view(1, 1, -1)
        start = max(0, self._length - kind.window) if isinstance(kind, Local) else 0
        keys, values = past[:, :, start : self._length]  # (H, L, K)
        if buckets is not None:  # one row of pairs is small enough for what `time_aware` avoids
            keys, values = keys + p["interval_key"][buckets], values + p["interval_value"][buckets]
        falls = None if self._falls is None else self._falls[-self._length :]
        weights = weights_of_last(kind, query, keys, falls, p.get("vector"))
        mixed: Tensor = (weights.unsqueeze(1) @ values).view(1, 1, -1)
        return mixed

    def _look(self, hidden: Tensor) -> None:
        """Let every item look at new positions, ``(1, n, D)``: `common.models.target.target_scores`, one more term."""
        for part in hidden.split(STRIDE, dim=1):
            pair = (linear(part, self._target[f"{name}.weight"]) for name in ("key", "value"))
            key, value = (split_heads(x, self.model.heads)[0] for x in pair)  # (H, n, K); √D / √K is √H
            weights = (key * math.sqrt(self.model.heads) @ self._candidates).clamp_(-LIMIT, LIMIT).exp_()  # (H, n, I)
            self._sums[1] += weights.sum(1)
            self._sums[0] += (value @ self._candidates).mul_(weights).sum(1)


def _wanted(model: ModelConfig) -> dict[str, torch.dtype]:
    """Fields of `Moments` that a model looks at."""
    kinds = {each.kind for each in model.inputs}
    wanted = {"times": (model.timed, torch.int64), "behaviours": ("behaviour" in kinds, torch.int64)}
    wanted["ratings"] = ("rating" in kinds, torch.float32)
    return {name: kind for name, (looked_at, kind) in wanted.items() if looked_at}
