"""GPTQ (arXiv 2210.17323): columns are rounded one after another, each making up for the errors before it.

With second moment H and error D = W - W^, the loss is tr(D H D^T). Factor H = R R^T with R upper
triangular; then the loss is |D R|^2, whose column j is D_j R_jj + sum_{k<j} D_k R_kj. Rounding
w_j + sum_{k<j} D_k R_kj / R_jj makes each term as small as the grid allows. These are GPTQ's codes
(its inverse Cholesky factor is R^-1), without an inverse and without rewriting the later columns.

Shapes: O out features, I in features, B columns of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from qtool.errors import QtoolError, UsageError, unknown
from qtool.methods import Solution

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.numerics.grid import GridParams, IntGrid

SCALES = ("searched", "minmax")
ORDERS = ("activation", "natural")
MOST_DAMPING = 1.0


@dataclass(frozen=True)
class GPTQ:
    """Options of `gptq`."""

    damp: float = 0.01  # added to the diagonal of H, relative to its mean
    order: str = "activation"  # activation: columns by falling diag(H); natural: as they stand
    scales: str = "searched"  # searched: least error weighted by diag(H); minmax: from the range of each group
    block: int = 128  # columns between two matrix products; speed only

    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.scales not in SCALES:
            raise unknown("value of gptq.scales:", self.scales, SCALES)
        if self.order not in ORDERS:
            raise unknown("value of gptq.order:", self.order, ORDERS)
        if self.damp < 0 or self.block < 1:
            raise UsageError(f"gptq.damp={self.damp} must not be negative and gptq.block={self.block} must be positive")

    def solve(self, weight_OI: Tensor, grid: IntGrid, second_moment_II: Tensor | None) -> Solution:
        from qtool.numerics.grid import QTensor

        assert second_moment_II is not None
        importance_I = second_moment_II.diagonal()
        params = grid.fit(weight_OI, importance_I, search=self.scales == "searched")
        order = importance_I.argsort(descending=True, stable=True) if self.order == "activation" else None
        factor_II, notes = upper_factor(second_moment_II, self.damp, order)
        codes = round_columns(weight_OI, grid, params, factor_II, order, self.block)
        return Solution(QTensor(codes, params, grid.scheme), notes)


def upper_factor(second_moment_II: Tensor, damp: float, order: Tensor | None) -> tuple[Tensor, list[str]]:
    """Upper triangular R with R R^T = H + damp mean(diag H), rows and columns permuted by `order`; notes on trouble.

    Tried in float32, then float64, then with ten times the damping. Inputs that are always zero get a unit diagonal.
    Raises QtoolError when even a damping of 1 does not help.
    """
    import torch

    notes = []
    moment = second_moment_II if order is None else second_moment_II[order][:, order]
    diagonal = moment.diagonal()
    mean = float(diagonal.mean()) or 1.0
    dead = int((diagonal == 0).sum())
    if dead:
        notes.append(f"{dead} of {len(diagonal)} inputs are always zero on the calibration data")
    amount = damp
    while True:
        damped = moment.flip(0, 1)
        damped.diagonal().add_(amount * mean)
        damped.diagonal()[diagonal.flip(0) == 0] = mean
        for dtype in (torch.float32, torch.float64):
            factor, failed = torch.linalg.cholesky_ex(damped.to(dtype))
            if not failed:
                return factor.flip(0, 1).float(), notes
        amount = max(10 * amount, 1e-4)
        if amount > MOST_DAMPING:
            raise QtoolError("the second moment of the inputs is not positive definite even with a damping of 1")
        notes.append(f"H is not positive definite: damping raised to {amount:g}")


def round_columns(
    weight_OI: Tensor, grid: IntGrid, params: GridParams, factor_II: Tensor, order: Tensor | None, block: int
) -> Tensor:
    """uint8 codes [O, I] by the rule above; `factor_II` is permuted by `order`, weight and codes are not."""
    import torch

    from qtool.numerics.grid import GridParams

    rows, inputs = weight_OI.shape
    order = torch.arange(inputs, device=weight_OI.device) if order is None else order
    feedback_II = factor_II / factor_II.diagonal()  # R_kj / R_jj
    weight_IO = weight_OI.T[order]  # a column of the weight is a row here: contiguous
    error_IO = torch.empty_like(weight_IO)
    codes_IO = torch.empty(inputs, rows, dtype=torch.uint8, device=weight_OI.device)
    for start in range(0, inputs, block):
        end = min(start + block, inputs)
        target_BO = torch.addmm(weight_IO[start:end], feedback_II[:start, start:end].T, error_IO[:start])
        columns = grid.per_column(params, order[start:end], rows, inputs)
        for j in range(end - start):
            behind = slice(start, start + j)
            target_O = torch.addmv(target_BO[j], error_IO[behind].T, feedback_II[behind, start + j])
            column = GridParams(columns.scale[:, j : j + 1], None if columns.zero is None else columns.zero[:, j : j + 1])
            codes_O1 = grid.encode(target_O[:, None], column)
            codes_IO[start + j] = codes_O1[:, 0]
            error_IO[start + j] = weight_IO[start + j] - grid.decode(codes_O1, column)[:, 0]
    codes_OI = torch.empty(rows, inputs, dtype=torch.uint8, device=weight_OI.device)
    codes_OI[:, order] = codes_IO.T
    return codes_OI
