"""Ids of the known-truth log: which one a random word draws, and the signs an id stands for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from .config import BLOCK
from .world import World


def popular_id(world: World, word: jax.Array) -> jax.Array:
    """Id in popularity order from one word: top bits alias column, 5 bits member, 12 bits alias threshold."""
    column_bits = world.config.blocks.bit_length() - 1
    column = top_bits(word, world.config.blocks)
    member = (word >> np.uint32(27 - column_bits)) & np.uint32(BLOCK - 1)
    threshold = (word >> np.uint32(15 - column_bits)) & np.uint32(4095)
    entry = jnp.asarray(world.alias)[column]
    block = jnp.where(threshold < entry >> 16, column, entry & np.uint32(0xFFFF))
    return (block * np.uint32(BLOCK) + member).astype(jnp.int32)


def top_bits(word: jax.Array, values: int) -> jax.Array:
    """Uniform integer below a power of two from the top bits of a word (uint32)."""
    bits = values.bit_length() - 1
    return word >> np.uint32(32 - bits) if bits else jnp.zeros_like(word)


def code_words(world: World, first: int, ids: jax.Array) -> jax.Array:
    """Words of the ids (popularity order) of consecutive cross fields first, first + 1, ...: uint32, shaped as `ids`.

    ids: int32 [fields, ...]. Bit j, 1 <= j <= code_bits, is set where sign j is -1: bit j of the block's word XOR
    parity(member AND j), so that over the 32 ids of a block the signs are Walsh functions.
    """
    field = (first + jnp.arange(ids.shape[0])).reshape(-1, *(1,) * (ids.ndim - 1))
    mask = np.uint32(2 ** (world.config.code_bits + 1) - 2)
    return jnp.asarray(world.code_words)[field, ids // BLOCK] ^ (_walsh(ids) & mask)


def history_word(world: World, ids: jax.Array) -> jax.Array:
    """uint32 word of item ids: bit j, 0 <= j < d, is set where history sign j is -1 (Walsh functions 1 ... d)."""
    mask = np.uint32(2**world.config.code_width - 1)
    return jnp.asarray(world.history_words)[ids // BLOCK] ^ ((_walsh(ids) >> np.uint32(1)) & mask)


def signs(word: jax.Array, count: int, first: int) -> jax.Array:
    """Signs of bits first ... first + count - 1 of each word, appended as a last axis: int32 in {-1, 1}."""
    shift = jnp.arange(first, first + count, dtype=jnp.uint32)
    return 1 - 2 * ((word[..., None] >> shift) & 1).astype(jnp.int32)


def _walsh(ids: jax.Array) -> jax.Array:
    """Bit j, 0 <= j < 32, is parity(member AND j): the XOR of the j-patterns of the member's five bits."""
    word = jnp.uint32(0)
    for i, pattern in enumerate((0xAAAAAAAA, 0xCCCCCCCC, 0xF0F0F0F0, 0xFF00FF00, 0xFFFF0000)):
        word = word ^ jnp.where((ids >> i) & 1 == 1, np.uint32(pattern), np.uint32(0))
    return word
