"""Notebooks say what they said when they were committed, whatever other tests compiled before."""

import pytest

from recscale.scaling.laws.fitting import solver


@pytest.fixture(autouse=True, scope="module")
def _compiled_as_by_a_user():
    """Other tests of this process may have left programs of the fitter without optimisations."""
    solver._program.cache_clear()
