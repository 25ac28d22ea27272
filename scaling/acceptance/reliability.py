"""What damage and death do to results: every file of a run and of a sweep is damaged in every way, and processes are
killed at random. Afterwards the same commands give the same figures, or a message that names the file and a command
that mends it; never another figure.

A *scene* is a folder as a command left it, and the commands that go on from there. A cell of the matrix is one scene
with one file damaged in one way:

    same      the commands give the same figures
    mended    they name the file and say what to do; done, and run again, they give the same figures
    anything else is a fault, in capitals
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import pandas as pd

from recscale.scaling import cli
from recscale.scaling.data.importing.importer import import_log
from recscale.scaling.data.known_truth import card
from recscale.scaling.data.made_up_shop import write_shop
from recscale.scaling.records.planned import PLAN, SWEEP
from recscale.scaling.records.runs import MEASURED, METRICS, RECORD, TABLE, read_record, write_record

PASSED = ("same", "mended")

_SETTINGS = (
    "data.preset=smoke", "data.holdout_rows=256", "training.requests=64", "training.examples=1920",
    "training.warmup_examples=128", "training.log_every_examples=320", "training.checkpoint_every_s=0",
)  # fmt: skip

_PASSES = ("training.requests=128", "training.passes=2", "training.patience=1")

# What of a run is damaged: patterns, see `Scene`; NEWEST is the newest checkpoint. "passes" is a finished run of some
# passes over an imported log.
_MODEL = ("model/*/*/manifest.json", "model/*/*/arrays/**/d/*")
_CHECKPOINT = ("checkpoints/NEWEST/manifest.json", "checkpoints/NEWEST/arrays/**/d/*")
RUN_FILES = {
    "finished": (RECORD, METRICS, *_MODEL),
    "stopped": (RECORD, METRICS, "cache/*card*.json", "cache/*.npz", *_CHECKPOINT),
    "passes": (RECORD, METRICS, "model/best/*/manifest.json"),
}

# Two branches of one trunk and two seeds: a checkpoint holds replicas and a waiting trunk, beside finished runs.
_SWEEP = """
from recscale.scaling.training import get_config as base_config
from recscale.sweeps import axis, product, seeds
def get_config():
    config = base_config("dlrm_mlp", "known_truth")
    config.data.preset, config.data.holdout_rows = "smoke", 256
    config.training.requests, config.training.warmup_examples = 64, 128
    config.training.log_every_examples, config.training.checkpoint_every_s = EXAMPLES // 10, 0.0
    return config
def get_sweep():
    return product(axis("training.examples", [EXAMPLES, 2 * EXAMPLES]), seeds(2))
"""


def _cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _flipped(content: bytes) -> bytes:
    """One bit changed: of the last digit there is, where numbers are text; else in the middle."""
    digits = [match.start() for match in re.finditer(rb"\d", content)] if content[:1] == b"{" else []
    at = digits[len(digits) // 2] if digits else len(content) // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "deleted": lambda content: None,
    "emptied": lambda content: b"",
    "cut in half": _cut,
    "one bit flipped": _flipped,
    "garbage appended": lambda content: content + b"\x00\xff{garbage",
}


def damage(path: Path, how: str) -> None:
    """Does one of `DAMAGES` to a file."""
    content = DAMAGES[how](path.read_bytes())
    path.unlink() if content is None else path.write_bytes(content)


@dataclasses.dataclass(frozen=True)
class Scene:
    """A folder, the files in it that are damaged (patterns), the commands that go on from there, what they must give.

    commands: arguments of `recscale`, to be run one after the other until one fails.
    """

    name: str
    folder: Path
    files: tuple[str, ...]
    commands: tuple[tuple[str, ...], ...]
    figures: Any

    def cells(self) -> Iterator[tuple[Path, str]]:
        """Every file, relative to the folder, with every damage."""
        for pattern in self.files:
            # Of files whose names differ from run to run the largest, which holds the numbers.
            if "NEWEST" in pattern:
                pattern = pattern.replace("NEWEST", str(max(map(int, os.listdir(self.folder / "checkpoints")))))
            found = max(self.folder.glob(pattern), key=lambda path: path.stat().st_size)
            for how in DAMAGES:
                yield found.relative_to(self.folder), how

    def outcome(self, file: Path, how: str) -> str:
        """What damage to a file comes to; the folder is as before afterwards."""
        kept = self.folder.with_name(f"{self.folder.name}.kept")
        shutil.copytree(self.folder, kept)
        try:
            damage(self.folder / file, how)
            return self._outcome(file)
        finally:
            shutil.rmtree(self.folder)
            kept.rename(self.folder)

    def _outcome(self, file: Path) -> str:
        outcome = "same"
        for _ in range(3):
            try:
                code, text = run(*self.commands)
            except Exception as error:
                return f"TRACEBACK {type(error).__name__}: {error}"
            if code == 0:
                return outcome if figures(self.folder, text) == self.figures else "ANOTHER FIGURE"
            advice = re.findall("`(.+?)`", text)
            if file.name not in text or not advice:
                return f"NOT NAMED, OR NO COMMAND: {text.strip()[-300:]}"
            for command in " && ".join(advice).split(" && "):
                name, *arguments = shlex.split(command)
                if name == "recscale":
                    run(tuple(arguments))
                else:
                    subprocess.run([name, *arguments], check=True)
            outcome = "mended"
        return "NOT MENDED"


def run(*commands: Sequence[str]) -> tuple[int, str]:
    """Runs commands of `recscale` in this process until one fails: (exit code, all that was printed)."""
    card.forget()
    printed, code = io.StringIO(), 0
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        for command in commands:
            try:
                cli.main(list(command))
            except SystemExit as left:
                code = left.code if isinstance(left.code, int) else 1
            if code:
                break
    return code, printed.getvalue()


def figures(folder: Path, printed: str = "") -> dict[str, Any]:
    """Everything a folder shows that must not change: the run table but for what is measured, every run's metrics, and
    the figures among what was printed, a line each."""
    lines: dict[str, Any] = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob(METRICS))}
    lines["printed"] = re.findall(r"^\w+ +[-+.\de]+$", printed, re.MULTILINE)
    if (folder / TABLE).exists():
        table = pd.read_parquet(folder / TABLE).drop(columns=list(MEASURED))
        return lines | {TABLE: table.to_json(double_precision=15)}
    return lines | {RECORD: json.loads((folder / RECORD).read_text())["metrics"]}


def run_scene(folder: Path, name: str) -> Scene:
    """A run that is finished or was stopped, one of `RUN_FILES`, below a folder."""
    out, data, settings = folder / f"run {name}", (), _SETTINGS
    if name == "passes":
        log = import_log(write_shop(folder / "shop", 2_000, users=40), folder / "log")
        data, settings = ("--dataset", str(log.folder)), _PASSES
    asked = [part for text in settings for part in ("--set", text)]
    commands = (("train", "dlrm_mlp", *data, "--out", str(out), *asked), ("evaluate", str(out)))
    expected = figures(out, _must(run(*commands)))
    if name == "stopped":
        _stop_in_the_middle(out)
    return Scene(name, out, RUN_FILES[name], commands, expected)


def sweep_scene(folder: Path) -> Scene:
    """A sweep that is finished, below a folder."""
    file, out = write_sweep_file(folder, 1280), folder / "a sweep"
    commands = (("launch", str(out), "--workers", "1"), ("collect", str(out)))
    _must(run(("plan", str(file), "--out", str(out)), *commands))
    files = (PLAN, SWEEP, TABLE, f"runs/*/{RECORD}", f"runs/*/{METRICS}")
    return Scene("sweep", out, files, commands, figures(out))


def write_sweep_file(folder: Path, examples: int) -> Path:
    """The sweep file of the kills and of the scene "sweep", of runs of so many rows and twice as many."""
    path = folder / "small sweep.py"
    path.write_text(f"EXAMPLES = {examples}\n{_SWEEP}")
    return path


def _stop_in_the_middle(out: Path) -> None:
    """A finished run as if it had been killed a while after its newest checkpoint but one."""
    record = read_record(out) or {}
    newest = max(out.glob("checkpoints/*/"), key=lambda path: int(path.name))
    write_record(out, record | {"status": "running"})
    lines = (out / METRICS).read_bytes().splitlines(keepends=True)
    marks = json.loads((newest / "manifest.json").read_text())["position"]["metrics"]
    kept = marks[record["run_id"]]["lines"]
    (out / METRICS).write_bytes(b"".join(lines[:kept]) + lines[kept][:9])  # the last line is torn


def _must(done: tuple[int, str]) -> str:
    """What was printed, by commands that must not fail."""
    if done[0]:
        raise RuntimeError(f"a scene could not be made: {done[1][-2000:]}")
    return done[1]


def matrix(made: Sequence[Scene]) -> list[dict[str, str]]:
    """The outcome of every cell: scene, file, damage, outcome."""
    rows = []
    for scene in made:
        for file, how in scene.cells():
            rows.append({"scene": scene.name, "file": str(file), "damage": how, "outcome": scene.outcome(file, how)})
    return rows


VICTIMS = ("parent", "worker", "both")
PHASES = ("plan", "training", "checkpoint", "collect")


def kill(file: Path, out: Path, phase: str, victim: str, dice: random.Random) -> bool:
    """Starts a command on a sweep and kills it, or its workers, or both, at a random moment of a phase; False if it
    was through by then."""
    command = {
        "plan": ["plan", str(file), "--out", str(out)],
        "collect": ["collect", str(out)],
    }.get(phase, ["launch", str(file), "--out", str(out), "--workers", "2"])
    before = _progress(out, phase)
    process = subprocess.Popen(_recscale(command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if phase in ("training", "checkpoint"):
        while process.poll() is None and _progress(out, phase) <= before:
            time.sleep(0.002)
        time.sleep(dice.uniform(0.0, 0.5 if phase == "training" else 0.01))
    else:
        time.sleep(dice.uniform(0.0, 4.0))  # from the start of Python to the last file
    alive = process.poll() is None
    for pid in ([] if victim == "parent" else _children(process.pid)) + ([] if victim == "worker" else [process.pid]):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if victim == "worker":  # the launcher starts another, and is stopped in its turn
        time.sleep(dice.uniform(0.0, 5.0))
        process.terminate()
    process.wait()
    return alive


def kill_and_finish(file: Path, out: Path, kills: int, dice: random.Random) -> tuple[dict[str, Any], int]:
    """The figures of a sweep that was killed so many times, phase after phase, and how many kills hit."""
    hit = sum(kill(file, out, PHASES[n % len(PHASES)], dice.choice(VICTIMS), dice) for n in range(kills))
    finish(file, out)
    return figures(out), hit


def finish(file: Path, out: Path) -> None:
    """Runs a sweep to its end, whatever state its folder is in."""
    done = subprocess.run(
        _recscale(["sweep", str(file), "--out", str(out), "--no-report", "--workers", "2"]),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the sweep ended with code {done.returncode}: {done.stderr[-2000:]}")


def _progress(out: Path, phase: str) -> set[tuple[str, int]]:
    """What there is of a phase: lines of metrics, checkpoints whose manifest is missing. More of it means progress."""
    if phase == "training":
        return {(str(path), line) for path in out.glob(f"runs/*/{METRICS}") for line in range(_lines(path))}
    written = out.glob("groups/*/checkpoints/*/")
    return {(str(path), path.stat().st_ino) for path in written if not (path / "manifest.json").exists()}


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _recscale(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-c", "from recscale.scaling.cli import main; main()", *arguments]


def measure_reliability(*, kills: int = 20, seed: int = 0) -> dict[str, Any]:
    """Runs the corruption matrix and so many kills, shows them, and returns them as JSON-able figures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = matrix([*(run_scene(folder, name) for name in RUN_FILES), sweep_scene(folder)])
        show(rows)
        file, whole = write_sweep_file(folder, 38_400), folder / "whole"
        finish(file, whole)
        found, hit = kill_and_finish(file, folder / "killed", kills, random.Random(seed))
        same = found == figures(whole)
    click.echo(f"{hit} of {kills} kills hit a running command; results {'identical' if same else 'DIFFERENT'}")
    faults = sum(row["outcome"] not in PASSED for row in rows)
    return {"matrix": rows, "faults": faults, "kills": kills, "hit": hit, "identical": same}


def show(rows: Sequence[dict[str, str]]) -> None:
    """Prints the matrix: a line a file, a column a damage."""
    table = pd.DataFrame(rows).pivot(index=["scene", "file"], columns="damage", values="outcome")
    click.echo(table[list(DAMAGES)].to_string())
