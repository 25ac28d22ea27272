"""`recscale bench device`: rows that survive whatever ends a process, a rerun that goes on, the real thing on a CPU.

Most tests put a small program in the place of the processes that compute, which does as the task's operation says.
"""

import json
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from recscale.pallas_kernels import blocks
from recscale.pallas_kernels.dispatch import KERNELS
from recscale.scaling.bench import device, device_plan, device_summary
from recscale.scaling.bench.bench_commands import BENCHMARKS, bench

# Six items a job, a tenth of a second each. "crash" ends its process at the third, "hang" waits there.
WORKER = """
import json, os, sys, time
task = json.loads(sys.stdin.readline())
for i in range(6):
    name = f"{task['stage']}/{task['name']}/case/{i}"
    if name in task["done"]:
        continue
    print(json.dumps({"begun": name}), flush=True)
    if i == 2 and "crash" in task["name"]:
        print("an illegal address", file=sys.stderr)
        os._exit(3)
    time.sleep(60 if i == 2 and "hang" in task["name"] else 0.1)
    print("a compiler's remark")
    print(json.dumps({"id": name, "status": "right", "max_error": 0.0}), flush=True)
"""
COMMAND = (sys.executable, "-c", WORKER)


def plan(*names, **options):
    return lambda **_: [device_plan.Job("check", name, 1.0, least_s=0.2, **options) for name in names]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs jobs by name with the small program; returns the rows."""
    monkeypatch.setattr(device, "_COMMAND", COMMAND)

    def call(*names, budget=60.0, **options):
        monkeypatch.setattr(device_plan, "jobs", plan(*names, **options))
        return device.measure_device(out=tmp_path, budget=budget, cpu=True, show=lambda line: None)["rows"]

    return call


def statuses(rows, name):
    return [row["status"] for row in rows if row["id"].startswith(f"check/{name}/")]


def test_a_process_that_ends_or_hangs_costs_one_row(run, tmp_path):
    rows = run("fine", "crash", "hang", item_s=1.0, together=True)
    assert statuses(rows, "fine") == 6 * ["right"]
    assert statuses(rows, "crash") == ["right", "right", "crashed", "right", "right", "right"]
    assert statuses(rows, "hang") == ["right", "right", "timed out", "right", "right", "right"]
    reasons = [row["reason"] for row in rows if row["status"] in ("crashed", "timed out")]
    assert any("code 3: an illegal address" in reason for reason in reasons) and any("1 s" in r for r in reasons)
    assert [row["status"] for row in rows if row["id"].count("/") == 1] == 3 * ["done"]
    page = (tmp_path / "summary.md").read_text()
    assert "1 crashed" in page and "1 timed out" in page and "Not reached" not in page


def test_the_budget_ends_it_and_the_same_command_goes_on(run, tmp_path, monkeypatch):
    first = run("hang", "b", budget=2.0)
    assert set(statuses(first, "hang")) <= {"right"} and len(first) <= 2
    assert "check/hang" in (tmp_path / "summary.md").read_text() and "check/b" in (tmp_path / "summary.md").read_text()
    second = run("hang", "b", item_s=1.0)
    assert second[: len(first)] == first and len({row["id"] for row in second}) == len(second) == 14
    monkeypatch.setattr(device, "_COMMAND", ("/no/such/program",))  # nothing is left to start a process for
    assert run("hang", "b") == second


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_ended_from_outside_the_file_is_whole(number, run, tmp_path):
    script = (
        "import sys; from pathlib import Path; from recscale.scaling.bench import device, device_plan\n"
        f"device._COMMAND = {COMMAND!r}\n"
        "device_plan.jobs = lambda **_: [device_plan.Job('check', n, 1.0, least_s=.2) for n in ('a', 'b')]\n"
        f"device.measure_device(out=Path({str(tmp_path)!r}), cpu=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL)
    path = tmp_path / "results.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < 4:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(timeout=60) == (-9 if number == signal.SIGKILL else 143)
    assert (tmp_path / "summary.md").exists() == (number == signal.SIGTERM)
    text = path.read_bytes()
    assert text.endswith(b"\n")
    before = [json.loads(line) for line in text.splitlines()]
    path.write_bytes(text + b'{"id": "check/a/ca')  # and what a machine without power leaves
    rows = run("a", "b")
    assert rows[: len(before)] == before and len({row["id"] for row in rows}) == len(rows) == 14


def test_the_plan(tmp_path):
    result = CliRunner().invoke(bench, ["device", "--dry-run", "--out", str(tmp_path / "none")])
    assert result.exit_code == 0 and not (tmp_path / "none").exists()
    jobs = device_plan.jobs(cpu=False)
    lines = result.output.splitlines()
    assert [line.split("  ")[0] for line in lines if "/" in line.split("  ")[0]] == [job.id for job in jobs]
    assert [job.name for job in jobs[: len(KERNELS)]] == list(KERNELS)
    assert [job.name for job in device_plan.jobs(cpu=True)[: len(KERNELS)]] == [f"{name} first" for name in KERNELS]
    assert [device_plan.limit_s(stage, 480) for stage in ("check", "measure", "train", "tune")] == [90, 150, 100, 100]
    assert device_plan.limit_s("check", 60) == 90 and device_plan.limit_s("measure", 240) == 75
    with pytest.raises(ValueError, match="there is no 'chekc' to do; did you mean 'check'"):
        device_plan.jobs(cpu=True, stages=["chekc"])


def _time(name, ms, case="gather-ind"):
    return {"id": f"measure/sparse_gather/{case}/{name}", "stage": "measure", "status": "measured",
            "operation": "sparse_gather", "case": case, "implementation": name, "median_ms": ms,
            "lower_quartile_ms": ms, "upper_quartile_ms": ms, "bytes_moved": 2.0e9, "flops": 1e9}  # fmt: skip


def test_what_lost_is_tuned_and_shares_are_of_the_measured_ceilings():
    rows = [
        {"id": "measure/ceilings/copy", "stage": "measure", "status": "measured", "gb_per_s": 4000.0},
        {"id": "measure/ceilings/product", "stage": "measure", "status": "measured", "tflop_per_s": 700.0},
        *(_time("xla", 2.0), _time("pallas_gpu", 1.0), _time("torch embedding_bag", 0.8)),
        *(_time("xla", 2.0, "other"), _time("pallas_gpu", 1.5, "other")),
    ]
    assert device_summary.lost(rows, "sparse_gather") == [("gather-ind", "pallas_gpu")]
    assert device_summary.lost(rows, "w8a16_matmul") == []
    page = device_summary.text(rows, [], 1.0)
    assert "| sparse_gather/gather-ind | pallas_gpu | 1 | 1 to 1 | 50 % | 2.00 | 0.80 (torch embedding_bag) |" in page


def test_block_sizes_wait_in_the_folder_until_they_are_adopted(tmp_path, monkeypatch):
    package = tmp_path / "package"
    monkeypatch.setattr(blocks, "__file__", str(package / "blocks.py"))
    (package / "toy").mkdir(parents=True)
    for case in ("a", "b"):
        blocks.write_tuned("toy", "NVIDIA H200", "pallas_gpu", {case: {"rows": 8}}, {case: 2.0}, {}, tmp_path / "tuned")
    assert not (package / "toy" / "tuned").exists()
    result = CliRunner().invoke(bench, ["device", "--adopt", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    (written,) = (package / "toy" / "tuned").iterdir()
    assert set(json.loads(written.read_text())["times_xla"]["pallas_gpu"]) == {"a", "b"}
    blocks._tuned.cache_clear()


@pytest.mark.parametrize(
    "name, decides",
    [("measure/w8a16_matmul/w8-16/torch bf16 (cuBLAS)", False), ("train/rankmixer_1b/torch/step", False),
     ("measure/w8a16_matmul/w8-16/pallas_gpu", True), ("check/w8a16_matmul", True)],
)  # fmt: skip
def test_rivals_decide_nothing(name, decides):
    passed = BENCHMARKS["device"].passed
    assert passed({"rows": [{"id": name, "status": "crashed"}]}) != decides
    assert passed({"rows": [{"id": name, "status": "refused"}]})


def _ours(rows):
    return [row for row in rows if row["id"].rsplit("/")[-1].startswith(("xla", "pallas"))]


def test_the_real_thing_on_a_cpu(tmp_path, monkeypatch):
    """An operation's smallest shape and what the machine can do: kernels interpreted, outputs poisoned, run twice."""
    wanted = ("check/sparse_gather first", "measure/ceilings")
    jobs = [job for job in device_plan.jobs(cpu=True) if job.id in wanted]
    monkeypatch.setattr(device_plan, "jobs", lambda **_: jobs)
    result = CliRunner().invoke(bench, ["device", "--cpu", "--json", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    rows = {row["id"]: row for row in json.loads(result.output.splitlines()[-1])["rows"]}
    checks = {name.rsplit("/")[-1]: row for name, row in rows.items() if "max_error" in row}
    assert set(checks) == {"xla", "pallas_gpu", "pallas_tpu"}
    assert all(row["status"] == "right" and row["bit_equal"] for row in checks.values())
    assert rows["check/sparse_gather/gather-tiny/pallas_tpu_sc"]["status"] == "refused"
    assert rows["measure/ceilings/copy"]["gb_per_s"] > 0 and rows["measure/ceilings/product"]["median_ms"] > 0
    assert set(wanted) | {"environment"} < set(rows)
    assert "Measured ceilings" in (tmp_path / "summary.md").read_text()


@pytest.mark.slow
def test_every_operation_and_stage_on_a_cpu(tmp_path):
    result = CliRunner().invoke(bench, ["device", "--cpu", "--budget", "900", "--json", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.output.splitlines()[-1])["rows"]
    assert {row["id"].split("/")[1] for row in _ours(rows) if row["status"] == "right"} == set(KERNELS)
    assert {row["stage"] for row in rows} == {"", *device_plan.STAGES}
    timed = {row["id"].split("/")[1] for row in _ours(rows) if row["status"] == "measured"}
    assert timed == set(KERNELS)
    assert not [row for row in rows if row["status"] in ("wrong", "failed", "crashed", "timed out")]


@pytest.mark.slow
def test_it_runs_without_the_laboratory(tmp_path):
    """What need not be on a device machine is not imported."""
    blocked = ("grain", "wandb", "array_record", "matplotlib", "pandas", "pyarrow")
    for name in blocked:
        (tmp_path / "blocked" / name).mkdir(parents=True)
        (tmp_path / "blocked" / name / "__init__.py").write_text("raise ImportError('blocked')")
    command = ["-c", "from recscale.scaling.cli import main; main()", "bench", "device", "--cpu", "--operation",
               "w8a16_matmul", *(f"--stage={name}" for name in ("check", "measure", "train", "tune")),
               "--out", str(tmp_path / "out")]  # fmt: skip
    environment = {"PYTHONPATH": str(tmp_path / "blocked"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    ended = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert not [row for row in rows if row["status"] in ("wrong", "failed", "crashed", "timed out")]
    assert any(row["id"] == "train/rankmixer_10k/xla/step" and row["median_ms"] for row in rows)
