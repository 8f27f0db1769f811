"""Rounding the inputs of linears, keys and values as serving engines do: float32 in, float32 out.

The scales are those of compressed-tensors 0.19 (`calculate_qparams`): the largest magnitude over half the width of
the range, 127.5 for int8. vLLM's own int8 kernel divides by 127, a difference of 0.4 %. LLM.int8() (arXiv
2208.07339) is what bitsandbytes 0.50 computes.

Shapes: N tokens, I input features, G groups of K of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.numerics.chunks import chunk_rows, map_chunks
from qtool.numerics.minifloat import floor_e8m0, round_e2m1, round_fp8
from qtool.numerics.scales import E2M1_MAX, E4M3_MAX
from qtool.scheme import ActivationScheme

E4M3 = torch.float8_e4m3fn
E4M3_EPS = torch.finfo(E4M3).eps  # the scale of a group that is too small to have one
LARGEST_POWERS = {"mxfp4": 4.0, "mxfp8": 256.0}
EPS, TINY = torch.finfo(torch.float32).eps, torch.finfo(torch.float32).tiny


def fake_quantize(x: Tensor, scheme: ActivationScheme, scale: Tensor | None = None) -> Tensor:
    """x [..., I] rounded, in new memory and without gradient. Groups must divide I.

    `scale` [1] is the fixed scale of schemes that have one: of int and fp8 per tensor a factor, of nvfp4 the divisor
    448 * 6 / max|x|. llm-int8 looks for columns with outliers in all rows given, so its result depends on the batch.
    """
    assert scheme.is_static == (scale is not None), f"{scheme} and scale {scale}"
    x_NI = x.detach().reshape(-1, x.shape[-1])
    if scheme.kind == "llm-int8":
        return _mixed_int8(x_NI, scheme.threshold or torch.inf).reshape(x.shape)
    rounded_NI, step = torch.empty_like(x_NI), chunk_rows(x.device, x.shape[-1])

    def fill(start: int) -> None:
        rows = slice(start, start + step)
        rounded_NI[rows] = _tokens(x_NI[rows], scheme, scale)

    map_chunks(fill, range(0, len(x_NI), step), x.device)
    return rounded_NI.reshape(x.shape)


def static_scale(absmax: Tensor, scheme: ActivationScheme) -> Tensor:
    """The fixed scale [1], float32, for values of at most this magnitude [1]; for nvfp4 the divisor.

    As `calculate_qparams` and `generate_gparam` of compressed-tensors 0.19 have them, also for zeros.
    """
    absmax = absmax.float()
    if scheme.kind == "nvfp4":
        divisor = E4M3_MAX * E2M1_MAX / absmax.clamp(min=TINY)
        return torch.where(divisor.isinf(), 1.0, divisor)
    return _not_zero(absmax / _half_range(scheme))


def reach(scheme: ActivationScheme, scale: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """The smallest and the largest value [1] under a fixed scale; None where the scale follows the values."""
    if scale is None:
        return None
    if scheme.kind == "nvfp4":
        largest = E4M3_MAX * E2M1_MAX / scale
        return -largest, largest
    if scheme.kind == "int":
        half = 2 ** (scheme.bits - 1)
        return -half * scale, (half - 1) * scale
    return -E4M3_MAX * scale, E4M3_MAX * scale


def _tokens(x_NI: Tensor, scheme: ActivationScheme, scale: Tensor | None) -> Tensor:
    """Rounding in which no token depends on another."""
    if scheme.group_size:
        x_NGK = x_NI.unflatten(-1, (-1, scheme.group_size))
        return _rounded(x_NGK, _group_scale(_absmax(x_NGK), scheme, scale), scheme).flatten(-2)
    if scale is None:
        scale = _not_zero(_absmax(x_NI) / _half_range(scheme))
    return _rounded(x_NI, scale, scheme)


def _group_scale(absmax: Tensor, scheme: ActivationScheme, divisor: Tensor | None) -> Tensor:
    """The scales of groups with these largest magnitudes."""
    if scheme.kind == "nvfp4":
        assert divisor is not None
        scale = round_fp8(absmax / E2M1_MAX * divisor, E4M3)
        return torch.where(scale == 0, E4M3_EPS, scale) / divisor
    if scheme.kind.startswith("mx"):
        # the power of two of the largest, or the next one where it is within an eighth of that
        bumped = (absmax.view(torch.int32) + (1 << 21)).view(torch.float32)
        return floor_e8m0(floor_e8m0(bumped) / LARGEST_POWERS[scheme.kind])
    return _not_zero(absmax / _half_range(scheme))


def _mixed_int8(x_NI: Tensor, threshold: float) -> Tensor:
    """int8 per token, but for the columns that reach the threshold anywhere: those stay as they are."""
    half = x_NI.half().float()
    outliers = half.abs() >= threshold
    inside = half.masked_fill_(outliers, 0)  # what else is in a column with outliers counts for the scale, too
    absmax = _absmax(inside)
    codes = inside.mul_(127 / torch.where(absmax == 0, 1.0, absmax)).round_()
    return torch.where(outliers.any(0), x_NI, codes.mul_(absmax / 127))


def _rounded(x: Tensor, scale: Tensor, scheme: ActivationScheme) -> Tensor:
    values = x / scale
    if scheme.kind == "int":
        half = 2 ** (scheme.bits - 1)
        return values.round_().clamp_(-half, half - 1).mul_(scale)
    values = round_e2m1(values) if scheme.kind in ("nvfp4", "mxfp4") else round_fp8(values, E4M3)
    return values.mul_(scale)


def _absmax(x: Tensor) -> Tensor:
    """max |x| over the last axis, which stays; without a copy of x."""
    return torch.maximum(x.amax(-1, keepdim=True), x.amin(-1, keepdim=True).neg_())


def _half_range(scheme: ActivationScheme) -> float:
    return (2**scheme.bits - 1) / 2 if scheme.kind == "int" else E4M3_MAX


def _not_zero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, EPS, scale)
