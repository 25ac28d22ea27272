"""DLRM-MLP and DCNv2: equations in NumPy, counts of every variant, identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import normal
from flax import nnx

from recscale.models import build, count
from recscale.models.baselines.dcnv2 import CrossLayer, CrossOptions
from recscale.models.inputs.examples import random_inputs
from recscale.models.inputs.schema import Field, Schema, reference_schema


def rows(schema, inputs, keep=lambda field: True):
    """x [R*C, d_in], user fields first."""
    requests, candidates = jax.tree.leaves(inputs.candidates.fields)[0].shape[:2]
    parts = [np.repeat(np.asarray(inputs.user.fields[f.name]), candidates, 0) for f in schema.user_fields if keep(f)]
    parts += [
        np.asarray(inputs.candidates.fields[f.name]).reshape(requests * candidates, -1)
        for f in schema.candidate_fields
        if keep(f)
    ]
    return np.concatenate(parts, axis=-1)


def relu_mlp(x, layers):
    for layer in layers:
        x = np.maximum(x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...]), 0)
    return x


def head(x, towers):
    kernel, bias = np.asarray(towers.kernels[0][...]), np.asarray(towers.biases[0][...])
    return np.einsum("bd,yd->by", x, kernel[..., 0]) + bias[:, 0]


def test_dlrm_mlp_is_a_relu_mlp(schema):
    model = build("dlrm_mlp", schema, dict(widths=(9, 5)), rngs=nnx.Rngs(0))
    inputs = random_inputs(schema, 2, 3)
    expected = head(relu_mlp(rows(schema, inputs), [model.first, *model.rest.layers]), model.towers)
    np.testing.assert_allclose(model(inputs).logits.reshape(6, 2), expected, rtol=1e-5, atol=1e-5)


def test_dot_interaction(schema):
    model = build("dlrm_mlp", schema, dict(widths=(9,), interaction="dot", interaction_width=6), rngs=nnx.Rngs(0))
    inputs = random_inputs(schema, 2, 3)
    tables = rows(schema, inputs, lambda field: not field.is_dense)
    sides, tokens, numeric = (inputs.user, inputs.candidates), [], []
    for i, (side, names) in enumerate(zip(sides, (["age"], ["price", "overlap"]), strict=True)):
        spread = (lambda x: np.repeat(x, 3, 0)) if i == 0 else (lambda x: x.reshape(6, -1))
        part = model.sides[i]
        for name in part.names:
            x = np.asarray(side.fields[name])
            if name in part.project:
                x = x @ np.asarray(part.project[name].kernel[...]) + np.asarray(part.project[name].bias[...])
            tokens.append(spread(x))
        bottom = relu_mlp(np.concatenate([side.fields[name] for name in names], -1), part.bottom.layers)
        tokens.append(spread(bottom))
        numeric.append(spread(bottom))
    z = np.stack(tokens, axis=1)
    assert z.shape == (6, 4 + 2, 6)
    gram = np.einsum("bid,bjd->bij", z, z)
    i, j = np.triu_indices(6, k=1)
    user = sum(f.width for f in schema.user_fields if not f.is_dense)
    x = np.concatenate([tables[:, :user], numeric[0], tables[:, user:], numeric[1], gram[:, i, j]], axis=-1)
    expected = head(relu_mlp(x, [model.first]), model.towers)
    np.testing.assert_allclose(model(inputs).logits.reshape(6, 2), expected, rtol=1e-4, atol=1e-4)


def test_a_field_may_be_called_items():
    schema = Schema(tuple(Field(name, "candidate", width, 9) for name, width in (("items", 4), ("keys", 6))))
    model = build("dlrm_mlp", schema, dict(widths=(3,), interaction="dot", interaction_width=4), rngs=nnx.Rngs(0))
    assert jax.eval_shape(model, random_inputs(schema, 2, 3)).logits.shape == (2, 3, 1)


def test_dot_interaction_needs_one_width(schema):
    with pytest.raises(ValueError, match=r"found \[4, 5, 6\]; set interaction_width"):
        build("dlrm_mlp", schema, dict(interaction="dot"), rngs=nnx.Rngs(0))


def test_published_form_of_the_dot_interaction():
    """All pairs of 32 tokens of width 16 are further inputs; the whole Gram matrix is computed."""
    plain = count("dlrm_mlp", reference_schema(), dict(widths=(7, 5)))
    dots = count("dlrm_mlp", reference_schema(), dict(widths=(7, 5), interaction="dot"))
    pairs = 32 * 31 // 2
    assert dots.dense_params - plain.dense_params == 7 * pairs
    assert dots.forward_flops_per_row - plain.forward_flops_per_row == 2 * 7 * pairs + 2 * 32**2 * 16


@pytest.mark.parametrize("structure", ["stacked", "parallel"])
def test_dcnv2_joins_its_two_parts(schema, structure):
    config = dict(cross_layers=2, widths=(9, 5), structure=structure)
    model = build("dcnv2", schema, config, rngs=nnx.Rngs(0))
    inputs = random_inputs(schema, 2, 3)
    x0 = x = rows(schema, inputs)
    for layer in model.cross:
        layer.bias[...] = normal(x.shape[1], seed=3)
        x = x0 * (x @ np.asarray(layer.inward.kernel[...]) + np.asarray(layer.bias[...])) + x
    h = relu_mlp(x0 if structure == "parallel" else x, [model.first, *model.rest.layers])
    expected = head(np.concatenate([x, h], -1) if structure == "parallel" else h, model.towers)
    np.testing.assert_allclose(model(inputs).logits.reshape(6, 2), expected, rtol=1e-4, atol=1e-4)


VARIANTS = [
    ("dlrm_mlp", dict(widths=(7,))),
    ("dlrm_mlp", dict(widths=(9, 5, 3), tower=(4,), activation="gelu")),
    ("dlrm_mlp", dict(widths=(9, 5), interaction="dot", interaction_width=6)),
    ("dlrm_mlp", dict(widths=(9,), interaction="dot", interaction_width=5, bottom=())),
    ("dcnv2", dict(widths=(7, 5))),
    ("dcnv2", dict(widths=(), cross_layers=1)),
    ("dcnv2", dict(widths=(7, 5), structure="parallel")),
    ("dcnv2", dict(widths=(6,), rank=3)),
    ("dcnv2", dict(widths=(6,), rank=3, experts=2)),
    ("dcnv2", dict(widths=(6,), rank=2, experts=4, structure="parallel", cross_activation="relu")),
]


@pytest.mark.parametrize("name, config", VARIANTS, ids=str)
def test_every_variant_builds_counts_and_runs(schema, check_variant, name, config):
    check_variant(name, schema, config)


@pytest.mark.parametrize(
    ("config", "cross", "flops"),
    [
        (dict(cross_layers=3), 3 * (512**2 + 512), 2 * 3 * 512**2),
        (dict(cross_layers=2, rank=16), 2 * (2 * 512 * 16 + 512), 2 * 2 * 2 * 512 * 16),
        (
            dict(cross_layers=2, rank=16, experts=4),
            2 * (4 * (2 * 512 * 16 + 16**2) + 512 + 512 * 4),
            2 * (2 * 4 * (2 * 512 * 16 + 16**2) + 2 * 512 * 4),
        ),
    ],
    ids=str,
)
def test_published_forms_of_the_cross_layers(config, cross, flops):
    counted = count("dcnv2", reference_schema(), config | dict(widths=()))
    assert counted.dense_params - 513 == cross
    assert counted.forward_flops_per_row - 2 * 512 == flops


def test_cross_layer_with_zero_weights_is_the_identity():
    layer = CrossLayer(3, 4, CrossOptions(), rngs=nnx.Rngs(0))
    layer.inward.kernel[...] = jnp.zeros((7, 7))
    x0, x = normal(5, 7), normal(5, 7, seed=1)
    np.testing.assert_array_equal(layer(x0, x), x)


def test_low_rank_equals_full_with_the_product_matrix():
    low = CrossLayer(3, 4, CrossOptions(rank=2), rngs=nnx.Rngs(0))
    full = CrossLayer(3, 4, CrossOptions(), rngs=nnx.Rngs(1))
    full.inward.kernel[...] = low.inward.kernel[...] @ low.outward[...][0]
    low.bias[...] = full.bias[...] = normal(7, seed=2)
    x0, x = normal(5, 7), normal(5, 7, seed=1)
    np.testing.assert_allclose(low(x0, x), full(x0, x), rtol=1e-5, atol=1e-5)


def test_mixture_follows_its_equation():
    E, r, d = 3, 2, 7
    layer = CrossLayer(3, 4, CrossOptions(rank=r, experts=E), rngs=nnx.Rngs(0))
    layer.bias[...] = normal(d, seed=2)
    x0, x = np.asarray(normal(5, d)), np.asarray(normal(5, d, seed=1))
    inward = np.asarray(layer.inward.kernel[...])
    gate = np.exp(x @ inward[:, E * r :])
    gate /= gate.sum(-1, keepdims=True)
    mixed = np.asarray(layer.bias[...])[None]
    for i in range(E):
        h = np.tanh(np.tanh(x @ inward[:, i * r : (i + 1) * r]) @ np.asarray(layer.between[...])[i])
        mixed = mixed + gate[:, i : i + 1] * (h @ np.asarray(layer.outward[...])[i])
    np.testing.assert_allclose(layer(jnp.asarray(x0), jnp.asarray(x)), x0 * mixed + x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("dlrm_mlp", dict(widths=()), "widths is empty"),
        ("dlrm_mlp", dict(widths=(8, 0)), r"widths is \(8, 0\), expected at least 1 everywhere"),
        ("dlrm_mlp", dict(bottom=(0,)), "bottom is"),
        ("dlrm_mlp", dict(interaction_width=4), "interaction_width has no effect without interaction='dot'"),
        ("dcnv2", dict(cross_activation="relu"), "cross_activation has no effect on one expert"),
        ("dcnv2", dict(rank=0), "rank is 0"),
        ("dcnv2", dict(widths=(0,)), "widths is"),
        ("dcnv2", dict(cross_layers=0), "cross_layers is 0"),
        ("dcnv2", dict(experts=2), "needs experts >= 1 and a rank"),
        ("dcnv2", dict(structure="parallel", widths=()), "needs an MLP"),
    ],
    ids=str,
)
def test_bad_configs_say_what_to_change(schema, name, config, message):
    with pytest.raises(ValueError, match=message):
        build(name, schema, config, rngs=nnx.Rngs(0))
