"""Embedding width, table rows and history length as axes of sweeps on an imported log: from plan to figure."""

import pandas as pd
import pytest

from recscale.scaling.data.importing.importer import import_log
from recscale.scaling.data.made_up_shop import write_shop
from recscale.scaling.records.runs import RECORD, TABLE

SWEEP = """
from recscale.scaling.training import get_config as base_config
from recscale.sweeps import by_embedding_rows, by_embedding_width, by_history_length, chain
def get_config():
    config = base_config("din+dlrm_mlp", "stored")
    config.model.backbone.widths, config.model.encoder.sequence = (8,), "clicks"
    config.training.requests, config.training.passes, config.training.patience = 256, 1, 1
    return config
def get_sweep():
    return {points}
def get_report():
    return {{"form": "power_offset", "axes": {{"N": "data.embedding_width"}}, "hold_out_largest": False}}
"""


@pytest.mark.slow
def test_every_axis_of_tables_goes_from_plan_to_figure(call, last_json, tmp_path):
    log = import_log(write_shop(tmp_path, 2_000, users=40), tmp_path / "log")
    counted = {}
    for name, points in {
        "width": "by_embedding_width([1, 2, 4, 8, 16])",
        "others": "chain(by_embedding_rows([8, 32]), by_history_length([2, 4]))",
    }.items():
        file, out = tmp_path / f"{name}.py", tmp_path / "runs" / name
        file.write_text(SWEEP.format(points=points))
        call("plan", file, "--data", log.folder, "--out", out)
        call("launch", out, "--data", log.folder, "--workers", "1")
        call("collect", out)
        table = pd.read_parquet(out / TABLE)
        counted[name] = table
        assert (table["status"] == "done").all()
        before = {path: path.read_bytes() for path in out.glob(f"runs/*/{RECORD}")}
        lost = next(iter(before))
        lost.unlink()
        call("launch", out, "--data", log.folder, "--workers", "1")
        call("collect", out)
        assert pd.read_parquet(out / TABLE)["logloss"].tolist() == table["logloss"].tolist()
        assert all(path.read_bytes() == old for path, old in before.items() if path != lost), "finished runs stay"
    width, others = counted["width"], counted["others"]
    assert width.sort_values("data.embedding_width")["embedding_params"].is_monotonic_increasing
    assert others["data.embedding_rows"].notna().sum() == 2 and others["embedding_params"].nunique() == 3
    assert {2, 4} <= set(others["history_length"])
    axis = ["--form", "power_offset", "--axes", "N=data.embedding_width", "--json", "--bootstrap", "0"]
    fitted = last_json(call("fit", tmp_path / "runs/width" / TABLE, *axis, code=3))
    assert fitted["refusals"], "five sizes of 1,600 rows carry no exponent"
    call("plot", tmp_path / "runs/width", "--bootstrap", "0")
    assert "embedding" in (tmp_path / "runs/width/report/report.html").read_text()
