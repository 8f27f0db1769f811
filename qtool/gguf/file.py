"""A GGUF file: typed keys, tensor headers, then the tensors. The container of llama.cpp (ggml, docs/gguf.md).

Read without trust: every count and length is held against what is left of the file before anything is allocated.
Versions 2 and 3, little-endian. Never imports torch before a tensor is read.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.errors import QtoolError, ReadError, UsageError
from qtool.headers import TensorInfo
from qtool.scheme import BLOCK_TYPES, FLOATS, MXFP4_BLOCK, BlockType

if TYPE_CHECKING:
    import numpy as np
    import torch

Metadata = dict[str, Any]  # in the order of the file

MAGIC = b"GGUF"
ALIGNMENT = 32  # of tensors, where general.alignment says nothing else
MAX_ALIGNMENT = 1 << 20
MAX_HEADER_BYTES = 1 << 27  # a vocabulary of 262144 tokens takes 15 MB
MAX_ENTRIES = 1 << 17  # keys, or tensors
MAX_ITEMS = 1 << 24  # of one array
MAX_NAME_BYTES = 255
MAX_DIMENSIONS = 4

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # of struct
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
KINDS = FLOATS | BLOCK_TYPES | {"mxfp4": MXFP4_BLOCK}  # tensor types that are read and written
KIND_OF = {block.number: kind for kind, block in KINDS.items()}
SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")  # as llama.cpp's gguf-split names its parts


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor's header. `kind` is a key of KINDS, or the name in capitals of a type that is not read.

    `shape` is that of the weights, in torch's order (a file has it reversed); `offset` counts from the file's begin.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int
    file: str = ""

    @property
    def info(self) -> TensorInfo:
        """How it is read: floats as they are; of blocks the bytes of each row, [..., rows, row_bytes]."""
        if self.kind in FLOATS:
            return TensorInfo(self.name, self.kind.upper(), self.shape, self.file)
        rows = self.shape[:-1]
        return TensorInfo(self.name, "U8", (*rows, self.size_bytes // prod(rows)), self.file)


class GGUFFile:
    """The header of a GGUF file, or of all parts of a split one, given the first; tensors are read one at a time.

    `metadata` is that of the first part without its split.* keys. Raises QtoolError naming the file and what is
    wrong in it, UsageError for a part that is not the first.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata, found = _read_header(path)
        self.tensors = {tensor.name: tensor for tensor in found}
        parts = _other_parts(path, self.metadata)
        self.files = [path.name, *(part.name for part in parts)]
        for number, part in enumerate(parts, 1):
            metadata, found = _read_header(part)
            if metadata.get("split.no") != number or metadata.get("split.count") != len(self.files):
                raise QtoolError(f"{part} does not belong to {path.name}", "download it again")
            for tensor in found:
                if first := self.tensors.get(tensor.name):
                    raise QtoolError(f"tensor `{tensor.name}` is both in {first.file} and in {part}")
                self.tensors[tensor.name] = tensor
        expected = self.metadata.get("split.tensors.count", len(self.tensors))
        if parts and expected != len(self.tensors):
            raise QtoolError(
                f"the {len(self.files)} parts of {path} hold {len(self.tensors)} tensors, not {expected}",
                "download them again: they do not belong together",
            )
        self.metadata = {key: value for key, value in self.metadata.items() if key not in SPLIT_KEYS}

    def read(self, name: str) -> torch.Tensor:
        """The tensor as its `info` says, in a map of its own: pages are read as they are used, gone with the tensor.

        Raises QtoolError for a type that is not read, ReadError when the file has gone or shrunk.
        """
        import torch

        info = self.tensors[name].info
        dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
        return torch.from_numpy(self.read_bytes(name)).view(dtypes[info.dtype]).reshape(info.shape)

    def read_bytes(self, name: str) -> np.ndarray:
        """Its bytes, without torch."""
        import numpy as np

        tensor = self.tensors[name]
        path = self.path.parent / tensor.file
        if tensor.kind not in KINDS:
            raise QtoolError(
                f"`{name}` in {path} is {tensor.kind}, a type that is not read", f"these are: {', '.join(KINDS)}"
            )
        try:
            return np.memmap(path, np.uint8, "c", tensor.offset, (tensor.size_bytes,))
        except (OSError, ValueError) as error:
            raise ReadError(f"cannot read {path}: {error}") from None

    def read_rows(self, name: str, rows: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """A copy of some rows; no more of the file is read."""
        return self.read(name)[rows]


def header_bytes(
    metadata: Metadata, tensors: Iterable[tuple[str, str, tuple[int, ...]]], alignment: int = ALIGNMENT
) -> tuple[bytes, dict[str, int], int]:
    """All of a file before its tensors, the offset of each in the file, and the file's size.

    `tensors` are name, kind and shape in torch's order. Types of values: bool BOOL, int UINT32, float FLOAT32,
    str STRING; lists of them arrays, of INT32 for int; an empty list is one of strings. general.alignment is that of
    this file, whatever `metadata` says. Raises QtoolError naming a value that does not fit its type.
    """
    metadata = {key: value for key, value in metadata.items() if key != "general.alignment"}
    if alignment != ALIGNMENT:
        metadata["general.alignment"] = alignment
    tensors = list(tensors)
    parts = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        try:
            parts += [_string(key), _typed(value)]
        except (struct.error, OverflowError, UnicodeError) as error:
            raise QtoolError(f"`{key}` = {str(value)[:80]!r} cannot be stored in a GGUF file: {error}") from None
    offsets: dict[str, int] = {}
    position = 0
    for name, kind, shape in tensors:
        assert name not in offsets, name
        assert prod(shape[-1:]) % KINDS[kind].weights == 0, (name, kind, shape)
        offsets[name] = position
        numbers = struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), KINDS[kind].number, position)
        parts += [_string(name), numbers]
        position += _padded(_size_bytes(shape, KINDS[kind]), alignment)
    header = b"".join(parts)
    header += bytes(_padded(len(header), alignment) - len(header))
    return header, {name: len(header) + offset for name, offset in offsets.items()}, len(header) + position


def _typed(value: Any) -> bytes:
    """A value of the metadata behind its type."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, bool | int | float):
        number = BOOL if isinstance(value, bool) else UINT32 if isinstance(value, int) else FLOAT32
        return struct.pack(f"<I{NUMBERS[number]}", number, value)
    head = value[0] if value else ""
    assert all(isinstance(item, type(head)) for item in value), f"a list of mixed types: {value[:10]}"
    if isinstance(head, str):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_string, value))
    number = BOOL if isinstance(head, bool) else INT32 if isinstance(head, int) else FLOAT32
    return struct.pack(f"<IIQ{len(value)}{NUMBERS[number]}", ARRAY, number, len(value), *value)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _size_bytes(shape: tuple[int, ...], block: BlockType) -> int:
    return prod(shape) // block.weights * block.size_bytes


def _other_parts(path: Path, metadata: Metadata) -> list[Path]:
    """The files beside the first part of a split model; [] for one that is not split."""
    count = metadata.get("split.count", 1)
    if count in (0, 1):
        return []
    match = PART.fullmatch(path.name)
    if type(count) is not int or match is None or int(match[3]) != count:
        raise QtoolError(
            f"{path} is one of {str(count)[:40]!r} parts, but its name does not say so, as in -00001-of-00003.gguf",
            "give all parts the names they had",
        )
    paths = [path.with_name(f"{match[1]}-{number:05}-of-{match[3]}.gguf") for number in range(1, count + 1)]
    if path != paths[0] or metadata.get("split.no") != 0:
        raise UsageError(f"{path} is not the first of its {count} parts", f"give {paths[0]}")
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        raise QtoolError(
            f"{path} has {count} parts, of which {len(missing)} are missing: {', '.join(missing[:3])}",
            "download them into the same folder",
        )
    return paths[1:]


def _read_header(path: Path) -> tuple[Metadata, list[GGUFTensor]]:
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if size < 24:
                raise QtoolError(f"{path} is truncated or not a GGUF file ({size} bytes)", "download the file again")
            with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as data:
                return _Header(path, data).read()
    except (OSError, ValueError) as error:
        raise QtoolError(f"cannot read {path}: {error}") from None


class _Header:
    """A parser that walks over the bytes of a header once."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data = path, data
        self.position = 0
        self.end = min(len(data), MAX_HEADER_BYTES)

    def read(self) -> tuple[Metadata, list[GGUFTensor]]:
        magic = self.data[:4]
        if magic != MAGIC:
            raise QtoolError(f"{self.path} is not a GGUF file: it begins with {magic!r}")
        self.position = 4
        version = self.number("I")
        if version & 0xFFFF == 0 and version:
            raise QtoolError(
                f"{self.path} is a big-endian GGUF file: these are not read", "convert it again without it"
            )
        if version not in (2, 3):
            raise QtoolError(f"{self.path} has version {version} of GGUF; 2 and 3 are read", "convert the model again")
        counts = [self.number("Q"), self.number("Q")]
        for count, what in zip(counts, ("tensors", "keys"), strict=True):
            if count > MAX_ENTRIES:
                raise self.error(f"{count} {what}")
        metadata: Metadata = {}
        for _ in range(counts[1]):
            key = self.name(metadata)
            metadata[key] = self.value(key)
        headers: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(counts[0]):
            name = self.name(headers)
            dimensions = self.number("I")
            if dimensions > MAX_DIMENSIONS:
                raise self.error(f"`{name}` with {dimensions} dimensions")
            headers[name] = (self.numbers("Q", dimensions)[::-1], self.number("I"), self.number("Q"))
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self.error(f"the alignment {str(alignment)[:40]!r}")
        start = _padded(self.position, alignment)
        tensors = [self.tensor(name, *header, start, alignment) for name, header in headers.items()]
        self.check_apart(tensors)
        return metadata, tensors

    def tensor(
        self, name: str, shape: tuple[int, ...], number: int, offset: int, start: int, alignment: int
    ) -> GGUFTensor:
        if number in KIND_OF:
            kind = KIND_OF[number]
            block = KINDS[kind]
        else:
            kind, block = self.unread(name, number)
        row = shape[-1] if shape else 1
        if 0 in shape or row % block.weights:
            raise self.error(f"`{name}` of the shape {shape} in blocks of {block.weights} {kind}")
        size = _size_bytes(shape, block)
        if offset % alignment or start + offset + size > len(self.data):
            raise self.error(f"`{name}` of {size} bytes at {start} + {offset}, aligned to {alignment}")
        return GGUFTensor(name, kind, shape, start + offset, size, self.path.name)

    def unread(self, name: str, number: int) -> tuple[str, BlockType]:
        """Name and size of a type that we only pass over."""
        from gguf.constants import GGML_QUANT_SIZES

        for kind, (weights, size_bytes) in GGML_QUANT_SIZES.items():
            if kind == number:
                return kind.name, BlockType(number, 0, weights, size_bytes)
        raise self.error(f"`{name}` of the unknown type {number}")

    def check_apart(self, tensors: list[GGUFTensor]) -> None:
        end = 0
        for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
            if tensor.offset < end:
                raise self.error(f"`{tensor.name}` in the place of another tensor")
            end = tensor.offset + tensor.size_bytes

    def name(self, taken: Iterable[str]) -> str:
        """A key or a tensor's name, which must be new."""
        name = self.string(MAX_NAME_BYTES)
        if not name.isprintable() or name in taken:
            raise self.error(f"the name {name!r}" + (" twice" if name in taken else ""))
        return name

    def value(self, key: str) -> Any:
        number = self.number("I")
        if number == STRING:
            return self.string()
        if number in NUMBERS:
            return self.number(NUMBERS[number])
        if number != ARRAY:
            raise self.error(f"`{key}` of the unknown type {number}")
        item, count = self.number("I"), self.number("Q")
        if count > MAX_ITEMS:
            raise self.error(f"`{key}` of {count} items")
        if item == STRING:
            self.need(8 * count)
            return [self.string() for _ in range(count)]
        if item not in NUMBERS:
            raise self.error(f"`{key}`, an array of {'arrays' if item == ARRAY else f'the unknown type {item}'}")
        return list(self.numbers(NUMBERS[item], count))

    def string(self, limit: int = MAX_HEADER_BYTES) -> str:
        data, begin = self.data, self.position + 8
        if begin > self.end:
            self.need(8)
        (length,) = _LENGTH(data, self.position)
        self.position = begin + length
        if length > limit or self.position > self.end:
            raise self.error(f"a string of {length} bytes", begin)
        try:
            return str(data[begin : self.position], "utf-8")
        except UnicodeDecodeError:
            raise self.error("a string that is not UTF-8", begin) from None

    def number(self, code: str) -> Any:
        return self.numbers(code, 1)[0]

    def numbers(self, code: str, count: int) -> tuple[Any, ...]:
        form = f"<{count}{code}"
        size = struct.calcsize(form)
        self.need(size)
        self.position += size
        return struct.unpack_from(form, self.data, self.position - size)

    def need(self, size: int) -> None:
        if size > self.end - self.position:
            raise self.error(f"{size} bytes to read and {self.end - self.position} left")

    def error(self, what: str, position: int | None = None) -> QtoolError:
        at = self.position if position is None else position
        return QtoolError(
            f"{self.path} is damaged or truncated ({len(self.data)} bytes): its header has {what} at byte {at}",
            "download the file again",
        )


_LENGTH = struct.Struct("<Q").unpack_from
