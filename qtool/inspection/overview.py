"""A checkpoint from its headers alone: parameters, sizes, schemes, what is not quantized and why. Never imports torch.

Parameters are logical: a packed weight counts out * in, a head tied to the embedding counts once, integer
buffers not at all. Bits per weight include scales and zero points; bits per parameter are all bytes over all
parameters.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from qtool.checkpoint.reader import Checkpoint
from qtool.formats import Format, least_capable
from qtool.formats.weights import Weights
from qtool.headers import kind_of
from qtool.inspection.logical import (
    CACHE_SCALES,
    Entry,
    cache_scales,
    cache_type,
    entries,
    is_float,
    open_weights,
    tied_pair,
)
from qtool.models.architectures import config_value
from qtool.scheme import ActivationScheme, QuantScheme

COMPONENTS = (  # the first pattern that a module's name matches; a norm may lie inside attention
    ("norms", r"(norm\d*|\bln(_\w+|\d+))$"),
    ("head", r"(^|\.)(lm_head|embed_out)$"),
    ("embeddings", r"embed|\.w[tp]e$|^w[tp]e$"),
    ("attention", r"attn|attention"),
    ("mlp", r"mlp|ffn|feed_forward|experts|moe|\.fc\d$"),
)
OTHER = "other"
DIMENSIONS = {  # keys of config.json, and what people call them
    "num_hidden_layers": "layers", "hidden_size": "hidden", "intermediate_size": "mlp", "num_attention_heads": "heads",
    "num_key_value_heads": "key/value heads", "vocab_size": "vocabulary", "max_position_embeddings": "context",
}  # fmt: skip


@dataclass(frozen=True)
class Component:
    """A part of the model, such as attention."""

    name: str
    parameters: int
    size_bytes: int


@dataclass(frozen=True)
class LayerKind:
    """Tensors whose names differ only in their numbers, stored alike. `pattern` can be typed after `--layer`."""

    pattern: str
    stored_as: str  # a scheme, or a type of safetensors
    tensors: int
    shape: tuple[int, ...]
    parameters: int
    bits_per_weight: float
    size_bytes: int
    why_not_quantized: str | None


@dataclass(frozen=True)
class SchemeUse:
    """Where a scheme is used, and who loads it."""

    scheme: str
    layers: int
    parameters: int
    bits_per_weight: float
    bits_on_disk: float  # per weight, with the tables, shapes and padding of the format
    inputs: str | None  # how they are rounded while the model runs, None for not
    inputs_static: bool  # whether that takes a scale from calibration
    outliers: int  # weights that are kept in 16 bits
    readers: str


@dataclass(frozen=True)
class CacheScales:
    """The type that keys and values are stored in, with one fixed scale each in so many layers."""

    stored_as: str
    layers: int


@dataclass(frozen=True)
class Origin:
    """What the manifest of `qtool quantize` says. `gates` have `gate`, `asked`, `measured` and `passed`."""

    qtool: str
    source: str
    method: str
    scheme: str
    layers: dict[str, str]
    gates: list[dict[str, Any]]


@dataclass(frozen=True)
class Overview:
    """All that headers, config.json and manifest.json say."""

    model: str
    architecture: str
    model_type: str | None
    dimensions: dict[str, int]
    files: int
    tensors: int
    parameters: int
    size_bytes: int
    bits_per_parameter: float
    dtypes: dict[str, int]  # bytes of each
    format: str | None
    quantized_parameters: int
    bits_per_weight: float | None  # of the quantized weights
    schemes: list[SchemeUse]
    readers: str | None  # who loads all of them
    kv_cache: CacheScales | None
    components: list[Component]
    kinds: list[LayerKind]
    origin: Origin | None
    notes: list[str]

    def to_tree(self) -> dict[str, Any]:
        return asdict(self)


def overview(checkpoint: Checkpoint) -> Overview:
    """The overview of a checkpoint. Raises QtoolError for a format that is not read."""
    weights = open_weights(checkpoint)
    found = entries(weights)
    quantized = [e for e in found if e.scheme]
    components = _components(found)
    origin, reasons = _manifest(checkpoint.path)
    config = checkpoint.config
    schemes = _scheme_uses(quantized, weights.format)
    parameters = sum(e.parameters for e in found)
    dtypes: dict[str, int] = defaultdict(int)
    for info in checkpoint.tensors.values():
        dtypes[info.dtype] += info.size_bytes
    return Overview(
        model=str(checkpoint.path),
        architecture=(config.get("architectures") or ["unknown"])[0],
        model_type=config.get("model_type"),
        dimensions={key: value for key in DIMENSIONS if isinstance(value := config_value(config, key), int)},
        files=len(checkpoint.files),
        tensors=len(checkpoint.tensors),
        parameters=parameters,
        size_bytes=checkpoint.size_bytes,
        bits_per_parameter=8 * checkpoint.size_bytes / parameters if parameters else 0.0,
        dtypes=dict(sorted(dtypes.items(), key=lambda item: -item[1])),
        format=str(config["quantization_config"].get("quant_method")) if weights.format else None,
        quantized_parameters=sum(e.parameters for e in quantized),
        bits_per_weight=_bits_per_weight(quantized) if quantized else None,
        schemes=schemes,
        readers=least_capable(use.readers for use in schemes) if schemes else None,
        kv_cache=_kv_cache(weights),
        components=components,
        kinds=_kinds(found, components, config, reasons),
        origin=origin,
        notes=_notes(weights),
    )


def _notes(weights: Weights) -> list[str]:
    notes = []
    pair = tied_pair(weights.checkpoint)
    stored = [name for name in pair or () if name in weights.shapes]
    if pair and len(stored) == 1:
        notes.append(f"embedding and head are tied: `{stored[0]}` is both")
    elif pair and stored:
        notes.append(f"embedding and head are tied, but `{pair[0]}` and `{pair[1]}` are both stored: counted once")
    if weights.checkpoint.path.is_file() and any(not is_float(t.dtype) for t in weights.checkpoint.tensors.values()):
        notes.append("a single file is read without config.json: packed weights appear as the integers that hold them")
    return notes


def _bits_per_weight(members: list[Entry]) -> float:
    return sum(e.size_bits for e in members) / sum(prod(e.shape) for e in members)


def _scheme_uses(quantized: list[Entry], format_: Format | None) -> list[SchemeUse]:
    by_scheme: dict[QuantScheme, list[Entry]] = defaultdict(list)
    for entry in quantized:
        if entry.scheme:
            by_scheme[entry.scheme].append(entry)
    return [
        SchemeUse(
            scheme=str(scheme),
            layers=len(members),
            parameters=sum(e.parameters for e in members),
            bits_per_weight=_bits_per_weight(members),
            bits_on_disk=8 * sum(e.size_bytes for e in members) / sum(prod(e.shape) for e in members),
            inputs=described_inputs(scheme.activations) if scheme.activations else None,
            inputs_static=bool(scheme.activations and scheme.activations.is_static),
            outliers=sum(scheme.outlier_count(e.matrix) for e in members),
            readers=format_.readers(scheme) if format_ else "",
        )
        for scheme, members in by_scheme.items()
    ]


def described_inputs(scheme: ActivationScheme) -> str:
    """How inputs are rounded while the model runs."""
    number = "int8" if scheme.kind == "llm-int8" else f"int{scheme.bits}" if scheme.kind == "int" else scheme.kind
    if scheme.granularity == "tensor":
        return f"{number}, with a fixed scale (static)"
    shared = f"group of {scheme.group_size}" if scheme.group_size else scheme.granularity
    text = f"{number}, with a scale for each {shared} as it comes"
    if scheme.threshold is not None:
        text += f", but for columns that reach {scheme.threshold:g}"
    return text + (", under a fixed one (static)" if scheme.is_static else " (dynamic)")


def _kv_cache(weights: Weights) -> CacheScales | None:
    stored_as = cache_type(weights)
    names = [info.name for info in cache_scales(weights)]
    return CacheScales(stored_as, sum(n.endswith(".k_scale") for n in names)) if stored_as else None


def _components(found: list[Entry]) -> list[Component]:
    members: dict[str, list[Entry]] = {name: [] for name in (*dict(COMPONENTS), OTHER)}
    for entry in found:
        members[component_of(entry.name)].append(entry)
    return [
        Component(name, sum(e.parameters for e in part), sum(e.size_bytes for e in part))
        for name, part in sorted(members.items(), key=lambda item: -sum(e.size_bytes for e in item[1]))
        if part
    ]


def component_of(name: str) -> str:
    """Which part of a model a tensor belongs to, by its name."""
    module = re.sub(r"\.(weight|bias)$", "", name)
    return next((component for component, pattern in COMPONENTS if re.search(pattern, module)), OTHER)


def _kinds(
    found: list[Entry], components: list[Component], config: dict[str, Any], reasons: dict[str, str]
) -> list[LayerKind]:
    groups: dict[tuple[str, str, tuple[int, ...]], list[Entry]] = defaultdict(list)
    for entry in found:
        groups[kind_of(entry.module), entry.stored_as, entry.shape].append(entry)
    packed = any(e.scheme for e in found)
    kinds = [
        LayerKind(
            pattern=pattern,
            stored_as=stored_as,
            tensors=len(members),
            shape=shape,
            parameters=sum(e.parameters for e in members),
            bits_per_weight=_bits_per_weight(members) if prod(shape) else 0.0,
            size_bytes=sum(e.size_bytes for e in members),
            why_not_quantized=_why_not(members[0], config, reasons) if packed else None,
        )
        for (pattern, stored_as, shape), members in groups.items()
    ]
    rank = {component.name: i for i, component in enumerate(components)}
    return sorted(kinds, key=lambda kind: (rank[component_of(kind.pattern)], -kind.size_bytes))


def _why_not(entry: Entry, config: dict[str, Any], reasons: dict[str, str]) -> str | None:
    if entry.scheme or entry.name.endswith(CACHE_SCALES):
        return None
    if entry.name in reasons:
        return reasons[entry.name]
    listed = config["quantization_config"]
    skipped = any(f".{name}." in f".{entry.module}." for name in listed.get("llm_int8_skip_modules") or [])
    if skipped or _ignored(entry.module, listed.get("ignore") or []):
        return "in the ignore list of config.json"
    if len(entry.shape) < 2:
        return "a vector, not a matrix"
    return "nothing in the quantization_config names it"


def _ignored(module: str, patterns: Iterable[str]) -> bool:
    return any(re.match(p[3:], module) if p.startswith("re:") else p == module for p in patterns)


def _manifest(folder: Path) -> tuple[Origin | None, dict[str, str]]:
    """What the manifest beside a checkpoint says, if qtool made it, and why each tensor was left alone."""
    try:
        tree = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        identity, report = tree["identity"], tree["report"]
        recipe = identity["recipe"]
        origin = Origin(
            qtool=identity["qtool"],
            source=report["model"],
            method=recipe["method"],
            scheme=report["scheme"],
            layers=recipe["layers"],
            gates=report["gates"],
        )
        return origin, {kept["name"]: kept["reason"] for kept in report["kept"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None, {}
