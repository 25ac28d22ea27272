"""How often the law fitter refuses what is right, prints what is noise, and states an interval that misses the truth.

Every study of `law_studies` goes through `fit` itself. Per cell and parameter the table holds the shares of studies in
which it was printed, in which it was refused although the estimate was within a tenth of the truth and its interval
held it (a wrong refusal), and of printed intervals that held the truth, with their median half-width; per cell also the
share of studies each gate refused something in. What most papers do (`law_rivals`) is put to the studies of the small
design. `compare` is put to pairs of one architecture under two names, and to pairs whose exponents differ by .1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from recscale.scaling.laws import compare, fit
from recscale.scaling.processes import one_thread
from recscale.scaling.records.files import replacing
from recscale.scaling.records.plain import plain
from recscale.scaling.records.provenance import command, cores, environment, now
from recscale.scaling.training.progress import clock

from . import law_rivals
from .law_studies import Cell, design, study
from .results_log import ResultsLog

OURS = "recscale"
QUANTITIES = ("E", "alpha", "beta", "kappa")
STUDIES, BLOCK = 200, 20  # of a kind; studies that one process does in one go
CLOSE = 0.1  # a refusal is wrong where the estimate was within this share of the truth
COMPARED = {"identical": 0.0, "exponents differ by .1": 0.1}
_PAIR = {"sizes": 8, "seeds": 3, "decades": 3.0, "noise": 2e-4, "alpha": 0.35, "at_centre": 0.01}


def judged(cell: Cell, seed: int) -> dict[str, Any]:
    """One study of a cell: what was printed of it, what it would have been, and which gates refused something."""
    frame, truth = study(cell, seed)
    law = fit(frame, cell.form, None if cell.amounts > 1 else {"x": "dense_params"}, "logloss", bootstrap=0)
    told = {"gates": {gate.id for gate in law.refusals}, "printed": {}, "wrong": {}, "inside": {}, "width": {}}
    told["number"] = any(value is not None for name, value in law.params.items() if name in QUANTITIES)
    solved = law.solution_params() if law.solution is not None else {}
    for name in set(truth) & set(law.form.names):
        profile, interval, right = law.profiles.get(name), law.intervals[name], truth[name]
        told["printed"][name] = law.params[name] is not None
        if interval is not None:
            # Noise-free tables have intervals of the width of rounding.
            slack = 1e-6 * abs(right)
            told["inside"][name] = interval[0] - slack <= right <= interval[1] + slack
            told["width"][name] = (interval[1] - interval[0]) / 2
        elif profile is not None:
            near = abs(solved[name] - right) < CLOSE * abs(right)
            told["wrong"][name] = near and profile.interval[0] <= right <= profile.interval[1]
    return told


def of_rival(cell: Cell, seed: int) -> dict[str, Any]:
    """The same of the rival, which prints whatever it finds."""
    frame, truth = study(cell, seed)
    found = law_rivals.plain_bootstrap(frame, cell.form, seed=seed)
    known = set(truth) & set(found)
    return {
        "gates": set(),
        "number": True,
        "wrong": {},
        "printed": dict.fromkeys(known, True),
        "inside": {name: found[name][1] <= truth[name] <= found[name][2] for name in known},
        "width": {name: (found[name][2] - found[name][1]) / 2 for name in known},
    }


def summarised(cell: Cell, told: list[dict[str, Any]], fitter: str = OURS) -> list[dict[str, Any]]:
    """Rows of the table of one cell: one per parameter, and one for the cell as a whole."""
    about = {**dataclasses.asdict(cell), "cell": cell.name, "null": cell.null, "studies": len(told), "fitter": fitter}
    gates = sorted(set().union(*(one["gates"] for one in told)))
    share = {f"refused by {gate}": float(np.mean([gate in one["gates"] for one in told])) for gate in gates}
    rows = [{**about, "quantity": "any", "printed": float(np.mean([one["number"] for one in told])), **share}]
    for name in QUANTITIES:
        if name in told[0]["printed"]:
            inside, width = ([one[key][name] for one in told if name in one[key]] for key in ("inside", "width"))
            rows.append(
                about
                | {
                    "quantity": name,
                    "printed": float(np.mean([one["printed"][name] for one in told])),
                    "wrong_refusals": float(np.mean([one["wrong"].get(name, False) for one in told])),
                    "intervals": len(inside),
                    "coverage": float(np.mean(inside)) if inside else None,
                    "half_width": float(np.median(width)) if width else None,
                }
            )
    return rows


def pair(difference: float, seed: int) -> pd.DataFrame:
    """Runs of two architectures whose exponents differ by this much, matched in size, seeds and data."""
    draw, p = np.random.default_rng([seed, round(1e6 * difference)]), _PAIR
    x = np.geomspace(1e14, 1e14 * 10 ** p["decades"], p["sizes"])
    u = np.log(x / np.sqrt(x[0] * x[-1]))
    rows = []
    for name, more in (("a", difference), ("b", 0.0)):
        excess = p["at_centre"] * np.exp(-(p["alpha"] + more) * u)
        for k, flops in enumerate(x):
            for run in range(p["seeds"]):
                loss = (0.42 + excess[k]) * np.exp(p["noise"] * draw.standard_normal())
                rows.append((name, f"{name}{k}", flops, run, run, f"{name}{k}-{run}", loss))
    columns = ["architecture", "shape_id", "train_flops", "seed", "data_seed", "run_id", "logloss"]
    return pd.DataFrame(rows, columns=columns)


def compared(difference: float, seed: int) -> str:
    """What the exponents of one pair say, apart from the checklist of how the runs were made."""
    return compare(pair(difference, seed), "a", "b", bootstrap=300, seed=seed).evidence


@dataclasses.dataclass(frozen=True)
class Job:
    """Some studies of one kind: of a cell put to a fitter or, without a cell, pairs put to `compare`."""

    fitter: str
    cell: Cell | None
    seeds: range
    kind: str = ""

    @property
    def id(self) -> str:
        """What it is, and of which code: a change of the fitter or of the studies makes all of it new."""
        kind = self.cell.name if self.cell else f"compare, {self.kind}"
        return f"{_code()}: {self.fitter}, {kind}, seeds {self.seeds.start} to {self.seeds.stop - 1}"

    def done(self) -> dict[str, Any]:
        """What was told of every study, with the seconds of one core that it took."""
        start, one = time.process_time(), judged if self.fitter == OURS else of_rival
        told = [one(self.cell, seed) if self.cell else compared(COMPARED[self.kind], seed) for seed in self.seeds]
        return plain({"id": self.id, "told": told, "seconds": time.process_time() - start, "date": now()})


@functools.cache
def _code() -> str:
    """Hash of the sources that decide an outcome."""
    folder = Path(__file__).parents[1]
    parts = ("comparing", "fitting", "forms", "judgement", "tables", "uncertainty")
    files = [*(file for part in parts for file in sorted((folder / "laws" / part).glob("*.py")))]
    files += [folder / "bench" / f"{name}.py" for name in ("law_calibration", "law_rivals", "law_studies")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def _jobs(studies: int, pairs: int, rivals: int, small: bool, seed: int) -> list[Job]:
    """In blocks, so that little is lost where a sitting ends, and none keeps one core alone for long."""
    first = seed * 1_000_000
    wanted = [(OURS, cell, "", studies) for cell in design(reduced=not small)]
    wanted += [(law_rivals.NAME, c, "", rivals) for c in design(reduced=False) if c.form in law_rivals.FORMS]
    wanted += [(OURS, None, kind, pairs) for kind in COMPARED]
    return [
        Job(fitter, cell, range(first + at, first + min(at + BLOCK, count)), kind)
        for fitter, cell, kind, count in wanted
        for at in range(0, count, BLOCK)
    ]


def calibrate(
    studies: int = STUDIES,
    pairs: int = 40,
    rivals: int = 40,
    small: bool = False,
    workers: int = 0,
    seed: int = 0,
    out: Path | None = None,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The table of all cells, and the conditions it must meet with what was measured.

    workers: processes, 0 for one a core. out: folder of `law_calibration.jsonl`, a line a block of studies; what stands
    there of this code is not done again, and the table's `attrs` say when it was done and how long it took.
    """
    jobs = _jobs(studies, pairs, rivals, small, seed)
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        log = stack.enter_context(contextlib.closing(ResultsLog((out or scratch) / "law_calibration.jsonl")))
        known = log.ids()
        missing = [job for job in jobs if job.id not in known]
        # Every stretch of them is a sample of all, so that the time left can be told from the time gone.
        missing = [missing[k] for k in np.random.default_rng(0).permutation(len(missing))]
        for row in _worked(missing, workers or len(cores()), scratch):
            log.add(row)
    rows = {row["id"]: row for row in log.rows}
    parts: dict[tuple[str, Cell | None, str], list[Any]] = {}
    for job in jobs:
        parts.setdefault((job.fitter, job.cell, job.kind), []).extend(rows[job.id]["told"])
    told = []
    for (fitter, cell, kind), studied in parts.items():
        told += summarised(cell, studied, fitter) if cell else [_of_pairs(kind, studied)]
    table, own = pd.DataFrame(told), [rows[job.id] for job in jobs]
    table.attrs = {
        "core_seconds": round(sum(row["seconds"] for row in own)),
        "made": f"{min(row['date'] for row in own)} to {max(row['date'] for row in own)}",
    }
    return table, conditions(table)


def _of_pairs(kind: str, answers: list[str]) -> dict[str, Any]:
    steeper, either = (float(np.mean([a.endswith(end) for a in answers])) for end in ("a steeper", "steeper"))
    row = {"cell": f"compare, {kind}", "studies": len(answers), "quantity": "steeper", "printed": either}
    return row | {"correct": steeper if COMPARED[kind] else 1 - either}


def _worked(jobs: list[Job], workers: int, cache: Path) -> Iterator[dict[str, Any]]:
    """What comes of the jobs, as it comes, with a bar on standard error."""
    if not jobs:
        return
    columns = (BarColumn(), TextColumn("{task.completed}/{task.total} blocks of studies, {task.fields[left]}"))
    start = time.perf_counter()
    with (
        # The threads of two processes on two cores would wait for each other.
        one_thread(),
        Progress(*columns, console=Console(stderr=True)) as progress,
        ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _share_programs, (cache,)) as pool,
    ):
        bar = progress.add_task("", total=len(jobs), left="compiling")
        running = [pool.submit(Job.done, job) for job in jobs]
        try:
            for done, future in enumerate(as_completed(running), 1):
                yield future.result()
                left = (time.perf_counter() - start) * (len(jobs) - done) / done
                progress.update(bar, completed=done, left=f"about {clock(left)} left")
        finally:
            pool.shutdown(cancel_futures=True)


def _share_programs(cache: Path) -> None:
    """One process compiles a program for all."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def conditions(table: pd.DataFrame) -> dict[str, Any]:
    """What must hold before a change of the fitter is merged, each with the value measured and whether it holds."""
    fits = table[table["fitter"] == OURS]
    null = fits[fits["null"].astype(bool) & (fits["quantity"] == "any")]
    laws = fits[~fits["null"].astype(bool) & (fits["quantity"] != "any")]
    told = laws[laws["intervals"] >= 20]
    enough = told[(told["sizes"] >= 7)]
    clear = laws[(laws["noise"] <= 0.004) & (laws["sizes"] >= 7) & (laws["decades"] >= 1.8) & (laws["defect"] == "")]
    pooled = float(np.average(laws["coverage"].dropna(), weights=laws["intervals"][laws["coverage"].notna()]))
    measured = {
        "numbers from noise, worst cell": (float(null["printed"].max()), "<=", 0.05),
        "coverage, pooled": (pooled, ">=", 0.93),
        "coverage, worst cell with 7 sizes or more": (float(enough["coverage"].min()), ">=", 0.90),
        "wrong refusals at noise <= .4 %, worst cell": (float(clear["wrong_refusals"].max()), "<=", 0.05),
    }
    pure = clear[(clear["shape"] == 0) & clear["quantity"].isin(["E", "alpha"]) & (clear["form"] == "power_offset")]
    grid = laws[(laws["form"] == "chinchilla") & (laws["amounts"] == 5) & (laws["quantity"] == "beta")]
    measured |= {
        "E and alpha granted at noise <= .4 %, worst cell": (float(pure["printed"].min()), ">=", 0.95),
        "coverage of E and alpha there, worst cell": (float(pure["coverage"].min()), ">=", 0.93),
        "coverage of beta of a 7 x 5 grid, worst cell": (float(grid["coverage"].min()), ">=", 0.90),
        # Two hundred studies measure a share near 0 to within .02.
        "largest rise of refusals as noise falls": (_largest_rise(laws), "<=", 0.02),
    }
    pairs = table[table["quantity"] == "steeper"].set_index("cell")
    if len(pairs):
        measured["compare says yes of one architecture"] = (pairs["printed"]["compare, identical"], "<=", 0.05)
        measured["compare finds a difference of .1"] = (pairs["correct"]["compare, exponents differ by .1"], ">=", 0.9)
    return {
        name: {
            "value": value,
            "limit": f"{sign} {limit:g}",
            "holds": bool(value <= limit if sign == "<=" else value >= limit),
        }
        for name, (value, sign, limit) in measured.items()
    }


def _largest_rise(laws: pd.DataFrame) -> float:
    """By how much refusals rise at most from one noise to the next lower one, all else equal."""
    alike = [field.name for field in dataclasses.fields(Cell) if field.name != "noise"]
    rises = [0.0]
    for _, part in laws.groupby([*alike, "quantity"]):
        rises += list(np.diff(part.sort_values("noise")["printed"].to_numpy(float)))
    return float(max(rises))


def figure(table: pd.DataFrame, path: Path) -> None:
    """Coverage and share printed of every cell with a law, and numbers printed where there is none."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ours, theirs = (table[table["fitter"] == name] for name in (OURS, law_rivals.NAME))
    laws = ours[ours["coverage"].notna()].assign(label=lambda t: t["cell"] + ": " + t["quantity"])
    laws = laws.merge(
        theirs[["cell", "quantity", "coverage"]], how="left", on=["cell", "quantity"], suffixes=("", "_2")
    )
    null = ours[(ours["null"] == True) & (ours["quantity"] == "any")]  # noqa: E712  a column of True, False and None
    height = 0.17 * (len(laws) + len(null)) + 1.5
    shown, (left, right) = pyplot.subplots(
        2, 1, figsize=(11, height), height_ratios=(len(laws) + 1, len(null) + 1), layout="constrained"
    )
    for axes, rows, limits in ((left, laws, (0.90, 0.93)), (right, null.assign(label=null["cell"]), (0.05,))):
        places = np.arange(len(rows))[::-1]
        axes.plot(rows["printed"], places, "o", color="0.7", label="printed")
        if rows is laws:
            axes.plot(rows["wrong_refusals"], places, "x", color="tab:red", label="wrongly refused")
            axes.plot(rows["coverage_2"], places, "^", color="tab:orange", label=f"the same of {law_rivals.NAME}")
            axes.plot(rows["coverage"], places, "s", color="tab:blue", label="printed intervals that hold the truth")
        axes.set_yticks(places, rows["label"], fontsize=6)
        axes.set_ylim(-1, len(rows))
        axes.set_xlim(-0.02, 1.02)
        for limit in limits:
            axes.axvline(limit, color="0.3", linewidth=0.6, linestyle=":")
    shown.legend(*left.get_legend_handles_labels(), fontsize=7, loc="outside lower center", ncols=3)
    left.set_title("Studies with a known law: share of studies", fontsize=9)
    right.set_title("Studies without one: share in which a parameter is printed", fontsize=9)
    with replacing(path) as target:
        shown.savefig(target, dpi=110, format="png")
    pyplot.close(shown)


def measure(
    calibration: bool = False,
    studies: int = STUDIES,
    pairs: int = 40,
    rivals: int = 40,
    small: bool = False,
    seed: int = 0,
    out: Path | None = None,
) -> dict[str, Any]:
    """`recscale bench laws`: speed and recovered constants, or with `calibration` the simulation of this module.

    out: folder for law_calibration.parquet and .png, and for the studies themselves, so that the same command goes on
    where it was ended; the table's metadata say what was run.
    """
    if not calibration:
        from .laws import run

        return run()
    table, found = calibrate(studies, pairs, rivals, small, seed=seed, out=out)
    if out is not None:
        table.attrs |= {"command": command(), "environment": str(environment()), "seed": seed}
        with replacing(out / "law_calibration.parquet") as target:
            table.to_parquet(target, index=False)
        figure(table, out / "law_calibration.png")
    seconds = table.attrs["core_seconds"]
    return {"conditions": found, "core_seconds": seconds, "passed": all(one["holds"] for one in found.values())}
