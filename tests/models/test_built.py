"""What the flags of every architecture build, as shapes alone: parameters with their axes and how they are drawn, what
every layer was told (dtype, activation, heads, rates), counts by closed form; and defaults, and what is refused.

built.json, counts.json, defaults.json and settings.json say what was found; a failure prints what there is now, by
place in the model. The slow test holds the counts against the programs. `RECSCALE_WRITE_GOLDEN=1 pytest
tests/models/test_built.py` writes them anew.
"""

import dataclasses
import functools
import json
import os
import types
import typing
import zlib
from collections import defaultdict
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from tiny_models import SIZES, VARIANTS, config_of, config_type, schema_of

from recscale.models import build, count, freeze_config, list_models
from recscale.models.domains import promo
from recscale.models.domains.budget import ResponseHeads
from recscale.models.domains.stale_bank import LSTMForecast
from recscale.models.domains.two_tower import TwoTower, TwoTowerConfig
from recscale.models.layers import history_attention, param
from recscale.models.sequences import mixformer_block
from recscale.pallas_kernels.hybrid_attention import hybrid_attention
from recscale.scaling.counting.abstract import abstract_model, forward_program, train_program, tree_params
from recscale.scaling.counting.jaxpr_flops import count_flops

WRITE = bool(os.environ.get("RECSCALE_WRITE_GOLDEN"))

# Other than the defaults of every layer, so that a layer that was not told of them is seen. They change no count.
TOLD = dict(init="lecun_uniform", activation="silu", dropout=0.25, implementation="reference", norm_eps=1e-3)

BUILT = [(name, flags) for name in list_models() for flags in ({}, *VARIANTS.get(name, ()))]

# The settings in which every flag acts, of test_flags.py.
ACTING = [
    (name, {key: tuple(v) if isinstance(v, list) else v for key, v in (one["in"] | {flag: one["value"]}).items()})
    for name, flags in json.loads(Path(__file__).with_name("fingerprints.json").read_text()).items()
    if name != "variants"
    for flag, found in flags.items()
    for one in found
]


def told(name, flags):
    """Flags with those of `TOLD` that the architecture has and whose form was chosen."""
    known = config_type(name).__dataclass_fields__
    for key, value in TOLD.items():
        if key in known and key not in flags:
            with_it = flags | {key: value}
            try:
                freeze_config(name, config_of(name, with_it))
            except ValueError:  # refused where it has no effect
                continue
            flags = with_it
    return flags


def raw(schema):
    """The schema with numbers in place of ids: no gradient flows into an input."""
    fields = tuple(dataclasses.replace(f, vocabulary=None, ids=None, bag=1) for f in schema.fields)
    sequences = tuple(
        dataclasses.replace(s, fields=tuple(dataclasses.replace(f, vocabulary=None, ids=None, bag=1) for f in s.fields))
        for s in schema.sequences
    )
    return dataclasses.replace(schema, fields=fields, sequences=sequences)


def values_of(name):
    """[(flag, value)]: some values of every flag, with those at the edge of what is allowed."""
    hints, found = typing.get_type_hints(config_type(name)), []
    for field in dataclasses.fields(config_type(name)):
        hint = hints[field.name]
        for kind in typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,):
            if typing.get_origin(kind) is typing.Literal:
                values = typing.get_args(kind)
            elif typing.get_origin(kind) is tuple:
                values = (), (0,), (1,), (2, 2), (1, 3)
            else:
                some = {bool: (False, True), int: (-1, 0, 1, 2, 5, 9), float: (-0.5, 0.0, 0.5, 1.0, 2.0)}
                values = some.get(kind, (None,))
            found += [(field.name, value) for value in values]
    return found


@functools.cache
def golden(name):
    path = Path(__file__).with_name(f"{name}.json")
    return json.loads(path.read_text()) if path.exists() else {}


def as_found(file, key, found):
    """What is stored under the key; what was found now if that is asked for."""
    if WRITE:
        golden(file)[key] = found
        lines = (f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(golden(file).items()))
        Path(__file__).with_name(f"{file}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    assert key in golden(file), f"{file}.json has no {key}; the first lines of this file say how to write it"
    return golden(file)[key]


def plain(value):
    return isinstance(value, bool | int | float | str) or isinstance(value, tuple) and all(map(plain, value))


def described(model):
    """Lines by place in a model: of every variable its shape and metadata, of every module what it was told."""
    found = defaultdict(list)
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Variable):
            metadata = {
                key: node.get_metadata().get(key) for key in ("logical_axes", "decays", "training_only", "drawn")
            }
            line = f"{type(node).__name__} {node.shape} {node.dtype} {metadata}"
        elif isinstance(node, nnx.Module):
            values = {
                k: v for k, v in sorted(vars(node).items()) if plain(v) and not k.startswith("_")
            }  # not Flax's own
            if "dtype" in vars(node):
                values["dtype"] = jnp.dtype(node.dtype).name
            line = f"{type(node).__name__} {values}"
        else:
            continue
        found[str(path[0]) if path else ""].append(f"{'/'.join(map(str, path))}: {line}")
    return found


@pytest.fixture
def watched(monkeypatch):
    """Parameters carry how they were drawn."""

    def watch(draw):
        def drawn(*arguments, **kwargs):
            made = draw(*arguments, **kwargs)
            how = [a for a in (*arguments, *kwargs.values()) if plain(a)]
            made.set_metadata(drawn=f"{draw.__name__} {how}")
            return made

        return drawn

    for name in ("kernel", "constant", "normal"):
        monkeypatch.setattr(param, name, watch(getattr(param, name)))


def check_built(key, make):
    """What `make` builds is as it was, with parameters `watched`."""
    lines = described(nnx.eval_shape(make))
    found = {place: zlib.crc32("\n".join(sorted(own)).encode()) for place, own in lines.items()}
    before = as_found("built", key, found)
    changed = [line for place in lines if found[place] != before.get(place) for line in sorted(lines[place])]
    assert found == before, "\n".join(["now:", *changed])


@pytest.mark.parametrize(("name", "flags"), BUILT, ids=str)
def test_what_is_built(name, flags, watched):
    flags = told(name, flags)

    def make():
        return build(name, schema_of(name), config_of(name, flags), rngs=nnx.Rngs(0), dtype=jnp.bfloat16)

    check_built(f"{name} {flags}", make)


def make_promo(flags, own):
    config = promo.PromoConfig(**flags)
    return promo.build(config, promo.promo_schema(6, 30, config), **own)


PROMOS = [dict(layers=2), dict(generator="hypernet"), dict(generator="shared", lambda1=0.0)]

# Models without a name of their own, and parts of training.
APART = {
    **{f"promo {flags}": functools.partial(make_promo, flags) for flags in PROMOS},
    "two_tower": lambda own: TwoTower(schema_of("two_tower"), TwoTowerConfig(hidden=(5, 3)), **own),
    "responses": lambda own: ResponseHeads(6, 4, (5,), **own),
    "forecast": lambda own: LSTMForecast(6, 5, **own),
}


@pytest.mark.parametrize("name", APART)
def test_what_is_built_apart(name, watched):
    check_built(name, lambda: APART[name](dict(dtype=jnp.bfloat16, rngs=nnx.Rngs(0))))


def counted(name, flags, schema):
    """In the order of `Count`, without the sums that are the same per row."""
    values = dataclasses.asdict(count(name, schema, config_of(name, flags)))
    return [value or 0 for key, value in values.items() if not key.endswith("per_row")]


@pytest.mark.parametrize(("name", "flags"), [*BUILT, *ACTING], ids=str)
def test_counts_are_those_of_the_programs(name, flags):
    schemas = [schema_of(name)]
    if (name, flags) in BUILT:
        schemas.append(raw(schemas[0]))
    if name == "ads":  # whose domain vector is made of the user's fields then
        schemas.append(dataclasses.replace(schemas[1], domains=1))
    found = [counted(name, flags, schema) for schema in schemas]
    assert found == as_found("counts", f"{name} {flags}", found)


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [False, True])
@pytest.mark.parametrize(("name", "flags"), BUILT, ids=str)
def test_the_programs_cost_what_is_counted(name, flags, numbers):
    schema = raw(schema_of(name)) if numbers else schema_of(name)
    # A batch of one row costs what the closed forms say of every row unless a part of it is encoded.
    config = config_of(name, flags | (dict(encode_fraction=1.0, backward_fraction=1.0) if name == "lemur" else {}))
    own = count(name, schema, config)
    assert tree_params(abstract_model(name, schema, config)) == own.dense_params
    function, arguments = forward_program(name, schema, config, 2, 3)
    expected = 2 * own.forward_flops_user + 6 * own.forward_flops_candidate + own.forward_flops_step
    assert count_flops(function, *arguments) == expected
    function, arguments = train_program(name, schema, config, 1, 1)
    assert count_flops(function, *arguments) == own.train_flops_per_row + own.train_flops_step


@pytest.mark.parametrize("name", list_models())
def test_defaults(name):
    config = freeze_config(name)
    parts = dict(zip(("encoder", "backbone"), config, strict=True)) if isinstance(config, tuple) else {"": config}
    # As JSON has them: lists for tuples.
    found = json.loads(json.dumps({part: dataclasses.asdict(one) for part, one in parts.items()}))
    assert found == as_found("defaults", name, found)


@pytest.mark.parametrize("name", list_models())
def test_the_settings_that_are_refused(name):
    """One flag changed, to any of `values_of`, of every variant and of every setting in which a flag acts."""
    kind, values = config_type(name), values_of(name)
    settings = [flags for own, flags in (*BUILT, *ACTING) if own == name]
    refused = []
    for flags in settings:
        for flag, value in values:
            try:
                kind(**SIZES[name] | flags | {flag: value})
                refused.append(0)
            except ValueError:
                refused.append(1)
    found = [len(refused), sum(refused), zlib.crc32(bytes(refused))]
    assert found == as_found("settings", name, found)


def forward(name, **flags):
    return forward_program(name, schema_of(name), config_of(name, flags), 1, 1)


@pytest.mark.parametrize("name", ["hyformer", "longer", "mixformer"])
def test_every_attention_is_served_by_the_chosen_kernel(name, monkeypatch):
    function, arguments = forward(name, implementation="reference")
    asked = []

    def watched(*operands, implementation=None, **kwargs):
        asked.append(implementation)
        return hybrid_attention(*operands, implementation=implementation, **kwargs)

    for module in (history_attention, mixformer_block):
        monkeypatch.setattr(module, "hybrid_attention", watched)
    jax.eval_shape(function, *arguments)
    assert len(asked) >= 2 and set(asked) == {"reference"}


def test_longer_rematerialises_every_part():
    """The front, and of both layers events, user globals and candidates."""
    function, arguments = forward("longer", remat=True)
    names = [equation.primitive.name for equation in jax.make_jaxpr(function)(*arguments).jaxpr.eqns]
    assert sum(name in ("checkpoint", "remat2") for name in names) == 1 + 2 * 3
