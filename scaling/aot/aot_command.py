"""`recscale aot`: kernels and training steps compiled for accelerators that are not there."""

from __future__ import annotations

import json
from typing import Any

import click

_TARGETS = ("tpu-v5e", "tpu-v5p", "tpu-v6e", "tpu-7x", "h100", "h200")


@click.command()
@click.option("--target", "targets", multiple=True, required=True, type=click.Choice(_TARGETS), help="May be repeated.")
@click.option("--kernel", "operations", multiple=True, metavar="OP", help="Only this operation; may be repeated.")
@click.option("--case", "cases", multiple=True, metavar="NAME", help="Only this shape of it; may be repeated.")
@click.option("--implementation", "implementations", multiple=True, metavar="NAME", help="xla, pallas_tpu, ...")
@click.option("--model", metavar="MODEL", help="The training step of this architecture or preset.")
@click.option("--mesh", metavar="MESH", help="As 16x16; default one device, fsdp=16,tensor=16 from 1e9 parameters.")
@click.option("--schema", metavar="NAME", help="Schema of the step, see `recscale count --help`.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Setting of the run or of the model.")
@click.option("--rows-per-step", "rows", default=8192, show_default=True, help="Rows of the whole step.")
@click.option("--candidates", default=1, show_default=True, help="Rows of one request.")
@click.option("--kernels-only", is_flag=True, help="No training steps.")
@click.option("--quick", is_flag=True, help="Without large gradients that are mostly XLA's and slow to compile.")
@click.option("--lower-only", is_flag=True, help="Kernels up to where the chip's compiler would begin; needs none.")
@click.option("--jobs", type=click.IntRange(min=1), help="Targets compiled at the same time.  [as many as cores]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line.")
def aot(targets: tuple[str, ...], kernels_only: bool, jobs: int | None, as_json: bool, **asked: Any) -> None:
    """Compiles kernels or a training step for a chip on a machine without it; nothing runs.

    Without --kernel and --model: every kernel, and one training step of every family. Ends with code 1 if a program
    fails to compile or needs more temporaries than its kernel states. Needs the chip's compiler: `make aot-tpu` and
    `make aot-gpu` set up an environment that has it.
    """
    if asked["cases"] and not asked["operations"]:
        raise click.UsageError("--case names a shape of an operation; give --kernel as well")
    if asked["model"] and asked["lower_only"]:
        raise click.UsageError("--lower-only is for kernels; a training step needs the compiler")
    if asked["operations"] and asked["model"]:
        raise click.UsageError("give --kernel or --model, not both")
    if not asked["model"] and (asked["mesh"] or asked["schema"] or asked["assignments"]):
        raise click.UsageError("--mesh, --schema and --set describe a training step; give --model as well")
    from .environment import CompilerMissing, prepare

    try:
        platforms = {"tpu" if name.startswith("tpu") else "gpu" for name in targets}
        prepare(platforms, compiler=not asked["lower_only"])
    except CompilerMissing as error:
        raise click.ClickException(str(error)) from error
    from recscale.pallas_kernels.targets import get_target
    from recscale.scaling.records.provenance import cores

    from .outcomes import header, line, result, summary
    from .processes import rows_side_by_side
    from .program import FAILED, compile_all
    from .request import Request

    request = Request(**asked, steps=not (kernels_only or asked["lower_only"]))
    first = get_target(targets[0])
    request.programs(first)  # a name or size that cannot be is an error here, before any process
    alone = len(targets) == 1
    if alone:
        rows = compile_all(request.programs, first, lower_only=request.lower_only)
    else:
        rows = rows_side_by_side(targets, request, jobs or len(cores()))
    click.echo(header())
    found = []
    for row in rows:
        click.echo(line(row))
        found.append(row)
    click.echo(summary(found))
    if as_json:
        click.echo(json.dumps(result(found)))
    if any(row["status"] == FAILED for row in found):
        click.get_current_context().exit(1)
