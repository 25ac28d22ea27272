"""Forms made of power terms: power laws, additive sums, and the kappa mean of two terms with further additive
terms.

Families (search space; u = centred ln x):
    additive      y = E + sum_j A_j e^(-alpha_j u_j)
    kappa         y = E + [(A e^(-alpha u_1))^k + (B e^(-beta u_2))^k]^(1/k) + sum_j A_j e^(-alpha_j u_j)
    repeated      kappa with x_2 replaced by U (1 + R* (1 - e^(-R/R*))), R = epochs - 1     (arXiv 2305.16264)

kappa = 1 is the sum, kappa -> infinity the larger of the two terms; kappa = 1/beta is the joint form of arXiv
2001.08361 with a floor. Every form below is one of these families under affine constraints.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np

from .form import (
    ABSENT,
    DATA,
    ONE,
    SIZE,
    UNCHECKED,
    Axes,
    Family,
    Form,
    Linear,
    Parameter,
    Slot,
    coefficient,
    exponent,
    floor_parameter,
)

KAPPA = Parameter(
    "kappa",
    "shape",
    0.1,
    1e3,
    "log",
    "one",
    ("N", "D"),
    meaning="1 is a sum, infinity a bottleneck (the larger term)",
)
# Axes a sum may use when the call names none, in the order of the run table.
SUM_COLUMNS = ("dense_params", "examples", "history_length", "memory_slots")


@cache
def additive_family(terms: int, real_floor: bool = False) -> Family:
    """y = E + sum of `terms` power terms; theta = (ln E or E, ln A_1, ln alpha_1, ...)."""
    names = ["E"] + [f"{kind}{j}" for j in range(terms) for kind in ("A", "alpha")]

    def value(theta, axes, xp):
        y = theta[0] if real_floor else xp.exp(theta[0])
        for j in range(terms):
            y = y + xp.exp(theta[1 + 2 * j] - xp.exp(theta[2 + 2 * j]) * axes[:, j])
        return y

    return Family(f"additive_{terms}{'_real' if real_floor else ''}", tuple(names), value)


def kappa_mean(log_first, log_second, kappa, xp):
    """ln [(e^a)^k + (e^b)^k]^(1/k) = max(a, b) + ln(1 + e^(-k |a - b|)) / k, elementwise and stable for any
    k.
    """
    gap = xp.abs(log_first - log_second)
    return xp.maximum(log_first, log_second) + xp.log1p(xp.exp(-kappa * gap)) / kappa


@cache
def kappa_family(extra: int = 0) -> Family:
    """E + kappa mean of two power terms + `extra` power terms; theta = (E, A, alpha, B, beta, kappa, A_j,
    alpha_j, ...).
    """
    names = ["E", "A", "alpha", "B", "beta", "kappa"]
    names += [f"{kind}{j}" for j in range(extra) for kind in ("A", "alpha")]

    def value(theta, axes, xp):
        first = theta[1] - xp.exp(theta[2]) * axes[:, 0]
        second = theta[3] - xp.exp(theta[4]) * axes[:, 1]
        y = xp.exp(theta[0]) + xp.exp(kappa_mean(first, second, xp.exp(theta[5]), xp))
        for j in range(extra):
            y = y + xp.exp(theta[6 + 2 * j] - xp.exp(theta[7 + 2 * j]) * axes[:, 2 + j])
        return y

    return Family(f"kappa_{extra}", tuple(names), value)


def effective_data(log_unique, epochs, r_star, xp):
    """ln of U (1 + R* (1 - e^(-R/R*))) with R = epochs - 1: what repeated examples are worth (arXiv
    2305.16264, eq. 5).
    """
    return log_unique + xp.log1p(-r_star * xp.expm1(-(epochs - 1.0) / r_star))


@cache
def repeated_family() -> Family:
    """kappa family over (N, effective data); theta = (E, A, alpha, B, beta, kappa, R_star), axes = (ln N, ln
    U, epochs).
    """

    def value(theta, axes, xp):
        data = effective_data(axes[:, 1], axes[:, 2], xp.exp(theta[6]), xp)
        first = theta[1] - xp.exp(theta[2]) * axes[:, 0]
        second = theta[3] - xp.exp(theta[4]) * data
        return xp.exp(theta[0]) + xp.exp(kappa_mean(first, second, xp.exp(theta[5]), xp))

    return Family("repeated", ("E", "A", "alpha", "B", "beta", "kappa", "R_star"), value)


def _linear(names: list[tuple[str, str]], floor: bool, tied: bool = False) -> Linear:
    """Linear problem of E + sum A_j x_j^-alpha_j; `names` pairs each coefficient with its exponent."""

    def columns(exponents, axes):
        terms = [np.exp(-exponents[alpha] * axes[:, j]) for j, (_, alpha) in enumerate(names)]
        return ([np.ones((1, len(axes)))] if floor else []) + terms

    coefficients = (("E",) if floor else ()) + tuple(name for name, _ in names)
    exponents = (names[0][1],) if tied else tuple(alpha for _, alpha in names)
    return Linear(exponents, coefficients, columns, (False,) * len(coefficients))


def _additive_embed(names: list[tuple[str, str]], floor: bool) -> dict:
    """Own parameter names onto the additive family's E, A0, alpha0, A1, ..."""
    embed = {} if floor else {"E": ({}, ABSENT)}
    for j, (name, alpha) in enumerate(names):
        embed[f"A{j}"] = ({name: 1.0}, 0.0)
        embed[f"alpha{j}"] = ({alpha: 1.0}, 0.0)
    return embed


@cache
def power(axes: Axes = None) -> Form:
    """y = A x^-alpha. For relative losses in percent fit y/100 + 1, which is loss / baseline."""
    names = [("A", "alpha")]
    return Form(
        "power",
        ("P0",),
        "y = A x^-alpha",
        "power law",
        (ONE,),
        (coefficient("A", "x", "alpha"), exponent("alpha", "x")),
        additive_family(1),
        _linear(names, False),
        embed=_additive_embed(names, False),
        nested_in=("power_offset",),
        limits="x -> infinity gives 0",
        min_distinct=5,
    )


@cache
def power_offset(axes: Axes = None, real_floor: bool = False) -> Form:
    """y = E + A x^-alpha, the default on one axis."""
    names = [("A", "alpha")]
    floor = floor_parameter("E", "real" if real_floor else "log")
    return Form(
        "power_offset",
        ("P1",),
        "y = E + A x^-alpha",
        "power law with offset",
        (ONE,),
        (floor, coefficient("A", "x", "alpha"), exponent("alpha", "x")),
        additive_family(1, real_floor),
        _linear(names, True),
        embed=_additive_embed(names, True),
        floor="E",
        nested_in=("bnsl", "m4"),
        limits="x -> infinity gives E; alpha -> 0 with A -> infinity is log_linear",
        valid="x > 0, y > E",
        target="any" if real_floor else "positive",
        signed=None if real_floor else lambda: power_offset(real_floor=True),
    )


def _two_axis_parameters(tied: bool, floor: bool, kappa: bool) -> tuple[Parameter, ...]:
    """E, A, alpha, B, beta, kappa as a form needs them; tied exponents drop beta."""
    beta = "alpha" if tied else "beta"
    alpha_slots = ("N", "D") if tied else ("N",)
    kept = [floor_parameter()] if floor else []
    kept += [coefficient("A", "N", "alpha"), exponent("alpha", *alpha_slots), coefficient("B", "D", beta)]
    return tuple(kept + ([] if tied else [exponent("beta", "D")]) + ([KAPPA] if kappa else []))


def _kappa_embed(tied: bool, floor: bool, kappa: str) -> dict:
    """Constraints of the kappa family: no floor, tied exponents, kappa = 1/beta ("kaplan") or kappa = 1
    ("sum").
    """
    embed = {} if floor else {"E": ({}, ABSENT)}
    if tied:
        embed["beta"] = ({"alpha": 1.0}, 0.0)
    if kappa == "kaplan":
        embed["kappa"] = ({"beta": -1.0}, 0.0)
    elif kappa == "sum":
        embed["kappa"] = ({}, 0.0)
    return embed


def _two_axis(
    id: str,
    aliases: tuple[str, ...],
    equation: str,
    source: str,
    shape: str,
    nested_in: tuple[str, ...],
    limits: str,
    tied: bool = False,
    floor: bool = True,
) -> Form:
    """A form of N and D; shape: how the two terms are joined, "sum", "kaplan" (kappa = 1/beta) or "free" (kappa)."""
    beta = "alpha" if tied else "beta"
    names = [("A", "alpha"), ("B", beta)]
    return Form(
        id,
        aliases,
        equation,
        source,
        (SIZE, DATA),
        _two_axis_parameters(tied, floor, shape == "free"),
        additive_family(2) if shape == "sum" else kappa_family(),
        _linear(names, floor, tied),
        extra_starts={"kappa": (1.0, 4.0)} if shape == "free" else {},
        embed=_additive_embed(names, floor) if shape == "sum" else _kappa_embed(tied, floor, shape),
        floor="E" if floor else None,
        split=("alpha", beta),
        nested_in=nested_in,
        limits=limits,
        valid=f"N > 0, D > 0, y > {'E' if floor else '0'}{', kappa > 0' if shape == 'free' else ''}",
    )


_CHINCHILLA = ("arXiv 2203.15556, approach 3", "sum")
_KAPLAN = ("arXiv 2001.08361, eq. 1.5", "kaplan")
_KAPPA = ("power mean of the two terms", "free")
_OWN_AXES = "N, D -> infinity gives E; each term is a power law of its own axis"
_BETWEEN = "kappa = 1 is chinchilla, kappa = 1/beta is kaplan_offset, kappa -> infinity the larger term"


@cache
def chinchilla(axes: Axes = None) -> Form:
    """y = E + A N^-alpha + B D^-beta."""
    equation = "y = E + A N^-alpha + B D^-beta"
    return _two_axis("chinchilla", ("C",), equation, *_CHINCHILLA, ("kappa", "repeated_data"), _OWN_AXES)


@cache
def chinchilla_tied(axes: Axes = None) -> Form:
    """y = E + A N^-alpha + B D^-alpha."""
    equation, nested = "y = E + A N^-alpha + B D^-alpha", ("kappa_tied", "chinchilla", "kappa")
    return _two_axis("chinchilla_tied", ("C=",), equation, *_CHINCHILLA, nested, _OWN_AXES, tied=True)


@cache
def kaplan(axes: Axes = None) -> Form:
    """y = [(A N^-alpha)^(1/beta) + (B D^-beta)^(1/beta)]^beta: the kappa form at kappa = 1/beta without a floor."""
    equation, limits = "y = [(A N^-alpha)^(1/beta) + (B D^-beta)^(1/beta)]^beta", "N, D -> infinity gives 0"
    return _two_axis("kaplan", ("K",), equation, *_KAPLAN, ("kaplan_offset",), limits, floor=False)


@cache
def kaplan_offset(axes: Axes = None) -> Form:
    """y = E + [(A N^-alpha)^(1/beta) + (B D^-beta)^(1/beta)]^beta: the kappa form at kappa = 1/beta."""
    equation, limits = "y = E + [(A N^-alpha)^(1/beta) + (B D^-beta)^(1/beta)]^beta", "N, D -> infinity gives E"
    return _two_axis("kaplan_offset", ("K+E",), equation, *_KAPLAN, ("kappa",), limits)


@cache
def kappa(axes: Axes = None) -> Form:
    """y = E + [(A N^-alpha)^kappa + (B D^-beta)^kappa]^(1/kappa)."""
    equation = "y = E + [(A N^-alpha)^kappa + (B D^-beta)^kappa]^(1/kappa)"
    return _two_axis("kappa", (), equation, *_KAPPA, ("kappa_sum", "repeated_data"), _BETWEEN)


@cache
def kappa_tied(axes: Axes = None) -> Form:
    """y = E + [(A N^-alpha)^kappa + (B D^-alpha)^kappa]^(1/kappa)."""
    equation = "y = E + [(A N^-alpha)^kappa + (B D^-alpha)^kappa]^(1/kappa)"
    nested = ("kappa", "kappa_sum", "repeated_data")
    return _two_axis("kappa_tied", ("kappa=",), equation, *_KAPPA, nested, _BETWEEN, tied=True)


@cache
def gamma(axes: Axes = None) -> Form:
    """y = E + (A N^-alpha + B D^-beta)^gamma: the kappa form in other letters, gamma = 1/kappa, alpha and beta times
    kappa. Centred, A and B are contributions to the target.
    """

    def raw(centred, log_centre):
        power = 1.0 / np.asarray(centred["gamma"])
        terms = {
            name: np.asarray(centred[name]) ** power * np.exp(np.asarray(centred[alpha]) * log_centre[slot])
            for name, alpha, slot in (("A", "alpha", "N"), ("B", "beta", "D"))
        }
        return {**centred, **terms}

    a, b = (
        Parameter(name, "coefficient", 1e-12, 1e6, "log", "target", (slot,), unit=f"target^(1/gamma) * {slot}^{alpha}",
                  meaning=f"contribution of {slot}; centred: in the target's unit, at the geometric mean")
        for name, slot, alpha in (("A", "N", "alpha"), ("B", "D", "beta"))
    )  # fmt: skip
    shape = Parameter("gamma", "shape", 1e-3, 10.0, "log", "one", ("N", "D"), meaning="1 is a sum, 0 a bottleneck")
    return Form(
        "gamma",
        (),
        "y = E + (A N^-alpha + B D^-beta)^gamma",
        "arXiv 2510.02228 (xLSTM)",
        (SIZE, DATA),
        (floor_parameter(), a, exponent("alpha", "N"), b, exponent("beta", "D"), shape),
        kappa_family(),
        _linear([("A", "alpha"), ("B", "beta")], True),
        extra_starts={"gamma": (1.0, 0.5)},
        embed={
            "alpha": ({"alpha": 1.0, "gamma": 1.0}, 0.0),
            "beta": ({"beta": 1.0, "gamma": 1.0}, 0.0),
            "kappa": ({"gamma": -1.0}, 0.0),
        },
        floor="E",
        split=("alpha", "beta"),
        raw=raw,
        nested_in=("kappa", "kappa_sum", "repeated_data"),
        limits="gamma = 1 is chinchilla; N, D -> infinity gives E",
        valid="N > 0, D > 0, y > E, gamma > 0",
        note=UNCHECKED,
    )


@cache
def sum_form(axes: Axes = None) -> Form:
    """y = E + sum_j A_j x_j^-alpha_j over any axes; parameters are E, A_<axis>, alpha_<axis>."""
    slots = axes or ("dense_params", "examples")
    names = [(f"A_{slot}", f"alpha_{slot}") for slot in slots]
    parameters = [floor_parameter()]
    for slot, (name, alpha) in zip(slots, names, strict=True):
        parameters += [coefficient(name, slot, alpha), exponent(alpha, slot)]
    return Form(
        "sum",
        ("SUM",),
        "y = E + sum_j A_j x_j^-alpha_j",
        "sum of independent resources",
        tuple(Slot(slot, slot) for slot in slots),
        tuple(parameters),
        additive_family(len(slots)),
        _linear(names, True),
        embed=_additive_embed(names, True),
        floor="E",
        limits="every axis -> infinity gives E",
        valid="x_j > 0, y > E",
        note="dense_params and train_flops enter together only if their logs correlate below .9",
    )


@cache
def kappa_sum(axes: Axes = None) -> Form:
    """y = E + kappa(N, D) + sum over further axes: size and data are a bottleneck, the rest add."""
    extra = tuple(slot for slot in axes or SUM_COLUMNS[2:] if slot not in ("N", "D", "x1", "x2"))
    pairs = [("A", "alpha"), ("B", "beta")] + [(f"A_{slot}", f"alpha_{slot}") for slot in extra]
    parameters = list(_two_axis_parameters(False, True, True))
    embed = {}
    for j, slot in enumerate(extra):
        name, alpha = pairs[2 + j]
        parameters += [coefficient(name, slot, alpha), exponent(alpha, slot)]
        embed[f"A{j}"], embed[f"alpha{j}"] = ({name: 1.0}, 0.0), ({alpha: 1.0}, 0.0)
    return Form(
        "kappa_sum",
        ("KSUM",),
        "y = E + [(A N^-alpha)^kappa + (B D^-beta)^kappa]^(1/kappa) + sum_j A_j x_j^-alpha_j",
        "bottleneck of capacity and data plus independent resources",
        (SIZE, DATA, *(Slot(slot, slot) for slot in extra)),
        tuple(parameters),
        kappa_family(len(extra)),
        _linear(pairs, True),
        extra_starts={"kappa": (1.0, 4.0)},
        embed=embed,
        floor="E",
        split=("alpha", "beta"),
        limits="every axis -> infinity gives E",
        valid="x_j > 0, y > E, kappa > 0",
    )


@cache
def repeated_data(axes: Axes = None, base: str = "chinchilla") -> Form:
    """A two-axis form with D replaced by U (1 + R* (1 - e^(-R/R*))), R = epochs - 1 (arXiv 2305.16264)."""
    constraints = {
        "chinchilla": (False, "sum"),
        "chinchilla_tied": (True, "sum"),
        "kappa": (False, "free"),
        "kappa_tied": (True, "free"),
        "kaplan_offset": (False, "kaplan"),
    }
    if base not in constraints:
        raise ValueError(
            f"repeated_data: base {base!r} is not a two-axis form with a floor; one of {', '.join(constraints)}"
        )
    tied, shape = constraints[base]
    beta = "alpha" if tied else "beta"
    slots = (
        SIZE,
        Slot("U", "unique_examples", "unique examples", ("D",)),
        Slot("epochs", "epochs", "epochs", (), "linear"),
    )
    parameters = [_onto_unique(p) for p in _two_axis_parameters(tied, True, shape == "free")]
    meaning = "repetitions after which data is spent"
    parameters.append(Parameter("R_star", "shape", 1e-3, 1e4, slots=("epochs",), unit="epochs", meaning=meaning))

    def columns(exponents, axes):
        data = effective_data(axes[:, 1], axes[:, 2], exponents["R_star"], np)
        return [
            np.ones((1, len(axes))),
            np.exp(-exponents["alpha"] * axes[:, 0]),
            np.exp(-exponents[beta] * data),
        ]

    grid = {"R_star": (1.0, 10.0)}
    free = ("alpha",) if tied else ("alpha", "beta")
    linear = Linear((*free, "R_star"), ("E", "A", "B"), columns, (False,) * 3, grid=grid)
    return Form(
        "repeated_data",
        ("RC",),
        f"{base} with D = U (1 + R* (1 - e^(-R/R*))), R = epochs - 1",
        "arXiv 2305.16264",
        slots,
        tuple(parameters),
        repeated_family(),
        linear,
        extra_starts={"kappa": (1.0, 4.0)} if shape == "free" else {},
        embed=_kappa_embed(tied, True, shape),
        floor="E",
        split=("alpha", beta),
        limits="epochs = 1 is the base form",
        valid="N > 0, U > 0, epochs >= 1, y > E",
        note="R* near 0 is expected for embedding tables; " + UNCHECKED,
    )


def _onto_unique(parameter: Parameter) -> Parameter:
    """The parameter with its data axis D renamed to U, the unique examples."""
    slots = tuple("U" if slot == "D" else slot for slot in parameter.slots)
    powers = tuple(("U" if slot == "D" else slot, alpha, sign) for slot, alpha, sign in parameter.powers)
    return replace(parameter, slots=slots, powers=powers, unit=parameter.unit.replace(" D^", " U^"))
