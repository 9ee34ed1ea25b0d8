"""What a client process holds: the experiment, and the histories of the users whose device it plays."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context

from client.accounts import ACCOUNTS_FILE, Accounts
from client.cohort import train
from client.evaluation import rank
from client.facts import require_facts
from client.own import OWN_FILE, Own, own_of
from client.room import ROOM, room
from common.config import Experiment, experiment_hash
from common.data import folder as disk
from common.data.catalogue import Catalogue
from common.data.itemrows import table_rows
from common.data.prepare import prepare
from common.data.sequences import Sequences
from common.errors import DataError, UsageError
from common.metrics import Ranking
from common.privacy.schema import on_device
from common.run_config import experiment_of

PARTITION = "partition-id"
"""Key in Flower's node config that says which user this node is."""
DATA_PATH, CATALOGUE = "data-path", "catalogue"
"""Keys of its prepared folder, and of the catalogue's version that this must have."""


@dataclass(frozen=True)
class Device:
    """Private data and public settings of the users that this process plays."""

    experiment: Experiment
    """The experiment, as the client itself was told."""
    sequences: Sequences
    """Histories by user index."""
    catalogue: Catalogue
    """The public list of items."""
    trainer: Callable[..., Iterable[Any]] = train
    """What trains a cohort; a simulation may put worker processes here."""
    ranker: Callable[..., Ranking] = rank
    """What ranks a cohort's held-out items."""
    own: Own | None = None
    """What stays with the users, where anything does."""
    accounts: Accounts = field(default_factory=Accounts)
    """How often each user has taken part, where devices protect their users themselves."""

    @property
    def fingerprint(self) -> str:
        """Hash of the experiment; a message of another experiment is refused."""
        return experiment_hash(self.experiment)

    @property
    def rows(self) -> int:
        """Rows of the table that the model has here."""
        return table_rows(self.experiment, self.catalogue)

    def damaged(self, users: Sequence[int]) -> set[int]:
        """Which of these users have events on items outside the catalogue; reads only theirs."""
        cohort = np.array(users, dtype=np.int64)
        items, rows = self.sequences.events(cohort, self.sequences.ends(cohort))
        return set(cohort[rows[(items < 0) | (items >= self.catalogue.items)]].tolist())

    @classmethod
    def open(cls, experiment: Experiment, folder: Path, run: Path | None = None) -> "Device":
        """Open a prepared data set for an experiment; accounts and what stays with users, if any, in a run's folder.

        Raises
        ------
        DataError
            Where the folder is missing or damaged.
        """
        sequences = Sequences.open(folder)
        require_facts(experiment.model, sequences, disk.read_manifest(folder).get("timed", True))
        catalogue, kept = Catalogue.open(folder), Accounts()
        if on_device(experiment.privacy):
            kept = Accounts(run / ROOM / ACCOUNTS_FILE, partial(room, run)) if run else Accounts()
        file, rows = run / OWN_FILE if run else None, table_rows(experiment, catalogue)
        own = own_of(experiment, sequences.first, len(sequences), rows, file)
        return cls(experiment, sequences, catalogue, own=own, accounts=kept)

    @classmethod
    def of(cls, context: Context) -> "Device":
        """The device that a Flower context describes.

        `node_config["data-path"]` names a prepared folder, on a real device that of its own user only (see
        `common.data.extract`); without it the experiment's data set is prepared. The node is the user with its
        `partition-id`.
        """
        config = context.node_config
        device = _open(experiment_of(context), str(config.get(DATA_PATH, "")))
        if CATALOGUE in config and config[CATALOGUE] != device.catalogue.version:
            raise DataError(f"{device.catalogue.folder}: its catalogue is not version {config[CATALOGUE]}")
        return device


@lru_cache(maxsize=4)
def _open(experiment: Experiment, path: str) -> Device:
    """Devices of one process share the memory map; an experiment is frozen, hence a key."""
    return Device.open(experiment, Path(path) if path else prepare(experiment.data))


def user_of(context: Context) -> int:
    """Index of the one user that lives on this node.

    Raises
    ------
    UsageError
        Where the node was not told which one, or hosts several.
    """
    users = users_of(context)
    if len(users) != 1:
        raise UsageError(f"this node has no {PARTITION!r} in its node config and hosts {len(users)} users: name some")
    return users.start


def users_of(context: Context) -> range:
    """Users that live on this node: the one with its `partition-id`, else all of its `data-path`.

    Raises
    ------
    UsageError
        Where the node was told neither.
    """
    if PARTITION in context.node_config:
        user = int(context.node_config[PARTITION])
        return range(user, user + 1)
    if DATA_PATH not in context.node_config:
        raise UsageError(
            f"this node's config has neither {PARTITION!r} nor {DATA_PATH!r}, so it does not know whose device it is"
        )
    sequences = Device.of(context).sequences
    return range(sequences.first, sequences.first + len(sequences))
