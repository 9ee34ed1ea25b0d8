"""A world small enough to check by hand: histories in memory, experiments, weights and messages."""

from pathlib import Path

import numpy as np
import torch
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client.device import Device
from common.config import Experiment, experiment_hash
from common.data.catalogue import Catalogue
from common.data.sequences import Sequences
from common.data.split import leave_one_out
from common.models.schema import ModelConfig
from common.models.weights import Weights, initialise
from common.seeding import generator
from common.wire import METRICS, MODEL, ROUND, UPDATE, arrays, pack

LOSSES = {
    "softmax": {"kind": "softmax"},
    "sampled-softmax": {"kind": "sampled-softmax", "negatives": 7},
    "gbce": {"kind": "gbce", "negatives": 5, "calibration": 0.75},
    "bce": {"kind": "bce"},
}
NOWHERE = Path("/nowhere")
NODE = 2  # of user 0


def experiment(**sections):
    """An experiment with a tiny model; each keyword is a section, merged into the tiny one."""
    tiny = {"dim": 8, "blocks": 1, "heads": 2, "dropout": 0.0, "max_length": 6}
    base = {"name": "test", "data": {"kind": "synthetic", "users": 12, "items": 20, "interests": 4, "mean_length": 6}}
    model = {**tiny, **sections.pop("model", {})}
    return Experiment.model_validate({**base, "model": model, **sections})


def sequences(histories, held_out=True):
    """Histories in memory; unless `held_out`, every event is a training event."""
    lengths = [len(history) for history in histories]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    items = np.concatenate([*map(np.asarray, histories), []]).astype(np.int32)
    train_end, validation, test = leave_one_out(offsets)
    if not held_out:
        train_end, validation, test = offsets[1:], np.full_like(validation, -1), np.full_like(test, -1)
    return Sequences(NOWHERE, items, np.arange(len(items)), offsets, train_end, validation, test)


def random_histories(lengths, items, seed=0):
    """Histories of such lengths, without repeats where the catalogue is large enough for it."""
    rng = np.random.default_rng(seed)
    return [rng.choice(items, length, replace=length > items).tolist() for length in lengths]


def device(experiment, sequences, items):
    """A device that plays all users."""
    catalogue = Catalogue(NOWHERE, len(sequences), items, "digest")
    catalogue.__dict__["version"] = "made up"  # there is no file to read it from
    return Device(experiment, sequences, catalogue)


def weights(config: ModelConfig, items, seed=0, scale=0.3):
    """Weights with nothing at zero or one, so that no parameter can be left out unseen."""
    table, body = initialise(config, items, seed)
    rng = generator(seed, "test-weights")
    noise = [torch.from_numpy(rng.standard_normal(tuple(part.shape), dtype="float32")) for part in (table, body)]
    return Weights(table + scale * noise[0], body + scale / 2 * noise[1])


def identify():
    """What Flower wants to know before it makes a message."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1


def ask(kind, experiment, weights=None, users=(0,), round_=1, **config):
    """The server's messages to some users."""
    identify()
    told = ConfigRecord({"round": round_, "experiment": experiment_hash(experiment), **config})
    content = RecordDict({ROUND: told} | ({} if weights is None else {MODEL: pack(weights)}))
    return [Message(content, NODE + user, kind, group_id=str(round_)) for user in users]


def answer(user, *, node=None, error=None, metrics=None, without=(), round_=1, **values):
    """A client's reply: arrays by name; `metrics` None, or what goes beside `user`; `without` leaves records out."""
    identify()
    question = Message(RecordDict(), NODE + user if node is None else node, "train", group_id=str(round_))
    if error is not None:
        return Message(Error(1, error), reply_to=question)
    records = {UPDATE: arrays(**values), METRICS: MetricRecord({"user": user, **(metrics or {})})}
    return Message(RecordDict({k: v for k, v in records.items() if k not in without}), reply_to=question)


def same(left: Weights, right: Weights, atol=0.0):
    """Whether two sets of weights agree, to the bit by default."""
    return all(torch.allclose(a, b, rtol=0, atol=atol) for a, b in zip(left, right, strict=True))


def gap(left: Weights, right: Weights):
    """Largest difference between two sets of weights."""
    assert [part.shape for part in left] == [part.shape for part in right]
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True) if a.numel())
