"""What rounding the inputs of a linear costs, told from statistics of its channels alone.

A number type rounds x to within a share of x, and to a fixed step below some size. The step follows the largest
magnitude among the channels that are rounded together, of each token. Its mean square is estimated by taking channels
to be independent and each |x| to follow a Weibull distribution, which has two parameters: such that its mean square,
and its largest magnitude over as many tokens, are those seen. That covers flat, normal and heavy tails.

Shapes: I channels, G groups that are rounded together, K channels of a group, P points, T points of a table.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qtool.calibration.stats import Moments
from qtool.scheme import ActivationScheme

POINTS = 128  # of the integral, over eight decades of x^2
TABLE = 256  # shapes of the distribution
SQUARE_IN_OCTAVE = 3 / (2 * math.log(2))  # mean of x^2 / 4^floor(log2 x), log x uniform
# mantissa bits, and the step of the smallest numbers over the largest magnitude. A scale that is a power of two puts
# that at 4 sqrt(2) of 6, or at 256 sqrt(2) of 448, in the geometric mean
FLOATS = {
    "fp8-e4m3": (3, 2**-9 / 448),
    "mxfp8": (3, 2**-9 / (256 * math.sqrt(2))),
    "nvfp4": (1, 0.5 / 6),
    "mxfp4": (1, 0.5 / (4 * math.sqrt(2))),
}


def rounding_noise(scheme: ActivationScheme, moments: Moments, scale_I: Tensor) -> Tensor:
    """Mean square error [I] of the channels of x / scale when they are rounded."""
    assert moments.vectors is not None
    absmax_I = moments.vectors.absmax_I / scale_I
    square_I = moments.diagonal_I / scale_I.square()
    if scheme.threshold is not None:  # channels with outliers stay as they are
        exact_I = absmax_I >= scheme.threshold
        absmax_I, square_I = absmax_I.masked_fill(exact_I, 0), square_I.masked_fill(exact_I, 0)
    if scheme.granularity == "tensor":
        largest_I = absmax_I.amax().square()
    else:
        width = scheme.group_size or len(absmax_I)
        largest_G = mean_square_of_largest(absmax_I.view(-1, width), square_I.view(-1, width), moments.tokens)
        largest_I = largest_G.repeat_interleave(width)
    if scheme.kind in FLOATS:
        mantissa, step = FLOATS[scheme.kind]
        share = 4.0**-mantissa / 12 / SQUARE_IN_OCTAVE
    else:
        share, step = 0.0, 2 / (2**scheme.bits - 1)
    noise_I = share * square_I + step**2 / 12 * largest_I
    return torch.minimum(noise_I, square_I)  # what is rounded to 0 loses no more than itself


def mean_square_of_largest(absmax_GK: Tensor, square_GK: Tensor, tokens: int) -> Tensor:
    """E max_k x_k^2 [G], given max |x| over the tokens and E x^2 of each channel."""
    log_tokens = math.log(max(tokens, 2)) + 0.5772  # |x| with 1 - F = exp(-(x / l)^(1/p)) is at most l log_tokens^p
    spread_T = torch.linspace(0.02, max(0.1, (log_tokens - 1) / 2), TABLE, device=absmax_GK.device)  # p
    mean_square_T = torch.special.gammaln(1 + 2 * spread_T)  # log of E x^2 / l^2
    ratio_T = (2 * spread_T * math.log(log_tokens) - mean_square_T).cummax(0).values
    floor = torch.finfo(torch.float32).tiny
    log_square_GK = square_GK.clamp(min=floor).log()
    ratio_GK = 2 * absmax_GK.clamp(min=floor).log() - log_square_GK
    index_GK = torch.searchsorted(ratio_T, ratio_GK).clamp(max=TABLE - 1)
    spread_GK, log_l_GK = spread_T[index_GK], (log_square_GK - mean_square_T[index_GK]) / 2
    highest_G = absmax_GK.amax(1).square()
    points_P = torch.logspace(-8, 0, POINTS, device=absmax_GK.device)
    squares_PG = points_P[:, None] * highest_G.clamp(min=floor)
    # P(x_k^2 <= v) = 1 - exp(-exp((log v / 2 - log l) / p)); the product over k as a sum of logarithms
    z_PGK = ((squares_PG.log() / 2)[..., None] - log_l_GK) / spread_GK
    below_PG = (-torch.expm1(-z_PGK.exp())).clamp(min=floor).log().sum(-1).exp()
    above_PG = 1 - below_PG
    inner_G = ((above_PG[1:] + above_PG[:-1]) / 2 * squares_PG.diff(dim=0)).sum(0)
    return (squares_PG[0] + inner_G).minimum(highest_G)
