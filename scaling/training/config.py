"""The run configuration: one nested ConfigDict, everything a run is a function of.

A run id is the hash of the resolved configuration. Runs that differ only in `seed`, `training.lr` and
`training.examples` form a group: one compiled program with a replica axis, one checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict, config_dict

from recscale import models
from recscale.scaling.data.sources import STORED
from recscale.scaling.records.plain import checksum

# Most passes over a finite log, where a run does not say.
MOST_PASSES = 30

# Settings that become the replica axis (seed, rate) or a decay branch of one trunk (examples).
REPLICA_KEYS = ("seed", "training.lr", "training.examples")

# Checkpoints of a group that are kept, the newest first: one that is damaged has an older one behind it.
KEPT_CHECKPOINTS = 2


def get_config(architecture: str = "rankmixer", data: str = "known_truth") -> ConfigDict:
    """Default configuration of one run of `architecture` on `data`.

    Raises:
        ValueError: the architecture is not registered (the message names the nearest one).
    """
    config = ConfigDict()
    config.architecture = architecture
    config.model = models.get_config(architecture)
    config.seed = 0

    # Targets the planner turns into `config.model` through the sizing solver; None keeps the model as written.
    config.size = ConfigDict()
    config.size.dense_params = config_dict.placeholder(float)
    config.size.train_flops = config_dict.placeholder(float)  # per row
    config.size.budget_flops = config_dict.placeholder(float)  # whole run: sets training.examples to what it affords
    # Of a shape's target a sequence encoder has what its own settings take; or this share; or all but the "backbone".
    config.size.encoder_share = config_dict.placeholder(float)
    config.size.fixed = config_dict.placeholder(str)

    config.data = ConfigDict()
    config.data.name = data
    config.data.preset = "dense"  # known-truth preset; ignored by other data sets
    config.data.overrides = ConfigDict()  # fields of the known-truth configuration laid over the preset
    config.data.log_seed = 0  # which stream of the same world; replicas always share it
    config.data.root = ""  # folder of a downloaded data set
    config.data.history_length = 0  # 0 keeps the schema's own length
    config.data.embedding_width = 0  # of a stored log: 0 keeps 16
    config.data.embedding_rows = 0  # of a stored log: most rows of a table, ids of larger ones are hashed; 0 keeps all
    config.data.holdout_rows = 65_536
    config.data.order = "time"
    config.data.passes = 1
    # data.metrics, further metrics of the holdout by name or address, is there only where it is set
    # (recscale.scaling.records.overrides.OPTIONAL): runs without any keep their ids.

    t = config.training = ConfigDict()
    t.requests = 512  # R per step
    t.candidates = 1  # C per request
    t.examples = 1_000_000  # rows (R * C * steps) of the whole run; rounded up to whole steps
    # At most so many passes with validation after each, until `patience` of them do not improve it; then a decay from
    # the best. 0 = the one-pass protocol, with `examples` as the horizon.
    t.passes = 0
    t.patience = 2
    t.lr = 3e-3  # peak rate of the dense parameters
    t.optimizer = "adamw"  # adamw | adam | rmsprop | adagrad
    t.b1 = 0.9
    t.b2 = 0.999
    t.eps = 1e-8
    t.weight_decay = 0.0  # decoupled, on matrices only, scaled by the rate
    t.clip_norm = 0.0  # global gradient norm of the dense parameters; 0 = off
    # Training on random suffixes: every request keeps its newest Beta(alpha, beta) share of the history; both below 1:
    # mostly very short or whole. 0 = off. Evaluation always sees the whole history.
    t.suffix_alpha = 0.0
    t.suffix_beta = 0.0
    t.embedding_optimizer = "rowwise_adagrad"  # rowwise_adagrad | rowwise_adam | rowwise_sgd
    t.embedding_lr = 0.05
    t.embedding_eps = 1e-8
    t.embedding_init_std = 0.01
    t.embedding_l2 = 0.0  # l2 / 2 |row|^2 of every row that was ever read, in the loss of every step
    t.value_update = "rows_adam"  # memory values: rows_adam | rows_adagrad | rows_sgd | dense_adam
    t.value_lr_rule = "multiple"  # of training.lr | linear (down to it) | absolute (scheduled) | constant
    t.value_lr = 1.0  # the multiple, or the rate itself
    t.value_lr_decay_examples = 0  # rows over which rule "linear" reaches 1x
    t.value_clip_norm = 0.0  # gradient norm of one table of values; 0 = off
    t.value_weight_decay = 0.0  # decoupled; under row updates on touched rows only
    t.value_bias_correction = "global"  # Adam's step count: of the run ("global") or of the row ("row")
    t.schedule = "wsd"  # wsd | cosine | constant
    t.warmup_examples = config_dict.placeholder(int)  # None: the smaller of 20,000 and 5 % of the run
    t.decay_fraction = 0.2  # last share of each horizon spent decaying (wsd)
    t.decay_shape = "linear"  # linear | sqrt (1 - sqrt(t)), both to 0
    t.log_every_examples = 0  # 0 = a fortieth of the shortest horizon
    t.checkpoint_every_s = 30.0  # wall seconds between checkpoints, 0 = a logging interval; never changes a result
    t.keep_model = True  # leave the trained model in the run's folder; never changes a result
    t.accumulate = 1  # parts of a batch whose gradients are summed, one after the other: less memory for activations
    t.remat = "none"  # none | dots | blocks: what the backward pass computes again; never changes more than rounding
    t.mesh = ""  # devices that share the run, "data=4,fsdp=2"; "" = one. Rounding differs, nothing else

    if data == STORED:
        # A finite log: shuffled passes as long as they improve.
        config.data.preset = ""
        config.data.order = "shuffle"
        t.examples, t.passes, t.warmup_examples = 0, MOST_PASSES, 0
        # Rows come back, and what one pass profits from is learnt by heart in two. So dense parameters learn slowly
        # and fall back, and table rows rest where an L2 holds them, those that are seldom read above all. Chosen on
        # the validation rows of the made-up shop (clicks of 200,000 rows, DCNv2): .3484; .3491 with 3e-4, 0 and 3e-4.
        t.lr, t.weight_decay, t.embedding_l2 = 3e-4, 3.0, 1e-3

    config.tracking = ConfigDict()
    config.tracking.wandb = "off"  # off | offline | online; a mirror of metrics.jsonl, never the source
    config.tracking.project = "recscale"
    # What only the user knows, for the bill of a sweep and the resources of a record; 0 = not said.
    config.tracking.watts_per_device = 0.0
    config.tracking.usd_per_device_hour = 0.0
    config.tracking.grid_kg_per_kwh = 0.0
    return config


def data_section(config: ConfigDict) -> dict[str, Any]:
    """The `data` section as a source is made of it: with as many passes as training may take."""
    section, training = config.data.to_dict(), config.training
    if training.passes:
        section["passes"] = training.passes + max(math.ceil(training.decay_fraction * training.passes), 1)
    return section


def resolved(config: ConfigDict) -> dict[str, Any]:
    """Plain dictionary of everything that decides a run's numbers, in canonical form.

    Left out: `tracking`, `training.checkpoint_every_s` and `data.root`, which cannot change a result; the mesh and
    rematerialisation, which change no more than rounding (a run goes on with other devices than it began with); parts
    of a batch, random suffixes, sizes of tables and settings of models that came later where they are off. A warm-up
    that was left open is the rows it comes to; it stays open where the data decides how long the run is.
    """
    plain = config.to_dict()  # a copy, to the leaves
    examples = plain["training"].get("examples")
    if plain["training"].get("warmup_examples", 0) is None and examples:
        plain["training"]["warmup_examples"] = default_warmup(examples)
    plain.pop("tracking", None)
    plain["training"].pop("checkpoint_every_s", None)
    plain["training"].pop("keep_model", None)
    plain["training"].pop("mesh", None)
    plain["training"].pop("remat", None)
    if plain["training"].get("accumulate") == 1:
        plain["training"].pop("accumulate")
    plain["training"]["data_parallel"] = False  # a setting of earlier versions, whose runs keep their ids
    if not plain["training"].get("passes"):
        plain["training"].pop("passes", None)
        plain["training"].pop("patience", None)
    if not plain["training"].get("embedding_l2"):
        plain["training"].pop("embedding_l2", None)
    plain["data"].pop("root", None)
    for key in ("encoder_share", "fixed"):  # as the targets beside them, of no resolved run
        plain.get("size", {}).pop(key, None)
    _drop_unset(plain["model"])
    for key in ("embedding_width", "embedding_rows"):
        if not plain["data"].get(key):
            plain["data"].pop(key, None)
    if not plain["training"].get("suffix_alpha"):
        # Off: the run is the same as one of a configuration that never had the setting.
        plain["training"].pop("suffix_alpha", None)
        plain["training"].pop("suffix_beta", None)
    return plain


# Settings of models that runs without them keep their ids for, where they are at these defaults.
_LATER = {"hidden_dropout": 0.0, "batch_norm": False, "output_norm": False, "inner_init": 1.0}


def _drop_unset(model: dict[str, Any]) -> None:
    """Takes out of a model's settings, and those of its parts, what came later and is at its default."""
    for key, default in _LATER.items():
        if model.get(key) == default:
            del model[key]
    for part in model.values():
        if isinstance(part, dict):
            _drop_unset(part)


def default_warmup(examples: int) -> int:
    """Rows of warm-up of a run of so many rows that says nothing else."""
    return min(20_000, examples // 20)


def config_hash(plain: dict[str, Any]) -> str:
    """First 12 hex digits of the SHA-256 of the canonical JSON of a plain dictionary."""
    try:
        return checksum(plain)[:12]
    except TypeError as error:
        raise TypeError(f"a run configuration holds plain values only: {error}") from error


def identities(config: ConfigDict) -> dict[str, str]:
    """run_id, group_id, shape_id and trunk_id of a configuration, which is resolved once."""
    plain = resolved(config)
    shape = {"architecture": plain["architecture"], "model": plain["model"]}
    sizes = ("history_length", "embedding_width", "embedding_rows")
    of_trunk = () if plain["training"]["schedule"] == "cosine" else ("training.examples",)
    return {
        "run_id": config_hash(plain),
        "group_id": config_hash(_without(plain, REPLICA_KEYS)),
        "shape_id": config_hash(shape | {key: plain["data"][key] for key in sizes if key in plain["data"]}),
        "trunk_id": config_hash(_without(plain, of_trunk)),
    }


def run_id(config: ConfigDict) -> str:
    """Hash of the resolved configuration: the run's name everywhere."""
    return config_hash(resolved(config))


def group_id(config: ConfigDict) -> str:
    """Hash of the resolved configuration without the replica keys."""
    return identities(config)["group_id"]


def shape_id(config: ConfigDict) -> str:
    """Hash of the architecture and its size settings, history length included, without seed, rate or amount of data."""
    return identities(config)["shape_id"]


def trunk_id(config: ConfigDict) -> str:
    """Hash of one trajectory: the resolved configuration without its number of examples. A cosine schedule decays from
    the start, so there every horizon is a trajectory of its own."""
    return identities(config)["trunk_id"]


def _without(plain: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """A resolved configuration without some of its settings, `section.key` or `key`."""
    left = {name: dict(value) if isinstance(value, dict) else value for name, value in plain.items()}
    for key in keys:
        section, _, name = key.rpartition(".")
        (left[section] if section else left).pop(name, None)
    return left


def require_word(setting: str, value: str, known: Sequence[str]) -> None:
    """Raises ValueError, naming the setting, if its value is none of the known words."""
    if value not in known:
        raise ValueError(f"{setting} is {value!r}, expected one of {', '.join(known)}")
