"""The search for the scales of GGUF's block types, denser than `search`: a file is made once and read for years.

What is minimized is the weighted squared error of a block of weights, as its scales will be stored.

1. Groups. Ranges cut at either end give a scale and a minimum each (symmetric types: shrunken scales of both signs),
   and the least-squares fit to their codes another. The best is refitted.
2. Lattice. Error is a jagged function of scale and minimum, with many basins that no descent would find: a dense
   lattice around that best finds the good ones. A lower end one step further down moves the upper end by as much, so
   the lattice is sheared: both ends go equally far. Types of one level are done here.
3. Blocks. In a basin the codes stay as they are, so the error of a group is a quadratic form, five sums. With those
   of a few basins of each group, many scales and minima of the block (d, dmin) are compared at next to no cost, each
   group taking whichever basin has integers nearby.
4. Under the best d and dmin the integers next to those chosen are tried together, five of each; d and dmin are
   refitted by least squares with codes and integers fixed; and once more. A step is taken where it lowers the error.

llama.cpp chooses the scale of each group first, under other weights, and rounds it afterwards. Weights are
searched in units of a power of two near the largest of their block, so that no square overflows.

Shapes: R rows, G groups, K weights of a group, B blocks of groups. Importance is [1, G, K], or None for plain error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.numerics.chunks import chunk_rows, map_chunks
from qtool.numerics.codecs import Codec, geometric

F16_MAX, F16_TINY = torch.finfo(torch.float16).max, 2.0**-24  # the largest and the smallest that float16 holds
TINY = 1e-12  # added to scales, which may be 0; the largest weight of a block is about 1

Lattice = list[tuple[int, list[int]]]  # rows: a step of the minimum, and the steps of the scale that go with it
Stored = Callable[[Tensor], Tensor]  # what becomes of scales and minima in their file


def sheared(reach: int) -> Lattice:
    """Steps that move neither end of a range by more than `reach` steps of the upper one.

    A step of a minimum is taken to be half as long as what a step of the scale adds to the upper end.
    """
    steps = range(-2 * reach, 2 * reach + 1)
    return [(b, [a for a in steps if abs(2 * a - b) <= 2 * reach]) for b in steps]


CUTS = geometric(0.3, 1.0, 4)  # what is left of either half of a range
REFITS = 2
ROOM = 1.1  # d and dmin of the lattice, as multiples of what the largest group needs
BASINS = 4  # of each group
SHARES = [1 + i / 40 for i in range(8)]  # d and dmin that are compared, likewise
SIGNED_SHARES = [sign * (1 + i / 80) for i in range(16) for sign in (1, -1)]  # those of symmetric types
WIDE, NEAR = sheared(4), [(b, list(range(-2, 3))) for b in range(-2, 3)]
SYMMETRIC_WIDE: Lattice = [(0, [a]) for a in range(-16, 17, 2)]
SYMMETRIC_FINE: Lattice = [(0, list(range(-12, 13)))]
SYMMETRIC_NEAR: Lattice = [(0, list(range(-2, 3)))]


@dataclass(frozen=True)
class Integers:
    """The integers of the `groups` of a block: scales `lowest` .. `highest`, and minima 0 .. `minimum` if not 0."""

    groups: int
    lowest: int
    highest: int
    minimum: int = 0


class Found(NamedTuple):
    """Scales and minima of groups, w = scale * level - minimum, and their error, [R, G]."""

    error: Tensor
    scale: Tensor
    minimum: Tensor

    def or_better(self, other: Found) -> Found:
        better = other.error < self.error
        return Found(*(torch.where(better, new, old) for old, new in zip(self, other, strict=True)))


class Blocks(NamedTuple):
    """Integers of groups [R, G], and the scale and minimum [R, B] of the blocks by which they are multiplied."""

    groups: Found
    scale: Tensor
    minimum: Tensor


class Sums(NamedTuple):
    """Importance times 1, level, level^2, level * weight and weight, summed over groups [R, G], codes being fixed.

    The error is s^2 square - 2 s product + m^2 one - 2 m (s level - weight), and a constant. Without minima: m = 0.
    """

    one: Tensor
    level: Tensor
    square: Tensor
    product: Tensor
    weight: Tensor

    def solved(self) -> tuple[Tensor, Tensor]:
        """The scale and minimum of least squares; not finite where there is no such."""
        determinant = self.one * self.square - self.level * self.level
        scale = (self.one * self.product - self.level * self.weight) / determinant
        return scale, (self.level * self.product - self.square * self.weight) / determinant


def fit_groups(
    weight_RGK: Tensor,
    importance_RGK: Tensor | None,
    codec: Codec,
    minima: bool,
    fine_step: float,
    search: bool = True,
    coarse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scales and minima [R, G] such as float16 holds, of w = scale * level - minimum; without `minima` those are 0.

    `fine_step` is the distance between points of the lattice, as a share of the scale.
    """

    def fit(weight_RGK: Tensor) -> tuple[Tensor, ...]:
        unit_RG = _unit(weight_RGK)
        groups = _Groups(weight_RGK / unit_RG[..., None], importance_RGK, codec, -torch.inf if minima else None)

        def stored(values_RG: Tensor) -> Tensor:
            return _stored(values_RG, unit_RG)

        found = groups.search(stored, coarse) if search else groups.range(stored)
        if search and not coarse:
            found = groups.finer(found, fine_step, stored)
        return found.scale * unit_RG, found.minimum * unit_RG

    scale, minimum = _in_chunks(fit, weight_RGK)
    return scale, minimum


def fit_blocks(
    weight_RGK: Tensor,
    importance_RGK: Tensor | None,
    codec: Codec,
    integers: Integers,
    search: bool = True,
    coarse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Integer scales and minima [R, G] of groups, and scales and minima [R, B] of blocks, float32.

    Without `search` groups take their scales from their range, and integers are rounded to nearest.
    """

    def fit(weight_RGK: Tensor) -> tuple[Tensor, ...]:
        unit_RB = _unit(weight_RGK.unflatten(1, (-1, integers.groups)).flatten(2))
        unit_RG = unit_RB.repeat_interleave(integers.groups, 1)
        groups = _Groups(weight_RGK / unit_RG[..., None], importance_RGK, codec, 0.0 if integers.minimum else None)
        blocks = _BlockSearch(groups, integers, unit_RB)
        best = blocks.search(coarse) if search else blocks.start(groups.range(lambda values: values), 1.0)
        return best.groups.scale, best.groups.minimum, best.scale * unit_RB, best.minimum * unit_RB

    scale, minimum, super_scale, super_minimum = _in_chunks(fit, weight_RGK)
    return scale, minimum, super_scale, super_minimum


class _Groups:
    """Groups of a few rows, and what it costs to round them.

    Minima below `least` are not allowed. Where it is None there are no minima: the type is symmetric.
    """

    def __init__(self, weight_RGK: Tensor, importance_RGK: Tensor | None, codec: Codec, least: float | None) -> None:
        self.weight, self.importance, self.codec, self.least = weight_RGK, importance_RGK, codec, least
        self.scratch = [torch.empty_like(weight_RGK) for _ in range(3)]
        self.ones = torch.ones_like(weight_RGK[0, 0])
        self.low, self.high = weight_RGK.aminmax(dim=-1)

    def shifted(self, minimum_RG: Tensor) -> Tensor:
        """Weights above their minimum, in memory that is used again."""
        if self.least is None:
            return self.weight
        return torch.add(self.weight, minimum_RG[..., None], out=self.scratch[0])

    def error(self, shifted_RGK: Tensor, scale_RG: Tensor) -> Tensor:
        """The weighted squared error [R, G] under a scale."""
        scale = scale_RG + TINY
        values, levels = self._levels(shifted_RGK, scale)
        squares = values.sub_(levels).square_()  # in units of the scale
        if self.importance is not None:
            squares.mul_(self.importance)
        return (squares.flatten(0, 1) @ self.ones).view_as(scale).mul_(scale.square_())

    def offer(self, scale_RG: Tensor, minimum_RG: Tensor) -> Found:
        """These scales and minima, with their error."""
        return Found(self.error(self.shifted(minimum_RG), scale_RG), scale_RG, minimum_RG)

    def sums(self, scale_RG: Tensor, minimum_RG: Tensor) -> Sums:
        """The sums for the codes that are nearest under these."""
        scratch, levels = self._levels(self.shifted(minimum_RG), scale_RG + TINY)
        importance = self.ones.expand_as(self.weight[:1]) if self.importance is None else self.importance
        weighted = levels * importance
        square = torch.mul(weighted, levels, out=scratch).sum(-1)
        product = torch.mul(weighted, self.weight, out=scratch).sum(-1)
        if self.least is None:
            nothing = torch.zeros_like(square)
            return Sums(torch.ones_like(square), nothing, square, product, nothing)
        weight = torch.mul(self.weight, importance, out=scratch).sum(-1)
        return Sums(importance.sum(-1).expand_as(square), weighted.sum(-1), square, product, weight)

    def range(self, stored: Stored) -> Found:
        """Scales that clip nothing, but for weights of the other sign than the largest of symmetric types."""
        return self._shrunken(1.0, stored) if self.least is None else self._cut(1.0, 1.0, stored)

    def search(self, stored: Stored, coarse: bool) -> Found:
        """The scales and minima of least error."""
        best = self.range(stored)
        if self.least is None:
            shrinks = self.codec.shrinks[:: 2 if coarse else 1]
            offers = (self._shrunken(shrink * sign, stored) for shrink in shrinks for sign in (1, -1))
        else:
            offers = (self._cut(low, high, stored) for low, high in product(CUTS, repeat=2))
            if not coarse:
                offers = (cut.or_better(self._refitted(cut, stored)) for cut in offers)
        return self._refined(reduce(Found.or_better, offers, best), stored)

    def finer(self, found: Found, step: float, stored: Stored) -> Found:
        """The best of a fine lattice around scales and minima."""
        best, scale_step = found, found.scale * step
        minimum_step = scale_step * (self.codec.largest / 2)
        for b, steps in SYMMETRIC_FINE if self.least is None else WIDE:
            minimum = stored(found.minimum + b * minimum_step)
            shifted = self.shifted(minimum)
            for sign in (1, -1) if self.least is None else (1,):
                for scale in (stored(sign * (found.scale + a * scale_step)) for a in steps):
                    best = best.or_better(Found(self.error(shifted, scale), scale, minimum))
        return self._refined(best, stored)

    def _levels(self, shifted_RGK: Tensor, scale_RG: Tensor) -> tuple[Tensor, Tensor]:
        """Weights in units of a scale, and the nearest levels."""
        values = torch.mul(shifted_RGK, scale_RG.reciprocal()[..., None], out=self.scratch[1])
        return values, self.codec.round(self.scratch[2].copy_(values))

    def _shrunken(self, shrink: float, stored: Stored) -> Found:
        """The scale under which the weight of largest magnitude is the lowest level, times `shrink`."""
        extreme = torch.where(self.high > -self.low, self.high, self.low)
        return self.offer(stored(extreme * (-shrink / self.codec.largest)), torch.zeros_like(extreme))

    def _cut(self, low_share: float, high_share: float, stored: Stored) -> Found:
        """The range of each group, of whose halves these shares are left."""
        assert self.least is not None
        low, high = self.low, self.high
        if self.least == 0:
            low, high = low.clamp(max=0), high.clamp(min=0)
        middle = (low + high) / 2
        minimum = stored(((middle - low) * low_share - middle).clamp(min=self.least))
        scale = ((high - middle) * high_share + middle + minimum) / self.codec.largest
        return self.offer(stored(scale.clamp(min=0)), minimum)

    def _refined(self, found: Found, stored: Stored) -> Found:
        for _ in range(REFITS):
            found = found.or_better(self._refitted(found, stored))
        return found

    def _refitted(self, found: Found, stored: Stored) -> Found:
        """The scale and minimum of least squares for the codes of others."""
        sums = self.sums(found.scale, found.minimum)
        scale, minimum = sums.solved()
        least = self.least or 0.0
        scale = torch.where(minimum >= least, scale, sums.product / sums.square)
        minimum = minimum.clamp(min=least)
        fine = scale.isfinite() & minimum.isfinite()
        scale, minimum = torch.where(fine, scale, found.scale), torch.where(fine, minimum, found.minimum)
        return self.offer(stored(scale), stored(minimum))


class _BlockSearch:
    """Integers for the groups of blocks."""

    def __init__(self, groups: _Groups, integers: Integers, unit_RB: Tensor) -> None:
        self.groups, self.integers, self.unit = groups, integers, unit_RB

    def search(self, coarse: bool) -> Blocks:
        near = NEAR if self.integers.minimum else SYMMETRIC_NEAR
        wanted = self.groups.search(lambda values: values, coarse)
        best = self.start(wanted, ROOM)
        if not coarse:
            rows = self._rows(best, WIDE if self.integers.minimum else SYMMETRIC_WIDE)
            if not self.integers.minimum:
                mirrored = best.groups._replace(scale=-best.groups.scale)
                rows += self._rows(best._replace(groups=mirrored), SYMMETRIC_WIDE)
            best = best._replace(groups=reduce(Found.or_better, rows))
            best = self._better_of(self._refitted(best), self._compared(wanted, best, rows))
            best = self._refitted(self._near(best, near))
        return self._refitted(self._near(best, near))

    def start(self, wanted: Found, share: float) -> Blocks:
        """The integers nearest to scales and minima, under a d and dmin that are so much larger than they need be."""
        limits, (d, dmin) = self.integers, self._needed(wanted)
        d, dmin = self._stored(d * share), self._stored(dmin * share)
        scale = (wanted.scale * self._inverse(d)).round_().clamp_(limits.lowest, limits.highest)
        minimum = (wanted.minimum * self._inverse(dmin)).round_().clamp_(0, limits.minimum)
        return self._offer(scale, minimum, d, dmin)

    def _needed(self, wanted: Found) -> tuple[Tensor, Tensor]:
        """The least d and dmin for the largest group of each block."""
        limits, scale_RBG = self.integers, self._by_block(wanted.scale)
        extreme_RB = scale_RBG.gather(-1, scale_RBG.abs().argmax(-1, keepdim=True))[..., 0]
        largest_RB = self._by_block(wanted.minimum).amax(-1)
        return extreme_RB / (limits.lowest or limits.highest), largest_RB / max(limits.minimum, 1)

    def _rows(self, found: Blocks, lattice: Lattice) -> list[Found]:
        """The best integers of each row of a lattice around the given ones."""
        limits, given, rows = self.integers, found.groups, []
        scale_RG, minimum_RG = self._by_group(found.scale), self._by_group(found.minimum)
        for b, steps in lattice:
            minimum = (given.minimum + b).clamp_(0, limits.minimum)
            shifted = self.groups.shifted(minimum * minimum_RG)
            scales = ((given.scale + a).clamp_(limits.lowest, limits.highest) for a in steps)
            row = (Found(self.groups.error(shifted, scale * scale_RG), scale, minimum) for scale in scales)
            rows.append(reduce(Found.or_better, row))
        return rows

    def _near(self, found: Blocks, lattice: Lattice) -> Blocks:
        """The best integers of a lattice around the given ones, or those."""
        return found._replace(groups=reduce(Found.or_better, self._rows(found, lattice), found.groups))

    def _compared(self, wanted: Found, found: Blocks, rows: list[Found]) -> Blocks:
        """The best of many d and dmin, and their integers, by the quadratic forms of some basins of each group."""
        limits, least, basins = self.integers, self._needed(wanted), self._basins(found, rows)
        best: Blocks | None = None
        for scale_share in SHARES if limits.minimum else SIGNED_SHARES:
            d = self._stored(least[0] * scale_share)
            d_RG, inverse_RG = self._by_group(d), self._inverse(d)
            terms = []  # of each basin: the integer, the error without a minimum, and half of what a minimum takes off
            for scale_RG, sums in basins:
                integer = (scale_RG * inverse_RG).round_().clamp_(limits.lowest, limits.highest)
                scale = integer * d_RG
                terms.append(
                    (integer, scale * (scale * sums.square - 2 * sums.product), scale * sums.level - sums.weight)
                )
            for minimum_share in SHARES if limits.minimum else SHARES[:1]:
                dmin = self._stored(least[1] * minimum_share)
                dmin_RG, inverse_RG = self._by_group(dmin), self._inverse(dmin)
                groups: Found | None = None
                for (integer, error, gain), (_, sums) in zip(terms, basins, strict=True):
                    lower = (gain / sums.one * inverse_RG).round_().clamp_(0, limits.minimum)
                    minimum = lower * dmin_RG
                    basin = Found(error + minimum * (minimum * sums.one - 2 * gain), integer, lower)
                    groups = basin if groups is None else groups.or_better(basin)
                assert groups is not None
                offered = Blocks(groups, d, dmin)
                best = offered if best is None else self._better_of(best, offered)
        assert best is not None
        return self._offer(best.groups.scale, best.groups.minimum, best.scale, best.minimum)

    def _basins(self, found: Blocks, rows: list[Found]) -> list[tuple[Tensor, Sums]]:
        """The scale at the bottom of the basins of the best rows, and their quadratic forms."""
        error, scale, minimum = (torch.stack(values) for values in zip(*rows, strict=True))
        chosen = error.topk(BASINS, 0, largest=False).indices
        scales = scale.gather(0, chosen) * self._by_group(found.scale)
        minima = minimum.gather(0, chosen) * self._by_group(found.minimum)
        basins = []
        for scale_RG, minimum_RG in zip(scales, minima, strict=True):
            sums = self.groups.sums(scale_RG, minimum_RG)
            bottom = sums.solved()[0]
            basins.append((torch.where(bottom.isfinite(), bottom, scale_RG), sums))
        return basins

    def _refitted(self, found: Blocks) -> Blocks:
        """d and dmin by least squares, where that is better."""
        (_, scale, minimum), d, dmin = found
        one, level, square, product, weight = self.groups.sums(
            scale * self._by_group(d), minimum * self._by_group(dmin)
        )
        parts = (
            minimum * minimum * one,
            scale * minimum * level,
            scale * scale * square,
            scale * product,
            minimum * weight,
        )
        sums = Sums(*(self._by_block(part).sum(-1) for part in parts))
        new_d, new_dmin = sums.solved()
        alone = (sums.product + sums.level * dmin) / sums.square  # d under the same dmin
        both = new_d.isfinite() & new_dmin.isfinite() & (new_dmin >= 0)
        d = torch.where(both, new_d, torch.where(alone.isfinite(), alone, d))
        dmin = torch.where(both, new_dmin, dmin)
        return self._better_of(found, self._offer(scale, minimum, self._stored(d), self._stored(dmin)))

    def _offer(self, scale_RG: Tensor, minimum_RG: Tensor, d_RB: Tensor, dmin_RB: Tensor) -> Blocks:
        found = self.groups.offer(scale_RG * self._by_group(d_RB), minimum_RG * self._by_group(dmin_RB))
        return Blocks(Found(found.error, scale_RG, minimum_RG), d_RB, dmin_RB)

    def _better_of(self, old: Blocks, new: Blocks) -> Blocks:
        """The better of two, block by block."""
        better_RB = self._by_block(new.groups.error).sum(-1) < self._by_block(old.groups.error).sum(-1)
        better_RG = self._by_group(better_RB)
        groups = (torch.where(better_RG, n, o) for n, o in zip(new.groups, old.groups, strict=True))
        scale, minimum = (torch.where(better_RB, n, o) for n, o in zip(new[1:], old[1:], strict=True))
        return Blocks(Found(*groups), scale, minimum)

    def _stored(self, values_RB: Tensor) -> Tensor:
        return _stored(values_RB, self.unit)

    def _inverse(self, values_RB: Tensor) -> Tensor:
        """One over the scale of each group's block, and 0 for 0."""
        return self._by_group(torch.where(values_RB == 0, 0.0, values_RB.reciprocal()))

    def _by_block(self, values_RG: Tensor) -> Tensor:
        return values_RG.unflatten(1, (-1, self.integers.groups))

    def _by_group(self, values_RB: Tensor) -> Tensor:
        return values_RB.repeat_interleave(self.integers.groups, 1)


def _in_chunks(fit: Callable[[Tensor], tuple[Tensor, ...]], weight_RGK: Tensor) -> list[Tensor]:
    """What `fit` finds for all rows, a few at a time."""
    parts = weight_RGK.split(chunk_rows(weight_RGK.device, weight_RGK[0].numel()))
    return [torch.cat(found) for found in zip(*map_chunks(fit, parts, weight_RGK.device), strict=True)]


def _unit(weight_RGK: Tensor) -> Tensor:
    """The power of two above the largest magnitude of each group, [R, G]; 1 for zeros."""
    low, high = weight_RGK.aminmax(dim=-1)
    return torch.exp2(torch.frexp(torch.maximum(high, -low)).exponent.clamp(-100, 126).float())


def _stored(values: Tensor, unit: Tensor) -> Tensor:
    """The nearest that float16 holds, in these units; not 0 for what is not."""
    values = values * unit
    magnitude = values.abs().clamp_(F16_TINY, F16_MAX)
    return torch.where(values == 0, 0.0, magnitude.copysign_(values)).half().float().div_(unit)
