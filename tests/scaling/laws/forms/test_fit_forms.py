"""Every registered form: noise-free recovery from its own starts, metadata, optima, invariances."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import qmc

from recscale.scaling.laws import fit, forms, optimum
from recscale.scaling.laws.forms import Form
from recscale.scaling.laws.forms.metric_maps import t_to_auc


def grid(*axes):
    return [values.ravel() for values in np.meshgrid(*axes, indexing="ij")]


ONE = [np.geomspace(1e4, 1e8, 9)]
TWO = grid(np.geomspace(1e4, 1e7, 8), np.geomspace(1e5, 1e9, 8))
UNIQUE = grid(np.geomspace(1e4, 1e7, 6), np.geomspace(1e5, 1e8, 5), np.array([1.0, 2.0, 4.0, 8.0, 16.0]))
FINE = grid(np.geomspace(1e6, 1e9, 6), np.geomspace(1e8, 1e11, 6), np.geomspace(1.0, 32.0, 6))
SPARSE = grid(np.geomspace(1e6, 1e9, 6), np.geomspace(1e8, 1e11, 6), np.geomspace(0.03, 1.0, 6))
EXPERTS = grid(np.geomspace(1e6, 1e9, 8), np.geomspace(1.0, 64.0, 8))
FIVE_NAMES = ("dense_params", "train_flops", "examples", "history_length", "memory_slots")
FIVE = list(10 ** (3 + 4 * qmc.Sobol(5, scramble=True, rng=1).random_base2(7)).T)
FOUR_NAMES = ("N", "D", "history_length", "memory_slots")
KAPPA = {"E": 0.42, "A": 3.0, "alpha": 0.35, "B": 8.0, "beta": 0.28, "kappa": 3.0}
CHINCHILLA = {name: KAPPA[name] for name in ("E", "A", "alpha", "B", "beta")}
FIVE_TRUTH = {"E": 0.42} | {
    f"{kind}_{name}": value
    for name, a, alpha in zip(FIVE_NAMES, (0.5, 0.2, 0.8, 0.6, 2.0), (0.35, 0.2, 0.26, 0.3, 0.4), strict=True)
    for kind, value in (("A", a), ("alpha", alpha))
}
CASES = {
    "power": (ONE, {"A": 3.0, "alpha": 0.2}, {}),
    "power_offset": (ONE, {"E": 0.42, "A": 3.0, "alpha": 0.35}, {}),
    "log_linear": (ONE, {"a": 1.0, "b": 0.01}, {}),
    "chinchilla": (TWO, CHINCHILLA, {}),
    "chinchilla_tied": (TWO, {"E": 0.42, "A": 3.0, "alpha": 0.35, "B": 8.0}, {}),
    "kaplan": (TWO, {"A": 3.0, "alpha": 0.076, "B": 8.0, "beta": 0.1}, {}),
    "kaplan_offset": (TWO, CHINCHILLA, {}),
    "kappa": (TWO, KAPPA, {}),
    "kappa_tied": (TWO, {"E": 0.42, "A": 3.0, "alpha": 0.35, "B": 20.0, "kappa": 2.0}, {}),
    "trunk": (
        grid(np.geomspace(1e4, 1e7, 8), np.geomspace(1e5, 1e9, 8), np.array([1.0, 2.0])),
        CHINCHILLA | {"C": 0.01},
        {},
    ),
    "gamma": (TWO, {"E": 0.42, "A": 27.0, "alpha": 1.05, "B": 512.0, "beta": 0.84, "gamma": 1 / 3}, {}),
    "farseer": (
        TWO,
        {"a3": 4.0, "gamma": -0.25, "b3": -0.9, "a2": 0.02, "beta": 0.3, "b2": 2.0, "a1": 0.02, "alpha": 0.25}
        | {"b1": -1.5},
        {},
    ),
    "sum": (FIVE, FIVE_TRUTH, {"axes": {name: name for name in FIVE_NAMES}}),
    "kappa_sum": (
        [FIVE[0], FIVE[2], FIVE[3], FIVE[4]],
        KAPPA
        | {
            "A_history_length": 0.6,
            "alpha_history_length": 0.3,
            "A_memory_slots": 2.0,
            "alpha_memory_slots": 0.4,
        },
        {"axes": {name: name for name in FOUR_NAMES}},
    ),
    "m4": ([np.geomspace(1e3, 1e9, 24)], {"E": 0.3, "E0": 0.7, "a": 1.3, "A": 200.0, "c": 0.5}, {}),
    "bnsl": (
        [np.geomspace(1e2, 1e9, 32)],
        {"a": 0.4, "b": 2.0, "c0": 0.1, "c1": 0.4, "d1": 1e5, "f1": 0.5},
        {},
    ),
    "repeated_data": (UNIQUE, CHINCHILLA | {"R_star": 5.0}, {}),
    "moe_granularity": (
        FINE,
        {"c": 0.47, "g": 2.1, "gamma": 0.58, "a": 18.1, "alpha": 0.115, "b": 30.8, "beta": 0.147},
        {},
    ),
    "moe_unified": (EXPERTS, {"a": -0.08, "b": -0.1, "c": 0.005, "d": 2.0}, {}),
    "moe_sparsity": (
        SPARSE,
        {
            "e": 0.42,
            "a": 30.0,
            "alpha": 0.5,
            "b": 30.0,
            "beta": 0.4,
            "c": 0.02,
            "lambda": 0.5,
            "d": 1.0,
            "delta": 0.8,
            "gamma": 0.25,
        },
        {},
    ),
    "auc": (ONE, {"S": 1.1, "A": 3.0, "alpha": 0.35}, {}),
    "joint": (ONE, {"E": 0.42, "v": 0.15, "S": 1.1, "A": 3.0, "alpha": 0.35}, {}),
    "gain": (ONE, {"c": 0.01, "gamma": 0.2}, {}),
}
MIN_SHARE = {"bnsl": 0.2, "farseer": 0.8}
# Forms whose parameters at the centre 1 are not the raw ones: the law as it is printed.
PRINTED = {
    "gamma": lambda p, n, d: p["E"] + (p["A"] * n ** -p["alpha"] + p["B"] * d ** -p["beta"]) ** p["gamma"],
    "farseer": lambda p, n, d: (
        np.exp(p["a3"] * n ** p["gamma"] + p["b3"])
        + np.exp(p["a2"] * n ** p["beta"] + p["b2"]) * d ** -np.exp(p["a1"] * n ** p["alpha"] + p["b1"])
    ),
}


def raw_value(form: Form, truth: dict, axes: list[np.ndarray], stream: float | None = None) -> np.ndarray:
    """The law itself at raw axes: centring at 1, so raw and centred parameters coincide."""
    columns = [np.log(x) if slot.transform == "log" else x for slot, x in zip(form.slots, axes, strict=True)]
    if stream is not None:
        columns.append(np.full(len(axes[0]), stream))
    return form.value(
        form.to_search({name: np.array(value) for name, value in truth.items()}), np.stack(columns, axis=1)
    )


def made_table(name: str) -> tuple[pd.DataFrame, Form, dict]:
    axes, truth, options = CASES[name]
    form = forms.get(name, tuple(options["axes"]) if "axes" in options else None)
    frame = pd.DataFrame({slot.name: x for slot, x in zip(form.slots, axes, strict=True)})
    if form.streams:
        frame["logloss"], frame["auc"] = (
            raw_value(form, truth, axes, 0.0),
            t_to_auc(raw_value(form, truth, axes, 1.0)),
        )
    elif form.target == "auc":
        frame["auc"] = t_to_auc(raw_value(form, truth, axes))
    else:
        frame["logloss"] = PRINTED[name](truth, *axes) if name in PRINTED else raw_value(form, truth, axes)
    return frame, form, truth


def test_every_registered_form_has_a_recovery_case():
    assert set(CASES) == set(forms.names())


@pytest.mark.parametrize("name", list(CASES))
def test_noise_free_data_return_the_parameters(name):
    frame, form, truth = made_table(name)
    law = fit(frame, name, {slot: slot for slot in form.axes}, bootstrap=0, profile=False)
    assert law.solution is not None, [gate.reason for gate in law.refusals]
    assert law.solution.convergence_share >= MIN_SHARE.get(name, 0.9)
    found = law.solution_params()
    for key, value in truth.items():
        assert found[key] == pytest.approx(value, rel=1e-6), key
    predicted = law.predict({slot: frame[slot] for slot in form.axes})
    target = frame["auc"] if form.target == "auc" else frame["logloss"]
    np.testing.assert_allclose(predicted, target, rtol=1e-8)


@pytest.mark.slow
def test_two_breaks_are_recovered_up_to_their_order():
    truth = {"a": 0.4, "b": 2.0, "c0": 0.1, "c1": 0.4, "d1": 1e4, "f1": 0.3, "c2": -0.3, "d2": 1e7, "f2": 0.3}
    x = np.geomspace(1e2, 1e9, 64)
    form = forms.get("bnsl", breaks=2)
    law = fit(
        pd.DataFrame({"x": x, "logloss": raw_value(form, truth, [x])}),
        "bnsl",
        {"x": "x"},
        bootstrap=0,
        breaks=2,
    )
    found = law.solution_params()
    assert sorted([found["d1"], found["d2"]]) == pytest.approx([1e4, 1e7], rel=1e-6)
    assert found["a"] == pytest.approx(0.4, rel=1e-6)


@pytest.mark.parametrize("base", ["kappa", "kappa_tied", "kaplan_offset"])
@pytest.mark.slow
def test_repeated_data_on_other_bases(base):
    truth = {"E": 0.42, "A": 3.0, "alpha": 0.35, "B": 8.0, "beta": 0.28, "kappa": 3.0, "R_star": 5.0}
    form = forms.get("repeated_data", base=base)
    truth = {name: truth[name] for name in form.names}
    frame = pd.DataFrame(dict(zip(form.axes, UNIQUE, strict=True)))
    frame["logloss"] = raw_value(form, truth, UNIQUE)
    law = fit(frame, "repeated_data", {s: s for s in form.axes}, bootstrap=0, base=base, profile=False)
    assert law.solution_params() == pytest.approx(truth, rel=1e-6)


def test_aliases_and_readable_ids_are_the_same_form():
    for alias, name in (
        ("P0", "power"),
        ("P1", "power_offset"),
        ("LL", "log_linear"),
        ("C", "chinchilla"),
        ("C=", "chinchilla_tied"),
        ("K", "kaplan"),
        ("K+E", "kaplan_offset"),
        ("kappa=", "kappa_tied"),
        ("SUM", "sum"),
        ("KSUM", "kappa_sum"),
        ("M4", "m4"),
        ("BNSL", "bnsl"),
        ("RC", "repeated_data"),
        ("AUC", "auc"),
        ("JOINT", "joint"),
        ("GAIN", "gain"),
        ("MOE-S", "moe_sparsity"),
    ):
        assert forms.get(alias) is forms.get(name)
    with pytest.raises(ValueError, match="did you mean .chinchilla"):
        forms.get("chinchila")


@pytest.mark.parametrize("name", list(CASES))
def test_description_names_units_ranges_and_validity(name):
    told = forms.describe(name)
    assert told["equation"] and told["source"] and told["valid"] and told["limits"]
    assert all(p["unit"] and p["range"][0] < p["range"][1] for p in told["parameters"])
    assert told["floor"] is None or told["floor"] in [p["name"] for p in told["parameters"]]
    for rival in told["nested_in"]:
        assert rival in forms.names()


def test_nested_forms_coincide_where_they_should():
    log_axes = np.random.default_rng(0).normal(size=(20, 2))

    def value(name, **changes):
        form = forms.get(name)
        natural = {**KAPPA, **changes}
        return form.value(form.to_search({key: np.array(natural[key]) for key in form.names}), log_axes)

    np.testing.assert_allclose(value("kappa", kappa=1.0), value("chinchilla"), rtol=1e-14)
    np.testing.assert_allclose(value("kappa", kappa=1 / 0.28), value("kaplan_offset"), rtol=1e-14)
    np.testing.assert_allclose(value("kappa", alpha=0.3, beta=0.3), value("kappa_tied", alpha=0.3), rtol=1e-14)
    np.testing.assert_allclose(value("kaplan_offset") - 0.42, value("kaplan"), rtol=1e-12)
    bottleneck = np.maximum(3.0 * np.exp(-0.35 * log_axes[:, 0]), 8.0 * np.exp(-0.28 * log_axes[:, 1])) + 0.42
    np.testing.assert_allclose(value("kappa", kappa=500.0), bottleneck, rtol=2e-3)


def test_saturating_form_satisfies_its_own_equation_at_both_ends():
    form = forms.get("m4")
    u = np.linspace(-30, 30, 61)[:, None]
    for a in (0.05, 1.0, 8.0):
        natural = {"E": 0.3, "E0": 0.7, "a": a, "A": 2.0, "c": 0.5}
        y = form.value(form.to_search({k: np.array(v) for k, v in natural.items()}), u)
        inside = (y > 0.3 + 1e-12) & (y < 0.7 - 1e-12)
        left = np.log(y[inside] - 0.3) - a * np.log(0.7 - y[inside])
        np.testing.assert_allclose(left, np.log(2.0) - 0.5 * u[inside, 0], atol=2e-3)
        assert np.all(np.diff(y) <= 0) and 0.3 <= y.min() and y.max() <= 0.7


def noisy(sizes=8, amounts=8, noise=2e-3):
    n, d = grid(np.geomspace(5e7, 1.6e10, sizes), np.geomspace(8e8, 3e11, amounts))
    y = (1.8 + 480 * n**-0.35 + 2100 * d**-0.37) * np.exp(noise * np.random.default_rng(3).standard_normal(len(n)))
    return pd.DataFrame({"N": n, "D": d, "loss": y})


def test_row_order_axis_unit_and_metric_unit_do_not_move_exponents():
    frame, axes = noisy(), {"N": "N", "D": "D"}
    base = fit(frame, "chinchilla", axes, "loss", bootstrap=0)
    shuffled = fit(frame.sample(frac=1.0, random_state=1), "chinchilla", axes, "loss", bootstrap=0)
    rescaled = fit(frame.assign(N=frame["N"] * 1e6), "chinchilla", axes, "loss", bootstrap=0)
    in_bits = fit(frame.assign(loss=frame["loss"] / np.log(2)), "chinchilla", axes, "loss", bootstrap=0)
    for other in (shuffled, rescaled, in_bits):
        assert other.params["alpha"] == pytest.approx(base.params["alpha"], abs=1e-9)
        assert other.params["beta"] == pytest.approx(base.params["beta"], abs=1e-9)
    assert rescaled.params["E"] == pytest.approx(base.params["E"], abs=1e-8)
    assert in_bits.params["E"] * np.log(2) == pytest.approx(base.params["E"], abs=1e-8)
    assert rescaled.centred["A"] == pytest.approx(base.centred["A"], abs=1e-8)


def test_optimum_matches_the_closed_form_of_the_sum():
    law = fit(noisy(noise=0.0), "chinchilla", {"N": "N", "D": "D"}, "loss", bootstrap=0)
    e, a_, alpha, b_, beta = (law.params[name] for name in ("E", "A", "alpha", "B", "beta"))
    g = (alpha * a_ / (beta * b_)) ** (1 / (alpha + beta))
    split = beta / (alpha + beta)
    best = optimum(law, budget=6e20, cost=lambda n, d: 6 * n * d)
    assert best["N"] == pytest.approx(g * (1e20) ** split, rel=1e-5)
    assert best["N"] * best["D"] == pytest.approx(1e20, rel=1e-9)
    assert law.derived["a"] == pytest.approx(split)
    many = optimum(law, budget=[1e19, 1e20, 1e21])
    assert np.polyfit(np.log(many["budget"]), np.log(many["N"]), 1)[0] == pytest.approx(split, abs=1e-6)


def test_optimum_under_a_cost_that_is_not_a_product():
    law = fit(noisy(noise=0.0), "chinchilla", {"N": "N", "D": "D"}, "loss", bootstrap=0)

    def cost(n, d):
        return d * (2e9 + 6 * n)  # a fixed price per example besides the size

    best = optimum(law, budget=1e21, cost=cost)
    assert cost(best["N"], best["D"]) == pytest.approx(1e21, rel=1e-9)
    for factor in (0.9, 1.1):
        n = best["N"] * factor
        d = 1e21 / (2e9 + 6 * n)
        assert law.predict({"N": n, "D": d}) > best["metric"]
    with pytest.raises(ValueError, match="interior optimum"):
        optimum(law, budget=1e21, cost=lambda n, d: d + 0 * n)


def test_optimum_over_three_axes_beats_its_neighbours():
    names = ("dense_params", "examples", "history_length")
    axes = [FIVE[0], FIVE[2], FIVE[3]]
    truth = {
        "E": 0.42,
        "A_dense_params": 0.5,
        "alpha_dense_params": 0.35,
        "A_examples": 0.8,
        "alpha_examples": 0.26,
        "A_history_length": 0.6,
        "alpha_history_length": 0.3,
    }
    form = forms.get("sum", names)
    frame = pd.DataFrame(dict(zip(names, axes, strict=True))).assign(logloss=raw_value(form, truth, axes))
    law = fit(frame, "sum", bootstrap=0)
    assert law.form.axes == names
    best = optimum(law, budget=1e14)
    for slot in names:
        for other in names:
            if slot != other:
                moved = {**{n: best[n] for n in names}, slot: best[slot] * 1.2, other: best[other] / 1.2}
                assert law.predict(moved, beyond_range=True) > best["metric"]


OWN_FORM = '''
import numpy as np
from recscale.scaling.laws.forms import ONE, Family, Form, Linear, coefficient, exponent

def shifted(axes=None, shift=1.0):
    """y = A x^-alpha + shift, with a shift that is known."""
    return Form(
        "shifted", (), "y = A x^-alpha + shift", "this test", (ONE,),
        (coefficient("A", "x", "alpha"), exponent("alpha", "x")),
        Family(f"shifted {shift}", ("A", "alpha"),
               lambda theta, axes, xp: xp.exp(theta[0] - xp.exp(theta[1]) * axes[:, 0]) + shift),
        Linear(("alpha",), ("A",), lambda e, axes: [np.exp(-e["alpha"] * axes[:, 0])], (False,)),
    )

def nothing(axes=None):
    return None
'''


def test_a_form_of_ones_own_is_named_by_its_address(tmp_path, monkeypatch):
    (tmp_path / "forms_of_a_test.py").write_text(OWN_FORM)
    monkeypatch.syspath_prepend(tmp_path)
    x = np.geomspace(1e4, 1e7, 9)
    frame = pd.DataFrame({"dense_params": x, "logloss": 2.0 + 3 * x**-0.35})
    law = fit(frame, "forms_of_a_test:shifted", bootstrap=0, shift=2.0)
    assert law.form.id == "shifted" and law.params == pytest.approx({"A": 3.0, "alpha": 0.35}, rel=1e-6)
    with pytest.raises(ValueError, match="no attribute 'shiftd'"):
        forms.get("forms_of_a_test:shiftd")
    with pytest.raises(ValueError, match="returned None, expected a Form"):
        forms.get("forms_of_a_test:nothing")


def test_an_alias_is_one_forms_and_no_forms_name():
    aliases = [alias for name in forms.names() for alias in forms.get(name).aliases]
    assert len(aliases) == len(set(aliases)) and not set(aliases) & set(forms.names())
    assert forms.full_name("KSUM") == "kappa_sum" and forms.full_name("kappa") == "kappa"
