"""Event by event against a pass over the whole window: every kind, at every prefix, past the window's end."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client import online
from client.evaluation import final_scores
from client.online import Session
from common.models.attention import Setting, attention_weights
from common.models.inputs import Moments
from common.models.last import buckets_of_last, weights_of_last
from common.models.mixing import interval_buckets
from common.models.schema import ModelConfig, TimeAware
from tests.support import world
from tests.support.kinds import ATTENTION

ITEMS, LONGEST, CLOSE = 20, 7, 1e-5
ENCODERS = ("attention", "gru-attention", "cnn-attention")
PAIRS = [*product(ATTENTION, ENCODERS), ("scaled-dot-product", "gru")]
INPUTS = [
    {"kind": "behaviour", "names": ["view", "buy"]},
    {"kind": "rating"},
    {"kind": "hour"},
    {"kind": "weekday"},
    {"kind": "interval", "buckets": 20},
]
EVENTS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7]  # twice the window, with repeats
TIMES = [100, 100, 107, 110, 110, 4000, 4001, 4001, 4001, 90_000, 90_060, 10**7, 10**7, 10**7 + 5]  # with ties


def model(kind="scaled-dot-product", **rest):
    given = {"dim": 8, "heads": 2, "max_length": LONGEST, "attention": {"kind": kind, **ATTENTION[kind]}}
    return ModelConfig.model_validate(given | rest)


def session(config, items=ITEMS):
    return Session(config, world.weights(config, items))


def facts(items, times):
    """All that may be known of some events."""
    return {
        "times": times,
        "behaviours": [item % 2 for item in items],
        "ratings": [float("nan") if item % 3 == 2 else item % 7 for item in items],
    }


def whole(config, items, times):
    """A full pass over the last events."""
    window, when = items[-config.max_length :], times[-config.max_length :]
    lengths = torch.tensor([len(window)])
    known = {name: torch.tensor([values]) for name, values in facts(window, when).items()}
    weights = world.weights(config, ITEMS)
    with torch.no_grad():
        return final_scores(config, weights, torch.tensor([window]), lengths, Moments(lengths=lengths, **known))[0]


def gaps(config, one, items=EVENTS, times=TIMES):
    """Difference to a full pass after each event."""
    for n, (item, time) in enumerate(zip(items, times, strict=True), start=1):
        known = facts([item], [time])
        scored = one.append(item, time, known["behaviours"][0], known["ratings"][0])
        yield float((scored - whole(config, items[:n], times[:n])).abs().max())


# --- equal to a full pass --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["dot-product", "target"])
@pytest.mark.parametrize(("kind", "encoder"), PAIRS)
def test_each_event_gives_what_a_full_pass_gives(kind, encoder, head):
    for heads, ffn in ((1, 0), (2, 1), (4, 2)):
        config = model(kind, encoder=encoder, head=head, heads=heads, ffn=ffn)
        assert max(gaps(config, session(config))) < CLOSE


@pytest.mark.parametrize("head", ["dot-product", "target"])
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("kind", [kind for kind in ATTENTION if kind not in {"local", "linear"}])
def test_recency_too(kind, encoder, head):
    config = model(kind, encoder=encoder, head=head, position="recency", recency=0.7)
    assert max(gaps(config, session(config))) < CLOSE


@pytest.mark.parametrize(
    "rest",
    [
        {"attention": {"kind": "time-aware", "buckets": 5, "scale": "linear"}},
        {"attention": {"kind": "top-k", "k": 1}},
        {"attention": {"kind": "top-k", "k": 50}},
        {"attention": {"kind": "local", "window": 1}},
        {"attention": {"kind": "local", "window": 50}},
        {"encoder": "cnn-attention", "kernel": 1},
        {"encoder": "cnn-attention", "kernel": 12},
        {"blocks": 1},
        {"blocks": 3},
        {"max_length": 1},
        {"inputs": INPUTS},
        {"inputs": INPUTS, "encoder": "gru", "head": "target"},
        {"inputs": INPUTS, "position": "recency", "attention": {"kind": "time-aware"}},
        *({"inputs": [each]} for each in INPUTS),
        {"max_length": 1, "encoder": "gru", "head": "target"},
    ],
    ids=str,
)
def test_odd_sizes(rest):
    config = model(**rest)
    assert max(gaps(config, session(config))) < CLOSE


@settings(max_examples=40)
@given(st.data())
def test_any_history_in_any_pieces(data):
    kind, encoder = data.draw(st.sampled_from(PAIRS))
    config = model(kind, encoder=encoder, head=data.draw(st.sampled_from(["dot-product", "target"])), inputs=INPUTS)
    one, items, times = session(config), [], []
    for n in data.draw(st.lists(st.integers(1, 2 * LONGEST), min_size=1, max_size=4)):
        new = data.draw(st.lists(st.integers(0, ITEMS - 1), min_size=n, max_size=n))
        steps = data.draw(st.lists(st.sampled_from([0, 0, 1, 9, -4, 3600, 10**8]), min_size=n, max_size=n))
        when = [(times[-1] if times else 0) + sum(steps[: i + 1]) for i in range(n)]  # clocks may go back
        items, times = items + new, times + when
        one.extend(new, facts(new, when))
        assert (one.scores() - whole(config, items, times)).abs().max() < CLOSE
    assert one.seen == set(items)


@pytest.mark.parametrize("kind", [kind for kind in ATTENTION if kind not in {"linear", "local", "time-aware"}])
@pytest.mark.parametrize("recency", [False, True])
def test_weights_are_the_last_row_of_all(kind, recency):
    torch.manual_seed(0)
    config, heads, length = model(kind).attention, 2, 9
    qkv = torch.randn(1, length, 24)
    qkv[:, 4] = qkv[:, 2]  # a tie, which top-k keeps
    bias = -0.1 * torch.arange(length - 1.0, -1, -1) if recency else None
    vector = torch.randn(heads, 4) if kind == "additive" else None
    full = None if bias is None else torch.full((length, length), -torch.inf).triu(1) + bias
    expected = attention_weights(qkv, heads, Setting(config, {"vector": vector}, full))[0, :, -1]
    query, keys, _ = qkv.view(length, 3, heads, 4).permute(1, 2, 0, 3)
    found = weights_of_last(config, query[:, -1], keys, bias, vector)
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(found.sum(-1), torch.ones(heads))


def test_all_that_tie_with_the_kth_stay():
    kind = model("top-k").attention.model_copy(update={"k": 2})
    found = weights_of_last(kind, torch.ones(1, 1), torch.tensor([[[2.0], [1.0], [1.0], [0.0]]]))
    assert (found > 0).tolist() == [[True, True, True, False]]


@given(st.lists(st.sampled_from([0, 0, 1, 5, -3, 3600, 10**8]), min_size=1, max_size=12), st.booleans())
def test_buckets_are_the_last_row_of_all(steps, linear):
    kind = TimeAware(kind="time-aware", buckets=40, scale="linear" if linear else "log")
    times = torch.tensor(steps).cumsum(0)
    expected = interval_buckets(times[None], torch.tensor([len(steps)]), 40, kind.scale)[0, -1]
    assert torch.equal(buckets_of_last(times, kind), expected)


# --- mistakes that these tests would see -----------------------------------------------------------------------------


def stale(monkeypatch):
    encode = Session._encode
    monkeypatch.setattr(Session, "_encode", lambda one, first: encode(one, one._length - 1))


def never_zeroed(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "zero_", lambda part: part)


def seconds(monkeypatch):
    buckets = online.buckets_of_last
    monkeypatch.setattr(online, "buckets_of_last", lambda times, kind: buckets(times, kind).clamp(max=3))


@pytest.mark.parametrize(
    ("mistake", "rest"),
    [
        (stale, {}),
        (stale, {"kind": "local"}),
        (never_zeroed, {"kind": "linear"}),
        (never_zeroed, {"encoder": "gru"}),
        (never_zeroed, {"encoder": "cnn-attention"}),
        (never_zeroed, {"head": "target"}),
        (seconds, {"kind": "time-aware"}),
    ],
)
def test_a_planted_mistake_is_seen(monkeypatch, mistake, rest):
    mistake(monkeypatch)
    config = model(**rest)
    assert max(gaps(config, session(config))) > 100 * CLOSE


# --- what a session is -----------------------------------------------------------------------------------------------

EACH = pytest.mark.parametrize(
    ("kind", "head"), [*product(["linear", "time-aware", "top-k"], ["dot-product", "target"])]
)


@EACH
def test_a_new_history_knows_nothing_of_the_old(kind, head):
    config = model(kind, head=head, encoder="gru-attention")
    one = session(config)
    first = [one.append(*event) for event in zip(EVENTS, TIMES, strict=True)]
    one.reset()
    assert not one.seen
    with pytest.raises(ValueError, match="no event yet"):
        one.scores()
    again = [one.append(*event) for event in zip(EVENTS, TIMES, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@EACH
def test_two_people_by_turns(kind, head):
    config = model(kind, head=head, encoder="cnn-attention")
    one = session(config)
    other = one.fresh()
    for n in range(1, len(EVENTS) + 1):
        mine = one.append(EVENTS[n - 1], TIMES[n - 1])
        theirs = other.append(EVENTS[-n], TIMES[n - 1])
        assert (mine - whole(config, EVENTS[:n], TIMES[:n])).abs().max() < CLOSE
        assert (theirs - whole(config, EVENTS[::-1][:n], TIMES[:n])).abs().max() < CLOSE
    assert one._table is other._table


def test_scores_are_the_callers_own():
    one = session(model())
    scored = one.append(3)
    kept = scored.clone()
    scored[list(one.seen)] = -torch.inf
    assert torch.equal(one.scores(), kept)


def test_weights_that_learn_are_only_read():
    config = model("entmax-1.5")
    weights = world.weights(config, ITEMS)
    for part in weights:
        part.requires_grad_()
    assert not Session(config, weights).append(3).requires_grad


@pytest.mark.parametrize("kind", ["scaled-dot-product", "time-aware"])
def test_what_cannot_be_taken_changes_nothing(kind):
    config = model(kind)
    one = session(config)
    before = one.append(3, 10)
    for bad in ([ITEMS], [-1], [2, ITEMS]):
        with pytest.raises(IndexError, match="from 0 to 19"):
            one.extend(bad, facts([0] * len(bad), [11] * len(bad)))
    if config.timed:
        with pytest.raises(ValueError, match="wants the times of events"):
            one.append(4)
        with pytest.raises((ValueError, RuntimeError)):  # torch's
            one.append(4, 2**80)
    one.extend([], {"times": []})
    assert torch.equal(one.scores(), before)
    assert one.seen == {3}


def test_what_the_model_looks_at_must_be_told():
    one = session(model(inputs=INPUTS))
    before = one.append(3, 10, 1)  # no rating is one that counts as nothing
    for why, missing in (("times", {"behaviour": 0}), ("behaviours", {"time": 11})):
        with pytest.raises(ValueError, match=f"wants the {why} of events"):
            one.append(4, **missing)
    for behaviour in (-1, 2):
        with pytest.raises(IndexError, match="from 0 to 1"):
            one.append(4, 11, behaviour)
    assert torch.equal(one.scores(), before)


def test_memory_does_not_grow():
    one = session(model(encoder="gru-attention", head="target"))
    empty = one.nbytes
    for item in EVENTS:
        one.append(item)
    assert one.nbytes == empty


def test_a_stack_of_weights_is_refused():
    config = model()
    table, body = world.weights(config, ITEMS)
    with pytest.raises(ValueError, match="not a stack"):
        Session(config, world.Weights(table[None], body[None]))
