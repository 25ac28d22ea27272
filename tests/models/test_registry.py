"""Names, presets, strict configs, composition, and what importing costs."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from ml_collections import ConfigDict

from recscale.models import build, count, freeze_config, get_config, list_models, list_presets
from recscale.models.counts import Count, Flops, Params
from recscale.models.inputs import reference_schema
from recscale.models.inputs.examples import random_inputs


def test_the_listed_models():
    assert {"rankmixer", "dlrm_mlp", "dcnv2", "sum_pooling", "din"} <= set(list_models())
    kinds = [set(list_models(kind)) for kind in ("backbone", "encoder", "ranker")]
    assert set.union(*kinds) == set(list_models()) and sum(map(len, kinds)) == len(list_models())
    assert {"rankmixer_100m", "rankmixer_1b"} <= set(list_presets())


@pytest.mark.parametrize("name", [*list_models(), *list_presets(), "din+rankmixer", "sum_pooling+rankmixer_100m"])
def test_defaults_survive_the_round_trip(name):
    config = get_config(name)
    assert isinstance(config, ConfigDict)
    assert freeze_config(name, config) == freeze_config(name)
    assert hash(freeze_config(name, config)) == hash(freeze_config(name))


def test_presets_fix_sizes_and_can_be_changed():
    config = get_config("rankmixer_1b")
    assert (config.tokens, config.width, config.hidden, config.layers) == (32, 1536, 5632, 2)
    assert freeze_config("rankmixer_1b", dict(layers=4)).layers == 4
    assert get_config("din+rankmixer_100m").backbone.width == 768
    assert count("rankmixer_100m", reference_schema()) == count(
        "rankmixer", reference_schema(), dict(tokens=16, width=768, hidden=2176, layers=2)
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rankmixr", "no model 'rankmixr'; did you mean 'rankmixer'"),
        ("din+rankmixr", "did you mean 'rankmixer'"),
        ("rankmixer+din", "rankmixer\\+din' is backbone \\+ encoder, expected encoder\\+backbone"),
        ("din+din+rankmixer", "has 3 parts"),
    ],
)
def test_unknown_names_are_explained(name, message):
    with pytest.raises(ValueError, match=message):
        get_config(name)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("rankmixer", dict(hiden=3), "rankmixer has no key 'hiden'; did you mean 'hidden'"),
        ("rankmixer", dict(hidden=3.0), "rankmixer.hidden is 3.0 \\(float\\), expected int"),
        ("rankmixer", dict(residual=1), "expected bool"),
        ("rankmixer", dict(tokens=True), "expected int or None"),
        ("rankmixer", dict(mixer="mixx"), "expected 'mix', 'none', 'self_attention'"),
        ("rankmixer", dict(tower=(8, "x")), "expected a tuple of int"),
        ("din", dict(hidden=(8, 4)), "has no key 'hidden'.*Known: encoder, backbone"),
        ("din", dict(encoder=dict(soft=True)), "din.encoder has no key 'soft'; did you mean 'softmax'"),
    ],
)
def test_configs_are_strict(name, config, message):
    with pytest.raises(ValueError, match=message):
        freeze_config(name, config)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("rankmixer", dict(heads=4), "heads is 4 and has no effect: mixer='mix' has no attention; set mixer="),
        ("rankmixer", dict(norm="none", norm_affine=False), "there is no norm; set norm"),
        ("rankmixer", dict(balance_weight=0.1), "balance_weight is 0.1 and has no effect.*router='topk'"),
        ("rankmixer", dict(experts=8, balance_weight=0.1), "no softmax-routed experts"),
        ("rankmixer", dict(experts=8, router="topk", active_ratio=0.5, lam0=1e-3), "no ReLU-routed experts"),
        ("rankmixer", dict(experts=8, expert_path="masked", capacity_factor=2.0), "has no capacity"),
        ("tokenmixer_large", dict(gate_scale=2.0), "there are no experts; set experts, or leave it at None"),
        ("tokenmixer_large", dict(aux_weight=0.0, aux_layers=(1,)), "no auxiliary heads; set aux_weight"),
        ("tokenmixer_large", dict(ffn="per_token_ffn", up_init_scale=0.1), "take a SwiGLU"),
        ("msn", dict(balance_weight=0.1), "has no experts; take an smoe"),
        ("pkm", dict(theta_noise=0.1), "there is no theta; set theta"),
        ("pkm", dict(memory_stride=2), "take two memories or more"),
        ("lmn", dict(memory_weight=0.0, target="event"), "there is no memory loss; set memory_weight"),
    ],
)
def test_flags_without_effect_are_refused_and_defaults_never(name, config, message):
    with pytest.raises(ValueError, match=message):
        freeze_config(name, config)
    defaults = dataclasses.asdict(freeze_config(name))
    assert freeze_config(name, {flag: defaults[flag] for flag in config if flag in defaults}) == freeze_config(name)


def test_words_are_checked_when_a_config_is_made_without_the_registry():
    with pytest.raises(ValueError, match="norm_place is 'middle', expected 'post', 'pre'"):
        type(freeze_config("rankmixer"))(norm_place="middle")


def test_a_spec_can_be_named_by_its_address():
    address, schema = "recscale.models.mixers.rankmixer:RANKMIXER", reference_schema(8, 4)
    config = dict(width=8, hidden=8, tokens=4)
    assert count(address, schema, config) == count("rankmixer", schema, config)
    assert get_config(f"din+{address}").backbone == get_config("rankmixer")
    with pytest.raises(ValueError, match="is a dict, expected a BackboneSpec, EncoderSpec or RankerSpec"):
        get_config("recscale.models.presets:PRESETS")
    with pytest.raises(ValueError, match="no module 'recscale.models.nowhere'"):
        get_config("recscale.models.nowhere:SPEC")


def test_public_names_are_those_of_their_modules():
    import recscale.models as models

    names = [name for name in models.__all__ if name != "__version__"]
    assert len(names) > 70 and set(names) <= set(dir(models))
    for name in names:
        assert getattr(models, name).__name__ == name
    with pytest.raises(AttributeError, match="RankMixerBlok"):
        models.RankMixerBlok  # noqa: B018


def test_lists_become_tuples_and_ints_floats():
    frozen = freeze_config("rankmixer", dict(tower=[8, 4], dropout=0))
    assert frozen.tower == (8, 4) and frozen.dropout == 0.0
    assert freeze_config("rankmixer", ConfigDict(dict(tower=[8]))).tower == (8,)


def test_compute_dtype_follows_the_argument():
    schema = reference_schema(8, 4)
    config = dict(width=8, hidden=8)
    for dtype in (None, jnp.bfloat16):
        model = build("rankmixer", schema, config, rngs=nnx.Rngs(0), dtype=dtype)
        state = model.encode_user(random_inputs(schema, 2, 1).user)
        assert state.tokens.dtype == (dtype or jnp.float32)  # None is float32 on CPUs
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def test_every_parameter_names_its_axes():
    schema = reference_schema(8, 4)
    model = build("rankmixer", schema, dict(width=8, hidden=8, tokenizer="group"), rngs=nnx.Rngs(0))
    for path, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Param):
            assert len(variable.get_metadata("logical_axes")) == variable[...].ndim, path
    assert model.blocks[0].ffn.up.kernel.get_metadata("logical_axes") == ("tokens", "embed", "hidden")


def test_count_adds_up():
    counted = Count.of(Params(10, 2, 1, 0, 4), Flops(6, 8, 1, 2), 50)
    assert dataclasses.asdict(counted) == counted.to_dict()
    assert (counted.active_params, counted.forward_flops_per_row, counted.train_flops_per_row) == (6, 14, 3 * 14 - 3)
    assert counted.train_flops_per_row == counted.train_flops_user + counted.train_flops_candidate
    assert Params(1, 2, 3, 4, 5) + Params(1, 1, 1, 1, 1) == Params(2, 3, 4, 5, 6)


def test_sizes_of_billions_cost_no_memory():
    model = nnx.eval_shape(lambda: build("rankmixer_1b", reference_schema(), rngs=nnx.Rngs(0)))
    size = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert size == count("rankmixer_1b", reference_schema()).dense_params


_ALONE = """
import importlib, sys
import recscale.models
assert not any(name in sys.modules for name in ("jax", "flax", "recscale.models.registry")), "importing is not cheap"
from recscale.models.registry import MODELS
for where in MODELS.values():
    for name in [name for name in sys.modules if name.startswith("recscale.")]:
        del sys.modules[name]
    module, attribute = where.split(":")
    assert getattr(importlib.import_module(module), attribute)
    others = [name for name in sys.modules if name.startswith("recscale.") and not name.startswith("recscale.models")
              and not name.startswith("recscale.pallas_kernels")]
    assert not others, (module, others)
    assert not any(name in sys.modules for name in ("grain", "wandb", "pandas")), module
print("alone")
"""


def test_every_architecture_is_importable_alone():
    done = subprocess.run([sys.executable, "-c", _ALONE], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "alone", done.stderr
