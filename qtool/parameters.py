"""The float32 tensors of one unit by checkpoint name: read when they are asked for, or those of a loaded block.

They are written to in place. `changed` are tensors that stay unquantized but are not what the source has any more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

from qtool.models.blockwise import Source
from qtool.plan import Unit

if TYPE_CHECKING:
    from torch import Tensor

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class Parameters:
    """`transposed`: the linears of this model store their weight [in, out]. `as_stored` is what the output makes of a
    value of a tensor that stays unquantized; without it that is rounded to the type that it has in the source."""

    def __init__(
        self,
        unit: Unit,
        source: Source,
        device: torch.device,
        transposed: bool,
        loaded: Mapping[str, Tensor],
        as_stored: Callable[[str, Tensor], Tensor] | None = None,
    ) -> None:
        self.unit, self.source, self.device, self.transposed = unit, source, device, transposed
        self.tensors = dict(loaded)
        self.as_stored = as_stored or self._in_its_type
        self.changed: set[str] = set()
        self._dtypes = {kept.source.name: kept.source.dtype for kept in unit.kept}
        self._quantized = {linear.module for linear in unit.linears}

    def full(self, name: str) -> str:
        """The checkpoint's name of what is called so inside the unit."""
        return f"{self.unit.name}.{name}"

    def __contains__(self, name: str) -> bool:
        return name in self.source.shapes

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            self.tensors[name] = self.source.read([name])[name].to(self.device)
        return self.tensors[name]

    def weight(self, module: str) -> Tensor:
        """The weight of a linear, [out, in] however it is stored."""
        weight = self[f"{module}.weight"]
        return weight.T if self.transposed else weight

    def is_matrix(self, module: str) -> bool:
        return len(self.source.shapes[f"{module}.weight"]) == 2

    def is_quantized(self, module: str) -> bool:
        return module in self._quantized

    def stacked(self, modules: list[str]) -> Tensor:
        """The weights of linears along their rows, [O, I]; from now on each one's weight is its part of that."""
        if len(modules) == 1:
            return self.weight(modules[0])
        assert not self.transposed
        stacked_OI = torch.cat([self.weight(module) for module in modules])
        for module, part in zip(modules, stacked_OI.split([len(self.weight(m)) for m in modules]), strict=True):
            self[f"{module}.weight"].data = part
        return stacked_OI

    def drop(self, module: str) -> None:
        """The weight is not needed any more."""
        self.tensors.pop(f"{module}.weight", None)

    def change(self, name: str, value: Tensor) -> None:
        """A new value for a tensor that stays unquantized."""
        self[name].copy_(value)
        self.changed.add(name)

    def _in_its_type(self, name: str, value: Tensor) -> Tensor:
        return value.to(TORCH_DTYPES[self._dtypes[name]]).float()
