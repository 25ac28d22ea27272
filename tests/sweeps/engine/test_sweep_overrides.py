"""Overrides: typed, strict, and helpful about misspelt keys."""

import numpy as np
import pytest
from ml_collections import ConfigDict, config_dict

from recscale.scaling.records.overrides import OverrideError, apply, leaves, parse


@pytest.fixture
def config():
    base = ConfigDict(
        {
            "architecture": "toy",
            "model": {"tokens": 16, "widths": (8, 8), "gate": True, "tail": None},
            "training": {"lr": 3e-3, "examples": 1000, "optimizer": "adamw"},
            "data": {"overrides": {}, "root": ""},
        }
    )
    base.size = ConfigDict({"dense_params": config_dict.placeholder(float)})
    return base


def test_values_are_converted_to_the_type_of_the_setting(config):
    laid = apply(
        config,
        {
            "training.lr": 1,
            "size.dense_params": 1000,
            "model.widths": [4, 4],
            "training.examples": np.int64(5),
            "data.overrides.alpha": 0.5,
        },
    )
    assert laid.training.lr == 1.0 and isinstance(laid.training.lr, float)
    assert laid.size.dense_params == 1000.0 and isinstance(laid.size.dense_params, float)
    assert laid.model.widths == (4, 4) and type(laid.training.examples) is int
    assert laid.data.overrides.alpha == 0.5


def test_the_base_is_left_alone_and_empty_settings_keep_their_type(config):
    laid = apply(config, {"training.lr": 1.0})
    assert config.training.lr == 3e-3 and laid.get_ref("training") is not config.get_ref("training")
    assert apply(laid, {"size.dense_params": 5}).size.dense_params == 5.0
    with pytest.raises(OverrideError, match="expected float"):
        apply(laid, {"size.dense_params": "many"})
    assert config.size.dense_params is None and laid.size.dense_params is None


@pytest.mark.parametrize(
    "key, nearest",
    [
        ("training.learning_rate", "training"),
        ("lr", "training.lr"),
        ("training.exmaples", "training.examples"),
        ("model.token", "model.tokens"),
        ("trainng.lr", "training.lr"),
    ],
)
def test_an_unknown_key_names_the_nearest(config, key, nearest):
    with pytest.raises(OverrideError, match=f"unknown configuration key '{key}'.*nearest key is '{nearest}"):
        apply(config, {key: 1.0})
    with pytest.raises(OverrideError, match="nearest key is"):
        parse(config, [f"{key}=1"])


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("training.examples", 1e3, "is float, expected int .*; write 1000"),
        ("training.examples", True, "is bool, expected int"),
        ("training.optimizer", 3, "is int, expected str"),
        ("model.gate", 1, "is int, expected bool"),
        ("training.lr", None, "is NoneType, expected float"),
        ("training", {"lr": 1.0}, "is a section .* training.lr"),
        ("training.lr.x", 1.0, "unknown configuration key"),
        ("data.overrides", 3, "expected a dictionary"),
    ],
)
def test_values_of_a_wrong_type_are_refused(config, key, value, message):
    with pytest.raises(OverrideError, match=message):
        apply(config, {key: value})


def test_texts_are_read_by_the_type_of_the_setting(config):
    texts = ["training.examples=1e6", "training.lr=1", "model.widths=(4, 2)", "model.gate=false", "data.root=1"]
    texts += ["model.tail=3", "data.overrides.codes=oracle", "data.overrides.quanta=64", "size.dense_params=1e4"]
    values = parse(config, texts)
    assert values["training.examples"] == 1_000_000 and type(values["training.examples"]) is int
    assert values["data.root"] == "1" and values["model.gate"] is False and values["model.widths"] == (4, 2)
    assert values["model.tail"] == 3 and values["data.overrides.codes"] == "oracle"
    assert values["data.overrides.quanta"] == 64
    assert leaves(apply(config, values))["training.lr"] == 1.0


@pytest.mark.parametrize(
    "text, message", [("training.lr", "not key=value"), ("training.lr=fast", "not a value of type float")]
)
def test_texts_that_say_nothing_are_refused(config, text, message):
    with pytest.raises(OverrideError, match=message):
        parse(config, [text])
