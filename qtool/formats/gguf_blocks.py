"""The bytes of GGUF's block types: codes and scales of a weight, packed and unpacked (ggml 0.25, `ggml-common.h`).

A row is a sequence of blocks; what follows each other in a block is listed once, in `_pack`, and `_unpack` takes it
apart in the same order. Small numbers share bytes: `_join` puts those that stand F apart into one byte, the first
into its low bits. Every byte means something, so packing is the exact inverse of unpacking and the other way round.

Shapes: O out features, B blocks of a row; the last axis is what lies in one block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.gguf import block_of
from qtool.numerics.grid import GridParams, QTensor
from qtool.scheme import QuantScheme


def pack_blocks(weight: QTensor) -> Tensor:
    """The rows of a weight as they lie in a file, uint8 [O, bytes of a row]."""
    kind, block = weight.scheme.kind, block_of(weight.scheme)
    codes = weight.codes.unflatten(1, (-1, block.weights))
    absent = codes.new_empty(len(codes), 0)
    params = [(absent if values is None else values).unflatten(1, (codes.shape[1], -1)) for values in weight.params]
    raw = torch.cat(_pack(kind, codes, *params), -1)
    assert raw.shape[2] == block.size_bytes, f"{kind}: {raw.shape[2]} bytes"
    return raw.flatten(1)


def unpack_blocks(raw: Tensor, scheme: QuantScheme) -> QTensor:
    """The inverse of `pack_blocks`. Raises QtoolError where rows are no whole number of blocks."""
    block = block_of(scheme)
    if raw.dtype != torch.uint8 or raw.dim() != 2 or raw.shape[1] % block.size_bytes:
        found = f"{str(raw.dtype).removeprefix('torch.')} {list(raw.shape)}"
        raise QtoolError(f"a tensor of {scheme} is {found}: its rows are not blocks of {block.size_bytes} bytes")
    codes, params = _unpack(scheme.kind, raw.unflatten(1, (-1, block.size_bytes)))
    second = (None if values is None else values.flatten(1) for values in params[1:])
    return QTensor(codes.flatten(1), GridParams(params.scale.flatten(1), *second), scheme)


def _pack(kind: str, q: Tensor, scale: Tensor, zero: Tensor, d: Tensor, dmin: Tensor) -> list[Tensor]:
    """The parts of blocks [O, B, bytes], of codes and parameters [O, B, n]; what a type does not have is empty."""
    match kind:
        case "q4_0" | "iq4_nl":
            return [_bytes(scale), _join(q, 4, 16)]
        case "q4_1":
            return [_bytes(scale), _bytes(dmin), _join(q, 4, 16)]
        case "q5_0":
            return [_bytes(scale), _join(q >> 4, 1), _join(q & 15, 4, 16)]
        case "q5_1":
            return [_bytes(scale), _bytes(dmin), _join(q >> 4, 1), _join(q & 15, 4, 16)]
        case "q8_0":
            return [_bytes(scale), q ^ 128]
        case "mxfp4":
            return [scale, _join(q, 4, 16)]
        case "q2_k":
            return [scale | (zero << 4), _join(q, 2, 32), _bytes(d), _bytes(dmin)]
        case "q3_k":
            sixths = (scale + 32).view(torch.uint8)
            scales = [_join(sixths & 15, 4, 8), _join(sixths >> 4, 2, 4)]
            return [_join(q >> 2, 1, 32), _join(q & 3, 2, 32), *scales, _bytes(d)]
        case "q4_k":
            return [_bytes(d), _bytes(dmin), *_pack_six_bits(scale, zero), _join(q, 4, 32)]
        case "q5_k":
            codes = [_join(q >> 4, 1, 32), _join(q & 15, 4, 32)]
            return [_bytes(d), _bytes(dmin), *_pack_six_bits(scale, zero), *codes]
        case "q6_k":
            return [_join(q & 15, 4, 64), _join(q >> 4, 2, 32), scale.view(torch.uint8), _bytes(d)]
        case "iq4_xs":
            sixths = (scale + 32).view(torch.uint8)
            return [_bytes(d), _join(sixths >> 4, 2), _join(sixths & 15, 4), _join(q, 4, 16)]
    raise AssertionError(kind)


def _unpack(kind: str, raw: Tensor) -> tuple[Tensor, GridParams]:
    """Codes and parameters [O, B, n] of blocks [O, B, bytes]."""
    match kind:
        case "q4_0" | "iq4_nl":
            d, q = raw.split([2, 16], -1)
            return _split(q, 4, 16), GridParams(_half(d))
        case "q4_1":
            d, m, q = raw.split([2, 2, 16], -1)
            return _split(q, 4, 16), GridParams(_half(d), super_zero=_half(m))
        case "q5_0":
            d, high, q = raw.split([2, 4, 16], -1)
            return _split(q, 4, 16) | (_split(high, 1) << 4), GridParams(_half(d))
        case "q5_1":
            d, m, high, q = raw.split([2, 2, 4, 16], -1)
            return _split(q, 4, 16) | (_split(high, 1) << 4), GridParams(_half(d), super_zero=_half(m))
        case "q8_0":
            d, q = raw.split([2, 32], -1)
            return q ^ 128, GridParams(_half(d))
        case "mxfp4":
            exponent, q = raw.split([1, 16], -1)
            return _split(q, 4, 16), GridParams(exponent.clone())
        case "q2_k":
            scales, q, d, dmin = raw.split([16, 64, 2, 2], -1)
            return _split(q, 2, 32), GridParams(scales & 15, scales >> 4, _half(d), _half(dmin))
        case "q3_k":
            high, q, low, tops, d = raw.split([32, 64, 8, 4, 2], -1)
            sixths = _split(low, 4, 8) | (_split(tops, 2, 4) << 4)
            codes = _split(q, 2, 32) | (_split(high, 1, 32) << 2)
            return codes, GridParams(sixths.view(torch.int8) - 32, None, _half(d))
        case "q4_k":
            d, dmin, scales, q = raw.split([2, 2, 12, 128], -1)
            return _split(q, 4, 32), GridParams(*_unpack_six_bits(scales), _half(d), _half(dmin))
        case "q5_k":
            d, dmin, scales, high, q = raw.split([2, 2, 12, 32, 128], -1)
            codes = _split(q, 4, 32) | (_split(high, 1, 32) << 4)
            return codes, GridParams(*_unpack_six_bits(scales), _half(d), _half(dmin))
        case "q6_k":
            low, high, scales, d = raw.split([128, 64, 16, 2], -1)
            codes = _split(low, 4, 64) | (_split(high, 2, 32) << 4)
            return codes, GridParams(scales.clone().view(torch.int8), None, _half(d))
        case "iq4_xs":
            d, tops, low, q = raw.split([2, 2, 4, 128], -1)
            sixths = _split(low, 4) | (_split(tops, 2) << 4)
            return _split(q, 4, 16), GridParams(sixths.view(torch.int8) - 32, None, _half(d))
    raise AssertionError(kind)


def _pack_six_bits(scale: Tensor, minimum: Tensor) -> list[Tensor]:
    """Eight scales and eight minima of six bits in twelve bytes: the last four of each put two bits with the first."""
    low = [values[..., :4] | (values[..., 4:] >> 4 << 6) for values in (scale, minimum)]
    return [*low, (scale[..., 4:] & 15) | (minimum[..., 4:] << 4)]


def _unpack_six_bits(raw: Tensor) -> tuple[Tensor, Tensor]:
    scale, minimum, rest = raw.split(4, -1)
    return (
        torch.cat([scale & 63, (rest & 15) | (scale >> 6 << 4)], -1),
        torch.cat([minimum & 63, (rest >> 4) | (minimum >> 6 << 4)], -1),
    )


def _join(values: Tensor, bits: int, apart: int = 1) -> Tensor:
    """Values of so many bits, those `apart` from each other together in a byte, low bits first."""
    fields = values.unflatten(-1, (-1, 8 // bits, apart))
    joined = fields[..., 0, :].clone()
    for i in range(1, 8 // bits):
        joined |= fields[..., i, :] << (i * bits)
    return joined.flatten(-2)


def _split(raw: Tensor, bits: int, apart: int = 1) -> Tensor:
    """The inverse of `_join`."""
    fields = raw.unflatten(-1, (-1, apart))
    values = [(fields >> (i * bits)) & (2**bits - 1) for i in range(8 // bits)]
    return torch.stack(values, -2).flatten(-3)


def _bytes(half: Tensor) -> Tensor:
    return half.contiguous().view(torch.uint8)


def _half(raw: Tensor) -> Tensor:
    return raw.contiguous().view(torch.float16)
