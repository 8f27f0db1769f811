"""fp8: DeepSeek-V3 and its followers by blocks, AutoFP8 per tensor; only read. Checked against transformers 5.17.

A linear [out, in] is `weight` F8_E4M3 and its scales, which multiply the weights in spite of their name:
- by blocks of 128 x 128: `weight_scale_inv` [ceil(out/128), in/128], F32 or BF16, or F8_E8M0 for powers of two; inputs
  are rounded in groups of 128 as they come;
- per tensor, where `weight_block_size` is null: `weight_scale` or `weight_scale_inv`, one number. Inputs have one in
  `input_scale` or `activation_scale` where the `activation_scheme` is static; else a scale comes with each token, which
  is what vLLM and transformers do on GPUs that multiply fp8.
What is not to be converted is stored in 16 bits, so its type tells. vLLM joins q, k and v of checkpoints per tensor
under the largest of their scales, and so rounds some of them again: we read what is stored.
"""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Any

from qtool.errors import QtoolError, shown
from qtool.formats.checks import ANY_FLOAT, check_headers, check_shapes, header
from qtool.formats.read_only import ReadOnly
from qtool.headers import TensorInfo
from qtool.scheme import BLOCK, QuantScheme

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.checkpoint.reader import Checkpoint
    from qtool.numerics.grid import QTensor

WEIGHT = ".weight"
SCALES = (".weight_scale_inv", ".weight_scale")
INPUT_SCALES = (".input_scale", ".activation_scale")
POWERS = "F8_E8M0"


class FP8(ReadOnly):
    """The format's entry in the table; see `qtool.formats.Format`."""

    name = "fp8"
    parts: tuple[str, ...] = (WEIGHT, *SCALES, *INPUT_SCALES)

    def layout(self, module: str, scheme: QuantScheme, shape: tuple[int, ...], dtype: str) -> list[TensorInfo]:
        return _tensors_of(module, scheme, shape, dtype, SCALES[0], INPUT_SCALES[0])

    def unpack(self, module: str, tensors: dict[str, Tensor], scheme: QuantScheme) -> QTensor:
        import torch

        from qtool.numerics.grid import GridParams, QTensor

        weight, shape = tensors[module + WEIGHT], tuple(tensors[module + WEIGHT].shape)
        scale_part, input_part = (_present(tensors, module, parts) for parts in (SCALES, INPUT_SCALES))
        check_shapes(tensors, shape, _tensors_of(module, scheme, shape, ANY_FLOAT, scale_part, input_part))
        scale = tensors[module + scale_part]
        if scale.dtype == torch.float8_e8m0fnu:
            scale = scale.float()
        if scheme.granularity == "tensor":
            scale = scale.reshape(1, 1)
        static = scheme.activations is not None and scheme.activations.is_static
        input_scale = tensors[module + input_part].reshape(1) if static else None
        return QTensor(weight.contiguous().view(torch.uint8), GridParams(scale), scheme, input_scale=input_scale)

    def modules(self, checkpoint: Checkpoint) -> dict[str, tuple[QuantScheme, tuple[int, ...]]]:
        config = checkpoint.config["quantization_config"]
        found: dict[str, tuple[QuantScheme, tuple[int, ...]]] = {}
        for module in dict.fromkeys(_module_of(checkpoint, name) for name in _packed_names(checkpoint)):
            weight = header(checkpoint, module, WEIGHT, SCALES[0], 2)
            scale_part, input_part = (_present(checkpoint.tensors, module, parts) for parts in (SCALES, INPUT_SCALES))
            scale = checkpoint.tensors.get(module + scale_part)
            scheme = _scheme_of(config, by_blocks=scale is not None and len(scale.shape) == 2)
            dtype = POWERS if scale is not None and scale.dtype == POWERS else ANY_FLOAT
            wanted = _tensors_of(module, scheme, weight.shape, dtype, scale_part, input_part)
            check_headers(checkpoint, scheme, weight.shape, wanted)
            found[module] = (scheme, weight.shape)
        return found

    def readers(self, scheme: QuantScheme, shape: tuple[int, ...] | None = None) -> str:
        return "vLLM, SGLang, transformers"


def _tensors_of(
    module: str, scheme: QuantScheme, shape: tuple[int, ...], dtype: str, scale_part: str, input_part: str
) -> list[TensorInfo]:
    blocks = (ceil(shape[0] / BLOCK), scheme.groups(shape[1])) if scheme.granularity == "block" else (1,)
    found = [TensorInfo(module + WEIGHT, "F8_E4M3", shape), TensorInfo(module + scale_part, dtype, blocks)]
    if scheme.activations and scheme.activations.is_static:
        found.append(TensorInfo(module + input_part, ANY_FLOAT, (1,)))
    return found


def _present(tensors: Any, module: str, parts: tuple[str, ...]) -> str:
    """Which of these spellings a module has; the first where it has none."""
    return next((part for part in parts if module + part in tensors), parts[0])


def _packed_names(checkpoint: Checkpoint) -> list[str]:
    tensors = checkpoint.tensors.values()
    return [info.name for info in tensors if info.dtype.startswith("F8") or info.name.endswith(SCALES)]


def _module_of(checkpoint: Checkpoint, name: str) -> str:
    for part in (WEIGHT, *SCALES):
        if name.endswith(part):
            return name.removesuffix(part)
    info = checkpoint.tensors[name]
    raise QtoolError(
        f"`{name}` in {checkpoint.path} is {info.dtype} {info.shape}: fp8 is read only of a linear's weight, [out, in]"
    )


def _scheme_of(config: dict[str, Any], by_blocks: bool) -> QuantScheme:
    """The scheme of a linear; `by_blocks` where its scales are a matrix."""
    inputs, size = config.get("activation_scheme", "dynamic"), config.get("weight_block_size")
    if size not in (None, [BLOCK, BLOCK]):
        raise QtoolError(f"fp8 in blocks of {shown(size)} is not read: only of [{BLOCK}, {BLOCK}]")
    if size is not None or by_blocks:
        if inputs != "dynamic":
            raise QtoolError(f"fp8 by blocks is read with the activation_scheme dynamic, not {shown(inputs)}")
        return QuantScheme.parse(f"fp8-e4m3-block+fp8-e4m3-g{BLOCK}")
    if inputs not in ("dynamic", "static"):
        raise QtoolError(f"fp8 per tensor is read with the activation_scheme dynamic or static, not {shown(inputs)}")
    return QuantScheme.parse(f"fp8-e4m3-tensor+fp8-e4m3-{'token' if inputs == 'dynamic' else 'tensor'}")
