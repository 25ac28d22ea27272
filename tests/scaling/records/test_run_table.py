"""What a sweep varied can be told from its run table."""

from recscale.scaling.records import runs


def _record(run_id, architecture="msn", **settings):
    model = {"combine": "gated", "width": 8, "layers_with_memory": [0]} | settings
    config = {"architecture": architecture, "seed": 0, "model": model, "training": {"lr": 1e-3, "examples": 100}}
    return {"run_id": run_id, "status": "done", "config": config, "metrics": {"logloss": 0.5}}


def _collected(tmp_path, *records):
    for record in records:
        runs.write_record(tmp_path / "runs" / record["run_id"], record)
    return runs.collect(tmp_path)


def test_arms_of_an_ablation_have_columns_and_constants_have_none(tmp_path):
    table = _collected(
        tmp_path,
        _record("a"),
        _record("b", combine="plain"),
        _record("c", layers_with_memory=[0, 1]),
        _record("d", architecture="pkm", width=16),
    )
    assert list(table["model.combine"]) == ["gated", "plain", "gated", "gated"]
    assert list(table["model.layers_with_memory"]) == ["[0]", "[0]", "[0, 1]", "[0]"]
    # Architectures may differ in a setting without it having been varied.
    assert "model.width" not in table
    assert "training.lr" not in table and "seed" in table
    assert table.query("`model.combine` == 'plain'")["run_id"].tolist() == ["b"]


def test_settings_of_several_types_survive_the_file(tmp_path):
    import pandas as pd

    table = _collected(tmp_path, _record("a", width=8), _record("b", width="auto"), _record("c", width=None))
    assert list(table["model.width"][:2]) == ["8", '"auto"'] and table["model.width"].isna()[2]
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / runs.TABLE), table, check_dtype=False)


def test_nothing_varied_adds_no_column(tmp_path):
    assert not [name for name in _collected(tmp_path, _record("a"), _record("b")) if "." in name]


def test_a_row_names_the_parts_of_a_model():
    counts = {"dense_params": 100, "encoder_params": 40, "position_params": 10, "head_params": 3}
    row = runs.run_row(_record("a") | {"counts": counts})
    assert {name: row[name] for name in counts} == counts and row["backbone_params"] == 60
    assert runs.run_row(_record("a") | {"counts": {"dense_params": 100}})["backbone_params"] is None
