"""What GPTQ and AWQ share: scales and zero points lie [groups, out], codes in words of 32 bits, settings in one entry.

Never imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qtool.errors import QtoolError
from qtool.formats.compressed_tensors_config import by_scheme
from qtool.formats.patterns import begins
from qtool.headers import TensorInfo
from qtool.scheme import QuantScheme, packed_words

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.checkpoint.reader import Checkpoint
    from qtool.numerics.grid import GridParams, QTensor

QWEIGHT, QZEROS, SCALES = ".qweight", ".qzeros", ".scales"
FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
FUSED |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}  # what vLLM and SGLang call them when joined
LEFT_ALONE = QuantScheme(kind="none")  # stands among the schemes for what has none
Rules = list[tuple[str, dict[str, Any] | None]]


def scheme_problem(scheme: QuantScheme, name: str, bits: tuple[int, ...], group_sizes: tuple[int, ...]) -> str | None:
    """Why a format that stores integers of these bits, in groups of these sizes or per channel, has no such scheme."""
    if scheme.kind != "int" or scheme.bits not in bits:
        return f"{name} stores integers of {_listed(bits)} bits"
    if scheme.outliers or scheme.activations:
        return f"{name} has no place for {'outliers' if scheme.outliers else 'how inputs are rounded'}"
    if scheme.granularity == "tensor":
        return f"{name} has a scale for every output, not one for the tensor"
    if scheme.granularity == "group" and scheme.group_size not in group_sizes:
        return f"readers of {name} know groups of {_listed(group_sizes)}"
    return None


def group_size(scheme: QuantScheme) -> int:
    """As config.json says it: -1 is the whole row."""
    return scheme.group_size or -1


def in_block(module: str) -> bool:
    """Whether a module belongs to a numbered block, unlike embeddings and the output layer."""
    return any(part.isdigit() for part in module.split("."))


def params_layout(module: str, scheme: QuantScheme, shape: tuple[int, ...], scale_dtype: str) -> list[TensorInfo]:
    """Scales and zero points of a weight [out, in]."""
    out, groups = shape[0], scheme.groups(shape[1])
    return [
        TensorInfo(module + QZEROS, "I32", (groups, packed_words(out, scheme.bits))),
        TensorInfo(module + SCALES, scale_dtype, (groups, out)),
    ]


def check_order(module: str, weight: QTensor) -> None:
    """Raises QtoolError for a weight in act-order."""
    if weight.group_of is not None:
        raise QtoolError(
            f"`{module}` has its columns in groups by activation (act-order), which is only read here, not written",
            "write it out with `--format dense`",
        )


def zero_points(weight: QTensor) -> Tensor:
    """uint8 [O, G]; the middle of the codes for symmetric weights."""
    import torch

    if weight.params.zero is None:
        return torch.full_like(weight.params.scale, 2 ** (weight.scheme.bits - 1), dtype=torch.uint8)
    return weight.params.zero.to(torch.uint8)


def stored_params(module: str, scale_GO: Tensor, zero_GO: Tensor, scheme: QuantScheme) -> GridParams:
    """Scales and uint8 zero points as they were read. Raises QtoolError for symmetric weights that are not."""
    from qtool.numerics.grid import GridParams

    half = 2 ** (scheme.bits - 1)
    if not scheme.symmetric:
        return GridParams(turned(scale_GO), turned(zero_GO).float())
    others = int((zero_GO != half).sum())
    if others:
        raise QtoolError(
            f"`{module}{QZEROS}` has {others} zero points other than {half}, but config.json says that it is symmetric"
        )
    return GridParams(turned(scale_GO))


def turned(matrix: Tensor) -> Tensor:
    """The transpose, with the strides of a new tensor: `contiguous` keeps others where a side is 1."""
    import torch

    return matrix.T.clone(memory_format=torch.contiguous_format)


def quantized_modules(checkpoint: Checkpoint) -> list[str]:
    """The modules that have a part of a quantized weight."""
    parts = (QWEIGHT, QZEROS)
    found = {name.removesuffix(part): None for name in checkpoint.tensors for part in parts if name.endswith(part)}
    return list(found)


def stated_scheme(checkpoint: Checkpoint, said: dict[str, Any], bits: tuple[int, ...], symmetric: Any) -> QuantScheme:
    """The scheme of an entry of config.json. Raises QtoolError for one that no such file can have."""
    width, size = said.get("bits", said.get("w_bit")), said.get("group_size", said.get("q_group_size"))
    if type(width) is not int or width not in bits:
        raise QtoolError(f"{checkpoint.path} says that its weights have {width!r} bits: {_listed(bits)} are read")
    if type(size) is not int or (size < 1 and size != -1):
        raise QtoolError(f"{checkpoint.path} says that {size!r} weights share a scale: -1 or a positive number is read")
    if not isinstance(symmetric, bool):
        raise QtoolError(f"{checkpoint.path} says {symmetric!r} where it should say whether its weights are symmetric")
    return QuantScheme(width, "channel" if size == -1 else "group", None if size == -1 else size, symmetric)


def settings(scheme: QuantScheme) -> dict[str, Any]:
    """A scheme as GPTQ's config.json says it."""
    return {"bits": scheme.bits, "group_size": group_size(scheme), "sym": scheme.symmetric}


def dynamic_rules(schemes: dict[str, QuantScheme], left: list[str], base: QuantScheme) -> dict[str, dict[str, Any]]:
    """The rules of `dynamic`, for modules left alone and for those of another scheme than `base`; see `rules_of`.

    vLLM asks for q, k and v, and for gate and up, under the name that they have when joined.
    """
    chosen = {**schemes, **dict.fromkeys(left, LEFT_ALONE)}
    for module, scheme in list(chosen.items()):
        parent, _, leaf = module.rpartition(".")
        if leaf in FUSED:
            chosen.setdefault(f"{parent}.{FUSED[leaf]}", scheme)
    rules: dict[str, dict[str, Any]] = {}
    for scheme, targets in by_scheme(chosen).items():
        patterns = [t.removeprefix("re:") if t.startswith("re:") else re.escape(t) + "$" for t in targets]
        if scheme == LEFT_ALONE:
            rules |= {f"-:{pattern}": {} for pattern in patterns}
        elif scheme != base:
            rules |= {f"+:{pattern}": settings(scheme) for pattern in patterns}
    return rules


def rules_of(checkpoint: Checkpoint, config: dict[str, Any]) -> Rules:
    """The patterns of `dynamic` in their order: what they change, or None for modules left alone.

    `+:pattern` or `pattern` changes settings, `-:pattern` leaves alone; a pattern must match from the start of the
    name, and the first that does counts (gptqmodel 7.7, `dynamic_get`). Raises QtoolError for what is none.
    """
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, dict) or not all(isinstance(change, dict) for change in dynamic.values()):
        raise QtoolError(f"`dynamic` in the quantization_config of {checkpoint.path} is not patterns with settings")
    rules: Rules = []
    for text, change in dynamic.items():
        rules.append((text.removeprefix("+:").removeprefix("-:"), None if text.startswith("-:") else change))
    return rules


def settings_of(checkpoint: Checkpoint, config: dict[str, Any], rules: Rules, module: str) -> dict[str, Any]:
    """What config.json says of a quantized module."""
    change = next((change for pattern, change in rules if begins(pattern, module)), {})
    if change is None:
        raise QtoolError(f"`{module}` in {checkpoint.path} is quantized, but `dynamic` says that it was left alone")
    return {**config, **change}


def read_modules(
    checkpoint: Checkpoint, scheme_and_shape: Callable[[str, dict[str, Any]], tuple[QuantScheme, tuple[int, int]]]
) -> dict[str, tuple[QuantScheme, tuple[int, ...]]]:
    """Scheme and shape of each quantized module, from its name and its settings."""
    config = checkpoint.config["quantization_config"]
    rules = rules_of(checkpoint, config)
    found: dict[str, tuple[QuantScheme, tuple[int, ...]]] = {}
    for module in quantized_modules(checkpoint):
        found[module] = scheme_and_shape(module, settings_of(checkpoint, config, rules, module))
    return found


def _listed(numbers: tuple[int, ...]) -> str:
    *some, last = (str(number) for number in numbers)
    return f"{', '.join(some)} or {last}" if some else last
