"""SASRec's encoder, written once for a cohort of users."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from common.config import ModelConfig
from common.models.attention import multi_head


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Affine map with shared or stacked weights.

    Parameters
    ----------
    x : Tensor
        ``(C, L, in)``.
    weight, bias : Tensor
        Shared ``(out, in)`` and ``(out,)``, or stacked ``(C, out, in)`` and ``(C, out)``.

    Returns
    -------
    Tensor
        ``(C, L, out)``.
    """
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    return bias.unsqueeze(-2).baddbmm(x, weight.mT) if x.dim() == 3 else x @ weight.mT + bias.unsqueeze(-2)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Layer normalisation over the last dimension (Ba et al., arXiv 1607.06450); arguments as in `linear`."""
    if weight.dim() == 1:
        return F.layer_norm(x, x.shape[-1:], weight, bias)
    return F.layer_norm(x, x.shape[-1:]) * weight.unsqueeze(-2) + bias.unsqueeze(-2)


def dropout_sites(config: ModelConfig) -> int:
    """Number of ``(L, D)`` masks that one pass of one user consumes: the embedding, then two per block."""
    return 1 + 2 * config.blocks


def encode(config: ModelConfig, parameters: Mapping[str, Tensor], x: Tensor, masks: Tensor | None = None) -> Tensor:
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
        Scaled dropout masks ``(C, dropout_sites, L, D)``; none in evaluation.

    Returns
    -------
    Tensor
        ``(C, L, D)``; positions past a window's end hold finite numbers without meaning.
    """

    def drop(y: Tensor, site: int) -> Tensor:
        return y if masks is None else y * masks[:, site]

    length = x.shape[-2]
    x = drop(x * config.dim**0.5 + parameters["position"][..., :length, :], 0)  # (C, L, D)
    for block in range(config.blocks):
        p = {name: parameters[f"blocks.{block}.{name}"] for name in _BLOCK}
        h = layer_norm(x, p["norm1.weight"], p["norm1.bias"])
        h = multi_head(linear(h, p["qkv.weight"], p["qkv.bias"]), config.heads)
        x = x + drop(linear(h, p["out.weight"], p["out.bias"]), 2 * block + 1)
        h = layer_norm(x, p["norm2.weight"], p["norm2.bias"])
        h = F.gelu(linear(h, p["up.weight"], p["up.bias"]))
        x = x + drop(linear(h, p["down.weight"], p["down.bias"]), 2 * block + 2)
    return layer_norm(x, parameters["norm.weight"], parameters["norm.bias"])


_BLOCK = tuple(
    f"{layer}.{kind}" for layer in ("norm1", "qkv", "out", "norm2", "up", "down") for kind in ("weight", "bias")
)
