"""Models that carry a product-key memory: flags, closed forms, placement, padding, controls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import normal
from flax import nnx

from recscale.models import count
from recscale.models.inputs import reference_schema
from recscale.models.inputs.examples import random_inputs
from recscale.models.layers.hidden import RunningStatistic
from recscale.models.memories.memory_mixer import MemoryMixerConfig, MemoryPlusConfig, PKMConfig
from recscale.models.memories.options import MemoryOptions
from recscale.models.memories.product_key_memory import ProductKeyMemory
from recscale.scaling.counting.abstract import abstract_model, forward_program, train_program, tree_params
from recscale.scaling.counting.jaxpr_flops import count_flops


def test_contradicting_flags_are_named():
    for message, options in (
        ("never moves a key", dict(theta="left_nxn", freeze_base_keys=True)),
        ("leaves nothing to train", dict(freeze_base_keys=True)),
        ("n = 5 sub-keys", dict(memory_slots=25, memory_topk=6)),
        ("expected a square", dict(value_op="expansion", expansion=3)),
        ("score='tucker' has keys", dict(score="tucker", theta="right_dxd")),
        ("score is 'additive'", dict(tucker_cores=2)),
        ("no fixed hash", dict(addressing="random", query_norm="batch")),
        ("no gradient", dict(memory_topk=1)),
        ("value_width is 0", dict(value_op="swilu", value_width=0)),
        ("query_hidden is 0", dict(query="mlp", query_hidden=0)),
        ("expansion is 0", dict(value_op="expansion", expansion=0)),
        ("temperature is 0", dict(temperature=0)),
        ("value_init_std is -1", dict(value_init_std=-1)),
    ):
        with pytest.raises(ValueError, match=message):
            MemoryMixerConfig(**options)
    assert MemoryMixerConfig(memory_topk=1, addressing="random").memory_topk == 1
    for name in ("pkm_random", "pkm_hashed"):  # pkm's batch norm would move the hash
        memory = abstract_model(name, reference_schema()).blocks[1].memory
        assert memory.fixed and memory.address.query_norm.kind == "layer"
    for message, options in (
        ("never moves a key", dict(theta="left_nxn", freeze_base_keys=True)),
        ("only n = 5 sub-keys", dict(memory_topk=6)),
        ("score is 'x', expected 'additive', 'tucker'", dict(score="x")),
        ("addressing is 'x'", dict(addressing="x")),
        ("score_scale is 'x'", dict(score_scale="x")),
        ("theta_order is 'x'", dict(theta="right_dxd", theta_order="x")),
        ("expansion_join is 'x'", dict(value_op="expansion", expansion_join="x")),
        ("8 wide, which 3 tucker_cores", dict(score="tucker", tucker_cores=3)),
    ):
        with pytest.raises(ValueError, match=message):
            ProductKeyMemory(3, 8, MemoryOptions(**dict(memory_slots=25, memory_topk=4) | options), rngs=nnx.Rngs(0))


VARIANTS = [
    dict(),
    dict(memory_heads=3, query_shared_by_heads=True, keys_shared_by_heads=True),
    dict(query="mlp", query_hidden=12, query_per_token=True, score_scale="learned", key_norm="rms"),
    dict(keys_per_token=True, values_per_token=True, query_norm=None, key_norm=None),
    dict(theta="right_dxd", query_norm="batch"),
    dict(theta="left_nxn", theta_order="ln_before"),
    dict(theta="right_dxd", freeze_base_keys=True),
    dict(value_op="swilu", value_width=12, read_weights="sigmoid"),
    dict(value_op="prevalue", prevalue_width=4, value_width=12, read_weights="none"),
    dict(value_op="expert", read_weights="relu"),
    dict(value_op="expansion", expansion=4, value_width=12),
    dict(value_op="expansion", expansion=4, expansion_join="summed"),
    dict(score="tucker", tucker_rank=3, tucker_cores=2, memory_heads=2, read_weights="none"),
    dict(score="tucker", value_op="expansion", expansion=4, read_weights="none"),
    dict(addressing="random"),
    dict(values_frozen=True),
    dict(memory_count=2, memory_shared_values=True, combine="replace", layers=3, norm_place="pre"),
]


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()) or "default")
@pytest.mark.slow
def test_closed_forms_equal_the_program(options):
    schema = reference_schema()
    config = dict(tokens=4, width=16, hidden=24, memory_slots=49, memory_topk=4, key_width=6) | options
    counted = count("pkm", schema, dict(query_norm="layer", key_norm="layer", memory_heads=1) | config)
    config = dict(query_norm="layer", key_norm="layer", memory_heads=1) | config
    assert tree_params(abstract_model("pkm", schema, config)) == counted.dense_params
    function, arguments = forward_program("pkm", schema, config, 2, 3)
    expected = 2 * counted.forward_flops_user + 6 * counted.forward_flops_candidate + counted.forward_flops_step
    assert count_flops(function, *arguments) == expected
    function, arguments = train_program("pkm", schema, config, 1, 1)
    assert count_flops(function, *arguments) == counted.train_flops_per_row + counted.train_flops_step
    tokens = 4 if options.get("values_per_token") else 1
    assert counted.memory_slots == 49 * tokens
    assert counted.active_params == counted.dense_params - counted.memory_params
    if not options:
        spec = 4 * 16 * 6 + 4 * 7 * 6 + 2 * 4 * 16  # query, scores, read
        plain = count("rankmixer", schema, dict(tokens=4, width=16, hidden=24))
        assert counted.forward_flops_candidate - plain.forward_flops_candidate == 4 * spec
        assert counted.memory_params == 49 * 16


def test_placement_is_centred():
    assert MemoryMixerConfig(layers=2).memory_layers == (1,)
    assert MemoryMixerConfig(layers=9, memory_count=3, memory_stride=3).memory_layers == (1, 4, 7)
    with pytest.raises(ValueError, match="span 5 layers, there are 4"):
        MemoryMixerConfig(layers=4, memory_count=3, memory_stride=2)
    assert PKMConfig().combine == "residual" and MemoryPlusConfig().memory_layers == (1, 2)


@pytest.mark.parametrize("name, place", [("pkm", "memory1"), ("msn", "layer1/memory"), ("lmn", "memory_target")])
def test_padded_candidates_enter_neither_statistics_nor_usage(name, place, schema):
    config = dict(tokens=4, width=8, hidden=8) if name != "lmn" else dict(widths=(8,), din_hidden=(4, 4))
    config |= dict(memory_slots=25, memory_topk=4, key_width=6, memory_heads=1)
    config |= {} if name == "lmn" else dict(query_norm="batch")
    graph, state = nnx.split(abstract_model(name, schema, config))
    state = jax.tree.map(lambda leaf: normal(*leaf.shape), state)
    inputs = random_inputs(schema, 2, 3)
    valid = jnp.asarray([[True, True, False], [True, False, False]])

    @jax.jit
    def call(inputs):
        model = nnx.merge(graph, state, copy=True)
        out = model(inputs, key=jax.random.key(0))
        return out.logits, out.stats, nnx.to_pure_dict(nnx.state(model, RunningStatistic))

    def at(junk):
        fields = {k: jnp.where(valid[..., None], v, junk) for k, v in inputs.candidates.fields.items()}
        return call(inputs.replace(candidates=inputs.candidates.replace(fields=fields, valid=valid)))

    (logits, stats, running), (other, same, unmoved) = at(0.0), at(1e3)
    np.testing.assert_allclose(logits[valid], other[valid], rtol=1e-5, atol=1e-5)
    tokens = 1 if name == "lmn" else 4
    assert int(stats[f"{place}/hits"].sum()) == 3 * 4 * tokens
    for key in ("hits", "usage", "kl", "top1_weight", *(["gate_saturated"] if name == "msn" else [])):
        np.testing.assert_allclose(stats[f"{place}/{key}"], same[f"{place}/{key}"], rtol=1e-4, err_msg=key)
    assert (name == "lmn") == (not jax.tree.leaves(running))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), running, unmoved)
