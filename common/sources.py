"""The schema of data sources; see `common.config`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from common.features import ItemFeatures
from common.section import Natural, Positive, Section, Share


class Only(Section):
    """Which events are seen; the others vanish after the split.

    The catalogue and the held-out events that stay are the same, so that figures compare.
    """

    behaviours: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Of these behaviours; `null` means all."""
    domains: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """In these domains; `null` means all."""


class _Prepared(Section):
    """Options that every data source shares."""

    min_user_events: Natural = 0
    """Drop users with fewer events; with `min_item_events` applied again and again until both hold (k-core)."""
    min_item_events: Natural = 0
    """Drop items with fewer events (see `min_user_events`)."""
    repeats: Literal["keep", "first", "last"] = "keep"
    """A user's repeated events on one item, of one behaviour: keep all, or collapse to the first or the last."""
    target: str | None = None
    """Behaviour that is predicted, such as `buy`: only such events are held out, and only their items left out of what
    is recommended. `null` means all."""
    ties: Literal["file", "target-first"] = "file"
    """Order of a user's events of equal times: the file's, or those of `target` first, so that nothing of the same
    moment (or day) gives away what is predicted."""
    only: Only = Only()
    """Which events are seen, to learn what the others are worth."""
    split: Literal["leave-one-out", "global-time"] = "leave-one-out"
    """`leave-one-out`: last event = test, the one before = validation. `global-time`: two points in time, the same
    for all users; a user's first event after each point is the held-out one."""
    validation_from: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """Only for `split: global-time`: quantile of all event times at which validation begins."""
    test_from: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """Only for `split: global-time`: quantile of all event times at which test begins."""
    features: ItemFeatures = ItemFeatures()
    """What is publicly known of items, for models whose `items` are built from it."""
    cold: Share = 0.0
    """Share of the items that are held out of all training: they may only be somebody's last event, to measure how well
    items are recommended that nobody has touched."""
    cold_seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Which items these are; another draw of them is another data set."""

    @property
    def many_domains(self) -> bool:
        """Whether items belong to several catalogues."""
        return False

    @model_validator(mode="after")
    def _ordered(self) -> "_Prepared":
        if self.cold and self.split != "leave-one-out":
            raise ValueError(f"cold needs split leave-one-out; with {self.split} a last event may be trained on")
        if self.ties == "target-first" and self.target is None:
            raise ValueError("ties: target-first needs a target")
        if self.cold and (self.target is not None or self.only != Only()):
            raise ValueError("cold goes with neither target nor only: cold items may be held-out events of any sort")
        if self.validation_from >= self.test_from:
            raise ValueError("validation_from must be smaller than test_from")
        return self


class _Files(_Prepared):
    """Options of sources that read files."""

    path: str
    """File or folder; absolute, or relative to $HUSHREC_DATA, or to the working directory."""
    strict: bool = False
    """Refuse a file with malformed rows; otherwise they are left out, counted and reported."""


class MovieLensData(_Files):
    """MovieLens as distributed: a folder with `u.data`, `ratings.dat` or `ratings.csv` (titles and genres beside)."""

    kind: Literal["movielens"]
    """Selects this source."""
    min_rating: float | None = None
    """Keep only events rated at least so high; by default every rating counts as an event."""


class PairsData(_Files):
    """One `user item` pair a line, in time order (the preparation used by SASRec and its successors)."""

    kind: Literal["pairs"]
    """Selects this source."""


class SequencesData(_Files):
    """One user a line: user id, then items in time order (the preparation used by S3-Rec)."""

    kind: Literal["sequences"]
    """Selects this source."""


class RecBoleData(_Files):
    """A RecBole atomic file `*.inter`: tab-separated, typed header such as `user_id:token`."""

    kind: Literal["recbole"]
    """Selects this source."""


class Columns(Section):
    """Names of the columns of a table."""

    user: str = "user"
    """Who."""
    item: str = "item"
    """On what."""
    time: str | None = "time"
    """When; `null` means that the file's order is the time order."""
    behaviour: str | None = None
    """View, cart, buy …"""
    rating: str | None = None
    """A number."""
    domain: str | None = None
    """Catalogue that the item belongs to; with it an item is known as `domain/item`."""


class TableData(_Files):
    """Any CSV, TSV or Parquet file with named columns."""

    kind: Literal["table"]
    """Selects this source."""
    columns: Columns = Columns()
    """Which column means what."""
    separator: Annotated[str, Field(min_length=1, max_length=1)] = ","
    """Between the fields of a text file."""
    time_format: str | None = None
    """strptime format of the time column, such as `%Y-%m-%d`; by default it holds numbers. A format without a year
    counts within one year."""

    @property
    def many_domains(self) -> bool:
        """As above."""
        return self.columns.domain is not None


class SyntheticData(_Prepared):
    """Made-up sequences with a known law, hence a known best possible ranker (see `common.data.synthetic`)."""

    kind: Literal["synthetic"]
    """Selects this source."""
    users: Positive = 1000
    """Number of users."""
    items: Annotated[int, Field(ge=10)] = 500
    """Size of the catalogue."""
    interests: Positive = 20
    """Groups that the items fall into."""
    mean_length: Annotated[float, Field(ge=3)] = 20.0
    """Mean number of events of a user."""
    max_length: Annotated[int, Field(ge=3)] = 100
    """Largest number of events of a user."""
    successors: Positive = 4
    """Each item has so many likely next items, all of its own interest."""
    follow: Annotated[float, Field(ge=0, le=1)] = 0.8
    """Probability that an event follows such a transition rather than the popularity inside the interest."""
    recency: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Weight of a past event as the cause of the next one falls by this factor per step back."""
    noise: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Probability that an event is drawn from the overall popularity, with no cause."""
    zipf: Annotated[float, Field(ge=0)] = 1.0
    """Exponent of the popularity law."""
    seed: Natural = 0
    """Seed of the generator; apart from the experiment's, so that several seeds train on the same data."""

    @model_validator(mode="after")
    def _possible(self) -> "SyntheticData":
        if self.interests > self.items:
            raise ValueError(f"interests ({self.interests}) must not exceed items ({self.items})")
        if self.mean_length > self.max_length:
            raise ValueError(f"mean_length ({self.mean_length}) must not exceed max_length ({self.max_length})")
        return self


DataConfig = Annotated[
    MovieLensData | PairsData | SequencesData | RecBoleData | TableData | SyntheticData, Field(discriminator="kind")
]
