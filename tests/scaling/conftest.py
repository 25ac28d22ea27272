"""A run table that obeys a stated law, which report, plot and notebook tests read instead of training anything, and a
real MovieLens-100K copy where there is one."""

import hashlib
import os
from pathlib import Path

import jaxtyping
import numpy as np
import pandas as pd
import pytest

ASYMPTOTE, ENTROPY_FLOOR = 0.4255, 0.4329
SIZES = (1.7e3, 4.9e3, 9.6e3, 3.5e4, 1.35e5, 2.69e5, 7.4e5)


def synthetic_runs(
    laws=None,
    *,
    sizes=SIZES,
    seeds=3,
    examples=(1_280_000,),
    noise=2e-4,
    floor=ASYMPTOTE,
    data_term=None,
    truth=True,
    diverged=True,
    rates=(3e-3,),
    sweep="synthetic",
    seed=0,
):
    """Runs whose logloss is floor + A (dense_params / 1e4)^-alpha [+ B (examples / 1e6)^-beta] times exp(noise).

    Columns are those of a run table: identity, size, work, data, training, metrics, cost; missing values are null.

    Args:
        laws: architecture -> (A, alpha). sizes: dense parameters, architectures differ by a few percent.
        seeds: runs per cell, sharing the noise of the data but not their own. data_term: (B, beta) or None.
        truth: add the columns of the known-truth log. diverged: the largest size of the last architecture lost a run.
        rates: learning rates per cell; the first is best, each further one costs 2 % of the excess.
    """
    laws = laws or {"dlrm_mlp": (0.033, 0.16), "rankmixer": (0.026, 0.24)}
    generator = np.random.default_rng(seed)
    rows = []
    for k, (name, (a, alpha)) in enumerate(laws.items()):
        for size in sizes:
            dense = int(round(size * (1 + 0.03 * k)))
            for amount in examples:
                for rate_index, rate in enumerate(rates):
                    for s in range(seeds):
                        loss = floor + a * (dense / 1e4) ** -alpha * (1 + 0.02 * rate_index)
                        loss += data_term[0] * (amount / 1e6) ** -data_term[1] if data_term else 0.0
                        loss *= np.exp(noise * generator.standard_normal())
                        rows.append(_row(name, dense, int(amount), rate, s, float(loss), sweep, truth))
    table = pd.DataFrame(rows)
    if diverged:
        last = table.index[-1]
        table.loc[last, ["status", "reasons"]] = ["diverged", "loss was not finite at step 812"]
        table.loc[last, ["logloss", "excess_logloss"] if truth else ["logloss"]] = np.nan
    return table.sort_values("run_id", ignore_index=True)


def _row(name, dense, examples, rate, seed, loss, sweep, truth):
    shape = hashlib.sha256(f"{name}{dense}".encode()).hexdigest()[:12]
    run = hashlib.sha256(f"{shape}{examples}{rate}{seed}".encode()).hexdigest()[:12]
    flops = 6 * dense
    row = {
        "run_id": run,
        "sweep": sweep,
        "architecture": name,
        "shape_id": shape,
        "trunk_id": f"{shape}-{seed}-{rate}",
        "seed": seed,
        "data_seed": 0,
        "status": "done",
        "reasons": "",
        "dense_params": dense,
        "active_params": dense,
        "embedding_params": 0,
        "head_params": 65,
        "forward_flops_per_row": flops // 3,
        "train_flops_per_row": flops,
        "train_flops": float(flops * examples),
        "dataset": "known_truth" if truth else "clicks",
        "preset": "dense_nested" if truth else None,
        "examples": examples,
        "unique_examples": examples,
        "epochs": 1.0,
        "lr_dense": rate,
        "lr_rule": "fixed",
        "lr_bracketed": None,
        "batch_rows": 512,
        "optimizer": "adamw",
        "schedule": "wsd",
        "decayed": True,
        "logloss": loss,
        "base_rate": 0.199,
        "auc": 0.75,
        "wall_s": 12.0,
        "rows_per_s": 1e5,
        "device": "cpu",
    }
    if truth:
        row |= {"excess_logloss": loss - ENTROPY_FLOOR, "entropy_floor": ENTROPY_FLOOR, "asymptote": ASYMPTOTE}
    return row


@pytest.fixture
def symbols():
    """Annotations are not checked: they take sizes for numbers, and in an exported program some are symbols."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def make_runs():
    """The generator of synthetic run tables."""
    return synthetic_runs


@pytest.fixture(scope="session")
def ml100k():
    """The real set, opened; skips with a reason where no copy is at hand. Nothing here downloads."""
    from recscale.scaling.data.stored_log.packed import PackedLog

    here = Path(__file__).parents[2] / "data" / "movielens-100k"
    root = Path(os.environ.get("RECSCALE_ML100K") or here)
    if not root.exists():
        pytest.skip(
            f"no MovieLens-100K at {here} and RECSCALE_ML100K is not set; "
            "`recscale data movielens-100k --out data/movielens-100k` gets it"
        )
    return PackedLog(root)
