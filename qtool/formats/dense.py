"""dense: weights rounded, and then written out in the type they had, for programs that read nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qtool.formats import Format
from qtool.headers import TORCH_NAMES, TensorInfo
from qtool.scheme import QuantScheme

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.checkpoint.reader import Checkpoint
    from qtool.numerics.grid import QTensor


class Dense(Format):
    """The format's entry in the table; see `qtool.formats.Format`."""

    name = "dense"
    parts: tuple[str, ...] = (".weight",)
    takes_embeddings = True
    by_rows = True
    serves_fused = False

    def problem(self, scheme: QuantScheme, shape: tuple[int, ...] | None = None) -> str | None:
        return None

    def scale_dtype(self, weight_dtype: str) -> str:
        return weight_dtype

    def layout(self, module: str, scheme: QuantScheme, shape: tuple[int, ...], dtype: str) -> list[TensorInfo]:
        return [TensorInfo(f"{module}.weight", dtype, shape)]

    def held(self, weight: QTensor, dtype: str) -> QTensor:
        import torch

        from qtool.numerics.grid import float_tensor

        return float_tensor(weight.dequantize().to(getattr(torch, TORCH_NAMES[dtype])))

    def pack(self, module: str, weight: QTensor, dtype: str = "BF16") -> dict[str, Tensor]:
        return {f"{module}.weight": weight.codes}

    def unpack(self, module: str, tensors: dict[str, Tensor], scheme: QuantScheme) -> QTensor:
        from qtool.numerics.grid import float_tensor

        return float_tensor(tensors[f"{module}.weight"])

    def modules(self, checkpoint: Checkpoint) -> dict[str, tuple[QuantScheme, tuple[int, ...]]]:
        return {}

    def readers(self, scheme: QuantScheme, shape: tuple[int, ...] | None = None) -> str:
        return "everything that reads safetensors"
