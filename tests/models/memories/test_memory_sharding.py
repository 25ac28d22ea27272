"""Values spread over forced host devices equal one device: reads, gradients, row updates, in a process of its own."""

import subprocess
import sys

import forced_devices
import jax
import jax.numpy as jnp
import pytest

from recscale.models.memories.sharding import sharded_read

HEAD = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from recscale.models.memories.sharding import sharded_read
from recscale.models.memories.value_table import RowGrads
from recscale.pallas_kernels.sparse_gather import sparse_gather
from recscale.scaling.training.rows.memory_rows import ValueOptions, init_slots, update_rows

assert jax.device_count() == 8
N, J = 32, 5
rng = np.random.default_rng(0)

def draw(M, d):
    values = jnp.asarray(rng.standard_normal((M, d)), jnp.float32)
    ids = rng.integers(-1, M, (N, J))
    ids[0], ids[1] = -1, M - 1
    weights = jnp.asarray(rng.standard_normal((N, J)), jnp.float32)
    g = jnp.asarray(rng.standard_normal((N, d)), jnp.float32)
    return values, jnp.asarray(ids, jnp.int32), weights, g

def make_mesh(devices):
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((devices,), ("shards",), devices=jax.devices()[:devices], axis_types=auto)

def equal(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6, rtol=2e-6), found, expected)
"""

READS = """
values, ids, weights, g = draw(37, 12)  # neither is a multiple of 8
expected = jax.vjp(lambda v, w: sparse_gather(v, ids, w), values, weights)
expected = (expected[0], *expected[1](g))
wanted = {"rows": ("reduce-scatter",), "columns": ("all-to-all",), "dedupe": ("reduce-scatter",)}
for devices in map(int, sys.argv[1:]):
    mesh = make_mesh(devices)
    for name in wanted:
        kwargs = dict(by="rows", dedupe=N // devices * J) if name == "dedupe" else dict(by=name)

        @jax.jit
        def step(values, weights):
            y, pull = jax.vjp(lambda v, w: sharded_read(v, ids, w, mesh, "shards", **kwargs), values, weights)
            return (y, *pull(g))

        text = step.lower(values, weights).compile().as_text()
        assert all(collective in text for collective in (*wanted[name], "all-gather")), name
        equal(step(values, weights), expected)
print("equal")
"""

UPDATES = """
values, ids, weights, g = draw(400, 16)
options = ValueOptions()
grads = RowGrads(ids.reshape(-1), weights.reshape(-1), jnp.arange(N * J, dtype=jnp.int32) // J, g)

@jax.jit
def step(table, slots):
    return update_rows(options, table, slots, grads, jnp.float32(0.1), jnp.int32(0))

expected = step(values, init_slots(options, values))
for devices in map(int, sys.argv[1:]):
    mesh = make_mesh(devices)
    for spec in (PartitionSpec("shards"), PartitionSpec(None, "shards")):
        put = lambda a: jax.device_put(a, NamedSharding(mesh, spec))
        sharding = jax.tree.map(lambda _: NamedSharding(mesh, spec), expected)
        split = jax.jit(step, out_shardings=sharding)
        found = split(put(values), jax.tree.map(put, init_slots(options, values)))
        equal(found, expected)
        # Moments lie where their rows or columns lie, and rows that were not hit keep their bits.
        assert all(leaf.addressable_shards[0].data.size == values.size // devices for leaf in jax.tree.leaves(found))
        unhit = np.setdiff1d(np.arange(400), np.asarray(ids))
        assert unhit.size and (np.asarray(found[0])[unhit] == np.asarray(values)[unhit]).all()
print("equal")
"""


def run(script, *devices):
    env = forced_devices.environment(8)
    command = [sys.executable, "-c", HEAD + script, *map(str, devices)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "equal" in result.stdout


@pytest.mark.parametrize("devices", [(4,), pytest.param((2, 8), marks=pytest.mark.slow)])
def test_reads_by_rows_and_columns_equal_one_device(devices):
    run(READS, *devices)


def test_row_updates_of_split_tables_equal_one_device():
    run(UPDATES, 4)


def test_errors_name_what_was_wrong():
    explicit = jax.make_mesh((1,), ("shards",), axis_types=(jax.sharding.AxisType.Explicit,))
    mesh = jax.make_mesh((1,), ("shards",), axis_types=(jax.sharding.AxisType.Auto,))
    values, ids, weights = jnp.ones((4, 2)), jnp.zeros((3, 1), jnp.int32), jnp.ones((3, 1))
    with pytest.raises(ValueError, match="by is 'slots'"):
        sharded_read(values, ids, weights, mesh, "shards", by="slots")
    with pytest.raises(ValueError, match="dedupe exchanges rows"):
        sharded_read(values, ids, weights, mesh, "shards", by="columns", dedupe=4)
    with pytest.raises(ValueError, match="is Explicit, expected Auto"):
        sharded_read(values, ids, weights, explicit, "shards")
