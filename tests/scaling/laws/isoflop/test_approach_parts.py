"""The parts of the three approaches by hand: the envelope of parabolas, groups, and what follows for b."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from recscale.scaling.laws.isoflop import approaches as parts
from recscale.scaling.laws.isoflop.frontier import AllocationLaw, Isoflop, IsoflopGroup

SIZES = np.arange(6.0)  # ln N
AT = np.linspace(0, 12, 49)  # ln C


def envelope(slope=0.5):
    """Losses of which the best size at ln C is the one nearest to slope ln C - 1/2."""
    return (SIZES[:, None] - (slope * AT - 0.5)) ** 2


def test_the_envelope_is_a_line_through_sizes_that_lie_between_others():
    losses = envelope()
    slope, used, decades = parts._slope_of_envelope(SIZES, losses, AT)
    best = losses.argmin(axis=0)
    inside = (best > 0) & (best < 5)
    assert used == inside.sum() and decades == pytest.approx(np.ptp(AT[inside]) / np.log(10))
    assert slope == pytest.approx(np.polyfit(AT[inside], SIZES[best[inside]], 1)[0])
    # Where the neighbours were not run, the best size lies at an edge of what was.
    known = losses.copy()
    known[4:, AT < 6.5] = np.nan
    known[0, AT > 8.2] = np.nan
    told = parts._slope_of_envelope(SIZES, known, AT)
    order = np.where(np.isnan(known), np.inf, known).argmin(axis=0)
    low, high = np.isfinite(known).argmax(axis=0), 5 - np.isfinite(known)[::-1].argmax(axis=0)
    inside = (order > low) & (order < high)
    assert told[1] == inside.sum() and told[0] == pytest.approx(np.polyfit(AT[inside], SIZES[order[inside]], 1)[0])
    three = np.where(np.abs(SIZES[:, None] - np.clip(best, 1, 4)) <= 1, losses, np.nan)
    assert parts._slope_of_envelope(SIZES, three, AT)[:2] == (pytest.approx(slope), used)
    # Three sizes at a budget, three best ones, and a decade of budgets are needed.
    two = np.where((SIZES == 2)[:, None] | (SIZES == 3)[:, None], losses, np.nan)
    assert parts._slope_of_envelope(SIZES, two, AT) == (None, 0, 0.0)
    assert parts._slope_of_envelope(SIZES[:4], losses[:4], AT)[0] is None  # two lie inside
    for reach, enough in ((2.5, True), (2.25, False)):
        part = np.abs(AT - 6) <= reach / 2
        wide = (SIZES[:, None] - (1.0 * AT - 3.5)) ** 2
        slope, _, decades = parts._slope_of_envelope(SIZES, np.where(part, wide, np.nan), AT)
        assert (slope is not None) is enough and (decades >= 1) is enough


def curves(sizes=SIZES):
    """Each size at 25 budgets: ln loss is a parabola in ln N around half of ln C."""
    rows = [
        {"N": np.exp(s), "C": np.exp(c), "loss": np.exp(0.01 * (s - c / 2 + 0.5) ** 2 - 1)}
        for s in sizes
        for c in np.linspace(0, 12, 25)
    ]
    return pd.DataFrame(rows)


def test_the_envelope_has_an_interval_from_resampled_sizes():
    found = parts._envelope(curves(np.linspace(0, 5, 16)), "N", "C", "loss", 200, 0)
    assert found.a == pytest.approx(0.5, abs=0.03) and found.b is None and found.refused == ""
    assert found.interval[0] <= found.a <= found.interval[1] and found.rests_on.startswith("16 sizes")
    assert 0 < found.interval[1] - found.interval[0] < 0.2
    assert parts._envelope(curves(), "N", "C", "loss", 200, 0).interval is None  # most resamples have too few sizes
    assert parts._envelope(curves(), "N", "C", "loss", 0, 0).interval is None
    twice = pd.concat([curves(), curves()])  # repeated runs are averaged
    once = parts._envelope(curves(), "N", "C", "loss", 0, 0)
    assert parts._envelope(twice, "N", "C", "loss", 0, 0).a == pytest.approx(once.a)
    four = parts._envelope(curves(SIZES[:4]), "N", "C", "loss", 0, 0)
    assert four.a is None and four.refused.startswith("4 sizes were run at several budgets, fewer than 5")
    single = curves()
    alone = pd.concat([single[single.N < 50], single[single.N > 50].iloc[:1]])  # four sizes, and one at one budget
    assert parts._envelope(alone, "N", "C", "loss", 0, 0).refused.startswith("4 sizes")
    flat = parts._envelope(curves().assign(loss=lambda t: t.N**0.1), "N", "C", "loss", 0, 0)
    assert flat.a is None and "over 0.00 decades of budgets, fewer than 1" in flat.refused


def test_approaches_by_groups_are_refused_with_their_reasons():
    group = IsoflopGroup(1e18, SIZES, SIZES, None, None, {"akima": "at the edge"})
    fine = IsoflopGroup(1e19, SIZES, SIZES, None, None, {})
    law = AllocationLaw(0.48, 1.0, 0.01, "seed noise", (0.46, 0.5), 1)
    good = Isoflop([group, fine], law, law, True, [], [], {})
    told = parts._from_groups(good, "Akima", law)
    assert (told.a, told.interval, told.rests_on, told.name) == (
        0.48,
        (0.46, 0.5),
        "1 of 2 budgets",
        "2 isoFLOP, Akima",
    )
    bad = Isoflop([group, fine], law, law, False, ["they differ"], [], {})
    assert parts._from_groups(bad, "Akima", law).refused == "they differ; 1e+18: at the edge"
    assert parts._from_groups(good, "parabola", None).refused == ""
    grid = parts.as_grid([told, parts.Approach("3 parametric", refused="few")], ["so"])
    assert grid.rows == [
        ("2 isoFLOP, Akima", "0.48", "0.46 to 0.5", "refused", "1 of 2 budgets"),
        ("3 parametric", "refused", "", "", "few"),
    ]  # fmt: skip


def test_b_follows_where_compute_is_proportional(monkeypatch):
    laws = []

    def fit(rows, form, axes, target, bootstrap, cluster, *, seed):
        laws.append((len(rows), form, axes, target, bootstrap, cluster, seed))
        refused = axes["N"] == "odd"
        return SimpleNamespace(
            derived={"a": None if refused else 0.6}, intervals={"a": (0.5, 0.7)}, form=SimpleNamespace(id="chinchilla"),
            reason=lambda name: "wide" if refused else "", rows=SimpleNamespace(y=rows),
        )  # fmt: skip

    monkeypatch.setattr(parts, "fit", fit)
    table = curves().assign(D=lambda t: t.C / t.N)
    options = dict(size="N", data="D", flops="C", target="loss", bootstrap=3, cluster="c", seed=5)
    found, groups, remarks = parts.approaches(table, **options)
    assert groups is None and remarks == [] and [f.name for f in found] == ["1 envelope", "2 isoFLOP", "3 parametric"]
    assert (found[2].a, found[2].b, found[2].interval) == (0.6, pytest.approx(0.4), (0.5, 0.7))
    assert found[2].rests_on == f"{len(table)} rows, chinchilla" and found[1].b is None
    assert laws == [(len(table), "chinchilla", {"N": "N", "D": "D"}, "loss", 3, "c", 5)]
    assert "no column 'flops_target'" in found[1].refused
    for factor, told in ((1.09, False), (1.11, True)):
        uneven = table.assign(D=np.where(table.index == 0, table.D * factor, table.D))
        found, _, remarks = parts.approaches(uneven, **options)
        assert bool(remarks) is told and (found[2].b is None) is told
    assert f"varies by x{1.11:.2f}" in remarks[0]
    refused, _, _ = parts.approaches(table.rename(columns={"N": "odd"}), **{**options, "size": "odd"})
    assert refused[2].a is None and refused[2].refused == "wide"
    gap = parts.approaches(table.assign(flops_target=np.nan), **options)
    assert gap[1] is None
