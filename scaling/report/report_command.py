"""`recscale report`: one page of one or several studies, to be explored in a browser."""

from __future__ import annotations

from pathlib import Path

import click

from recscale.scaling.laws.commands import BOOTSTRAP, TARGET
from recscale.scaling.laws.forms.registry import ONE_AXIS


@click.command()
@click.argument("studies", nargs=-1, required=True, metavar="OUT...", type=click.Path(path_type=Path, exists=True))
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="HTML file to write.")
@TARGET
@click.option("--form", default=ONE_AXIS, show_default=True, help="Law to fit.")
@BOOTSTRAP
@click.option("--no-compare", is_flag=True, help="Leave out which architecture scales better (seconds a pair).")
def report(
    studies: tuple[Path, ...], out: Path, target: str | None, form: str, bootstrap: int, no_compare: bool
) -> None:
    """Write one self-contained page of studies, each the folder of a sweep or a run table: the answers in words, plots
    with every run behind them, the table of runs, learning curves, and all numbers with what is refused.
    """
    from recscale.scaling.records.files import write_atomically

    from .report import fitted, named, summarised
    from .study_page import study_page

    found = []
    for name, study in named(studies).items():
        contents = fitted(study, form, None, target, True, None, {"bootstrap": bootstrap}, None)
        found.append((name, contents, summarised(contents, {})))
    write_atomically(out, study_page(found, comparisons=not no_compare))
    click.echo(f"page  {out} ({out.stat().st_size / 2**20:.2g} MiB)")
