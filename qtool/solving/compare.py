"""How far a rounded weight is from what it was, and its output from what that was.

Shapes: O out features, I in features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 512  # of a weight compared at once


@dataclass(frozen=True)
class Errors:
    """Relative Frobenius errors of a weight and, where the second moment of its input is known, of its output."""

    weight: float
    output: float | None


def compare(weight_OI: Tensor, new_OI: Tensor, second_II: Tensor | None) -> Errors:
    """How far a weight is from what it was, given E[x x^T] of its input."""
    sums = torch.zeros(4, dtype=torch.float64)  # |D|^2, |W|^2, tr D H D^T, tr W H W^T
    for weight, new in zip(weight_OI.split(ROWS), new_OI.split(ROWS), strict=True):
        error = new - weight
        products = [error.square().sum(), weight.square().sum()]
        if second_II is not None:
            products += [((x @ second_II).mul_(x)).sum() for x in (error, weight)]
        sums[: len(products)] += torch.stack(products).cpu().double()
    return Errors(_ratio(sums[0], sums[1]), None if second_II is None else _ratio(sums[2], sums[3]))


def _ratio(part: Tensor, whole: Tensor) -> float:
    """The square root of a share, 0 where the whole is 0."""
    return math.sqrt(max(float(part), 0.0) / float(whole)) if float(whole) > 0 else 0.0
