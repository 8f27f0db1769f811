"""compressed-tensors: what vLLM, SGLang and transformers load. Checked against 0.19.

A linear [out, in] becomes one of
- packed integers of b bits: `weight_packed` I32 [out, ceil(in*b/32)], `weight_shape` I64 [2] and, when asymmetric,
  `weight_zero_point`: I32 packed along the rows [ceil(out*b/32), groups], or one plain I8 per tensor;
- plain bytes, of integers under integer inputs and of fp8: `weight` [out, in] I8 or F8_E4M3, `weight_zero_point` I8;
- fp4: `weight_packed` U8 [out, in/2], the first of two codes in the low bits; nvfp4 adds `weight_global_scale` F32 [1];
each with `weight_scale` [out, groups]; [1] per tensor; [ceil(out/128), in/128] for blocks; and, where the inputs have a
fixed scale, `input_scale` [1], or `input_global_scale` F32 [1] for nvfp4. Only read: `weight_g_idx` I32 [in], which
says to which group each input belongs (actorder "group" of versions up to 0.18); without it, or where one is -1,
groups are inputs side by side. The library counts integers and zero points
from -2^(b-1); packed ones have 2^(b-1) added, and so are the unsigned codes of our grid.
"""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Any

from qtool.errors import QtoolError
from qtool.formats import Contents, Format
from qtool.formats.checks import ANY_FLOAT, check_headers, check_shapes, field, header
from qtool.formats.compressed_tensors_config import (
    PACKED_FORMAT,
    VERSION,
    activations_of,
    by_scheme,
    check_config,
    format_name,
    group_of,
    groups_in,
    inputs_entry,
    match,
)
from qtool.headers import TensorInfo
from qtool.scheme import BLOCK, ActivationScheme, QuantScheme, packed_words

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.checkpoint.reader import Checkpoint
    from qtool.numerics.grid import GridParams, QTensor

WEIGHT, PACKED, SCALE, ZERO = ".weight", ".weight_packed", ".weight_scale", ".weight_zero_point"
SHAPE, GLOBAL_SCALE, GROUP_OF = ".weight_shape", ".weight_global_scale", ".weight_g_idx"
INPUT_SCALE, INPUT_GLOBAL_SCALE = ".input_scale", ".input_global_scale"
FP4 = ("nvfp4", "mxfp4")
BYTES = {"int": "I8", "fp8-e4m3": "F8_E4M3", "mxfp8": "F8_E4M3", "fp8-e5m2": "F8_E5M2"}
SCALES = {"nvfp4": "F8_E4M3", "mxfp4": "U8", "mxfp8": "U8"}
FP8_DTYPES = {"fp8-e4m3": "float8_e4m3fn", "mxfp8": "float8_e4m3fn", "fp8-e5m2": "float8_e5m2"}


class CompressedTensors(Format):
    """The format's entry in the table; see `qtool.formats.Format`."""

    name = "compressed-tensors"
    takes_kv = True
    parts: tuple[str, ...] = (
        WEIGHT, PACKED, SCALE, ZERO, SHAPE, GROUP_OF, GLOBAL_SCALE, INPUT_SCALE, INPUT_GLOBAL_SCALE,
    )  # fmt: skip

    def problem(self, scheme: QuantScheme, shape: tuple[int, ...] | None = None) -> str | None:
        if scheme.outliers:
            return "compressed-tensors has no place for outliers"
        if scheme.kind == "fp8-e5m2" or scheme.kind not in BYTES.keys() | SCALES.keys():
            return f"{scheme.kind} is not among the types of compressed-tensors"
        return None

    def layout(self, module: str, scheme: QuantScheme, shape: tuple[int, ...], scale_dtype: str) -> list[TensorInfo]:
        return tensors_of(module, scheme, shape, scale_dtype, is_packed(scheme))

    def pack(self, module: str, weight: QTensor, dtype: str = "BF16") -> dict[str, Tensor]:
        tensors = {
            **(_pack_words(weight) if is_packed(weight.scheme) else _pack_bytes(weight)),
            SCALE: weight.params.scale.reshape(-1) if _is_whole(weight.scheme) else weight.params.scale.contiguous(),
            **pack_input(weight),
        }
        if weight.params.super_scale is not None:
            tensors[GLOBAL_SCALE] = weight.params.super_scale.reshape(1)
        return {module + part: tensor for part, tensor in tensors.items()}

    def unpack(self, module: str, tensors: dict[str, Tensor], scheme: QuantScheme) -> QTensor:
        from qtool.numerics.grid import QTensor

        packed = module + PACKED in tensors and scheme.kind not in FP4
        shape = _unpacked_shape(module, tensors, scheme, packed)
        check_shapes(tensors, shape, tensors_of(module, scheme, shape, ANY_FLOAT, packed))
        codes = _unpack_words(module, tensors, scheme, shape[1]) if packed else _unpack_bytes(module, tensors, scheme)
        params = _params(module, tensors, scheme, packed, shape[0])
        input_scale, group_of = unpack_input(module, tensors, scheme), _unpack_order(module, tensors, scheme)
        return QTensor(codes, params, scheme, input_scale=input_scale, group_of=group_of)

    def config(self, contents: Contents) -> dict[str, Any]:
        targets = by_scheme(contents.schemes)
        formats = {format_name(scheme): None for scheme in targets}
        groups = {
            f"group_{i}": group_of(scheme, ["Linear"] if len(targets) == 1 else patterns)
            for i, (scheme, patterns) in enumerate(targets.items())
        }
        return {
            "quant_method": self.name,
            "version": VERSION,
            "format": next(iter(formats), PACKED_FORMAT) if len(formats) < 2 else "mixed-precision",
            "quantization_status": "compressed",
            "ignore": contents.left_alone,
            "kv_cache_scheme": contents.kv and _kv_entry(contents.kv),
            "config_groups": groups,
        }

    def modules(self, checkpoint: Checkpoint) -> dict[str, tuple[QuantScheme, tuple[int, ...]]]:
        config = checkpoint.config["quantization_config"]
        check_config(config)
        groups = groups_in(config)
        found: dict[str, tuple[QuantScheme, tuple[int, ...]]] = {}
        for module in quantized_modules(checkpoint):
            scheme = match(module, groups)
            if scheme is None:
                raise QtoolError(f"no group of the quantization_config of {checkpoint.path} covers `{module}`")
            found[module] = (scheme, stored_shape(checkpoint, module, scheme))
        return found

    def kv_of(self, config: dict[str, Any]) -> ActivationScheme | None:
        entry = field(config["quantization_config"], "kv_cache_scheme", dict, {})
        if not entry:
            return None
        scheme = activations_of(entry, "keys and values")
        if scheme.granularity != "tensor" or scheme.bits != 8:
            raise QtoolError(f"keys and values of {scheme} are not read: only those of 8 bits with a scale per tensor")
        return scheme

    def readers(self, scheme: QuantScheme, shape: tuple[int, ...] | None = None) -> str:
        inputs = scheme.activations
        if scheme.kind == "int" and inputs is None:
            if scheme.granularity == "tensor":
                return "transformers"
            if scheme.bits in (4, 8):
                return "vLLM, SGLang, transformers"
            return "transformers (vLLM and SGLang only in versions that take these bits)"
        if scheme.kind == "int":
            plain = scheme.bits == 8 and scheme.symmetric and scheme.granularity != "group"
            if plain and inputs and inputs.kind == "int" and inputs.bits == 8:
                return "vLLM, SGLang, transformers"
            return "transformers (vLLM only where it has a kernel for such weights and inputs)"
        if scheme.kind == "nvfp4" or (scheme.kind == "fp8-e4m3" and (inputs is None or inputs.kind == "fp8-e4m3")):
            return "vLLM, SGLang, transformers"
        return "transformers, and vLLM in recent versions"


def is_packed(scheme: QuantScheme) -> bool:
    """Whether the codes are written as words of 32 bits; else each has a byte, or half of one."""
    return format_name(scheme) == PACKED_FORMAT


def tensors_of(
    module: str, scheme: QuantScheme, shape: tuple[int, ...], scale_dtype: str, packed: bool
) -> list[TensorInfo]:
    """The tensors of a module, with integers packed into words or not."""
    out, inputs = shape
    groups = scheme.groups(inputs)
    scales = {"tensor": (1,), "block": (ceil(out / BLOCK), groups)}.get(scheme.granularity, (out, groups))
    parts: list[tuple[str, str, tuple[int, ...]]] = []
    if packed:
        parts += [(PACKED, "I32", (out, packed_words(inputs, scheme.bits))), (SHAPE, "I64", (2,))]
    elif scheme.kind in FP4:
        parts.append((PACKED, "U8", (out, inputs // 2)))
    else:
        parts.append((WEIGHT, BYTES[scheme.kind], (out, inputs)))
    parts.append((SCALE, SCALES.get(scheme.kind, scale_dtype), scales))
    if not scheme.symmetric:
        words = packed and not _is_whole(scheme)
        parts.append((ZERO, "I32", (packed_words(out, scheme.bits), groups)) if words else (ZERO, "I8", scales))
    if scheme.kind == "nvfp4":
        parts.append((GLOBAL_SCALE, "F32", (1,)))
    return [*(TensorInfo(module + part, dtype, s) for part, dtype, s in parts), *inputs_of(module, scheme, scale_dtype)]


def inputs_of(module: str, scheme: QuantScheme, scale_dtype: str) -> list[TensorInfo]:
    """The fixed scale of the inputs, where there is one."""
    if scheme.activations is None or not scheme.activations.is_static:
        return []
    if scheme.activations.kind == "nvfp4":
        return [TensorInfo(module + INPUT_GLOBAL_SCALE, "F32", (1,))]
    return [TensorInfo(module + INPUT_SCALE, scale_dtype, (1,))]


def pack_input(weight: QTensor) -> dict[str, Tensor]:
    """The tensor of `inputs_of`, by part."""
    if weight.scheme.activations is None or not weight.scheme.activations.is_static:
        return {}
    assert weight.input_scale is not None, f"{weight.scheme} without a scale of its inputs"
    part = INPUT_GLOBAL_SCALE if weight.scheme.activations.kind == "nvfp4" else INPUT_SCALE
    return {part: weight.input_scale.reshape(1)}


def unpack_input(module: str, tensors: dict[str, Tensor], scheme: QuantScheme) -> Tensor | None:
    """The inverse of `pack_input`."""
    names = [info.name for info in inputs_of(module, scheme, ANY_FLOAT)]
    return tensors[names[0]].reshape(1) if names else None


def quantized_modules(checkpoint: Checkpoint) -> list[str]:
    """The modules that have a part of a quantized weight, or a weight whose type only such a one has."""
    found: dict[str, None] = {}
    for name, info in checkpoint.tensors.items():
        parts: tuple[str, ...] = (PACKED, SCALE, *([WEIGHT] if info.dtype in BYTES.values() else []))
        found |= {name.removesuffix(part): None for part in parts if name.endswith(part)}
    return list(found)


def stored_shape(checkpoint: Checkpoint, module: str, scheme: QuantScheme) -> tuple[int, int]:
    """The shape [out, in] of a module. Raises QtoolError when its tensors do not fit the scheme."""
    packed = module + PACKED in checkpoint.tensors and scheme.kind not in FP4
    codes = header(checkpoint, module, PACKED if packed or scheme.kind in FP4 else WEIGHT, SCALE, 2)
    if packed and scheme.kind != "int":
        raise QtoolError(f"`{codes.name}` in {checkpoint.path} holds integers, but is said to be {scheme}")
    out, inputs = codes.shape
    if packed and scheme.granularity == "group":
        inputs = header(checkpoint, module, SCALE, PACKED, 2).shape[1] * (scheme.group_size or 1)
    elif packed:
        inputs = _packed_inputs(checkpoint, module)
    elif scheme.kind in FP4:
        inputs *= 2
    wanted = tensors_of(module, scheme, (out, inputs), ANY_FLOAT, packed)
    if module + GROUP_OF in checkpoint.tensors:
        wanted.append(TensorInfo(module + GROUP_OF, "I32", (inputs,)))
    check_headers(checkpoint, scheme, (out, inputs), wanted)
    return out, inputs


def _packed_inputs(checkpoint: Checkpoint, module: str) -> int:
    """in_features from `weight_shape`: 16 bytes, the only values read besides headers."""
    info = header(checkpoint, module, SHAPE, PACKED, 1)
    if info.shape != (2,) or info.dtype != "I64":
        raise QtoolError(f"`{info.name}` in {checkpoint.path} is {info.dtype} {info.shape}, not I64 (2,)")
    return int(checkpoint.read_small(info.name)[1])


def _is_whole(scheme: QuantScheme) -> bool:
    return scheme.granularity == "tensor"


def _kv_entry(scheme: ActivationScheme) -> dict[str, Any]:
    entry = inputs_entry(scheme)
    return {key: entry[key] for key in ("num_bits", "type", "strategy", "symmetric", "dynamic")}


def _pack_words(weight: QTensor) -> dict[str, Tensor]:
    import torch

    from qtool.numerics.packing import pack_bits

    bits, zero = weight.scheme.bits, weight.params.zero
    tensors = {
        PACKED: pack_bits(weight.codes, bits),
        SHAPE: torch.tensor(weight.codes.shape, dtype=torch.int64),
    }
    if zero is not None and _is_whole(weight.scheme):
        tensors[ZERO] = _signed(zero, bits).reshape(1)
    elif zero is not None:
        tensors[ZERO] = _turned(pack_bits(zero.T.to(torch.uint8), bits))
    return tensors


def _unpacked_shape(module: str, tensors: dict[str, Tensor], scheme: QuantScheme, packed: bool) -> tuple[int, int]:
    if packed:
        out, inputs = (int(n) for n in tensors[module + SHAPE])
        return out, inputs
    codes = tensors[module + (PACKED if scheme.kind in FP4 else WEIGHT)]
    return len(codes), codes.shape[1] * (2 if scheme.kind in FP4 else 1)


def _unpack_words(module: str, tensors: dict[str, Tensor], scheme: QuantScheme, inputs: int) -> Tensor:
    from qtool.numerics.packing import unpack_bits

    return unpack_bits(tensors[module + PACKED], scheme.bits, inputs)


def _pack_bytes(weight: QTensor) -> dict[str, Tensor]:
    import torch

    scheme, codes, zero = weight.scheme, weight.codes, weight.params.zero
    if scheme.kind in FP4:
        return {PACKED: codes[:, ::2] | codes[:, 1::2] << 4}
    if scheme.kind != "int":
        return {WEIGHT: codes.contiguous().view(getattr(torch, FP8_DTYPES[scheme.kind]))}
    tensors = {WEIGHT: _signed(codes, scheme.bits)}
    if zero is not None:
        signed = _signed(zero, scheme.bits)
        tensors[ZERO] = signed.reshape(1) if _is_whole(scheme) else signed.contiguous()
    return tensors


def _turned(matrix: Tensor) -> Tensor:
    """The transpose, with the strides of a new tensor: `contiguous` keeps others where a side is 1."""
    import torch

    return matrix.T.clone(memory_format=torch.contiguous_format)


def _unpack_bytes(module: str, tensors: dict[str, Tensor], scheme: QuantScheme) -> Tensor:
    import torch

    if scheme.kind in FP4:
        pairs = tensors[module + PACKED]
        return torch.stack([pairs & 15, pairs >> 4], 2).flatten(1)
    weight = tensors[module + WEIGHT]
    if scheme.kind != "int":
        return weight.contiguous().view(torch.uint8)
    return (weight.short() + 2 ** (scheme.bits - 1)).to(torch.uint8)


def _unpack_order(module: str, tensors: dict[str, Tensor], scheme: QuantScheme) -> Tensor | None:
    """To which group each input belongs, or None for side by side."""
    group_of = tensors.get(module + GROUP_OF)
    if group_of is None or bool((group_of < 0).any()):
        return None
    groups = scheme.groups(len(group_of))
    if int(group_of.max()) >= groups or bool((group_of.bincount(minlength=groups) != len(group_of) // groups).any()):
        raise QtoolError(f"`{module}{GROUP_OF}` does not spread {len(group_of)} inputs evenly over {groups} groups")
    return group_of


def _signed(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes or zero points as the library counts them, int8."""
    import torch

    return (codes.short() - 2 ** (bits - 1)).to(torch.int8)


def _params(module: str, tensors: dict[str, Tensor], scheme: QuantScheme, packed: bool, out: int) -> GridParams:
    from qtool.numerics.grid import GridParams
    from qtool.numerics.packing import unpack_bits

    whole = _is_whole(scheme)
    scale, zero = tensors[module + SCALE], None
    if not scheme.symmetric:
        zero = tensors[module + ZERO]
        if packed and not whole:
            zero = _turned(unpack_bits(_turned(zero), scheme.bits, out)).float()
        else:
            zero = (zero.float() + 2 ** (scheme.bits - 1)).reshape(scale.shape)
    if whole:
        scale, zero = scale.reshape(1, 1), None if zero is None else zero.reshape(1, 1)
    divisor = tensors[module + GLOBAL_SCALE].reshape(1) if scheme.kind == "nvfp4" else None
    return GridParams(scale, zero, divisor)
