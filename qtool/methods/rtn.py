"""Round to nearest: the grid and nothing else. Needs no data and no model.

Where statistics of the inputs are at hand, because a transform or a fixed input scale wants them, the search for
scales weights the error of each column by the mean square of its input: that is how AWQ clips.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from qtool.errors import unknown
from qtool.methods import Method, Solution

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.calibration.stats import Moments
    from qtool.numerics.grid import Grid

SCALES = ("searched", "minmax")


@dataclass(frozen=True)
class RTN(Method):
    """Options of `rtn`."""

    scales: str = "searched"  # searched: least squared error; minmax: from the range of each group

    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if self.scales not in SCALES:
            raise unknown("value of rtn.scales:", self.scales, SCALES)

    def solve(self, weight_OI: Tensor, grid: Grid, moments: Moments | None) -> Solution:
        importance_I = moments.diagonal_I if moments else None
        params = grid.fit(weight_OI, importance_I, search=self.scales == "searched")
        return Solution(grid.nearest(weight_OI, params))
