"""A batch in parts, and blocks that are computed again: the numbers of the whole batch, less memory for activations."""

import dataclasses

import jax
import numpy as np
import pytest

from recscale.models.inputs import Field, Schema, Task
from recscale.scaling.bench.fixed_batch import FixedBatch
from recscale.scaling.counting.jaxpr_flops import Counting, count_flops
from recscale.scaling.training import get_config
from recscale.scaling.training.step import make_trainer

FIELDS = tuple(Field(f"f{i}", "user" if i < 2 else "candidate", 4, 50) for i in range(4))
SCHEMA = Schema(FIELDS, (), (Task("click"), Task("buy", weight=0.5)))
SETTINGS = {"tokens": 4, "width": 16, "hidden": 32, "layers": 2}


class PartlyLabelled(FixedBatch):
    """Tasks whose labels are known for different rows, and rows that are padding."""

    def batch(self, index):
        whole = super().batch(index)
        mask = np.asarray(whole.label_mask).copy()
        mask[3:11, :, 1] = 0
        valid = np.asarray(whole.valid).copy()
        valid[-3:] = False
        return dataclasses.replace(whole, label_mask=mask, valid=valid)


def trainer_of(name="rankmixer", replicas=2, settings=SETTINGS, requests=24, **training):
    config = get_config(name)
    config.model.update(settings)
    config.training.update({"eps": 1e-3, **training})
    return make_trainer(config, PartlyLabelled(SCHEMA, requests), [(i, 3e-3) for i in range(replicas)], warmup=1)


def after(trainer, steps=3):
    state, batch = trainer.fresh_state(), trainer.put(trainer.source.batch(0))
    for _ in range(steps):
        state, metrics = trainer.step(state, batch)
    return jax.device_get((state, metrics))


def assert_close(one, other):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5, err_msg=jax.tree_util.keystr(path))


def test_parts_and_recomputation_change_no_number():
    whole = after(trainer_of())
    assert_close(whole, after(trainer_of(accumulate=4, remat="blocks")))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tokenmixer_large", "ug_rankmixer", "hiformer", "wukong"])
def test_blocks_of_every_kind_are_recomputed(name):
    settings = {"width": 16, "hidden": 16, "layers": 2}
    for remat in ("dots", "blocks"):
        assert_close(after(trainer_of(name, 1, settings)), after(trainer_of(name, 1, settings, remat=remat)))


def test_recomputation_keeps_less_and_computes_at_most_a_third_more():
    wide = {"tokens": 4, "width": 32, "hidden": 64, "layers": 6}
    peaks, flops = [], []
    for remat in ("none", "blocks"):
        trainer = trainer_of(replicas=1, settings=wide, requests=4096, remat=remat)
        batch = trainer.source.batch(0)
        peaks.append(
            trainer.program.lower(trainer.state_shapes(), batch).compile().memory_analysis().temp_size_in_bytes
        )
        flops.append(count_flops(trainer.program, trainer.state_shapes(), batch, counting=Counting(recomputed=True)))
    assert peaks[1] < peaks[0] and flops[0] < flops[1] < 4 / 3 * flops[0]


def test_what_has_no_effect_or_cannot_be_is_refused():
    with pytest.raises(ValueError, match="training.remat=blocks would be ignored: .* has no blocks"):
        trainer_of("dlrm_mlp", 1, {}, remat="blocks")
    with pytest.raises(ValueError, match="training.remat is 'bloks', expected one of none, dots, blocks"):
        trainer_of(remat="bloks")
    memory = {**SETTINGS, "memory_slots": 64, "memory_topk": 2}
    with pytest.raises(ValueError, match="memory values that train by rows"):
        trainer_of("msn", 1, memory, remat="blocks")
    with pytest.raises(ValueError, match="training.accumulate is 2, which does not go with"):
        trainer_of("msn", 1, memory, accumulate=2)
