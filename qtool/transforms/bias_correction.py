"""Bias correction (Data-Free Quantization, arXiv 1906.04721, sec. 4.2): rounding shall not move the mean output.

Where a linear has a bias, (W - W^) E x is added to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.calibration.stats import Moments


@dataclass(frozen=True)
class BiasCorrection:
    """`bias-correction` has no options."""

    needs: ClassVar[frozenset[str]] = frozenset({"vectors"})

    def shift(self, error_OI: Tensor, moments: Moments) -> Tensor:
        """See `qtool.transforms.BiasTransform`."""
        assert moments.vectors is not None
        return error_OI @ moments.vectors.mean_I
