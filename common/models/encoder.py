"""The encoder, written once for a cohort of users; by default SASRec's."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.models.attention import Setting, attention_weights, multi_head, recency_bias
from common.models.fronts import front
from common.models.inputs import Moments, embedded
from common.models.linear import layer_norm, linear
from common.models.mixing import interval_buckets
from common.models.personal import personalised
from common.models.schema import ModelConfig


def dropout_sites(config: ModelConfig) -> int:
    """Number of ``(L, D)`` masks that one pass of one user consumes: embedding, two per block, one in front."""
    return 1 + 2 * config.attends + (config.encoder != "attention")


def encode(
    config: ModelConfig,
    parameters: Mapping[str, Any],
    x: Tensor,
    masks: Tensor | None = None,
    moments: Moments | None = None,
    watched: list[Tensor] | None = None,
) -> Tensor:
    """Hidden state after each event: what the user may want next (Kang & McAuley, ICDM 2018; pre-LN).

    Positions count from the start of the window. Attention weights have no dropout of their own, since the fused
    kernel could not draw it from our keyed streams; embeddings and the outputs of all sublayers have.

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
    moments : Moments, optional
        When, and what else is known; wanted where the model looks at it.
    watched : list of Tensor, optional
        Each block's attention weights are put here, ``(C, H, L, L)``, to be looked at.

    Returns
    -------
    Tensor
        ``(C, L, D)``; positions past a window's end hold finite numbers without meaning.
    """

    def add_dropped(x: Tensor, y: Tensor, site: int) -> Tensor:
        return x + y if masks is None else torch.addcmul(x, y, masks[:, :, site])

    length = x.shape[-2]
    bias = None
    if "position" in parameters:
        x = torch.add(parameters["position"][..., :length, :], x, alpha=config.dim**0.5)  # (C, L, D)
    else:
        x = x * config.dim**0.5
        bias = recency_bias(length, config.recency) if config.position == "recency" else None
    if config.inputs:
        x = x + embedded(config, parameters, _known(moments))
    x = x if masks is None else x * masks[:, :, 0]
    if config.encoder != "attention":
        p = _of("front", parameters)
        h = front(config.encoder, config.kernel, p, layer_norm(x, p["norm.weight"], p["norm.bias"]))
        x = add_dropped(x, h, 2 * config.attends + 1)
    buckets = _buckets(config, moments) if config.intervals else None
    for block in range(config.attends):
        p = _of(f"blocks.{block}", parameters)
        h = layer_norm(x, p["norm1.weight"], p["norm1.bias"])
        qkv, setting = linear(h, p["qkv.weight"]), Setting(config.attention, p, bias, buckets)
        if watched is not None:
            watched.append(attention_weights(qkv, config.heads, setting))
        h = multi_head(qkv, config.heads, setting)
        x = add_dropped(x, linear(h, p["out.weight"], p["out.bias"]), 2 * block + 1)
        if not config.ffn:
            continue
        h = layer_norm(x, p["norm2.weight"], p["norm2.bias"])
        h = F.gelu(linear(h, p["up.weight"], p["up.bias"]))
        x = add_dropped(x, linear(h, p["down.weight"], p["down.bias"]), 2 * block + 2)
    hidden = layer_norm(x, parameters["norm.weight"], parameters["norm.bias"])
    return personalised(config, parameters, hidden) if config.personal else hidden


def _of(place: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of one place, by their names in it."""
    begin = len(place) + 1
    return {name[begin:]: part for name, part in parameters.items() if name.startswith(f"{place}.")}


def _known(moments: Moments | None) -> Moments:
    if moments is None:
        raise ValueError("this model wants to know more of events than their items")
    return moments


def _buckets(config: ModelConfig, moments: Moments | None) -> Tensor:
    times, lengths, *_ = _known(moments)
    if config.attention.kind != "time-aware":
        raise ValueError(f"attention {config.attention.kind} has no intervals")
    return interval_buckets(times, lengths, config.attention.buckets, config.attention.scale)
