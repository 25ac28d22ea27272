"""What PyTorch offers for the operations of `recscale.pallas_kernels`: the public rivals of `recscale bench device`.

    product_key_topk    two products and topk, twice          sparse_gather     embedding_bag, weighted
    hybrid_attention    scaled_dot_product_attention          w8a16_matmul      a bfloat16 product, of twice the bytes
    per_token_ffn       two batched products                  grouped_matmul    a product for each group

Needs `torch`. On a GPU calls are captured as one CUDA graph, so that starting them costs nothing.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from recscale.pallas_kernels.cases import Case
from recscale.pallas_kernels.product_key_topk.reference import pair_ranks
from recscale.pallas_kernels.targets import Target

from .kernel_timing import Effort, input_sets
from .timing import quartiles

torch: Any = importlib.import_module("torch")  # its stub here knows what the benchmark of training needs
functional: Any = importlib.import_module("torch.nn.functional")

_LEAST_S = 2e-3


def names(operation: str, case: str) -> tuple[str, ...]:
    """The rivals at a case, as implementations are called."""
    return tuple(_RIVALS.get((operation, case.endswith("-backward")), {}))


def measure(case: Case, target: Target | None, name: str, effort: Effort) -> dict[str, Any]:
    """status, and the columns of `kernel_timing.time_calls`."""
    make = _RIVALS[case.operation, case.name.endswith("-backward")][name]
    calls = [make(case, [_tensor(array) for array in arrays]) for arrays in input_sets(case, target, effort)]
    return {"status": "measured", **_time(calls, effort, graph=target is not None)}


def _tensor(array: Any) -> Any:
    """The same numbers for PyTorch, on the device they are on; None stays."""
    return None if array is None else torch.from_dlpack(array)


def _time(calls: list[Callable[[], Any]], effort: Effort, graph: bool) -> dict[str, Any]:
    """Milliseconds of a call in programs of all calls, in as many rounds as take 2 ms."""

    def once() -> None:
        for call in calls:
            call()

    wait = torch.cuda.synchronize if graph else lambda: None
    for _ in range(3):
        once()
    wait()
    play = _captured(once) if graph else once

    def seconds(rounds: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(rounds):
            play()
        wait()
        return time.perf_counter() - start

    rounds = min(math.ceil(_LEAST_S / min(seconds(1) for _ in range(2))), 1000)
    times = [seconds(rounds) for _ in range(effort.warmup + effort.runs)][effort.warmup :]
    each = [time / (rounds * len(calls)) for time in times]
    return {**quartiles(each), "runs": effort.runs, "calls": len(calls), "rounds": rounds}


def _captured(once: Callable[[], None]) -> Callable[[], None]:
    """The calls as one CUDA graph; as they are where something of them cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            once()
    except RuntimeError:
        torch.cuda.synchronize()
        return once
    return graph.replay


# One function a rival: (case, tensors) -> the call to time.


def _topk(case: Case, arrays: list[Any]) -> Callable[[], Any]:
    q, keys, ds = arrays
    k, sub_keys = ds.shape[-1], keys.shape[2]
    i, j = (torch.as_tensor(rank, dtype=torch.long, device=q.device) for rank in pair_ranks(k))

    def call() -> tuple[Any, Any]:
        best, index = torch.topk(torch.einsum("nhap,hamp->nham", q, keys).float(), k)
        pairs = best[:, :, 0, i] + best[:, :, 1, j]
        slots = index[:, :, 0, i] * sub_keys + index[:, :, 1, j]
        scores, chosen = torch.topk(pairs, k)
        return scores, torch.gather(slots, -1, chosen)

    return call


def _bag(case: Case, arrays: list[Any]) -> Callable[[], Any]:
    values, ids, weights = arrays[:3]
    return lambda: _embedding_bag(values, ids, weights)


def _embedding_bag(values: Any, ids: Any, weights: Any) -> Any:
    return functional.embedding_bag(ids.clamp(min=0), values, mode="sum", per_sample_weights=weights.to(values.dtype))


def _bag_backward(case: Case, arrays: list[Any]) -> Callable[[], Any]:
    """With the forward it needs: its time is that of both."""
    values, ids, weights, dout = arrays[:4]
    values, weights = (x.detach().requires_grad_(True) for x in (values, weights.to(values.dtype)))
    return lambda: torch.autograd.grad(_embedding_bag(values, ids, weights), (values, weights), dout)


def _attention_arguments(case: Case, arrays: list[Any]) -> tuple[list[Any], Any]:
    """q, k, v as [R, H, rows, width], and which pairs see each other, bool [R, 1, N, S]."""
    made: Any = case.call  # of a partial function
    shape = made.keywords["shape"]
    q, k, v, lengths = arrays[:4]
    v = k if v is None else v
    heads = (shape.H, shape.key_heads, shape.key_heads)
    split = [
        x.reshape(x.shape[0], x.shape[1], count, -1).transpose(1, 2) for x, count in zip((q, k, v), heads, strict=True)
    ]
    key = torch.arange(shape.S, device=q.device)
    first = np.zeros(shape.C * shape.Q, np.int64)
    if shape.mode == "causal":
        first = np.tile(np.arange(shape.Q), shape.C)
    elif shape.positions() is not None:
        first = np.tile(np.asarray(shape.positions()), shape.C)
    seen = key[None] >= torch.as_tensor(first, device=q.device)[:, None]
    return split, seen[None, None] & (key < lengths[:, None])[:, None, None]


def _attention(case: Case, arrays: list[Any]) -> Callable[[], Any]:
    (q, k, v), seen = _attention_arguments(case, arrays)
    return lambda: functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def _attention_backward(case: Case, arrays: list[Any]) -> Callable[[], Any]:
    """With the forward it needs: its time is that of both."""
    inputs, seen = _attention_arguments(case, arrays)
    q, k, v = (x.detach().requires_grad_(True) for x in inputs)
    do = arrays[5].reshape(q.shape[0], q.shape[2], q.shape[1], -1).transpose(1, 2)
    return lambda: torch.autograd.grad(functional.scaled_dot_product_attention(q, k, v, attn_mask=seen), (q, k, v), do)


def _matmul(case: Case, arrays: list[Any]) -> Callable[[], Any]:
    x, _, _, w = arrays
    return lambda: torch.matmul(x, w)


def _per_token(case: Case, arrays: list[Any]) -> Callable[[], Any]:
    x, w1, b1, w2, b2 = arrays
    # Token-major, as batched products want it; laid out before the clock starts.
    x = x if x.ndim == 3 else x.reshape(x.shape[0], w1.shape[0], -1).transpose(0, 1).contiguous()

    def call() -> Any:
        hidden = functional.gelu(torch.baddbmm(b1[:, None], x, w1), approximate="tanh")
        return torch.baddbmm(b2[:, None], hidden, w2)

    return call


def _grouped(case: Case, arrays: list[Any]) -> Callable[[], Any]:
    x, w1, w2, sizes = arrays
    parts = torch.split(x[: int(sizes.sum())], sizes.tolist())
    return lambda: [torch.mm(torch.mm(part, a), b) for part, a, b in zip(parts, w1, w2, strict=True)]


# (operation, whether backward) -> name -> rival.
_RIVALS: dict[tuple[str, bool], dict[str, Callable[[Case, list[Any]], Callable[[], Any]]]] = {
    ("product_key_topk", False): {"torch topk": _topk},
    ("sparse_gather", False): {"torch embedding_bag": _bag},
    ("sparse_gather", True): {"torch embedding_bag": _bag_backward},
    ("hybrid_attention", False): {"torch SDPA": _attention},
    ("hybrid_attention", True): {"torch SDPA": _attention_backward},
    ("w8a16_matmul", False): {"torch bf16 (cuBLAS)": _matmul},
    ("per_token_ffn", False): {"torch baddbmm (cuBLAS)": _per_token},
    ("grouped_matmul", False): {"torch mm (cuBLAS)": _grouped},
}
