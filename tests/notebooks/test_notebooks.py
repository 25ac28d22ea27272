"""The committed notebooks run top to bottom and still say what their committed outputs say."""

import importlib.util
import re
from pathlib import Path

import pandas as pd
import pytest

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed; pip install 'recscale[notebooks]'")
pytest.importorskip("nbclient", reason="nbclient is not installed; pip install 'recscale[notebooks]'")
pytest.importorskip("ipykernel", reason="ipykernel is not installed; pip install 'recscale[notebooks]'")

FOLDER = Path(__file__).parents[2] / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def load_execute():
    spec = importlib.util.spec_from_file_location("notebooks_execute", FOLDER / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def words(output):
    """The words of an output; digits differ between machines, words must not."""
    text = output.get("text", "") if output.output_type == "stream" else output.get("data", {}).get("text/plain", "")
    return sorted(re.findall(r"[A-Za-z_]{2,}", text))


def shape(output):
    return output.output_type, output.get("name"), sorted(output.get("data", {}))


def test_all_notebooks_are_here():
    assert NAMES == sorted(load_execute().NOTEBOOKS)


def test_the_committed_table_is_that_of_the_quickstart_sweep():
    table = pd.read_parquet(FOLDER / "runs" / "quickstart.parquet")
    assert set(table["sweep"]) == {"quickstart"}, "take it over: python notebooks/execute.py --sweep runs/quickstart"
    assert set(table["dataset"]) == {"known_truth"} and (table["status"] == "done").any()


def test_committed_outputs_show_the_committed_table():
    """Digits of fits differ between machines; means over a table do not."""
    table = pd.read_parquet(FOLDER / "runs" / "quickstart.parquet")
    first = code_cells(nbformat.read(FOLDER / "quickstart.ipynb", as_version=4))[0]
    shown = "".join(output.get("data", {}).get("text/plain", "") for output in first.outputs)
    means = table.groupby(["architecture", "dense_params"])["logloss"].mean()
    assert [f"{value:.6f}" for value in means] == re.findall(r"0\.\d{6}\b", shown)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "quickstart" else pytest.mark.slow) for name in NAMES]
)
def test_a_notebook_runs_and_says_what_is_committed(name, monkeypatch):
    # The last digits of fits are those of optimised programs, and a gate may hang on them.
    monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS", raising=False)
    path = FOLDER / f"{name}.ipynb"
    committed, fresh = nbformat.read(path, as_version=4), load_execute().execute(path)
    for old, new in zip(code_cells(committed), code_cells(fresh), strict=True):
        assert old.source == new.source
        assert [shape(output) for output in old.outputs] == [shape(output) for output in new.outputs], old.source
        for before, after in zip(old.outputs, new.outputs, strict=True):
            assert words(before) == words(after), old.source


@pytest.mark.parametrize("name", NAMES)
def test_committed_outputs_are_complete_and_name_no_machine(name):
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    for cell in cells:
        names = [output.get("name") for output in cell.outputs]
        assert not any(a == b == "stdout" for a, b in zip(names, names[1:], strict=False)), "text in several pieces"
    assert not any(output.get("name") == "stderr" for cell in cells for output in cell.outputs)
    assert not re.search(r"/(home|root|tmp|usr|work|Users)/", text)


def test_a_sweep_hands_over_its_table(tmp_path, monkeypatch):
    execute = load_execute()
    monkeypatch.setattr(execute, "TABLE", tmp_path / "own" / "quickstart.parquet")
    rows = {"run_id": ["a"], "status": ["done"], "asymptote": [0.42], "entropy_floor": [0.43]}
    pd.DataFrame(rows).to_parquet(tmp_path / "runs.parquet")
    execute.take_over(tmp_path)
    assert pd.read_parquet(execute.TABLE)["run_id"].tolist() == ["a"]
