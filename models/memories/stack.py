"""RankMixer's stack with blocks that read a memory and report how: what `pkm`, `memory_plus` and `msn` share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from recscale.models.inputs.batch import CandidateInputs, Output
from recscale.models.inputs.tokenizers import UserTokens
from recscale.models.mixers.rankmixer import RankMixerBlock, TokenStack

from .product_key_memory import ProductKeyMemory, valid_tokens

Stats = dict[str, Array]


class ReadingBlock(RankMixerBlock):
    """A RankMixer block with `branch` as its network: x [T, B, D] -> [T, B, D] and the branch's diagnostics."""

    def branch(self, z: Array, *, training: bool, valid: Array | None) -> tuple[Array, Stats]:
        """z [T, B, D] -> [T, B, D] and named diagnostics; valid: bool [T, B], other tokens read nothing."""
        raise NotImplementedError

    def with_stats(
        self, x: Float[Array, "T B D"], *, key: Array | None = None, valid: Bool[Array, "T B"] | None = None
    ) -> tuple[Float[Array, "T B D"], Stats]:
        """A key means training. valid: tokens that are no padding; others read nothing."""
        found: Stats = {}

        def branch(z: Array) -> Array:
            y, stats = self.branch(z, training=key is not None, valid=valid)
            found.update(stats)
            return y

        return self.around(branch, x, key), found


class MemoryStack(TokenStack):
    """Tokenizer, L blocks of which some read a memory, mean over tokens, towers. Arguments: see `TokenStack`.

    stats_name: what the diagnostics of block i are called, "<name>i/..."; balance_weight: of the loss that evens out
    the rows of experts.
    """

    stats_name = "memory"
    balance_weight = 0.0

    def score(
        self,
        state: UserTokens,
        candidates: CandidateInputs,
        tokens: Float[Array, "R C t A"] | None = None,
        *,
        key: Array | None = None,
    ) -> Output:
        x, shape = self.join(state, candidates, tokens)
        valid, stats, losses = valid_tokens(candidates, x.shape[0]), {}, {}
        for i, block in enumerate(self.blocks):
            own_key = None if key is None else jax.random.fold_in(key, i)
            if isinstance(block, ReadingBlock):
                x, found = block.with_stats(x, key=own_key, valid=valid)
                stats |= {f"{self.stats_name}{i}/{name}": value for name, value in found.items()}
            else:
                x = block(x, key=own_key)
        if self.balance_weight:
            balance = [value for name, value in stats.items() if name.endswith("experts/balance")]
            losses["router_balance"] = self.balance_weight * jnp.mean(jnp.stack(balance))
        return Output(logits=self.read_out(x).reshape(shape), losses=losses, stats=stats)

    def fold(self) -> None:
        """Folds over-parameterised keys into constants, for serving."""
        for _, module in list(nnx.iter_modules(self)):
            if isinstance(module, ProductKeyMemory):
                module.fold()
