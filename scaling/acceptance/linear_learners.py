"""One-pass linear learners on known features of the known-truth log: what its laws are stated for.

Logistic regression by diagonal Newton: after each batch  h += sum_rows p(1-p),  w_k += sum_rows (y - p) x_k / h_k,
with h_k starting at a prior precision. Features are products of signs, so their squares are 1 and they are
orthonormal over rows; a weight of true size a_k is then off by 1 / (1/a_k^2 + v D) in the mean square.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, UInt32

from recscale.scaling.data.known_truth.batches import request_numbers
from recscale.scaling.data.known_truth.config import CROSS_FIELDS
from recscale.scaling.data.known_truth.draw import draw
from recscale.scaling.data.known_truth.logit_parts import padded_words, term_values
from recscale.scaling.data.known_truth.world import Terms, World, signs

_INTERCEPT_PRECISION = 1.0

# Code words uint32 [9, n] -> features float32 [p, n].
Features = Callable[[jax.Array], jax.Array]


def term_features(terms: Terms, first: int) -> Features:
    """The first `first` terms of a world as features: words [9, n] -> float32 [first, n] in {-1, 1}."""
    chosen = np.argsort(terms.number, kind="stable")[:first]
    known = dataclasses.replace(terms, field=terms.field[chosen], bit=terms.bit[chosen])
    return lambda words: term_values(words, known)


def product_features(code_bits: int, pairs: Sequence[tuple[int, int]]) -> Features:
    """All single signs, then products of pairs of them: words [9, n] -> float32 [8 bits + pairs, n].

    A sign is numbered field * code_bits + bit - 1.
    """
    left, right = (jnp.asarray([pair[i] for pair in pairs], jnp.int32) for i in (0, 1))

    def features(words: jax.Array) -> jax.Array:
        single = jnp.moveaxis(signs(words[: len(CROSS_FIELDS)], code_bits, 1), -1, 1).astype(jnp.float32)
        single = single.reshape(-1, words.shape[1])
        return jnp.concatenate([single, single[left] * single[right]]) if len(pairs) else single

    return features


def code_words_and_labels(
    world: World, log_seed: int, index: Any, rows: int, evaluation: bool = False
) -> tuple[UInt32[jax.Array, "9 rows"], Float32[jax.Array, " rows"]]:
    """Words and labels of batch `index` with one candidate a request."""
    drawn = draw(world, log_seed, request_numbers(index, rows, evaluation), 1)
    return padded_words(drawn.rows)[..., 0], drawn.labels[:, 0, 0]


def train(
    world: World,
    features: Features,
    precision: Float[np.ndarray, "learners p"],
    *,
    examples: Sequence[int],
    batch: int,
    chunk: int,
    log_seed: int = 1,
    start: float,
) -> tuple[Float[np.ndarray, "checkpoints learners p"], Float[np.ndarray, "checkpoints learners"]]:
    """Weights and intercepts after each number of examples, float32.

    Args:
        precision: prior precision of every weight; inf leaves a feature out. Learners share all rows.
        examples: increasing numbers of examples, multiples of `chunk`, itself a multiple of `batch`.
        start: initial intercept.

    Raises:
        ValueError: a number of examples that is not a multiple of the chunk.
    """
    if any(count % chunk for count in examples) or chunk % batch:
        raise ValueError(f"examples {list(examples)} and chunk {chunk} must be multiples of chunk and batch {batch}")
    learners = precision.shape[0]

    def step(state, inputs):
        weights, intercept, h, h0 = state
        x, y = inputs
        p = jax.nn.sigmoid(weights @ x + intercept[:, None])
        error, v = y - p, jnp.sum(p * (1.0 - p), axis=1)
        h, h0 = h + v[:, None], h0 + v
        return (weights + error @ x.T / h, intercept + jnp.sum(error, axis=1) / h0, h, h0), None

    @jax.jit
    def many(state, index):
        words, labels = code_words_and_labels(world, log_seed, index, chunk)
        x = features(words).reshape(precision.shape[1], chunk // batch, batch)
        return jax.lax.scan(step, state, (jnp.moveaxis(x, 1, 0), labels.reshape(-1, batch)))[0]

    state = (
        jnp.zeros(precision.shape, jnp.float32),
        jnp.full(learners, start, jnp.float32),
        jnp.asarray(precision, jnp.float32),
        jnp.full(learners, _INTERCEPT_PRECISION, jnp.float32),
    )
    kept = []
    for index in range(max(examples) // chunk):
        state = many(state, np.uint32(index))
        if (index + 1) * chunk in examples:
            kept.append(jax.device_get(state[:2]))
    return np.stack([weights for weights, _ in kept]), np.stack([intercept for _, intercept in kept])


def make_scorer(
    world: World, features: Features, weights: Float[np.ndarray, "... p"], log_seed: int, rows: int
) -> Callable[[int], np.ndarray]:
    """Evaluation batch index -> weights . features, float64 [..., rows]; add the intercepts to get logits.

    The rows are those of `known_truth.exact.sample(world, log_seed, index, rows)`.
    """

    @jax.jit
    def score(flat, index):
        words, _ = code_words_and_labels(world, log_seed, index, rows, evaluation=True)
        return flat @ features(words)

    flat = weights.reshape(-1, weights.shape[-1])
    return lambda index: np.asarray(score(flat, np.uint32(index)), np.float64).reshape(*weights.shape[:-1], rows)
