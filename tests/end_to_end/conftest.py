"""One run that nothing disturbed, for all others to be held against; and copies of it to be spoilt."""

import shutil
from pathlib import Path

import pytest

from tests.support.processes import TINY, hushrec

COUNTED = """
import simulations.runner as runner
whole, calls = runner.run, 0
def count(frame, event, arg):
    global calls
    calls += event == "call"
def counted(*args):
    sys.setprofile(count)
    result = whole(*args)
    sys.setprofile(None)
    open("calls", "w").write(str(calls))
    return result
runner.run = counted
"""


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `tiny.yaml`, its finished run in `run`, what that printed, and its number of function calls."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "tiny.yaml").write_text(TINY)
    done = hushrec(folder, "run", "tiny.yaml", "--out", "run", "--json", before=COUNTED)
    assert done.code == 0, done.err
    (folder / "printed").write_text(done.out)
    return folder


@pytest.fixture
def finished(undisturbed: Path, tmp_path: Path) -> Path:
    """A working directory with a finished run in `run`."""
    return Path(shutil.copytree(undisturbed, tmp_path / "work"))


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """A working directory with nothing in it but `tiny.yaml`."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "tiny.yaml").write_text(TINY)
    return tmp_path / "work"
