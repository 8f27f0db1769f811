"""GPTQ, versions 1 and 2: what vLLM, SGLang and transformers with gptqmodel load. Checked against gptqmodel 7.7.

A linear [out, in] of b bits becomes `qweight` I32 [in*b/32, out], each column a dense stream of its codes, low bits
first (3 bits cross words); `qzeros` I32 [groups, out*b/32], each row such a stream; `scales` F16 [groups, out]; and
`g_idx` I32 [in], the group of each input. w = scale * (code - zero); symmetric weights have the zero 2^(b-1).

Version 1 stores zeros less one. gptqmodel reads them by adding one to every field of a word at once, others field by
field: the same, unless a field is full. So a zero of 0 is never written: as s (q - 0) = -s ((m - q) - m) with m =
2^b - 1, such a group is stored upside down, under a negative scale, and is turned back when read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qtool.errors import QtoolError, shown
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
    settings,
    stated_scheme,
    stored_params,
    turned,
    zero_points,
)
from qtool.headers import TensorInfo, kind_of
from qtool.scheme import QuantScheme, packed_words

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.checkpoint.reader import Checkpoint
    from qtool.numerics.grid import QTensor

G_IDX = ".g_idx"
BITS = (2, 3, 4, 8)
GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)  # of gptqmodel
PER_WORD = {2: 16, 3: 32, 4: 8, 8: 4}  # codes that fill whole words
MARLIN_BITS, MARLIN_GROUP_SIZES = (4, 8), (-1, 32, 64, 128)
MARLIN_OUT, MARLIN_IN = 64, 128  # the kernel of vLLM and SGLang works on multiples
ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # one in every field of a word
FILE = "quantize_config.json"


class GPTQ(Format):
    """The entry of version 1 in the table; see `qtool.formats.Format`."""

    name = "gptq"
    quant_method = "gptq"
    checkpoint_format = "gptq"
    parts: tuple[str, ...] = (QWEIGHT, QZEROS, SCALES, G_IDX)
    zero_offset = 1  # what zeros are stored less by

    def problem(self, scheme: QuantScheme, shape: tuple[int, ...] | None = None) -> str | None:
        problem = scheme_problem(scheme, "GPTQ", BITS, GROUP_SIZES)
        if problem or shape is None:
            return problem
        count = PER_WORD[scheme.bits]
        odd = [f"{n} {side}" for n, side in zip(shape, ("outputs", "inputs"), strict=True) if n % count]
        return f"{' and '.join(odd)} are not a multiple of {count}, which share a word" if odd else None

    def scale_dtype(self, weight_dtype: str) -> str:
        return "F16"

    def layout(self, module: str, scheme: QuantScheme, shape: tuple[int, ...], dtype: str) -> list[TensorInfo]:
        out, inputs = shape
        return [
            TensorInfo(module + QWEIGHT, "I32", (packed_words(inputs, scheme.bits), out)),
            *params_layout(module, scheme, shape, dtype),
            TensorInfo(module + G_IDX, "I32", (inputs,)),
        ]

    def held(self, weight: QTensor, dtype: str) -> QTensor:
        return _upright(weight)

    def pack(self, module: str, weight: QTensor, dtype: str = "BF16") -> dict[str, Tensor]:
        import torch

        from qtool.numerics.packing import pack_bits

        check_order(module, weight)
        if self.zero_offset and weight.params.zero is not None:
            weight = _turned_over(weight, weight.params.zero == 0)
        bits, scale = weight.scheme.bits, weight.params.scale
        assert scale.dtype == torch.float16, f"{module} has scales in {scale.dtype}"
        inputs, groups = weight.codes.shape[1], scale.shape[1]
        return {
            module + QWEIGHT: turned(pack_bits(weight.codes, bits)),
            module + QZEROS: pack_bits(turned(zero_points(weight) - self.zero_offset), bits),
            module + SCALES: turned(scale),
            module + G_IDX: torch.arange(groups, dtype=torch.int32).repeat_interleave(inputs // groups),
        }

    def unpack(self, module: str, tensors: dict[str, Tensor], scheme: QuantScheme) -> QTensor:
        from qtool.numerics.grid import QTensor
        from qtool.numerics.packing import unpack_bits

        rows, out = tensors[module + QWEIGHT].shape
        shape = out, rows * 32 // scheme.bits
        check_shapes(tensors, shape, _present(self.layout(module, scheme, shape, ANY_FLOAT), tensors))
        codes = unpack_bits(turned(tensors[module + QWEIGHT]), scheme.bits, shape[1])
        zero_GO = _unpacked_zeros(tensors[module + QZEROS], scheme.bits, out, self.zero_offset)
        params = stored_params(module, tensors[module + SCALES], zero_GO, scheme)
        group_of = _group_of(module, tensors.get(module + G_IDX), params.scale.shape[1])
        return self.held(QTensor(codes, params, scheme, group_of=group_of), dtype="F16")

    def config(self, contents: Contents) -> dict[str, Any]:
        schemes = contents.schemes
        base = Counter(schemes.values()).most_common(1)[0][0]
        left = [module for module in contents.left_alone if in_block(module)]
        entry: dict[str, Any] = {
            "quant_method": self.quant_method,
            "checkpoint_format": self.checkpoint_format,
            **settings(base),
            "desc_act": False,
            "lm_head": not all(in_block(module) for module in schemes),
            "pack_dtype": "int32",
        }
        if dynamic := dynamic_rules(schemes, left, base):
            entry["dynamic"] = dynamic
        if left:  # transformers and vLLM look here for what is quantized, gptqmodel in `dynamic`
            entry["modules_in_block_to_quantize"] = [_endings([m for m in schemes if in_block(m)], left)]
        return entry

    def files(self, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
        return {FILE: config}

    def version_of(self, config: dict[str, Any]) -> Format:
        """The version that a checkpoint with this entry is in. Raises QtoolError for other layouts of that name."""
        said = shown(config.get("checkpoint_format") or config.get("format") or "gptq")
        version = next((v for v in (GPTQ(), GPTQv2()) if v.checkpoint_format == said), None)
        if version is None or config.get("is_marlin_format") or config.get("pack_dtype", "int32") != "int32":
            layout = "marlin" if config.get("is_marlin_format") else said
            packed = shown(config.get("pack_dtype", "int32"))
            raise QtoolError(
                f"a GPTQ checkpoint in the layout `{layout}`, packed into {packed}, is not read",
                "gptq and gptq_v2, packed into int32, are: make it again as one of them",
            )
        return version

    def modules(self, checkpoint: Checkpoint) -> dict[str, tuple[QuantScheme, tuple[int, ...]]]:
        def stored(module: str, said: dict[str, Any]) -> tuple[QuantScheme, tuple[int, int]]:
            scheme = stated_scheme(checkpoint, said, BITS, said.get("sym", False))
            rows, out = header(checkpoint, module, QWEIGHT, QZEROS, 2).shape
            shape = out, rows * 32 // scheme.bits
            if not out or not rows or rows * 32 % scheme.bits:
                raise QtoolError(f"`{module}{QWEIGHT}` in {checkpoint.path} has the impossible shape {(rows, out)}")
            wanted = _present(self.layout(module, scheme, shape, ANY_FLOAT), checkpoint.tensors)
            check_headers(checkpoint, scheme, shape, wanted)
            return scheme, shape

        return read_modules(checkpoint, stored)

    def readers(self, scheme: QuantScheme, shape: tuple[int, ...] | None = None) -> str:
        fits = shape is None or (shape[0] % MARLIN_OUT == 0 and shape[1] % MARLIN_IN == 0)
        if scheme.bits in MARLIN_BITS and scheme.symmetric and group_size(scheme) in MARLIN_GROUP_SIZES and fits:
            return "vLLM, SGLang, transformers (with gptqmodel and optimum)"
        if self.zero_offset and not scheme.symmetric:
            return "transformers (with gptqmodel and optimum; gptqmodel alone wants gptq-v2)"
        return "transformers (with gptqmodel and optimum)"


class GPTQv2(GPTQ):
    """The entry of version 2, which stores zeros as they are."""

    name = "gptq-v2"
    checkpoint_format = "gptq_v2"
    zero_offset = 0

    def held(self, weight: QTensor, dtype: str) -> QTensor:
        return weight


def _endings(modules: list[str], left: list[str]) -> list[str]:
    """What the names of quantized modules end in, such as `mlp.up_proj`, or where that names others, too, the names."""
    endings = list(dict.fromkeys(kind_of(module).removeprefix("*.") for module in modules))
    return modules if any(ending in module for module in left for ending in endings) else endings


def _present(wanted: list[TensorInfo], names: Iterable[str]) -> list[TensorInfo]:
    """What there must be: without `g_idx`, inputs belong to groups in their order."""
    return [info for info in wanted if not info.name.endswith(G_IDX) or info.name in names]


def _unpacked_zeros(words: Tensor, bits: int, count: int, offset: int) -> Tensor:
    """uint8 zero points [G, O], as gptqmodel reads them."""
    from qtool.numerics.packing import unpack_bits

    if offset and bits in ONES:
        return unpack_bits(words + ONES[bits], bits, count)
    return (unpack_bits(words, bits, count) + offset) & 2**bits - 1


def _group_of(module: str, g_idx: Tensor | None, groups: int) -> Tensor | None:
    """The group of each input, or None where they are side by side; all zeros also stand for that.

    Raises QtoolError where the groups are not of one size.
    """
    import torch

    if g_idx is None or not bool(g_idx.any()):
        return None
    size = len(g_idx) // groups
    if torch.equal(g_idx, torch.arange(groups, dtype=torch.int32).repeat_interleave(size)):
        return None
    inside = bool(((g_idx >= 0) & (g_idx < groups)).all())
    if not inside or bool((g_idx.bincount(minlength=groups) != size).any()):
        raise QtoolError(f"`{module}{G_IDX}` does not put {size} of {len(g_idx)} inputs into each of {groups} groups")
    return g_idx


def _upright(weight: QTensor) -> QTensor:
    """The same values under scales that are not negative, where there are zero points."""
    return weight if weight.params.zero is None else _turned_over(weight, weight.params.scale.signbit())


def _turned_over(weight: QTensor, groups_OG: Tensor) -> QTensor:
    """The same values with codes, zeros and scales of some groups counted from the other end."""
    import torch

    if not bool(groups_OG.any()):
        return weight
    (scale, zero, *_), largest = weight.params, 2**weight.scheme.bits - 1
    assert zero is not None
    if weight.group_of is None:
        columns_OI = groups_OG.repeat_interleave(weight.codes.shape[1] // groups_OG.shape[1], 1)
    else:
        columns_OI = groups_OG[:, weight.group_of.long()]
    codes = torch.where(columns_OI, largest - weight.codes, weight.codes)
    params = weight.params._replace(
        scale=torch.where(groups_OG, -scale, scale), zero=torch.where(groups_OG, largest - zero, zero)
    )
    return replace(weight, codes=codes, params=params)
