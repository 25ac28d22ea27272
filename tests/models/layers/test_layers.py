"""Per-token layers, norms, split products, attention, towers and the low-precision product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import normal
from flax import nnx
from jax.extend.core import jaxprs_in_params

from recscale.models.layers import param
from recscale.models.layers.attention import SelfAttention
from recscale.models.layers.dense import FFN, MLP, Dense, SplitDense, mlp_params
from recscale.models.layers.matmul import contract
from recscale.models.layers.norms import Norm, norm_params
from recscale.models.layers.per_token import ACTIVATIONS, PerTokenDense, PerTokenFFN
from recscale.models.layers.towers import Towers, mean_tokens, tower_params


def size(module):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


@pytest.mark.parametrize("tokens", [4, 64])
def test_kernel_std_does_not_depend_on_tokens(tokens):
    layer = PerTokenDense(tokens, 256, 64, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(layer.kernel[...].std(), 256**-0.5, rtol=0.01)
    experts = param.kernel(nnx.Rngs(0), (3, tokens, 256, 64), ("experts", "tokens", "embed", "hidden"))
    np.testing.assert_allclose(experts[...].std(), 256**-0.5, rtol=0.01)


@pytest.mark.parametrize("init", list(param.INITIALIZERS))
def test_every_initialiser_draws(init):
    kernel = param.kernel(nnx.Rngs(0), (3, 64, 192), ("tokens", "embed", "hidden"), init)
    library = getattr(jax.nn.initializers, init.replace("xavier", "glorot"))(batch_axis=0)
    expected = library(jax.random.key(1), (3, 64, 192), jnp.float32)
    np.testing.assert_allclose(kernel[...].std(), expected.std(), rtol=0.02)
    np.testing.assert_allclose(jnp.abs(kernel[...]).max(), jnp.abs(expected).max(), rtol=0.02)


def test_bad_parameters_are_refused():
    with pytest.raises(ValueError, match="init is 'lecun'"):
        param.kernel(nnx.Rngs(0), (2, 3), ("embed", "hidden"), "lecun")
    with pytest.raises(ValueError, match="axis names"):
        param.kernel(nnx.Rngs(0), (2, 3), ("embed",))


def test_per_token_with_equal_weights_is_the_shared_ffn():
    shared, own = FFN(8, 12, rngs=nnx.Rngs(0)), PerTokenFFN(3, 8, 12, rngs=nnx.Rngs(1))
    for mine, theirs in ((own.up, shared.up), (own.down, shared.down)):
        theirs_stored = theirs.kernel[...].T if mine.transposed else theirs.kernel[...]
        mine.kernel[...] = jnp.broadcast_to(theirs_stored, mine.kernel.shape)
        mine.bias[...] = jnp.broadcast_to(normal(theirs.bias.shape[0]), mine.bias.shape)
        theirs.bias[...] = mine.bias[...][0]
    x = normal(3, 5, 8)
    np.testing.assert_allclose(own(x), shared(x), rtol=1e-5, atol=1e-6)


def test_tokens_do_not_share_weights():
    graph, state = nnx.split(PerTokenFFN(3, 4, 6, rngs=nnx.Rngs(0)))
    x = normal(3, 5, 4)
    for t in range(3):
        grads = jax.grad(lambda s, t=t: nnx.merge(graph, s)(x)[t].sum())(state)
        for leaf in map(np.asarray, jax.tree.leaves(grads)):
            assert (leaf[np.arange(3) != t] == 0).all()
            assert np.abs(leaf[t]).max() > 0


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_every_activation(name):
    out = PerTokenFFN(2, 4, 6, activation=name, rngs=nnx.Rngs(0))(normal(2, 3, 4))
    assert out.shape == (2, 3, 4) and jnp.isfinite(out).all()


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="activation is 'swish'"):
        FFN(2, 2, activation="swish", rngs=nnx.Rngs(0))(normal(1, 2))


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("tokens", [None, 3])
def test_norm(kind, tokens):
    norm = Norm(6, kind=kind, tokens=tokens)
    norm.gain[...] = normal(*norm.gain.shape)
    x = np.asarray(normal(3, 5, 6, seed=1)) * 4 + 1
    centred = x - x.mean(-1, keepdims=True) if kind == "layer" else x
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    gain = np.asarray(norm.gain[...])
    expected = expected * (gain[:, None] if tokens else gain)
    if kind == "layer":
        norm.bias[...] = normal(*norm.bias.shape, seed=2)
        bias = np.asarray(norm.bias[...])
        expected = expected + (bias[:, None] if tokens else bias)
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-5)
    assert size(norm) == norm_params(6, kind=kind, tokens=tokens)


def test_norm_statistics_are_float32_for_bfloat16_activations():
    x = (300 + normal(2, 3, 64)).astype(jnp.bfloat16)
    y = Norm(64, dtype=jnp.bfloat16)(x)
    expected = Norm(64)(x.astype(jnp.float32))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=0.02)


@pytest.mark.parametrize("user", [0, 3])
def test_split_product_is_the_whole_product(user):
    layer = SplitDense(user, 4, 5, rngs=nnx.Rngs(0))
    layer.bias[...] = normal(5)
    x_user, x = normal(2, user), normal(2, 3, 4, seed=1)
    split = layer.score(layer.encode_user(x_user), x)
    rows = jnp.concatenate([jnp.repeat(x_user, 3, axis=0), x.reshape(6, 4)], axis=1)
    np.testing.assert_allclose(split, layer(rows), rtol=1e-5, atol=1e-6)


def test_mlp_counts_and_shapes():
    mlp = MLP(7, (5, 3), rngs=nnx.Rngs(0))
    assert size(mlp) == mlp_params(7, (5, 3)) == 7 * 5 + 5 + 5 * 3 + 3
    assert mlp(normal(2, 4, 7)).shape == (2, 4, 3)
    assert (mlp(normal(2, 4, 7)) >= 0).all()


@pytest.mark.parametrize("tower", [(), (6,), (6, 5)])
def test_towers(tower):
    towers = Towers(4, 3, tower=tower, rngs=nnx.Rngs(0))
    h = normal(7, 4)
    logits = towers(h)
    assert logits.shape == (7, 3) and logits.dtype == jnp.float32
    assert size(towers) == tower_params(4, 3, tower)
    for task in range(3):
        one = h
        for i, (kernel, bias) in enumerate(zip(towers.kernels, towers.biases, strict=True)):
            one = one @ kernel[...][task] + bias[...][task][None]
            one = one if i == len(tower) else jax.nn.relu(one)
        np.testing.assert_allclose(logits[:, task], one[:, 0], rtol=1e-5, atol=1e-6)


def test_attention_is_softmax_of_scaled_scores():
    attention = SelfAttention(6, 2, rngs=nnx.Rngs(0))
    x = normal(4, 3, 6)
    q, k, v = (np.asarray(f(x)) for f in (attention.query, attention.key, attention.value))
    out = np.zeros((4, 3, 6))
    for row in range(3):
        for cut in (slice(0, 3), slice(3, 6)):
            scores = q[:, row, cut] @ k[:, row, cut].T / np.sqrt(3)
            weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
            out[:, row, cut] = weights @ v[:, row, cut]
    np.testing.assert_allclose(attention(x), attention.out(jnp.asarray(out, jnp.float32)), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="attention heads"):
        SelfAttention(6, 4, rngs=nnx.Rngs(0))


def test_low_precision_product_and_gradients():
    x, w, g = normal(3, 50, 64), normal(3, 64, 32, seed=1), normal(3, 50, 32, seed=2)
    spec = "tbd,tdf->tbf"

    def loss(x, w, dtype):
        return (contract(spec, x, w, dtype).astype(jnp.float32) * g).sum()

    y = contract(spec, x, w, jnp.bfloat16)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), contract(spec, x, w), atol=0.25)
    low, full = jax.grad(loss, (0, 1))(x, w, jnp.bfloat16), jax.grad(loss, (0, 1))(x, w, jnp.float32)
    for a, b in zip(low, full, strict=True):
        assert a.dtype == jnp.float32
        assert jnp.linalg.norm(a - b) < 0.01 * jnp.linalg.norm(b)
    # The gradient of a float32 parameter keeps its accumulator: it is not a bfloat16 number.
    assert (low[1] != low[1].astype(jnp.bfloat16).astype(jnp.float32)).any()

    def operands(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                yield [str(v.aval.dtype) for v in eqn.invars]
            for inner in jaxprs_in_params(eqn.params):
                yield from operands(inner)

    program = jax.make_jaxpr(jax.grad(lambda x, w: loss(x, w, jnp.bfloat16), (0, 1)))(x, w)
    # One of each for CPUs, which lack some bfloat16 products, and one for everything else.
    assert sorted(operands(program.jaxpr)) == [["bfloat16", "bfloat16"]] * 3 + [["float32", "float32"]] * 3


def test_transposed_storage_holds_the_same_numbers():
    plain, turned = (PerTokenDense(3, 4, 6, transposed=flag, rngs=nnx.Rngs(0)) for flag in (False, True))
    np.testing.assert_array_equal(turned.kernel[...], plain.kernel[...].swapaxes(1, 2))
    assert turned.kernel.get_metadata("logical_axes") == ("tokens", "hidden", "embed")
    x = normal(3, 5, 4)
    np.testing.assert_allclose(turned(x), plain(x), rtol=1e-5, atol=1e-6)


def test_mean_over_tokens_and_its_derivative():
    x = normal(5, 3, 4)
    np.testing.assert_allclose(mean_tokens(x), x.mean(axis=0), rtol=1e-5, atol=1e-6)
    grad = jax.grad(lambda x: jnp.sum(mean_tokens(x) ** 2))(x)
    np.testing.assert_allclose(grad, jnp.broadcast_to(2 * x.mean(axis=0)[None] / 5, x.shape), rtol=1e-5, atol=1e-6)


def test_dense_keeps_leading_axes():
    layer = Dense(4, 3, rngs=nnx.Rngs(0))
    x = normal(2, 5, 4)
    np.testing.assert_allclose(layer(x), x @ layer.kernel[...], rtol=1e-5, atol=1e-6)
