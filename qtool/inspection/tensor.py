"""One weight looked at closely: its distribution, its outliers, what they cost in bits, and its channels.

Effective bits: of b bits that span [-max, max], the typical weight uses b - 1 + log2(typical / outlier), where
typical is the 99th percentile of |w| and outlier is max|w|; one bit is the sign. Shapes: [.., I] is read as [O, I],
and weights that are stored [I, O] are turned.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from difflib import get_close_matches
from math import log2, prod, sqrt
from typing import TYPE_CHECKING, Any

from qtool.checkpoint.reader import Checkpoint
from qtool.errors import QtoolError, unknown
from qtool.formats.weights import check_finite
from qtool.inspection.codes import CodeStats, code_stats, read_packed
from qtool.inspection.logical import entries, open_weights
from qtool.scheme import BLOCK_TYPES

if TYPE_CHECKING:
    import numpy as np

QUANTILES = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)
TYPICAL = 0.99
GROUP = 128
BITS = (4, 8)
OUTLIER_SIGMAS = 6
BINS = 24
EXTREMES = 5
CHUNK = 1 << 22  # values in float64 at a time


@dataclass(frozen=True)
class Channels:
    """Of each channel's max|w|: the least, the median, the largest, and the channels with the largest, by index."""

    count: int
    minimum: float
    median: float
    maximum: float
    extremes: list[tuple[int, float]]


@dataclass(frozen=True)
class EffectiveBits:
    """What b bits are worth to the typical weight; `group` is the median over groups, None where none fits a row."""

    bits: int
    tensor: float
    group: float | None


@dataclass(frozen=True)
class Histogram:
    """`counts[i]` values lie in edges[i]..edges[i + 1]; beyond the edges are `below` and `above`."""

    edges: list[float]
    counts: list[int]
    below: int
    above: int


@dataclass(frozen=True)
class TensorStats:
    """Everything about one tensor. `effective_bits` is empty where typical is zero, `channels` for a vector."""

    model: str
    name: str
    shape: tuple[int, ...]
    transposed: bool  # the shape is [in, out]
    stored_as: str
    bits_per_weight: float
    minimum: float
    maximum: float
    mean: float
    std: float
    quantiles: dict[str, float]
    histogram: Histogram
    zero_ratio: float  # share that is exactly zero
    outlier_ratio: float  # share that is more than 6 standard deviations from the mean
    group_size: int
    effective_bits: list[EffectiveBits]
    channels: dict[str, Channels]  # "output" and "input"
    codes: CodeStats | None  # of a packed weight

    def to_tree(self) -> dict[str, Any]:
        return asdict(self)


def tensor_stats(checkpoint: Checkpoint, name: str) -> TensorStats:
    """The statistics of the tensor `name`. Raises UsageError with the nearest names when there is no such tensor."""
    weights = open_weights(checkpoint)
    check_name(name, list(weights.shapes))
    entry = next(e for e in entries(weights) if e.name == name)
    if not prod(entry.shape):
        raise QtoolError(f"`{name}` in {checkpoint.path} has no values: its shape is {list(entry.shape)}")
    if entry.is_unread:
        raise QtoolError(
            f"`{name}` in {checkpoint.path} is {entry.stored_as} of the shape {list(entry.shape)}, which is not read",
            f"matrices in blocks of {', '.join(BLOCK_TYPES)} and mxfp4 are",
        )
    packed = read_packed(weights, entry.module) if entry.scheme else None
    if packed:
        dense_OI = packed.dequantize()
        check_finite(name, dense_OI)
        values = dense_OI.numpy()
    else:
        values = weights.read([name])[name].numpy()
        values = values.T if entry.transposed else values
    mean, std = _moments(values)
    rows = values.reshape(-1, values.shape[-1]) if values.ndim > 1 else None
    return TensorStats(
        model=str(checkpoint.path),
        name=name,
        shape=entry.shape,
        transposed=entry.transposed,
        stored_as=entry.stored_as,
        bits_per_weight=entry.size_bits / prod(entry.shape),
        minimum=float(values.min()),
        maximum=float(values.max()),
        mean=mean,
        std=std,
        quantiles=_quantiles(values),
        histogram=_histogram(values),
        zero_ratio=float((values == 0).mean()),
        outlier_ratio=float((abs(values - mean) > OUTLIER_SIGMAS * std).mean()),
        group_size=GROUP,
        effective_bits=_effective_bits(values),
        channels={} if rows is None else {"output": _channels(rows, 1), "input": _channels(rows, 0)},
        codes=code_stats(packed) if packed else None,
    )


def check_name(name: str, known: list[str]) -> None:
    """Raises UsageError, with the nearest names, unless `name` is known."""
    if name in known:
        return
    hint = None
    if not get_close_matches(name, known, n=1, cutoff=0.5):
        holding = [k for k in known if name in k]
        found = f"{len(holding)} tensors have that in their names, such as" if holding else "names look like"
        hint = f"{found} `{(holding or known)[0]}`; `qtool inspect MODEL` lists them by kind"
    raise unknown("tensor", name, known, hint)


def effective_bits(bits: int, typical: float, outlier: float) -> float:
    """b - 1 + log2(typical / outlier)."""
    return bits - 1 + log2(typical / outlier)


def _effective_bits(values: np.ndarray) -> list[EffectiveBits]:
    import numpy as np

    magnitude = np.abs(values)
    typical, outlier = float(np.quantile(magnitude, TYPICAL)), float(magnitude.max())
    if not typical:
        return []
    grouped = None
    if values.ndim > 1 and values.shape[-1] >= GROUP:
        whole = values.shape[-1] // GROUP * GROUP  # the rest of a row that is not a multiple is left out
        groups = magnitude[..., :whole].reshape(-1, GROUP)
        outliers, typicals = groups.max(axis=1), np.quantile(groups, TYPICAL, axis=1)
        used = typicals > 0
        grouped = float(np.median(np.log2(typicals[used] / outliers[used]))) if used.any() else None
    return [
        EffectiveBits(bits, effective_bits(bits, typical, outlier), None if grouped is None else bits - 1 + grouped)
        for bits in BITS
    ]


def _moments(values: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation, in float64 without a float64 copy of everything."""
    flat = values.reshape(-1)
    starts = range(0, flat.size, CHUNK)
    mean = float(flat.sum(dtype="float64")) / flat.size
    squares = sum(float(((flat[i : i + CHUNK].astype("float64") - mean) ** 2).sum()) for i in starts)
    return mean, sqrt(squares / flat.size)


def _quantiles(values: np.ndarray) -> dict[str, float]:
    import numpy as np

    found = np.quantile(values, QUANTILES)
    return {f"{100 * q:g}%": float(v) for q, v in zip(QUANTILES, found, strict=True)}


def _histogram(values: np.ndarray) -> Histogram:
    """Equal bins between the outermost quantiles, so that a few outliers do not hide the rest."""
    import numpy as np

    low, high = (float(v) for v in np.quantile(values, (QUANTILES[0], QUANTILES[-1])))
    counts, edges = np.histogram(values, BINS, (low, high)) if low < high else np.histogram(values, 1, (low, high))
    return Histogram(edges.tolist(), counts.tolist(), int((values < edges[0]).sum()), int((values > edges[-1]).sum()))


def _channels(rows: np.ndarray, axis: int) -> Channels:
    import numpy as np

    reach = np.maximum(rows.max(axis=axis), -rows.min(axis=axis))
    extremes = np.argsort(-reach, kind="stable")[:EXTREMES]
    return Channels(
        count=reach.size,
        minimum=float(reach.min()),
        median=float(np.median(reach)),
        maximum=float(reach.max()),
        extremes=[(int(i), float(reach[i])) for i in extremes],
    )
