"""The benchmark of LONGER over history lengths: its bookkeeping, and what of it does not depend on the clock."""

import json

import pytest
from click.testing import CliRunner

from recscale.scaling import host_memory
from recscale.scaling.bench import history_length
from recscale.scaling.bench.bench_commands import bench


@pytest.mark.slow
def test_a_training_step_is_linear_in_the_length():
    """512 to 8,192 events at 64 query rows: FLOPs of the program and temporaries of the compiled step."""
    found = history_length.measure_history_lengths(rounds=1)
    lengths = [found["lengths"][str(S)] for S in history_length.LENGTHS]
    assert all(found["exponents"][name] < 1.05 for name in ("temporary_bytes", "flops"))
    # FLOPs are affine in S to the last digit.
    steps = [b["flops"] - a["flops"] for a, b in zip(lengths, lengths[1:], strict=False)]
    assert steps[1:] == [2 * step for step in steps[:-1]]


@pytest.mark.slow
def test_the_command_prints_figures_and_json(monkeypatch):
    monkeypatch.setattr(host_memory, "keep_freed_memory", lambda: None)
    small = history_length.measure_history_lengths(lengths=(8, 16), requests=1, width=4, queries=1, rounds=1)
    assert small["lengths"]["8"]["flops"] < small["lengths"]["16"]["flops"]
    monkeypatch.setattr(
        history_length, "measure_history_lengths", lambda **options: small | {"asked": options["rounds"]}
    )
    result = CliRunner().invoke(bench, ["history", "--rounds", "3", "--json"])
    assert result.exit_code == 0 and "exponents.cpu_ms" in result.output
    value = json.loads(result.output.splitlines()[-1])
    assert value["asked"] == 3 and value["environment"]["command"]
