"""Architectures by name. Adding one = one model file and one line in `MODELS`; files are imported on first use.

rankmixer            a backbone
din                  a sequence encoder in front of a DLRM-MLP (short for din+dlrm_mlp)
din+rankmixer        a sequence encoder in front of a backbone
hyformer             a ranker: owns its histories as well, so nothing goes in front of it
rankmixer_100m       a preset: an alias with fixed sizes
package.module:SPEC  any spec by its address; other distributions add names through the entry points `recscale.models`

What a name means is its spec: a `BackboneSpec`, an `EncoderSpec` or a `RankerSpec`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from recscale.pallas_kernels.names import available, load, nearest
from recscale.pallas_kernels.targets import current_platform

from .architecture import BackboneSpec, EncoderSpec, RankerSpec
from .counts import Count
from .inputs.history import NO_TOKENS
from .inputs.schema import Schema
from .options import freeze
from .presets import PRESETS
from .ranker import Composed, Ranker

GROUP = "recscale.models"

# name -> address of the spec
MODELS = {
    "rankmixer": "recscale.models.mixers.rankmixer:RANKMIXER",
    "tokenmixer_large": "recscale.models.mixers.tokenmixer_large:TOKENMIXER_LARGE",
    "ug_rankmixer": "recscale.models.mixers.ug_rankmixer:UG_RANKMIXER",
    "ug_tokenmixer_large": "recscale.models.mixers.ug_tokenmixer_large:UG_TOKENMIXER_LARGE",
    "dlrm_mlp": "recscale.models.baselines.dlrm_mlp:DLRM_MLP",
    "dcnv2": "recscale.models.baselines.dcnv2:DCNV2",
    "wukong": "recscale.models.baselines.wukong:WUKONG",
    "hiformer": "recscale.models.baselines.hiformer:HIFORMER",
    "autoint": "recscale.models.baselines.autoint:AUTOINT",
    "dhen_lite": "recscale.models.baselines.dhen_lite:DHEN_LITE",
    "pkm": "recscale.models.memories.memory_mixer:PKM",
    "memory_plus": "recscale.models.memories.memory_mixer:MEMORY_PLUS",
    "msn": "recscale.models.memories.msn:MSN_SPEC",
    "mmoe": "recscale.models.baselines.mmoe:MMOE",
    "mdl": "recscale.models.domains.mdl:MDL_SPEC",
    "domain_heads": "recscale.models.domains.domain_heads:DOMAIN_HEADS",
    "lemur": "recscale.models.domains.lemur:LEMUR",
    "hyformer": "recscale.models.sequences.hyformer:HYFORMER",
    "mixformer": "recscale.models.sequences.mixformer:MIXFORMER",
    "ui_mixformer": "recscale.models.sequences.mixformer:UI_MIXFORMER",
    "longer": "recscale.models.sequences.longer:LONGER",
    "ads": "recscale.models.sequences.ads:ADS_SPEC",
    "sum_pooling": "recscale.models.baselines.sum_pooling:SUM_POOLING",
    "din": "recscale.models.baselines.din:DIN_SPEC",
    "target_attention": "recscale.models.baselines.target_attention:TARGET_ATTENTION",
    "sequence_transformer": "recscale.models.baselines.sequence_transformer:SEQUENCE_TRANSFORMER",
    "sasrec": "recscale.models.baselines.sequence_transformer:SASREC",
    "hstu": "recscale.models.baselines.hstu:HSTU_SPEC",
    "twin_lite": "recscale.models.baselines.twin_lite:TWIN_LITE",
    "stca": "recscale.models.baselines.stca:STCA_SPEC",
    "lmn": "recscale.models.memories.lmn:LMN_SPEC",
    "onetrans_lite": "recscale.models.baselines.onetrans_lite:ONETRANS_LITE",
}

_KINDS = {BackboneSpec: "backbone", EncoderSpec: "encoder", RankerSpec: "ranker"}

# What a sequence encoder stands in front of when it is named alone.
_ALONE = "dlrm_mlp"


@dataclasses.dataclass(frozen=True)
class _Part:
    """One side of a name: the spec and the preset's overrides."""

    spec: Any
    overrides: dict[str, Any]

    @property
    def kind(self) -> str:
        return _KINDS[type(self.spec)]


def list_models(kind: str | None = None) -> list[str]:
    """Names of this package and of other distributions, presets excluded; kind "backbone", "encoder" or "ranker"
    selects, and imports every model for it.

    Any encoder goes with any backbone; a ranker stands alone.
    """
    names = available(GROUP, MODELS)
    return names if kind is None else [name for name in names if _load(name).kind == kind]


def reads_history(name: str) -> bool:
    """Whether a model needs a schema with histories: it is a ranker, or has a sequence encoder."""
    encoder, backbone = _parts(name)
    return encoder is not None or isinstance(backbone.spec, RankerSpec)


def list_presets() -> list[str]:
    """Aliases with fixed sizes."""
    return list(PRESETS)


def get_config(name: str) -> ConfigDict:
    """The default config of an architecture, for users to change.

    A sequence encoder with a backbone has two parts, `config.encoder` and `config.backbone`.

    Raises:
        ValueError: an unknown name; the nearest is named.
    """
    encoder, backbone = _parts(name)
    if encoder is None:
        return ConfigDict(_defaults(backbone))
    return ConfigDict({"encoder": _defaults(encoder), "backbone": _defaults(backbone)})


def build(
    name: str, schema: Schema, config: Mapping[str, Any] | ConfigDict | None = None, *, rngs: nnx.Rngs, dtype=None
) -> Ranker:
    """The architecture `name` for inputs of `schema`.

    Args:
        name: see `list_models` and `list_presets`.
        schema: what the inputs look like.
        config: from `get_config`, or any part of it; missing keys keep their defaults.
        rngs: randomness of the initial parameters.
        dtype: compute dtype; None is bfloat16 on accelerators and float32 on CPU. Parameters and logits are float32.

    Raises:
        ValueError: unknown name, unknown key, or values that contradict each other or the schema.
    """
    dtype = default_dtype() if dtype is None else dtype
    encoder, encoder_config, backbone, config, tokens = _resolve(name, schema, config)
    model = backbone.build(config, schema, *tokens, rngs=rngs, dtype=dtype)
    if encoder is None:
        return model
    return Composed(encoder.build(encoder_config, schema, rngs=rngs, dtype=dtype), model)


def count(name: str, schema: Schema, config: Mapping[str, Any] | ConfigDict | None = None) -> Count:
    """Parameters and FLOPs of `build(name, schema, config)` in closed form; allocates nothing."""
    encoder, encoder_config, backbone, config, tokens = _resolve(name, schema, config)
    params, flops = backbone.count_params(config, schema, *tokens), backbone.count_flops(config, schema, *tokens)
    own = None
    if encoder is not None:
        front = encoder.count_params(encoder_config, schema)
        params, own = params + front, front.dense
        flops += encoder.count_flops(encoder_config, schema)
    return Count.of(params, flops, schema.embedding_params(), own)


def size_space(
    name: str,
    schema: Schema,
    config: Mapping[str, Any] | ConfigDict | None,
    target_dense_params: float,
    *,
    encoder_share: float | None = None,
    fixed: str | None = None,
) -> Iterator[dict[str, Any]]:
    """Overrides of `config` whose `dense_params` lie near the target, hardware-friendly shapes first; lazy.

    A sequence encoder keeps its config and the backbone behind it is sized for the rest. With `encoder_share` the
    encoder is sized as well, for that share of the target; with fixed="backbone" the backbone keeps its config, and the
    encoder in front is sized for the rest.

    Raises:
        ValueError: the part that is sized first or not at all has more parameters than the target; both options, a
            wrong value of one, or either for an architecture without an encoder that has a size of its own.
    """
    encoder, encoder_config, backbone, config, tokens = _resolve(name, schema, config)
    if encoder_share is not None or fixed is not None:
        _check_split(name, encoder, encoder_share, fixed)
    if encoder is None:
        yield from backbone.size_space(schema, config, target_dense_params, *tokens)
        return

    def rest(part: str, dense: int) -> float:
        if dense >= target_dense_params:
            raise ValueError(
                f"{name}: the {part} alone has {dense} dense parameters, the target is {target_dense_params:g}; "
                f"configure a smaller {part} or raise the target"
            )
        return target_dense_params - dense

    fronts: Iterable[dict[str, Any]] = [{}]
    if fixed is not None:
        behind = backbone.count_params(config, schema, *tokens).dense
        yield from ({"encoder": it} for it in _sizes(encoder, schema, encoder_config, rest("backbone", behind)))
        return
    if encoder_share is not None:
        fronts = _sizes(encoder, schema, encoder_config, encoder_share * target_dense_params)
    for front in fronts:
        sized = dataclasses.replace(encoder_config, **front)
        left = rest("encoder", encoder.count_params(sized, schema).dense)
        for overrides in backbone.size_space(schema, config, left, encoder.token_shape(sized, schema)):
            yield {"backbone": overrides} | ({"encoder": front} if front else {})


def _check_split(name: str, encoder: EncoderSpec | None, encoder_share: float | None, fixed: str | None) -> None:
    if encoder is None or encoder.size_space is None:
        lacks = "no sequence encoder in front" if encoder is None else "an encoder without a size of its own"
        raise ValueError(f"{name} has {lacks}; leave size.encoder_share and size.fixed unset")
    if encoder_share is not None and fixed is not None:
        raise ValueError("size.encoder_share and size.fixed are both set; set one of them")
    if encoder_share is not None and not 0 < encoder_share < 1:
        raise ValueError(f"size.encoder_share is {encoder_share:g}, expected a number between 0 and 1")
    if fixed not in (None, "backbone"):
        raise ValueError(f"size.fixed is {fixed!r}, expected 'backbone'")


def _sizes(encoder: EncoderSpec, schema: Schema, config: Any, target: float) -> Iterable[dict[str, Any]]:
    return encoder.size_space(schema, config, target) if encoder.size_space else ()


def freeze_config(name: str, config: Mapping[str, Any] | ConfigDict | None = None) -> Any:
    """The frozen config dataclass, or a pair (encoder's, backbone's)."""
    encoder, backbone = _parts(name)
    values = _plain(config)
    if encoder is None:
        return freeze(backbone.spec.config, {**backbone.overrides, **values}, name)
    for key in values:
        if key not in ("encoder", "backbone"):
            raise ValueError(f"{name} has no key {key!r}{nearest(key, ['encoder', 'backbone'])}")
    return tuple(
        freeze(part.spec.config, {**part.overrides, **values.get(key, {})}, f"{name}.{key}")
        for key, part in (("encoder", encoder), ("backbone", backbone))
    )


def default_dtype():
    """bfloat16 on accelerators, float32 on CPU."""
    return jnp.float32 if current_platform() == "cpu" else jnp.bfloat16


def _resolve(
    name: str, schema: Schema, config: Any
) -> tuple[EncoderSpec | None, Any, BackboneSpec | RankerSpec, Any, tuple[Any, ...]]:
    """Encoder's spec and config, the other part's spec and config, and the last arguments of that part's callables:
    the shape of the tokens it is given, nothing for a ranker."""
    encoder, backbone = _parts(name)
    frozen = freeze_config(name, config)
    if encoder is None:
        return None, None, backbone.spec, frozen, () if isinstance(backbone.spec, RankerSpec) else (NO_TOKENS,)
    tokens = encoder.spec.token_shape(frozen[0], schema)
    return encoder.spec, frozen[0], backbone.spec, frozen[1], (tokens,)


def _parts(name: str) -> tuple[_Part | None, _Part]:
    names = name.split("+")
    if len(names) > 2:
        raise ValueError(f"{name!r} has {len(names)} parts; expected encoder+backbone")
    parts = [_load(part) for part in names]
    kinds = [part.kind for part in parts]
    if kinds in (["backbone"], ["ranker"]):
        return None, parts[0]
    if kinds == ["encoder"]:
        return parts[0], _load(_ALONE)
    if kinds == ["encoder", "backbone"]:
        return parts[0], parts[1]
    if kinds[-1] == "ranker":
        raise ValueError(
            f"{name!r}: {names[1]} reads the histories itself, so nothing goes in front of it; use {names[1]!r} alone"
        )
    raise ValueError(
        f"{name!r} is {' + '.join(kinds)}, expected encoder+backbone; encoders: {', '.join(list_models('encoder'))}"
    )


def _load(name: str) -> _Part:
    base, overrides = PRESETS.get(name, (name, {}))
    if base not in (known := available(GROUP, MODELS)) and ":" not in base:
        raise ValueError(
            f"there is no model {name!r}{nearest(name, [*known, *PRESETS])}; or name one as package.module:attribute"
        )
    spec = load(GROUP, base, MODELS, "model")
    if type(spec) not in _KINDS:
        raise ValueError(
            f"model {name!r} is a {type(spec).__name__}, expected a BackboneSpec, EncoderSpec or RankerSpec"
        )
    return _Part(spec, overrides)


def _defaults(part: _Part) -> dict[str, Any]:
    frozen = freeze(part.spec.config, part.overrides)
    return {field.name: getattr(frozen, field.name) for field in dataclasses.fields(frozen)}


def _plain(config: Any) -> dict[str, Any]:
    if config is None:
        return {}
    return config.to_dict() if isinstance(config, ConfigDict) else dict(config)
