"""What an architecture is: scoring in two calls, users before candidates, and how an encoder joins a backbone.

    state  = model.encode_user(user)            once per request, never sees a candidate
    output = model.score(state, candidates)     per candidate
    model(inputs) == model.score(model.encode_user(inputs.user), inputs.candidates)

`key` is the switch between training and evaluation: a training step gives one, evaluation and serving never do. Without
a key there is no dropout, no training-only head, and no variable of the model changes; so evaluation is a pure
function of parameters, state and data. With a key a model may assign its own `nnx.Variable`s (adaptive coefficients,
running statistics): the step returns and checkpoints them.

Shapes: R requests, C candidates per request, t history tokens of width A.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from flax import nnx
from jaxtyping import Array, Bool, Float

from .inputs.batch import CandidateInputs, Inputs, Output, UserInputs
from .inputs.history import NO_TOKENS, SequenceTokens, TokenShape

__all__ = [
    "NO_TOKENS",
    "Backbone",
    "Composed",
    "EncodedHistory",
    "Ranker",
    "SequenceEncoder",
    "SequenceTokens",
    "TokenShape",
]


class EncodedHistory(NamedTuple):
    """What `SequenceEncoder.encode_user` returns: finished user tokens [R, t_u, A] or None, and any cached state."""

    tokens: Float[Array, "R t A"] | None
    cache: Any


class Ranker(nnx.Module):
    """Base class of architectures; subclasses write `encode_user` and `score`."""

    def encode_user(self, user: UserInputs) -> Any:
        """Everything candidate-free, once per request."""
        raise NotImplementedError

    def score(self, state: Any, candidates: CandidateInputs, *, key: Array | None = None) -> Output:
        """Logits of every candidate. `key` is given in training only: randomness, and leave to change state."""
        raise NotImplementedError

    def settle(self, pending: Any, ok: Bool[Array, ""]) -> None:
        """Ends a training step that gave `Output.pending`: changes state that was read in it, for a trainer to call
        after the gradient. Where `ok` is False, a step that failed, nothing may change.

        Apart from the step itself so that a table that is read and then written need not be copied.
        """
        raise NotImplementedError(f"{type(self).__name__} leaves nothing pending")

    def __call__(self, inputs: Inputs, *, key: Array | None = None) -> Output:
        return self.score(self.encode_user(inputs.user), inputs.candidates, key=key)


class Backbone(Ranker):
    """A ranker that also takes the tokens of a sequence encoder."""

    def encode_user(self, user: UserInputs, tokens: Float[Array, "R t A"] | None = None) -> Any:
        """tokens: those the encoder made of the user, or None."""
        raise NotImplementedError

    def score(
        self,
        state: Any,
        candidates: CandidateInputs,
        tokens: Float[Array, "R C t A"] | None = None,
        *,
        key: Array | None = None,
    ) -> Output:
        """tokens: those the encoder made of each candidate, or None."""
        raise NotImplementedError


class SequenceEncoder(nnx.Module):
    """Turns one history into tokens: those free of the candidate in `encode_user`, the rest in `candidate_tokens`."""

    def encode_user(self, user: UserInputs) -> EncodedHistory:
        raise NotImplementedError

    def candidate_tokens(self, cache: Any, candidates: CandidateInputs) -> Float[Array, "R C t A"] | None:
        """[R, C, t_c, A]; None for an encoder that never looks at the candidate."""
        return None

    def __call__(self, inputs: Inputs) -> SequenceTokens:
        encoded = self.encode_user(inputs.user)
        return SequenceTokens(encoded.tokens, self.candidate_tokens(encoded.cache, inputs.candidates))


class Composed(Ranker):
    """A sequence encoder in front of a backbone. Either part can be any pair that agrees on the `TokenShape`."""

    def __init__(self, encoder: SequenceEncoder, backbone: Backbone):
        self.encoder, self.backbone = encoder, backbone

    def encode_user(self, user: UserInputs) -> tuple[Any, Any]:
        encoded = self.encoder.encode_user(user)
        return encoded.cache, self.backbone.encode_user(user, encoded.tokens)

    def score(self, state: tuple[Any, Any], candidates: CandidateInputs, *, key: Array | None = None) -> Output:
        cache, backbone_state = state
        tokens = self.encoder.candidate_tokens(cache, candidates)
        return self.backbone.score(backbone_state, candidates, tokens, key=key)
