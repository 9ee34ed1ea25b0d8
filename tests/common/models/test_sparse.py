"""The sparse ways to mix, each on its own; what they share with all others is tested with these."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.models import sparse
from common.models.mixing import scaled_dot_product
from common.models.sparse import entmax15, local, top_k

C, H, L, K = 3, 2, 7, 4


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(*shape):
    return [draw(*shape, seed=1 + i) for i in range(3)]


def bisected(scores):
    """1.5-entmax by its definition: the threshold at which the weights sum to one."""
    halves = scores / 2
    high = halves.amax(-1, keepdim=True)
    low = high - 1
    for _ in range(100):
        middle = (low + high) / 2
        much = (halves - middle).clamp(min=0).square().sum(-1, keepdim=True) > 1
        low, high = torch.where(much, middle, low), torch.where(much, high, middle)
    return (halves - low).clamp(min=0).square()


@given(window=st.integers(1, 12), length=st.integers(1, 12), block=st.sampled_from([1, 2, 3, 5, 64]))
@settings(max_examples=60, deadline=None)
def test_local_is_masked_dense_attention(window, length, block):
    q, k, v = inputs(2, 2, length, 3)
    back = torch.arange(length).unsqueeze(-1) - torch.arange(length)
    bias = torch.zeros(length, length).masked_fill((back < 0) | (back >= window), -torch.inf)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "BLOCK", block)
        assert torch.allclose(local(q, k, v, window), scaled_dot_product(q, k, v, bias), atol=1e-12)


def test_top_k():
    q, k, v = inputs(C, H, L, K)
    assert torch.allclose(top_k(q, k, v, L), scaled_dot_product(q, k, v), atol=1e-12)
    assert torch.allclose(top_k(q, k, v, L + 5), scaled_dot_product(q, k, v), atol=1e-12)
    best = (q @ k.mT + torch.full((L, L), -torch.inf).triu(1)).argmax(-1, keepdim=True).expand(-1, -1, -1, K)
    assert torch.allclose(top_k(q, k, v, 1), v.gather(2, best), atol=1e-12)
    ties = top_k(q, torch.zeros_like(k), v, 1)  # all stay
    assert torch.allclose(ties, v.cumsum(2) / torch.arange(1, L + 1).view(-1, 1), atol=1e-12)


def test_entmax_by_hand():
    # Halves 0.5 and 0: (0.5 − τ)² + τ² = 1 at τ = (0.5 − √1.75) / 2. Two equals share; a gap of 2 leaves one.
    tau = (0.5 - math.sqrt(1.75)) / 2
    rows = torch.tensor([[1.0, 0.0, -math.inf], [3.0, 3.0, 0.0], [2.0, 0.0, 0.0]], dtype=torch.float64)
    expected = torch.tensor([[(0.5 - tau) ** 2, tau**2, 0.0], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    assert torch.allclose(entmax15(rows), expected, atol=1e-12)
    assert torch.allclose(entmax15(rows.T, dim=0), expected.T, atol=1e-12)


LEVELS = st.sampled_from([-math.inf, -1e4, -2.5, -1.0, 0.0, 0.1, 0.2, 0.9, 1.7])


@given(rows=st.lists(st.tuples(*[LEVELS] * 5), min_size=1, max_size=4), shift=st.sampled_from([0.0, 1e4]))
@settings(max_examples=60, deadline=None)
def test_entmax_by_definition(rows, shift):
    scores = torch.tensor([[*row, 0.3] for row in rows], dtype=torch.float64) + shift
    weights = entmax15(scores)
    assert torch.allclose(weights, bisected(scores), atol=1e-9)
    assert torch.allclose(weights.sum(-1), torch.ones(len(rows), dtype=torch.float64))
    assert not weights[scores <= scores.amax(-1, keepdim=True) - 2].any()
    assert torch.allclose(entmax15(scores.float()).double(), entmax15(scores.float().double()), atol=1e-6)


def test_entmax_of_many():
    scores = 3 * draw(4, 2000, dtype=torch.float32)
    scores[:, 1000:] = -torch.inf
    scores.requires_grad_()
    weights = entmax15(scores)
    (weights * draw(4, 2000, seed=1).float()).sum().backward()
    assert torch.allclose(weights.sum(-1), torch.ones(4), atol=1e-5)
    assert 0 < (weights > 0).sum() < 400
    assert not scores.grad[weights == 0].any()
    assert scores.grad.sum(-1).abs().max() < 1e-5  # a shift of all scores changes nothing


def test_entmax_of_what_is_no_number_is_no_number_and_the_others_stay():
    scores = draw(3, 5)
    whole = entmax15(scores)
    scores[1] = math.nan
    found = entmax15(scores)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], whole[[0, 2]])
    assert entmax15(torch.full((2, 3), math.nan)).isnan().all()
