"""Depth, width or tokens at equal dense parameters: does it matter where the parameters go?

RankMixer's paper says growing tokens, width or depth is equal in quality at equal size; TokenMixer-Large's says its
lead over RankMixer grows with depth, where RankMixer stalls beyond two to four blocks. Five paired seeds of

    depth   RankMixer L 1, 2, 4, 8 and TokenMixer-Large L 2, 4, 8, 16, eight tokens of width 32
    width   RankMixer D 16, 32, 64, 128, two blocks of eight tokens
    tokens  RankMixer T 2, 4, 8, two blocks of width 32

Hidden widths are solved for, everything else is as written.

    recscale sweep mixer_growth --out runs/mixer_growth

Not run yet at this size: no figure of it has been committed.
"""

from ml_collections import ConfigDict

from recscale.models import count
from recscale.models.sizing import solve_affine
from recscale.scaling.data.known_truth import make_schema, preset
from recscale.sweeps import Sweep, chain, product, seeds
from recscale.sweeps.base import known_truth, power_law

PRESET = "dense_nested"
SIZE = 2.4e5


def get_config() -> ConfigDict:
    return known_truth("rankmixer", PRESET)


def get_sweep() -> Sweep:
    shapes = [_rankmixer(tokens=8, width=32, layers=layers) for layers in (1, 2, 4, 8)]
    shapes += [_tokenmixer(layers) for layers in (2, 4, 8, 16)]
    shapes += [_rankmixer(tokens=8, width=width, layers=2) for width in (16, 64, 128)]
    shapes += [_rankmixer(tokens=tokens, width=32, layers=2) for tokens in (2, 4)]
    return product(chain(shapes), seeds(5))


def get_report() -> dict:
    return power_law("dense_params", hold_out=False)


def _rankmixer(**sizes: int) -> dict:
    return _point("rankmixer", sizes, "hidden")


def _tokenmixer(layers: int) -> dict:
    sizes = {"tokenizer": "cut", "tokens": 8, "width": 32, "layers": layers}
    # Both halves together first, then one of them, whose steps are half as large.
    even = _solved("tokenmixer_large", sizes, "hidden")
    return _point("tokenmixer_large", sizes | {"hidden": even}, "mixed_hidden")


def _point(architecture: str, sizes: dict, solve: str) -> dict:
    sizes = sizes | {solve: _solved(architecture, sizes, solve)}
    return {"architecture": architecture} | {f"model.{name}": value for name, value in sizes.items()}


def _solved(architecture: str, sizes: dict, name: str) -> int:
    """The value of a hidden width at which the parameters, affine in it, come nearest to the target."""
    schema = make_schema(preset(PRESET))
    found = solve_affine(lambda hidden: count(architecture, schema, sizes | {name: hidden}).dense_params, SIZE, 1)
    if found is None:
        raise ValueError(f"{architecture} with {sizes} has more than {SIZE:g} parameters at any {name}")
    return found
