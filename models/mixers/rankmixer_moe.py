"""RankMixer's sparse experts (arXiv 2507.15551 v3, section on sparse MoE): dense training, sparse inference.

Every per-token network is cut into E experts gated by G = relu(S R_t + c_t), see `ReLUMoE` in
`layers/per_token_moe.py`. Two routers are trained, only the infer router is served. Its mean gate is penalised,

    loss += lam * L_reg,   L_reg = mean of G_infer over blocks, rows, tokens and experts

and lam follows the share of open experts (rule of the ReLU routing the paper cites, arXiv 2412.14711), once a step:

    lam <- clip(lam * lam_rate ** sign(share of open experts - active_ratio), 1e-8, 1e3)

How the two paths meet in training is undisclosed -> dtsi_merge:

    rows          requests of even index run every block on G_train, the others on G_infer; one task loss. Each path has
                  to predict by itself, so the served scale is right by construction. Cost of one pass (default)
    two_losses    both paths on every row, the mean of two task losses; twice the cost of the blocks
    mean_gates    gates (G_train + G_infer) / 2, the mean of the two outputs; NOT safe: the unpenalised router carries
                  the signal and the served path is off scale
    train_only    the infer router sees the penalty alone; shows the failure
    infer_only    no train router: the control

L_reg is taken on all rows; the share of open experts on the rows that run on the infer router, which is what is served.
lam and the ages of closed experts are state of training: the step returns and checkpoints them, evaluation (no key)
leaves them alone.

router="topk" replaces all this by softmax-routed experts (`TopKMoE`, no shared expert, K = active_ratio * E) in
training and inference, with `balance_weight`: the baseline of the paper's comparison.

Closed forms per block, a = active_ratio:
    params   + T*2*E*(D + 1)  (infer_only T*E*(D + 1), topk T*E*D);   unused when serving: the train router, and
             (1 - a) of the T*(2*D*F + F) of experts
    flops    training T*(4*D*F + 4*D*E), served T*(2*D*E + a*4*D*F)

Also undisclosed -> flag (default): E -> experts (8 where used), widths of experts (F/E), lam0 (1e-8), lam_rate (1.2),
window of `dead_experts` -> dead_window (steps), serve_cap (None: every open expert is computed).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from recscale.models.inputs.batch import Output
from recscale.models.layers.per_token_moe import (
    ExpertOptions,
    TopKMoE,
    TopKRouting,
    check_top_k,
    top_k_report,
)
from recscale.models.layers.relu_moe import Gating, ReLUMoE
from recscale.models.options import group_of, refuse_unused, require_sizes

# lam stays in here, however long the target is missed.
_LAM_RANGE = (1e-8, 1e3)


@dataclasses.dataclass(frozen=True)
class SparseOptions(ExpertOptions):
    """Flags of sparse experts, off by default.

    experts: E, None is dense. active_ratio: budget of open experts. gate_norm, gate_scale and balance_weight belong to
    router="topk", see `layers/per_token_moe.py`. The rest: see the file.
    """

    experts: int | None = None
    router: Literal["relu", "topk"] = "relu"
    active_ratio: float = 0.25
    dtsi_merge: Literal["rows", "two_losses", "mean_gates", "train_only", "infer_only"] = "rows"
    lam0: float = 1e-8
    lam_rate: float = 1.2
    dead_window: int = 100
    serve_cap: int | None = None
    gate_norm: Literal["selected", "all"] = "all"
    gate_scale: float | None = None

    @property
    def active_experts(self) -> int:
        """K of router="topk"."""
        return max(1, round(self.active_ratio * (self.experts or 1)))

    def check_experts(self, hidden: int, *, per_token: bool) -> None:
        """ValueError for flags that contradict each other; `per_token`: whether there are networks to cut."""
        if self.experts is None:
            dense = "there are no experts; set experts"
            refuse_unused(self, dense, router=self.router, active_ratio=self.active_ratio)
            refuse_unused(self, dense, expert_path=self.expert_path, capacity_factor=self.capacity_factor)
        if self.experts is None or self.router != "relu":
            reason = "there are no ReLU-routed experts; set experts with router='relu'"
            refuse_unused(self, reason, dtsi_merge=self.dtsi_merge, lam0=self.lam0, lam_rate=self.lam_rate)
            refuse_unused(self, reason, dead_window=self.dead_window, serve_cap=self.serve_cap)
        if self.experts is None or self.router != "topk":
            reason = "there are no softmax-routed experts; set experts with router='topk'"
            refuse_unused(self, reason, balance_weight=self.balance_weight)
            refuse_unused(self, reason, gate_norm=self.gate_norm, gate_scale=self.gate_scale)
        if self.experts is None:
            return
        require_sizes(experts=self.experts, dead_window=self.dead_window)
        self.check_capacity()
        if not per_token:
            raise ValueError(
                "experts are slices of per-token networks; this mixer or ffn has none, so experts must be None"
            )
        if not 0.0 < self.active_ratio <= 1.0:
            raise ValueError(f"active_ratio is {self.active_ratio}, expected a share in (0, 1]")
        if hidden % self.experts:
            raise ValueError(f"hidden is {hidden}, expected a multiple of the {self.experts} experts")
        if self.serve_cap is not None and not 1 <= self.serve_cap <= self.experts:
            raise ValueError(f"serve_cap is {self.serve_cap}, expected 1 to the {self.experts} experts")
        if self.lam_rate <= 1.0 or not _LAM_RANGE[0] <= self.lam0 <= _LAM_RANGE[1]:
            raise ValueError(
                f"lam_rate is {self.lam_rate} and lam0 {self.lam0}, expected above 1 and within {_LAM_RANGE}"
            )
        if self.router == "topk":
            check_top_k(hidden, self.experts, self.active_experts, shared=False, gate_norm=self.gate_norm)


class Coefficient(nnx.Variable):
    """A coefficient that training adapts outside the optimiser."""


class Age(nnx.Variable):
    """Steps since something last happened."""


def make_experts(
    options: SparseOptions,
    tokens: int,
    width: int,
    hidden: int,
    activation: str,
    init: str,
    *,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> ReLUMoE | TopKMoE:
    """The sparse network of one block."""
    experts = options.experts or 1
    if options.router == "topk":
        return TopKMoE(
            tokens,
            width,
            hidden,
            experts=experts,
            active=options.active_experts,
            shared=False,
            gate_scale=options.gate_scale,
            gate_norm=options.gate_norm,
            kind="ffn",
            activation=activation,
            init=init,
            path=options.expert_path,
            capacity_factor=options.capacity_factor,
            dtype=dtype,
            rngs=rngs,
        )
    return ReLUMoE(
        tokens,
        width,
        hidden,
        experts=experts,
        two_routers=options.dtsi_merge != "infer_only",
        serve_cap=options.serve_cap,
        active_share=options.active_ratio,
        activation=activation,
        init=init,
        path=options.expert_path,
        capacity_factor=options.capacity_factor,
        dtype=dtype,
        rngs=rngs,
    )


class ExpertControl(nnx.Module):
    """Which passes a model runs, the penalty and its controller, and the report.

    Args:
        options: flags with experts. layers, tokens: L, T.
    """

    def __init__(self, options: SparseOptions, layers: int, tokens: int):
        self.options = group_of(options, SparseOptions)
        if options.router == "relu":
            self.lam = Coefficient(jnp.asarray(options.lam0, jnp.float32))
            self.closed_for = Age(jnp.zeros((layers, tokens, options.experts), jnp.int32))

    def passes(self, requests: int, candidates: int, *, training: bool) -> list[Gating]:
        """What the sparse networks are told, once for every pass through the blocks; "topk" has no choice."""
        merge = self.options.dtsi_merge
        if training and merge == "rows" and self.options.router == "relu" and requests < 2:
            raise ValueError(
                f"dtsi_merge='rows' runs half of a batch's requests on each router, and this batch has {requests}; "
                "give it two or more, or use 'two_losses'"
            )
        if self.options.router == "topk" or not training or merge == "infer_only":
            return [Gating()]
        if merge == "rows":
            by_train = jnp.arange(requests) % 2 == 0
            return [Gating("rows", jnp.repeat(by_train, candidates))]
        if merge == "two_losses":
            return [Gating(), Gating("train_alone")]
        return [Gating("mean" if merge == "mean_gates" else "train")]

    def output(self, logits: list[Float[Array, "R C Y"]], routing: list[list[Any]], *, training: bool) -> Output:
        """The output of all passes; in training also moves lam and the ages.

        logits: [R, C, Y] of every pass, the served path first. routing: of every pass and block.
        """
        if self.options.router == "topk":
            return _top_k_output(logits[0], routing[0], self.options.balance_weight)
        gate, active, opened, cut = (jnp.stack(values) for values in zip(*routing[0], strict=True))
        share, penalty = active.mean(), gate.mean()
        lam = self.lam[...]
        losses = {"gate_penalty": lam * penalty} if training else {}
        if training:
            moved = lam * self.options.lam_rate ** jnp.sign(share - self.options.active_ratio)
            self.lam.set_value(jnp.clip(moved, *_LAM_RANGE))
            self.closed_for.set_value(jnp.where(opened > 0, 0, self.closed_for[...] + 1))
        stats = {
            "lam": lam,
            "gate_mean": penalty,
            "active_ratio": share,
            "active_ratio_by_token": active,  # [L, T]
            "expert_share": opened,  # [L, T, E]
            "dead_experts": (self.closed_for[...] >= self.options.dead_window).sum(),
            "cut_share": cut.mean(),
        }
        loss_logits = {"infer": (0.5, logits[0]), "train": (0.5, logits[1])} if len(logits) > 1 else {}
        return Output(logits=logits[0], losses=losses, stats=stats, loss_logits=loss_logits)


def _top_k_output(logits: Array, routing: list[TopKRouting], balance_weight: float) -> Output:
    losses, stats = top_k_report(routing, {"balance": balance_weight})
    stats["expert_load"] = jnp.stack([r.load for r in routing])  # [L, T, E]
    return Output(logits=logits, losses=losses, stats=stats)


def count_params(options: SparseOptions, T: int, D: int, F: int) -> tuple[int, int]:
    """(parameters of a block's routers, parameters of a block that serving a row leaves unused)."""
    if options.experts is None:
        return 0, 0
    E, expert_weights = options.experts, T * (2 * D * F + F)
    if options.router == "topk":
        return T * E * D, expert_weights * (E - options.active_experts) // E
    one = T * E * (D + 1)
    unused_router = 0 if options.dtsi_merge == "infer_only" else one
    return one + unused_router, unused_router + round((1 - options.active_ratio) * expert_weights)


def count_flops(options: SparseOptions, T: int, D: int, F: int, dense: int) -> tuple[int, int]:
    """FLOPs of a block's network per row, served and in one training pass; `dense` where there are no experts."""
    if options.experts is None:
        return dense, dense
    masked, E = options.expert_path == "masked", options.experts
    if options.router == "topk":
        active = E if masked else options.active_experts
        flops = 2 * T * D * E + 4 * T * D * F * active // E
        return flops, flops
    share = 1.0 if masked else options.active_ratio
    both = options.dtsi_merge in ("rows", "mean_gates", "train_only")
    served = 2 * T * D * E + round(share * 4 * T * D * F)
    return served, 4 * T * D * F + (4 if both else 2) * T * D * E


def training_passes(options: SparseOptions) -> int:
    """How often a training step runs the blocks and heads on a row."""
    two = options.experts is not None and options.router == "relu" and options.dtsi_merge == "two_losses"
    return 2 if two else 1
