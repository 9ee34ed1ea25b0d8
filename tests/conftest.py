"""What all tests share. Neither torch nor flwr is imported here: torch takes seconds, and many tests need neither."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# flwr reads these when it is imported, which may be as early as the collection of the first test file.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    # One thread a worker, or two workers would fight over two cores; torch and polars read these, in subprocesses too.
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS"), "1")

settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


FIRST = ("test_deployment_faults.py", "test_network_namespaces.py", "test_deployment.py")
"""Files that wait for other processes most of the time: what starts last would be waited for alone."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that wait in front; the others stay as they are."""
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


@pytest.fixture(autouse=True, scope="session")
def _folders_of_our_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the prepared data and Flower's files of a test session away from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HUSHREC_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("FLWR_HOME", str(tmp_path_factory.mktemp("flwr")))
        yield


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with the real data sets; without one the test is skipped."""
    folder = os.environ.get("HUSHREC_DATA")
    if not folder:
        pytest.skip("needs real data: set HUSHREC_DATA to a folder with ml-100k, ml-1m, beauty …")
    path = Path(folder).resolve()
    assert path.is_dir(), f"HUSHREC_DATA names no folder: {path}"
    return path
