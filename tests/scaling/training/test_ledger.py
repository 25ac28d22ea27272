"""The ledger without training: what it writes of every run at its beginning, in its course and at its end."""

import dataclasses
import types

import numpy as np
import pytest

from recscale.scaling.records.runs import append_metrics, metrics_mark, read_metrics, read_record, write_record
from recscale.scaling.training import RunSpec, get_config, identity, ledger, run_id
from recscale.scaling.training.group import Group
from recscale.scaling.training.ledger import Ledger
from recscale.scaling.training.schedule import Segment


@dataclasses.dataclass
class Counts:
    dense_params: int = 5


FACTS = {"name": "made up", "rows": 20}
TRUNK, SHORT, LONG = Segment(0, 4), Segment(4, 5, 5), Segment(4, 10, 10)


@pytest.fixture
def mirrors(monkeypatch):
    made = []

    class Mirror:
        def __init__(self, *given):
            self.given, self.rows, self.figures = given, [], None
            self.log, self.finish = self.rows.append, lambda figures: setattr(self, "figures", figures)
            made.append(self)

    monkeypatch.setattr(ledger, "WandbMirror", Mirror)
    return made


class Runs:
    """Two seeds of 10 steps and one run of 5, of 8 rows a step, and what a schedule says of them."""

    def __init__(self, folder, total_rows=None, sequences=()):
        self.runs = []
        for seed, examples in ((0, 40), (0, 80), (1, 80)):
            config = get_config("dlrm_mlp")
            config.seed, config.training.examples, config.training.warmup_examples = seed, examples, 0
            labels = {"sweep": "s", "notes": {"note": 1}, "flops_target": 7.0, "params_target": 8.0}
            self.runs.append(RunSpec(config, folder / f"{seed}-{examples}", labels))
        short, first, second = self.runs
        source = types.SimpleNamespace(
            facts=lambda: dict(FACTS), total_rows=total_rows, schema=types.SimpleNamespace(sequences=sequences)
        )
        self.schedule = types.SimpleNamespace(
            source=source, batch_rows=8, counts=Counts(), train_flops_per_row=3.0, segments=[TRUNK, SHORT, LONG],
            steps={short.run_dir: 5, first.run_dir: 10, second.run_dir: 10},
            members={TRUNK: [[short, first], [second]], SHORT: [[short], []], LONG: [[first], [second]]},
            examples=lambda run: run.config.training.examples,
        )  # fmt: skip

    def begun(self, mesh=None):
        made = Ledger(self.runs)
        made.begin(self.schedule, mesh)
        return made


@pytest.fixture
def three(tmp_path, mirrors):
    made = Runs(tmp_path)
    for run in made.runs:
        run.run_dir.mkdir()
    return made


def test_every_run_begins_with_a_record_and_a_mirror(three, mirrors):
    assert Ledger(three.runs).records == [{}, {}, {}] and not Ledger(three.runs).finished
    made = three.begun()
    for run, record, mirror in zip(three.runs, made.records, mirrors, strict=True):
        assert record == read_record(run.run_dir) and record["status"] == "running" and record["reasons"] == []
        assert (record["run_id"], record["note"], record["sweep"]) == (run_id(run.config), 1, "s")
        assert (record["counts"], record["data"], record["history_length"]) == ({"dense_params": 5}, FACTS, None)
        assert record["placement"] == {"mesh": "", "devices": 1, "processes": 1} and record["started"]
        assert record["horizons"] == [40, 80] and [seed for seed, _ in record["replicas"]] == [0, 1]
        examples = run.config.training.examples
        assert record["work"] == {
            "steps": examples // 8, "batch_rows": 8, "examples": examples, "unique_examples": examples, "epochs": 1.0,
            "train_flops": 3.0 * examples, "flops_target": 7.0, "params_target": 8.0,
        }  # fmt: skip
        assert mirror.given[:4] == ("off", "recscale", run_id(run.config), run.run_dir)
        assert mirror.given[4]["seed"] == run.config.seed
    assert not made.finished and made.data == ledger.checksum(FACTS)


def test_rows_of_a_finite_log_come_back_in_epochs(tmp_path, mirrors):
    sequences = [types.SimpleNamespace(length=n) for n in (3, 9, 4)]
    made = Runs(tmp_path, total_rows=60, sequences=sequences)
    for run in made.runs:
        run.run_dir.mkdir()
    mesh = types.SimpleNamespace(shape={"data": 2, "fsdp": 3}, size=6)
    records = made.begun(mesh).records
    assert [(one["work"]["unique_examples"], one["work"]["epochs"]) for one in records] == [
        (40, 1.0), (60, 80 / 60), (60, 80 / 60),
    ]  # fmt: skip
    assert records[0]["history_length"] == 9
    assert records[0]["placement"] == {"mesh": "data=2,fsdp=3", "devices": 6, "processes": 1}


def test_a_run_goes_on_with_what_its_record_keeps(three, mirrors):
    run = three.runs[0]
    kept = {"started": "then", "restored_from": 3, "discarded": [{"checkpoint": 4, "reason": "x"}]}
    write_record(run.run_dir, {"status": "running", "run_id": run_id(run.config), "data": FACTS, "old": 1} | kept)
    record = three.begun().records[0]
    assert {key: record[key] for key in kept} == kept and "old" not in record
    write_record(run.run_dir, record | {"data": {"name": "other"}})
    with pytest.raises(ValueError, match='begun on other data: .*name is "other" there, "made up" here'):
        three.begun()


def test_a_folder_is_compared_before_it_is_used(three):
    first, second, _ = three.runs
    write_record(first.run_dir, {"status": "running", "run_id": "another", "config": {}})
    with pytest.raises(ValueError, match="holds run another"):
        Ledger(three.runs)
    append_metrics(first.run_dir, {"step": 1})
    own = {"run_id": run_id(first.config), "metrics_file": metrics_mark(first.run_dir)}
    write_record(first.run_dir, {"status": "done"} | own)
    write_record(second.run_dir, {"status": "running", "run_id": run_id(second.config)})
    made = Ledger(three.runs)
    assert not made.finished and [record.get("status") for record in made.records] == ["done", "running", None]
    assert made._open == three.runs[1:]
    append_metrics(first.run_dir, {"step": 2})
    with pytest.raises(ValueError, match="is not as the run left it"):
        Ledger(three.runs)


def test_a_checkpoint_fits_where_its_metrics_are_still_there(three):
    short, first, second = three.runs
    made = three.begun()
    for number in range(3):
        for run in three.runs:
            append_metrics(run.run_dir, {"step": number})
    marks = made.marks()
    assert marks == {run_id(run.config): metrics_mark(run.run_dir) for run in three.runs}
    position = {"segment": 1, "metrics": marks}
    assert made.unfit(position) is None
    append_metrics(first.run_dir, {"step": 3})  # behind the checkpoint: they will be written again
    assert made.unfit(position) is None
    told = made.unfit(position | {"segment": 2})
    assert told == f"it lies behind the end of run {run_id(short.config)}, whose result is missing"
    less = {name: mark for name, mark in marks.items() if name != run_id(second.config)}
    assert f"metrics of run {run_id(second.config)} are not those" in made.unfit(position | {"metrics": less})
    (first.run_dir / "metrics.jsonl").write_text('{"step": 9}\n' * 4)
    assert f"metrics of run {run_id(first.config)} are not those" in made.unfit(position)

    made.rewind(position | {"step": 4}, [])
    assert [len(read_metrics(run.run_dir)) for run in three.runs] == [3, 3, 3] and len(made._lines[first.run_dir]) == 3
    assert [(record["restored_from"], record["discarded"]) for record in made.records] == [(4, [])] * 3
    made.rewind(position | {"step": 4}, [{"checkpoint": 7, "reason": "x"}])
    made.rewind(None, [{"checkpoint": 6, "reason": "y"}])
    assert all(not read_metrics(run.run_dir) for run in three.runs) and made._lines[first.run_dir] == []
    record = read_record(short.run_dir)
    assert record["restored_from"] == 0 and [each["checkpoint"] for each in record["discarded"]] == [7, 6]
    fresh = three.begun()
    for run in three.runs:
        write_record(run.run_dir, {key: value for key, value in fresh._records[run.run_dir].items()
                                   if key not in ("restored_from", "discarded")})  # fmt: skip
    fresh = three.begun()
    fresh.rewind(None, [])
    assert "restored_from" not in fresh.records[0] and "discarded" not in read_record(short.run_dir)


def test_an_interval_is_written_to_every_run_it_belongs_to(three, mirrors):
    short, first, second = three.runs
    made = three.begun()
    values = {"logloss": np.array([0.5, 0.25]), "load": np.array([[1, 2], [3, 4]])}
    made.append(TRUNK, {"step": 4}, values)
    made.append(SHORT, {"step": 5}, values)
    lines = [{"step": 4, "logloss": 0.5, "load": [1, 2]}, {"step": 5, "logloss": 0.5, "load": [1, 2]}]
    other = [{"step": 4, "logloss": 0.25, "load": [3, 4]}]
    for run, mirror, expected in zip(three.runs, mirrors, (lines, lines[:1], other), strict=True):
        assert read_metrics(run.run_dir) == made._lines[run.run_dir] == mirror.rows == expected


def finish(made, run, failed_at=-1, metrics=None, **more):
    made.finish(run, metrics, {"wall_s": 1.0}, {"used": 2}, {"op": {"xla": "why"}}, failed_at, **more)


def test_a_run_ends_with_its_metrics_or_the_step_it_broke_at(three, mirrors, monkeypatch):
    short, first, second = three.runs
    asked = []
    monkeypatch.setattr(ledger, "progressive_metrics", lambda *given: asked.append(given) or {"progressive": 0.75})
    made = three.begun()
    made.append(TRUNK, {"step": 4}, {})
    finish(made, short, metrics={"logloss": 0.5, "days": [1], "auc": 1})
    record = read_record(short.run_dir)
    assert asked == [([{"step": 4}], 5)] and record["status"] == "done" and record["reasons"] == []
    assert record["metrics"] == {"logloss": 0.5, "days": [1], "auc": 1, "progressive": 0.75}
    assert record["metrics_file"] == metrics_mark(short.run_dir) and record["finished"]
    assert (record["cost"], record["resources"], record["kernels"]) == (
        {"wall_s": 1.0}, {"used": 2}, {"op": {"xla": "why"}},
    )  # fmt: skip
    assert record["work"]["examples_seen"] == record["work"]["examples"] == 40 and record["started"]
    assert mirrors[0].figures == {"logloss": 0.5, "auc": 1, "progressive": 0.75} and not made.finished

    finish(made, first, work={"examples": 24, "passes_tried": 3})
    record = read_record(first.run_dir)
    assert record["metrics"] == {"progressive": 0.75} and record["work"]["passes_tried"] == 3
    assert (record["work"]["examples"], record["work"]["examples_seen"], record["work"]["steps"]) == (24, 24, 10)

    finish(made, second, failed_at=0)
    record = read_record(second.run_dir)
    assert record["status"] == "diverged" and record["reasons"] == ["loss was not finite at step 0"]
    assert record["metrics"] == {"logloss": None, "progressive": 0.75} and record["work"]["examples_seen"] == 8
    assert mirrors[2].figures == {"progressive": 0.75} and made.finished and Ledger(three.runs).finished
    for failed_at, seen in ((4, 40), (9, 80), (10, 80)):
        finish(made, second, failed_at=failed_at)
        assert read_record(second.run_dir)["work"]["examples_seen"] == seen


def test_a_finished_run_and_what_others_write_stay_as_they_are(three, mirrors, monkeypatch):
    short, first, second = three.runs
    made = three.begun()
    finish(made, short)
    before = (short.run_dir / "run.json").read_bytes()
    again = three.begun()
    assert len(mirrors) == 3 + 2 and list(again.marks()) == [run_id(run.config) for run in three.runs[1:]]
    again.append(TRUNK, {"step": 4}, {})
    finish(again, short, failed_at=3)
    again.rewind(None, [{"checkpoint": 1, "reason": "x"}])
    assert (short.run_dir / "run.json").read_bytes() == before and not read_metrics(short.run_dir)
    monkeypatch.setattr(ledger, "is_first", lambda: False)
    other = three.begun()
    assert len(mirrors) == 5 and other.records[1]["status"] == "running" and other.marks() == {}
    before = (first.run_dir / "run.json").read_bytes()
    append_metrics(first.run_dir, {"step": 3})
    other.append(TRUNK, {"step": 4}, {})
    other.rewind(None, [{"checkpoint": 1, "reason": "x"}])
    finish(other, first)
    assert (first.run_dir / "run.json").read_bytes() == before and read_metrics(first.run_dir) == [{"step": 3}]


def test_what_differs_is_named_up_to_three_settings():
    assert identity.differences({"a": 1}, {"a": 1}) == ""
    old, new = {"s": {"a": 1, "b": "x", "c": None}, "d": 1}, {"s": {"a": 2, "b": "y", "c": None}, "e": 1}
    told = identity.differences(old, new)
    assert told == 's.a is 1 there, 2 here; s.b is "x" there, "y" here; e is absent there, 1 here; 1 more'
    assert identity.differences({"a": 1, "b": 1, "c": 1}, {}).count("absent here") == 3
    assert "more" not in identity.differences({"a": 1, "b": 1, "c": 1}, {})
    four = identity.differences(dict.fromkeys("abcde", 1), {})
    assert four.endswith("c is 1 there, absent here; 2 more")


def test_runs_of_a_group_belong_together_and_come_once(tmp_path, three):
    made = Group(three.runs)
    rate = float(three.runs[0].config.training.lr)
    assert made.replicas == [(0, rate), (1, rate)] and made.runs == tuple(three.runs)
    assert made.signature != Group(three.runs[:2]).signature == Group(three.runs[1::-1]).signature
    assert made.config is three.runs[0].config
    seeds = [RunSpec(get_config("dlrm_mlp"), tmp_path) for _ in range(9)]
    for number, run in enumerate(seeds):
        run.config.seed = 7 * number % 9
    assert [seed for seed, _ in Group(seeds).replicas] == list(range(9))
    twice = ", ".join(sorted(run_id(run.config) for run in seeds))
    with pytest.raises(ValueError, match=f"given twice: {twice}$"):
        Group([*seeds, *seeds])
    with pytest.raises(ValueError, match="at least one run"):
        Group([])
    with pytest.raises(ValueError, match=f"given twice: {run_id(three.runs[0].config)}$"):
        Group([*three.runs, three.runs[0]])
    other = get_config("dlrm_mlp")
    other.training.b1 = 0.5
    with pytest.raises(ValueError, match="these belong to 2 groups"):
        Group([three.runs[0], RunSpec(other, tmp_path)])
    assert RunSpec(other, tmp_path).labels == {}
