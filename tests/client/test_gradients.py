"""Gradients of item rows, in two parts: rows that all users read, and each user's own."""

from types import SimpleNamespace

import pytest
import torch

from client.gradients import Tables, _of_rows, _side_by_side, added
from client.step import Vectors
from common.models.alike import Outer


def test_vectors_are_summed_by_place_and_some_left_out():
    values = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]])
    place = torch.tensor([[0, 2], [0, 3]])
    assert added(3, place, values).tolist() == [[6.0, 8.0], [0.0, 0.0], [3.0, 4.0]]
    assert added(0, torch.zeros(2, 2, dtype=torch.int64), values).shape == (0, 2)


def test_an_event_counts_among_the_rows_that_its_item_has():
    """Two users, two shared rows, two of their own; the first's item is one of the negatives and comes twice."""
    problem = SimpleNamespace(
        shared=2,
        mixture=None,
        rows=torch.zeros(2, 4).numpy(),
        private=None,
        events=torch.tensor([[[1, 1, 2]], [[3, 2, 3]]]),
    )
    events = torch.arange(1.0, 7.0).view(2, 3, 1)
    tables = _of_rows(Vectors(events, torch.full((2, 2, 1), 10.0), None), problem, 0)
    assert tables.shared.squeeze(-1).tolist() == [[10.0, 13.0], [10.0, 10.0]]
    assert tables.own.squeeze(-1).tolist() == [[3.0, 0.0], [5.0, 10.0]]
    whole = Tables.split(torch.cat(tables, dim=1), 2)
    assert all(torch.equal(a, b) for a, b in zip(whole, tables, strict=True))


@pytest.mark.parametrize("order", ["vmvvm", "vvv", "m", "vmov"])
def test_vectors_that_follow_one_another_become_one_and_keep_their_order(order):
    torch.manual_seed(0)
    made = {"v": lambda: torch.randn(2, 3), "m": lambda: torch.randn(2, 2, 2)}
    made["o"] = lambda: Outer(torch.randn(2, 4, 2), torch.randn(2, 4, 3))
    parts = [made[kind]() for kind in order]

    def flat(parts):
        return torch.cat([(p.whole() if isinstance(p, Outer) else p).flatten(1) for p in parts], dim=1)

    joined = _side_by_side(parts)
    assert torch.equal(flat(joined), flat(parts))
    assert len(joined) == len([1 for a, b in zip(order, " " + order, strict=False) if a != "v" or b != "v"])
