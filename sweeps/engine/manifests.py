"""A manifest per job for whatever runs commands: Kubernetes, SkyPilot, or a template of your own.

    recscale launch OUT --executor command --executor-option template=kubernetes --executor-option image=my/image \\
        --executor-option claim=sweeps --executor-option 'submit=kubectl create -f {file}'

Manifests lie in `OUT/manifests`. XManager and Airflow need none: their task
runs the command `recscale run-job OUT JOB` of every job in `plan.jsonl`, again as long as it ends with 75.
"""

from __future__ import annotations

import json
import math
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from recscale.scaling.records.files import write_atomically

from .executors import Executor, Launch
from .job import Job
from .resources import Resources

TEMPLATES = {"kubernetes": "kubernetes.yaml.j2", "skypilot": "skypilot.yaml.j2"}


class Manifests(Executor):
    """Options: submit and cancel (shell commands in which `{file}` is the manifest; submit=true only writes them),
    template (kubernetes, skypilot, or a file), and whatever the template takes.

    Templates are Jinja2's, with a filter `json` that quotes. One gets name, command (a list), shell (the same as text),
    out, job, seconds, memory_mib, memory_gib, cores, devices and nodes.
    """

    hands_over = True

    def __init__(self, launch: Launch):
        super().__init__(launch)
        self._values = launch.values()
        self._submit, self._cancel = (str(self._values.pop(name, "")) for name in ("submit", "cancel"))
        if not self._submit:
            raise ValueError(
                "the command executor needs --executor-option 'submit=COMMAND {file}', such as submit='kubectl create "
                "-f {file}'; submit=true only writes the manifests"
            )
        name = str(self._values.pop("template", "kubernetes"))
        path = Path(__file__).parent / "templates" / TEMPLATES[name] if name in TEMPLATES else Path(name)
        if not path.is_file():
            raise ValueError(f"there is no template {name!r}; give {', '.join(TEMPLATES)}, or a file")
        environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
        environment.filters["json"] = _json
        self._template = environment.from_string(path.read_text(encoding="utf-8"))

    def submit(self, jobs: Sequence[Job], resources: Resources) -> list[str]:
        return [self._submitted(job, resources) for job in jobs]

    def cancel(self, handle: str) -> None:
        if not self._cancel:
            raise ValueError("these jobs were submitted without --executor-option 'cancel=COMMAND {file}'")
        self._run(self._cancel, Path(handle))

    def _submitted(self, job: Job, resources: Resources) -> str:
        out = self.launch.out.resolve()
        command = ["recscale", "run-job", str(out), job.id]
        command += [part for text in self.launch.overrides for part in ("--set", text)]
        values: dict[str, Any] = {
            "name": f"recscale-{job.id}",
            "command": command,
            "shell": shlex.join(command),
            "out": str(out),
            "job": job.id,
            "seconds": math.ceil(resources.seconds),
            "memory_mib": math.ceil(resources.memory_bytes / 2**20),
            "memory_gib": math.ceil(resources.memory_bytes / 2**30),
            "cores": resources.cores,
            "devices": resources.devices,
            "nodes": resources.nodes,
        }
        try:
            text = self._template.render(values | self._values)
        except jinja2.UndefinedError as error:
            raise ValueError(f"the template needs another option: {error}; give it with --executor-option") from error
        file = out / "manifests" / f"{job.id}.yaml"
        write_atomically(file, text)
        self._run(self._submit, file)
        return str(file)

    def _run(self, command: str, file: Path) -> None:
        subprocess.run(command.replace("{file}", shlex.quote(str(file))), shell=True, check=True)


def _json(value: Any) -> str:
    """The value in JSON, which is YAML; of an option that was not given the error that says so."""
    return json.dumps(str(value) if isinstance(value, jinja2.Undefined) else value)
