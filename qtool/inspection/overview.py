"""A checkpoint from its headers alone: parameters, sizes, schemes, what is not quantized and why. Never imports torch.

Parameters are logical: a packed weight counts out * in, a head tied to the embedding counts once, integer
buffers not at all. Bits per weight include scales and zero points; bits per parameter are all bytes over all
parameters. Of a GGUF file tensors have their Hugging Face names where its architecture is known.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import Any

from qtool.checkpoint.reader import Checkpoint
from qtool.errors import shown
from qtool.formats import Format, least_capable
from qtool.formats.gguf import READERS
from qtool.formats.patterns import begins, problem
from qtool.formats.weights import Weights
from qtool.gguf.architectures import SIZES
from qtool.gguf.checkpoint import GGUFCheckpoint
from qtool.headers import kind_of
from qtool.inspection.logical import (
    CACHE_SCALES,
    Entry,
    cache_scales,
    cache_type,
    entries,
    gguf_kinds,
    is_float,
    open_weights,
    tied_pair,
)
from qtool.mixes import MIXES
from qtool.models.architectures import config_value
from qtool.scheme import ActivationScheme, QuantScheme

COMPONENTS = (  # the first pattern that a module's name matches; a norm may lie inside attention
    ("norms", r"(norm\d*|\bln(_\w+|\d+))$"),
    ("head", r"(^|\.)(lm_head|embed_out)$|^output$"),
    ("embeddings", r"embe?d|\.w[tp]e$|^w[tp]e$"),
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
    stored_as: str  # a scheme, or a type of safetensors or GGUF
    tensors: int
    shape: tuple[int, ...]
    parameters: int
    bits_per_weight: float
    size_bytes: int
    why_not_quantized: str | None


@dataclass(frozen=True)
class SchemeUse:
    """Where a scheme is used, and who loads it."""

    scheme: str  # or a type of GGUF that qtool does not read
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
    file_type: str | None  # what llama.cpp calls the mix of types in a GGUF file
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
    quantized = [e for e in found if e.is_quantized]
    components = _components(found)
    origin, reasons = _manifest(checkpoint)
    config, gguf = checkpoint.config, checkpoint if isinstance(checkpoint, GGUFCheckpoint) else None
    schemes = _scheme_uses(quantized, weights.format)
    readers = [use.readers for use in schemes] or [READERS] * (gguf is not None and gguf.model is not None)
    parameters = sum(e.parameters for e in found)
    kinds = gguf_kinds(checkpoint)
    dtypes: dict[str, int] = defaultdict(int)
    for info in checkpoint.tensors.values():
        dtypes[kinds.get(info.name, info.dtype).upper()] += info.size_bytes
    return Overview(
        model=str(checkpoint.path),
        architecture=_name(config.get("architectures")) or _name(config.get("gguf_architecture")) or "unknown",
        model_type=_name(config.get("model_type")),
        dimensions=_dimensions(checkpoint),
        files=len(checkpoint.files),
        tensors=len(checkpoint.tensors),
        parameters=parameters,
        size_bytes=checkpoint.size_bytes,
        bits_per_parameter=8 * checkpoint.size_bytes / parameters if parameters else 0.0,
        dtypes=dict(sorted(dtypes.items(), key=lambda item: -item[1])),
        format=weights.format.name if weights.format else None,
        file_type=_file_type(gguf.metadata) if gguf else None,
        quantized_parameters=sum(e.parameters for e in quantized),
        bits_per_weight=_bits_per_weight(quantized) if quantized else None,
        schemes=schemes,
        readers=least_capable(readers) if readers else None,
        kv_cache=_kv_cache(weights),
        components=components,
        kinds=_kinds(found, components, weights, reasons),
        origin=origin,
        notes=_notes(weights, found),
    )


def _dimensions(checkpoint: Checkpoint) -> dict[str, int]:
    """The numbers that say how large a model is, by their keys in config.json."""
    config: dict[str, Any] = checkpoint.config
    if isinstance(checkpoint, GGUFCheckpoint) and checkpoint.model is None:
        keys = checkpoint.metadata
        config = {size.name: keys.get(f"{config['gguf_architecture']}.{size.key}") for size in SIZES}
        tokens = keys.get("tokenizer.ggml.tokens")
        config["vocab_size"] = len(tokens) if isinstance(tokens, list) else None
    return {key: value for key in DIMENSIONS if isinstance(value := config_value(config, key), int)}


def _file_type(metadata: Mapping[str, Any]) -> str | None:
    """The name of a GGUF file's general.file_type: of a mix that qtool makes, or of llama.cpp's others."""
    number = metadata.get("general.file_type")
    if type(number) is not int:
        return None
    name = next((mix.name for mix in MIXES.values() if mix.file_type == number), None)
    if name is None:
        from gguf import LlamaFileType

        name = next((kind.name.removeprefix("MOSTLY_") for kind in LlamaFileType if kind == number), None)
    return name or f"unknown ({number})"


def _name(value: object) -> str | None:
    """A name, or the first of a list of them; None for anything else that config.json may say."""
    value = value[0] if isinstance(value, list) and value else value
    return shown(value) if isinstance(value, str) else None


def _notes(weights: Weights, found: list[Entry]) -> list[str]:
    notes = []
    pair = tied_pair(weights.checkpoint)
    stored = [name for name in pair or () if name in weights.shapes]
    if pair and len(stored) == 1:
        notes.append(f"embedding and head are tied: `{stored[0]}` is both")
    elif pair and stored:
        notes.append(f"embedding and head are tied, but `{pair[0]}` and `{pair[1]}` are both stored: counted once")
    checkpoint = weights.checkpoint
    if isinstance(checkpoint, GGUFCheckpoint):
        return notes + _gguf_notes(checkpoint, found)
    if checkpoint.path.is_file() and any(not is_float(t.dtype) for t in checkpoint.tensors.values()):
        notes.append("a single file is read without config.json: packed weights appear as the integers that hold them")
    return notes


def _gguf_notes(checkpoint: GGUFCheckpoint, found: list[Entry]) -> list[str]:
    """What of a GGUF file qtool cannot read, and where llama.cpp computes something else than transformers."""
    if checkpoint.model is not None:
        notes = list(checkpoint.model.notes)
    elif (kind := checkpoint.metadata.get("general.type", "model")) != "model":
        notes = [f"general.type is `{shown(kind)}`: this is no model"]
    else:
        name = checkpoint.config["gguf_architecture"]
        known = f"`{name}` with experts" if checkpoint.metadata.get(f"{name}.expert_count") else f"`{name}`"
        notes = [f"qtool does not know the architecture {known}: tensors have the names that llama.cpp gives them"]
    unread = [entry for entry in found if entry.is_unread]
    types = (f"{e.stored_as} of {len(e.shape)} dimensions" if len(e.shape) != 2 else e.stored_as for e in unread)
    if unread:
        notes.append(f"the values of {len(unread)} tensors are not read: {', '.join(dict.fromkeys(types))}")
    return notes


def _bits_per_weight(members: list[Entry]) -> float:
    return sum(e.size_bits for e in members) / sum(prod(e.shape) for e in members)


def _scheme_uses(quantized: list[Entry], format_: Format | None) -> list[SchemeUse]:
    by_name: dict[str, list[Entry]] = defaultdict(list)
    for entry in quantized:
        by_name[entry.stored_as].append(entry)
    by_scheme = {name: (next((e.scheme for e in m if e.scheme), None), m) for name, m in by_name.items()}
    return [
        SchemeUse(
            scheme=stored_as,
            layers=len(members),
            parameters=sum(e.parameters for e in members),
            bits_per_weight=_bits_per_weight(members),
            bits_on_disk=8 * sum(e.size_bytes for e in members) / sum(prod(e.shape) for e in members),
            inputs=described_inputs(scheme.activations) if scheme and scheme.activations else None,
            inputs_static=bool(scheme and scheme.activations and scheme.activations.is_static),
            outliers=sum(scheme.outlier_count(e.matrix) for e in members) if scheme else 0,
            readers=_readers(scheme, members, format_),
        )
        for stored_as, (scheme, members) in by_scheme.items()
    ]


def _readers(scheme: QuantScheme | None, members: list[Entry], format_: Format | None) -> str:
    """Who loads all of these: a format's readers may depend on shapes."""
    if scheme is None or format_ is None:
        return READERS  # types of GGUF that qtool lacks
    return least_capable(dict.fromkeys(format_.readers(scheme, e.matrix) for e in members))


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
    found: list[Entry], components: list[Component], weights: Weights, reasons: dict[str, str]
) -> list[LayerKind]:
    groups: dict[tuple[str, str, tuple[int, ...]], list[Entry]] = defaultdict(list)
    for entry in found:
        groups[kind_of(entry.module), entry.stored_as, entry.shape].append(entry)
    packed = any(e.is_quantized for e in found)
    kinds = [
        LayerKind(
            pattern=pattern,
            stored_as=stored_as,
            tensors=len(members),
            shape=shape,
            parameters=sum(e.parameters for e in members),
            bits_per_weight=_bits_per_weight(members) if prod(shape) else 0.0,
            size_bytes=sum(e.size_bytes for e in members),
            why_not_quantized=_why_not(members[0], weights, reasons) if packed else None,
        )
        for (pattern, stored_as, shape), members in groups.items()
    ]
    rank = {component.name: i for i, component in enumerate(components)}
    return sorted(kinds, key=lambda kind: (rank[component_of(kind.pattern)], -kind.size_bytes))


def _why_not(entry: Entry, weights: Weights, reasons: dict[str, str]) -> str | None:
    if entry.is_quantized or entry.name.endswith(CACHE_SCALES):
        return None
    if entry.name in reasons:
        return reasons[entry.name]
    if len(entry.shape) < 2:
        return "a vector, not a matrix"
    if entry.name.endswith("bias"):
        return "a bias, not a weight"
    if isinstance(weights.checkpoint, GGUFCheckpoint):
        return f"the file has it as {entry.dtype}"
    if said := _ignored(entry.module, weights.checkpoint.config["quantization_config"]):
        return said
    listing = weights.format is not None and weights.format.name in ("compressed-tensors", "qtool")
    return "nothing in the quantization_config names it" if listing else "config.json does not say why"


def _ignored(module: str, config: dict[str, Any]) -> str | None:
    """What the quantization_config says of leaving a module alone: every format has a list of its own for that."""
    patterns = _strings(config.get("ignore"))
    names = [*_strings(config.get("llm_int8_skip_modules")), *_strings(config.get("modules_to_not_convert"))]
    rules = [rule.removeprefix("-:") for rule in _strings(config.get("dynamic")) if rule.startswith("-:")]
    regexes = [p.removeprefix("re:") for p in patterns if p.startswith("re:")] + rules
    usable = [regex for regex in regexes if problem(regex, module) is None]
    if (
        module in patterns
        or any(f".{name}." in f".{module}." or fnmatchcase(f"{module}.", f"{name}.*") for name in names)
        or any(begins(regex, module) for regex in usable)
    ):
        return "in the ignore list of config.json"
    return "the ignore list of config.json has patterns that are not read" if len(usable) < len(regexes) else None


def _strings(value: object) -> list[str]:
    """The strings of a list, or of an object's keys, that a config.json may or may not have."""
    return [item for item in value if isinstance(item, str)] if isinstance(value, (list, dict)) else []


def _manifest(checkpoint: Checkpoint) -> tuple[Origin | None, dict[str, str]]:
    """What the manifest beside a checkpoint says, if qtool made it, and why each tensor was left alone."""
    try:
        tree = json.loads((checkpoint.root / "manifest.json").read_text(encoding="utf-8"))
        if checkpoint.path.is_file() and checkpoint.files[0] not in [file["name"] for file in tree["files"]]:
            return None, {}
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
