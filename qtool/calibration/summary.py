"""What the statistics of one input say to a person: outliers, dead channels, and what few bits would cost.

Rounding each token of I inputs to b bits with a scale of its own, step = max |x| / (2^(b-1) - 1), adds an error of
step^2 / 12 per element (uniform noise), so the relative error of the input is the square root of
I E[max x^2] / (12 (2^(b-1) - 1)^2 E[|x|^2]). For I = 4096 normally distributed inputs that is 0.9 % and 17 % at 8
and 4 bits; outliers make it more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from qtool.calibration.stats import InputStats
from qtool.errors import QtoolError
from qtool.headers import kind_of

BITS = (8, 4)


def summary(
    linears: Sequence[str], stats: InputStats, peak_squares: Tensor, output_absmax: Sequence[Tensor]
) -> dict[str, Any]:
    """A record of plain values; `linears` are those that read the input, named in full.

    Raises QtoolError when the input, its second moment or an output is not finite.
    """
    channels = stats.channels
    assert channels is not None
    name, width = linears[0], len(channels.absmax_I)
    squares = float(channels.sum_squares_I.sum())
    finite = channels.sum_squares_I.isfinite().all() and channels.absmax_I.isfinite().all()
    if stats.second_II is not None:
        finite = finite and stats.second_II.isfinite().all()
    if not finite:
        raise QtoolError(f"the inputs of `{name}` are not finite on the calibration data")
    for linear, largest in zip(linears, output_absmax, strict=True):
        if not largest.isfinite():
            raise QtoolError(f"the outputs of `{linear}` are not finite on the calibration data")
    absmax = float(channels.absmax_I.max())
    mean_abs = float(channels.sum_abs_I.sum()) / (stats.tokens * width)
    return {
        "input": name,
        "kind": kind_of(name),
        "linears": list(linears),
        "channels": width,
        "tokens": stats.tokens,
        "absmax": absmax,
        "mean_abs": mean_abs,
        "outlier_ratio": absmax / mean_abs if mean_abs else 0.0,
        "large_channels": int((channels.large_I > 0).sum()),  # LLM.int8() keeps these in 16 bits
        "dead_channels": int((channels.absmax_I == 0).sum()),
        "token_error": {
            f"int{bits}": min(1.0, (width * float(peak_squares) / (12 * squares)) ** 0.5 / (2 ** (bits - 1) - 1))
            if squares
            else 0.0
            for bits in BITS
        },
        "output_absmax": {linear: float(x) for linear, x in zip(linears, output_absmax, strict=True)},
    }
