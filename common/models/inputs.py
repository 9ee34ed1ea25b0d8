"""What of an event is looked at beside its item (``model.inputs``): each kind has vectors of its own."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.models.linear import lookup
from common.models.schema import InputConfig, IntervalInput, ModelConfig, RatingInput

HOUR, DAY = 3600, 24 * 3600
"""In seconds."""
_THURSDAY = 3
"""The first day of 1970, from Monday = 0."""


class Moments(NamedTuple):
    """When events happened, and what else is known of them; right-padded with anything."""

    times: Tensor
    """Seconds since 1970, UTC, ``(C, L)`` int64."""
    lengths: Tensor
    """Real events of each user, ``(C,)`` int64."""
    behaviours: Tensor | None = None
    """Place of each behaviour among the names that the model has, ``(C, L)`` int64."""
    ratings: Tensor | None = None
    """``(C, L)`` float32; NaN where there is none."""


def embedded(config: ModelConfig, parameters: Mapping[str, Any], moments: Moments) -> Tensor:
    """Sum of the vectors of all inputs of each event.

    Parameters
    ----------
    config : ModelConfig
        With at least one input.
    parameters : Mapping of str to Tensor
        Shared or stacked; those named ``inputs.`` are used.
    moments : Moments
        Of C users.

    Returns
    -------
    Tensor
        ``(C, L, D)``.

    Raises
    ------
    ValueError
        Where an input is not known of these events.
    """
    parts = [_vectors(each, parameters[f"inputs.{each.kind}"], moments) for each in config.inputs]
    total: Tensor = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
    return total


def _vectors(config: InputConfig, table: Tensor, moments: Moments) -> Tensor:
    if isinstance(config, RatingInput):
        place = (_known(moments.ratings, config) - config.low) / (config.high - config.low)  # (C, L)
        place = place.clamp(0, 1)
        weights = torch.stack([1 - place, place], dim=-1).nan_to_num(0.0).to(table.dtype)  # (C, L, 2)
        return weights @ table
    if config.kind == "behaviour":
        return lookup(table, _known(moments.behaviours, config))
    return lookup(table, _numbered(config, moments.times))


def _numbered(config: InputConfig, times: Tensor) -> Tensor:
    if isinstance(config, IntervalInput):
        gaps = times.diff(dim=-1, prepend=times[:, :1]).clamp(min=0)  # 0 at the first
        return (1 + gaps.double()).log2().long().clamp(max=config.buckets - 1)
    if config.kind == "hour":
        return times % DAY // HOUR
    return (times // DAY + _THURSDAY) % 7


def _known(values: Tensor | None, config: InputConfig) -> Tensor:
    if values is None:
        raise ValueError(f"model.inputs {config.kind}: not known of these events")
    return values
