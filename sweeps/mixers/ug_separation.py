"""UG-Sep (arXiv 2602.10455): what cutting candidates from users costs, by the user's share of tokens, at equal size.

Twelve tokens, 4, 6 or 9 of them the user's (U:G of 1:2, 1:1 and 3:1). Beside each pair of separated models, with and
without compensation, stand the unseparated backbone with the same tokens and the control in which neither side sees
the other before the mean over tokens (two towers). Published on private data, in AUC points x 100:

    separation     base ~ 1:2 ~ 1:1 > 3:1                     +.002 -.004 -.013
    compensation   helps where the user is heavy              without .00 -.01 -.06 at 1:2 1:1 3:1, with -.02 at 3:1
    two towers     much worse (implied by the argument, not published)

Five paired seeds, dense parameters held equal by the hidden width, so that what UG-Sep drops of TokenMixer-Large's
matrices is given back. The log's 8 fields are cut into tokens of equal width, which may split a field.

    recscale sweep ug_separation --out runs/ug_separation

Not run yet at this size: no figure of it has been committed.
"""

from ml_collections import ConfigDict

from recscale.sweeps import Sweep, architectures, axis, by_dense_params, chain, product, seeds
from recscale.sweeps.base import known_truth, power_law

SIZE = 6e4
TOKENS, USER_TOKENS = 12, (4, 6, 9)

# The width is a multiple of the tokens; only the hidden width follows the size.
_TOKENIZER = {"model.tokenizer": "cut", "model.cut_align": "exact", "model.tokens": TOKENS}
_RANKMIXER = _TOKENIZER | {"model.layers": 2}
_TOKENMIXER = _TOKENIZER | {"model.layers": 4, "model.global_token": False}


def get_config() -> ConfigDict:
    return known_truth("rankmixer", "dense_nested")


def get_sweep() -> Sweep:
    families = chain(_family("rankmixer", _RANKMIXER), _family("tokenmixer_large", _TOKENMIXER))
    return product(by_dense_params([SIZE]), families, axis("model.user_tokens", USER_TOKENS), seeds(5))


def _family(backbone: str, fixed: dict) -> Sweep:
    separated = chain(
        axis("model.compensation", ["none", "per_token"]),
        [{"model.compensation": "none", "model.user_to_candidate": False}],
    )
    models = chain(architectures([backbone]), product(architectures([f"ug_{backbone}"]), separated))
    return product(models, [fixed])


def get_report() -> dict:
    return power_law("dense_params", hold_out=False)
