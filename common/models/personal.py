"""What is a person's own: parameters that act on the last hidden state, and which parameters stay on the device."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from common.models.linear import linear
from common.models.schema import ModelConfig
from common.models.weights import body_shapes

Ints = NDArray[np.int64]


class Kept(NamedTuple):
    """Numbers that stay on the devices of C users, in the order of `kept_columns`."""

    users: Ints
    """``(C,)``, distinct."""
    values: Tensor
    """``(C, K)`` float32."""

    def of(self, users: Ints) -> "Kept":
        """Those of some of the users, in their order."""
        order = np.argsort(self.users)
        places = order[np.searchsorted(self.users, users, sorter=order)]
        return Kept(users, self.values[torch.from_numpy(places)])


def personalised(config: ModelConfig, parameters: Mapping[str, Any], hidden: Tensor) -> Tensor:
    """Hidden states as a person sees them (`model.personal`), ``(C, L, D) → (C, L, D)``; shared or stacked."""

    def beside(name: str, part: Tensor) -> Tensor:  # one a user stands beside all of the user's positions
        return part if parameters[name].dim() == 1 else part.unsqueeze(-2)

    if "adapter" in config.personal:
        narrow = F.gelu(linear(hidden, parameters["user.adapter_down"]))
        hidden = hidden + linear(narrow, parameters["user.adapter_up"])
    if "scale" in config.personal:
        hidden = hidden * beside("user.scale", parameters["user.scale"])
    if "bias" in config.personal:
        hidden = hidden + beside("user.bias", parameters["user.bias"])
    return hidden


def stays(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a parameter stays on the device, by shell patterns such as ``user.*``."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


@lru_cache(maxsize=16)
def kept_columns(config: ModelConfig, patterns: tuple[str, ...]) -> Tensor:
    """Places in a body of the parameters that stay on the device, ascending, ``(K,)`` int64."""
    sizes = {name: prod(shape) for name, shape in body_shapes(config).items()}
    mask = np.repeat([stays(name, patterns) for name in sizes], list(sizes.values()))
    return torch.from_numpy(np.flatnonzero(mask))


def bodies(config: ModelConfig, patterns: tuple[str, ...], body: Tensor, values: Tensor) -> Tensor:
    """Each user's body: the global one with its own numbers in their places, ``(P,), (C, K) → (C, P)``."""
    own = body.expand(len(values), -1).clone()
    own[:, kept_columns(config, patterns)] = values
    return own
