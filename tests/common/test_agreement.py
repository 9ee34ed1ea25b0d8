"""Sections that contradict one another, or that nothing would read, are refused; what a mode reads is not."""

import pytest
from pydantic import ValidationError

from tests.privacy import private
from tests.support import world


def made(mode, kind="user-level", **evaluation):
    sections = {"evaluation": {"privacy": mode, **evaluation}}
    return private.experiment(**sections) if kind == "user-level" else world.experiment(**sections)


@pytest.mark.parametrize(
    ("mode", "key", "value", "heard"),
    [
        ("noised", "noise", 20.0, True),
        ("unaccounted", "noise", 20.0, False),
        ("public-holdout", "noise", 20.0, False),
        ("public-holdout", "holdout", 0.2, True),
        ("noised", "holdout", 0.2, False),
        ("unaccounted", "holdout", 0.2, False),
        ("noised", "users", 5, True),
        ("public-holdout", "users", 5, False),
        ("public-holdout", "test_users", 5, False),
    ],
)
def test_what_a_mode_does_not_read(mode, key, value, heard):
    if heard:
        made(mode, **{key: value})
    else:
        with pytest.raises(ValueError, match=rf"evaluation\.{key} is (not )?for "):
            made(mode, **{key: value})


def test_without_a_mode_there_are_no_public_users_and_no_noise():
    made("unaccounted", "none")  # a twin of a private experiment
    with pytest.raises(ValueError, match=r"evaluation\.privacy public-holdout is for a privacy mode"):
        made("public-holdout", "none")
    for key, value in {"noise": 20.0, "holdout": 0.2}.items():
        with pytest.raises(ValueError, match=rf"evaluation\.{key} is for "):
            made("noised", "none", **{key: value})


# --- what stays on devices -------------------------------------------------------------------------------------------

LOCAL = {"kind": "local", "noise_multiplier": 1.0}
EXAMPLES = {"kind": "example-level", "noise_multiplier": 1.0, "segment": 3}


@pytest.mark.parametrize(
    "privacy", [LOCAL, EXAMPLES, {"kind": "user-level", "noise_multiplier": 1.0, "on_device": EXAMPLES}]
)
def test_devices_that_send_everything_keep_nothing(privacy):
    federation = {"weighting": "uniform"} | ({"sampling": "poisson"} if privacy["kind"] == "user-level" else {})
    given = {"privacy": privacy, "evaluation": {"privacy": "unaccounted"}}
    world.experiment(**given, federation=federation)
    with pytest.raises(ValidationError, match=r"privacy.kind .* knows no federation.on_device"):
        world.experiment(**given, federation={**federation, "on_device": ["norm.*"]})


@pytest.mark.parametrize("pattern", ["*", "item", "i*", "[i]tem", "????"])
def test_the_item_table_stays_with_nobody(pattern):
    for section in (
        {"federation": {"on_device": ["norm.*", pattern]}},
        {"evaluation": {"fine_tune": {"parameters": ["norm.*", pattern]}}},
    ):
        with pytest.raises(ValidationError, match="takes in the item table, which all share"):
            world.experiment(**section)


def test_of_several_each_must_name_something_to_stay():
    with pytest.raises(ValidationError, match=r"on_device: blokcs.0.\* names no parameter"):
        world.experiment(federation={"on_device": ["norm.*", "blokcs.0.*"]})
    world.experiment(evaluation={"fine_tune": {"parameters": ["norm.*", "blokcs.0.*"]}})


@pytest.mark.parametrize("pattern", ["user.*", "norm", "blocks.7.*", "NORM.*", ""])
def test_what_names_nothing_is_refused(pattern):
    for key, section in (
        ("federation.on_device", {"federation": {"on_device": [pattern]}}),
        ("evaluation.fine_tune.parameters", {"evaluation": {"fine_tune": {"parameters": [pattern]}}}),
    ):
        with pytest.raises(ValidationError, match=f"{key}: .* names no parameter; there are .*norm.weight"):
            world.experiment(**section)


@pytest.mark.parametrize(
    ("sections", "shared"),
    [
        ({}, "user.bias"),
        ({"federation": {"on_device": ["norm.*"]}}, "user.bias"),
        ({"federation": {"on_device": ["user.bias"]}}, "user.scale"),
        ({"evaluation": {"fine_tune": {"parameters": ["norm.*", "user.b*"]}}}, "user.scale"),
        ({"federation": {"on_device": ["user.bias"]}, "evaluation": {"fine_tune": {"parameters": ["*.scale"]}}}, None),
        ({"evaluation": {"fine_tune": {}}}, None),
    ],
)
def test_what_is_personal_is_somebodys(sections, shared):
    sections = {"model": {"personal": ["bias", "scale"]}, **sections}
    if shared is None:
        world.experiment(**sections)
    else:
        with pytest.raises(ValidationError, match=f"all would share {shared}; put user.* into federation.on_device"):
            world.experiment(**sections)


def test_what_is_personal_comes_once():
    with pytest.raises(ValidationError, match="names something twice"):
        world.experiment(model={"personal": ["bias", "bias"]})
