"""`recscale evaluate` and `recscale predict`: what a finished run's model makes of its log, and of other rows."""

from __future__ import annotations

import json
from pathlib import Path

import click

_RUN = click.argument("run", type=click.Path(path_type=Path, exists=True, file_okay=False))
_DATA = click.option("--data", "root", help="Folder of the imported log; default the one the run was trained from.")


@click.command()
@_RUN
@_DATA
@click.option("--split", type=click.Choice(["valid", "test"]), default="test", show_default=True, help="Part to print.")
@click.option("--json", "as_json", is_flag=True, help="Print the metrics as one JSON object, last.")
def evaluate(run: Path, root: str | None, split: str, as_json: bool) -> None:
    """Evaluate the model that RUN left on the log it was trained on: the metrics of its record."""
    from .model_files import restore_model

    try:
        trainer, state, source = restore_model(run, root)
    except (FileNotFoundError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    metrics = source.evaluate(trainer.holdout_logits(state)[0])
    shown = {
        name.removeprefix("valid_"): value
        for name, value in metrics.items()
        if name.startswith("valid_") == (split == "valid")
    }
    for name, value in shown.items():
        if isinstance(value, int | float):
            click.echo(f"{name:28s} {value:.6g}")
    if as_json:
        click.echo(json.dumps(shown))


@click.command()
@_RUN
@click.option(
    "--data",
    "file",
    required=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="File of rows with the log's columns; labels are not needed.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="Parquet file of scores.")
@click.option("--log", "root", help="Folder of the imported log; default the one the run was trained from.")
def predict(run: Path, file: Path, out: Path, root: str | None) -> None:
    """Score the rows of a file with the model that RUN left: row, logit and probability of every label.

    Ids and histories are those of the log the run was trained on; rows that cannot be read are left out and counted.
    """
    from .predicting import predict_file

    try:
        rows, report = predict_file(run, file, out, root)
    except (FileNotFoundError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(report)
    click.echo(f"{rows:,} rows scored in {out}")
