"""How often experts are open: from logged metrics to shares, activity and balance per token."""

import numpy as np
import pytest

from recscale.scaling.records import runs
from recscale.scaling.report.expert_activity import activity, activity_figure, by_token


def make_run(folder, arm, seed, **last):
    """A run of 20 intervals whose last tenth reports `last`, earlier ones nothing but zeros."""
    config = {"architecture": "rankmixer", "seed": seed}
    record = {"run_id": f"{arm}{seed}", "arm": arm, "config": config, "work": {"batch_rows": 100}}
    runs.write_record(folder, record | {"status": "done", "metrics": {"logloss": 0.5}})
    for step in range(1, 21):
        found = {f"model_{name}": (value if step > 18 else 0 * value).tolist() for name, value in last.items()}
        runs.append_metrics(folder, {"step": step, "examples": 100 * step, **found})


def test_shares_activity_and_balance(tmp_path):
    share = np.zeros((2, 3, 4))
    share[0, 0] = [0.5, 0.5, 0, 0]  # half of its experts, alike
    share[0, 1] = [1, 0, 0, 0]
    share[1] = 0.25
    make_run(tmp_path / "runs" / "a", "relu", 0, expert_share=share)
    make_run(tmp_path / "runs" / "b", "large", 0, expert_load=100 * share, expert_load_mixed=40 * np.ones((2, 3, 4)))
    table = activity([tmp_path])
    assert len(table) == 3 * share.size and set(table["half"]) == {"token", "mixed"}
    own = table[(table["half"] == "token")]
    for _, rows in own.groupby("arm"):
        np.testing.assert_allclose(rows["share"].to_numpy().reshape(share.shape), share)
    assert (table.loc[table["half"] == "mixed", "share"] == 0.4).all() and (table["logloss"] == 0.5).all()

    found = by_token(own[own["arm"] == "relu"]).set_index(["layer", "token"])
    assert found.loc[(0, 0), "activity"] == 1 and found.loc[(0, 0), "balance"] == pytest.approx(0.5)
    assert found.loc[(0, 0), "dead"] == 0.5 and found.loc[(0, 1), "balance"] == pytest.approx(0.25)
    assert found.loc[(0, 2), "activity"] == 0 and np.isnan(found.loc[(0, 2), "balance"])
    assert found.loc[(1, 1), "balance"] == pytest.approx(1.0) and found.loc[(1, 1), "dead"] == 0

    panels = [ax for ax in activity_figure(table).axes if ax.get_images()]
    assert [ax.get_title() for ax in panels] == ["relu", "large"]
    assert panels[0].get_images()[0].get_array().shape == (2, 12)
