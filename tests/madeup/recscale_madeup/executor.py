"""One job after the other, each in a process of its own."""

import subprocess
import sys

from recscale.sweeps.engine.executors import Executor
from recscale.sweeps.engine.job_command import run_job_command


class OneByOne(Executor):
    def submit(self, jobs, resources):
        for job in jobs:
            (self.launch.out / "one_by_one.log").open("a").write(f"{job.id}\n")
            command = run_job_command(self.launch.out, job.id, self.launch.overrides)
            subprocess.run([sys.executable, *command], check=True)
        return [job.id for job in jobs]
