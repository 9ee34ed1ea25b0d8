"""Every way to mix, the sparse ones too: against a slow reference with loops, by hand, and what must not matter."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from common.models import mixing
from common.models.mixing import (
    additive,
    dot_product,
    interval_buckets,
    linear_attention,
    scaled_dot_product,
    time_aware,
)
from common.models.sparse import entmax, local, top_k

C, H, L, K, B = 3, 2, 7, 4, 5
ALL = slice(None)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(*shape, seed=1):
    return [draw(*shape, seed=seed + i) for i in range(3)]


VECTOR, KEY_TABLE, VALUE_TABLE = draw(C, H, K), draw(C, B, K, seed=8), draw(C, B, K, seed=9)
BUCKETS = torch.randint(B, (C, L, L), generator=torch.Generator().manual_seed(0))
BIAS = draw(L, L, seed=7) + torch.full((L, L), -torch.inf).triu(1)
KINDS = {  # of queries, keys, values and the users that they are of
    "scaled_dot_product": lambda q, k, v, users: scaled_dot_product(q, k, v),
    "dot_product": lambda q, k, v, users: dot_product(q, k, v),
    "additive": lambda q, k, v, users: additive(q, k, v, VECTOR[users].to(q)),
    "time_aware": lambda q, k, v, users: time_aware(
        q, k, v, BUCKETS[users], KEY_TABLE[users].to(q), VALUE_TABLE[users].to(q)
    ),
    "local": lambda q, k, v, users: local(q, k, v, 3),
    "top_k": lambda q, k, v, users: top_k(q, k, v, 2),
    "entmax": lambda q, k, v, users: entmax(q, k, v),
    "linear_attention": lambda q, k, v, users: linear_attention(q, k, v, chunk=2),
}
BIASED = {
    "scaled_dot_product": scaled_dot_product,
    "dot_product": dot_product,
    "additive": lambda q, k, v, bias: additive(q, k, v, VECTOR, bias),
    "time_aware": lambda q, k, v, bias: time_aware(q, k, v, BUCKETS, KEY_TABLE, VALUE_TABLE, bias),
    "top_k": lambda q, k, v, bias: top_k(q, k, v, 2, bias),
    "entmax": entmax,
}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_biased = pytest.mark.parametrize("kind", BIASED)


# --- references ------------------------------------------------------------------------------------------------------


def softmax(scores):
    top = max(scores)
    weights = [math.exp(s - top) for s in scores]
    return [w / sum(weights) for w in weights]


def strongest(scores, k=2):
    least = sorted(scores, reverse=True)[:k][-1]
    return softmax([s if s >= least else -math.inf for s in scores])


def bisected(scores):
    """1.5-entmax by its definition: the threshold at which the weights sum to one."""
    low, high = max(scores) / 2 - 1, max(scores) / 2
    for _ in range(100):
        middle = (low + high) / 2
        total = sum(max(s / 2 - middle, 0) ** 2 for s in scores)
        low, high = (middle, high) if total > 1 else (low, middle)
    return [max(s / 2 - low, 0) ** 2 for s in scores]


def phi(x):
    return torch.where(x > 0, x + 1, x.exp())


SCORES = {  # of the query at i and the key at j of user c, head h
    "dot_product": lambda q, k, c, h, i, j: float(q @ k),
    "additive": lambda q, k, c, h, i, j: float(sum(VECTOR[c, h, n] * math.tanh(q[n] + k[n]) for n in range(K))),
    "time_aware": lambda q, k, c, h, i, j: float(q @ (k + KEY_TABLE[c, BUCKETS[c, i, j]])) / math.sqrt(K),
    "linear_attention": lambda q, k, c, h, i, j: math.log(phi(q) @ phi(k)),
}
WEIGHTS = {"top_k": strongest, "entmax": bisected, "local": lambda s: softmax([-math.inf] * len(s[:-3]) + s[-3:])}


def reference(kind, query, key, value, bias=None):
    score = SCORES.get(kind, lambda q, k, c, h, i, j: float(q @ k) / math.sqrt(len(q)))
    out = torch.zeros_like(value)
    for c, h, i in product(*map(range, query.shape[:3])):
        scores = [
            score(query[c, h, i], key[c, h, j], c, h, i, j) + (0.0 if bias is None else float(bias[i, j]))
            for j in range(i + 1)
        ]
        for j, weight in enumerate(WEIGHTS.get(kind, softmax)(scores)):
            extra = VALUE_TABLE[c, BUCKETS[c, i, j]] if kind == "time_aware" else 0
            out[c, h, i] += weight * (value[c, h, j] + extra)
    return out


# --- every kind ------------------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("shape", [(C, H, L, K), (1, 1, 1, K), (2, 1, 2, K), (1, 2, 6, K)])
def test_as_the_reference(kind, shape):
    q, k, v = inputs(*shape)
    users, heads, length = shape[:3]
    if kind == "additive":
        mixed = additive(q, k, v, VECTOR[:users, :heads])
    elif kind == "time_aware":
        buckets = BUCKETS[:users, :length, :length]
        mixed = time_aware(q, k, v, buckets, KEY_TABLE[:users], VALUE_TABLE[:users])
    else:
        mixed = KINDS[kind](q, k, v, ALL)
    assert mixed.shape == shape
    assert torch.allclose(mixed, reference(kind, q, k, v), atol=1e-10)


@each_biased
def test_biased_as_the_reference(kind):
    q, k, v = inputs(C, H, L, K)
    mixed = BIASED[kind](q, k, v, BIAS)
    assert torch.allclose(mixed, reference(kind, q, k, v, BIAS), atol=1e-10)
    assert torch.allclose(mixed, BIASED[kind](q, k, v, BIAS.expand(C, 1, L, L)), atol=1e-10)


@each_kind
def test_the_first_event_sees_itself(kind):
    q, k, v = inputs(C, H, L, K)
    own = VALUE_TABLE[range(C), BUCKETS[:, 0, 0]].unsqueeze(1) if kind == "time_aware" else 0
    assert torch.allclose(KINDS[kind](q, k, v, ALL)[:, :, 0], v[:, :, 0] + own)


@each_kind
@pytest.mark.parametrize("cut", range(1, L))
def test_later_events_change_nothing(kind, cut):
    xs = [x.float() for x in inputs(C, H, L, K)]
    before = KINDS[kind](*xs, ALL)
    for x, other in zip(xs, inputs(C, H, L, K, seed=20), strict=True):
        x[:, :, cut:] = 100 * other[:, :, cut:].float()
    after = KINDS[kind](*xs, ALL)
    assert torch.allclose(before[:, :, :cut], after[:, :, :cut], atol=1e-6, rtol=0)
    assert not torch.allclose(before[:, :, cut], after[:, :, cut], atol=1e-2)


@each_kind
def test_earlier_results_have_no_gradient_in_later_events(kind):
    xs = [x.float().requires_grad_() for x in inputs(C, H, L, K)]
    KINDS[kind](*xs, ALL)[:, :, :4].square().sum().backward()
    for x in xs:
        assert not x.grad[:, :, 4:].any()
        assert x.grad[:, :, 1:4].any()


@each_kind
def test_users_never_mix(kind):
    xs = inputs(C, H, L, K)
    together = KINDS[kind](*xs, ALL)
    for user in range(C):
        alone = KINDS[kind](*(x[user : user + 1] for x in xs), slice(user, user + 1))
        assert torch.allclose(together[user], alone[0], atol=1e-12)


@each_kind
def test_heads_never_mix(kind):
    xs = inputs(C, H, L, K)
    before = KINDS[kind](*xs, ALL)
    for x in xs:
        x[:, 1] += 1
    after = KINDS[kind](*xs, ALL)
    assert torch.allclose(before[:, 0], after[:, 0], atol=1e-12)
    assert not torch.allclose(before[:, 1], after[:, 1])


@each_kind
def test_gradients(kind):
    xs = [x[:2].requires_grad_() for x in inputs(C, H, L, K)]
    assert gradcheck(lambda q, k, v: KINDS[kind](q, k, v, slice(2)), xs)


@each_biased
def test_gradients_of_a_learnt_bias(kind):
    bias = draw(L, L, seed=7).requires_grad_()
    future = torch.full((L, L), -torch.inf).triu(1)
    xs = inputs(C, H, L, K)
    assert gradcheck(lambda b: BIASED[kind](*xs, b + future)[:, :1, ::3], [bias])


def test_gradients_of_weights():
    q, k, v = inputs(C, H, L, K)
    vector, tables = VECTOR[0].clone().requires_grad_(), [KEY_TABLE[0].clone(), VALUE_TABLE[0].clone()]
    assert gradcheck(lambda w: additive(q, k, v, w), [vector])
    assert gradcheck(lambda a, b: time_aware(q, k, v, BUCKETS, a, b), [x.requires_grad_() for x in tables])


@each_kind
@pytest.mark.parametrize("size", [0.0, 1e4, -1e4])
def test_finite_at_extremes(kind, size):
    signs = [x.sign().float() for x in inputs(C, H, L, K)]
    xs = [100 * signs[0], abs(size) * signs[1], signs[2]]  # scaled scores up to 2 · 10⁶
    if size < 0:  # all features of the linear kind vanish
        xs[:2] = [torch.full_like(x, size) for x in xs[:2]]
    xs = [x.requires_grad_() for x in xs]
    mixed = KINDS[kind](*xs, ALL)
    mixed.sum().backward()
    assert mixed.isfinite().all()
    assert all(x.grad.isfinite().all() for x in xs)


def test_shared_weights_are_stacked_weights():
    q, k, v = inputs(C, H, L, K)
    stacked = additive(q, k, v, VECTOR[:1].expand(C, H, K))
    assert torch.allclose(additive(q, k, v, VECTOR[0]), stacked, atol=1e-12)
    tables = KEY_TABLE[:1].expand(C, B, K), VALUE_TABLE[:1].expand(C, B, K)
    shared = time_aware(q, k, v, BUCKETS, KEY_TABLE[0], VALUE_TABLE[0])
    assert torch.allclose(shared, time_aware(q, k, v, BUCKETS, *tables), atol=1e-12)


class Largest(TorchDispatchMode):
    """Notes how many float64 the largest new tensor could hold."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [x for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, torch.Tensor)]
        self.size = max([self.size, *(x.untyped_storage().nbytes() // 8 for x in tensors)])
        return out


@pytest.mark.parametrize(
    ("mix", "most"),
    [
        (lambda q, k, v: additive(q, k, v, draw(1, 8)), 4096),  # a block
        (lambda q, k, v: time_aware(q, k, v, torch.zeros(1, 256, 256).long(), draw(4, 8), draw(4, 8)), 256 * 256),
        (lambda q, k, v: local(q, k, v, 8), 256 * 128),  # pairs of positions, of a block and the one before
        (lambda q, k, v: linear_attention(q, k, v, chunk=8), 33 * 8 * 9),
    ],
    ids=["additive", "time_aware", "local", "linear_attention"],
)
def test_memory(mix, most, monkeypatch):
    monkeypatch.setattr(mixing, "BLOCK_BYTES", 8 * 4096)
    monkeypatch.setattr(mixing, "causal", lambda bias, like: torch.zeros(()).expand(256, 256))  # L² whoever asks
    with torch.no_grad(), Largest() as largest:
        mix(*inputs(1, 1, 256, 8))
    assert largest.size <= most


# --- single kinds ----------------------------------------------------------------------------------------------------


def test_scaled_dot_product_is_torchs_multihead_attention():
    layer = nn.MultiheadAttention(H * K, H, bias=False, batch_first=True).double()
    x = draw(C, L, H * K)
    projected = (x @ layer.in_proj_weight.mT).view(C, L, 3, H, K).permute(2, 0, 3, 1, 4)
    mixed = scaled_dot_product(*projected).transpose(1, 2).flatten(2) @ layer.out_proj.weight.mT
    expected, _ = layer(x, x, x, attn_mask=torch.ones(L, L).triu(1).bool(), need_weights=False)
    assert torch.allclose(mixed, expected, atol=1e-10)


def test_scaled_and_plain_by_hand():
    # Width 4: logits of 2 ln 3 and 0 weigh the two values 9 : 1, scaled by 1 / 2 only 3 : 1.
    query, value = torch.ones(1, 1, 2, 4), torch.tensor([[10.0] * 4, [20.0] * 4]).view(1, 1, 2, 4)
    key = torch.tensor([[math.log(3) / 2] * 4, [0.0] * 4]).view(1, 1, 2, 4)
    assert dot_product(query, key, value)[0, 0, 1].tolist() == pytest.approx([11.0] * 4)
    assert scaled_dot_product(query, key, value)[0, 0, 1].tolist() == pytest.approx([12.5] * 4)


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 7])
def test_blocks_of_additive_change_nothing(rows, monkeypatch):
    q, k, v = inputs(C, H, L, K)
    expected = additive(q, k, v, VECTOR, BIAS)
    monkeypatch.setattr(mixing, "BLOCK_BYTES", rows * C * H * L * K * 8)
    assert torch.allclose(additive(q, k, v, VECTOR, BIAS), expected, atol=1e-12)


def test_time_aware_without_tables_is_scaled_dot_product():
    q, k, v = inputs(C, H, L, K)
    none = torch.zeros(B, K, dtype=torch.float64)
    assert torch.allclose(time_aware(q, k, v, BUCKETS, none, none), scaled_dot_product(q, k, v), atol=1e-12)


def test_interval_buckets_by_hand():
    times = torch.tensor([[100, 110, 110, 150, 7], [5, 5, 5, 8, 9]])  # the last is padding; then all ties, then padding
    linear = interval_buckets(times, torch.tensor([4, 3]), 6, "linear")
    assert linear[0].tolist() == [[0] * 5, [1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [5, 4, 4, 0, 0], [0] * 5]
    assert not linear[1].any()
    assert interval_buckets(times, torch.tensor([4, 3]), 4, "linear")[0, 3].tolist() == [3, 3, 3, 0, 0]
    shrinks = torch.tensor([[0, 60, 70]])  # the unit is a minute until the third event, and ten seconds from then on
    assert interval_buckets(shrinks, torch.tensor([3]), 9, "linear")[0].tolist() == [[0, 0, 0], [1, 0, 0], [7, 1, 0]]
    log = interval_buckets(times, torch.tensor([4, 5]), 28)
    assert log[0, 3].tolist() == [2, 2, 2, 0, 0]  # log2 of 6, 5, 5, 1
    assert log[1, 4].tolist() == [2, 2, 2, 1, 0]  # log2 of 5, 5, 5, 2, 1
    assert interval_buckets(times, torch.tensor([4, 3]), 84)[0, 3].tolist() == [7, 6, 6, 0, 0]  # ⌊3 log2 6⌋ = 7
    assert interval_buckets(times, torch.tensor([0, 1]), 9).tolist() == [[[0] * 5] * 5] * 2
    years = torch.tensor([[0, 1, 2**28, 2**40]])
    assert interval_buckets(years, torch.tensor([4]), 56)[0].tolist() == [
        [0] * 4,
        [2, 0, 0, 0],
        [55, 55, 0, 0],
        [55, 55, 55, 0],
    ]
    assert interval_buckets(times[:, :1], torch.tensor([1, 0]), 9).tolist() == [[[0]], [[0]]]
    with pytest.raises(ValueError, match="scale"):
        interval_buckets(times, torch.tensor([4, 3]), 6, "cubic")


@pytest.mark.parametrize("scale", ["log", "linear"])
@given(gaps=st.lists(st.integers(0, 10**8), max_size=8), count=st.integers(1, 300), unit=st.integers(1, 1000))
@settings(max_examples=30, deadline=None)
def test_interval_buckets(scale, gaps, count, unit):
    times = torch.tensor([[0, *gaps]]).cumsum(-1)
    length = torch.tensor([len(gaps) + 1])
    buckets = interval_buckets(times, length, count, scale)
    assert (buckets == buckets.tril()).all()
    assert 0 <= buckets.min() <= buckets.max() < count
    assert (buckets[0, -1].diff() <= 0).all()  # farther back, no smaller
    if any(gaps):  # else the unit is a second whatever the scale of time
        assert (interval_buckets(unit * times + 10**9, length, count, scale) == buckets).all()
    padded = interval_buckets(torch.cat([times, times[:, -1:] + 1], 1), length, count, scale)
    assert (padded[:, :-1, :-1] == buckets).all()
    assert not padded[:, -1].any()
    later = torch.cat([times, times[:, -1:] + 1], 1)
    assert (interval_buckets(later, length + 1, count, scale)[:, :-1, :-1] == buckets).all()  # blind to what comes


@given(length=st.integers(1, 9), chunk=st.integers(1, 10))
@settings(max_examples=30, deadline=None)
def test_linear_attention_is_quadratic_attention(length, chunk):
    q, k, v = inputs(2, 2, length, 3)
    weights = (phi(q) @ phi(k).mT).tril()
    expected = weights / weights.sum(-1, keepdim=True) @ v
    assert torch.allclose(linear_attention(q, k, v, chunk), expected, atol=1e-12)
    assert torch.allclose(linear_attention(q, k, v), expected, atol=1e-12)
