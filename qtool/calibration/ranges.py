"""What a run of a block tells besides its inputs' statistics: how large outputs and single tokens get.

Shapes: N tokens, I input features.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class Ranges:
    """By linear, relative to the block; a linear that did not run is in neither."""

    output_absmax: dict[str, Tensor] = field(default_factory=dict)  # max |y|, float32 []
    peak_squares: dict[str, Tensor] = field(default_factory=dict)  # sum over tokens of max_I x^2, float64 []


@contextmanager
def watch_ranges(block: nn.Module, linears: Iterable[str], inputs: Collection[str]) -> Iterator[Ranges]:
    """The output ranges of `linears`, and the tokens' peaks of the inputs of those that are in `inputs` too."""
    ranges = Ranges()

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            largest = _magnitude(output.flatten()).float()
            before = ranges.output_absmax.get(name)
            ranges.output_absmax[name] = largest if before is None else torch.maximum(before, largest)
            if name in inputs:
                peaks = _magnitude(args[0].flatten(0, -2)).double().square().sum()
                ranges.peak_squares[name] = peaks + ranges.peak_squares.get(name, 0)

        return hook

    handles = [block.get_submodule(name).register_forward_hook(watch(name)) for name in linears]
    try:
        yield ranges
    finally:
        for handle in handles:
            handle.remove()


def _magnitude(values: Tensor) -> Tensor:
    """max |x| over the last axis, without a copy of x."""
    smallest, largest = values.aminmax(dim=-1)
    return torch.maximum(largest, -smallest)
