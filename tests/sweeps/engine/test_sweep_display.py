"""What a launch shows: time left that follows what is measured, and lines a log file can hold."""

import types

import pytest

from recscale.sweeps.engine import display


@pytest.fixture
def clock(monkeypatch):
    now = types.SimpleNamespace(value=100.0)
    monkeypatch.setattr(display.time, "monotonic", lambda: now.value)
    return now


def job(name, seconds):
    return types.SimpleNamespace(id=name, label=f"toy {name}", seconds=seconds, rows=[{}, {}])


def event(step, eta_s):
    return {"step": step, "total_steps": 10, "rows_per_s": 1000.0, "flops_per_s": 2e9, "eta_s": eta_s}


def test_time_left_is_predicted_then_measured(clock):
    jobs = [job("a", 10.0), job("b", 10.0), job("c", 20.0)]
    meter = display.Meter(jobs, workers=2)
    assert meter.left_s() == 20.0 and meter.share() == 0.0
    meter.started(jobs[0])
    meter.started(jobs[1])
    meter.progress(jobs[0], event(5, 30.0))
    assert meter.left_s() == 30.0  # b and c as predicted and a's own 30 s over two workers; a alone needs as long
    assert meter.share() == pytest.approx(5 / 40)
    clock.value += 40.0
    assert meter.ended(jobs[0]) == 40.0  # four times the prediction, so the others are expected to take that too
    assert meter.left_s() == 80.0  # c alone
    meter.progress(jobs[1], event(5, 100.0))
    assert meter.left_s() == 100.0
    assert "1,000 rows/s, 2.00 GFLOP/s, about 1 min 40 s left" in meter.summary()


def test_lines_say_what_happened(clock, capsys):
    jobs, lines = [job("a", 10.0), job("b", 10.0)], display.Lines()
    lines.start(jobs, workers=4)
    lines.started(jobs[0])
    lines.refresh()
    clock.value += 31.0
    lines.refresh()
    lines.done(jobs[0], {"r1": "done", "r2": "diverged"})
    lines.started(jobs[1])
    lines.retried(jobs[1], "it broke")
    lines.failed(jobs[1], "it broke again", "groups/b/log.txt")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [
        "4 runs to train, in 2 jobs on 2 workers",
        "running 0% done, about 10 s left",
        "done    toy a: 2 runs, 1 diverged in 31 s  [50% done, about 31 s left]",
        "retry   toy b: it broke",
        "FAILED  toy b: it broke again",
        "        log: groups/b/log.txt",
    ]


def test_a_bar_of_every_running_job_and_one_of_all(clock, capsys):
    jobs, bars = [job("a", 10.0), job("b", 10.0)], display.Bars()
    bars.start(jobs, workers=2)
    bars.started(jobs[0])
    bars.progress(jobs[0], event(5, 5.0))
    shown = {task.description: task.percentage for task in bars._bars.tasks}
    assert shown == {"all jobs": 25.0, "toy a": 50.0}
    bars.done(jobs[0], {"r1": "done", "r2": "done"})
    bars.refresh()
    bars.stop()
    assert [task.description for task in bars._bars.tasks] == ["all jobs"]
    assert "4 runs to train, in 2 jobs on 2 workers" in capsys.readouterr().err


def test_clock():
    assert [display.clock(s) for s in (0.4, 59, 200, 7500)] == ["0 s", "59 s", "3 min 20 s", "2 h 05 min"]


def test_time_left_goes_on_while_nothing_is_heard(clock):
    jobs = [job("a", 100.0)]
    meter = display.Meter(jobs, workers=1)
    meter.started(jobs[0])
    clock.value += 40.0
    assert meter.left_s() == 60.0
    clock.value += 100.0
    assert meter.left_s() == pytest.approx(14.0)  # overdue: a tenth of its silence, not nothing
    meter.progress(jobs[0], event(5, 50.0))
    clock.value += 20.0
    assert meter.left_s() == 30.0
