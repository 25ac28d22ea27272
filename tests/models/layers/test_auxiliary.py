"""Heads on lower blocks: which blocks have one, what is refused, and what their losses are made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recscale.models.layers.auxiliary import AuxiliaryHeads, AuxiliaryOptions, auxiliary_params


def test_blocks_with_a_head():
    found = [AuxiliaryOptions().auxiliary_blocks(layers) for layers in (1, 2, 4, 5)]
    assert found == [(), (1,), (2,), (2,)]
    assert AuxiliaryOptions(aux_layers=(1, 3)).auxiliary_blocks(4) == (1, 3)
    assert AuxiliaryOptions(aux_weight=0.0).auxiliary_blocks(4) == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(aux_layers=(0,)), "expected blocks from 1 to 3, each once"),
        (dict(aux_layers=(4,)), "expected blocks from 1 to 3"),
        (dict(aux_layers=(1, 1)), "each once"),
        (dict(aux_weight=0.0, aux_layers=(1,)), r"aux_layers is \(1,\) and has no effect: aux_weight is 0"),
        (dict(aux_weight=0.0, aux_mode="independent"), "aux_mode is 'independent' and has no effect"),
        (dict(aux_weight=0.0, aux_stop_gradient=True), "aux_stop_gradient is True and has no effect"),
        (dict(aux_mode="independent", aux_stop_gradient=True), "aux_stop_gradient is True and has no effect"),
    ],
    ids=str,
)
def test_what_has_no_effect_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AuxiliaryOptions(**options).check_auxiliary(4)


def test_blocks_on_either_end_are_allowed():
    for options in (dict(), dict(aux_layers=(1, 3)), dict(aux_stop_gradient=True), dict(aux_weight=0.0)):
        AuxiliaryOptions(**options).check_auxiliary(4)


@pytest.mark.parametrize("mode, stopped", [("joint", False), ("joint", True), ("independent", False)])
def test_logits_of_the_losses(mode, stopped):
    options = AuxiliaryOptions(aux_mode=mode, aux_weight=0.3, aux_stop_gradient=stopped)
    heads = nnx.eval_shape(lambda: AuxiliaryHeads(4, 2, layers=(1, 2), options=options, rngs=nnx.Rngs(0)))
    high, low = np.arange(12.0).reshape(6, 2), [np.full((6, 2), 0.5), np.full((6, 2), -2.0)]

    def logits(high):
        return heads.loss_logits(high, [jnp.asarray(z) for z in low], (3, 2, -1))

    found = logits(jnp.asarray(high))
    assert {name: weight for name, (weight, _) in found.items()} == dict(main=1.0, auxiliary_1=0.15, auxiliary_2=0.15)
    np.testing.assert_array_equal(found["main"][1], high.reshape(3, 2, 2))
    for name, z in zip(("auxiliary_1", "auxiliary_2"), low, strict=True):
        np.testing.assert_array_equal(found[name][1], (z + high * (mode == "joint")).reshape(3, 2, 2))
    slope = jax.grad(lambda high: logits(high)["auxiliary_2"][1].sum())(jnp.asarray(high))
    assert (np.asarray(slope) == (mode == "joint" and not stopped)).all()
    assert heads.loss_logits(jnp.asarray(high), [], (3, 2, -1)) == {}


def test_a_head_has_a_gain_and_a_tower_per_task():
    """D gains, and D weights and a bias for each of Y tasks."""
    assert auxiliary_params(4, 2) == 4 + 2 * (4 + 1)
