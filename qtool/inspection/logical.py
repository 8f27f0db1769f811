"""A checkpoint as the model it stands for: one entry per weight, however many tensors hold it. Never imports torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from qtool.checkpoint.reader import Checkpoint
from qtool.errors import QtoolError, ReadError
from qtool.formats.weights import Weights
from qtool.gguf.checkpoint import GGUFCheckpoint
from qtool.headers import DTYPE_BITS, TensorInfo
from qtool.models.architectures import ARCHITECTURES, LLAMA, text_config
from qtool.scheme import KV_SCHEMES, QuantScheme

CACHE_SCALES = (".k_scale", ".v_scale")


@dataclass(frozen=True)
class Entry:
    """A dense tensor, or all that a packed weight is made of."""

    name: str
    shape: tuple[int, ...]
    scheme: QuantScheme | None
    dtype: str  # of a dense tensor; of the scales of a packed weight; what GGUF calls blocks that are not read
    size_bytes: int
    size_bits: int  # without what the format adds, such as padding and fixed scales of inputs
    parameters: int  # 0 for integer buffers, scales of the cache, and a tied head that is stored a second time
    transposed: bool = False  # the shape is [in, out], as GPT-2 has it

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def matrix(self) -> tuple[int, ...]:
        """The shape as a scheme sees it: [out, in], of experts [experts, in, out] one below the other."""
        if self.scheme and len(self.shape) == 3:
            experts, inputs, out = self.shape
            return experts * out, inputs
        return self.shape[::-1] if self.transposed else self.shape

    @property
    def is_unread(self) -> bool:
        """Whether it is in blocks of GGUF's that are not read: of a type that qtool lacks, or of experts."""
        return self.scheme is None and self.dtype not in DTYPE_BITS

    @property
    def is_quantized(self) -> bool:
        return self.scheme is not None or self.is_unread

    @property
    def stored_as(self) -> str:
        return str(self.scheme or self.dtype)


def open_weights(checkpoint: Checkpoint) -> Weights:
    """The logical tensors of a checkpoint. Raises QtoolError where headers do not tell their shapes."""
    try:
        return Weights(checkpoint)
    except ReadError:
        if checkpoint.root.exists():
            raise
        raise QtoolError(
            f"{checkpoint.path} is packed in a way whose shapes its headers do not tell",
            f"download it and give the folder: `hf download {checkpoint.path}`",
        ) from None


def is_quantized(weights: Weights) -> bool:
    """Whether any tensor is."""
    return bool(weights.schemes or gguf_kinds(weights.checkpoint))


def gguf_kinds(checkpoint: Checkpoint) -> dict[str, str]:
    """The type of each tensor that is in blocks of GGUF's."""
    return checkpoint.kinds if isinstance(checkpoint, GGUFCheckpoint) else {}


def entries(weights: Weights) -> list[Entry]:
    """Every logical tensor, dense ones in file order first, and the fixed scales of the cache last."""
    pair = tied_pair(weights.checkpoint)
    kinds = gguf_kinds(weights.checkpoint)
    found = []
    for name, shape in weights.shapes.items():
        module = name.removesuffix(".weight")
        if module in weights.schemes:
            found.append(_packed(weights, name, module, shape))
        elif name in kinds:
            found.append(_unread(weights.checkpoint, name))
        else:
            info = weights.checkpoint.tensors[name]
            repeated = pair and name == pair[1] and pair[0] in weights.shapes
            parameters = prod(shape) if is_float(info.dtype) and not repeated else 0
            transposed = len(shape) == 2 and weights.is_transposed(module)
            size_bytes = info.size_bytes
            found.append(Entry(name, shape, None, info.dtype, size_bytes, 8 * size_bytes, parameters, transposed))
    for info in cache_scales(weights):
        found.append(Entry(info.name, info.shape, None, info.dtype, info.size_bytes, 8 * info.size_bytes, 0))
    return found


def _packed(weights: Weights, name: str, module: str, shape: tuple[int, ...]) -> Entry:
    scheme, transposed = weights.schemes[module], weights.is_transposed(module)
    parts = [weights.checkpoint.tensors[part] for part in weights.packed_names[module]]
    scales = [p.dtype for p in parts if p.name.endswith(".weight_scale")]
    floats = scales or [p.dtype for p in parts if is_float(p.dtype)]
    scale = max(floats, key=DTYPE_BITS.__getitem__, default="BF16")
    entry = Entry(name, shape, scheme, scale, sum(p.size_bytes for p in parts), 0, prod(shape), transposed)
    return replace(entry, size_bits=scheme.size_bits(entry.matrix, DTYPE_BITS[scale]))


def _unread(checkpoint: Checkpoint, name: str) -> Entry:
    """A tensor in blocks that are only passed over."""
    assert isinstance(checkpoint, GGUFCheckpoint)
    stored = checkpoint.model.gguf_name(name) if checkpoint.model else name
    assert stored is not None, name
    tensor = checkpoint.file.tensors[stored]
    size_bytes = tensor.size_bytes
    return Entry(name, tensor.shape, None, tensor.kind, size_bytes, 8 * size_bytes, prod(tensor.shape))


def cache_scales(weights: Weights) -> list[TensorInfo]:
    """The fixed scales of keys and values."""
    tensors = weights.checkpoint.tensors.values()
    return [info for info in tensors if info.name not in weights.shapes and info.name.endswith(CACHE_SCALES)]


def cache_type(weights: Weights) -> str | None:
    """The name of the type that the checkpoint gives its keys and values, or None for none."""
    known = {scheme: name for name, scheme in KV_SCHEMES.items()}
    return known.get(weights.kv, str(weights.kv)) if weights.kv else None


def is_float(dtype: str) -> bool:
    """Whether a type, as safetensors spells it, is one of weights."""
    return dtype.startswith(("F", "BF"))


def tied_pair(checkpoint: Checkpoint) -> tuple[str, str] | None:
    """The names of embedding and head where they are one tensor, else None.

    A config.json that does not say so leaves it to the architecture: a known one without a head has its embedding.
    """
    config = checkpoint.config
    tied = config.get("tie_word_embeddings", text_config(config).get("tie_word_embeddings"))
    kind = str(text_config(config).get("model_type"))
    if not tied and (tied is not None or kind not in ARCHITECTURES):
        return None
    architecture = ARCHITECTURES.get(kind, LLAMA)
    names = []
    for module in (architecture.embedding, architecture.head):
        spellings = architecture.spellings(f"{module}.weight")
        names.append(next((name for name in spellings if name in checkpoint.tensors), spellings[0]))
    if tied is None and (names[0] not in checkpoint.tensors or names[1] in checkpoint.tensors):
        return None
    return names[0], names[1]
