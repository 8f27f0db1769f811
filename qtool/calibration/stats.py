"""Statistics of the inputs of linear layers: one per distinct input, as sums over tokens.

Shapes: N tokens, I input features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qtool.errors import QtoolError


@dataclass
class InputStats:
    """Sums over `count` tokens x of one input."""

    second_moment_II: Tensor  # float32, sum of x x^T
    count: int = 0

    @classmethod
    def empty(cls, inputs: int, device: torch.device) -> InputStats:
        return cls(torch.zeros(inputs, inputs, device=device))

    def add(self, x_NI: Tensor) -> None:
        self.second_moment_II.addmm_(x_NI.T, x_NI)
        self.count += x_NI.shape[0]

    def mean(self, name: str) -> Tensor:
        """X^T X / N, [I, I]. Raises QtoolError naming the layer when it saw no token or something not finite."""
        if not self.count:
            raise QtoolError(f"`{name}` saw no token of the calibration data", "give more varied data")
        mean_II = self.second_moment_II / self.count
        if not torch.isfinite(mean_II.diagonal()).all():
            raise QtoolError(f"the inputs of `{name}` are not finite on the calibration data")
        return mean_II


@contextmanager
def collecting(block: nn.Module, layers: Iterable[str], device: torch.device) -> Iterator[dict[str, InputStats]]:
    """While it is open, the inputs of these linears of a block are added up."""
    stats: dict[str, InputStats] = {}
    handles = []
    for layer in layers:
        linear = block.get_submodule(layer)
        stats[layer] = InputStats.empty(linear.in_features, device)

        def hook(_: nn.Module, args: tuple[Tensor, ...], layer: str = layer) -> None:
            stats[layer].add(args[0].flatten(0, -2))

        handles.append(linear.register_forward_pre_hook(hook))
    try:
        yield stats
    finally:
        for handle in handles:
            handle.remove()
