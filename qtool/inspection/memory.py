"""What serving a checkpoint takes: weights and key/value cache, as it is and under other schemes. Never imports torch.

The cache holds, per token and attention layer, one key and one value vector for each key/value head; under
multi-head latent attention one vector, `kv_lora_rank + qk_rope_head_dim` long. int8 and int4 caches add one
16-bit scale per vector, fp8 has one scale per tensor, which is not counted. A checkpoint with fixed scales for
its cache has a type of its own, without scales per vector. Layers of sliding attention hold at most their window.
What activations and the runtime need beside is covered by filling a card to `USABLE`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from math import ceil, prod
from typing import Any

from qtool.checkpoint.reader import Checkpoint
from qtool.errors import QtoolError, shown
from qtool.formats.weights import Weights
from qtool.gguf.checkpoint import GGUFCheckpoint
from qtool.headers import WEIGHT_DTYPES
from qtool.inspection.logical import (
    Entry,
    cache_type,
    entries,
    is_float,
    open_weights,
)
from qtool.inspection.statistics import statistics_of
from qtool.models.architectures import config_value, text_config
from qtool.plan import matches
from qtool.recipe import DEFAULT_IGNORE
from qtool.scheme import QuantScheme

SCHEMES = (
    "int8-channel-sym", "fp8-dynamic", "int4-g128-sym", "nvfp4a16", "mxfp4a16", "nf4", "int3-g128-sym", "int2-g128-sym",
)  # fmt: skip
KV_BITS = {"fp16": (16, 0), "fp8": (8, 0), "int8": (8, 16), "int4": (4, 16)}  # of a value, and of a vector's scale
THIS = "this checkpoint"
OWN = "own"  # the cache of the type that the checkpoint has scales for
LARGEST_KV_FIRST = ("fp16", "int8", "fp8", "int4")
CARDS_GB = (8, 16, 24, 48, 80)
USABLE = 0.9  # of a card's memory: what vLLM, too, takes unless told otherwise
CACHING = ("full_attention", "sliding_attention", "chunked_attention")
MOST_LAYERS = 10_000


@dataclass(frozen=True)
class KvCache:
    """`tokens` are held in all attention layers together, for one sequence; each has `vectors` of `dim` values."""

    layers: int
    tokens: int
    vectors: int
    dim: int
    own: str | None  # the type that the checkpoint has fixed scales for
    size_bytes: dict[str, int]  # of the whole batch, by the type of the values; `own` where there is one


@dataclass(frozen=True)
class Option:
    """The weights under one scheme: with each cache the total, and on each card the largest cache that fits.

    A checkpoint with a cache of its own type is served with that one or not at all.
    """

    weights: str
    weight_bytes: int
    total_bytes: dict[str, int]
    fits: dict[str, str | None]


@dataclass(frozen=True)
class Memory:
    """What serving takes with `batch` sequences of `context` tokens."""

    model: str
    context: int
    batch: int
    usable: float
    kv_cache: KvCache
    options: list[Option]
    notes: list[str]

    def to_tree(self) -> dict[str, Any]:
        return asdict(self)


def memory(checkpoint: Checkpoint, context: int, batch: int) -> Memory:
    """The memory of a checkpoint. Raises QtoolError naming the key that its config.json lacks, or what is no model."""
    if statistics_of(checkpoint):
        raise QtoolError(
            f"{checkpoint.path} holds statistics of a model's inputs, not a model", "give the model itself"
        )
    weights = open_weights(checkpoint)
    found = entries(weights)
    notes: list[str] = []
    cache = _kv_cache(weights, context, batch, notes)
    sizes = {THIS: checkpoint.size_bytes, "bf16": _dense_bytes(found)}
    sizes.update({scheme: _packed_bytes(found, scheme, notes) for scheme in SCHEMES})
    options = [_option(name, size_bytes, cache) for name, size_bytes in sizes.items()]
    return Memory(str(checkpoint.path), context, batch, USABLE, cache, options, notes)


def _option(name: str, weight_bytes: int, cache: KvCache) -> Option:
    total = {kv: weight_bytes + size_bytes for kv, size_bytes in cache.size_bytes.items()}
    fits = {}
    caches = (OWN,) if cache.own and name == THIS else LARGEST_KV_FIRST
    for card in CARDS_GB:
        fitting = (kv for kv in caches if total[kv] <= USABLE * card * 1e9)
        fits[f"{card} GB"] = next(fitting, None)
    return Option(name, weight_bytes, total, fits)


def _kv_cache(weights: Weights, context: int, batch: int, notes: list[str]) -> KvCache:
    checkpoint = weights.checkpoint
    config = text_config(checkpoint.config)
    layers = _layer_contexts(checkpoint, context, notes)
    if config.get("kv_lora_rank"):
        vectors, dim = 1, _key(checkpoint, "kv_lora_rank") + _key(checkpoint, "qk_rope_head_dim")
    else:
        heads = _key(checkpoint, "num_attention_heads")
        vectors = 2 * (_key(checkpoint, "num_key_value_heads") if config.get("num_key_value_heads") else heads)
        dim = _key(checkpoint, "head_dim") if config.get("head_dim") else _key(checkpoint, "hidden_size") // heads
    limit = config_value(checkpoint.config, "max_position_embeddings")
    if isinstance(limit, int) and context > limit:
        notes.append(f"the model was made for at most {limit} tokens of context (max_position_embeddings)")
    held = sum(layers) * vectors * batch
    size_bytes = {kv: held * (dim * bits + scale_bits) // 8 for kv, (bits, scale_bits) in KV_BITS.items()}
    if weights.kv:
        size_bytes = {OWN: held * dim * weights.kv.bits // 8, **size_bytes}
    return KvCache(len(layers), sum(layers), vectors, dim, cache_type(weights), size_bytes)


def _layer_contexts(checkpoint: Checkpoint, context: int, notes: list[str]) -> list[int]:
    """How many tokens each layer with a cache holds."""
    config = text_config(checkpoint.config)
    types = config.get("layer_types")
    if not types:
        window = _key(checkpoint, "sliding_window") if config.get("sliding_window") else context
        if window < context and config.get("use_sliding_window", True):
            notes.append(f"sliding_window {window} is not counted on: config.json has no `layer_types` for it")
        return [context] * _key(checkpoint, "num_hidden_layers", MOST_LAYERS)
    if not isinstance(types, list) or not all(isinstance(kind, str) for kind in types):
        raise QtoolError(f"the size of the KV cache is unknown: `layer_types` = `{shown(types)}`")
    limits = {"full_attention": context}
    if "sliding_attention" in types:
        limits["sliding_attention"] = min(context, _key(checkpoint, "sliding_window"))
    if "chunked_attention" in types:
        limits["chunked_attention"] = min(context, _key(checkpoint, "attention_chunk_size"))
    for kind, layers in Counter(t for t in types if t not in CACHING).items():
        notes.append(f"{layers} layers of {kind} have a state of fixed size, which is not counted")
    return [limits[t] for t in types if t in CACHING]


def _key(checkpoint: Checkpoint, key: str, most: int = 1 << 32) -> int:
    if isinstance(checkpoint, GGUFCheckpoint) and checkpoint.model is None:
        name = checkpoint.config["gguf_architecture"]
        raise QtoolError(f"the size of the KV cache is unknown: qtool does not know the architecture `{name}`")
    if not checkpoint.config:
        hint = "give the folder of the model" if checkpoint.path.is_file() else "put the model's config.json there"
        raise QtoolError(f"{checkpoint.path} has no config.json, which tells the size of the KV cache", hint)
    value = config_value(checkpoint.config, key)
    if not isinstance(value, int) or not 1 <= value <= most:
        said = f"`{key}` = `{shown(value)}` in" if key in text_config(checkpoint.config) else f"no `{key}` in"
        where = checkpoint.path if isinstance(checkpoint, GGUFCheckpoint) else checkpoint.root / "config.json"
        raise QtoolError(f"the size of the KV cache is unknown: {said} {where}")
    return value


def _dense_bytes(found: list[Entry]) -> int:
    return sum(2 * prod(e.shape) if e.is_quantized or is_float(e.dtype) else e.size_bytes for e in found)


def _packed_bytes(found: list[Entry], name: str, notes: list[str]) -> int:
    """Exact bytes when the linears that `qtool quantize` takes unasked have a scheme, and all else stays as it is."""
    scheme, size_bytes, unfit = QuantScheme.parse(name), 0, []
    for entry in found:
        if not _is_linear(entry):
            size_bytes += entry.size_bytes
        elif scheme.shape_error(entry.matrix):
            unfit.append(entry)
            size_bytes += 2 * prod(entry.shape)
        else:
            size_bytes += ceil(scheme.size_bits(entry.matrix) / 8)
    if unfit:
        reason = scheme.shape_error(unfit[0].matrix)
        notes.append(f"{name}: {len(unfit)} linears cannot have it and count as bf16; `{unfit[0].name}`: {reason}")
    return size_bytes


def _is_linear(entry: Entry) -> bool:
    known = entry.dtype in WEIGHT_DTYPES or entry.is_unread
    matrix = entry.scheme or (len(entry.shape) == 2 and entry.name.endswith(".weight") and known)
    return bool(matrix) and not any(matches(entry.module, pattern) for pattern in DEFAULT_IGNORE)
