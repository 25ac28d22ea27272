"""Small configurations of every registered architecture, for tests."""

import functools
import itertools

from recscale.models import count, size_space

# Encoders whose defaults leave a backbone nothing of a small target.
_SMALL_ENCODERS = {
    "ads": dict(gen_hidden=8, width=16),
    "longer": dict(event_width=4, merge=2, inner_heads=2, head_dim=4, queries=2),
    "sequence_transformer": dict(width=16),
    "stca": dict(width=16),
}

# Settings under which a batch of one row costs what the closed forms say of every row: it cannot encode a fifth of it.
_FIXED = {"lemur": dict(encode_fraction=1.0, backward_fraction=1.0)}


@functools.cache
def small_config(name, schema, target=20_000):
    """Overrides for about `target` dense parameters: the first that `size_space` offers within 10 %, or the nearest."""
    encoder = _SMALL_ENCODERS.get(name.split("+")[0])
    fixed, found = {"encoder": encoder} if encoder else _FIXED.get(name, {}), []
    for offer in itertools.islice(size_space(name, schema, fixed, target), 500):
        offer = fixed | offer
        found.append((abs(count(name, schema, offer).dense_params / target - 1), len(found), offer))
        if found[-1][0] < 0.1:
            break
    return min(found)[2]
