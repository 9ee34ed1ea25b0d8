"""Layers with weights that are shared by a cohort, stacked, or alike for all (see `common.models.alike`)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from common.models.alike import LayerNorm, Tap


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


def lookup(table: Tensor, index: Tensor) -> Tensor:
    """Rows of a table, shared ``(R, D)`` or each user's own ``(C, R, D)``, at ``(C, L)`` → ``(C, L, D)``."""
    if table.dim() == 2:
        return F.embedding(index, table)
    c, r, d = table.shape
    return F.embedding(index + torch.arange(c).unsqueeze(-1) * r, table.reshape(c * r, d))
