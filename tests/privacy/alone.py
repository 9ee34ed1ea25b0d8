"""A world of devices that trust nobody: experiments, updates and replies of users who protect themselves."""

import numpy as np

from client.cohort import train
from client.handlers import handle_train
from common.wire import METRICS, UPDATE
from tests.privacy import private
from tests.support import world

ITEMS = 20


def experiment(kind="example-level", loss="softmax", *, privacy=None, federation=None, evaluation=None, **sections):
    """No noise, a small bound, short segments of which all are taken, a server that adds the mean update."""
    own = {"segment": 4, "sampling_rate": 1.0, "examples": 2} if kind == "example-level" else {}
    price = {} if "target_epsilon" in (privacy or {}) else {"noise_multiplier": 0.0}
    plain = {"weighting": "uniform", "optimizer": {"kind": "fedavg"}, "local": {"lr": 0.3}}
    return world.experiment(
        loss=world.LOSSES[loss],
        privacy={"kind": kind, "rng": "reproducible", "clipping_norm": 0.1, **own, **price, **(privacy or {})},
        federation={**plain, **(federation or {})},
        evaluation={"privacy": "unaccounted", **(evaluation or {})},
        **sections,
    )


def chunks(experiment, histories, users=None, round_=1, *, weights=None, items=ITEMS, clip=None, held_out=False):
    """What training gives for some users, by default for all, chunk by chunk."""
    weights = world.weights(experiment.model, items) if weights is None else weights
    users = np.arange(len(histories)) if users is None else np.asarray(users)
    return list(train(experiment, weights, world.sequences(histories, held_out), users, round_, clip))


def each(made):
    """Update of each user of some chunks, flat."""
    return {user: private.flat(chunk.one(i)) for chunk in made for i, user in enumerate(chunk.users.tolist())}


def updates(experiment, histories, users=None, round_=1, **options):
    """Update of each user, flat, by one call."""
    return each(chunks(experiment, histories, users, round_, **options))


def replies(experiment, device, users, round_=1, weights=None, **config):
    """What devices answer when they are asked to train."""
    weights = world.weights(experiment.model, ITEMS) if weights is None else weights
    return handle_train(world.ask("train", experiment, weights, users, round_, **config), users, device)


def sent(reply):
    """The numbers of a reply, flat."""
    arrays = reply.content.array_records[UPDATE]
    return private.flat([arrays[name].numpy() for name in ("table", "body")])


def said(reply):
    """What a reply says beside its numbers."""
    return dict(reply.content.metric_records[METRICS])
