"""From YAML text and overrides to a validated `Experiment`, or to all faults at once, each with its place.

Scalars stay text until the schema says what they are. So `no`, `010`, `1_000`, `1e-5` and `2024-01-01` mean what they
look like, whatever YAML 1.1 makes of them; only an unquoted `null` (or nothing at all) is taken at YAML's word.
"""

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from yaml.reader import ReaderError

from common.config import Experiment
from common.errors import ConfigError
from common.wording import Key, dotted, fault_of, shown

_MAX_BYTES = 100_000  # a longer text is no experiment
_MAX_VALUES = 10_000  # with aliases followed, as a few nested ones can stand for billions
_Place = tuple[int, str]  # order among the places, name


def load(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment from a YAML or JSON file.

    Parameters
    ----------
    path : str or Path
        Looked up as given, then beside the package, since the code may run from an installed Flower app.
    overrides : sequence of str
        See `parse`.

    Raises
    ------
    ConfigError
        The file cannot be read (the nearest names are offered), or as in `parse`.
    """
    path, home = Path(path), Path(__file__).resolve().parents[1]
    for candidate in (path, home / path):
        try:
            with candidate.open("rb") as file:
                content = file.read(_MAX_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from error
        return parse(content, str(path), overrides)
    known = [*Path("configs").rglob("*.yaml"), *path.parent.glob("*.*")]
    known += [file.relative_to(home) for file in home.glob("configs/**/*.yaml")]
    names = {file.name: str(file) for file in known}
    near = difflib.get_close_matches(path.name, names, n=1)
    raise ConfigError([f"{path}: no such file" + (f"; did you mean {names[near[0]]}?" if near else "")])


def parse(text: str | bytes, source_name: str = "experiment", overrides: Sequence[str] = ()) -> Experiment:
    """Validate an experiment given as YAML or JSON text.

    Parameters
    ----------
    text : str or bytes
        One mapping; bytes are UTF-8.
    source_name : str
        What to call the text in messages.
    overrides : sequence of str
        `dotted.key=value`, the value in YAML; later ones win. One that changes a section's `kind` starts that section
        afresh: of its keys only overridden ones remain, in whatever order they come, and defaults fill the rest.

    Raises
    ------
    ConfigError
        All faults, one line each, in the order of the text: place, dotted key, value, what is allowed.
    """
    if len(text) > _MAX_BYTES:
        raise ConfigError([f"{source_name}: larger than {_MAX_BYTES} bytes; that is no experiment"])
    try:
        text = text if isinstance(text, str) else text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError([f"{source_name}:{line}: not UTF-8: byte {error.object[error.start]:#x}"]) from error
    reader = _Reader(source_name)
    data = reader.read(text, ())
    if not isinstance(data, dict):
        problem = "it is empty" if data is None else f"{shown(data)} is not allowed"
        raise ConfigError(reader.lines() or [f"{source_name}:1: {problem}; must be lines such as `name: first-try`"])
    reader.override(data, overrides)
    try:
        experiment = Experiment.model_validate(data)
    except ValidationError as error:
        reader.note(error)
    if reader.faults:
        raise ConfigError(reader.lines())
    return experiment


def dump(experiment: Experiment) -> str:
    """Write an experiment as YAML.

    Returns
    -------
    str
        Every key, defaults too, in the schema's order; `parse(dump(e)) == e`.
    """
    values = experiment.model_dump(mode="json")
    # Characters such as U+0085 are line breaks to YAML; written as they are, they would not come back.
    readable = json.dumps(values, ensure_ascii=False).isprintable()
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=readable, width=_MAX_BYTES))


# --- reading: plain values, the place of each key, faults ---------------------------------------------------------


class _Reader:
    def __init__(self, source_name: str):
        self._source, self._left = source_name, _MAX_VALUES
        self._override: _Place | None = None  # what is being read, unless it is the file
        self.places: dict[Key, _Place] = {}
        self.faults: list[tuple[_Place, str]] = []

    def lines(self) -> list[str]:
        return [f"{place}: {text}" for (_, place), text in sorted(self.faults)]

    def note(self, error: ValidationError) -> None:
        for key, text in map(fault_of, error.errors(include_url=False)):
            # What is missing has no place, but its section may have one.
            place = next(self.places[key[:n]] for n in range(len(key), -1, -1) if key[:n] in self.places)
            self.faults.append((place, f"{dotted(key)}: {text}"))

    def read(self, text: str, key: Key) -> Any:
        """Value of a text that stands at `key`; None if it is empty or, with a fault noted, broken."""
        try:
            node = yaml.SafeLoader(text).get_single_node()
            return None if node is None else self._value(node, key)
        except yaml.MarkedYAMLError as error:
            mark: Any = error.problem_mark
            problem = " ".join(filter(None, (error.context, error.problem)))
            problem = "a tab where only spaces may be" if r"'\t'" in problem else problem
            problem += "; put the text in quotes" if "cannot start" in problem else ""
            self.faults.append((self._at(mark.line), f"broken YAML at column {mark.column + 1}: {problem}"))
        except ReaderError as error:
            line, column = text.count("\n", 0, error.position), error.position - text.rfind("\n", 0, error.position)
            self.faults.append((self._at(line), f"broken YAML at column {column}: {error.reason}"))
        except RecursionError:
            self.faults.append((self._at(0), "broken YAML: nested too deeply, or an alias contains itself"))
        return None

    def _at(self, line: int) -> _Place:
        return self._override or (line + 1, f"{self._source}:{line + 1}")

    def _value(self, node: yaml.Node, key: Key) -> Any:
        self._left -= 1
        if self._left < 0 or not re.fullmatch(r"tag:yaml\.org,2002:\w+", node.tag):
            problem = f"more than {_MAX_VALUES} values" if self._left < 0 else f"tag {node.tag[:60]} is not allowed"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        self.places[key] = self._at(node.start_mark.line)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(item, (*key, i)) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            text = node.value.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")  # joins JSON's pairs
            return None if node.tag.endswith(":null") else text
        section: dict[str, Any] = {}
        for name, inner in node.value:
            place = self._at(name.start_mark.line)
            if not isinstance(name, yaml.ScalarNode):
                self.faults.append((place, f"{dotted(key)}: a key must be text, not a list or a section"))
                continue
            path = (*key, name.value)
            if name.value in section:
                self.faults.append((place, f"{dotted(path)}: given twice; first at {self.places[path][1]}"))
            section[name.value] = self._value(inner, path)
            self.places[path] = place
        return section

    def override(self, data: dict[str, Any], overrides: Sequence[str]) -> None:
        split = [(order, text, *text.partition("=")) for order, text in enumerate(overrides, start=_MAX_BYTES)]
        # Kinds first, since a new one empties its section.
        for order, text, name, equals, value in sorted(split, key=lambda entry: not entry[2].endswith(".kind")):
            self._override = (order, f"override {text!r}")
            key = tuple(name.split("."))
            if equals and all(key):
                self._set(data, key, value, self._override)
            else:
                self.faults.append((self._override, "must look like federation.rounds=5"))

    def _set(self, section: dict[str, Any], key: tuple[str, ...], value: str, place: _Place) -> None:
        for depth, name in enumerate(key[:-1], start=1):
            if section.get(name) is None:
                section[name], self.places[key[:depth]] = {}, place
            section = section[name]
            if not isinstance(section, dict):
                self.faults.append((place, f"{dotted(key[:depth])}: {shown(section)} is no section of keys"))
                return
        parsed = self.read(value, key)
        if len(key) > 1 and key[-1] == "kind" and section.get("kind", parsed) != parsed:
            section.clear()
            self.places[key[:-1]] = place
        section[key[-1]], self.places[key] = parsed, place
