"""The server's step: by hand with two numbers, then that its state travels to the bit."""

import math

import pytest
import torch

from common.config import FedAdagrad, FedAdam, FedAvg, FedAvgM
from common.models.weights import Weights
from server.optimizers import ServerOptimizer, mean_of

CONFIGS = [
    FedAvg(kind="fedavg", lr=0.5),
    FedAvgM(kind="fedavgm", lr=0.5, momentum=0.9),
    FedAdam(kind="fedadam", lr=0.1),
    FedAdagrad(kind="fedadagrad", lr=0.1),
]


def two_numbers():
    return Weights(torch.tensor([[1.0]]), torch.tensor([-2.0]))


def update(table, body):
    return Weights(torch.tensor([[table]]), torch.tensor([body]))


def stepped(config, *updates):
    weights = two_numbers()
    optimizer = ServerOptimizer(config, weights)
    for each in updates:
        optimizer.step(update(*each))
    return [float(part) for part in weights]


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_fedavg_adds_the_mean_update_exactly():
    weights = Weights(torch.randn(50, 3), torch.randn(99))
    before = [part.clone() for part in weights]
    mean = Weights(torch.randn(50, 3), torch.randn(99))
    ServerOptimizer(FedAvg(kind="fedavg"), weights).step(mean)
    for part, begin, change in zip(weights, before, mean, strict=True):
        assert torch.equal(part, begin + change)


def test_fedavg_by_hand():
    assert stepped(FedAvg(kind="fedavg", lr=0.5), (2.0, -4.0), (1.0, 0.0)) == [2.5, -4.0]


def test_momentum_by_hand():
    # Buffers 2, −4; then .9·2 + 1 = 2.8 and .9·−4 + 0 = −3.6.
    found = stepped(FedAvgM(kind="fedavgm", lr=0.5, momentum=0.9), (2.0, -4.0), (1.0, 0.0))
    assert found == pytest.approx([1 + 1 + 1.4, -2 - 2 - 1.8])


def test_adam_by_hand():
    # Bias correction makes the first step lr · sign; the second by the definition.
    config = FedAdam(kind="fedadam", lr=0.1, beta1=0.9, beta2=0.98, eps=1e-8)
    assert stepped(config, (2.0, -4.0)) == pytest.approx([1.1, -2.1])
    first = (0.9 * 0.1 * 2 + 0.1 * 1) / (1 - 0.9**2)
    second = (0.98 * 0.02 * 4 + 0.02 * 1) / (1 - 0.98**2)
    assert stepped(config, (2.0, -4.0), (1.0, -4.0)) == pytest.approx([1.1 + 0.1 * first / math.sqrt(second), -2.2])


def test_eps_by_hand():
    assert stepped(FedAdam(kind="fedadam", lr=0.1, eps=2.0), (2.0, -6.0)) == pytest.approx([1 + 0.05, -2 - 0.075])


def test_adagrad_by_hand():
    config = FedAdagrad(kind="fedadagrad", lr=0.1)
    assert stepped(config, (3.0, -4.0)) == pytest.approx([1.1, -2.1])
    assert stepped(config, (3.0, -4.0), (4.0, 0.0)) == pytest.approx([1.1 + 0.1 * 4 / 5, -2.1])


def test_the_mean():
    mean = mean_of(Weights(torch.tensor([[6.0]]), torch.tensor([3.0])), 4.0)
    assert [float(part) for part in mean] == [1.5, 0.75]


# --- state -----------------------------------------------------------------------------------------------------------


def course(seed, n):
    generator = torch.Generator().manual_seed(seed)
    return [Weights(torch.randn(7, 3, generator=generator), torch.randn(11, generator=generator)) for _ in range(n)]


def fresh():
    return Weights(*(part.clone() for part in course(0, 1)[0]))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_going_on_from_a_stored_state_is_not_stopping(config):
    whole, half = fresh(), fresh()
    straight, first = ServerOptimizer(config, whole), ServerOptimizer(config, half)
    for each in course(1, 6):
        straight.step(each)
    for each in course(1, 6)[:3]:
        first.step(each)
    stored = {name: value.clone() for name, value in first.state().items()}
    second = ServerOptimizer(config, half)
    second.load(stored)
    assert {name: value.tolist() for name, value in second.state().items()} == {
        name: value.tolist() for name, value in stored.items()
    }
    for each in course(1, 6)[3:]:
        second.step(each)
    for a, b in zip(half, whole, strict=True):
        assert torch.equal(a, b)
    assert straight.state().keys() == second.state().keys()
    for name, value in straight.state().items():
        assert torch.equal(value, second.state()[name])


@pytest.mark.parametrize("config", CONFIGS[1:], ids=lambda config: config.kind)
def test_the_state_matters(config):
    with_, without = fresh(), fresh()
    for weights, keep in ((with_, True), (without, False)):
        optimizer = ServerOptimizer(config, weights)
        optimizer.step(course(1, 2)[0])
        if not keep:
            optimizer = ServerOptimizer(config, weights)
        optimizer.step(course(1, 2)[1])
    assert not torch.equal(with_.table, without.table)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_steps_are_in_place_and_leave_no_gradient(config):
    weights = fresh()
    optimizer = ServerOptimizer(config, weights)
    optimizer.step(course(1, 1)[0])
    assert optimizer.weights is weights
    assert all(part.grad is None for part in weights)
    assert not torch.equal(weights.table, fresh().table)
