"""AWQ in its GEMM layout: what vLLM, SGLang and transformers with gptqmodel load. Checked against gptqmodel 7.7.

A linear [out, in] of 4 bits becomes `qweight` I32 [in, out/8], `qzeros` I32 [groups, out/8] and `scales` F16
[groups, out]. Eight outputs share a word, low bits first in the order 0 2 4 6 1 3 5 7. w = scale * (code - zero).
Symmetric weights have the zero 8; they are written like the others, because vLLM has no fast kernel for those that
are said to have no zero points.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qtool.errors import QtoolError, UsageError, shown
from qtool.formats import Contents, Format
from qtool.formats.checks import ANY_FLOAT, check_headers, check_shapes, header
from qtool.formats.columns import (
    QWEIGHT,
    QZEROS,
    SCALES,
    check_order,
    dynamic_rules,
    group_size,
    in_block,
    params_layout,
    read_modules,
    scheme_problem,
    stated_scheme,
    stored_params,
    turned,
    zero_points,
)
from qtool.headers import TensorInfo
from qtool.scheme import QuantScheme

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.checkpoint.reader import Checkpoint
    from qtool.numerics.grid import QTensor

BITS, PER_WORD = 4, 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GROUP_SIZES = (16, 32, 64, 128)  # of gptqmodel
KERNEL_GROUP_SIZES, KERNEL_OUT = (32, 64, 128), 64  # of vLLM and SGLang


class AWQ(Format):
    """The format's entry in the table; see `qtool.formats.Format`."""

    name = "awq"
    quant_method = "awq"
    parts: tuple[str, ...] = (QWEIGHT, QZEROS, SCALES)

    def problem(self, scheme: QuantScheme, shape: tuple[int, ...] | None = None) -> str | None:
        if problem := scheme_problem(scheme, "AWQ", (BITS,), GROUP_SIZES):
            return problem
        if scheme.granularity == "channel":
            return "not all readers of AWQ know a scale for a whole row"
        if shape and shape[0] % PER_WORD:
            return f"{shape[0]} outputs are not a multiple of {PER_WORD}, which share a word"
        return None

    def scale_dtype(self, weight_dtype: str) -> str:
        return "F16"

    def layout(self, module: str, scheme: QuantScheme, shape: tuple[int, ...], dtype: str) -> list[TensorInfo]:
        words = TensorInfo(module + QWEIGHT, "I32", (shape[1], shape[0] // PER_WORD))
        return [words, *params_layout(module, scheme, shape, dtype)]

    def pack(self, module: str, weight: QTensor, dtype: str = "BF16") -> dict[str, Tensor]:
        import torch

        check_order(module, weight)
        assert weight.params.scale.dtype == torch.float16, f"{module} has scales in {weight.params.scale.dtype}"
        return {
            module + QWEIGHT: _words(turned(weight.codes)),
            module + QZEROS: _words(turned(zero_points(weight))),
            module + SCALES: turned(weight.params.scale),
        }

    def unpack(self, module: str, tensors: dict[str, Tensor], scheme: QuantScheme) -> QTensor:
        from qtool.numerics.grid import QTensor

        inputs, words = tensors[module + QWEIGHT].shape
        shape = words * PER_WORD, inputs
        check_shapes(tensors, shape, self.layout(module, scheme, shape, ANY_FLOAT))
        codes = turned(_fields(tensors[module + QWEIGHT]))
        params = stored_params(module, tensors[module + SCALES], _fields(tensors[module + QZEROS]), scheme)
        return QTensor(codes, params, scheme)

    def config(self, contents: Contents) -> dict[str, Any]:
        schemes, left_alone = contents.schemes, contents.left_alone
        sizes = sorted({group_size(scheme) for scheme in schemes.values()})
        if len(sizes) > 1:
            raise UsageError(
                f"AWQ has one group size for a whole checkpoint, not {' and '.join(map(str, sizes))}",
                "use one of them for all layers, or `--format gptq`",
            )
        for left in left_alone:
            caught = next((module for module in schemes if left in module), None)
            if caught:
                raise UsageError(
                    f"AWQ cannot leave `{left}` alone: its readers would take `{caught}` for it, too",
                    "use `--format gptq`, or leave both alone",
                )
        entry: dict[str, Any] = {
            "quant_method": self.quant_method,
            "version": "gemm",
            "bits": BITS,
            "group_size": sizes[0],
            "zero_point": True,
            "lm_head": not all(in_block(module) for module in schemes),
            "modules_to_not_convert": left_alone,
        }
        one = next(iter(schemes.values()))
        if dynamic := dynamic_rules(dict.fromkeys(schemes, one), [m for m in left_alone if in_block(m)], one):
            entry["dynamic"] = dynamic  # gptqmodel looks here for what is left alone
        return entry

    def modules(self, checkpoint: Checkpoint) -> dict[str, tuple[QuantScheme, tuple[int, ...]]]:
        config = checkpoint.config["quantization_config"]
        said = [config[key] for key in ("version", "checkpoint_format", "format") if config.get(key)]
        layout = "llm-awq" if config.get("backend") == "llm-awq" else shown([*said, "gemm"][0]).lower()
        if layout != "gemm":
            raise QtoolError(f"{checkpoint.path} is AWQ in the layout `{layout}`, which is not read: only `gemm` is")

        def stored(module: str, said: dict[str, Any]) -> tuple[QuantScheme, tuple[int, int]]:
            zeros = said.get("zero_point", True)
            scheme = stated_scheme(checkpoint, said, (BITS,), not zeros if isinstance(zeros, bool) else zeros)
            inputs, words = header(checkpoint, module, QWEIGHT, QZEROS, 2).shape
            if not inputs or not words:
                raise QtoolError(f"`{module}{QWEIGHT}` in {checkpoint.path} has the impossible shape {(inputs, words)}")
            shape = words * PER_WORD, inputs
            check_headers(checkpoint, scheme, shape, self.layout(module, scheme, shape, ANY_FLOAT))
            return scheme, shape

        return read_modules(checkpoint, stored)

    def readers(self, scheme: QuantScheme, shape: tuple[int, ...] | None = None) -> str:
        if scheme.group_size in KERNEL_GROUP_SIZES and (shape is None or shape[0] % KERNEL_OUT == 0):
            return "vLLM, SGLang, transformers (with gptqmodel)"
        return "transformers (with gptqmodel)"


def _words(codes_RO: Tensor) -> Tensor:
    """uint8 codes [R, O] -> int32 words [R, O / 8]."""
    from qtool.numerics.packing import pack_bits

    return pack_bits(codes_RO.unflatten(1, (-1, PER_WORD))[:, :, list(ORDER)].flatten(1), BITS)


def _fields(words_RW: Tensor) -> Tensor:
    """The inverse of `_words`."""
    from qtool.numerics.packing import unpack_bits

    codes = unpack_bits(words_RW, BITS, words_RW.shape[1] * PER_WORD)
    places = [ORDER.index(i) for i in range(PER_WORD)]
    return codes.unflatten(1, (-1, PER_WORD))[:, :, places].flatten(1)
