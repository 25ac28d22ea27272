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


def test_a_job_that_failed_is_over_and_one_tried_again_begins_anew(clock, capsys):
    jobs, lines = [job("a", 10.0), job("b", 10.0), job("c", 10.0)], display.Lines()
    lines.start(jobs, workers=2)
    lines.started(jobs[0])
    clock.value += 100.0
    lines.retried(jobs[0], "it broke")
    clock.value += 7.0
    lines.done(jobs[0], {"r1": "done", "r2": "done"})  # of its second attempt
    lines.started(jobs[1])
    lines.failed(jobs[1], "it broke", "log.txt")
    lines.done(jobs[2], {"r": "diverged"})
    assert [line.partition("[")[2] for line in capsys.readouterr().err.splitlines() if line.startswith("done")] == [
        "33% done, about 7 s left]",
        "100% done]",
    ]
    lines.start([], workers=3)
    assert capsys.readouterr().err == "0 runs to train, in 0 jobs on 1 workers\n" and lines._meter.share() == 1.0
    clock.value += 30.0
    lines.refresh()
    assert capsys.readouterr().err == ""  # half a minute, and not a moment less, goes by


def test_time_left_takes_the_share_done_off_and_never_divides_by_nothing(clock):
    jobs = [job("a", 100.0), job("b", 0.0)]
    meter = display.Meter(jobs, workers=0)
    meter.started(jobs[0])
    meter.progress(jobs[0], {"step": 5, "total_steps": 10})
    assert meter.left_s() == pytest.approx(50.0) and meter.share() == pytest.approx(0.5)
    assert "rows/s" not in meter.summary()
    meter.progress(jobs[0], event(5, 50.0) | {"flops_per_s": None})
    assert "1,000 rows/s, 0.00 GFLOP/s" in meter.summary()
    assert meter.ended(job("unknown", 1.0)) == 0.0 and meter.share() == pytest.approx(0.5)
    assert meter.ended(jobs[0]) == 0.0  # in no time: what the others take stays as predicted
    meter.started(jobs[1])
    meter.progress(jobs[1], {"step": 1, "total_steps": 1})
    assert meter.share() == pytest.approx(1.0) and meter.left_s() == 0.0
    assert display._share({"step": 0, "total_steps": 0}) == 0.0 and display._share({"step": 1, "total_steps": 1}) == 1.0


def test_bars_follow_the_jobs(clock, capsys, monkeypatch):
    jobs, bars = [job("a", 10.0), job("b", 10.0), job("c", 20.0)], display.Bars()
    bars.start(jobs, workers=2)
    assert bars._bars.live.is_started and bars._bars.columns[1].bar_width == 30
    printed = []
    monkeypatch.setattr(bars._bars.console, "print", lambda text="", **options: printed.append((text, options)))

    def shown():
        return {task.description: (round(task.percentage), task.fields["speed"]) for task in bars._bars.tasks}

    bars.started(jobs[0])
    bars.started(jobs[0])  # again: one bar
    bars.started(jobs[1])
    assert shown() == {"all jobs": (0, ""), "toy a": (0, "compiling"), "toy b": (0, "compiling")}
    assert len(bars._bars.tasks) == 3
    bars.progress(jobs[0], event(5, 5.0))
    bars.progress(jobs[2], event(1, 5.0) | {"total_steps": 1})  # not begun here
    assert shown()["toy a"] == (50, "1,000 rows/s, 2.00 GFLOP/s, 5 s left")
    share, text = shown()["all jobs"]
    assert share == 62 and text.startswith("62% done, 2,000 rows/s")
    clock.value += 3.0
    bars.done(jobs[0], {"r1": "diverged", "r2": "done"})
    bars.failed(jobs[1], "it [broke]", "log.txt")
    assert list(shown()) == ["all jobs"] and shown()["all jobs"][0] == 75
    assert shown()["all jobs"][1].startswith("75% done, 1,000 rows/s")
    assert [text.partition(":")[0] for text, _ in printed] == ["done    toy a", "FAILED  toy b"]
    assert all(options == {"markup": False, "highlight": False} for _, options in printed)
    assert "1 diverged in 3 s" in printed[0][0]
    bars.progress(jobs[2], event(1, 1.0) | {"total_steps": 1})
    monkeypatch.undo()
    bars.stop()
    assert not bars._bars.live.is_started


def test_bars_where_there_is_a_terminal(monkeypatch):
    for terminal, kind in ((True, display.Bars), (False, display.Lines)):
        monkeypatch.setattr(display.sys, "stderr", types.SimpleNamespace(isatty=lambda answer=terminal: answer))
        assert type(display.for_terminal()) is kind
