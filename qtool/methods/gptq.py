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
from qtool.methods import Method, Solution

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qtool.calibration.stats import Moments
    from qtool.numerics.grid import Grid, Rounder

SCALES = ("searched", "minmax")
ORDERS = ("activation", "natural")
MOST_DAMPING = 1.0


@dataclass(frozen=True)
class GPTQ(Method):
    """Options of `gptq`."""

    damp: float = 0.01  # added to the diagonal of H, relative to its mean
    order: str = "activation"  # activation: columns by falling diag(H); natural: as they stand
    scales: str = "searched"  # searched: least error weighted by its cost; minmax: from the range of each group
    block: int = 128  # columns between two matrix products; speed only

    needs: ClassVar[frozenset[str]] = frozenset({"second"})

    def __post_init__(self) -> None:
        if self.scales not in SCALES:
            raise unknown("value of gptq.scales:", self.scales, SCALES)
        if self.order not in ORDERS:
            raise unknown("value of gptq.order:", self.order, ORDERS)
        if self.damp < 0 or self.block < 1:
            raise UsageError(f"gptq.damp={self.damp} must not be negative and gptq.block={self.block} must be positive")

    def solve(self, weight_OI: Tensor, grid: Grid, moments: Moments | None) -> Solution:
        import torch

        assert moments is not None
        assert moments.second_II is not None
        diagonal_I = moments.second_II.diagonal()
        order_I = torch.arange(len(diagonal_I), device=diagonal_I.device)
        if self.order == "activation":
            order_I = diagonal_I.argsort(descending=True, stable=True)
        factor_II, notes = reversed_factor(moments.second_II, self.damp, order_I)
        target_OI = self._target(weight_OI, moments, factor_II, order_I)
        importance_I = torch.empty_like(diagonal_I)
        importance_I[order_I] = factor_II.diagonal().flip(0).square()  # what an error costs after the feedback
        params = grid.fit(target_OI, importance_I, search=self.scales == "searched")
        rounder = grid.rounder(params, (len(target_OI), len(order_I)))
        round_columns(target_OI, rounder, factor_II, order_I, self.block)
        return Solution(rounder.result(), notes)

    def _target(self, weight_OI: Tensor, moments: Moments, factor_II: Tensor, order_I: Tensor) -> Tensor:
        """The weight to come close to."""
        return weight_OI


def reversed_factor(second_II: Tensor, damp: float, order_I: Tensor) -> tuple[Tensor, list[str]]:
    """Lower triangular L, the Cholesky factor of H + damp mean(diag H) with rows and columns in reversed `order_I`.

    Read backwards it is the R above: R_kj = L[I-1-k, I-1-j]. Tried in float32, then float64, then with ten
    times the damping, which the notes say. Inputs that are always zero get a diagonal of their own.
    Raises QtoolError when even a damping of 1 does not help.
    """
    import torch

    notes: list[str] = []
    backwards_I = order_I.flip(0)
    diagonal = second_II.diagonal()[backwards_I]
    mean = float(diagonal.mean()) or 1.0
    dead = diagonal == 0
    diagonal[dead] = mean
    amount = damp
    while True:
        for dtype in (torch.float32, torch.float64):
            # the transpose of a symmetric matrix is itself, stored as LAPACK wants it: factored in place
            damped = _permuted(second_II, backwards_I, dtype).mT
            damped.diagonal().copy_(diagonal + amount * mean)
            failed = torch.zeros((), dtype=torch.int32, device=damped.device)
            torch.linalg.cholesky_ex(damped, out=(damped, failed))
            if not failed:
                return damped.float(), notes
        amount = max(10 * amount, 1e-4)
        if amount > MOST_DAMPING:
            raise QtoolError("the second moment of the inputs is not positive definite even with a damping of 1")
        notes.append(f"H is not positive definite: damping raised to {amount:g}")


def _permuted(matrix_II: Tensor, order_I: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows and columns in another order, with no second copy on the way."""
    import torch

    result_II = torch.empty_like(matrix_II, dtype=dtype)
    for rows in torch.arange(len(order_I), device=order_I.device).split(256):
        result_II[rows] = matrix_II[order_I[rows]][:, order_I].to(dtype)
    return result_II


def round_columns(weight_OI: Tensor, rounder: Rounder, factor_II: Tensor, order_I: Tensor, block: int) -> None:
    """Every column through the rounder by the rule above. `factor_II` is `reversed_factor` for the same `order_I`."""
    import torch

    inputs = weight_OI.shape[1]
    # a column of the weight is a row here, contiguous; once it is rounded, its error takes its place
    error_IO = weight_OI.T[order_I]
    for start in range(0, inputs, block):
        end = min(start + block, inputs)
        feedback_IB = factor_II[inputs - end :, inputs - end : inputs - start].flip(0, 1)  # R_kj, k < end
        feedback_IB = feedback_IB / feedback_IB[start:].diagonal()
        target_BO = torch.addmm(error_IO[start:end], feedback_IB[:start].T, error_IO[:start])
        rounder.start(order_I[start:end])
        for j in range(end - start):
            behind = slice(start, start + j)
            target_O = torch.addmv(target_BO[j], error_IO[behind].T, feedback_IB[behind, j])
            error_IO[start + j] -= rounder.round(j, target_O)
