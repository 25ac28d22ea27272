"""Slots by a hash of the token: what a hash table does where a product-key memory learns its addresses.

    slot of read k = murmur3(the bits of x, seed_k) mod M        K seeds a head, drawn with the parameters

MurmurHash3 (Austin Appleby, public domain, the 32-bit form) of the D float32 numbers of a token, four bytes each; -0 is
hashed as 0. Slots are uniform whatever the tokens are, and M <= 2^20 leaves a bias of the remainder below .03 %. K = 1
is a table with collisions (the hashing trick); K rows summed are Bloom embeddings (arXiv 1706.03993).

A hash sees equality and nothing else, so tokens have to be codes that stay as they are: frozen vectors, one for each
discrete key, which reach the memory bit by bit. Training refuses anything else (`recscale.scaling.training.preflight`).

Letters: N reads (token-major, t*B + b), H heads, K slots per head, D token width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, UInt32

from .addressing import Found
from .options import MemoryOptions
from .value_table import Constant


class HashAddressing(nnx.Module):
    """x [T, B, D] -> K slots per head, with scores of 1: read_weights "none" sums the rows, "softmax" takes their mean.

    Args:
        options: slots, heads and slots per head, see `MemoryOptions`.
    """

    def __init__(self, options: MemoryOptions, *, rngs: nnx.Rngs):
        self.slots, self.heads, self.topk = options.virtual_sub_keys**2, options.memory_heads, options.memory_topk
        self.seeds = Constant(jax.random.bits(rngs.params(), (self.heads * self.topk,), jnp.uint32))

    def fold(self) -> None:
        """Nothing is to be folded: a hash is constant as it is."""

    def __call__(
        self, x: Float[Array, "T B D"], *, train: bool = False, valid: Bool[Array, " N"] | None = None
    ) -> Found:
        """train, valid: as of `Addressing`, which a hash needs to know nothing of."""
        x = x.astype(jnp.float32).reshape(-1, x.shape[-1])
        words = jax.lax.bitcast_convert_type(jnp.where(x == 0.0, 0.0, x), jnp.uint32)
        hashed = murmur3(words[:, None], self.seeds[...])
        ids = (hashed % jnp.uint32(self.slots)).astype(jnp.int32).reshape(-1, self.heads, self.topk)
        return Found(jnp.ones(ids.shape, jnp.float32), ids)


def murmur3(words: UInt32[Array, "*N D"], seed: UInt32[Array, "*S"]) -> UInt32[Array, "*M"]:
    """MurmurHash3_x86_32 of the little-endian bytes of D words; leading axes and seeds broadcast."""

    def rotate(x: Array, by: int) -> Array:
        return (x << by) | (x >> (32 - by))

    def mix(h: Array, word: Array) -> tuple[Array, None]:
        h = h ^ rotate(word * jnp.uint32(0xCC9E2D51), 15) * jnp.uint32(0x1B873593)
        return rotate(h, 13) * jnp.uint32(5) + jnp.uint32(0xE6546B64), None

    shape = jnp.broadcast_shapes(words.shape[:-1], seed.shape)
    h, _ = jax.lax.scan(mix, jnp.broadcast_to(seed, shape), jnp.moveaxis(words, -1, 0))
    h = h ^ jnp.uint32(4 * words.shape[-1])
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
