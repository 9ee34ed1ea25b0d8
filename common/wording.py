"""What a fault in an experiment is called: its dotted key, the value, what the schema allows, the nearest spelling.

All of it is read off the JSON Schema, so a new field or variant needs no word here.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from pydantic_core import ErrorDetails

from common.config import Experiment

_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<", "pattern": "matching"}
_BOUNDS |= {"minLength": "of length ≥", "maxLength": "of length ≤", "minItems": "of length ≥"}
_TYPES = {"integer": "a whole number", "number": "a finite number", "string": "text", "boolean": "true or false"}
_TYPES |= {"null": "null", "object": "a section of keys", "array": "a list"}


Key = tuple[str | int, ...]
"""Path of names and list positions to a value; the empty one is the experiment itself."""


def json_schema() -> dict[str, Any]:
    """Describe the format of an experiment, for editors and documentation.

    Returns
    -------
    dict
        JSON Schema, draft 2020-12; the docstrings of `common.config` are its descriptions.
    """
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Experiment.model_json_schema()}


def fault_of(error: ErrorDetails) -> tuple[Key, str]:
    """Key of one of pydantic's errors, without union tags, and what is wrong there in one line."""
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
    return key, f"{shown(value)} is not allowed; must be {_allowed(schema)}{_nearest(value, schema.get('enum', ()))}"


def _unknown(loc: Sequence[str | int]) -> str:
    *parents, name = loc
    siblings = _variants(_follow(parents[:-1])[1])
    if kinds := [kind for kind, variant in siblings.items() if name in variant["properties"]]:
        return f"kind {parents[-1]} has no such key, only {either(kinds)}"
    known = _follow(parents)[1]["properties"]
    return "unknown key" + (_nearest(name, known) or f"; known are {', '.join(known)}")


def _allowed(schema: dict[str, Any]) -> str:
    schema = _resolved(schema)
    if "anyOf" in schema:
        return either(map(_allowed, schema["anyOf"]))
    if variants := _variants(schema):
        return f"a section whose kind is {either(variants)}"
    if "enum" in schema:
        return either(schema["enum"])
    bounds = " and ".join(f"{sign} {schema[name]}" for name, sign in _BOUNDS.items() if name in schema)
    each = f"each {_allowed(schema['items'])}" if "items" in schema else ""
    return " ".join(filter(None, (_TYPES.get(schema.get("type", ""), "another value"), bounds, each)))


def dotted(key: Key) -> str:
    """A key as people write it, such as ``federation.rounds``."""
    return ".".join(shown(part, bare=r"[\w-]+") for part in key) or "experiment"


def shown(value: object, bare: str = r"[\w.+-]+") -> str:
    """A value as short text, quoted unless it matches `bare`."""
    text = "null" if value is None else str(value) if re.fullmatch(bare, str(value)) else repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


def either(options: Iterable[str]) -> str:
    """Options as in ``a, b or c``."""
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


def _follow(loc: Iterable[str | int]) -> tuple[Key, dict[str, Any]]:
    """Key and schema at a pydantic location; its union tags are no part of the key."""
    key: Key = ()
    schema = _schema()
    for part in loc:
        if variants := _variants(schema):
            schema = variants[str(part)]
            continue
        key = (*key, part)
        schema = _resolved(schema.get("items") or schema.get("properties", {}).get(part, {}))
    return key, schema
