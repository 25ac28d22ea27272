"""What a form is: axes, parameters with units and ranges, a value function, and its linear part.

A form predicts the metric y from axes x. Every axis enters as its centred logarithm u = ln x - mean(ln x)
over the fitted rows, so coefficients are contributions at the geometric-mean x; `uncentre` turns them into
raw ones. Positive quantities are searched as logarithms.

Legend: n rows, d axes, p parameters of a form, P parameters of its family, g grid points, k linear terms.

Several forms are one *family* under affine constraints in search space: theta = T phi + c. Chinchilla with
alpha = beta, the power law without a floor and the sum over two axes all run one compiled program; Kaplan's
form with a floor is the kappa form with ln kappa = -ln beta.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float

# What the note of a form says when its equation has been taken from a summary of the paper, not the paper.
UNCHECKED = "equation not yet checked against the paper: do so before citing it"
# exp(ABSENT) is exactly 0 in float64: how an affine constraint removes a positive term.
ABSENT = -1e3

# Search interval of an exponent. Far wider than the starting grid: printed ranking laws have exponents below
# 1e-3, and a degenerate table must be able to run to a large one, where the gates catch it.
EXPONENT_RANGE = (1e-6, 20.0)
EXPONENT_GRID = tuple(np.geomspace(0.03, 2.5, 16))
SOBOL_SEED = 20240229  # starts are part of the method: the same for every table and every run

# Names of a form's axes in a call, in order; None where the call names none.
Axes = tuple[str, ...] | None


def sobol(dims: int, log2_count: int) -> np.ndarray:
    """Scrambled Sobol points [2^log2_count, dims] in the unit cube, the same every time."""
    from scipy.stats import qmc  # takes half a second to import, and most forms need none

    return qmc.Sobol(dims, scramble=True, rng=SOBOL_SEED).random_base2(log2_count)


@dataclass(frozen=True)
class Slot:
    """One axis of a form: its name in calls, the run-table column it reads by default, and how it enters.

    transform: "log" for a centred logarithm, "linear" for the value itself (epochs).
    """

    name: str
    column: str
    unit: str = ""
    aliases: tuple[str, ...] = ()
    transform: str = "log"
    valid: str = "x > 0"


# The axes most forms share: the only one, a size, an amount of data.
ONE = Slot("x", "dense_params", "parameters", ("N", "x1"))
SIZE = Slot("N", "dense_params", "parameters", ("x1", "x"))
DATA = Slot("D", "examples", "examples", ("x2",))


@dataclass(frozen=True)
class Parameter:
    """One free parameter: its role, how it is searched, its search interval, unit and the axes it belongs to.

    role: floor | ceiling | coefficient | exponent | shape | location | level | slope.
    scale: what `low` and `high` multiply: "one", "target" (the median metric), or "axis:<slot>" (the
    interval of the centred axis).
    powers: (slot, exponent parameter, sign) triples; raw coefficient = centred * prod x0^(sign * exponent).
    """

    name: str
    role: str
    low: float
    high: float
    searched: str = "log"
    scale: str = "one"
    slots: tuple[str, ...] = ()
    powers: tuple[tuple[str, str, float], ...] = ()
    unit: str = "1"
    meaning: str = ""


@dataclass(frozen=True)
class Family:
    """A value function over search-space parameters: value(theta[P], axes[n, d], xp) -> y[n].

    xp is numpy or jax.numpy; the function must work under both. Families of one id, with the same names and a function
    written at the same place, share a compiled program: a constant that the function holds belongs in the id.
    """

    id: str
    names: tuple[str, ...]
    value: Callable = field(compare=False)
    written_at: str = field(init=False, repr=False)

    def __post_init__(self):
        place = f"{self.value.__module__}.{self.value.__qualname__}"
        object.__setattr__(self, "written_at", place)


@dataclass(frozen=True)
class Linear:
    """The part solved exactly once the exponents are fixed (variable projection).

    columns(exponents, axes): exponents maps a name to [g, 1]; returns k arrays that broadcast to [g, n].
    signed: which coefficients may be negative. of: "target" or "log" (the form is linear in ln y).
    grid: values of exponents that need their own; sampler(axes) -> {exponent: [g]} replaces the grid.
    known: what a coefficient that was fixed contributes to y.
    """

    exponents: tuple[str, ...]
    coefficients: tuple[str, ...]
    columns: Callable
    signed: tuple[bool, ...] = ()
    of: str = "target"
    grid: Mapping[str, Sequence[float]] = field(default_factory=dict)
    sampler: Callable | None = None
    known: float = 0.0


@dataclass(frozen=True)
class Form:
    """A scaling law: see the module docstring. Use `recscale.scaling.laws.forms.get(id)` to obtain one.

    embed: family parameter -> ({own parameter: weight}, constant) in search space; absent names map to
    themselves.
    starts, if set, replaces the grid: starts(axes[n, d], y[n], generator) -> {name: [s]} natural, centred.
    start_count: how many grid points are refined.
    extra_starts: values tried for parameters that are not part of the linear problem.
    streams: rows carry a last axis that tells logloss (0) from t (1).
    signed: the same form for metrics that may be 0 or negative, where there is one.
    target: "positive" (log residuals), "any", "auc" (t = 2 Phi^-1(AUC)^2), "log_target" (linear in ln y).
    depends: parameter -> those it means nothing without; where a form declares none, see `belongs_to`.
    held: natural values of parameters that are fixed, see `holding`.
    raw(centred, log_centre) replaces the general rule of `uncentre`.
    """

    id: str
    aliases: tuple[str, ...]
    equation: str
    source: str
    slots: tuple[Slot, ...]
    parameters: tuple[Parameter, ...]
    family: Family
    linear: Linear | None = None
    starts: Callable | None = None
    extra_starts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    embed: Mapping[str, tuple[Mapping[str, float], float]] = field(default_factory=dict)
    floor: str | None = None
    nested_in: tuple[str, ...] = ()
    limits: str = ""
    valid: str = "x > 0, y > 0"
    target: str = "positive"
    split: tuple[str, str] | None = None
    raw: Callable | None = None
    min_distinct: int = 5
    start_count: int = 8
    streams: bool = False
    note: str = ""
    signed: Callable[[], Form] | None = None
    depends: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    held: Mapping[str, float] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the free parameters, in order."""
        return tuple(parameter.name for parameter in self.parameters)

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axis slots, in order."""
        return tuple(slot.name for slot in self.slots)

    @property
    def units(self) -> dict[str, str]:
        """Unit of every raw parameter, in words of the target and the axes."""
        return {parameter.name: parameter.unit for parameter in self.parameters}

    def __getitem__(self, name: str) -> Parameter:
        for parameter in self.parameters:
            if parameter.name == name:
                return parameter
        raise KeyError(f"form {self.id} has no parameter {name!r}; it has {', '.join(self.names)}")

    def affine(self) -> tuple[np.ndarray, np.ndarray]:
        """T[P, P] and c[P] of theta = T phi + c; phi holds the free parameters first, unused columns are
        zero.
        """
        size = len(self.family.names)
        matrix, constant = np.zeros((size, size)), np.zeros(size)
        for row, name in enumerate(self.family.names):
            weights, constant[row] = self.embed.get(name, ({name: 1.0}, 0.0))
            for own, weight in weights.items():
                matrix[row, self.names.index(own)] = weight
        return matrix, constant

    def to_search(self, natural: Mapping[str, np.ndarray]) -> np.ndarray:
        """Stack natural centred parameters (name -> [...]) into search space [..., p]; zeros of logs become
        tiny.
        """
        rows = []
        for parameter in self.parameters:
            values = np.asarray(natural[parameter.name], float)
            rows.append(np.log(np.maximum(values, 1e-300)) if parameter.searched == "log" else values)
        return np.stack(np.broadcast_arrays(*rows), axis=-1)

    def to_natural(self, phi: np.ndarray) -> dict[str, np.ndarray]:
        """Centred natural parameters (name -> [...]) from search space phi[..., >= p]."""
        phi = np.asarray(phi, float)
        return {
            parameter.name: np.exp(phi[..., i]) if parameter.searched == "log" else phi[..., i]
            for i, parameter in enumerate(self.parameters)
        }

    def uncentre(self, centred: Mapping[str, np.ndarray], log_centre: Mapping[str, float]) -> dict[str, np.ndarray]:
        """Raw parameters from centred ones: A = A' * prod x0^(sign * exponent); locations times x0."""
        known = {**self.held, **centred}
        if self.raw is not None:
            return self.raw(known, log_centre)
        raw = {}
        for parameter in self.parameters:
            value = np.asarray(centred[parameter.name], float)
            if parameter.role == "location":
                value = value * np.exp(log_centre[parameter.slots[0]])
            for slot, exponent, sign in parameter.powers:
                value = value * np.exp(sign * np.asarray(known[exponent]) * log_centre[slot])
            raw[parameter.name] = value
        return raw

    def value(self, phi: Float[np.ndarray, " p"], axes: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
        """y[n] for one search-space vector phi[>= p] at centred axes[n, d], NumPy float64."""
        matrix, constant = self.affine()
        full = np.zeros(len(self.family.names))
        full[: len(self.names)] = np.asarray(phi, float)[: len(self.names)]
        return np.asarray(self.family.value(matrix @ full + constant, np.asarray(axes, float), np))

    def bounds(
        self, axes: Float[np.ndarray, "n d"], target_scale: float
    ) -> tuple[Float[np.ndarray, " p"], Float[np.ndarray, " p"]]:
        """Search-space bounds (low[p], high[p]) for a table with centred axes[n, d] and metric of size
        target_scale.
        """
        low, high = [], []
        for parameter in self.parameters:
            edges = np.array([parameter.low, parameter.high], float)
            if parameter.scale == "target":
                edges = edges * target_scale
            elif parameter.scale.startswith("axis:"):
                column = axes[:, self.axes.index(parameter.scale.removeprefix("axis:"))]
                edges = edges * np.exp([column.min(), column.max()])
            edges = np.log(edges) if parameter.searched == "log" else edges
            low.append(edges[0])
            high.append(edges[1])
        return np.array(low), np.array(high)

    @property
    def floor_at(self) -> int:
        """Place of the floor among the parameters. Raises ValueError for a form without one."""
        if self.floor is None:
            raise ValueError(f"form {self.id} has no floor")
        return self.names.index(self.floor)

    def belongs_to(self, name: str) -> tuple[str, ...]:
        """Parameters without which this one cannot be read: what `depends` says, else the floor (and the ceiling) for
        whatever describes the part above it, and its exponents for a coefficient.
        """
        if name in self.depends:
            return self.depends[name]
        parameter = self[name]
        if parameter.role in ("floor", "ceiling", "level", "slope"):
            return ()
        edges = tuple(other.name for other in self.parameters if other.role in ("floor", "ceiling"))
        return edges + tuple(power for _, power, _ in parameter.powers if power in self.names)

    def touched_by(self, refused: set[str]) -> set[str]:
        """The refused parameters and everything that, directly or not, belongs to one of them."""
        found = set(refused)
        while more := {name for name in self.names if name not in found and found & set(self.belongs_to(name))}:
            found |= more
        return found

    def without_floor(self) -> Form:
        """The same form with its floor fixed at 0: the rival of the `floor` gate."""
        return replace(self.holding({self.names[self.floor_at]: 0.0}), id=self.id + "_no_floor")

    def holding(self, values: Mapping[str, float]) -> Form:
        """The same form with parameters fixed at natural values: floors, exponents and shapes at any, 0 included.

        Coefficients are searched at the centre of the rows, which a caller's raw value is not. Raises ValueError for
        one of those, for an unknown parameter and for a value that the parameter cannot take.
        """
        embed, linear = dict(self.embed), self.linear
        for name, value in values.items():
            constant = self._held(name, value)
            for place in self.family.names:
                weights, shift = embed.get(place, ({place: 1.0}, 0.0))
                if name in weights:
                    rest = {own: weight for own, weight in weights.items() if own != name}
                    embed[place] = (rest, shift + weights[name] * constant)
            linear = linear and _without(linear, name, value)
        kept = tuple(parameter for parameter in self.parameters if parameter.name not in values)
        split = None if self.split is None or set(self.split) & set(values) else self.split
        floor = None if self.floor in values else self.floor
        extra = {name: tried for name, tried in self.extra_starts.items() if name not in values}
        return replace(
            self, parameters=kept, embed=embed, linear=linear, floor=floor, split=split, extra_starts=extra,
            starts=_starts_without(self.starts, tuple(values)), held={**self.held, **values},
        )  # fmt: skip

    def _held(self, name: str, value: float) -> float:
        """A natural value in search space."""
        if name not in self.names:
            raise ValueError(f"form {self.id} has no parameter {name!r} to fix; it has {', '.join(self.names)}")
        parameter = self[name]
        if parameter.role in ("coefficient", "location", "level"):
            raise ValueError(f"{name} of {self.id} is a {parameter.role}: fix floors, exponents and shapes instead")
        if not np.isfinite(value) or (parameter.searched == "log" and value < 0):
            raise ValueError(f"{name} of {self.id} cannot be fixed at {value:g}")
        if parameter.searched != "log":
            return float(value)
        return float(np.log(value)) if value > 0 else ABSENT

    def for_any_metric(self) -> Form:
        """The form for metrics that may be 0 or negative: its floor is searched as a real number on plain residuals.

        Raises ValueError for a form that is only defined on positive metrics.
        """
        if self.signed is not None:
            return self.signed()
        if self.target in ("any", "auc") or self.floor is None:
            return self
        raise ValueError(f"form {self.id} needs a positive metric; power_offset and log_linear take any")


def _without(linear: Linear, name: str, value: float) -> Linear:
    """The linear problem with one of its coefficients or exponents known."""
    full = linear.columns
    if name in linear.exponents:

        def known(exponents: dict, axes: np.ndarray) -> list[np.ndarray]:
            return full({**exponents, name: np.array([[value]])}, axes)

        return replace(linear, exponents=tuple(own for own in linear.exponents if own != name), columns=known)
    if name not in linear.coefficients:
        return linear
    at = linear.coefficients.index(name)

    def columns(exponents: dict, axes: np.ndarray) -> list[np.ndarray]:
        kept = full(exponents, axes)
        return kept[:at] + kept[at + 1 :]

    signed = linear.signed[:at] + linear.signed[at + 1 :]
    names = linear.coefficients[:at] + linear.coefficients[at + 1 :]
    return replace(linear, coefficients=names, columns=columns, signed=signed, known=value)


def _starts_without(starts: Callable | None, names: tuple[str, ...]) -> Callable | None:
    """The form's own starts without the parameters that are known."""
    if starts is None:
        return None
    return lambda *table: {name: value for name, value in starts(*table).items() if name not in names}


def floor_parameter(name: str = "E", searched: str = "log") -> Parameter:
    """E, the metric with every axis unlimited. Positive metrics search ln E; others E itself."""
    low, high = (1e-9, 2.0) if searched == "log" else (-1e6, 1e6)
    return Parameter(
        name,
        "floor",
        low,
        high,
        searched,
        "target",
        unit="target",
        meaning="metric with every axis unlimited",
    )


def coefficient(
    name: str, slot: str, exponent: str, *further: tuple[str, str], sign: float = 1.0, meaning: str = ""
) -> Parameter:
    """A positive coefficient A of A x^-alpha, or of a product of powers: `further` pairs of slot and exponent."""
    pairs = ((slot, exponent), *further)
    unit = "".join(f" {'*' if sign > 0 else '/'} {axis}^{power}" for axis, power in pairs)
    return Parameter(
        name,
        "coefficient",
        1e-12,
        1e6,
        "log",
        "target",
        tuple(axis for axis, _ in pairs),
        tuple((axis, power, sign) for axis, power in pairs),
        "target" + unit,
        meaning or f"contribution of {slot}; centred: at the geometric mean of the fitted rows",
    )


def exponent(name: str, *slots: str) -> Parameter:
    """A positive exponent."""
    return Parameter(name, "exponent", *EXPONENT_RANGE, "log", "one", slots, meaning=f"exponent of {', '.join(slots)}")
