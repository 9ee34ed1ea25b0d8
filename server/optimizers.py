"""Server optimisers: torch.optim on the global weights, with the negative mean update as the gradient.

Reddi et al., "Adaptive Federated Optimization", ICLR 2021, algorithm 2; torch's Adam corrects the bias of young
moments, the paper's does not.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, Optimizer

from common.config import OptimizerConfig
from common.errors import StateError
from common.models.weights import Weights

OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], OptimizerConfig], Optimizer]] = {
    "fedavg": lambda p, c: SGD(p, lr=c.lr),
    "fedavgm": lambda p, c: SGD(p, lr=c.lr, momentum=c.momentum),  # type: ignore[union-attr]
    "fedadam": lambda p, c: Adam(p, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps, fused=True),  # type: ignore[union-attr]
    "fedadagrad": lambda p, c: Adagrad(p, lr=c.lr, eps=c.eps),  # type: ignore[union-attr]
}
"""Optimiser by ``federation.optimizer.kind``."""


class ServerOptimizer:
    """Steps global weights along mean updates, in place, and packs its state into named tensors."""

    def __init__(self, config: OptimizerConfig, weights: Weights):
        self.weights = weights
        body = config.lr * getattr(config, "body", 1.0)
        groups: list[dict[str, Any]] = [{"params": [weights.table]}, {"params": [weights.body], "lr": body}]
        self._optimizer = OPTIMIZERS[config.kind](groups, config)

    def step(self, mean_update: Weights) -> None:
        """Move the weights along the cohort's mean update, tensors of the weights' shapes."""
        for weight, update in zip(self.weights, mean_update, strict=True):
            weight.grad = -update
        self._optimizer.step()
        for weight in self.weights:
            weight.grad = None

    def state(self) -> dict[str, Tensor]:
        """All moments and counters, by ``<tensor>.<name>``."""
        state = self._optimizer.state_dict()["state"]
        named = {Weights._fields[i]: values for i, values in state.items()}
        return {
            f"{field}.{name}": value
            for field, values in named.items()
            for name, value in values.items()
            if isinstance(value, Tensor)
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state` gave."""
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            field, _, name = key.partition(".")
            if field not in Weights._fields:
                raise StateError(f"the checkpoint holds an optimiser state that no tensor has: {key}; start a new run")
            state.setdefault(Weights._fields.index(field), {})[name] = value
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": state})


def mean_of(total: Weights, weight: float) -> Weights:
    """The mean update from a weighted sum and the sum of weights."""
    return Weights(*(torch.div(part, weight) for part in total))
