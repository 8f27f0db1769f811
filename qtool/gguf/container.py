"""What a GGUF file makes of the tensors of a plan: its header, their order of rows and their types."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

from qtool.checkpoint.writer import FileLayout
from qtool.errors import UsageError
from qtool.gguf.file import ALIGNMENT, KINDS, Metadata, header_bytes
from qtool.gguf.model import GGUFModel
from qtool.headers import WEIGHT_DTYPES, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

FILE = "model.gguf"
PHI3 = re.compile("(phi)-?(3)", re.IGNORECASE)  # a file with such a name llama.cpp loads only with these tokens
PHI3_TOKENS = {"<s>", "</s>", "<unk>", "<|endoftext|>"}


class GGUFContainer:
    """One file for the whole model: llama.cpp reads any size.

    `metadata` is all that the file says of the model. What is slow to find of it comes from `tokenizer`, when it is
    first asked for. `kinds` is the type of each matrix in blocks, by Hugging Face name with `.weight`: a key of
    qtool.scheme.BLOCK_TYPES or "mxfp4". Such a tensor is U8 [out, row_bytes] in the plan. All else is a float tensor:
    what has one dimension is F32, as llama.cpp computes with it, and a matrix stays as it is.
    """

    def __init__(
        self,
        model: GGUFModel,
        metadata: Metadata,
        kinds: Mapping[str, str],
        tokenizer: Callable[[], Metadata] = dict,
    ) -> None:
        self.model, self._metadata, self.kinds, self._tokenizer = model, metadata, kinds, tokenizer

    def with_kinds(self, kinds: Mapping[str, str]) -> GGUFContainer:
        """The same file with these matrices in blocks."""
        return GGUFContainer(self.model, self._metadata, kinds, self._tokenizer)

    @cached_property
    def metadata(self) -> Metadata:
        """The keys of the file. Raises what `tokenizer` does."""
        keys = {**self._metadata, **self._tokenizer()}
        if "general.name" in keys and not set(keys.get("tokenizer.ggml.tokens", ())) >= PHI3_TOKENS:
            keys["general.name"] = PHI3.sub(r"\1 \2", keys["general.name"])
        return keys

    def stored(self, info: TensorInfo) -> TensorInfo | str:
        """How a tensor of the source that is not quantized stands in the file, or why the file leaves it out.

        Raises UsageError for one that llama.cpp does not know, or of a type that it does not compute with.
        """
        if why := self.model.left_out(info.name):
            return why
        self._name(info)
        if info.dtype not in WEIGHT_DTYPES:
            raise UsageError(f"`{info.name}` is {info.dtype}: GGUF files hold {', '.join(WEIGHT_DTYPES)} and blocks")
        dtype = "F32" if len(info.shape) == 1 else info.dtype
        return TensorInfo(info.name, dtype, info.shape, info.file)

    def files(self, tensors: list[TensorInfo]) -> dict[str, TensorInfo]:
        """The tensors in the order in which they lie, by name, each with its file."""
        return {info.name: replace(info, file=FILE) for info in tensors}

    def encode(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the plan as the file has it: rows in llama.cpp's order, vectors in float32, with their offset."""
        import torch

        order = self.model.row_order(name, len(tensor))
        if order is not None:
            tensor = tensor[torch.tensor(order, device=tensor.device)]
        if tensor.dim() == 1:
            tensor = tensor.float() + self.model.offset(name)
        return tensor

    def decode(self, name: str, tensor: Tensor) -> Tensor:
        return decode(self.model, name, tensor)

    def lay_out(self, tensors: list[TensorInfo]) -> FileLayout:
        """The file with these tensors. What llama.cpp has besides (frequencies of the rotary embedding) lies first.

        Raises UsageError naming a tensor that llama.cpp does not know, and what `tokenizer` raises.
        """
        extra = self.model.extra()
        names = {info.name: self._name(info) for info in tensors}
        own = [(name, "f32", array.shape) for name, array in extra.items()]
        planned = [(names[info.name], *self._kind(info)) for info in tensors]
        header, offsets, size_bytes = header_bytes(self.metadata, own + planned)
        for array in extra.values():
            data = array.astype("<f4").tobytes()
            header += data + bytes(-len(data) % ALIGNMENT)
        return FileLayout(header, {name: offsets[in_file] for name, in_file in names.items()}, size_bytes)

    def _name(self, info: TensorInfo) -> str:
        name = self.model.gguf_name(info.name)
        if name is None:
            raise UsageError(f"llama.cpp has no place for `{info.name}` in this {self.model.architecture}")
        return name

    def _kind(self, info: TensorInfo) -> tuple[str, tuple[int, ...]]:
        """Type of a tensor, and the shape of its weights."""
        kind = self.kinds.get(info.name, info.dtype.lower())
        block = KINDS[kind]
        if info.dtype != "U8":
            return kind, info.shape
        *rows, row_bytes = info.shape
        return kind, (*rows, row_bytes // block.size_bytes * block.weights)


def decode(model: GGUFModel, name: str, tensor: Tensor) -> Tensor:
    """What lies in a file under llama.cpp's order of rows, as Hugging Face has it."""
    import torch

    order = model.row_order(name, prod(tensor.shape[:1]))
    if order is not None:
        tensor = tensor[torch.tensor(order, device=tensor.device).argsort()]
    offset = model.offset(name)
    return tensor - offset if offset else tensor
