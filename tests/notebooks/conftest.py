"""Committed figures say what the fitter finds; at the end of an open interval that depends on the compilation."""

import jax
import pytest

from recscale.scaling.laws.fitting import solver


@pytest.fixture(autouse=True, scope="module")
def _compiled_as_by_a_user():
    jax.config.update("jax_disable_most_optimizations", False)
    solver._program.cache_clear()  # other tests of this process may have left programs without optimisations
    yield
    jax.config.update("jax_disable_most_optimizations", True)
