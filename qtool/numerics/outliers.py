"""A grid beside which the most sensitive weights stay in 16 bits (SpQR, arXiv 2306.03078).

A weight is an outlier when rounding it would cost most: importance_j (w - w^)^2, w^ on the grid fitted to all
weights. The grid is then fitted to the others alone. How many there are is fixed by the scheme and the shape.
With error feedback an outlier takes up what the columns before it owe, as far as 16 bits can.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qtool.numerics.grid import Grid, GridParams, Outliers, QTensor, Rounder


class OutlierParams(GridParams):
    """GridParams with the `mask` [O, I] of the outliers."""

    mask: Tensor


@dataclass(frozen=True)
class OutlierGrid(Grid):
    """The grid of a scheme with outliers."""

    def fit(
        self, weight_OI: Tensor, importance_I: Tensor | None = None, search: bool = True, coarse: bool = False
    ) -> OutlierParams:
        params = super().fit(weight_OI, importance_I, search, coarse)
        cost_OI = (weight_OI - self.decode(self.encode(weight_OI, params), params)).square_()
        if importance_I is not None:
            cost_OI *= importance_I
        count = self.scheme.outlier_count(tuple(weight_OI.shape))
        mask = torch.zeros(weight_OI.shape, dtype=torch.bool, device=weight_OI.device)
        mask.view(-1)[cost_OI.reshape(-1).topk(count).indices] = True
        fitted = OutlierParams(*super().fit(weight_OI.masked_fill(mask, 0), importance_I, search, coarse))
        fitted.mask = mask
        return fitted

    def nearest(self, weight_OI: Tensor, params: GridParams) -> QTensor:
        assert isinstance(params, OutlierParams)
        return self.beside(super().nearest(weight_OI.masked_fill(params.mask, 0), params), params.mask, weight_OI)

    def rounder(self, params: GridParams, shape: tuple[int, int]) -> OutlierRounder:
        assert isinstance(params, OutlierParams)
        return OutlierRounder(self, params, shape)

    def beside(self, weight: QTensor, mask_OI: Tensor, exact_OI: Tensor) -> QTensor:
        """A quantized weight with the values of `exact_OI` where the mask is."""
        rows, columns = mask_OI.nonzero(as_tuple=True)
        ends = torch.cat([rows.new_zeros(1), mask_OI.sum(1).cumsum(0)]).int()
        values = exact_OI[rows, columns].to(self.scale_dtype)
        return replace(weight, params=GridParams(*weight.params), outliers=Outliers(ends, columns.int(), values))


class OutlierRounder(Rounder):
    """Rounds a column but for its outliers, which only lose what 16 bits lack."""

    def __init__(self, grid: OutlierGrid, params: OutlierParams, shape: tuple[int, int]) -> None:
        super().__init__(grid, params, shape)
        self.outlier_grid, self.mask = grid, params.mask
        self.exact_OI = torch.zeros(shape, dtype=grid.scale_dtype, device=params.scale.device)

    def round(self, j: int, target_O: Tensor) -> Tensor:
        column = self.columns[j]
        mask_O = self.mask[:, column]
        rounded_O = super().round(j, target_O.masked_fill(mask_O, 0))
        self.exact_OI[:, column] = target_O
        return torch.where(mask_O, self.exact_OI[:, column].float(), rounded_O)

    def result(self) -> QTensor:
        return self.outlier_grid.beside(super().result(), self.mask, self.exact_OI)
