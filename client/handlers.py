"""Messages in, replies out, for any number of users at once; the one place where client code meets Flower."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecordValues

from client.device import Device
from client.noised import Noised
from client.training import Updates
from client.tuning import judged
from common.data.sequences import Split
from common.models.weights import Weights
from common.privacy.devices import settle
from common.privacy.plan import public_users
from common.privacy.schema import on_device
from common.timing import each
from common.wire import (
    METRICS,
    MODEL,
    NO_METRICS,
    NO_RECORDS,
    RANKS,
    REFUSED,
    ROUND,
    UPDATE,
    assembled,
    pending_update,
    record,
    unpack,
)

Handler = Callable[[Sequence[Message], Sequence[int], Device], list[Message]]


def handle_train(messages: Sequence[Message], users: Sequence[int], device: Device) -> list[Message]:
    """Train the users that a round's messages address.

    Parameters
    ----------
    messages : sequence of Message
        One per user, all of the same round with the same model.
    users : sequence of int
        Index of each message's user.
    device : Device
        Their data.

    Returns
    -------
    list of Message
        One reply per message, in order: an update, or an error for a user whose training came to nothing. One user's
        trouble is its own.
    """
    asked, replies = _admit(messages, users, device)
    private = on_device(device.experiment.privacy) is not None
    if private:
        asked = _willing(asked, messages, users, device, replies)
    if asked:
        first = messages[asked[0]].content
        weights = unpack(record(first, MODEL, ArrayRecord))
        told = record(first, ROUND, ConfigRecord)
        round_, clip = int(str(told["round"])), float(str(told["clip"])) if "clip" in told else None
        place = {users[i]: i for i in asked}
        cohort = np.array(list(place), dtype=np.int64)
        if private:  # before anything can leave
            device.accounts.pay(cohort.tolist(), round_, settle(device.experiment).told)
        own = {} if device.own is None else {"own": device.own.before(cohort, round_)}
        trained = device.trainer(device.experiment, weights, device.sequences, cohort, round_, clip, **own)
        for updates in each("training", trained):
            if device.own is not None:
                device.own.keep(updates.users[updates.sound], round_, updates.kept[torch.from_numpy(updates.sound)])
            columns = {"user": updates.users, **updates.facts}
            if private:
                columns["participations"] = np.array([device.accounts.taken(user) for user in updates.users.tolist()])
            for i, values in enumerate(zip(*(column.tolist() for column in columns.values()), strict=True)):
                facts = dict(zip(columns, values, strict=True))
                at = place[facts["user"]]
                replies[at] = _update_reply(messages[at], updates, i, weights, facts)
    return _complete(messages, replies)


def handle_evaluate(messages: Sequence[Message], users: Sequence[int], device: Device) -> list[Message]:
    """Rank the held-out item of the users that messages address; arguments and result as in `handle_train`.

    Where devices do not trust the server and ranks are not given away, those of public users alone are told.
    """
    asked, replies = _admit(messages, users, device)
    evaluation = device.experiment.evaluation.privacy
    if on_device(device.experiment.privacy) is not None and evaluation != "unaccounted":
        public = set(public_users(device.experiment, device.sequences.population or len(device.sequences)).tolist())
        for i in asked:
            if users[i] not in public:
                replies[i] = _refusal(messages[i], "the rank of a user who is not public stays on the device")
        asked = [i for i in asked if replies[i] is None]
    if asked:
        first = messages[asked[0]].content
        cohort = np.array([users[i] for i in asked], dtype=np.int64)
        weights = unpack(record(first, MODEL, ArrayRecord))
        split: Split = "test" if record(first, ROUND, ConfigRecord)["split"] == "test" else "validation"
        round_ = int(str(record(first, ROUND, ConfigRecord)["round"]))
        kept = device.own if device.experiment.told_as_is else None
        own = {} if kept is None else {"own": kept.before(cohort, round_ + 1)}
        ranking = device.ranker(judged(device.experiment), weights, device.sequences, cohort, split, **own)
        for i, user, *ranks in zip(asked, cohort, *ranking, strict=True):
            told = {name: float(rank) for name, rank in zip(RANKS, ranks, strict=True) if not np.isnan(rank)}
            replies[i] = _metrics_reply(messages[i], {"user": int(user), **told})
    return _complete(messages, replies)


def handle_query(messages: Sequence[Message], users: Sequence[int], device: Device) -> list[Message]:
    """Say who lives here and which public catalogue is known here; arguments and result as in `handle_train`."""
    asked, replies = _known(messages, users, device)
    for i in asked:
        replies[i] = introduction(messages[i], range(users[i], users[i] + 1), device)
    return _complete(messages, replies)


def introduction(message: Message, users: range, device: Device) -> Message:
    """What a node that hosts these users says of itself."""
    sequences = device.sequences
    population = sequences.population or len(sequences)
    facts = {"first": users.start, "users": len(users), "population": population, "items": device.catalogue.items}
    facts["rows"] = device.rows
    told = ConfigRecord({"catalogue": device.catalogue.version})
    return Message(assembled(NO_RECORDS, {METRICS: assembled(NO_METRICS, facts), ROUND: told}), reply_to=message)


HANDLERS: dict[str, Handler] = {"train": handle_train, "evaluate": handle_evaluate, "query": handle_query}
"""Handler by Flower's message type."""


def _known(messages: Sequence[Message], users: Sequence[int], device: Device) -> tuple[list[int], list[Message | None]]:
    """Positions of the messages that are of this experiment and for users of this device; refusals for the others."""
    replies: list[Message | None] = [None] * len(messages)
    known, asked = device.fingerprint, []
    content, told = None, None
    for i, (message, user) in enumerate(zip(messages, users, strict=True)):
        if message.content is not content:  # in one process all messages of a round share theirs
            content = message.content
            told = record(content, ROUND, ConfigRecord)["experiment"]
        if told != known:
            replies[i] = _refusal(message, f"experiment {told!r} is not the one that runs here ({known!r})")
        elif user not in device.sequences:
            replies[i] = _refusal(message, f"user {user} does not live here")
        else:
            asked.append(i)
    return asked, replies


def _admit(messages: Sequence[Message], users: Sequence[int], device: Device) -> tuple[list[int], list[Message | None]]:
    """As `_known`, without the users whose events would break off the work for all."""
    asked, replies = _known(messages, users, device)
    damaged = device.damaged([users[i] for i in asked])
    for i in asked:
        if users[i] in damaged:
            replies[i] = _refusal(messages[i], "events on items outside the catalogue")
    return [i for i in asked if replies[i] is None], replies


def _willing(
    asked: list[int], messages: Sequence[Message], users: Sequence[int], device: Device, replies: list[Message | None]
) -> list[int]:
    """Positions of the users who have participations left, by their own account; refusals for the others."""
    privacy = on_device(device.experiment.privacy)
    device.accounts.refresh()
    most = privacy.participations if privacy else None
    for i in asked:
        if most is not None and device.accounts.taken(users[i]) >= most:
            replies[i] = _refusal(messages[i], f"took part {most} times, and that was all")
    return [i for i in asked if replies[i] is None]


def _complete(messages: Sequence[Message], replies: Sequence[Message | None]) -> list[Message]:
    return [
        reply if reply is not None else _refusal(message, "no result")
        for message, reply in zip(messages, replies, strict=True)
    ]


def _update_reply(
    message: Message, updates: Updates | Noised, i: int, weights: Weights, facts: Mapping[str, MetricRecordValues]
) -> Message:
    if not updates.sound[i]:
        return _refusal(message, "training diverged: numbers not finite or too large")
    update = pending_update(updates, i, tuple(weights.body.shape), weights.table.shape[1])
    return Message(assembled(NO_RECORDS, {UPDATE: update, METRICS: assembled(NO_METRICS, facts)}), reply_to=message)


def _metrics_reply(message: Message, values: Mapping[str, MetricRecordValues]) -> Message:
    return Message(assembled(NO_RECORDS, {METRICS: assembled(NO_METRICS, values)}), reply_to=message)


def _refusal(message: Message, reason: str) -> Message:
    return Message(Error(code=REFUSED, reason=reason), reply_to=message)
