"""The `quantization_config` of compressed-tensors, written and read. Checked against 0.19. Never imports torch."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from qtool.errors import QtoolError, shown
from qtool.formats.checks import field, names_in
from qtool.formats.patterns import begins
from qtool.scheme import BLOCK, KINDS, WITH_OWN_ACTIVATIONS, ActivationScheme, QuantScheme

VERSION = "0.19.0"
PACKED_FORMAT = "pack-quantized"
SCALE_DTYPES = {"nvfp4": "torch.float8_e4m3fn", "mxfp4": "torch.uint8", "mxfp8": "torch.uint8"}
FORMATS_OF_KINDS = {
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "mxfp8": "mxfp8-quantized",
}


def format_name(scheme: QuantScheme) -> str:
    """The library's name for how the weights of a scheme lie.

    As `infer_module_format` has it, but for integers under float inputs (w4afp8): it would take a byte for each
    (int-quantized), while vLLM's kernel for them reads packed words. The library reads what the group names.
    """
    if scheme.kind == "int":
        integers = scheme.activations is not None and scheme.activations.kind == "int"
        return "int-quantized" if integers else PACKED_FORMAT
    other = "float-quantized" if scheme.activations else "naive-quantized"
    return FORMATS_OF_KINDS.get(scheme.kind, other)


def group_of(scheme: QuantScheme, targets: list[str]) -> dict[str, Any]:
    """An entry of `config_groups`."""
    inputs = scheme.activations
    weights = _arguments(scheme.kind, scheme.bits, scheme.granularity, scheme.group_size, scheme.symmetric)
    weights |= {"dynamic": False, "observer": "memoryless_minmax"}
    return {
        "targets": targets,
        "format": format_name(scheme),
        "weights": weights,
        "input_activations": inputs and inputs_entry(inputs),
        "output_activations": None,
    }


def inputs_entry(scheme: ActivationScheme) -> dict[str, Any]:
    """How values are rounded while the model runs."""
    entry = _arguments(scheme.kind, scheme.bits, scheme.granularity, scheme.group_size, True)
    static = {"dynamic": "local" if scheme.kind == "nvfp4" else False, "observer": "static_minmax"}
    return entry | (static if scheme.is_static else {"dynamic": True, "observer": None})


def _arguments(kind: str, bits: int, granularity: str, group_size: int | None, symmetric: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "num_bits": bits,
        "type": "int" if kind == "int" else "float",
        "symmetric": symmetric,
        "strategy": "tensor_group" if kind == "nvfp4" else granularity,
        "group_size": group_size,
        "actorder": None,
        "observer_kwargs": {},
    }
    if granularity == "block":
        entry["block_structure"] = [BLOCK, BLOCK]
    if kind in SCALE_DTYPES:
        entry["scale_dtype"] = SCALE_DTYPES[kind]
    return entry


def check_config(config: dict[str, Any]) -> None:
    """Raises QtoolError for what changes the meaning of all tensors: sparse ones, and rotations at run time."""
    sparse = field(config, "sparsity_config", dict, {}).get("format") or "dense"
    if sparse != "dense":
        raise QtoolError(f"compressed-tensors of the sparse format {shown(sparse)} are not read")
    if field(config, "transform_config", dict, {}).get("config_groups"):
        raise QtoolError("compressed-tensors with transforms of the inputs (transform_config) are not read")


def groups_in(config: dict[str, Any]) -> list[tuple[list[str], QuantScheme]]:
    """Targets and scheme of each of the `config_groups`, in their order."""
    groups = field(config, "config_groups", dict, {})
    return [
        (names_in(group, "targets"), scheme_of(group)) for group in (field(groups, key, dict, {}) for key in groups)
    ]


def scheme_of(group: dict[str, Any]) -> QuantScheme:
    """The scheme of an entry of `config_groups`. Raises QtoolError for one that has no scheme here."""
    weights, inputs = field(group, "weights", dict, {}), field(group, "input_activations", dict, {})
    kind, granularity, group_size = _read_arguments(weights, ("tensor", "channel", "group", "block"), "weights")
    symmetric = bool(weights.get("symmetric", True))
    impossible = granularity == "block" if kind == "int" else not symmetric
    if impossible or weights.get("dynamic") or group.get("output_activations"):
        raise QtoolError(f"compressed-tensors weights of this kind are not read: {_described(weights)}")
    activations = activations_of(inputs, "inputs") if inputs else None
    if activations and activations.kind != kind and {activations.kind, kind} & set(WITH_OWN_ACTIVATIONS):
        raise QtoolError(f"compressed-tensors weights of {kind} with inputs of {activations.kind} are not read")
    return QuantScheme(weights["num_bits"], granularity, group_size, symmetric, kind, activations)


def activations_of(entry: dict[str, Any], what: str) -> ActivationScheme:
    """The inverse of `inputs_entry`. `what` names the values in the QtoolError."""
    kind, granularity, group_size = _read_arguments(entry, ("token", "tensor", "group"), what)
    scheme = ActivationScheme(kind, entry["num_bits"], granularity, group_size)
    if not entry.get("symmetric", True) or (kind == "int" and granularity == "group"):
        raise QtoolError(f"compressed-tensors {what} of this kind are not read: {_described(entry)}, asymmetric")
    if entry.get("dynamic", False) != inputs_entry(scheme)["dynamic"]:
        raise QtoolError(
            f"compressed-tensors {what} of this kind are not read: {_described(entry)}, "
            f"dynamic {shown(entry.get('dynamic'))}"
        )
    return scheme


def _read_arguments(entry: dict[str, Any], strategies: tuple[str, ...], what: str) -> tuple[str, str, int | None]:
    """Kind, granularity and group size."""
    bits, number, strategy, size = (entry.get(key) for key in ("num_bits", "type", "strategy", "group_size"))
    grouped = isinstance(size, int) and size > 0
    kind = None
    if number == "int" and isinstance(bits, int) and 2 <= bits <= 8 and strategy in strategies:
        kind = "int" if strategy != "group" or grouped else None
    elif number == "float" and isinstance(bits, int):
        for name in WITH_OWN_ACTIVATIONS:
            own = strategy == ("tensor_group" if name == "nvfp4" else "group") and size == KINDS[name].group_size
            bytewise = name != "mxfp8" or entry.get("scale_dtype") == SCALE_DTYPES[name]
            if own and bytewise and bits == KINDS[name].bits:
                return name, "group", KINDS[name].group_size
        if bits == 8 and strategy in strategies and (strategy != "group" or (what != "weights" and grouped)):
            kind = "fp8-e4m3"
    if strategy == "block" and entry.get("block_structure") not in ([BLOCK, BLOCK], f"{BLOCK}x{BLOCK}"):
        kind = None
    if kind is None:
        raise QtoolError(f"compressed-tensors {what} of this kind are not read: {_described(entry)}")
    return kind, str(strategy), size if strategy == "group" else None


def _described(arguments: dict[str, Any]) -> str:
    extent = arguments.get("block_structure") or arguments.get("group_size")
    return shown(f"{arguments.get('num_bits')}-bit {arguments.get('type')} per {arguments.get('strategy')} of {extent}")


def match(module: str, groups: list[tuple[list[str], QuantScheme]]) -> QuantScheme | None:
    """The scheme of a module: a group that names it goes before one that names its class."""
    for by_class in (False, True):
        for targets, scheme in groups:
            for target in targets:
                if by_class and target == "Linear":
                    return scheme
                if not by_class and matches_target(target, module):
                    return scheme
    return None


def matches_target(target: str, module: str) -> bool:
    """Whether a target, or an entry of `ignore`, names a module. Raises QtoolError as `begins` does."""
    return begins(target[3:], module) if target.startswith("re:") else target == module


def by_scheme(schemes: dict[str, QuantScheme]) -> dict[QuantScheme, list[str]]:
    """The targets that name exactly the modules of each scheme."""
    members: dict[QuantScheme, list[str]] = defaultdict(list)
    for module, scheme in schemes.items():
        members[scheme].append(module)
    return {scheme: _patterns(modules, set(schemes)) for scheme, modules in members.items()}


def _patterns(modules: Iterable[str], all_modules: set[str]) -> list[str]:
    """Targets that name exactly `modules` among `all_modules`: one pattern per kind of layer where that is enough."""
    by_kind: dict[str, list[str]] = defaultdict(list)
    for module in modules:
        by_kind[re.sub(r"\.\d+\.", ".*.", module)].append(module)
    targets = []
    for kind, members in by_kind.items():
        pattern = re.escape(kind).replace(r"\.\*\.", r"\.\d+\.") + "$"
        matching = [m for m in all_modules if re.match(pattern, m)]
        targets += ["re:" + pattern] if len(matching) == len(members) else members
    return targets
