"""What a finished run may recommend, and as which lists."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from client.device import Device
from client.lists import best
from common.data.names import unknown
from common.errors import DataError


@dataclass(frozen=True)
class Offer:
    """All items, or those of one domain.

    Raises
    ------
    DataError
        On use, where there is no domain of that name.
    """

    device: Device
    domain: str | None = None
    """Recommend of this one only; without it, of each that the model was trained on, one list after another."""

    @cached_property
    def domains(self) -> tuple[Tensor, ...]:
        """The items of each list, ``(I,)`` bool; none where there is one list of all."""
        sequences, only = self.device.sequences, self.device.experiment.data.only.domains
        names = [name for name in sequences.domain_names if only is None or name in only]
        if self.domain is not None and self.domain not in names:
            if not names:
                raise DataError(
                    f"no domain {self.domain!r}: the run's data has none (data.columns.domain); leave it away"
                )
            raise unknown("domain", self.domain, names)
        if sequences.domains is None:
            return ()
        wanted = names if self.domain is None else [self.domain]
        return tuple(torch.tensor(sequences.domains == sequences.domain_names.index(name)) for name in wanted)

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
            ``item``, ``title``, ``genres`` and ``score``; with several domains ``domain``, too.
        """
        left_out = np.fromiter(seen, dtype=np.int64)
        rows = np.zeros(len(left_out), dtype=np.int64)
        found = best(self.device.experiment, scored.unsqueeze(0), rows, left_out, k, self.domains)
        return [
            {**self._about(item), "score": round(score, 4)}
            for item, score in zip(found.items[0].tolist(), found.scores[0].tolist(), strict=True)
            if item >= 0
        ]

    def _about(self, item: int) -> dict[str, Any]:
        sequences = self.device.sequences
        said = dict(zip(("item", "title", "genres"), self.device.catalogue.about(item), strict=True))
        return said if sequences.domains is None else said | {"domain": sequences.domain_names[sequences.domains[item]]}
