"""What every command that prints figures says, for holding a change that must not alter results to what stood before.

    python .ci/outputs.py run BIN OUT       runs the commands of BIN (folder of a `recscale` executable) into OUT
    python .ci/outputs.py diff OLD NEW      names what differs between two such folders; exits 1 if anything does

Plans, counts, sizes, fits and comparisons are held to the byte of their JSON, the run table of a small sweep bit for
bit; only times, paths, host and version facts are left out.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "notebooks" / "runs"
TABLES = ROOT / "tests" / "tables"
# Facts of the machine and the moment: endings of names, and names.
ENDINGS = ("_s", "_ms", "_bytes", "seconds")
FACTS = {
    "started", "finished", "host", "commit", "versions", "provenance", "workdir", "path", "paths", "out", "folder",
    "file", "table", "report", "page", "plot", "git", "command", "device", "recscale", "time",
}  # fmt: skip


def commands(bin_folder: Path, out: Path) -> dict[str, list[str]]:
    """Name -> arguments of every command whose output is compared."""
    tool = str(bin_folder / "recscale")
    listed = subprocess.run([tool, "models", "--json"], capture_output=True, text=True, check=True)
    models = sorted(row["model"] for row in last_json(listed.stdout)["models"])
    composed = ["longer+rankmixer", "din+dcnv2", "hstu+dlrm_mlp", "stca+rankmixer"]
    found: dict[str, list[str]] = {"models": ["models"]}
    for name in [*models, *composed]:
        found[f"count-{name}"] = ["count", name]
        found[f"count-kt-{name}"] = ["count", name, "--schema", "known_truth:long"]
        found[f"size-{name}"] = ["size", name, "--dense-params", "1e6"]
    files = sorted((ROOT / "sweeps").rglob("*.py"), key=lambda path: path.stem)
    for name in [path.stem for path in files if "\ndef get_sweep(" in path.read_text("utf-8")]:
        found[f"plan-{name}"] = ["plan", name, "--out", str(out / "plans" / name)]
    for table in ("quickstart", "mixer_ladder", "length_ladder", "memory_slots_ladder"):
        for form in ("power_offset", "power", "log_linear"):
            axis = {"length_ladder": "history_length", "memory_slots_ladder": "memory_slots"}.get(table, "dense_params")
            found[f"fit-{table}-{form}"] = ["fit", str(RUNS / f"{table}.parquet"), "--form", form, "--axes",
                                            f"x={axis}", "--bootstrap", "100", "--rolling"]  # fmt: skip
    found["fit-olmo"] = ["fit", str(TABLES / "olmo_ladder" / "ladder_runs.csv"), "--bootstrap", "100"]
    for a, b in (("rankmixer", "dlrm_mlp"), ("rankmixer", "dcnv2"), ("tokenmixer_large", "rankmixer")):
        found[f"compare-{a}-{b}"] = ["compare", str(RUNS / "mixer_ladder.parquet"), "--a", a, "--b", b, "--axis",
                                     "dense_params", "--bootstrap", "100"]  # fmt: skip
    found["sweep-smoke"] = ["sweep", "smoke", "--out", str(out / "smoke")]
    return found


def last_json(text: str) -> object:
    lines = text.strip().splitlines()
    return json.loads(lines[-1]) if lines else None


def passing(name: str) -> bool:
    """Whether what is called so differs between two runs of the same command."""
    return name in FACTS or name.endswith(ENDINGS)


def settled(value: object) -> object:
    """`value` without what differs between two runs of the same command."""
    if isinstance(value, dict):
        return {k: settled(v) for k, v in sorted(value.items()) if not passing(k)}
    if isinstance(value, list):
        return [settled(item) for item in value]
    return value


def run(bin_folder: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "commands.json").write_text(json.dumps(commands(bin_folder, out)), encoding="utf-8")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "WANDB_MODE": "offline"}
    # One process for all of them: starting JAX takes longer than most of the commands.
    subprocess.run([str(bin_folder / "python"), __file__, "inside", str(out), "-"], env=environment, check=True)
    (out / "commands.json").unlink()
    for plan in sorted((out / "plans").glob("*/plan.jsonl")):
        lines = [json.dumps(settled(json.loads(line)), sort_keys=True) for line in plan.read_text().splitlines()]
        (out / f"planned-{plan.parent.name}.jsonl").write_text("\n".join(lines), encoding="utf-8")


def run_inside(out: Path) -> None:
    """The commands of `commands.json`, in this process."""
    from recscale.scaling.cli import main

    for name, arguments in json.loads((out / "commands.json").read_text("utf-8")).items():
        printed, code = io.StringIO(), 0
        with contextlib.redirect_stdout(printed):
            try:
                main([*arguments, "--json"])
            except SystemExit as end:
                code = end.code or 0
        try:
            said = settled(last_json(printed.getvalue()))
        except json.JSONDecodeError:
            said = printed.getvalue().strip().splitlines()[-1]
        text = json.dumps({"code": code, "said": said}, indent=1, sort_keys=True)
        (out / f"{name}.json").write_text(text.replace(str(out), "").replace(str(ROOT), ""), encoding="utf-8")


def diff(old: Path, new: Path) -> list[str]:
    different = []
    names = sorted({p.name for folder in (old, new) for p in folder.iterdir() if p.suffix in (".json", ".jsonl")})
    for name in names:
        texts = [(folder / name).read_text("utf-8") if (folder / name).exists() else None for folder in (old, new)]
        if texts[0] != texts[1]:
            different.append(name)
    tables = [pd.read_parquet(folder / "smoke" / "runs.parquet").sort_values("run_id") for folder in (old, new)]
    for column in sorted(set(tables[0]) | set(tables[1])):
        if passing(column):
            continue
        if column not in tables[0] or column not in tables[1]:
            different.append(f"smoke table: column {column} in one only")
        elif not tables[0][column].reset_index(drop=True).equals(tables[1][column].reset_index(drop=True)):
            different.append(f"smoke table: column {column}")
    return different


if __name__ == "__main__":
    mode, first, second = sys.argv[1], Path(sys.argv[2]).absolute(), Path(sys.argv[3]).absolute()
    if mode == "run":
        run(first, second)
    elif mode == "inside":
        run_inside(first)
    else:
        differing = diff(first, second)
        print("\n".join(differing) or "nothing differs")
        sys.exit(bool(differing))
