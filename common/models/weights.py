"""The model's weights as two tensors: the item table and everything else in one flat vector.

Two tensors are all that travel, train, step and are stored; names exist only where the model reads them. A *stacked*
pair carries one copy per user of a cohort in front, ``(C, …)``; a *shared* pair has no such dimension. Every function
of this package takes both.
"""

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from common.models.schema import ModelConfig
from common.models.shapes import ITEM_TABLE, parameter_shapes
from common.seeding import generator


class Weights(NamedTuple):
    """One set of weights, or one update of them."""

    table: Tensor
    """Item embeddings, ``(I, D)`` shared or ``(C, R, D)`` stacked, float32; R rows that a user touches."""
    body: Tensor
    """All other parameters in the order of `parameter_shapes`, ``(P,)`` or ``(C, P)``, float32."""


def body_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters inside `Weights.body`, in order."""
    return {name: shape for name, shape in parameter_shapes(config, items=0).items() if name != ITEM_TABLE}


def body_size(config: ModelConfig) -> int:
    """Number of parameters in `Weights.body`."""
    return sum(prod(shape) for shape in body_shapes(config).values())


def named(config: ModelConfig, body: Tensor) -> dict[str, Tensor]:
    """Views into a body by parameter name.

    Parameters
    ----------
    config : ModelConfig
        The model.
    body : Tensor
        ``(P,)`` or ``(C, P)``.

    Returns
    -------
    dict of str to Tensor
        Each of its shape in `parameter_shapes`, with C in front where the body is stacked. One `split` makes them all,
        so the backward pass is one concatenation rather than one dense scatter per parameter.
    """
    shapes = body_shapes(config)
    parts = torch.split(body, [prod(shape) for shape in shapes.values()], dim=-1)
    return {
        name: part.reshape(*body.shape[:-1], *shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def initialise(config: ModelConfig, items: int, seed: int) -> Weights:
    """Fresh weights: normal numbers, norms at one, biases at zero, target attention at the identity.

    Their standard deviation is .02, in recurrent layers and convolutions one over the root of their inputs.

    Parameters
    ----------
    config : ModelConfig
        The model.
    items : int
        Size of the catalogue.
    seed : int
        The experiment's seed; equal seeds give equal bits.
    """
    rng = generator(seed, "initial-weights")

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.from_numpy(rng.standard_normal(shape, dtype="float32")) * 0.02

    def parts() -> Iterator[Tensor]:
        for name, shape in body_shapes(config).items():
            if name.endswith(("bias", "adapter_up")):
                yield torch.zeros(shape)
            elif len(shape) == 1:
                yield torch.ones(shape)
            elif name.startswith("front."):
                yield draw(shape) * (50 / shape[-1] ** 0.5)  # as wide as their inputs are many: gates of .02 are shut
            elif name.startswith("target."):
                yield draw(shape) + torch.eye(config.dim)  # an item begins by looking for what is like itself
            elif config.start == "mean" and name.endswith(("qkv.weight", "out.weight")):
                drawn = draw(shape)
                drawn[-config.dim :] += torch.eye(config.dim)  # the values of queries, keys and values
                yield drawn
            else:
                yield draw(shape)

    table = draw((items, config.dim))
    return Weights(table, torch.cat([part.flatten() for part in parts()]))
