"""SmoothQuant (arXiv 2211.10438, eq. 4): outliers of the inputs move into the weights, where they cost less.

s_j = max|x_j|^a / max|W_j|^(1-a). The paper has one strength a for all layers; here each input gets the one of least
expected output error, weights and inputs rounded, and none when that is best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from qtool.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.calibration.stats import Moments
    from qtool.numerics.grid import Grid
    from qtool.transforms import Scales

STEPS = 20  # of the search, from 0 to 1


@dataclass(frozen=True)
class SmoothQuant:
    """Options of `smoothquant`."""

    strength: float | None = None  # 0: all range into the inputs, 1: all into the weights; default searched

    needs: ClassVar[frozenset[str]] = frozenset({"vectors", "second"})

    def __post_init__(self) -> None:
        if self.strength is not None and not 0 <= self.strength <= 1:
            raise UsageError(f"smoothquant.strength={self.strength} is not between 0 and 1", "leave it out to search")

    def scales(self, weights: Sequence[Tensor], grid: Grid, moments: Moments, share_I: Tensor | None) -> Scales | None:
        """See `qtool.transforms.ScaleTransform`."""
        import torch

        from qtool.transforms import Scales
        from qtool.transforms.input_error import rounding_noise
        from qtool.transforms.scaling import best_scales, powers, shared

        assert moments.vectors is not None
        assert moments.second_II is not None
        inputs_I = shared(moments.vectors.absmax_I, share_I, "amax")
        weights_I = shared(torch.stack([w.abs().amax(0) for w in weights]).amax(0), share_I, "amax")
        if self.strength is not None:
            return Scales(
                powers(inputs_I, weights_I, self.strength, 1 - self.strength), f"strength {self.strength:.2f}"
            )
        squares_I = torch.stack([w.square().sum(0) for w in weights]).sum(0)
        activations = grid.scheme.activations

        def input_error(scale_I: Tensor) -> float:
            if activations is None:
                return 0.0
            noise_I = rounding_noise(activations, moments, scale_I)
            return float((noise_I * scale_I.square() * squares_I).sum(dtype=torch.float64))

        candidates = [
            (f"strength {a:.2f}", powers(inputs_I, weights_I, a, 1 - a)) for a in (i / STEPS for i in range(STEPS + 1))
        ]
        return best_scales(weights, grid, moments.second_II, candidates, input_error)
