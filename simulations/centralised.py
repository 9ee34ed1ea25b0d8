"""Training as everybody else does it: one process that sees all data, mini-batches, Adam. No federated code in here.

With the models of `simulations.reference` it is the reference that the federated run must equal (`hushrec certify`)
and the floor that its speed is measured against (`hushrec bench`). What it shares with the rest are the schema, the
data and the keyed draws: the same initial weights, users of a batch, negatives and dropout masks can only come from
the same seeds.
"""

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from common.config import Experiment
from common.data.holdout import cold_of
from common.data.sequences import Ints, Sequences
from common.models.schema import BehaviourInput
from common.seeding import generator, keep_mask, uniform_bits, uniform_integers
from simulations.reference import SASRec

__all__ = ["LOSSES", "SASRec", "adam", "loss", "test_ranks", "train", "train_step"]

LOSSES = ("softmax", "sampled-softmax")
"""Values of `loss.kind` that are known here."""


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
    optimizer.zero_grad()
    mean = loss(experiment, model, sequences, users, step)
    if mean.requires_grad:
        mean.backward()
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
    """Mean over all tokens of a batch that are to be predicted, a scalar; a constant where there are none.

    Raises
    ------
    ValueError
        Where `loss.kind` is neither softmax nor sampled-softmax.
    """
    config = experiment.model
    if not len(users):
        return torch.zeros(())
    stops, _ = sequences.stops(users, "train")
    histories = stops - sequences.offsets[users]
    width = int(np.clip(histories.max() - 1, 1, config.max_length))
    ends = stops
    if experiment.federation.local.window == "random":
        starts = np.maximum(0, histories - (config.max_length + 1)) + 1  # places where a whole window may begin
        ends = stops - uniform_integers(experiment.seed, "window", step, users, 1, 2**31)[:, 0] * starts // 2**31
    places, lengths = sequences.places(users, ends, width + 1)
    real = torch.from_numpy(np.arange(1, width + 1) < lengths[:, None])  # (B, L)
    window = torch.from_numpy(np.where(places < 0, 0, sequences.items[places]).astype(np.int64))
    masks = None
    if config.dropout:
        shape = (len(users), width, model.sites, config.dim)
        bits = uniform_bits(experiment.seed, "dropout-0", step, users, int(np.prod(shape[1:])))
        masks = torch.from_numpy(keep_mask(bits, config.dropout)).view(shape)
    items, table = model.item.count, model.item()  # (I, D)
    hidden = model(window[:, :-1], masks, _known(experiment, sequences, places[:, :-1]), table)  # (B, L, D)
    if sequences.target >= 0 and experiment.federation.local.predict == "target" and sequences.behaviours is not None:
        real &= torch.from_numpy(sequences.behaviours[places[:, 1:]] == sequences.target)
    came = window[:, 1:][real]  # (T,)
    if not len(came):
        return torch.zeros(())
    domain = torch.zeros(items) if sequences.domains is None else torch.tensor(sequences.domains)
    cold = cold_of(experiment.data, items)
    if experiment.loss.kind not in LOSSES:
        raise ValueError(f"the centralised loop knows {' and '.join(LOSSES)}, not {experiment.loss.kind}")
    if experiment.loss.kind == "softmax":
        scores = model.score_all(hidden, real, table).index_fill(1, torch.tensor(cold), -torch.inf)
        return F.cross_entropy(scores.masked_fill(domain != domain[came].unsqueeze(-1), -torch.inf), came)
    warm = np.setdiff1d(np.arange(items), cold)
    wanted = min(getattr(experiment.loss, "negatives", 0), len(warm))
    negatives = np.sort(generator(experiment.seed, "negatives", step).choice(warm, wanted, replace=False))
    learnt = sequences.events if experiment.federation.local.predict == "all" else sequences.had
    owned, owner = learnt(users, stops)
    known = np.zeros((len(users), items), dtype=bool)
    known[owner, owned] = True
    allowed = torch.from_numpy(~known[:, negatives]).unsqueeze(1).expand(-1, width, -1)[real]  # (T, N)
    positive = model.score_each(hidden, real, F.embedding(window[:, 1:], table))  # (T,)
    allowed = allowed & (domain[torch.from_numpy(negatives)] == domain[came].unsqueeze(-1))
    negative = model.score_all(hidden, real, table[torch.from_numpy(negatives)]).masked_fill(~allowed, -torch.inf)
    logits = torch.cat([positive.unsqueeze(-1), negative], -1)
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64))


def test_ranks(experiment: Experiment, model: SASRec, sequences: Sequences) -> NDArray[np.float64]:
    """Rank of every user's test item, one user at a time, NaN where there is none; ties at their expectation."""
    ranks = np.full(len(sequences), np.nan)
    with torch.no_grad():
        table = model.item()  # (I, D)
        for user in range(len(sequences)):
            place, start = int(sequences.test[user]), int(sequences.offsets[user])
            if place < start:
                continue
            if place == start:  # nothing is known: all items of the domain tie
                own = sequences.domains
                rivals = model.item.count if own is None else int((own == own[sequences.items[place]]).sum())
                ranks[user] = (rivals + 1) / 2
                continue
            history = torch.from_numpy(sequences.items[start:place].astype(np.int64))
            places = np.arange(max(start, place - model.longest), place)[None]
            known = _known(experiment, sequences, places)
            hidden = model(history[None, -model.longest :], None, known, table)[0]  # (L, D)
            scores = model.score_last(hidden, table)  # (I,)
            target = int(sequences.items[place])
            others = torch.ones(len(scores), dtype=torch.bool)
            others[history if sequences.target < 0 else history[sequences.targets(np.arange(start, place))]] = False
            if sequences.domains is not None:
                others &= torch.from_numpy(sequences.domains == sequences.domains[target])
            others[target] = False
            better, equal = (scores[others] > scores[target]).sum(), (scores[others] == scores[target]).sum()
            ranks[user] = 1 + int(better) + int(equal) / 2
    return ranks


def _known(experiment: Experiment, sequences: Sequences, places: Ints) -> dict[str, Tensor]:
    """All that the data tells of some events, ``(B, L)`` each."""
    told = {"times": torch.from_numpy(sequences.times[places] // sequences.per_second)}
    names = [each.names for each in experiment.model.inputs if isinstance(each, BehaviourInput)]
    if names and sequences.behaviours is not None:
        numbers = {number: names[0].index(name) for number, name in enumerate(sequences.behaviour_names)}
        told["behaviours"] = torch.tensor(sequences.behaviours[places].astype(np.int64)).apply_(numbers.__getitem__)
    if sequences.ratings is not None:
        told["ratings"] = torch.from_numpy(sequences.ratings[places])
    return told
