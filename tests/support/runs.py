"""What a run directory holds, as far as it must be the same each time."""

import json
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

UNTIMED = ("rounds", "best_round", "users", "items", "users_tested", "test", "baselines", "bytes_up_per_client")


def figures(run: Path) -> dict[str, Any]:
    """All of `result.json` that is no time, place or memory."""
    result = json.loads((run / "result.json").read_text())
    return {name: result[name] for name in UNTIMED}


def metrics(run: Path) -> list[dict[str, Any]]:
    """Lines of `metrics.jsonl` without their seconds."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in {"seconds", "phases"}} for line in lines]


def weights(run: Path) -> dict[str, bytes]:
    """Every tensor of the model; its file also has the experiment, with `runtime`."""
    return {name: tensor.tobytes() for name, tensor in load_file(run / "model.safetensors").items()}


def tree(folder: Path) -> dict[str, bytes]:
    """Content of every file below a folder; of a folder, nothing."""
    found = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in found}


def assert_same_run(run: Path, other: Path) -> None:
    """Equal to the bit: the model, every line of metrics, every figure. And nothing half-written lies about."""
    assert metrics(run) == metrics(other)
    assert figures(run) == figures(other)
    assert (run / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in other.iterdir())
