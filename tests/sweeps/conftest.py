"""What the tests of sweeps share: plans are counted, not built."""

import pytest

from recscale.sweeps.engine import plan


@pytest.fixture(autouse=True)
def _shapes_are_not_traced(request, monkeypatch):
    """Planning traces every shape of a sweep; the slow stage does it, and the fast one tries every flag of a model."""
    if request.path.parent.name != "engine" and not request.node.get_closest_marker("slow"):
        monkeypatch.setattr(plan, "check_shape", lambda config, source: None)
