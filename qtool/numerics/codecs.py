"""Number types: which values a code can stand for, as multiples of a scale.

int        -2^(b-1) .. 2^(b-1)-1, the code counted from the smallest
llm-int8   -127 .. 127, likewise (LLM.int8(), arXiv 2208.07339)
fp8        e4m3fn to +-448, e5m2 to +-57344; the code is the byte
e2m1       0, .5, 1, 1.5, 2, 3, 4, 6 with a sign: nvfp4 and mxfp4
nf4        the 16 quantiles of a normal distribution (QLoRA, arXiv 2305.14314, appendix E)
iq4        16 integers, finer around 0 (llama.cpp, `kvalues_iq4nl`): iq4_nl and iq4_xs of GGUF
fp4        0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3, 1 with a sign, codes in the order of bitsandbytes 0.50

`shrinks` are the scales worth trying, as multiples of max|w| / `largest`; a larger one clips nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from qtool.numerics.minifloat import decode_e2m1, encode_e2m1, round_e2m1, round_fp8
from qtool.scheme import BLOCK_TYPES, QuantScheme

NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4_VALUES = tuple(sign * twelfths / 12 + 0.0 for sign in (1, -1) for twelfths in (0, 0.0625, 8, 12, 4, 6, 2, 3))
IQ4_VALUES = (
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
)  # fmt: skip
TABLE_BINS = 64
WITH_MINIMUM = ("q4_1", "q5_1", "q2_k", "q4_k", "q5_k")  # block types whose groups begin at a minimum of their own
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
    def ends(self) -> tuple[float, float]:
        """The smallest and the largest value."""
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
    def ends(self) -> tuple[float, float]:
        return -self.largest, self.unclipped

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

    @property
    def ends(self) -> tuple[float, float]:
        return -self.largest, self.largest

    def round(self, values: Tensor) -> Tensor:
        return round_fp8(values, self.dtype)

    def encode(self, values: Tensor) -> Tensor:
        return values.clamp_(-self.largest, self.largest).to(self.dtype).view(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.contiguous().view(self.dtype).float()


class E2M1:
    """fp4. With a shrink of 1.5 the largest weight of a group lies on 4 instead of 6 (four over six, 2512.02010)."""

    largest = unclipped = 6.0
    ends = -6.0, 6.0
    signed = False
    shrinks = tuple(1.5 * 0.5 ** (i / 10) for i in range(12))

    def round(self, values: Tensor) -> Tensor:
        return round_e2m1(values)

    def encode(self, values: Tensor) -> Tensor:
        return encode_e2m1(values)

    def decode(self, codes: Tensor) -> Tensor:
        return decode_e2m1(codes)


@dataclass(frozen=True)
class UnsignedCodec:
    """Integers from 0 to 2^bits - 1, of block types whose groups begin at a minimum of their own."""

    bits: int

    signed: ClassVar[bool] = False

    @property
    def largest(self) -> float:
        return 2.0**self.bits - 1

    @property
    def unclipped(self) -> float:
        return self.largest

    @property
    def ends(self) -> tuple[float, float]:
        return 0.0, self.largest

    @property
    def shrinks(self) -> tuple[float, ...]:
        return geometric(SMALLEST_INT_SHRINK[self.bits], 1.0, 16)

    def round(self, values: Tensor) -> Tensor:
        return values.round_().clamp_(0, self.largest)

    def encode(self, values: Tensor) -> Tensor:
        return self.round(values).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.float()


class _Lookup(NamedTuple):
    values: Tensor  # by code
    rising: Tensor  # the same, each once
    codes: Tensor  # uint8: those of `rising`
    borders: Tensor  # above each of `rising`
    lowest: Tensor  # int32: the lowest place among them in each bin of -largest .. largest


@dataclass(frozen=True)
class Table:
    """A type of a few values, listed by code. No two borders between them share a bin, 64ths of the range."""

    table: tuple[float, ...]

    shrinks: ClassVar[tuple[float, ...]] = tuple(1.1 * 0.6 ** (i / 12) for i in range(12))

    @property
    def largest(self) -> float:
        return max(self.unclipped, -min(self.table))

    @property
    def unclipped(self) -> float:
        return min(max(self.table), -min(self.table))

    @property
    def ends(self) -> tuple[float, float]:
        return min(self.table), max(self.table)

    @property
    def signed(self) -> bool:
        return self.largest != self.unclipped

    def round(self, values: Tensor) -> Tensor:
        return self._lookup(values.device).rising.index_select(0, self._places(values)).view(values.shape)

    def encode(self, values: Tensor) -> Tensor:
        return self._lookup(values.device).codes.index_select(0, self._places(values)).view(values.shape)

    def decode(self, codes: Tensor) -> Tensor:
        return self._lookup(codes.device).values.index_select(0, codes.reshape(-1).int()).view(codes.shape)

    def _places(self, values: Tensor) -> Tensor:
        """Where among the rising values the nearest stand, int32, flat.

        A bin holds one border between values at most: six times as fast as torch.bucketize.
        """
        lookup, flat = self._lookup(values.device), values.reshape(-1)
        bins = ((flat + self.largest) * (TABLE_BINS / 2 / self.largest)).clamp_(0, TABLE_BINS - 1).int()
        places = lookup.lowest.index_select(0, bins)
        return places.add_(flat > lookup.borders.index_select(0, places))

    def _lookup(self, device: torch.device) -> _Lookup:
        return _lookup(self.table, device)


@cache
def _lookup(table: tuple[float, ...], device: torch.device) -> _Lookup:
    by_value = {value + 0.0: code for code, value in reversed(list(enumerate(table)))}  # the first code of a value
    rising = torch.tensor(sorted(by_value), device=device)
    codes = torch.tensor([code for _, code in sorted(by_value.items())], dtype=torch.uint8, device=device)
    borders = torch.cat([(rising[1:] + rising[:-1]) / 2, rising.new_tensor([torch.inf])])
    largest = rising.abs().amax()
    edges = torch.arange(TABLE_BINS, device=device) * (2 / TABLE_BINS) - 1 - 1e-4  # a little below those of the bins
    lowest = torch.bucketize(edges * largest, borders, out_int32=True)
    return _Lookup(torch.tensor(table, device=device), rising, codes, borders, lowest)


def codec_of(scheme: QuantScheme) -> Codec:
    """The number type of a scheme."""
    if scheme.kind in ("int", "llm-int8"):
        # kernels that multiply integers may count on positive scales, and 8 bits lose little by that
        return IntCodec(scheme.bits, narrow=scheme.bits == 8 and scheme.activations is not None)
    if scheme.kind in ("nvfp4", "mxfp4"):
        return E2M1()
    if scheme.kind.startswith("nf4"):
        return Table(NF4_VALUES)
    if scheme.kind.startswith("fp4"):
        return Table(FP4_VALUES)
    if scheme.kind.startswith("iq4"):
        return Table(IQ4_VALUES)
    if scheme.kind in BLOCK_TYPES:
        return (UnsignedCodec if scheme.kind in WITH_MINIMUM else IntCodec)(scheme.bits)
    return FP8(torch.float8_e5m2 if scheme.kind == "fp8-e5m2" else torch.float8_e4m3fn)


def geometric(low: float, high: float, count: int) -> tuple[float, ...]:
    """`count` values from `high` down to `low`, each the same share of the one before."""
    return tuple(high * (low / high) ** (i / (count - 1)) for i in range(count))
