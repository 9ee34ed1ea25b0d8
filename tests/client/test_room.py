"""The folder that stands for devices: nobody else's, whoever comes first, and told to be no result."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from client.room import room
from common.errors import StateError


def test_many_make_one_room(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        folders = {*pool.map(lambda _: room(tmp_path), range(64))}
    (folder,) = folders
    assert folder.stat().st_mode & 0o777 == 0o700
    assert "do not publish" in (folder / "README.txt").read_text()


def test_a_room_left_half_made_is_finished(tmp_path):
    (tmp_path / "devices").mkdir(mode=0o755)
    assert room(tmp_path).stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "devices" / "README.txt").exists()


def test_no_room_is_one_line(tmp_path):
    (tmp_path / "devices").write_text("")
    with pytest.raises(StateError, match="devices"):
        room(tmp_path)
