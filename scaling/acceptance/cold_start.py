"""PROMO on cold items of the known-truth log, beside the most that anything could gain there.

Two towers are trained on the first half of a log whose items have biases and signs, and frozen; PROMO (a reconstruction
of arXiv 2412.18082) trains prompts beside them on the second. Its control trains the towers themselves on. A row's
excess loss is exact, KL(p* || p), so is the bound: Bayes' rule for whoever knows all but the item's bias, and of the
item its rows in the whole log (`known_truth.item_bias`). Rows are grouped by their item's positives in that log.

    recscale bench cold-start
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from flax import nnx

from recscale.models.domains.promo import BEST, COLD, ITEM, NETWORK, USER, WORST, PromoConfig, promo_schema
from recscale.models.domains.two_tower import TwoTower
from recscale.models.inputs import Batch, CandidateSide, Schema, UserSide
from recscale.models.inputs.tables import embed, table_lookup
from recscale.scaling.data.feedback_lists import (
    Feedback,
    Lists,
    feedback_lists,
    feedback_value,
    popular_neighbours,
)
from recscale.scaling.data.known_truth.batches import make_batch, make_schema
from recscale.scaling.data.known_truth.config import KnownTruthConfig
from recscale.scaling.data.known_truth.exact import truth
from recscale.scaling.data.known_truth.expectations import divergence
from recscale.scaling.data.known_truth.item_bias import bayes_logits, fresh_excess, item_weights, rest_of_logit
from recscale.scaling.data.known_truth.logit_parts import HISTORY_CODE
from recscale.scaling.data.known_truth.world import World, build_world
from recscale.scaling.training import get_config
from recscale.scaling.training.step import Trainer, TrainState, make_trainer

from .paired import paired_differences, require_pairs, study

TWO_TOWER, PROMO = "recscale.models.domains.two_tower:TWO_TOWER", "recscale.models.domains.promo:PROMO"
# Biases and a history, half each; 2,048 items whose popularity falls as 1 / rank of their block. Signs of the history
# are given, so taste is known of every item: what is missing of a cold one is its bias.
WORLD = KnownTruthConfig(
    b=-1.7, shares=(0.0, 0.5, 0.0, 0.5), codes="oracle_history", code_bits=1, blocks=64, history_max=16,
    match_groups=1, code_width=8, embedding_width=8, timestamps=False,
)  # fmt: skip
# "promo_plain" has neither auxiliary loss, "promo_shared" one network for all items.
PROMPTS = {
    "promo": PromoConfig(),
    "promo_plain": PromoConfig(lambda1=0.0, lambda2=0.0),
    "promo_shared": PromoConfig(generator="shared"),
}
ARMS = ("frozen", "longer", *PROMPTS)
USERS = PromoConfig().users
# Rates tried of everything, on a stream that no seed of a study has.
BASE_RATES, RATES, TUNING_SEED = (3e-3, 1e-2, 3e-2), (1e-4, 1e-3, 1e-2), 1000
# Positives of an item in the training log: from each number to the next.
BUCKETS = {"0": (0, 1), "1-2": (1, 3), "3-9": (3, 10), "<10": (0, 10), "10+": (10, 2**31)}


@dataclasses.dataclass(frozen=True)
class ColdStart:
    """Sizes: requests of a batch and their candidates, batches of the log, of which the base has the first half, and of
    the evaluation; width of the base's vectors; share of items that are cold, and how many neighbours they borrow from.
    """

    requests: int = 128
    candidates: int = 4
    batches: int = 160
    holdout: int = 40
    width: int = 16
    cold_share: float = 0.8
    neighbours: int = 5


@dataclasses.dataclass(frozen=True)
class Rows:
    """Batches of a log, on the host, stacked [N, R, C]: user, item and label of rows, in order."""

    batches: Batch
    user: np.ndarray
    item: np.ndarray
    label: np.ndarray

    def each(self) -> Iterator[Batch]:
        """One after the other."""
        for index in range(len(self.batches.valid)):
            yield jax.tree.map(lambda x, i=index: x[i], self.batches)


@dataclasses.dataclass(frozen=True)
class Log(Rows):
    """A known-truth log, in the order of time, with the truth of its rows."""

    rest: np.ndarray
    noise_sd: np.ndarray
    p: np.ndarray
    q: np.ndarray


class _Batches:
    """As much of a source as a trainer needs that is handed its batches."""

    on_device, total_rows, batches = False, None, None

    def __init__(self, schema: Schema, sizes: ColdStart):
        self.schema, self.requests, self.candidates = schema, sizes.requests, sizes.candidates


def base_schema(config: KnownTruthConfig) -> Schema:
    """What the towers see of a log: the ids of user and item, and the signs of the history."""
    schema = make_schema(config)
    kept = tuple(field for field in schema.fields if field.name in ("user", "item", HISTORY_CODE))
    return dataclasses.replace(schema, fields=kept)


def draw_log(world: World, log_seed: int, sizes: ColdStart, *, evaluation: bool = False) -> Log:
    """The first batches of a stream, or of what no training reads of it, with their truth."""
    make = jax.jit(lambda seed, k: make_batch(world, seed, k, sizes.requests, sizes.candidates, evaluation))
    count = sizes.holdout if evaluation else sizes.batches
    drawn = [jax.device_get(make(np.uint32(log_seed), np.int32(k))) for k in range(count)]
    rows = [truth(world, batch) for batch in drawn]
    item = np.stack([batch.candidates.ids["item"] for batch in drawn])
    user = np.broadcast_to(np.stack([batch.user.ids["user"] for batch in drawn])[..., None], item.shape)
    columns = [
        user,
        item,
        np.stack([batch.labels[..., 0] for batch in drawn]),
        np.stack([rest_of_logit(row) for row in rows]),
        *(np.stack([getattr(row, name)[..., 0] for row in rows]) for name in ("noise_sd", "p", "q")),
    ]
    stacked = jax.tree.map(lambda *x: np.stack(x), *drawn)
    return Log(stacked, *(column.reshape(-1) for column in columns))


def train(trainer: Trainer, state: TrainState, batches: Sequence[Batch]) -> TrainState:
    """One pass; the rate falls to 0 over the last fifth."""
    steps = len(batches)
    falls = max(steps // 5, 1)
    start = int(state.step)
    state = _changed(state, decay_from=start + steps - falls, decay_steps=falls)
    for batch in batches:
        state, _ = trainer.step(state, batch)
    return state


def _changed(state: TrainState, **values: Any) -> TrainState:
    """A state with other numbers, bound to where the old ones are, or the step would be compiled anew."""
    old = {name: getattr(state, name) for name in values}
    new = {name: jnp.asarray(value, old[name].dtype) for name, value in values.items()}
    return dataclasses.replace(state, **{name: jax.device_put(x, old[name].sharding) for name, x in new.items()})


def logits_of(trainer: Trainer, state: TrainState, batches: Iterable[Batch]) -> np.ndarray:
    """Of all rows, in order."""
    return np.concatenate([trainer.batch_logits(state, batch)[0].reshape(-1) for batch in batches])


@dataclasses.dataclass(frozen=True)
class Frozen:
    """Vectors of a trained base, users of every request of the log and of the evaluation and every item, and what was
    made of them: which items are cold, and the lists of all rows, which number rows of the log."""

    users: np.ndarray
    late_users: np.ndarray
    items: np.ndarray
    cold: np.ndarray
    lists: Lists
    late_lists: Lists


def base_vectors(
    trainer: Trainer, state: TrainState, parts: Sequence[Rows], width: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """A base's vectors of the users of every request of each part, and of the items in them."""
    model, tables = nnx.merge(*trainer.model_state(state)), jax.tree.map(lambda t: t[0], state.tables)
    assert isinstance(model, TwoTower)
    graph, weights = nnx.split(model)

    @jax.jit
    def vectors_of(weights: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        model, inputs = nnx.merge(graph, weights), embed(trainer.schema, batch, table_lookup(tables))
        return model.user_vector(inputs.user), model.item_vector(inputs.candidates)

    made, items = [], np.zeros((trainer.schema.tables()["item"][0], width), np.float32)
    for part in parts:
        own, theirs = zip(*(jax.device_get(vectors_of(weights, batch)) for batch in part.each()), strict=True)
        made.append(np.concatenate(own))
        items[part.item] = np.concatenate(theirs).reshape(-1, width)
    return made, items


def cold_items(items: np.ndarray, log: Rows, sizes: ColdStart) -> tuple[np.ndarray, np.ndarray]:
    """Which items are cold by the positives that were known when the base was frozen, and whom each borrows from."""
    known = len(log.item) // 2
    positives = np.bincount(log.item[:known], weights=log.label[:known], minlength=len(items)).astype(np.int64)
    return popular_neighbours(items, positives, cold_share=sizes.cold_share, count=sizes.neighbours)


def prompted(frozen: Frozen, log: Rows, sizes: ColdStart, config: PromoConfig, *, late: bool) -> Iterator[Batch]:
    """Batches of `promo_schema` for a log, or for its evaluation."""
    lists = frozen.late_lists if late else frozen.lists
    users = frozen.late_users if late else frozen.users
    shape = log.batches.valid.shape
    items, labels = log.item.reshape(shape), log.label.reshape(*shape, 1)
    best, worst = (array.reshape(*shape, -1) for array in lists)

    def vectors(rows: np.ndarray) -> np.ndarray:
        """Users of listed rows side by side; rows are always of the training log."""
        found = np.where(rows[..., None] >= 0, frozen.users[np.maximum(rows, 0) // sizes.candidates], 0.0)
        return found.reshape(*shape[1:], -1).astype(np.float32)

    for k, own in enumerate(users.reshape(*shape[:2], -1)):
        columns = {BEST: vectors(best[k])}
        # Only training, by PFPE, asks for the worst.
        columns[WORST] = np.zeros_like(columns[BEST]) if late else vectors(worst[k])
        columns |= {ITEM: frozen.items[items[k]], COLD: frozen.cold[items[k]][..., None].astype(np.float32)}
        ids = {NETWORK: items[k]} if config.generator == "table" else {}
        side, ones = UserSide({}, {USER: own}, {}), np.ones_like(labels[k])
        yield Batch(side, CandidateSide(ids, columns), labels[k], ones, np.ones(shape[1:], bool))


def trainer_of(
    name: str, schema: Schema, sizes: ColdStart, rate: float, seed: int, model: Mapping[str, Any]
) -> Trainer:
    """Adam at a rate; PROMO's networks as well, those of the batch's items alone. model: flags."""
    config = get_config(name)
    config.model.update(dict(model))
    config.training.optimizer = "adam"
    if name == PROMO:
        config.training.embedding_optimizer, config.training.embedding_lr = "rowwise_adam", rate
        config.training.embedding_init_std = 0.0  # the identity is a network's beginning
    warm = max(sizes.batches // 20, 1)
    handed: Any = _Batches(schema, sizes)  # no whole source: batches are handed to the steps
    return make_trainer(config, handed, [(seed, rate)], warm)


class Study:
    """One log, a base trained on its first half and frozen, and every arm's logits for the rows of the evaluation.

    schema: what the base reads, `item` among it. passes: over either half of the log.
    """

    passes = 1

    def __init__(self, schema: Schema, sizes: ColdStart, seed: int, logs: tuple[Rows, Rows], base_rate: float):
        self.schema, self.sizes, self.seed, self.base_rate = schema, sizes, seed, base_rate
        self.log, self.late = logs
        self.rows = list(self.log.each())
        self.half, self.items = len(self.rows) // 2, schema.tables()["item"][0]

    @functools.cached_property
    def base(self) -> Trainer:
        """Of the two towers."""
        model = {"width": self.sizes.width, "hidden": ()}
        return trainer_of(TWO_TOWER, self.schema, self.sizes, self.base_rate, self.seed, model)

    @functools.cached_property
    def state(self) -> TrainState:
        """The base as it is frozen."""
        return train(self.base, self.base.fresh_state(), self.rows[: self.half] * self.passes)

    def vectors(self) -> tuple[list[np.ndarray], np.ndarray]:
        """The base's, of the users of the log and of the evaluation, and of items."""
        return base_vectors(self.base, self.state, (self.log, self.late), self.sizes.width)

    @functools.cached_property
    def frozen(self) -> Frozen:
        """The base's vectors, and lists made with its neighbours."""
        log, late = self.log, self.late
        (users, late_users), items = self.vectors()
        cold, neighbours = cold_items(items, log, self.sizes)
        request = np.arange(len(log.item)) // self.sizes.candidates
        feedback = Feedback(request, log.user, log.item, feedback_value(log.label), log.label > 0)
        lists, late_lists = feedback_lists(feedback, USERS, neighbours, then=(late.user, late.item))
        assert late_lists is not None
        return Frozen(users, late_users, items, cold, lists, late_lists)

    def loss(self, logits: np.ndarray) -> float:
        """What rates are chosen by: the observed logloss of the evaluation."""
        return float(np.mean(np.logaddexp(0.0, logits) - self.late.label * logits))

    def logits(self, arm: str, rate: float) -> np.ndarray:
        """Of an arm that trains at this rate; "frozen" has none."""
        if arm == "frozen":
            return logits_of(self.base, self.state, self.late.each())
        if arm == "longer":
            state = _changed(jax.tree.map(jnp.copy, self.state), rate=[rate])
            state = train(self.base, state, self.rows[self.half :] * self.passes)
            return logits_of(self.base, state, self.late.each())
        config = PROMPTS[arm]
        schema = promo_schema(self.sizes.width, self.items, config)
        trainer = trainer_of(PROMO, schema, self.sizes, rate, self.seed, dataclasses.asdict(config))
        given = list(prompted(self.frozen, self.log, self.sizes, config, late=False))
        state = train(trainer, trainer.fresh_state(), given[self.half :] * self.passes)
        return logits_of(trainer, state, prompted(self.frozen, self.late, self.sizes, config, late=True))


def find_rates(
    study_at: Callable[[float], Study], base_rates: Sequence[float] = BASE_RATES, rates: Sequence[float] = RATES
) -> dict[str, tuple[float, bool]]:
    """The rate of every arm with the lowest loss, and whether it lies inside those tried.

    study_at: a study whose base is trained at a rate, on a stream of its own.
    """

    def best(losses: Mapping[float, float]) -> tuple[float, bool]:
        rate = min(losses, key=lambda rate: losses[rate])
        return rate, min(losses) < rate < max(losses)

    studies = {rate: study_at(rate) for rate in base_rates}
    found = {"frozen": best({rate: study.loss(study.logits("frozen", 0.0)) for rate, study in studies.items()})}
    study = studies[found["frozen"][0]]
    for arm in ARMS[1:]:
        found[arm] = best({rate: study.loss(study.logits(arm, rate)) for rate in rates})
    return found


def one_seed(world: World, sizes: ColdStart, seed: int, rates: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Excess loss of every evaluated row by arm and of Bayes' rule, and the positives of its item ("positives")."""
    log, late = draw_log(world, seed, sizes), draw_log(world, seed, sizes, evaluation=True)
    study = Study(base_schema(world.config), sizes, seed, (log, late), rates["frozen"])
    logits = {arm: study.logits(arm, rates[arm]) for arm in ARMS}
    weights = item_weights(world, log.item, log.rest, log.noise_sd, log.label)
    logits["bayes"] = bayes_logits(world, late.item, late.rest, late.noise_sd, weights)
    found = {name: divergence(late.p, late.q, values) for name, values in logits.items()}
    return found | {"positives": np.bincount(log.item, weights=log.label, minlength=world.config.vocabulary)[late.item]}


def compare_cold_start(
    *,
    seeds: int = 5,
    sizes: ColdStart = ColdStart(),  # noqa: B008
    save: str | Path | None = None,
) -> dict[str, Any]:
    """A row for every bucket of positives and arm: mean excess loss over seeds, what it saves on the frozen base with
    the 95 % interval of paired seeds, and the most that anything could save (`bound`). An ordering is confirmed where
    the interval lies above 0, refuted where it lies below, and otherwise not resolved; see `summarise`.

    Seed k has a log and initial parameters of its own, the same for all arms. save: a parquet file for every seed.

    Raises:
        ValueError: fewer than two seeds, which have no interval.
    """
    require_pairs(seeds)
    world = build_world(WORLD)
    logs = draw_log(world, TUNING_SEED, sizes), draw_log(world, TUNING_SEED, sizes, evaluation=True)
    found = find_rates(lambda rate: Study(base_schema(WORLD), sizes, TUNING_SEED, logs, rate))
    rates = {arm: rate for arm, (rate, _) in found.items()}
    runs = [row for seed in range(seeds) for row in by_bucket(one_seed(world, sizes, seed, rates), seed)]
    about = {"seeds": seeds, "world": WORLD.hash, **dataclasses.asdict(sizes), "fresh_excess": fresh_excess(WORLD)}
    return study(about, with_rates(runs, found), summarise, save)


def with_rates(runs: Sequence[Mapping[str, Any]], found: Mapping[str, tuple[float, bool]]) -> pd.DataFrame:
    """A table of runs with the rate of each arm, and whether it lies inside those tried."""
    of_rates = pd.DataFrame([(*pair, arm) for arm, pair in found.items()], columns=["rate", "bracketed", "method"])
    return pd.DataFrame(runs).merge(of_rates, on="method")


def by_bucket(found: Mapping[str, np.ndarray], seed: int) -> list[dict[str, Any]]:
    """A row for every bucket of positives and arm of one seed's evaluation."""
    rows = []
    for name, (low, high) in BUCKETS.items():
        kept = (found["positives"] >= low) & (found["positives"] < high)
        if not kept.any():
            continue
        means = {arm: float(found[arm][kept].mean()) for arm in (*ARMS, "bayes")}
        about = {"positives": name, "seed": seed, "share_of_rows": float(kept.mean())}
        bound = means["frozen"] - means["bayes"]
        rows += [about | {"method": arm, "excess": means[arm], "bound": bound} for arm in ARMS]
    return rows


def summarise(runs: pd.DataFrame) -> pd.DataFrame:
    """The rows of `compare_cold_start` from those of every seed; an arm whose rate is not bracketed gets no verdict."""
    return without_loose_ends(paired_differences(runs, "excess", "frozen", ("positives",)))


def without_loose_ends(found: pd.DataFrame) -> pd.DataFrame:
    """Rows of `paired_differences` whose arms at an outermost rate have no verdict."""
    loose = (found["bracketed"] < 1) & (found["verdict"] != "")
    found.loc[loose, "verdict"] = "trend: best at an outermost rate"
    return found
