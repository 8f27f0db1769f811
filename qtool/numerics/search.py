"""Scales and zero points of integer grids: from the range of a group, or by search.

The search minimizes the weighted squared error of each group over a fine grid of shrink factors, then
refits by least squares with the codes held fixed, keeping a step only when it lowers the error. Every
candidate is rounded to the scale's storage type first, so what is compared is what will be stored.
A symmetric scale may be negative: then the code -2^(b-1) lies on the positive side, and whichever end of
a group is larger gets the extra level.

Shapes: R rows, G groups, K weights of a group. Importance is [1, G, K], or None for plain error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.numerics.chunks import chunk_rows, map_chunks

SYMMETRIC_CANDIDATES = 16
ASYMMETRIC_CANDIDATES = 6  # per end of the range
REFITS = 3
SMALLEST_SHRINK = {2: 0.2, 3: 0.25, 4: 0.3, 5: 0.4, 6: 0.5, 7: 0.6, 8: 0.7}


def minmax_scales(weight_RGK: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The smallest scale that clips nothing: max|w| / (2^(b-1) - 1), or (max - min) / (2^b - 1) with a zero point."""
    if symmetric:
        return _stored(weight_RGK.abs().amax(-1) / (2 ** (bits - 1) - 1), dtype), None
    low, high = weight_RGK.amin(-1).clamp(max=0), weight_RGK.amax(-1).clamp(min=0)
    scale = _stored((high - low) / (2**bits - 1), dtype)
    return scale, _zero_point(low, scale, bits)


def search_scales(
    weight_RGK: Tensor, importance_RGK: Tensor | None, bits: int, symmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Scale [R, G] in `dtype` and zero [R, G] (None when symmetric) of the least weighted error."""
    rows = chunk_rows(weight_RGK.device, weight_RGK[0].numel())

    def search_from(start: int) -> tuple[Tensor, Tensor | None]:
        search = _Search(weight_RGK[start : start + rows], importance_RGK, bits, dtype)
        return search.symmetric() if symmetric else search.asymmetric()

    found = map_chunks(search_from, range(0, weight_RGK.shape[0], rows), weight_RGK.device)
    scales, zeros = zip(*found, strict=True)
    return torch.cat(scales), None if symmetric else torch.cat(zeros)


class _Search:
    """The search over one chunk; keeps the best scale, code range and zero of each group so far."""

    def __init__(self, weight_RGK: Tensor, importance_RGK: Tensor | None, bits: int, dtype: torch.dtype) -> None:
        self.weight, self.importance, self.bits, self.dtype = weight_RGK, importance_RGK, bits, dtype
        self.scratch = torch.empty_like(weight_RGK)
        self.best_error = torch.full(weight_RGK.shape[:2], torch.inf, device=weight_RGK.device)
        self.best_scale = torch.ones_like(self.best_error)
        self.best_zero = torch.zeros_like(self.best_error)

    def symmetric(self) -> tuple[Tensor, None]:
        half = 2 ** (self.bits - 1)
        self.best_zero.fill_(half)
        step = self.weight.abs().amax(-1) / half
        widest = half / (half - 1)
        shrinks = _geometric(SMALLEST_SHRINK[self.bits], widest, SYMMETRIC_CANDIDATES)
        step = torch.where(self.weight.amax(-1) > -self.weight.amin(-1), -step, step)  # the larger end gets -2^(b-1)
        for shrink in shrinks:
            self._offer(step * shrink, self.best_zero)
        spacing = shrinks[0] / shrinks[1]
        for factor in (spacing**0.5, spacing**-0.5, -1.0, spacing**0.25, spacing**-0.25):
            self._offer(self.best_scale * factor, self.best_zero)
        for _ in range(REFITS):
            levels = self._codes(self.best_scale, self.best_zero).sub_(half)
            weighted = levels * self.importance if self.importance is not None else levels
            scale = (weighted * self.weight).sum(-1) / (weighted * levels).sum(-1)
            self._offer(torch.where(scale.isfinite(), scale, self.best_scale), self.best_zero)
        return self.best_scale.to(self.dtype), None

    def asymmetric(self) -> tuple[Tensor, Tensor]:
        low, high = self.weight.amin(-1).clamp(max=0), self.weight.amax(-1).clamp(min=0)
        shrinks = _geometric(SMALLEST_SHRINK[self.bits], 1.0, ASYMMETRIC_CANDIDATES)
        for low_shrink in shrinks:
            for high_shrink in shrinks:
                scale = _stored((high * high_shrink - low * low_shrink) / (2**self.bits - 1), self.dtype).float()
                self._offer(scale, _zero_point(low * low_shrink, scale, self.bits))
        middle, spacing = (2**self.bits - 1) / 2, shrinks[0] / shrinks[1]
        for factor in (spacing**0.5, spacing**-0.5, spacing**0.25, spacing**-0.25):
            scale = _stored(self.best_scale * factor, self.dtype).float()
            zero = middle - (middle - self.best_zero) * self.best_scale / scale  # the middle of the range stays
            self._offer(scale, zero.round_().clamp_(0, 2**self.bits - 1))
        ones = torch.ones_like(self.weight[:1]) if self.importance is None else self.importance
        total = ones.sum(-1)
        mean_weight = (self.weight * ones).sum(-1) / total
        for _ in range(REFITS):
            codes = self._codes(self.best_scale, self.best_zero)
            mean_code = (codes * ones).sum(-1) / total
            centred = codes - mean_code[..., None]
            scale = (centred * ones * self.weight).sum(-1) / (centred * ones * codes).sum(-1)
            scale = torch.where(scale.isfinite() & (scale > 0), scale, self.best_scale)
            scale = _stored(scale, self.dtype).float()
            self._offer(scale, (mean_code - mean_weight / scale).round_().clamp_(0, 2**self.bits - 1))
        return self.best_scale.to(self.dtype), self.best_zero

    def _codes(self, scale_RG: Tensor, zero_RG: Tensor) -> Tensor:
        codes = torch.mul(self.weight, (1 / scale_RG)[..., None], out=self.scratch)
        return codes.round_().add_(zero_RG[..., None]).clamp_(0, 2**self.bits - 1)

    def _offer(self, scale_RG: Tensor, zero_RG: Tensor) -> None:
        """Take scale and zero wherever they lower the error."""
        scale_RG = _stored(scale_RG, self.dtype).float()
        error = self._codes(scale_RG, zero_RG).sub_(zero_RG[..., None]).mul_(scale_RG[..., None])
        error = error.sub_(self.weight).square_()
        if self.importance is not None:
            error = error.mul_(self.importance)
        total = error.sum(-1)
        better = total < self.best_error
        self.best_error = torch.where(better, total, self.best_error)
        self.best_scale = torch.where(better, scale_RG, self.best_scale)
        self.best_zero = torch.where(better, zero_RG, self.best_zero)


def _geometric(low: float, high: float, count: int) -> list[float]:
    return [high * (low / high) ** (i / (count - 1)) for i in range(count)]


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` rounded to its storage type; a group of zeros gets 1, and nothing underflows to 0."""
    info = torch.finfo(dtype)
    tiny = max(
        info.tiny * info.eps, torch.finfo(torch.float32).tiny
    )  # the smallest value that is not 0 and has a finite inverse in float32
    scale = torch.where(scale == 0, 1.0, scale)
    magnitude = scale.abs().clamp(tiny, info.max)
    return torch.copysign(magnitude, scale).to(dtype)


def _zero_point(low: Tensor, scale: Tensor, bits: int) -> Tensor:
    return (-low / scale.float()).round_().clamp_(0, 2**bits - 1)
