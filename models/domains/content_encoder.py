"""Encoders of content (LEMUR, arXiv 2511.10962): tokens of an item or of a query -> one vector.

    x = [CLS, segment_1, SEP, segment_2, ...]     + embeddings of position and segment
    x = block(x), L times, bidirectional          the vector is the last block's CLS, normalised

Blocks are those of `HistoryBlock` (pre-norm attention, then a network W -> F -> W). Token 0 is padding, wherever it
stands: what is left is moved to the front and sees itself alone. The last block computes the row of CLS only.

Letters: N items, n tokens (separators and CLS included), W width, F hidden width, L layers, H heads, v token ids.
Closed forms: (v + 2 + n + segments)*W + 2*W + L*block parameters, with block = 4*W^2 + 2*W*F + 9*W + F;
(L - 1)*(n*(8*W^2 + 4*W*F) + 4*n^2*W) + 4*W^2 + 4*W*F + 4*n*W^2 + 4*n*W FLOPs per item.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from recscale.models.layers import param
from recscale.models.layers.history_attention import HistoryBlock, Visible, block_flops, block_params
from recscale.models.layers.norms import Norm, norm_params
from recscale.models.options import Options, require_sizes


@dataclasses.dataclass(frozen=True)
class ContentEncoderOptions(Options):
    """content_width W, encoder_heads H, encoder_hidden F (None: 4*W); layers of the two encoders."""

    content_width: int = 128
    encoder_heads: int = 4
    encoder_hidden: int | None = None
    query_layers: int = 2
    document_layers: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(content_width=self.content_width, encoder_heads=self.encoder_heads)
        require_sizes(query_layers=self.query_layers, document_layers=self.document_layers)
        require_sizes(encoder_hidden=self.encoder_hidden)


class ContentEncoder(nnx.Module):
    """tokens int32 [N, n'] -> [N, W].

    Args:
        vocabulary: v, token 0 (padding) included. segments: lengths of the parts that n' tokens fall into.
        layers: L; options: everything else.
    """

    def __init__(
        self,
        vocabulary: int,
        segments: tuple[int, ...],
        layers: int,
        options: ContentEncoderOptions,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        W, self.segments, self.vocabulary = options.content_width, segments, vocabulary
        self.tokens = param.normal(rngs, (vocabulary + 2, W), ("buckets", "embed"), W**-0.5)
        self.positions = param.normal(rngs, (encoded_tokens(segments), W), ("events", "embed"), W**-0.5)
        self.kinds = param.normal(rngs, (len(segments), W), ("buckets", "embed"), W**-0.5)
        self.blocks = nnx.List(
            HistoryBlock(W, options.encoder_heads, hidden=options.encoder_hidden, dtype=dtype, rngs=rngs)
            for _ in range(layers)
        )
        self.norm = Norm(W, dtype=dtype)

    def __call__(self, tokens: Int[Array, "N n"]) -> Float[Array, "N W"]:
        whole, kind = self._with_separators(tokens)
        real = whole != 0
        # Padding last, everything else in its order: attention then needs lengths alone.
        order = jnp.argsort(~real)
        moved, kind = jnp.take_along_axis(whole, order, axis=1), jnp.take(kind, order)
        x = jnp.take(self.tokens[...], moved, axis=0) + jnp.take(self.kinds[...], kind, axis=0)
        x = x + self.positions[...][None]
        length = real.sum(axis=1, dtype=jnp.int32)
        for i, block in enumerate(self.blocks):
            rows = x[:, :1] if i == len(self.blocks) - 1 else x
            x = block(rows, Visible(block.keys(x), length))
        return self.norm(x[:, 0])

    def _with_separators(self, tokens: Array) -> tuple[Array, Array]:
        """[N, n] token ids with CLS and separators in place, and the segment of each column."""
        ends = [sum(self.segments[: k + 1]) for k in range(len(self.segments) - 1)]
        special = jnp.full((tokens.shape[0], 1), self.vocabulary, tokens.dtype)
        columns, kinds = [special + 1], [0]
        for k, part in enumerate(jnp.split(tokens, ends, axis=1)):
            columns += [special, part] if k else [part]
            kinds += [k] * (part.shape[1] + (k > 0))
        return jnp.concatenate(columns, axis=1), jnp.asarray(kinds, jnp.int32)


def encoded_tokens(segments: tuple[int, ...]) -> int:
    """n: tokens, a separator between segments, CLS."""
    return sum(segments) + len(segments)


def encoder_params(vocabulary: int, segments: tuple[int, ...], layers: int, options: ContentEncoderOptions) -> int:
    """Parameters of `ContentEncoder`."""
    W = options.content_width
    embeddings = (vocabulary + 2 + encoded_tokens(segments) + len(segments)) * W
    return embeddings + norm_params(W, kind="layer") + layers * block_params(W, hidden=options.encoder_hidden)


def encoder_flops(segments: tuple[int, ...], layers: int, options: ContentEncoderOptions) -> int:
    """Forward FLOPs of `ContentEncoder` per item."""
    W, F, n = options.content_width, options.encoder_hidden, encoded_tokens(segments)
    return (layers - 1) * block_flops(W, n, n, n * n, F) + block_flops(W, 1, n, n, F)
