"""Norms that are trained: what they multiply by is always what a file would hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

SMALLEST = 0.01  # a weight nearer to zero moves as if it were so large


class TrainedNorm(nn.Module):
    """The weight of a norm [E], moved by trained shares of what it multiplies by, as it is stored."""

    def __init__(self, weight_E: Tensor, offset: float, stored: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.unit_E = (weight_E.detach() + offset).abs().clamp(min=SMALLEST)
        self.shares = nn.Parameter(torch.zeros_like(weight_E))
        self.stored, self.start_E = stored, weight_E.detach()

    def value(self) -> Tensor:
        """The weight as it is now."""
        return self(self.start_E).detach()

    def forward(self, weight_E: Tensor) -> Tensor:
        moved_E: Tensor = _Stored.apply(torch.addcmul(weight_E, self.unit_E, self.shares), self.stored)
        return moved_E


class _Stored(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, stored: Callable[[Tensor], Tensor]) -> Tensor:
        return stored(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None


def norms_of(model: nn.Module) -> dict[str, nn.Module]:
    """The norms with a weight, by name."""
    named = model.named_modules()
    return {n: m for n, m in named if type(m).__name__.endswith("Norm") and getattr(m, "weight", None) is not None}


def train_norm(norm: nn.Module, offset: float, stored: Callable[[Tensor], Tensor]) -> TrainedNorm:
    """Make the weight of a norm trained, by shares of what it multiplies by; `offset` is added to it there."""
    assert isinstance(norm.weight, Tensor)
    trained = TrainedNorm(norm.weight, offset, stored)
    parametrize.register_parametrization(norm, "weight", trained, unsafe=True)
    return trained
