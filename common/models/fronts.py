"""What may stand in front of the attention blocks: a recurrent layer, or a causal convolution."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.models.linear import linear


def convolved(x: Tensor, weight: Any, bias: Tensor, kernel: int) -> Tensor:
    """A causal convolution with GELU, as in NextItNet (Yuan et al., WSDM 2019) without dilation.

    Each position sees itself and the `kernel` − 1 events before it, side by side, by one linear map.

    Parameters
    ----------
    x : Tensor
        ``(C, L, D)``.
    weight, bias : Tensor or Tap
        ``(D, kernel · D)`` and ``(D,)``, or stacked; the oldest event first.
    kernel : int
        Events that a position sees.

    Returns
    -------
    Tensor
        ``(C, L, D)``.
    """
    padded = F.pad(x, (0, 0, kernel - 1, 0))
    windows = padded.unfold(1, kernel, 1).mT.flatten(2)  # (C, L, kernel · D)
    return F.gelu(linear(windows, weight, bias))


def recurrent(x: Tensor, weight: Any, bias: Tensor, again: Tensor, again_bias: Tensor) -> Tensor:
    """A gated recurrent unit (Cho et al., EMNLP 2014), as `torch.nn.GRU` computes it.

    A state needs the one before it, so this is the one place that loops over positions.

    Parameters
    ----------
    x : Tensor
        ``(C, L, D)``.
    weight, bias : Tensor or Tap
        Of the input: reset, update and new gate, ``(3D, D)`` and ``(3D,)``, or stacked.
    again, again_bias : Tensor
        Of the state, alike.

    Returns
    -------
    Tensor
        State after each position, ``(C, L, D)``.
    """
    given = linear(x, weight, bias)  # (C, L, 3D)
    state, states = x.new_zeros(len(x), x.shape[2]), []
    for position in range(x.shape[1]):
        remembered = linear(state.unsqueeze(1), again, again_bias).squeeze(1)  # (C, 3D)
        reset, update, new = given[:, position].chunk(3, dim=-1)
        reset_again, update_again, new_again = remembered.chunk(3, dim=-1)
        gate = torch.sigmoid(update + update_again)
        fresh = torch.tanh(new + torch.sigmoid(reset + reset_again) * new_again)
        state = torch.lerp(fresh, state, gate)
        states.append(state)
    return torch.stack(states, dim=1)


def front(encoder: str, kernel: int, p: Mapping[str, Any], x: Tensor) -> Tensor:
    """The layer that an encoder begins with, of normalised inputs ``(C, L, D)``; `p` by names without ``front.``."""
    if encoder == "cnn-attention":
        return convolved(x, p["weight"], p["bias"], kernel)
    return recurrent(x, p["weight"], p["bias"], p["recurrent"], p["recurrent_bias"])
