"""The Flower ClientApp: one node, whose user's events, or whose users' events, stay here."""

import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable

from client import shard
from client.accounts import accounts_of, kept_by, store
from client.device import Device, user_of, users_of
from client.handlers import handle_evaluate, handle_query, handle_train, introduction
from client.own import recalled, remember
from common.errors import DataError, HushrecError, UsageError
from common.privacy.schema import ExampleLevel, on_device
from common.run_config import experiment_of
from common.wire import REFUSED


def discreet(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """A mod: what goes wrong here is told in the log of this node; the server hears what is meant for people.

    That is our own errors' text without the paths, which are nobody's business, and of all others the name alone;
    where devices do not trust the server, of those about data, too, since they count events.
    """
    try:
        return call_next(message, context)
    except Exception as fault:
        logging.getLogger(__name__).exception("a message of the server cannot be answered")
        reason = type(fault).__name__
        if isinstance(fault, HushrecError) and (not isinstance(fault, DataError) or _trusts(context)):
            text = str(fault)
            for folder in sorted(_folders(context), key=len, reverse=True):
                text = text.replace(folder, "…")
            reason += f": {re.sub('…+', '…', _PATH.sub('…', text))}"
        return Message(Error(code=REFUSED, reason=reason), reply_to=message)


def _trusts(context: Context) -> bool:
    try:
        return on_device(experiment_of(context).privacy) is None
    except HushrecError:
        return True  # no experiment, so nothing of any user's was read


def _folders(context: Context) -> set[str]:
    """Folders that this node knows of."""
    named = {str(value) for value in context.node_config.values() if isinstance(value, str)}
    places = {place for name in named for place in (name, str(Path(name).parent)) if Path(place).is_absolute()}
    return {place for place in places | {str(Path.home()), str(Path.cwd())} if len(place) > 1}


app = ClientApp(mods=[discreet])
_PATH = re.compile(r"(?<![\w.])(?:[A-Za-z]:\\|\\\\|~\w*/|\.\./|/)[^\s:;,'\"]*")
"""Other paths, up to a blank."""


@app.query()
def query(message: Message, context: Context) -> Message:
    """Tell the server which users live on this node."""
    users, device = users_of(context), Device.of(context)
    reply = handle_query([message], [users.start], device)[0]
    return reply if reply.has_error() else introduction(message, users, device)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the global model on the events of this node's users, and reply with the update."""
    users, device = _here(message, context), _device(context)
    reply = _trained(message, context, users, device)
    if device.own is not None:
        remember(device.own, context, users_of(context))
    return reply


def _trained(message: Message, context: Context, users: list[int] | None, device: Device) -> Message:
    private = on_device(device.experiment.privacy) is not None
    if users is not None:
        return shard.handle("train", message, users, replace(device, accounts=kept_by(context)) if private else device)
    user = user_of(context)
    if not private:
        return handle_train([message], [user], device)[0]
    device = replace(device, accounts=accounts_of(context, user), trainer=alone(device))
    reply = handle_train([message], [user], device)[0]
    store(device.accounts, context, user)
    return reply


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Rank the held-out items of this node's users with the global model and reply with the ranks."""
    users, device = _here(message, context), _device(context)
    if users is None:
        return handle_evaluate([message], [user_of(context)], device)[0]
    return shard.handle("evaluate", message, users, device)


def _device(context: Context) -> Device:
    """The device of a context, with what its users keep there."""
    device = Device.of(context)
    if device.own is None:
        return device
    return replace(device, own=recalled(device.own, context, users_of(context)))


def _here(message: Message, context: Context) -> list[int] | None:
    """The users that a message names, all of this node; none where it names nobody."""
    named = shard.addressed(message)
    if named is not None and not set(named) <= set(users_of(context)):
        raise UsageError("a message names users who do not live here")
    return named


def alone(device: Device) -> Callable[..., Iterable[Any]]:
    """What trains one user by itself: Opacus, where examples are protected, which takes a while to load."""
    if not isinstance(on_device(device.experiment.privacy), ExampleLevel):
        return device.trainer
    from client import opacus_training

    return opacus_training.train
