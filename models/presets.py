"""Presets: architectures with fixed sizes, by name. Plain data, read by the registry.

name -> (registered name, overrides of its config)

`<name>_10k ... _1b` are starter sizes: dense parameters near 1e4 ... 1e9 on the reference schema (32 fields of width
16, one task, no history). From 1e7 on widths are multiples of 64 or 128, which matrix units prefer.
"""

from __future__ import annotations

from typing import Any

Preset = tuple[str, dict[str, Any]]


def _hiformer(width: int, layers: int, keys: int, values: int, key_rank: int, value_rank: int, hidden: int) -> dict:
    """keys = H*d_k, values = H*d_v, for four heads."""
    ranks = dict(key_rank=key_rank, value_rank=value_rank)
    heads = dict(heads=4, key_width=keys // 4, value_width=values // 4)
    return dict(width=width, layers=layers, hidden=hidden) | heads | ranks


def _msn(tokens: int, width: int, hidden: int, layers: int, memories: int, n: int, topk: int, key_width: int) -> dict:
    """M = n*n slots in each memory."""
    memory = dict(memory_count=memories, memory_slots=n * n, memory_topk=topk, key_width=key_width)
    return dict(tokens=tokens, width=width, hidden=hidden, layers=layers) | memory


# 100m and 1b: sizes of arXiv 2507.15551, table 1; hidden widths chosen to meet its parameters.
_RANKMIXER: dict[str, Preset] = {
    "rankmixer_10k": ("rankmixer", dict(tokens=4, width=8, hidden=40, layers=2)),
    "rankmixer_100k": ("rankmixer", dict(tokens=8, width=24, hidden=112, layers=2)),
    "rankmixer_1m": ("rankmixer", dict(tokens=16, width=64, hidden=224, layers=2)),
    "rankmixer_10m": ("rankmixer", dict(tokens=16, width=256, hidden=640, layers=2)),
    "rankmixer_100m": ("rankmixer", dict(tokens=16, width=768, hidden=2176, layers=2)),
    "rankmixer_1b": ("rankmixer", dict(tokens=32, width=1536, hidden=5632, layers=2)),
}

# The same shapes with their user's half separated: half of the tokens are the user's.
_UG_RANKMIXER: dict[str, Preset] = {
    f"ug_{name}": ("ug_rankmixer", shape | dict(user_tokens=shape["tokens"] // 2))
    for name, (_, shape) in _RANKMIXER.items()
}

# The same shapes with every network cut into eight ReLU-routed experts.
_RANKMIXER_MOE: dict[str, Preset] = {
    name.replace("rankmixer", "rankmixer_moe"): ("rankmixer", shape | dict(experts=8))
    for name, (_, shape) in _RANKMIXER.items()
}


def _tokenmixer(tokens: int, width: int, hidden: int, layers: int, **more: Any) -> Preset:
    """Fields are cut into T - 1 tokens beside the global one, whatever groups a schema has; H = T."""
    shape = dict(tokens=tokens, width=width, hidden=hidden, layers=layers)
    return "tokenmixer_large", dict(tokenizer="cut", heads=tokens) | shape | more


# From 500m on: the sizes arXiv 2602.06563 names, whose shapes it does not print; these are ours.
_TOKENMIXER_LARGE: dict[str, Preset] = {
    "tokenmixer_large_10k": _tokenmixer(4, 8, 4, 2),
    "tokenmixer_large_100k": _tokenmixer(8, 24, 32, 2),
    "tokenmixer_large_1m": _tokenmixer(16, 48, 48, 4),
    "tokenmixer_large_10m": _tokenmixer(16, 128, 192, 4),
    "tokenmixer_large_100m": _tokenmixer(16, 512, 512, 4),
    "tokenmixer_large_500m": _tokenmixer(32, 768, 832, 4),
    "tokenmixer_large_1b": _tokenmixer(32, 1024, 1280, 4),
    "tokenmixer_large_2b": _tokenmixer(32, 1536, 1920, 4),
    "tokenmixer_large_4b": _tokenmixer(32, 2048, 1984, 6, mixed_hidden=1920),
    "tokenmixer_large_7b": _tokenmixer(32, 2560, 2560, 6),
    "tokenmixer_large_15b": _tokenmixer(32, 3072, 3200, 8),
}

# The same shapes with eight sub-experts in every half, four of them active (1:2); 10k is too narrow for eight.
_TOKENMIXER_LARGE_MOE: dict[str, Preset] = {
    name.replace("large", "large_moe"): (base, shape | dict(experts=8, active=4))
    for name, (base, shape) in _TOKENMIXER_LARGE.items()
    if shape["hidden"] % 8 == 0
}

_DLRM_MLP: dict[str, Preset] = {
    "dlrm_mlp_10k": ("dlrm_mlp", dict(widths=(16, 64))),
    "dlrm_mlp_100k": ("dlrm_mlp", dict(widths=(128, 128, 128))),
    "dlrm_mlp_1m": ("dlrm_mlp", dict(widths=(768, 640, 256))),
    "dlrm_mlp_10m": ("dlrm_mlp", dict(widths=(2048, 2048, 2048))),
    "dlrm_mlp_100m": ("dlrm_mlp", dict(widths=(6912, 6912, 6912))),
    "dlrm_mlp_1b": ("dlrm_mlp", dict(widths=(22272, 22272, 22272))),
}

_DCNV2: dict[str, Preset] = {
    "dcnv2_10k": ("dcnv2", dict(cross_layers=1, rank=4, widths=(8,))),
    "dcnv2_100k": ("dcnv2", dict(cross_layers=2, rank=16, widths=(112, 96))),
    "dcnv2_1m": ("dcnv2", dict(cross_layers=3, widths=(256, 256))),
    "dcnv2_10m": ("dcnv2", dict(cross_layers=3, widths=(1984, 1984, 1984))),
    "dcnv2_100m": ("dcnv2", dict(cross_layers=3, widths=(6912, 6912, 6912))),
    "dcnv2_1b": ("dcnv2", dict(cross_layers=3, widths=(22016, 22016, 22016))),
}

# Headline of arXiv 2505.04421 (meant for histories of 2,000 events); sizes it does not print have their defaults.
_LONGER: dict[str, Preset] = {
    "longer_paper": ("longer", dict(event_width=32, merge=8, queries=100, layers=2, n_global=(1, 3))),
}

_WUKONG: dict[str, Preset] = {
    "wukong_10k": (
        "wukong",
        dict(width=16, layers=2, fm_tokens=4, linear_tokens=4, rank=4, hidden=32, hidden_layers=1),
    ),
    "wukong_100k": (
        "wukong",
        dict(width=16, layers=2, fm_tokens=8, linear_tokens=8, rank=8, hidden=160, hidden_layers=1),
    ),
    "wukong_1m": (
        "wukong",
        dict(width=32, layers=3, fm_tokens=16, linear_tokens=16, rank=16, hidden=256, hidden_layers=2),
    ),
    "wukong_10m": (
        "wukong",
        dict(width=64, layers=4, fm_tokens=16, linear_tokens=16, rank=16, hidden=1024, hidden_layers=2),
    ),
    "wukong_100m": (
        "wukong",
        dict(width=128, layers=4, fm_tokens=32, linear_tokens=32, rank=24, hidden=3072, hidden_layers=2),
    ),
    "wukong_1b": (
        "wukong",
        dict(width=128, layers=8, fm_tokens=48, linear_tokens=48, rank=48, hidden=7168, hidden_layers=2),
    ),
}

_AUTOINT: dict[str, Preset] = {
    "autoint_10k": ("autoint", dict(width=16, attention=40, layers=2)),
    "autoint_100k": ("autoint", dict(width=32, attention=96, layers=3)),
    "autoint_1m": ("autoint", dict(width=64, attention=272, layers=4)),
    "autoint_10m": ("autoint", dict(width=128, attention=896, layers=4)),
    "autoint_100m": ("autoint", dict(width=256, attention=2816, layers=4)),
    "autoint_1b": ("autoint", dict(width=512, attention=9088, layers=4)),
}

_HIFORMER: dict[str, Preset] = {
    "hiformer_10k": ("hiformer", _hiformer(8, 1, 8, 8, 2, 6, 32)),
    "hiformer_100k": ("hiformer", _hiformer(16, 1, 16, 32, 8, 52, 64)),
    "hiformer_1m": ("hiformer", _hiformer(64, 2, 32, 64, 8, 24, 128)),
    "hiformer_10m": ("hiformer", _hiformer(128, 2, 64, 256, 32, 192, 384)),
    "hiformer_100m": ("hiformer", _hiformer(384, 2, 192, 512, 128, 768, 1536)),
    "hiformer_1b": ("hiformer", _hiformer(768, 4, 384, 1536, 256, 1024, 3072)),
}

_DHEN_LITE: dict[str, Preset] = {
    "dhen_lite_10k": ("dhen_lite", dict(width=8, layers=1, rank=8, modules=("linear", "attention", "cross"))),
    "dhen_lite_100k": ("dhen_lite", dict(width=16, layers=1, rank=32, projections=4)),
    "dhen_lite_1m": ("dhen_lite", dict(width=32, layers=2, rank=112, projections=8)),
    "dhen_lite_10m": ("dhen_lite", dict(width=64, layers=4, rank=256, projections=20)),
    "dhen_lite_100m": ("dhen_lite", dict(width=256, layers=4, rank=768, projections=48)),
    "dhen_lite_1b": ("dhen_lite", dict(width=512, layers=8, rank=2048, projections=112)),
}

_MMOE: dict[str, Preset] = {
    "mmoe_10k": ("mmoe", dict(experts=2, hidden=8, expert_width=8, tower=(8,))),
    "mmoe_100k": ("mmoe", dict(experts=4, hidden=40, expert_width=40, tower=(32,))),
    "mmoe_1m": ("mmoe", dict(experts=4, hidden=320, expert_width=256, tower=(64,))),
    "mmoe_10m": ("mmoe", dict(experts=8, hidden=1024, expert_width=704, tower=(256,))),
    "mmoe_100m": ("mmoe", dict(experts=8, hidden=4096, expert_width=2560, tower=(512,))),
    "mmoe_1b": ("mmoe", dict(experts=16, hidden=8192, expert_width=7040, tower=(1024,))),
}

# Tokens of arXiv 2601.12681 (T_n = 13 and a query for each of 3 histories); its width is not disclosed.
_HYFORMER: dict[str, Preset] = {"hyformer_tokens": ("hyformer", dict(tokens=16))}

# Sizes of arXiv 2602.14110, table 1. "small" prints width 386, which 16 heads do not divide; 368 meets the ratio
# of the two printed sizes. F = 4*D and F_s = 2*D meet the printed parameters to 1.4 %.
_MIXFORMER: dict[str, Preset] = {
    "mixformer_small": ("mixformer", dict(tokens=16, width=368, layers=4)),
    "mixformer_medium": ("mixformer", dict(tokens=16, width=768, layers=4)),
}

# Sizes of arXiv 2510.26104: widths, layers and the ends of the pyramid (1190 to 12 and 1500 to 16 rows) are printed,
# the heads of "l" are not.
_ONETRANS: dict[str, Preset] = {
    "onetrans_s": ("onetrans_lite", dict(tokens=12, width=256, layers=6, heads=4)),
    "onetrans_l": ("onetrans_lite", dict(tokens=16, width=384, layers=8, heads=4)),
}

# Sizes of our own around arXiv 2602.07526, whose widths and heads are not disclosed.
_MSN: dict[str, Preset] = {
    "msn_as_printed": ("msn", dict(theta="left_nxn")),
    "msn_tiny": ("msn", _msn(8, 64, 192, 2, 1, 32, 8, 32)),
    "msn_small": ("msn", _msn(16, 128, 384, 4, 2, 128, 32, 64)),
    "msn_base": ("msn", _msn(16, 256, 704, 4, 2, 256, 32, 64)),
    "msn_paper_like": ("msn", _msn(16, 768, 2176, 4, 2, 256, 32, 128)),
}

# Controls that learn no addresses: product keys as drawn, which crowd on a part of the slots, and hash tables, whose
# addresses are uniform: one row a token, and eight of them summed.
_PKM: dict[str, Preset] = {
    "pkm_random": ("pkm", dict(addressing="random", query_norm="layer")),
    "pkm_hashed": ("pkm", dict(addressing="random", query_norm="layer", memory_topk=1)),
    "hash_table": ("pkm", dict(addressing="hash", read_weights="none", memory_heads=1, memory_topk=1)),
    "hash_table_8": ("pkm", dict(addressing="hash", read_weights="none", memory_heads=1, memory_topk=8)),
}

# A reconstruction: no size of arXiv 2502.05558 is public, and these are no more than usual ones.
_LMN: dict[str, Preset] = {
    "lmn_million": ("lmn", dict(memory_slots=2**20, memory_topk=16, key_width=64, widths=(512, 256, 128))),
}

PRESETS: dict[str, Preset] = {
    **_RANKMIXER,
    **_UG_RANKMIXER,
    **_RANKMIXER_MOE,
    **_TOKENMIXER_LARGE,
    **_TOKENMIXER_LARGE_MOE,
    **_DLRM_MLP,
    **_DCNV2,
    **_WUKONG,
    **_AUTOINT,
    **_HIFORMER,
    **_DHEN_LITE,
    **_MMOE,
    **_LONGER,
    **_HYFORMER,
    **_MIXFORMER,
    **_ONETRANS,
    **_PKM,
    **_MSN,
    **_LMN,
}
