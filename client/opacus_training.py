"""DP-SGD with Opacus, one user at a time, as a device does it; the same as `client.examples` to float tolerance."""

import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from opacus import PrivacyEngine
from opacus.optimizers import DPOptimizer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from client.examples import Examples, draw, mode
from client.gradcheck import self_test
from client.noised import Noised
from client.opacus_module import TiedSASRec
from client.problem import Problem
from client.rows import Ints
from client.step import dropout_masks
from common.config import Experiment
from common.data.sequences import Sequences
from common.errors import StateError
from common.models.losses import Candidates, build_loss
from common.models.weights import Weights
from common.privacy.devices import settle


class Steps(Dataset[Examples]):
    """What a user's local steps train on; the coins are tossed here."""

    def __init__(self, experiment: Experiment, sequences: Sequences, users: Ints, items: int, round_: int):
        self._told = experiment, sequences, users, items, round_

    def __len__(self) -> int:
        return self._told[0].federation.local.steps or 1

    def __getitem__(self, step: int) -> Examples:
        return draw(*self._told, step)


class OwnNoise(DPOptimizer):
    """Opacus' optimiser with noise from our sources, which draw all parameters' noise together."""

    noise: Callable[[int], Tensor]
    """Gives so many standard normal numbers, for one step."""

    def clip_and_accumulate(self) -> None:
        """As Opacus does, where a segment's gradient that is not finite is worth nothing, and not NaN."""
        samples = self.grad_samples
        finite = torch.stack([sample.flatten(1).isfinite().all(1) for sample in samples]).all(0)  # (E,)
        for sample in samples:
            sample[~finite] = 0.0
        super().clip_and_accumulate()

    def add_noise(self) -> None:
        """Add noise to the clipped sum, in the order in which weights travel."""
        drawn = self.noise(sum(parameter.numel() for parameter in self.params))
        begin = 0
        for parameter in self.params:
            part = drawn[begin : begin + parameter.numel()].view(parameter.shape)
            begin += parameter.numel()
            parameter.grad = parameter.summed_grad + self.noise_multiplier * self.max_grad_norm * part


def train(
    experiment: Experiment,
    weights: Weights,
    sequences: Sequences,
    users: Ints,
    round_: int,
    clip: float | None = None,
) -> Iterator[Noised]:
    """Train users one by one; arguments as in `client.cohort.train`."""
    opacus_is_right(experiment)
    for user in users.tolist():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of random numbers that are not used, and of hooks on a first layer
            change = one(experiment, weights, sequences, user, round_)
        yield Noised(np.array([user]), change.table.unsqueeze(0), change.body.unsqueeze(0), clip)


def one(experiment: Experiment, weights: Weights, sequences: Sequences, user: int, round_: int) -> Weights:
    """One user's noised change.

    Raises
    ------
    StateError
        Where Opacus' accountant has not seen every step.
    """
    privacy, source = mode(experiment)
    terms, local, (items, _) = settle(experiment), experiment.federation.local, weights.table.shape
    module = _module(experiment, weights)
    sgd = torch.optim.SGD(module.ordered(), lr=local.lr / privacy.examples)
    steps = Steps(experiment, sequences, np.array([user]), items, round_)
    engine = PrivacyEngine(accountant="prv")
    watched, _, loader = engine.make_private(
        module=module,
        optimizer=sgd,
        data_loader=DataLoader(steps, batch_size=None, collate_fn=_as_it_is),
        noise_multiplier=terms.noise_multiplier,
        max_grad_norm=privacy.clipping_norm,
        poisson_sampling=False,  # the steps have tossed their coins
        loss_reduction="sum",
        grad_sample_mode="hooks",
    )
    optimizer = OwnNoise(
        sgd,
        noise_multiplier=terms.noise_multiplier,
        max_grad_norm=privacy.clipping_norm,
        expected_batch_size=None,
        loss_reduction="sum",
    )
    optimizer.attach_step_hook(engine.accountant.get_optimizer_hook_fn(privacy.sampling_rate))
    change = [torch.zeros_like(parameter) for parameter in module.ordered()]
    for step, taken in enumerate(loader):
        optimizer.noise = lambda n, step=step: source.many(n, "device-noise", round_, step, user)  # type: ignore[misc]
        optimizer.zero_grad()
        losses(experiment, watched, taken.problem, round_).sum().backward()
        optimizer.step()
        for part, parameter in zip(change, module.ordered(), strict=True):  # a difference of weights loses digits
            if parameter.grad is not None:
                part.sub_(parameter.grad, alpha=local.lr / privacy.examples)
    seen = sum(count for _, _, count in engine.accountant.history)
    if seen != len(steps):
        raise StateError(f"Opacus accounted for {seen} of {len(steps)} local steps")
    return Weights(change[0], torch.cat([part.flatten() for part in change[1:]]))


def losses(experiment: Experiment, module: Callable[..., Candidates], problem: Problem, round_: int) -> Tensor:
    """Loss of each segment, ``(E,)``."""
    events = torch.from_numpy(problem.windows.events[:, 0])
    count, width = len(events), events.shape[1] - 1
    masks = dropout_masks(experiment, problem.windows.users, width, 0, round_)
    negatives, private = torch.zeros(count, 0, dtype=torch.int64), problem.private is not None
    if problem.private is not None and problem.rows is not None:
        negatives = torch.from_numpy(np.take_along_axis(problem.rows, problem.private[:, 0].numpy(), axis=1))
    elif problem.rows is not None:
        negatives = torch.from_numpy(problem.rows[:, : problem.negatives]).contiguous()
    found = module(events, negatives, private, masks)
    negative = found.negative
    if problem.barred is not None:
        negative = negative + (problem.barred[:, 0] if private else problem.barred)
    mask = torch.from_numpy(np.arange(1, width + 1) < problem.windows.lengths[:, :1])
    loss = build_loss(experiment.loss, problem.catalogue)
    return loss(Candidates(found.positive, negative), events[:, 1:], mask)


def hooked(experiment: Experiment, weights: Weights, problem: Problem) -> Weights:
    """Per-example gradients as Opacus' hooks have them, for `self_test`."""
    from opacus import GradSampleModule

    module = _module(experiment, weights)
    losses(experiment, GradSampleModule(module, loss_reduction="sum"), problem, 1).sum().backward()
    table, *others = (getattr(parameter, "grad_sample") for parameter in module.ordered())  # noqa: B009
    return Weights(table, torch.cat([part.flatten(1) for part in others], dim=1))


@lru_cache(maxsize=4)
def opacus_is_right(experiment: Experiment) -> None:
    """`self_test` of Opacus' hooks on our module, once in a process; errors as there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        self_test(experiment, "opacus", hooked)


def _module(experiment: Experiment, weights: Weights) -> TiedSASRec:
    module = TiedSASRec(experiment.model, len(weights.table), experiment.loss.kind == "softmax")
    module.load(experiment.model, weights)
    return module


def _as_it_is(taken: Any) -> Any:
    return taken
