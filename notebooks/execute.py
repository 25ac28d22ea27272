"""Executes the notebooks in place; with a sweep's folder, first takes over its run table.

    python notebooks/execute.py                          executes all of them on committed tables
    python notebooks/execute.py --sweep runs/quickstart  takes that sweep's table over first

Outputs are written without timestamps or machine names, so a diff shows what changed in the results.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import nbformat
import pandas as pd
from nbclient import NotebookClient

HERE = Path(__file__).parent
NOTEBOOKS = (
    "quickstart",
    "mixers",
    "history_length",
    "memory_slots",
    "compute_allocation",
    "what_a_fit_can_say",
    "any_table",
    "own_log",
    "reuse_a_module",
    "budgets_and_cold_start",
    "domains",
)
TABLE = HERE / "runs" / "quickstart.parquet"
TIMEOUT_S = 600


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook at `path` with fresh outputs; raises CellExecutionError with the traceback of a failing cell."""
    # The committed results are those of the CPU, whatever the machine has.
    os.environ["JAX_PLATFORMS"] = "cpu"
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT_S,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,  # how many pieces a kernel sends a text in is chance
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def take_over(sweep: Path) -> None:
    """Copies a sweep's run table to notebooks/runs."""
    TABLE.parent.mkdir(exist_ok=True)
    pd.read_parquet(sweep / "runs.parquet").to_parquet(TABLE, index=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", default=NOTEBOOKS, help="notebooks to execute; default all")
    parser.add_argument(
        "--sweep", type=Path, help="folder of a finished sweep whose run table replaces the committed one"
    )
    arguments = parser.parse_args()
    if arguments.sweep is not None:
        take_over(arguments.sweep)
    for name in arguments.names:
        path = HERE / f"{Path(name).stem}.ipynb"
        nbformat.write(execute(path), path)
        print(f"executed {path.name}")


if __name__ == "__main__":
    main()
