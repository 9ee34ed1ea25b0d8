"""Files that load, files that must not, and what a person is told about them."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import loading, loss
from common.errors import ConfigError, UsageError
from common.loading import load, parse
from common.wording import json_schema

ROOT = Path(__file__).resolve().parents[2]
MINIMAL = "name: tiny\ndata: {kind: synthetic}\n"
NAME = "must be text matching ^[a-z0-9][a-z0-9._-]{0,63}$"
KNOWN = "known are name, seed, data, model, loss, federation, privacy, evaluation, runtime"
OPTIMIZERS = "fedadagrad, fedadam, fedavg or fedavgm"
SOURCES = "movielens, pairs, recbole, sequences, synthetic or table"


def faults(text, *overrides):
    with pytest.raises(ConfigError) as caught:
        parse(text, "x.yaml", overrides)
    assert caught.value.exit_code == 2
    assert str(caught.value).splitlines() == caught.value.faults, "one line a fault"
    return caught.value.faults


# --- faults of keys and values -----------------------------------------------------------------------------------

BAD = {  # text after MINIMAL (two lines) -> the line about it
    "federation:\n  rounds: -5": "x.yaml:4: federation.rounds: -5 is not allowed; must be a whole number ≥ 0",
    "federation:\n  rond: 5": "x.yaml:4: federation.rond: unknown key; did you mean rounds?",
    "federation: {cohort: 0}": "x.yaml:3: federation.cohort: 0 is not allowed; must be a whole number > 0",
    "federation: {sampling: poison}": "x.yaml:3: federation.sampling: poison is not allowed; "
    "must be fixed, poisson or passes; did you mean poisson?",
    "federation: {optimizer: {lr: 1}}": f"x.yaml:3: federation.optimizer.kind: is missing; must be {OPTIMIZERS}",
    "federation: {optimizer: {kind: adam}}": f"x.yaml:3: federation.optimizer.kind: adam is not allowed; "
    f"must be {OPTIMIZERS}; did you mean fedadam?",
    "federation:\n  local:\n    steps: 1\n    epochs: 1": "x.yaml:4: federation.local: give steps or epochs, not both",
    "federation: {local: {lr: .inf}}": "x.yaml:3: federation.local.lr: .inf is not allowed; "
    "must be a finite number > 0",
    "loss: {kind: GBCE}": "x.yaml:3: loss.kind: GBCE is not allowed; must be bce, gbce, sampled-softmax or softmax"
    "; did you mean gbce?",
    "loss: {kind: softmax, negatives: 5}": "x.yaml:3: loss.negatives: kind softmax has no such key, "
    "only gbce or sampled-softmax",
    "loss: gbce": "x.yaml:3: loss: gbce is not allowed; must be a section whose kind is "
    "bce, gbce, sampled-softmax or softmax",
    "loss: {kind: [1]}": "x.yaml:3: loss.kind: ['1'] is not allowed; must be bce, gbce, sampled-softmax or softmax",
    "model:": "x.yaml:3: model: null is not allowed; must be a section of keys",
    "model: {dim: off}": "x.yaml:3: model.dim: off is not allowed; must be a whole number > 0",
    "model: {dropout: 1}": "x.yaml:3: model.dropout: 1 is not allowed; must be a finite number ≥ 0 and < 1",
    "model: {dim: 1:30}": "x.yaml:3: model.dim: '1:30' is not allowed; must be a whole number > 0",
    "seed: a much too long text that goes on and on until nobody wants to read it": "x.yaml:3: seed: "
    "'a much too long text that goes on and on until nobody want… is not allowed; must be a whole number ≥ 0",
    "evaluation: {cutoffs: 5}": "x.yaml:3: evaluation.cutoffs: 5 is not allowed; "
    "must be a list of length ≥ 1 each a whole number > 0",
    "evaluation:\n  cutoffs:\n    - 5\n    - -1": "x.yaml:6: evaluation.cutoffs.1: -1 is not allowed; "
    "must be a whole number > 0",
    "evaluation: {users: some}": "x.yaml:3: evaluation.users: some is not allowed; must be a whole number > 0 or null",
    "batch: 5": f"x.yaml:3: batch: unknown key; {KNOWN}",
    "model.dim: 5": "x.yaml:3: 'model.dim': unknown key; did you mean model?",
    "[1]: x": "x.yaml:3: experiment: a key must be text, not a list or a section",
    "model: {dim: 32, dim: 16}": "x.yaml:3: model.dim: given twice; first at x.yaml:3",
    "seed: 1\nmodel: {}\nseed: 2": "x.yaml:5: seed: given twice; first at x.yaml:3",
}


@pytest.mark.parametrize(("text", "line"), BAD.items(), ids=lambda text: text[:40])
def test_one_bad_value(text, line):
    assert faults(MINIMAL + text) == [line]


def test_all_faults_at_once_in_the_order_of_the_text():
    text = "# a comment\n\ndata: {kind: pairs}\nmodel: {dim: x, dims: 3}\nmodel: {dim: y}\nlos: {}\n"
    assert faults(text, "evaluation.every=0", "nonsense") == [
        "x.yaml:3: data.path: is missing; must be text",
        f"x.yaml:3: name: is missing; {NAME}",
        "x.yaml:5: model.dim: y is not allowed; must be a whole number > 0",
        "x.yaml:5: model: given twice; first at x.yaml:4",
        "x.yaml:6: los: unknown key; did you mean loss?",
        "override 'evaluation.every=0': evaluation.every: 0 is not allowed; must be a whole number > 0",
        "override 'nonsense': must look like federation.rounds=5",
    ]


def test_missing_section():
    assert faults("name: a") == [f"x.yaml:1: data: is missing; must be a section whose kind is {SOURCES}"]


def fields(schema, prefix="", section=""):
    """Every dotted key of the schema, with the overrides that make its section."""
    for name, inner in schema["properties"].items():
        if name != "kind":
            yield prefix + name, section
        for kind, ref in inner.get("discriminator", {}).get("mapping", {"": inner.get("$ref")}).items():
            if ref:
                definition = json_schema()["$defs"][ref.rsplit("/", 1)[1]]
                yield from fields(definition, f"{prefix}{name}.", f"{prefix}{name}.kind={kind}" if kind else section)


@pytest.mark.parametrize(("key", "section"), fields(json_schema()))
def test_every_field_can_be_explained(key, section):
    override = f"{key}=5" if key in {"data.features.columns", "model.inputs"} else f"{key}=[{{a: 1}}]"
    lines = faults(MINIMAL, override, *filter(None, [section]))
    start = f"override '{override}': {key}"
    assert any(line.startswith(start) and " is not allowed; must be " in line for line in lines), lines


@pytest.mark.parametrize(
    ("columns", "why"),
    [
        ("{a: 1}", "columns.0.kind: is missing; must be categorical, numeric, text or vectors"),
        ("{kind: categorical, name: x, sep: 1}", "columns.0.sep: unknown key; known are name, column, pattern, kind"),
        ("{kind: categoric, name: x}", "did you mean categorical?"),
    ],
)
def test_a_fault_in_a_list_of_sections_is_placed(columns, why):
    (line,) = faults(MINIMAL, f"data.features.columns=[{columns}]")
    assert why in line


# --- faults of the text as such ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "x.yaml:1: it is empty; must be lines such as `name: first-try`"),
        ("- a\n", "x.yaml:1: ['a'] is not allowed; must be lines such as `name: first-try`"),
        ("name: a\ndata:\n\tkind: x", "x.yaml:3: broken YAML at column 1: a tab where only spaces may be"),
        ("name: a\nx: [1, 2", "x.yaml:2: broken YAML at column 9: while parsing a flow sequence "
         "expected ',' or ']', but got '<stream end>'"),
        ("name: a\nx: %d", "x.yaml:2: broken YAML at column 4: while scanning for the next token "
         "found character '%' that cannot start any token; put the text in quotes"),
        ("name: a\n---\nname: b", "x.yaml:2: broken YAML at column 1: expected a single document in the stream "
         "but found another document"),
        ("name: a\nx: \0", "x.yaml:2: broken YAML at column 4: special characters are not allowed"),
        ("name: *a", "x.yaml:1: broken YAML at column 7: found undefined alias 'a'"),
        ("name: !!python/object:os.system x", "x.yaml:1: broken YAML at column 7: "
         "tag tag:yaml.org,2002:python/object:os.system is not allowed"),
        ("a: &a [*a]", "x.yaml:1: broken YAML: nested too deeply, or an alias contains itself"),
        ("a: " + "[" * 5000, "x.yaml:1: broken YAML: nested too deeply, or an alias contains itself"),
        ("#" * 100_001, "x.yaml: larger than 100000 bytes; that is no experiment"),
        (b"name: a\nx: caf\xe9", "x.yaml:2: not UTF-8: byte 0xe9"),
    ],
)  # fmt: skip
def test_broken_text(text, line):
    assert faults(text) == [line]


def test_an_alias_bomb_is_defused():
    levels = [f"l{i}: &l{i} [{', '.join(['x' if i == 0 else f'*l{i - 1}'] * 10)}]" for i in range(10)]
    assert faults("\n".join(levels)) == ["x.yaml:1: broken YAML at column 37: more than 10000 values"]


def test_a_few_aliases_are_fine():
    assert parse(MINIMAL + "model: {dim: &n 16, max_length: *n}").model.max_length == 16


# --- overrides ---------------------------------------------------------------------------------------------------

GBCE = MINIMAL + "loss: {kind: gbce, negatives: 7, calibration: 0.1}\n"


@pytest.mark.parametrize(
    ("overrides", "loss"),
    [
        (["loss.negatives=9"], loss.GBCELoss(kind="gbce", negatives=9, calibration=0.1)),
        (["loss.kind=gbce"], loss.GBCELoss(kind="gbce", negatives=7, calibration=0.1)),
        (["loss.kind=softmax"], loss.SoftmaxLoss(kind="softmax")),
        (["loss.kind=sampled-softmax"], loss.SampledSoftmaxLoss(kind="sampled-softmax")),
        (["loss.negatives=9", "loss.kind=bce", "loss.kind=sampled-softmax"],
         loss.SampledSoftmaxLoss(kind="sampled-softmax", negatives=9)),
        (["loss.negatives=8", "loss.negatives=9"], loss.GBCELoss(kind="gbce", negatives=9, calibration=0.1)),
    ],
)  # fmt: skip
def test_a_new_kind_starts_its_section_afresh(overrides, loss):
    assert parse(GBCE, overrides=overrides).loss == loss


def test_overrides_make_sections_that_the_file_lacks():
    assert parse(MINIMAL + "model:\n", overrides=["federation.local.steps=3", "model.dim=8"]).model.dim == 8


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("federation.rond=5", "federation.rond: unknown key; did you mean rounds?"),
        ("federatoin.rounds=5", "federatoin: unknown key; did you mean federation?"),
        ("data.kind=pairs", "data.path: is missing; must be text"),
        ("name.x=5", "name: tiny is no section of keys"),
        ("a..b=5", "must look like federation.rounds=5"),
        ("evaluation.cutoffs=[5,-1]", "evaluation.cutoffs.1: -1 is not allowed; must be a whole number > 0"),
        ("loss.kind=bec", "loss.kind: bec is not allowed; must be bce, gbce, sampled-softmax or softmax; "
         "did you mean bce?"),
    ],
)  # fmt: skip
def test_the_place_of_an_overrides_fault_is_the_override(override, text):
    assert faults(MINIMAL + "evaluation: {cutoffs: [1, 2]}", override) == [f"override {override!r}: {text}"]


@given(st.integers(0, len(GBCE)), st.integers(0, 6), st.text(st.characters() | st.sampled_from("{}[]:,-&*!|'#? \t\n")))
def test_whatever_the_text_the_only_error_is_a_config_error(start, length, new):
    with contextlib.suppress(ConfigError):
        parse(GBCE[:start] + new + GBCE[start + length :], "x.yaml", [new, f"loss.kind={new}"])


# --- files -------------------------------------------------------------------------------------------------------


def refusal(path):
    with pytest.raises(UsageError) as caught:
        load(path)
    return str(caught.value)


def test_load_names_the_file_as_it_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())  # as Windows saves it
    assert load("mine.yaml", ["seed=3"]).seed == 3
    Path("mine.json").write_text(json.dumps({"name": "b", "data": {"kind": "synthetic"}}, indent=1))
    assert load(Path("mine.json")).name == "b"
    Path("bad.yaml").write_text("name: A\ndata: {kind: synthetic}")
    assert refusal("bad.yaml") == f"bad.yaml:1: name: A is not allowed; {NAME}"


def test_missing_file(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "__file__", str(tmp_path / "app" / "common" / "loading.py"))
    monkeypatch.chdir(tmp_path)
    assert refusal("quick.yaml") == "quick.yaml: no such file"
    for path in ("configs/deep/quickstart.yaml", "app/configs/installed.yaml"):
        Path(path).parent.mkdir(parents=True)
        Path(path).write_text(MINIMAL)
    assert refusal("quikstart.yaml") == "quikstart.yaml: no such file; did you mean configs/deep/quickstart.yaml?"
    assert refusal("configs/instaled") == "configs/instaled: no such file; did you mean configs/installed.yaml?"
    assert refusal("configs/deep/quickstart.yaml/x") == "configs/deep/quickstart.yaml/x: no such file"
    assert load("configs/installed.yaml").name == "tiny", "found beside the package"


def test_directory_and_unreadable_file(tmp_path, monkeypatch):
    assert refusal(tmp_path) == f"{tmp_path}: cannot be read: Is a directory"

    def forbidden(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbidden)  # as tests may run as root, who can read everything
    assert refusal("x.yaml") == "x.yaml: cannot be read: Permission denied"


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs /dev/zero")
def test_an_endless_file_is_refused():
    assert refusal("/dev/zero") == "/dev/zero: larger than 100000 bytes; that is no experiment"


def test_no_heavy_import():
    code = "import sys, common.loading; print({'torch', 'flwr', 'opacus', 'polars'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
