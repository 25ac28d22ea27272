"""optax optimisers of the dense parameters. The rate is applied by the step, so it can differ between replicas."""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax
import optax
from flax import nnx

from .config import require_word

Optimizer = Literal["adamw", "adam", "rmsprop", "adagrad"]


def dense_optimizer(
    name: Optimizer,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float = 0.0,
) -> optax.GradientTransformation:
    """The optimiser without its learning rate: multiply its updates by -rate.

    `weight_decay` is decoupled (AdamW) and acts on matrices only; gains, biases and embeddings are left alone, whatever
    their rank. `clip_norm` clips the global norm of the gradient first, 0 switches it off.

    Raises:
        ValueError: unknown name, naming the known ones.
    """
    scale = {
        "adamw": lambda: optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        "adam": lambda: optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        "rmsprop": lambda: optax.scale_by_rms(decay=b2, eps=eps),
        "adagrad": lambda: optax.scale_by_rss(eps=eps),
    }
    require_word("training.optimizer", name, get_args(Optimizer))
    if weight_decay and name == "adam":
        raise ValueError(
            "training.optimizer 'adam' takes no weight decay; use 'adamw' for the decoupled form, "
            "or set training.weight_decay=0"
        )
    parts = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    parts.append(scale[name]())
    if weight_decay:
        parts.append(optax.add_decayed_weights(weight_decay, mask=_decays))
    return optax.chain(*parts)


def _decays(params: Any) -> Any:
    """Whether each parameter decays: what `recscale.models.layers.param` says of it.

    Parameters that other packages make themselves say nothing: of those, all but biases with two axes or more decay.
    """

    def of(path: Any, variable: Any) -> Any:
        said = variable.get_metadata().get("decays") if isinstance(variable, nnx.Variable) else None
        is_bias = "bias" in jax.tree_util.keystr(path)
        return jax.tree.map(lambda array: array.ndim >= 2 and not is_bias if said is None else said, variable)

    return jax.tree_util.tree_map_with_path(of, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
