"""GGUF: what llama.cpp loads. A linear is one tensor of blocks, in which codes and scales lie together.

Here a weight [out, in] is U8 [out, bytes of a row], or a plain tensor of a float type, under its Hugging Face name;
the names of the file, and the order of its rows, are the container's business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qtool.errors import QtoolError
from qtool.formats import Format
from qtool.headers import TensorInfo
from qtool.scheme import BLOCK_TYPES, FLOATS, MXFP4_BLOCK, BlockType, QuantScheme

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.checkpoint.reader import Checkpoint
    from qtool.numerics.grid import QTensor

MXFP4 = "mxfp4"  # what files call the scheme mxfp4a16
READERS = "llama.cpp, Ollama, LM Studio"


class GGUF(Format):
    """The format's entry in the table; see `qtool.formats.Format`."""

    name = "gguf"
    parts: tuple[str, ...] = (".weight",)
    container = "gguf"
    takes_embeddings = True
    by_rows = True
    serves_fused = False

    def problem(self, scheme: QuantScheme, shape: tuple[int, ...] | None = None) -> str | None:
        if scheme.activations or scheme.kind not in {*BLOCK_TYPES, *FLOATS, MXFP4}:
            return f"{scheme} is not a type of GGUF files; those are {', '.join(BLOCK_TYPES)}, {', '.join(FLOATS)}"
        return None

    def scale_dtype(self, weight_dtype: str) -> str:
        return "F16"

    def layout(self, module: str, scheme: QuantScheme, shape: tuple[int, ...], dtype: str) -> list[TensorInfo]:
        if scheme.kind in FLOATS:
            return [TensorInfo(f"{module}.weight", scheme.kind.upper(), shape)]
        block = block_of(scheme)
        return [TensorInfo(f"{module}.weight", "U8", (shape[0], shape[1] // block.weights * block.size_bytes))]

    def pack(self, module: str, weight: QTensor, dtype: str = "BF16") -> dict[str, Tensor]:
        from qtool.formats.gguf_blocks import pack_blocks

        return {f"{module}.weight": weight.codes if weight.scheme.kind in FLOATS else pack_blocks(weight)}

    def unpack(self, module: str, tensors: dict[str, Tensor], scheme: QuantScheme) -> QTensor:
        from qtool.formats.gguf_blocks import unpack_blocks
        from qtool.numerics.grid import float_tensor

        stored = tensors[f"{module}.weight"]
        return float_tensor(stored) if scheme.kind in FLOATS else unpack_blocks(stored, scheme)

    def modules(self, checkpoint: Checkpoint) -> dict[str, tuple[QuantScheme, tuple[int, ...]]]:
        from qtool.gguf.checkpoint import GGUFCheckpoint

        if not isinstance(checkpoint, GGUFCheckpoint):
            raise QtoolError(f"{checkpoint.path} has safetensors, but its config.json says `quant_method`: gguf")
        found: dict[str, tuple[QuantScheme, tuple[int, ...]]] = {}
        for name, kind in checkpoint.kinds.items():
            matrix = len(checkpoint.tensors[name].shape) == 2  # experts are not
            if matrix and (kind in BLOCK_TYPES or kind == MXFP4):
                scheme = QuantScheme.parse("mxfp4a16" if kind == MXFP4 else kind)
                rows, row_bytes = checkpoint.tensors[name].shape
                block = block_of(scheme)
                found[name.removesuffix(".weight")] = scheme, (rows, row_bytes // block.size_bytes * block.weights)
        return found

    def readers(self, scheme: QuantScheme, shape: tuple[int, ...] | None = None) -> str:
        return READERS


def block_of(scheme: QuantScheme) -> BlockType:
    """How weights of a scheme of GGUF's lie."""
    return MXFP4_BLOCK if scheme.kind == MXFP4 else BLOCK_TYPES[scheme.kind]
