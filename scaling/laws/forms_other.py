"""Forms beyond sums of power terms: log-linear, saturating, broken, mixture-of-experts, AUC, joint logloss + AUC, gains.

Families (search space; u = centred ln x):
    log_linear       y = a - b u
    gain             y = c e^(gamma u)
    saturating       (y - E) / (E0 - y)^a = A e^(-c u)                                            (arXiv 2209.06640, M4)
    broken           y = a + b e^(-c0 u) prod_i (1 + e^((u - ln d_i) / f_i))^(-c_i f_i)           (arXiv 2210.14891)
    moe_granularity  y = c + (g G^-gamma + a) N^-alpha + b D^-beta                                (arXiv 2402.07871)
    moe_unified      ln y = a ln N + b ln Ehat + c ln N ln Ehat + d                               (arXiv 2202.01169)
    moe_sparsity     y = e + a N^-alpha + b D^-beta + c s^-lambda + d s^-delta N^-gamma           (arXiv 2501.12370)
    auc              t = S - A x^-alpha,  t = 2 Phi^-1(AUC)^2
    joint            logloss = E + (v/2) sum_j A_j x_j^-alpha_j  and  t = S - sum_j A_j x_j^-alpha_j
"""

from __future__ import annotations

from functools import lru_cache

import jax
import numpy as np
from scipy.stats import qmc

from .forms_base import Family, Form, Linear, Parameter, Slot, coefficient, exponent, floor_parameter

_ONE = Slot("x", "dense_params", "parameters", ("N", "x1"))
_SIZE = Slot("N", "dense_params", "parameters", ("x1", "x"))
_DATA = Slot("D", "examples", "examples", ("x2",))
_MANY_STARTS = 64
_NEWTON_STEPS = 25


def _sobol(dims: int, log2_count: int) -> np.ndarray:
    """Scrambled Sobol points [2^log2_count, dims] in the unit cube, the same every time."""
    return qmc.Sobol(dims, scramble=True, rng=20240229).random_base2(log2_count)


def _between(unit: np.ndarray, low: float, high: float, log: bool = True) -> np.ndarray:
    """Unit-interval samples onto [low, high], evenly in the logarithm or plainly."""
    return low * (high / low) ** unit if log else low + unit * (high - low)


@lru_cache(maxsize=None)
def log_linear(real: bool = False) -> Form:
    """y = a - b ln x: the limit of power_offset as alpha -> 0 with A -> infinity; fitted as a rival to every one-axis form."""

    def value(theta, axes, xp):
        return theta[0] - theta[1] * axes[:, 0]

    def raw(centred, log_centre):
        return {"a": centred["a"] + centred["b"] * log_centre["x"], "b": centred["b"]}

    parameters = (
        Parameter("a", "level", -1e6, 1e6, "real", "target", (), unit="target", meaning="metric at ln x = 0; centred: at x0"),
        Parameter("b", "slope", -1e6, 1e6, "real", "target", (), unit="target per e-fold", meaning="fall of y per e-fold"),
    )
    linear = Linear((), ("a", "b"), lambda exponents, axes: [np.ones(len(axes)), -axes[:, 0]], (True, True))
    return Form(
        "log_linear", ("LL",), "y = a - b ln x", "limit of a power law", (_ONE,), parameters,
        Family("log_linear", ("a", "b"), value), linear, raw=raw, limits="unbounded as x -> infinity: never a forecast of a floor",
        valid="x > 0", target="any" if real else "positive", min_distinct=3,
    )  # fmt: skip


@lru_cache(maxsize=None)
def gain() -> Form:
    """Delta = c x^gamma, to store published gains. gamma is not an exponent of the loss and is compared with nothing."""

    def value(theta, axes, xp):
        return xp.exp(theta[0] + xp.exp(theta[1]) * axes[:, 0])

    parameters = (coefficient("c", "x", "gamma", sign=-1.0), exponent("gamma", "x"))
    linear = Linear(("gamma",), ("c",), lambda e, axes: [np.exp(e["gamma"] * axes[:, 0])], (False,))
    return Form(
        "gain", ("GAIN",), "delta = c x^gamma", "published gains over a baseline", (_ONE,), parameters,
        Family("gain", ("c", "gamma"), value), linear, limits="unbounded as x -> infinity", valid="x > 0, delta > 0",
        note="gamma depends on the baseline and the range: it falls as the loss exponent rises",
    )  # fmt: skip


def _solve_saturating(log_a, rhs, xp):
    """q with ln sigma(q) - a ln sigma(-q) = rhs, elementwise.

    The left side is increasing and convex or concave throughout, so Newton from its asymptote converges; one more step outside
    the loop carries the derivative.
    """
    a = xp.exp(log_a)

    def gap(q):
        return -xp.logaddexp(0.0, -q) + a * xp.logaddexp(0.0, q) - rhs

    def slope(q):
        s = 0.5 * (1.0 + xp.tanh(0.5 * q))
        return (1.0 - s) + a * s

    def newton(q):
        return q - gap(q) / slope(q)

    q = xp.where(rhs > 0, rhs / a, rhs)
    if xp is np:
        for _ in range(_NEWTON_STEPS):
            q = newton(q)
        return q
    q = jax.lax.fori_loop(0, _NEWTON_STEPS, lambda _, q: newton(q), jax.lax.stop_gradient(q))
    return newton(jax.lax.stop_gradient(q))


@lru_cache(maxsize=None)
def saturating() -> Form:
    """(y - E) / (E0 - y)^a = A x^-c: saturates at E0 for small x and at E for large x."""

    def value(theta, axes, xp):
        floor, span = xp.exp(theta[0]), xp.exp(theta[1]) - xp.exp(theta[0])
        a = xp.exp(theta[2])
        rhs = theta[3] - xp.exp(theta[4]) * axes[:, 0] - (1.0 - a) * xp.log(span)
        q = _solve_saturating(theta[2], rhs, xp)
        return floor + span * 0.5 * (1.0 + xp.tanh(0.5 * q))

    def starts(axes, y, generator):
        unit = _sobol(2, 6)
        low, high = float(y.min()), float(y.max())
        reach = high - low
        floor = low * (1.0 - _between(unit[:, 0], 1e-3, 0.95))
        ceiling = high + reach * _between(unit[:, 1], 1e-2, 10.0)
        named = {"E": floor, "E0": ceiling, "a": [], "A": [], "c": []}
        for e, top in zip(floor, ceiling, strict=True):
            # Given E and E0 the form is linear in (a, ln A, c): ln(y - E) = a ln(E0 - y) + ln A - c u.
            design = np.stack([np.log(top - y), np.ones(len(y)), -axes[:, 0]], axis=1)
            a, log_a, c = np.linalg.lstsq(design, np.log(y - e), rcond=None)[0]
            named["a"].append(np.clip(a, 0.05, 20.0))
            named["A"].append(np.exp(np.clip(log_a, -25, 25)))
            named["c"].append(np.clip(c, 0.03, 10.0))
        return {name: np.asarray(values) for name, values in named.items()}

    parameters = (
        floor_parameter(),
        Parameter("E0", "ceiling", 1e-9, 1e4, "log", "target", ("x",), unit="target", meaning="metric at x -> 0"),
        Parameter("a", "shape", 1e-3, 1e3, "log", "one", ("x",), meaning="how the ceiling is left"),
        Parameter("A", "coefficient", 1e-15, 1e15, "log", "one", ("x",), (("x", "c", 1.0),), "target^(1-a) * x^c", "scale"),
        exponent("c", "x"),
    )
    return Form(
        "m4", ("M4",), "(y - E) / (E0 - y)^a = A x^-c", "arXiv 2209.06640", (_ONE,), parameters,
        Family("saturating", ("E", "E0", "a", "A", "c"), value), starts=starts, floor="E",
        limits="x -> 0 gives E0, x -> infinity gives E; a -> 0 is power_offset", valid="x > 0, E < y < E0", min_distinct=8,
    )  # fmt: skip


@lru_cache(maxsize=None)
def broken(breaks: int = 1) -> Form:
    """y = a + b x^-c0 prod_i (1 + (x/d_i)^(1/f_i))^(-c_i f_i): power laws joined at `breaks` smooth breaks."""
    if breaks not in (1, 2):
        raise ValueError(f"bnsl: breaks must be 1 or 2 (0 is power_offset), found {breaks}")
    names = ["a", "b", "c0"] + [f"{kind}{i}" for i in range(1, breaks + 1) for kind in ("c", "d", "f")]

    def log_shape(c0, turns, u, xp):
        total = -c0 * u
        for c, log_d, f in turns:
            total = total - c * f * xp.logaddexp(0.0, (u - log_d) / f)
        return total

    def value(theta, axes, xp):
        turns = [(theta[3 + 3 * i], theta[4 + 3 * i], xp.exp(theta[5 + 3 * i])) for i in range(breaks)]
        return xp.exp(theta[0]) + xp.exp(theta[1] + log_shape(theta[2], turns, axes[:, 0], xp))

    def columns(e, axes):
        turns = [(e[f"c{i}"], np.log(e[f"d{i}"]), e[f"f{i}"]) for i in range(1, breaks + 1)]
        shape = log_shape(e["c0"], turns, axes[:, 0], np)
        return [np.ones((1, len(axes))), np.exp(np.clip(shape, -300, 300))]

    def sampler(axes):
        unit = _sobol(1 + 3 * breaks, 11)
        low, high = axes[:, 0].min(), axes[:, 0].max()
        found = {"c0": _between(unit[:, 0], -0.2, 1.5, log=False)}
        for i in range(1, breaks + 1):
            turn, place, width = unit[:, 3 * i - 2], unit[:, 3 * i - 1], unit[:, 3 * i]
            found[f"c{i}"] = _between(turn, -1.5, 1.5, log=False)
            found[f"d{i}"] = np.exp(low + (0.1 + 0.8 * place) * (high - low))
            found[f"f{i}"] = _between(width, 0.05, 3.0)
        return found

    parameters = [
        floor_parameter("a"),
        Parameter("b", "coefficient", 1e-12, 1e6, "log", "target", ("x",), (("x", "c0", 1.0),), "target * x^c0", "scale"),
        Parameter("c0", "exponent", -5.0, 20.0, "real", "one", ("x",), meaning="slope before the first break"),
    ]
    for i in range(1, breaks + 1):
        parameters += [
            Parameter(f"c{i}", "exponent", -20.0, 20.0, "real", "one", ("x",), meaning=f"change of slope at break {i}"),
            Parameter(f"d{i}", "location", 0.1, 10.0, "log", "axis:x", ("x",), unit="x", meaning=f"place of break {i}"),
            Parameter(f"f{i}", "shape", 1e-2, 1e2, "log", "one", ("x",), meaning=f"width of break {i}"),
        ]
    linear = Linear(tuple(names[2:]), ("a", "b"), columns, (False, False), sampler=sampler)
    return Form(
        "bnsl", ("BNSL",), "y = a + b x^-c0 prod_i (1 + (x/d_i)^(1/f_i))^(-c_i f_i)", "arXiv 2210.14891, eq. 1", (_ONE,),
        tuple(parameters), Family(f"broken_{breaks}", tuple(names), value), linear, floor="a",
        limits="x -> infinity gives a if the last slope is positive", valid="x > 0, y > a", min_distinct=12 * breaks,
        start_count=_MANY_STARTS,
    )  # fmt: skip


@lru_cache(maxsize=None)
def moe_granularity() -> Form:
    """y = c + (g G^-gamma + a) N^-alpha + b D^-beta, G the expert granularity."""

    def value(theta, axes, xp):
        c, g, gamma, a, alpha, b, beta = theta
        size = xp.exp(alpha) * axes[:, 0]
        fine = xp.exp(g - xp.exp(gamma) * axes[:, 2] - size)
        return xp.exp(c) + fine + xp.exp(a - size) + xp.exp(b - xp.exp(beta) * axes[:, 1])

    def columns(e, axes):
        size = np.exp(-e["alpha"] * axes[:, 0])
        return [np.ones((1, len(axes))), size * np.exp(-e["gamma"] * axes[:, 2]), size, np.exp(-e["beta"] * axes[:, 1])]

    fine = Parameter("g", "coefficient", 1e-12, 1e6, "log", "target", ("N", "G"), (("N", "alpha", 1.0), ("G", "gamma", 1.0)),
                     "target * N^alpha * G^gamma", "contribution of coarse experts")  # fmt: skip
    names = ("c", "g", "gamma", "a", "alpha", "b", "beta")
    parameters = (floor_parameter("c"), fine, exponent("gamma", "G"), coefficient("a", "N", "alpha"), exponent("alpha", "N"),
                  coefficient("b", "D", "beta"), exponent("beta", "D"))  # fmt: skip
    return Form(
        "moe_granularity", ("MOE-G",), "y = c + (g G^-gamma + a) N^-alpha + b D^-beta", "arXiv 2402.07871, eq. 9",
        (_SIZE, _DATA, Slot("G", "expert_granularity")), parameters, Family("moe_granularity", names, value),
        Linear(("gamma", "alpha", "beta"), ("c", "g", "a", "b"), columns, (False,) * 4), floor="c",
        limits="N, D -> infinity gives c", valid="N > 0, D > 0, G >= 1, y > c",
    )  # fmt: skip


@lru_cache(maxsize=None)
def moe_unified() -> Form:
    """ln y = a ln N + b ln Ehat + c ln N ln Ehat + d; Ehat is the saturated expert count, mapped by the user."""

    def value(theta, axes, xp):
        a, b, c, d = theta
        return xp.exp(a * axes[:, 0] + b * axes[:, 1] + c * axes[:, 0] * axes[:, 1] + d)

    def raw(centred, log_centre):
        a, b, c, d = (centred[name] for name in "abcd")
        n0, e0 = log_centre["N"], log_centre["Ehat"]
        return {"a": a - c * e0, "b": b - c * n0, "c": c, "d": d - a * n0 - b * e0 + c * n0 * e0}

    parameters = tuple(
        Parameter(name, role, -1e3, 1e3, "real", "one", slots, unit=unit, meaning=meaning)
        for name, role, slots, unit, meaning in (
            ("a", "slope", ("N",), "1", "log-log slope in N at Ehat = 1; centred: at the mean ln Ehat"),
            ("b", "slope", ("Ehat",), "1", "log-log slope in Ehat at N = 1; centred: at the mean ln N"),
            ("c", "slope", ("N", "Ehat"), "1", "interaction"),
            ("d", "level", (), "ln target", "ln y at N = Ehat = 1; centred: at the centre"),
        )
    )
    linear = Linear((), ("a", "b", "c", "d"), lambda e, axes: [axes[:, 0], axes[:, 1], axes[:, 0] * axes[:, 1],
                    np.ones(len(axes))], (True,) * 4, of="log")  # fmt: skip
    return Form(
        "moe_unified", ("MOE-U",), "ln y = a ln N + b ln Ehat + c ln N ln Ehat + d", "arXiv 2202.01169, eq. 7",
        (_SIZE, Slot("Ehat", "saturated_experts")), parameters, Family("moe_unified", tuple("abcd"), value), linear, raw=raw,
        limits="no floor: not a forecast far beyond the rows", valid="N > 0, Ehat > 0, y > 0", target="log_target", min_distinct=3,
    )  # fmt: skip


@lru_cache(maxsize=None)
def moe_sparsity() -> Form:
    """y = e + a N^-alpha + b D^-beta + c s^-lambda + d s^-delta N^-gamma, s the active fraction."""

    def value(theta, axes, xp):
        e, a, alpha, b, beta, c, lam, d, delta, gamma = theta
        n, data, s = axes[:, 0], axes[:, 1], axes[:, 2]
        alone = xp.exp(a - xp.exp(alpha) * n) + xp.exp(b - xp.exp(beta) * data) + xp.exp(c - xp.exp(lam) * s)
        return xp.exp(e) + alone + xp.exp(d - xp.exp(delta) * s - xp.exp(gamma) * n)

    def columns(e, axes):
        n, data, s = axes[:, 0], axes[:, 1], axes[:, 2]
        alone = [np.exp(-e["alpha"] * n), np.exp(-e["beta"] * data), np.exp(-e["lambda"] * s)]
        return [np.ones((1, len(axes))), *alone, np.exp(-e["delta"] * s - e["gamma"] * n)]

    both = Parameter("d", "coefficient", 1e-12, 1e6, "log", "target", ("s", "N"), (("s", "delta", 1.0), ("N", "gamma", 1.0)),
                     "target * s^delta * N^gamma", "joint contribution of size and sparsity")  # fmt: skip
    names = ("e", "a", "alpha", "b", "beta", "c", "lambda", "d", "delta", "gamma")
    parameters = (floor_parameter("e"), coefficient("a", "N", "alpha"), exponent("alpha", "N"), coefficient("b", "D", "beta"),
                  exponent("beta", "D"), coefficient("c", "s", "lambda"), exponent("lambda", "s"), both, exponent("delta", "s"),
                  exponent("gamma", "N"))  # fmt: skip
    linear = Linear(("alpha", "beta", "lambda", "delta", "gamma"), ("e", "a", "b", "c", "d"), columns, (False,) * 5)
    return Form(
        "moe_sparsity", ("MOE-S",), "y = e + a N^-alpha + b D^-beta + c s^-lambda + d s^-delta N^-gamma",
        "arXiv 2501.12370, eq. 5", (_SIZE, _DATA, Slot("s", "active_fraction", "fraction", valid="0 < s <= 1")), parameters,
        Family("moe_sparsity", names, value), linear, floor="e", limits="every axis -> infinity gives e",
        valid="N > 0, D > 0, 0 < s <= 1, y > e",
    )  # fmt: skip


def _ceiling() -> Parameter:
    return Parameter("S", "ceiling", 1e-6, 1e4, "log", "target", (), unit="t", meaning="t with the axis unlimited")


@lru_cache(maxsize=None)
def auc() -> Form:
    """t = S - A x^-alpha with t = 2 Phi^-1(AUC)^2: parameters live on t, predictions come back as AUC."""

    def value(theta, axes, xp):
        return xp.exp(theta[0]) - xp.exp(theta[1] - xp.exp(theta[2]) * axes[:, 0])

    linear = Linear(("alpha",), ("S", "A"), lambda e, axes: [np.ones((1, len(axes))), -np.exp(-e["alpha"] * axes[:, 0])],
                    (False, False))  # fmt: skip
    return Form(
        "auc", ("AUC",), "t = S - A x^-alpha, t = 2 Phi^-1(AUC)^2", "Gaussian logits", (_ONE,),
        (_ceiling(), coefficient("A", "x", "alpha"), exponent("alpha", "x")), Family("auc", ("S", "A", "alpha"), value), linear,
        limits="x -> infinity gives S", valid="x > 0, .5 <= AUC < 1", target="auc",
    )  # fmt: skip


@lru_cache(maxsize=None)
def joint(slots: tuple[str, ...] = ("x",)) -> Form:
    """logloss = E + (v/2) sum_j A_j x_j^-alpha_j and t = S - sum_j A_j x_j^-alpha_j: one bracket, two streams.

    Rows carry a last axis that is 0 for logloss and 1 for t.
    """
    pairs = [("A", "alpha")] if len(slots) == 1 else [(f"A_{s}", f"alpha_{s}") for s in slots]

    def value(theta, axes, xp):
        bracket = 0.0
        for j in range(len(pairs)):
            bracket = bracket + xp.exp(theta[3 + 2 * j] - xp.exp(theta[4 + 2 * j]) * axes[:, j])
        loss = xp.exp(theta[0]) + 0.5 * xp.exp(theta[1]) * bracket
        return xp.where(axes[:, len(pairs)] > 0.5, xp.exp(theta[2]) - bracket, loss)

    names = ["E", "v", "S"] + [name for pair in pairs for name in pair]

    def columns(e, axes):
        second = (axes[:, len(pairs)] > 0.5).astype(float)
        terms = [np.exp(-e[alpha] * axes[:, j]) for j, (_, alpha) in enumerate(pairs)]
        shared = [-second * term + 0.5 * e["v"] * (1 - second) * term for term in terms]
        return [(1 - second)[None], second[None], *shared]

    parameters = [
        floor_parameter(),
        Parameter("v", "shape", 1e-4, 1e2, "log", "one", (), unit="1", meaning="E[p (1 - p)]: logloss per unit of missed variance"),
        _ceiling(),
    ]
    for slot, (name, alpha) in zip(slots, pairs, strict=True):
        parameters += [coefficient(name, slot, alpha), exponent(alpha, slot)]
    linear = Linear(tuple(["v"] + [alpha for _, alpha in pairs]), ("E", "S", *(name for name, _ in pairs)), columns,
                    (False,) * (2 + len(pairs)), grid={"v": (0.03, 0.08, 0.15, 0.3, 1.0)})  # fmt: skip
    described = {"x": _ONE, "N": _SIZE, "D": _DATA}
    return Form(
        "joint", ("JOINT",), "logloss = E + (v/2) sum_j A_j x_j^-alpha_j; t = S - sum_j A_j x_j^-alpha_j", "Gaussian logits",
        tuple(described.get(s, Slot(s, s)) for s in slots), tuple(parameters), Family(f"joint_{len(slots)}", tuple(names), value),
        linear, floor="E", limits="every axis -> infinity gives (E, S)", valid="x_j > 0, .5 <= AUC < 1, logloss > E",
        target="any", streams=True, note="v is free; a little above the measured E[p (1 - p)] is expected",
    )  # fmt: skip
