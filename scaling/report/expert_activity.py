"""How often every expert of a model is open, and how evenly: a table, a row per run, layer, token and expert, and its
picture, in the shape of figure 4 of RankMixer (arXiv 2507.15551) and figure 7 of TokenMixer-Large (arXiv 2602.06563).

    share      of rows that open the expert: by a ReLU gate above 0, or as one of the K largest
    activity   sum of a token's shares over its experts: how many are open, of which top-k routing leaves no choice
    balance    exp(entropy of a token's shares) / E: 1 where all its experts are open equally often, 1/E where one is

A run logs the shares of its training batches (model_expert_share of ReLU-routed experts, model_expert_load, the rows of
a batch, of top-k); those of its last tenth are averaged. TokenMixer-Large has two halves a layer: `mixed` tokens and
tokens. A shared expert, open on every row, is not among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from recscale.scaling.records import runs
from recscale.scaling.records.files import replacing

from . import frame
from .wording import architecture_words

# Metric -> (half of a layer, whether it counts rows).
_METRICS = {
    "model_expert_share": ("token", False),
    "model_expert_load": ("token", True),
    "model_expert_load_mixed": ("mixed", True),
}
_CELL = ["arm", "seed", "half", "layer", "token"]
_PANELS = 4


def activity(folders: Sequence[Path]) -> pd.DataFrame:
    """Shares of rows per expert of runs: columns run_id, arm (the architecture where none is noted), seed, lr_dense,
    lr_bracketed, logloss of the holdout, half ("token" or "mixed"), layer, token, expert, share.

    Raises:
        ValueError: no run reports its experts.
    """
    found = [rows for folder, record in runs.records_in(folders) for rows in _shares(folder, record)]
    if not found:
        raise ValueError(f"no run in {', '.join(map(str, folders))} reports its experts ({', '.join(_METRICS)})")
    return pd.concat(found, ignore_index=True)


def save(table: pd.DataFrame, path: Path) -> Path:
    """Writes a table of `activity`, replacing the file at once."""
    with replacing(path) as temporary:
        table.to_parquet(temporary, index=False, write_page_checksum=True)
    return path


def _shares(folder: Path, record: dict[str, Any]) -> list[pd.DataFrame]:
    lines = runs.read_metrics(folder)
    tail = [line for line in lines if line["step"] > 0.9 * lines[-1]["step"]]
    facts = {
        "run_id": record["run_id"],
        "arm": record.get("arm") or record["config"]["architecture"],
        "seed": record["config"].get("seed", 0),
        "lr_dense": record["config"].get("training", {}).get("lr"),
        "lr_bracketed": record.get("lr_bracketed"),
        "logloss": record.get("metrics", {}).get("logloss"),
    }
    found = []
    for name, (half, counts) in _METRICS.items():
        values = [np.asarray(line[name], float) for line in tail if line.get(name) is not None]
        if values:
            share = np.mean(values, axis=0) / (record["work"]["batch_rows"] if counts else 1)
            layer, token, expert = (axis.reshape(-1) for axis in np.indices(share.shape))
            places = {"half": half, "layer": layer, "token": token, "expert": expert, "share": share.reshape(-1)}
            found.append(pd.DataFrame(facts | places))
    return found


def by_token(table: pd.DataFrame) -> pd.DataFrame:
    """activity and balance of every token of every run: columns arm, seed, half, layer, token, experts, activity,
    balance, dead (share of its experts that less than a thousandth of the rows open)."""

    def of(share: pd.Series) -> pd.Series:
        own = share.to_numpy(float)
        spread = own[own > 0] / max(own.sum(), 1e-30)
        even = np.exp(-np.sum(spread * np.log(spread))) / len(own) if own.sum() > 0 else np.nan
        figures = {"experts": len(own), "activity": own.sum(), "balance": even, "dead": np.mean(own < 1e-3)}
        return pd.Series(figures)

    return table.groupby(_CELL, sort=False)["share"].apply(of).unstack().reset_index()


def activity_figure(table: pd.DataFrame, *, style: str = "report") -> Figure:
    """Layers by tokens, and a column for every expert of a token; a panel for every arm, of its first seed."""
    table = table[table["half"] == "token"]
    arms = list(dict.fromkeys(table["arm"]))[:_PANELS]
    with frame.style(style):
        figure, axes = frame.panels(len(arms), style, None)
        for ax, arm in zip(axes, arms, strict=True):
            rows = table[table["arm"] == arm]
            rows = rows[rows["run_id"] == rows["run_id"].iloc[0]]
            grid = rows.pivot(index="layer", columns=["token", "expert"], values="share")
            experts = rows["expert"].nunique()
            tokens = grid.shape[1] // experts
            image = ax.imshow(grid.to_numpy(), aspect="auto", cmap="cividis", vmin=0.0)
            ax.set(xlabel="token, and its experts", ylabel="layer", title=architecture_words(arm))
            ax.set(xticks=experts * (np.arange(tokens) + 0.5) - 0.5, xticklabels=range(tokens), yticks=range(len(grid)))
            ax.vlines(experts * np.arange(1, tokens) - 0.5, -0.5, len(grid) - 0.5, color="white", lw=1.0)
            ax.grid(False)
            figure.colorbar(image, ax=ax, label="share of rows that open it")
        frame.lay_out(figure, "activity of experts", [], [])
    return figure


def experts_figure(folders: Sequence[Path], *, style: str = "report", **_: Any) -> Figure:
    """`activity_figure` of run folders, or of the folders of sweeps; at most four arms.

    Raises:
        ValueError: no run reports its experts.
    """
    return activity_figure(activity(folders), style=style)
