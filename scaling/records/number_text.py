"""Numbers as a reader sees them: the digits that the uncertainty deserves, and a unit."""

from __future__ import annotations

import math

_SUFFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def amount(value: float, digits: int = 3) -> str:
    """A size or count to three digits: 1.72k, 269k, 1.28M; from 1e15 on 2.56e19."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1e15:
        mantissa, power = f"{value:.{digits - 1}e}".split("e")
        return f"{float(mantissa):.{digits}g}e{int(power)}"
    for scale, suffix in _SUFFIXES:
        if abs(value) >= scale:
            return f"{value / scale:.{digits}g}{suffix}"
    return f"{value:.{digits}g}"


def decimals(uncertainty: float, least: int = 0, most: int = 7) -> int:
    """Decimal places that show two digits of an uncertainty (a half-width or a difference)."""
    if not math.isfinite(uncertainty) or uncertainty <= 0:
        return 4
    return min(max(1 - math.floor(math.log10(uncertainty)), least), most)


def value_text(value: float, interval: tuple[float, float] | None = None) -> str:
    """`0.4213 [0.4180, 0.4240]`, with two digits of the interval's half-width; four digits of the value without one."""
    if not math.isfinite(value):
        return "not finite"
    if interval is None or not all(math.isfinite(end) for end in interval):
        return f"{value:.4g}"
    half = 0.5 * (interval[1] - interval[0])
    if abs(value) >= 1e5 or (value != 0 and abs(value) < 1e-4):
        return f"{value:.3g} [{interval[0]:.3g}, {interval[1]:.3g}]"
    places = decimals(half)
    return f"{value:.{places}f} [{interval[0]:.{places}f}, {interval[1]:.{places}f}]"


def byte_text(value: float | None) -> str:
    """A number of bytes: three significant digits with a binary unit, "-" for None."""
    if value is None:
        return "-"
    power = min(int(math.log2(value)) // 10, 4) if value >= 1 else 0
    return f"{value / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
