"""Any readable checkpoint, dense or packed, as float32 tensors under their dense names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from qtool.checkpoint.reader import Checkpoint
from qtool.errors import QtoolError
from qtool.formats import FORMATS, Format, get_format
from qtool.scheme import QuantScheme

if TYPE_CHECKING:
    from torch import Tensor


class Weights:
    """`shapes` and `schemes` come from headers alone; `read` unpacks and dequantizes what it is asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.format: Format | None = format_of(checkpoint)
        packed = self.format.modules(checkpoint) if self.format else {}
        self.schemes: dict[str, QuantScheme] = {module: scheme for module, (scheme, _) in packed.items()}
        self.packed_names = {
            module: [t.name for t in self.format.layout(module, scheme, shape, "BF16")]
            for module, (scheme, shape) in packed.items()
            if self.format
        }
        hidden = {name for names in self.packed_names.values() for name in names}
        self.shapes = {name: info.shape for name, info in checkpoint.tensors.items() if name not in hidden}
        self.shapes.update({f"{module}.weight": shape for module, (_, shape) in packed.items()})

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """float32 tensors by dense name. Raises QtoolError naming a tensor with NaN or infinity."""
        names = list(names)
        packed = {name: module for name in names if (module := name.removesuffix(".weight")) in self.schemes}
        result = dict(self.checkpoint.read_many((n for n in names if n not in packed), as_float32=True))
        for name, module in packed.items():
            assert self.format
            parts = dict(self.checkpoint.read_many(self.packed_names[module]))
            result[name] = self.format.unpack(module, parts, self.schemes[module]).dequantize()
        for name in names:
            check_finite(name, result[name])
        return result

    def read_rows(self, name: str, rows: Tensor) -> Tensor:
        """Some rows of a matrix in float32; of a dense one no more than these is read."""
        if name.removesuffix(".weight") in self.schemes:
            return self.read([name])[name][rows]
        for _, tensor in self.checkpoint.borrow([name]):
            chosen = tensor[rows].float()
            check_finite(name, chosen)
        return chosen


def format_of(checkpoint: Checkpoint) -> Format | None:
    """The format a checkpoint is packed in, or None for a dense one. Raises QtoolError for one that is not read."""
    config = checkpoint.config.get("quantization_config")
    if not config:
        return None
    method = config.get("quant_method") if isinstance(config, dict) else config
    if method not in FORMATS:
        raise QtoolError(f"{checkpoint.path} is quantized as `{method}`; qtool reads: {', '.join(FORMATS)}")
    return get_format(method)


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises QtoolError naming the tensor and how many of its values are NaN or infinite."""
    import torch

    if tensor.numel() and not torch.isfinite(torch.stack(tensor.aminmax())).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise QtoolError(
            f"`{name}` has {bad} NaN or infinite values of {tensor.numel()}",
            "the checkpoint is damaged: download it again, or leave the layer alone with --ignore if that is intended",
        )
