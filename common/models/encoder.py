"""SASRec's encoder, written once for a cohort of users."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.config import ModelConfig
from common.models.alike import LayerNorm, Tap
from common.models.attention import multi_head, recency_bias


def linear(x: Tensor, weight: Tensor | Tap, bias: Tensor | None = None) -> Tensor:
    """Affine map with shared or stacked weights.

    Parameters
    ----------
    x : Tensor
        ``(C, L, in)``.
    weight, bias : Tensor or Tap
        Shared ``(out, in)`` and ``(out,)``, or stacked ``(C, out, in)`` and ``(C, out)``; the bias may be left away.

    Returns
    -------
    Tensor
        ``(C, L, out)``.
    """
    if isinstance(weight, Tap):
        return weight.linear(x, bias)
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    return torch.bmm(x, weight.mT) if bias is None else torch.baddbmm(bias.unsqueeze(-2), x, weight.mT)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Layer normalisation over the last dimension (Ba et al., arXiv 1607.06450); arguments as in `linear`."""
    if weight.dim() == 1:
        return F.layer_norm(x, x.shape[-1:], weight, bias)
    if weight.stride(0) == 0:
        same: Tensor = LayerNorm.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return same
    return torch.addcmul(bias.unsqueeze(-2), F.layer_norm(x, x.shape[-1:]), weight.unsqueeze(-2))


def dropout_sites(config: ModelConfig) -> int:
    """Number of ``(L, D)`` masks that one pass of one user consumes: the embedding, then two per block."""
    return 1 + 2 * config.blocks


def encode(config: ModelConfig, parameters: Mapping[str, Any], x: Tensor, masks: Tensor | None = None) -> Tensor:
    """Hidden state after each event: what the user may want next (Kang & McAuley, ICDM 2018; pre-LN).

    Positions count from the start of the window. Attention weights have no dropout of their own, since the fused
    kernel could not draw it from our keyed streams; embeddings and the outputs of both sublayers have.

    Parameters
    ----------
    config : ModelConfig
        The model.
    parameters : Mapping of str to Tensor
        From `common.models.weights.named`; shared or stacked.
    x : Tensor
        Item embeddings of each window, right-padded, ``(C, L, D)``, L ≤ ``config.max_length``.
    masks : Tensor, optional
        Scaled dropout masks ``(C, L, dropout_sites, D)``; none in evaluation. Positions first, so that a longer padding
        draws the same masks.

    Returns
    -------
    Tensor
        ``(C, L, D)``; positions past a window's end hold finite numbers without meaning.
    """

    def add_dropped(x: Tensor, y: Tensor, site: int) -> Tensor:
        return x + y if masks is None else torch.addcmul(x, y, masks[:, :, site])

    length = x.shape[-2]
    bias = None
    if config.position == "recency":
        bias, x = recency_bias(length, config.recency), x * config.dim**0.5  # as below, without positions
    else:
        x = torch.add(parameters["position"][..., :length, :], x, alpha=config.dim**0.5)  # (C, L, D)
    x = x if masks is None else x * masks[:, :, 0]
    for block in range(config.blocks):
        p = {name: parameters[f"blocks.{block}.{name}"] for name in (_BLOCK if config.ffn else _ATTENTION)}
        h = layer_norm(x, p["norm1.weight"], p["norm1.bias"])
        h = multi_head(linear(h, p["qkv.weight"]), config.heads, bias)
        x = add_dropped(x, linear(h, p["out.weight"], p["out.bias"]), 2 * block + 1)
        if not config.ffn:
            continue
        h = layer_norm(x, p["norm2.weight"], p["norm2.bias"])
        h = F.gelu(linear(h, p["up.weight"], p["up.bias"]))
        x = add_dropped(x, linear(h, p["down.weight"], p["down.bias"]), 2 * block + 2)
    return layer_norm(x, parameters["norm.weight"], parameters["norm.bias"])


_ATTENTION = ("qkv.weight", *(f"{layer}.{part}" for layer in ("norm1", "out") for part in ("weight", "bias")))
_BLOCK = (*_ATTENTION, *(f"{layer}.{part}" for layer in ("norm2", "up", "down") for part in ("weight", "bias")))
