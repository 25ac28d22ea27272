"""RankMixer: its equations, its ablations, and what the paper implies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import normal
from flax import nnx
from in_float64 import in_float64

from recscale.models import build, count
from recscale.models.inputs import Field, Schema, reference_schema
from recscale.models.inputs.examples import random_inputs
from recscale.models.layers.mixing import mix
from recscale.models.mixers.rankmixer import RankMixerBlock
from recscale.scaling.counting.jaxpr_flops import count_flops


def token_schema(tokens=4, width=8):
    """Every field is a token."""
    return Schema(tuple(Field(f"t{i}", "candidate", width) for i in range(tokens)))


def token_model(**config):
    tokens, width = config.pop("T", 4), config.pop("width", 8)
    values = dict(tokens=tokens, width=width, hidden=12, tokenizer="identity") | config
    return build("rankmixer", token_schema(tokens, width), values, rngs=nnx.Rngs(0))


def params(module):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def test_block_equals_a_numpy_transcription():
    T, B, D, F = 4, 5, 8, 12
    block = RankMixerBlock(T, D, F, rngs=nnx.Rngs(0))
    for leaf, seed in zip(
        (block.ffn.up.bias, block.ffn.down.bias, block.ffn_norm.gain, block.mixing_norm.bias), range(4), strict=True
    ):
        leaf[...] = normal(*leaf.shape, seed=seed)

    def layer_norm(x, norm):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        return x * np.asarray(norm.gain[...]) + np.asarray(norm.bias[...])

    x = np.asarray(normal(B, T, D, seed=9), np.float64)
    s = layer_norm(np.asarray(mix(jnp.asarray(x), T)) + x, block.mixing_norm)
    y = np.empty_like(s)
    for t in range(T):
        h = s[:, t] @ np.asarray(block.ffn.up.kernel[...])[t] + np.asarray(block.ffn.up.bias[...])[t]
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        y[:, t] = h @ np.asarray(block.ffn.down.kernel[...])[t].T + np.asarray(block.ffn.down.bias[...])[t]
    expected = layer_norm(y + s, block.ffn_norm)
    found = block(jnp.asarray(x, jnp.float32).swapaxes(0, 1)).swapaxes(0, 1)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("sizes", [(4, 8, 40, 2), (8, 24, 112, 2), (3, 9, 17, 3)])
def test_closed_form_of_the_paper(sizes):
    T, D, F, L = sizes
    config = dict(tokens=T, width=D, hidden=F, layers=L)
    schema = reference_schema()
    inputs = -(-32 // T) * 16 if T != 3 else None
    counted = count("rankmixer", schema, config)
    blocks = L * (T * (2 * D * F + F + D) + 4 * D) + D + 1
    assert counted.dense_params == counted.tokenizer_params + blocks
    if inputs is not None:
        assert counted.tokenizer_params == 512 * D + T * D
    assert counted.forward_flops_per_row == 2 * (counted.tokenizer_params - T * D) + L * 4 * T * D * F + 2 * D


@pytest.mark.parametrize("name, millions", [("rankmixer_100m", 106.95), ("rankmixer_1b", 1107.3)])
def test_presets_meet_the_printed_parameters(name, millions):
    counted = count(name, reference_schema())
    T, D, F = (16, 768, 2176) if name == "rankmixer_100m" else (32, 1536, 5632)
    weights = 2 * 2 * T * D * F
    assert round(weights / 1e6, 2 if T == 16 else 1) == millions
    assert counted.dense_params - counted.tokenizer_params > weights


ABLATIONS = [
    dict(mixer="none"),
    dict(mixer="self_attention"),
    dict(mixer="self_attention", heads=2),
    dict(mixer="all_share"),
    dict(mixer="all_concat"),
    dict(ffn="shared"),
    dict(residual=False),
    dict(norm=None),
    dict(norm="rms"),
    dict(norm_place="pre"),
    dict(norm_place="pre", norm=None),
    dict(norm_affine=False),
    dict(norm_per_token=True),
    dict(norm_eps=1e-3),
    dict(activation="gelu_erf"),
    dict(init="xavier_normal"),
    dict(tower=(6,)),
    dict(layers=1),
]


@pytest.mark.parametrize("flags", ABLATIONS, ids=str)
@pytest.mark.slow
def test_every_flag_builds_counts_and_runs(flags):
    schema = token_schema()
    inputs = random_inputs(schema, 3, 2)
    counted = count("rankmixer", schema, dict(tokens=4, width=8, hidden=12, tokenizer="identity") | flags)
    model = nnx.eval_shape(lambda: token_model(**flags))
    assert params(model) == counted.dense_params
    graph, state = nnx.split(model)
    flops = count_flops(lambda s, i: nnx.merge(graph, s)(i).logits, state, inputs)
    assert flops == 6 * counted.forward_flops_candidate
    out = in_float64(lambda i: token_model(**flags)(i).logits)(inputs)
    assert out.shape == (3, 2, 1) and jnp.isfinite(out).all()


def test_ablations_have_the_sizes_the_paper_states():
    schema, T, D, F = token_schema(4, 8), 4, 8, 20
    base = dict(tokens=T, width=D, tokenizer="identity", layers=1, norm=None)

    def block(**flags):
        counted = count("rankmixer", schema, base | flags)
        return counted.dense_params - counted.head_params, counted.forward_flops_per_row - 2 * D

    dense = block(hidden=F)
    assert dense == (T * (2 * D * F + F + D), 4 * T * D * F)
    attention = block(hidden=F, mixer="self_attention")
    assert (attention[0] - dense[0], attention[1] - dense[1]) == (4 * D * D, 8 * T * D * D + 4 * T * T * D)
    concat = block(hidden=F, mixer="all_concat")
    assert concat == (2 * T * D * F + F + T * D, dense[1])
    narrow = 2 * F // (T + 1)
    share = block(hidden=narrow, mixer="all_share")
    assert share == (2 * T * D * F + T * (narrow + D), dense[1])
    assert block(hidden=F, ffn="shared") == (dense[0] // T, dense[1])


def test_without_mixing_the_logit_is_additive_in_the_tokens():
    def mixed_derivative(mixer):
        model = token_model(mixer=mixer)
        inputs = random_inputs(token_schema(), 1, 1)

        def logit(a, b):
            fields = inputs.candidates.fields | {"t0": a, "t2": b}
            return model(inputs.replace(candidates=inputs.candidates.replace(fields=fields))).logits.sum()

        a, b = inputs.candidates.fields["t0"], inputs.candidates.fields["t2"]
        return in_float64(jax.jacfwd(jax.grad(logit), argnums=1))(a, b)

    assert (mixed_derivative("none") == 0).all()
    assert jnp.abs(mixed_derivative("mix")).max() > 1e-4


def test_rows_are_independent_and_permute():
    model = token_model()
    inputs = random_inputs(token_schema(), 6, 1)
    order = np.asarray([3, 1, 5, 0, 4, 2])
    shuffled = jax.tree.map(lambda x: x[order], inputs)
    np.testing.assert_allclose(model(shuffled).logits, model(inputs).logits[order], rtol=1e-5, atol=1e-6)


def test_dropout_needs_a_key_and_keeps_the_mean():
    model = token_model(dropout=0.5, norm=None, layers=1)
    inputs = random_inputs(token_schema(), 2, 1)
    plain = model(inputs).logits
    np.testing.assert_array_equal(plain, model(inputs).logits)
    draw = in_float64(jax.vmap(lambda key: model(inputs, key=key).logits))
    samples = draw(jax.random.split(jax.random.key(0), 4000))
    assert float(samples.std(axis=0).min()) > 0.01
    error = jnp.abs(samples.mean(axis=0) - plain) / (samples.std(axis=0) / 4000**0.5)
    assert float(error.max()) < 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(T=3), "does not divide into 3 heads"),
        (dict(hidden=0), "hidden is 0"),
        (dict(mixer="self_attention", heads=0), "heads is 0"),
        (dict(tower=(4, 0)), r"tower is \(4, 0\)"),
        (dict(dropout=1.0), "dropout is 1.0"),
        (dict(mixer="self_attention", heads=3), "attention heads"),
        (dict(mixer="all_share", ffn="shared"), "per_token"),
        (dict(mixer="Mix"), "expected 'mix'"),
    ],
    ids=str,
)
def test_bad_configs_say_what_to_change(flags, message):
    with pytest.raises(ValueError, match=message):
        token_model(**flags)
