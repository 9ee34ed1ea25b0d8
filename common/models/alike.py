"""Layers at weights that are the same for all users, where each user's own gradient is wanted all the same.

The forward pass and the gradient of the input are then one product for everybody, as with shared weights; a batched
product of C small matrices takes up to half as long again. The gradient of a linear layer's weight is not even made:
it stays in its two factors, of which norm and weighted sum follow (ghost norms: Li et al., ICLR 2022; book-keeping: Bu
et al., ICML 2023).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

SLACK = 1e-6
"""What single precision may lose of a ghost norm's square, in parts of what would be there if nothing cancelled."""


class Outer:
    """Gradients of C users' weights, Σ over positions of left · rightᵀ, unmultiplied.

    Parameters
    ----------
    left, right : Tensor
        ``(C, L, out)`` and ``(C, L, in)``; as a tensor it would be ``(C, out, in)``.
    """

    def __init__(self, left: Tensor, right: Tensor):
        self._left, self._right = left, right

    def __getitem__(self, users: Tensor | slice) -> "Outer":
        """Those of some users."""
        return Outer(self._left[users], self._right[users])

    def __mul__(self, factor: float) -> "Outer":
        """All of them times a number."""
        return Outer(self._left * factor, self._right)

    def whole(self) -> Tensor:
        """As a tensor, ``(C, out, in)``."""
        return torch.bmm(self._left.mT, self._right)

    def weighted(self, scale: Tensor) -> Tensor:
        """Σ scale · gradient over users, ``(C,) → (out, in)``."""
        return (self._left * scale.view(-1, 1, 1)).flatten(0, 1).T @ self._right.flatten(0, 1)

    def squares(self) -> Tensor:
        """Squared Frobenius norm of each gradient, never too small, ``(C,)`` float64.

        ‖Σ l rᵀ‖² is the sum over pairs of positions of (l · l')(r · r'). What rounding may have lost where the pairs
        cancel is added.
        """
        pairs = torch.bmm(self._left, self._left.mT).mul_(torch.bmm(self._right, self._right.mT))  # (C, L, L)
        most = (self._left.norm(dim=-1) * self._right.norm(dim=-1)).sum(-1).double().square()
        squares: Tensor = pairs.sum((1, 2), dtype=torch.float64).clamp(min=0.0) + SLACK * most
        return squares


class Tap:
    """One linear layer's weight ``(out, in)``, the same for all users; where each user's own gradient is caught.

    It is kept in factors where windows are short. Pairs of positions in long ones are dearer than the gradient itself,
    which is then made while its factors are in the caches.
    """

    def __init__(self, weight: Tensor):
        self._weight = weight
        self._gradient: Tensor | Outer | None = None

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``(C, L, in) → (C, L, out)``, the bias ``(C, out)`` alike; once in a pass."""
        y: Tensor = _Linear.apply(x, bias, self)  # type: ignore[no-untyped-call]
        return y

    @property
    def gradient(self) -> Tensor | Outer:
        """What the backward pass left here, ``(C, out, in)``."""
        if self._gradient is None:
            raise ValueError("no backward pass has come by")
        return self._gradient

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The map itself."""
        return F.linear(x, self._weight, bias)

    def catch(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Keep the weight's gradient; return the input's."""
        if self._gradient is not None:
            raise ValueError("a layer is used twice in one pass")
        caught, (out, in_) = Outer(gradient, x.detach()), self._weight.shape
        self._gradient = caught if x.shape[1] * (out + in_) <= out * in_ else caught.whole()
        return gradient @ self._weight


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, tap: Tap) -> Tensor:
        ctx.save_for_backward(x)
        ctx.tap = tap
        return tap.forward(x, None if bias is None else bias[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (x,) = ctx.saved_tensors
        return ctx.tap.catch(x, gradient), gradient.sum(1) if ctx.needs_input_grad[1] else None, None


class LayerNorm(torch.autograd.Function):
    """`common.models.encoder.layer_norm` for weights that are stacked but not copied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """``(C, L, D), (C, D), (C, D) → (C, L, D)``."""
        y, mean, scale = torch.native_layer_norm(x, x.shape[-1:], weight[0], bias[0], 1e-5)
        ctx.save_for_backward(x, weight, bias, mean, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the input, and each user's of weight and bias."""
        x, weight, bias, mean, scale = ctx.saved_tensors
        shape, wanted = x.shape[-1:], [True, False, False]
        of_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            gradient, x, shape, mean, scale, weight[0], bias[0], wanted
        )
        return of_x, torch.addcmul(-mean * scale, x, scale).mul_(gradient).sum(1), gradient.sum(1)
