"""Grids: which values a scheme can represent, and how weights get onto them.

A grid fits its parameters to a weight and rounds weights under them: all at once (`nearest`), or column by
column through a `Rounder`, which gives back what each column will be read as. A method never knows which
grid it rounds on. Codes are uint8; with a zero point w = (code - zero) * scale, else w = value(code) * scale.

Shapes: O out features, I in features, G groups of columns, C columns given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from qtool.headers import TORCH_NAMES
from qtool.numerics.codecs import codec_of
from qtool.numerics.minifloat import decode_e8m0
from qtool.numerics.scales import (
    AbsmaxStore,
    E4M3Store,
    FloatStore,
    PowerOfTwoStore,
    ScaleStore,
    nest,
    nvfp4_divisors,
    unnest,
)
from qtool.numerics.search import range_affine, range_scales, search_affine, search_scales, weighted_error
from qtool.scheme import BLOCK, BLOCK_TYPES, FLOATS, QuantScheme


class GridParams(NamedTuple):
    """The parameters of a grid as they are stored.

    `scale` [O, G]; [1, 1] when a tensor shares one, [O / 128, I / 128] for blocks. `zero` of the same shape,
    integral in float32, or None. `super_scale` and `super_zero` are the second level of two-level scales:
    nvfp4's divisor [1]; those of nf4-dq and fp4-dq: scales [ceil(O G / 256)] and offset [1].
    """

    scale: Tensor
    zero: Tensor | None = None
    super_scale: Tensor | None = None
    super_zero: Tensor | None = None


class Outliers(NamedTuple):
    """Weights kept in 16 bits: those of row r stand at row_ends[r] .. row_ends[r + 1]."""

    row_ends: Tensor  # int32 [O + 1]
    columns: Tensor  # int32 [n]
    values: Tensor  # [n], in the type of the scales

    @property
    def rows(self) -> Tensor:
        """The row of each, [n]."""
        counts = self.row_ends.diff().long()
        return torch.arange(len(counts), device=counts.device).repeat_interleave(counts)


@dataclass(frozen=True)
class QTensor:
    """A quantized weight [O, I]. `dequantize` is its meaning; a format may only lay it out differently.

    `input_scale` [1] is the fixed scale of its input, where the scheme has one. `group_of` says to which group each
    column belongs where groups are not columns side by side (checkpoints in act-order).
    """

    codes: Tensor  # uint8 [O, I]
    params: GridParams
    scheme: QuantScheme
    outliers: Outliers | None = None
    input_scale: Tensor | None = None
    group_of: Tensor | None = None  # int32 [I]

    def dequantize(self) -> Tensor:
        """float32 [O, I]."""
        grid = grid_of(self.scheme, self.params.scale.dtype)
        if self.group_of is None:
            weight_OI = grid.decode(self.codes, self.params)
        else:
            order_I = self.group_of.argsort(stable=True)
            weight_OI = torch.empty_like(self.codes, dtype=torch.float32)
            weight_OI[:, order_I] = grid.decode(self.codes[:, order_I], self.params)
        if self.outliers is not None:
            weight_OI[self.outliers.rows, self.outliers.columns.long()] = self.outliers.values.float()
        return weight_OI

    def to(self, device: torch.device) -> QTensor:
        """The same on a device."""

        def moved(parts: Any) -> Any:
            return None if parts is None else type(parts)(*(x if x is None else x.to(device) for x in parts))

        one = [x if x is None else x.to(device) for x in (self.codes, self.input_scale, self.group_of)]
        codes, input_scale, group_of = one
        assert codes is not None
        return QTensor(codes, moved(self.params), self.scheme, moved(self.outliers), input_scale, group_of)

    def split(self, rows: list[int]) -> list[QTensor]:
        """The weights that were stacked along their rows, of which there are `rows` each; see `stackable`."""
        assert stackable(self.scheme)
        assert self.outliers is None
        shared = [x is None or x.dim() == 1 for x in self.params]  # what there is not, and the divisor of nvfp4
        parts = [[x] * len(rows) if s else x.split(rows) for x, s in zip(self.params, shared, strict=True)]  # type: ignore[union-attr]
        params = [GridParams(*part) for part in zip(*parts, strict=True)]
        return [replace(self, codes=c, params=p) for c, p in zip(self.codes.split(rows), params, strict=True)]

    @staticmethod
    def joined(parts: Sequence[QTensor]) -> QTensor:
        """The inverse of `split`, for schemes whose rows have nothing in common; see `QuantScheme.by_rows`."""

        def join(name: str) -> Any:
            values = [getattr(part.params, name) for part in parts]
            return None if values[0] is None else torch.cat(values)

        params = parts[0].params._replace(**{name: join(name) for name in GridParams._fields})
        return replace(parts[0], codes=torch.cat([part.codes for part in parts]), params=params)

    def tensors(self) -> list[Tensor]:
        """Everything that it is made of."""
        parts = [self.codes, *self.params, *(self.outliers or ()), self.input_scale, self.group_of]
        return [part for part in parts if part is not None]


@dataclass(frozen=True)
class Grid:
    """The grid of a scheme; scales without a type of their own are stored in `scale_dtype`."""

    scheme: QuantScheme
    scale_dtype: torch.dtype

    has_minimum: ClassVar[bool] = False  # what `effective` calls zero is subtracted after the scale was multiplied

    def fit(
        self, weight_OI: Tensor, importance_I: Tensor | None = None, search: bool = True, coarse: bool = False
    ) -> GridParams:
        """Parameters of least sum_ij importance_j (w_ij - w^_ij)^2; without `search`, from the range of each group.

        A `coarse` search is several times faster and good enough to compare weights by.
        """
        search = search and not self._range_is_best
        weight_RGK, importance = self._grouped(weight_OI, importance_I if search else None)
        if not self.scheme.symmetric:
            bits, dtype = self.scheme.bits, self.scale_dtype
            if search:
                scale, zero = search_affine(weight_RGK, importance, bits, dtype, coarse)
            else:
                scale, zero = range_affine(weight_RGK, bits, dtype)
            return GridParams(scale.to(dtype), zero)
        codec = codec_of(self.scheme)
        best: tuple[Tensor, ScaleStore, Tensor] | None = None
        stores = self._stores(weight_OI)[: None if search and not coarse else 1]
        for store in stores:
            if search:
                scale = search_scales(weight_RGK, importance, codec, store, coarse)
            else:
                scale = range_scales(weight_RGK, codec, store)
            error = weighted_error(weight_RGK, importance, codec, scale) if len(stores) > 1 else scale.new_zeros(1)
            if best is None or error < best[0]:
                best = error, store, scale
        assert best is not None
        _, store, scale = best
        if self.scheme.kind.endswith("-dq"):
            codes, super_scale, super_zero = nest(scale)
            return GridParams(codes, None, super_scale, super_zero)
        return GridParams(store.pack(scale), None, store.divisor if isinstance(store, E4M3Store) else None)

    def encode(self, weight_OC: Tensor, params: GridParams) -> Tensor:
        """The nearest codes, uint8 [O, C]. C is a multiple of the groups of `params`."""
        scale = self._effective(params, len(weight_OC))
        values = weight_OC.unflatten(1, (scale.shape[1], -1)) / scale[:, :, None]
        if params.zero is not None:
            codes = values.round_().add_(params.zero[:, :, None]).clamp_(0, 2**self.scheme.bits - 1)
            return codes.to(torch.uint8).flatten(1)
        return codec_of(self.scheme).encode(values).flatten(1)

    def decode(self, codes_OC: Tensor, params: GridParams) -> Tensor:
        """float32 weights [O, C] of codes."""
        scale = self._effective(params, len(codes_OC))
        codes = codes_OC.unflatten(1, (scale.shape[1], -1))
        zero = params.zero
        values = codec_of(self.scheme).decode(codes) if zero is None else codes.float().sub_(zero[:, :, None])
        return values.mul_(scale[:, :, None]).flatten(1)

    def nearest(self, weight_OI: Tensor, params: GridParams) -> QTensor:
        """A weight rounded to nearest."""
        return QTensor(self.encode(weight_OI, params), params, self.scheme)

    def rounder(self, params: GridParams, shape: tuple[int, int]) -> Rounder:
        """What rounds the columns of a weight [O, I] one at a time."""
        return Rounder(self, params, shape)

    def per_column(self, params: GridParams, columns_C: Tensor, rows: int, inputs: int) -> GridParams:
        """The parameters of chosen columns of an [rows, inputs] weight, one group per column, scales in float32."""
        scale = self._effective(params, rows)
        group = columns_C * scale.shape[1] // inputs

        def pick(values: Tensor) -> Tensor:
            return values.T[group].expand(-1, rows).T  # a column of it is contiguous

        return GridParams(pick(scale), None if params.zero is None else pick(params.zero))

    @property
    def _range_is_best(self) -> bool:
        """Where a search was measured to find nothing that the outputs keep.

        A float type is about as fine under every scale, so where thousands of weights share one there is nothing to
        find; and 8-bit weights under rounded inputs lose less than the inputs do.
        """
        scheme = self.scheme
        floats = scheme.kind.startswith("fp8") and scheme.granularity in ("tensor", "block")
        return floats or (scheme.kind == "int" and scheme.bits == 8 and scheme.activations is not None)

    def _grouped(self, weight_OI: Tensor, importance_I: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weights that share a scale side by side, [R, G, K], and their importance, [1, G, K]."""
        rows, inputs = weight_OI.shape
        groups = self.scheme.groups(inputs)
        if self.scheme.granularity == "tensor":
            importance = None if importance_I is None else importance_I.repeat(rows).reshape(1, 1, -1)
            return weight_OI.reshape(1, 1, -1), importance
        if self.scheme.granularity == "block":
            padded = torch.nn.functional.pad(weight_OI, (0, 0, 0, -rows % BLOCK))
            blocks = padded.view(-1, BLOCK, groups, BLOCK).transpose(1, 2).flatten(2)
            importance = None if importance_I is None else importance_I.view(1, groups, BLOCK).repeat(1, 1, BLOCK)
            return blocks, importance
        importance = None if importance_I is None else importance_I.reshape(1, groups, -1)
        return weight_OI.reshape(rows, groups, -1), importance

    def _stores(self, weight_OI: Tensor) -> list[ScaleStore]:
        """The ways to store the scales of this weight that are worth trying, the usual one first."""
        if self.scheme.kind == "nvfp4":
            return [E4M3Store(divisor) for divisor in nvfp4_divisors(weight_OI.abs().amax())]
        if self.scheme.kind.startswith("mx"):
            return [PowerOfTwoStore()]
        if self.scheme.kind == "llm-int8":
            return [AbsmaxStore()]
        if self.scheme.kind.startswith(("nf4", "fp4")):
            return [FloatStore(torch.float32)]
        return [FloatStore(self.scale_dtype)]

    def effective(self, params: GridParams) -> GridParams:
        """What `params` mean: w = scale * (level - zero) for the kinds here; scale and zero in float32, as they lie."""
        scale = params.scale
        if params.super_zero is not None:
            assert params.super_scale is not None
            scale = unnest(scale, params.super_scale, params.super_zero)
        elif params.super_scale is not None:
            scale = scale.float() / params.super_scale
        elif scale.dtype == torch.uint8:
            scale = decode_e8m0(scale)
        return GridParams(scale.float(), params.zero)

    def stored(self, effective: GridParams, like: GridParams) -> GridParams:
        """The nearest that can be stored, under the second level of `like`: the inverse of `effective`."""
        scale, zero, _, _ = effective
        if not self.scheme.symmetric:
            assert zero is not None
            zero = zero.round().clamp_(0, 2**self.scheme.bits - 1)
            return GridParams(FloatStore(self.scale_dtype).pack(scale), zero)
        if like.super_scale is not None and like.super_zero is not None:
            return like._replace(scale=nest(scale, (like.super_scale, like.super_zero))[0])
        store = E4M3Store(like.super_scale) if like.super_scale is not None else self._stores(scale)[0]
        return like._replace(scale=store.pack(store.stored(scale)))

    def _effective(self, params: GridParams, rows: int) -> Tensor:
        """The scales that codes are multiplied by, float32 [O or 1, G]."""
        return spread_rows(self.effective(params).scale, rows)

    @property
    def ends(self) -> tuple[float, float]:
        """The smallest and the largest level."""
        return codec_of(self.scheme).ends if self.scheme.symmetric else (0.0, 2.0**self.scheme.bits - 1)

    def gaps(self, levels: Tensor) -> Tensor:
        """How far the nearest neighbours of levels are; those of integers are 1."""
        if not self.scheme.symmetric:
            return torch.ones_like(levels)
        known = _levels(self.scheme, levels.device)
        steps = known.diff()
        gaps = torch.cat([steps[:1], torch.minimum(steps[1:], steps[:-1]), steps[-1:]])
        return gaps[torch.bucketize(levels, (known[1:] + known[:-1]) / 2)]


def spread_rows(values: Tensor, rows: int) -> Tensor:
    """What blocks of rows share, one row for each; [1, G] stays as it is."""
    return values if len(values) in (1, rows) else values.repeat_interleave(BLOCK, 0)[:rows]


@cache
def _levels(scheme: QuantScheme, device: torch.device) -> Tensor:
    """All levels of a number type, rising."""
    values = codec_of(scheme).decode(torch.arange(2**scheme.bits, dtype=torch.uint8, device=device))
    return values[values.isfinite()].unique()


def float_tensor(values_OI: Tensor) -> QTensor:
    """A weight that is stored as it is, in float32, float16 or bfloat16: its own codes."""
    name = next(name for name, dtype in TORCH_NAMES.items() if getattr(torch, dtype) == values_OI.dtype)
    ones = torch.ones((1, 1), device=values_OI.device)
    return QTensor(values_OI, GridParams(ones), QuantScheme.parse(name.lower()))


class Rounder:
    """Rounds the columns of one weight, in any order, and keeps the codes."""

    def __init__(self, grid: Grid, params: GridParams, shape: tuple[int, int]) -> None:
        self.grid, self.params, self.shape = grid, params, shape
        self.codes_OI = torch.empty(shape, dtype=torch.uint8, device=params.scale.device)
        self.columns: list[int] = []

    def start(self, columns_C: Tensor) -> None:
        """The columns that come next, in their order."""
        self.columns = columns_C.tolist()
        self.of_columns = self.grid.per_column(self.params, columns_C, *self.shape)

    def round(self, j: int, target_O: Tensor) -> Tensor:
        """The j-th of them rounded: what it will be read as, float32 [O]."""
        scale, zero, _, _ = self.of_columns
        params = GridParams(scale[:, j : j + 1], None if zero is None else zero[:, j : j + 1])
        codes_O1 = self.grid.encode(target_O[:, None], params)
        self.codes_OI[:, self.columns[j]] = codes_O1[:, 0]
        return self.grid.decode(codes_O1, params)[:, 0]

    def result(self) -> QTensor:
        """The weight, once every column was rounded."""
        return QTensor(self.codes_OI, self.params, self.grid.scheme)


def stackable(scheme: QuantScheme) -> bool:
    """Whether weights may be solved as one, stacked along their rows, and be split again afterwards."""
    return scheme.granularity in ("channel", "group") and not scheme.kind.endswith("-dq") and not scheme.outliers


def grid_of(scheme: QuantScheme, scale_dtype: torch.dtype) -> Grid:
    """The grid that a scheme names."""
    if scheme.outliers:
        from qtool.numerics.outliers import OutlierGrid

        return OutlierGrid(scheme, scale_dtype)
    if scheme.kind in (*BLOCK_TYPES, *FLOATS) or (scheme.kind == "mxfp4" and scheme.activations is None):
        from qtool.numerics.blocks import BlockGrid, FloatGrid

        return (FloatGrid if scheme.kind in FLOATS else BlockGrid)(scheme, torch.float16)
    return Grid(scheme, scale_dtype)
