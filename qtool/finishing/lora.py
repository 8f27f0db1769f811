"""A low-rank change of frozen quantized weights (LoRA, arXiv 2106.09685; QLoRA, 2305.14314): W^ + (alpha / rank) B A.

Merged, the sum is rounded to the weight's own grid in every forward pass, so that what was trained is what is packed.
Kept beside, it is a PEFT adapter in OUT/adapter, for programs that load adapters on quantized models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qtool.errors import UsageError
from qtool.finishing import EndToEnd

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qtool.finishing.linear import QuantizedLinear
    from qtool.numerics.grid import Grid, QTensor


@dataclass(frozen=True)
class LoRA(EndToEnd):
    """Options of `lora`. The learning rate is that of A and B; what they change is counted in steps of the grid."""

    epochs: int | None = 4
    lr: float = 0.02
    scale_lr: float = 0.002  # of norms, as shares of themselves
    rank: int = 16
    merge: bool = True  # onto the grid; false: an adapter beside the packed weights
    norms: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise UsageError(f"lora.rank={self.rank} must be at least 1")
        if self.norms and not self.merge:
            raise UsageError("an adapter beside the weights has no norms", "`lora.norms=false`, or `lora.merge=true`")

    @property
    def scales_rate(self) -> float:
        return self.scale_lr / self.lr

    def linear(
        self, weight: QTensor, grid: Grid, bias: nn.Parameter | None, float_weight: Callable[[], Tensor]
    ) -> QuantizedLinear:
        from qtool.finishing.linear import AdaptedLinear, MergedLinear

        if self.merge:
            return MergedLinear(weight, grid, bias, float_weight(), self.rank)
        return AdaptedLinear(weight, grid, bias, self.rank)
