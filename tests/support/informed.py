"""A small world of which more is known than items: behaviours of which one is predicted, ratings, times, domains."""

import dataclasses
import math

import numpy as np
import torch

from client.cohort import train
from common.data.split import leave_one_out
from tests.support import records, world

ITEMS, LONGEST, ROUND = 24, 11, 5
LENGTHS = [0, 1, 2, 3, 9, 10, 12, 14, 23, 16, 8]
HISTORIES = [[item % ITEMS for item in history] for history in world.random_histories(LENGTHS, 2 * ITEMS)]
VIEW, CART, BUY = range(3)
NAMES, OTHER_NAMES = ("view", "cart", "buy"), ("buy", "nothing", "view", "cart")  # of the data, and of the model
RNG = np.random.default_rng(1)
EVENTS = sum(LENGTHS)
TIMES = 10**9 + RNG.choice([0, 0, 1, 7, 60, 3600, 86_400, 10**7], EVENTS).cumsum()
BEHAVIOURS = RNG.choice(3, EVENTS, p=[0.5, 0.1, 0.4]).astype(np.int8)
BEHAVIOURS[sum(LENGTHS[:-1]) :] = VIEW  # the last one never buys
RATINGS = RNG.choice([0.0, 1, 2.5, 4, 5, 7, math.nan], EVENTS).astype(np.float32)
DOMAINS = RNG.choice(3, ITEMS, p=[0.4, 0.4, 0.2]).astype(np.int8)
EVERYBODY, NEVER = np.arange(len(LENGTHS)), len(LENGTHS) - 1
ALL_INPUTS = [
    {"kind": "behaviour", "names": OTHER_NAMES},
    {"kind": "rating", "low": 1, "high": 5},
    {"kind": "hour"},
    {"kind": "weekday"},
    {"kind": "interval", "buckets": 20},
]
USERS_OF = {user: slice(sum(LENGTHS[:user]), sum(LENGTHS[: user + 1])) for user in EVERYBODY.tolist()}


def data(target=BUY, domains=True, held_out=False, known=True):
    whole = world.sequences(HISTORIES, held_out=False)
    names = ("toy", "game", "book") if domains else ("toy",)
    whole = dataclasses.replace(whole, times=TIMES, target=target, behaviour_names=NAMES, domain_names=names)
    if held_out:
        places = None if target < 0 else np.flatnonzero(target == BEHAVIOURS)
        whole = dataclasses.replace(whole, **leave_one_out(whole.offsets, places)._asdict())
    said = {"behaviours": BEHAVIOURS, "ratings": RATINGS} if known else {"behaviours": None, "ratings": None}
    whole.__dict__.update(said, domains=DOMAINS if domains else None)
    return whole


def case(loss, inputs=True, predict="target", steps=1, window="last", weighting="uniform", **model):
    return world.experiment(
        loss=world.LOSSES[loss],
        model={"dropout": 0.3, "max_length": LONGEST, "inputs": ALL_INPUTS if inputs else [], **model},
        federation={
            "weighting": weighting,
            "local": {"lr": 1.0 if steps == 1 else 0.1, "steps": steps, "window": window, "predict": predict},
        },
    )


def trained(experiment, sequences, users=EVERYBODY):
    weights = world.weights(experiment.model, ITEMS)
    return list(train(experiment, weights, sequences, np.asarray(users), ROUND))


def singles(chunks):
    return {
        user: records.dense(None if updates.whole else updates.rows(i), updates.one(i), ITEMS)
        for updates in chunks
        for i, user in enumerate(updates.users.tolist())
    }


def said(chunks, name):
    return {
        user: value for each in chunks for user, value in zip(each.users.tolist(), getattr(each, name), strict=True)
    }


def targets(user, predict="target"):
    """Places of the events that a user's last window learns to predict."""
    places = range(USERS_OF[user].start, USERS_OF[user].stop)[-LONGEST - 1 :][1:]
    return [place for place in places if predict == "all" or BEHAVIOURS[place] == BUY]


def item(place):
    return next(HISTORIES[user][place - cut.start] for user, cut in USERS_OF.items() if cut.start <= place < cut.stop)


def norm(change):
    return float(torch.hypot(*map(torch.linalg.vector_norm, change)))
