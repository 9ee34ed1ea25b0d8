"""The account that a device keeps of itself: lines of a file, never forgotten, and refused where they are damaged."""

import json
import os
import subprocess
import sys

import pytest

from client.accounts import ACCOUNTS_FILE, Accounts
from common.errors import StateError
from tests.support.books import opened, seal

TERMS = {"noise_multiplier": 2.0, "sampling_rate": 0.5, "steps": 3}


def lines(path):
    return [opened(line) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path):
    return tmp_path / ACCOUNTS_FILE


# --- counting --------------------------------------------------------------------------------------------------------


def test_an_account_by_hand(path):
    accounts = Accounts(path)
    assert not path.exists()
    accounts.pay([3, 5], 1, TERMS)
    accounts.pay([3], 4, TERMS)
    assert [accounts.taken(user) for user in (3, 5, 7)] == [2, 1, 0]
    assert lines(path) == [{"round": 1, "users": [3, 5], "terms": TERMS}, {"round": 4, "users": [3], "terms": TERMS}]
    again = Accounts(path)
    assert [again.taken(user) for user in (3, 5, 7)] == [2, 1, 0]
    assert again.terms == TERMS


def test_an_account_in_memory_counts_the_same():
    accounts = Accounts()
    for users in ([3, 5], [3]):
        accounts.pay(users, 1, TERMS)
    assert [accounts.taken(user) for user in (3, 5, 7)] == [2, 1, 0]


def test_another_process_sees_what_was_spent(path):
    Accounts(path).pay([0, 1], 1, TERMS)
    look = (
        f"from pathlib import Path; from client.accounts import Accounts; print(Accounts(Path({str(path)!r})).taken(1))"
    )
    told = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True, cwd=os.getcwd())
    assert told.stdout.split() == ["1"]


def test_two_on_one_file_see_each_others_lines(path):
    one, other = Accounts(path), Accounts(path)
    one.pay([0], 1, TERMS)
    assert other.taken(0) == 0
    other.refresh()
    other.refresh()
    assert other.taken(0) == 1
    other.pay([0, 2], 2, TERMS)
    one.pay([0], 3, TERMS)  # who pays has read all that was written
    assert [one.taken(user) for user in (0, 2)] == [3, 1]
    other.refresh()
    assert [other.taken(user) for user in (0, 2)] == [3, 1]


def test_what_is_known_from_elsewhere_never_lowers_a_count():
    accounts = Accounts()
    accounts.pay([1], 1, TERMS)
    accounts.remember(1, 5, TERMS)
    accounts.remember(1, 2, TERMS)
    accounts.pay([1], 2, TERMS)
    assert accounts.taken(1) == 6
    with pytest.raises(StateError, match="other terms"):
        accounts.remember(1, 9, {**TERMS, "steps": 4})


# --- accounts that cannot be believed --------------------------------------------------------------------------------

GOOD = json.dumps({"round": 1, "users": [0], "terms": TERMS})
BAD = {
    "no JSON": "hello",
    "half a line": GOOD[:25],
    "a blank line": "",
    "a number": "3",
    "a list": "[]",
    "nothing": "null",
    "no users": GOOD.replace('"users": [0], ', ""),
    "users as a number": GOOD.replace("[0]", "0"),
    "no terms": '{"round": 1, "users": [0]}',
    "terms as a list": '{"round": 1, "users": [0], "terms": []}',
    "no text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("fault", BAD)
@pytest.mark.parametrize("place", [1, 3])
def test_a_damaged_account_is_refused_by_file_and_line(fault, place, path):
    rows = [GOOD.encode()] * 3
    rows[place - 1] = BAD[fault] if isinstance(BAD[fault], bytes) else BAD[fault].encode()
    path.write_bytes(b"\n".join(map(seal, rows)) + b"\n")
    with pytest.raises(StateError, match=rf"{ACCOUNTS_FILE}:{place}: .*what was spent is unknown"):
        Accounts(path)


@pytest.mark.parametrize("fault", BAD)
def test_what_is_damaged_later_is_refused_by_its_line_too(fault, path):
    accounts = Accounts(path)
    for round_ in (1, 2):
        accounts.pay([0], round_, TERMS)
    with path.open("ab") as file:
        file.write(seal(BAD[fault] if isinstance(BAD[fault], bytes) else BAD[fault].encode()) + b"\n")
    for attempt in (accounts.refresh, accounts.refresh, lambda: accounts.pay([0], 3, TERMS)):
        with pytest.raises(StateError, match=rf"{ACCOUNTS_FILE}:3: "):
            attempt()


@pytest.mark.parametrize("end", [len(seal(GOOD)) - 1, len(seal(GOOD))])
def test_an_account_that_is_cut_off_is_refused(end, path):
    path.write_text(seal(GOOD) + "\n" + seal(GOOD)[:end])
    with pytest.raises(StateError, match=ACCOUNTS_FILE):
        Accounts(path)


@pytest.mark.parametrize("name", TERMS)
def test_an_account_of_other_terms_is_refused(name, path):
    other = {**TERMS, name: 4}
    accounts = Accounts(path)
    accounts.pay([0], 1, TERMS)
    before = path.read_bytes()
    for attempt in (accounts, Accounts(path)):
        with pytest.raises(StateError, match="other terms"):
            attempt.pay([0], 2, other)
    assert path.read_bytes() == before
    changed = GOOD.replace(f'"{name}": {TERMS[name]}', f'"{name}": 4')
    path.write_text(seal(GOOD) + "\n" + seal(changed) + "\n")
    with pytest.raises(StateError, match="other terms"):
        Accounts(path)


def test_an_account_with_a_line_of_other_terms_stays_refused(path):
    accounts = Accounts(path)
    accounts.pay([0], 1, TERMS)
    with path.open("a") as file:
        file.write(seal(GOOD.replace("2.0", "4.0")) + "\n" + seal(GOOD) + "\n")
    for _ in range(2):
        with pytest.raises(StateError, match="other terms"):
            accounts.refresh()


@pytest.mark.parametrize("way", ["emptied", "removed"])
def test_an_account_that_has_lost_lines_is_refused(way, path):
    """What was paid before is known, and what is paid afterwards must not be overlooked."""
    accounts = Accounts(path)
    for round_ in (1, 2):
        accounts.pay([0], round_, TERMS)
    if way == "removed":
        path.unlink()
    else:
        path.write_text("")
    for attempt in (accounts.refresh, lambda: accounts.pay([0], 3, TERMS)):
        with pytest.raises(StateError, match=ACCOUNTS_FILE):
            attempt()


@pytest.mark.parametrize("line", ['"users": ["0"]', '"users": [null]', '"users": [[0]]'])
def test_users_that_are_no_numbers_are_damage(line, path):
    path.write_text(seal(GOOD.replace('"users": [0]', line)) + "\n")
    with pytest.raises(StateError, match=f"{ACCOUNTS_FILE}:1: "):
        Accounts(path)
