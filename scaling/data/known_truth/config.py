"""Configuration, presets and closed-form variances of the known-truth click log.

The logit of a row is `z = b + z_N + z_L + z_M + z_B (+ z_X)`, each part a function of observable inputs with
mean zero, the parts pairwise uncorrelated. `signal` S is the variance of all parts together, tails included,
and `shares` divides it: c_part = S * share.

    N  products of code signs of cross fields   a_k^2     = c_N [k^-alpha - (k+1)^-alpha]   axis dense_params
    L  events of the history against the item   kappa_l^2 = c_L [l^-lam - (l+1)^-lam]       axis history_length
    M  signs of (cluster, item) pairs           p_k = k^-a / zeta(a), variance c_M          axis memory_slots
    B  biases of user and item                  variance c_B / 2 each                       axis embedding rows
    X  biases of domains, shared and private N terms
    T  a second label

Content, tokens of items and of queries, says again what L is a function of: it adds inputs and no variance.

Coefficients are differences of powers, so what the first n terms of the infinite series leave out is exactly
c (n+1)^-alpha. What a finite world cannot hold is added as unobservable noise: the tail stays a clean power
law.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import typing
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64
from scipy.special import zeta

from recscale.models.options import freeze
from recscale.pallas_kernels.names import nearest

# Raised whenever the same configuration would give another log, so that stored truth is never mixed up.
GENERATOR_VERSION = 2

BLOCK = 32  # ids per popularity block: the 31 non-constant Walsh functions of 5 member bits are the code signs
MAX_ORDER = 4
REQUEST_FIELDS = ("user", "u1", "u2", "c1", "c2")
CANDIDATE_FIELDS = ("item", "i1", "i2")
CROSS_FIELDS = REQUEST_FIELDS + CANDIDATE_FIELDS
BIASED_FIELDS = ("user", "item")  # carry B, so never an order-1 term of N: both would be functions of the same id
TASK_NAMES = ("click", "convert")

Codes = Literal["learned", "oracle", "oracle_history", "none"]

_CONTENT = ("content_tokens", "query_tokens", "content_bits", "content_flip")

# Fields that change what a model is given but neither z nor the labels: they do not invalidate stored truth.
_INPUT_ONLY = (
    "embedding_width", "memory_embedding_width", "timestamps", "soft_labels", "permute_ids", "pair_field", *_CONTENT
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class KnownTruthConfig:
    """Everything that defines a known-truth log.

    Frozen and hashable; `hash` identifies the log, `truth_hash` its truth.

    Attributes:
        b: mean logit of the first label.
        signal: S, variance of the logit with every tail included.
        shares: shares of N, L, M, B in S; must sum to 1. A zero share removes the part and its inputs.
        alpha, lam, a: exponents of N, L and of the pair popularity of M (missed mass falls as ranks^-(a-1)); with a = 0
            all pairs are equally likely, none is fresh, and the missed mass falls linearly.
        zipf: exponent of the block popularity.
        quanta: K, number of N terms.
        order_shares: share of the N variance carried by products of 1, 2, 3, 4 signs.
        nested: each term of order >= 2 extends an earlier term by one sign, so gradient descent can climb.
        disjoint: all terms are pairs, and no sign is used again before every sign was used equally often: the first
            fields * code_bits / 2 terms share none. Then n terms take n units of any learner, whose missing variance
            is exactly c_N (n+1)^-alpha up to there: no matrix of lower rank holds more than one term per rank.
        blocks: blocks of 32 ids per cross field, a power of two up to 2^15.
        code_bits: signs per id that N may use (and, with oracle codes, that a model is given), 1 to 31.
        history_max: events per request, even. match_groups: number of categories, a power of two; only events
            of the candidate's category count. code_width: d, signs of an id in the history part, a power of
            two <= 16.
        clusters, pair_items: rows and columns of the pair matrix, powers of two.
        codes: "learned" gives ids, "oracle" the signs of N as dense inputs, "oracle_history" those and the signs of L,
            of the candidate and of every event, "none" nothing of N, whose share must be 0.
        domains: G. domain_shared: share of the N variance in terms common to all domains; domain_spread:
            standard deviation of the domain biases.
        tasks: 1 or 2. task_b: mean logit of the second label; task_common: share of its N variance in the
            terms of the first; task_lam: its history exponent. cascade: the second label is observed only
            where the first is 1.
        ragged: history lengths uniform on 0 ... history_max. continuing: one user's events are one stream,
            which moves on by one event every `continuing_stride` requests of the log (no exact claims: user
            leaks history).
        drift: r <= 8 hidden states of the first label's logit, revealed by noisy event fields; drift_variance: their
            variance together.
        pair_field: one crossed pair id instead of `mem_u` and `mem_i`.
        content_tokens: tokens of an item, 0 for none; each names the signs of content_bits of the item's code_width
            hidden ones of L, every sign flipped with probability content_flip. query_tokens: of a request, the same
            of the signs of what its history asks for; see `content`.
        soft_labels: labels are p* instead of draws (a diagnostic: it changes the data exponent).
        permute_ids: ids of cross fields go through a fixed bijection, so their order says nothing about
            popularity.
        timestamps: histories carry `delta_s`; it holds no information about the label.
        embedding_width, memory_embedding_width: widths of id fields, and of `mem_u`, `mem_i` and the pair id
            (None: the same). A `mem_i` table of width w holds up to w / clusters of M by itself.
        world_seed: seed of every constant of the log.
    """

    b: float = -2.0
    signal: float = 1.2
    shares: tuple[float, ...] = (0.40, 0.30, 0.20, 0.10)
    alpha: float = 0.35
    lam: float = 0.30
    a: float = 1.35
    zipf: float = 1.05
    quanta: int = 2048
    order_shares: tuple[float, ...] = (0.10, 0.45, 0.25, 0.20)
    nested: bool = True
    disjoint: bool = False
    blocks: int = 64
    code_bits: int = 31
    history_max: int = 256
    match_groups: int = 16
    code_width: int = 16
    clusters: int = 64
    pair_items: int = 2**14
    codes: Codes = "learned"
    domains: int = 1
    domain_shared: float = 0.5
    domain_spread: float = 0.4
    tasks: int = 1
    task_b: float = -1.0
    task_common: float = 0.5
    task_lam: float = 0.5
    cascade: bool = False
    ragged: bool = False
    continuing: bool = False
    continuing_stride: int = 1024
    drift: int = 0
    drift_variance: float = 0.2
    pair_field: bool = False
    content_tokens: int = 0
    query_tokens: int = 4
    content_bits: int = 3
    content_flip: float = 0.05
    soft_labels: bool = False
    permute_ids: bool = False
    timestamps: bool = True
    embedding_width: int = 16
    memory_embedding_width: int | None = None
    world_seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "shares", tuple(float(share) for share in self.shares))
        orders = tuple(float(share) for share in self.order_shares)
        object.__setattr__(self, "order_shares", orders + (0.0,) * (MAX_ORDER - len(orders)))
        _check(self)

    @property
    def c_n(self) -> float:
        return self.signal * self.shares[0]

    @property
    def c_l(self) -> float:
        return self.signal * self.shares[1]

    @property
    def c_m(self) -> float:
        return self.signal * self.shares[2]

    @property
    def c_b(self) -> float:
        return self.signal * self.shares[3]

    @property
    def has_n(self) -> bool:
        return self.shares[0] > 0

    @property
    def has_l(self) -> bool:
        return self.shares[1] > 0

    @property
    def shows_codes(self) -> bool:
        """Whether models are given the signs of the cross fields."""
        return self.codes in ("oracle", "oracle_history")

    @property
    def shows_history_codes(self) -> bool:
        """Whether models are given the signs of events and of the candidate instead of the items' ids."""
        return self.has_l and self.codes == "oracle_history"

    @property
    def shows_item(self) -> bool:
        """Whether models need the candidate's item id: its bias, or its signs where those are not given."""
        return self.has_b or (self.has_l and not self.shows_history_codes)

    @property
    def has_m(self) -> bool:
        return self.shares[2] > 0

    @property
    def has_b(self) -> bool:
        return self.shares[3] > 0

    @property
    def has_history(self) -> bool:
        """Whether batches carry a history: only if a part reads it."""
        return self.has_l or self.drift > 0

    @property
    def vocabulary(self) -> int:
        """Ids of each cross field."""
        return BLOCK * self.blocks

    def task_bias(self, task: int) -> float:
        return (self.b, self.task_b)[task]

    def history_exponent(self, task: int) -> float:
        return (self.lam, self.task_lam)[task]

    def quanta_variances(self) -> Float64[np.ndarray, " K"]:
        """Variance of every term of N: a_k^2 = c_N [k^-alpha - (k+1)^-alpha], k = 1 ... quanta."""
        return power_differences(self.c_n, self.alpha, self.quanta)

    def history_variances(self, task: int = 0) -> Float64[np.ndarray, " S"]:
        """Variance that every event adds: kappa_l^2 = c_L [l^-lam - (l+1)^-lam], l = 1 ... history_max."""
        return power_differences(self.c_l, self.history_exponent(task), self.history_max)

    def quanta_tail(self) -> float:
        """Variance of the terms beyond the last, part of the noise: c_N (K+1)^-alpha."""
        return self.c_n * (self.quanta + 1.0) ** -self.alpha

    def history_tail(self, task: int = 0) -> float:
        """Variance of the events beyond the last, part of the noise: c_L (history_max+1)^-lam."""
        return self.c_l * (self.history_max + 1.0) ** -self.history_exponent(task)

    def missing_history(self, seen: Any, task: int = 0) -> Float64[np.ndarray, " ..."]:
        """Variance of L that the newest `seen` events leave out, mean over requests; array of real numbers >= 0.

        A full history goes on beyond its last event: its tail counts, and infinitely many events would hold it. A
        ragged one of m events ends there: E_m c_L [(min(seen, m) + 1)^-lam - (m + 1)^-lam].
        """
        exponent, seen = -self.history_exponent(task), np.asarray(seen, np.float64)
        whole = np.asarray(self.c_l * (seen + 1.0) ** exponent)
        if not self.ragged:
            return whole
        law, m = self.length_law(), np.arange(self.history_max)
        short = self.c_l * ((np.minimum(seen[..., None], m) + 1.0) ** exponent - (m + 1.0) ** exponent)
        return np.asarray(short @ law[:-1] + law[-1] * whole)

    def noise_variance(self, task: int = 0) -> float:
        """Variance s_eta^2 of the unobservable noise of a request with a full history: both tails."""
        return self.quanta_tail() + self.history_tail(task)

    def missed_mass(self, ranks: Any) -> Float64[np.ndarray, " ..."]:
        """Share of rows whose pair is none of the `ranks` (real) most popular: sum over k > ranks of k^-a / zeta(a), or
        1 - ranks / pair_items where all are alike."""
        if not self.a:
            return np.asarray(np.maximum(1.0 - np.asarray(ranks, np.float64) / self.pair_items, 0.0))
        return np.asarray(zeta(self.a, np.asarray(ranks, np.float64) + 1.0) / zeta(self.a, 1.0))

    def fresh_share(self) -> float:
        """Probability of a pair beyond `pair_items`, whose sign is unobservable."""
        return float(self.missed_mass(self.pair_items)) if self.has_m else 0.0

    def length_law(self) -> Float64[np.ndarray, " lengths"]:
        """Probability of each history length 0 ... history_max: [S + 1]."""
        law = np.zeros(self.history_max + 1)
        if not self.ragged:
            law[-1] = 1.0
            return law
        lengths = (np.arange(2**16, dtype=np.int64) * (self.history_max + 1)) >> 16
        return np.bincount(lengths, minlength=self.history_max + 1) / 2.0**16

    def domain_law(self) -> Float64[np.ndarray, " G"]:
        """Probability of each domain, proportional to 1 / (g + 1) before rounding to 2^-16."""
        weights = 1.0 / np.arange(1, self.domains + 1)
        edges = np.round(2.0**16 * np.cumsum(weights) / weights.sum())
        return np.diff(edges, prepend=0.0) / 2.0**16

    @functools.cached_property
    def hash(self) -> str:
        """Identity of the log: first 16 hex digits of a SHA-256."""
        return _digest(self._identity())

    @functools.cached_property
    def truth_hash(self) -> str:
        """Identity of the truth: equal for configurations that differ only in how inputs are presented."""
        return _digest({k: v for k, v in self._identity().items() if k not in _INPUT_ONLY})

    def _identity(self) -> dict[str, Any]:
        """The fields that tell logs apart; one that is off where a log was made before it existed is left out."""
        off = {"disjoint": not self.disjoint} | dict.fromkeys(_CONTENT, not self.content_tokens)
        return {k: v for k, v in dataclasses.asdict(self).items() if not off.get(k, False)}


_HISTORY = dict(match_groups=16, code_width=16)

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": dict(
        b=-1.7, shares=(0.45, 0.30, 0.15, 0.10), quanta=256, blocks=8,
        history_max=32, match_groups=1, code_width=8, clusters=4, pair_items=2**8,
    ),
    "base": dict(b=-2.0, shares=(0.40, 0.30, 0.20, 0.10), history_max=256, clusters=64, pair_items=2**14, **_HISTORY),
    "sparse": dict(b=-3.5, shares=(0.40, 0.30, 0.20, 0.10), history_max=256, clusters=64, pair_items=2**14, **_HISTORY),
    "dense": dict(
        b=-1.7, shares=(1.0, 0.0, 0.0, 0.0), codes="oracle", quanta=1024, alpha=1.0, order_shares=(0.0, 1.0),
        nested=False, disjoint=True, blocks=8, soft_labels=True,
    ),
    "dense_nested": dict(
        b=-1.7, shares=(1.0, 0.0, 0.0, 0.0), codes="oracle", quanta=1024, code_bits=8,
        order_shares=(0.10, 0.90), blocks=8,
    ),
    "long": dict(
        b=-2.0, shares=(0.15, 0.70, 0.05, 0.10), quanta=1024,
        history_max=4096, clusters=64, pair_items=2**12, **_HISTORY,
    ),
    "memory": dict(
        b=-2.0, shares=(0.25, 0.15, 0.50, 0.10), quanta=1024,
        history_max=128, clusters=256, pair_items=2**16, **_HISTORY,
    ),
    "content": dict(
        b=-1.7, shares=(0.10, 0.80, 0.0, 0.10), quanta=64, blocks=256,
        history_max=32, match_groups=1, code_width=8, content_tokens=8, query_tokens=4,
    ),
}  # fmt: skip


def preset(name: str, **overrides: Any) -> KnownTruthConfig:
    """Configuration of a preset, with fields replaced by `overrides`.

    smoke   continuous integration and overfit tests: everything small, no categories.
    base    the default. sparse: the same at a click rate near 5 %.
    dense   N alone with its signs given: the clean `dense_params` axis. 1,024 pairs over 8 fields of 31 signs, the
            strongest 124 of them disjoint, alpha 1, labels that are probabilities: what is short is capacity, and the
            excess falls by an order of magnitude over two decades of parameters.
    dense_nested  the same axis with 8 signs a field, nested terms, alpha .35 and drawn labels: pairs share signs, so
            few parameters recover most of it. For the wide variant, with orders 1 to 4 over 31 signs, override
            `code_bits=31, order_shares=(.10, .45, .25, .20), quanta=4096`.
    long    70 % of the variance in 4,096 events: the `history_length` axis.
    memory  half the variance in 16.8 million pairs: the `memory_slots` axis.
    content 80 % of the variance in 32 events of 8,192 items, most of them rare; tokens say what they are made of.

    Raises:
        ValueError: for an unknown preset, an unknown field or a value of another type.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; expected one of {', '.join(PRESETS)}")
    return replace(KnownTruthConfig(**PRESETS[name]), **overrides)


def replace(config: KnownTruthConfig, **overrides: Any) -> KnownTruthConfig:
    """The configuration with fields replaced, each checked for its name and its type; lists become tuples.

    Raises:
        ValueError: an unknown field (the nearest is named), or a value of another type.
    """
    plain = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    unknown = [name for name in overrides if name not in plain]
    if unknown:
        raise ValueError(f"known-truth log: unknown fields {', '.join(unknown)}{nearest(unknown[0], plain)}")
    return freeze(KnownTruthConfig, plain | overrides, "known-truth log")


def power_differences(c: float, exponent: float, terms: int) -> Float64[np.ndarray, " {terms}"]:
    """Differences of a power law, c [k^-exponent - (k+1)^-exponent], k = 1 ... terms."""
    k = np.arange(1, terms + 1, dtype=np.float64)
    # expm1 keeps the relative accuracy of a difference of nearly equal powers.
    return -c * k**-exponent * np.expm1(-exponent * np.log1p(1.0 / k))


def _digest(values: dict[str, Any]) -> str:
    text = json.dumps({"version": GENERATOR_VERSION, **values}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check(config: KnownTruthConfig) -> None:
    def require(ok: bool, name: str, expected: str) -> None:
        if not ok:
            raise ValueError(f"known-truth log: {name} is {getattr(config, name)!r}, expected {expected}")

    def power(value: int, low: int, high: int) -> bool:
        return low <= value <= high and value & (value - 1) == 0

    require(len(config.shares) == 4 and min(config.shares) >= 0 and abs(sum(config.shares) - 1) < 1e-9,
            "shares", "four non-negative numbers (N, L, M, B) that sum to 1")  # fmt: skip
    require(len(config.order_shares) == MAX_ORDER and min(config.order_shares) >= 0
            and abs(sum(config.order_shares) - 1) < 1e-9,
            "order_shares", f"at most {MAX_ORDER} non-negative numbers that sum to 1")  # fmt: skip
    if config.disjoint:
        require(config.order_shares[1] == 1, "order_shares", "(0, 1): with disjoint, all terms are pairs")
        require(not config.nested, "nested", "False with disjoint: a nested term shares its parent's signs")
        require(config.domains == config.tasks == 1, "disjoint", "False unless there are one domain and one task")
    require(config.signal > 0, "signal", "a positive variance")
    require(config.alpha > 0, "alpha", "a positive exponent")
    require(config.lam > 0, "lam", "a positive exponent")
    require(config.task_lam > 0, "task_lam", "a positive exponent")
    require(config.a > 1 or config.a == 0, "a", "an exponent above 1 (the pair popularity must have a finite sum) or 0")
    require(config.quanta >= 1, "quanta", "at least 1")
    require(power(config.blocks, 1, 2**15), "blocks", "a power of two up to 32768")
    require(1 <= config.code_bits <= BLOCK - 1, "code_bits", "1 to 31")
    codes = typing.get_args(Codes)
    require(config.codes in codes, "codes", f"one of {', '.join(codes)}")
    require(config.codes != "none" or not config.has_n, "codes", "another value unless N has no share")
    require(
        2 <= config.history_max <= 2**15 and config.history_max % 2 == 0,
        "history_max",
        "an even number, 2 to 32768",
    )
    require(power(config.match_groups, 1, 2**15), "match_groups", "a power of two up to 32768")
    require(power(config.code_width, 2, 16), "code_width", "a power of two, 2 to 16")
    require(power(config.clusters, 2, 2**16), "clusters", "a power of two, 2 to 65536")
    require(power(config.pair_items, BLOCK, 2**24), "pair_items", "a power of two, 32 to 2^24")
    require(config.domains >= 1, "domains", "at least 1")
    require(0 <= config.domain_shared <= 1, "domain_shared", "a share between 0 and 1")
    require(config.tasks in (1, 2), "tasks", "1 or 2")
    require(0 <= config.task_common <= 1, "task_common", "a share between 0 and 1")
    require(not config.cascade or config.tasks == 2, "cascade", "False unless tasks is 2")
    require(config.continuing_stride >= 1, "continuing_stride", "at least 1")
    require(config.content_tokens == 0 or config.has_l, "content_tokens", "0 unless L has a share: it tells its signs")
    require(config.content_tokens >= 0, "content_tokens", "0 or more")
    require(config.content_tokens == 0 or 1 <= config.query_tokens <= config.content_tokens, "query_tokens",
            f"1 to content_tokens, {config.content_tokens}")  # fmt: skip
    require(1 <= config.content_bits <= min(8, config.code_width), "content_bits", "1 to 8 of the code_width signs")
    require(0 <= config.content_flip < 0.5, "content_flip", "a probability below one half")
    require(0 <= config.drift <= 8, "drift", "0 to 8 hidden states")
    require(
        not (config.soft_labels and config.drift),
        "soft_labels",
        "False with drift: p* needs a recursion over events",
    )
    if config.pair_field and 4 * config.clusters * config.pair_items >= 2**31:
        raise ValueError(
            f"known-truth log: pair_field needs {4 * config.clusters * config.pair_items} ids, more than int32 holds; "
            "lower clusters or pair_items"
        )
