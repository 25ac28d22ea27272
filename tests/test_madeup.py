"""Another distribution brings a model, a data set, a law form, a metric and an executor, and a sweep uses all five.

`tests/madeup` is that distribution. Here it is laid out as an installer leaves it: its package and its metadata in a
folder on the import path of every process.
"""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pandas as pd
import pytest

MADEUP = Path(__file__).parent / "madeup"
PROJECT = tomllib.loads((MADEUP / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def lay_out(folder):
    """The distribution in `folder`, as an installer leaves it."""
    shutil.copytree(
        MADEUP / "recscale_madeup", folder / "recscale_madeup", ignore=shutil.ignore_patterns("__pycache__")
    )
    information = folder / f"recscale_madeup-{PROJECT['version']}.dist-info"
    information.mkdir()
    head = f"Metadata-Version: 2.1\nName: {PROJECT['name']}\nVersion: {PROJECT['version']}\n"
    (information / "METADATA").write_text(head, encoding="utf-8")
    (information / "top_level.txt").write_text("recscale_madeup\n", encoding="utf-8")
    groups = [
        "\n".join([f"[{group}]", *(f"{name} = {address}" for name, address in entries.items())])
        for group, entries in PROJECT["entry-points"].items()
    ]
    (information / "entry_points.txt").write_text("\n\n".join(groups) + "\n", encoding="utf-8")


def recscale(*arguments, path, status=0):
    environment = os.environ | {"PYTHONPATH": str(path), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", "from recscale.scaling.cli import main; main()", *map(str, arguments), "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """(folder on the import path, folder of the finished sweep, what the command said)."""
    path = tmp_path_factory.mktemp("site")
    lay_out(path)
    out = path / "out"
    return path, out, recscale("sweep", MADEUP / "sweep.py", "--out", out, "--backend", "one_by_one", path=path)


def test_its_executor_trains_its_model_on_its_data(swept):
    _, out, said = swept
    assert said["statuses"] == {"done": 4}
    table = pd.read_parquet(out / "runs.parquet")
    assert set(table["architecture"]) == {"one_layer"} and set(table["dataset"]) == {"coins"}
    assert len((out / "one_by_one.log").read_text().split()) == len(list((out / "groups").iterdir()))


def test_its_metric_is_recorded_and_its_form_fitted_to_it(swept):
    _, out, _ = swept
    table = pd.read_parquet(out / "runs.parquet")
    assert table["brier"].between(0.15, 0.3).all()
    report = json.loads((out / "report" / "fit.json").read_text())
    assert report["form"] == "bare_power" and report["target"] == "brier" and report["records"]


def test_the_plan_says_where_each_came_from(swept):
    _, out, _ = swept
    for line in (out / "plan.jsonl").read_text().splitlines():
        brought = {part["name"]: part for part in json.loads(line)["brought"]}
        assert set(brought) >= {"one_layer", "coins", "brier"}
        assert {part["distribution"] for part in brought.values()} == {"recscale-madeup"}
        assert {part["version"] for part in brought.values()} == {PROJECT["version"]}


def test_commands_know_its_names(swept):
    path, out, _ = swept
    assert "one_layer" in {row["model"] for row in recscale("models", path=path)["models"]}
    options = {"--form": "bare_power", "--axes": "x=dense_params", "--target": "brier", "--bootstrap": "20"}
    # Two sizes carry no law: every number is refused, and the command says so.
    fitted = recscale("fit", out, *(word for option in options.items() for word in option), path=path, status=3)
    assert (fitted["form"], fitted["target"]) == ("bare_power", "brier")
    counted = recscale("count", "one_layer", "--schema", "known_truth:smoke", path=path)
    assert counted["model"] == "one_layer"


def test_an_address_needs_no_declaration(swept, tmp_path):
    path, _, _ = swept
    shutil.copytree(path / "recscale_madeup", tmp_path / "recscale_madeup")  # without the metadata
    arguments = ["--dataset", "recscale_madeup.dataset:Coins", "--out", tmp_path / "run"]
    for text in ("data.holdout_rows=512", "training.requests=64", "training.examples=6400"):
        arguments += ["--set", text]
    said = recscale("train", "recscale_madeup.model:ONE_LAYER", *arguments, path=tmp_path)
    assert said["status"] == "done" and said["rows"] == 512 and 0.5 < said["logloss"] < 0.72
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "done" and record["config"]["architecture"] == "recscale_madeup.model:ONE_LAYER"
    assert record["data"]["name"] == "coins"
