"""Layers of sparse experts and what they report against their equations: padding, loads, losses, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import filled, normal
from flax import nnx
from in_float64 import in_float64

from recscale.models.layers import per_token_moe
from recscale.models.layers.per_token_moe import (
    PATHS,
    PerTokenExperts,
    TopKMoE,
    capacity_of,
    check_top_k,
    choose_path,
    row_mean,
    top_k_report,
)
from recscale.models.layers.relu_moe import Gating, ReLUMoE

T, B, D, F, E = 2, 6, 4, 8, 4
VALID = np.asarray([1, 1, 0, 1, 0, 1], bool)
X = np.asarray(normal(T, B, D), np.float64)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def silu(z):
    return z / (1 + np.exp(-z))


def gelu(z):
    return 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


def of(variable):
    return np.asarray(variable[...], np.float64)


def top_k(layer, x, valid, active, norm, alpha):
    """(y of valid rows, load, balance, z) of a layer with a shared expert, SwiGLU experts."""
    router, e, s = of(layer.router), layer.experts, layer.shared
    y, load, balance, z = np.zeros_like(x), np.zeros((T, E - 1)), [], []
    for t in range(T):
        logits = x[t] @ router[t]
        chosen = np.argsort(-logits, axis=-1)[:, : active - 1]
        share = np.zeros(E - 1)
        for b in np.flatnonzero(valid):
            g = softmax(logits[b, chosen[b]]) if norm == "selected" else softmax(logits[b])[chosen[b]]
            for gate, k in zip(g, chosen[b], strict=True):
                h = (of(e.up)[t, k] @ x[t, b]) * silu(of(e.gate)[t, k] @ x[t, b])
                y[t, b] += alpha * gate * (h @ of(e.out)[t, k])
                load[t, k] += 1
                share[k] += 1
            h = (x[t, b] @ of(s.up.kernel)[t]) * silu(x[t, b] @ of(s.gate.kernel)[t])
            y[t, b] += of(s.out.kernel)[t] @ h
        rows = valid.sum()
        probability = softmax(logits)[valid].mean(0)
        balance.append((E - 1) * np.sum(share / (rows * (active - 1)) * probability))
        z.append(np.mean(np.log(np.exp(logits[valid]).sum(-1)) ** 2))
    return y, load, np.mean(balance), np.mean(z)


@pytest.mark.parametrize("norm", ["selected", "all"])
@pytest.mark.parametrize("valid", [None, VALID], ids=["all rows", "padding"])
def test_top_k_layer(norm, valid):
    layer = filled(lambda: TopKMoE(T, D, F, experts=E, active=3, gate_norm=norm, path="masked", rngs=nnx.Rngs(0)))
    own = np.ones(B, bool) if valid is None else valid
    x = np.where(own[None, :, None], X, 50.0)  # what stands in padding would outweigh all else
    y, routing = in_float64(lambda x: layer(x, training=True, valid=None if valid is None else jnp.asarray(valid)))(x)
    expected, load, balance, z = top_k(layer, x, own, 3, norm, E / 3)
    np.testing.assert_allclose(y[:, own], expected[:, own], rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(routing.load, load)
    assert routing.dropped == 0
    assert (routing.balance, routing.z) == (pytest.approx(balance, rel=1e-6), pytest.approx(z, rel=1e-6))


def test_several_layers_report_their_mean_and_weigh_it():
    layer = filled(lambda: TopKMoE(T, D, F, experts=E, active=3, path="masked", rngs=nnx.Rngs(0)))
    both = [in_float64(lambda x: layer(x)[1])(x) for x in (X, 2 * X)]
    losses, stats = in_float64(lambda: top_k_report(both, {"balance": 0.5, "z": 0.0}))()
    assert set(losses) == {"router_balance"}
    assert losses["router_balance"] == pytest.approx(0.25 * (both[0].balance + both[1].balance), rel=1e-6)
    assert stats["router_z"] == pytest.approx((both[0].z + both[1].z) / 2, rel=1e-6)
    assert top_k_report([], {"balance": 1.0}) == ({}, {})


@pytest.mark.parametrize("loss", ["balance", "z"])
def test_router_losses_have_the_gradient_of_their_values(loss):
    """By central differences; the choice of experts is constant there, its probabilities are not."""
    layer = filled(lambda: TopKMoE(T, D, F, experts=E, active=3, path="masked", rngs=nnx.Rngs(0)))

    graph, router, rest = nnx.split(layer, lambda path, _: path[-1] == "router", ...)

    def value(router):
        return getattr(nnx.merge(graph, router, rest)(jnp.asarray(X, jnp.float32))[1], loss)

    start, step = of(layer.router), np.random.default_rng(1).standard_normal(layer.router.shape)
    run, at = in_float64(jax.value_and_grad(value)), lambda h: jax.tree.map(lambda _: start + h * step, router)  # noqa: E731
    (up, _), (down, _), (_, found) = (run(at(h)) for h in (1e-5, -1e-5, 0.0))
    (gradient,) = jax.tree.leaves(found)
    assert np.sum(gradient * step) == pytest.approx((up - down) / 2e-5, rel=1e-4) and np.abs(gradient).max() > 1e-4


GATINGS = ["infer", "train", "train_alone", "mean", "rows"]


@pytest.mark.parametrize("gates_from", GATINGS)
def test_relu_layer(gates_from):
    layer = filled(lambda: ReLUMoE(T, D, F, experts=E, path="masked", rngs=nnx.Rngs(0)))
    x, by_train = np.where(VALID[None, :, None], X, 50.0), np.asarray([1, 0, 1, 0, 1, 0], bool)
    gating = Gating(gates_from, jnp.asarray(by_train) if gates_from == "rows" else None)
    y, routing = in_float64(lambda x: layer(x, training=True, gating=gating, valid=jnp.asarray(VALID)))(x)

    def gates(router):
        return np.maximum(np.einsum("tbd,tde->tbe", x, of(router.kernel)) + of(router.bias)[:, None], 0)

    infer, train = gates(layer.infer_router), gates(layer.train_router)
    used = {
        "infer": infer,
        "train": train,
        "train_alone": train,
        "mean": (infer + train) / 2,
        "rows": np.where(by_train[None, :, None], train, infer),
    }[gates_from]
    e, expected = layer.experts, np.zeros_like(x)
    for t, b, k in np.ndindex(T, B, E):
        h = gelu(of(e.up)[t, k] @ x[t, b] + of(e.bias)[t, k])
        expected[t, b] += used[t, b, k] * (h @ of(e.out)[t, k])
    expected += of(layer.bias)[:, None]
    np.testing.assert_allclose(y[:, VALID], expected[:, VALID], rtol=1e-5, atol=1e-7)
    reported = train if gates_from == "train_alone" else infer
    own = VALID & ~by_train if gates_from == "rows" else VALID
    assert routing.gate == pytest.approx(reported[:, VALID].mean(), rel=1e-6) and routing.cut == 0
    np.testing.assert_allclose(routing.active, (reported[:, own] > 0).mean(axis=(1, 2)), rtol=1e-6)
    np.testing.assert_allclose(routing.opened, (reported[:, own] > 0).mean(axis=1), rtol=1e-6)


@pytest.mark.parametrize("cap", [1, 2])
def test_a_cap_keeps_the_largest_gates_in_evaluation_alone(cap):
    layer = filled(lambda: ReLUMoE(T, D, F, experts=E, serve_cap=cap, path="masked", rngs=nnx.Rngs(0)))
    gates = np.maximum(
        np.einsum("tbd,tde->tbe", X, of(layer.infer_router.kernel)) + of(layer.infer_router.bias)[:, None], 0
    )
    kept = np.where(gates >= np.sort(gates, axis=-1)[..., -cap][..., None], gates, 0.0)
    whole, served = (in_float64(lambda x, t=training: layer(x, training=t))(X)[1].cut for training in (True, False))
    assert whole == 0 and served == pytest.approx(1 - (kept > 0).sum() / (gates > 0).sum(), rel=1e-6) and served > 0


def test_places_of_an_expert():
    """A multiple of 8 that holds the mean number of rows times the factor, and never more than all rows."""
    for rows, share, factor, places in (
        (100, 0.25, 1.0, 32),
        (100, 0.24, 1.0, 24),
        (64, 0.5, 1.25, 40),
        (64, 0.5, 1.26, 48),
        (10, 0.5, 1.0, 8),
        (10, 1.0, 1.0, 10),
        (8, 0.1, 1.0, 8),
        (3, 0.1, 1.0, 3),
    ):
        assert capacity_of(rows, share, factor) == places
    layers = {
        p: nnx.eval_shape(lambda p=p: TopKMoE(T, D, F, experts=E, active=3, path=p, rngs=nnx.Rngs(0))) for p in PATHS
    }
    assert {path: layer.places(64) for path, layer in layers.items()} == dict(
        auto=168, masked=None, capacity=168, ragged=None
    )


def test_how_experts_are_computed(monkeypatch):
    """On CPUs with places while training, masked in evaluation; sorted on accelerators."""
    assert [choose_path("auto", training) for training in (True, False)] == ["capacity", "masked"]
    assert all(choose_path(path, training) == path for path in PATHS[1:] for training in (True, False))
    with pytest.raises(ValueError, match="expected one of auto, masked, capacity, ragged"):
        choose_path("sorted", True)
    monkeypatch.setattr(per_token_moe, "current_platform", lambda: "gpu")
    assert [choose_path("auto", training) for training in (True, False)] == ["ragged", "ragged"]


def test_scales_multiply_the_weights_they_name():
    """Up, gate and out, in this order; the same draws otherwise."""
    plain, scaled = (
        PerTokenExperts(2, 8, 4, 3, rngs=nnx.Rngs(0), **options) for options in ({}, dict(scales=(2.0, 3.0, 5.0)))
    )
    for name, scale in (("up", 2.0), ("gate", 3.0), ("out", 5.0)):
        np.testing.assert_allclose(getattr(scaled, name)[...], scale * getattr(plain, name)[...], rtol=1e-6)


def test_experts_a_layer_can_have():
    for sizes, options in (
        ((8, 4, 3), {}),
        ((8, 4, 4), {}),
        ((8, 4, 2), dict(gate_norm="all")),
        ((8, 4, 2), dict(shared=False)),
        ((8, 4, 1), dict(shared=False, gate_norm="all")),
    ):
        check_top_k(*sizes, **options)
    for sizes, options, message in (
        ((9, 4, 3), {}, "9 does not divide into 4 experts"),
        ((8, 4, 5), {}, "active is 5 of 4"),
        ((8, 4, 1), dict(gate_norm="all"), "active is 1 of 4"),
        ((8, 4, 0), dict(shared=False), "active is 0 of 4"),
        ((8, 4, 2), {}, "the constant 1"),
        ((8, 4, 1), dict(shared=False), "the constant 1"),
        ((8, 4, 3), dict(gate_norm="some"), "gate_norm is 'some'"),
    ):
        with pytest.raises(ValueError, match=message):
            check_top_k(*sizes, **options)


def test_rows_that_are_no_padding_have_a_mean():
    x = jnp.asarray([[[1.0], [2.0], [6.0]]])
    assert row_mean(x, None) == 3 and row_mean(x, jnp.asarray([True, True, False])) == 1.5
    assert row_mean(x, jnp.zeros(3, bool)) == 0
