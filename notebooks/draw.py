"""Draws the figures of the README and of notebooks/runs/README.md from the committed tables, into notebooks/runs.

    python notebooks/draw.py                 all of them
    python notebooks/draw.py mixer_ladder    one

Drawn twice from one table, a figure is the same file.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import pandas as pd

from recscale.scaling.bench import law_calibration
from recscale.scaling.report import figures, truth, verdict, views

RUNS = Path(__file__).parent / "runs"
# Table of a ladder: its axis, and whether the largest value is held out (a short ladder would be left with too few).
LADDERS = {
    "mixer_ladder": ("dense_params", True),
    "length_ladder": ("history_length", False),
    "memory_slots_ladder": ("memory_slots", False),
}


def draw_ladder(name: str, bootstrap: int = 1000) -> None:
    """Loss against the ladder's axis and, where a floor is granted or known, the excess beside it."""
    axis, held_out = LADDERS[name]
    table = pd.read_parquet(RUNS / f"{name}.parquet")
    (view,) = views.make_views(table, axes=[axis], hold_out_largest=held_out, bootstrap=bootstrap)
    figures.save(figures.study_figure(view, truth=truth.find(table)), RUNS / f"{name}.png")


def draw_quickstart() -> None:
    """The figure the README opens with."""
    found = verdict.judge(pd.read_parquet(RUNS / "quickstart.parquet"), "rankmixer", "dlrm_mlp")
    figures.save(verdict.verdict_figure(found), RUNS / "quickstart.png")


def draw_law_calibration() -> None:
    """What the simulated studies of the law fitter found."""
    law_calibration.figure(pd.read_parquet(RUNS / "law_calibration.parquet"), RUNS / "law_calibration.png")


FIGURES = {name: partial(draw_ladder, name) for name in LADDERS} | {
    "quickstart": draw_quickstart,
    "law_calibration": draw_law_calibration,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", default=[*FIGURES], help="figures to draw; default all")
    for name in parser.parse_args().names:
        FIGURES[name]()
        print(f"drew {name}.png")


if __name__ == "__main__":
    main()
