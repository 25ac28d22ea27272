"""Sweeps on a real Slurm: a cluster of this machine alone, on loopback, from Debian's packages.

    python .ci/slurm_proof.py BIN           BIN: folder of a `recscale` executable

Trains two jobs with the local pool, then with `--executor slurm` under a time limit that is too short, while one job is
cancelled and one is queued again by hand, and compares the results bit by bit. Ends with 0 when everything holds, 1
when something does not, and 77, saying SKIPPED, where Slurm cannot be installed or started.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

SKIPPED, BEGAN = 77, time.monotonic()
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol", "munged")

SWEEP = """
from recscale.scaling.training import get_config as base_config
from recscale.sweeps import axis, product, seeds
def get_config():
    config = base_config("rankmixer", "known_truth")
    config.data.preset = "smoke"
    config.data.holdout_rows = 2048
    config.model.tokens, config.model.width, config.model.hidden = 4, 16, 32
    config.training.requests = 64
    config.training.examples = 32_000
    config.training.log_every_examples = 1_600
    config.training.checkpoint_every_s = 0.5
    return config
def get_sweep():
    return product(axis("model.layers", [1, 2]), seeds(2))
"""

CONF = """
ClusterName=recscale
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldPort=36817
SlurmdPort=36818
ReturnToService=2
JobRequeue=1
KillWait=5
SchedulerParameters=sched_interval=2,bf_interval=5
MpiDefault=none
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 Boards=1 SocketsPerBoard=1 CoresPerSocket=2 ThreadsPerCore=1 RealMemory=8000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class NotHere(Exception):
    """Slurm cannot be had on this machine."""


def install() -> None:
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    if all(map(shutil.which, PROGRAMS)):
        return
    if os.geteuid() or not shutil.which("apt-get"):
        raise NotHere("its packages are not installed, and only root can on a Debian system")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        subprocess.run(["apt-get", "-qq", *command], env=environment, check=False, stdout=subprocess.DEVNULL)
    if not all(map(shutil.which, PROGRAMS)):
        raise NotHere(f"apt-get could not install {', '.join(PACKAGES)}")


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[None]:
    """One node of two cores, for as long as the block runs."""
    if os.geteuid():
        raise NotHere("its daemons need root")
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(mode=0o755)
    (folder / "munge" / "key").write_bytes(os.urandom(128))
    (folder / "munge" / "key").chmod(0o400)
    conf, host = folder / "slurm.conf", os.uname().nodename
    conf.write_text(CONF.format(folder=folder, host=host))
    os.environ["SLURM_CONF"] = str(conf)
    munge = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    commands = [
        ["munged", "--force", "--foreground", *(f"--{name}={folder}/munge/{file}" for name, file in munge.items())],
        ["slurmctld", "-D", "-f", str(conf)],
        ["slurmd", "-D", "-f", str(conf), "-N", host],
    ]
    daemons = []
    try:
        for command in commands:
            with open(folder / f"{command[0]}.txt", "w") as log:
                daemons.append(subprocess.Popen(command, stdout=log, stderr=log))
            time.sleep(1)
        for _ in range(30):
            state = subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True, check=False).stdout
            if state.strip() == "idle":
                break
            time.sleep(1)
        else:
            said = "".join((folder / f"{command[0]}.txt").read_text()[-600:] for command in commands)
            raise NotHere(f"its daemons did not come up (node {state.strip() or 'unknown'}): {said}")
        yield
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait()


def recscale(tool: str, *arguments: object, code: int = 0) -> dict:
    done = subprocess.run([tool, *map(str, arguments), "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == code, f"{arguments} ended with {done.returncode}, not {code}:\n{done.stdout}{done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])


def compiled_once(folder: Path) -> dict[str, str]:
    """Variables with which a program is compiled by the first process that needs it."""
    return {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def queue() -> dict[str, str]:
    asked = ["squeue", "-h", "-r", "-O", "JobArrayID:60,State:30"]
    return dict(
        line.split() for line in subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()
    )


def handles(out: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (out / "submitted.jsonl").read_text().splitlines()]
    return {line["job"]: line["handle"] for line in lines}


def until(what: str, condition, seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for: {what}; the queue is {queue()}"
        time.sleep(0.5)
    print(f"  {time.monotonic() - BEGAN:.0f} s: {what}", flush=True)


def results(out: Path) -> dict[str, object]:
    """Everything of the runs that must not depend on who trained them."""
    found = {}
    for run in sorted((out / "runs").iterdir()):
        record = json.loads((run / "run.json").read_text())
        metrics = hashlib.sha256((run / "metrics.jsonl").read_bytes()).hexdigest()
        found[run.name] = record["status"], record.get("metrics"), metrics
    return found


def check_states(tool: str, out: Path) -> None:
    """`recscale status` agrees with `squeue`; asked again where a state changed in between."""
    words = {"RUNNING": "running", "COMPLETING": "running"}
    for _ in range(5):
        before = queue()
        said = recscale(tool, "status", out)["runs"]
        if before != queue():
            continue
        for run in said:
            slurm = before.get(handles(out)[run["job"]])
            expected = ("done", "lost") if slurm is None else (words.get(slurm, "queued"), "requeued", "done")
            assert run["state"] in expected, (run, slurm)
        return


def submit(tool: str, out: Path, trainer: str, *options: str) -> dict[str, str]:
    """Hands the unfinished jobs of a plan to Slurm, to be trained by a function of `proof_trainers.py`."""
    code = """if True:
        import json, sys
        from pathlib import Path
        from recscale.sweeps.engine.executors import Launch
        from recscale.sweeps.engine.submission import carry_out
        out, trainer, *options = sys.argv[1:]
        launch = Launch(Path(out), options=tuple(options), trainer=trainer)
        print(json.dumps(dict(carry_out(launch, "slurm").submitted)))"""
    python = str(Path(tool).with_name("python"))
    done = subprocess.run(
        [python, "-c", code, str(out), trainer_path(trainer), *options], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def two_cores(tool: str, folder: Path, file: Path) -> None:
    """Two jobs of a node keep two cores busy."""
    out = folder / "spin"
    recscale(tool, "plan", file, "--out", out)
    submit(tool, out, "spin", "timeout_min=5", "mem_gb=2")
    until("both jobs are through", lambda: not queue())
    found = [json.loads(path.read_text())["metrics"] for path in out.glob("runs/*/run.json")]
    cores = {core for metrics in found for core in metrics["cores"]}
    shares = {metrics["logloss"] for metrics in found}
    assert len(shares) == 2 and len(cores) > 1, f"two jobs ran on core {cores}, with {shares} of it"
    shown = " and ".join(f"{share:.2f}" for share in shares)
    print(f"two jobs of a node with two cores ran on cores {cores}, with {shown} of one", flush=True)


def prove(tool: str, folder: Path, file: Path, local: subprocess.Popen) -> None:
    whole, out = folder / "local", folder / "slurm"
    recscale(tool, "plan", file, "--out", out)
    assert local.wait(120) == 0, "the local pool failed"
    if len(os.sched_getaffinity(0)) > 1:
        two_cores(tool, folder, file)
    # Slurm counts limits in minutes and looks at them twice a minute: the signal comes 15 to 45 s after the start of a
    # job that takes a minute.
    asked = ("timeout_min=1", "slurm_signal_delay_s=15", "mem_gb=2")
    first = submit(tool, out, "slow", *asked)
    assert len(first) == 2, first
    assert submit(tool, out, "slow", *asked) == {}
    assert len(queue()) == 2
    print("two submits queue nothing twice", flush=True)
    until("two jobs run at once", lambda: Counter(queue().values())["RUNNING"] == 2)
    check_states(tool, out)
    cancelled, other = first
    until("one has a checkpoint", lambda: list(out.glob("groups/*/checkpoints/*/manifest.json")))
    subprocess.run(["scancel", first[cancelled]], check=True)
    until("the other is cancelled", lambda: first[cancelled] not in queue())
    check_states(tool, out)
    again = submit(tool, out, "slow", *asked)
    assert set(again) == {cancelled}, again
    print("the cancelled job, and it alone, is submitted again", flush=True)
    until("a job reached its limit and queued itself again", lambda: _restarts(first[other]) >= 1)
    check_states(tool, out)
    until("the cancelled one runs again", lambda: queue().get(again[cancelled]) == "RUNNING")
    subprocess.run(["scontrol", "requeue", again[cancelled]], check=True)
    until("it was queued again by hand", lambda: _restarts(again[cancelled]) >= 1)
    options = [part for text in asked for part in ("--executor-option", text)]
    done = recscale(tool, "sweep", file, "--out", out, "--executor", "slurm", *options, "--wait", "--no-report")
    assert done["statuses"] == {"done": 4}, done
    assert results(out) == results(whole), "the runs differ from those of the local pool"
    print(f"every run equals that of the local pool, bit for bit; {time.monotonic() - BEGAN:.0f} s in all", flush=True)


def trainer_path(name: str) -> str:
    return f"{Path(__file__).absolute().with_name('proof_trainers.py')}:{name}"


def _restarts(job: str) -> int:
    said = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, check=False).stdout
    return int(said.partition("Restarts=")[2].split()[0]) if "Restarts=" in said else 0


def main() -> int:
    tool = str(Path(sys.argv[1]).absolute() / "recscale")
    os.environ["JAX_PLATFORMS"] = "cpu"
    folder = Path(tempfile.mkdtemp(prefix="slurm-proof-"))
    os.environ |= compiled_once(folder)
    file = folder / "two_jobs.py"
    file.write_text(SWEEP)
    try:
        install()
        with (
            subprocess.Popen([tool, "launch", file, "--out", folder / "local"], stdout=subprocess.DEVNULL) as local,
            cluster(folder),
        ):
            prove(tool, folder, file, local)
    except NotHere as reason:
        print(f"the Slurm stage was SKIPPED: {reason}")
        return SKIPPED
    except (AssertionError, subprocess.CalledProcessError) as error:
        print(f"the Slurm stage FAILED: {error}")
        for log in sorted((folder / "slurm" / "slurm").glob("*.err")):
            print(f"--- {log.name}\n{log.read_text()[-2000:]}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
