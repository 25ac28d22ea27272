"""The acceptance experiment end to end, on a sixteenth of its rows."""

import json

import pytest

from recscale.scaling.bench import known_truth


@pytest.mark.slow
def test_quick_acceptance_passes_and_fills_a_page():
    lines: list[str] = []
    result = known_truth.run(quick=True, networks=lambda: {"sizes": 3}, show=lines.append)
    json.dumps(result)
    assert result["passed"]
    assert result["networks"] == {"sizes": 3}
    assert set(result["seconds"]) == {"generator", "plateaus", "data_axis", "fitter"}
    assert 20 < len(lines) < 60
    assert max(len(line) for line in lines) < 110
    levels = result["plateaus"]["level"]
    assert levels == sorted(levels, reverse=True)
    assert result["fitter"]["selected"] in ("kappa", "kaplan_offset")
    assert result["fitter"]["four_axes"]["sum"]["dense_params"] > 0.5
