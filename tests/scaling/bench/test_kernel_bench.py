"""`recscale bench kernels` and `mfu`: the harness at tiny shapes on the CPU, wrong results, search of block sizes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from click.testing import CliRunner

from recscale.models.inputs import reference_schema
from recscale.pallas_kernels import blocks, cases
from recscale.pallas_kernels.targets import get_target
from recscale.scaling.bench import kernel_timing, kernel_tuning, kernels, mfu
from recscale.scaling.bench.bench_commands import bench
from recscale.scaling.bench.kernel_timing import Effort

H100 = get_target("h100")
ONCE = Effort(warmup=0, runs=2, calls=2)


def _toy(**changed):
    """y = 2 x, in a few ways."""

    def call(x, *, implementation):
        if implementation == "pallas_gpu":
            size = blocks.block_sizes("toy", "pallas_gpu", "n8", {"rows": 4}, H100)["rows"]
            if size > 8:
                raise ValueError("no room")
            return x * (2.0 if size != 2 else 2.5)
        return x + x if implementation == "reference" else 2 * x

    fields = {
        "operation": "toy", "name": "toy", "group": "tiny", "call": call, "bytes_moved": 64, "flops": 8,
        "inputs": lambda key: (jax.random.normal(key, (8,)),),
        "rivals": {"theirs": lambda x: x * 2.0, "broken": lambda x: jnp.reshape(x, (3, 3))},
    }  # fmt: skip
    return cases.Case(**(fields | changed))


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(cases, "OPERATIONS", ("toy",))
    monkeypatch.setattr(cases, "cases", lambda operation: (_toy(),))
    monkeypatch.setattr(cases, "kernels", lambda operation, platform: ("pallas_gpu",))


def test_rows_of_a_case(toy):
    rows = {row["implementation"]: row for row in kernels.measure_case(_toy(), H100, (), ONCE)}
    assert list(rows) == ["xla", "pallas_gpu", "theirs", "broken"]
    ours = rows["pallas_gpu"]
    assert ours["status"] == "measured" and ours["max_error"] == 0 and ours["bit_equal"] and ours["within_tolerance"]
    assert ours["calls"] == 2 and ours["runs"] == 2 and ours["peak_bytes"] >= 64
    assert ours["gb_per_s"] == pytest.approx(64 / ours["median_ms"] / 1e6)
    assert ours["share_of_floor"] == pytest.approx(ours["floor_ms"] / ours["median_ms"])
    assert ours["times_xla"] == pytest.approx(rows["xla"]["median_ms"] / ours["median_ms"])
    assert set(ours["times_rival"]) == {"theirs"}
    assert rows["broken"]["status"] == "failed" and "reshape" in rows["broken"]["reason"]
    assert "FAILED" in kernels.report(rows["broken"]) and "x XLA" in kernels.report(ours)


def test_rivals_of_another_platform_are_not_tried():
    case = next(case for case in cases.cases("hybrid_attention") if case.name == "hyformer-decode")
    assert {"jax.nn.dot_product_attention cudnn", "flash_attention"} <= set(case.rivals)
    assert "flash_attention" not in kernels.functions(case, H100)
    assert "jax.nn.dot_product_attention cudnn" not in kernels.functions(case, get_target("tpu-v5e"))


def test_wrong_results_have_no_time():
    wrong = _toy(call=lambda x, *, implementation: x * (3 if implementation == "pallas_gpu" else 2), rivals={})
    row = kernels._row(
        wrong, "pallas_gpu", lambda x: 3 * x, kernel_timing.input_sets(wrong, H100, ONCE), (2 * jnp.ones(8),), "", H100,
        ONCE, exact=True,
    )  # fmt: skip
    assert row["status"] == "wrong" and row["median_ms"] is None
    expected = wrong.call(jnp.ones(8), implementation="xla")
    found = kernel_timing.errors(wrong, 3 * jnp.ones(8), expected)
    assert found == {"max_error": 0.5, "mismatched_ids": None, "within_tolerance": False}
    assert not kernel_timing.errors(wrong, jnp.full(8, jnp.nan), expected)["within_tolerance"]


def test_only_kernels_must_repeat_their_bits(monkeypatch):
    """XLA adds with atomics on GPUs; without its time there would be nothing to compare with."""
    monkeypatch.setattr(kernels, "bit_equal", lambda a, b: False)
    case = _toy(rivals={})
    sets = kernel_timing.input_sets(case, H100, ONCE)
    for name, status in (("xla", "measured"), ("pallas_gpu", "wrong")):
        row = kernels._row(case, name, lambda x: 2 * x, sets, 2 * sets[0][0], "", H100, ONCE, exact=True)
        assert row["status"] == status and row["bit_equal"] is False


def test_small_shapes_come_first_and_are_not_timed_long(monkeypatch):
    """On a device every shape is checked, small ones before anything is timed."""
    made = [_toy(name=name, group=group) for name, group in (("a", "bench"), ("b", "tiny"), ("c", "ragged"))]
    monkeypatch.setattr(cases, "OPERATIONS", ("toy",))
    monkeypatch.setattr(cases, "cases", lambda operation: made)
    monkeypatch.setattr(kernels, "accelerator", lambda: H100)

    def measured(case, target, implementations, effort):
        return [{"case": case.name, "runs": effort.runs}]

    monkeypatch.setattr(kernels, "measure_case", measured)
    assert [(row["case"], row["runs"]) for row in kernels.kernel_rows()] == [("b", 3), ("c", 3), ("a", 50)]
    assert [row["case"] for row in kernels.kernel_rows(groups=("bench",))] == ["a"]
    assert [row["case"] for row in kernels.kernel_rows(names=("a", "b"))] == ["b", "a"]


def test_int8_weights_have_a_bfloat16_rival():
    """The product it is claimed to beat reads weights of two bytes; the closed forms and the kernel do not see them."""
    for case in cases.cases("w8a16_matmul"):
        _, wq, _, w = case.structs()
        assert w.dtype == jnp.bfloat16 and w.shape == wq.shape
    case = cases.cases("w8a16_matmul")[1]
    arrays = case.inputs(jax.random.key(0))
    expected = case.call(*arrays, implementation="reference").astype(jnp.float32)
    for rival in case.rivals.values():
        error = jnp.abs(rival(*arrays).astype(jnp.float32) - expected).max()
        assert error < 2e-2 * jnp.abs(expected).max() or rival.__name__ == "_bfloat16"
    by_hand = arrays[0].astype(jnp.float32) @ arrays[3].astype(jnp.float32)
    found = case.rivals["bf16 x bf16 (XLA)"](*arrays)
    assert jnp.abs(found.astype(jnp.float32) - by_hand).max() < 1e-2 * jnp.abs(by_hand).max()


def test_ids_are_compared_by_share():
    expected = (jnp.ones(2000), jnp.arange(2000))
    found = kernel_timing.errors(_toy(), (jnp.ones(2000), jnp.arange(2000).at[0].set(5)), expected)
    assert found["mismatched_ids"] == pytest.approx(1 / 2000) and found["within_tolerance"]
    assert not kernel_timing.errors(_toy(), (jnp.ones(2000), jnp.zeros(2000, int)), expected)["within_tolerance"]


def test_bits_are_compared():
    assert kernel_timing.bit_equal(jnp.array([jnp.nan, 0.0]), jnp.array([jnp.nan, 0.0]))
    assert not kernel_timing.bit_equal(jnp.array([0.0]), jnp.array([-0.0]))


def test_inputs_rotate_through_more_than_the_cache():
    large = _toy(inputs=lambda key: (jax.random.normal(key, (2**20,)),), bytes_moved=2**24)
    sets = kernel_timing.input_sets(large, H100, Effort())
    assert len(sets) == 25  # 4 x 50 MiB by 8 MiB of input and output
    # Of a call that reads less than its inputs, only what it reads goes through the cache.
    assert len(kernel_timing.input_sets(dataclasses.replace(large, bytes_moved=7 * 2**20), H100, Effort())) == 29
    assert float(jnp.max(jnp.abs(sets[0][0] - sets[1][0]))) > 0


def test_the_harness_runs_on_a_cpu(tmp_path):
    out = tmp_path / "rows.json"
    args = ["kernels", "--cpu", "--operation", "w8a16_matmul", "--json", "--out", str(out)]
    result = CliRunner().invoke(bench, args)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.output.splitlines()[-1])["rows"]
    assert {row["implementation"] for row in rows} == {"xla", "reference"}
    for row in rows:
        assert row["status"] == "measured" and row["bit_equal"] and row["share_of_floor"] is None
        assert row["device"] == "cpu" and row["versions"]["jax"] and row["date"] and row["command"]
    assert json.loads(out.read_text())["rows"] == rows


@pytest.mark.parametrize("command", ["kernels", "mfu"])
def test_without_an_accelerator_nothing_is_measured(command):
    result = CliRunner().invoke(bench, [command])
    assert result.exit_code == 2 and "no accelerator here" in result.output and "ms" not in result.stdout


def test_unknown_names_are_errors(toy):
    result = CliRunner().invoke(bench, ["kernels", "--cpu", "--case", "tyo"])
    assert result.exit_code == 1 and "no case 'tyo'; did you mean 'toy'? Known: toy" in str(result.exception)


def test_search_of_block_sizes(toy, monkeypatch, tmp_path):
    """2 is fastest and wrong, 8 beats the rule of 4, 16 does not run; XLA is asked last, at what 16 would take."""
    asked = []

    def clock(function, sets, effort):
        with blocks.trial() as inner:
            function(*sets[0])
        del inner
        return {"median_ms": 1.0 / asked[-1]}

    def offer(request):
        for rows in (2, 8, 16):
            asked.append(rows)
            yield {"rows": rows}

    asked.append(4)
    monkeypatch.setattr(kernel_tuning, "time_calls", clock)
    monkeypatch.setattr(kernel_tuning, "offered", offer)
    monkeypatch.setattr(blocks, "tuned_path", lambda operation, kind: tmp_path / operation / "tuned" / "h100.json")
    (tmp_path / "toy").mkdir()
    rows = list(kernel_tuning.tune_and_write(["toy"], ["toy"], H100, {"device": "somewhere"}, ONCE))
    assert [row["sizes"].get("rows") for row in rows] == [None, 2, 8, 16, None]
    assert [row["implementation"] for row in rows] == 4 * ["pallas_gpu"] + ["xla"]
    assert [row["median_ms"] for row in rows] == [0.25, None, 0.125, None, 1 / 16]
    assert [row["times_xla"] for row in rows] == [0.25, None, 0.5, None, 1.0]
    assert "error" in rows[1]["reason"] and "no room" in rows[3]["reason"]
    written = json.loads((tmp_path / "toy" / "tuned" / "h100.json").read_text())
    assert written == {
        "provenance": {"device": "somewhere"},
        "blocks": {"pallas_gpu": {"n8": {"rows": 8}}},
        "times_xla": {"pallas_gpu": {"toy": 0.5}},
    }
    assert blocks.block_sizes("toy", "pallas_gpu", "n8", {"rows": 4}, H100) == {"rows": 8}
    assert not blocks.beats_xla("toy", "pallas_gpu", H100)  # tuned, and still slower than XLA
    blocks._tuned.cache_clear()


def test_sizes_are_halved_and_doubled_unless_the_kernel_offers_its_own():
    request = blocks.Asked("w8a16_matmul", "pallas_tpu", "k", {"a": 4, "b": 1}, None)
    module = type("module", (), {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_tuning, "kernel_of", lambda operation, name: module)
        assert list(kernel_tuning.offered(request)) == [{"a": 2}, {"a": 8}, {"b": 2}]
        module.candidates = lambda key, heuristic, target: [{"a": 4}, {"a": 16, "b": 2}]
        assert list(kernel_tuning.offered(request)) == [{"a": 16, "b": 2}]


@pytest.mark.slow
def test_mfu_is_useful_flops_over_peak(monkeypatch):
    monkeypatch.setattr(mfu, "accelerator", lambda: H100)
    monkeypatch.setattr(mfu, "load_schema", lambda: reference_schema(fields=4))
    result = mfu.measure_mfu("rankmixer_10k", rows=32, warmup=1, steps=3)
    assert result["mfu"] == pytest.approx(result["train_flops_per_step"] / (result["median_ms"] / 1e3) / 989e12)
    assert result["train_flops_per_step"] % 32 == 0
