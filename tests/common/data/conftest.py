"""Every test has a cache of its own, and a way to write a file and read it as a source."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from common.sources import DataConfig

Source = Callable[..., Any]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("HUSHREC_CACHE", str(folder))
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """Write `content` to `name` in a folder and give a data section of that kind that points there."""

    def make(kind: str, name: str, content: str | bytes, **options: Any) -> Any:
        path = tmp_path / "raw" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return TypeAdapter(DataConfig).validate_python({"kind": kind, "path": str(path), **options})

    return make
