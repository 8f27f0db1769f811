"""Grids: which values a scheme can represent, and how weights get onto them.

A grid fits its parameters to a weight, encodes weights to codes and decodes codes to weights. A method
never knows which grid it rounds on. Codes are unsigned (uint8); the integer grid means
w = (code - zero) * scale, where a symmetric grid has zero = 2^(b-1).

Shapes: O out features, I in features, G groups of columns, C columns given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.numerics.search import minmax_scales, search_scales
from qtool.scheme import QuantScheme


class GridParams(NamedTuple):
    """One scale and zero point per group, [O, G]; [1, 1] when a whole tensor shares them.

    `scale` has its storage type; `zero` is integral in float32, or None when symmetric.
    """

    scale: Tensor
    zero: Tensor | None


@dataclass(frozen=True)
class IntGrid:
    """The integer grid of a scheme; scales are rounded to `scale_dtype` before anything is encoded."""

    scheme: QuantScheme
    scale_dtype: torch.dtype

    def fit(self, weight_OI: Tensor, importance_I: Tensor | None = None, search: bool = True) -> GridParams:
        """Parameters of least sum_ij importance_j (w_ij - w^_ij)^2; without `search`, from the range of each group."""
        rows, inputs = weight_OI.shape
        whole = self.scheme.granularity == "tensor"
        shape = (1, 1, -1) if whole else (rows, self.scheme.groups(inputs), -1)
        weight_RGK, bits, symmetric = weight_OI.reshape(shape), self.scheme.bits, self.scheme.symmetric
        if not search:
            return GridParams(*minmax_scales(weight_RGK, bits, symmetric, self.scale_dtype))
        importance = importance_I
        if importance is not None:
            importance = (importance.repeat(rows) if whole else importance).reshape(1, *weight_RGK.shape[1:])
        return GridParams(*search_scales(weight_RGK, importance, bits, symmetric, self.scale_dtype))

    def encode(self, weight_OC: Tensor, params: GridParams) -> Tensor:
        """The nearest codes, uint8 [O, C]. C is a multiple of the groups of `params`."""
        scale, zero = self._affine(params)
        codes = weight_OC.unflatten(1, (params.scale.shape[1], -1)) / scale
        return codes.round_().add_(zero).clamp_(0, 2**self.scheme.bits - 1).to(torch.uint8).flatten(1)

    def decode(self, codes_OC: Tensor, params: GridParams) -> Tensor:
        """float32 weights [O, C] of codes: (code - zero) * scale."""
        scale, zero = self._affine(params)
        return codes_OC.unflatten(1, (params.scale.shape[1], -1)).float().sub_(zero).mul_(scale).flatten(1)

    def per_column(self, params: GridParams, columns_C: Tensor, rows: int, inputs: int) -> GridParams:
        """The parameters of chosen columns of an [rows, inputs] weight, one group per column, scales in float32."""
        group = columns_C * params.scale.shape[1] // inputs

        def pick(values: Tensor) -> Tensor:
            return values.float().T[group].expand(-1, rows).T  # a column of it is contiguous

        return GridParams(pick(params.scale), None if params.zero is None else pick(params.zero))

    def _affine(self, params: GridParams) -> tuple[Tensor, Tensor | float]:
        zero = float(2 ** (self.scheme.bits - 1)) if params.zero is None else params.zero[:, :, None]
        return params.scale.float()[:, :, None], zero


@dataclass(frozen=True)
class QTensor:
    """A quantized weight [O, I]. `dequantize` is its meaning; a format may only lay it out differently."""

    codes: Tensor  # uint8 [O, I]
    params: GridParams
    scheme: QuantScheme

    def dequantize(self) -> Tensor:
        """float32 [O, I]."""
        return grid_of(self.scheme, self.params.scale.dtype).decode(self.codes, self.params)

    def split(self, rows: list[int]) -> list[QTensor]:
        """The weights that were stacked along their rows, of which there are `rows` each."""
        codes, scales = self.codes.split(rows), self.params.scale.split(rows)
        zeros = [None] * len(rows) if self.params.zero is None else self.params.zero.split(rows)
        return [QTensor(c, GridParams(s, z), self.scheme) for c, s, z in zip(codes, scales, zeros, strict=True)]


def grid_of(scheme: QuantScheme, scale_dtype: torch.dtype) -> IntGrid:
    """The grid that a scheme names."""
    return IntGrid(scheme, scale_dtype)
