"""Settings of all kernel tests: most of their time is compiling interpreted kernels that run once."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
