"""Whether the mixers of `mixers_by_rows_others` that are behind are badly built: other shapes of as many parameters.

At 2.4e4 parameters and 2.5e5 rows, three rates of each, and one beyond where the best was the highest; seed 0, another
stream of the log. First of each name is the shape of that study, which the closed forms' preferences give: its tokens
are 13 to 24 wide, and a field of this log has 31 inputs. The others have wider tokens with fewer of everything else.
Of HiFormer also two layers, its default, since the last layer computes the task token alone; and its norms in front.

    recscale sweep mixers_by_rows_shapes --out runs/mixers_by_rows_shapes --no-report

What it says: notebooks/runs/mixers.md.
"""

from ml_collections import ConfigDict

from recscale.sweeps import Sweep, chain, rate_search
from recscale.sweeps.mixers import mixers_by_rows_others


def get_config() -> ConfigDict:
    return mixers_by_rows_others.get_config()


def get_sweep() -> Sweep:
    narrow = _hiformer(1, 13, 5, 4, 4, 68, 15)
    wide = _hiformer(1, 32, 4, 4, 8, 16, 64)
    first = _wukong(16, 10, 80), _wukong(32, 8, 46), narrow, wide, _hiformer(2, 16, 4, 4, 4, 16, 14)
    pre = [point | {"model.norm_place": "pre"} for point in (narrow, wide)]
    beyond = {6.4e-2: _tokenmixer(32, 9, 9, 4), 8e-2: _wukong(64, 4, 21)}
    points = [*first, *beyond.values(), _tokenmixer(24, 16, 24, 4), *pre]
    further = ([trial | {"training.lr": rate} for trial in rate_search([point])[:1]] for rate, point in beyond.items())
    return chain(rate_search(points), *further)


def _wukong(width: int, tokens: int, hidden: int) -> dict:
    shape = {"width": width, "fm_tokens": tokens, "linear_tokens": tokens, "rank": tokens, "hidden": hidden}
    return _point("wukong", 2e-2, layers=1, **shape)


def _hiformer(layers: int, width: int, keys: int, key_rank: int, values: int, value_rank: int, hidden: int) -> dict:
    shape = {"layers": layers, "width": width, "key_width": keys, "key_rank": key_rank, "value_width": values}
    return _point("hiformer", 1e-2, **shape, value_rank=value_rank, hidden=hidden)


def _tokenmixer(width: int, mixed: int, hidden: int, heads: int) -> dict:
    shape = {"layers": 1, "width": width, "mixed_hidden": mixed, "hidden": hidden, "heads": heads, "aux_weight": 0.0}
    return _point("tokenmixer_large", 1.6e-2, **shape)


def _point(architecture: str, rate: float, **model: float) -> dict:
    options = {f"model.{name}": value for name, value in model.items()}
    return {"architecture": architecture, **options, "training.lr": rate, "note.arm": architecture}
