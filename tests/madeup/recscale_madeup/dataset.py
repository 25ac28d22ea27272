"""Biased coins: a click is likelier for even items. Endless rows, drawn by number."""

import numpy as np

from recscale.models.inputs import Batch, CandidateSide, Field, Schema, Task, UserSide
from recscale.scaling.data.metrics import evaluate, evaluate_binary

HOLDOUT = 2**40  # batches from here on are never trained on


class Coins:
    """A `Source`: a user's coin and an item's parity decide."""

    on_device, total_rows, batches = False, None, None

    def __init__(self, asked):
        self.requests, self.candidates, self.seed = asked.requests, asked.candidates, asked.config.log_seed
        self.gap = asked.config.overrides.get("gap", 0.3)
        self.held = -(-(asked.config.holdout_rows or 512) // (self.requests * self.candidates))
        fields = (Field("user", "user", 4, vocabulary=10), Field("item", "candidate", 4, vocabulary=20))
        self.schema = Schema(fields=fields, tasks=(Task("heads"),))

    def batch(self, index):
        rng, shape = np.random.default_rng([self.seed, int(index)]), (self.requests, self.candidates)
        item = rng.integers(20, size=shape, dtype=np.int32)
        labels = (rng.random(shape) < 0.5 + self.gap * (0.5 - item % 2)).astype(np.float32)[..., None]
        user = UserSide({"user": rng.integers(10, size=self.requests, dtype=np.int32)}, {}, {})
        return Batch(user, CandidateSide({"item": item}, {}), labels, np.ones_like(labels), np.ones(shape, bool))

    def iterate(self, start):
        while True:
            yield self.batch(start)
            start += 1

    def holdout(self):
        return (self.batch(HOLDOUT + index) for index in range(self.held))

    def evaluate(self, logits, metrics=()):
        held = list(self.holdout())
        labels = np.stack([batch.labels for batch in held])[..., 0]
        users = np.stack([np.broadcast_to(batch.user.ids["user"][:, None], batch.valid.shape) for batch in held])
        further = evaluate(metrics, logits[..., 0], labels, mask=np.ones(labels.shape, bool), groups=users)
        return evaluate_binary(logits[..., 0], labels, groups=users) | further

    def facts(self):
        return {"name": "coins", "seed": self.seed, "gap": self.gap, "rejected": {}}
