"""The same weights in another format: which schemes hold exactly the values of another, and the way there.

Codes stay as they are. Scales may move to another 16-bit type when every one of them exists there, to smaller
groups, which repeat them, and zero points may become minima and the other way round, with the same condition.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from qtool.errors import QtoolError
from qtool.formats import Format
from qtool.scheme import QuantScheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qtool.numerics.grid import QTensor

GGUF_GROUP = 32
ROWS = 512  # of a weight that are compared at once
SYMMETRIC = {4: "q4_0", 5: "q5_0", 8: "q8_0"}  # types of GGUF that hold integers
AFFINE = {4: "q4_1", 5: "q5_1"}
INTEGERS = {**{name: bits for bits, name in SYMMETRIC.items()}, **{name: bits for bits, name in AFFINE.items()}}


def relaid_scheme(scheme: QuantScheme, shape: tuple[int, ...], format: Format) -> QuantScheme | None:
    """The scheme under which a format can hold a weight [out, in] of this one, or None. The values may not fit yet."""
    candidates = [scheme, *_equivalents(scheme)]
    fitting = (c for c in candidates if c.shape_error(shape) is None and format.problem(c, shape) is None)
    return next(fitting, None)


def relay(module: str, weight: QTensor, scheme: QuantScheme, scale_dtype: torch.dtype) -> QTensor:
    """The same values under an equivalent scheme. Raises QtoolError naming what would be lost."""
    from qtool.numerics.grid import GridParams

    if weight.group_of is not None:
        raise QtoolError(f"`{module}` has its columns in groups of their own (act-order), which are not written", HINT)
    if weight.scheme == scheme and (scheme.kind != "int" or weight.params.scale.dtype == scale_dtype):
        return weight
    scale, zero = weight.params.scale, _zero(weight)
    groups = scheme.groups(weight.codes.shape[1]) if scheme.granularity == "group" else scale.shape[1]
    scale = _exact(module, "scales", scale.repeat_interleave(groups // scale.shape[1], 1), scale_dtype)
    zero = zero if zero is None else zero.repeat_interleave(groups // zero.shape[1], 1)
    minimum = None
    half = 2.0 ** (scheme.bits - 1)
    if scheme.kind in AFFINE.values():
        minimum = -(half if zero is None else zero) * scale.float()
        minimum, zero = _exact(module, "minima", minimum, scale_dtype), None
    elif scheme.symmetric and zero is not None:
        if not bool((zero == half).all()):
            raise QtoolError(f"`{module}` has zero points other than {half:g}, which {scheme} cannot hold", HINT)
        zero = None
    elif not scheme.symmetric and zero is None:
        zero = scale.float().new_full(scale.shape, half)
    moved = replace(weight, params=GridParams(scale, zero, super_zero=minimum), scheme=scheme)
    _check_same(module, weight, moved)
    return moved


def _check_same(module: str, weight: QTensor, moved: QTensor) -> None:
    """Raises QtoolError unless every weight is worth the same, as far as float32 tells."""
    from qtool.numerics.grid import stackable

    count = len(weight.codes)
    rows = [min(ROWS, count - start) for start in range(0, count, ROWS)] if stackable(weight.scheme) else [count]
    parts = zip(weight.split(rows), moved.split(rows), strict=True) if len(rows) > 1 else [(weight, moved)]
    changed = sum(int((before.dequantize() != after.dequantize()).sum()) for before, after in parts)
    if changed:
        raise QtoolError(
            f"{changed} of {weight.codes.numel()} weights of `{module}` would change: {moved.scheme} has zero points, "
            "but their minima are no whole multiples of their scales",
            HINT,
        )


HINT = "write it out with `--format dense`, or round it again with --requantize and --scheme"


def _equivalents(scheme: QuantScheme) -> list[QuantScheme]:
    """Schemes with the same codes."""
    if scheme.kind in INTEGERS:
        symmetric = scheme.kind in SYMMETRIC.values()
        plain = QuantScheme(scheme.bits, "group", GGUF_GROUP, symmetric)
        return [plain, replace(plain, symmetric=False)]
    if scheme.kind != "int" or scheme.outliers or scheme.activations:
        return []
    found = [replace(scheme, symmetric=not scheme.symmetric)]
    if scheme.granularity == "channel" or (scheme.group_size or 1) % GGUF_GROUP == 0:
        names = [SYMMETRIC.get(scheme.bits)] if scheme.symmetric else [AFFINE.get(scheme.bits)]
        names.append(AFFINE.get(scheme.bits) if scheme.symmetric else SYMMETRIC.get(scheme.bits))
        found += [QuantScheme.parse(name) for name in names if name]
    return found


def _zero(weight: QTensor) -> Tensor | None:
    """Zero points [O, G] in float32, of minima, too."""
    params = weight.params
    if weight.scheme.kind not in AFFINE.values():
        return params.zero
    assert params.super_zero is not None
    zero = (-params.super_zero.float() / params.scale.float()).round().nan_to_num(0.0)
    return zero.clamp(0, 2**weight.scheme.bits - 1)


def _exact(module: str, what: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales or minima in another type. Raises QtoolError when they are not the same there."""
    moved = values.to(dtype)
    lost = int((moved.to(values.dtype) != values).sum())
    if lost:
        name = str(dtype).removeprefix("torch.")
        raise QtoolError(f"{lost} of {values.numel()} {what} of `{module}` do not exist in {name}", HINT)
    return moved
