"""The reader benchmark runs and reports what it measured; how fast is not asserted here."""

from recscale.scaling.bench import reader


def test_every_condition_is_reported():
    found = reader.measure_reader(
        rows=3_000, fields=4, history_length=8, batch=512, threads=(0, 2), train_rows_per_s=10.0
    )
    orders = {name.split(",")[0] for name in found["rows_per_s"]}
    assert orders == {"time", "shuffle"} and all(speed > 0 for speed in found["rows_per_s"].values())
    assert any("warm, 2 threads" in name for name in found["rows_per_s"])
    assert found["slowest_rows_per_s"] == min(found["rows_per_s"].values())
    assert found["ratio"] == found["slowest_rows_per_s"] / 10.0
    assert (found["rows"], found["fields"], found["history_length"], found["batch"]) == (3_000, 4, 8, 512)
    # Four int32 fields, label, mask, time, user and end per row, and an event of two int32 and a time per row.
    assert 4 * 4 + 2 + 8 + 16 + 16 <= found["stored_bytes_per_row"] < 100
