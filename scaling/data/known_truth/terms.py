"""Which products of the signs of several fields make up the cross-feature signal of the known-truth log, its part N.

Term k has a set of (field, bit) pairs with distinct fields; psi_k is the product of those signs. Distinct
sets give exactly orthonormal psi, so Var z_N is the sum of the a_k^2 and every subset of terms has a known
variance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Int

from .config import BIASED_FIELDS, CROSS_FIELDS, MAX_ORDER, REQUEST_FIELDS, KnownTruthConfig
from .words import Draws

_ATTEMPTS = 20_000
_ORDER_ONE_FIELDS = tuple(i for i, name in enumerate(CROSS_FIELDS) if name not in BIASED_FIELDS)
_REQUEST = frozenset(i for i, name in enumerate(CROSS_FIELDS) if name in REQUEST_FIELDS)

Term = tuple[tuple[int, int], ...]  # ((field, bit), ...), sorted


@dataclasses.dataclass(frozen=True)
class TermPlan:
    """Every term of a world.

    order: number of signs multiplied; request_only: the term is constant within a request; shared: the same in all
    domains; common: the same for both labels; parent: index of the term it extends, -1 if none (first label, first
    domain); terms[task][domain][k]: the (field, bit) pairs.
    """

    order: Int[np.ndarray, " K"]
    request_only: Bool[np.ndarray, " K"]
    shared: Bool[np.ndarray, " K"]
    common: Bool[np.ndarray, " K"]
    parent: Int[np.ndarray, " K"]
    terms: tuple[tuple[tuple[Term, ...], ...], ...]


def plan_terms(config: KnownTruthConfig) -> TermPlan:
    """Chooses orders, classes and tuples of all K terms, deterministically from the world seed.

    Order k goes to the order whose accumulated variance is furthest below its share, so every prefix has
    nearly the target shares; the same walk decides shared or private (domains) and common or own (tasks).
    Private and own versions of a term keep its order and its side (request-only or not), so the closed forms
    hold in each of them.

    Raises:
        ValueError: if fewer distinct tuples exist than terms are wanted.
    """
    chooser = _Chooser(config)
    orders, request_only, shared, common, parents = [], [], [], [], []
    order_walk = _Walk(config.order_shares)
    domain_walk = _Walk((config.domain_shared, 1 - config.domain_shared) if config.domains > 1 else (1.0, 0.0))
    task_walk = _Walk((config.task_common, 1 - config.task_common) if config.tasks > 1 else (1.0, 0.0))
    for variance in config.quanta_variances():
        is_shared = domain_walk.take(variance) == 0
        is_common = task_walk.take(variance) == 0
        order, parent = chooser.place(order_walk.ranking(variance), is_shared, is_common)
        if order is None:
            raise ValueError(
                f"known-truth log: quanta is {config.quanta}, but only {len(orders)} distinct terms exist for "
                f"{len(CROSS_FIELDS)} fields x {config.code_bits} signs at order_shares {config.order_shares}; lower "
                "quanta, raise code_bits, or give a share to a higher order"
            )
        order_walk.add(order - 1, variance)
        orders.append(order)
        request_only.append(_is_request_only(chooser.terms[0, 0][-1]))
        shared.append(is_shared)
        common.append(is_common)
        parents.append(parent)
    return TermPlan(
        np.asarray(orders), np.asarray(request_only, bool), np.asarray(shared, bool), np.asarray(common, bool),
        np.asarray(parents),
        tuple(tuple(tuple(chooser.terms[t, g]) for g in range(config.domains)) for t in range(config.tasks)),
    )  # fmt: skip


class _Walk:
    """Keeps accumulated variance close to fixed shares."""

    def __init__(self, shares: Iterable[float]):
        self.shares = np.asarray(tuple(shares))
        self.sums = np.zeros(len(self.shares))
        self.total = 0.0

    def ranking(self, variance: float) -> list[int]:
        """Classes with a share, the one furthest below its target first."""
        deficit = self.shares * (self.total + variance) - self.sums
        return [int(i) for i in np.argsort(-deficit, kind="stable") if self.shares[i] > 0]

    def add(self, index: int, variance: float) -> None:
        self.sums[index] += variance
        self.total += variance

    def take(self, variance: float) -> int:
        index = self.ranking(variance)[0]
        self.add(index, variance)
        return index


class _Chooser:
    """Draws distinct tuples, extending earlier terms where the configuration is nested."""

    def __init__(self, config: KnownTruthConfig):
        self.config = config
        self.draws = Draws(config.world_seed, 1)
        self.used: set[Term] = set()
        keys = [(t, g) for t in range(config.tasks) for g in range(config.domains)]
        self.terms: dict[tuple[int, int], list[Term]] = {key: [] for key in keys}
        self.by_order: dict[tuple[int, int], dict[int, list[tuple[Term, int]]]] = {
            key: {order: [] for order in range(1, MAX_ORDER + 1)} for key in keys
        }
        self.exhausted: set[tuple] = set()
        self.waiting: list[Term] = []  # pairs of the current matching of all signs, for `disjoint`
        free = [(f, j) for f in _ORDER_ONE_FIELDS for j in range(1, config.code_bits + 1)]
        self.first_order: list[Term] = [(free[i],) for i in self.draws.permutation(len(free))]

    def place(self, ranking: list[int], shared: bool, common: bool) -> tuple[int | None, int]:
        """Adds one term to every (task, domain), of the first order of the ranking that has enough tuples left.

        Returns the order (None if none has) and the parent's index in the first task and domain (-1: none).
        """
        for order in (index + 1 for index in ranking):
            versions, parent = self._versions(order, shared, common)
            if versions is None:
                continue
            for key, term in versions.items():
                self.by_order[key][order].append((term, len(self.terms[key])))
                self.terms[key].append(term)
            return order, parent
        return None, -1

    def _versions(self, order: int, shared: bool, common: bool) -> tuple[dict | None, int]:
        """One tuple per (task, domain): equal where shared or common, else own ones of the same side."""
        drawn: dict[tuple[int, int], Term] = {}
        parent, side = -1, None
        for task, domain in self.terms:
            source = (0 if common else task, 0 if shared else domain)
            if source in drawn:
                continue
            term, index = self._draw(source, order, side)
            if term is None:
                self.used.difference_update(drawn.values())
                self.first_order.extend(drawn.values() if order == 1 else ())
                return None, -1
            drawn[source] = term
            self.used.add(term)
            if side is None:
                parent, side = index, _is_request_only(term)
        return {(t, g): drawn[0 if common else t, 0 if shared else g] for t, g in self.terms}, parent

    def _draw(self, key: tuple[int, int], order: int, side: bool | None) -> tuple[Term | None, int]:
        if (key, order, side) in self.exhausted:
            return None, -1
        if self.config.disjoint:
            term, parent = self._draw_disjoint(), -1
        else:
            term, parent = self._draw_first(side) if order == 1 else self._draw_product(key, order, side)
        if term is None and order > 1:
            self.exhausted.add((key, order, side))
        return term, parent

    def _draw_first(self, side: bool | None) -> tuple[Term | None, int]:
        for index, term in enumerate(self.first_order):
            if side is None or _is_request_only(term) == side:
                return self.first_order.pop(index), -1
        return None, -1

    def _draw_disjoint(self) -> Term | None:
        """The next pair of a perfect matching of all signs, or of a new matching where the last is used up."""
        self.waiting = self.waiting or self._matching()
        return self.waiting.pop() if self.waiting else None

    def _matching(self) -> list[Term]:
        """A random perfect matching of all signs, every pair of two fields and none used before; [] if not found.

        A shuffle, then faulty pairs exchange their second sign with random others until none is left.
        """
        signs = [(f, j) for f in range(len(CROSS_FIELDS)) for j in range(1, self.config.code_bits + 1)]
        order = [signs[i] for i in self.draws.permutation(len(signs))]
        first, second = order[::2], order[1::2]

        def faulty(i: int) -> bool:
            return first[i][0] == second[i][0] or tuple(sorted((first[i], second[i]))) in self.used

        for _ in range(_ATTEMPTS):
            faults = [i for i in range(len(first)) if faulty(i)]
            if not faults:
                return [tuple(sorted(pair)) for pair in zip(first, second, strict=True)]
            for i in faults:
                j = self.draws.below(len(second))
                second[i], second[j] = second[j], second[i]
        return []

    def _draw_product(self, key: tuple[int, int], order: int, side: bool | None) -> tuple[Term | None, int]:
        parents = self.by_order[key][order - 1] if self.config.nested else []
        for _ in range(_ATTEMPTS):
            parent, index = parents[self.draws.below(len(parents))] if parents else ((), -1)
            pairs = list(parent)
            while len(pairs) < order:
                field = self.draws.below(len(CROSS_FIELDS))
                if all(field != other for other, _ in pairs):
                    pairs.append((field, 1 + self.draws.below(self.config.code_bits)))
            term = tuple(sorted(pairs))
            if term not in self.used and (side is None or _is_request_only(term) == side):
                return term, index
        return None, -1


def _is_request_only(term: Term) -> bool:
    return all(field in _REQUEST for field, _ in term)
