"""Asking a finished run: recommendations for one user, in the data or not, and the ranks behind its figures."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from client.device import Device
from client.evaluation import final_scores, of_items, rank, scores
from client.facts import assumed
from client.lists import best
from client.own import OWN_FILE
from client.past import Past, past_of
from client.tuning import Personal, personal
from common.data.prepare import prepare
from common.data.sequences import Ints, Split
from common.errors import StateError, UsageError
from common.files import atomic
from common.metrics import Ranking, Ranks, coverage, long_tail_share, ndcg, worst_tenth
from common.models.personal import Kept
from common.models.weights import Weights
from server.checkpoint import load_model
from server.curator import curator as curator_of
from server.rounds import MODEL_FILE
from simulations import arrivals, rundir
from simulations.figures import domain_names, figures, marked
from simulations.offer import Offer


class Person(NamedTuple):
    """Somebody to be recommended to."""

    past: Past
    """One history, as far as the model sees it."""
    weights: Weights
    """As trained, with the person's own numbers."""
    seen: Ints
    """Items that are not recommended again."""


@dataclass(frozen=True)
class Trained:
    """A finished run, opened to be asked.

    Raises
    ------
    StateError
        On opening, where the run isn't finished, or its data has changed since.
    """

    folder: Path
    domain: str | None = None
    """Recommend items of this one only, as `Offer.domain`."""
    new: Path | None = None
    """Also recommend items that came after training: a file as in `arrivals.read`."""

    @cached_property
    def device(self) -> Device:
        """The run's data; refused where it isn't what the model was trained on."""
        experiment = rundir.reopen(self.folder)
        if rundir.result(self.folder) is None:
            raise StateError(f"{self.folder}: not finished; go on with `hushrec run --resume {self.folder}`")
        data = prepare(experiment.data)
        rundir.check_manifest(self.folder, experiment, data)
        return Device.open(experiment, data, self.folder)

    @cached_property
    def weights(self) -> Weights:
        """The model that validation chose."""
        return load_model(self.folder / MODEL_FILE, self.device.experiment, self.device.rows)

    @cached_property
    def built(self) -> Weights:
        """The same, its table that of the items' vectors ``(I, D)``."""
        return of_items(self.device.experiment, self.weights, self.device.sequences)

    @property
    def judges(self) -> Ints:
        """Users that the run's test looked at.

        Raises
        ------
        UsageError
            Where the run's privacy mode lets figures be released with noise only.
        """
        experiment = self.device.experiment
        if not experiment.told_as_is and experiment.evaluation.privacy == "noised":
            raise UsageError(
                f"{self.folder}: its figures are released with noise only, as result.json has them; ranks as they are "
                "would be another release. A simulation may set evaluation.privacy=unaccounted"
            )
        return curator_of(experiment, len(self.device.sequences), self.device.catalogue.items).judges("test", 0)

    def kept(self, users: Ints) -> Kept | None:
        """What stayed on these users' devices until the round that was chosen.

        Raises
        ------
        StateError
            Where the run directory does not have it.
        """
        if self.device.own is None:
            return None
        if not (self.folder / OWN_FILE).exists():
            raise StateError(f"{self.folder}: what stays with users is on their devices; it has no {OWN_FILE}")
        return self.device.own.before(users, (rundir.result(self.folder) or {})["best_round"] + 1)

    def person(self, users: Ints) -> Personal | None:
        """What these users have of their own: what stays on their devices, or is fine-tuned there."""
        return personal(self.device.experiment, self.weights, self.device.sequences, users, self.kept(users))

    def known(self, user_id: str) -> Person:
        """Somebody in the data, with all of its events.

        Raises
        ------
        DataError
            Where nobody has this id.
        StateError
            Where it has no events.
        """
        experiment, sequences = self.device.experiment, self.device.sequences
        user = np.array([sequences.index_of(user_id)], dtype=np.int64)
        stops = sequences.ends(user)
        if stops[0] == sequences.starts(user)[0]:
            raise StateError(f"user {user_id} has no events")
        own, weights = self.person(user), self.weights
        if own is not None:
            weights = weights._replace(body=own.bodies(experiment, weights.body, user)[0])
        return Person(past_of(experiment.model, sequences, user, stops), weights, sequences.had(user, stops)[0])

    def stranger(self, names: Sequence[str]) -> Person:
        """Somebody who is not in the data, from items in time order, by id or title.

        Raises
        ------
        DataError
            Where an item is not in the catalogue, or its name may mean several.
        """
        if not names:
            raise UsageError("--history: name at least one item, in time order, separated by commas")
        history = [self.device.catalogue.find(name) for name in names]
        model = self.device.experiment.model
        window = history[-model.max_length :]
        facts = assumed(model, self.device.sequences, len(window))
        told = None if facts is None else {name: torch.from_numpy(values) for name, values in facts.items()}
        past = Past(torch.tensor([window]), torch.tensor([len(window)]), told)
        return Person(past, self.weights, np.array(history, dtype=np.int64))

    @cached_property
    def offer(self) -> Offer:
        """What may be recommended; errors as there and in `arrivals.read`."""
        later = None if self.new is None else arrivals.read(self.new, self.device, self.weights.table)
        return Offer(self.device, self.domain, later)

    @cached_property
    def offered(self) -> Weights:
        """As `built`, with the vectors of all that is offered."""
        later, built = self.offer.arrivals, self.built
        return built if later is None else built._replace(table=torch.cat([built.table, later.vectors]))

    def top(self, person: Person, k: int) -> list[dict[str, Any]]:
        """The k best items for a person, of each domain, without those that it had; as `Offer.best`."""
        past, weights = person.past, self.offered._replace(body=person.weights.body)
        with torch.no_grad():
            scored = final_scores(self.device.experiment.model, weights, past.items, past.lengths, past.moments)[0]
        return self.offer.best(scored, person.seen, k)

    def lists(self, users: Ints, stops: Ints, k: int) -> Ints:
        """The same of many users, from their events before `stops`: catalogue indices ``(n, k)``, −1 where none is.

        With several domains ``(n, domains · k)``, the lists of each beside one another.
        """
        experiment, sequences, domains = self.device.experiment, self.device.sequences, self.offer.domains
        found = np.full((len(users), k * max(1, len(domains))), -1, dtype=np.int64)
        for here, scored in scores(experiment, self.weights, sequences, users, stops):
            seen, rows = sequences.had(users[here], stops[here])
            items = best(experiment, scored, rows, seen, k, domains).items.numpy()
            found[here, : items.shape[1]] = items
        return found


def evaluate(folder: Path, split: Split, ranks_file: Path | None = None) -> dict[str, Any]:
    """Measure a finished run's model once more, from nothing but its files, on the users that its test looked at.

    Parameters
    ----------
    folder : Path
        The run directory.
    split : str
        ``validation`` or ``test``.
    ranks_file : Path, optional
        CSV to write: each user's id and rank, and a column for each mark of other figures with the ranks behind them,
        so that anybody can recompute every metric.

    Returns
    -------
    dict
        ``split``, ``users``, ``domains`` and under ``metrics`` all figures of `result.json`; beyond accuracy
        ``coverage@10`` (share of the catalogue in anybody's top 10), ``long_tail@10`` (share of the places that go
        to the 80 % least popular items), ``worst_tenth_ndcg@10`` (mean over the tenth with the shortest histories).

    Raises
    ------
    UsageError
        Where `ranks_file` names a folder, or lies in none; known before anything is ranked. Where the run's privacy
        mode lets figures be released with noise only.
    StateError
        Where the run cannot be opened, or the file cannot be written.
    """
    if ranks_file and (ranks_file.is_dir() or not ranks_file.parent.is_dir()):
        raise UsageError(f"{ranks_file}: cannot be a file; name one in a folder that exists")
    trained = Trained(folder)
    device, users = trained.device, trained.judges
    everybody, kept = np.arange(len(device.sequences)), trained.kept(users)
    ranking = Ranking(*(np.full(len(everybody), np.nan) for _ in Ranking._fields))
    found = rank(device.experiment, trained.weights, device.sequences, users, split, kept)
    for whole, some in zip(ranking, found, strict=True):
        whole[users] = some
    ranks = marked(device, trained.weights, ranking, split)
    held = np.flatnonzero(np.isfinite(ranking.full))
    if ranks_file:
        ids = device.sequences.user_ids()
        _write_ranks(ranks_file, [ids[user] for user in held], {mark: some[held] for mark, some in ranks.items()})
    stops, _ = device.sequences.stops(held, split)
    lists = trained.lists(held, stops, 10)
    counted = everybody if device.experiment.told_as_is else users  # nothing of private users
    train_items, _ = device.sequences.events(counted, device.sequences.stops(counted, "train")[0])
    popularity = np.bincount(train_items, minlength=device.catalogue.items)
    return {
        "run_dir": str(folder),
        "split": split,
        "users": len(held),
        "domains": domain_names(device),
        "metrics": figures(device, ranks),
        "coverage@10": coverage(lists, device.catalogue.items),
        "long_tail@10": long_tail_share(lists, popularity),
        "worst_tenth_ndcg@10": worst_tenth(ndcg(ranking.full[held], 10), stops - device.sequences.starts(held)),
    }


def _write_ranks(path: Path, users: Sequence[str], ranks: Mapping[str, Ranks]) -> None:
    with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["user", *(mark or "rank" for mark in ranks)])
        for user, *each in zip(users, *ranks.values(), strict=True):
            writer.writerow([user, *("" if np.isnan(rank) else f"{rank:.15g}" for rank in each)])
