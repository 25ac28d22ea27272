"""Per-token layers of scenario tokens on each row's own scenario alone: one matrix per scenario, rows sorted by it.

A layer with a matrix per scenario, W [G,D,F], and one for the global token behind them, is given two tokens a row:

    y_0[b] = x_0[b] W[g_b]      g_b the row's scenario; rows sorted by it, `pallas_kernels.grouped_matmul`
    y_1[b] = x_1[b] W[G]        the global token, where there is one

What it leaves out is read by no row, so it changes no output; 2 tokens instead of G + 1 are computed.

Letters: B rows, G scenarios, D inputs, F outputs, n = 1 or 2 tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recscale.models.layers.dispatch import Assignment, by_sorting, collect, dispatch
from recscale.models.layers.matmul import contract
from recscale.models.layers.per_token import PerTokenDense, PerTokenFFN, activation
from recscale.pallas_kernels.grouped_matmul import grouped_matmul


class Active(NamedTuple):
    """Which scenario every row is made in: int32 [B], one outside 0 ... G - 1 is none; its rows sorted by scenario."""

    scenario: Int[Array, " B"]
    known: Bool[Array, " B"]
    assignment: Assignment
    sizes: Int[Array, " G"]


def find_active(scenario: Int[Array, " B"], scenarios: int) -> Active:
    """Sorts the rows of a batch by their scenario."""
    known = (scenario >= 0) & (scenario < scenarios)
    assignment, sizes = by_sorting(jnp.where(known, scenario, scenarios)[None, :, None], scenarios)
    return Active(scenario, known, assignment, sizes)


def own_tokens(x: Float[Array, "N B D"], active: Active) -> Float[Array, "n B D"]:
    """Of a token per scenario, and the global one behind them, each row's own and the global one."""
    own = jnp.take_along_axis(x, active.scenario[None, :, None], axis=0, mode="clip")
    return jnp.concatenate([own, x[active.sizes.shape[0] :]])


def per_row(layer: PerTokenDense, x: Float[Array, "n B in"], active: Active | None) -> Float[Array, "n B out"]:
    """The layer on all its tokens, or where `active` is given on each row's own and the global one."""
    if active is None:
        return layer(x)
    G = active.sizes.shape[0]
    w = layer.kernel[...].swapaxes(1, 2) if layer.transposed else layer.kernel[...]
    rows = grouped_matmul(dispatch(x[:1].astype(layer.dtype), active.assignment), w[:G], active.sizes)
    y = collect(rows, active.assignment)
    if x.shape[0] > 1:
        y = jnp.concatenate([y, contract("bd,df->bf", x[1], w[G], layer.dtype)[None]])
    if layer.bias is None:
        return y
    bias = layer.bias[...].astype(layer.dtype)
    own = jnp.take(bias, active.scenario, axis=0, mode="clip")[None]
    return y + (own if x.shape[0] == 1 else jnp.concatenate([own, jnp.broadcast_to(bias[G:, None], own.shape)]))


def per_row_network(network: PerTokenFFN, x: Float[Array, "n B in"], active: Active | None) -> Float[Array, "n B out"]:
    """The network on all its tokens, or where `active` is given on each row's own and the global one."""
    if active is None:
        return network(x)
    hidden = activation(network.act)(per_row(network.up, x, active))
    return per_row(network.down, hidden, active)
