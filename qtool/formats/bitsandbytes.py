"""bitsandbytes, as transformers saves it: LLM.int8(), nf4 and nf4 with double quantization. Checked against 0.50.

A linear [out, in] becomes
- llm-int8: `weight` I8 [out, in], `SCB` F32 [out] the magnitude of 127 in each row, `weight_format` U8 [];
- nf4: `weight` U8 [out*in/2, 1], the first of two codes in the high bits, `weight.absmax` F32 [out*in/64] the scales,
  `weight.quant_map` F32 [16] the values, and `weight.quant_state.bitsandbytes__nf4` U8, which spells a JSON object;
- nf4-dq: besides, `weight.absmax` U8, codes in `weight.nested_quant_map` F32 [256], and `weight.nested_absmax` F32, the
  scale of 256 of them; their offset is in the JSON.
The length of the JSON must be known before its numbers are: it ends in spaces. Weights lie [out, in] also in models
that store them [in, out] elsewhere (GPT-2). bitsandbytes itself is not needed.
"""

from __future__ import annotations

import json
from dataclasses import replace
from math import ceil, prod
from typing import TYPE_CHECKING, Any

from qtool.errors import QtoolError, UsageError
from qtool.formats.checks import ANY_FLOAT, check_headers, check_shapes, header, read_json
from qtool.headers import TensorInfo, scale_dtype
from qtool.scheme import KINDS, NESTED_BLOCK, ActivationScheme, QuantScheme

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.checkpoint.reader import Checkpoint
    from qtool.numerics.grid import QTensor

WEIGHT, SCB, WEIGHT_FORMAT = ".weight", ".SCB", ".weight_format"
ABSMAX, QUANT_MAP = ".weight.absmax", ".weight.quant_map"
NESTED_ABSMAX, NESTED_MAP = ".weight.nested_absmax", ".weight.nested_quant_map"
STATE, FP4_STATE = ".weight.quant_state.bitsandbytes__nf4", ".weight.quant_state.bitsandbytes__fp4"
NF4_BLOCK = KINDS["nf4"].group_size or 0
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
LONGEST_FLOAT = -1.7976931348623157e308


class BitsAndBytes:
    """The format's entry in the table; see `qtool.formats.Format`."""

    name = "bitsandbytes"
    takes_transposed = True
    container = "safetensors"
    serves_fused = True
    parts: tuple[str, ...] = (WEIGHT, SCB, WEIGHT_FORMAT, ABSMAX, QUANT_MAP, NESTED_ABSMAX, NESTED_MAP, STATE)

    def problem(self, scheme: QuantScheme, shape: tuple[int, ...] | None = None) -> str | None:
        if scheme.kind not in ("nf4", "nf4-dq", "llm-int8"):
            return "bitsandbytes stores nf4, nf4-dq and llm-int8"
        if scheme.kind != "llm-int8" and scheme.activations:
            return "bitsandbytes does not round the inputs of nf4 weights"
        return None

    def layout(self, module: str, scheme: QuantScheme, shape: tuple[int, ...], scale_dtype: str) -> list[TensorInfo]:
        count = prod(shape) // NF4_BLOCK
        if scheme.kind == "llm-int8":
            parts = [(WEIGHT, "I8", shape), (SCB, "F32", shape[:1]), (WEIGHT_FORMAT, "U8", ())]
        else:
            nested = scheme.kind == "nf4-dq"
            parts = [
                (WEIGHT, "U8", (prod(shape) // 2, 1)),
                (ABSMAX, "U8" if nested else "F32", (count,)),
                (QUANT_MAP, "F32", (16,)),
                (STATE, "U8", (len(_spelled(nested, shape)),)),
            ]
            if nested:
                parts += [(NESTED_ABSMAX, "F32", (ceil(count / NESTED_BLOCK),)), (NESTED_MAP, "F32", (256,))]
        return [TensorInfo(module + part, dtype, size) for part, dtype, size in parts]

    def pack(self, module: str, weight: QTensor, dtype: str = "BF16") -> dict[str, Tensor]:
        tensors = _pack_int8(weight) if weight.scheme.kind == "llm-int8" else _pack_nf4(weight, dtype)
        return {module + part: tensor for part, tensor in tensors.items()}

    def unpack(self, module: str, tensors: dict[str, Tensor], scheme: QuantScheme) -> QTensor:
        if scheme.kind == "llm-int8":
            return _unpack_int8(module, tensors, scheme)
        return self._unpack_nf4(module, tensors, scheme)

    def config(
        self,
        schemes: dict[str, QuantScheme],
        left_alone: list[str],
        kv: ActivationScheme | None = None,
        dtype: str = "BF16",
    ) -> dict[str, Any]:
        if kv is not None:
            raise UsageError(
                "bitsandbytes has no place for how keys and values are rounded", "use `--format qtool`, or leave it out"
            )
        kinds = {scheme.kind for scheme in schemes.values()}
        eight = "llm-int8" in kinds
        if eight and len(kinds) > 1:
            raise UsageError(
                f"bitsandbytes holds either llm-int8 or nf4 in one checkpoint, not {' and '.join(sorted(kinds))}",
                "use one of them for all layers, or `--format qtool`",
            )
        thresholds = {s.activations.threshold for s in schemes.values() if s.activations}
        return {
            "quant_method": self.name,
            "_load_in_4bit": not eight,
            "_load_in_8bit": eight,
            "load_in_4bit": not eight,
            "load_in_8bit": eight,
            "bnb_4bit_compute_dtype": "float32" if eight else DTYPES[dtype],
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": "fp4" if eight else "nf4",
            "bnb_4bit_use_double_quant": "nf4-dq" in kinds,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": left_alone,
            "llm_int8_threshold": max((t for t in thresholds if t is not None), default=6.0),
        }

    def modules(self, checkpoint: Checkpoint) -> dict[str, tuple[QuantScheme, tuple[int, ...]]]:
        config = checkpoint.config["quantization_config"]
        found: dict[str, tuple[QuantScheme, tuple[int, ...]]] = {}
        for name in checkpoint.tensors:
            if name.endswith(FP4_STATE):
                raise QtoolError(f"`{name.removesuffix(FP4_STATE)}` is fp4 of bitsandbytes, which is not read")
            for part, scheme_of in ((SCB, _int8_scheme), (STATE, _nf4_scheme)):
                if name.endswith(part):
                    module = name.removesuffix(part)
                    found[module] = self.stored(checkpoint, module, scheme_of(checkpoint, module, config))
        return found

    def stored(self, checkpoint: Checkpoint, module: str, scheme: QuantScheme) -> tuple[QuantScheme, tuple[int, ...]]:
        """The scheme and the shape [out, in] of a module. Raises QtoolError when its tensors do not fit the scheme."""
        if scheme.kind == "llm-int8":
            shape = header(checkpoint, module, WEIGHT, SCB, 2).shape
        else:
            shape = _shape_of(read_json(checkpoint, header(checkpoint, module, STATE, WEIGHT, 1).name), module)
        free = (STATE, WEIGHT_FORMAT)  # any length; need not be there
        wanted = [i for i in self.layout(module, scheme, shape, ANY_FLOAT) if i.name.removeprefix(module) not in free]
        check_headers(checkpoint, scheme, shape, wanted)
        return scheme, shape

    def kv_of(self, config: dict[str, Any]) -> ActivationScheme | None:
        return None

    def scale_dtype(self, weight_dtype: str) -> str:
        return scale_dtype(weight_dtype)

    def readers(self, scheme: QuantScheme, shape: tuple[int, ...] | None = None) -> str:
        return "transformers and vLLM with bitsandbytes"

    def _unpack_nf4(self, module: str, tensors: dict[str, Tensor], scheme: QuantScheme) -> QTensor:
        import torch

        from qtool.numerics.grid import GridParams, QTensor

        state = json.loads(bytes(tensors[module + STATE].tolist()).decode())
        shape = _shape_of(state, module)
        wanted = self.layout(module, scheme, shape, ANY_FLOAT)
        check_shapes(tensors, shape, (info for info in wanted if not info.name.endswith(STATE)))
        pairs = tensors[module + WEIGHT].flatten()
        codes = torch.stack([pairs >> 4, pairs & 15], 1).reshape(shape)
        params = GridParams(tensors[module + ABSMAX].reshape(shape[0], -1))
        if scheme.kind == "nf4-dq":
            offset = torch.tensor([state["nested_offset"]], dtype=torch.float32)
            params = GridParams(params.scale, None, tensors[module + NESTED_ABSMAX], offset)
        return QTensor(codes, params, scheme)


def _int8_scheme(checkpoint: Checkpoint, module: str, config: dict[str, Any]) -> QuantScheme:
    scheme = QuantScheme.parse("llm-int8")
    assert scheme.activations
    threshold = float(config.get("llm_int8_threshold", 6.0))
    return replace(scheme, activations=replace(scheme.activations, threshold=threshold))


def _nf4_scheme(checkpoint: Checkpoint, module: str, config: dict[str, Any]) -> QuantScheme:
    return QuantScheme.parse("nf4-dq" if module + NESTED_ABSMAX in checkpoint.tensors else "nf4")


def _shape_of(state: dict[str, Any], module: str) -> tuple[int, ...]:
    """The shape in a quant_state. Raises QtoolError for one whose blocks are not the usual ones."""
    shape, blocks = state.get("shape"), (state.get("blocksize"), state.get("nested_blocksize", NESTED_BLOCK))
    if not isinstance(shape, list) or len(shape) != 2 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise QtoolError(f"`{module}{STATE}` has the impossible shape {shape}")
    if blocks != (NF4_BLOCK, NESTED_BLOCK):
        raise QtoolError(
            f"`{module}` has a scale for {blocks[0]} weights and {blocks[1]} scales: only 64 and 256 are read"
        )
    return tuple(shape)


def _spelled(
    nested: bool, shape: tuple[int, ...], dtype: str = max(DTYPES.values(), key=len), offset: float = LONGEST_FLOAT
) -> str:
    """The JSON object of a quant_state; with the defaults it is as long as it can get."""
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": NF4_BLOCK, "dtype": dtype, "shape": list(shape)}
    if nested:
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


def _pack_nf4(weight: QTensor, dtype: str) -> dict[str, Tensor]:
    import torch

    from qtool.numerics.codecs import NF4_VALUES
    from qtool.numerics.scales import dynamic_map

    params, shape, nested = weight.params, tuple(weight.codes.shape), weight.scheme.kind == "nf4-dq"
    codes = weight.codes.flatten()
    offset = 0.0 if params.super_zero is None else float(params.super_zero)
    state = _spelled(nested, shape, DTYPES[dtype], offset).ljust(len(_spelled(nested, shape)))
    tensors = {
        WEIGHT: (codes[::2] << 4 | codes[1::2])[:, None],
        ABSMAX: params.scale.flatten(),
        QUANT_MAP: torch.tensor(NF4_VALUES, dtype=torch.float32),
        STATE: torch.tensor(list(state.encode()), dtype=torch.uint8),
    }
    if params.super_scale is not None:
        tensors |= {NESTED_ABSMAX: params.super_scale, NESTED_MAP: dynamic_map().clone()}
    return tensors
