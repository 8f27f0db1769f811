"""Number types: which values a code can stand for, as multiples of a scale.

int        -2^(b-1) .. 2^(b-1)-1, the code counted from the smallest
llm-int8   -127 .. 127, likewise (LLM.int8(), arXiv 2208.07339)
fp8        e4m3fn to +-448, e5m2 to +-57344; the code is the byte
e2m1       0, .5, 1, 1.5, 2, 3, 4, 6 with a sign: nvfp4 and mxfp4
nf4        the 16 quantiles of a normal distribution (QLoRA, arXiv 2305.14314, appendix E)

`shrinks` are the scales worth trying, as multiples of max|w| / `largest`; a larger one clips nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from qtool.numerics.minifloat import decode_e2m1, encode_e2m1, round_e2m1, round_fp8
from qtool.scheme import QuantScheme

NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
NF4_BINS = 64
SMALLEST_INT_SHRINK = {2: 0.2, 3: 0.25, 4: 0.3, 5: 0.4, 6: 0.5, 7: 0.6, 8: 0.7}


class Codec(Protocol):
    """A number type. Values are float32, already divided by their scale."""

    @property
    def largest(self) -> float:
        """The largest magnitude that a code stands for."""
        ...

    @property
    def unclipped(self) -> float:
        """The magnitude that both signs have."""
        ...

    @property
    def signed(self) -> bool:
        """Whether a scale may be negative, so that either end of a group gets the extra level."""
        ...

    @property
    def shrinks(self) -> tuple[float, ...]: ...

    def round(self, values: Tensor) -> Tensor:
        """The nearest values that have a code; `values` may be overwritten."""
        ...

    def encode(self, values: Tensor) -> Tensor:
        """The codes of the nearest values, uint8."""
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """float32 values of codes."""
        ...


@dataclass(frozen=True)
class IntCodec:
    """Two's complement integers, from `-2^(bits-1)`, or one less in magnitude when `narrow`."""

    bits: int
    narrow: bool = False

    @property
    def largest(self) -> float:
        return self.unclipped if self.narrow else self._half

    @property
    def unclipped(self) -> float:
        return self._half - 1.0

    @property
    def signed(self) -> bool:
        return not self.narrow

    @property
    def shrinks(self) -> tuple[float, ...]:
        return geometric(SMALLEST_INT_SHRINK[self.bits], self.largest / self.unclipped, 16)

    @property
    def _half(self) -> float:
        return float(2 ** (self.bits - 1))

    def round(self, values: Tensor) -> Tensor:
        return values.round_().clamp_(-self.largest, self.unclipped)

    def encode(self, values: Tensor) -> Tensor:
        return self.round(values).add_(self._half).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.float().sub_(self._half)


@dataclass(frozen=True)
class FP8:
    """An 8-bit float of torch's."""

    dtype: torch.dtype

    signed: ClassVar[bool] = False
    shrinks: ClassVar[tuple[float, ...]] = tuple(
        2 ** (i / 8) for i in range(8, -2, -1)
    )  # one octave, and a little less

    @property
    def largest(self) -> float:
        return torch.finfo(self.dtype).max

    unclipped = largest

    def round(self, values: Tensor) -> Tensor:
        return round_fp8(values, self.dtype)

    def encode(self, values: Tensor) -> Tensor:
        return values.clamp_(-self.largest, self.largest).to(self.dtype).view(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.contiguous().view(self.dtype).float()


class E2M1:
    """fp4. With a shrink of 1.5 the largest weight of a group lies on 4 instead of 6 (four over six, 2512.02010)."""

    largest = unclipped = 6.0
    signed = False
    shrinks = tuple(1.5 * 0.5 ** (i / 10) for i in range(12))

    def round(self, values: Tensor) -> Tensor:
        return round_e2m1(values)

    def encode(self, values: Tensor) -> Tensor:
        return encode_e2m1(values)

    def decode(self, codes: Tensor) -> Tensor:
        return decode_e2m1(codes)


class _NF4Table(NamedTuple):
    values: Tensor
    borders: Tensor  # above each value
    lowest: Tensor  # int32: the lowest code in each bin of -1 .. 1


class NF4:
    """The sixteen values of nf4."""

    largest = unclipped = 1.0
    signed = False
    shrinks = tuple(1.1 * 0.6 ** (i / 12) for i in range(12))

    def round(self, values: Tensor) -> Tensor:
        return self._table(values.device).values.index_select(0, self._codes(values)).view(values.shape)

    def encode(self, values: Tensor) -> Tensor:
        return self._codes(values).view(values.shape).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return self._table(codes.device).values.index_select(0, codes.reshape(-1).int()).view(codes.shape)

    def _codes(self, values: Tensor) -> Tensor:
        """int32, flat. A bin holds one border between codes at most: six times as fast as torch.bucketize."""
        table, flat = self._table(values.device), values.reshape(-1)
        bins = ((flat + 1) * (NF4_BINS / 2)).clamp_(0, NF4_BINS - 1).int()
        codes = table.lowest.index_select(0, bins)
        return codes.add_(flat > table.borders.index_select(0, codes))

    @staticmethod
    @cache
    def _table(device: torch.device) -> _NF4Table:
        values = torch.tensor(NF4_VALUES, device=device)
        borders = torch.cat([(values[1:] + values[:-1]) / 2, values.new_tensor([torch.inf])])
        edges = torch.arange(NF4_BINS, device=device) * (2 / NF4_BINS) - 1 - 1e-4  # a little below those of the bins
        return _NF4Table(values, borders, torch.bucketize(edges, borders, out_int32=True))


def codec_of(scheme: QuantScheme) -> Codec:
    """The number type of a scheme."""
    if scheme.kind in ("int", "llm-int8"):
        # kernels that multiply integers may count on positive scales, and 8 bits lose little by that
        return IntCodec(scheme.bits, narrow=scheme.bits == 8 and scheme.activations is not None)
    if scheme.kind in ("nvfp4", "mxfp4"):
        return E2M1()
    if scheme.kind.startswith("nf4"):
        return NF4()
    return FP8(torch.float8_e5m2 if scheme.kind == "fp8-e5m2" else torch.float8_e4m3fn)


def geometric(low: float, high: float, count: int) -> tuple[float, ...]:
    """`count` values from `high` down to `low`, each the same share of the one before."""
    return tuple(high * (low / high) ** (i / (count - 1)) for i in range(count))
