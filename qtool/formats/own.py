"""The format "qtool": every scheme, for this program to read.

A linear has the tensors of compressed-tensors, or of bitsandbytes for its types, each with `.qtool` before its own
name: vLLM refuses the format, and transformers 5.17, which goes on with a warning, finds no weight to mistake.
Further there are
- fp8-e5m2: `weight` F8_E5M2 and `weight_scale`, as for e4m3;
- outliers: `outlier_row_ends` I32 [out + 1], `outlier_columns` U16 [n], I32 where a row has more than 65536 inputs,
  and `outlier_values` [n] in the type of the scales. Those of row r stand at row_ends[r] .. row_ends[r + 1].
config.json says which modules have which scheme, and how keys and values are rounded.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qtool.errors import QtoolError, shown
from qtool.formats import Contents, Format
from qtool.formats.bitsandbytes import MARKS, BitsAndBytes
from qtool.formats.bitsandbytes import STORED as OF_BITSANDBYTES
from qtool.formats.checks import ANY_FLOAT, check_headers, check_shapes, field, names_in
from qtool.formats.compressed_tensors import (
    CompressedTensors,
    inputs_of,
    pack_input,
    quantized_modules,
    stored_shape,
    unpack_input,
)
from qtool.formats.compressed_tensors_config import by_scheme, match
from qtool.headers import TensorInfo
from qtool.scheme import BLOCK_TYPES, FLOATS, ActivationScheme, QuantScheme

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.checkpoint.reader import Checkpoint
    from qtool.numerics.grid import QTensor

VERSION = 1
OURS = ".qtool"
ROW_ENDS, COLUMNS, VALUES = ".outlier_row_ends", ".outlier_columns", ".outlier_values"
INTEGERS, BLOCKWISE = CompressedTensors(), BitsAndBytes()


class Own(Format):
    """The format's entry in the table; see `qtool.formats.Format`."""

    name = "qtool"
    takes_transposed = True
    takes_embeddings = True
    takes_kv = True
    parts: tuple[str, ...] = tuple(
        OURS + part
        for part in dict.fromkeys((*CompressedTensors.parts, *BitsAndBytes.parts, ROW_ENDS, COLUMNS, VALUES))
    )

    def problem(self, scheme: QuantScheme, shape: tuple[int, ...] | None = None) -> str | None:
        if scheme.kind in BLOCK_TYPES | FLOATS:
            return f"{scheme.kind} is a type of GGUF files"
        return None

    def layout(self, module: str, scheme: QuantScheme, shape: tuple[int, ...], scale_dtype: str) -> list[TensorInfo]:
        if scheme.kind in OF_BITSANDBYTES:
            return [
                *BLOCKWISE.layout(module + OURS, scheme, shape, scale_dtype),
                *inputs_of(module + OURS, scheme, scale_dtype),
            ]
        return [
            *INTEGERS.layout(module + OURS, scheme, shape, scale_dtype),
            *_outliers_of(module + OURS, scheme, shape, scale_dtype),
        ]

    def pack(self, module: str, weight: QTensor, dtype: str = "BF16") -> dict[str, Tensor]:
        import torch

        module += OURS
        if weight.scheme.kind in OF_BITSANDBYTES:
            inputs = {module + part: tensor for part, tensor in pack_input(weight).items()}
            return BLOCKWISE.pack(module, weight, dtype) | inputs
        tensors = INTEGERS.pack(module, weight, dtype)
        if weight.outliers is not None:
            index = torch.uint16 if _fits_16_bits(weight.codes.shape[1]) else torch.int32
            tensors[module + ROW_ENDS] = weight.outliers.row_ends
            tensors[module + COLUMNS] = weight.outliers.columns.to(index)
            tensors[module + VALUES] = weight.outliers.values
        return tensors

    def unpack(self, module: str, tensors: dict[str, Tensor], scheme: QuantScheme) -> QTensor:
        import torch

        from qtool.numerics.grid import Outliers

        module += OURS
        if scheme.kind in OF_BITSANDBYTES:
            weight = BLOCKWISE.unpack(module, tensors, scheme)
            return replace(weight, input_scale=unpack_input(module, tensors, scheme))
        weight = INTEGERS.unpack(module, tensors, scheme)
        if not scheme.outliers:
            return weight
        shape = tuple(weight.codes.shape)
        check_shapes(tensors, shape, _outliers_of(module, scheme, shape, ANY_FLOAT))
        ends, columns, values = (tensors[module + part] for part in (ROW_ENDS, COLUMNS, VALUES))
        columns = columns.to(torch.int32)
        in_order = ends[0] == 0 and ends[-1] == len(columns) and bool((ends.diff() >= 0).all())
        if not in_order or bool((columns < 0).any() | (columns >= shape[1]).any()):
            raise QtoolError(f"`{module}` has outliers outside of its {shape[0]} rows of {shape[1]} weights")
        return replace(weight, outliers=Outliers(ends, columns, values))

    def config(self, contents: Contents) -> dict[str, Any]:
        return {
            "quant_method": self.name,
            "version": VERSION,
            "schemes": {str(scheme): targets for scheme, targets in by_scheme(contents.schemes).items()},
            "ignore": contents.left_alone,
            "kv": contents.kv and str(contents.kv),
        }

    def modules(self, checkpoint: Checkpoint) -> dict[str, tuple[QuantScheme, tuple[int, ...]]]:
        config = checkpoint.config["quantization_config"]
        if config.get("version") != VERSION:
            said = shown(config.get("version"))
            raise QtoolError(
                f"{checkpoint.path} is version {said} of this format; version {VERSION} is read",
                "use a newer qtool",
            )
        schemes = field(config, "schemes", dict, {})
        groups = [(names_in(schemes, text), QuantScheme.parse(text)) for text in schemes]
        ours = [n.removesuffix(part) for n in checkpoint.tensors for part in MARKS if n.endswith(part)]
        found: dict[str, tuple[QuantScheme, tuple[int, ...]]] = {}
        for inner in dict.fromkeys([*quantized_modules(checkpoint), *ours]):
            module = inner.removesuffix(OURS)
            scheme = match(module, groups)
            if scheme is None or module == inner:
                raise QtoolError(f"no scheme in the quantization_config of {checkpoint.path} covers `{module}`")
            if scheme.kind in OF_BITSANDBYTES:
                _, shape = BLOCKWISE.stored(checkpoint, inner, scheme)
                further = inputs_of(inner, scheme, ANY_FLOAT)
            else:
                shape = stored_shape(checkpoint, inner, scheme)
                further = _outliers_of(inner, scheme, shape, ANY_FLOAT)
            check_headers(checkpoint, scheme, shape, further)
            found[module] = (scheme, shape)
        return found

    def kv_of(self, config: dict[str, Any]) -> ActivationScheme | None:
        text = field(config["quantization_config"], "kv", str, "")
        return ActivationScheme.parse(text, "of keys and values") if text else None

    def readers(self, scheme: QuantScheme, shape: tuple[int, ...] | None = None) -> str:
        return "qtool alone"


def _outliers_of(module: str, scheme: QuantScheme, shape: tuple[int, ...], scale_dtype: str) -> list[TensorInfo]:
    if not scheme.outliers:
        return []
    count = scheme.outlier_count(shape)
    return [
        TensorInfo(module + ROW_ENDS, "I32", (shape[0] + 1,)),
        TensorInfo(module + COLUMNS, "U16" if _fits_16_bits(shape[1]) else "I32", (count,)),
        TensorInfo(module + VALUES, scale_dtype, (count,)),
    ]


def _fits_16_bits(inputs: int) -> bool:
    return inputs <= 2**16
