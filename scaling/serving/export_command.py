"""`recscale export`: a finished run's model as programs that need neither this package nor flax."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("run", metavar="RUN", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--data", "root", help="Folder of the imported log; default the one the run was trained from.")
@click.option(
    "--platform",
    "platforms",
    multiple=True,
    type=click.Choice(["cpu", "cuda", "tpu"]),
    help="Where the programs are to run; may be given several times [default: as here].",
)
@click.option(
    "--w8a16",
    is_flag=True,
    help="Kernels in int8 with a scale per output channel: off by 1/254 of the largest at most.",
)
def export(run: Path, out: Path, root: str | None, platforms: tuple[str, ...], w8a16: bool) -> None:
    """Write the model that RUN left as jax.export programs `encode_user` and `score`, for any number of requests and
    candidates, with its tables, its vocabularies, a manifest, and `served.py`, which loads them with jax and numpy.
    """
    from .export import export_run

    manifest = export_run(run, out, root=root, platforms=platforms, w8a16=w8a16)
    size = sum(path.stat().st_size for path in out.iterdir())
    click.echo(f"{manifest['architecture']} for {', '.join(manifest['platforms'])} in {out} ({size / 2**20:.3g} MiB)")
    click.echo(f'load it: cd {out} && python -c \'from served import load; print(load(".").manifest["inputs"])\'')
