"""What a fit makes of its solution: which rules are asked, what they are asked about, and what is resampled."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from recscale.scaling.laws.fitting import fit as fitting
from recscale.scaling.laws.fitting.law_fit import Settings
from recscale.scaling.laws.fitting.problem import make_problem
from recscale.scaling.laws.fitting.solver import Batch, Solution
from recscale.scaling.laws.forms.registry import get
from recscale.scaling.laws.judgement.gates import Gate
from recscale.scaling.laws.tables.validate import prepare
from recscale.scaling.laws.uncertainty.profile import Profile

U = np.linspace(-3, 3, 9)
PHI = np.log([0.4, 0.1, 0.3])
ENDS = {"E": (0.35, 0.41), "A": (0.09, 0.11), "alpha": (0.2, 0.4)}
NONE = np.zeros(0)


def solution_at(phi=PHI, share=0.75):
    phi = np.asarray(phi, float)
    return Solution(phi, 0.5, 7, 1e-9, share, Batch(phi[None], np.zeros(1), np.zeros(1, int), np.zeros(1)))


def curves_of(ends=None):
    return {name: Profile(name, NONE, NONE, 4.0, pair, 1.0) for name, pair in (ends or ENDS).items()}


@pytest.fixture
def weighed(monkeypatch):
    """Diagnostics that note what they are asked and find nothing wrong."""
    asked = []
    told = fitting.diagnostics
    monkeypatch.setattr(told, "rivals", lambda squares: {"a line": (0.1, 2), "a step": (0.2, 3)})
    monkeypatch.setattr(told, "beaten", lambda squares, rival: 10 * rival[0])
    monkeypatch.setattr(told, "lack_of_fit", lambda squares, at: asked.append(at) or (0.001, 0.5))
    return asked


def ids(found):
    return [(gate.id, gate.passed) for gate in found]


def test_a_least_squares_fit_is_judged_by_its_rivals_and_widths(weighed):
    form = get("power_offset")
    squares = SimpleNamespace(problem=SimpleNamespace(axes=U[:, None]))
    found = fitting._judged(form, solution_at(), curves_of(), squares)
    rules = [("form", True), ("form", True), ("form", False), ("interval", True), ("width", True)]
    assert ids(found) == [*rules, ("interval", True), ("interval", True), ("width", True)] and weighed == [0]
    least = 0.1 * np.exp(-0.9)
    assert found[4].value == pytest.approx(0.06 / 2 / least)  # of a floor, in smallest excesses above it
    assert found[7].value == pytest.approx(0.2 / 2 / 0.3)  # of an exponent, in its own value
    lost = fitting._judged(form, solution_at(), {}, squares)
    assert ids(lost)[3:] == [("interval", False)] and lost[3].refuses == form.names
    outside = fitting._judged(form, solution_at(np.log([0.5, 0.1, 0.3])), curves_of(), squares)
    assert [gate.refuses for gate in outside if gate.id == "interval" and not gate.passed] == [("E",)]


def test_forms_without_exponents_or_comparison_have_fewer_rules(weighed):
    squares = SimpleNamespace(problem=SimpleNamespace(axes=np.column_stack([U, U])))
    gain = fitting._judged(get("gain"), solution_at([0.0, 0.0]), curves_of({"c": (0.5, 2), "gamma": (0.5, 2)}), squares)
    assert ids(gain) == [("interval", True)] * 2
    line = fitting._judged(get("log_linear"), solution_at([0.5, 0.1]), curves_of({"a": (0, 1), "b": (0, 1)}), squares)
    assert ids(line) == [("interval", True)] * 2 and weighed == []
    broken = get("bnsl")
    wide = {name: (-1e9, 1e9) for name in broken.names}
    told = fitting._judged(broken, solution_at(np.zeros(6)), curves_of(wide), squares)
    assert [gate.id for gate in told].count("width") == 1  # real exponents have no width of their own
    weighed.clear()
    two = get("chinchilla")
    fitting._judged(two, solution_at(np.zeros(5)), curves_of({name: (0.5, 2) for name in two.names}), squares)
    assert weighed == [0, 1]


def rows_of(clusters=9, seeds=False, count=9):
    frame = pd.DataFrame(
        {"p": np.exp(5 + U), "loss": 0.4 + 0.1 * np.exp(-0.3 * U), "shape_id": np.arange(9) % clusters}
    )
    if seeds:
        frame = pd.concat([frame.assign(seed=0), frame.assign(seed=1, loss=frame.loss * (1 + 0.01 * U**2))])
    return prepare(frame, get("power_offset"), {"x": "p"}, "loss")


@pytest.fixture
def assembled(monkeypatch):
    """`_assemble` of a solved problem; profiles, evidence and refits are laid out, and what they were given is kept."""
    seen = {}
    evidence = {"ratio": 3.0, "held_out_ratio": 1.0}
    bare = SimpleNamespace(phi=np.log([0.5, 0.1]), objective=0.9)
    refits = fitting.resampling
    monkeypatch.setattr(
        fitting, "profiles", lambda p, s, names, groups: seen.update(names=names, groups=groups) or (curves_of(), None)
    )
    monkeypatch.setattr(fitting.diagnostics, "floor_evidence", lambda p, s: (evidence, bare))
    monkeypatch.setattr(
        refits,
        "bootstrap",
        lambda p, s, codes, count, seed: seen.update(bootstrap=(count, seed)) or np.tile(PHI, (count, 1)),
    )
    monkeypatch.setattr(
        refits,
        "seed_bootstrap",
        lambda p, s, noise, count, seed: seen.update(seeds=(count, seed)) or np.tile(PHI, (count, 1)),
    )
    monkeypatch.setattr(
        refits,
        "jackknife",
        lambda p, s, codes: np.tile(PHI, (int(codes.max()) + 1, 1)) + 0.01 * np.arange(int(codes.max()) + 1)[:, None],
    )

    def assemble(rows, before=(), share=0.75, form="power_offset", phi=PHI, **settings):
        problem = make_problem(get(form), np.tile(U, len(rows.y) // 9)[:, None], rows.y)
        chosen = Settings(**{"bootstrap": 5, "seed": 2, **settings})
        return fitting._assemble(get(form), rows, chosen, list(before), problem, {"x": 5.0}, solution_at(phi, share))

    return seen, assemble


def test_a_fit_is_assembled_from_its_parts(assembled):
    seen, assemble = assembled
    law = assemble(rows_of())
    assert seen["names"] == ("E", "A", "alpha") and [group.clusters for group in seen["groups"]] == [True]
    assert {gate.id: gate.passed for gate in law.gates} == {"convergence": True, "bound": True, "floor": True}
    assert law.params == pytest.approx({"E": 0.4, "A": 0.1 * np.exp(1.5), "alpha": 0.3}) and law.granted
    assert law.no_floor == pytest.approx({"A": 0.5 * np.exp(0.5), "alpha": 0.1, "objective": 0.9})
    assert seen["bootstrap"] == (5, 2) and law.draws.shape == (5, 3) and law.seed_draws is None
    assert law.warnings[-1] == "seed noise unknown" and law.jackknife["most_influential"] == "8"
    assert law.slopes == pytest.approx({"x": np.polyfit(U, rows_of().y, 1)[0]}) and law.centre == {"x": 5.0}
    assert law.intervals["alpha"] == (0.2, 0.4) and law.spread is None
    none = assemble(rows_of(), bootstrap=0)
    assert none.draws is None and none.jackknife == {} and none.seed_draws is None
    bare = assemble(rows_of(), profile=False)
    assert bare.profiles == {} and bare.intervals["alpha"] is None


def test_few_clusters_and_repeated_seeds_decide_what_is_resampled(assembled):
    seen, assemble = assembled
    assert assemble(rows_of(5)).draws is None and assemble(rows_of(6)).draws is not None
    noisy = assemble(rows_of(seeds=True))
    assert noisy.seed_noise is not None and noisy.seed_draws.shape == (5, 3) and seen["seeds"] == (5, 4)
    assert "seed noise unknown" not in noisy.warnings
    assert assemble(rows_of(seeds=True), bootstrap=0).seed_draws is None


def test_what_is_refused_takes_along_what_belongs_to_it(assembled, monkeypatch):
    _, assemble = assembled
    accident = assemble(rows_of(), share=0.1)
    assert accident.refused and accident.reason("E").startswith("convergence")
    bound = assemble(rows_of(), phi=np.log([0.4, 0.1, 19.9]))
    assert bound.params["E"] == pytest.approx(0.4) and bound.params["alpha"] is None and bound.params["A"] is None
    assert bound.reason("A") == "belongs: A belongs to alpha, which is refused"
    # A short axis names what rests on it itself; nothing else goes along.
    for rule, kept in (("span", True), ("trend", True), ("other", False)):
        law = assemble(rows_of(), [Gate(rule, 1, "", False, "short", refuses=("E",))])
        assert (law.params["alpha"] is not None) is kept
    reaches = {"E": (0.0, 0.41), "A": (0.09, 0.11), "alpha": (0.2, 0.4)}
    monkeypatch.setattr(fitting, "profiles", lambda *_: (curves_of(reaches), None))
    floorless = assemble(rows_of())
    assert floorless.params == {"E": None, "A": None, "alpha": None} and floorless.ranges == {"alpha": (0.2, 0.4)}
