"""`recscale train` over devices and processes: the numbers of one device, checkpoints that go on anywhere, a loss."""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time

import forced_devices
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from recscale.scaling.data.importing.importer import import_log
from recscale.scaling.data.made_up_shop import write_shop
from recscale.scaling.parallel import make_mesh, own_share

STEPS = f"{os.path.dirname(__file__)}/two_processes.py"
TRAIN = [sys.executable, "-c", "from recscale.scaling.cli import main; main()", "train"]
# Adam divides by the size of the gradient: near 0 that would magnify the order of sums.
SETTINGS = ["data.preset=smoke", "data.holdout_rows=128", "training.requests=64", "training.examples=256",
            "training.schedule=constant", "training.eps=1e-3", "training.log_every_examples=192",
            "training.checkpoint_every_s=0"]  # fmt: skip

RANKMIXER = ("rankmixer", ["model.tokens=4", "model.width=16", "model.hidden=32", "model.layers=1"])
CASES = [
    (*RANKMIXER, "data=4,fsdp=2"),
    (
        "tokenmixer_large",
        ["model.tokenizer=cut", "model.tokens=8", "model.heads=8", "model.width=16", "model.hidden=32",
         "model.layers=2", "model.experts=4", "model.active=3"],
        "data=2,fsdp=2,expert=2",
    ),
    (
        "longer+rankmixer",
        ["data.overrides.history_max=8", "model.backbone.tokens=8", "model.backbone.width=16",
         "model.backbone.hidden=32", "model.backbone.layers=1", "model.encoder.inner=0", "model.encoder.head_dim=16"],
        "data=4,tensor=2",
    ),
    (
        "msn",
        ["model.tokens=4", "model.width=16", "model.hidden=32", "model.layers=2", "model.memory_slots=256",
         "model.memory_topk=4"],
        "fsdp=4,expert=2",
    ),
]  # fmt: skip


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def arguments(out, case, mesh, settings, base, data):
    name, model = case[:2]
    command = [name, "--out", str(out), *data, *(["--mesh", mesh] if mesh else [])]
    return command + [part for text in [*base, *model, *settings] for part in ("--set", text)]


def begin(out, case, *, mesh="", processes=1, devices=1, settings=(), base=SETTINGS, data=()):
    """Starts `recscale train`, in so many processes of so many forced devices each."""
    command = [*TRAIN, *arguments(out, case, mesh, settings, base, data)]
    env = forced_devices.environment(devices)
    where = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", str(processes)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    each = [[*where, "--process-id", str(i)] if processes > 1 else [] for i in range(processes)]
    return [subprocess.Popen([*command, *which], env=env, **pipes) for which in each]


def train(out, case, **more):
    """In processes of its own, also on one device: this one draws the log's constants from fewer rows."""
    started = begin(out, case, **more)
    said = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), "\n".join(said)[-4000:]
    return said


def record(out):
    return json.loads((out / "run.json").read_text())


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def state(out, tick):
    """Arrays of a checkpoint, whichever devices wrote it; moments are sums of gradients."""
    folder = out / "checkpoints" / str(tick)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def shape(text):
        kind, _, sizes = text.partition("[")
        return jax.ShapeDtypeStruct(tuple(json.loads(f"[{sizes}")), kind, sharding=here)

    stored = json.loads((folder / "manifest.json").read_text())["arrays"]["state"]
    wanted = {"state": {name: shape(text) for name, text in stored.items()}}
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        return reader.restore(folder / "arrays", args=ocp.args.StandardRestore(wanted))["state"]


def assert_equal_runs(one, other):
    np.testing.assert_allclose(losses(one), losses(other), atol=1e-5, rtol=1e-5)
    mine, theirs = state(one, 3), state(other, 3)
    assert mine.keys() == theirs.keys() and any("moments" in name for name in mine)
    for name, array in mine.items():
        np.testing.assert_allclose(array, theirs[name], atol=1e-5, rtol=1e-5, err_msg=name)
    a, b = record(one), record(other)
    assert a["run_id"] == b["run_id"] and a["status"] == b["status"] == "done"
    assert a["metrics"]["logloss"] == pytest.approx(b["metrics"]["logloss"], abs=1e-5)


def test_a_step_over_two_processes_equals_one_device():
    where = f"127.0.0.1:{free_port()}"
    env = forced_devices.environment(1, "--xla_backend_optimization_level=0")  # compiles faster
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([sys.executable, STEPS, where, str(i)], env=env, **pipes) for i in (0, 1)]
    losses, leaves = runpy.run_path(STEPS)["three_steps"]()
    for process in started:
        said, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-3000:]
        found_losses, found = json.loads(said.splitlines()[-1])  # Gloo talks, too
        np.testing.assert_allclose(found_losses, losses, atol=1e-5, rtol=1e-5)
        for mine, theirs in zip(leaves, found, strict=True):
            np.testing.assert_allclose(theirs, mine, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(case, id=case[0]) for case in CASES])
def test_two_processes_of_four_devices_equal_eight_and_one(case, tmp_path):
    one, eight, two = (tmp_path / name for name in ("one", "eight", "two"))
    train(one, case)
    said = train(two, case, mesh=case[2], processes=2, devices=4)
    assert "status done" in said[0] and "status" not in said[1]  # the first process alone speaks
    assert record(two)["placement"] == {"mesh": case[2], "devices": 8, "processes": 2}
    assert_equal_runs(one, two)
    train(eight, case, mesh=case[2], devices=8)
    assert_equal_runs(one, eight)
    sent = record(eight)["resources"]["communication_bytes_per_step"]
    assert sent["source"] == "counted" and sent == record(two)["resources"]["communication_bytes_per_step"]


@pytest.mark.slow
def test_a_checkpoint_of_eight_devices_goes_on_with_two_and_a_process_may_be_lost(tmp_path):
    more = ["training.examples=12800", "training.log_every_examples=640"]
    one, many = tmp_path / "one", tmp_path / "many"
    train(one, RANKMIXER, settings=more)
    started = begin(many, RANKMIXER, mesh="fsdp=8", processes=2, devices=4, settings=more)
    while not any((many / "checkpoints").glob("*/manifest.json")):
        assert all(process.poll() is None for process in started)
        time.sleep(0.02)
    started[1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    said = started[0].communicate(timeout=120)[0]
    assert time.monotonic() - began < 60 and started[0].returncode != 0
    assert "another process of this run was lost" in said or "another task died" in said, said[-2000:]
    started[1].communicate()
    assert record(many)["status"] == "running"
    train(many, RANKMIXER, mesh="fsdp=2", devices=2, settings=more)
    assert record(many)["restored_from"] > 0
    np.testing.assert_allclose(losses(one), losses(many), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_each_process_reads_its_share_of_a_stored_log(tmp_path):
    log = import_log(write_shop(tmp_path, 2_000, users=40), tmp_path / "log")
    base = ["training.requests=128", "training.passes=2", "training.patience=1", "training.eps=1e-3"]
    given = {"base": base, "data": ("--dataset", str(log.folder))}
    one, two = tmp_path / "one", tmp_path / "two"
    train(one, ("dcnv2", []), **given)
    train(two, ("dcnv2", []), mesh="data=2,fsdp=4", processes=2, devices=4, **given)
    np.testing.assert_allclose(losses(one), losses(two), atol=1e-5, rtol=1e-4)
    a, b = record(one), record(two)
    assert a["work"]["passes_tried"] == b["work"]["passes_tried"]
    assert a["metrics"]["logloss"] == pytest.approx(b["metrics"]["logloss"], abs=1e-5)


def test_the_share_of_a_process_is_what_its_devices_need():
    mesh = make_mesh({"data": 1}, jax.devices())
    assert own_share(None, 64) == own_share(mesh, 64) == (0, 1)


def test_a_mesh_that_cannot_be_is_refused_before_any_work(tmp_path):
    [process] = begin(tmp_path / "a", RANKMIXER, mesh="data=3", devices=4)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 1 and "training.requests is 64, which does not divide over the 3 devices" in said
    assert not (tmp_path / "a" / "run.json").exists()
