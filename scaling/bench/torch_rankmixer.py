"""RankMixer's blocks and head in PyTorch, the same equations: what `torch.compile` makes of them is our step's rival.

Token-major `bmm`/`baddbmm` and row-major einsum compute the same function; the benchmark takes the fastest.
Needs `torch` (`pip install "recscale[bench]"`); nothing else in the project imports this file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from jaxtyping import Float

LAYOUTS = ("baddbmm", "bmm", "einsum")


class Block(torch.nn.Module):
    """Post-norm block: S = LN(mix(X) + X), X = LN(PFFN(S) + S), on [T, B, D] ([B, T, D] for "einsum")."""

    def __init__(self, tokens: int, width: int, hidden: int, layout: str, eps: float = 1e-6):
        super().__init__()
        self.tokens, self.width, self.layout = tokens, width, layout
        self.up = torch.nn.Parameter(torch.empty(tokens, width, hidden))
        self.up_bias = torch.nn.Parameter(torch.zeros(tokens, hidden))
        self.down = torch.nn.Parameter(torch.empty(tokens, hidden, width))
        self.down_bias = torch.nn.Parameter(torch.zeros(tokens, width))
        self.mixing_norm = torch.nn.LayerNorm(width, eps=eps)
        self.ffn_norm = torch.nn.LayerNorm(width, eps=eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens, width = self.tokens, self.width
        if self.layout == "einsum":
            mixed = x.view(-1, tokens, tokens, width // tokens).permute(0, 2, 1, 3).reshape(x.shape)
        else:
            mixed = x.view(tokens, -1, tokens, width // tokens).permute(2, 1, 0, 3).reshape(x.shape)
        s = self.mixing_norm(mixed + x)
        return self.ffn_norm(self._feed_forward(s) + s)

    def _feed_forward(self, s: torch.Tensor) -> torch.Tensor:
        if self.layout == "einsum":
            hidden = torch.einsum("btd,tdf->btf", s, self.up) + self.up_bias
            return torch.einsum("btf,tfd->btd", _gelu(hidden), self.down) + self.down_bias
        if self.layout == "bmm":
            hidden = torch.bmm(s, self.up) + self.up_bias[:, None]
            return torch.bmm(_gelu(hidden), self.down) + self.down_bias[:, None]
        hidden = torch.baddbmm(self.up_bias[:, None], s, self.up)
        return torch.baddbmm(self.down_bias[:, None], _gelu(hidden), self.down)


class RankMixer(torch.nn.Module):
    """L blocks, mean over tokens, one linear head: x [T, B, D] ([B, T, D] for "einsum") -> logits [B]."""

    def __init__(self, tokens: int, width: int, hidden: int, layers: int, layout: str):
        super().__init__()
        self.layout = layout
        self.blocks = torch.nn.ModuleList(Block(tokens, width, hidden, layout) for _ in range(layers))
        self.head = torch.nn.Linear(width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=1 if self.layout == "einsum" else 0))[:, 0]

    def load(self, weights: Mapping[str, Any]) -> None:
        """Takes the weights of `train_step.weights_of`: the same model starts from the same point."""
        own = dict(self.named_parameters())
        if own.keys() != weights.keys():
            raise ValueError(f"weights do not match the model: {sorted(own.keys() ^ weights.keys())}")
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(torch.from_numpy(np.array(weights[name])))


def make_step(
    weights: Mapping[str, Any],
    x: Float[np.ndarray, "T B D"],
    labels: Float[np.ndarray, " B"],
    *,
    layers: int,
    layout: str,
    rate: float,
    compiled: bool = True,
    device: str = "cpu",
) -> tuple[Callable[[int], float], RankMixer]:
    """Adam on the batch: a function that does n steps and returns the loss of the last.

    Forward, loss and backward are compiled; the optimiser is PyTorch's fused Adam. On the device "cuda" products are in
    bfloat16, as ours are there.
    """
    tokens, width, hidden = weights["blocks.0.up"].shape
    model = RankMixer(tokens, width, hidden, layers, layout)
    model.load(weights)
    model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    inputs = torch.from_numpy(np.array(x if layout != "einsum" else x.transpose(1, 0, 2))).to(device)
    targets = torch.from_numpy(np.array(labels)).to(device)

    def loss_of(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            logits = model(inputs)
        return functional.binary_cross_entropy_with_logits(logits.float(), targets)

    loss_of = torch.compile(loss_of) if compiled else loss_of

    def run(steps: int) -> float:
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(inputs, targets)
            loss.backward()
            optimizer.step()
        return loss.item()

    return run, model


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x, approximate="tanh")
