"""How far a rounded weight is from what it was, and its output from what that was.

Shapes: O out features, I in features.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 512  # of a weight compared at once


@dataclass(frozen=True)
class Errors:
    """Relative Frobenius errors of a weight and, where the second moment of its input is known, of its output."""

    weight: float
    output: float | None

    @classmethod
    def of(cls, sums: Iterable[Tensor]) -> Errors:
        """From the sums of `squares` over parts of a weight."""
        total = torch.stack(list(sums)).sum(0)
        return cls(_ratio(total[0], total[1]), _ratio(total[2], total[3]) if len(total) > 2 else None)


def compare(weight_OI: Tensor, new_OI: Tensor, second_II: Tensor | None) -> Errors:
    """How far a weight is from what it was, given E[x x^T] of its input."""
    parts = zip(weight_OI.split(ROWS), new_OI.split(ROWS), strict=True)
    return Errors.of(squares(weight, new, second_II) for weight, new in parts)


def squares(weight_OI: Tensor, new_OI: Tensor, second_II: Tensor | None = None) -> Tensor:
    """|D|^2, |W|^2 and, with a second moment, tr D H D^T, tr W H W^T of a change D of a weight, float64."""
    error = new_OI - weight_OI
    products = [error.square().sum(), weight_OI.square().sum()]
    if second_II is not None:
        products += [((x @ second_II).mul_(x)).sum() for x in (error, weight_OI)]
    return torch.stack(products).cpu().double()


def _ratio(part: Tensor, whole: Tensor) -> float:
    """The square root of a share, 0 where the whole is 0."""
    return math.sqrt(max(float(part), 0.0) / float(whole)) if float(whole) > 0 else 0.0
