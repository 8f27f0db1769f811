"""Which blocks of a model have a sliding window, how scores are scaled, and where llama.cpp does otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtool.errors import QtoolError, UsageError
from qtool.gguf.architectures import Architecture
from qtool.gguf.hyperparameters import Keys, number

KINDS = ("full_attention", "sliding_attention")  # `layer_types` of config.json


def windows(known: Mapping[str, Any], table: Architecture, values: Mapping[str, Any]) -> tuple[bool, ...]:
    """Which blocks have a sliding window, of a config.json."""
    if table.window_period is None:
        return ()
    blocks = values["num_hidden_layers"]
    period = known.get("sliding_window_pattern") or known.get("_sliding_window_pattern") or table.window_period
    kinds = known.get("layer_types")
    if kinds is None:
        found = _pattern(number(period, "`sliding_window_pattern` of config.json"), blocks)
    else:
        if not isinstance(kinds, list) or len(kinds) != blocks or any(kind not in KINDS for kind in kinds):
            raise UsageError(f"`layer_types` of config.json are not {blocks} of {' or '.join(KINDS)}")
        found = tuple(kind == KINDS[1] for kind in kinds)
    if any(found) and values["sliding_window"] is None:
        raise UsageError("config.json has blocks of sliding_attention, but no `sliding_window`")
    always = any(hyper.name == "sliding_window" and hyper.missing for hyper in table.hyperparameters)
    if always and not any(found):
        raise UsageError(
            f"config.json has no block of sliding_attention, but llama.cpp has {table.name} only with some"
        )
    return found


def from_keys(keys: Keys, table: Architecture, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config.json about attention, of a file. Raises QtoolError naming the key."""
    assert table.window_period is not None
    blocks = values["num_hidden_layers"]
    name = f"{table.name}.attention.sliding_window_pattern"
    pattern = keys.metadata.get(name)
    if values["sliding_window"] is None:
        found: tuple[bool, ...] = (False,) * blocks
    elif isinstance(pattern, list):
        if len(pattern) != blocks or any(type(value) not in (bool, int) for value in pattern):
            raise QtoolError(f"key `{name}` of the GGUF file is not a list of {blocks} true or false")
        found = tuple(bool(value) for value in pattern)
    elif type(pattern) is int and pattern == 0:
        found = (True,) * blocks
    else:
        found = _pattern(keys.number("attention.sliding_window_pattern", missing=table.window_period), blocks)
    return {
        "layer_types": [KINDS[window] for window in found],
        "sliding_window": values["sliding_window"] or values["max_position_embeddings"],  # transformers must have one
        "query_pre_attn_scalar": scale(table, values),
    }


def _pattern(period: int, blocks: int) -> tuple[bool, ...]:
    """Every block has a window, but the last of each `period`."""
    return tuple((block + 1) % period != 0 for block in range(blocks))


def pattern_of(windows: tuple[bool, ...], usual: int | None) -> int | list[bool]:
    """The key for these windows: their period, where they have one."""
    assert usual is not None
    periods = (period for period in (usual, *range(1, len(windows) + 2)) if _pattern(period, len(windows)) == windows)
    return next(periods, list(windows))


def scale(table: Architecture, values: Mapping[str, Any]) -> int:
    """The number by whose root llama.cpp divides the scores: it knows Gemma's largest models by their blocks."""
    if values["num_hidden_layers"] == table.wide_scale:
        return int(values["hidden_size"] // values["num_attention_heads"])
    return int(values["head_dim"])


def check_scale(known: Mapping[str, Any], table: Architecture, values: Mapping[str, Any]) -> None:
    """Raises UsageError where a config.json scales the scores otherwise than llama.cpp does."""
    scalar = known.get("query_pre_attn_scalar")
    if table.window_period and scalar != scale(table, values):
        raise UsageError(
            f"config.json has a `query_pre_attn_scalar` of {scalar}, but llama.cpp takes {scale(table, values)} for "
            f"{table.name} with {values['num_hidden_layers']} blocks"
        )


def notes(known: Mapping[str, Any], table: Architecture, values: Mapping[str, Any]) -> tuple[str, ...]:
    """Where llama.cpp computes something else than transformers does from a config.json, one sentence each."""
    found = []
    window, used = known.get("sliding_window"), known.get("use_sliding_window", True)
    if not table.window_period and used and isinstance(window, int) and window < values["max_position_embeddings"]:
        found.append(
            f"llama.cpp has no sliding window for {table.name}: after {window} tokens it sees more than trained"
        )
    if table.name == "gptneox" and known.get("hidden_act", "gelu") == "gelu":
        found.append("llama.cpp takes the tanh approximation of gelu")
    return tuple(found)
