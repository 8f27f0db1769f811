"""AWQ (arXiv 2306.00978, sec. 3.2): weights of channels with large inputs are scaled up, and so rounded more finely.

s_j = (E|x_j|)^a, or that over m_j^(1-a), m_j the mean of |W_j| relative to the largest weight of its group; a from a
grid, the pair of least output error, told from second moments without a forward pass. The paper clips ranges in a
second search. Here that is what fitting a grid does: candidates are rounded under scales of least weighted error.
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


@dataclass(frozen=True)
class AWQ:
    """Options of `awq`."""

    grid: int = 20  # exponents tried, from 0 to 1

    needs: ClassVar[frozenset[str]] = frozenset({"vectors", "second"})

    def __post_init__(self) -> None:
        if self.grid < 1:
            raise UsageError(f"awq.grid={self.grid} is not a positive number of exponents")

    def scales(self, weights: Sequence[Tensor], grid: Grid, moments: Moments, share_I: Tensor | None) -> Scales | None:
        """See `qtool.transforms.ScaleTransform`."""
        from qtool.transforms.scaling import best_scales, powers, shared

        assert moments.vectors is not None
        assert moments.second_II is not None
        inputs_I = shared(moments.vectors.mean_abs_I, share_I, "mean")
        weights_I = shared(relative_magnitudes(weights, grid), share_I, "mean")
        exponents = [i / self.grid for i in range(self.grid + 1)]
        candidates = [(f"inputs^{a:.2f}", powers(inputs_I, weights_I, a, 0)) for a in exponents[1:]]
        candidates += [
            (f"inputs^{a:.2f} / weights^{1 - a:.2f}", powers(inputs_I, weights_I, a, 1 - a)) for a in exponents[:-1]
        ]
        return best_scales(weights, grid, moments.second_II, candidates, lambda _: 0.0)


def relative_magnitudes(weights: Sequence[Tensor], grid: Grid) -> Tensor:
    """Mean over all rows of |w| / max|w| of its group, [I]."""
    import torch

    sums = []
    for weight_OI in weights:
        magnitude_OGK = weight_OI.abs().unflatten(1, (grid.scheme.groups(weight_OI.shape[1]), -1))
        largest_OG1 = magnitude_OGK.amax(-1, keepdim=True)
        sums.append((magnitude_OGK / largest_OG1.masked_fill(largest_OG1 == 0, 1)).sum(0).flatten())
    return torch.stack(sums).sum(0) / sum(map(len, weights))
