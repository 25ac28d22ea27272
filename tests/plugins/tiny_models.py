"""A tiny model of every registered architecture: sizes, a schema with everything in it, inputs with padding."""

import functools
import zlib

import jax.numpy as jnp
import numpy as np
from flax import nnx

from recscale.models import build, freeze_config
from recscale.models.inputs import Content, Field, Schema, Sequence, Task
from recscale.models.inputs.examples import random_inputs
from recscale.models.inputs.tables import Table

R, C = 4, 3

CLICKS = dict(sequence="clicks")  # of the two histories
SMALL = dict(tokens=4, width=8, hidden=6, layers=2)
MEMORY = dict(memory_slots=16, memory_topk=3, key_width=4)
SIZES = {
    "rankmixer": SMALL,
    "ug_rankmixer": SMALL | dict(user_tokens=2),
    "tokenmixer_large": SMALL | dict(tokens=6, width=12),
    "ug_tokenmixer_large": SMALL | dict(tokens=6, width=12, user_tokens=2),
    "dlrm_mlp": dict(widths=(6, 5)),
    "dcnv2": dict(widths=(6,), cross_layers=2),
    "wukong": dict(width=6, fm_tokens=3, linear_tokens=2, rank=3, hidden=5),
    "hiformer": dict(width=6, heads=2, key_width=3, value_width=4, key_rank=5, value_rank=7, hidden=6),
    "autoint": dict(width=4, attention=6, layers=2),
    "dhen_lite": dict(width=4, rank=3, projections=2),
    "pkm": SMALL | MEMORY | dict(memory_heads=2),
    "memory_plus": SMALL | MEMORY | dict(memory_heads=2, layers=3),
    "msn": SMALL | MEMORY,
    "mmoe": dict(experts=3, hidden=6, expert_width=4, tower=(5,)),
    "mdl": SMALL,
    "domain_heads": SMALL | dict(experts=2, expert_width=5),
    "lemur": CLICKS | SMALL | dict(tokens=8, content_width=8, encoder_heads=2, query_layers=1, document_layers=1),
    "hyformer": dict(tokens=6, width=12, hidden=6, query_hidden=5, seq_hidden=7, keep=3, head_dim=4),
    "mixformer": CLICKS | dict(tokens=4, width=4, hidden=6),
    "ui_mixformer": CLICKS | dict(tokens=4, width=4, hidden=6),
    "longer": CLICKS | dict(event_width=4, merge=2, inner_heads=2, head_dim=4, queries=2),
    "ads": CLICKS | dict(width=8, gen_hidden=4, hidden=(6, 5)),
    "sum_pooling": CLICKS,
    "din": CLICKS | dict(hidden=(6, 5)),
    "target_attention": CLICKS | dict(width=8),
    "sequence_transformer": CLICKS | dict(width=8),
    "sasrec": CLICKS | dict(width=8),
    "hstu": CLICKS | dict(width=8, time_buckets=8),
    "twin_lite": CLICKS | dict(width=8, heads=2, selected=3),
    "stca": CLICKS | dict(width=8),
    "lmn": CLICKS | MEMORY | dict(widths=(6,), din_hidden=(5, 4)),
    "onetrans_lite": CLICKS | dict(tokens=4, width=8),
}


def config_type(name):
    """The dataclass of the flags that `SIZES` changes: of a sequence encoder its own."""
    config = freeze_config(name)
    return type(config[0] if isinstance(config, tuple) else config)


def config_of(name, changed=None):
    """The tiny configuration with some flags changed, those of the encoder where there is one."""
    first, _, backbone = name.partition("+")
    config = SIZES[first] | (changed or {})
    if isinstance(freeze_config(name), tuple):
        return dict(encoder=config, backbone=SIZES[backbone or "dlrm_mlp"])
    return config


def smooth_config_of(name):
    """The tiny configuration without rectifiers, which leave some inputs without influence on so few units."""
    fields = config_type(name).__dataclass_fields__
    smooth = {"activation": "gelu"} if "activation" in fields and fields["activation"].default == "relu" else {}
    config = config_of(name, smooth)
    if isinstance(freeze_config(name), tuple) and "+" not in name:
        return config | dict(backbone=config["backbone"] | {"activation": "gelu"})
    return config


def schema_of(name):
    """Both sides, ids and numbers, two histories, content, two tasks; scenarios where an architecture needs them."""

    def ids(name, side, width, group, table=None):
        return Field(name, side, width, 40, table=table, group=group)

    fields = (
        ids("user", "user", 4, "who"),
        Field("age", "user", 4, group="who"),
        ids("hour", "user", 4, "when"),
        ids("item", "candidate", 4, "what", "items"),
        ids("shop", "candidate", 4, "what", "shops"),
        Field("price", "candidate", 4, group="price"),
        Field("overlap", "cross", 4, group="price"),
        Field("place", "cross", 4, group="place"),
    )
    past = (ids("past_item", "user", 4, "past", "items"), ids("past_shop", "user", 4, "past", "shops"))
    sequences = (
        Sequence("clicks", 6, (*past, ids("action", "user", 2, "past")), timestamps=True),
        Sequence("buys", 4, (ids("bought", "user", 4, "past", "items"), ids("bought_at", "user", 4, "past", "shops"))),
    )
    content = Content(40, 12, segments=(3, 2), query_length=2, histories=("clicks",))
    domains = 3 if name in ("mdl", "domain_heads", "ads") else 1
    schema = Schema(fields, sequences, (Task("click"), Task("buy")), content=content, domains=domains)
    return schema.with_extra_tables(("user", "item")) if name == "mdl" else schema


def shaken(model):
    """The model with noise on all that is trained: no bias at zero, no gain at one."""
    for path, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Param | Table):
            rng = np.random.default_rng(zlib.crc32(repr(path).encode()))
            noise = rng.standard_normal(variable.shape, np.float32)
            # `variable[...] =` would make JAX word an error that nobody sees, as long as the program so far
            variable.set_value(variable[...] + 0.3 * noise)
    return model


def model_of(name, changed=None):
    """To be traced: the tiny model."""
    return shaken_model(name, config_of(name, changed))


def shaken_model(name, config):
    """To be traced: the model of a whole configuration."""
    return shaken(build(name, schema_of(name), config, rngs=nnx.Rngs(0)))


@functools.cache
def data_of(name):
    """Inputs, labels and their mask: two padded candidates and a padded request."""
    schema = schema_of(name)
    valid = np.ones((R, C), bool)
    valid[1, 2] = valid[3] = False
    inputs = random_inputs(schema, R, C, seed=1)
    inputs = inputs.replace(candidates=inputs.candidates.replace(valid=jnp.asarray(valid)))
    labels = jnp.asarray(np.random.default_rng(2).integers(0, 2, (R, C, 2)), jnp.float32)
    return inputs, labels, jnp.ones_like(labels) * valid[..., None]
