"""What the same data, model and passes give without federation: one pool of everybody's events.

A step of the centralised loop takes the users of a round as its batch; validation chooses the step, as in a run.
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from client.device import Device
from client.evaluation import rank
from common.config import Experiment
from common.data.prepare import prepare
from common.data.sequences import Split
from common.memory import keep_freed_memory
from common.metrics import point
from common.models.shapes import ITEM_TABLE
from common.models.weights import Weights, body_shapes
from server.rounds import SELECT
from server.sampling import cohort
from simulations import centralised
from simulations.certify import initial_model, parity_mode, require_known


def train(experiment: Experiment, report: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Train on the pool, choose by validation, test once.

    Parameters
    ----------
    experiment : Experiment
        Its rounds are steps. What is federated about it, such as weighting and local steps, is put into parity mode.
    report : callable
        Told each validation.

    Returns
    -------
    dict
        `steps`, `best_step`, `validation` (its NDCG@10) and `test` (figures by name).

    Raises
    ------
    UsageError
        As `simulations.certify.require_known`.
    """
    require_known(experiment)
    keep_freed_memory()
    if experiment.runtime.threads:
        torch.set_num_threads(experiment.runtime.threads)
    federation, evaluation = experiment.federation, experiment.evaluation
    experiment = parity_mode(experiment)
    device = Device.open(experiment, prepare(experiment.data))
    sequences, everybody = device.sequences, np.arange(len(device.sequences))
    model = initial_model(device)
    optimizer = centralised.adam(experiment, model)

    def quality(split: Split) -> dict[str, float]:
        parts = model.named()
        body = torch.cat([parts[name].flatten() for name in body_shapes(experiment.model)])
        return point(rank(experiment, Weights(parts[ITEM_TABLE], body), sequences, everybody, split).full, [10])

    step, stale, best_step, best_value, best = 0, 0, 0, -1.0, model.state_dict()
    while step < federation.rounds and (evaluation.patience is None or stale < evaluation.patience):
        step += 1
        users = cohort(federation, len(sequences), experiment.seed, step)
        centralised.train_step(experiment, model, optimizer, sequences, users, step)
        if step % evaluation.every == 0 or step == federation.rounds:
            value = quality("validation")[SELECT]
            report(f"step {step}/{federation.rounds}  validation NDCG@10 {value:.4f}")
            stale += 1
            if value > best_value:
                best_step, best_value, best, stale = step, value, copy.deepcopy(model.state_dict()), 0
    model.load_state_dict(best)
    return {"steps": step, "best_step": best_step, "validation": best_value, "test": quality("test")}
