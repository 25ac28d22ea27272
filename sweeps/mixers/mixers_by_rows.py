"""RankMixer and the MLP over sizes and rows on a log whose law is known: how either is short of parameters, or of rows.

The log and the seven shapes of the quickstart with other numbers of rows: with the quickstart's own runs, of 1.25e6 and
1.75e6 rows, a table over both axes, and the first stage of a study of eight mixers. Rates are the quickstart's, which
are the best of three with 1.75e6 rows, times a power of the rows: searched were three rates of every shape with 2.5e5
rows (`mixers_by_rows_rates`), and the powers are the means over the seven shapes, to a tenth. No rate was searched at
the rows between, below or above.

    recscale sweep mixers_by_rows --out runs/mixers_by_rows --no-report

What it says and what it does not: notebooks/runs/mixers.md.
"""

from ml_collections import ConfigDict

from recscale.sweeps import Sweep, axis, chain, noted, product, quickstart, seeds

ROWS = (75_000, 125_000, 250_000, 500_000, 2_500_000)

# The best rate falls as a power of the rows, from 2.5e5 to 1.75e6 of them.
SEARCHED_ROWS = 1_750_000
RATE_EXPONENT = {"rankmixer": 0.5, "dlrm_mlp": 0.2}
WARMUP = 12_500


def get_config() -> ConfigDict:
    return quickstart.get_config()


def get_sweep() -> Sweep:
    """Two seeds, one where a run takes a minute and more."""
    counts = {(rows, size): 2 if rows < 2e6 or float(size) < 4e4 else 1 for rows in ROWS for size in quickstart.LADDER}
    return chain(*(product(_at(size, rows), seeds(count)) for (rows, size), count in counts.items()))


def get_report() -> dict:
    return {"form": "kappa", "axes": {"N": "dense_params", "D": "examples"}}


def with_rows(points: Sweep, rows: int, searched: int, rule: str) -> Sweep:
    """Points whose rates are those of `searched` rows, with other rows and the rates of these."""
    found = []
    for point in points:
        rate = point["training.lr"] * (rows / searched) ** -RATE_EXPONENT[point["architecture"]]
        warmup = {"training.warmup_examples": min(WARMUP, rows // 20)}
        found.append(point | warmup | {"training.lr": float(f"{rate:.2g}")})
    return product(noted(found, lr_rule=rule, lr_bracketed=False), axis("training.examples", [rows]))


def _at(size: str, rows: int) -> Sweep:
    """Both architectures of a size of the quickstart with so many rows."""
    shapes = noted(quickstart.shapes(size), match_id=size)
    return with_rows(shapes, rows, SEARCHED_ROWS, "best of three at 1.75e6 rows, times a power of the rows")
