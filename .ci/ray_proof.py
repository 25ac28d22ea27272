"""A sweep on a local Ray of two CPUs: equal to the local pool, bit for bit, also where a task is killed on the way.

    python .ci/ray_proof.py BIN             BIN: folder of a `recscale` executable

Ends with 0, 1 or, saying SKIPPED, 77; see `slurm_proof.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from slurm_proof import SKIPPED, SWEEP, compiled_once, recscale, results, trainer_path


def kill_one(out: Path) -> int:
    """Kills a process that trains a job which has a checkpoint; returns its number."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for lease in out.glob("groups/*/lock"):
            try:
                owner = json.loads(lease.read_text())["pid"]
            except (OSError, ValueError):
                continue
            if list(lease.parent.glob("checkpoints/*/manifest.json")):
                os.kill(owner, signal.SIGKILL)
                return owner
        time.sleep(0.1)
    raise AssertionError("no job had a checkpoint within two minutes")


def prove(tool: str, folder: Path) -> None:
    file, whole, out = folder / "two_jobs.py", folder / "local", folder / "ray"
    file.write_text(SWEEP)
    recscale(tool, "launch", file, "--out", whole)
    recscale(tool, "plan", file, "--out", out)
    code = """if True:
        import sys
        from pathlib import Path
        from recscale.sweeps.engine.executors import Launch
        from recscale.sweeps.engine.submission import carry_out
        launch = Launch(Path(sys.argv[1]), options=("num_cpus=2",), trainer=sys.argv[2])
        sys.exit(carry_out(launch, "ray").unfinished)"""
    asked = [str(Path(tool).with_name("python")), "-c", code, str(out), trainer_path("slow")]
    began = subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(f"killed process {kill_one(out)} of a task", flush=True)
    said, _ = began.communicate(timeout=300)
    assert began.returncode == 0, said
    records = [json.loads(path.read_text()) for path in out.glob("runs/*/run.json")]
    assert any(record.get("restored_from") for record in records), "no run went on from a checkpoint"
    assert results(out) == results(whole), "the runs differ from those of the local pool"
    print("every run equals that of the local pool, bit for bit", flush=True)


def main() -> int:
    tool = Path(sys.argv[1]).absolute() / "recscale"
    os.environ["JAX_PLATFORMS"] = "cpu"
    found = subprocess.run([str(tool.parent / "python"), "-c", "import ray"], capture_output=True, check=False)
    if found.returncode:
        print("the Ray stage was SKIPPED: ray is not installed")
        return SKIPPED
    folder = Path(tempfile.mkdtemp(prefix="ray-proof-"))
    os.environ |= compiled_once(folder)
    try:
        prove(str(tool), folder)
    except (AssertionError, subprocess.SubprocessError) as error:
        print(f"the Ray stage FAILED: {error}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
