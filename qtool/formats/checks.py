"""Whether the tensors of a module are those that its scheme needs. Never imports torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from qtool.errors import QtoolError, shown
from qtool.headers import WEIGHT_DTYPES, TensorInfo
from qtool.scheme import QuantScheme

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.checkpoint.reader import Checkpoint

T = TypeVar("T")
KINDS: dict[type, str] = {dict: "an object", list: "a list", str: "a text"}
ANY_FLOAT = "BF16"  # asking a layout for scales of this type means: any of WEIGHT_DTYPES will do


def header(checkpoint: Checkpoint, module: str, part: str, beside: str, dimensions: int) -> TensorInfo:
    """The header of `module` + `part`. Raises QtoolError where it is missing or has other than so many dimensions."""
    info = checkpoint.tensors.get(module + part)
    if info is None:
        raise QtoolError(f"`{module}` has {beside[1:]} but no {part[1:]} in {checkpoint.path}")
    if len(info.shape) != dimensions:
        raise QtoolError(f"`{info.name}` in {checkpoint.path} has the impossible shape {info.shape}")
    return info


def check_headers(
    checkpoint: Checkpoint, scheme: QuantScheme, shape: tuple[int, ...], wanted: Iterable[TensorInfo]
) -> None:
    """Raises QtoolError for the first tensor of `wanted` that is missing or has another type or shape."""
    problem = scheme.shape_error(shape) or ("it is empty" if 0 in shape else None)
    for info in wanted:
        if problem:
            raise QtoolError(f"`{info.name}` in {checkpoint.path} is said to be {scheme}, but {problem}")
        actual = checkpoint.tensors.get(info.name)
        types = WEIGHT_DTYPES if info.dtype == ANY_FLOAT else (info.dtype,)
        if actual is None or actual.shape not in _shapes(info) or actual.dtype not in types:
            there = f"{actual.dtype} {actual.shape}" if actual else "missing"
            raise QtoolError(
                f"`{info.name}` in {checkpoint.path} is {there}, but {scheme} needs {' or '.join(types)} {info.shape}"
            )


def check_shapes(tensors: Mapping[str, Tensor], shape: tuple[int, ...], wanted: Iterable[TensorInfo]) -> None:
    """The same for tensors that were read."""
    for info in wanted:
        if info.name not in tensors or tuple(tensors[info.name].shape) not in _shapes(info):
            raise QtoolError(f"`{info.name}` does not have the shape {info.shape} of a weight {list(shape)}")


def field(tree: Mapping[str, Any], key: str, kind: type[T], default: T) -> T:
    """What a part of the quantization_config has under `key`; `default` for nothing.

    Raises QtoolError where that is of another type.
    """
    value = tree.get(key)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise QtoolError(f"`{key}` in the quantization_config is {shown(repr(value))}, not {KINDS[kind]}")
    return value


def names_in(tree: Mapping[str, Any], key: str) -> list[str]:
    """The same for a list of names or patterns."""
    found = field(tree, key, list, [])
    for value in found:
        if not isinstance(value, str):
            raise QtoolError(f"`{key}` in the quantization_config has {shown(repr(value))} in it, not only names")
    return found


def read_json(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """The JSON object that the bytes of a small tensor spell. Raises QtoolError naming it if they do not."""
    import json

    try:
        value = json.loads(checkpoint.read_small(name).tobytes().decode())
    except (ValueError, RecursionError) as error:
        raise QtoolError(f"`{name}` in {checkpoint.path} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise QtoolError(f"`{name}` in {checkpoint.path} is not a JSON object")
    return value


def _shapes(info: TensorInfo) -> tuple[tuple[int, ...], ...]:
    """A single number may also be stored without dimensions."""
    return ((1,), ()) if info.shape == (1,) else (info.shape,)
