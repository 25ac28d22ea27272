"""Every form against its printed equation: values at raw axes, the linear part, and what may be fixed."""

from __future__ import annotations

import numpy as np
import pytest

from recscale.scaling.laws import forms
from recscale.scaling.laws.forms.form import ABSENT, UNCHECKED, coefficient
from recscale.scaling.laws.forms.metric_maps import absolute_auc
from recscale.scaling.laws.forms.one_axis import _between
from recscale.scaling.laws.forms.size_dependent import _stretched

exp, log = np.exp, np.log
BASE = {"E": 0.42, "A": 30.0, "alpha": 0.35, "B": 80.0, "beta": 0.28}


def kappa_mean(first, second, kappa):
    return (first**kappa + second**kappa) ** (1 / kappa)


def effective(u, epochs, r_star):
    return u * (1 + r_star * (1 - exp(-(epochs - 1) / r_star)))


def of_repeated(shape, tied=False):
    def equation(p, n, u, epochs):
        d, kappa = effective(u, epochs, p["R_star"]), p.get("kappa", 1 / p.get("beta", 1.0))
        second = p["B"] * d ** -(p["alpha"] if tied else p["beta"])
        return p["E"] + kappa_mean(p["A"] * n ** -p["alpha"], second, 1.0 if shape == "sum" else kappa)

    return equation


def bracket(p, x, d):
    return p["A_N"] * x ** -p["alpha_N"] + p["A_D"] * d ** -p["alpha_D"]


FIVE = {"E": 0.42, "A_p": 0.5, "alpha_p": 0.35, "A_q": 0.2, "alpha_q": 0.2, "A_r": 0.9, "alpha_r": 0.1}
FURTHER = {"A_q": 0.2, "alpha_q": 0.2, "A_r": 0.9, "alpha_r": 0.1}
SPARSE = dict(zip(("e", "a", "alpha", "b", "beta", "c", "lambda", "d", "delta", "gamma"),
                  (0.42, 30.0, 0.5, 30.0, 0.4, 0.02, 0.5, 1.0, 0.8, 0.25), strict=True))  # fmt: skip
BREAKS = {"a": 0.4, "b": 2.0, "c0": 0.1, "c1": 0.4, "d1": 30.0, "f1": 0.5, "c2": -0.3, "d2": 300.0, "f2": 0.8}


def broken(breaks):
    def equation(p, x):
        y = p["b"] * x ** -p["c0"]
        for i in range(1, breaks + 1):
            y = y * (1 + (x / p[f"d{i}"]) ** (1 / p[f"f{i}"])) ** (-p[f"c{i}"] * p[f"f{i}"])
        return p["a"] + y

    return equation


# name -> (raw parameters, equation at raw axes, how the form is had)
LAWS = {
    "power": ({"A": 3.0, "alpha": 0.2}, lambda p, x: p["A"] * x ** -p["alpha"], {}),
    "power_offset": ({"E": 0.4, "A": 3.0, "alpha": 0.2}, lambda p, x: p["E"] + p["A"] * x ** -p["alpha"], {}),
    "power_offset of any metric": (
        {"E": -0.4, "A": 3.0, "alpha": 0.2}, lambda p, x: p["E"] + p["A"] * x ** -p["alpha"], {"real_floor": True},
    ),
    "log_linear": ({"a": 1.0, "b": 0.01}, lambda p, x: p["a"] - p["b"] * log(x), {}),
    "gain": ({"c": 0.01, "gamma": 0.2}, lambda p, x: p["c"] * x ** p["gamma"], {}),
    "bnsl": ({name: BREAKS[name] for name in list(BREAKS)[:6]}, broken(1), {}),
    "bnsl of two breaks": (BREAKS, broken(2), {"breaks": 2}),
    "chinchilla": (BASE, lambda p, n, d: p["E"] + p["A"] * n ** -p["alpha"] + p["B"] * d ** -p["beta"], {}),
    "chinchilla_tied": (
        {k: v for k, v in BASE.items() if k != "beta"},
        lambda p, n, d: p["E"] + p["A"] * n ** -p["alpha"] + p["B"] * d ** -p["alpha"], {},
    ),
    "kaplan": (
        {k: v for k, v in BASE.items() if k != "E"},
        lambda p, n, d: kappa_mean(p["A"] * n ** -p["alpha"], p["B"] * d ** -p["beta"], 1 / p["beta"]), {},
    ),
    "kaplan_offset": (
        BASE, lambda p, n, d: p["E"] + kappa_mean(p["A"] * n ** -p["alpha"], p["B"] * d ** -p["beta"], 1 / p["beta"]),
        {},
    ),
    "kappa": (
        BASE | {"kappa": 3.0},
        lambda p, n, d: p["E"] + kappa_mean(p["A"] * n ** -p["alpha"], p["B"] * d ** -p["beta"], p["kappa"]), {},
    ),
    "kappa_tied": (
        {k: v for k, v in BASE.items() if k != "beta"} | {"kappa": 3.0},
        lambda p, n, d: p["E"] + kappa_mean(p["A"] * n ** -p["alpha"], p["B"] * d ** -p["alpha"], p["kappa"]), {},
    ),
    "gamma": (
        {"E": 0.42, "A": 27.0, "alpha": 1.05, "B": 512.0, "beta": 0.84, "gamma": 1 / 3},
        lambda p, n, d: p["E"] + (p["A"] * n ** -p["alpha"] + p["B"] * d ** -p["beta"]) ** p["gamma"], {},
    ),
    "sum": (
        FIVE,
        lambda p, x, y, z: p["E"] + p["A_p"] * x ** -p["alpha_p"] + p["A_q"] * y ** -p["alpha_q"]
        + p["A_r"] * z ** -p["alpha_r"],
        {"axes": ("p", "q", "r")},
    ),
    "kappa_sum": (
        BASE | {"kappa": 3.0} | FURTHER,
        lambda p, n, d, x, y: p["E"] + kappa_mean(p["A"] * n ** -p["alpha"], p["B"] * d ** -p["beta"], p["kappa"])
        + p["A_q"] * x ** -p["alpha_q"] + p["A_r"] * y ** -p["alpha_r"],
        {"axes": ("N", "D", "q", "r")},
    ),
    "trunk": (
        BASE | {"C": 0.01},
        lambda p, n, d, stage: p["E"] + p["A"] * n ** -p["alpha"] + p["B"] * d ** -p["beta"] + p["C"] * (stage - 1), {},
    ),
    "repeated_data": (BASE | {"R_star": 5.0}, of_repeated("sum"), {}),
    "repeated_data of tied exponents": (
        {k: v for k, v in BASE.items() if k != "beta"} | {"R_star": 5.0}, of_repeated("sum", True),
        {"base": "chinchilla_tied"},
    ),
    "repeated_data of kappa": (BASE | {"kappa": 3.0, "R_star": 5.0}, of_repeated("free"), {"base": "kappa"}),
    "repeated_data of tied kappa": (
        {k: v for k, v in BASE.items() if k != "beta"} | {"kappa": 3.0, "R_star": 5.0}, of_repeated("free", True),
        {"base": "kappa_tied"},
    ),
    "repeated_data of kaplan": (BASE | {"R_star": 5.0}, of_repeated("kaplan"), {"base": "kaplan_offset"}),
    "moe_granularity": (
        {"c": 0.47, "g": 2.1, "gamma": 0.58, "a": 18.1, "alpha": 0.115, "b": 30.8, "beta": 0.147},
        lambda p, n, d, g: p["c"] + (p["g"] * g ** -p["gamma"] + p["a"]) * n ** -p["alpha"] + p["b"] * d ** -p["beta"],
        {},
    ),
    "moe_unified": (
        {"a": -0.08, "b": -0.1, "c": 0.005, "d": 2.0},
        lambda p, n, e: exp(p["a"] * log(n) + p["b"] * log(e) + p["c"] * log(n) * log(e) + p["d"]), {},
    ),
    "moe_sparsity": (
        SPARSE,
        lambda p, n, d, s: p["e"] + p["a"] * n ** -p["alpha"] + p["b"] * d ** -p["beta"] + p["c"] * s ** -p["lambda"]
        + p["d"] * s ** -p["delta"] * n ** -p["gamma"],
        {},
    ),
    "auc": ({"S": 1.1, "A": 3.0, "alpha": 0.35}, lambda p, x: p["S"] - p["A"] * x ** -p["alpha"], {}),
    "farseer": (
        {"b3": -0.9, "a3": 4.0, "gamma": -0.25, "b2": 2.0, "a2": 0.02, "beta": 0.3, "b1": -1.5, "a1": 0.02,
         "alpha": 0.25},
        lambda p, n, d: exp(p["a3"] * n ** p["gamma"] + p["b3"])
        + exp(p["a2"] * n ** p["beta"] + p["b2"]) * d ** -exp(p["a1"] * n ** p["alpha"] + p["b1"]),
        {},
    ),
}  # fmt: skip


def form_of(name):
    return forms.get(name.partition(" ")[0], **LAWS.get(name, ((), (), {}))[2])


def phi_of(form, natural):
    return form.to_search({name: np.array(value) for name, value in natural.items()})


def centred(form, raw, centre):
    """The search-space vector whose raw parameters are these."""
    if form.id == "farseer":
        natural = {}
        for b, a, p in (("b3", "a3", "gamma"), ("b2", "a2", "beta"), ("b1", "a1", "alpha")):
            at = raw[a] * exp(raw[p] * centre["N"])
            natural |= {b: raw[b] + at, a: raw[p] * at, p: raw[p]}
        return phi_of(form, natural)
    if form.id == "gamma":
        terms = {"A": raw["A"] * exp(-raw["alpha"] * centre["N"]), "B": raw["B"] * exp(-raw["beta"] * centre["D"])}
        return phi_of(form, raw | {name: term ** raw["gamma"] for name, term in terms.items()})
    if form.id == "log_linear":
        return phi_of(form, raw | {"a": raw["a"] - raw["b"] * centre["x"]})
    if form.id == "moe_unified":
        n, e = centre["N"], centre["Ehat"]
        a, b, c, d = (raw[name] for name in "abcd")
        return phi_of(form, {"a": a + c * e, "b": b + c * n, "c": c, "d": d + a * n + b * e + c * n * e})
    at_one = form.uncentre(dict.fromkeys(form.names, 1.0) | raw, centre)  # coefficients are multiplied, others stay
    return phi_of(form, {k: raw[k] * raw[k] / at_one[k] if at_one[k] != raw[k] else raw[k] for k in form.names})


@pytest.mark.parametrize("name", list(LAWS))
def test_a_form_is_its_printed_equation(name):
    raw, equation, _ = LAWS[name]
    form, rng = form_of(name), np.random.default_rng(0)
    assert set(raw) == set(form.names)
    low = {"linear": 1.5, "log": 2.0}
    axes = [low[slot.transform] * exp(rng.uniform(0, 3, 12)) for slot in form.slots]
    centre = {slot.name: 0.7 if slot.transform == "log" else 0.0 for slot in form.slots}
    columns = [log(x) - centre[s.name] if s.transform == "log" else x for s, x in zip(form.slots, axes, strict=True)]
    phi, points = centred(form, raw, centre), np.stack(columns, axis=1)
    value = form.value(phi, points)
    np.testing.assert_allclose(value, equation(raw, *axes), rtol=1e-10)
    back = form.uncentre(form.to_natural(phi), centre)
    assert {key: float(v) for key, v in back.items()} == pytest.approx(raw)
    if form.linear is not None:
        # Given the exponents, the columns times the coefficients are the form where it is a sum.
        natural = {key: float(v) for key, v in form.to_natural(phi).items()}
        exponents = {key: np.array([[natural[key]]]) for key in form.linear.exponents}
        columns = [np.broadcast_to(c, (1, 12))[0] for c in form.linear.columns(exponents, points)]
        total = sum(natural[key] * c for key, c in zip(form.linear.coefficients, columns, strict=True))
        if form.linear.of == "log":
            total = exp(total)
        # What is joined in another way starts from the sum of its terms.
        plain = {key: 1.0 for key in ("kappa", "gamma") if key in form.extra_starts}
        alike = form.value(phi_of(form, natural | plain), points)
        if "kaplan" in name:
            second = points[:, 1]
            if form.id == "repeated_data":
                second = log(effective(axes[1], axes[2], raw["R_star"])) - centre["U"]
            terms = natural["A"] * exp(-natural["alpha"] * points[:, 0]) + natural["B"] * exp(-natural["beta"] * second)
            alike = natural.get("E", 0.0) + terms
        np.testing.assert_allclose(total, alike, rtol=1e-10)
        signed = {c for c, free in zip(form.linear.coefficients, form.linear.signed, strict=True) if free}
        assert signed == {c for c in form.linear.coefficients if form[c].searched == "real"} - {"E"}


def test_the_joint_form_has_one_bracket_in_two_streams():
    form = forms.get("joint", ("N", "D"))
    raw = {"E": 0.42, "v": 0.15, "S": 1.1, "A_N": 3.0, "alpha_N": 0.3, "A_D": 2.0, "alpha_D": 0.4}
    rng = np.random.default_rng(0)
    n, d = 2 * exp(rng.uniform(0, 3, (2, 10)))
    second = np.arange(10) % 2
    points = np.column_stack([log(n), log(d), second])
    value = form.value(phi_of(form, raw), points)
    expected = np.where(second == 1, 1.1 - bracket(raw, n, d), 0.42 + 0.075 * bracket(raw, n, d))
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    known = {key: np.array([[raw[key]]]) for key in form.linear.exponents}
    columns = [np.broadcast_to(c, (1, 10))[0] for c in form.linear.columns(known, points)]
    total = sum(raw[key] * c for key, c in zip(form.linear.coefficients, columns, strict=True))
    np.testing.assert_allclose(total, expected, rtol=1e-12)
    assert forms.get("joint").names == ("E", "v", "S", "A", "alpha") and forms.get("joint").axes == ("x",)


def test_the_saturating_form_obeys_its_equation():
    form, u = forms.get("m4"), np.linspace(-6, 6, 25)[:, None]
    for constants in ((0.3, 0.7, 1.3, 2.0, 0.5), (0.3, 3.3, 0.4, 0.7, 0.9)):
        raw = dict(zip(form.names, constants, strict=True))
        y = form.value(phi_of(form, raw), u)
        left = (y - raw["E"]) / (raw["E0"] - y) ** raw["a"]
        np.testing.assert_allclose(left, raw["A"] * exp(-raw["c"] * u[:, 0]), rtol=1e-9)


@pytest.mark.parametrize("name", ["bnsl", "m4", "farseer"])
def test_starts_of_a_forms_own_lie_around_the_rows(name):
    rng = np.random.default_rng(0)
    form = forms.get(name)
    axes = np.sort(rng.uniform(-3, 3, (24, len(form.slots))), axis=0)
    axes[:, 1:] = exp(axes[:, 1:] + 5)
    y = 0.4 + 0.1 * exp(-0.3 * axes[:, 0])
    if name == "bnsl":
        found = form.linear.sampler(axes)
        assert all(len(v) == 2**11 for v in found.values())
        ends = {"c0": (-0.2, 1.5), "c1": (-1.5, 1.5), "f1": (0.05, 3.0)}
        found |= {"place": (log(found["d1"]) - axes[:, 0].min()) / np.ptp(axes[:, 0])}
        for key, (low, high) in {**ends, "place": (0.1, 0.9)}.items():
            assert (found[key].min(), found[key].max()) == pytest.approx((low, high), abs=5e-3)
        assert np.median(found["f1"]) == pytest.approx(np.sqrt(0.05 * 3.0), rel=0.01)
        return
    found = form.starts(axes, y, rng)
    if name == "m4":
        below = 1 - found["E"] / y.min()
        assert len(below) == 64 and 1e-3 <= below.min() < 1.5e-3 and 0.8 < below.max() <= 0.95
        reach = (found["E0"] - y.max()) / np.ptp(y)
        assert 0.01 <= reach.min() < 0.015 and 8 < reach.max() <= 10
        assert abs(np.corrcoef(found["E"], found["E0"])[0, 1]) < 0.3
        for k in (0, 30, 63):
            # Given both ends the law is linear in a, ln A and c.
            left, u = log(y - found["E"][k]), axes[:, 0]
            design = np.column_stack([log(found["E0"][k] - y), np.ones(24), -u])
            a, level, c = np.linalg.lstsq(design, left, rcond=None)[0]
            expected = np.clip(a, 0.05, 20), exp(np.clip(level, -25, 25)), np.clip(c, 0.03, 10)
            assert (found["a"][k], found["A"][k], found["c"][k]) == pytest.approx(expected)
        ends = [(found[key].min(), found[key].max(), len(found[key])) for key in ("a", "c")]
        assert ends[0][0] >= 0.05 and ends[0][1] <= 20 and ends[1][0] >= 0.03 and ends[1][1] <= 10
        return
    assert all(len(v) == 8 for v in found.values())
    np.testing.assert_array_equal(found["gamma"], np.tile([-0.3, 0.05], 4))
    np.testing.assert_array_equal(found["alpha"], found["gamma"])
    assert np.all(found["a2"] == 0) and np.all(found["a1"] == 0)
    # The first is the best sum of the grid at the mean of ln D.
    n, d = axes[:, 0], log(axes[:, 1])
    misses = []
    for a in (0.0, 0.05, 0.1, 0.2):
        for b in (0.15, 0.3, 0.45, 0.6):
            design = np.stack([exp(-a * n), exp(-b * (d - d.mean()))], axis=1) / y[:, None]
            solved, miss, *_ = np.linalg.lstsq(design, np.ones(len(y)), rcond=None)
            if np.all(solved > 1e-3 * y.min()):
                misses.append((miss[0], a, b, *solved))
    _, a, b, top, data = min(misses)
    first = {key: v[0] for key, v in found.items()}
    assert (first["b3"], -first["a3"], exp(first["b1"])) == pytest.approx((log(top), a, b))
    assert first["b2"] == pytest.approx(log(data) + b * d.mean())


def test_a_stretched_power_has_the_logarithm_as_its_limit():
    u = np.array([-2.0, 0.5])
    assert _stretched(0.3, -0.2, 0.5, u, np) == pytest.approx(0.3 - 0.2 * (exp(0.5 * u) - 1) / 0.5)
    for power in (0.0, 0.9e-8, -0.9e-8):
        np.testing.assert_array_equal(_stretched(0.3, -0.2, power, u, np), 0.3 - 0.2 * u)
    assert np.all(_stretched(0.3, -0.2, 1.1e-8, u, np) != 0.3 - 0.2 * u)


def test_samples_of_the_unit_interval_are_even_in_the_logarithm_or_plainly():
    unit = np.array([0.0, 0.5, 1.0])
    assert _between(unit, 1.0, 100.0) == pytest.approx([1, 10, 100])
    assert _between(unit, -1.0, 2.0, log=False) == pytest.approx([-1, 0.5, 2])


def test_a_fixed_parameter_is_gone_and_holds_its_value():
    form = forms.get("chinchilla")
    points = np.random.default_rng(0).normal(size=(6, 2))
    for name, value in (("alpha", 0.3), ("E", 0.2), ("E", 0.0), ("beta", 0.5)):
        held = form.holding({name: value})
        natural = BASE | {name: value}
        assert name not in held.names and held.held == {name: value}
        left = {key: natural[key] for key in held.names}
        full = natural["E"] + 30 * exp(-natural["alpha"] * points[:, 0]) + 80 * exp(-natural["beta"] * points[:, 1])
        np.testing.assert_allclose(held.value(phi_of(held, left), points), full, rtol=1e-12)
        assert held.floor == (None if name == "E" else "E") and held.split == (None if name != "E" else form.split)
        exponents = {key: np.array([[natural[key]]]) for key in held.linear.exponents}
        columns = [np.broadcast_to(c, (1, 6))[0] for c in held.linear.columns(exponents, points)]
        known = held.linear.known
        assert known == (value if name == "E" else 0.0) and len(held.linear.signed) == len(columns)
        total = known + sum(natural[key] * c for key, c in zip(held.linear.coefficients, columns, strict=True))
        np.testing.assert_allclose(total, full, rtol=1e-12)
    bare = form.without_floor()
    assert bare.id == "chinchilla_no_floor" and exp(bare.affine()[1][0]) == 0.0 and bare.affine()[1][0] == ABSENT
    tried = forms.get("kappa")
    assert tried.holding({"alpha": 0.3}).extra_starts == tried.extra_starts == {"kappa": (1.0, 4.0)}
    assert tried.holding({"kappa": 2.0}).extra_starts == {}
    own = forms.get("m4").holding({"c": 0.5})
    assert set(own.starts(np.linspace(-1, 1, 9)[:, None], np.linspace(0.7, 0.4, 9), None)) == {"E", "E0", "a", "A"}
    real = forms.get("power_offset", real_floor=True).holding({"E": -0.5})
    assert real.value(phi_of(real, {"A": 1.0, "alpha": 1.0}), np.zeros((1, 1)))[0] == 0.5
    for name, value in (("E", -0.1), ("E", np.nan), ("A", 1.0), ("kappa", 1.0)):
        with pytest.raises(ValueError, match="cannot be fixed|is a coefficient|no parameter"):
            form.holding({name: value})


def test_what_belongs_to_what():
    form = forms.get("chinchilla")
    owners = {name: form.belongs_to(name) for name in form.names}
    assert owners == {"E": (), "A": ("E", "alpha"), "alpha": ("E",), "B": ("E", "beta"), "beta": ("E",)}
    assert form.touched_by({"beta"}) == {"beta", "B"} and form.touched_by({"E"}) == set(form.names)
    assert forms.get("m4").belongs_to("A") == ("E", "E0", "c") and forms.get("log_linear").belongs_to("b") == ()
    assert [forms.get(name).floor_at for name in ("power_offset", "bnsl")] == [0, 0]
    with pytest.raises(ValueError, match="has no floor"):
        forms.get("power").floor_at  # noqa: B018


def test_search_intervals_follow_the_metric_and_the_axis():
    axes = np.array([[-2.0], [3.0]])
    low, high = forms.get("power_offset").bounds(axes, 0.5)
    assert exp(low) == pytest.approx([0.5e-9, 0.5e-12, 1e-6]) and exp(high) == pytest.approx([1.0, 0.5e6, 20.0])
    form = forms.get("bnsl")
    low, high = (dict(zip(form.names, ends, strict=True)) for ends in form.bounds(axes, 0.5))
    assert exp(low["d1"]) == pytest.approx(0.1 * exp(-2)) and exp(high["d1"]) == pytest.approx(10 * exp(3))
    assert (low["c1"], high["c1"], low["c0"], high["c0"]) == (-20, 20, -5, 20)


RANGES = {
    "power_offset of any metric": {"E": (-1e6, 1e6)},
    "log_linear": {"a": (-1e6, 1e6), "b": (-1e6, 1e6)},
    "kappa": {"kappa": (0.1, 1e3)},
    "gamma": {"A": (1e-12, 1e6), "B": (1e-12, 1e6), "gamma": (1e-3, 10.0)},
    "trunk": {"C": (1e-9, 10.0)},
    "repeated_data": {"R_star": (1e-3, 1e4)},
    "moe_unified": {name: (-1e3, 1e3) for name in "abcd"},
    "bnsl": {"f1": (1e-2, 1e2)},
    "m4": {"E0": (1e-9, 1e4), "a": (1e-3, 1e3), "A": (1e-15, 1e15)},
    "auc": {"S": (1e-6, 1e4)},
    "farseer": {"b1": (-50.0, 50.0), "a1": (-20.0, 20.0), "alpha": (-3.0, 3.0), "b3": (-50.0, 50.0)},
}


@pytest.mark.parametrize("name", list(RANGES))
def test_what_a_search_may_find_is_told(name):
    told = forms.describe(form_of(name))
    ranges = {p["name"]: tuple(p["range"]) for p in told["parameters"]}
    assert {key: ranges[key] for key in RANGES[name]} == RANGES[name]


def test_forms_say_what_they_need_and_what_they_take():
    got = forms.get
    distinct = {"log_linear": 3, "m4": 8, "bnsl": 12, "moe_unified": 3, "farseer": 6}
    assert {name: got(name).min_distinct for name in forms.names()} == {n: distinct.get(n, 5) for n in forms.names()}
    assert got("bnsl", breaks=2).min_distinct == 24 and got("bnsl").start_count == 64 and got("kappa").start_count == 8
    targets = {"auc": "auc", "joint": "any", "moe_unified": "log_target"}
    assert all(got(name).target == targets.get(name, "positive") for name in forms.names())
    assert [name for name in forms.names() if got(name).streams] == ["joint"]
    splits = {name: got(name).split for name in forms.names() if got(name).split}
    own = dict.fromkeys(("chinchilla", "kaplan", "kaplan_offset", "kappa", "gamma", "kappa_sum", "repeated_data"))
    assert splits == dict.fromkeys(own, ("alpha", "beta")) | dict.fromkeys(
        ("chinchilla_tied", "kappa_tied"), ("alpha", "alpha")
    )
    floors = {name: got(name).floor for name in forms.names()}
    none = ("power", "log_linear", "kaplan", "auc", "gain", "moe_unified", "farseer")
    others = {"bnsl": "a", "moe_granularity": "c", "moe_sparsity": "e"}
    assert floors == {name: None if name in none else others.get(name, "E") for name in forms.names()}
    tried = {name: dict(got(name).extra_starts) for name in forms.names() if got(name).extra_starts}
    kappa = dict.fromkeys(("kappa", "kappa_tied", "kappa_sum"), {"kappa": (1.0, 4.0)})
    assert tried == kappa | {"gamma": {"gamma": (1.0, 0.5)}}
    assert got("repeated_data", base="kappa").extra_starts == {"kappa": (1.0, 4.0)}
    assert got("repeated_data").linear.grid == {"R_star": (1.0, 10.0)}
    assert got("joint").linear.grid == {"v": (0.03, 0.08, 0.15, 0.3, 1.0)}
    for name in ("power_offset", "log_linear"):
        assert got(name).for_any_metric().target == "any"
    assert got("auc").for_any_metric() is got("auc") and got("power").for_any_metric() is got("power")
    with pytest.raises(ValueError, match="needs a positive metric"):
        got("kappa").for_any_metric()
    units = got("moe_granularity").units
    assert units["g"] == "target * N^alpha * G^gamma" and units["c"] == "target"
    assert coefficient("c", "x", "gamma", sign=-1.0).unit == "target / x^gamma"
    unique = got("repeated_data")["B"]
    assert unique.slots == ("U",) and unique.powers == (("U", "beta", 1.0),) and unique.unit == "target * U^beta"
    for breaks in (0, 3):
        with pytest.raises(ValueError, match="breaks must be 1 or 2"):
            got("bnsl", breaks=breaks)


def test_forms_say_where_they_hold():
    unchecked = ("gamma", "repeated_data", "moe_granularity", "moe_unified", "moe_sparsity", "m4", "farseer")
    assert {name for name in forms.names() if UNCHECKED in forms.get(name).note} == set(unchecked)
    assert "correlate below .9" in forms.get("sum").note and "gamma depends on the baseline" in forms.get("gain").note
    for name in forms.names():
        form = forms.get(name)
        several = name in ("sum", "kappa_sum", "joint")
        for slot in form.slots:
            assert ("x_j" if several else slot.name) in form.valid, name
        if form.floor is not None and name not in ("m4", "joint"):
            assert f"y > {form.floor}" in form.valid
    assert "E < y < E0" in forms.get("m4").valid and "logloss > E" in forms.get("joint").valid
    slots = {name: forms.get(name)["alpha"].slots for name in ("chinchilla", "chinchilla_tied", "kappa", "kappa_tied")}
    assert slots == dict(zip(slots, [("N",), ("N", "D")] * 2, strict=True))
    assert forms.get("auc").units["S"] == "t" and "AUC < 1" in forms.get("auc").valid
    kappa = ("kappa", "kappa_sum", "repeated_data")
    within = {name: forms.get(name).nested_in for name in forms.names() if forms.get(name).nested_in}
    assert within == {
        "power": ("power_offset",), "power_offset": ("bnsl", "m4"), "chinchilla": ("kappa", "repeated_data"),
        "chinchilla_tied": ("kappa_tied", "chinchilla", "kappa"), "kaplan": ("kaplan_offset",),
        "kaplan_offset": ("kappa",), "kappa": ("kappa_sum", "repeated_data"), "kappa_tied": kappa, "gamma": kappa,
    }  # fmt: skip


def test_published_gains_are_read_by_their_convention():
    gain = np.array([0.0, 0.1])
    assert absolute_auc(gain, 0.7, "ratio") == pytest.approx([0.7, 0.77])
    assert absolute_auc(gain, 0.7, "excess_ratio") == pytest.approx([0.7, 0.72])
    assert absolute_auc(gain, 0.7, "points") == pytest.approx([0.7, 0.8])
    for baseline in (0.5, 1.0):
        with pytest.raises(ValueError, match="baseline AUC"):
            absolute_auc(gain, baseline, "ratio")
