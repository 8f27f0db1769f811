"""How scales are stored, and what a stored scale means.

A store rounds a float32 scale to one that can be stored (`stored`), and turns such scales into the tensors of
the file (`pack`). Two-level stores are made for a weight at hand, whose largest scale decides the second level.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from qtool.numerics.minifloat import encode_e8m0
from qtool.scheme import NESTED_BLOCK

E4M3_MAX, E4M3_TINY = 448.0, 2.0**-9
E2M1_MAX = 6.0


class ScaleStore(Protocol):
    """A way to store scales."""

    def stored(self, scale: Tensor) -> Tensor:
        """The nearest scales that can be stored, float32; never 0."""
        ...

    def pack(self, scale: Tensor) -> Tensor:
        """Such scales as they are stored."""
        ...


@dataclass(frozen=True)
class FloatStore:
    """One number of a float type."""

    dtype: torch.dtype

    def stored(self, scale: Tensor) -> Tensor:
        return self.pack(scale).float()

    def pack(self, scale: Tensor) -> Tensor:
        info = torch.finfo(self.dtype)
        # the smallest value that is not 0 and has a finite inverse in float32
        tiny = max(info.tiny * info.eps, torch.finfo(torch.float32).tiny)
        scale = torch.where(scale == 0, 1.0, scale)  # of a group of zeros
        return torch.copysign(scale.abs().clamp(tiny, info.max), scale).to(self.dtype)


class AbsmaxStore(FloatStore):
    """llm-int8: a file holds 127 times the scale, the largest magnitude of the row."""

    def __init__(self) -> None:
        super().__init__(torch.float32)

    def pack(self, scale: Tensor) -> Tensor:
        return super().pack(scale) * 127 / 127


class PowerOfTwoStore:
    """e8m0: an exponent in a byte (OCP microscaling formats, 2310.10537)."""

    def stored(self, scale: Tensor) -> Tensor:
        exponent = scale.log2().round_().clamp_(-126, 127)  # of a group of zeros: the smallest
        return torch.exp2(exponent)

    def pack(self, scale: Tensor) -> Tensor:
        return encode_e8m0(scale)


@dataclass(frozen=True)
class E4M3Store:
    """nvfp4: an e4m3 number for each group, over one float32 `divisor` [1] for the tensor."""

    divisor: Tensor

    def stored(self, scale: Tensor) -> Tensor:
        return self.pack(scale).float() / self.divisor

    def pack(self, scale: Tensor) -> Tensor:
        return (scale * self.divisor).clamp(E4M3_TINY, E4M3_MAX).to(torch.float8_e4m3fn)


def nvfp4_divisors(absmax: Tensor) -> list[Tensor]:
    """Divisors [1] under which the largest group scale of a tensor becomes 448, as its readers compute it, or 256.

    Under 256 the same group can also take 1.5 times its scale, and so lie on 4 instead of 6.
    """
    absmax = absmax.float().reshape(1).clamp(min=torch.finfo(torch.float32).tiny * 1e6)
    return [top * E2M1_MAX / absmax for top in (E4M3_MAX, 256.0)]


@cache
def dynamic_map() -> Tensor:
    """The 256 values, rising, of the 8-bit type in which nf4-dq stores absolute maxima, float32.

    Seven decades, each with twice as many values as the one below: the means of neighbouring points of a
    linear grid of the decade, with either sign; and 0 and 1 (8-bit optimizers, arXiv 2110.02861; bitsandbytes 0.50).
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2.0 * 10.0 ** (i - 6)
        values += [sign * v for v in means.tolist() for sign in (1, -1)]
    return torch.tensor(sorted(values), dtype=torch.float32)


def nest(absmax: Tensor, under: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Absolute maxima of nf4 -> codes in `dynamic_map` uint8, scales [ceil(n / 256)], offset [1] (QLoRA, sec. 3).

    Scales and offset are chosen, or those given.
    """
    flat = absmax.reshape(-1).float()
    offset = under[1] if under else flat.mean().reshape(1)
    blocks = torch.nn.functional.pad(flat - offset, (0, -len(flat) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    scale = under[0] if under else blocks.abs().amax(1)
    table = dynamic_map().to(flat.device)
    relative = (blocks / torch.where(scale == 0, 1.0, scale)[:, None]).contiguous()
    codes = torch.bucketize(relative, (table[1:] + table[:-1]) / 2).to(torch.uint8)
    return codes.flatten()[: len(flat)].reshape(absmax.shape), scale, offset


def unnest(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """The absolute maxima that `nest` stored, float32, in the shape of `codes`."""
    values = dynamic_map().to(codes.device)[codes.reshape(-1).int()]
    return (values * scale.repeat_interleave(NESTED_BLOCK)[: len(values)] + offset).reshape(codes.shape)
