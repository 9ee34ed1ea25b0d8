import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data import folder as disk
from common.errors import DataError


def test_appender_makes_a_plain_array(tmp_path):
    appender = disk.Appender(tmp_path, "items")
    for size in (3, 0, 1000):
        appender.append(np.arange(size, dtype=np.int64))
    appender.close()
    assert disk.load_array(tmp_path, "items", 1003).tolist() == [0, 1, 2, *range(1000)]
    assert np.load(tmp_path / "items.npy").dtype == np.int32


def test_a_draft_becomes_the_folder(tmp_path):
    target = tmp_path / "cache" / "data"
    with disk.being_made(target) as draft:
        (draft / "f").write_text("1")
        assert not target.exists()
    assert (target / "f").read_text() == "1"
    assert [path.name for path in target.parent.iterdir()] == ["data"]


def test_a_failed_draft_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), disk.being_made(tmp_path / "data") as draft:
        (draft / "f").write_text("1")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_the_other_process_was_faster(tmp_path):
    target = tmp_path / "data"
    with disk.being_made(target), disk.being_made(target) as other:
        (other / "f").write_text("other")
    assert (target / "f").read_text() == "other"


def test_an_unwritable_cache(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="HUSHREC_CACHE"), disk.being_made(tmp_path / "file" / "data"):
        pass


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 127))
def test_any_damage_is_an_error_of_ours(tmp_path_factory, junk, keep):
    folder = tmp_path_factory.mktemp("junk")
    np.save(folder / "items.npy", np.arange(5, dtype=np.int32))
    whole = (folder / "items.npy").read_bytes()
    (folder / "items.npy").write_bytes(whole[:keep] + junk)
    with pytest.raises(DataError, match="delete it"):
        disk.load_array(folder, "items", 5)
