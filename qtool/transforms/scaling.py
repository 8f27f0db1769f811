"""Choosing among scales for the channels of an input by the error that rounding leaves in the outputs.

For weights W and columns scaled by s the rounded outputs differ by D x / s, D = Q(W s) - W s. With H = E x x^T
that is tr(D / s H (D / s)^T), so a candidate costs one rounding and one product with H, and no forward pass. Rows
are alike enough that candidates are compared on a few hundred of them, and the winner with doing nothing on all.
Scales from the range of each group instead of searched ones would choose much worse (0.86 instead of 0.58 of the error,
int4-g128, 1024 inputs with outliers): a coarse search makes a short list, and the usual one chooses from it.

Shapes: O out features, I in features, R some rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from qtool.numerics.grid import Grid, stackable
from qtool.transforms import Scales

SMALLEST, LARGEST = 1e-4, 1e4  # of a scale
SAMPLE_ROWS = 256  # of a weight, on which candidates are compared
SHORTLIST = 6  # candidates that are rounded as the winner will be
CHUNK_ROWS = 512  # of a weight rounded at once


def best_scales(
    weights: Sequence[Tensor],
    grid: Grid,
    second_II: Tensor,
    candidates: Sequence[tuple[str, Tensor]],
    input_error: Callable[[Tensor], float],
) -> Scales | None:
    """The scales [I] of least error among named `candidates`, or None when none is better than doing nothing.

    `weights` [O, I] are rounded on their grid under `second_II` = E x x^T; `input_error` is what the rounding of the
    inputs adds under given scales.
    """

    def error(scale_I: Tensor, rows: int | None = None, coarse: bool = False) -> float:
        return weight_error(weights, grid, second_II, scale_I, rows, coarse) + input_error(scale_I)

    nothing = torch.ones_like(second_II[0])
    shortlist = sorted(candidates, key=lambda candidate: error(candidate[1], SAMPLE_ROWS, coarse=True))[:SHORTLIST]
    name, scale_I = min(shortlist, key=lambda candidate: error(candidate[1], SAMPLE_ROWS))
    before, after = error(nothing), error(scale_I)
    if not after < before:
        return None
    outputs = sum(float(_quadratic(weight, second_II)) for weight in weights)
    relative = [math.sqrt(max(e, 0.0) / outputs) if outputs > 0 else 0.0 for e in (before, after)]
    return Scales(scale_I, f"{name}, expected output error {relative[0]:.4f} -> {relative[1]:.4f}")


def weight_error(
    weights: Iterable[Tensor],
    grid: Grid,
    second_II: Tensor,
    scale_I: Tensor,
    rows: int | None = None,
    coarse: bool = False,
) -> float:
    """sum_k tr(D_k / s H (D_k / s)^T) of weights [O, I], or about that from so many rows of each."""
    importance_I = second_II.diagonal() / scale_I.square()
    scheme = grid.scheme
    alone = stackable(scheme) and scheme.kind != "nvfp4"  # parts can be rounded by themselves
    total = 0.0
    for weight_OI in weights:
        chosen_RI = weight_OI[:: math.ceil(len(weight_OI) / rows) if rows else 1]
        for part_RI in chosen_RI.split(CHUNK_ROWS if alone else len(chosen_RI)):
            scaled_RI = part_RI * scale_I
            params = grid.fit(scaled_RI, importance_I, coarse=coarse)
            error_RI = grid.nearest(scaled_RI, params).dequantize().sub_(scaled_RI).div_(scale_I)
            total += float(_quadratic(error_RI, second_II)) * len(weight_OI) / len(chosen_RI)
    return total


def _quadratic(error_OI: Tensor, second_II: Tensor) -> Tensor:
    """tr(D H D^T), float64."""
    return torch.stack(
        [(part @ second_II).mul_(part).sum(dtype=torch.float64) for part in error_OI.split(CHUNK_ROWS)]
    ).sum()


def powers(inputs_I: Tensor, weights_I: Tensor, of_inputs: float, of_weights: float) -> Tensor:
    """inputs^a / weights^b over its geometric mean, within SMALLEST .. LARGEST, [I].

    Channels where either magnitude is 0 keep a scale of 1: what the data does not show says nothing of them.
    """
    live_I = (inputs_I > 0) & (weights_I > 0)
    if not live_I.any():
        return torch.ones_like(inputs_I)
    log_I = of_inputs * inputs_I.log() - of_weights * weights_I.log()
    log_I = (log_I - log_I[live_I].mean()).clamp(math.log(SMALLEST), math.log(LARGEST))
    return torch.where(live_I, log_I.exp(), 1.0)


def shared(values_I: Tensor, share_I: Tensor | None, reduce: str) -> Tensor:
    """Values [I] reduced ("amax" or "mean") over the channels that have the same number."""
    if share_I is None:
        return values_I
    reduced = values_I.new_zeros(int(share_I.max()) + 1)
    return reduced.scatter_reduce(0, share_I, values_I, reduce, include_self=False)[share_I]
