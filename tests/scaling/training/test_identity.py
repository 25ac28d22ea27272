"""A folder belongs to one run and to one process: anything else is refused, with what differs or who holds it."""

import json
import multiprocessing
import os
import re
import socket

import pytest

from recscale.scaling.records import runs as records
from recscale.scaling.records.locks import Busy, hold
from recscale.scaling.records.sealed import sealed
from recscale.scaling.training import RunSpec, get_config, resolved, run_id, runner, train, train_group


def finished(folder, config, **more):
    record = {"status": "done", "run_id": run_id(config), "config": resolved(config), "metrics": {"logloss": 0.111}}
    records.write_record(folder, record | more)


@pytest.mark.parametrize("status", ["done", "running", "failed", "diverged"])
@pytest.mark.parametrize("key, value", [("training.lr", 0.1), ("seed", 3), ("model.layers", 1)])
def test_the_folder_of_another_run_is_refused_with_what_differs(tmp_path, status, key, value):
    old, new = get_config("dlrm_mlp"), get_config("rankmixer" if "model" in key else "dlrm_mlp")
    new.update_from_flattened_dict({key: value})
    finished(tmp_path, old, status=status)
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(ValueError, match=f"holds run {run_id(old)} .*, not {run_id(new)}: ") as refused:
        train(new, tmp_path)
    assert (key if "model" not in key else "architecture") in str(refused.value)
    assert (tmp_path / "run.json").read_bytes() == before


def test_settings_that_change_no_result_may_differ(tmp_path):
    config = get_config("dlrm_mlp")
    finished(tmp_path, config)
    config.training.checkpoint_every_s, config.tracking.project = 1.0, "mine"
    assert train(config, tmp_path)["metrics"] == {"logloss": 0.111}


def test_the_same_run_in_another_group_is_another_result(tmp_path):
    config = get_config("dlrm_mlp")
    alone = {"replicas": [[0, 0.003]], "horizons": [config.training.examples]}
    for other in ({"replicas": [[0, 0.003], [1, 0.003]]}, {"horizons": [1_000, config.training.examples]}):
        finished(tmp_path, config, **alone | other)
        with pytest.raises(ValueError, match=f"trained together with other runs: {next(iter(other))} is .* there"):
            train(config, tmp_path)
    finished(tmp_path, config, **alone)
    assert train(config, tmp_path)["status"] == "done"


def test_one_folder_of_a_group_that_holds_another_run_stops_all(tmp_path):
    first, second = get_config("dlrm_mlp"), get_config("dlrm_mlp")
    second.seed = 1
    finished(tmp_path / "a", first)
    finished(tmp_path / "b", first)
    with pytest.raises(ValueError, match="seed is 0 there, 1 here"):
        train_group([RunSpec(first, tmp_path / "a"), RunSpec(second, tmp_path / "b")], tmp_path)


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda text: text[: len(text) // 2], "is not valid JSON"),
        (lambda text: b"", "is not valid JSON"),
        (lambda text: text + b"\xff\x00garbage", "is not valid JSON"),
        (lambda text: text.replace(b"0.111", b"0.011"), "is not valid JSON as it was written"),
        (lambda text: b'{"status": "done"}', "is not valid JSON as it was written"),
        (lambda text: sealed({"status": "doze"}).encode(), "is not a run record"),
    ],
)
def test_a_damaged_record_is_named_with_a_mend_that_works(tmp_path, damage, told):
    config = get_config("dlrm_mlp")
    finished(tmp_path, config)
    path = tmp_path / "run.json"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=told) as error:
        train(config, tmp_path)
    command = re.search(r"`(rm .*?)`", str(error.value)).group(1)
    assert str(path) in str(error.value) and os.system(command) == 0
    assert records.read_record(tmp_path) is None


def test_metrics_a_finished_record_was_not_made_of_are_named(tmp_path):
    config = get_config("dlrm_mlp")
    records.append_metrics(tmp_path, {"step": 1, "logloss": 0.5})
    finished(tmp_path, config, metrics_file=records.metrics_mark(tmp_path))
    assert train(config, tmp_path)["status"] == "done"
    records.append_metrics(tmp_path, {"step": 2, "logloss": 0.5})
    with pytest.raises(ValueError, match=r"metrics.jsonl is not as the run left it.*rm .*run.json"):
        train(config, tmp_path)


def _hold(path, ready, done):
    with hold(path):
        ready.set()
        done.wait(30)


def test_a_run_that_another_process_trains_is_refused_with_its_host_and_process(tmp_path, monkeypatch):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path / "lock", ready, done))
    other.start()
    assert ready.wait(30)
    monkeypatch.setattr(runner, "_LOCK_WAIT_S", 0.0)
    try:
        with pytest.raises(Busy, match=rf"process {other.pid} on {re.escape(socket.gethostname())}"):
            train(get_config("dlrm_mlp"), tmp_path)
        assert not (tmp_path / "run.json").exists()
        finished(tmp_path, get_config("dlrm_mlp"))
        assert train(get_config("dlrm_mlp"), tmp_path)["status"] == "done"  # reading takes no lock
    finally:
        done.set()
        other.join()


def test_a_run_that_was_begun_on_other_data_is_refused(tmp_path):
    config = get_config("dlrm_mlp")
    config.data.preset, config.data.holdout_rows = "smoke", 128
    config.training.requests, config.training.examples, config.training.warmup_examples = 64, 64, 0
    finished(tmp_path, config, status="running", data={"name": "other"})
    with pytest.raises(ValueError, match='was begun on other data: .*name is "other" there'):
        train(config, tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["data"] == {"name": "other"}
