"""`recscale aot` without its compilers: rows, bounds, refusals and errors, compiled for the CPU where need be.

What the TPU compiler makes of the programs is tested where it is installed, and skipped with the reason elsewhere."""

import contextlib
import importlib.util
import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from click.testing import CliRunner

from recscale.models.inputs import reference_schema
from recscale.pallas_kernels import cases
from recscale.pallas_kernels.dispatch import Refused, resolve
from recscale.pallas_kernels.targets import get_target, partitioned
from recscale.scaling.aot import devices, environment, kernels, outcomes, processes, program, train_steps
from recscale.scaling.aot.aot_command import aot
from recscale.scaling.aot.request import Request

V5E, V5P, V7X, H100 = (get_target(name) for name in ("tpu-v5e", "tpu-v5p", "tpu-7x", "h100"))


def _case(**changed):
    def call(x, *, implementation):
        if implementation == "pallas_tpu_sc":
            raise Refused("toy cannot run as 'pallas_tpu_sc': no SparseCores")
        if implementation == "pallas_gpu":
            raise NotImplementedError("the compiler's own words")
        return jnp.sort(x) @ x

    fields = {
        "operation": "toy", "name": "toy-bench", "group": "bench", "call": call, "bytes_moved": 1, "flops": 1,
        "inputs": lambda key: (jax.random.normal(key, (16, 16)),),
    }  # fmt: skip
    return cases.Case(**(fields | changed))


@pytest.fixture
def toy(monkeypatch):
    """One operation with one case, compiled for the CPU in the name of a TPU."""

    def install(case):
        monkeypatch.setattr(cases, "OPERATIONS", ("toy",))
        monkeypatch.setattr(cases, "cases", lambda operation: (case,))
        monkeypatch.setattr(cases, "kernels", lambda operation, platform: ("pallas_tpu", "pallas_tpu_sc"))

    monkeypatch.setattr(program, "_lowering_platform", lambda target: "cpu")
    monkeypatch.setattr(program, "compile_only_devices", lambda target, count: jax.devices())
    monkeypatch.setattr(program, "compiling_for", lambda target: contextlib.nullcontext())
    monkeypatch.setattr(environment, "prepare", lambda platforms, compiler: None)
    return install


def _rows(target=V5E, operations=("toy",), **options):
    return list(program.compile_all(lambda t: kernels.kernel_programs(t, operations, **options), target))


def test_a_row_says_what_the_compiler_says(toy):
    toy(_case())
    compiled, refused = _rows()
    assert compiled["status"] == "compiled" and compiled["reason"] == ""
    assert compiled["argument_bytes"] == compiled["output_bytes"] == 4 * 16 * 16
    assert compiled["bytes_per_device"] == 2 * 4 * 16 * 16 + compiled["temporary_bytes"]
    assert compiled["flops"] >= 2 * 16**3 and compiled["collectives"] == {}
    assert refused["status"] == "refused" and "no SparseCores" in refused["reason"]


def test_lowering_needs_no_compiler():
    programs = kernels.kernel_programs(H100, ["w8a16_matmul"], ["tiny", "odd"], ["xla", "pallas_gpu"])
    rows = list(program.compile_all(lambda target: programs, H100, lower_only=True))
    assert [row["status"] for row in rows] == 4 * ["lowered"], [row["reason"] for row in rows]
    assert outcomes.summary(rows).strip().startswith("4 lowered, 0 refused, 0 failed")
    result = CliRunner().invoke(aot, ["--target", "h100", "--lower-only", "--model", "rankmixer"])
    assert result.exit_code == 2 and "a training step needs the compiler" in result.output


def test_more_temporaries_than_stated_fail(toy):
    toy(_case(temporaries={"pallas_tpu": 0}))
    row = _rows()[0]
    assert row["temporary_bytes"] > 0, "the toy needs temporaries for this test to say anything"
    assert row["status"] == "failed" and "of temporaries, at most 0 expected" in row["reason"]


def test_what_a_compiler_refuses_is_a_failure_not_a_refusal(toy):
    toy(_case())
    (row,) = _rows(implementations=("pallas_gpu",))
    assert row["status"] == "failed" and row["reason"] == "NotImplementedError: the compiler's own words"


def test_an_unknown_case_names_the_nearest(toy):
    toy(_case())
    with pytest.raises(ValueError, match="no case 'toy-bnech' of toy; did you mean 'toy-bench'"):
        _rows(names=("toy-bnech",))


def test_collectives_of_a_program_text():
    text = """
      %a = f32[8]{0} all-reduce(f32[8]{0} %x), replica_groups={}
      %b = (f32[8], f32[16]) all-gather-start(f32[8]{0} %x), dimensions={0}
      %c = f32[16]{0} all-gather-done((f32[8], f32[16]) %b)
      %d = f32[8]{0} fusion(f32[8]{0} %all-reduce.3), kind=kLoop
      %e = f32[8]{0} all-reduce(f32[8]{0} %y), replica_groups={}
    """
    assert program.collectives(text) == {"all-reduce": 2, "all-gather": 1}


def test_spills_are_read_from_ptxas():
    printed = "ptxas info: 16 bytes stack frame, 24 bytes spill stores, 8 bytes spill loads\nUsed 255 registers, 0 b"
    assert program._registers(printed) == {"registers": 255, "spill_bytes": 32}
    assert program._registers("nothing") == {"registers": None, "spill_bytes": None}


@pytest.mark.parametrize(
    "target, count, name",
    [
        (V5E, 1, "v5e:2x2"),
        (V5E, 256, "v5e:16x16"),
        (V5P, 6, "v5p:2x2x2"),
        (V7X, 8, "tpu7x:2x2x1"),  # two devices a chip
        (V7X, 9, "tpu7x:2x2x2"),
    ],
)
def test_the_smallest_topology_that_holds_a_mesh(target, count, name):
    assert devices.topology_name(target, count) == name


def test_a_mesh_can_be_too_large():
    with pytest.raises(ValueError, match=r"1024 devices is larger than tpu-v5e allows \(256\)"):
        devices.topology_name(V5E, 1024)


def test_a_gpu_is_described_by_its_file():
    assert "NVIDIA H100" in devices._description(H100)


@pytest.mark.parametrize("platform, command", [("tpu", "make aot-tpu"), ("gpu", "make aot-gpu")])
def test_a_missing_compiler_names_the_make_target(monkeypatch, platform, command):
    monkeypatch.setattr(environment, "_installed", lambda module: False)
    before = dict(os.environ)
    with pytest.raises(environment.CompilerMissing, match=command):
        environment.prepare({platform})
    assert dict(os.environ) == before


def test_the_command_sets_the_environment_itself(monkeypatch):
    for name in (*environment._TPU, *environment._GPU):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    monkeypatch.setattr(environment, "_installed", lambda module: True)
    environment.prepare({"tpu", "gpu"})
    assert os.environ["TPU_SKIP_MDS_QUERY"] == "1" and os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] == "1"
    assert os.environ["XLA_FLAGS"] == (
        "--xla_cpu_enable_fast_math=false --xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
    )
    for name in (*environment._TPU, *environment._GPU):  # monkeypatch removes only what it knows of
        monkeypatch.delenv(name)


def test_a_training_step_compiles_with_its_state_split(toy, monkeypatch):
    monkeypatch.setattr(train_steps, "load_schema", lambda name: reference_schema(fields=4))
    step = train_steps.train_step_program(
        "rankmixer", axes={"data": 1, "tensor": 1}, rows=64, assignments=["tokens=4", "model.width=16", "hidden=32"]
    )
    (row,) = program.compile_all(lambda target: [step], V5E)
    assert row["status"] == "compiled", row["reason"]
    assert (row["mesh"], row["rows_per_step"]) == ("data=1,tensor=1", 64)
    # Parameters and both moments in float32, donated: they count once.
    assert row["bytes_per_device"] > 12 * (row["dense_params"] + row["embedding_params"] // 16)
    assert row["bytes_per_device"] < row["argument_bytes"] + row["output_bytes"] + row["temporary_bytes"]
    assert row["gradient_bytes"] == 4 * row["dense_params"]
    assert row["argument_bytes"] == pytest.approx(row["state_bytes"] + row["batch_bytes"], rel=0.01)
    assert row["activation_bytes"] == max(row["temporary_bytes"] - row["gradient_bytes"], 0)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"rows": 100, "axes": {"data": 8}},
            "100 requests per step do not divide over 8 devices of the mesh axes data",
        ),
        ({"rows": 10, "candidates": 4}, "rows per step are 10, not a multiple of 4 candidates"),
        ({"assignments": ["widht=4"]}, "nearest key is 'model.width'"),
        ({"schema_name": "nowhere"}, "there is no schema 'nowhere'"),
    ],
)
def test_a_step_that_cannot_be_says_why(options, message):
    with pytest.raises(ValueError, match=message):
        train_steps.train_step_program("rankmixer", **({"rows": 8192} | options))


def test_large_presets_share_their_state():
    """Without a mesh a step runs on one device, from a billion parameters on where its state is split."""
    meshes = [train_steps.train_step_program(f"rankmixer_{size}", rows=8192).mesh for size in ("100m", "1b")]
    assert meshes == ["data=1", "fsdp=16,tensor=16"]


@pytest.mark.parametrize(
    "state, said",
    [
        (
            20 * 2**30,
            "state and gradients alone are 21 GiB, the largest array is .params with 20 GiB: they fit on --mesh fsdp=8",
        ),
        (2**30, "activations take more than the rest"),
    ],
)
def test_a_step_without_room_says_which_limit_it_hit(toy, state, said):
    def build(devices):
        def fail():
            raise RuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm")

        return jax.jit(fail), ()

    memory = {"state_bytes": state, "batch_bytes": 1, "gradient_bytes": 2**30, "largest_array": ".params with 20 GiB"}
    more = {"memory": lambda args: memory, "facts": {"rows_per_step": 1}, "fitting": lambda room: "fsdp=8"}
    step = program.Program("train_step", "large", "", "", "", 1, build, **more)
    (row,) = program.compile_all(lambda target: [step], V5E)
    assert row["status"] == "failed" and "the limit is 16 GiB of tpu-v5e" in row["reason"] and said in row["reason"]
    assert f"state {state // 2**30} GiB" in outcomes.line(row)


@pytest.mark.slow
def test_a_mesh_is_found_for_a_state_that_one_device_cannot_hold():
    step = train_steps.train_step_program("tokenmixer_large_7b", axes={"data": 1}, rows=8192)
    found = step.fitting(V5E.hbm_bytes)
    assert found.startswith("fsdp=") and step.fitting(2**50) == "fsdp=2"
    ways = math.prod(int(part.partition("=")[2]) for part in found.split(","))
    # Parameters, two moments and the gradient, four bytes each: as few devices as hold them.
    needed = 16 * 7e9 / (0.8 * V5E.hbm_bytes)
    assert needed / 2 < ways < 4 * needed


def test_kernels_leave_a_split_program_to_xla():
    assert resolve("toy", None, {"pallas_tpu": None}, platform="tpu") == "pallas_tpu"
    with partitioned(4):
        assert resolve("toy", None, {"pallas_tpu": None}, platform="tpu") == "xla"
        with pytest.raises(Refused, match="over 4 devices and cannot split a kernel"):
            resolve("toy", "pallas_tpu", {"pallas_tpu": None})


def _invoke(*args):
    return CliRunner().invoke(aot, list(args))


def test_the_command_prints_a_table_and_json(toy):
    toy(_case())
    result = _invoke("--target", "tpu-v5e", "--kernel", "toy", "--json")
    assert result.exit_code == 0, result.output
    assert "toy/toy-bench pallas_tpu" in result.output and "REFUSED: toy cannot run" in result.output
    assert "1 compiled, 1 refused, 0 failed; nothing was run" in result.output
    last = json.loads(result.output.splitlines()[-1])
    assert last["failed"] == 0 and [row["status"] for row in last["programs"]] == ["compiled", "refused"]
    assert "bytes_per_device" not in last and last["environment"]["versions"]["jax"]


def test_a_single_program_has_its_figures_at_the_top(toy):
    toy(_case())
    output = _invoke("--target", "tpu-v5e", "--kernel", "toy", "--implementation", "xla", "--json").output
    last = json.loads(output.splitlines()[-1])
    assert last["bytes_per_device"] == last["programs"][0]["bytes_per_device"] > 0


def test_the_command_fails_with_a_program(toy):
    toy(_case(temporaries={"pallas_tpu": 0}))
    result = _invoke("--target", "tpu-v5e", "--kernel", "toy")
    assert result.exit_code == 1 and "FAILED: " in result.output


def test_a_quick_check_leaves_out_slow_gradients():
    whole, quick = (kernels.kernel_programs(V5E, ("product_key_topk",), quick=quick) for quick in (False, True))
    left_out = {p.case for p in whole} - {p.case for p in quick}
    assert left_out and all(name.endswith("-backward") for name in left_out)
    assert {p.implementation for p in quick} == {p.implementation for p in whole}


def test_an_operation_without_shapes_is_one_failed_row(toy, monkeypatch):
    toy(_case())

    def missing(operation, platform):
        raise ModuleNotFoundError("No module named 'recscale.pallas_kernels.toy.shapes'")

    monkeypatch.setattr(cases, "kernels", missing)
    (row,) = _rows()
    assert row["status"] == "failed" and "toy.shapes" in row["reason"]


# Four programs a target; the compiler dies over the third.
_DYING = """
import json, sys
task = json.load(sys.stdin)
print("noise of a compiler")
for number in range(task["start"], 4):
    row = {"target": task["target"], "case": number, "status": "failed", "reason": ""}
    print(json.dumps({"begun": row}), flush=True)
    if number == 2:
        sys.exit("CHECK failed")
    print(json.dumps(row | {"status": "compiled"}), flush=True)
"""


def test_a_compiler_that_dies_takes_one_program_with_it(monkeypatch):
    monkeypatch.setattr(processes, "_COMMAND", (sys.executable, "-c", _DYING))
    rows = list(processes.rows_side_by_side(["a", "b", "c"], Request(), jobs=2))
    for target in "abc":
        own = [row for row in rows if row["target"] == target]
        assert [(row["case"], row["status"]) for row in own] == [
            (0, "compiled"), (1, "compiled"), (2, "failed"), (3, "compiled")
        ]  # fmt: skip
        assert own[2]["reason"] == "the compiler ended its process with code 1: CHECK failed"


def test_a_process_that_never_begins_is_an_error(monkeypatch):
    monkeypatch.setattr(processes, "_COMMAND", (sys.executable, "-c", "raise SystemExit('no such thing')"))
    with pytest.raises(ValueError, match="compiling for a ended with code 1: no such thing"):
        list(processes.rows_side_by_side(["a"], Request(), jobs=2))


@pytest.mark.parametrize(
    "args, message",
    [
        (("--case", "x"), "give --kernel as well"),
        (("--kernel", "a", "--model", "b"), "not both"),
        (("--mesh", "2x2"), "give --model as well"),
    ],
)
def test_options_that_contradict_each_other(args, message):
    result = _invoke("--target", "tpu-v5e", *args)
    assert result.exit_code == 2 and message in result.output


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed here; `make aot-tpu` compiles for TPUs"
)
def test_a_step_compiles_for_sixteen_chips():
    args = ["--target", "tpu-v5e", "--model", "rankmixer_1m", "--mesh", "4x4", "--json"]
    code = f"from recscale.scaling.cli import main; main(['aot', *{args!r}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["devices"] == 16 and row["bytes_per_device"] > 0 and row["collectives"]["all-reduce"] > 0
