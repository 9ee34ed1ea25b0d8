"""Recommending to people while they act: one JSON line in, one JSON line out, as long as there are lines."""

import json
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

from client.online import Session
from common.errors import DataError
from common.files import json_text
from common.models.schema import BehaviourInput
from simulations.inference import Trained
from simulations.offer import Offer

USERS = 10_000
"""Histories that are remembered at most."""
KEYS = ("item", "time", "behaviour", "rating", "user", "reset")
"""What a line may have."""
FARTHEST = 2**62
"""Bound of a time, so that no interval leaves int64."""


class Watch:
    """Several people's histories, and what to recommend after each of their events.

    Whoever was away for longest is forgotten where there are too many, and begins anew.

    Parameters
    ----------
    offer : Offer
        What may be recommended.
    session : Session
        A model; its own history is not touched.
    k : int
        How many items an answer has at most.
    users : int
        How many people to remember, at least 1.
    target : str, optional
        Behaviour that is predicted; items of other events may be recommended.
    """

    def __init__(self, offer: Offer, session: Session, k: int, users: int = USERS, target: str | None = None):
        self._target = target
        self._offer, self._session, self._k, self._users = offer, session, k, users
        self._sessions: OrderedDict[str | None, Session] = OrderedDict()
        self._catalogue = offer.device.catalogue
        ids, titles = self._catalogue.item_ids(), self._catalogue.titles()
        folded = [title.casefold() for title in titles]
        often = Counter(folded)
        # An id that stands in for a title is left to the catalogue, and so is what several items are called.
        pairs = zip(ids, titles, folded, strict=True)
        self._named = {
            name: i for i, (id_, title, name) in enumerate(pairs) if title not in {id_, ""} and often[name] == 1
        }
        self._numbers = {id_: i for i, id_ in enumerate(ids)}

    def answer(self, line: str) -> dict[str, Any]:
        """Take one line's event, and say what to recommend after it.

        Parameters
        ----------
        line : str
            A JSON object: ``item`` (id or title); ``time`` (seconds since 1970), ``behaviour`` (its name) and
            ``rating``, where the model looks at them; ``user`` (any id; nobody in particular without). With
            ``reset: true`` the user's history begins anew, with the item if there is one.

        Returns
        -------
        dict
            ``items``, best first, as `Offer.best`; none of the history, and none at all where that is empty.

        Raises
        ------
        DataError
            Where the line can't be followed; nothing has changed then.
        """
        event = _parse(line)
        who = None if event.get("user") is None else _name(event, "user")
        reset = event.get("reset", False)
        if not isinstance(reset, bool):
            raise DataError('"reset" must be true or false')
        if "item" not in event:
            if not reset:
                raise DataError('name an "item", or say "reset": true')
            self._sessions.pop(who, None)
            return {"items": []}
        item, told = self._find(_name(event, "item")), self._told(event)
        if reset:
            self._sessions.pop(who, None)
        session = self._of(who)
        again = item in session.seen
        scored = session.append(item, **told)
        if not again and self._target not in (None, event.get("behaviour", self._target)):
            session.seen.discard(item)
        return {"items": self._offer.best(scored, session.seen, self._k)}

    def _of(self, who: str | None) -> Session:
        if who not in self._sessions:
            if len(self._sessions) >= self._users:
                self._sessions.popitem(last=False)
            self._sessions[who] = self._session.fresh()
        self._sessions.move_to_end(who)
        return self._sessions[who]

    def _told(self, event: Mapping[str, Any]) -> dict[str, Any]:
        """What the model looks at beside the item, as `Session.append` takes it."""
        model = self._session.model
        told: dict[str, Any] = {"time": _time(event, model.timed)}
        for each in model.inputs:
            if isinstance(each, BehaviourInput):
                if event.get("behaviour") not in each.names:
                    raise DataError(f'the model looks at behaviours; say "behaviour", one of {", ".join(each.names)}')
                told["behaviour"] = each.names.index(event["behaviour"])
            elif each.kind == "rating" and event.get("rating") is not None:
                told["rating"] = _number(event["rating"])
        return told

    def _find(self, name: str) -> int:
        """`Catalogue.find`, at once for whole names."""
        found = self._numbers.get(name)
        found = self._named.get(name.casefold()) if found is None else found
        return self._catalogue.find(name) if found is None else found


def watch(trained: Trained, lines: Iterable[str], k: int, out: TextIO, users: int = USERS) -> None:
    """Answer each line with a line, at once, until there are no more; blank ones have no answer.

    Parameters
    ----------
    trained : Trained
        A finished run.
    lines : iterable of str
        As in `Watch.answer`.
    k : int
        How many items an answer has at most.
    out : TextIO
        Where answers go: those of `Watch.answer`, with ``ms`` that they took; ``{"error": "line 3: …"}`` for a line
        that can't be followed, after which it goes on.
    users : int
        Histories that are remembered at most; fewer where ``runtime.memory_mb`` holds no more.
    """
    device = trained.device
    session = Session(device.experiment.model, trained.offered)
    fitting = max(1, device.experiment.runtime.memory_mb * 2**20 // session.nbytes)
    sequences = device.sequences
    target = sequences.behaviour_names[sequences.target] if sequences.target >= 0 else None
    watching = Watch(trained.offer, session, k, min(users, fitting), target)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        start = time.perf_counter()
        try:
            answer = watching.answer(line)
            answer["ms"] = round(1000 * (time.perf_counter() - start), 3)
        except DataError as fault:
            answer = {"error": f"line {number}: {fault}"}
        out.write(json_text(answer) + "\n")
        out.flush()


def _parse(line: str) -> Mapping[str, Any]:
    try:
        event = json.loads(line)
    except json.JSONDecodeError as fault:
        raise DataError(f"not JSON: {fault.msg} at column {fault.colno}") from None
    except (ValueError, RecursionError) as fault:  # numbers of thousands of digits, thousands of brackets
        raise DataError(f"not JSON: {fault}") from None
    if not isinstance(event, dict):
        raise DataError('not a JSON object such as {"item": "42"}')
    unknown = next((key for key in event if key not in KEYS), None)
    if unknown is not None:
        raise DataError(f"unknown key {unknown!r}; a line may have {', '.join(KEYS)}")
    return event


def _name(event: Mapping[str, Any], key: str) -> str:
    """An id or title; a number is the id that it spells."""
    name = event[key]
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise DataError(f'"{key}" must be a text or a whole number')
    return str(name)


def _number(rating: object) -> float:
    if isinstance(rating, bool) or not isinstance(rating, int | float) or not abs(rating) < FARTHEST:
        raise DataError('"rating" must be a number')
    return float(rating)


def _time(event: Mapping[str, Any], wanted: bool) -> int | None:
    when = event.get("time")
    if when is None:
        if wanted:
            raise DataError('the model looks at times; say "time", in seconds')
        return None
    if isinstance(when, bool) or not isinstance(when, int) or abs(when) >= FARTHEST:
        raise DataError('"time" must be whole seconds')
    return when
