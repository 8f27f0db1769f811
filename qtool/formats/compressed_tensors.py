"""compressed-tensors, `pack-quantized`: what vLLM, SGLang and transformers load. Checked against 0.19.

A linear [out, in] of b bits becomes `weight_packed` I32 [out, ceil(in*b/32)], `weight_scale` [out, groups]
([1] per tensor), `weight_shape` I64 [2] and, when asymmetric, `weight_zero_point`: I32 packed along the
rows [ceil(out*b/32), groups], or one plain I8 per tensor. The library counts codes and zero points from
-2^(b-1), and stores them with 2^(b-1) added: the unsigned codes of our grid.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from qtool.errors import QtoolError
from qtool.headers import TensorInfo
from qtool.scheme import QuantScheme, packed_words

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.checkpoint.reader import Checkpoint
    from qtool.numerics.grid import QTensor

VERSION = "0.19.0"
PACKED, SCALE, ZERO, SHAPE = ".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape"


class CompressedTensors:
    """The format's entry in the table; see `qtool.formats.Format`."""

    def layout(self, module: str, scheme: QuantScheme, shape: tuple[int, ...], scale_dtype: str) -> list[TensorInfo]:
        out, inputs = shape
        groups, whole = scheme.groups(inputs), scheme.granularity == "tensor"
        tensors = [
            TensorInfo(module + PACKED, "I32", (out, packed_words(inputs, scheme.bits))),
            TensorInfo(module + SCALE, scale_dtype, (1,) if whole else (out, groups)),
            TensorInfo(module + SHAPE, "I64", (2,)),
        ]
        if not scheme.symmetric and whole:
            tensors.append(TensorInfo(module + ZERO, "I8", (1,)))
        elif not scheme.symmetric:
            tensors.append(TensorInfo(module + ZERO, "I32", (packed_words(out, scheme.bits), groups)))
        return tensors

    def pack(self, module: str, weight: QTensor) -> dict[str, Tensor]:
        import torch

        from qtool.numerics.packing import pack_bits

        scale, zero, bits = weight.params.scale, weight.params.zero, weight.scheme.bits
        whole = weight.scheme.granularity == "tensor"
        tensors = {
            module + PACKED: pack_bits(weight.codes, bits),
            module + SCALE: scale.reshape(1) if whole else scale.contiguous(),
            module + SHAPE: torch.tensor(weight.codes.shape, dtype=torch.int64),
        }
        if zero is not None and whole:
            tensors[module + ZERO] = (zero.reshape(1) - 2 ** (bits - 1)).to(torch.int8)
        elif zero is not None:
            tensors[module + ZERO] = pack_bits(zero.T.to(torch.uint8), bits).T.contiguous()
        return tensors

    def unpack(self, module: str, tensors: dict[str, Tensor], scheme: QuantScheme) -> QTensor:
        from qtool.numerics.grid import GridParams, QTensor
        from qtool.numerics.packing import unpack_bits

        out, inputs = (int(n) for n in tensors[module + SHAPE])
        for info in self.layout(module, scheme, (out, inputs), "BF16"):
            if info.name not in tensors or tuple(tensors[info.name].shape) != info.shape:
                raise QtoolError(f"`{info.name}` does not have the shape {info.shape} of a weight [{out}, {inputs}]")
        whole = scheme.granularity == "tensor"
        scale = tensors[module + SCALE]
        zero = tensors.get(module + ZERO)
        if scheme.symmetric:
            zero = None
        elif whole and zero is not None:
            zero = zero.float().reshape(1, 1) + 2 ** (scheme.bits - 1)
        elif zero is not None:
            zero = unpack_bits(zero.T.contiguous(), scheme.bits, out).T.float()
        scale = scale.reshape(1, 1) if whole else scale
        return QTensor(unpack_bits(tensors[module + PACKED], scheme.bits, inputs), GridParams(scale, zero), scheme)

    def config(self, schemes: dict[str, QuantScheme], left_alone: list[str]) -> dict[str, Any]:
        by_scheme: dict[QuantScheme, list[str]] = defaultdict(list)
        for module, scheme in schemes.items():
            by_scheme[scheme].append(module)
        groups = {}
        for i, (scheme, modules) in enumerate(by_scheme.items()):
            targets = ["Linear"] if len(by_scheme) == 1 else _patterns(modules, set(schemes))
            groups[f"group_{i}"] = {"targets": targets, "format": "pack-quantized", "weights": _weights_entry(scheme),
                                    "input_activations": None, "output_activations": None}  # fmt: skip
        return {
            "quant_method": "compressed-tensors",
            "version": VERSION,
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": left_alone,
            "kv_cache_scheme": None,
            "config_groups": groups,
        }

    def modules(self, checkpoint: Checkpoint) -> dict[str, tuple[QuantScheme, tuple[int, ...]]]:
        config = checkpoint.config["quantization_config"]
        groups = [(g.get("targets", []), _scheme_of(g)) for g in config.get("config_groups", {}).values()]
        found: dict[str, tuple[QuantScheme, tuple[int, ...]]] = {}
        for name in checkpoint.tensors:
            if not name.endswith(PACKED):
                continue
            module = name.removesuffix(PACKED)
            missing = [s for s in (SCALE, SHAPE) if module + s not in checkpoint.tensors]
            if missing:
                raise QtoolError(f"`{module}` has {PACKED[1:]} but no {missing[0][1:]} in {checkpoint.path}")
            scheme = _match(module, groups)
            if scheme is None:
                raise QtoolError(f"no group of the quantization_config of {checkpoint.path} covers `{module}`")
            for part, dimensions in ((name, (2,)), (module + SCALE, (1, 2))):
                if len(checkpoint.tensors[part].shape) not in dimensions:
                    shape = checkpoint.tensors[part].shape
                    raise QtoolError(f"`{part}` in {checkpoint.path} has the impossible shape {shape}")
            out = checkpoint.tensors[name].shape[0]
            groups_per_row = checkpoint.tensors[module + SCALE].shape[-1]
            inputs = groups_per_row * scheme.group_size if scheme.group_size else _inputs(checkpoint, module)
            for wanted in self.layout(module, scheme, (out, inputs), "BF16"):
                actual = checkpoint.tensors.get(wanted.name)
                types = ("BF16", "F16", "F32") if wanted.name.endswith(SCALE) else (wanted.dtype,)
                if actual is None or actual.shape != wanted.shape or actual.dtype not in types:
                    found_there = f"{actual.dtype} {actual.shape}" if actual else "missing"
                    raise QtoolError(
                        f"`{wanted.name}` in {checkpoint.path} is {found_there}, "
                        f"but {scheme} needs {' or '.join(types)} {wanted.shape}"
                    )
            found[module] = (scheme, (out, inputs))
        return found

    def readers(self, scheme: QuantScheme) -> str:
        if scheme.granularity == "tensor":
            return "transformers"
        if scheme.bits in (4, 8):
            return "vLLM, SGLang, transformers"
        return "transformers (vLLM and SGLang only in versions that take these bits)"


def _inputs(checkpoint: Checkpoint, module: str) -> int:
    """in_features from `weight_shape`: 16 bytes, the only values read besides headers."""
    from safetensors import safe_open

    info = checkpoint.tensors[module + SHAPE]
    if info.shape != (2,) or info.dtype != "I64":
        raise QtoolError(f"`{info.name}` in {checkpoint.path} is {info.dtype} {info.shape}, not I64 (2,)")
    with safe_open(checkpoint.root / info.file, framework="np") as handle:
        return int(handle.get_tensor(info.name)[1])


def _weights_entry(scheme: QuantScheme) -> dict[str, Any]:
    return {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric, "strategy": scheme.granularity,
            "group_size": scheme.group_size, "actorder": None, "dynamic": False,
            "observer": "memoryless_minmax", "observer_kwargs": {}}  # fmt: skip


def _scheme_of(group: dict[str, Any]) -> QuantScheme:
    weights = group.get("weights") or {}
    bits, group_size = weights.get("num_bits", 0), weights.get("group_size")
    known = weights.get("type") == "int" and weights.get("strategy") in ("tensor", "channel", "group")
    known = known and isinstance(bits, int) and 2 <= bits <= 8
    known = known and (weights["strategy"] != "group" or (isinstance(group_size, int) and group_size > 0))
    if not known or group.get("input_activations") or weights.get("actorder") in ("group", "dynamic"):
        described = f"{weights.get('num_bits')}-bit {weights.get('type')} per {weights.get('strategy')} of {group_size}"
        raise QtoolError(f"compressed-tensors weights of this kind are not read: {described}")
    strategy = weights["strategy"]
    return QuantScheme(
        bits, strategy, group_size if strategy == "group" else None, bool(weights.get("symmetric", True))
    )


def _match(module: str, groups: list[tuple[list[str], QuantScheme]]) -> QuantScheme | None:
    """The group of a module: one that names it goes before one that names its class."""
    for by_class in (False, True):
        for targets, scheme in groups:
            for target in targets:
                if by_class and target == "Linear":
                    return scheme
                if not by_class and _names(target, module):
                    return scheme
    return None


def _names(target: str, module: str) -> bool:
    if not target.startswith("re:"):
        return target == module
    try:
        return re.match(target[3:], module) is not None
    except re.error as error:
        raise QtoolError(f"the quantization_config has the target `{target}`, which is no pattern: {error}") from None


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
