"""One user in ten is hostile: plain averaging is carried away, a bound on norms or a robust rule is not.

Small and synthetic; the figures of MovieLens 100K stand in docs/results.md.
"""

from functools import cache

import numpy as np
import pytest
from flwr.app import RecordDict

from client.device import Device
from common.data.prepare import prepare
from common.wire import UPDATE, arrays
from server.rounds import serve
from simulations.grid import FIRST_NODE, InProcessGrid
from tests.support import world

USERS = 150
HOSTILE = frozenset(np.random.default_rng(1).choice(USERS, USERS // 10, replace=False).tolist())
FLIPPED, LOUD, BOTH = -1.0, 100.0, -100.0
BOUND = {"norm_bound": "median"}


class Hostile(InProcessGrid):
    """A Grid in which some users multiply what they send."""

    factor = 1.0

    def send_and_receive(self, messages, *, timeout=None):
        replies = super().send_and_receive(messages, timeout=timeout)
        for reply in replies:
            if self.factor != 1 and reply.metadata.src_node_id - FIRST_NODE in HOSTILE and UPDATE in reply.content:
                sent = {name: array.numpy() * np.float32(self.factor) for name, array in reply.content[UPDATE].items()}
                reply.content = RecordDict({**reply.content, UPDATE: arrays(**sent)})
        return replies


def rule(kind):
    return {"aggregation": {"kind": kind}, "shards": "users"}


def quality(factor, **federation):
    """Test NDCG@10 of the honest users' model, chosen by validation as ever."""
    experiment = world.experiment(
        data={"kind": "synthetic", "users": USERS, "items": 60, "interests": 4, "mean_length": 10, "max_length": 20},
        model={"dim": 16, "max_length": 12},
        federation={"rounds": 30, "cohort": 60, "optimizer": {"kind": "fedadam", "lr": 0.02}, **federation},
        evaluation={"every": 10, "resamples": 100},
    )
    grid = Hostile(Device.open(experiment, prepare(experiment.data)), "vectorized")
    grid.factor = factor
    return serve(grid, experiment, None, lambda line: None).figures["ndcg@10"]


@cache
def unattacked():
    return quality(1.0)


def test_plain_averaging_is_carried_away():
    assert quality(BOTH) < 0.5 * unattacked()


@pytest.mark.parametrize("factor", [FLIPPED, LOUD, BOTH])
@pytest.mark.parametrize("defence", [BOUND, rule("trimmed-mean")], ids=["norm bound", "trimmed mean"])
def test_a_defence_keeps_nearly_all(defence, factor):
    assert quality(factor, **defence) >= 0.9 * unattacked()
