"""Small floats: fp4 (e2m1), fp8 and the exponents of e8m0 (OCP microscaling formats, arXiv 2310.10537).

A float32 to which 2^(23 - m) times its own power of two is added keeps m bits of its fraction, and the addition
rounds to nearest, ties to even. That is faster than a cast to float8 and back, and exact.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

EXPONENT = 0x7F800000  # these bits of a float32; with the rest 0 they are a power of two
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class _Type(NamedTuple):
    largest: float
    normal: float  # the smallest that has all bits of the fraction; below it the step stays the same
    fraction_bits: int


_E2M1 = _Type(6.0, 1.0, 1)
_FP8 = {
    torch.float8_e4m3fn: _Type(448.0, 2.0**-6, 3),
    torch.float8_e5m2: _Type(57344.0, 2.0**-14, 2),
}


def round_e2m1(values: Tensor) -> Tensor:
    """The nearest of +-{0, .5, 1, 1.5, 2, 3, 4, 6}, ties to the even code, 6 beyond that; float32 in and out."""
    return _rounded(values, _E2M1)


def encode_e2m1(values: Tensor) -> Tensor:
    """The codes 0..15 of the nearest values, uint8: the sign is bit 3.

    What is negative and rounds to 0 becomes -0, code 8, as in files of compressed-tensors 0.19.
    """
    # of the sum the last bits count the steps inside its octave, of which every octave from 2 on begins two later
    bits = _shifted(values, _E2M1)[0].view(torch.int32)
    codes = (bits & 7) + 2 * ((bits >> 23) - (127 + 22))
    return codes.add_(torch.signbit(values), alpha=8).to(torch.uint8)


def decode_e2m1(codes: Tensor) -> Tensor:
    """float32 values of codes 0..15."""
    return _e2m1_values(codes.device)[codes.int()]


def round_fp8(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest values of torch.float8_e4m3fn or float8_e5m2, ties to even, float32 in and out.

    What is beyond the largest (448, 57344) becomes the largest: a cast does not do that in torch <= 2.11.
    """
    return _rounded(values, _FP8[dtype])


def encode_e8m0(scale: Tensor) -> Tensor:
    """The exponent of a positive float32 + 127, uint8: of a power of two its code, else that of the next one below.

    Code 0 is 2^-127 and all that is smaller, 0 included.
    """
    return (scale.view(torch.int32) >> 23).to(torch.uint8)


def decode_e8m0(codes: Tensor) -> Tensor:
    """2^(code - 127), float32, for codes 0..254."""
    return torch.where(codes == 0, 1 << 22, codes.int() << 23).view(torch.float32)


def floor_e8m0(values: Tensor) -> Tensor:
    """The largest power of two that is not above a positive float32 and that e8m0 has."""
    return decode_e8m0(encode_e8m0(values))


def _shifted(values: Tensor, to: _Type) -> tuple[Tensor, Tensor]:
    """|values| plus a power of two that leaves only the bits of `to`, and that power."""
    magnitude = values.abs().clamp_(max=to.largest)
    shift = (magnitude.view(torch.int32) & EXPONENT).view(torch.float32)
    shift.clamp_(min=to.normal).mul_(2.0 ** (23 - to.fraction_bits))
    return magnitude.add_(shift), shift


def _rounded(values: Tensor, to: _Type) -> Tensor:
    shifted, shift = _shifted(values, to)
    return shifted.sub_(shift).copysign_(values)


@cache
def _e2m1_values(device: torch.device) -> Tensor:
    return torch.tensor([sign * value for sign in (1, -1) for value in E2M1_VALUES], device=device)
