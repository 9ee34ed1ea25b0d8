"""The public side of a prepared data set: which items exist. It reads no user's events, so the server may open it."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from common.data import folder as disk
from common.data.names import unknown
from common.errors import DataError

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True)
class Catalogue:
    """The list of items that everybody knows.

    Attributes
    ----------
    folder : Path
        The prepared folder.
    users : int
        Size of the population.
    items : int
        Size of the catalogue; items are the integers 0 … items - 1.
    digest : str
        Fingerprint of the options and source files behind the data.
    """

    folder: Path
    users: int
    items: int
    digest: str

    @classmethod
    def open(cls, folder: Path) -> "Catalogue":
        """Open a prepared folder; reads nothing but the manifest.

        Raises
        ------
        DataError
            If the folder is not a prepared data set.
        """
        manifest = disk.read_manifest(folder)
        return cls(folder, manifest["kept"]["users"], manifest["kept"]["items"], manifest["digest"])

    @cached_property
    def table(self) -> "pl.DataFrame":
        """All that is known of the items, one a row, in the order of their numbers: ``item``, perhaps more columns."""
        import polars as pl

        try:
            found = pl.read_parquet(self.folder / disk.CATALOGUE)
        except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
            raise disk.damaged(self.folder, f"{disk.CATALOGUE}: {error}") from None
        if found.height != self.items or "item" not in found.columns:
            raise disk.damaged(self.folder, f"{disk.CATALOGUE} has {found.height} rows, expected {self.items}")
        return found

    @cached_property
    def version(self) -> str:
        """Fingerprint of the list of items and their features: nodes with others number items otherwise."""
        features = disk.read_manifest(self.folder).get("features", {}).get("digest", "")
        return hashlib.sha256("\n".join([*self.item_ids(), *[features] * bool(features)]).encode()).hexdigest()[:16]

    @cached_property
    def _ids(self) -> list[str]:
        return self.table["item"].to_list()

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self._ids)}

    @cached_property
    def _titles(self) -> list[str]:
        if "title" not in self.table.columns:
            return self._ids
        return self.table["title"].fill_null(self.table["item"]).to_list()

    def item_ids(self) -> list[str]:
        """Ids of all items, as in the source, in the order of their numbers."""
        return list(self._ids)

    def titles(self) -> list[str]:
        """Titles of all items; where none is known, the id."""
        return list(self._titles)

    @cached_property
    def _genres(self) -> list[list[str]]:
        if "genres" not in self.table.columns:
            return [[] for _ in range(self.items)]
        return [genres or [] for genres in self.table["genres"].to_list()]

    def genres(self) -> list[list[str]]:
        """Genres of all items; an empty list where none is known."""
        return list(self._genres)

    def about(self, item: int) -> tuple[str, str, list[str]]:
        """Id, title and genres of one item, as the lists of all have them."""
        return self._ids[item], self._titles[item], self._genres[item]

    def index_of(self, item_id: str) -> int:
        """Find the number of the item with that id.

        Raises
        ------
        DataError
            If there is none; it names the nearest spelling.
        """
        try:
            return self._numbers[item_id]
        except KeyError:
            raise unknown("item", item_id, self._ids) from None

    def find(self, name: str) -> int:
        """Find the number of an item by its id, its title, or a part of a title that no other has; case is no matter.

        Raises
        ------
        DataError
            If there is none, with the nearest spelling, or if there are several, with some of them.
        """
        ids = self._ids
        if name in self._numbers or "title" not in self.table.columns or not name:
            return self.index_of(name)
        titles, wanted = self._titles, name.casefold()
        folded = [title.casefold() for title in titles]
        found = [i for i, title in enumerate(folded) if title == wanted]
        found = found or [i for i, title in enumerate(folded) if wanted in title]
        if not found:
            raise unknown("item", name, [*titles, *ids], self.items)
        if len(found) > 1:
            some = ", ".join(f"{titles[i]!r} ({ids[i]})" for i in found[:3])
            raise DataError(f"item {name!r} may be one of {len(found)}, such as {some}; name one of them, or its id")
        return found[0]
