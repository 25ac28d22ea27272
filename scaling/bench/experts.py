"""What sparse experts save: a TokenMixer-Large training step and a RankMixer forward pass by share of active experts.

    train    TokenMixer-Large, L 2, E 8: dense; K 4 (1:2) and K 2 (1:4) on the sparse path of this machine; K 4 with all
             experts computed under a mask
    serve    RankMixer, L 2, E 8 with ReLU gates of which a half and a quarter are open, at fixed capacity; dense and
             masked beside it. RankMixer trains densely, so only serving has anything to save

At two shapes, because what an expert saves has to pay for the traffic of its rows: `narrow`, T 16, D 128, F 512, whose
experts are 64 wide, and `wide`, T 8, D 256, F 2,048, whose experts are 256 wide. 1,024 rows, float32, tokens given as
dense input, Adam. All variants of a shape run by turns in one process. Ratios are to dense: below 1 is saved.
`flops_ratio` is what the closed forms promise, routers included.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from recscale.models import build, count
from recscale.models.inputs import Batch, Schema
from recscale.models.inputs.tables import embed, table_lookup
from recscale.scaling.training.step import Trainer

from .fixed_batch import FixedBatch
from .timing import Rival, race, repeated
from .training_steps import Shape, TrainingSteps, adam_config


@dataclasses.dataclass(frozen=True)
class ExpertShape(Shape):
    """Sizes of both models, and the number of experts."""

    experts: int = 8


SHAPES = {"narrow": ExpertShape(), "wide": ExpertShape(tokens=8, width=256, hidden=2048)}


def measure_experts(
    *, shapes: Mapping[str, ExpertShape] = SHAPES, rounds: int = 6, per_round: int = 2
) -> dict[str, Any]:
    """Measures and returns JSON-able figures.

    Args:
        shapes: name -> sizes. rounds, per_round: turns of each variant, and timed steps per turn.

    Returns:
        shapes: name -> shape; train, serve: variant -> times, `ratio` and `flops_ratio` to dense, `dropped_share` of
        the last pass; train_falls, serve_falls: whether each sparser variant is faster than the one before.
    """
    return {"shapes": {name: _shape(shape, rounds, per_round) for name, shape in shapes.items()}}


def _shape(shape: ExpertShape, rounds: int, per_round: int) -> dict[str, Any]:
    train = _measure(_training(shape), rounds, per_round)
    serve = _measure(_serving(shape), rounds, per_round)
    result: dict[str, Any] = {"train": train, "serve": serve}
    for name in ("train", "serve"):
        times = [result[name][variant]["median_ms"] for variant in ("dense", "1:2", "1:4")]
        result[f"{name}_falls"] = times == sorted(times, reverse=True)
    return result | {"shape": dataclasses.asdict(shape)}


@dataclasses.dataclass(frozen=True)
class _Variant:
    """Something to time, its FLOPs per row, and the share of selections its last pass dropped."""

    step: Rival
    flops: int
    dropped: Callable[[], float]


def _measure(variants: Mapping[str, _Variant], rounds: int, per_round: int) -> dict[str, dict[str, float]]:
    times = race({name: variant.step for name, variant in variants.items()}, rounds=rounds, per_round=per_round)
    dense = times["dense"]["median_ms"]
    for name, variant in variants.items():
        times[name] |= {
            "ratio": times[name]["median_ms"] / dense,
            "flops_ratio": variant.flops / variants["dense"].flops,
            "dropped_share": variant.dropped(),
        }
    return times


def _training(shape: ExpertShape) -> dict[str, _Variant]:
    half, quarter = shape.experts // 2, shape.experts // 4
    # One routed expert beside the shared one learns only from gates that are not renormalised.
    norm = "selected" if quarter > 2 else "all"
    sparse = {"experts": shape.experts, "gate_norm": norm}
    flags: dict[str, dict[str, Any]] = {
        "dense": {},
        "1:2": sparse | {"active": half},
        "1:4": sparse | {"active": quarter},
        "1:2 masked": sparse | {"active": half, "expert_path": "masked"},
    }
    schema, source = shape.schema(), FixedBatch(shape.schema(), shape.rows)
    variants = {}
    for name, own in flags.items():
        settings = shape.model_config(global_token=False, heads=shape.tokens, **own)
        step = TrainingSteps(adam_config("tokenmixer_large", **settings), source, source.batch(0))
        flops = count("tokenmixer_large", schema, settings).train_flops_per_row
        variants[name] = _Variant(step, flops, functools.partial(_dropped_in_training, step.trainer, source.batch(0)))
    return variants


def _dropped_in_training(trainer: Trainer, batch: Batch) -> float:
    stats: Any = trainer.step(trainer.fresh_state(), batch)[1]["stats"]
    return float(stats.get("dropped_share", jnp.zeros(1))[0])


def _serving(shape: ExpertShape) -> dict[str, _Variant]:
    schema, batch = shape.schema(), FixedBatch(shape.schema(), shape.rows).batch(0)
    inputs = embed(schema, batch, table_lookup({}))
    flags: dict[str, dict[str, Any]] = {"dense": {}}
    for name, share, path in (
        ("1:2", 0.5, "capacity"),
        ("1:4", 0.25, "capacity"),
        ("1:2 masked", 0.5, "masked"),
    ):
        flags[name] = {"experts": shape.experts, "active_ratio": share, "expert_path": path}
    return {name: _served(schema, shape.model_config(**own), inputs) for name, own in flags.items()}


def _served(schema: Schema, config: dict[str, Any], inputs: Any) -> _Variant:
    model: Any = build("rankmixer", schema, config, rngs=nnx.Rngs(0))  # a mixer, whose blocks hold the routers
    for block in model.blocks if "experts" in config else ():
        # Inputs are normalised, so before the ReLU gates are normal with the scale of the kernel.
        router = block.ffn.infer_router
        spread = router.kernel[...].std() * schema.fields[0].width ** 0.5
        threshold = statistics.NormalDist().inv_cdf(config["active_ratio"])
        router.bias[...] = jnp.full_like(router.bias[...], threshold * spread)
    graph, state = nnx.split(model)

    @jax.jit
    def forward(state, inputs):
        output = nnx.merge(graph, state)(inputs)
        return output.logits, output.stats.get("cut_share", jnp.zeros(()))

    flops = count("rankmixer", schema, config).forward_flops_per_row
    return _Variant(repeated(lambda: forward(state, inputs)), flops, lambda: float(forward(state, inputs)[1]))
