"""A thread that a library leaves behind does not keep a finished command alive."""

import pytest

from tests.support.processes import TINY, hushrec

LEFT_BEHIND = """
import threading, time
threading.Thread(target=time.sleep, args=(600,), daemon={daemon}).start()
"""


@pytest.mark.parametrize("daemon", [True, False])
def test_a_command_ends_all_the_same(tmp_path, daemon):
    (tmp_path / "tiny.yaml").write_text(TINY)
    done = hushrec(tmp_path, "show", "tiny.yaml", "--json", before=LEFT_BEHIND.format(daemon=daemon))
    assert done.code == 0
    assert done.out.rstrip().endswith("}")
    assert hushrec(tmp_path, "show", "none.yaml", before=LEFT_BEHIND.format(daemon=daemon)).code == 2
