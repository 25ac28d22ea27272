"""The bench of sparse experts: what it races, and what it prints. Speed is for `recscale bench`."""

import dataclasses
import json

import pytest
from click.testing import CliRunner

from recscale.scaling import host_memory
from recscale.scaling.bench import experts
from recscale.scaling.bench.bench_commands import bench
from recscale.scaling.records.provenance import environment

TIME = {"median_ms": 9.0, "lower_quartile_ms": 8.0, "upper_quartile_ms": 9.5, "ratio": 1.0, "flops_ratio": 1.0}
VARIANTS = {name: TIME | {"dropped_share": 0.0} for name in ("dense", "1:2", "1:4", "1:2 masked")}


@pytest.mark.slow
def test_variants_do_what_their_names_say():
    shapes = {"tiny": experts.ExpertShape(rows=64, tokens=4, width=16, hidden=32)}
    (found,) = experts.measure_experts(shapes=shapes, rounds=2, per_round=1)["shapes"].values()
    for name in ("train", "serve"):
        times = found[name]
        assert list(times) == list(VARIANTS) and times["dense"]["ratio"] == 1.0
        assert times["1:4"]["flops_ratio"] < times["1:2"]["flops_ratio"] < 1 < times["1:2 masked"]["flops_ratio"]
        assert times["1:2 masked"]["dropped_share"] == times["dense"]["dropped_share"] == 0.0
        assert times["1:2"]["dropped_share"] < 0.2


def test_the_command_prints_figures_and_json(monkeypatch):
    asked = {}
    shape = dataclasses.asdict(experts.SHAPES["wide"])
    wide = {"train": VARIANTS, "serve": VARIANTS, "train_falls": True, "serve_falls": False, "shape": shape}
    found = {"shapes": {"wide": wide}, "environment": environment()}
    monkeypatch.setattr(experts, "measure_experts", lambda **options: asked.update(options) or found)
    monkeypatch.setattr(host_memory, "keep_freed_memory", lambda: False)
    done = CliRunner().invoke(bench, ["experts", "--rounds", "3", "--json"])
    assert done.exit_code == 0 and asked == {"rounds": 3}
    lines = [line.split() for line in done.output.splitlines()]
    assert ["shapes.wide.train_falls", "True"] in lines and ["shapes.wide.serve_falls", "False"] in lines
    assert ["shapes.wide.train", *TIME, "dropped_share"] in lines
    assert ["1:2", "masked", "9", "8"] in [line[:4] for line in lines]
    assert json.loads(done.output.splitlines()[-1])["shapes"]["wide"]["train"]["dense"]["ratio"] == 1.0
