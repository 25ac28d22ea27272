"""Jobs on record: what is left to do, longest first, and a failure that leaves the job's finished runs alone."""

from recscale.scaling.records.runs import read_record, write_record
from recscale.sweeps.engine.job import count, mark_failed, pending_jobs, run_statuses


def row(run, job, seconds=1.0):
    return {
        "run_id": run,
        "job": job,
        "sweep": "s",
        "config": {"architecture": "dlrm_mlp"},
        "counts": {"dense_params": 1234},
        "labels": {},
        "targets": {"dense_params": None, "train_flops": None},
        "predicted": {"peak_memory_bytes": 7, "job_seconds": seconds, "train_flops": 1.0, "examples": 10},
        "group_id": job,
        "shape_id": "shape",
        "trunk_id": "trunk",
        "stage": 0,
        "part": "p",
        "target_error": None,
    }


def record(out, run, status):
    write_record(out / "runs" / run, {"run_id": run, "status": status, "reasons": [], "metrics": {"logloss": 0.5}})


def test_a_failure_is_written_to_unfinished_runs_alone(tmp_path):
    for run, status in (("a", "done"), ("b", "diverged"), ("c", "running"), ("d", "failed")):
        record(tmp_path, run, status)
    rows = [row(run, "job") for run in "abcde"]
    before = {run: read_record(tmp_path / "runs" / run) for run in "ab"}
    mark_failed(tmp_path, rows, ["killed by SIGKILL", "log: x"])
    found = run_statuses(tmp_path, rows)
    assert found == {"a": "done", "b": "diverged", "c": "failed", "d": "failed", "e": "failed"}
    assert {run: read_record(tmp_path / "runs" / run) for run in "ab"} == before
    for run in "cde":
        assert read_record(tmp_path / "runs" / run)["reasons"] == ["killed by SIGKILL", "log: x"]
    assert count(found.values()) == {"diverged": 1, "done": 1, "failed": 3}


def test_a_job_is_left_while_one_of_its_runs_is(tmp_path):
    rows = [row("a", "x"), row("b", "x"), row("c", "y", 9.0), row("d", "z", 5.0)]
    for run, status in (("a", "done"), ("b", "running"), ("d", "done")):
        record(tmp_path, run, status)
    jobs = pending_jobs(tmp_path, rows)
    assert [(job.id, [own["run_id"] for own in job.rows]) for job in jobs] == [("y", ["c"]), ("x", ["a", "b"])]
    assert [job.seconds for job in jobs] == [9.0, 1.0] and jobs[0].label == "dlrm_mlp 1,234"
    record(tmp_path, "b", "diverged")
    record(tmp_path, "c", "done")
    assert pending_jobs(tmp_path, rows) == []
