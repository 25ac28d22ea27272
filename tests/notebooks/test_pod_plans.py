"""The page of pod plans says what the compilers said, as committed beside it."""

import json
from pathlib import Path

from recscale.pallas_kernels.targets import get_target
from recscale.scaling.records.number_text import byte_text

RUNS = Path(__file__).parents[2] / "notebooks" / "runs"
PLANS = [json.loads(line) for line in (RUNS / "pods.jsonl").read_text(encoding="utf-8").splitlines()]


def line(plan):
    room = get_target(plan["target"]).hbm_bytes
    sent, formula = (plan[key] and sum(plan[key].values()) for key in ("collective_bytes", "predicted_bytes"))
    cells = [plan["target"], f"`{plan['name']}`", plan["mesh"]]
    cells += [byte_text(plan[f"{part}_bytes"]) for part in ("state", "gradient", "activation")]
    cells += [f"{byte_text(plan['bytes_per_device'])} of {byte_text(room)}", byte_text(sent), byte_text(formula)]
    return "| " + " | ".join([*cells, f"{plan['compile_s']:.0f}"]) + " |"


def test_the_page_quotes_every_plan():
    page = (RUNS / "pods.md").read_text(encoding="utf-8").splitlines()
    assert [text for text in page if text.startswith(("| tpu", "| h"))] == [line(plan) for plan in PLANS]
    for plan in PLANS:
        assert plan["status"] == "compiled" and plan["bytes_per_device"] < get_target(plan["target"]).hbm_bytes


def test_formulas_hold_where_there_are_some():
    known = [plan for plan in PLANS if plan["predicted_bytes"]]
    assert known
    for plan in known:
        sent, formula = sum(plan["collective_bytes"].values()), sum(plan["predicted_bytes"].values())
        assert abs(sent / formula - 1) < 0.05, plan["command"]
