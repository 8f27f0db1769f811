"""Statistics of the inputs of linear layers: one per distinct input, as sums over tokens.

Shapes: N tokens, I input features.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qtool.errors import QtoolError
from qtool.plan import unit_of

LARGE = 6.0  # an input of this magnitude is an outlier (LLM.int8(), arXiv 2208.07339, sec. 3.1)
VECTORS, SECOND, CROSS = "vectors", "second", "cross"  # what may be asked for


@dataclass
class Channels:
    """Per channel of one input, [I] each: sums over its tokens in float64, and the largest magnitude."""

    absmax_I: Tensor  # float32
    sum_I: Tensor
    sum_abs_I: Tensor
    sum_squares_I: Tensor
    large_I: Tensor  # int64: how many tokens have a magnitude of at least LARGE

    @classmethod
    def empty(cls, inputs: int, device: torch.device) -> Channels:
        def zeros(dtype: torch.dtype) -> Tensor:
            return torch.zeros(inputs, dtype=dtype, device=device)

        double = torch.float64
        return cls(zeros(torch.float32), zeros(double), zeros(double), zeros(double), zeros(torch.int64))

    def add(self, x_NI: Tensor) -> None:
        magnitude_NI = x_NI.abs()
        torch.maximum(self.absmax_I, magnitude_NI.amax(0), out=self.absmax_I)
        self.large_I += (magnitude_NI >= LARGE).sum(0)
        self.sum_I += x_NI.sum(0, dtype=torch.float64)
        self.sum_abs_I += magnitude_NI.sum(0, dtype=torch.float64)
        self.sum_squares_I += magnitude_NI.square_().sum(0, dtype=torch.float64)


@dataclass(frozen=True)
class Vectors:
    """Per channel of one input x, float32 [I]: max |x|, E x, E |x|."""

    absmax_I: Tensor
    mean_I: Tensor
    mean_abs_I: Tensor


@dataclass(frozen=True)
class Moments:
    """Means over the tokens x of one input; x_f is what the same input is in the float model."""

    second_II: Tensor | None  # E x x^T, float32, where it was asked for
    cross_II: Tensor | None = None  # E (x_f - x) x^T, float32, likewise
    tokens: int = 0
    vectors: Vectors | None = None  # likewise
    square_I: Tensor | None = None  # E x^2, with the vectors

    @property
    def diagonal_I(self) -> Tensor:
        """E x^2 per channel, float32."""
        if self.second_II is not None:
            return self.second_II.diagonal()
        assert self.square_I is not None
        return self.square_I

    def divided(self, scale_I: Tensor) -> Moments:
        """The moments of x / scale; the matrices are divided in place."""
        for matrix in (self.second_II, self.cross_II):
            if matrix is not None:
                matrix.div_(scale_I).div_(scale_I[:, None])
        square = None if self.square_I is None else self.square_I / scale_I.square()
        vectors = self.vectors and Vectors(
            self.vectors.absmax_I / scale_I, self.vectors.mean_I / scale_I, self.vectors.mean_abs_I / scale_I
        )
        return replace(self, vectors=vectors, square_I=square)


@dataclass
class InputStats:
    """Sums over the tokens of one input."""

    tokens: int = 0
    channels: Channels | None = None
    second_II: Tensor | None = None
    cross_II: Tensor | None = None

    @classmethod
    def empty(cls, inputs: int, wanted: Collection[str], device: torch.device) -> InputStats:
        """Nothing yet; `wanted` are some of VECTORS, SECOND and CROSS."""

        def matrix(name: str) -> Tensor | None:
            return torch.zeros(inputs, inputs, device=device) if name in wanted else None

        channels = Channels.empty(inputs, device) if VECTORS in wanted else None
        return cls(0, channels, matrix(SECOND), matrix(CROSS))

    def add(self, x_NI: Tensor, float_x_NI: Tensor | None = None) -> None:
        """Tokens of the input and, for the cross moment, the same tokens in the float model."""
        if self.channels is not None:
            self.channels.add(x_NI)
        if self.second_II is not None:
            self.second_II.addmm_(x_NI.T, x_NI)
        if self.cross_II is not None:
            assert float_x_NI is not None
            self.cross_II.addmm_((float_x_NI - x_NI).T, x_NI)
        self.tokens += x_NI.shape[0]

    def moments(self, name: str) -> Moments:
        """The sums over the token count; they are divided in place, so this ends the collecting.

        Raises QtoolError naming the layer when it saw no token, or only zeros, or something not finite.
        """
        if not self.tokens:
            raise QtoolError(f"`{name}` saw no token of the calibration data", "give more varied data")
        for matrix in (self.second_II, self.cross_II):
            if matrix is not None:
                matrix /= self.tokens
        vectors = square = None
        if self.channels is not None:
            mean, mean_abs, square = (
                (total / self.tokens).float()
                for total in (self.channels.sum_I, self.channels.sum_abs_I, self.channels.sum_squares_I)
            )
            vectors = Vectors(self.channels.absmax_I, mean, mean_abs)
        moments = Moments(self.second_II, self.cross_II, self.tokens, vectors, square)
        if not torch.isfinite(moments.diagonal_I).all():
            raise QtoolError(
                f"the inputs of `{name}` are not finite on the calibration data",
                "something before it overflows: see whether `qtool eval-ppl MODEL` gives a finite loss",
            )
        if not moments.diagonal_I.any():
            raise QtoolError(
                f"the inputs of `{name}` are zero for all {self.tokens} tokens of the calibration data",
                f"give more varied data, or leave its block alone with `--ignore '{unit_of(name)}.*'`",
            )
        return moments


class _AllSeen(Exception):  # noqa: N818 (not an error)
    """Ends a run of a block once every watched input was seen."""


def inputs_of(
    run: Callable[[], Tensor], block: nn.Module, layers: Iterable[str], to_the_end: bool = False
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The inputs [N, I] of these linears of a block while `run` runs it, and what it returns.

    Unless it shall go `to_the_end`, the run ends with the last of them and returns nothing.
    """
    wanted = list(layers)
    seen: dict[str, Tensor] = {}

    def watch(layer: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[layer] = args[0].flatten(0, -2)
            if len(seen) == len(wanted) and not to_the_end:
                raise _AllSeen

        return hook

    # first of all hooks: what is seen has not been rounded yet
    handles = [block.get_submodule(x).register_forward_pre_hook(watch(x), prepend=True) for x in wanted]
    try:
        return seen, run()
    except _AllSeen:
        return seen, None
    finally:
        for handle in handles:
            handle.remove()
