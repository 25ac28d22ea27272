"""What is refused before any work is done: settings out of their range or without effect, and shapes that cannot be
built. The planner asks for every run it plans, training before its first step."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from recscale.models.counts import Count
from recscale.scaling import host_memory
from recscale.scaling.counting.abstract import trace_forward
from recscale.scaling.data.source import Source
from recscale.scaling.parallel import check_requests, parse_mesh
from recscale.scaling.records.advice import advised
from recscale.scaling.records.number_text import byte_text
from recscale.scaling.records.overrides import leaves

from .config import KEPT_CHECKPOINTS
from .wandb_mirror import require_login

Test = tuple[Callable[[Any], bool], str]

_FINITE: Test = (math.isfinite, "a finite number")
_POSITIVE: Test = (lambda x: 0 < x < math.inf, "a finite number above 0")
_NOT_NEGATIVE: Test = (lambda x: 0 <= x < math.inf, "a finite number, 0 or above")
_BELOW_ONE: Test = (lambda x: 0 <= x < 1, "a share in [0, 1)")
_SHARE: Test = (lambda x: 0 <= x <= 1, "a share between 0 and 1")
_COUNT: Test = (lambda x: x >= 1, "at least 1")
_SEED: Test = (lambda x: 0 <= x < 2**32, "a number from 0 to 2^32 - 1")

_RANGES: dict[str, Test] = {
    "seed": _SEED,
    "data.log_seed": _SEED,
    "data.history_length": _NOT_NEGATIVE,
    "data.holdout_rows": _COUNT,
    "training.passes": _NOT_NEGATIVE,
    "training.patience": _COUNT,
    "training.embedding_l2": _NOT_NEGATIVE,
    "data.passes": _COUNT,
    "training.requests": _COUNT,
    "training.candidates": _COUNT,
    "training.examples": _NOT_NEGATIVE,
    "training.lr": _POSITIVE,
    "training.b1": _BELOW_ONE,
    "training.b2": _BELOW_ONE,
    "training.eps": _POSITIVE,
    "training.weight_decay": _NOT_NEGATIVE,
    "training.clip_norm": _NOT_NEGATIVE,
    "training.suffix_alpha": _NOT_NEGATIVE,
    "training.suffix_beta": _NOT_NEGATIVE,
    "training.embedding_lr": _NOT_NEGATIVE,  # 0 freezes the tables
    "training.embedding_eps": _POSITIVE,
    "training.embedding_init_std": _POSITIVE,
    "training.value_lr": _POSITIVE,
    "training.value_lr_decay_examples": _NOT_NEGATIVE,
    "training.value_clip_norm": _NOT_NEGATIVE,
    "training.value_weight_decay": _NOT_NEGATIVE,
    "training.warmup_examples": _NOT_NEGATIVE,
    "training.decay_fraction": _SHARE,
    "training.log_every_examples": _NOT_NEGATIVE,
    "training.checkpoint_every_s": _NOT_NEGATIVE,
    "training.accumulate": _COUNT,
}

# Of any model that has them, by the last part of the key; what depends on the architecture is its own to check.
_MODEL_RANGES: dict[str, Test] = {
    "dropout": _BELOW_ONE,
    "norm_eps": _POSITIVE,
    "temperature": _POSITIVE,
    "theta_noise": _NOT_NEGATIVE,
    "value_init_std": _POSITIVE,
    "capacity_factor": _POSITIVE,
    "balance_weight": _NOT_NEGATIVE,
    "aux_weight": _NOT_NEGATIVE,
    "z_weight": _NOT_NEGATIVE,
    "memory_weight": _NOT_NEGATIVE,
    "sqdc_weight": _NOT_NEGATIVE,
    "sqdc_scale": _POSITIVE,
    "lam0": _POSITIVE,
    "ema_decay": _BELOW_ONE,
    "encode_fraction": _SHARE,
    "backward_fraction": _SHARE,
    "query_share": _SHARE,
}


def check_settings(config: ConfigDict) -> None:
    """Checks every number that has a range, and what no run can use.

    Raises:
        ValueError: names every setting that is wrong, its value and what it may be.
    """
    values = leaves(config)
    wrong = [
        f"{key} is {value!r}, expected {words}"
        for key, value in values.items()
        for fits, words in (_range(key),)
        if isinstance(value, int | float) and not fits(value)
    ]
    batch = config.training.requests * config.training.candidates
    if 0 < config.training.examples < batch:
        wrong.append(f"training.examples is {config.training.examples}, expected at least one batch of {batch} rows")
    parts = config.training.get("accumulate", 1)
    if parts > 0 and config.training.requests % parts:
        wrong.append(
            f"training.accumulate is {parts}, expected a number that divides training.requests "
            f"({config.training.requests})"
        )
    elif config.training.get("mesh"):
        try:
            check_requests(parse_mesh(config.training.mesh), config.training.requests // max(parts, 1))
        except ValueError as error:
            wrong.append(f"training.mesh: {error}")
    targets = {name: value for name, value in config.size.items() if isinstance(value, float)}
    if targets:
        name, value = next(iter(targets.items()))
        asked = ["--dense-params" if name == "dense_params" else "--train-flops", f"{value:g}"]
        asked += ["--examples", config.training.examples] if name == "budget_flops" else []
        asked += ["--schema", f"known_truth:{config.data.preset}"] if config.data.name == "known_truth" else []
        wrong.append(
            f"size.{name} is {value:g}, a target that only the planner of a sweep turns into a shape; find one with "
            f"{advised('recscale', 'size', config.architecture, *asked)}"
        )
    wrong += _hash_of_trained(config)
    if wrong:
        raise ValueError("; ".join(wrong))
    if config.tracking.wandb == "online":
        require_login()


def _hash_of_trained(config: ConfigDict) -> list[str]:
    """What of a hash table's tokens training or rounding would change, so that a key lost its slots."""
    model = config.model
    if model.get("addressing") != "hash":
        return []
    kept = {
        "model.tokenizer": (model.tokenizer, "identity"),
        "model.norm": (model.norm or "none", "none"),
        "model.layers": (model.layers, 1),
        "training.embedding_lr": (config.training.embedding_lr, 0),
    }
    return [
        f"{key} is {value!r}, but addressing='hash' finds a row by the bits of its token, which nothing may change: "
        f"set {key} to {needed!r}"
        for key, (value, needed) in kept.items()
        if value != needed
    ]


def _range(key: str) -> Test:
    own = _MODEL_RANGES.get(key.rpartition(".")[2]) if key.startswith("model.") else _RANGES.get(key)
    return own or _FINITE


def check_shape(config: ConfigDict, source: Source) -> None:
    """Builds the model as shapes alone and traces one forward pass.

    Raises:
        ValueError: it cannot be built or run; names the architecture and the first cause.
    """
    try:
        trace_forward(config.architecture, source.schema, config.model, source.requests, source.candidates)
    except Exception as error:  # whatever a model raises, this shape is not to be planned
        cause = str(error).strip().splitlines()
        raise ValueError(
            f"{config.architecture} cannot be built with these settings: {cause[0] if cause else type(error).__name__}"
        ) from error


def check_holdout(config: ConfigDict, source: Source) -> None:
    """Raises ValueError if there is no row to evaluate a run on; what makes its rows itself always has some."""
    if source.on_device:
        return
    held = source.facts().get("holdout_requests", {})
    if held.get("test") == 0 or next(iter(source.holdout()), None) is None:
        raise ValueError(
            f"data set {config.data.name!r} has no held-out row to evaluate a run on (requests held out: {held}): its "
            "users have too few rows for the split; give it more rows"
        )


def check_places(*folders: Path) -> None:
    """Raises ValueError if one of these folders is not there and cannot be made, or cannot be written to."""
    for folder in folders:
        place = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            raise ValueError(
                f"{folder} must be a folder that can be written to, and {place} is none: choose another with --out"
            )


def state_bytes(shapes: Any, mesh: Mesh | None = None) -> int:
    """Bytes of a tree of arrays or shapes; on a mesh those on the devices of this process."""
    if mesh is None:
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    return len(mesh.local_devices) * device_bytes(shapes)


def device_bytes(shapes: Any) -> int:
    """Bytes of the part that one device holds of arrays, or of shapes that say how they are split."""
    leaves = jax.tree.leaves(shapes)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def batch_bytes(source: Source) -> int:
    """Bytes of the inputs of a batch as a model sees them, histories included: the least that a step needs of it."""
    schema = source.schema
    own = sum(field.width for field in schema.candidate_fields)
    shared = schema.width - own + sum(sequence.length * sequence.width for sequence in schema.sequences)
    return 4 * source.requests * (shared + source.candidates * own)


def check_room(needed: int, folder: Path, batch: int = 0) -> None:
    """Compares the bytes of a state, which memory holds once and the disk in every checkpoint, and of a batch with what
    is free.

    Raises:
        ValueError: it does not fit; names both numbers and what to change.
    """
    free = host_memory.free_bytes()
    if jax.default_backend() == "cpu" and needed + batch > free:
        raise ValueError(
            f"the state alone takes {byte_text(needed)} of memory and a batch {byte_text(batch)}, and "
            f"{byte_text(free)} are free: train fewer seeds and rates together, lower training.requests, the model's "
            "sizes or the data's vocabularies, or use a larger machine"
        )
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free, stored = shutil.disk_usage(place).free, (KEPT_CHECKPOINTS + 1) * needed  # one more while it is written
    if stored > free:
        raise ValueError(
            f"checkpoints take {byte_text(stored)} of disk, and {byte_text(free)} are free at {place}: free "
            "some, or choose another folder with --out"
        )


def without_effect(config: ConfigDict, source: Source, counts: Count, keys: Iterable[str]) -> dict[str, str]:
    """{key: why} of the settings among `keys` that this run, of a model with these counts, would ignore."""
    t, known_truth = config.training, config.data.name == "known_truth"
    histories = bool(source.schema.sequences)
    reasons: dict[str, tuple[bool, str]] = {
        "data.root": (known_truth, "the known-truth log has no files"),
        "data.preset": (not known_truth, "only the known-truth log has presets"),
        "data.log_seed": (not known_truth and config.data.order != "shuffle", "data.order is not 'shuffle'"),
        "data.history_length": (not histories, "the data has no history"),
        "training.b1": (t.optimizer not in ("adam", "adamw"), f"training.optimizer is {t.optimizer!r}"),
        "training.b2": (t.optimizer == "adagrad", "training.optimizer is 'adagrad'"),
        "training.decay_fraction": (t.schedule != "wsd" and not t.passes, f"training.schedule is {t.schedule!r}"),
        "training.decay_shape": (
            t.schedule == "cosine" or t.schedule == "constant" and not t.passes,
            f"training.schedule is {t.schedule!r}",
        ),
        "training.examples": (bool(t.passes), f"training.passes is {t.passes}, and validation ends the run"),
        "training.patience": (not t.passes, "training.passes is 0"),
        "training.suffix_alpha": (not histories, "the data has no history"),
        "training.suffix_beta": (not histories or not t.suffix_alpha, "training.suffix_alpha is 0"),
        "training.value_lr_decay_examples": (
            t.value_lr_rule != "linear",
            f"training.value_lr_rule is {t.value_lr_rule!r}",
        ),
        "data.embedding_width": (known_truth, "the known-truth log has tables of its own"),
        "data.embedding_rows": (known_truth, "the known-truth log has tables of its own"),
    }
    own = {"training.embedding_": (not source.schema.tables(), "the data has no ids")}
    own["training.value_"] = (not counts.memory_params, f"{config.architecture} has no memory")
    for prefix, reason in own.items():
        if reason[0]:
            reasons |= {key: reason for key in leaves(config) if key.startswith(prefix)}
    return {key: reasons[key][1] for key in keys if key in reasons and reasons[key][0]}


def refuse_without_effect(found: dict[str, str]) -> None:
    """Raises ValueError, naming each setting of `without_effect` and why it changes nothing."""
    if found:
        named = "; ".join(f"{key} would be ignored: {why}" for key, why in found.items())
        raise ValueError(f"{named}. Leave it out")
