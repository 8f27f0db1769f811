"""The numbers of a config.json and of a GGUF file's keys, each checked as it is read: both come without trust."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

from qtool.errors import QtoolError, UsageError
from qtool.gguf.architectures import GATED, INNER, JOINED, KEY, MOST_INTEGER, MOST_TOKENS, QUERY, Architecture

LEAST_FLOAT, MOST_FLOAT = 1e-30, 1e15


def number(value: object, what: str, kind: type = int, most: float = MOST_INTEGER) -> Any:
    """A positive number of this kind (int or float), or a bool. Raises QtoolError saying `what` it is otherwise."""
    if kind is bool:
        if not isinstance(value, bool):
            raise QtoolError(f"{what} is {value!r:.60}: not true or false")
        return value
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        raise QtoolError(f"{what} is {value!r:.60}: not {'an integer' if kind is int else 'a number'}")
    least, most = (1, most) if kind is int else (LEAST_FLOAT, MOST_FLOAT)
    if not least <= value <= most:
        raise QtoolError(f"{what} is {value}: not within {least}..{most}")
    return kind(value)


@dataclass(frozen=True)
class Keys:
    """The keys of a file that begin with the name of its architecture."""

    metadata: Mapping[str, Any]
    architecture: str

    def number(
        self, key: str, kind: type = int, most: float = MOST_INTEGER, missing: float | EllipsisType | None = ...
    ) -> Any:
        """A number, or `missing` where the file lacks it; where that is None, a zero is None, too.

        Floats are the shortest that are the same in float32. Raises QtoolError naming the key.
        """
        import numpy as np

        name = f"{self.architecture}.{key}"
        value = self.metadata.get(name)
        if value is None and missing is ...:
            raise QtoolError(f"the GGUF file has no key `{name}`")
        if value is None or (missing is None and type(value) in (int, float) and value == 0):
            return missing
        value = number(value, f"key `{name}` of the GGUF file", kind, most)
        return float(str(np.float32(value))) if kind is float else value

    def text(self, key: str, missing: str) -> str:
        """A string. Raises QtoolError naming the key where it is something else."""
        name = f"{self.architecture}.{key}"
        value = self.metadata.get(name, missing)
        if not isinstance(value, str):
            raise QtoolError(f"key `{name}` of the GGUF file is {value!r:.60}: not a string")
        return value


def from_config(config: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """The hyperparameters of a config.json, its defaults included, by their names there.

    Raises UsageError for what llama.cpp cannot do, QtoolError for a number that is none.
    """
    for name, allowed in architecture.fixed.items():
        value = config.get(name)
        if value is not None and value not in allowed:
            raise UsageError(
                f"config.json says `{name}`: {value}, but llama.cpp has {architecture.name} only with "
                f"{' or '.join(map(str, allowed))}"
            )
    known = {**architecture.defaults, **config}
    values: dict[str, Any] = {}
    for hyper in architecture.hyperparameters:
        value = known.get(hyper.name)
        if value is None and isinstance(hyper.missing, str):
            value = values[hyper.missing]
        if value is None and hyper.missing is ...:
            raise UsageError(f"config.json has no `{hyper.name}`")
        if value is not None:
            value = number(value, f"`{hyper.name}` of config.json", hyper.kind, hyper.most)
        values[hyper.name] = value
    vocabulary = known.get("vocab_size")
    values["vocab_size"] = number(vocabulary, "`vocab_size` of config.json", most=MOST_TOKENS)
    if known.get("head_dim") is not None:
        values["head_dim"] = number(known["head_dim"], "`head_dim` of config.json")
    return with_head_dim(values, architecture, "config.json")


def from_keys(keys: Keys, architecture: Architecture) -> dict[str, Any]:
    """The hyperparameters of a file by their names in config.json. Raises QtoolError naming the key."""
    values: dict[str, Any] = {}
    for hyper in architecture.hyperparameters:
        missing = values[hyper.missing] if isinstance(hyper.missing, str) else hyper.missing
        values[hyper.name] = keys.number(hyper.key, hyper.kind, hyper.most, missing)
    values["vocab_size"] = _vocabulary(keys)
    head_dim = keys.number("attention.key_length", missing=None)
    if keys.number("attention.value_length", missing=None) != head_dim:
        raise QtoolError(f"the GGUF file has keys and values of different lengths, which no {architecture.name} has")
    return with_head_dim(
        values if head_dim is None else {**values, "head_dim": head_dim}, architecture, "the GGUF file"
    )


def with_head_dim(values: dict[str, Any], architecture: Architecture, where: str) -> dict[str, Any]:
    """With the `head_dim` that they mean. Raises QtoolError where the heads do not fit together."""
    hidden, heads, shared = (values[n] for n in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    if hidden % heads or heads % shared:
        raise QtoolError(
            f"{where} has a hidden size of {hidden} with {heads} heads and {shared} key-value heads: they do not divide"
        )
    head_dim = values.get("head_dim", hidden // heads)
    if head_dim % 2:
        raise QtoolError(f"{where} has heads of {head_dim} dimensions, which cannot be rotated in pairs")
    if head_dim * heads != hidden and not architecture.head_dim:
        raise UsageError(
            f"{where} has {heads} heads of {head_dim} with a hidden size of {hidden}, but llama.cpp has "
            f"{architecture.name} only with {hidden // heads}"
        )
    return {**values, "head_dim": head_dim}


def lengths(values: Mapping[str, Any]) -> dict[str, int]:
    """The lengths that tensors have, by their names in qtool.gguf.architectures.SHAPES."""
    query, key = (values[name] * values["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    return {**values, QUERY: query, KEY: key, JOINED: query + 2 * key, GATED: 2 * values[INNER]}


def metadata(values: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """The keys of a file, without the name of the architecture before them. No window is one of 0."""
    written: dict[str, Any] = {}
    for hyper in architecture.hyperparameters:
        value = values[hyper.name]
        if value is not None or (hyper.missing is None and hyper.kind is int):
            written[hyper.key] = hyper.kind(value or 0)
    written["vocab_size"] = values["vocab_size"]
    if architecture.head_dim:
        written |= {"attention.key_length": values["head_dim"], "attention.value_length": values["head_dim"]}
    return written


def _vocabulary(keys: Keys) -> int:
    """How many tokens a file has; llama.cpp counts them where it can."""
    tokens = keys.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and tokens:
        return len(tokens)
    found = keys.number("vocab_size", most=MOST_TOKENS, missing=None)
    if found is None:
        raise QtoolError("the GGUF file has neither a key `vocab_size` nor `tokenizer.ggml.tokens`")
    return int(found)
