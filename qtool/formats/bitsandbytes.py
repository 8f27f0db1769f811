"""bitsandbytes, as transformers saves it: LLM.int8(), nf4 and fp4, also with double quantization. Checked against 0.50.

A linear [out, in] becomes
- llm-int8: `weight` I8 [out, in], `SCB` F32 [out] the magnitude of 127 in each row, `weight_format` U8 [];
- nf4: `weight` U8 [out*in/2, 1], the first of two codes in the high bits, `weight.absmax` F32 [out*in/64] the scales,
  `weight.quant_map` F32 [16] the values, and `weight.quant_state.bitsandbytes__nf4` U8, which spells a JSON object;
- fp4: the same, with `fp4` in the name of the last and in its JSON;
- nf4-dq, fp4-dq: besides, `weight.absmax` U8, codes in `weight.nested_quant_map` F32 [256], and
  `weight.nested_absmax` F32, the scale of 256 of them; their offset is in the JSON.
The length of the JSON must be known before its numbers are: it ends in spaces. Weights lie [out, in] also in models
that store them [in, out] elsewhere (GPT-2). bitsandbytes itself is not needed.
"""

from __future__ import annotations

import json
from dataclasses import replace
from math import ceil, prod
from typing import TYPE_CHECKING, Any

from qtool.errors import QtoolError, UsageError, shown
from qtool.formats import Contents, Format
from qtool.formats.checks import ANY_FLOAT, check_headers, check_shapes, header, read_json
from qtool.headers import TORCH_NAMES, TensorInfo
from qtool.scheme import KINDS, NESTED_BLOCK, QuantScheme

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.checkpoint.reader import Checkpoint
    from qtool.numerics.grid import QTensor

WEIGHT, SCB, WEIGHT_FORMAT = ".weight", ".SCB", ".weight_format"
ABSMAX, QUANT_MAP = ".weight.absmax", ".weight.quant_map"
NESTED_ABSMAX, NESTED_MAP = ".weight.nested_absmax", ".weight.nested_quant_map"
STATES = {kind: f".weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")}
OF_FOUR_BITS = ("nf4", "nf4-dq", "fp4", "fp4-dq")
STORED = (*OF_FOUR_BITS, "llm-int8")
MARKS = (SCB, *STATES.values())  # every packed module has one of them
LONGEST_STATE = 1 << 12
LARGEST = 3.4028235e38  # of float32
BLOCK = KINDS["nf4"].group_size or 0
LONGEST_FLOAT = -1.7976931348623157e308


class BitsAndBytes(Format):
    """The format's entry in the table; see `qtool.formats.Format`."""

    name = "bitsandbytes"
    takes_transposed = True
    parts: tuple[str, ...] = (WEIGHT, WEIGHT_FORMAT, ABSMAX, QUANT_MAP, NESTED_ABSMAX, NESTED_MAP, *MARKS)

    def problem(self, scheme: QuantScheme, shape: tuple[int, ...] | None = None) -> str | None:
        if scheme.kind not in STORED:
            return f"bitsandbytes stores {', '.join(OF_FOUR_BITS)} and llm-int8"
        if scheme.kind != "llm-int8" and scheme.activations:
            return f"bitsandbytes does not round the inputs of {scheme.kind} weights"
        return None

    def layout(self, module: str, scheme: QuantScheme, shape: tuple[int, ...], scale_dtype: str) -> list[TensorInfo]:
        count = prod(shape) // BLOCK
        if scheme.kind == "llm-int8":
            parts = [(WEIGHT, "I8", shape), (SCB, "F32", shape[:1]), (WEIGHT_FORMAT, "U8", ())]
        else:
            nested = _is_nested(scheme)
            parts = [
                (WEIGHT, "U8", (prod(shape) // 2, 1)),
                (ABSMAX, "U8" if nested else "F32", (count,)),
                (QUANT_MAP, "F32", (16,)),
                (_state(scheme), "U8", (len(_spelled(scheme, shape)),)),
            ]
            if nested:
                parts += [(NESTED_ABSMAX, "F32", (ceil(count / NESTED_BLOCK),)), (NESTED_MAP, "F32", (256,))]
        return [TensorInfo(module + part, dtype, size) for part, dtype, size in parts]

    def pack(self, module: str, weight: QTensor, dtype: str = "BF16") -> dict[str, Tensor]:
        tensors = _pack_int8(weight) if weight.scheme.kind == "llm-int8" else _pack_four_bits(weight, dtype)
        return {module + part: tensor for part, tensor in tensors.items()}

    def unpack(self, module: str, tensors: dict[str, Tensor], scheme: QuantScheme) -> QTensor:
        if scheme.kind == "llm-int8":
            return _unpack_int8(module, tensors, scheme)
        return self._unpack_four_bits(module, tensors, scheme)

    def config(self, contents: Contents) -> dict[str, Any]:
        schemes = contents.schemes
        kinds = {scheme.kind.removesuffix("-dq") for scheme in schemes.values()}
        eight = "llm-int8" in kinds
        if len(kinds) > 1:
            raise UsageError(
                f"bitsandbytes holds llm-int8, nf4 or fp4 in one checkpoint, not {' and '.join(sorted(kinds))}",
                "use one of them for all layers, or `--format qtool`",
            )
        thresholds = {s.activations.threshold for s in schemes.values() if s.activations}
        return {
            "quant_method": self.name,
            "_load_in_4bit": not eight,
            "_load_in_8bit": eight,
            "load_in_4bit": not eight,
            "load_in_8bit": eight,
            "bnb_4bit_compute_dtype": "float32" if eight else TORCH_NAMES[contents.dtype],
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": "nf4" if "nf4" in kinds else "fp4",
            "bnb_4bit_use_double_quant": any(_is_nested(scheme) for scheme in schemes.values()),
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": contents.left_alone,
            "llm_int8_threshold": max((t for t in thresholds if t is not None), default=6.0),
        }

    def modules(self, checkpoint: Checkpoint) -> dict[str, tuple[QuantScheme, tuple[int, ...]]]:
        config = checkpoint.config["quantization_config"]
        found: dict[str, tuple[QuantScheme, tuple[int, ...]]] = {}
        for name in checkpoint.tensors:
            for part in MARKS:
                if name.endswith(part):
                    module = name.removesuffix(part)
                    scheme = _int8_scheme(config) if part == SCB else _four_bit_scheme(checkpoint, module, part)
                    if module in found:
                        both = f"{found[module][0]} and {scheme}"
                        raise QtoolError(f"`{module}` in {checkpoint.path} is said to be {both}")
                    found[module] = self.stored(checkpoint, module, scheme)
        return found

    def stored(self, checkpoint: Checkpoint, module: str, scheme: QuantScheme) -> tuple[QuantScheme, tuple[int, ...]]:
        """The scheme and the shape [out, in] of a module. Raises QtoolError when its tensors do not fit the scheme."""
        if scheme.kind == "llm-int8":
            shape = header(checkpoint, module, WEIGHT, SCB, 2).shape
        else:
            info = header(checkpoint, module, _state(scheme), WEIGHT, 1)
            if info.dtype != "U8" or info.size_bytes > LONGEST_STATE:
                there = f"{info.dtype}, {info.size_bytes} bytes"
                raise QtoolError(f"`{info.name}` in {checkpoint.path} is {there}, not U8 of at most {LONGEST_STATE}")
            shape, _ = _read_state(read_json(checkpoint, info.name), info.name, scheme)
        free = [module + state for state in STATES.values()]  # of any length
        if module + WEIGHT_FORMAT not in checkpoint.tensors:  # older versions leave it out
            free.append(module + WEIGHT_FORMAT)
        wanted = [info for info in self.layout(module, scheme, shape, ANY_FLOAT) if info.name not in free]
        check_headers(checkpoint, scheme, shape, wanted)
        return scheme, shape

    def readers(self, scheme: QuantScheme, shape: tuple[int, ...] | None = None) -> str:
        return "transformers and vLLM with bitsandbytes"

    def _unpack_four_bits(self, module: str, tensors: dict[str, Tensor], scheme: QuantScheme) -> QTensor:
        import torch

        from qtool.numerics.codecs import codec_of
        from qtool.numerics.grid import GridParams, QTensor
        from qtool.numerics.scales import dynamic_map

        name = module + _state(scheme)
        shape, offset = _read_state(json.loads(bytes(tensors[name].tolist()).decode()), name, scheme)
        wanted = self.layout(module, scheme, shape, ANY_FLOAT)
        check_shapes(tensors, shape, (info for info in wanted if info.name != name))
        _check_map(module + QUANT_MAP, tensors[module + QUANT_MAP], codec_of(scheme).decode(torch.arange(16).byte()))
        pairs = tensors[module + WEIGHT].flatten()
        codes = torch.stack([pairs >> 4, pairs & 15], 1).reshape(shape)
        params = GridParams(tensors[module + ABSMAX].reshape(shape[0], -1))
        if _is_nested(scheme):
            _check_map(module + NESTED_MAP, tensors[module + NESTED_MAP], dynamic_map())
            super_zero = torch.tensor([offset], dtype=torch.float32)
            params = GridParams(params.scale, None, tensors[module + NESTED_ABSMAX], super_zero)
        return QTensor(codes, params, scheme)


def _is_nested(scheme: QuantScheme) -> bool:
    return scheme.kind.endswith("-dq")


def _state(scheme: QuantScheme) -> str:
    return STATES[scheme.kind.removesuffix("-dq")]


def _int8_scheme(config: dict[str, Any]) -> QuantScheme:
    scheme = QuantScheme.parse("llm-int8")
    assert scheme.activations
    threshold = config.get("llm_int8_threshold", 6.0)
    if not isinstance(threshold, int | float) or not 0 <= threshold <= LARGEST:
        raise QtoolError(f"the quantization_config has the impossible llm_int8_threshold {shown(threshold)}")
    return replace(scheme, activations=replace(scheme.activations, threshold=float(threshold)))


def _four_bit_scheme(checkpoint: Checkpoint, module: str, part: str) -> QuantScheme:
    kind = next(kind for kind, state in STATES.items() if state == part)
    return QuantScheme.parse(f"{kind}-dq" if module + NESTED_ABSMAX in checkpoint.tensors else kind)


def _read_state(state: dict[str, Any], name: str, scheme: QuantScheme) -> tuple[tuple[int, ...], float]:
    """Shape and offset in a quant_state. Raises QtoolError for one whose blocks are not the usual ones."""
    shape, blocks = state.get("shape"), (state.get("blocksize"), state.get("nested_blocksize", NESTED_BLOCK))
    offset = state.get("nested_offset") if _is_nested(scheme) else 0.0
    if not isinstance(shape, list) or len(shape) != 2 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise QtoolError(f"`{name}` has the impossible shape {shown(shape)}")
    if blocks != (BLOCK, NESTED_BLOCK):
        raise QtoolError(
            f"`{name}` has a scale for {shown(blocks[0])} weights and {shown(blocks[1])} scales: "
            f"only {BLOCK} and {NESTED_BLOCK} are read"
        )
    if not isinstance(offset, int | float) or not abs(offset) <= LARGEST:
        raise QtoolError(f"`{name}` has the impossible offset {shown(offset)}")
    return tuple(shape), float(offset)


def _check_map(name: str, values: Tensor, expected: Tensor) -> None:
    """Raises QtoolError for a table of values that is not the one we know."""
    import torch

    if not torch.allclose(values.float(), expected, rtol=1e-3, atol=1e-6):
        raise QtoolError(f"`{name}` has other values than bitsandbytes has: codes in it are not read")


def _spelled(
    scheme: QuantScheme,
    shape: tuple[int, ...],
    dtype: str = max(TORCH_NAMES.values(), key=len),
    offset: float = LONGEST_FLOAT,
) -> str:
    """The JSON object of a quant_state; with the defaults it is as long as it can get."""
    kind = scheme.kind.removesuffix("-dq")
    state: dict[str, Any] = {"quant_type": kind, "blocksize": BLOCK, "dtype": dtype, "shape": list(shape)}
    if _is_nested(scheme):
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    return json.dumps(state)


def _pack_int8(weight: QTensor) -> dict[str, Tensor]:
    import torch

    return {
        WEIGHT: (weight.codes.short() - 128).to(torch.int8),
        SCB: weight.params.scale.flatten() * 127,
        WEIGHT_FORMAT: torch.tensor(0, dtype=torch.uint8),  # rows one after the other
    }


def _unpack_int8(module: str, tensors: dict[str, Tensor], scheme: QuantScheme) -> QTensor:
    import torch

    from qtool.numerics.grid import GridParams, QTensor

    if module + WEIGHT_FORMAT in tensors and int(tensors[module + WEIGHT_FORMAT]) != 0:
        raise QtoolError(f"`{module}{WEIGHT_FORMAT}` is {int(tensors[module + WEIGHT_FORMAT])}: only rows (0) are read")
    codes = (tensors[module + WEIGHT].short() + 128).to(torch.uint8)
    return QTensor(codes, GridParams((tensors[module + SCB] / 127)[:, None]), scheme)


def _pack_four_bits(weight: QTensor, dtype: str) -> dict[str, Tensor]:
    import torch

    from qtool.numerics.codecs import codec_of
    from qtool.numerics.scales import dynamic_map

    scheme, params, shape = weight.scheme, weight.params, tuple(weight.codes.shape)
    codes = weight.codes.flatten()
    offset = 0.0 if params.super_zero is None else float(params.super_zero)
    state = _spelled(scheme, shape, TORCH_NAMES[dtype], offset).ljust(len(_spelled(scheme, shape)))
    tensors = {
        WEIGHT: (codes[::2] << 4 | codes[1::2])[:, None],
        ABSMAX: params.scale.flatten(),
        QUANT_MAP: codec_of(scheme).decode(torch.arange(16, dtype=torch.uint8)),
        _state(scheme): torch.tensor(list(state.encode()), dtype=torch.uint8),
    }
    if params.super_scale is not None:
        tensors |= {NESTED_ABSMAX: params.super_scale, NESTED_MAP: dynamic_map().clone()}
    return tensors
