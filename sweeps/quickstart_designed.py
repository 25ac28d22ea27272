"""The runs that `recscale design` names for the quickstart's RankMixer, to know its exponent to within .02.

    recscale design notebooks/runs/quickstart.parquet --form power --target excess_logloss --axes dense_params \
        --where "architecture == 'rankmixer'" --goal alpha=.02
    recscale sweep quickstart_designed --out runs/quickstart_designed --no-report

Twenty-five runs at thirteen sizes inside the ladder, and four beyond it that ask whether the law goes on: it does not
(notebooks/runs/quickstart.md). Shapes are those of eight tokens nearest to the sizes it names. Rates lie between those
of the neighbours, beyond the ladder on a line through them in logarithms, and were not searched.
"""

from ml_collections import ConfigDict

from recscale.sweeps import Sweep, chain, noted, product, quickstart, seeds

# Size that was asked for: width and hidden width of a RankMixer of eight tokens and one block; rate; seeds.
NAMED = {
    "3.35e3": (8, 9, 1.4e-2, 4),
    "4.16e3": (8, 15, 1.05e-2, 4),
    "5.17e3": (16, 4, 7.5e-3, 4),
    "7.37e3": (16, 12, 7.5e-3, 1),
    "8.46e3": (16, 16, 8e-3, 1),
    "9.72e3": (24, 8, 8.5e-3, 1),
    "4.16e4": (56, 29, 5.1e-3, 1),
    "5.75e4": (72, 33, 4.4e-3, 1),
    "6.57e4": (72, 40, 4.2e-3, 1),
    "7.52e4": (80, 42, 4e-3, 1),
    "9.24e4": (96, 43, 3.7e-3, 2),
    "9.94e4": (96, 48, 3.6e-3, 2),
    "1.07e5": (104, 47, 3.5e-3, 2),
}
BEYOND = {"2.21e5": (152, 76, 2.5e-3, 2), "4.23e5": (216, 108, 1.9e-3, 2)}
RUNS = NAMED | BEYOND


def get_config() -> ConfigDict:
    return quickstart.get_config()


def get_sweep() -> Sweep:
    return chain(*(product(_shape(size), seeds(RUNS[size][3])) for size in RUNS))


def _shape(size: str) -> Sweep:
    width, hidden, rate, _ = RUNS[size]
    model = {"model.layers": 1, "model.tokens": 8, "model.width": width, "model.hidden": hidden}
    searched = dict(lr_rule="a line through the rates of the quickstart", lr_bracketed=False)
    return noted([{"architecture": "rankmixer", **model, "training.lr": rate}], match_id=size, **searched)
