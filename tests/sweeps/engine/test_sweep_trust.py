"""What a sweep's folder shows can be trusted: one row per planned run, nothing copied, edited or lost in silence."""

import itertools
import json
import os
import re
import shlex
import shutil

import pandas as pd
import pytest

from recscale.scaling.cli import main
from recscale.scaling.records import files
from recscale.scaling.records.runs import TABLE, collect, read_record, write_record
from recscale.scaling.records.sealed import sealed
from recscale.scaling.training import resolved
from recscale.sweeps.engine import machine
from recscale.sweeps.engine.locks import only_launcher
from recscale.sweeps.engine.plan import read_plan, read_sweep, run_config

SWEEP = """
from recscale.scaling.training import get_config as base_config
from recscale.sweeps import axis, product, seeds
def get_config():
    config = base_config("dlrm_mlp", "known_truth")
    config.data.preset, config.data.holdout_rows = "smoke", 512
    config.training.requests, config.training.examples = 64, 640
    return config
def get_sweep():
    return product(axis("training.lr", [1e-3, 3e-3]), seeds(2))
"""


def call(capsys, *arguments, code=0):
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert left.value.code == code, printed
    return printed.out + printed.err


def follow(advice, capsys):
    """Does what a message says, in its own words."""
    [commands] = re.findall("`(.+?)`", advice)
    for command in commands.split(" && "):
        if command.startswith("recscale "):
            call(capsys, *shlex.split(command)[1:])
        else:
            assert os.system(command) == 0


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trust")
    (folder / "my sweep.py").write_text(SWEEP)
    with pytest.raises(SystemExit):
        main(["plan", str(folder / "my sweep.py"), "--out", str(folder / "out")])
    for row in read_plan(folder / "out"):
        record = {"run_id": row["run_id"], "status": "done", "config": resolved(run_config(row)), "reasons": []}
        write_record(folder / "out" / "runs" / row["run_id"], record | {"metrics": {"logloss": row["config"]["seed"]}})
    return folder


@pytest.fixture
def out(planned):
    """The folder of a finished sweep; its place stays the same, since messages name it."""
    kept = planned / "kept"
    shutil.copytree(planned / "out", kept)
    yield planned / "out"
    shutil.rmtree(planned / "out")
    kept.rename(planned / "out")


def test_every_planned_run_has_a_row_and_missing_ones_are_lost(out, capsys):
    assert list(collect(out)["status"]) == ["done"] * 4
    gone = read_plan(out)[1]
    shutil.rmtree(out / "runs" / gone["run_id"])
    told = call(capsys, "collect", out, code=1)
    assert f"1 planned runs have no record: {gone['run_id']}" in told and f"recscale launch {out}" in told
    row = pd.read_parquet(out / TABLE).set_index("run_id").loc[gone["run_id"]]
    assert row["status"] == "lost" and row["dense_params"] == gone["counts"]["dense_params"]
    assert row["lr_dense"] == gone["config"]["training"]["lr"] and pd.isna(row["logloss"])
    with only_launcher(out):
        assert dict(collect(out)["status"].value_counts()) == {"done": 3, "planned": 1}


def test_a_copied_run_is_refused(out, capsys):
    first = out / "runs" / read_plan(out)[0]["run_id"]
    shutil.copytree(first, out / "runs" / "copy of a run")
    told = call(capsys, "collect", out, code=1)
    assert f"holds the record of run {first.name}: it was copied or renamed" in told
    follow(told, capsys)
    call(capsys, "collect", out)


@pytest.mark.parametrize("sealed", [False, True])
def test_an_edited_run_is_refused(out, capsys, sealed):
    folder = out / "runs" / read_plan(out)[0]["run_id"]
    record = read_record(folder)
    record["config"]["training"]["lr"] = 1.0
    if sealed:
        write_record(folder, record)
        assert "training.lr is 1.0 there, 0.001 in the plan" in call(capsys, "collect", out, code=1)
    else:
        (folder / "run.json").write_text(json.dumps(record | {"check": "0"}))
        assert "run.json is not valid JSON as it was written" in call(capsys, "collect", out, code=1)


DAMAGES = {
    "line lost": lambda text: b"".join(text.splitlines(keepends=True)[1:]),
    "changed": lambda text: text.replace(b'"examples": 640', b'"examples": 641', 1),
    "deleted": lambda text: None,
    "emptied": lambda text: b"",
    "cut": lambda text: text[: len(text) // 2],
    "garbage": lambda text: text + b'{"run_id": \xff',
    "line twice": lambda text: text + text.splitlines(keepends=True)[1],
    "line twice, another lost": lambda text: b"".join(text.splitlines(keepends=True)[i] for i in (0, 1, 1, 3)),
    "no hash": lambda text: text + b"{}\n",
}


@pytest.mark.parametrize(
    "how", [pytest.param(how, marks=[pytest.mark.slow] * (i > 1)) for i, how in enumerate(DAMAGES)]
)
def test_a_damaged_plan_is_named_and_written_anew_by_the_command_it_names(out, capsys, how):
    def planned():
        keys = ("run_id", "job", "part", "part_rows", "config", "counts", "stage")
        return sorted(([row[key] for key in keys] for row in read_plan(out)), key=str)

    path, whole = out / "plan.jsonl", planned()
    damaged = DAMAGES[how](path.read_bytes())
    path.unlink() if damaged is None else path.write_bytes(damaged)
    told = call(capsys, "collect", out, code=1)
    assert "plan.jsonl" in told
    assert call(capsys, "launch", out, code=1) and call(capsys, "status", out, code=1)
    follow(told, capsys)
    assert planned() == whole
    call(capsys, "collect", out)


def test_a_run_whose_line_is_gone_is_named(out, capsys):
    """Also where a whole part of the plan is gone, so that nothing in the file says that it was there."""
    lines = (out / "plan.jsonl").read_text().splitlines()
    row = json.loads(lines[0]) | {"part": "other", "part_rows": 1}
    row.pop("check")
    (out / "plan.jsonl").write_text(sealed(row))
    assert re.search("has no line of run [0-9a-f]{12}", call(capsys, "collect", out, code=1))


def test_a_changed_sweep_json_is_not_believed_and_planning_writes_it_anew(out, capsys):
    path, whole = out / "sweep.json", read_sweep(out)
    path.write_text(path.read_text().replace("my sweep", "my swoop", 1))
    with pytest.raises(ValueError, match="sweep.json is damaged; planning the sweep writes it anew") as told:
        read_sweep(out)
    follow(str(told.value), capsys)
    assert read_sweep(out) == whole


@pytest.mark.parametrize(
    "read, name, damage",
    [
        (read_plan, "plan.jsonl", lambda text: b""),
        pytest.param(read_plan, "plan.jsonl", lambda text: text[:-100], marks=pytest.mark.slow),
        pytest.param(read_sweep, "sweep.json", lambda text: b"", marks=pytest.mark.slow),
    ],
)
def test_a_plan_that_grew_comes_back_whole(planned, tmp_path, capsys, read, name, damage):
    """Its parts were planned with different settings; either file knows those of both."""
    out, file = tmp_path / "out", planned / "my sweep.py"
    call(capsys, "plan", file, "--out", out)
    call(capsys, "plan", file, "--out", out, "--set", "training.examples=1280", "--extend")
    whole, path = sorted(row["run_id"] for row in read_plan(out)), out / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError) as told:
        read(out)
    follow(str(told.value), capsys)
    assert sorted(row["run_id"] for row in read_plan(out)) == whole and len(whole) == 8
    assert len(read_sweep(out)["arguments"]) == 2


class Killed(BaseException):
    """Nothing in the product catches it."""


def stopped_at(arguments, number, done, monkeypatch):
    """Whether a command was stopped at its n-th replacement of a file: before it, or when it is done."""
    replace, count = os.replace, 0

    def replacing(*places):
        nonlocal count
        count += 1
        if count == number and not done:
            raise Killed
        replace(*places)
        if count == number:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", replacing)
        try:
            with pytest.raises(SystemExit):
                main([str(argument) for argument in arguments])
        except Killed:
            return True
    return False


@pytest.mark.parametrize("command", ["plan", "collect"])
def test_a_command_stopped_at_any_file_is_completed_by_the_next(planned, out, tmp_path, capsys, monkeypatch, command):
    monkeypatch.setattr(machine, "core_flops", lambda: 1e10)
    if command == "plan":
        out = tmp_path / "planned"
    arguments = [command, planned / "my sweep.py", "--out", out] if command == "plan" else [command, out]
    call(capsys, *arguments)
    whole, stops = contents(out), 0
    for number, done in itertools.product(range(1, 9), (False, True)):
        for path in out.glob("*.json*" if command == "plan" else "*.parquet"):
            path.unlink()
        if not stopped_at(arguments, number, done, monkeypatch):
            break
        stops += 1
        call(capsys, *arguments)
        assert contents(out) == whole
    assert stops == {"plan": 4, "collect": 2}[command]


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.suffix in (".json", ".jsonl", ".parquet")}
