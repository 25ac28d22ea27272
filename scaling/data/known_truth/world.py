"""What decides every click of the known-truth log: the signs and popularity of ids, and the coefficients of each part.

Built once on the host from a configuration, as integer arrays. Coefficients are round(scale * value) with scale = 2^22,
or the largest smaller power of two whose int32 sums cannot overflow, so sums are exact in any order.

    id  = 32 * block + member, ordered by popularity; blocks follow a Zipf law, the 32 members of one are equally likely
    sign j of an id = -1 where bit j of its word is set: the block's word XOR the Walsh functions of the member
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float64, Int, Int32, UInt32
from scipy.special import ndtri

from .config import BIASED_FIELDS, BLOCK, CROSS_FIELDS, MAX_ORDER, KnownTruthConfig
from .terms import TermPlan, plan_terms
from .words import Draws

_MAX_SCALE_BITS = 22
_THRESHOLD_BITS = 12


@dataclasses.dataclass(frozen=True)
class TermGroup:
    """Neighbours in a list of terms, entries start ... stop - 1, that share their order and side."""

    order: int
    request_only: bool
    start: int
    stop: int


@flax.struct.dataclass
class Terms:
    """The N terms of one task as a list of n entries, sorted by order, side and k.

    A term shared by all domains is one entry, a private one has an entry per domain. field, bit: int32 [n, 4], padded
    with field 8, whose word is 0; coefficient: int32 [n]; number: int32 [n], k counted from 1; domain: int32 [n], -1:
    all; common: bool [n], the same for both labels; group: int32 [n], index into `groups`.
    """

    field: Any
    bit: Any
    coefficient: Any
    number: Any
    domain: Any
    common: Any
    group: Any
    groups: tuple[TermGroup, ...] = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class World:
    """All constants of one known-truth log: what labels depend on, as integer arrays, and its configuration.

    Host arrays and static sizes; a pytree that can be closed over or passed to a jitted function.

    alias: uint32 [blocks], threshold (in 2^-12) << 16 | other block of the popularity's alias table; code_words: uint32
    [8, blocks] and history_words: uint32 [blocks], per block, see `code_words`; event_weight: int32
    [Y, S]; matrix: int32 [Y, d, d]; rank_threshold: uint32 [pair_items]; pair_odd, pair_offset: uint32 [clusters];
    pair_signs: uint32 [clusters, pair_items / 32], packed; bias_words: uint32 [2, blocks]; bias_scores: int32 [32];
    domain_threshold: uint32 [G]; domain_bias: int32 [G]; id_multiplier, id_offset: uint32 [8, 3]; drift_*: uint32 or
    int32 [r]; task_bias: int32 [Y]; terms: one `Terms` per task, none without N.
    """

    alias: Any
    code_words: Any
    history_words: Any
    event_weight: Any
    matrix: Any
    rank_threshold: Any
    pair_odd: Any
    pair_offset: Any
    pair_signs: Any
    bias_words: Any
    bias_scores: Any
    domain_threshold: Any
    domain_bias: Any
    id_multiplier: Any
    id_offset: Any
    drift_refresh: Any
    drift_flip: Any
    drift_weight: Any
    task_bias: Any
    terms: tuple[Terms, ...]
    config: KnownTruthConfig = flax.struct.field(pytree_node=False)
    scale_bits: int = flax.struct.field(pytree_node=False)

    @property
    def scale(self) -> float:
        """Integer logits are `scale` times the logit."""
        return 2.0**self.scale_bits

    @property
    def pair_amplitude(self) -> int:
        """What a pair adds to the integer logit or takes from it: round(scale * sqrt(c_M))."""
        return int(round(self.scale * self.config.c_m**0.5))


@functools.lru_cache(maxsize=16)
def build_world(config: KnownTruthConfig) -> World:
    """The constants of a configuration's log: a deterministic function of it, identical in every process."""
    bits = scale_bits(config)
    scale = 2.0**bits
    blocks, seed = config.blocks, config.world_seed
    threshold, alias = _alias_table(blocks, config.zipf)
    tau = (config.c_b / 2) ** 0.5
    odd, offset, signs = _pairs(config)
    refresh, flip, weight = _drift(config)
    draws = Draws(seed, 2)
    return World(
        alias=threshold << np.uint32(16) | alias,
        code_words=draws.words(len(CROSS_FIELDS), blocks) & np.uint32(2 ** (config.code_bits + 1) - 2),
        history_words=draws.words(blocks) & np.uint32(2**config.code_width - 1),
        event_weight=np.stack([np.round(scale * w).astype(np.int32) for w in _event_weights(config)]),
        matrix=_matrices(config),
        rank_threshold=_rank_thresholds(config),
        pair_odd=odd,
        pair_offset=offset,
        pair_signs=signs,
        bias_words=draws.words(len(BIASED_FIELDS), blocks) & np.uint32(BLOCK - 1),
        bias_scores=np.round(scale * tau * bias_scores()).astype(np.int32),
        domain_threshold=_domain_thresholds(config),
        domain_bias=np.round(scale * domain_biases(config)).astype(np.int32),
        id_multiplier=Draws(seed, 6).words(len(CROSS_FIELDS), 3) | np.uint32(1),
        id_offset=Draws(seed, 7).words(len(CROSS_FIELDS), 3),
        drift_refresh=refresh,
        drift_flip=flip,
        drift_weight=np.round(scale * weight).astype(np.int32),
        task_bias=np.asarray([round(scale * config.task_bias(t)) for t in range(config.tasks)], np.int32),
        terms=_sorted_terms(config, plan_terms(config), scale) if config.has_n else (),
        config=config,
        scale_bits=bits,
    )


def popularity(world: World, field: str = "item") -> Float64[np.ndarray, " blocks"]:
    """Probability of each block of 32 ids of a cross field, exactly as drawn (alias thresholds rounded).

    Within a block the 32 ids are equally likely. All cross fields follow the same law.
    """
    if field not in CROSS_FIELDS:
        raise ValueError(f"no popularity for field {field!r}; cross fields are {', '.join(CROSS_FIELDS)}")
    keep = (world.alias >> np.uint32(16)) / 2.0**_THRESHOLD_BITS
    other = (world.alias & np.uint32(0xFFFF)).astype(np.int64)
    return (keep + np.bincount(other, weights=1 - keep, minlength=len(keep))) / len(keep)


def popular_id(world: World, word: UInt32[Array, "*shape"]) -> Int32[Array, "*shape"]:
    """Id in popularity order from one word: top bits alias column, 5 bits member, 12 bits alias threshold."""
    column_bits = world.config.blocks.bit_length() - 1
    column = top_bits(word, world.config.blocks)
    member = (word >> np.uint32(27 - column_bits)) & np.uint32(BLOCK - 1)
    threshold = (word >> np.uint32(15 - column_bits)) & np.uint32(4095)
    entry = jnp.asarray(world.alias)[column]
    block = jnp.where(threshold < entry >> 16, column, entry & np.uint32(0xFFFF))
    return (block * np.uint32(BLOCK) + member).astype(jnp.int32)


def top_bits(word: UInt32[Array, "*shape"], values: int) -> UInt32[Array, "*shape"]:
    """Uniform integer below a power of two from the top bits of a word."""
    bits = values.bit_length() - 1
    return word >> np.uint32(32 - bits) if bits else jnp.zeros_like(word)


def code_words(
    world: World, first: int, ids: Int[Array | np.ndarray, " fields *shape"]
) -> UInt32[Array, " fields *shape"]:
    """Words of the ids (popularity order) of consecutive cross fields first, first + 1, ...

    Bit j, 1 <= j <= code_bits, is set where sign j is -1: bit j of the block's word XOR
    parity(member AND j), so that over the 32 ids of a block the signs are Walsh functions.
    """
    field = (first + jnp.arange(ids.shape[0])).reshape(-1, *(1,) * (ids.ndim - 1))
    mask = np.uint32(2 ** (world.config.code_bits + 1) - 2)
    return jnp.asarray(world.code_words)[field, ids // BLOCK] ^ (_walsh(ids) & mask)


def history_word(world: World, ids: Int[Array | np.ndarray, "*shape"]) -> UInt32[Array, "*shape"]:
    """Word of item ids: bit j, 0 <= j < d, is set where history sign j is -1 (Walsh functions 1 ... d)."""
    mask = np.uint32(2**world.config.code_width - 1)
    return jnp.asarray(world.history_words)[ids // BLOCK] ^ ((_walsh(ids) >> np.uint32(1)) & mask)


def signs(word: UInt32[Array, "*shape"], count: int, first: int) -> Int32[Array, "*shape {count}"]:
    """Signs of bits first ... first + count - 1 of each word, -1 or 1, appended as a last axis."""
    shift = jnp.arange(first, first + count, dtype=jnp.uint32)
    return 1 - 2 * ((word[..., None] >> shift) & 1).astype(jnp.int32)


def scale_bits(config: KnownTruthConfig) -> int:
    """log2 of the coefficient scale: 22, lowered until no int32 sum of a row can overflow."""
    bound = np.sqrt(config.quanta_variances()).sum() + np.sqrt(config.c_m)
    bound += max(np.abs(w).sum() for w in _event_weights(config)) * config.code_width**1.5
    bound += 2 * np.sqrt(config.c_b / 2) * np.abs(bias_scores()).max()
    bound += max(abs(config.task_bias(task)) for task in range(config.tasks))
    bound += np.abs(domain_biases(config)).max() + np.abs(_drift(config)[2]).sum()
    roundings = config.quanta + config.history_max * config.code_width**1.5 + 64
    bits = _MAX_SCALE_BITS
    while 2.0**bits * bound + roundings >= 2.0**31:
        bits -= 1
    return bits


def bias_scores() -> Float64[np.ndarray, " 32"]:
    """32 normal scores, standardised to mean 0 and variance 1."""
    scores = ndtri((np.arange(BLOCK) + 0.5) / BLOCK)
    return scores / np.sqrt(np.mean(scores**2))


def domain_biases(config: KnownTruthConfig) -> Float64[np.ndarray, " G"]:
    """Domain biases with mean 0 and standard deviation `domain_spread` under the domain law."""
    if config.domains == 1:
        return np.zeros(1)
    law = config.domain_law()
    grid = (np.arange(config.domains) + 0.5) / config.domains
    raw = ndtri(grid)[Draws(config.world_seed, 5).permutation(config.domains)]
    raw = raw - law @ raw
    return config.domain_spread * raw / np.sqrt(law @ raw**2)


def _walsh(ids: Array | np.ndarray) -> Array:
    """Bit j, 0 <= j < 32, is parity(member AND j): the XOR of the j-patterns of the member's five bits."""
    word = jnp.uint32(0)
    for i, pattern in enumerate((0xAAAAAAAA, 0xCCCCCCCC, 0xF0F0F0F0, 0xFF00FF00, 0xFFFF0000)):
        word = word ^ jnp.where((ids >> i) & 1 == 1, np.uint32(pattern), np.uint32(0))
    return word


def _alias_table(blocks: int, zipf: float) -> tuple[np.ndarray, np.ndarray]:
    """Vose's alias table of p_j proportional to (j+1)^-zipf, thresholds in units of 2^-12: two uint32 [blocks]."""
    weights = np.arange(1, blocks + 1, dtype=np.float64) ** -zipf
    weights *= blocks / weights.sum()
    threshold = np.full(blocks, 2**_THRESHOLD_BITS, np.uint32)
    alias = np.arange(blocks, dtype=np.uint32)
    small = [j for j in range(blocks) if weights[j] < 1]
    large = [j for j in range(blocks) if weights[j] >= 1]
    while small and large:
        low, high = small.pop(), large[-1]
        threshold[low] = round(weights[low] * 2**_THRESHOLD_BITS)
        alias[low] = high
        weights[high] -= 1 - weights[low]
        if weights[high] < 1:
            small.append(large.pop())
    return threshold, alias


def _event_weights(config: KnownTruthConfig) -> list[np.ndarray]:
    """Weight of every event in the logit, kappa_l sqrt(Gamma) / d, per task: float64 [S]."""
    factor = config.match_groups**0.5 / config.code_width
    return [factor * np.sqrt(config.history_variances(task)) for task in range(config.tasks)]


def _matrices(config: KnownTruthConfig) -> np.ndarray:
    """Per task a d x d Hadamard matrix with random column signs and row order: int32 [Y, d, d]."""
    d = config.code_width
    i, j = np.arange(d)[:, None], np.arange(d)[None, :]
    hadamard = 1 - 2 * (np.bitwise_count((i & j).astype(np.uint32)).astype(np.int32) & 1)
    draws = Draws(config.world_seed, 3)
    out = []
    for _ in range(config.tasks):
        signs = 1 - 2 * draws.below_array(2, d).astype(np.int32)
        out.append((hadamard * signs)[draws.permutation(d)])
    return np.stack(out)


def _rank_thresholds(config: KnownTruthConfig) -> np.ndarray:
    """2^32 times the distribution function of the pair rank: uint32 [pair_items] (or [1] without M)."""
    if not config.has_m:
        return np.zeros(1, np.uint32)
    below = 1.0 - config.missed_mass(np.arange(1, config.pair_items + 1))
    return np.minimum(np.round(below * 2.0**32), 2.0**32 - 1).astype(np.uint32)


def _pairs(config: KnownTruthConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if not config.has_m:
        return np.ones(1, np.uint32), np.zeros(1, np.uint32), np.zeros((1, 1), np.uint32)
    draws = Draws(config.world_seed, 4)
    odd = draws.words(config.clusters) | np.uint32(1)
    offset = draws.words(config.clusters)
    return odd, offset, draws.words(config.clusters, config.pair_items // BLOCK)


def _domain_thresholds(config: KnownTruthConfig) -> np.ndarray:
    """Upper edges of the domains on the 16-bit scale: uint32 [G]."""
    return np.round(np.cumsum(config.domain_law()) * 2.0**16).astype(np.uint32)


def _drift(config: KnownTruthConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Refresh thresholds (of 2^16), flip thresholds (of 2^15) and logit weights of the hidden states, each [r].

    Refresh probabilities are log-uniform in [1 / history_max, 1/4], flip probabilities uniform in [.1, .4].
    """
    r = config.drift
    draws = Draws(config.world_seed, 8)
    low, high = np.log(1.0 / config.history_max), np.log(0.25)
    refresh = np.exp(low + (high - low) * draws.below_array(2**16, r) / 2.0**16)
    flip = 0.1 + 0.3 * draws.below_array(2**16, r) / 2.0**16
    weight = np.full(r, (config.drift_variance / max(r, 1)) ** 0.5)
    return (
        np.maximum(1, np.round(refresh * 2.0**16)).astype(np.uint32),
        np.round(flip * 2.0**15).astype(np.uint32),
        weight,
    )


def _sorted_terms(config: KnownTruthConfig, plan: TermPlan, scale: float) -> tuple[Terms, ...]:
    """Entries of each task's terms, sorted so that those of one order and side are neighbours."""
    coefficient = np.round(scale * np.sqrt(config.quanta_variances())).astype(np.int32)
    index = np.lexsort((np.arange(config.quanta), plan.request_only, plan.order))
    out = []
    for task in range(config.tasks):
        entries, pairs = [], []
        for k in index:
            for domain in [-1] if plan.shared[k] else range(config.domains):
                term = plan.terms[task][max(domain, 0)][k]
                entries.append((k, domain, plan.order[k], plan.request_only[k]))
                pairs.append(term + ((len(CROSS_FIELDS), 0),) * (MAX_ORDER - len(term)))
        k, domain, order, request_only = np.asarray(entries, np.int64).T
        starts = np.flatnonzero(np.r_[True, (np.diff(order) != 0) | (np.diff(request_only) != 0)])
        stops = np.r_[starts[1:], len(k)]
        groups = tuple(
            TermGroup(int(order[i]), bool(request_only[i]), int(i), int(j)) for i, j in zip(starts, stops, strict=True)
        )
        field, bit = np.moveaxis(np.asarray(pairs, np.int32), -1, 0)
        out.append(
            Terms(
                field=np.ascontiguousarray(field),
                bit=np.ascontiguousarray(bit),
                coefficient=coefficient[k],
                number=(k + 1).astype(np.int32),
                domain=domain.astype(np.int32),
                common=plan.common[k],
                group=np.repeat(np.arange(len(groups)), stops - starts).astype(np.int32),
                groups=groups,
            )
        )
    return tuple(out)
