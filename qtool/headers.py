"""What a safetensors header says of a tensor. Never imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "F4": 4, "C64": 64,
}  # fmt: skip
WEIGHT_DTYPES = ("F16", "BF16", "F32")  # what a weight to be quantized may be
TORCH_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's name, `dtype` as safetensors spells it, shape, and its `file` inside the checkpoint's folder."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str = ""

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def scale_dtype(weight_dtype: str) -> str:
    """How the scales of a weight are stored: 16 bits, in the range of the weight's own type."""
    return "F16" if weight_dtype == "F16" else "BF16"


def kind_of(module: str) -> str:
    """A layer's name with the block's number taken out: `*.self_attn.q_proj`."""
    parts = module.split(".")
    last_number = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(["*", *parts[last_number + 1 :]]) if last_number >= 0 else module
