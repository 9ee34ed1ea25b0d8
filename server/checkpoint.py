"""The state of a run between two rounds, in one file that is whole or absent.

One safetensors file holds all tensors; its header holds the rest as JSON. Whatever is drawn at random is a function of
the seed and the round, so no generator's state is stored.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.config import Experiment, experiment_hash
from common.errors import StateError
from common.files import atomic, explained
from common.models.shapes import ITEM_TABLE, parameter_shapes
from common.models.weights import Weights, body_size, named

FORMAT = 2
"""2 has a checksum over everything; files of 1 are not read."""


@dataclass
class State:
    """All that the next round depends on."""

    weights: Weights
    """Global weights."""
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    """Moments of the server's optimiser, by name."""
    round: int = 0
    """Rounds done."""
    best: Weights | None = None
    """Weights of the best validation so far."""
    best_round: int = 0
    """Its round."""
    best_value: float = float("-inf")
    """Its NDCG@10."""
    stale: int = 0
    """Validations since."""
    clip: float | None = None
    """Clipping norm of the next round, where it adapts."""


def save(path: Path, state: State, experiment: Experiment) -> None:
    """Write a checkpoint atomically; of those before it, `runtime.checkpoints` − 1 stay under numbered names.

    Raises
    ------
    StateError
        Where the file cannot be written; the one before stays.
    """
    tensors = {f"weights.{name}": part for name, part in state.weights._asdict().items()}
    tensors |= {f"optimizer.{name}": part for name, part in state.optimizer.items()}
    if state.best is not None:
        tensors |= {f"best.{name}": part for name, part in state.best._asdict().items()}
    facts = {
        "format": FORMAT,
        "experiment": experiment_hash(experiment),
        "round": state.round,
        "best_round": state.best_round,
        "best_value": state.best_value,
        "stale": state.stale,
        "clip": state.clip,
    }
    with explained(path):
        kept = versions(path, experiment.runtime.checkpoints)
        shifted = len(kept) > 1 and kept[1].exists() and path.exists() and kept[1].samefile(path)  # then killed
        for newer, older in [] if shifted else reversed([*pairwise(kept)]):
            _keep(newer, older)
    _write(path, tensors, facts)


def versions(path: Path, count: int) -> list[Path]:
    """Where a checkpoint and those before it lie, the newest first."""
    return [path, *(path.with_suffix(f".{age}{path.suffix}") for age in range(1, count))]


def found(path: Path) -> list[Path]:
    """Checkpoints that are there, the newest first, whatever the configuration said when they were written."""
    ages = {
        int(age): older for older in path.parent.glob(f"{path.stem}.*{path.suffix}") if (age := _age(older)).isdigit()
    }
    return [path] * path.exists() + [ages[age] for age in sorted(ages)]


def _age(path: Path) -> str:
    return path.stem.rpartition(".")[2]


def load_newest(path: Path, experiment: Experiment) -> State:
    """Read the newest checkpoint that is whole; errors as in `load`, of the newest, where none is."""
    faults = []
    for version in found(path) or [path]:
        try:
            state = load(version, experiment)
        except StateError as fault:
            faults.append(fault)
            continue
        if version != path:
            why = faults[0] if faults else f"{path}: is not there"
            logging.getLogger(__name__).warning("%s; going on from %s", why, version.name)
        return state
    raise faults[0]


def _keep(newer: Path, older: Path) -> None:
    """Let an older name stand for what a newer one stands for, at once; the newer stays."""
    if newer.exists() and not (older.exists() and older.samefile(newer)):
        with atomic(older) as temporary:
            try:
                temporary.hardlink_to(newer)
            except OSError:  # not on every file system
                shutil.copyfile(newer, temporary)


def load(path: Path, experiment: Experiment) -> State:
    """Read a checkpoint of this experiment.

    Raises
    ------
    StateError
        Where the file is missing, truncated, of another format or of another experiment.
    """
    tensors, facts = _read(path)
    if facts.get("format") != FORMAT:
        raise StateError(f"{path}: format {facts.get('format')} is not {FORMAT}, which this version reads")
    if facts.get("experiment") != experiment_hash(experiment):
        raise StateError(f"{path}: belongs to another experiment (its configuration was changed); start a new run")

    def part(prefix: str) -> dict[str, Tensor]:
        return {name[len(prefix) + 1 :]: t for name, t in tensors.items() if name.startswith(prefix + ".")}

    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise StateError(f"{path}: holds numbers that are not finite; delete it and start a new run")
    try:
        best = part("best")
        _check(experiment, part("weights"), best, facts)
        return State(
            Weights(**part("weights")),
            part("optimizer"),
            facts["round"],
            Weights(**best) if best else None,
            facts["best_round"],
            facts["best_value"],
            facts["stale"],
            facts["clip"],
        )
    except (KeyError, TypeError, ValueError) as fault:
        raise StateError(f"{path}: incomplete checkpoint ({fault}); delete it and start a new run") from fault


def _check(
    experiment: Experiment, weights: dict[str, Tensor], best: dict[str, Tensor], facts: Mapping[str, object]
) -> None:
    """Hold what was read against the model; KeyError or ValueError where it does not fit."""
    items = len(weights["table"]) if weights["table"].dim() else 0
    shapes = {"table": (items, experiment.model.dim), "body": (body_size(experiment.model),)}
    for name, tensor in [*weights.items(), *best.items()]:
        if tuple(tensor.shape) != shapes[name] or tensor.dtype != torch.float32 or not tensor.numel():
            raise ValueError(f"{name} is {tuple(tensor.shape)} of {tensor.dtype}")
    for name in ("round", "best_round", "stale"):
        if type(facts[name]) is not int:
            raise ValueError(f"{name} is {facts[name]!r}")
    if not isinstance(facts["best_value"], float):
        raise ValueError(f"best_value is {facts['best_value']!r}")


def save_model(path: Path, weights: Weights, experiment: Experiment) -> None:
    """Write a trained model by parameter names, with its experiment in the header; atomically."""
    tensors = {ITEM_TABLE: weights.table} | named(experiment.model, weights.body)
    _write(path, tensors, {"format": FORMAT, "experiment": experiment.model_dump(mode="json", exclude={"runtime"})})


def load_model(path: Path, experiment: Experiment, items: int) -> Weights:
    """Read a model written by `save_model`.

    Raises
    ------
    StateError
        Where the file is missing or truncated, or where names or shapes don't fit the experiment, or a number is not
        finite.
    """
    tensors, _ = _read(path)
    shapes = parameter_shapes(experiment.model, items)
    for name, shape in shapes.items():
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != shape:
            raise StateError(f"{path}: parameter {name!r} is {found or 'missing'}, the experiment wants {shape}")
        if not torch.isfinite(tensors[name]).all():
            raise StateError(f"{path}: parameter {name!r} holds numbers that are not finite; train again")
    body = torch.cat([tensors[name].flatten() for name in shapes if name != ITEM_TABLE])
    return Weights(tensors[ITEM_TABLE], body)


def _write(path: Path, tensors: dict[str, Tensor], facts: dict[str, object]) -> None:
    owned = {name: part.detach().clone(memory_format=torch.contiguous_format) for name, part in tensors.items()}
    try:
        with atomic(path) as temporary:
            save_file(owned, temporary, metadata={"hushrec": sealed(owned, facts)})
    except SafetensorError as fault:
        raise StateError(f"{path}: cannot be written ({fault}); free some space or choose another folder") from fault


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with explained(path):
        path.open("rb").close()
    try:
        with safe_open(path, framework="pt") as file:
            facts = {**json.loads((file.metadata() or {})["hushrec"])}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        if facts.pop("sha256") != _digest(tensors, facts):
            raise ValueError("its checksum is another")
        return tensors, facts
    except (SafetensorError, KeyError, ValueError, TypeError, RecursionError) as fault:
        raise StateError(
            f"{path}: not a file of hushrec, or a truncated one ({fault}); restore it, or remove it and start again"
        ) from fault


def sealed(tensors: dict[str, Tensor], facts: Mapping[str, object]) -> str:
    """What is said beside the numbers, with a checksum over both; one entry, as safetensors orders none."""
    return json.dumps({**facts, "sha256": _digest(tensors, facts)})


def _digest(tensors: dict[str, Tensor], facts: Mapping[str, object]) -> str:
    whole = hashlib.sha256(json.dumps(facts).encode())
    for name, tensor in sorted(tensors.items()):
        whole.update(f"|{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        if tensor.numel():
            whole.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()
