"""Committed figures say what the fitter finds; what is found at an open interval's end depends on how it was compiled."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def _compiled_as_by_a_user():
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
