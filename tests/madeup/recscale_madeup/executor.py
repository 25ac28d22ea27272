"""One job after the other, each in a process of its own."""

import subprocess
import sys
import time

from recscale.sweeps.engine.executors import Outcome
from recscale.sweeps.engine.job import pending_jobs
from recscale.sweeps.engine.locks import only_launcher

TRAIN = "import sys; from recscale.sweeps.engine.worker import run_job; run_job(sys.argv[1], sys.argv[2], sys.argv[3:])"


def one_by_one(out, plan, *, workers, memory_gb, overrides, options):
    began = time.monotonic()
    with only_launcher(out):
        for job in pending_jobs(out, plan):
            (out / "one_by_one.log").open("a").write(f"{job.id}\n")
            subprocess.run([sys.executable, "-c", TRAIN, str(out), job.id, *overrides], check=True)
    return Outcome.of(out, plan, time.monotonic() - began)
