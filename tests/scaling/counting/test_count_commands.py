"""`recscale count`, `size`, `models` and `--schema`."""

import json

import pytest
from click.testing import CliRunner

from recscale import models
from recscale.models.inputs import reference_schema
from recscale.scaling.counting import count_commands as commands
from recscale.scaling.counting.schemas import load_schema

SMALL = ("--set", "width=16", "--set", "hidden=24", "--set", "layers=1")


def _run(command, *args):
    result = CliRunner().invoke(command, list(args), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def _json(command, *args):
    return json.loads(_run(command, *args, "--json").splitlines()[-1])


def test_count_prints_all_counts_and_agrees():
    value = _json(commands.count, "rankmixer", *SMALL)
    expected = models.count("rankmixer", reference_schema(), {"width": 16, "hidden": 24, "layers": 1})
    for name, figure in expected.to_dict().items():
        assert value[name] == figure
    assert value["agrees"] is True and value["tree_params"] == expected.dense_params
    assert value["jaxpr_flops"]["train"] == expected.train_flops_per_row
    assert value["config"]["hidden"] == 24 and value["xla"] == {}
    text = _run(commands.count, "rankmixer", *SMALL)
    assert f"{expected.dense_params:,d}" in text and "per batch" not in text
    assert "train step per batch" in " ".join(_run(commands.count, "msn", "--set", "theta=left_nxn").split())


def test_sparse_experts_are_counted_as_a_budget_unless_all_are_computed():
    """Which experts a row opens is not in a program; a batch of one request cannot train on half of its requests."""
    sparse = [*SMALL, "--set", "experts=8"]
    text = _run(commands.count, "rankmixer", *sparse)
    assert "not to be compared" in text and "expert_path=masked" in text
    assert _json(commands.count, "rankmixer", *sparse, "--set", "expert_path=masked")["agrees"] is True


def test_count_with_xla(tmp_path):
    path = tmp_path / "small.json"
    path.write_text(json.dumps(reference_schema(fields=4, width=4).to_dict()))
    value = _json(commands.count, "rankmixer", "--xla", "--schema", str(path), *SMALL)
    assert value["xla_flops_per_row"]["train"] >= value["train_flops_per_row"]
    assert value["xla"]["train"]["temporary_bytes"] > 0


def test_size_gives_figures_and_config():
    value = _json(commands.size, "rankmixer", "--dense-params", "1e5")
    assert value["target"] == 1e5 and abs(value["relative_error"]) <= 0.03 and value["reachable"] is True
    count = models.count("rankmixer", reference_schema(), value["config"])
    assert value["dense_params"] == count.dense_params and value["train_flops"] == count.train_flops_per_row


def test_size_for_a_run():
    value = _json(commands.size, "rankmixer", "--train-flops", "1e13", "--examples", "1e6")
    assert value["achieved"] == value["train_flops"] * 1_000_000
    assert value["achieved"] == pytest.approx(1e13, rel=0.03)


def test_size_says_when_a_target_cannot_be_met():
    text = _run(commands.size, "rankmixer", "--dense-params", "500")
    assert "no shape within 3 %" in text and "nearest" in text


@pytest.mark.parametrize("targets", [(), ("--dense-params", "1e5", "--train-flops", "1e6")])
def test_size_wants_one_target(targets):
    result = CliRunner().invoke(commands.size, ["rankmixer", *targets])
    assert result.exit_code == 2 and "--dense-params or --train-flops" in result.output


def test_models_lists_every_name():
    rows = {row["model"]: row for row in _json(commands.models)["models"]}
    assert set(rows) == {*models.list_models(), *models.list_presets()}
    assert rows["rankmixer"]["kind"] == "backbone" and rows["rankmixer_1b"]["kind"] == "preset"
    assert rows["rankmixer_1b"]["dense_params"] == models.count("rankmixer_1b", reference_schema()).dense_params


@pytest.mark.parametrize("command", [commands.count, commands.size])
def test_a_model_of_histories_names_a_schema_that_has_one(command):
    options = ["--dense-params", "1e5"] if command is commands.size else []
    with pytest.raises(ValueError, match="din reads histories and the schema reference has none; known_truth:long"):
        command.main(["din", *options], standalone_mode=False)


def test_schema_from_a_file(tmp_path):
    path = tmp_path / "small.json"
    schema = reference_schema(fields=8, width=4, tasks=2)
    path.write_text(json.dumps(schema.to_dict()))
    assert load_schema(str(path)) == schema
    path.write_text(json.dumps({"schema": schema.to_dict(), "rows": 7}))
    assert load_schema(str(path)) == schema
    value = _json(commands.count, "rankmixer", "--schema", str(path), *SMALL)
    assert value["head_params"] == 2 * 17


def test_schema_of_a_known_truth_preset():
    schema = load_schema("known_truth:dense")
    assert len(schema.fields) == 8 and schema.embedding_params() == 0


def test_bad_schemas_are_explained(tmp_path):
    with pytest.raises(ValueError, match="'reference'"):
        load_schema("refrence")
    with pytest.raises(FileNotFoundError, match="nothing.json"):
        load_schema(str(tmp_path / "nothing.json"))
    for text in ("{", '{"fields": 3}', "[]", '{"fields": [{"nam": "x"}], "sequences": [], "tasks": [], "domains": 1}'):
        path = tmp_path / "bad.json"
        path.write_text(text)
        with pytest.raises(ValueError, match="bad.json does not hold a schema"):
            load_schema(str(path))
