"""Every flag of every architecture does something, and still does what it did.

A tiny model with random parameters serves and trains once for every flag, in float64 and without compiling anything.
fingerprints.json says in which setting a flag is tried, and has the fingerprint found there: logits, losses, statistics
and state, weighed at random, and gradients where only those tell. It must come out again, and differ from the one with
the flag at its default. A flag that several architectures share is tried of the first, every word of it.

`RECSCALE_WRITE_GOLDEN=1 pytest tests/models/test_flags.py` looks for settings in which flags act and writes them anew.
"""

import dataclasses
import functools
import json
import os
import types
import typing
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from in_float64 import in_float64
from tiny_models import SIZES, VARIANTS, config_type, data_of, model_of

from recscale.models import list_models
from recscale.models.inputs.tables import Table
from recscale.models.layers.losses import training_loss

GOLDEN = Path(__file__).with_name("fingerprints.json")

# Presets of another architecture, with its code.
PRESETS = {"memory_plus": "pkm", "ui_mixformer": "mixformer"}

# How, not what: the program changes and its values do not. Other tests compare the programs.
PROGRAMS = {
    "expert_path": "how experts are executed",
    "capacity_factor": "room of one way to execute experts",
    "remat": "what is computed again in the backward pass",
    "implementation": "which kernel serves an operation",
    "kv": "the order of two products",
    "candidates": "what the order of two products is chosen for",
    "drop_dead": "whether weights without a gradient are stored",
    "active_only": "whether scenarios that are nobody's are computed",
    "bank_dtype": "the precision of what is stored",
}

# Not tried here yet: flags that act in none of `SETTINGS`, and architectures whose flags have tests of their own alone.
UNTRIED = {
    "dlrm_mlp": {"interaction_width"},
    "domain_heads": {"head"},
    "lemur": {"encode_fraction", "forecast_hidden", "sample_order", "sequence", "session_mask"},
    "mmoe": {"experts", "tower"},
    "pkm": {"addressing"},
    "rankmixer": {"active_ratio", "dead_window", "tokenizer", "user_tokens"},
    "tokenmixer_large": {"active", "experts"},
}
ELSEWHERE = set(list_models("encoder")) | {"lmn", "hyformer", "mixformer", "ui_mixformer", "onetrans_lite"}

# Settings in which flags act that do not at the defaults; the first that works is taken.
SETTINGS = [
    {},
    dict(experts=3, active_ratio=0.5),
    dict(experts=3, active_ratio=0.5, router="topk", balance_weight=0.1),
    dict(experts=3, active_ratio=0.5, router="topk", gate_norm="selected"),
    dict(experts=6, active=3),
    dict(experts=6, active=3, balance_weight=0.1),
    dict(mixer="self_attention"),
    dict(norm_place="pre"),
    dict(interaction="dot", interaction_width=4),
    dict(rank=3, experts=2),
    dict(rank=3),
    dict(tower=(5,)),
    dict(batch_norm=True),
    dict(tokenizer="group"),
    dict(tokenizer="cut"),
    dict(tokenizer="field"),
    dict(aux_layers=(1,)),
    dict(aux_mode="independent", aux_layers=(1,)),
    dict(layers=4),
    dict(layers=4, aux_layers=(1,)),
    dict(ffn="per_token_ffn"),
    dict(down_init_scale=0.5),
    dict(query="mlp"),
    dict(score="tucker", theta="none"),
    dict(score="tucker", tucker_cores=2, theta="none"),
    dict(value_op="swilu"),
    dict(value_op="prevalue"),
    dict(value_op="expert"),
    dict(value_op="expansion"),
    dict(theta="right_dxd"),
    dict(theta="right_dxd", key_norm="layer"),
    dict(theta="right_dxd", key_norm="layer", theta_noise=0.3),
    dict(memory_heads=2),
    dict(layers=3, memory_count=2),
    dict(module="gated_ffn"),
    dict(module="smoe"),
    dict(module="msn_smoe"),
    dict(module="smoe", balance_weight=0.1),
    dict(encoder="swiglu"),
    dict(encoder="full"),
    dict(queries=2, tokens=6),
    dict(query_strategy="uniform"),
    dict(scorer="din"),
    dict(scorer="can"),
    dict(candidate="project"),
    dict(predictor="linear"),
    dict(predictor="lstm", forecast_hidden=4),
    dict(predictor="lstm"),
    dict(predictor="ema"),
    dict(positions=False),
    dict(target_in_sequence=True),
    dict(token_state="split"),
    dict(head="private"),
    dict(head="mmoe"),
    dict(user_heads=2),
    dict(target="event"),
    dict(target="learned"),
]

# Values of flags whose type does not say which ones there are.
VALUES = {
    "modules": [("linear", "attention")],
    "domain_fields": [("user",)],
    "actions": [("action",)],
    "cross": [("overlap",), ("age",)],
    "sequences": [("clicks",)],
    "sequence": ["buys"],
    "user_heads": [1, 2, "width"],
    "mem_layers": [(0,)],
    "aux_layers": [(1,), (0,)],
    "n_global": [(2, 2), (1, 2)],
    "dropout": [0.5],
    "norm_eps": [0.5],
    "recent": [2],
    "max_length": [3, 2, 8],
    "memory_slots": [25],
    "snapshot_rows": [10],
    "widths": [(5,)],
    "temperature": [0.3],
    "gate_scale": [2.5],
    "experts": [3, 2, 4],
    "lam0": [0.5],
    "lam_rate": [1e3],
    "mixed_hidden": [7],
    "tokens": [2, 3, 5, 6, 8],
    "width": [16, 12, 20, 10, 6],
}


def weighed(tree):
    """One number of everything in a tree."""
    total = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            seed = zlib.crc32(jax.tree_util.keystr(path).encode())
            weights = np.random.default_rng(seed).standard_normal(np.shape(leaf))
            total += float(np.sum(np.asarray(leaf, np.float64) * weights))
    return total


def fingerprint(name, changed, gradients, prepare=lambda model: None):
    """What the tiny model with some flags changed gives, in one number; prepare: what is done to it first."""
    changed = {key: tuple(value) if isinstance(value, list) else value for key, value in changed.items()}

    def trained(model, inputs, labels, mask, key):
        output = model(inputs, key=key)
        loss, tasks = training_loss(output, labels, mask)
        if output.pending is not None:
            model.settle(output.pending, jnp.asarray(True))
        return loss, (tasks, output.logits, output.losses, output.stats)

    def everything(inputs, labels, mask, key):
        model = model_of(name, changed)
        prepare(model)
        served = model(inputs).logits
        found = trained(model, inputs, labels, mask, key)
        return served, found, nnx.split(model, nnx.Any(nnx.Param, Table), ...)[2]

    def gradient(inputs, labels, mask, key):
        graph, params, rest = nnx.split(model_of(name, changed), nnx.Any(nnx.Param, Table), ...)

        def loss(params, inputs):
            return trained(nnx.merge(graph, params, rest, copy=True), inputs, labels, mask, key)[0]

        found = jax.grad(loss, argnums=(0, 1), allow_int=True)(params, inputs)
        return [leaf for leaf in jax.tree.leaves(found) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    return weighed(in_float64(gradient if gradients else everything)(*data_of(name), jax.random.key(3)))


# ---- the flags there are, and values other than their defaults


def flags_of(name):
    return [field.name for field in dataclasses.fields(config_type(name)) if field.name not in PROGRAMS]


def owner(name, flag):
    """The option group that a flag belongs to, None if the architecture has no such flag."""
    return next((b for b in config_type(name).__mro__ if flag in b.__dict__.get("__annotations__", {})), None)


def values_of(name, flag):
    """Lists of other values: of each list, the first that is allowed and acts is tried."""
    kind = config_type(name)
    hint, default = typing.get_type_hints(kind)[flag], kind.__dataclass_fields__[flag].default
    current = SIZES[name].get(flag, default)
    words, others = [], list(VALUES.get(flag, []))
    for one in typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else [hint]:
        if typing.get_origin(one) is typing.Literal:
            words += [word for word in typing.get_args(one) if word != current]
        elif one is bool:
            words.append(not current)
        elif one is int:
            others += [(current or 1) + 1, 2 * (current or 1), 2, 1]
        elif one is float:
            others += [0.5 * current if current else 0.25, 2.0]
        elif one is not type(None) and typing.get_args(one)[:1] == (int,):
            others.append((5,))
    return [[word] for word in words] if words else [others]


@functools.cache
def stored():
    return json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}


@functools.cache
def plain(name, text, gradients):
    return fingerprint(name, json.loads(text), gradients)


def looked_for(name, flag, values):
    """The first setting and value in which a flag acts, and the fingerprint there; None if there is none among the
    defaults and the ten settings with most of its group's flags."""
    known = {field.name for field in dataclasses.fields(config_type(name))}
    possible = [setting for setting in SETTINGS if setting.keys() <= known - {flag}]
    nearest = sorted(possible[1:], key=lambda one: -sum(owner(name, key) is owner(name, flag) for key in one))
    for gradients, settings in ((False, [{}, *nearest[:10]]), (True, [{}, *nearest[:2]])):
        for setting in settings:
            for value in values[:4]:
                try:
                    before = plain(name, json.dumps(setting), gradients)
                    after = fingerprint(name, setting | {flag: value}, gradients)
                except (ValueError, TypeError):
                    continue
                if after != pytest.approx(before, rel=1e-9):
                    return {"in": setting, "value": value, "gradients": gradients, "found": float(f"{after:.10g}")}
                break
    return None


def is_first(name, flag):
    """Whether no architecture before has the flag of the same group."""
    return name == next(other for other in list_models() if owner(other, flag) is owner(name, flag))


# A flag of a group is tried of the first architecture that has it.
FLAGS = [
    (name, flag)
    for name in list_models()
    if name not in PRESETS.keys() | ELSEWHERE
    for flag in flags_of(name)
    if is_first(name, flag) and flag not in UNTRIED.get(name, ())
]


@pytest.mark.parametrize(("name", "flag"), FLAGS)
def test_a_flag_acts_as_it_did(name, flag):
    if os.environ.get("RECSCALE_WRITE_GOLDEN"):
        found = [looked_for(name, flag, values) for values in values_of(name, flag)]
        stored().setdefault(name, {})[flag] = [case for case in found if case]
        GOLDEN.write_text(json.dumps(stored(), indent=1, sort_keys=True) + "\n")
    cases = stored().get(name, {}).get(flag)
    assert cases, (
        f"no setting is known in which {flag} of {name} acts; the first lines of this file say how to find one"
    )
    for case in cases:
        before = plain(name, json.dumps(case["in"]), case["gradients"])
        after = fingerprint(name, case["in"] | {flag: case["value"]}, case["gradients"])
        assert after != pytest.approx(before, rel=1e-9), f"{flag}={case['value']!r} does nothing"
        assert after == pytest.approx(case["found"], rel=1e-6, abs=1e-9), case


def rounded(value):
    return float(f"{value:.10g}")


def as_stored(key, found):
    """The numbers of a variant as they were; those found now if asked to write."""
    variants = stored().setdefault("variants", {})
    if os.environ.get("RECSCALE_WRITE_GOLDEN"):
        variants[key] = found
        GOLDEN.write_text(json.dumps(stored(), indent=1, sort_keys=True) + "\n")
    return variants[key]


# Those whose flags are not tried one by one, and flags that belong to the first architecture but reach parts of others.
JOINED = [
    (name, flags)
    for name in VARIANTS
    for flags in VARIANTS[name]
    if name in {*ELSEWHERE, "memory_plus", "msn"} or "dropout" in flags
]


@pytest.mark.parametrize(("name", "flags"), JOINED, ids=str)
def test_a_variant_gives_what_it_did(name, flags):
    """Values, and gradients where flags say what flows."""
    flows = name == "lmn" and {"target", "memory_loss_to"} & flags.keys()
    found = [fingerprint(name, flags, gradients) for gradients in ((False, True) if flows else (False,))]
    assert found == pytest.approx(as_stored(f"{name} {flags}", list(map(rounded, found))), rel=1e-6, abs=1e-9)


def fill_bank(model):
    """Three writes of ever fewer rows of the bank, which is empty at the start and says little then."""
    for k, step in enumerate((2, 5, 6)):
        ids = jnp.arange(10 * k, model.bank.rows)
        vectors = np.random.default_rng(k).standard_normal((len(ids), model.bank.width), np.float32)
        model.bank.write(ids, jnp.asarray(vectors), step)
    model.now.set_value(jnp.asarray(9, jnp.int32))


FILLED = [
    dict(encode_fraction=0.75, backward_fraction=0.25),
    dict(predictor="linear", snapshot_rows=30, encode_fraction=0.75),
    dict(predictor="lstm", forecast_hidden=4, session_mask=False),
    dict(predictor="ema", sample_order="missing_first"),
]


@pytest.mark.parametrize("flags", FILLED, ids=str)
def test_lemur_on_a_filled_bank_gives_what_it_did(flags):
    found = rounded(fingerprint("lemur", flags | dict(bank_dtype="float32"), False, fill_bank))
    assert found == pytest.approx(as_stored(f"lemur, filled {flags}", [found])[0], rel=1e-6, abs=1e-9)
