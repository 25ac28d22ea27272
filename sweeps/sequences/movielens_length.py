"""Loss against history length on MovieLens-100K, one pass: three ways to read the ratings a user gave before.

Six lengths at one size and one rate, three seeds. 80,000 rows carry no exponent (the report says what it refuses); what
the sweep shows is whether more history helps at all on real data, and by how much beside the noise of seeds.

    recscale data movielens-100k --out DIR
    recscale sweep movielens_length --data DIR --out runs/movielens_length

Not run yet at this size: no figure of it has been committed.
"""

from ml_collections import ConfigDict

from recscale.scaling.training import get_config as base_config
from recscale.sweeps import Sweep, architectures, by_dense_params, by_history_length, chain, product, seeds
from recscale.sweeps.base import power_law
from recscale.sweeps.sequences.length_ladder import SETTINGS

LENGTHS = [3, 6, 12, 24, 50, 100]
SIZE = 6e4


def get_config() -> ConfigDict:
    config = base_config("din+rankmixer", "stored")
    config.training.requests = 256
    config.training.passes = 0  # one pass in the log's order, every row of it, with nothing to learn by heart
    config.training.lr, config.training.weight_decay, config.training.embedding_l2 = 1e-3, 0.0, 0.0
    config.data.order = "time"
    config.training.warmup_examples = None
    return config


def get_sweep() -> Sweep:
    settings = {name: SETTINGS[name] for name in ("din+rankmixer", "longer+rankmixer", "mixformer")}
    settings["longer+rankmixer"] = SETTINGS["longer+rankmixer"] | {"model.encoder.max_length": max(LENGTHS)}
    models = chain(*(product(architectures([name]), [values]) for name, values in settings.items()))
    return product(models, by_dense_params([SIZE]), by_history_length(LENGTHS), seeds(3))


def get_report() -> dict:
    return power_law("history_length")
