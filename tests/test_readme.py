"""What the README says can be done: its code runs, its links and commands exist, its counts are those of the tables."""

import importlib.metadata
import re
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = {entry.name for entry in importlib.metadata.entry_points(group="recscale.commands")}


def test_its_code_runs(capsys):
    names = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(block, names)
    losses, shape = capsys.readouterr().out.splitlines()
    first, _, last = (float(loss) for loss in losses.strip("[]").split(","))
    assert last < first and shape == "(8, 32, 64)"


PAGES = [ROOT / "README.md", ROOT / "tests" / "tables" / "README.md", *(ROOT / "notebooks" / "runs").glob("*.md")]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\((?!https?:|#)([^)]+)\)", path.read_text(encoding="utf-8"))
    assert not [link for link in links if not (path.parent / link).exists()]


def test_commands_and_make_targets_exist():
    assert set(re.findall(r"\brecscale ([a-z]+(?:-[a-z]+)*)", TEXT)) <= COMMANDS
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"\bmake ([a-z][a-z-]+)(?=[\s`])", TEXT)) <= set(targets)


@pytest.mark.parametrize("name", ["mixer_ladder", "length_ladder", "memory_slots_ladder"])
def test_counts_of_runs_are_those_of_the_tables(name):
    table = pd.read_parquet(ROOT / "notebooks" / "runs" / f"{name}.parquet")
    said = {"mixer_ladder": r"four backbones, (\d+) runs", "length_ladder": r"history, (\d+)\s+runs",
            "memory_slots_ladder": r"memory slots \((\d+)\s+runs"}[name]  # fmt: skip
    assert int(re.search(said, TEXT)[1]) == len(table)
