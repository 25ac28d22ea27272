"""No plain form of an operation lets a matrix unit round float32 operands, or sums in a narrow dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.pallas_kernels.grouped_matmul import grouped_matmul
from recscale.pallas_kernels.hybrid_attention import hybrid_attention
from recscale.pallas_kernels.per_token_ffn import per_token_ffn
from recscale.pallas_kernels.product_key_topk import product_key_topk
from recscale.pallas_kernels.sparse_gather import sparse_dot, sparse_gather
from recscale.pallas_kernels.w8a16_matmul import w8a16_matmul

IDS, LENGTHS, SIZES = (jnp.asarray(x, jnp.int32) for x in ([[0, 1], [2, -1]], [1, 3], [1, 1]))
WQ = jnp.ones((6, 5), jnp.int8)

# name -> (shapes of the float operands, a call of them).
CALLS = {
    "product_key_topk": (((2, 1, 2, 3), (1, 2, 4, 3)), lambda q, keys, **o: product_key_topk(q, keys, 2, **o)[0]),
    "sparse_gather": (((3, 4), (2, 2)), lambda values, weights, **o: sparse_gather(values, IDS, weights, **o)),
    "sparse_dot": (((3, 4), (2, 4)), lambda values, x, **o: sparse_dot(values, IDS, x, **o)),
    "hybrid_attention": (
        ((2, 3, 1, 4), (2, 5, 1, 4)),
        lambda q, k, **o: hybrid_attention(q, k, None, LENGTHS, scale=0.5, **o)[0],
    ),
    "w8a16_matmul": (((2, 6),), lambda x, **o: w8a16_matmul(x, WQ, jnp.ones(5), **o)),
    "w8a16_matmul in groups": (((2, 6),), lambda x, **o: w8a16_matmul(x, WQ, jnp.ones((2, 5)), **o)),
    "per_token_ffn": (
        ((2, 3, 4), (2, 4, 5), (2, 5, 4), (2, 4, 5)),
        lambda x, w1, w2, gate, **o: per_token_ffn(x, w1, None, w2, None, w_gate=gate, token_first=True, **o),
    ),
    "grouped_matmul": (((3, 4), (2, 4, 5)), lambda x, w, **o: grouped_matmul(x, w, SIZES, **o)),
}


def products(jaxpr):
    """Every matrix product of a program."""
    for equation in jaxpr.eqns:
        if "dot" in equation.primitive.name:
            yield equation
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from products(inner)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("name", CALLS)
def test_products_are_of_float32_or_sum_in_it(name, implementation):
    shapes, call = CALLS[name]

    def everything(*operands):
        if name.startswith("w8a16"):
            return call(*operands, implementation=implementation)
        y, pull = jax.vjp(lambda *a: call(*a, implementation=implementation), *operands)
        return pull(y)

    for dtype in (jnp.float32, jnp.bfloat16):
        operands = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
        found = list(products(jax.make_jaxpr(everything)(*operands).jaxpr))
        assert found
        for equation in found:
            assert {x.aval.dtype for x in equation.outvars} == {np.dtype(np.float32)}
            if dtype == jnp.float32:
                precision = equation.params["precision"]
                each = precision if isinstance(precision, tuple) else (precision,)
                assert set(each) == {jax.lax.Precision.HIGHEST}, equation
