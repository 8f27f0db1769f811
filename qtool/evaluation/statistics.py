"""From losses per token to figures with errors. Rows are the clusters: tokens of one row are not independent.

Shapes: N scored tokens, R rows. `row_N` says which row a token is of.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Z95 = 1.959963984540054  # of the normal distribution, two-sided 95 %
PERCENTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99, "p99_9": 0.999}


@dataclass(frozen=True)
class Estimate:
    """A figure, its standard error and its 95 % confidence interval; no error from a single row."""

    value: float
    standard_error: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, value: float, standard_error: float | None) -> Estimate:
        if standard_error is None:
            return cls(value, None, None, None)
        return cls(value, standard_error, value - Z95 * standard_error, value + Z95 * standard_error)


def clustered_error(influence_N: Tensor, row_N: Tensor) -> float | None:
    """Standard error of sum(influence) when rows, not tokens, are the independent draws (None for one row).

    For the mean m of x over N tokens the influence of a token is (x - m) / N; any smooth function of means
    has the influence that its derivative gives (the delta method).
    """
    rows = int(row_N.max()) + 1
    if rows < 2:
        return None
    per_row_R = torch.zeros(rows, dtype=torch.float64).index_add_(0, row_N, influence_N)
    return math.sqrt(float(per_row_R.square().sum()) * rows / (rows - 1))


def mean(values_N: Tensor, row_N: Tensor) -> Estimate:
    """The mean over tokens with its clustered error."""
    average = float(values_N.mean())
    return Estimate.of(average, clustered_error((values_N - average) / len(values_N), row_N))


def perplexity(loss_N: Tensor, row_N: Tensor) -> Estimate:
    """exp of the mean loss in nats."""
    average = float(loss_N.mean())
    value = _exp(average)
    return Estimate.of(value, clustered_error(value * (loss_N - average) / len(loss_N), row_N))


def perplexity_delta(loss_N: Tensor, base_N: Tensor, row_N: Tensor) -> Estimate:
    """exp(mean loss) - exp(mean base), paired token by token."""
    a, b = float(loss_N.mean()), float(base_N.mean())
    influence = (_exp(a) * (loss_N - a) - _exp(b) * (base_N - b)) / len(loss_N)
    return Estimate.of(_exp(a) - _exp(b), clustered_error(influence, row_N))


def perplexity_ratio(loss_N: Tensor, base_N: Tensor, row_N: Tensor) -> Estimate:
    """exp(mean loss - mean base) - 1: the relative increase."""
    difference = loss_N - base_N
    average = float(difference.mean())
    error = clustered_error(_exp(average) * (difference - average) / len(difference), row_N)
    return Estimate.of(_exp(average) - 1, error)


def percentiles(values_N: Tensor) -> dict[str, float]:
    """The named percentiles and the maximum, linearly interpolated."""
    ordered = values_N.sort().values
    result = {}
    for name, share in PERCENTILES.items():
        position = share * (len(ordered) - 1)
        below = int(position)
        above = min(below + 1, len(ordered) - 1)
        result[name] = float(ordered[below] + (ordered[above] - ordered[below]) * (position - below))
    return {**result, "max": float(ordered[-1])}


def _exp(nats: float) -> float:
    """exp, at most so large that its square is a number: a model beyond that is lost anyhow."""
    return math.exp(min(nats, 300.0))
