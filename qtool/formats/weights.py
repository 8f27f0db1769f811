"""Any readable checkpoint, dense or packed, as float32 tensors under their dense names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

from qtool.checkpoint.reader import Checkpoint
from qtool.errors import QtoolError, shown
from qtool.formats import FORMATS, READ_ONLY, Format, reader_of
from qtool.headers import TORCH_NAMES, TensorInfo
from qtool.models.architectures import ARCHITECTURES
from qtool.scheme import ActivationScheme, QuantScheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qtool.numerics.grid import QTensor

INPUT_SCALES = (".input_scale", ".activation_scale", ".input_global_scale")


class Source(Protocol):
    """Where float32 tensors come from, by dense name: a checkpoint, or one that a transform has changed.

    `changed` are tensors that differ from the checkpoint's, `added` those that it does not have, and
    `config_changes` what config.json must say of it.
    """

    format: Format | None
    shapes: dict[str, tuple[int, ...]]
    changed: set[str]
    added: list[TensorInfo]
    config_changes: dict[str, Any]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]: ...

    def read_rows(self, name: str, rows: Tensor) -> Tensor: ...

    def read_stored(self, name: str) -> Tensor:
        """A changed or added tensor in the type in which it is stored."""
        ...

    def roundings(self, unit: str) -> Mapping[str, tuple[ActivationScheme, Tensor | None]]:
        """How the inputs of linears of a unit are rounded, and their fixed scales; names are relative to the unit."""
        ...

    def kv_scales(self, unit: str) -> tuple[ActivationScheme, Tensor, Tensor] | None:
        """How the unit's keys and values are stored, with the scale of each, or None for as they are."""
        ...


class Weights:
    """`shapes` and `schemes` come from headers alone; `read` unpacks and dequantizes what it is asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.format: Format | None = format_of(checkpoint)
        self.changed: set[str] = set()
        self.added: list[TensorInfo] = []
        self.config_changes: dict[str, Any] = {}
        architecture = ARCHITECTURES.get(str(checkpoint.config.get("model_type")))
        self.is_transposed = architecture.is_block_linear if architecture and architecture.transposed else _never
        packed = self.format.modules(checkpoint) if self.format else {}
        self.schemes: dict[str, QuantScheme] = {module: scheme for module, (scheme, _) in packed.items()}
        self.kv = self.format.kv_of(checkpoint.config) if self.format else None
        parts = self.format.parts if self.format else ()
        self.packed_names = {
            module: [module + part for part in parts if module + part in checkpoint.tensors] for module in packed
        }
        hidden = {name for names in self.packed_names.values() for name in names}
        if self.kv:
            hidden |= {name for name in checkpoint.tensors if name.endswith((".k_scale", ".v_scale"))}
        self.shapes = {name: info.shape for name, info in checkpoint.tensors.items() if name not in hidden}
        self.kv_tensors = {name: checkpoint.tensors[name] for name in hidden if name.endswith((".k_scale", ".v_scale"))}
        self.dense = {name: checkpoint.tensors[name] for name in self.shapes}
        for module, (_, shape) in packed.items():
            name = _dense_name(module, shape)
            self.shapes[name] = shape[::-1] if self.is_transposed(module) else shape
            self.dense[name] = TensorInfo(name, self._dense_dtype(module), self.shapes[name])
        self.experts = {module for module in packed if module in self.shapes}
        self.write_out(self.experts)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """float32 tensors by dense name. Raises QtoolError naming a tensor with NaN or infinity."""
        import torch

        names = list(names)
        packed = {name: module for name in names if (module := name.removesuffix(".weight")) in self.schemes}
        result = dict(self.checkpoint.read_many((n for n in names if n not in packed), as_float32=True))
        for name, module in packed.items():
            if module in self.experts:
                result[name] = _experts(self.read_packed(module), self.shapes[name], torch.float32)
                continue
            weight_OI = self.read_packed(module).dequantize()
            result[name] = weight_OI.T.contiguous() if self.is_transposed(module) else weight_OI
        for name in names:
            check_finite(name, result[name])
        return result

    def read_packed(self, module: str) -> QTensor:
        """A quantized weight as it is."""
        assert self.format
        parts = dict(self.checkpoint.read_many(self.packed_names[module]))
        return self.format.unpack(module, parts, self.schemes[module])

    def matrix_shape(self, module: str) -> tuple[int, ...]:
        """The shape [out, in] of a quantized weight; of experts, which lie one below the other."""
        if module in self.shapes:
            experts, inputs, out = self.shapes[module]
            return experts * out, inputs
        shape = self.shapes[f"{module}.weight"]
        return shape[::-1] if self.is_transposed(module) else shape

    def read_rows(self, name: str, rows: Tensor) -> Tensor:
        """Some rows of a matrix in float32; of a dense one no more than these is read."""
        module = name.removesuffix(".weight")
        if module in self.schemes:
            assert self.format
            if not self.format.by_rows:
                return self.read([name])[name][rows]
            parts = {name: tensor[rows] for name, tensor in self.checkpoint.borrow([name])}
            chosen = self.format.unpack(module, parts, self.schemes[module]).dequantize()
            check_finite(name, chosen)
            return chosen
        for _, tensor in self.checkpoint.borrow([name]):
            chosen = tensor[rows].float()
            check_finite(name, chosen)
        return chosen

    def read_stored(self, name: str) -> Tensor:
        import torch

        if name not in self.changed:
            return self.checkpoint.read(name)
        dtype = getattr(torch, TORCH_NAMES[self.dense[name].dtype])
        if name in self.experts:
            return _experts(self.read_packed(name), self.shapes[name], dtype)
        return self.read([name])[name].to(dtype)

    def write_out(self, names: Iterable[str]) -> None:
        """From now on these quantized tensors count as dense ones that the checkpoint does not have so."""
        self.changed.update(names)

    def _dense_dtype(self, module: str) -> str:
        """The type of a weight that was quantized, or that of its scales where these say more than bfloat16 does."""
        parts = [self.checkpoint.tensors[name] for name in self.packed_names[module]]
        assert self.format
        if self.format.scale_dtype("BF16") == "F16" or any(part.dtype == "F16" for part in parts):
            return "F16"
        config = self.checkpoint.config
        said = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
        return next((name for name, torch_name in TORCH_NAMES.items() if torch_name == said), "BF16")

    def roundings(self, unit: str) -> Mapping[str, tuple[ActivationScheme, Tensor | None]]:
        found: dict[str, tuple[ActivationScheme, Tensor | None]] = {}
        for module, scheme in self.schemes.items():
            if scheme.activations and f"{module}.".startswith(unit + "."):
                names = [n for n in self.packed_names[module] if n.endswith(INPUT_SCALES)]
                if scheme.activations.is_static and not names:
                    raise QtoolError(f"`{module}` in {self.checkpoint.path} has no fixed scale for its input")
                scale = self.checkpoint.read(names[0]).float() if names else None
                found[module.removeprefix(unit).removeprefix(".")] = (scheme.activations, scale)
        return found

    def kv_scales(self, unit: str) -> tuple[ActivationScheme, Tensor, Tensor] | None:
        if self.kv is None:
            return None
        names = [name for name in self.checkpoint.tensors if name.startswith(unit + ".") and name.endswith(".k_scale")]
        if not names:
            raise QtoolError(
                f"{self.checkpoint.path} says that its keys and values are rounded, but `{unit}` has no k_scale"
            )
        keys, values = (names[0].removesuffix("k_scale") + part for part in ("k_scale", "v_scale"))
        for name in (keys, values):
            if name not in self.checkpoint.tensors or prod(self.checkpoint.tensors[name].shape) != 1:
                raise QtoolError(f"`{name}` in {self.checkpoint.path} is not one number, the scale of keys or values")
        return self.kv, self.checkpoint.read(keys).float(), self.checkpoint.read(values).float()


def _dense_name(module: str, shape: tuple[int, ...]) -> str:
    """A linear's weight, or the tensor that holds all experts of a layer."""
    return f"{module}.weight" if len(shape) == 2 else module


def _experts(weight: QTensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The experts [E, I, O] of a weight [E * O, I], dequantized one at a time."""
    import torch

    experts_EIO = torch.empty(shape, dtype=dtype)
    for expert_IO, part in zip(experts_EIO, weight.split([shape[2]] * shape[0]), strict=True):
        expert_IO.copy_(part.dequantize().T)
    return experts_EIO


def _never(module: str) -> bool:
    return False


def format_of(checkpoint: Checkpoint) -> Format | None:
    """The format a checkpoint is packed in, or None for a dense one. Raises QtoolError for one that is not read."""
    config = checkpoint.config.get("quantization_config")
    if not config:
        return None
    method = config.get("quant_method") if isinstance(config, dict) else config
    found = reader_of(str(method))
    if found is None:
        known = ", ".join(name for name in [*FORMATS, *READ_ONLY] if reader_of(name))
        raise QtoolError(f"{checkpoint.path} is quantized as `{shown(method)}`; qtool reads: {known}")
    if not isinstance(config, dict):
        raise QtoolError(f"the quantization_config of {checkpoint.path} is `{shown(config)}`, not an object")
    return found.version_of(config)


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises QtoolError naming the tensor and how many of its values are NaN or infinite."""
    import torch

    if tensor.numel() and not torch.isfinite(torch.stack(tensor.aminmax())).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise QtoolError(
            f"`{name}` has {bad} NaN or infinite values of {tensor.numel()}",
            "the checkpoint is damaged: download it again, or leave the layer alone with --ignore if that is intended",
        )
