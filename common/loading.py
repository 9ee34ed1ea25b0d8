"""From YAML text and overrides to a validated `Experiment`, or to all faults at once, each with its place.

Scalars stay text until the schema says what they are. So `no`, `010`, `1_000`, `1e-5` and `2024-01-01` mean what they
look like, whatever YAML 1.1 makes of them; only an unquoted `null` (or nothing at all) is taken at YAML's word.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from yaml.reader import ReaderError

from common.config import Experiment
from common.errors import ConfigError

_MAX_BYTES = 100_000  # a longer text is no experiment
_MAX_VALUES = 10_000  # with aliases followed, as a few nested ones can stand for billions
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<", "pattern": "matching"}
_BOUNDS |= {"minLength": "of length ≥", "maxLength": "of length ≤", "minItems": "of length ≥"}
_TYPES = {"integer": "a whole number", "number": "a finite number", "string": "text", "boolean": "true or false"}
_TYPES |= {"null": "null", "object": "a section of keys", "array": "a list"}

_Key = tuple[str | int, ...]
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
        problem = "it is empty" if data is None else f"{_show(data)} is not allowed"
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
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=_MAX_BYTES))


def json_schema() -> dict[str, Any]:
    """Describe the format of an experiment, for editors and documentation.

    Returns
    -------
    dict
        JSON Schema, draft 2020-12; the docstrings of `common.config` are its descriptions.
    """
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Experiment.model_json_schema()}


# --- reading: plain values, the place of each key, faults ---------------------------------------------------------


class _Reader:
    def __init__(self, source_name: str):
        self._source, self._left = source_name, _MAX_VALUES
        self._override: _Place | None = None  # what is being read, unless it is the file
        self.places: dict[_Key, _Place] = {}
        self.faults: list[tuple[_Place, str]] = []

    def lines(self) -> list[str]:
        return [f"{place}: {text}" for (_, place), text in sorted(self.faults)]

    def note(self, error: ValidationError) -> None:
        for key, text in map(_fault, error.errors(include_url=False)):
            # What is missing has no place, but its section may have one.
            place = next(self.places[key[:n]] for n in range(len(key), -1, -1) if key[:n] in self.places)
            self.faults.append((place, f"{_dotted(key)}: {text}"))

    def read(self, text: str, key: _Key) -> Any:
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

    def _value(self, node: yaml.Node, key: _Key) -> Any:
        self._left -= 1
        if self._left < 0 or not re.fullmatch(r"tag:yaml\.org,2002:\w+", node.tag):
            problem = f"more than {_MAX_VALUES} values" if self._left < 0 else f"tag {node.tag} is not allowed"
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
                self.faults.append((place, f"{_dotted(key)}: a key must be text, not a list or a section"))
                continue
            path = (*key, name.value)
            if name.value in section:
                self.faults.append((place, f"{_dotted(path)}: given twice; first at {self.places[path][1]}"))
            section[name.value] = self._value(inner, path)
            self.places[path] = place
        return section

    def override(self, data: dict[str, Any], overrides: Sequence[str]) -> None:
        split = [(order, text, *text.partition("=")) for order, text in enumerate(overrides, start=_MAX_BYTES)]
        # Kinds first, since a new one empties its section.
        for order, text, dotted, equals, value in sorted(split, key=lambda entry: not entry[2].endswith(".kind")):
            self._override = (order, f"override {text!r}")
            key = tuple(dotted.split("."))
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
                self.faults.append((place, f"{_dotted(key[:depth])}: {_show(section)} is no section of keys"))
                return
        parsed = self.read(value, key)
        if len(key) > 1 and key[-1] == "kind" and section.get("kind", parsed) != parsed:
            section.clear()
            self.places[key[:-1]] = place
        section[key[-1]], self.places[key] = parsed, place


# --- wording: what is wrong, and what the schema allows -----------------------------------------------------------


def _fault(error: ErrorDetails) -> tuple[_Key, str]:
    key, schema = _follow(error["loc"])
    value = error["input"]
    if error["type"].startswith("union_tag"):
        key, schema, value = (*key, "kind"), {"enum": list(_variants(schema))}, value.get("kind")
    if error["type"] == "extra_forbidden":
        return key, _unknown(error["loc"])
    if error["type"] == "value_error":
        return key, str(error["ctx"]["error"])
    if error["type"] in {"missing", "union_tag_not_found"}:
        return key, f"is missing; must be {_allowed(schema)}"
    return key, f"{_show(value)} is not allowed; must be {_allowed(schema)}{_nearest(value, schema.get('enum', ()))}"


def _unknown(loc: Sequence[str | int]) -> str:
    *parents, name = loc
    siblings = _variants(_follow(parents[:-1])[1])
    if kinds := [kind for kind, variant in siblings.items() if name in variant["properties"]]:
        return f"kind {parents[-1]} has no such key, only {_either(kinds)}"
    known = _follow(parents)[1]["properties"]
    return "unknown key" + (_nearest(name, known) or f"; known are {', '.join(known)}")


def _allowed(schema: dict[str, Any]) -> str:
    schema = _resolved(schema)
    if "anyOf" in schema:
        return _either(map(_allowed, schema["anyOf"]))
    if variants := _variants(schema):
        return f"a section whose kind is {_either(variants)}"
    if "enum" in schema:
        return _either(schema["enum"])
    bounds = " and ".join(f"{sign} {schema[name]}" for name, sign in _BOUNDS.items() if name in schema)
    each = f"each {_allowed(schema['items'])}" if "items" in schema else ""
    return " ".join(filter(None, (_TYPES.get(schema.get("type", ""), "another value"), bounds, each)))


def _dotted(key: _Key) -> str:
    return ".".join(_show(part, bare=r"[\w-]+") for part in key) or "experiment"


def _show(value: object, bare: str = r"[\w.+-]+") -> str:
    text = "null" if value is None else str(value) if re.fullmatch(bare, str(value)) else repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


def _either(options: Iterable[str]) -> str:
    *most, last = options
    return f"{', '.join(most)} or {last}" if most else last


def _nearest(word: object, options: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(word).lower(), list(options), n=1)
    return f"; did you mean {near[0]}?" if near else ""


_schema = cache(json_schema)


def _resolved(schema: dict[str, Any]) -> dict[str, Any]:
    # An optional section is seen as the section.
    schema = next((s for s in schema.get("anyOf", ()) if "$ref" in s or "discriminator" in s), schema)
    return _schema()["$defs"][schema["$ref"].rsplit("/", 1)[1]] if "$ref" in schema else schema


def _variants(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    mapping = schema.get("discriminator", {}).get("mapping", {})
    return {kind: _resolved({"$ref": ref}) for kind, ref in mapping.items()}


def _follow(loc: Iterable[str | int]) -> tuple[_Key, dict[str, Any]]:
    """Key and schema at a pydantic location; its union tags are no part of the key."""
    key: _Key = ()
    schema = _schema()
    for part in loc:
        if variants := _variants(schema):
            schema = variants[str(part)]
            continue
        key = (*key, part)
        schema = _resolved(schema.get("items") or schema.get("properties", {}).get(part, {}))
    return key, schema
