"""Draws the figures of the README and of the notes in notebooks/runs from the committed tables, into notebooks/runs.

    python notebooks/draw.py                 all of them
    python notebooks/draw.py mixer_ladder    one

Drawn twice from one table, a figure is the same file.
"""

from __future__ import annotations

import argparse
import json
import math
from functools import partial
from pathlib import Path

import matplotlib
import pandas as pd

from recscale.scaling.bench import law_calibration
from recscale.scaling.records.number_text import amount
from recscale.scaling.report import expert_activity, figures, frame, panel, study_figures, truth, verdict, views
from recscale.scaling.report.wording import architecture_words

RUNS = Path(__file__).parent / "runs"
# Table of a ladder: its axis, and whether the largest value is held out (a short ladder would be left with too few).
LADDERS = {
    "mixer_ladder": ("dense_params", True),
    "length_ladder": ("history_length", False),
    "memory_slots_ladder": ("memory_slots", False),
}
GUIDES = matplotlib.colormaps["viridis_r"]


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


def draw_mixers_by_rows() -> None:
    """Excess of either mixer against its size, a guide for every number of rows; what was forecast, and what came."""
    runs, most, check = (pd.read_parquet(RUNS / f"mixers_by_rows{which}.parquet") for which in ("", "_most", "_check"))
    runs = pd.concat([runs, most], ignore_index=True)
    told = [row for row in json.loads((RUNS / "forecast.json").read_text()) if row["by"] == "joint"]
    with frame.style():
        figure, axes = frame.panels(len(told), "report", None)
        for ax, row in zip(axes, told, strict=True):
            own = runs[runs["architecture"] == row["architecture"]]
            excess = own["logloss"] - own["asymptote"]
            for rows in sorted(own["examples"].unique()):
                cells = excess.groupby(own["dense_params"].where(own["examples"] == rows)).mean()
                colour = GUIDES(math.log10(rows / 5e4) / 2.3)
                ax.plot(cells.index, cells, "o-", color=colour, lw=0.8, label=f"{amount(rows)} rows")
            ran = check[check["architecture"] == row["architecture"]]
            ends = [[row["predicted"] - row["wide_low"]], [row["wide_high"] - row["predicted"]]]
            name, size = f"forecast, {amount(ran['examples'].iloc[0])} rows", ran["dense_params"].iloc[0]
            ax.errorbar(size, row["predicted"], ends, fmt="D", mfc="white", color="black", capsize=4, label=name)
            excess = ran["logloss"] - ran["asymptote"]
            ax.plot(ran["dense_params"], excess, "*", ms=12, color="#D55E00", label="measured")
            title = architecture_words(row["architecture"])
            ax.set(title=title, yscale="log", ylabel="excess logloss over the asymptote")
            panel.axis_in_words(ax, "dense_params")
            ax.legend(fontsize="small")
    frame.save(figure, RUNS / "mixers_by_rows.png")


def draw_isoflop(architecture: str) -> None:
    """One mixer's groups of equal compute, and the best size of each."""
    table = pd.read_parquet(RUNS / "mixers_by_rows_isoflop.parquet")
    figure = study_figures.isoflop_figure(table[table["architecture"] == architecture])
    figures.save(figure, RUNS / f"mixers_by_rows_isoflop_{architecture}.png")


def draw_mixers_by_size() -> None:
    """DCNv2 beside the quickstart's RankMixer, as its own figure has that beside the MLP."""
    table = pd.concat([pd.read_parquet(RUNS / f"{name}.parquet") for name in ("quickstart", "mixers_by_size")])
    found = verdict.judge(table, "dcnv2", "rankmixer")
    figures.save(verdict.verdict_figure(found), RUNS / "mixers_by_size.png")


def draw_memory_slots_hashed() -> None:
    """Hash tables at their best update beside the memories, at every size, with 2e6 rows."""
    shown = ["hash table, K = 1, Adagrad", "hash table, K = 8, Adagrad", "pkm, Adam", "pkm_random, Adam", "MSN, Adam"]
    ladder = pd.read_parquet(RUNS / "memory_slots_ladder.parquet")
    ladder = ladder.assign(arm=ladder["architecture"] + ", Adam")
    table = pd.concat([pd.read_parquet(RUNS / "memory_slots_hashed.parquet"), ladder], ignore_index=True)
    table = table[table["arm"].isin(shown)].drop_duplicates("run_id")
    (view,) = views.make_views(
        table.assign(architecture=table["arm"]), axes=["memory_slots"], hold_out_largest=False, bootstrap=1000
    )
    figures.save(figures.study_figure(view, truth=truth.find(ladder)), RUNS / "memory_slots_hashed.png")


def draw_expert_activity() -> None:
    """Which experts are open, per layer and token, in four arms."""
    shown = ["RankMixer, two routers", "RankMixer, top-k", "TokenMixer-Large", "TokenMixer-Large, balance loss"]
    table = pd.read_parquet(RUNS / "expert_activity.parquet")
    table = pd.concat([table[table["arm"] == arm] for arm in shown])
    figures.save(expert_activity.activity_figure(table), RUNS / "expert_activity.png")


FIGURES = {name: partial(draw_ladder, name) for name in LADDERS} | {
    "memory_slots_hashed": draw_memory_slots_hashed,
    "expert_activity": draw_expert_activity,
    "quickstart": draw_quickstart,
    "law_calibration": draw_law_calibration,
    "mixers_by_rows": draw_mixers_by_rows,
    "mixers_by_rows_isoflop_dlrm_mlp": partial(draw_isoflop, "dlrm_mlp"),
    "mixers_by_rows_isoflop_rankmixer": partial(draw_isoflop, "rankmixer"),
    "mixers_by_size": draw_mixers_by_size,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", default=[*FIGURES], help="figures to draw; default all")
    for name in parser.parse_args().names:
        FIGURES[name]()
        print(f"drew {name}.png")


if __name__ == "__main__":
    main()
