"""Scales, zero points and norms end to end, under frozen codes (E2E-QP of EfficientQAT, arXiv 2407.11062).

What is in memory is the codes, a byte for each weight, one dense weight at a time, and the rest of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qtool.finishing import EndToEnd

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qtool.finishing.linear import QuantizedLinear
    from qtool.numerics.grid import Grid, QTensor


@dataclass(frozen=True)
class Scales(EndToEnd):
    """Options of `scales`. The learning rate is that of scales and norms, as shares of themselves."""

    epochs: int | None = 4
    lr: float = 0.002

    def linear(
        self, weight: QTensor, grid: Grid, bias: nn.Parameter | None, float_weight: Callable[[], Tensor]
    ) -> QuantizedLinear:
        from qtool.finishing.linear import CodedLinear

        return CodedLinear(weight, grid, bias)
