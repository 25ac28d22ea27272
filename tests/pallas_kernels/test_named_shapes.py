"""The small named shapes of every operation, forward and backward, through its interpreted kernels."""

import jax
import numpy as np
import pytest

from recscale.pallas_kernels.cases import OPERATIONS, cases, kernels

# What takes the interpreter less than a second or two; everything else is slow.
QUICK = {"per_token_ffn": ("tiny",), "w8a16_matmul": ("tiny", "ragged"), "sparse_gather": ("gather-tiny",)}

# A Hopper kernel is interpreted block by block: those of the other operations take minutes at these shapes.
ON_HOPPER = ("grouped_matmul", "product_key_topk")


def named_shapes():
    for operation in OPERATIONS:
        for name in (*kernels(operation, "tpu"), *kernels(operation, "gpu")):
            if name == "pallas_tpu_sc" or (name == "pallas_gpu" and operation not in ON_HOPPER):
                continue  # a SparseCore kernel cannot be interpreted
            for case in cases(operation):
                quick = name == "pallas_tpu" and {case.name, case.group} & {*QUICK.get(operation, ())}
                if case.group != "bench":
                    marks = () if quick else pytest.mark.slow
                    yield pytest.param(case, name, id=f"{operation}-{case.name}-{name}", marks=marks)


@pytest.mark.parametrize("case, name", list(named_shapes()))
def test_a_kernel_equals_the_reference(case, name):
    arrays = case.inputs(jax.random.key(0))
    found = jax.jit(lambda *a: case.call(*a, implementation=name, interpret=True))(*arrays)
    expected = jax.jit(lambda *a: case.call(*a, implementation="reference"))(*arrays)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        np.testing.assert_allclose(one, other, rtol=0, atol=case.rtol * np.abs(other).max() + case.atol)
