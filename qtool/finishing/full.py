"""All weights and scales end to end, as they will be packed in every forward pass (QAT, arXiv 1712.05877)."""

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
class Full(EndToEnd):
    """Options of `full`. The learning rate is that of weights, in steps of their grid.

    It should take a weight about one step far in the whole run, lr * steps / 2 with a cosine: over much less no code
    changes, and over much more those change that follow noise.
    """

    epochs: int | None = 4
    lr: float = 0.02
    scale_lr: float = 0.002  # of scales and norms, as shares of themselves

    @property
    def scales_rate(self) -> float:
        return self.scale_lr / self.lr

    def linear(
        self, weight: QTensor, grid: Grid, bias: nn.Parameter | None, float_weight: Callable[[], Tensor]
    ) -> QuantizedLinear:
        from qtool.finishing.linear import LatentLinear

        return LatentLinear(weight, grid, bias, float_weight())
