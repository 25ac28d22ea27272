"""The acceptance experiment end to end, on a sixteenth of its rows."""

import json

import pytest

from recscale.scaling.acceptance import known_truth, networks
from recscale.scaling.bench.figures import figure_lines


@pytest.mark.slow
def test_quick_acceptance_passes_and_fills_a_page():
    lines: list[str] = []
    result = known_truth.accept_known_truth(quick=True, with_networks=False, show=lines.append)
    json.dumps(result)
    assert result["passed"]
    assert result["networks"] is None
    assert set(result["seconds"]) == {"generator", "plateaus", "data_axis", "fitter"}
    assert 20 < len(lines) < 70
    assert max(len(line) for line in lines) < 110
    levels = result["plateaus"]["level"]
    assert levels == sorted(levels, reverse=True)
    assert result["fitter"]["selected"] in ("kappa", "kaplan_offset")
    assert result["fitter"]["four_axes"]["sum"]["dense_params"] > 0.5


def test_plateaus_of_the_quickstart_world():
    """What lacks the pairs lacks 90 % of the variance; an oracle of both orders would lack nothing."""
    levels = networks.plateaus(rows=4096)
    assert list(levels) == [0, 1]
    assert levels[0] > levels[1] > 0.8 * levels[0]


@pytest.mark.slow
def test_networks_are_reported_with_their_refusals():
    part = networks.measure_networks(shrink=8, architectures=["dlrm_mlp"], sizes=[2e3, 8e3], draws=20)
    json.dumps(part)
    own = part["architectures"]["dlrm_mlp"]
    assert [row["not_done"] for row in own["sizes"]] == [0, 0]
    assert all(0 < row["excess"] < 1.2 * part["plateaus"][0] for row in own["sizes"])
    assert own["law"]["params"]["E"] is None and "span" in own["law"]["refused"]["E"]
    text = "\n".join(figure_lines(part))
    assert "dlrm_mlp.law" in text and "span:" in text and "recovered_N2" in text and "plateau.smallest" in text
