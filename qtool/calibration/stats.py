"""Statistics of the inputs of linear layers: one per distinct input, as sums over tokens.

Shapes: N tokens, I input features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qtool.errors import QtoolError


@dataclass(frozen=True)
class Moments:
    """Means over the tokens x of one input; x_f is what the same input is in the float model."""

    second_II: Tensor  # x x^T, float32
    cross_II: Tensor | None = None  # (x_f - x) x^T, float32, where it was asked for
    tokens: int = 0


@dataclass
class InputStats:
    """Sums over the tokens of one input."""

    second_II: Tensor
    cross_II: Tensor | None
    tokens: int = 0

    @classmethod
    def empty(cls, inputs: int, cross: bool, device: torch.device) -> InputStats:
        zeros = torch.zeros(inputs, inputs, device=device)
        return cls(zeros, torch.zeros_like(zeros) if cross else None)

    def add(self, x_NI: Tensor, float_x_NI: Tensor | None = None) -> None:
        """Tokens of the input and, for the cross moment, the same tokens in the float model."""
        self.second_II.addmm_(x_NI.T, x_NI)
        if self.cross_II is not None:
            assert float_x_NI is not None
            self.cross_II.addmm_((float_x_NI - x_NI).T, x_NI)
        self.tokens += x_NI.shape[0]

    def moments(self, name: str) -> Moments:
        """The sums over the token count; they are divided in place, so this ends the collecting.

        Raises QtoolError naming the layer when it saw no token or something not finite.
        """
        if not self.tokens:
            raise QtoolError(f"`{name}` saw no token of the calibration data", "give more varied data")
        self.second_II /= self.tokens
        if self.cross_II is not None:
            self.cross_II /= self.tokens
        if not torch.isfinite(self.second_II.diagonal()).all():
            raise QtoolError(f"the inputs of `{name}` are not finite on the calibration data")
        return Moments(self.second_II, self.cross_II, self.tokens)


class _AllSeen(Exception):  # noqa: N818 (not an error)
    """Ends a run of a block once every watched input was seen."""


def inputs_of(run: Callable[[], Tensor], block: nn.Module, layers: Iterable[str]) -> dict[str, Tensor]:
    """The inputs [N, I] of these linears of a block while `run` runs it; the run ends with the last of them."""
    wanted = list(layers)
    seen: dict[str, Tensor] = {}

    def watch(layer: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[layer] = args[0].flatten(0, -2)
            if len(seen) == len(wanted):
                raise _AllSeen

        return hook

    handles = [block.get_submodule(layer).register_forward_pre_hook(watch(layer)) for layer in wanted]
    try:
        run()
    except _AllSeen:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen
