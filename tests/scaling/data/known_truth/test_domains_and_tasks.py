"""Domains and labels of the known-truth log: how much a model recovers of what they share and of what is theirs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.models.inputs.tables import find_touched
from recscale.scaling.data import make_source
from recscale.scaling.data.known_truth import build_world, make_batch, preset
from recscale.scaling.data.known_truth.card import card
from recscale.scaling.data.known_truth.evaluate import evaluate
from recscale.scaling.data.known_truth.logit_parts import decode, padded_words, term_values

CLASSES = {"N_shared", "N_domain0", "N_domain1", "N_common", "N_own"}


@pytest.fixture(scope="module")
def log():
    config = preset("dense_nested", quanta=24, domains=2, tasks=2, blocks=2)
    world = build_world(config)
    batch = jax.device_get(jax.jit(lambda k: make_batch(world, 0, k, 8192, evaluation=True))(np.uint32(0)))
    return world, batch, card(world, rows=2**13)


def logits_of(world, batch, keep):
    """[1, R, 1, 2]: the terms for which `keep(terms)` holds, each with its true coefficient."""
    rows, tasks = decode(world, batch), []
    for terms in world.terms:
        values = term_values(padded_words(rows)[..., 0], terms, jnp.asarray(rows.domain))
        tasks.append(np.where(keep(terms), terms.coefficient / world.scale, 0.0) @ np.asarray(values))
    return np.stack(tasks, axis=-1)[None, :, None]


@pytest.mark.parametrize(
    ("known", "keep"),
    [
        ({"N_shared"}, lambda terms: terms.domain < 0),
        ({"N_domain1"}, lambda terms: terms.domain == 1),
        ({"N_common"}, lambda terms: terms.common),
        (CLASSES, lambda terms: terms.domain < 9),
    ],
)
def test_recovery_names_what_a_model_knows(log, known, keep):
    world, batch, constants = log
    found = evaluate(world, [batch], logits_of(world, batch, keep), constants)
    for suffix in ("", "_convert"):
        recovery = found[f"recovery{suffix}"]
        assert set(recovery) >= CLASSES
        for name in known:
            assert recovery[name] > 0.97, (name, recovery)
        if known != CLASSES and "N_common" not in known:
            others = {"N_shared", "N_domain0", "N_domain1"} - known
            assert max(recovery[name] for name in others) < 0.1, recovery
    nothing = evaluate(world, [batch], np.zeros((1, 8192, 1, 2)), constants)
    assert nothing["recovery"].keys() == found["recovery"].keys() and not any(nothing["recovery"].values())


def test_extra_tables_hold_the_same_ids_apart():
    source = make_source(
        {"name": "known_truth", "preset": "smoke", "extra_tables": ("user", "item"), "holdout_rows": 8}, requests=8
    )
    extra = [field for field in source.schema.fields if field.group == "extra"]
    assert [(f.name, f.table_name, f.ids_name, f.side) for f in extra] == [
        ("user_extra", "user_extra", "user", "user"), ("item_extra", "item_extra", "item", "candidate"),
    ]  # fmt: skip
    touched = find_touched(source.schema, jax.jit(source.batch)(0))
    np.testing.assert_array_equal(touched["user"].rows, touched["user_extra"].rows)
    assert touched["item"].rows.shape != touched["item_extra"].rows.shape  # the history reads the first alone
    with pytest.raises(ValueError, match="extra tables are asked for usr"):
        make_source({"name": "known_truth", "preset": "smoke", "extra_tables": ("usr",)}, requests=8)
