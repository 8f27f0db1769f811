"""mxfp4, as gpt-oss has it; only read. Checked against transformers 5.17.

A weight is `<name>_blocks` U8, two codes in a byte, the first in the low bits, 16 bytes for 32 inputs, and
`<name>_scales` U8, the exponent of each 32, 127 added. They are
- of a linear: `weight_blocks` [out, in/32, 16] and `weight_scales` [out, in/32];
- of all experts of a layer: `gate_up_proj_blocks` [experts, out, in/32, 16] and `gate_up_proj_scales`, which stand for
  one tensor `gate_up_proj` [experts, in, out]: that is how models have it in memory. The module is then that tensor
  itself, and its QTensor has the experts one below the other, [experts * out, in].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qtool.errors import QtoolError
from qtool.formats.checks import check_headers, check_shapes, header
from qtool.formats.read_only import ReadOnly
from qtool.headers import TensorInfo
from qtool.scheme import KINDS, QuantScheme

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.checkpoint.reader import Checkpoint
    from qtool.numerics.grid import QTensor

LINEAR = ".weight"
BLOCKS, SCALES = "_blocks", "_scales"
SCHEME = QuantScheme.parse("mxfp4a16")
GROUP = KINDS["mxfp4"].group_size or 0


class MXFP4(ReadOnly):
    """The format's entry in the table; see `qtool.formats.Format`."""

    name = "mxfp4"
    parts: tuple[str, ...] = (LINEAR + BLOCKS, LINEAR + SCALES, BLOCKS, SCALES)

    def layout(self, module: str, scheme: QuantScheme, shape: tuple[int, ...], dtype: str) -> list[TensorInfo]:
        *rows, inputs = shape if len(shape) == 2 else (shape[0], shape[2], shape[1])
        name = module + LINEAR if len(shape) == 2 else module
        groups = (*rows, inputs // GROUP)
        return [TensorInfo(name + BLOCKS, "U8", (*groups, GROUP // 2)), TensorInfo(name + SCALES, "U8", groups)]

    def unpack(self, module: str, tensors: dict[str, Tensor], scheme: QuantScheme) -> QTensor:
        import torch

        from qtool.numerics.grid import GridParams, QTensor

        linear = module + LINEAR + BLOCKS in tensors
        name = module + LINEAR if linear else module
        pairs = tensors[name + BLOCKS]
        shape = _shape_of(tuple(pairs.shape), linear)
        check_shapes(tensors, shape, self.layout(module, scheme, shape, ""))
        codes = torch.stack([pairs & 15, pairs >> 4], -1).flatten(-3).flatten(0, -2)
        return QTensor(codes, GridParams(tensors[name + SCALES].flatten(0, -2)), scheme)

    def modules(self, checkpoint: Checkpoint) -> dict[str, tuple[QuantScheme, tuple[int, ...]]]:
        found: dict[str, tuple[QuantScheme, tuple[int, ...]]] = {}
        names = (n.removesuffix(part) for n in checkpoint.tensors for part in (BLOCKS, SCALES) if n.endswith(part))
        for name in dict.fromkeys(names):
            linear = name.endswith(LINEAR)
            module = name.removesuffix(LINEAR)
            pairs = header(checkpoint, name, BLOCKS, SCALES, 3 if linear else 4)
            if 0 in pairs.shape:
                raise QtoolError(f"`{pairs.name}` in {checkpoint.path} has the impossible shape {pairs.shape}")
            shape = _shape_of(pairs.shape, linear)
            rows, inputs = shape if linear else (shape[0] * shape[2], shape[1])
            check_headers(checkpoint, SCHEME, (rows, inputs), self.layout(module, SCHEME, shape, ""))
            found[module] = (SCHEME, shape)
        return found

    def readers(self, scheme: QuantScheme, shape: tuple[int, ...] | None = None) -> str:
        return "vLLM, SGLang, transformers"


def _shape_of(blocks: tuple[int, ...], linear: bool) -> tuple[int, ...]:
    """The shape of a weight: [out, in] of a linear, [experts, in, out] of experts."""
    *experts, out, groups, _ = blocks
    return (out, groups * GROUP) if linear else (*experts, groups * GROUP, out)
