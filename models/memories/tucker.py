"""Tucker scores (UltraMem, arXiv 2411.12364): slots scored by a small core instead of a sum.

    S_a [N,H,n,r]   = q_a . K_a                               keys [H,2,n,p,r], one score vector of r per sub-key
    score(i,j)      = S_row[i] C S_col[j]^T,  C = sum_c C_c   cores C_c [r,r] per head
    stage 1         the K best rows by S_row u and columns by S_col v, u and v the leading singular pair of C
    stage 2         the K best of the K*K pairs by score; core c weighs its own slice of the value by S_row C_c S_col^T

Stage 1 is a heuristic: the K*K grid may miss part of the best slots, and no pair of ranks may be left out of it. u and
v are state, refreshed from C before every training batch (their common sign stays closest to the previous one), without
gradient. With r = 2, C = [[0,1],[1,0]] and a constant second component the score is the additive one.

Letters: N reads, H heads, n sub-keys, p key width, r rank, m cores, K slots per head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from recscale.models.layers import param
from recscale.pallas_kernels.chunks import map_rows, rows_within
from recscale.pallas_kernels.product_key_topk.reference import comparable

from .addressing import Found, SlotSearch, draw_keys
from .options import MemoryOptions
from .value_table import Constant

# Most bytes of scores alive at once.
_LIMIT_BYTES = 64 * 2**20


class SingularVectors(nnx.Variable):
    """State of the first stage: changed by training steps only, part of the checkpoint, not a parameter."""


class TuckerAddressing(SlotSearch):
    """x [T, B, D] -> scores [N, H, K], or [N, m, H, K] for m > 1 cores (selected by their sum), and ids [N, H, K].

    Scores are not scaled by 1/sqrt p, as in the paper; `norm_gain_power` is its remedy. Arguments as of `Addressing`.
    """

    def __init__(
        self, tokens: int, width: int, options: MemoryOptions, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ):
        super().__init__(tokens, width, options, dtype=dtype, rngs=rngs)
        rank, cores, heads = options.tucker_rank, options.tucker_cores, options.memory_heads
        self.cores = cores
        shape = (rank, heads, 2, options.virtual_sub_keys, options.key_width)
        keys = draw_keys(rngs, shape, options.key_init)
        self.keys = param.matrix(keys, ("rank", "heads", "axes", "sub_keys", "key"))
        noise = 0.1 * jax.random.normal(rngs.params(), (cores, heads, rank, rank)) / rank
        core = jnp.broadcast_to(jnp.eye(rank) / cores, noise.shape) + noise
        self.core = param.matrix(core, ("cores", "heads", "rank", "rank"))
        self.left = SingularVectors(jnp.zeros((heads, rank)))
        self.right = SingularVectors(jnp.zeros((heads, rank)))
        self.refresh()

    def refresh(self) -> None:
        """Sets u and v to the leading singular pair of C, with the sign nearest to the previous u."""
        u, _, vt = jnp.linalg.svd(jax.lax.stop_gradient(jnp.sum(self.core[...], axis=0)))
        u, v = u[:, :, 0], vt[:, 0, :]
        # At first there is no previous vector: the larger sum is made positive.
        like = jnp.where(jnp.any(self.left[...] != 0, axis=-1, keepdims=True), self.left[...], 1.0)
        sign = jnp.where(jnp.sum(u * like, axis=-1, keepdims=True) < 0, -1.0, 1.0)
        self.left[...], self.right[...] = u * sign, v * sign

    def effective_keys(self) -> Float[Array, "r H 2 n p"]:
        """Normed keys [r, H, 2, n, p]."""
        return self.normed(self.keys[...])

    def fold(self) -> None:
        """Replaces keys and key norm by constants, for serving."""
        self.keys, self.key_norm = Constant(self.effective_keys()), None

    def __call__(
        self, x: Float[Array, "T B D"], *, train: bool = False, valid: Bool[Array, " N"] | None = None
    ) -> Found:
        if train:
            self.refresh()
        q = self.ask(x, train=train, valid=valid)
        q = jnp.broadcast_to(q, (q.shape[0], self.heads, *q.shape[2:])).astype(jnp.float32)
        keys, core, k = self.effective_keys(), self.core[...], self.topk
        sub_keys, rank = keys.shape[3], keys.shape[0]
        u, v = jax.lax.stop_gradient((self.left[...], self.right[...]))

        def search(q):
            s = jnp.einsum("nhap,rhamp->nhamr", q, keys)
            # Two products, not one over both axes: u and v differ.
            first = [jnp.einsum("nhmr,hr->nhm", s[:, :, a], w) for a, w in enumerate((u, v))]
            _, index = jax.lax.top_k(comparable(jnp.stack(first, axis=2)), k)
            best = jnp.take_along_axis(s, index[..., None], axis=3)
            right = jnp.einsum("chrs,nhjs->nchrj", core, best[:, :, 1])
            grid = jnp.einsum("nhir,nchrj->nchij", best[:, :, 0], right).reshape(q.shape[0], self.cores, -1, k * k)
            _, chosen = jax.lax.top_k(comparable(jnp.sum(grid, axis=1)), k)
            scores = jnp.take_along_axis(grid, chosen[:, None], axis=-1)
            slots = index[:, :, 0, :, None] * sub_keys + index[:, :, 1, None, :]
            return scores, jnp.take_along_axis(slots.reshape(*slots.shape[:2], k * k), chosen, axis=-1)

        per_read = 4 * self.heads * (2 * sub_keys * (rank + 1) + (self.cores + 2) * k * k)
        scores, ids = map_rows(search, rows_within(_LIMIT_BYTES, per_read), q)
        return Found(scores[:, 0] if self.cores == 1 else scores, ids)
