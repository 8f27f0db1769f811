"""Round to nearest: the grid and nothing else. Needs no data and no model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from qtool.errors import unknown
from qtool.methods import Solution

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.calibration.stats import Moments
    from qtool.numerics.grid import IntGrid

SCALES = ("searched", "minmax")


@dataclass(frozen=True)
class RTN:
    """Options of `rtn`."""

    scales: str = "searched"  # searched: least squared error; minmax: from the range of each group

    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if self.scales not in SCALES:
            raise unknown("value of rtn.scales:", self.scales, SCALES)

    def solve(self, weight_OI: Tensor, grid: IntGrid, moments: Moments | None) -> Solution:
        from qtool.numerics.grid import QTensor

        params = grid.fit(weight_OI, search=self.scales == "searched")
        return Solution(QTensor(grid.encode(weight_OI, params), params, grid.scheme))
