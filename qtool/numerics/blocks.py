"""Grids of GGUF's tensor types: the block types of llama.cpp, MXFP4 as its files have it, and plain floats.

A weight is scale * level - minimum. The scale of a group is a float16 of its own, or an integer times the float16
of its block (two levels); minima likewise. Levels are those of `codecs`.

mxfp4 is searched as in every format (`search`), the others by `block_search`. Without a search q4_0, q4_1, q5_0,
q5_1, q8_0 and mxfp4 come out byte for byte as the `gguf` package (0.19) and llama.cpp's reference quantize them:
these round weights under the scale before it is rounded to its own type, which `ReferenceParams` remembers. Other
bytes may come of denormal weights, of scales past float16, which are infinite there and its largest value here, and
of a minimum of zero, whose sign is that of whichever zero was found.

Shapes: O out features, I in features, G groups, B blocks of 256, C columns given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qtool.headers import TORCH_NAMES
from qtool.numerics.block_search import F16_MAX, Integers, fit_blocks, fit_groups
from qtool.numerics.codecs import WITH_MINIMUM, codec_of
from qtool.numerics.grid import Grid, GridParams, QTensor, Rounder
from qtool.numerics.minifloat import E2M1_VALUES, decode_e8m0
from qtool.scheme import BLOCK_TYPES

INTEGERS = {
    "q2_k": Integers(16, 0, 15, 15),
    "q3_k": Integers(16, -32, 31),
    "q4_k": Integers(8, 0, 63, 63),
    "q5_k": Integers(8, 0, 63, 63),
    "q6_k": Integers(16, -128, 127),
    "iq4_xs": Integers(8, -32, 31),
}
FINE_STEP = 1 / 2  # of a scale for a type of one level, over the number of its levels
IMPORTANCE_FLOOR = 1e-6  # of the mean of a block: where no importance is, all weights count the same


class ReferenceParams(GridParams):
    """GridParams with the scales [O, G] under which the reference rounds, and what it adds to weights before."""

    exact: Tensor
    shift: Tensor


@dataclass(frozen=True)
class BlockGrid(Grid):
    """The grid of a block type. `scale_dtype` has no effect: block types say how their scales are stored."""

    has_minimum: ClassVar[bool] = True

    def fit(
        self, weight_OI: Tensor, importance_I: Tensor | None = None, search: bool = True, coarse: bool = False
    ) -> GridParams:
        kind = self.scheme.kind
        if not search and kind not in INTEGERS and not kind.startswith("iq4"):
            return self._reference(weight_OI)
        importance_I = None if importance_I is None or not search else self._relative(importance_I)
        if kind == "mxfp4":
            return super().fit(weight_OI, importance_I, search, coarse)
        weight_OGK, importance_1GK = self._grouped(weight_OI, importance_I)
        codec = codec_of(self.scheme)
        if kind not in INTEGERS:
            minima, fine_step = kind in WITH_MINIMUM, FINE_STEP / 2**self.scheme.bits
            scale, minimum = fit_groups(weight_OGK, importance_1GK, codec, minima, fine_step, search, coarse)
            return GridParams(scale.half(), super_zero=-minimum.half() if minima else None)
        integers = INTEGERS[kind]
        scale, minimum, d, dmin = fit_blocks(weight_OGK, importance_1GK, codec, integers, search, coarse)
        if not integers.minimum:
            return GridParams(scale.to(torch.int8), None, d.half())
        return GridParams(scale.to(torch.uint8), minimum.to(torch.uint8), d.half(), dmin.half())

    def encode(self, weight_OC: Tensor, params: GridParams) -> Tensor:
        scale_OG, minimum_OG, _, _ = self.effective(params)
        values = weight_OC.unflatten(1, (scale_OG.shape[1], -1))
        if minimum_OG is not None:
            values = values + minimum_OG[:, :, None]
        # under a scale of 0 every code means the same
        values = values / torch.where(scale_OG == 0, torch.inf, scale_OG)[:, :, None]
        return codec_of(self.scheme).encode(values).flatten(1)

    def decode(self, codes_OC: Tensor, params: GridParams) -> Tensor:
        scale_OG, minimum_OG, _, _ = self.effective(params)
        values = codec_of(self.scheme).decode(codes_OC.unflatten(1, (scale_OG.shape[1], -1)))
        values = values.mul_(scale_OG[:, :, None])
        return (values if minimum_OG is None else values.sub_(minimum_OG[:, :, None])).flatten(1)

    def nearest(self, weight_OI: Tensor, params: GridParams) -> QTensor:
        if not isinstance(params, ReferenceParams):
            return super().nearest(weight_OI, params)
        return QTensor(self._reference_codes(weight_OI, params), GridParams(*params), self.scheme)

    def per_column(self, params: GridParams, columns_C: Tensor, rows: int, inputs: int) -> GridParams:
        return super().per_column(self.effective(params), columns_C, rows, inputs)

    def rounder(self, params: GridParams, shape: tuple[int, int]) -> Rounder:
        return super().rounder(GridParams(*params), shape)

    def effective(self, params: GridParams) -> GridParams:
        """Scales and minima [O, G] of w = scale * level - minimum, float32, the latter as `zero`; given such, the same.

        In the order in which llama.cpp multiplies them: what it reads is this to the last bit.
        """
        scale, zero, super_scale, super_zero = params
        if scale.dtype == torch.float32:
            return params
        if self.scheme.kind == "mxfp4":
            return GridParams(decode_e8m0(scale))
        if super_scale is None:
            return GridParams(scale.float(), None if super_zero is None else -super_zero.float())
        groups = scale.shape[1] // super_scale.shape[1]
        scale = super_scale.float().repeat_interleave(groups, 1).mul_(scale)
        if zero is None or super_zero is None:
            return GridParams(scale)
        return GridParams(scale, super_zero.float().repeat_interleave(groups, 1).mul_(zero))

    def stored(self, effective: GridParams, like: GridParams) -> GridParams:
        """The nearest that can be stored under the d and dmin of `like`: the inverse of `effective`."""
        scale_OG, minimum_OG, _, _ = effective
        if self.scheme.kind == "mxfp4":
            return super().stored(effective, like)
        if like.super_scale is None:
            return GridParams(_half(scale_OG), super_zero=None if minimum_OG is None else -_half(minimum_OG))
        integers = INTEGERS[self.scheme.kind]
        scale = _integers(scale_OG, like.super_scale, integers.lowest, integers.highest).to(like.scale.dtype)
        if minimum_OG is None or like.zero is None or like.super_zero is None:
            return like._replace(scale=scale)
        zero = _integers(minimum_OG, like.super_zero, 0, integers.minimum).to(torch.uint8)
        return like._replace(scale=scale, zero=zero)

    def _relative(self, importance_I: Tensor) -> Tensor:
        """Importance over its mean in each block."""
        columns = BLOCK_TYPES[self.scheme.kind].weights if self.scheme.kind in BLOCK_TYPES else 32
        blocks = importance_I.double().unflatten(0, (-1, columns))
        mean = blocks.mean(1, keepdim=True)
        return (blocks / torch.where(mean == 0, 1.0, mean)).clamp_(min=IMPORTANCE_FLOOR).float().flatten()

    def _reference(self, weight_OI: Tensor) -> ReferenceParams:
        """The scales of the reference, which come from the range of each group."""
        kind, bits = self.scheme.kind, self.scheme.bits
        weight_OGK = self._grouped(weight_OI, None)[0]
        low, high = weight_OGK.aminmax(dim=-1)
        largest = torch.maximum(high.abs(), low.abs())
        shift = torch.zeros_like(low)
        minimum: Tensor | None = None
        if kind == "mxfp4":
            exponent = largest.log2().floor_().sub_(2).clamp_(-127, 127)
            stored = (exponent + 127).to(torch.uint8)
            exact = decode_e8m0(stored)
        else:
            if kind in WITH_MINIMUM:
                exact, minimum, shift = (high - low) / (2**bits - 1), _half(low), -low
            elif kind == "q8_0":
                exact = largest / 127
            else:
                first = weight_OGK.abs().argmax(-1, keepdim=True)
                exact = weight_OGK.gather(-1, first)[..., 0] / -(2 ** (bits - 1))
            stored = _half(exact)
        params = ReferenceParams(stored, None, None, minimum)
        params.exact, params.shift = exact, shift
        return params

    def _reference_codes(self, weight_OI: Tensor, params: ReferenceParams) -> Tensor:
        """As the reference rounds: halves up, for q8_0 away from zero, for mxfp4 to the smaller magnitude."""
        kind, half = self.scheme.kind, 2 ** (self.scheme.bits - 1)
        shifted = weight_OI.unflatten(1, (params.exact.shape[1], -1)) + params.shift[..., None]
        inverse = torch.where(params.exact == 0, 0.0, 1 / params.exact)
        values = (shifted * inverse[..., None]).nan_to_num_()
        if kind == "mxfp4":
            levels = torch.tensor(E2M1_VALUES, device=values.device)
            codes = torch.bucketize(values.abs(), (levels[1:] + levels[:-1]) / 2, out_int32=True)
            codes += 8 * ((values < 0) & (codes > 0))
        elif kind == "q8_0":
            magnitude = values.abs()
            floor = magnitude.floor()
            codes = (floor + (magnitude - floor).mul_(2).floor_()).copysign_(values) + half
        else:
            codes = (values + (0.5 if kind in WITH_MINIMUM else half + 0.5)).trunc_().clamp_(0, 2 * half - 1)
        return codes.to(torch.uint8).flatten(1)


@dataclass(frozen=True)
class FloatGrid(Grid):
    """Weights as they are, in float32, float16 or bfloat16; what float16 lacks becomes its largest value."""

    def fit(
        self, weight_OI: Tensor, importance_I: Tensor | None = None, search: bool = True, coarse: bool = False
    ) -> GridParams:
        return GridParams(torch.ones((1, 1), device=weight_OI.device))

    def encode(self, weight_OC: Tensor, params: GridParams) -> Tensor:
        largest = torch.finfo(self.dtype).max
        return weight_OC.clamp(-largest, largest).to(self.dtype)

    def decode(self, codes_OC: Tensor, params: GridParams) -> Tensor:
        return codes_OC.float()

    def rounder(self, params: GridParams, shape: tuple[int, int]) -> Rounder:
        rounder = super().rounder(params, shape)
        rounder.codes_OI = torch.empty(shape, dtype=self.dtype, device=params.scale.device)
        return rounder

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, TORCH_NAMES[self.scheme.kind.upper()])
        return found


def _integers(values_OG: Tensor, step_OB: Tensor, lowest: int, highest: int) -> Tensor:
    """The nearest multiples of the steps of the blocks."""
    step_OG = step_OB.float().repeat_interleave(values_OG.shape[1] // step_OB.shape[1], 1)
    return (values_OG / torch.where(step_OG == 0, torch.inf, step_OG)).round_().clamp_(lowest, highest)


def _half(values: Tensor) -> Tensor:
    return values.clamp(-F16_MAX, F16_MAX).half()
