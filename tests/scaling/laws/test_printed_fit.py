"""A fit and its held-out scores that were laid out by hand, as `recscale fit` prints them and as plain data."""

import io
from dataclasses import replace

import numpy as np
import pandas as pd
from rich.console import Console

from recscale.scaling.laws import fit_command
from recscale.scaling.laws.fitting.law_fit import LawFit, Settings, with_numbers
from recscale.scaling.laws.fitting.problem import make_problem
from recscale.scaling.laws.fitting.solver import Batch, Solution
from recscale.scaling.laws.forms.registry import get
from recscale.scaling.laws.judgement.gates import Gate
from recscale.scaling.laws.judgement.rolling import Rolling
from recscale.scaling.laws.tables.validate import prepare
from recscale.scaling.laws.uncertainty.profile import Profile

X = np.geomspace(1e3, 1e6, 9)
PHI = np.log([0.4, 0.1, 0.3])


def law_of(bad=0, **changes):
    """y = .4 + .1 e^(-.3 u), three clusters of three rows, and `bad` rows that were left out."""
    y = 0.4 + 0.1 * (X / np.exp(np.log(X).mean())) ** -0.3
    frame = pd.DataFrame({"p": X, "logloss": y, "run_id": [f"r{i}" for i in range(9)], "shape_id": list("aaabbbccc")})
    more = pd.DataFrame({"p": np.arange(1.0, 1.0 + bad), "logloss": -1.0, "run_id": [f"bad{i}" for i in range(bad)]})
    rows = prepare(pd.concat([frame, more], ignore_index=True), get("power_offset"), {"x": "p"}, "logloss",
                   invalid="exclude")  # fmt: skip
    centre = {"x": float(np.log(X).mean())}
    problem = make_problem(get("power_offset"), (np.log(X) - centre["x"])[:, None], rows.y)
    none = np.zeros(1)
    solution = Solution(PHI, 0.5, 7, 1e-9, 0.75, Batch(PHI[None], none, none.astype(int), none))
    ends = {"E": (0.39, 0.41), "A": (0.09, 0.11), "alpha": (0.25, 0.35)}
    curves = {name: Profile(name, none, none, 4.0, pair, 1.0) for name, pair in ends.items()}
    law = LawFit(get("power_offset"), rows, Settings(), (), ("noted",), problem, solution, centre, profiles=curves)
    return with_numbers(replace(law, **changes))


def printed(law, monkeypatch, rolling=None):
    console = Console(width=220, record=True, file=io.StringIO())
    monkeypatch.setattr(fit_command, "Console", lambda: console)
    fit_command._print(law, rolling)
    return [" ".join(line.split()) for line in console.export_text().splitlines() if line.strip()]


def test_a_fit_is_printed_with_its_numbers(monkeypatch):
    law = law_of(bad=12, jackknife={"most_influential": "b"})
    lines = printed(law, monkeypatch)
    raw = 0.1 * np.exp(0.3 * np.log(X).mean())
    for line in (
        "power_offset on logloss: E = 0.4, alpha = 0.3; fitted over p 1e+03 to 1e+06",
        "y = E + A x^-alpha",
        f"fitted to {law.rows.described}; 3 clusters by shape_id, 12 rows excluded",
        "excluded bad0: logloss is -1, not positive",
        "excluded bad9: logloss is -1, not positive",
        "and 2 more (all are in the record)",
        "E 0.4 0.39 to 0.41 0.4 target",
        f"A 0.1 0.09 to 0.11 {raw:.5g} target * x^alpha",
        "alpha 0.3 0.25 to 0.35 0.3 1",
        "75% of the starts reached the optimum; leaving out b moves the fit most",
        "note: noted",
    ):
        assert line in lines, (line, lines)
    assert not any("bad10" in line or "upper bound" in line or "refused" in line for line in lines)
    few = printed(law_of(bad=10), monkeypatch)
    assert not any("more" in line for line in few) and "75% of the starts reached the optimum" in few


def test_refused_numbers_are_printed_as_reasons(monkeypatch):
    gates = (Gate("floor", 1, "", False, "near 0", "see below", ("E",)),
             Gate("belongs", 1, "", False, "of E", "so", ("alpha", "A")))  # fmt: skip
    lines = printed(law_of(gates=gates), monkeypatch)
    assert "E refused: floor: near 0" in lines and "95% upper bound of E: 0.41" in lines
    assert "alpha refused: belongs: of E 0.25 to 0.35, whatever E is" in lines
    assert "A refused: belongs: of E" in lines and "refused by floor: near 0; see below" in lines
    nothing = printed(law_of(gates=(Gate("dof", 1, "", False, "few", "more", ("*",)),)), monkeypatch)
    assert "refused by dof: few; more" in nothing and not any(
        "parameter" in line or "starts" in line for line in nothing
    )
    given = printed(law_of(settings=Settings(bounds={"alpha": (0, 2)})), monkeypatch)
    assert "alpha given: between 0 and 2" in given


def test_held_out_scores_are_printed_by_form(monkeypatch):
    scores = pd.DataFrame(
        [("power", 1.0, 9, 4, 0.125, 0.05), ("power", 2.0, 9, 4, 0.25, -0.01), ("last_value", 1.0, 9, 4, 0.5, 0.1),
         ("last_value", 2.0, 9, 4, 0.5, 0.1)], columns=["form", "cut", "train", "test", "rms", "bias"],
    )  # fmt: skip
    points = pd.DataFrame({"form": "power", "ratio_bin": "<=3x", "actual": [0.0, 2.0, 0.0, 0.0], "error": 0.0})
    points = points.assign(
        **{f"{end}_{level}": sign for end, sign in (("low", -1.0), ("high", 1.0)) for level in (50, 80, 95)}
    )
    rolling = Rolling("p", (1.0, 2.0), scores, points, {}, {"m4": "too few"})
    lines = printed(law_of(), monkeypatch, rolling)
    for line in (
        "Held-out error of ln y, cuts along p",
        "power 0.188 0.25 +0.02 2 1.00",
        "last_value 0.5 0.5 +0.1 2 0.00",
        "coverage of power at <=3x: 0.75 of .95 (4 points)",
        "m4 not ranked: too few",
    ):
        assert line in lines, (line, lines)


def test_a_fit_is_summed_up_as_plain_data():
    told = fit_command.summary(law_of(bad=1))
    assert (told["form"], told["target"], told["rows"], told["clusters"]) == ("power_offset", "logloss", 9, 3)
    assert told["excluded"] == [{"row": 9, "run_id": "bad0", "reason": "logloss is -1, not positive"}]
    assert (told["objective"], told["convergence_share"], told["warnings"]) == (0.5, 0.75, ["noted"])
    assert told["axes"] == {"x": "p"} and told["refusals"] == [] and told["intervals"]["E"] == (0.39, 0.41)
    bare = fit_command.summary(law_of(solution=None))
    assert bare["objective"] is None and bare["convergence_share"] is None
