"""`recscale count`, `recscale size`, `recscale models`: sizes and costs before anything runs."""

from __future__ import annotations

import json
from typing import Any

import click

from recscale.scaling.records.number_text import byte_text

_SCHEMA = click.option(
    "--schema", "schema_name", default="reference", show_default=True, metavar="NAME",
    help="reference (32 fields of width 16), known_truth:PRESET, a .json file, or the folder of an imported log.",
)  # fmt: skip
_SET = click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Change the model's config.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line.")


@click.command()
@click.argument("model")
@_SCHEMA
@_SET
@click.option("--xla", is_flag=True, help="Also compile it and show XLA's own cost and memory analysis.")
@_JSON
def count(model: str, schema_name: str, assignments: tuple[str, ...], xla: bool, as_json: bool) -> None:
    """Counts parameters and FLOPs of MODEL: closed form, parameter tree and jaxpr side by side."""
    from .table import PHASES, XLA_ROWS, count_table

    schema, config = _schema(model, schema_name), _config(model, assignments)
    table = count_table(model, schema, config, xla=xla)
    counts = table.count
    click.echo(f"{model}  {_settings(config)}\nschema {schema_name} ({schema.hash()}), {len(schema.fields)} fields\n")
    parts = {
        "dense": counts.dense_params,
        "  of which active": counts.active_params,
        "  of which tokenizer": counts.tokenizer_params,
        "  of which head": counts.head_params,
        "embedding tables": counts.embedding_params,
        "memory": counts.memory_params,
    }
    click.echo("parameters")
    for name, value in parts.items():
        click.echo(f"  {name:22s} {value:>22,d}")
    click.echo(f"  {'dense, counted':22s} {table.tree_params:>22,d}\n")
    units = {"user": "per request", "candidate": "per candidate", "forward": "per row", "train": "per row"}
    units |= dict.fromkeys(("step", "train_step"), "per batch")
    head = f"{'FLOPs':26s} {'closed form':>22s} {'jaxpr':>22s}"
    click.echo(head + (f" {'XLA':>22s} {'XLA temporaries':>18s}" if xla else ""))
    for phase in PHASES:
        if units[phase] == "per batch" and not table.closed[phase] and not table.jaxpr[phase]:
            continue  # few models make parameters from parameters
        line = (
            f"  {phase.replace('_', ' '):11s}{units[phase]:13s} {table.closed[phase]:>22,d} {table.jaxpr[phase]:>22,d}"
        )
        if phase in table.xla:
            flops, temporary = table.xla_flops_per_row(phase), table.xla[phase].temporary_bytes
            line += f" {_number(flops):>22s} {byte_text(temporary):>18s}"
        click.echo(line)
    if xla:
        click.echo(f"\nXLA counts element-wise work too; a batch of {XLA_ROWS} rows, optimiser left out.")
    verdict = "yes" if table.agrees else "NO, the closed form is wrong"
    if not table.agrees and config.get("experts") and config.get("expert_path", "masked") != "masked":
        verdict = "not to be compared: here closed experts are computed too; --set expert_path=masked counts them"
    click.echo(f"\nclosed form = counted: {verdict}")
    if as_json:
        _print_json({"model": model, "schema": schema_name, "config": config.to_dict(), **table.to_dict()})


@click.command()
@click.argument("model")
@click.option("--dense-params", type=float, help="Target of the parameters outside embedding tables, e.g. 1e6.")
@click.option("--train-flops", type=float, help="Target of training FLOPs per row, e.g. 1e7.")
@click.option("--examples", type=float, help="Read --train-flops as the FLOPs of a whole run of so many rows.")
@click.option("--tolerance", default=0.03, show_default=True, help="Accepted relative error.")
@click.option("--encoder-share", type=float, help="Share of the target that the sequence encoder is sized for.")
@click.option("--fixed", type=click.Choice(["backbone"]), help="Size the sequence encoder alone, in front of this.")
@_SCHEMA
@_SET
@_JSON
def size(
    model: str,
    dense_params: float | None,
    train_flops: float | None,
    examples: float | None,
    tolerance: float,
    encoder_share: float | None,
    fixed: str | None,
    schema_name: str,
    assignments: tuple[str, ...],
    as_json: bool,
) -> None:
    """Finds a hardware-friendly shape of MODEL for a target size or cost."""
    if (dense_params is None) == (train_flops is None):
        raise click.UsageError("give one target, --dense-params or --train-flops")
    from .sizing import size as solve

    result = solve(
        model, _schema(model, schema_name), dense_params=dense_params, train_flops=train_flops, examples=examples,
        config=_config(model, assignments), tolerance=tolerance, encoder_share=encoder_share, fixed=fixed,
    )  # fmt: skip
    per = " of the run" if examples else " per row" if result.quantity == "train_flops" else ""
    click.echo(f"{model}  {_settings(result.overrides)}")
    click.echo(f"  dense parameters       {result.count.dense_params:>22,d}")
    click.echo(f"  training FLOPs per row {result.count.train_flops_per_row:>22,d}")
    click.echo(
        f"  target {result.target:.4g} {result.quantity}{per}, achieved {result.achieved:.6g}, "
        f"error {100 * result.relative_error:+.2f} %"
    )
    if not result.reachable:
        click.echo(f"  no shape within {100 * tolerance:g} %: this is the nearest one found")
    if as_json:
        _print_json(
            {
                "model": model,
                "schema": schema_name,
                "quantity": result.quantity,
                "target": result.target,
                "achieved": result.achieved,
                "relative_error": result.relative_error,
                "reachable": result.reachable,
                "dense_params": result.count.dense_params,
                "train_flops": result.count.train_flops_per_row,
                "config": result.config.to_dict(),
                "count": result.count.to_dict(),
            }
        )


@click.command()
@_JSON
def models(as_json: bool) -> None:
    """Lists the architectures, with their default size on the reference schema."""
    from recscale import models as registry

    from .schemas import load_schema

    schema = load_schema()
    rows: list[dict[str, Any]] = []
    kinds = {name: kind for kind in ("backbone", "encoder", "ranker") for name in registry.list_models(kind)}
    kinds |= dict.fromkeys(registry.list_presets(), "preset")
    for name, kind in kinds.items():
        # What reads histories has no size here: the reference schema has none.
        counts = None if registry.reads_history(name) else registry.count(name, schema)
        rows.append(
            {
                "model": name,
                "kind": kind,
                "dense_params": counts and counts.dense_params,
                "train_flops_per_row": counts and counts.train_flops_per_row,
            }
        )
    click.echo(f"{'model':24s} {'kind':10s} {'dense parameters':>18s} {'train FLOPs per row':>22s}")
    for row in rows:
        dense, flops = (_number(row[key]) for key in ("dense_params", "train_flops_per_row"))
        click.echo(f"{row['model']:24s} {row['kind']:10s} {dense:>18s} {flops:>22s}")
    click.echo(
        "\nAny encoder composes with any backbone: ENCODER+BACKBONE. A ranker stands alone. Presets are fixed sizes."
    )
    if as_json:
        _print_json({"models": rows})


def _schema(model: str, name: str) -> Any:
    """The schema of that name; a model that reads histories needs one that has them."""
    from recscale import models as registry

    from .schemas import load_schema

    schema = load_schema(name)
    if registry.reads_history(model) and not schema.sequences:
        raise ValueError(f"{model} reads histories and the schema {name} has none; known_truth:long has one (--schema)")
    return schema


def _config(model: str, assignments: tuple[str, ...]) -> Any:
    """The architecture's default config with `--set` laid over it."""
    from recscale import models as registry
    from recscale.scaling.records.overrides import apply, parse

    config = registry.get_config(model)
    return apply(config, parse(config, assignments))


def _settings(config: Any, prefix: str = "") -> str:
    """key=value of every setting, nested keys dotted."""
    parts = []
    for name, value in config.items():
        nested = hasattr(value, "items")
        parts.append(_settings(value, f"{prefix}{name}.") if nested else f"{prefix}{name}={value}")
    return " ".join(parts)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{round(value):,d}"


def _print_json(value: dict[str, Any]) -> None:
    click.echo(json.dumps(value))
