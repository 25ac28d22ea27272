"""The plan: every run of a sweep, resolved, counted and priced before anything is launched.

`plan.jsonl` holds one planned run a line. It only ever grows: a later stage (a refined learning rate, longer budgets)
appends runs derived from finished ones. Lines are data, complete in themselves: launching needs no sweep file.

    run_id      hash of the resolved configuration
    group_id    the same without seed, rate and number of examples: one shape on one log
    job         runs of a group planned together: what a worker trains in one program
    shape_id    hash of the architecture and its sizes, the cluster of the law's bootstrap
    trunk_id    one trajectory: runs that differ only in the number of examples
    brought     models, data sets and metrics of other distributions, with their versions; absent where there are none
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from recscale import models
from recscale.scaling.counting.sizing import size
from recscale.scaling.data import make_source
from recscale.scaling.records.files import write_atomically
from recscale.scaling.records.overrides import OverrideError, apply, leaves, parse
from recscale.scaling.records.runs import FINISHED, read_record
from recscale.scaling.training import group_id, resolved, run_id, shape_id, trunk_id
from recscale.scaling.training.config import config_hash
from recscale.scaling.training.schedule import run_examples, run_steps, train_flops_per_row

from . import machine, predict
from .brought import brought, make_importable
from .locks import hold

PLAN = "plan.jsonl"
SWEEP = "sweep.json"

# Settings that cannot change a result: not part of a run's identity, free to differ between two launches of one plan.
FREE_KEYS = ("data.root", "tracking.wandb", "tracking.project", "training.checkpoint_every_s")


def is_free(assignment: str) -> bool:
    """Whether a `key=value` text sets something that cannot change a result."""
    return assignment.partition("=")[0].strip() in FREE_KEYS


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
    stage: int = 0,
    cache_dir: Path | str | None = None,
    folder: Path | None = None,
) -> Plan:
    """Resolves every point of a sweep into a planned run; nothing is written.

    Args:
        config: base configuration. points: what varies, laid over it. sweep: name recorded with every run.
        assignments: `key=value` texts laid over every run last, points included.
        stage: 0 for the sweep itself, counted up by later stages.
        cache_dir: where data sources keep what depends on their configuration alone; workers use `OUT/cache`.
        folder: where modules lie that workers have to import beside what is installed: the sweep file's own.

    Raises:
        OverrideError: a key or value that does not fit, naming the point.
        ValueError: an impossible target or configuration, naming the point.
    """
    planner = _Planner(sweep, stage, cache_dir, folder)
    for index, point in enumerate(points):
        try:
            laid = lay(config, point, assignments)
            texts = [text.partition("=")[0].strip() for text in assignments]
            planner.add(laid, pinned=[key for key in (*point, *texts) if key.startswith("model.")])
        except OverrideError as error:
            raise OverrideError(f"point {index} of sweep {sweep!r}, {dict(point)}: {error}") from error
        except ValueError as error:
            raise ValueError(f"point {index} of sweep {sweep!r}, {dict(point)}: {error}") from error
    return planner.finish()


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


class _Planner:
    def __init__(self, sweep: str, stage: int, cache_dir: Path | str | None, folder: Path | None):
        self.sweep, self.stage, self.cache_dir, self.folder = sweep, stage, cache_dir, folder
        self.core_flops = machine.core_flops()
        self.rows: dict[str, dict[str, Any]] = {}
        self.configs: dict[str, ConfigDict] = {}
        self.counts: dict[str, Any] = {}
        self.sources: dict[str, Any] = {}
        self.shapes: dict[str, ConfigDict] = {}
        self.notes: list[str] = []

    def add(self, config: ConfigDict, pinned: Sequence[str]) -> None:
        """Plans one run. `pinned` are the model settings the sweep itself sets: a target may not change them."""
        source = self._source(config)
        targets = {name: value for name, value in config.size.items() if value is not None}
        if {"dense_params", "train_flops"} <= targets.keys():
            raise ValueError("size.dense_params and size.train_flops are both set; a shape has one target")
        for name in targets:
            # A resolved run is what is trained, whatever was asked for: targets live beside it, not in its identity.
            config.size[name] = None
        shape = {name: value for name, value in targets.items() if name != "budget_flops"}
        if shape:
            wanted = {key: leaves(config)[key] for key in pinned}
            config.model = self._sized(config, source.schema, shape)
            for key, value in wanted.items():
                if leaves(config)[key] != value:
                    raise ValueError(
                        f"{key} = {value!r} is set by the sweep, but a size target chooses it "
                        f"({leaves(config)[key]!r}); leave out one of the two"
                    )
        counts = models.count(config.architecture, source.schema, config.model)
        if "budget_flops" in targets:
            config.training.examples = max(round(targets["budget_flops"] / train_flops_per_row(counts, source)), 1)
        run = run_id(config)
        if run not in self.rows:
            self.configs[run], self.counts[run] = config, counts
            self.rows[run] = self._row(config, run, counts, source, targets)
        elif self.rows[run]["targets"] != (row := self._row(config, run, counts, source, targets))["targets"]:
            asked, reached = _given(row["targets"]), _given(self.rows[run]["targets"])
            self.notes.append(f"{config.architecture}: {asked} reaches the same run as {reached}; planned once")

    def _source(self, config: ConfigDict) -> Any:
        training = config.training
        key = config_hash({"data": config.data.to_dict(), "rows": [training.requests, training.candidates]})
        if key not in self.sources:
            sizes = {"requests": training.requests, "candidates": training.candidates}
            try:
                self.sources[key] = make_source(config.data.to_dict(), cache_dir=self.cache_dir, **sizes)
            except KeyError as error:
                raise OverrideError(f"data: {error.args[0]}") from error
        return self.sources[key]

    def _sized(self, config: ConfigDict, schema: Any, targets: dict[str, float]) -> ConfigDict:
        """The architecture's model section nearest to a target; every distinct question is solved once."""
        model = resolved(config)["model"]
        key = config_hash({"name": config.architecture, "of": model, "to": targets, "schema": schema.hash()})
        if key not in self.shapes:
            solved = size(config.architecture, schema, config=config.model, **targets)
            self.shapes[key] = solved.config
            if not solved.reachable:
                asked, off = _given(targets), f"{solved.achieved:,} ({100 * solved.relative_error:+.1f} %)"
                self.notes.append(f"{config.architecture}: {asked} is out of reach; the nearest shape has {off}")
        return self.shapes[key]

    def _row(self, config: ConfigDict, run: str, counts: Any, source: Any, targets: dict[str, float]) -> dict[str, Any]:
        examples = run_examples(config, source, run_steps(config, source))
        train_flops = train_flops_per_row(counts, source) * examples
        per_row = targets.get("train_flops")
        whole = targets.get("budget_flops", None if per_row is None else per_row * examples)
        foreign = brought(config, self.folder)
        row = {
            "run_id": run,
            "group_id": group_id(config),
            "shape_id": shape_id(config),
            "trunk_id": trunk_id(config),
            "sweep": self.sweep,
            "stage": self.stage,
            "config": json.loads(json.dumps(config.to_dict())),  # as it will be read back: no tuples
            "counts": dataclasses.asdict(counts),
            "targets": {
                "dense_params": targets.get("dense_params"),
                "train_flops_per_row": per_row,
                "train_flops": whole,
            },
            "target_error": _target_error(targets, counts),
            "predicted": {
                "examples": examples,
                "train_flops": train_flops,
                "basis": "FLOPs counted; memory and seconds estimated",
            },
        }
        return row | ({"brought": foreign} if foreign else {})

    def finish(self) -> Plan:
        """Adds what depends on the runs trained together: predicted memory and seconds of each job."""
        groups: dict[str, list[str]] = {}
        for run, row in self.rows.items():
            groups.setdefault(row["group_id"], []).append(run)
        for runs in groups.values():
            configs, first = [self.configs[run] for run in runs], runs[0]
            examples = [self.rows[run]["predicted"]["examples"] for run in runs]
            replicas = len({(config.seed, config.training.lr) for config in configs})
            source, counts = self._source(configs[0]), self.counts[first]
            rows = predict.job_steps(configs, examples) * source.requests * source.candidates * replicas
            memory = predict.peak_memory_bytes(
                configs[0], source.schema, counts, replicas=replicas, horizons=len(set(examples))
            )
            seconds = predict.seconds(train_flops_per_row(counts, source) * rows, rows, self.core_flops)
            whole = sum(examples)
            for run, count in zip(runs, examples, strict=True):
                self.rows[run]["predicted"] |= {
                    "peak_memory_bytes": memory,
                    "job_seconds": round(seconds, 1),
                    "seconds": round(seconds * count / whole, 1),
                }
        return Plan(list(self.rows.values()), self.notes)


def write_plan(out: Path | str, plan: Plan, *, extend: bool = False) -> tuple[list[dict[str, Any]], int]:
    """Appends a plan's new runs to `out/plan.jsonl`; returns all planned rows and how many are new.

    Planning the same sweep again changes nothing. A different sweep over an existing plan needs `extend`.

    Raises:
        PlanError: the folder holds the plan of a different sweep; the message says what differs.
    """
    out = Path(out)
    with hold(out / ".plan.lock", wait_s=30.0):
        old = read_plan(out) if (out / PLAN).exists() else []
        part = config_hash({"runs": sorted(row["run_id"] for row in plan.rows)})
        new = [row for row in plan.rows if row["run_id"] not in {row["run_id"] for row in old}]
        if old and not extend and not _same(old, plan.rows, part):
            raise PlanError(
                f"{out / PLAN} holds another sweep: {difference(old, plan.rows)}. Give this one a folder of its own "
                "(--out), or add its runs to the plan (--extend)"
            )
        taken = {row["job"] for row in old}
        jobs = {group: _job_name(group, taken) for group in dict.fromkeys(row["group_id"] for row in new)}
        new = [row | {"job": jobs[row["group_id"]], "part": part} for row in new]
        if new:
            write_atomically(out / PLAN, "".join(json.dumps(row) + "\n" for row in [*old, *new]))
    return [*old, *new], len(new)


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


def read_plan(out: Path | str) -> list[dict[str, Any]]:
    """Rows of `out/plan.jsonl`.

    Raises:
        FileNotFoundError: no plan there. ValueError: a line is not JSON; names the line.
    """
    path = Path(out) / PLAN
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; plan a sweep first: recscale plan FILE --out {out}")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error})") from error
    return rows


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


def difference(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> str:
    """In words, what two plans' runs differ in: their numbers, then the settings whose values are not the same."""
    before, after = {row["run_id"] for row in old}, {row["run_id"] for row in new}
    gone, added = len(before - after), len(after - before)
    text = f"{gone} of its {len(before)} runs are not in this sweep, {added} of this sweep's {len(after)} are new"
    old_values, new_values = _values(old), _values(new)
    changes = [
        f"{key} {_listed(old_values.get(key, set()))} there, {_listed(new_values.get(key, set()))} here"
        for key in dict.fromkeys([*old_values, *new_values])
        if old_values.get(key) != new_values.get(key) and key not in FREE_KEYS
    ]
    return text + (f"; {'; '.join(changes[:5])}" if changes else "") + ("; ..." if len(changes) > 5 else "")


def write_sweep(out: Path | str, facts: Mapping[str, Any]) -> None:
    """Replaces `out/sweep.json`: the sweep's name, its file, and the options of its report."""
    write_atomically(Path(out) / SWEEP, json.dumps(facts, indent=1, sort_keys=True) + "\n")


def read_sweep(out: Path | str) -> dict[str, Any]:
    """`out/sweep.json`, empty where there is none."""
    path = Path(out) / SWEEP
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _same(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]], part: str) -> bool:
    """Whether a sweep is the one the plan was made of: all its first-stage runs, or one of the parts it grew by."""
    planned = {row["run_id"] for row in old}
    wanted = {row["run_id"] for row in new}
    first = {row["run_id"] for row in old if row["stage"] == 0}
    return wanted <= planned and (wanted == first or any(row["part"] == part for row in old))


def _job_name(group: str, taken: set[str]) -> str:
    """A group planned again (more seeds, more horizons) is another program, so another job with its own checkpoints."""
    names = [group, *(f"{group}-{n}" for n in range(2, len(taken) + 3))]
    return next(name for name in names if name not in taken)


def _target_error(targets: Mapping[str, float], counts: Any) -> float | None:
    """Relative error of the reached shape against its target, None without a target."""
    if "dense_params" in targets:
        return counts.dense_params / targets["dense_params"] - 1
    if "train_flops" in targets:
        return counts.train_flops_per_row / targets["train_flops"] - 1
    return None


def _values(rows: Sequence[Mapping[str, Any]]) -> dict[str, set[str]]:
    """{dotted key: the values it takes over the rows, as JSON}."""
    values: dict[str, set[str]] = {}
    for row in rows:
        for key, value in leaves(ConfigDict(_tuples(row["config"]))).items():
            values.setdefault(key, set()).add(json.dumps(value))
    return values


def _listed(values: set[str]) -> str:
    shown = sorted(values)[:4]
    return ("absent" if not shown else ", ".join(shown)) + (", ..." if len(values) > 4 else "")


def _given(targets: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value:g}" for name, value in targets.items() if value is not None)


def _tuples(value: Any) -> Any:
    """Lists back to tuples: JSON has no tuples, configurations hold no lists."""
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_tuples(item) for item in value)
    return value
