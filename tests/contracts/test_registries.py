"""Every variant of the configuration has its entry in a registry, and no entry is without a variant."""

from typing import get_args

import pytest
import torch
from pydantic import TypeAdapter

from client.handlers import HANDLERS
from common.config import OptimizerConfig
from common.data.readers import READERS
from common.loss import LossConfig
from common.models.losses import LOSSES, Candidates, build_loss
from common.models.weights import Weights
from common.sources import DataConfig
from server.optimizers import OPTIMIZERS, ServerOptimizer

REGISTRIES = {
    "losses": (LossConfig, LOSSES),
    "optimizers": (OptimizerConfig, OPTIMIZERS),
    "readers": (DataConfig, READERS),
}


def kinds(union):
    return [get_args(variant.model_fields["kind"].annotation)[0] for variant in get_args(get_args(union)[0])]


@pytest.mark.parametrize("name", REGISTRIES)
def test_registry_and_variants_agree(name):
    union, registry = REGISTRIES[name]
    assert sorted(kinds(union)) == sorted(registry)


@pytest.mark.parametrize("kind", kinds(LossConfig))
def test_every_loss_is_one_finite_number_per_user_with_a_gradient(kind):
    loss = build_loss(TypeAdapter(LossConfig).validate_python({"kind": kind}), items=9)
    positive, negative = torch.randn(3, 4).requires_grad_(), torch.randn(3, 4, 9).requires_grad_()
    mask = torch.tensor([[True] * 4, [True, False, False, False], [False] * 4])
    values = loss(Candidates(positive, negative), torch.zeros(3, 4).long(), mask)
    assert values.shape == (3,)
    assert torch.isfinite(values).all()
    assert values[2] == 0
    (gradient,) = torch.autograd.grad(values.sum(), negative)
    assert gradient[mask].any()
    assert not gradient[~mask].any()


@pytest.mark.parametrize("kind", kinds(OptimizerConfig))
def test_every_optimizer_moves_along_the_update_and_stays_without_one(kind):
    config = TypeAdapter(OptimizerConfig).validate_python({"kind": kind})
    weights = Weights(torch.zeros(2, 2), torch.zeros(3))
    optimizer = ServerOptimizer(config, weights)
    optimizer.load({})  # as a run that starts afresh does
    optimizer.step(Weights(torch.zeros(2, 2), torch.zeros(3)))
    assert not any(part.any() for part in weights)
    optimizer.step(Weights(torch.full((2, 2), 0.5), torch.full((3,), -0.5)))
    assert (weights.table > 0).all()
    assert (weights.body < 0).all()


def test_clients_answer_what_flower_sends():
    assert HANDLERS.keys() == {"train", "evaluate", "query"}
