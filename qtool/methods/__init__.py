"""The table of methods: which codes are chosen.

A method is a frozen dataclass whose fields are its recipe options. Its module imports torch only inside
functions, so that options are checked in a blink. `needs` says which moments of the inputs `solve` wants:
nothing (then no model is built), "second", or "cross" as well (then the float model runs alongside).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from qtool.errors import unknown
from qtool.recipe import options_of

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.calibration.stats import Moments
    from qtool.numerics.grid import Grid, QTensor

METHODS = {
    "rtn": "qtool.methods.rtn:RTN",
    "gptq": "qtool.methods.gptq:GPTQ",
    "gptaq": "qtool.methods.gptaq:GPTAQ",
    "qat": "qtool.methods.qat:QAT",
}


@dataclass(frozen=True)
class Solution:
    """A quantized weight, and what happened on the way that a person should know."""

    weight: QTensor
    notes: list[str] = field(default_factory=list)


class Method(Protocol):
    """What the pipeline asks of a method."""

    needs: ClassVar[frozenset[str]]
    finish: ClassVar[tuple[str, ...]] = ()  # how its solution is trained unless the recipe says otherwise

    def solve(self, weight_OI: Tensor, grid: Grid, moments: Moments | None) -> Solution:
        """The codes and parameters for a float32 weight, given the moments of its inputs that it needs."""
        ...


def get_method(name: str, options: Mapping[str, Any]) -> Method:
    """The method of that name with its options. Raises UsageError for unknown names, keys and types."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    module, _, cls = METHODS[name].partition(":")
    method: Method = options_of(getattr(import_module(module), cls), options, name)
    return method
