"""Rounding with gradients, for training: forward is what a file will hold, to the last bit; backward looks through.

A weight is read as w^ = s l(w / s), l the nearest level of the number type; with a zero point z as
s (l(w / s + z) - z), with a minimum m as s l((w + m) / s) - m. Rounding has no slope of its own: it counts as the
identity between the ends of the range and as a constant beyond them (clipped straight-through estimator, arXiv
1308.3432). With that, and v for the value that is rounded, the gradients are

    of the weight    1 inside, 0 beyond
    of the scale     (l - z) - (v - z) inside, l - z beyond (LSQ, arXiv 1902.08153, without its factor: Adam has none)
    of the zero      0 inside, -s beyond; of the minimum 0 inside, -1 beyond

How a scale itself is stored (bfloat16, e4m3, a power of two, an integer times its block's scale) is looked through.

Shapes: O out features, I in features, G groups of K columns; N tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qtool.numerics.activations import fake_quantize, reach
from qtool.numerics.grid import Grid, GridParams, spread_rows
from qtool.scheme import BLOCK, ActivationScheme


def fake_quantize_weight(weight_OI: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid, like: GridParams) -> Tensor:
    """What will be read of a weight under scales and zeros as `Grid.effective` has them, float32 [O, I].

    `like` are stored parameters of the grid, of which the second level, where there is one, stays as it is.
    """
    read_OI: Tensor = _FakeQuantizeWeight.apply(weight_OI, scale, zero, grid, like)
    return read_OI


class _FakeQuantizeWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight_OI: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid, like: GridParams
    ) -> Tensor:
        params = grid.stored(GridParams(scale, zero), like)
        read_OI = grid.decode(grid.encode(weight_OI, params), params)
        ctx.grid, ctx.effective = grid, grid.effective(params)
        ctx.save_for_backward(weight_OI, read_OI)
        return read_OI

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight_OI, read_OI = ctx.saved_tensors
        return *surrogate_gradients(ctx.grid, ctx.effective, weight_OI, read_OI, gradients[0]), None, None


def decode_codes(codes_OI: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid, like: GridParams) -> Tensor:
    """What will be read of codes that stay as they are, float32 [O, I], with the gradients of scale and zero.

    Nothing as large as the weight is kept for the backward pass.
    """
    read_OI: Tensor = _DecodeCodes.apply(codes_OI, scale, zero, grid, like)
    return read_OI


class _DecodeCodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, codes_OI: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid, like: GridParams) -> Tensor:
        ctx.grid, ctx.codes_OI, ctx.params = grid, codes_OI, grid.stored(GridParams(scale, zero), like)
        return grid.decode(codes_OI, ctx.params)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        read_OI = ctx.grid.decode(ctx.codes_OI, ctx.params)
        effective = ctx.grid.effective(ctx.params)
        _, of_scale, of_zero = surrogate_gradients(ctx.grid, effective, None, read_OI, gradients[0])
        return None, of_scale, of_zero, None, None


def surrogate_gradients(
    grid: Grid, effective: GridParams, weight_OI: Tensor | None, read_OI: Tensor, gradient_OI: Tensor
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """From the gradient of what is read to those of weight, scale and zero; without a weight, codes are constants."""
    scale, zero, _, _ = effective
    rows, groups = len(read_OI), scale.shape[1]

    def grouped(values_OI: Tensor) -> Tensor:
        return values_OI.unflatten(1, (groups, -1))

    def spread(values: Tensor) -> Tensor:
        return spread_rows(values, rows)[:, :, None]

    def gathered(values_OGK: Tensor) -> Tensor:
        sums_OG = values_OGK.sum(-1)
        if len(scale) == rows:
            return sums_OG
        parts = [sums_OG] if len(scale) == 1 else sums_OG.split(BLOCK)
        return torch.stack([part.sum(0) for part in parts])

    scale_OG1 = spread(torch.where(scale == 0, torch.inf, scale))
    minimum_OG1 = spread(zero) if zero is not None and grid.has_minimum else 0.0
    zero_OG1 = spread(zero) if zero is not None and not grid.has_minimum else 0.0
    gradient_OGK = grouped(gradient_OI)
    of_scale = gradient_OGK * ((grouped(read_OI) + minimum_OG1) / scale_OG1)
    of_zero = -gradient_OGK
    of_weight = None
    if weight_OI is not None:
        value_OGK = (grouped(weight_OI) + minimum_OG1) / scale_OG1
        lowest, highest = grid.ends
        inside = gradient_OGK * ((value_OGK >= lowest - zero_OG1) & (value_OGK <= highest - zero_OG1))
        of_scale -= inside * value_OGK
        of_zero += inside
        of_weight = inside.flatten(1)
    if zero is None:
        return of_weight, gathered(of_scale), None
    return of_weight, gathered(of_scale), gathered(of_zero) * (1.0 if grid.has_minimum else scale)


def fake_quantize_inputs(x: Tensor, scheme: ActivationScheme, scale: Tensor | None = None) -> Tensor:
    """`fake_quantize`, of any float type, with the clipped straight-through gradient.

    Scales that follow the values clip nothing; under a fixed one what is beyond its range has no gradient.
    """
    rounded: Tensor = _FakeQuantizeInputs.apply(x, scheme, scale)
    return rounded


class _FakeQuantizeInputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scheme: ActivationScheme, scale: Tensor | None) -> Tensor:
        ctx.reach = reach(scheme, scale)
        if ctx.reach is not None:
            ctx.save_for_backward(x)
        return fake_quantize(x.float(), scheme, scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        if ctx.reach is not None:
            (x,) = ctx.saved_tensors
            lowest, highest = ctx.reach
            gradient = gradient * ((x >= lowest) & (x <= highest))
        return gradient, None, None
