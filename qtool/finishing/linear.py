"""Linears whose quantized weight is trained: what they compute with is always what a file would hold.

What is trained has no dimension: weights move in steps of their grid, scales in shares of themselves, zero points in
steps and minima in scales. So one learning rate means the same in every layer of every model.

Shapes: O out features, I in features, G groups, R rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from qtool.numerics.fake_quant import decode_codes, fake_quantize_weight
from qtool.numerics.grid import Grid, GridParams, QTensor, spread_rows

BETWEEN = 0.5  # of the way from a grid point to the point of its cell that is nearest to the float weight
BETAS = (0.9, 0.95)  # of AdamW: these runs are short
SMALLEST = 0.1  # of a scale at the start: it keeps its sign
SHIFT = 5.0  # steps of a zero point (scales of a minimum) for 1 of its parameter: an integer needs longer ways


class QuantizedLinear(nn.Module, ABC):
    """A linear with a quantized weight [O, I]. `scale` and `zero` are as `Grid.effective` has them."""

    def __init__(self, weight: QTensor, grid: Grid, bias: nn.Parameter | None) -> None:
        super().__init__()
        assert weight.group_of is None
        self.quantized, self.grid, self.bias = weight, grid, bias
        effective = grid.effective(weight.params)
        self.scale, self.zero = effective.scale, effective.zero

    @abstractmethod
    def weight(self) -> Tensor:
        """What will be read of the weight, float32 [O, I], with the gradients of what is trained."""

    @abstractmethod
    def result(self) -> QTensor:
        """The weight as it is now."""

    @property
    def of_weights(self) -> list[nn.Parameter]:
        """What is trained of the weights."""
        return []

    @property
    def of_scales(self) -> list[nn.Parameter]:
        """What is trained of scales, zero points and minima."""
        return []

    def adapter(self) -> dict[str, Tensor]:
        """What is kept beside the weight, by the names that PEFT has for it."""
        return {}

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight(), self.bias)

    def with_outliers(self, read_OI: Tensor) -> Tensor:
        """With the weights that are kept in 16 bits."""
        if self.quantized.outliers is None:
            return read_OI
        rows, columns, values = self.quantized.outliers.rows, *self.quantized.outliers[1:]
        return read_OI.index_put((rows, columns.long()), values.float())

    def steps(self) -> Tensor:
        """How far weights must move to reach the next level, float32 [O, I]."""
        scale, zero = self._spread(self.scale), self.zero
        read_OI = self.grid.decode(self.quantized.codes, self.quantized.params).unflatten(1, (scale.shape[1], -1))
        if zero is not None and self.grid.has_minimum:
            read_OI += self._spread(zero)
        safe = torch.where(scale == 0, 1.0, scale)
        return (self.grid.gaps((read_OI / safe).contiguous()) * safe.abs()).flatten(1)

    def _spread(self, values: Tensor) -> Tensor:
        return spread_rows(values, len(self.quantized.codes))[:, :, None]

    def between(self, float_OI: Tensor, step_OI: Tensor) -> Tensor:
        """Weights in the cells of their codes, on the way from the grid to a float weight."""
        point_OI = self.grid.decode(self.quantized.codes, self.quantized.params)
        way_OI = ((float_OI - point_OI) / step_OI).clamp_(-0.5, 0.5)
        return point_OI.addcmul_(way_OI, step_OI, value=BETWEEN)


class CodedLinear(QuantizedLinear):
    """Codes are frozen; scales, zero points and minima are trained."""

    def __init__(self, weight: QTensor, grid: Grid, bias: nn.Parameter | None) -> None:
        super().__init__(weight, grid, bias)
        self.shares = nn.Parameter(torch.zeros_like(self.scale))
        self.shifts = None if self.zero is None else nn.Parameter(torch.zeros_like(self.zero))

    @property
    def of_scales(self) -> list[nn.Parameter]:
        return [self.shares] if self.shifts is None else [self.shares, self.shifts]

    def effective(self) -> GridParams:
        """Scales and zeros as they are now, before they are stored."""
        scale = self.scale * (1 + self.shares).clamp(min=SMALLEST)
        if self.zero is None or self.shifts is None:
            return GridParams(scale)
        return GridParams(scale, self.zero + SHIFT * self.shifts * (self.scale if self.grid.has_minimum else 1.0))

    def weight(self) -> Tensor:
        scale, zero, _, _ = self.effective()
        return self.with_outliers(decode_codes(self.quantized.codes, scale, zero, self.grid, self.quantized.params))

    @torch.no_grad()
    def result(self) -> QTensor:
        return replace(self.quantized, params=self.grid.stored(self.effective(), self.quantized.params))


class LatentLinear(CodedLinear):
    """Float weights behind the codes are trained, too. They begin in the cells of the codes, near `float_OI`."""

    def __init__(self, weight: QTensor, grid: Grid, bias: nn.Parameter | None, float_OI: Tensor) -> None:
        super().__init__(weight, grid, bias)
        self.step_OI = self.steps()
        self.start_OI = self.between(float_OI, self.step_OI)
        self.moved = nn.Parameter(torch.zeros_like(self.start_OI))  # in steps

    @property
    def of_weights(self) -> list[nn.Parameter]:
        return [self.moved]

    def latent(self) -> Tensor:
        return torch.addcmul(self.start_OI, self.moved, self.step_OI)

    def weight(self) -> Tensor:
        scale, zero, _, _ = self.effective()
        return self.with_outliers(fake_quantize_weight(self.latent(), scale, zero, self.grid, self.quantized.params))

    @torch.no_grad()
    def result(self) -> QTensor:
        params = self.grid.stored(self.effective(), self.quantized.params)
        return replace(self.quantized, codes=self.grid.encode(self.latent(), params), params=params)


class MergedLinear(QuantizedLinear):
    """A change of low rank, in steps of the grid, is trained and rounded together with the weight under its scales.

    The weight begins where that of `LatentLinear` does.
    """

    def __init__(self, weight: QTensor, grid: Grid, bias: nn.Parameter | None, float_OI: Tensor, rank: int) -> None:
        super().__init__(weight, grid, bias)
        self.step_OI = self.steps()
        self.start_OI = self.between(float_OI, self.step_OI)
        self.down_RI, self.up_OR = low_rank(self.start_OI, rank)

    @property
    def of_weights(self) -> list[nn.Parameter]:
        return [self.down_RI, self.up_OR]

    def latent(self) -> Tensor:
        with torch.autocast(self.start_OI.device.type, enabled=False):  # so that `result` has the same codes
            return torch.addcmul(self.start_OI, self.up_OR @ self.down_RI, self.step_OI)

    def weight(self) -> Tensor:
        like = self.quantized.params
        return self.with_outliers(fake_quantize_weight(self.latent(), self.scale, self.zero, self.grid, like))

    @torch.no_grad()
    def result(self) -> QTensor:
        return replace(self.quantized, codes=self.grid.encode(self.latent(), self.quantized.params))


class AdaptedLinear(QuantizedLinear):
    """The weight stays as it is; what is trained is a change of low rank beside it: x W^T + s x A^T B^T.

    s is the mean step of the grid, and part of the B that is kept: a learning rate means what it does for others.
    """

    def __init__(self, weight: QTensor, grid: Grid, bias: nn.Parameter | None, rank: int) -> None:
        super().__init__(weight, grid, bias)
        self.step = self.steps().mean()
        self.down_RI, self.up_OR = low_rank(weight.codes, rank)

    @property
    def of_weights(self) -> list[nn.Parameter]:
        return [self.down_RI, self.up_OR]

    def weight(self) -> Tensor:
        return self.quantized.dequantize()

    def result(self) -> QTensor:
        return self.quantized

    def adapter(self) -> dict[str, Tensor]:
        return {"lora_A.weight": self.down_RI.detach(), "lora_B.weight": self.step * self.up_OR.detach()}

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + functional.linear(functional.linear(x, self.down_RI), self.step * self.up_OR)


def low_rank(like_OI: Tensor, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """A [R, I], uniform as PEFT begins it, from a generator of its own, and B [O, R] = 0."""
    rows, inputs = like_OI.shape
    generator = torch.Generator().manual_seed(rows * inputs)
    down_RI = (2 * torch.rand(rank, inputs, generator=generator) - 1) * inputs**-0.5
    up_OR = torch.zeros(rows, rank, device=like_OI.device)
    return nn.Parameter(down_RI.to(like_OI.device)), nn.Parameter(up_OR)
