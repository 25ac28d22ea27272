"""Measurements of the law fitter on this machine: seconds per fit, per thousand refits, memory, and recovered
constants.

Times are the median of repeats after compilation, with versions and the device beside them. Data are
generated here from laws whose parameters are known, so the accuracy next to each time is part of the
measurement.
"""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Callable

import numpy as np
import pandas as pd

from recscale.scaling.laws import fit, forms
from recscale.scaling.laws.fitting.problem import make_problem
from recscale.scaling.laws.fitting.solver import cpu_device, solve
from recscale.scaling.laws.judgement.rolling import rolling_origin
from recscale.scaling.laws.uncertainty.bootstrap import bootstrap
from recscale.scaling.records.provenance import command, now, versions

REPEATS = 5
TRUTH = {"E": 1.8, "A": 480.0, "alpha": 0.35, "B": 2100.0, "beta": 0.37}


def language_like(sizes: int, amounts: int, noise: float = 3e-3, seed: int = 0) -> pd.DataFrame:
    """A sizes x amounts grid of y = E + A N^-alpha + B D^-beta with `TRUTH`, times exp(noise * normal)."""
    n, d = np.meshgrid(np.geomspace(5e7, 1.6e10, sizes), np.geomspace(8e8, 3e11, amounts), indexing="ij")
    n, d = n.ravel(), d.ravel()
    y = TRUTH["E"] + TRUTH["A"] * n ** -TRUTH["alpha"] + TRUTH["B"] * d ** -TRUTH["beta"]
    y = y * np.exp(noise * np.random.default_rng(seed).standard_normal(len(y)))
    shape = np.repeat([f"size {i}" for i in range(sizes)], amounts)
    return pd.DataFrame({"shape_id": shape, "dense_params": n, "examples": d, "logloss": y})


def _timed(action: Callable[[], object], repeats: int = REPEATS) -> dict[str, float]:
    """Seconds of the first call (with compilation) and the median of later ones, by the wall and by the CPU.

    CPU time adds up the cores and leaves out other programs, so it is the figure to read on a busy machine.
    """
    begin = time.perf_counter()
    action()
    first = time.perf_counter() - begin
    wall, cpu = [], []
    for _ in range(repeats):
        begin, begin_cpu = time.perf_counter(), time.process_time()
        action()
        wall.append(time.perf_counter() - begin)
        cpu.append(time.process_time() - begin_cpu)
    return {"seconds": float(np.median(wall)), "cpu_seconds": float(np.median(cpu)), "first_call_s": first}


def _problem(frame: pd.DataFrame, form: str):
    """A solver problem over the two axes of a generated table."""
    logs = np.log(frame[["dense_params", "examples"]].to_numpy())
    return make_problem(forms.get(form), logs - logs.mean(axis=0), frame["logloss"].to_numpy())


def _one_axis(form: str, count: int):
    """A noise-free problem on one axis for the slow forms."""
    found = forms.get(form)
    u = np.linspace(-8, 8, count)
    natural = (
        {"E": 0.3, "E0": 0.7, "a": 1.3, "A": 1.0, "c": 0.4}
        if form == "m4"
        else {"a": 0.4, "b": 0.3, "c0": 0.1, "c1": 0.4, "d1": 1.0, "f1": 0.5}
    )
    y = found.value(found.to_search({name: np.array(value) for name, value in natural.items()}), u[:, None])
    return make_problem(found, u[:, None], y)


def run(repeats: int = REPEATS) -> dict:
    """All measurements as one plain dictionary: seconds, targets, accuracy, peak memory and versions."""
    hundred, many = language_like(10, 10), language_like(16, 15)
    results: dict[str, dict] = {}

    def note(name: str, target: float, action: Callable[[], object], times: int = repeats) -> None:
        timed = _timed(action, times)
        results[name] = {**timed, "target_s": target, "within": timed["seconds"] <= target}

    for form, target in (("chinchilla", 0.12), ("kappa", 0.5)):
        problem = _problem(hundred, form)
        note(f"{form}, 100 points, eight grid starts", target, lambda problem=problem: solve(problem))
    note(
        "fit() chinchilla, 100 points, with its gates, no bootstrap",
        0.12,
        lambda: fit(hundred, "chinchilla", bootstrap=0),
    )
    for form, count in (("m4", 24), ("bnsl", 32)):
        problem = _one_axis(form, count)
        note(f"{form}, {count} points, 64 starts", 3.0, lambda problem=problem: solve(problem), 2)
    problem = _problem(many, "chinchilla")
    solution, codes = solve(problem), pd.factorize(many["shape_id"])[0]
    note(
        "1,000 cluster-bootstrap refits of 240 points, chinchilla, two starts each",
        5.0,
        lambda: bootstrap(problem, solution, codes, 1000, 0),
        3,
    )
    eight = [
        "chinchilla",
        "chinchilla_tied",
        "kaplan",
        "kaplan_offset",
        "kappa",
        "kappa_tied",
        "power_offset",
        "power",
    ]
    note(
        "rolling origin, 8 forms x 5 cuts, 200 draws",
        10.0,
        lambda: rolling_origin(many, eight, {"N": "dense_params", "D": "examples"}),
        1,
    )
    exact = fit(language_like(16, 15, noise=0.0), "chinchilla", bootstrap=0)
    return {
        "times": results,
        "accuracy": {
            "parameters_relative_error": max(abs(exact.solution_params()[k] / v - 1) for k, v in TRUTH.items()),
            "convergence_share": exact.solved()[1].convergence_share,
        },
        "peak_memory_bytes": _peak_memory(),
        "peak_memory_target_bytes": 10**9,
        "versions": versions(("jax", "numpy", "scipy", "pandas")),
        "device": {
            "jax": str(cpu_device()),
            "cores": os.cpu_count(),
            "machine": platform.machine(),
            "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        },
        "date": now(),
        "command": command(),
    }


def _peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
