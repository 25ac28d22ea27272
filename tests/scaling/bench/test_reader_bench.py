"""The reader benchmark runs and reports what it measured; how fast is not asserted here."""

import pytest

from recscale.scaling.bench import reader


@pytest.mark.parametrize("history_length", [pytest.param(0, marks=pytest.mark.slow), 8])
def test_every_condition_is_reported(history_length):
    found = reader.measure_reader(rows=3_000, fields=4, history_length=history_length, batch=64, threads=(0, 2))
    assert {name.split(",")[0] for name in found["reading"]} == {"time", "shuffle"}
    assert any("warm, 2 threads" in name for name in found["reading"])
    for name in ("rows_per_s", "rows_per_cpu_s"):
        speeds = [speed[name] for speed in found["reading"].values()]
        assert min(speeds) > 0 and found[f"slowest_{name}"] == min(speeds)
    assert 0 <= found["training"]["input_wait_share"] <= 1 and found["training"]["rows_per_s"] > 0
    assert (found["rows"], found["fields"], found["history_length"], found["batch"]) == (3_000, 4, history_length, 64)
    # Four int32 fields, label, mask, time and user per row; an event of two int32 and a time per row, key and end.
    least = 4 * 4 + 2 + 8 + 8 + (32 if history_length else 0)
    assert least <= found["stored_bytes_per_row"] < 100
