"""A linear map on updates before the clip: how the clipping norm is shared out among directions.

It hangs on the weights that everybody has been sent, and on nothing of a user's, so the clip after it bounds what a
user adds as before; whoever steps along the release only processes it further. So DP-SGD with public side information
does it (Li et al., ICML 2022, AdaDPS), except that here the side information is what has been released already.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.models.alike import Outer
from common.privacy.schema import Precondition


def preconditioned(
    settings: Precondition, released: Tensor, tables: Sequence[Tensor], parts: list[Tensor | Outer]
) -> tuple[Sequence[Tensor], list[Tensor | Outer]]:
    """Updates of C users, mapped.

    Parameters
    ----------
    settings : Precondition
        How much.
    released : Tensor
        The global item table that the users were sent, ``(I, D)``.
    tables : sequence of Tensor
        Of item rows, ``(C, …, D)`` each.
    parts : list of Tensor
        The body's parameters, ``(C, …)`` each.
    """
    if settings.body != 1:
        parts = [part * settings.body for part in parts]
    if settings.whiten is None:
        return tables, parts
    evened = whitening(released, settings.whiten)
    return [table @ evened for table in tables], parts


def whitening(table: Tensor, weight: float) -> Tensor:
    """A map of the item table's directions that evens out their energy.

    A released table is a sum of noised updates: its second moment is that of the signal plus about the same in every
    direction, of which the smallest eigenvalue is an estimate.

    Parameters
    ----------
    table : Tensor
        Released item table, ``(I, D)``.
    weight : float
        Added to each direction's energy, in multiples of the mean; the larger, the closer to the identity.

    Returns
    -------
    Tensor
        ``(D, D)``, symmetric; directions of equal energy keep their lengths.
    """
    moment = table.detach().double()
    values, directions = torch.linalg.eigh(moment.T @ moment)
    values = values - values[0]
    energy = values + weight * values.mean() + torch.finfo(torch.float64).tiny
    scale = (energy.sum() / len(energy) / energy).sqrt()
    whole: Tensor = directions * scale @ directions.T
    return whole.float()
