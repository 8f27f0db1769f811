"""GPTQ towards the float model's outputs (GPTAQ, arXiv 2504.02692; Qronos, arXiv 2505.11695).

GPTQ asks of a quantized layer what the float layer would do with the quantized model's input x. The float
model had x_f there. Minimizing E|W x_f - W^ x|^2 over W^ is the same quadratic in W^ as GPTQ's, centred at

    W + W C H^-1,  C = E[(x_f - x) x^T],  H = E[x x^T]

so the weight moves there first and is then rounded with feedback. Each input is measured after the layers
before it were solved, which costs forward passes: two to three times
GPTQ's time on a small model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from qtool.methods.gptq import GPTQ

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.calibration.stats import Moments


@dataclass(frozen=True)
class GPTAQ(GPTQ):
    """Options of `gptaq`: those of `gptq`."""

    needs: ClassVar[frozenset[str]] = frozenset({"second", "cross"})

    def _target(self, weight_OI: Tensor, moments: Moments, factor_II: Tensor, order_I: Tensor) -> Tensor:
        import torch

        assert moments.cross_II is not None
        backwards_I = order_I.flip(0)  # the factor's own order
        moved_IO = torch.cholesky_solve((weight_OI @ moments.cross_II[:, backwards_I]).T, factor_II)
        target_OI = weight_OI.clone()
        target_OI[:, backwards_I] += moved_IO.T
        return target_OI
