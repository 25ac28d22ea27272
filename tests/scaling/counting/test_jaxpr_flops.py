"""FLOPs counted on jaxprs: every rule against a number worked out by hand."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from recscale.scaling.counting.jaxpr_flops import Counting, contractions, count_flops

RECOMPUTED = Counting(recomputed=True)


def _array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _mlp(weights, x):
    for w in weights:
        x = jnp.tanh(x @ w)
    return jnp.sum(x)


WEIGHTS = (_array(7, 5), _array(5, 3))
ROWS = _array(11, 7)
FORWARD = 2 * 11 * (7 * 5 + 5 * 3)


def test_matrix_products_count_two_per_multiply_add():
    assert count_flops(_mlp, WEIGHTS, ROWS) == FORWARD


def test_batched_products_with_any_axis_order():
    left, right = _array(4, 3, 6), _array(3, 5, 6)
    assert count_flops(lambda a, b: jnp.einsum("btd,tfd->tbf", a, b), left, right) == 2 * 3 * 4 * 5 * 6


def test_elementwise_work_sums_and_factorisations_count_nothing():
    assert count_flops(lambda x: jnp.linalg.cholesky(jnp.exp(x) + x.T).sum() + jnp.sort(x).max(), _array(8, 8)) == 0


def test_gradient_is_three_times_forward_when_the_input_needs_one():
    both = jax.value_and_grad(_mlp, argnums=(0, 1))
    assert count_flops(both, WEIGHTS, ROWS) == 3 * FORWARD


def test_gradient_of_raw_input_is_not_counted():
    only_weights = jax.value_and_grad(_mlp)
    assert count_flops(only_weights, WEIGHTS, ROWS) == 3 * FORWARD - 2 * 11 * 7 * 5


def test_jit_and_vmap_are_seen_through():
    mapped = jax.jit(jax.vmap(jax.jit(_mlp), in_axes=(None, 0)))
    assert count_flops(mapped, WEIGHTS, _array(6, 11, 7)) == 6 * FORWARD


def test_a_product_shared_by_a_vmap_is_counted_once():
    def inside(x, w, v):
        return (w @ v).sum() * x

    mapped = jax.vmap(inside, in_axes=(0, None, None))
    assert count_flops(mapped, _array(6), _array(4, 3), _array(3, 2)) == 2 * 4 * 3 * 2


def test_arguments_may_be_concrete_and_keywords():
    assert count_flops(_mlp, weights=[jnp.ones((7, 5))], x=jnp.ones((11, 7))) == 2 * 11 * 7 * 5


def _square_steps(x, length):
    return jax.lax.scan(lambda c, _: (jnp.tanh(c @ c), None), x, None, length=length)[0]


@pytest.mark.parametrize("length", [0, 1, 5])
def test_scan_counts_its_length(length):
    assert count_flops(lambda x: _square_steps(x, length), _array(3, 3)) == length * 54


def test_nested_scans_multiply():
    def outer(x):
        return jax.lax.scan(lambda c, _: (_square_steps(c, 4), None), x, None, length=3)[0]

    assert count_flops(outer, _array(3, 3)) == 12 * 54


def test_fori_loop_of_fixed_length_and_map():
    assert count_flops(lambda x: jax.lax.fori_loop(0, 3, lambda i, c: c @ c, x), _array(3, 3)) == 3 * 54
    assert count_flops(lambda x: jax.lax.map(lambda row: row @ x, x), _array(3, 3)) == 54


def _while(x):
    return jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] @ s[1]), (0, x))[1]


def test_while_loop_with_flops_needs_a_stated_number_of_trips():
    with pytest.raises(ValueError, match="while_trips"):
        count_flops(_while, _array(3, 3))
    assert count_flops(_while, _array(3, 3), counting=Counting(while_trips=4)) == 4 * 54


def test_while_loop_without_flops_is_free():
    assert count_flops(lambda x: jax.lax.while_loop(lambda v: v < 9, lambda v: v + 1, x), _array()) == 0


def test_condition_counts_its_dearest_branch():
    def branches(i, x):
        return jax.lax.switch(i, [lambda c: c, lambda c: c @ c, lambda c: c @ c @ c], x)

    assert count_flops(branches, 1, _array(3, 3)) == 2 * 54


@jax.custom_vjp
def _own_gradient(x):
    return x @ x


_own_gradient.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x.T + x.T @ g,))


@jax.custom_jvp
def _own_tangent(x):
    return x @ x


_own_tangent.defjvp(lambda primals, tangents: (_own_tangent(primals[0]), tangents[0] * 2.0))


def test_custom_derivatives_count_the_rule_that_runs():
    assert count_flops(_own_gradient, _array(3, 3)) == 54
    assert count_flops(jax.value_and_grad(lambda x: _own_gradient(x).sum()), _array(3, 3)) == 3 * 54
    assert count_flops(_own_tangent, _array(3, 3)) == 54
    assert count_flops(jax.value_and_grad(lambda x: _own_tangent(x).sum()), _array(3, 3)) == 54


POLICIES = {"everything": None, "keep products": jax.checkpoint_policies.dots_saveable}


@pytest.mark.parametrize("policy", POLICIES)
def test_recomputation_is_left_out_unless_asked_for(policy):
    kept = jax.checkpoint(_mlp, policy=POLICIES[policy])
    step = jax.value_and_grad(kept, argnums=(0, 1))
    assert count_flops(step, WEIGHTS, ROWS) == 3 * FORWARD
    repeated = FORWARD if policy == "everything" else 0
    assert count_flops(step, WEIGHTS, ROWS, counting=RECOMPUTED) == 3 * FORWARD + repeated


def _checkpoint_in_scan(x):
    return jax.lax.scan(lambda c, _: (jax.checkpoint(lambda v: jnp.tanh(v @ v))(c), None), x, None, length=3)[0]


@pytest.mark.parametrize(
    "program, repeats",
    [
        (_checkpoint_in_scan, 1),
        (jax.checkpoint(lambda x: _square_steps(x, 3)), 1),
        (jax.checkpoint(_checkpoint_in_scan), 2),
    ],
    ids=["checkpoint in scan", "scan in checkpoint", "checkpoint in scan in checkpoint"],
)
def test_recomputation_of_loops(program, repeats):
    step = jax.jit(jax.vmap(jax.value_and_grad(lambda x: program(x).sum())))
    assert count_flops(step, _array(2, 3, 3)) == 2 * 9 * 54
    assert count_flops(step, _array(2, 3, 3), counting=RECOMPUTED) == 2 * (9 + 3 * repeats) * 54


def _convolve(x, kernel, strides, padding, lhs_dilation, rhs_dilation, groups):
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, lhs_dilation, rhs_dilation, feature_group_count=groups
    )


CONVOLUTIONS = [
    ((1, 1), "VALID", None, None, 1),
    ((2, 1), "SAME", None, None, 1),
    ((1, 2), [(2, 0), (1, 3)], None, (2, 1), 1),
    ((1, 1), [(1, 1), (1, 1)], (2, 1), None, 1),
    ((1, 1), "SAME", None, None, 2),
]


@pytest.mark.parametrize("strides, padding, lhs_dilation, rhs_dilation, groups", CONVOLUTIONS)
def test_convolution_counts_products_of_real_numbers(strides, padding, lhs_dilation, rhs_dilation, groups):
    """With all-one operands every result is its number of products."""
    x, kernel = jnp.ones((2, 4, 6, 5)), jnp.ones((6, 4 // groups, 3, 2))
    args = (strides, padding, lhs_dilation, rhs_dilation, groups)
    products = float(_convolve(x, kernel, *args).sum())
    assert count_flops(lambda a, b: _convolve(a, b, *args), x, kernel) == 2 * products


@pytest.mark.parametrize("strides, padding, lhs_dilation, rhs_dilation, groups", CONVOLUTIONS)
def test_convolution_gradients_are_three_times_forward(strides, padding, lhs_dilation, rhs_dilation, groups):
    args = (strides, padding, lhs_dilation, rhs_dilation, groups)

    def loss(x, kernel):
        return jnp.sum(_convolve(x, kernel, *args) ** 2)

    shapes = _array(2, 4, 6, 5), _array(6, 4 // groups, 3, 2)
    assert count_flops(jax.value_and_grad(loss, argnums=(0, 1)), *shapes) == 3 * count_flops(loss, *shapes)


def test_ragged_products_count_the_rows_of_the_left_operand():
    def loss(x, w, sizes):
        return jnp.sum(jax.lax.ragged_dot(x, w, sizes) ** 2)

    shapes = _array(8, 4), _array(3, 4, 5), jax.ShapeDtypeStruct((3,), jnp.int32)
    assert count_flops(loss, *shapes) == 2 * 8 * 4 * 5
    assert count_flops(jax.value_and_grad(loss, argnums=(0, 1)), *shapes) == 3 * 2 * 8 * 4 * 5


def _copy_kernel(x_ref, out_ref):
    out_ref[...] = x_ref[...]


def _kernel_call(x, estimate):
    return pl.pallas_call(_copy_kernel, out_shape=x, cost_estimate=estimate, interpret=True, name="copy")(x)


def test_pallas_calls_count_their_estimate():
    estimate = pl.CostEstimate(flops=1000, bytes_accessed=8, transcendentals=0)
    assert count_flops(lambda x: _kernel_call(x, estimate), _array(8, 128)) == 1000
    assert count_flops(jax.vmap(lambda x: _kernel_call(x, estimate)), _array(3, 8, 128)) == 3000
    with pytest.raises(ValueError, match="copy.*cost_estimate"):
        count_flops(lambda x: _kernel_call(x, None), _array(8, 128))


def test_shard_map_counts_all_devices():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    mapped = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=spec, out_specs=spec)
    assert count_flops(mapped, _array(4, 3)) == 2 * 4 * 3 * 4


def test_shard_map_over_an_abstract_mesh_of_four():
    mesh = jax.sharding.AbstractMesh((4,), ("data",))
    spec = jax.sharding.PartitionSpec("data")
    mapped = jax.shard_map(lambda x: x @ jnp.ones((3, 2)), mesh=mesh, in_specs=spec, out_specs=spec)
    assert count_flops(mapped, _array(8, 3)) == 2 * 8 * 3 * 2


def test_linear_solve_counts_its_solver_only():
    def solve(matrix, b):
        return jax.lax.custom_linear_solve(lambda v: matrix @ v, b, lambda matvec, v: matrix @ (matrix @ v))

    assert count_flops(solve, _array(3, 3), _array(3)) == 2 * 18


def test_contractions_say_where_the_flops_are():
    found = contractions(lambda x: _square_steps(x, 5), _array(3, 3))
    assert [(c.primitive, c.shapes, c.flops, c.times) for c in found] == [
        ("dot_general", "[3, 3] x [3, 3] -> [3, 3]", 54, 5)
    ]
    assert sum(c.total for c in found) == 270


def test_count_is_an_exact_integer_beyond_double_precision():
    shape = 2**20 + 1
    flops = count_flops(lambda a, b: a @ b, _array(shape, shape), _array(shape, shape))
    assert isinstance(flops, int) and flops == 2 * shape**3 and flops != int(float(flops))


@pytest.mark.parametrize("spec", ["abc,cd->abd", "abc,dbc->bad", "abe,bce->ac", "ab,ab->a", "cba,dcb->cad"])
def test_equal_to_brute_force_over_einsum_specifications(spec):
    sizes = dict(zip("abcde", (2, 3, 4, 5, 6), strict=True))
    left, right = spec.split("->")[0].split(",")
    shapes = [_array(*(sizes[i] for i in term)) for term in (left, right)]
    # An index of one operand that is not in the result is summed beforehand, without a product.
    used = [i for i in sizes if i in spec.split("->")[1] or (i in left and i in right)]
    cells = sum(1 for _ in itertools.product(*(range(sizes[i]) for i in used)))
    assert count_flops(lambda x, y: jnp.einsum(spec, x, y), *shapes) == 2 * cells
