"""Every command that a message, a help text or a docstring names exists, with the options it is named with."""

import ast
import contextlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import jax.numpy as jnp
import pytest
from click.testing import CliRunner

from recscale.scaling.cli import cli
from recscale.scaling.data.importing.log_schema import read_log_schema
from recscale.scaling.data.stored_log.source import stored_folder
from recscale.scaling.records import runs as records
from recscale.scaling.training import get_config
from recscale.scaling.training.checkpoints import Checkpoints
from recscale.scaling.training.preflight import check_settings

ROOT = Path(__file__).parents[1]
FOLDERS = ("pallas_kernels", "models", "scaling", "sweeps")


def texts(tree):
    """Every text of a module; what an f-string fills in is X."""
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "advised":
            yield " ".join(str(word.value) if isinstance(word, ast.Constant) else "X" for word in node.args)
        elif isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "X" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.value


def named():
    """(file, command) of every text `recscale ...`."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for text in texts(ast.parse(path.read_text(encoding="utf-8"))):
                for command in re.findall(r"\brecscale (?!law solver)([a-z][a-z0-9-]+[^`\n;]*)", text):
                    yield str(path.relative_to(ROOT)), command


def problem(command):
    """What is wrong with the arguments of `recscale`, None if nothing is; words after it are prose."""
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    found, context = cli, click.Context(cli)
    while words and isinstance(found, click.Group):
        word = words.pop(0)
        inner = found.get_command(context, word.rstrip(".,:)"))
        if inner is None:
            return f"there is no command {word!r}"
        found = inner
    options = {"--help"} | {name for param in found.params for name in (*param.opts, *param.secondary_opts)}
    unknown = {word.partition("=")[0].rstrip(".,)") for word in words if word.startswith("--")} - options
    return f"{found.name} has no option {', '.join(sorted(unknown))}" if unknown else None


def test_commands_that_texts_name_exist_with_their_options():
    found = dict.fromkeys(named())
    assert len(found) > 50
    assert not {place: wrong for place in found if (wrong := problem(place[1]))}


def damaged_metrics(folder):
    run = folder / "runs" / "abc"
    records.append_metrics(run, {"step": 1}) if run.exists() else run.mkdir(parents=True)
    record = {"run_id": "abc", "status": "done", "config": {}, "metrics": {"logloss": 0.5}}
    records.write_record(run, record | {"metrics_file": records.metrics_mark(run)})
    records.append_metrics(run, {"step": 2})
    return lambda: records.collect(folder)


def copied_run(folder):
    record = {"run_id": "abc", "status": "done", "config": {}, "metrics": {"logloss": 0.5}}
    for name in ("abc", "a copy"):
        records.write_record(folder / "runs" / name, record)
    return lambda: records.collect(folder)


def checkpoint_of_another_version(folder):
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(1, {"segment": 0, "step": 1}, {"w": jnp.zeros(3)}, None)
    checkpoints.close()
    return lambda: Checkpoints(folder / "checkpoints").restore({"w": jnp.zeros(4)})


def target_of_the_planner(_):
    config = get_config("dlrm_mlp")
    config.size.dense_params, config.data.preset = 1e5, "smoke"
    return lambda: check_settings(config)


def budget_of_the_planner(_):
    config = get_config("rankmixer")
    config.size.budget_flops, config.data.preset = 1e12, "smoke"
    return lambda: check_settings(config)


CASES = [damaged_metrics, copied_run, checkpoint_of_another_version, target_of_the_planner, budget_of_the_planner]


@pytest.mark.parametrize("case", CASES)
def test_advised_commands_run(case, tmp_path):
    """In folders whose names need quoting; what asked for them has no more to complain of, if it was about a file."""
    folder = tmp_path / "it's mine"
    folder.mkdir()
    again = case(folder)
    with pytest.raises(ValueError) as told:
        again()
    commands = re.findall("`(.+?)`", str(told.value))
    assert commands
    for command in commands:
        if command.startswith("recscale "):
            done = CliRunner().invoke(cli, shlex.split(command)[1:])
            assert done.exit_code == 0, done.output
        else:
            subprocess.run(command, shell=True, check=True)
    if "recscale" not in commands[0]:
        with contextlib.suppress(FileNotFoundError):  # nothing is left to read
            again()


@pytest.mark.slow
def test_messages_lead_from_a_file_to_an_imported_log(tmp_path):
    """What stands in capitals is for the reader to fill in."""
    rows = [f"u{n % 20},i{n * 7 % 31},{1_700_000_000 + 60 * n},{int(n * 3 % 5 < 2)}" for n in range(1_000)]
    (tmp_path / "log.csv").write_text("\n".join(["user_id,item_id,ts,click", *rows]))
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    program = bin_folder / "recscale"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "from recscale.scaling.cli import main; main()" "$@"\n')
    program.chmod(0o755)
    environment = os.environ | {"PATH": f"{bin_folder}:{os.environ['PATH']}"}

    def follow(error):
        [command] = re.findall("`(.+?)`", str(error.value))
        command = command.replace("SCHEMA", "'my schema.toml'").replace("LOG", "log.csv")
        subprocess.run(command, shell=True, check=True, cwd=tmp_path, env=environment)

    place, schema = tmp_path / "my log", tmp_path / "my schema.toml"
    with pytest.raises(FileNotFoundError, match="no meta.json") as no_log:
        stored_folder(str(place))
    with pytest.raises(FileNotFoundError, match="there is no schema file") as no_schema:
        read_log_schema(schema)
    follow(no_schema)
    follow(no_log)
    assert stored_folder(str(place)) == place
