"""What a format says that is read and not written, because another one does the same for its readers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qtool.errors import UsageError
from qtool.formats import Contents, Format
from qtool.scheme import QuantScheme

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.numerics.grid import QTensor


class ReadOnly(Format):
    """A format without `pack` and `config`: the plan asks for its `problem` first."""

    def problem(self, scheme: QuantScheme, shape: tuple[int, ...] | None = None) -> str:
        return f"{self.name} checkpoints are only read"

    def pack(self, module: str, weight: QTensor, dtype: str = "BF16") -> dict[str, Tensor]:
        raise UsageError(self.problem(weight.scheme))

    def config(self, contents: Contents) -> dict[str, Any] | None:
        raise UsageError(f"{self.name} checkpoints are only read")
