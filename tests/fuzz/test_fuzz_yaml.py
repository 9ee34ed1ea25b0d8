"""Damaged configurations: out comes an experiment or a list of faults, one line each, and never anything else."""

from pathlib import Path

import pytest
import yaml

from common.config import Experiment
from common.errors import ConfigError
from common.loading import dump, load, parse
from tests.fuzz.mutations import Damage, bounded

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in sorted(ROOT.glob("configs/**/*.yaml"))}
DEEP = 20_000
LONGEST = 1000
"""Characters of a fault: what it repeats of the text is cut."""
VALUES = ["null", "~", "", "[]", "{}", "[1, [2, {a: b}]]", "{a: {b: c}}", "true", "no", "010", "0x10", "1_000", "1:30"]
VALUES += [".nan", "-.inf", "1e400", "-1", "0", "-0.0", "9" * 400, "9" * 5000, "1e-400", "2024-01-01", "'\\0'", '"\\0"']
VALUES += [
    '"\\uD800"',
    '"\\x85\\u2028"',
    "!!python/object:os.system x",
    "!!binary aGVsbG8=",
    "!!set {a}",
    "!!omap [a: 1]",
]
VALUES += [
    "&a [*a]",
    "*nowhere",
    "&a",
    "<<",
    "|\n  text\n",
    ">-\n  folded",
    "? x",
    "- x",
    "%YAML 3.0",
    "@x",
    "`x`",
    "\tx",
]
VALUES += ["!!int x", "!!null x", "!!str 5", "!!float [1]", "!!timestamp x", "![]", "=", "[" * 50, "{" * 50, "x" * 5000]
VALUES += ["!!int '" + "9" * 5000 + "'", "0b1", "1__0", "+5", "5.", "５", "٣", "1e5", "1_0.0", " 5 ", '"5"', "1,5", "∞"]


def outcome(text, overrides=(), source="x.yaml"):
    """The experiment, or the faults; whatever else is raised is a defect."""
    faults, experiment = None, None
    try:
        experiment = parse(text, source, overrides)
    except ConfigError as error:
        faults = error.faults
    assert faults or isinstance(experiment, Experiment)
    for fault in faults or ():
        assert len(fault.splitlines()) == 1, fault
        assert len(fault) < LONGEST + 10 * sum(map(len, overrides)), "escapes take up to ten characters each"
    return faults or experiment


def paths(value, key=()):
    """Keys of all values of a nested mapping."""
    for name, inner in value.items():
        yield (*key, name)
        if isinstance(inner, dict):
            yield from paths(inner, (*key, name))


def test_damaged_bytes():
    cases, valid = 0, 0
    for seed, content in enumerate(CONFIGS.values()):
        damage = Damage(seed)
        for _ in range(60):
            found = outcome(damage.any(content))
            if isinstance(found, Experiment):
                assert outcome(dump(found)) == found
                valid += 1
            cases += 1
    assert cases >= 800
    assert 0 < valid < cases


def test_swapped_values_and_unknown_keys():
    """Each value of each configuration is exchanged for something odd, as text, beside its intact neighbours."""
    cases = 0
    for seed, content in enumerate(CONFIGS.values()):
        damage = Damage(100 + seed)
        lines = content.decode().splitlines()
        places = [i for i, line in enumerate(lines) if ":" in line and not line.lstrip().startswith("#")]
        for _ in range(50):
            changed = list(lines)
            for place in {damage.pick(places) for _ in range(1 + damage.below(2))}:
                name, _, value = changed[place].partition(":")
                indent = name[: len(name) - len(name.lstrip())]
                changed[place] = damage.pick(
                    [
                        f"{name}: {damage.pick(VALUES)}",
                        f"{name}: {damage.pick(VALUES)}",
                        f"{indent}{damage.pick(VALUES)}: {value}",
                        f"{name}x:{value}",
                        f"{indent}<<: {damage.pick(VALUES)}\n{changed[place]}",
                        f"{indent}{damage.pick(['*a', '&b', '? ', '- ', '! ', '!!str '])}{changed[place]}",
                    ]
                )
            outcome("\n".join(changed))
            cases += 1
    assert cases >= 700


def test_overrides():
    damage, cases = Damage(3), 0
    whole = yaml.safe_load(CONFIGS["configs/ml-100k.yaml"])
    keys = [".".join(key) for key in paths(whole)] + [
        "privacy.kind",
        "privacy",
        "runtime.workers",
        "",
        ".",
        "a..b",
        "data.0",
    ]
    for _ in range(250):
        said = [
            f"{damage.pick(keys)}{damage.pick(['=', '=', '=', '', '.x=', '=='])}{damage.pick(VALUES)}" for _ in range(2)
        ]
        outcome(
            CONFIGS["configs/ml-100k.yaml"], [damage.any(said[0].encode()).decode("utf-8", "surrogateescape"), said[1]]
        )
        cases += 1
    assert cases == 250


def nested(start, end="", inner="x", depth=DEEP):
    return f"name: {start * depth}{inner}{end * depth}"


def laughs(width, depth, name="a"):
    lines = [f"{name}0: &{name}0 [x]"]
    lines += [f"{name}{i}: &{name}{i} [{', '.join([f'*{name}{i - 1}'] * width)}]" for i in range(1, depth)]
    return "\n".join([*lines, f"name: *{name}{depth - 1}"])


BOMBS = {
    "lists": nested("[", "]"),
    "half a list": nested("["),
    "sections": nested("{a: ", "}"),
    "half a section": nested("{a: "),
    "sequences": nested("- ", inner="\n").replace("name: ", ""),
    "keys": nested("? ").replace("name: ", ""),
    "indented": "\n".join(" " * i + "a:" for i in range(400)),
    "billion laughs": laughs(9, 10),
    "many more laughs": laughs(2, 64),
    "wide laughs": laughs(5000, 4),
    "laughs by merging": laughs(9, 10).replace("[", "{<<: [").replace("]", "]}"),
    "an alias in itself": "name: &a [*a, *a]",
    "a section in itself": "name: &a {b: *a}",
    "a merge of itself": "data: &a {<<: *a}",
    "an endless chain": "\n".join(f"a{i}: &a{i} {{x: *a{i - 1}}}" for i in range(1, 3000)).replace("*a0", "y"),
    "many anchors": "\n".join(f"a{i}: &a{i} x" for i in range(6000)),
    "many keys": "\n".join(f"k{i}: x" for i in range(8000)),
    "one key often": "name: x\n" * 9000,
    "a long key": "k" * 90_000 + ": 1",
    "a long name": "name: " + "x" * 90_000,
    "a long list": "name: [" + "1," * 40_000 + "]",
    "a long number": "seed: " + "9" * 90_000,
    "a long fraction": "seed: 0." + "9" * 90_000,
    "a long exponent": "model: {dropout: 1e" + "9" * 90_000 + "}",
    "quotes": "name: " + '"' * 90_001,
    "backslashes": 'name: "' + "\\" * 90_001,
    "colons": ":" * 90_000,
    "dashes": "-" * 90_000,
    "documents": "---\n" * 20_000,
    "comments": "#\n" * 40_000,
    "blanks": " " * 90_000 + "name: x",
    "folded": "name: >\n" + "  x\n\n" * 15_000,
    "directives": "%TAG ! x\n" * 9_000,
    "escapes": 'name: "' + "\\U0010FFFF" * 9_000 + '"',
    "surrogates": 'name: "' + "\\ud83d" * 15_000 + '"',
    "zeros": "\0" * 90_000,
    "control characters": "name: \x01\x1b",
    "other encodings": "name: x".encode("utf-16").decode("latin-1"),
}


LONG_TAGS = {
    "tags": "name: " + "!" * 90_000,
    "a long tag": "name: !<" + "x" * 90_000 + "> y",
    "percent signs": "name: !" + "%41" * 30_000 + " y",
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_bombs_are_refused_in_time(text):
    for whole in (text, "data: {kind: synthetic}\n" + text):
        with bounded(seconds=12, megabytes=250):
            assert not isinstance(outcome(whole), Experiment)


@pytest.mark.parametrize("text", LONG_TAGS.values(), ids=LONG_TAGS)
def test_of_a_long_tag_little_is_repeated(text):
    assert not isinstance(outcome(text), Experiment)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "cp037", "utf-7", "utf-8-sig", "latin-1"])
def test_other_encodings(encoding):
    text = "name: t\ndata: {kind: synthetic, users: 9}  # é"
    found = outcome(text.encode(encoding))
    assert isinstance(found, Experiment) == (encoding in {"utf-7", "utf-8-sig"})


def loaded(path):
    """As `outcome`, of a file."""
    try:
        return load(path)
    except ConfigError as error:
        return str(error)


def test_damaged_files(tmp_path):
    damage, path, content = Damage(9), tmp_path / "x.yaml", CONFIGS["configs/quickstart.yaml"]
    for size in (0, 1, 99_999, 100_000, 100_001, 3_000_000):
        path.write_bytes(content + b"#" * (size - len(content)))
        assert isinstance(loaded(path), Experiment) == (size <= 100_000)
    for _ in range(60):
        path.write_bytes(damage.any(content))
        found = loaded(path)
        assert isinstance(found, Experiment) or str(path) in found
