"""The Flower ClientApp: one node, one user, whose events stay here."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.accounts import accounts_of, store
from client.device import Device, user_of
from client.handlers import handle_evaluate, handle_query, handle_train
from common.privacy.schema import ExampleLevel, on_device

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Tell the server which user lives on this node."""
    return handle_query([message], [user_of(context)], Device.of(context))[0]


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the global model on this user's events and reply with the update."""
    user, device = user_of(context), Device.of(context)
    if on_device(device.experiment.privacy) is None:
        return handle_train([message], [user], device)[0]
    device = replace(device, accounts=accounts_of(context, user), trainer=alone(device))
    reply = handle_train([message], [user], device)[0]
    store(device.accounts, context, user)
    return reply


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Rank this user's held-out item with the global model and reply with its rank."""
    return handle_evaluate([message], [user_of(context)], Device.of(context))[0]


def alone(device: Device) -> Callable[..., Iterable[Any]]:
    """What trains one user by itself: Opacus, where examples are protected, which takes a while to load."""
    if not isinstance(on_device(device.experiment.privacy), ExampleLevel):
        return device.trainer
    from client import opacus_training

    return opacus_training.train
