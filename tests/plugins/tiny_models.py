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
# Flags besides these sizes, of architectures with parts that the defaults do not have.
VARIANTS = {
    "rankmixer": [
        dict(experts=3, active_ratio=0.5, router="topk", gate_norm="selected", expert_path="masked"),
        dict(experts=3, dtsi_merge="infer_only", norm_place="pre", expert_path="masked"),
        dict(mixer="self_attention", heads=2, ffn="shared", tokenizer_hidden=5, global_token="split"),
        dict(mixer="all_concat", norm_place="pre", tokenizer="group", tokens=None),
    ],
    "ug_rankmixer": [
        dict(compensation="mean", norm_per_token=True, norm_place="pre", tower=(5,)),
        dict(user_to_candidate=False, norm="rms", layers=3),
        dict(separated_residual=True, compensation="per_token"),
    ],
    "tokenmixer_large": [
        dict(experts=3, active=3, gate_norm="all", tower=(5,), norm_per_token=True),
        dict(experts=3, active=2, shared_expert=False, expert_scope="global", expert_path="masked"),
        dict(ffn="shared_swiglu", heads=3, mixed_hidden=7, sandwich_norm=True, layers=3, aux_layers=(2,)),
        dict(ffn="per_token_ffn", final_norm=False, aux_weight=0.0, tokenizer="cut", global_token="split"),
    ],
    "ug_tokenmixer_large": [
        dict(compensation="per_token", tower=(5,), norm_per_token=True),
        dict(drop_dead=False, compensation="mean", aux_layers=(1,)),
        dict(user_to_candidate=False, mixed_hidden=7, aux_weight=0.0),
    ],
    "dlrm_mlp": [dict(interaction="dot", interaction_width=4, bottom=(5,), tower=(3,), batch_norm=True)],
    "dcnv2": [dict(rank=3, experts=2, structure="parallel", tower=(3,)), dict(widths=(), rank=2)],
    "wukong": [dict(attentive=True, head_mlp=(5,), hidden_layers=2, tower=(3,), tokenizer="field")],
    "hiformer": [dict(norm_place="pre", tower=(3,), tokenizer_hidden=5)],
    "autoint": [dict(tower=(3,), scale_logits=True, heads=3)],
    "dhen_lite": [
        dict(modules=("fm", "cross"), ensemble="weighted", tower=(3,)),
        dict(modules=("attention",), heads=2),
    ],
    "mmoe": [dict(tower=(), experts=2)],
    "onetrans_lite": [
        dict(pyramid=False, hidden=7, tower=(5,), recent=3),
        dict(heads=4, layers=3, time_feature="none"),
    ],
    "sum_pooling": [dict(pool="mean", time_feature="none", recent=4)],
    "din": [dict(candidate="project", softmax=True, time_feature="none"), dict(recent=3, activation="gelu")],
    "target_attention": [dict(heads=4, recent=3, time_feature="none")],
    "sequence_transformer": [
        dict(positions=False, causal=True, layers=1),
        dict(target_in_sequence=True, heads=4, max_length=9, time_feature="none"),
    ],
    "sasrec": [dict(layers=1, heads=2, max_length=8, time_feature="none")],
    "hstu": [
        dict(query_width=4, value_width=6, layers=1, score_scale=0.5, max_length=9),
        dict(interleave=True, actions=("action",)),
    ],
    "twin_lite": [dict(cross=("action",), heads=4), dict(selected=2, values="all", recent=5, time_feature="none")],
    "stca": [dict(layers=1, ratio=3, heads=4), dict(kv="reordered", time_feature="none")],
    "pkm": [
        dict(query="mlp", query_hidden=12, query_per_token=True, score_scale="learned", key_norm="rms"),
        dict(query_shared_by_heads=True, keys_shared_by_heads=True, norm_gain_power=0.5, key_init="uniform"),
        dict(keys_per_token=True, values_per_token=True, query_norm=None, key_norm=None, value_init_std=0.25),
        dict(theta="right_dxd", query_norm="layer", key_norm="layer", theta_noise=0.5),
        dict(theta="left_nxn", theta_order="ln_before", keys_per_token=True, combine="replace", norm_place="pre"),
        dict(theta="right_dxd", freeze_base_keys=True, memory_count=2),
        dict(value_op="swilu", value_width=12, read_weights="sigmoid", addressing="random", query_norm="rms"),
        dict(value_op="prevalue", prevalue_width=3, value_width=12, read_weights="none"),
        dict(value_op="expert", read_weights="relu", expert_activation="relu", query="mlp"),
        dict(value_op="expansion", value_width=12, norm="none", values_frozen=True),
        dict(value_op="expansion", expansion_join="summed", tower=(5,)),
        dict(score="tucker", score_scale="none", tucker_rank=3, tucker_cores=2, read_weights="none"),
        dict(addressing="hash", key_width=16, memory_heads=3, read_weights="none"),
    ],
    "memory_plus": [dict(memory_stride=2, memory_shared_values=False, layers=4, dropout=0.5)],
    "msn": [
        dict(module="ffn"),
        dict(module="gated_ffn", memory_count=2),
        dict(module="gated_ffn", gate_hidden=5, mem_layers=(0,)),
        dict(module="smoe", expert_path="masked", balance_weight=0.1),
        dict(module="smoe", expert_path="ragged", experts=6, router="all"),
        dict(module="msn_smoe", expert_path="ragged", combine="replace", active_experts=1, router="all"),
        dict(mem_layers=(0, 1), block_style="pre", memory_heads=2),
        dict(block_style="plain", theta="left_nxn", tower=(6,), dropout=0.5),
        dict(combine="concat", value_width=6, values_per_token=True),
        dict(combine="replace", value_op="swilu", value_width=6, norm_per_token=True),
        dict(query_norm="none", key_norm="none", theta="none", query_per_token=False),
        dict(freeze_base_keys=True, memory_heads=2, query="mlp"),
    ],
    "lmn": [
        dict(read_from="sequence", query="mlp", query_hidden=9),
        dict(read_from="target", theta="right_dxd", memory_loss_to="values"),
        dict(read_from="target", theta="right_dxd", memory_heads=2),
        dict(read_from="target", memory_weight=0.0),
        dict(pool="mean", target="learned", target_gradient=True),
        dict(pool="mean", read_from="sequence", query_mode="item_only"),
        dict(target="event", target_gradient=True, read_weights="sigmoid"),
        dict(candidate="project", target="learned", memory_loss_to="values"),
        dict(addressing="random", value_width=10, recent=4),
        dict(sequence="buys"),
        dict(values_frozen=True, theta="left_nxn", tower=(5,), time_feature="none"),
    ],
    "mdl": [
        dict(ffn_residual=False, qkv_bias=True, out_proj=True),
        dict(share_kv=True, init_depth=2, heads=2),
        dict(token_state="split", scenario_hidden=5, task_hidden=7),
        dict(reads="last", active_only=True),
        dict(reads="none"),
        dict(reads="none", task_tokens="none"),
        dict(scenario_tokens="plain"),
        dict(scenario_tokens="none"),
        dict(task_tokens="plain", layers=3),
        dict(task_tokens="none", tower=(5,)),
        dict(global_scenario=False, active_only=True, dropout=0.5),
        dict(ffn_residual=False, dropout=0.5),
    ],
    "domain_heads": [dict(head="private", experts=4, expert_width=64, tower=(5,)), dict(tower=(3,), dropout=0.5)],
    "lemur": [
        dict(reader_layers=0, similarity=False, tokens=6, width=12),
        dict(sqdc_weight=0.0, reader_hidden=5, query_layers=2, document_layers=2),
        dict(ranking_gradient=False, encode_fraction=0.5, backward_fraction=0.25),
        dict(predictor="lstm", snapshot_rows=5, forecast_hidden=3),
        dict(predictor="linear", bank_dtype="float32"),
        dict(predictor="ema", encoder_hidden=7, dropout=0.5),
    ],
    "hyformer": [
        dict(encoder="full", queries=2, tokens=8, width=16, head_dim=None),
        dict(encoder_input="raw", tower=(4,)),
        dict(query_pools="own", split_info=False, recent=2, time_feature="none"),
        dict(query_sources="target", ns_flow="raw", readout="queries"),
        dict(encoder="swiglu", encoder_input="raw", decode_residual=False, sequences=("buys", "clicks")),
        dict(hidden=None, seq_hidden=None, query_hidden=None, layers=1, query_pools="none"),
        dict(encoder_causal=True),
    ],
    "mixformer": [
        dict(query_mixer="none", ui=True),
        dict(query_mixer="self_attention", kv="materialised"),
        dict(query_ffn=False, recent=4, seq_hidden=5),
        dict(history_ffn="shared", tower=(5,)),
        dict(output_ffn="shared", ui=True, user_heads="width"),
        dict(norms="post", kv="reordered", time_feature="none"),
        dict(norms="equations", candidates=9, layers=1, user_heads=1, ui=True),
    ],
    "longer": [
        dict(n_global=(2, 3), inner=2, inner_extra_residual=True, inner_init=0.5),
        dict(n_global=(1, 0), readout="globals", cls=False),
        dict(n_global=(2, 5), query_strategy="learnable", readout="flatten_all"),
        dict(globals_order="user_first", time_feature="none", merge=1, inner=0),
        dict(seq_sees_user_globals=True, norm="rms", use_bias=False),
        dict(queries=None, query_share=0.6, max_length=11, remat=True, layers=1),
        dict(recent=4, readout="globals", query_strategy="uniform"),
        dict(readout="globals_newest", output_norm=True, query_strategy="recent_uniform"),
    ],
    "ads": [
        dict(scorer=scorer) | flags
        for scorer in ("mha", "din", "can")
        for flags in (
            dict(),
            dict(psrg=False, chunk=3, micro=(5,)),
            dict(pcrg=False, candidate="project"),
            dict(domain_side="candidate", max_length=11, chunk=2, head_dim=4),
            dict(domain_fields=("age",), init_generators="glorot", recent=4, eta=3.0),
            dict(psrg=False, pcrg=False),
        )
    ],
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
