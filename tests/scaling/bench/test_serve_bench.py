"""The serving benchmark's bookkeeping: cases, FLOPs, the same model recomputed. Speed is for `recscale bench serve`."""

import json

import pytest
from click.testing import CliRunner

from recscale.models import count
from recscale.models.inputs import reference_schema
from recscale.scaling import host_memory
from recscale.scaling.bench import serve
from recscale.scaling.bench.bench_commands import bench

TINY = serve.ServingShape(requests=2, candidates=3, width=16, tokens=8, layers=1)


@pytest.fixture(scope="module")
def measured():
    return serve.measure_serving(names=["ug_rankmixer 3:1"], shape=TINY, rounds=2, per_round=1)


def test_cases_compare_equal_sizes_and_promise_the_closed_forms():
    schema = reference_schema()
    separated = {name: case for name, case in serve.cases(serve.ServingShape()).items() if name.startswith("ug_")}
    for name, case in separated.items():
        user = 12 if "3:1" in name else 8
        ours, theirs = count(case.architecture, schema, case.config), count(case.rival, schema, case.rival_config)
        assert case.config == case.rival_config and case.config["user_tokens"] == user
        # The compensation's user side is the only thing the separated model adds; dead slices are what it drops.
        promise = theirs.forward_flops_candidate / ours.forward_flops_candidate
        assert promise >= 0.9 * 16 / (16 - user)


def test_a_comparison_reports_ratios_of_its_own_figures(measured):
    found, schema = measured["cases"]["ug_rankmixer 3:1"], reference_schema()
    case = serve.cases(TINY)["ug_rankmixer 3:1"]
    for side, name in (("reused", case.architecture), ("rival", case.rival)):
        counted = count(name, schema, case.config)
        assert found[side]["flops"] == 2 * counted.forward_flops_user + 6 * counted.forward_flops_candidate
        assert found[side]["turns"] == 2
    assert found["flops_ratio"] == found["rival"]["flops"] / found["reused"]["flops"]
    assert found["time_ratio"] == found["rival"]["median_ms"] / found["reused"]["median_ms"]
    assert found["reached"] == found["time_ratio"] / found["flops_ratio"]
    assert found["state_elements"] == 6 * 2 * 2 + 2 * 16 + 16  # heads, compensation, pooled
    assert measured["shape"]["requests"] == 2


def test_user_heads_halve_what_a_candidate_costs():
    case = serve.cases(serve.ServingShape())["ui_mixformer 1:1"]
    ours, theirs = (count(name, case.schema(), case.config) for name in (case.architecture, case.rival))
    head = 2 * 16 * 256 * 4 * 256 + 2 * 4 * 256  # of the flattened heads, made per candidate by both
    assert ours.forward_flops_candidate - head == (theirs.forward_flops_candidate - head) // 2
    assert (
        theirs.forward_flops_user < ours.forward_flops_user < theirs.forward_flops_user + ours.forward_flops_candidate
    )


@pytest.mark.slow
def test_without_a_rival_the_same_model_is_recomputed_per_candidate(monkeypatch):
    config = {"tokens": 4, "width": 16, "hidden": 8, "layers": 1}
    monkeypatch.setattr(serve, "cases", lambda shape: {"again": serve.Case("rankmixer", config)})
    found = serve.measure_serving(shape=TINY, rounds=1, per_round=1)["cases"]["again"]
    counted = count("rankmixer", reference_schema(), config)
    assert found["rival"]["flops"] == 6 * counted.forward_flops_per_row
    assert found["reused"]["flops"] == 2 * counted.forward_flops_user + 6 * counted.forward_flops_candidate


@pytest.mark.slow
def test_longer_is_compared_with_itself_recomputed():
    found = serve.measure_serving(names=["longer"], shape=TINY, rounds=1, per_round=1)["cases"]["longer"]
    case = serve.cases(TINY)["longer"]
    counted = count(case.architecture, case.schema(), case.config)
    assert found["rival"]["flops"] == 6 * counted.forward_flops_per_row
    assert found["flops_ratio"] > 2


def test_an_unknown_case_is_named():
    with pytest.raises(ValueError, match="no serving case 'ug_rankmixr 1:1'; did you mean 'ug_rankmixer 1:1'"):
        serve.measure_serving(names=["ug_rankmixr 1:1"])


def test_the_command_prints_figures_and_json(monkeypatch, measured):
    asked, kept = {}, []
    monkeypatch.setattr(serve, "measure_serving", lambda **options: asked.update(options) or measured)
    monkeypatch.setattr(host_memory, "keep_freed_memory", lambda: kept.append(True))
    result = CliRunner().invoke(bench, ["serve", "--case", "ug_rankmixer 3:1", "--rounds", "3", "--json"])
    assert (
        result.exit_code == 0
        and kept
        and asked == dict(names=("ug_rankmixer 3:1",), rounds=3, exported=False, calls=200)
    )
    lines = [line.split() for line in result.output.splitlines()]
    assert ["cases.ug_rankmixer", "3:1.state_elements", "72"] in lines
    assert {"reused", "rival"} <= {line[0] for line in lines if line}
    value = json.loads(result.output.splitlines()[-1])
    assert value["cases"]["ug_rankmixer 3:1"]["flops_ratio"] > 1 and value["environment"]["command"]


def test_the_command_explains_an_unknown_case():
    result = CliRunner().invoke(bench, ["serve", "--case", "nothing", "--no-keep-memory"])
    assert result.exit_code == 1 and "no serving case 'nothing'" in str(result.exception)


def test_exported_models_have_the_tail_of_single_calls(symbols):
    found = serve.measure_serving(names=["rankmixer"], shape=TINY, exported=True, calls=3)
    assert (found["requests"], found["candidates"], found["calls"]) == (2, 3, 3)
    times = found["models"]["rankmixer"]
    assert set(times) == {"encode_user", "score", "both"}
    assert all(0 < entry["p50_ms"] <= entry["p99_ms"] for entry in times.values())
    with pytest.raises(ValueError, match="no model 'rankmixr'"):
        serve.measure_serving(names=["rankmixr"], shape=TINY, exported=True)
