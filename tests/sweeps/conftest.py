"""What the tests of sweeps share: plans are counted, not built; commands are called as from a shell."""

import pytest

from recscale.scaling.cli import main
from recscale.sweeps.engine import plan


@pytest.fixture(autouse=True)
def _shapes_are_not_traced(request, monkeypatch):
    """Planning traces every shape of a sweep; the slow stage does it, and the fast one tries every flag of a model."""
    if request.path.parent.name != "engine" and not request.node.get_closest_marker("slow"):
        monkeypatch.setattr(plan, "check_shape", lambda config, source: None)


@pytest.fixture
def call(capsys):
    """Runs `recscale COMMAND ARGUMENTS`, checks its exit code, and returns (standard output, standard error)."""

    def run(*arguments, code=0):
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert left.value.code == code, printed
        return printed

    return run
