"""What a finished run may recommend, and as which lists."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.device import Device
from client.lists import best
from common.data.names import unknown
from common.errors import DataError
from simulations.arrivals import Arrivals


@dataclass(frozen=True)
class Offer:
    """All items, or those of one domain.

    Raises
    ------
    DataError
        On making it, where there is no domain of that name.
    """

    device: Device
    domain: str | None = None
    """Recommend of this one only; without it, of each that the model was trained on, one list after another."""
    arrivals: Arrivals | None = None
    """Items that came after training; they follow those of the catalogue."""

    @cached_property
    def _domain_of(self) -> NDArray[np.int8] | None:
        """Domain of each item, ``(I,)``; none where there is only one."""
        known = self.device.sequences.domains
        if known is None or self.arrivals is None or self.arrivals.domains is None:
            return known
        return np.concatenate([known, self.arrivals.domains])

    def __post_init__(self) -> None:
        if self.domain is not None and self.domain not in self._names:
            if not self._names:
                raise DataError(
                    f"no domain {self.domain!r}: the run's data has none (data.columns.domain); leave it away"
                )
            raise unknown("domain", self.domain, self._names)

    @property
    def _names(self) -> list[str]:
        """Domains that the model was trained on."""
        only = self.device.experiment.data.only.domains
        return [name for name in self.device.sequences.domain_names if only is None or name in only]

    @cached_property
    def domains(self) -> tuple[Tensor, ...]:
        """The items of each list, ``(I,)`` bool; none where there is one list of all."""
        if self._domain_of is None:
            return ()
        numbers = {name: number for number, name in enumerate(self.device.sequences.domain_names)}
        wanted = self._names if self.domain is None else [self.domain]
        return tuple(torch.tensor(self._domain_of == numbers[name]) for name in wanted)

    def best(self, scored: Tensor, seen: Iterable[int], k: int) -> list[dict[str, Any]]:
        """The k best of each list for one person, from the scores of all items ``(I,)``, which are written to.

        Parameters
        ----------
        scored : Tensor
            As `client.evaluation.final_scores` gives them.
        seen : iterable of int
            Items that are not recommended again.
        k : int
            Items in a list.

        Returns
        -------
        list of dict
            ``item``, ``title``, ``genres`` and ``score``; with several domains ``domain``, and with arrivals ``new``,
            which says whether it is one.
        """
        later = 0 if self.arrivals is None else len(self.arrivals.ids)
        left_out = np.fromiter(seen, dtype=np.int64)
        rows = np.zeros(len(left_out), dtype=np.int64)
        found = best(self.device.experiment, scored.unsqueeze(0), rows, left_out, k, self.domains, later)
        return [
            {**self._about(item), "score": round(score, 4)}
            for item, score in zip(found.items[0].tolist(), found.scores[0].tolist(), strict=True)
            if item >= 0
        ]

    def _about(self, item: int) -> dict[str, Any]:
        catalogue, new = self.device.catalogue, self.arrivals
        place = item - catalogue.items
        told = catalogue.about(item) if new is None or place < 0 else (new.ids[place], new.titles[place], [])
        about: dict[str, Any] = dict(zip(("item", "title", "genres"), told, strict=True))
        if self._domain_of is not None:
            about["domain"] = self.device.sequences.domain_names[self._domain_of[item]]
        return about if new is None else about | {"new": place >= 0}
