"""A checkpoint as the model it stands for: one entry per weight, however many tensors hold it. Never imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from qtool.checkpoint.reader import Checkpoint
from qtool.errors import QtoolError
from qtool.formats.weights import Weights
from qtool.headers import DTYPE_BITS
from qtool.models.architectures import ARCHITECTURES, LLAMA
from qtool.scheme import QuantScheme


@dataclass(frozen=True)
class Entry:
    """A dense tensor, or all that a packed weight is made of."""

    name: str
    shape: tuple[int, ...]
    scheme: QuantScheme | None
    dtype: str  # of a dense tensor; of the scales of a packed weight
    size_bytes: int
    size_bits: int  # without what the format adds, such as padding
    parameters: int  # 0 for integer buffers, and for a tied head that is stored a second time

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def stored_as(self) -> str:
        return str(self.scheme or self.dtype)


def open_weights(checkpoint: Checkpoint) -> Weights:
    """The logical tensors of a checkpoint. Raises QtoolError where headers do not tell their shapes."""
    try:
        return Weights(checkpoint)
    except FileNotFoundError:
        raise QtoolError(
            f"{checkpoint.path} is packed in a way whose shapes its headers do not tell",
            f"download it and give the folder: `hf download {checkpoint.path}`",
        ) from None


def entries(weights: Weights) -> list[Entry]:
    """Every logical tensor, dense ones in file order first."""
    tensors, pair = weights.checkpoint.tensors, tied_pair(weights.checkpoint)
    found = []
    for name, shape in weights.shapes.items():
        module = name.removesuffix(".weight")
        if module in weights.schemes:
            scheme = weights.schemes[module]
            parts = [tensors[n] for n in weights.packed_names[module]]
            scale = max((p.dtype for p in parts if is_float(p.dtype)), key=DTYPE_BITS.__getitem__, default="BF16")
            size_bytes, size_bits = sum(p.size_bytes for p in parts), scheme.size_bits(shape, DTYPE_BITS[scale])
            found.append(Entry(name, shape, scheme, scale, size_bytes, size_bits, prod(shape)))
        else:
            info = tensors[name]
            repeated = pair and name == pair[1] and pair[0] in weights.shapes
            counted = is_float(info.dtype) and not repeated
            parameters = prod(shape) if counted else 0
            found.append(Entry(name, shape, None, info.dtype, info.size_bytes, 8 * info.size_bytes, parameters))
    return found


def is_float(dtype: str) -> bool:
    """Whether a type, as safetensors spells it, is one of weights."""
    return dtype.startswith(("F", "BF"))


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that describes the language model."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def tied_pair(checkpoint: Checkpoint) -> tuple[str, str] | None:
    """The names of embedding and head where config.json says that they are one tensor, else None."""
    config = checkpoint.config
    if not config.get("tie_word_embeddings", text_config(config).get("tie_word_embeddings", False)):
        return None
    architecture = ARCHITECTURES.get(str(text_config(config).get("model_type")), LLAMA)
    names = []
    for module in (architecture.embedding, architecture.head):
        spellings = architecture.spellings(f"{module}.weight")
        names.append(next((name for name in spellings if name in checkpoint.tensors), spellings[0]))
    return names[0], names[1]
