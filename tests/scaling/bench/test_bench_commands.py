"""`recscale bench`: figures, provenance and JSON of every subcommand."""

import functools
import inspect
import json
import pkgutil

import numpy as np
import pytest
from click.testing import CliRunner

from recscale.scaling import host_memory
from recscale.scaling.acceptance import known_truth
from recscale.scaling.bench import memory, train_step
from recscale.scaling.bench.bench_commands import BENCHMARKS, bench
from recscale.scaling.bench.figures import figure_lines
from recscale.scaling.records.provenance import environment

TIME = {"median_ms": 250.0, "lower_quartile_ms": 240.0, "upper_quartile_ms": 260.0, "cpu_ms": 480.0, "turns": 8}
SPEED = {**TIME, "rows_per_s": 4096.0, "flops_per_s": 1e11}


def _result(**changed):
    tables = {"ratio": 1.05, "large_rows": 10_000_000, "small_rows": 10_000, "large": TIME, "small": TIME}
    return {
        "rows_per_s": 4096.0, "torch_rows_per_s": 3900.0, "ratio": 1.05, "note": None, "jax": SPEED,
        "torch": {**SPEED, "layout": "bmm"}, "tables": tables,
        "known_truth": {"share": 0.06, "share_alone": 0.07, "preset": "dense", "dense_params": 1_000_000},
        "environment": environment(), **changed,
    }  # fmt: skip


def _invoke(*args):
    result = CliRunner().invoke(bench, list(args))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.mark.parametrize("keep", [True, False])
def test_train_step_prints_figures_and_json(monkeypatch, keep):
    asked, kept = {}, []
    monkeypatch.setattr(train_step, "measure_train_step", lambda **options: asked.update(options) or _result())
    monkeypatch.setattr(host_memory, "keep_freed_memory", lambda: kept.append(True))
    result = _invoke("train-step", "--rounds", "3", "--no-tables", "--json", *([] if keep else ["--no-keep-memory"]))
    assert result.exit_code == 0 and bool(kept) == keep
    assert asked == {"rounds": 3, "torch": True, "tables": False, "known_truth": True}
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    for text in ("ratio 1.05", "tables.ratio 1.05", "known_truth.share 0.06", "known_truth.dense_params 1,000,000"):
        assert text in lines
    (times,) = (line for line in lines if line.startswith("torch 250 240 260"))
    assert times.endswith("bmm") and "jax 0." in result.output
    assert json.loads(result.output.splitlines()[-1])["rows_per_s"] == 4096.0


def test_train_step_without_a_rival_says_how_to_get_one(monkeypatch):
    alone = _result(torch=None, torch_rows_per_s=None, ratio=None, note=train_step.TORCH_MISSING)
    monkeypatch.setattr(train_step, "measure_train_step", lambda **_: alone)
    monkeypatch.setattr(host_memory, "keep_freed_memory", lambda: False)
    output = _invoke("train-step").output
    lines = [line.split() for line in output.splitlines()]
    assert 'pip install "recscale[bench]"' in output and ["torch", "-"] in lines and ["ratio", "-"] in lines


@pytest.mark.parametrize("passed, code", [(True, 0), (False, 1)])
def test_known_truth_fails_with_its_gates(monkeypatch, passed, code):
    found = {"passed": passed, "slope": np.float64(0.35), "points": np.arange(2)}
    monkeypatch.setattr(host_memory, "keep_freed_memory", lambda: False)
    monkeypatch.setattr(known_truth, "accept_known_truth", lambda quick, with_networks: {**found, "quick": quick})
    result = _invoke("known-truth", "--quick", "--json")
    assert result.exit_code == code
    value = json.loads(result.output.splitlines()[-1])
    assert value["quick"] is True and value["slope"] == 0.35 and value["points"] == [0, 1]
    assert value["environment"]["command"]


@pytest.mark.slow
def test_reader_prints_nested_figures():
    result = _invoke("reader", "--rows", "300", "--json")
    assert result.exit_code == 0 and "slowest_rows_per_s" in result.output
    assert json.loads(result.output.splitlines()[-1])["rows"] == 300


def test_what_can_be_compared_is_a_table():
    cases = {"a": {"ratio": 1.5, "fast": {"median_ms": 1.0}, "slow": {"median_ms": 12.25, "layout": "bmm"}}}
    lines = figure_lines({"passed": True, "cases": cases | {"b": {"ratio": None, "levels": [[1, 2.0], [3, 4.0]]}}})
    exponents = {"true": {"alpha": 0.35}, "found": {"alpha": 0.34}, 7: "points"}
    assert [line.split() for line in figure_lines(exponents)] == [
        ["alpha"], ["true", "0.35"], ["found", "0.34"], ["7", "points"]
    ]  # fmt: skip
    assert [line.split() for line in lines] == [
        ["passed", "True"],
        ["cases", "ratio"],
        ["a", "1.5"],
        ["b", "-"],
        ["cases.a", "median_ms", "layout"],
        ["fast", "1", "-"],
        ["slow", "12.25", "bmm"],
        ["cases.b.levels.0", "1", "2"],
        ["cases.b.levels.1", "3", "4"],
    ]


def test_every_benchmark_leads_to_a_function_with_its_options():
    for name, benchmark in BENCHMARKS.items():
        parameters = inspect.signature(pkgutil.resolve_name(benchmark.address)).parameters
        free = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        for option in benchmark.params:
            assert free or option.name in parameters, f"{name}: {option.name}"


def test_environment_names_what_decides_speed():
    found = environment()
    assert found["versions"]["jax"] and found["device"]["platform"] == "cpu" and found["cores"] >= 1
    assert found["date"].endswith("+00:00") and found["keeps_freed_memory"] is False


def test_memory_compares_two_sizes(monkeypatch):
    monkeypatch.setattr(host_memory, "keep_freed_memory", lambda: False)
    small = functools.partial(
        memory.measure_memory, small=16, large=64, reads=8, heads=1, topk=2, width=4, key_width=3, per_round=1
    )
    monkeypatch.setattr(memory, "measure_memory", small)
    result = _invoke("memory", "--rounds", "1", "--json")
    found = json.loads(result.output.splitlines()[-1])
    assert result.exit_code == 0 and min(found[name] for name in ("ratio", "spread_ratio", "search_ratio")) > 0
    assert found["large_slots"] == 64 and found["shape"]["hits_per_read"] == 2
    assert found["read_and_update"]["large"]["turns"] == found["search"]["small"]["turns"] == 1
