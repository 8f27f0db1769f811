"""The table of formats: how codes lie on disk.

A format is a class with `layout` (the tensors of a linear, from its shape alone), `pack` and its exact
inverse `unpack`, `config` (the entry in config.json) and its inverse `schemes`, and `readers` (who loads it).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from qtool.errors import unknown
from qtool.headers import TensorInfo
from qtool.scheme import QuantScheme

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.checkpoint.reader import Checkpoint
    from qtool.numerics.grid import QTensor

FORMATS = {
    "compressed-tensors": "qtool.formats.compressed_tensors:CompressedTensors",
}


class Format(Protocol):
    """What the pipeline and the readers ask of a format."""

    def layout(self, module: str, scheme: QuantScheme, shape: tuple[int, ...], scale_dtype: str) -> list[TensorInfo]:
        """The tensors that stand for the weight of `module`, [out, in]."""
        ...

    def pack(self, module: str, weight: QTensor) -> dict[str, Tensor]:
        """Those tensors."""
        ...

    def unpack(self, module: str, tensors: dict[str, Tensor], scheme: QuantScheme) -> QTensor:
        """The inverse of `pack`: `tensors` holds at least those of `layout`."""
        ...

    def config(self, schemes: dict[str, QuantScheme], left_alone: list[str]) -> dict[str, Any]:
        """config.json's `quantization_config` for modules and their schemes; `left_alone` are unquantized modules."""
        ...

    def modules(self, checkpoint: Checkpoint) -> dict[str, tuple[QuantScheme, tuple[int, ...]]]:
        """Scheme and shape [out, in] of each quantized module of a checkpoint in this format."""
        ...

    def readers(self, scheme: QuantScheme) -> str:
        """Which programs load a linear of this scheme."""
        ...


def get_format(name: str) -> Format:
    """The format of that name. Raises UsageError for one that is in no table."""
    if name not in FORMATS:
        raise unknown("format", name, FORMATS)
    module, _, cls = FORMATS[name].partition(":")
    return getattr(import_module(module), cls)()
