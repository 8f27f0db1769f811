"""The codes of one packed weight and their scales: what is used of a number type, and what a scale belongs to.

A code counts by the value it stands for, as a multiple of its scale: the two zeros of fp4 and fp8 are one. With
zero points, where that differs from group to group, the codes themselves count. Entropy: -sum p log2 p, the bits
per weight that an ideal compression of the codes alone would take. Shapes: O out, I in, G groups of columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2
from typing import TYPE_CHECKING

from qtool.formats.weights import Weights
from qtool.scheme import BLOCK, BLOCK_TYPES, NESTED_BLOCK, QuantScheme

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.numerics.grid import QTensor

CHUNK = 1 << 22  # codes counted at a time
OF_BLOCK = f"over one float16 for every {BLOCK_TYPES['q4_k'].weights} inputs"
OVER = {  # two-level scales: what the scales are, and what they stand over
    "nvfp4": "e4m3, over one float32 for the tensor",
    **dict.fromkeys(("nf4-dq", "fp4-dq"), f"8-bit codes, over one float32 for every {NESTED_BLOCK} and an offset"),
    "q2_k": f"4-bit integers, {OF_BLOCK}",
    **dict.fromkeys(("q3_k", "q4_k", "q5_k", "iq4_xs"), f"6-bit integers, {OF_BLOCK}"),
    "q6_k": f"8-bit integers, {OF_BLOCK}",
}
POWERS = "powers of two (e8m0)"


@dataclass(frozen=True)
class CodeStats:
    """`counts` are the values that codes stand for, rising, with how many weights have each.

    Scales are those that a code is multiplied by, both levels together. `saturated_ratio` is the share of weights
    at either end of `counts`. `zero_point_*` are None without zero points, `minimum_*` where groups have no minimum of
    their own, which is added to the product of scale and code, `input_scale` without a fixed one.
    """

    scale_kind: str
    scales: int
    negative_scales: int
    scale_minimum: float
    scale_median: float
    scale_maximum: float
    zero_point_minimum: float | None
    zero_point_maximum: float | None
    minimum_lowest: float | None
    minimum_highest: float | None
    codes_available: int
    codes_used: int
    entropy_bits: float
    saturated_ratio: float
    counts: list[tuple[float, int]]
    outliers: int
    outlier_share: float
    outlier_maximum: float | None  # in magnitude
    input_scale: float | None


def read_packed(weights: Weights, module: str) -> QTensor:
    """The packed weight of a module."""
    assert weights.format
    parts = dict(weights.checkpoint.read_many(weights.packed_names[module]))
    return weights.format.unpack(module, parts, weights.schemes[module])


def code_stats(weight: QTensor) -> CodeStats:
    """The statistics of codes and scales of one weight [O, I]."""
    import numpy as np

    scheme, outliers = weight.scheme, weight.outliers
    scale, zero = effective_scales(weight)
    minimum = -zero if zero is not None and scheme.kind in BLOCK_TYPES else None
    zero = zero if minimum is None else None
    magnitude = scale.abs()
    counts = code_counts(weight)
    total, used = weight.codes.numel(), [n for _, n in counts if n]
    return CodeStats(
        scale_kind=scale_kind(scheme, weight.params.scale),
        scales=scale.numel(),
        negative_scales=int((scale < 0).sum()),
        scale_minimum=magnitude.min().item(),
        scale_median=float(np.median(magnitude.numpy())),
        scale_maximum=magnitude.max().item(),
        zero_point_minimum=None if zero is None else zero.min().item(),
        zero_point_maximum=None if zero is None else zero.max().item(),
        minimum_lowest=None if minimum is None else minimum.min().item(),
        minimum_highest=None if minimum is None else minimum.max().item(),
        codes_available=len(counts),
        codes_used=len(used),
        entropy_bits=sum(-n / total * log2(n / total) for n in used) + 0.0,
        saturated_ratio=(counts[0][1] + counts[-1][1]) / total,
        counts=counts,
        outliers=0 if outliers is None else len(outliers.values),
        outlier_share=0.0 if outliers is None else len(outliers.values) / total,
        outlier_maximum=None if outliers is None or not len(outliers.values) else outliers.values.abs().max().item(),
        input_scale=None if weight.input_scale is None else weight.input_scale.float().item(),
    )


def effective_scales(weight: QTensor) -> tuple[Tensor, Tensor | None]:
    """What codes are multiplied by, float32 [O, G]; [1, 1] for a tensor, [ceil(O / 128), G] for blocks; and zeros.

    Of block types with minima these are what is subtracted, instead of zeros.
    """
    from qtool.numerics.grid import grid_of

    found = grid_of(weight.scheme, weight.params.scale.dtype).effective(weight.params)
    return found.scale, found.zero


def code_counts(weight: QTensor) -> list[tuple[float, int]]:
    """The values that the scheme has codes for, rising, each with the number of weights that have it."""
    import torch

    from qtool.numerics.codecs import codec_of

    size = 2**weight.scheme.bits
    counts = torch.zeros(size, dtype=torch.int64)
    for part in weight.codes.flatten().split(CHUNK):
        counts += torch.bincount(part, minlength=size)
    found: dict[float, int] = {}
    codec = codec_of(weight.scheme)
    codes = torch.arange(size).to(torch.uint8)
    values = codec.decode(codes) if weight.scheme.symmetric else codes.float()
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        usual = not weight.scheme.symmetric or abs(value) <= codec.largest  # NaN is not
        if usual or count:
            found[value + 0.0] = found.get(value + 0.0, 0) + count
    return sorted(found.items())


def scale_kind(scheme: QuantScheme, scale: Tensor) -> str:
    """What one stored scale is and what it belongs to."""
    extent = {
        "tensor": "for the tensor",
        "channel": "for each row",
        "block": f"for each {BLOCK} x {BLOCK} block",
        "group": f"for each {scheme.group_size} inputs of a row",
    }[scheme.granularity]
    number = POWERS if scheme.kind.startswith("mx") else OVER.get(scheme.kind, str(scale.dtype).removeprefix("torch."))
    level = "two levels: " if scheme.kind in OVER else ""
    return f"one {extent}, {level}{number}"
