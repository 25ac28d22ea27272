"""A finite log with nothing set: training stops by itself and leaves a model that evaluates and scores."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from recscale.scaling.data.importing.importer import import_log
from recscale.scaling.data.made_up_shop import write_shop
from recscale.scaling.records.runs import read_record, write_record
from recscale.scaling.training import get_config, load, train
from recscale.scaling.training.model_commands import evaluate, predict
from recscale.scaling.training.passes import Tracker


def tracked(losses, patience=2, most=9, share=0.5):
    tracker = Tracker(patience, most, share)
    for loss in losses:
        assert not tracker.over
        if tracker.should_decay:
            tracker.decay = tracker.done
        tracker.losses.append([loss])
    return tracker


def test_passes_go_on_while_they_improve_and_then_the_rate_decays():
    tracker = tracked([0.6, 0.5, 0.4, 0.45, 0.41])
    assert tracker.should_decay and tracker.best.tolist() == [2]
    tracker.decay = tracker.done
    assert tracker.decay_length == 2 and not tracker.over
    tracker.losses += [[0.39], [0.38]]
    assert tracker.over and tracker.best.tolist() == [6]


def test_no_more_passes_than_asked_for():
    assert not tracked([0.6, 0.5], most=3).should_decay
    assert tracked([0.6, 0.5, 0.4], most=3).should_decay


def test_replicas_wait_for_each_other():
    tracker = Tracker(1, 9, 0.5, losses=[[0.6, 0.6], [0.5, 0.7], [0.4, 0.8]])
    assert not tracker.should_decay and tracker.best.tolist() == [2, 0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    log = import_log(write_shop(folder, 2_000, users=40), folder / "log")
    config = get_config("dcnv2", "stored")
    config.data.root = str(log.folder)
    config.training.requests, config.training.passes, config.training.patience = 128, 3, 1
    return folder, log, train(config, folder / "run")


def test_it_stops_by_itself_and_says_what_it_did(finished):
    folder, _, record = finished
    work = record["work"]
    assert record["status"] == "done" and work["passes_tried"] <= 5
    assert work["examples"] == 1_600 * work["epochs"]
    best = min(work["valid_losses"])
    assert record["metrics"]["valid_logloss"] == pytest.approx(best, rel=1e-6)
    assert (folder / "run" / "model" / "best").is_dir() and (folder / "run" / "model" / "final").is_dir()


def test_nothing_is_written_beside_the_data(finished):
    """Which may lie where nobody but its owner can write."""
    _, log, _ = finished
    files = {path.relative_to(log.folder).as_posix() for path in log.folder.rglob("*") if path.is_file()}
    assert files == {"meta.json", *log.meta["files"]}


@pytest.mark.parametrize("what", ["deleted", "another run's", "damaged"])
def test_a_model_that_is_not_the_runs_is_not_evaluated(finished, tmp_path, what):
    """Not even the last state in the place of the best."""
    run, log = tmp_path / "run", finished[1]
    shutil.copytree(finished[0] / "run", run)
    best = run / "model" / "best"
    if what == "deleted":
        shutil.rmtree(best)
    elif what == "damaged":
        file = max(best.rglob("*/d/*"), key=lambda path: path.stat().st_size)
        file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    else:
        record = read_record(run)
        write_record(run, record | {"run_id": "0" * 12})
    with pytest.raises((ValueError, FileNotFoundError), match=f"{best} is not .*`rm {run}/run.json`"):
        load(run, str(log.folder))


def test_evaluate_reads_the_model_to_the_same_metrics(finished):
    folder, _, record = finished
    done = CliRunner().invoke(evaluate, [str(folder / "run"), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output.splitlines()[-1])
    for name in ("logloss", "auc", "gauc", "buy_logloss"):
        assert found[name] == pytest.approx(record["metrics"][name], rel=1e-6)


@pytest.mark.slow
def test_a_run_of_one_pass_leaves_its_last_state(finished, tmp_path):
    config = get_config("dlrm_mlp", "stored")
    config.data.root, config.data.order = str(finished[1].folder), "time"
    config.training.requests, config.training.passes = 128, 0
    record = train(config, tmp_path / "run")
    done = CliRunner().invoke(evaluate, [str(tmp_path / "run"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output.splitlines()[-1])["logloss"] == pytest.approx(record["metrics"]["logloss"], rel=1e-6)


def test_predict_scores_a_file_as_the_log_was_scored(finished, tmp_path):
    """The log's own rows, labels taken away, get the logits of the model on the log."""
    folder, log, _ = finished
    table = pq.read_table(folder / "log.parquet").drop_columns(["is_click", "is_buy"])
    pq.write_table(table, tmp_path / "new.parquet")
    arguments = [
        str(folder / "run"),
        "--data",
        str(tmp_path / "new.parquet"),
        "--out",
        str(tmp_path / "scores.parquet"),
    ]
    done = CliRunner().invoke(predict, arguments)
    assert done.exit_code == 0, done.output
    scores = pq.read_table(tmp_path / "scores.parquet").to_pandas()
    assert scores["row"].tolist() == list(range(2_000))
    model, tables, schema = load(folder / "run")
    assert [task.name for task in schema.tasks] == ["click", "buy"]
    from recscale.scaling.data.stored_log.source import GrainSource

    source = GrainSource(log, requests=200)
    logits = [np.asarray(model(tables.lookup(batch)).logits)[:, 0, :] for batch in source.holdout()]
    rows = log.origins[slice(log.splits["valid"][0], None)]
    found = scores.set_index("row").loc[rows, ["click_logit", "buy_logit"]].to_numpy()
    np.testing.assert_allclose(found, np.concatenate(logits), atol=2e-5)


def test_a_run_without_a_model_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    done = CliRunner().invoke(evaluate, [str(tmp_path / "run")])
    assert done.exit_code == 1 and "holds no run" in done.output
    assert read_record(tmp_path / "run") is None
