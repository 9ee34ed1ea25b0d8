"""Target attention: by hand, against loops, and what must not matter."""

import math
from itertools import product

import pytest
import torch
from torch.autograd import gradcheck

from common.models.target import target_scores, target_scores_last

C, H, L, K, N = 3, 2, 7, 4, 6


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(dtype=torch.float64):
    """Keys and values of histories, queries and values of candidates."""
    return [draw(*shape, seed=i).to(dtype) for i, shape in enumerate([(C, H, L, K)] * 2 + [(C, N, H, K)] * 2)]


def reference(keys, values, queries, candidates):
    out = torch.zeros(C, L, N, dtype=torch.float64)
    for c, t, n, h in product(range(C), range(L), range(N), range(H)):
        logits = [float(queries[c, n, h] @ keys[c, h, j]) / math.sqrt(K) for j in range(t + 1)]
        weights = [math.exp(min(max(s, -30.0), 30.0)) for s in logits]
        matches = [float(values[c, h, j] @ candidates[c, n, h]) for j in range(t + 1)]
        out[c, t, n] += sum(w * m for w, m in zip(weights, matches, strict=True)) / sum(weights)
    return out


@pytest.mark.parametrize("size", [1.0, 30.0])  # the greater ones are clamped here and there
def test_target_scores_as_the_reference(size):
    keys, values, queries, candidates = inputs()
    expected = reference(size * keys, values, queries, candidates)
    assert torch.allclose(target_scores(size * keys, values, queries, candidates), expected, atol=1e-10)


def test_target_scores_by_hand():
    # The first event weighs 3 : 1 against the second, and matches the candidate by 2 against 6.
    keys, values = torch.tensor([[[[math.log(3)], [0.0]]]]), torch.tensor([[[[2.0], [6.0]]]])
    one = torch.ones(1, 1, 1)
    assert target_scores(keys, values, one, one).flatten().tolist() == pytest.approx([2.0, 3.0])


@pytest.mark.parametrize("size", [1.0, 30.0])
def test_the_last_target_scores_are_those_at_the_last_position(size):
    keys, values, queries, candidates = inputs()
    lengths = torch.tensor([L, 1, 4])
    full = target_scores(size * keys, values, queries, candidates)
    last = target_scores_last(size * keys, values, queries, candidates, lengths)
    assert torch.allclose(last, full[range(C), lengths - 1], atol=1e-12)
    empty = target_scores_last(keys, values, queries, candidates, torch.zeros(C, dtype=torch.int64))
    assert empty.isfinite().all()


def test_shared_candidates_are_stacked_candidates():
    keys, values, queries, candidates = inputs()
    shared, stacked = (queries[0], candidates[0]), [x[:1].expand(C, N, H, K) for x in (queries, candidates)]
    assert torch.allclose(target_scores(keys, values, *shared), target_scores(keys, values, *stacked), atol=1e-12)
    lengths = torch.tensor([L, 1, 4])
    last = [target_scores_last(keys, values, *each, lengths) for each in (shared, stacked)]
    assert torch.allclose(*last, atol=1e-12)


def test_target_scores_are_causal_and_ones_own():
    keys, values, queries, candidates = inputs(torch.float32)
    before = target_scores(keys, values, queries, candidates)
    keys[:, :, 4:], values[:, :, 4:] = 100 * values[:, :, 4:], -keys[:, :, 4:]
    after = target_scores(keys, values, queries, candidates)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])
    alone = target_scores(keys[1:2], values[1:2], queries[1:2, 2:3], candidates[1:2, 2:3])
    assert torch.allclose(alone[0, :, 0], after[1, :, 2], atol=1e-5)


def test_a_targets_history_has_no_order():
    keys, values, queries, candidates = inputs()
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    before = target_scores(keys, values, queries, candidates)
    after = target_scores(keys[:, :, order], values[:, :, order], queries, candidates)
    assert torch.allclose(before[:, -1], after[:, -1], atol=1e-12)
    assert not torch.allclose(before[:, 2], after[:, 2])


def test_gradients_of_target_scores():
    xs = [x[:2, :2, :3].clone().requires_grad_() for x in inputs()]
    assert gradcheck(target_scores, xs)
    assert gradcheck(lambda *xs: target_scores_last(*xs, torch.tensor([3, 2])), xs)


@pytest.mark.parametrize("last", [False, True])
def test_target_scores_at_extremes(last):
    keys, values, queries, candidates = (x.requires_grad_() for x in inputs(torch.float32))
    lengths = [torch.tensor([L, 1, 4])] if last else []
    scores = (target_scores_last if last else target_scores)(1e4 * keys, 100 * values, queries, candidates, *lengths)
    scores.sum().backward()
    assert scores.isfinite().all()
    assert all(x.grad.isfinite().all() for x in (keys, values, queries, candidates))
