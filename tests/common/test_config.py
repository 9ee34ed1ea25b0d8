"""The schema: shipped files, documentation, values, fingerprint, and the way to YAML and back."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from common import config, loss, sources
from common.config import Experiment, digest, experiment_hash
from common.loading import dump, load, parse
from common.wording import json_schema

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.y*ml"))
MINIMAL = "name: tiny\ndata: {kind: synthetic}\n"


def made(*overrides):
    return parse(MINIMAL, overrides=overrides)


# --- what is shipped ---------------------------------------------------------------------------------------------


def test_some_config_is_shipped():
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_configs_load(path):
    experiment = load(path)
    assert parse(dump(experiment)) == experiment


# --- the schema itself -----------------------------------------------------------------------------------------------


def described(schema):
    """Every (path, schema) of a JSON schema that ought to carry a description: classes and their fields."""
    for name, definition in {"Experiment": schema, **schema["$defs"]}.items():
        yield name, definition
        for field, inner in definition["properties"].items():
            yield f"{name}.{field}", inner


@pytest.mark.parametrize(("path", "schema"), described(json_schema()), ids=lambda value: str(value)[:40])
def test_every_class_and_field_has_a_docstring(path, schema):
    assert len(schema.get("description", "")) >= 4, f"{path} lacks a docstring"


def test_json_schema_has_title_and_forbids_unknown_keys():
    schema = json_schema()
    assert schema["title"] == "Experiment"
    assert schema["$schema"].endswith("2020-12/schema")
    assert all(part["additionalProperties"] is False for part in (schema, *schema["$defs"].values()))


def test_json_schema_is_a_fresh_copy():
    json_schema()["properties"].clear()
    assert json_schema()["properties"]


@pytest.mark.parametrize("section", [None, "data", "model", "loss", "federation", "evaluation", "runtime"])
def test_frozen(section):
    experiment = made()
    part = getattr(experiment, section) if section else experiment
    for field in type(part).model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, field, None)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.heads=3", r"heads \(3\) must divide dim \(64\)"),
        ("federation.local={steps: 1, epochs: 1}", "give steps or epochs, not both"),
        ("data.interests=501", r"interests \(501\) must not exceed items \(500\)"),
        ("data.mean_length=101", r"mean_length \(101.0\) must not exceed max_length \(100\)"),
        ("data.validation_from=0.9", "validation_from must be smaller than test_from"),
    ],
)
def test_fields_that_contradict_each_other(override, message):
    with pytest.raises(Exception, match=message):
        made(override)


# --- scalars -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("seed=1_000", 1000),
        ("seed=010", 10),
        ("name=no", "no"),
        ("name=2024-01-01", "2024-01-01"),
        ("name=007", "007"),
        ("evaluation.users=null", None),
        ("evaluation.users=", None),
        ("evaluation.cutoffs=[5,10]", (5, 10)),
        ("federation.local.lr=1e-5", 1e-5),
        ("federation.local.lr=1E2", 100.0),
        ("data.split='global-time'", "global-time"),
    ],
)
def test_scalars_mean_what_they_look_like(override, value):
    result = parse(MINIMAL, overrides=[override])
    for part in override.split("=")[0].split("."):
        result = getattr(result, part)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(("text", "value"), [("off", False), ("yes", True), ("true", True)])
def test_booleans_where_booleans_are_expected(text, value):
    assert parse(f"name: a\ndata: {{kind: pairs, path: 'null', strict: {text}}}").data.strict is value


# --- fingerprint -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    ["runtime.engine=sequential", "runtime.threads=3", "runtime.memory_mb=64", "runtime.checkpoint_every=1"],
)
def test_hash_ignores_runtime(override):
    assert made(override) != made()
    assert experiment_hash(made(override)) == experiment_hash(made())


CHANGES = [
    "name=other",
    "seed=1",
    "data.users=999",
    "data.seed=1",
    "data.split=global-time",
    "model.dim=32",
    "model.dropout=0",
    "loss.kind=gbce",
    "federation.rounds=1",
    "privacy={kind: user-level, noise_multiplier: 1} and federation={sampling: poisson, weighting: uniform}",
    "federation.local.steps=1",
    "federation.local.lr=0.5",
    "federation.optimizer.kind=fedavg",
    "federation.optimizer={kind: fedadam, lr: 0.1}",
    "evaluation.every=1",
    "evaluation.cutoffs=[5, 10]",
]


def test_hash_changes_with_anything_else():
    hashes = [experiment_hash(made(*change.split(" and "))) for change in CHANGES] + [experiment_hash(made())]
    assert len(set(hashes)) == len(hashes)


def test_hash_changes_with_every_section_but_runtime():
    assert set(Experiment.model_fields) - {change.split(".")[0].split("=")[0] for change in CHANGES} == {"runtime"}


def test_hash_is_the_same_whether_a_default_is_written_or_not():
    assert experiment_hash(made("seed=0", "model.dim=64", "loss.kind=softmax")) == experiment_hash(made())


def test_digest_ignores_the_order_of_keys_only():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest([1, 2]) != digest([2, 1])
    # sha256 of `{"a":1}`, from the sha256sum tool.
    assert digest({"a": 1}) == "015abd7f5cc57a2d"


# --- there and back ----------------------------------------------------------------------------------------------

rate = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
share = st.floats(0, 1, exclude_max=True)
count = st.integers(1, 10**30)
text = st.text() | st.sampled_from(
    ["null", "~", "no", "5", "1e5", " ", "a: b", "- x", "#", "'", "*a", "!x", "\t", "=", "<<"]
)
paths = {"path": text, "strict": st.booleans()}
data = st.one_of(
    st.builds(sources.MovieLensData, kind=st.just("movielens"), min_rating=st.none() | st.floats(-9, 9), **paths),
    st.builds(sources.PairsData, kind=st.just("pairs"), **paths),
    st.builds(sources.SequencesData, kind=st.just("sequences"), min_user_events=count, **paths),
    st.builds(sources.RecBoleData, kind=st.just("recbole"), **paths),
    st.builds(
        sources.TableData,
        kind=st.just("table"),
        columns=st.builds(sources.Columns, user=text, time=st.none() | text),
        separator=st.characters(exclude_categories=["Cs"]),
        time_format=st.none() | text,
        **paths,
    ),
    st.builds(sources.SyntheticData, kind=st.just("synthetic"), seed=count, follow=share, users=count),
)
losses = st.one_of(
    st.just(loss.SoftmaxLoss(kind="softmax")),
    st.just(loss.BCELoss(kind="bce")),
    st.builds(loss.GBCELoss, kind=st.just("gbce"), negatives=count, calibration=share),
    st.builds(loss.SampledSoftmaxLoss, kind=st.just("sampled-softmax"), negatives=count),
)
optimizers = st.one_of(
    st.builds(config.FedAvg, kind=st.just("fedavg"), lr=rate),
    st.builds(config.FedAvgM, kind=st.just("fedavgm"), lr=rate, momentum=share),
    st.builds(config.FedAdam, kind=st.just("fedadam"), lr=rate, eps=rate),
    st.builds(config.FedAdagrad, kind=st.just("fedadagrad"), lr=rate),
)
experiments = st.builds(
    config.Experiment,
    name=st.from_regex(r"\A[a-z0-9][a-z0-9._-]{0,63}\Z"),
    seed=count,
    data=data,
    loss=losses,
    federation=st.builds(config.FederationConfig, rounds=st.integers(0, 9), optimizer=optimizers),
    evaluation=st.builds(
        config.EvaluationConfig, cutoffs=st.lists(count, min_size=1, max_size=3), users=st.none() | count
    ),
)


@given(experiments)
def test_dump_and_parse_are_inverse(experiment):
    assert parse(dump(experiment)) == experiment
    assert parse(json.dumps(experiment.model_dump(mode="json"))) == experiment


def test_dump_is_stable():
    assert dump(parse(MINIMAL)).startswith("name: tiny\nseed: 0\ndata:\n  min_user_events: 0\n")
