"""Scales and zero points: from the range of a group, or by search.

The search minimizes the weighted squared error of each group over a fine grid of shrink factors, then
refits by least squares with the codes held fixed, keeping a step only when it lowers the error. Every
candidate is rounded to how it will be stored first, so what is compared is what will be read.
Where the number type allows it a symmetric scale may be negative: then the smallest code lies on the
positive side, and whichever end of a group is larger gets the extra level.

Shapes: R rows, G groups, K weights of a group. Importance is [1, G, K], or None for plain error.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qtool.numerics.chunks import chunk_rows, map_chunks
from qtool.numerics.codecs import SMALLEST_INT_SHRINK, Codec, geometric
from qtool.numerics.scales import FloatStore, ScaleStore

ASYMMETRIC_CANDIDATES = 6  # per end of the range
REFITS = 3
COARSE = 2  # of so many shrink factors one


def range_scales(weight_RGK: Tensor, codec: Codec, store: ScaleStore) -> Tensor:
    """The smallest scales [R, G] that clip nothing: max|w| / the largest value of both signs."""
    return store.stored(weight_RGK.abs().amax(-1) / codec.unclipped)


def range_affine(weight_RGK: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The smallest scale (max - min) / (2^b - 1) that clips nothing, and its zero point, both [R, G] float32."""
    low, high = weight_RGK.amin(-1).clamp(max=0), weight_RGK.amax(-1).clamp(min=0)
    scale = FloatStore(dtype).stored((high - low) / (2**bits - 1))
    return scale, _zero_point(low, scale, bits)


def search_scales(
    weight_RGK: Tensor, importance_RGK: Tensor | None, codec: Codec, store: ScaleStore, coarse: bool = False
) -> Tensor:
    """Scales [R, G] of the least weighted error, float32 and such as can be stored; `coarse` looks at fewer."""

    def search(rows: Tensor) -> tuple[Tensor]:
        return (_SymmetricSearch(rows, importance_RGK, codec, store).run(coarse),)

    return _in_chunks(search, weight_RGK)[0]


def search_affine(
    weight_RGK: Tensor, importance_RGK: Tensor | None, bits: int, dtype: torch.dtype, coarse: bool = False
) -> tuple[Tensor, Tensor]:
    """Scale and zero point [R, G] of the least weighted error of unsigned codes, float32; `coarse` looks at fewer."""

    def search(rows: Tensor) -> tuple[Tensor, ...]:
        return _AffineSearch(rows, importance_RGK, bits, dtype).run(coarse)

    scale, zero = _in_chunks(search, weight_RGK)
    return scale, zero


def weighted_error(weight_RGK: Tensor, importance_RGK: Tensor | None, codec: Codec, scale_RG: Tensor) -> Tensor:
    """The weighted squared error of the nearest codes, summed over all groups, float64."""

    def error(part: tuple[Tensor, Tensor]) -> Tensor:
        return _SymmetricSearch(part[0], importance_RGK, codec, FloatStore(torch.float32)).error(part[1]).double().sum()

    rows = chunk_rows(weight_RGK.device, weight_RGK[0].numel())
    parts = zip(weight_RGK.split(rows), scale_RG.split(rows), strict=True)
    return torch.stack(map_chunks(error, parts, weight_RGK.device)).sum()


class _SymmetricSearch:
    """The search over one chunk; keeps the best scale of each group so far."""

    def __init__(self, weight_RGK: Tensor, importance_RGK: Tensor | None, codec: Codec, store: ScaleStore) -> None:
        self.weight, self.importance, self.codec, self.store = weight_RGK, importance_RGK, codec, store
        self.scratch = torch.empty_like(weight_RGK)
        self.best_error = torch.full(weight_RGK.shape[:2], torch.inf, device=weight_RGK.device)
        self.best_scale = torch.ones_like(self.best_error)

    def run(self, coarse: bool) -> Tensor:
        step, shrinks = self.weight.abs().amax(-1) / self.codec.largest, self.codec.shrinks
        shrinks = shrinks[::COARSE] if coarse else shrinks
        if self.codec.signed:  # the larger end gets the extra level
            step = torch.where(self.weight.amax(-1) > -self.weight.amin(-1), -step, step)
        for shrink in shrinks:
            self._offer(step * shrink)
        if coarse:
            return self.best_scale
        spacing = shrinks[0] / shrinks[1]
        for factor in (spacing**0.5, spacing**-0.5, -1.0, spacing**0.25, spacing**-0.25):
            if factor > 0 or self.codec.signed:
                self._offer(self.best_scale * factor)
        for _ in range(REFITS):
            levels = self._levels(self.best_scale)
            weighted = levels * self.importance if self.importance is not None else levels
            scale = (weighted * self.weight).sum(-1) / (weighted * levels).sum(-1)
            self._offer(torch.where(scale.isfinite() & (scale != 0), scale, self.best_scale))
        return self.best_scale

    def error(self, scale_RG: Tensor) -> Tensor:
        """The error [R, G] under these scales."""
        error = self._levels(scale_RG).mul_(scale_RG[..., None]).sub_(self.weight).square_()
        return (error.mul_(self.importance) if self.importance is not None else error).sum(-1)

    def _levels(self, scale_RG: Tensor) -> Tensor:
        return self.codec.round(torch.mul(self.weight, (1 / scale_RG)[..., None], out=self.scratch))

    def _offer(self, scale_RG: Tensor) -> None:
        """Take a scale wherever it lowers the error."""
        scale_RG = self.store.stored(scale_RG)
        error = self.error(scale_RG)
        better = error < self.best_error
        self.best_error = torch.where(better, error, self.best_error)
        self.best_scale = torch.where(better, scale_RG, self.best_scale)


class _AffineSearch:
    """The same with a zero point."""

    def __init__(self, weight_RGK: Tensor, importance_RGK: Tensor | None, bits: int, dtype: torch.dtype) -> None:
        self.weight, self.importance, self.bits, self.store = weight_RGK, importance_RGK, bits, FloatStore(dtype)
        self.scratch = torch.empty_like(weight_RGK)
        self.best_error = torch.full(weight_RGK.shape[:2], torch.inf, device=weight_RGK.device)
        self.best_scale = torch.ones_like(self.best_error)
        self.best_zero = torch.zeros_like(self.best_error)

    def run(self, coarse: bool) -> tuple[Tensor, Tensor]:
        low, high = self.weight.amin(-1).clamp(max=0), self.weight.amax(-1).clamp(min=0)
        shrinks = geometric(SMALLEST_INT_SHRINK[self.bits], 1.0, ASYMMETRIC_CANDIDATES)
        shrinks = shrinks[: len(shrinks) // COARSE] if coarse else shrinks
        for low_shrink in shrinks:
            for high_shrink in shrinks:
                scale = self.store.stored((high * high_shrink - low * low_shrink) / (2**self.bits - 1))
                self._offer(scale, _zero_point(low * low_shrink, scale, self.bits))
        if coarse:
            return self.best_scale, self.best_zero
        middle, spacing = (2**self.bits - 1) / 2, shrinks[0] / shrinks[1]
        for factor in (spacing**0.5, spacing**-0.5, spacing**0.25, spacing**-0.25):
            scale = self.store.stored(self.best_scale * factor)
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
            scale = self.store.stored(torch.where(scale.isfinite() & (scale > 0), scale, self.best_scale))
            self._offer(scale, (mean_code - mean_weight / scale).round_().clamp_(0, 2**self.bits - 1))
        return self.best_scale, self.best_zero

    def _codes(self, scale_RG: Tensor, zero_RG: Tensor) -> Tensor:
        codes = torch.mul(self.weight, (1 / scale_RG)[..., None], out=self.scratch)
        return codes.round_().add_(zero_RG[..., None]).clamp_(0, 2**self.bits - 1)

    def _offer(self, scale_RG: Tensor, zero_RG: Tensor) -> None:
        """Take a stored scale and a zero point wherever they lower the error."""
        error = self._codes(scale_RG, zero_RG).sub_(zero_RG[..., None]).mul_(scale_RG[..., None])
        error = error.sub_(self.weight).square_()
        total = (error.mul_(self.importance) if self.importance is not None else error).sum(-1)
        better = total < self.best_error
        self.best_error = torch.where(better, total, self.best_error)
        self.best_scale = torch.where(better, scale_RG, self.best_scale)
        self.best_zero = torch.where(better, zero_RG, self.best_zero)


def _in_chunks(search: Callable[[Tensor], tuple[Tensor, ...]], weight_RGK: Tensor) -> list[Tensor]:
    """What `search` finds for all rows, a few at a time."""
    parts = weight_RGK.split(chunk_rows(weight_RGK.device, weight_RGK[0].numel()))
    return [torch.cat(found) for found in zip(*map_chunks(search, parts, weight_RGK.device), strict=True)]


def _zero_point(low: Tensor, scale: Tensor, bits: int) -> Tensor:
    return (-low / scale).round_().clamp_(0, 2**bits - 1)
