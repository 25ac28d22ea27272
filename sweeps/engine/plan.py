"""The plan: every run of a sweep, resolved, counted and priced before anything is launched.

`plan.jsonl` holds one planned run a line. It only ever grows: a later stage (a refined learning rate, longer budgets)
appends runs derived from finished ones. Lines are data, complete in themselves: launching needs no sweep file.

    run_id      hash of the resolved configuration
    group_id    the same without seed, rate and number of examples: one shape on one log
    job         runs of a group planned together, lengths only where they share trunks: what one program trains
    shape_id    hash of the architecture and its sizes, the cluster of the law's bootstrap
    trunk_id    one trajectory: runs that differ only in the number of examples
    notes       what the sweep says of a run besides (see `combinators.noted`); absent where it says nothing
    brought     models, data sets and metrics of other distributions, with their versions; absent where there are none
    arguments   what `recscale plan` was given, so that a damaged plan can be made again
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from recscale import models
from recscale.scaling.counting.sizing import SizeResult, size_ladder
from recscale.scaling.data import Recordable, make_source
from recscale.scaling.data.sources import pin_log
from recscale.scaling.records.locks import hold
from recscale.scaling.records.number_text import byte_text
from recscale.scaling.records.overrides import OverrideError, apply, leaves, parse
from recscale.scaling.records.planned import (
    PLAN,
    intact_rows,
    lost_rows,
    read_plan,
    read_sweep,
    write_rows,
    write_sweep,
)
from recscale.scaling.records.runs import FINISHED, read_record
from recscale.scaling.training import resolved, run_id
from recscale.scaling.training.config import config_hash, data_section, default_warmup, identities
from recscale.scaling.training.preflight import (
    check_holdout,
    check_settings,
    check_shape,
    refuse_without_effect,
    without_effect,
)
from recscale.scaling.training.schedule import run_examples, run_steps, train_flops_per_row, warmup_steps
from recscale.scaling.training.step_options import step_options

from . import machine, predict
from .brought import brought, make_importable
from .combinators import split_notes
from .plan_difference import difference

__all__ = ["append_stage", "make_plan", "read_plan", "read_sweep", "run_config", "write_plan", "write_sweep"]

# Settings that change no result beyond rounding: not part of a run's identity, free to differ between two launches of
# one plan.
FREE_KEYS = (
    "data.root",
    "tracking.wandb",
    "tracking.project",
    "tracking.watts_per_device",
    "tracking.usd_per_device_hour",
    "tracking.grid_kg_per_kwh",
    "training.checkpoint_every_s",
    "training.keep_model",
    "training.mesh",
    "training.remat",
)


def is_free(assignment: str) -> bool:
    """Whether a `key=value` text sets something that cannot change a result."""
    return assignment.partition("=")[0].strip() in FREE_KEYS


# Of the section `training`, what runs of one trunk may differ in while their warm-up is open.
_VARIED = ("lr", "examples", "warmup_examples")


class PlanError(ValueError):
    """A plan that does not fit what is already there."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Planned runs in order, and notes on anything a reader should know (shapes that coincide, ...)."""

    rows: list[dict[str, Any]]
    notes: list[str]


def make_plan(
    config: ConfigDict,
    points: Sequence[Mapping[str, Any]],
    *,
    sweep: str,
    assignments: Sequence[str] = (),
    given: Sequence[str] = (),
    stage: int = 0,
    cache_dir: Path | str | None = None,
    folder: Path | None = None,
) -> Plan:
    """Resolves every point of a sweep into a planned run; nothing is written.

    Args:
        config: base configuration. points: what varies, laid over it. sweep: name recorded with every run.
        assignments: `key=value` texts laid over every run last, points included. given: settings that were asked for
            beside them and are in `config`; one of either kind that no run reads is refused.
        stage: 0 for the sweep itself, counted up by later stages.
        cache_dir: where data sources keep what depends on their configuration alone; workers use `OUT/cache`.
        folder: where modules lie that workers have to import beside what is installed: the sweep file's own.

    Raises:
        OverrideError: a key or value that does not fit, naming the point.
        ValueError: an impossible target or configuration, naming the point.
    """
    assigned = [*given, *(text.partition("=")[0].strip() for text in assignments)]
    planner = _Planner(sweep, stage, cache_dir, folder, assigned)

    laid: list[ConfigDict] = []
    for index, point in enumerate(points):
        with _naming(sweep, index, point):
            laid.append(lay(config, split_notes(point)[0], assignments))
            planner.announce(laid[index])
    for index, point in enumerate(points):
        with _naming(sweep, index, point):
            settings, notes = split_notes(point)
            planner.add(laid[index], [key for key in (*settings, *assigned) if key.startswith("model.")], notes)
    return planner.finish()


@contextlib.contextmanager
def _naming(sweep: str, index: int, point: Mapping[str, Any]) -> Iterator[None]:
    """Errors inside say which point of the sweep they are about."""
    try:
        yield
    except (OverrideError, ValueError) as error:
        kind = OverrideError if isinstance(error, OverrideError) else ValueError
        raise kind(f"point {index} of sweep {sweep!r}, {dict(point)}: {error}") from error


def lay(config: ConfigDict, point: Mapping[str, Any], assignments: Sequence[str] = ()) -> ConfigDict:
    """A point, then `key=value` texts, laid over a configuration. A change of architecture comes first and brings that
    architecture's own `model` section."""
    config = _overlay(config, point)
    for text in assignments:
        config = _overlay(config, parse(config, [text]))
    return config


def _overlay(config: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    architecture = values.get("architecture", config.architecture)
    if architecture != config.architecture:
        config = apply(config, {"architecture": architecture})
        try:
            config.model = models.get_config(architecture)
        except ValueError as error:
            raise OverrideError(str(error)) from error
    return apply(config, values)


@dataclasses.dataclass
class _Run:
    """A resolved run; targets: what its shape and length were chosen for; notes: see `combinators.noted`."""

    config: ConfigDict
    counts: Any
    source: Any
    targets: dict[str, float]
    notes: dict[str, Any]

    @property
    def examples(self) -> int:
        return run_examples(self.config, self.source, run_steps(self.config, self.source))

    @property
    def train_flops(self) -> float:
        return train_flops_per_row(self.counts, self.source) * self.examples


class _Planner:
    def __init__(
        self, sweep: str, stage: int, cache_dir: Path | str | None, folder: Path | None, assigned: Sequence[str]
    ):
        self.sweep, self.stage, self.cache_dir, self.folder = sweep, stage, cache_dir, folder
        self.assigned = assigned
        self.core_flops = machine.core_flops()
        self.runs: dict[str, _Run] = {}
        self.sources: dict[str, Any] = {}
        self.ladders: dict[str, set[float]] = {}  # targets of the points that differ in nothing else
        self.shapes: dict[str, dict[float, SizeResult]] = {}
        self.built: set[str] = set()
        self.ignored: dict[str, str] | None = None  # assigned settings that no run so far reads
        self.notes: list[str] = []

    def announce(self, config: ConfigDict) -> None:
        """Takes note of a run that will be added: the sizes of a ladder are chosen together."""
        pin_log(config)
        source, (_, shape) = self._source(config), _targets(config)
        for quantity, target in shape.items():
            ladder = self._ladder(config, source.schema, quantity, _split(config))
            self.ladders.setdefault(ladder, set()).add(target)

    def add(self, config: ConfigDict, pinned: Sequence[str], notes: Mapping[str, Any]) -> None:
        """Plans one run. `pinned` are the model settings the sweep itself sets: a target may not change them. `notes`
        go into its record."""
        source = self._source(config)
        (targets, shape), split = _targets(config), _split(config)
        for name in config.size:
            # A resolved run is what is trained, whatever was asked for: targets live beside it, not in its identity.
            config.size[name] = None
        if shape:
            wanted = {key: leaves(config)[key] for key in pinned}
            ((quantity, target),) = shape.items()
            config.model = self._sized(config, source.schema, quantity, target, split)
            for key, value in wanted.items():
                if leaves(config)[key] != value:
                    raise ValueError(
                        f"{key} = {value!r} is set by the sweep, but a size target chooses it "
                        f"({leaves(config)[key]!r}); leave out one of the two"
                    )
        counts = models.count(config.architecture, source.schema, config.model)
        if "budget_flops" in targets:
            config.training.examples = max(round(targets["budget_flops"] / train_flops_per_row(counts, source)), 1)
        self._check(config, source)
        ignored = without_effect(config, source, counts, self.assigned)
        self.ignored = ignored if self.ignored is None else {k: w for k, w in ignored.items() if k in self.ignored}
        run = run_id(config)
        if run not in self.runs:
            self.runs[run] = _Run(config, counts, source, targets, dict(notes))
        elif targets != self.runs[run].targets:
            asked, reached = _given(targets), _given(self.runs[run].targets)
            self.notes.append(f"{config.architecture}: {asked} reaches the same run as {reached}; planned once")

    def _check(self, config: ConfigDict, source: Any) -> None:
        """Refuses what training would refuse or trip over; every distinct shape is built once."""
        check_settings(config)
        steps, rows = run_steps(config, source), source.requests * source.candidates
        step_options(config.training, rows, warmup_steps(config, rows, [steps]))
        model = config.model.to_dict()
        key = config_hash({"name": config.architecture, "of": model, "schema": source.schema.hash(), "rows": rows})
        if key not in self.built:
            check_holdout(config, source)
            check_shape(config, source)
            self.built.add(key)

    def _source(self, config: ConfigDict) -> Any:
        training = config.training
        key = config_hash({"data": data_section(config), "rows": [training.requests, training.candidates]})
        if key not in self.sources:
            sizes = {"requests": training.requests, "candidates": training.candidates}
            try:
                self.sources[key] = make_source(data_section(config), cache_dir=self.cache_dir, **sizes)
            except KeyError as error:
                raise OverrideError(f"data: {error.args[0]}") from error
        return self.sources[key]

    def _ladder(self, config: ConfigDict, schema: Any, quantity: str, split: Mapping[str, Any]) -> str:
        to = {"of": resolved(config)["model"], "to": quantity, "split": dict(split), "schema": schema.hash()}
        return config_hash({"name": config.architecture} | to)

    def _sized(
        self, config: ConfigDict, schema: Any, quantity: Any, target: float, split: Mapping[str, Any]
    ) -> ConfigDict:
        """The architecture's model section for a target; every distinct ladder is solved once."""
        key = self._ladder(config, schema, quantity, split)
        if key not in self.shapes:
            name = config.architecture
            self.shapes[key], rising = size_ladder(
                name, schema, quantity, self.ladders[key], config=config.model, **split
            )
            if not rising:
                self.notes.append(f"{name}: no shapes near all sizes in which no setting falls from one to the next")
            for asked, solved in self.shapes[key].items():
                if not solved.reachable:
                    off = f"{solved.achieved:,} ({100 * solved.relative_error:+.1f} %)"
                    self.notes.append(f"{name}: {quantity}={asked:g} is out of reach; the nearest shape has {off}")
        return self.shapes[key][target].config

    def finish(self) -> Plan:
        """Rows of all runs, with what depends on those trained together: an open warm-up, and each job's cost."""
        refuse_without_effect(self.ignored or {})
        self._settle_warmup()
        named = [(run, identities(run.config)) for run in self.runs.values()]
        lengths: dict[str, set[int]] = {}
        for run, ids in named:
            lengths.setdefault(ids["trunk_id"], set()).add(run.examples)
        branching = {ids["group_id"] for _, ids in named if len(lengths[ids["trunk_id"]]) > 1}
        jobs: dict[str, list[_Run]] = {}
        for run, ids in named:
            # Without a trunk in common (rates of its own for every length), the short would wait for the longest.
            ids["job"] = ids["group_id"] if ids["group_id"] in branching else f"{ids['group_id']} {run.examples}"
            jobs.setdefault(ids["job"], []).append(run)
        costs = {job: self._cost(runs) for job, runs in jobs.items()}
        rows = {ids["run_id"]: self._row(run, ids, costs[ids["job"]]) for run, ids in named}
        return Plan(list(rows.values()), self.notes)

    def _settle_warmup(self) -> None:
        """A trunk warms up once, whatever branches off it: an open warm-up becomes that of its shortest run."""
        trunks: dict[str, list[ConfigDict]] = {}
        for run in self.runs.values():
            if run.config.training.warmup_examples is None and run.config.training.examples:
                plain = resolved(run.config)
                plain.pop("seed")
                plain["training"] = {key: plain["training"][key] for key in plain["training"] if key not in _VARIED}
                trunks.setdefault(config_hash(plain), []).append(run.config)
        for configs in trunks.values():
            rows = default_warmup(min(config.training.examples for config in configs))
            for config in configs:
                config.training.warmup_examples = rows

    def _cost(self, runs: Sequence[_Run]) -> dict[str, Any]:
        """What rows of runs trained together say of their job, and `row_seconds`, seconds per row of a run."""
        first, examples = runs[0], [run.examples for run in runs]
        configs = [run.config for run in runs]
        replicas = len({(config.seed, config.training.lr) for config in configs})
        batch_rows = first.source.requests * first.source.candidates
        rows = predict.job_steps(configs, examples) * batch_rows * replicas
        sizes = {"replicas": replicas, "horizons": len(set(examples))}
        steps, source = max(run_steps(run.config, run.source) for run in runs), first.source
        record = source.recorded_bytes(steps) if isinstance(source, Recordable) else 0
        memory = predict.peak_memory_bytes(first.config, source.schema, first.counts, record=record, **sizes)
        free = machine.free_memory_bytes()
        if memory > free:
            name = f"{first.config.architecture} with {first.counts.dense_params:,} dense parameters"
            room = f"predicted peak memory {byte_text(memory)}, but {byte_text(free)} are free here"
            self.notes.append(f"{name}: {room}; launch it on a larger machine")
        seconds = predict.seconds(train_flops_per_row(first.counts, first.source) * rows, rows, self.core_flops)
        return {
            "peak_memory_bytes": memory,
            "checkpoint_bytes": predict.checkpoint_bytes(first.config, first.source.schema, first.counts, **sizes),
            "job_seconds": round(seconds, 1),
            "row_seconds": seconds / sum(examples),
        }

    def _row(self, run: _Run, ids: dict[str, str], cost: dict[str, Any]) -> dict[str, Any]:
        config, targets = run.config, run.targets
        per_row = targets.get("train_flops")
        whole = targets.get("budget_flops", None if per_row is None else per_row * run.examples)
        foreign = brought(config, self.folder)
        row = {
            **ids,
            "sweep": self.sweep,
            "stage": self.stage,
            "config": json.loads(json.dumps(config.to_dict())),  # as it will be read back: no tuples
            "counts": dataclasses.asdict(run.counts),
            "targets": {
                "dense_params": targets.get("dense_params"),
                "train_flops_per_row": per_row,
                "train_flops": whole,
            },
            "target_error": _target_error(targets, run.counts),
            "predicted": {
                "examples": run.examples,
                "train_flops": run.train_flops,
                "basis": "FLOPs counted; memory and seconds estimated",
                **{name: value for name, value in cost.items() if name != "row_seconds"},
                "seconds": round(cost["row_seconds"] * run.examples, 1),
            },
        }
        return row | ({"brought": foreign} if foreign else {}) | ({"notes": run.notes} if run.notes else {})


def write_plan(
    out: Path | str, plan: Plan, *, extend: bool = False, arguments: Sequence[str] = ()
) -> tuple[list[dict[str, Any]], int]:
    """Appends a plan's new runs to `out/plan.jsonl`; returns all planned rows and how many are new.

    Planning the same sweep again changes nothing. A different sweep over an existing plan needs `extend`. `arguments`:
    of the command line, noted with the new rows.

    Raises:
        PlanError: the folder holds the plan of a different sweep; the message says what differs.
    """
    out = Path(out)
    with hold(out / ".plan.lock", wait_s=30.0):
        path, old = out / PLAN, intact_rows(out)
        part = config_hash({"runs": sorted(row["run_id"] for row in plan.rows)})
        new = [row for row in plan.rows if row["run_id"] not in {row["run_id"] for row in old}]
        # Lines of this very sweep that were lost come back; lines of others stay lost, and `read_plan` says so.
        mended = bool(new) and lost_rows([row for row in old if row["part"] == part]) == len(new)
        if old and not (extend or mended) and not _same(old, plan.rows, part):
            differing = difference(old, plan.rows, but_for=FREE_KEYS)
            raise PlanError(
                f"{path} holds another sweep: {differing}. Give this one a folder of its own (--out), or add its runs "
                "to the plan (--extend)"
            )
        together, taken = {row["run_id"]: row["job"] for row in plan.rows}, {row["job"] for row in old}
        jobs = {together[row["run_id"]]: row["job"] for row in old if row["part"] == part}
        for row in new:
            if row["job"] not in jobs:
                jobs[row["job"]] = _job_name(row["group_id"], taken)
        new = [row | {"job": jobs[row["job"]], "part": part, "arguments": list(arguments)} for row in new]
        damaged = path.exists() and len(path.read_bytes().splitlines()) != len(old)
        rows = write_rows(out, [*old, *new]) if new or damaged else old
    return rows, len(new)


def append_stage(out: Path | str, points: Sequence[Mapping[str, Any]], derived_from: Iterable[str]) -> int:
    """Appends a later stage to a plan: points laid over the configuration of the first planned run; returns how many
    runs are new. The stage may depend on finished runs only, so that planning again gives the same runs.

    Raises:
        PlanError: a run it is derived from is not finished.
    """
    rows = read_plan(out)
    for run in derived_from:
        status = (read_record(Path(out) / "runs" / run) or {"status": "planned"})["status"]
        if status not in FINISHED:
            raise PlanError(f"a stage can be derived from finished runs only; run {run} is {status}")
    stage = 1 + max(row["stage"] for row in rows)
    make_importable(rows)
    base, cache = run_config(rows[0]), Path(out) / "cache"
    plan = make_plan(base, points, sweep=rows[0]["sweep"], stage=stage, cache_dir=cache)
    return write_plan(out, plan, extend=True)[1]


def run_config(row: Mapping[str, Any], overrides: Iterable[str] = ()) -> ConfigDict:
    """The configuration of a planned run, exactly as it was hashed, with settings that change no result laid over.

    Raises:
        OverrideError: an override that would change the run.
        PlanError: the row's configuration does not hash to its id (another version of the package planned it).
    """
    config = ConfigDict(_tuples(row["config"]))
    found = run_id(config)
    if found != row["run_id"]:
        raise PlanError(
            f"planned run {row['run_id']} now hashes to {found}: the plan was edited, or made by another version; "
            "plan again in a new folder"
        )
    values = parse(config, overrides)
    for key in values:
        if key not in FREE_KEYS:
            raise OverrideError(f"{key!r} changes the runs, so it belongs into the plan; a launch may set {FREE_KEYS}")
    return apply(config, values)


def _same(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]], part: str) -> bool:
    """Whether a sweep is the one the plan was made of: all its first-stage runs, or one of the parts it grew by."""
    planned = {row["run_id"] for row in old}
    wanted = {row["run_id"] for row in new}
    first = {row["run_id"] for row in old if row["stage"] == 0}
    return wanted <= planned and (wanted == first or any(row["part"] == part for row in old))


def _job_name(group: str, taken: set[str]) -> str:
    """A group planned again (more seeds, more horizons) is another program, so another job with its own checkpoints."""
    names = [group, *(f"{group}-{n}" for n in range(2, len(taken) + 3))]
    taken.add(name := next(name for name in names if name not in taken))
    return name


def _targets(config: ConfigDict) -> tuple[dict[str, float], dict[str, float]]:
    """What a run is sized for, and the part of it that its shape is chosen for: one quantity, or nothing.

    Raises:
        ValueError: two targets for one shape.
    """
    named = ("dense_params", "train_flops", "budget_flops")
    targets = {name: float(config.size[name]) for name in named if config.size[name] is not None}
    if {"dense_params", "train_flops"} <= targets.keys():
        raise ValueError("size.dense_params and size.train_flops are both set; a shape has one target")
    shape = {name: value for name, value in targets.items() if name != "budget_flops"}
    if not shape and _split(config):
        raise ValueError("size.encoder_share and size.fixed split a target, and neither size.dense_params nor "
                         "size.train_flops is set")  # fmt: skip
    return targets, shape


def _split(config: ConfigDict) -> dict[str, Any]:
    """What a sequence encoder is to have of a shape's target; empty where it stays as configured."""
    return {name: config.size[name] for name in ("encoder_share", "fixed") if config.size.get(name) is not None}


def _target_error(targets: Mapping[str, float], counts: Any) -> float | None:
    """Relative error of the reached shape against its target, None without a target."""
    reached = {"dense_params": counts.dense_params, "train_flops": counts.train_flops_per_row}
    return next((value / targets[name] - 1 for name, value in reached.items() if name in targets), None)


def _given(targets: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value:g}" for name, value in targets.items() if value is not None)


def _tuples(value: Any) -> Any:
    """Lists back to tuples: JSON has no tuples, configurations hold no lists."""
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_tuples(item) for item in value)
    return value
