"""Explanations: by hand, complete, of every kind of model, and right where the causes are known."""

import sys
import warnings
from itertools import product

import numpy as np
import pytest
import torch

from client import explaining
from client.evaluation import final_scores
from client.explaining import attention, ends, explain, integrated_gradients, rollout, split
from client.past import Past, apart, log_probability, past_of
from common.errors import UsageError
from common.models.inputs import Moments
from common.models.items import Mixture
from common.models.weights import Weights
from tests.support import kinds, world

ITEMS = 24
HISTORIES = [[3, 5, 7, 9], [11, 2, 4, 6, 8, 1, 13, 14, 20, 21, 22], [10], [17, 16]]
GOALS = torch.tensor([1, 0, 23, 5])
KINDS = {**kinds.KINDS, "inputs": {"inputs": [{"kind": "interval"}, {"kind": "rating"}]}}
EACH_KIND = pytest.mark.parametrize("kind", KINDS)
needs_captum = pytest.mark.skipif("not __import__('importlib').util.find_spec('captum')", reason="needs Captum")


def past(histories=HISTORIES, padding=0, timed=True):
    width = padding + max(map(len, histories))
    items = torch.tensor([history + [19] * (width - len(history)) for history in histories])
    times = torch.cumsum(torch.tensor([[1, 60, 7, 86_400] * 10])[:, :width], 1).expand(len(items), width)
    facts = {"times": times, "ratings": 1 + torch.arange(width).expand(len(items), width) % 5.0}
    return Past(items, torch.tensor([*map(len, histories)]), facts if timed else None)


def setup(kind="scaled-dot-product", **model):
    config = world.experiment(model={"max_length": 16, "blocks": 2, **KINDS[kind], **model}).model
    return config, world.weights(config, ITEMS), past(timed=config.timed)


def known(facts, row, places):
    """Moments of some events of one history."""
    if facts is None:
        return None
    return Moments(lengths=torch.tensor([len(places)]), **{n: x[row : row + 1, places] for n, x in facts.items()})


def alone(config, weights, history, goal, moments):
    """Log-probability by ranking's own scores."""
    items = torch.tensor([history])
    scored = final_scores(config, weights, items, torch.tensor([len(history)]), moments)
    return float(scored.log_softmax(1)[0, goal])


# --- histories --------------------------------------------------------------------------------------------------------


def test_what_was_left_away_has_never_been():
    keep = torch.zeros(4, 11, dtype=torch.bool)
    keep[0, [0, 2, 7]] = keep[1, [1, 10]] = keep[2, 0] = keep[3, 1] = True
    short = past().only(keep)
    assert [row[:n].tolist() for row, n in zip(short.items, short.lengths, strict=True)] == [
        [3, 7],
        [2, 22],
        [10],
        [16],
    ]
    assert short.facts["times"][1, :2].tolist() == past().facts["times"][1, [1, 10]].tolist()
    assert short.items.shape == (4, 2)


@EACH_KIND
def test_log_probabilities_are_those_of_ranking(kind, monkeypatch):
    config, weights, whole = setup(kind)
    keep = torch.rand(4, 11, generator=torch.Generator().manual_seed(0)) < 0.6
    keep[:, 0] = True
    short = whole.only(keep)
    monkeypatch.setattr("client.past.ROWS", 3)
    found = log_probability(config, weights, short, GOALS)
    for row, n in enumerate(short.lengths):
        history, moments = short.items[row, :n].tolist(), known(short.facts, row, range(n))
        expected = alone(config, weights, history, GOALS[row], moments)
        assert float(found[row]) == pytest.approx(expected, abs=1e-4)


def test_histories_are_the_most_recent_events():
    data = world.sequences([[1, 2, 3, 4, 5], [6, 7]], held_out=False)
    config = world.experiment(model={"max_length": 3}).model
    found = past_of(config, data, np.array([1, 0]), data.offsets[[2, 1]])
    assert found.items.tolist() == [[6, 7, 0], [3, 4, 5]]
    assert found.lengths.tolist() == [2, 3]
    assert found.facts is None


@EACH_KIND
def test_rivals_are_of_ones_own_domain(kind):
    config, weights, whole = setup(kind)
    two = torch.arange(ITEMS) % 2
    found = log_probability(config, weights, whole._replace(domains=two).only(whole.real), GOALS)
    for row, (history, goal) in enumerate(zip(HISTORIES, GOALS.tolist(), strict=True)):
        one = whole.pick([row]).only(whole.real[[row]])
        scored = final_scores(config, weights, torch.tensor([history]), one.lengths, one.moments)[0]
        expected = scored[goal] - scored[goal % 2 :: 2].logsumexp(0)
        assert float(found[row]) == pytest.approx(float(expected), abs=1e-4)
    assert apart(torch.tensor([[1.0, 2, 3]]), torch.tensor([0, 1, 0]), torch.tensor([2])).tolist() == [[1, -np.inf, 3]]


@needs_captum
@EACH_KIND
def test_an_item_without_rivals_owes_nothing_to_any_event(kind):
    config, weights, whole = setup(kind)
    found = explain(config, weights, whole._replace(domains=torch.arange(ITEMS)), GOALS, steps=4)
    assert all((values == 0).all() for values in (found.combined, found.gradients, found.gap))


# --- rollout ----------------------------------------------------------------------------------------------------------


def test_rollout_by_hand():
    heads = torch.tensor([[[[1, 0], [0.2, 0.8]], [[1, 0], [0.6, 0.4]]]])  # (1, 2, 2, 2), their mean .4, .6
    second = torch.tensor([[[[1, 0], [0.2, 0.8]]]])
    last = rollout([heads, second], torch.tensor([[0.0, 1.0]]))
    assert last.tolist() == [pytest.approx([0.1 * 1 + 0.9 * 0.2, 0.9 * 0.8])]
    assert rollout([], torch.tensor([[0.25, 0.75]])).tolist() == [[0.25, 0.75]]


@EACH_KIND
def test_attention_is_shares_of_the_past(kind):
    config, weights, whole = setup(kind)
    found = attention(config, weights, whole, GOALS)
    if kind == "gru":
        assert found is None
        return
    assert torch.allclose(found.sum(1), torch.ones(4), atol=1e-5)
    assert (found >= -1e-6).all()
    assert (found[~whole.real].abs() < 1e-6).all()
    other = attention(config, weights, whole, (GOALS + 1) % ITEMS)
    assert torch.allclose(found, other) == (config.head != "target")


# --- gradients --------------------------------------------------------------------------------------------------------


@needs_captum
def test_integrated_gradients_of_a_line_by_hand(monkeypatch):
    slopes = torch.arange(1.0, 7).view(3, 2)

    def line(model, parameters, table, x, past, targets):
        real = torch.arange(3) < past.lengths[:, None]
        return ((x * slopes).sum(-1) * real).sum(1)

    monkeypatch.setattr(explaining, "log_softmax", line)
    config = world.experiment().model
    table = torch.tensor([[0.0, 0], [2, 4], [1, 2]])  # its mean 1, 2
    weights = Weights(table, world.weights(config, 3).body)
    found = integrated_gradients(config, weights, Past(torch.tensor([[0, 1, 2]]), torch.tensor([3])), torch.tensor([0]))
    assert torch.allclose(found.slopes, slopes, atol=1e-5)
    assert torch.allclose(found.events, torch.tensor([[-1 * 1 - 2 * 2, 1 * 3 + 2 * 4, 0.0]]), atol=1e-4)
    assert float(found.gap) < 1e-4


@needs_captum
@EACH_KIND
def test_gradients_are_complete(kind):
    """They sum to what the history gives beyond a history of average events."""
    config, weights, whole = setup(kind)
    found = integrated_gradients(config, weights, whole, GOALS, 128)
    usual = Weights(weights.table.mean(0).expand(ITEMS, -1), weights.body)
    for row, history in enumerate(HISTORIES):
        moments = known(whole.facts, row, range(len(history)))
        x = alone(config, weights, history, GOALS[row], moments)
        parameters = explaining.named(config, weights.body)
        vectors = usual.table[torch.tensor([history])]
        some = whole.pick([row]).only(whole.real[[row]])
        expected = x - float(explaining.log_softmax(config, parameters, weights.table, vectors, some, GOALS[[row]]))
        if "top-k" not in kind:  # which jumps on the way
            assert float(found.events[row].sum()) == pytest.approx(expected, abs=0.01 * max(1, abs(expected)))
        assert float(found.gap[row]) == pytest.approx(abs(float(found.events[row].sum()) - expected), abs=1e-3)
    assert (found.events[~whole.real] == 0).all()


@needs_captum
@EACH_KIND
def test_neither_padding_nor_company_matters(kind, monkeypatch):
    config, weights, whole = setup(kind)
    once = explain(config, weights, whole, GOALS, steps=8)
    padded = past(padding=4, timed=config.timed)
    lonely = [explain(config, weights, padded.pick([row]), GOALS[[row]], steps=8) for row in range(4)]
    monkeypatch.setattr(explaining, "ROWS", 8)  # a history at a time
    slowly = explain(config, weights, padded, GOALS, steps=8)
    for name in ("attention", "gradients", "combined"):
        one, again, each = (getattr(found, name) for found in (once, slowly, lonely[0]))
        assert (one is None) == (again is None) == (each is None) == (kind == "gru" and name == "attention")
        if one is not None:
            assert torch.isfinite(one).all()
            for other in (again, torch.cat([getattr(found, name) for found in lonely])):
                assert torch.allclose(one, other[:, :11], atol=1e-4), name
                assert (other[:, 11:].abs() < 1e-6).all()
    assert once.parts is None


@needs_captum
def test_what_cannot_be_seen_does_not_matter():
    config, weights, whole = setup("local", blocks=1)
    found = explain(config, weights, whole, GOALS, steps=8)
    assert (found.gradients[1, :8] == 0).all(), "a window of three events"
    assert found.gradients[1, 8:11].abs().min() > 0
    assert (found.attention[1, :8] == 0).all()


def test_without_captum_one_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(UsageError, match=r"pip install 'hushrec\[explain\]'"):
        integrated_gradients(*setup(), GOALS)


# --- the two ends -----------------------------------------------------------------------------------------------------


@EACH_KIND
def test_the_two_ends_by_hand(kind):
    config, weights, whole = setup(kind)
    found = ends(config, weights, whole, GOALS)
    made = Weights(torch.cat([weights.table, weights.table.mean(0, keepdim=True)]), weights.body)

    def value(row, places):
        history = [HISTORIES[row][place] for place in places] or [ITEMS]
        moments = known(whole.facts, row, list(places) or [0])
        scored = final_scores(config, made, torch.tensor([history]), torch.tensor([len(history)]), moments)
        return float(scored[:, :ITEMS].log_softmax(1)[0, GOALS[row]])

    for row, history in enumerate(HISTORIES):
        everywhere = range(len(history))
        firsts = [value(row, [place]) for place in everywhere]
        usual = np.mean(firsts) if len(history) > 1 else value(row, [])
        for place in everywhere:
            first = firsts[place] - usual
            last = value(row, everywhere) - value(row, [other for other in everywhere if other != place])
            assert float(found[row, place]) == pytest.approx((first + last) / 2, abs=1e-4)
        if len(history) == 1:  # then it is the Shapley value, the whole
            assert float(found[row].sum()) == pytest.approx(value(row, everywhere) - value(row, []), abs=1e-4)
    assert (found[~whole.real] == 0).all()


# --- features ---------------------------------------------------------------------------------------------------------


def mixture(own, fusion):
    """Items of two features, of two and three rows."""
    dense = torch.zeros(ITEMS, 5)
    for item in range(ITEMS - 1):  # the last has no features
        dense[item, item % 2] = 1
        dense[item, 2 + item % 3] = 0.5
    counts = None if not own else (torch.arange(ITEMS) % 4 > 0).float().unsqueeze(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
        pairs = [(part.to_sparse_csr(), part.T.to_sparse_csr()) for part in (dense, dense[:, :2], dense[:, 2:])]
    return dense, Mixture(*pairs[0], counts, (2, 3), fusion, tuple(pairs[1:]) if fusion == "gate" else ())


def pieces(dense, own, fusion, table):
    """What each row puts into each item's vector, ``(I, R, D)``; rows of gates nothing."""
    full = dense if own is None else torch.cat([torch.diag(own[:, 0]), dense], dim=1)
    sizes = [ITEMS, 2, 3][own is None :]
    kinds, dim = len(sizes), table.shape[1]
    kind = [m for m, size in enumerate(sizes) for _ in range(size)]
    found = torch.zeros(ITEMS, len(table), dim)
    for item, row in product(range(ITEMS), range(len(kind))):
        found[item, row] = full[item, row] * table[row]
        if fusion == "concatenation":
            found[item, row, [column for column in range(dim) if column * kinds // dim != kind[row]]] = 0
    if fusion == "gate":
        for item in range(ITEMS):
            each = [sum(found[item, row] for row in range(len(kind)) if kind[row] == m) for m in range(kinds)]
            weights = torch.stack([each[m] @ table[len(kind) + m] for m in range(kinds)]).softmax(0) * kinds
            found[item, : len(kind)] *= weights[kind, None]
    return found


@needs_captum
@pytest.mark.parametrize("fusion", ["sum", "concatenation", "gate"])
@pytest.mark.parametrize(("own", "kind"), product([False, True], ["scaled-dot-product", "target, time-aware"]))
def test_features_sum_to_their_event_and_count_by_what_is_theirs(own, kind, fusion):
    config, _, whole = setup(kind)
    dense, made = mixture(own, fusion)
    weights = world.weights(config, made.rows)
    found = explain(config, weights, whole, GOALS, made, steps=8)
    gradients = integrated_gradients(config, Weights(made.vectors(weights.table), weights.body), whole, GOALS, 8)
    assert torch.equal(found.gradients, gradients.events)
    total = torch.zeros_like(found.gradients)
    total.index_put_(tuple(found.parts.events.T), found.parts.values, accumulate=True)
    assert torch.allclose(total, found.gradients, atol=1e-4)

    each_piece = pieces(dense, made.own, fusion, weights.table)
    assert torch.allclose(each_piece.sum(1), made.vectors(weights.table), atol=1e-5)
    first = ITEMS if own else 0  # row of the features
    for (row, place), at, value in zip(*(part.tolist() for part in found.parts), strict=True):
        item = int(whole.items[row, place])
        each = (each_piece[item] - each_piece.mean(0)) @ gradients.slopes[row, place]  # (R,)
        if at < 0:
            expected = each[first : first + 5][dense[item] == 0].sum()
        elif at < first:
            assert at == item
            expected = each[:ITEMS].sum()
        else:
            assert dense[item, at - first] > 0
            expected = each[at]
        assert value == pytest.approx(float(expected), abs=1e-4)
    assert not split(made, weights.table, whole.pick([]), gradients.slopes[:0]).values.numel()
