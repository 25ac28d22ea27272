"""Mix and Revert: permutations, checked bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recscale.models.layers.mixing import mix, mix_token_major, revert, revert_token_major


def tokens(rows, count, width):
    return jnp.asarray(np.random.default_rng(0).standard_normal((rows, count, width)), jnp.float32)


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 12])
def test_revert_undoes_mix_for_every_divisor(heads):
    x = tokens(5, 4, 12)
    mixed = mix(x, heads)
    assert mixed.shape == (5, heads, 4 * 12 // heads)
    np.testing.assert_array_equal(revert(mixed, 4), x)


def test_mix_is_an_involution_when_heads_equal_tokens():
    x = tokens(5, 4, 12)
    np.testing.assert_array_equal(mix(mix(x, 4), 4), x)
    np.testing.assert_array_equal(mix(x, 4), revert(x, 4))


def test_slot_t_of_row_h_is_head_h_of_token_t():
    x = tokens(2, 3, 6)
    mixed = mix(x, 3)
    for h in range(3):
        for t in range(3):
            np.testing.assert_array_equal(mixed[:, h, 2 * t : 2 * t + 2], x[:, t, 2 * h : 2 * h + 2])


@pytest.mark.parametrize("heads", [2, 4])
def test_every_mixed_row_depends_on_every_token(heads):
    jacobian = jax.jacobian(lambda x: mix(x[None], heads)[0])(tokens(1, 4, 12)[0])
    assert (jnp.abs(jacobian).sum(axis=(1, 3)) > 0).all()  # [H, T]


@pytest.mark.parametrize("heads", [2, 4, 12])
def test_layouts_agree(heads):
    x = tokens(5, 4, 12)
    np.testing.assert_array_equal(mix_token_major(x.swapaxes(0, 1), heads).swapaxes(0, 1), mix(x, heads))
    mixed = mix(x, heads)
    np.testing.assert_array_equal(revert_token_major(mixed.swapaxes(0, 1), 4).swapaxes(0, 1), revert(mixed, 4))


def test_indivisible_width_is_refused():
    with pytest.raises(ValueError, match="width 12 into 5"):
        mix(tokens(1, 5, 12), 5)
