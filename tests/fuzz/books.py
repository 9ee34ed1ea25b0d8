"""A small ledger and a small account, and what is read from them, or None where one line says that they are damaged."""

from client.accounts import ACCOUNTS_FILE, Accounts
from common.errors import StateError
from server.ledger import LEDGER_FILE, RANKING, UPDATE, Ledger

TERMS = {"noise_multiplier": 2.0, "sampling_rate": 0.5, "steps": 3}


def outcome(call, *arguments):
    """What comes back, or None where one line names the file; whatever else is raised is a defect."""
    line = None
    try:
        return call(*arguments)
    except StateError as error:
        line = str(error)
    assert len(line.splitlines()) == 1
    assert str(arguments[0]) in line
    return None


def ledger(folder):
    """A ledger's sums and lines, or None where it is refused; it then also can be paid into."""
    found = outcome(lambda path: Ledger(path.parent), folder / LEDGER_FILE)
    if found is None:
        return None
    sums = found.count(UPDATE), found.count(RANKING), found.attempts(UPDATE, 2), found.busiest
    return sums, list(found.lines), found.pay(UPDATE, 9, rate=0.1)


def account(folder):
    """What each user has spent, or None where the account is refused."""
    found = outcome(Accounts, folder / ACCOUNTS_FILE)
    return None if found is None else ([found.taken(user) for user in range(12)], dict(found.terms))


def paid(folder):
    """A ledger and an account of a few rounds."""
    book, accounts = Ledger(folder), Accounts(folder / ACCOUNTS_FILE)
    for round_ in (1, 2, 2, 3, 4):
        book.pay(UPDATE, round_, sampler="poisson", rate=0.25, noise_multiplier=4.0, participations=round_)
        accounts.pay([round_, round_ + 1, 11], round_, TERMS)
    book.pay(RANKING, 4, std=30.0)


BOOKS = {"ledger": (ledger, LEDGER_FILE), "account": (account, ACCOUNTS_FILE)}
