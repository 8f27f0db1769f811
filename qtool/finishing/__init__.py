"""The table of finishes: how what a method has rounded is trained afterwards, through the very grid that is packed.

A finish is a frozen dataclass whose fields are its recipe options. Its module imports torch only inside functions.
"block" trains the linears of a block while it is at hand; the others train all of them together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from qtool.errors import UsageError, unknown
from qtool.recipe import options_of
from qtool.training.objective import Objective
from qtool.training.options import HELD_OUT_SHARE, Training

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qtool.finishing.linear import QuantizedLinear
    from qtool.numerics.grid import Grid, QTensor

FINISHES = {
    "block": "qtool.finishing.block:Block",
    "scales": "qtool.finishing.scales:Scales",
    "full": "qtool.finishing.full:Full",
    "lora": "qtool.finishing.lora:LoRA",
}
ADAPTER = "adapter"  # the folder in OUT of what `lora` keeps beside the weights
ROWS = 512  # of text, unless the recipe says how many
BLOCK = "block"  # which comes first: its float block and the rows are there only while the block is rounded


@dataclass(frozen=True)
class EndToEnd(Objective, Training, ABC):
    """A finish that trains all linears together, by default towards the float model's distribution of every token."""

    norms: bool = True  # the weights of norms are trained as well

    def __post_init__(self) -> None:
        Objective.__post_init__(self)
        Training.__post_init__(self)
        if self.has_states:
            raise UsageError(
                "a finish learns from the float model's distributions, of which it has no hidden states or attention",
                "leave `hidden` and `attention` at 0; `qtool distill` compares them",
            )

    @property
    def scales_rate(self) -> float:
        """The learning rate of scales and norms, as a multiple of `lr`."""
        return 1.0

    @abstractmethod
    def linear(
        self, weight: QTensor, grid: Grid, bias: nn.Parameter | None, float_weight: Callable[[], Tensor]
    ) -> QuantizedLinear:
        """A linear with what this finish trains of it; `float_weight` is the weight [O, I] before it was rounded."""


def get_finish(name: str, options: Mapping[str, Any]) -> Training:
    """The finish of that name with its options. Raises UsageError for unknown names, keys and types."""
    if name not in FINISHES:
        raise unknown("finish", name, FINISHES)
    module, _, cls = FINISHES[name].partition(":")
    finish: Training = options_of(getattr(import_module(module), cls), options, name)
    return finish


def held_out_of(count: int, wanted: int | None) -> tuple[list[int], list[int]]:
    """Which of `count` rows are held out, evenly spaced, a sixteenth unless said, and which are trained on.

    Of a single row none is held out.
    """
    wanted = max(1, count // HELD_OUT_SHARE) if wanted is None else wanted
    wanted = min(wanted, count - 1)
    held_out = [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]
    return held_out, sorted(set(range(count)) - set(held_out))
