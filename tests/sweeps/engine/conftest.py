"""A small sweep file, and a Slurm of files that trains nothing."""

import json
import os
import sys

import pytest

from recscale.scaling.training import get_config
from recscale.sweeps.engine.plan import make_plan

SWEEP = """
from recscale.scaling.training import get_config as base_config
from recscale.sweeps import axis, product, seeds
def get_config():
    config = base_config("rankmixer", "known_truth")
    config.data.preset = "smoke"
    config.data.holdout_rows = 512
    config.training.requests = 64
    config.training.examples = 640
    return config
def get_sweep():
    return product(axis("model.layers", [1, 2]), seeds(2))
def get_report():
    return {"form": "power_offset"}
"""

# sbatch, squeue, scancel and srun; `queue.json` beside them is the queue: {id: [state, restarts]}.
SLURM = """#!{python}
import json, re, sys
from pathlib import Path
here = Path(__file__).parent
name, queue = Path(__file__).name, json.loads((here / "queue.json").read_text())
if name == "sbatch":
    text = Path(sys.argv[-1]).read_text()
    (here / f"script-{{len(list(here.glob('script-*')))}}.sh").write_text(text)
    number = 100 + len(list(here.glob("script-*")))
    array = re.search(r"--array=0-(\\d+)", text)
    for place in range(int(array[1]) + 1) if array else [None]:
        queue[str(number) if place is None else f"{{number}}_{{place}}"] = ["PENDING", 0]
    print(f"Submitted batch job {{number}}")
elif name == "squeue":
    for job, (state, restarts) in queue.items():
        print(f"{{job:<60}}{{state:<30}}{{restarts:<12}}")
elif name == "scancel":
    queue.pop(sys.argv[1], None)
(here / "queue.json").write_text(json.dumps(queue))
"""


@pytest.fixture
def sweep_file(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(SWEEP)
    return str(path)


@pytest.fixture(scope="session")
def one_run_plan():
    """A plan of one run, for a trainer that learns nothing."""
    config = get_config("dlrm_mlp", "known_truth")
    config.data.preset, config.data.holdout_rows, config.training.requests = "smoke", 512, 64
    config.training.examples = 640
    return make_plan(config, [{}], sweep="test")


@pytest.fixture
def last_json():
    return lambda printed: json.loads(printed.out.splitlines()[-1])


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """The queue of a made-up Slurm: a function that reads it, or replaces it; `.scripts()` are those it was given."""
    folder = tmp_path / "slurm-bin"
    folder.mkdir()
    for name in ("sbatch", "squeue", "scancel", "srun"):
        (folder / name).write_text(SLURM.format(python=sys.executable))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def queue(new=None):
        if new is not None:
            (folder / "queue.json").write_text(json.dumps(new))
        return json.loads((folder / "queue.json").read_text())

    queue({})
    queue.scripts = lambda: [path.read_text() for path in sorted(folder.glob("script-*"))]
    return queue
