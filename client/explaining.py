"""Why an item is recommended: what each past event has to do with it, and how far such an answer can be trusted.

What is explained is an item's log-probability after a history: the log-softmax of all scores of its domain, in nats.
"""

from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from client.past import ROWS, SCORES, Past, log_probability, log_softmax
from common.errors import UsageError
from common.models.attention import split_heads
from common.models.encoder import encode
from common.models.items import Mixture
from common.models.schema import ModelConfig
from common.models.scoring import history
from common.models.target import LIMIT
from common.models.weights import Weights, named


class Gradients(NamedTuple):
    """What `integrated_gradients` finds."""

    events: Tensor
    """What each event adds to the log-probability over an average one, ``(C, L)``; 0 at padding."""
    slopes: Tensor
    """Averaged gradients of the events' vectors, ``(C, L, D)``."""
    gap: Tensor
    """How far the sum of `events` is from what it should be, ``(C,)``."""


class Parts(NamedTuple):
    """Events' shares in `Gradients`, split among the table rows that their items are made of; n of them."""

    events: Tensor
    """Row of the batch and place in the history, ``(n, 2)`` int64."""
    rows: Tensor
    """Row of the trained table: an item's own, or a feature's; −1 for the features that others have, ``(n,)`` int64."""
    values: Tensor
    """``(n,)``; those of one event sum to its share."""


class Explanation(NamedTuple):
    """Importance of each past event, ``(C, L)``, 0 at padding."""

    attention: Tensor | None
    """Shares by `rollout`, which know no sign and, unless `model.head` is target, not what is recommended; none where
    nothing attends."""
    gradients: Tensor
    """By `integrated_gradients`: sums to the log-probability beyond that of average events."""
    combined: Tensor
    """By `ends`, the most faithful of the three."""
    parts: Parts | None
    """Of `gradients`, where items are made of features."""
    gap: Tensor
    """Of `Gradients`, ``(C,)``: a large one wants more steps, which top-k does not help."""


def explain(
    model: ModelConfig, weights: Weights, past: Past, targets: Tensor, mixture: Mixture | None = None, steps: int = 64
) -> Explanation:
    """Say what each past event has to do with the recommendation of an item.

    Parameters
    ----------
    model : ModelConfig
        Any kind of model.
    weights : Weights
        As trained, shared.
    past : Past
        C histories.
    targets : Tensor
        The item to be explained for each, ``(C,)`` int64.
    mixture : Mixture, optional
        What items are made of, from `common.models.items.mixture_of`.
    steps : int
        Of `integrated_gradients`.
    """
    made = weights if mixture is None else weights._replace(table=mixture.vectors(weights.table))
    gradients = integrated_gradients(model, made, past, targets, steps)
    parts = None if mixture is None else split(mixture, weights.table, past, gradients.slopes)
    seen, combined = attention(model, made, past, targets), ends(model, made, past, targets)
    return Explanation(seen, gradients.events, combined, parts, gradients.gap)


@torch.no_grad()
def attention(model: ModelConfig, weights: Weights, past: Past, targets: Tensor) -> Tensor | None:
    """Importance by `rollout`, ``(C, L)``: of the last event and, half of it with target attention, as the item looks.

    None for an encoder without blocks under a head without attention. What stands in front of the blocks, recurrent
    or convolution, is taken for the identity: it mixes events, but not by weights that could be rolled out.

    Parameters
    ----------
    model, weights, past, targets
        As in `explain`, with the table of the items' vectors, ``(I, D)``.
    """
    if not model.attends and model.head != "target":
        return None
    parameters, watched = named(model, weights.body), list[Tensor]()
    hidden = encode(model, parameters, weights.table[past.items], moments=past.moments, watched=watched)
    keys = history(model, parameters, hidden).keys  # (C, H, L, K)
    read = (torch.arange(past.items.shape[1]) == (past.lengths - 1).unsqueeze(1)).float()
    if keys is not None:
        asked = split_heads(weights.table[targets].unsqueeze(1), model.heads)  # (C, H, 1, K)
        logits = (asked @ keys.mT).squeeze(2) / keys.shape[-1] ** 0.5  # (C, H, L)
        looked = logits.clamp(-LIMIT, LIMIT).masked_fill(~past.real.unsqueeze(1), -torch.inf).softmax(-1).mean(1)
        read = 0.5 * read + 0.5 * looked
    return rollout(watched, read)


def rollout(watched: list[Tensor], read: Tensor) -> Tensor:
    """Attention rollout (Abnar & Zuidema, ACL 2020, section 3): paths through all blocks, half of each past the block.

    Parameters
    ----------
    watched : list of Tensor
        Each block's weights ``(C, H, L, L)`` from `common.models.encoder.encode`; heads are averaged.
    read : Tensor
        Weights by which the last hidden states are read, ``(C, L)``; rows sum to 1.

    Returns
    -------
    Tensor
        Share of each event, ``(C, L)``; rows sum to 1.
    """
    for weights in reversed(watched):
        read = 0.5 * read + 0.5 * (read.unsqueeze(1) @ weights.mean(1)).squeeze(1)
    return read


def integrated_gradients(
    model: ModelConfig, weights: Weights, past: Past, targets: Tensor, steps: int = 64
) -> Gradients:
    """Integrated gradients (Sundararajan et al., ICML 2017) of the events' vectors, before positions and scale.

    The path begins where every event is the catalogue's mean vector. From zero vectors layer norms turn too sharply for
    the integral, and where positions are not learned they have no value there at all. Attention top-k jumps where the
    choice of events changes, so its gap stays.

    Parameters
    ----------
    model, weights, past, targets
        As in `explain`, with the table of the items' vectors, ``(I, D)``.
    steps : int
        Points of the Gauss-Legendre rule.

    Raises
    ------
    UsageError
        Where Captum is missing.
    """
    try:
        method: Any = import_module("captum.attr").IntegratedGradients
    except ImportError:
        raise UsageError("this needs Captum: pip install 'hushrec[explain]'") from None
    parameters, names = named(model, weights.body), tuple(past.facts or ())

    def value(x: Tensor, lengths: Tensor, goals: Tensor, *facts: Tensor) -> Tensor:
        known = Past(goals, lengths, dict(zip(names, facts, strict=True)) if names else None, past.domains)
        return log_softmax(model, parameters, weights.table, x, known, goals)

    found, usual = [], weights.table.mean(0)
    size = max(1, min(ROWS, SCORES // len(weights.table)) // steps)
    for start in range(0, len(targets), size):
        here = past.pick(slice(start, start + size))
        x, more = weights.table[here.items], (here.lengths, targets[start : start + size], *(here.facts or {}).values())
        base = usual.expand_as(x)
        slopes = method(value, multiply_by_inputs=False).attribute(x, base, None, more, n_steps=steps).detach()
        events = ((x - base) * slopes).sum(-1) * here.real
        with torch.no_grad():
            gap = (value(x, *more) - value(base, *more) - events.sum(1)).abs()
        found.append(Gradients(events, slopes, gap))
    return Gradients(*map(torch.cat, zip(*found, strict=True)))


def split(mixture: Mixture, table: Tensor, past: Past, slopes: Tensor) -> Parts:
    """Split events' shares among the rows of a trained table ``(R, D)``: exact, since items are linear in rows.

    A row counts by how much more of it the item has than the average one. A gate's weights are taken as they are: what
    a row does to them is no share of its own.
    """
    place = past.real.nonzero()  # (E, 2)
    item, slope, zero = past.items[past.real], slopes[past.real], torch.zeros(len(place))
    starts, columns = mixture.forth.crow_indices().long(), mixture.forth.col_indices().long()
    begin, values, own = 0 if mixture.own is None else mixture.items, mixture.forth.values(), mixture.own
    if mixture.fusion == "concatenation":
        table = table * mixture.columns(table.shape[1])
    if mixture.fusion == "gate":
        gates, owner = mixture.gates(table), torch.arange(mixture.items).repeat_interleave(starts.diff())
        kind = torch.arange(mixture.kinds - len(mixture.groups), mixture.kinds)
        values = values * gates[kind.repeat_interleave(torch.tensor(mixture.groups))[columns], owner, 0]
        own = None if own is None else own * gates[0]
    features = table[begin : begin + mixture.forth.shape[1]]
    usual = torch.bincount(columns, values, minlength=len(features)) / mixture.items  # (V,)
    counts = starts[item + 1] - starts[item]
    event = torch.arange(len(place)).repeat_interleave(counts)
    entry = torch.arange(len(event)) + (starts[item] - counts.cumsum(0) + counts)[event]
    column = columns[entry]
    each = (features[column] * slope[event]).sum(-1)
    others = zero.index_add(0, event, usual[column] * each) - slope @ (usual @ features)
    found = [
        (event, begin + column, (values[entry] - usual[column]) * each),
        (torch.arange(len(place)), torch.full_like(item, -1), others),
    ]
    if own is not None:
        vectors = own * table[: mixture.items]
        found.append((torch.arange(len(place)), item, ((vectors[item] - vectors.mean(0)) * slope).sum(-1)))
    events, rows, shares = map(torch.cat, zip(*found, strict=True))
    return Parts(place[events], rows, shares)


@torch.no_grad()
def ends(model: ModelConfig, weights: Weights, past: Past, targets: Tensor) -> Tensor:
    """What an event adds as the first and as the last of its history, averaged, ``(C, L)``.

    Of the orders in which events could join, whose mean would be the Shapley value (Lundberg & Lee, NIPS 2017), these
    are the two ends, and all that matters where events act alone or in pairs. As the first it is compared with what
    the history's events add on average, since any event at all adds much: that changes signs, and no order. The only
    event is compared with one of the average item. No mean or product with the other two importances was as faithful.

    Parameters
    ----------
    model, weights, past, targets
        As in `explain`, with the table of the items' vectors, ``(I, D)``.
    """
    length = past.items.shape[1]
    user, place = past.real.nonzero(as_tuple=True)  # (E,)
    one = torch.eye(length, dtype=torch.bool)[place]  # (E, L)
    many, goals = past.pick(user), targets[user]
    blank, usual = past.only(torch.arange(length) < 1), weights.table.mean(0, keepdim=True)
    nothing = log_probability(model, weights, blank._replace(items=torch.zeros_like(blank.items)), targets, usual)
    alone = log_probability(model, weights, many.only(one), goals)
    without, rest = nothing[user], many.lengths > 1
    usually = nothing.index_add(0, user[rest], (alone - nothing[user])[rest] / many.lengths[rest])  # (C,)
    without[rest] = log_probability(model, weights, many.pick(rest).only(~one[rest]), goals[rest])
    whole = log_probability(model, weights, past, targets)
    found = torch.zeros(past.items.shape)
    found[user, place] = (alone - usually[user] + whole[user] - without) / 2
    return found
