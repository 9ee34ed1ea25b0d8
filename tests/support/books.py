"""Lines of ledgers and accounts, made and read by hand."""

import json
from contextlib import suppress

from common.privacy.lines import CHECK, sealed


def seal(row):
    """A line as it stands in a file, with its checksum where it is an object at all; text or bytes."""
    text = row.decode(errors="replace") if isinstance(row, bytes) else row
    with suppress(ValueError):
        line = json.loads(text)
        if isinstance(line, dict):
            made = sealed({name: value for name, value in line.items() if name != CHECK})
            return made.encode() if isinstance(row, bytes) else made
    return row


def opened(text):
    """What a line says, without its checksum."""
    line = json.loads(text)
    assert line.pop(CHECK)
    return line
