"""Importance matrices of llama.cpp as statistics: the mean square of each input column of a weight, and nothing else.

Two kinds of file. GGUF, since llama.cpp's pull request 9400 (2025): for each weight `<weight>.in_sum2` [1, columns],
sums of squares, and `<weight>.counts` [1, 1], by which they are divided. Before that a stream of little-endian numbers:
i32 entries, and of each i32 length of the weight's name, name, i32 calls, i32 columns, float32 values, to be divided by
the calls; at the end, where it is not left out, i32 chunks, i32 length of the data's name, name.

Weights that read one input (q, k and v) have an entry each, with the same values. The rows of q and k lie in another
order in GGUF than in Hugging Face's checkpoints; their columns do not.

Shapes: I input features.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from qtool.calibration.imatrix import SMALLEST, TYPE, check_architecture, gguf_names
from qtool.calibration.saved import SQUARES, SavedStats
from qtool.checkpoint.reader import Checkpoint, sha256_file
from qtool.errors import QtoolError, ReadError, UsageError
from qtool.gguf.file import MAGIC, GGUFFile
from qtool.models.architectures import config_value

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qtool.calibration.stats import Moments

SUMS, COUNTS = ".in_sum2", ".counts"
MAX_ENTRIES = 1 << 17
MAX_NAME_BYTES, MAX_DATA_BYTES = 255, 4096
HINT = "give what `llama-imatrix` or `qtool calibrate --format imatrix` wrote"
MISSING = {  # what an imatrix does not have of the inputs, by the name under which it is wanted
    "second": "second moments",
    "vectors": "ranges and means",
    "kv": "ranges of keys and values",
    "cross": "cross moments",
}


def open_stats(path: Path, checkpoint: Checkpoint, wanted: Collection[str]) -> SavedStats | ImatrixStats:
    """Statistics of a model's inputs: a folder of `qtool calibrate`, or an imatrix.

    Raises UsageError for what is neither, or has not what is `wanted`; QtoolError for those of another model.
    """
    if path.is_file() or (path.suffix in (".gguf", ".dat", ".imatrix") and not path.is_dir()):
        return ImatrixStats(path, checkpoint.config, wanted)
    return SavedStats(path, checkpoint)


class ImatrixStats:
    """An imatrix, for the model with this config.json. Headers are read at once, values when they are asked for.

    What it has of `SavedStats` does the same; `sha256` is that of the file. It says nothing of tokenizer and model, so
    another model is told only by names and widths. Raises UsageError for a file that is none, or where more is `wanted`
    of the inputs than their squares, and QtoolError for a damaged file.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], wanted: Collection[str] = (SQUARES,)) -> None:
        self.path, self.config = path, config
        if not path.is_file():
            raise UsageError(f"no such file: {path}", f"make it: `qtool calibrate MODEL --format imatrix -o {path}`")
        lacking = [what for kind, what in MISSING.items() if kind in wanted]
        if lacking:
            raise UsageError(
                f"{path} is an imatrix, which has the mean squares of inputs only: no {' and no '.join(lacking)}",
                "`qtool calibrate MODEL -o STATS --hessians` makes them; an imatrix does for `--method rtn`",
            )
        check_architecture(str(config.get("model_type")))
        with path.open("rb") as file:
            is_gguf = file.read(4) == MAGIC
        self._file: _File = _GGUF(path) if is_gguf else _Legacy(path)
        self._weights: dict[str, str] = {}  # by linear, what llama.cpp calls its weight

    @cached_property
    def sha256(self) -> str:
        return sha256_file(self.path)

    def check_inputs(self, columns: Mapping[str, int]) -> None:
        """Raises QtoolError unless these linears, named in full, are in it, with so many input columns."""
        self._weights |= self._translated(list(columns))
        for linear, count in columns.items():
            weight = self._weight(linear)
            if self._file.columns[weight] != count:
                raise self._other(f"`{weight}` has {self._file.columns[weight]} columns, `{linear}` {count} inputs")

    def check_tokenizer(self, sha256: str) -> None:
        """It does not know of what tokens it is."""

    def stats(self, name: str, wanted: Collection[str], device: torch.device | None = None) -> Squares:
        """What is known of the input of the linear `name`, in `device`'s memory.

        Columns without any input get a little importance: a block of them would else have none, and no best scale.
        Raises QtoolError naming the weight for values that no input can have.
        """
        import torch

        assert not set(wanted) & MISSING.keys(), wanted
        weight = self._weight(name)
        sums_I, count = self._file.read(weight)
        bad = int((~torch.isfinite(sums_I) | (sums_I < 0)).sum())
        problem = None
        if bad:
            problem = f"{bad} of its {len(sums_I)} sums of squares are negative or not finite"
        elif not 1 <= count < float("inf"):
            problem = f"its sums are those of {count:g} tokens"
        elif not sums_I.any():
            problem = f"all {len(sums_I)} sums of squares are zero"
        if problem:
            raise QtoolError(
                f"`{weight}` in {self.path} says nothing of its inputs: {problem}", "make the imatrix again"
            )
        square_I = sums_I.double() / count
        square_I = square_I.clamp(min=SMALLEST * float(square_I.mean()))
        return Squares(int(count), square_I.float().to(device))

    def kv(self, block: str) -> NoReturn:
        """An imatrix has none."""
        raise QtoolError(f"{self.path} has no ranges of keys and values of `{block}`")

    def data_record(self) -> dict[str, Any]:
        """What the data was, as far as the file says it."""
        chunks, length = self._file.chunks, self._file.chunk_tokens
        source = self._file.data or self.path.name
        if not length:
            source += " (an imatrix that does not say how long its chunks are)"
        return {"source": source, "rows": chunks, "tokens": chunks * length, "sha256": self.sha256}

    def _weight(self, linear: str) -> str:
        """What llama.cpp calls the weight of a linear. Raises QtoolError when it is not in the file."""
        if linear not in self._weights:
            self._weights |= self._translated([linear])
        weight = self._weights[linear]
        if weight not in self._file.columns:
            raise self._other(f"no `{weight}` is among its {len(self._file.columns)} weights, for `{linear}`")
        return weight

    def _other(self, why: str) -> QtoolError:
        hint = "`qtool calibrate MODEL --format imatrix -o FILE` makes one of this model"
        return QtoolError(f"{self.path} is an imatrix of another model: {why}", hint)

    def _translated(self, linears: list[str]) -> dict[str, str]:
        blocks = config_value(self.config, "num_hidden_layers")
        return gguf_names(linears, str(self.config["model_type"]), int(blocks))


@dataclass(frozen=True)
class Squares:
    """What an imatrix says of one input: E x^2 per column, float32, over so many tokens (or, of old files, calls)."""

    tokens: int
    square_I: Tensor

    def moments(self, name: str) -> Moments:
        """The same as `InputStats.moments` gives, as far as it is known."""
        from qtool.calibration.stats import Moments

        return Moments(None, tokens=self.tokens, square_I=self.square_I)


class _File(Protocol):
    """An imatrix as it lies on disk."""

    columns: dict[str, int]  # of each weight
    data: str  # what it was made from
    chunks: int
    chunk_tokens: int  # 0: not known

    def read(self, weight: str) -> tuple[Tensor, float]:
        """Sums of squares, float32 [I], and what to divide them by."""
        ...


class _GGUF:
    def __init__(self, path: Path) -> None:
        self._file = GGUFFile(path)
        metadata = self._file.metadata
        if metadata.get("general.type") != TYPE:
            kind = str(metadata.get("general.type") or metadata.get("general.architecture") or "something")[:40]
            raise UsageError(f"{path} is a GGUF file of a {kind}, not an imatrix", HINT)
        self.columns = {}
        for name, tensor in self._file.tensors.items():
            if not name.endswith(SUMS):
                continue
            weight = name.removesuffix(SUMS)
            counts = self._file.tensors.get(weight + COUNTS)
            if tensor.kind != "f32" or counts is None or counts.kind != "f32":
                raise QtoolError(f"{path} has no sums and counts of `{weight}` as float32", "make the imatrix again")
            if counts.size_bytes == 4:  # others are those of the experts of a layer
                self.columns[weight] = tensor.size_bytes // 4
        names = metadata.get("imatrix.datasets")
        self.data = ", ".join(str(name)[:200] for name in names[:10]) if isinstance(names, list) else ""
        self.chunks = _natural(metadata.get("imatrix.chunk_count"))
        self.chunk_tokens = _natural(metadata.get("imatrix.chunk_size"))

    def read(self, weight: str) -> tuple[Tensor, float]:
        return self._file.read(weight + SUMS).flatten(), float(self._file.read(weight + COUNTS).flatten()[0])


class _Legacy:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns: dict[str, int] = {}
        self.data, self.chunks, self.chunk_tokens = "", 0, 0
        self._places: dict[str, tuple[int, int]] = {}  # offset and calls
        size = path.stat().st_size
        if not size:
            raise QtoolError(f"{path} is empty, not an imatrix", HINT)
        with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as data:
            self._parse(data)

    def _parse(self, data: mmap.mmap) -> None:
        position = 0

        def error(what: str) -> QtoolError:
            return QtoolError(
                f"{self.path} is damaged or not an imatrix: {what} at byte {position} of {len(data)}", HINT
            )

        def skip(size: int, what: str) -> int:
            nonlocal position
            if not 0 <= size <= len(data) - position:
                raise error(f"{what} of {size} bytes")
            position += size
            return position - size

        def number(what: str, least: int, most: int) -> int:
            found: int = struct.unpack_from("<i", data, skip(4, what))[0]
            if not least <= found <= most:
                raise error(f"{what} {found}")
            return found

        def text(what: str, least: int, most: int) -> str:
            length = number(f"the length of {what}", least, most)
            start = skip(length, what)
            try:
                return data[start : start + length].decode()
            except UnicodeDecodeError:
                raise error(f"{what} that is not UTF-8") from None

        for _ in range(number("the number of entries", 1, MAX_ENTRIES)):
            weight = text("a name", 1, MAX_NAME_BYTES)
            calls = number("the calls", 0, 2**31 - 1)
            columns = number("the columns", 1, 2**31 - 1)
            self._places[weight] = skip(4 * columns, f"`{weight}`"), calls
            self.columns[weight] = columns
        if position < len(data):
            self.chunks = number("the number of chunks", 0, 2**31 - 1)
            self.data = text("the data's name", 0, MAX_DATA_BYTES) if position < len(data) else ""

    def read(self, weight: str) -> tuple[Tensor, float]:
        import numpy as np
        import torch

        offset, calls = self._places[weight]
        columns = self.columns[weight]
        try:
            values = np.fromfile(self.path, "<f4", columns, offset=offset)
        except OSError as error:
            raise ReadError(f"cannot read {self.path}: {error}") from None
        if len(values) != columns:
            raise ReadError(f"{self.path} ends within `{weight}`: it has changed")
        return torch.from_numpy(values), float(calls or 1)


def _natural(value: Any) -> int:
    return value if type(value) is int and value > 0 else 0
