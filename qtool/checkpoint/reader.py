"""A safetensors checkpoint seen through its headers; tensors are read one at a time.

Only safetensors is read: pickle files (`.bin`, `.pt`) can run code. Names from an index are plain file
names, so that no checkpoint can point outside its folder. Header facts need no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.errors import QtoolError, ReadError, UsageError, shown
from qtool.headers import DTYPE_BITS, TensorInfo

if TYPE_CHECKING:
    import numpy as np
    import torch

INDEX = "model.safetensors.index.json"
LONGEST_NAME = 1000
MOST_HEADER_BYTES = 1 << 24  # of one file: about 100 thousand tensors


@dataclass(frozen=True)
class FileIdentity:
    """What tells whether a file is still the same; the time only saves hashing it again."""

    name: str
    size_bytes: int
    mtime_ns: int
    sha256: str


class Checkpoint:
    """A folder of safetensors with its config, or one safetensors file.

    `tensors` maps each name to its header in file order; `config` is {} where there is no config.json.
    Raises QtoolError naming the file when anything is missing, truncated or not safetensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.is_file():
            self.root, self.files = path.parent, [path.name]
        else:
            self.root = path
            self.files, expected = _weight_files(path)
        self.config: dict[str, Any] = _read_json(self.root / "config.json") if path.is_dir() else {}
        self.tensors: dict[str, TensorInfo] = {}
        for file in self.files:
            for info in _read_header(self.root / file):
                if info.name in self.tensors:
                    raise QtoolError(f"tensor `{info.name}` is both in {self.tensors[info.name].file} and in {file}")
                self.tensors[info.name] = info
        if path.is_dir():
            for name, file in expected.items():
                if name not in self.tensors or self.tensors[name].file != file:
                    raise QtoolError(
                        f"{path / INDEX} says that `{name}` is in {file}, but it is not there",
                        "download the checkpoint again: its index and its shards do not belong together",
                    )

    @classmethod
    def from_headers(cls, path: Path, config: dict[str, Any], tensors: Iterable[TensorInfo]) -> Checkpoint:
        """A checkpoint of which only the headers are at hand, such as one on the hub: its values cannot be read."""
        checkpoint = cls.__new__(cls)
        checkpoint.path = checkpoint.root = path
        checkpoint.config = config
        checkpoint.tensors = {info.name: info for info in tensors}
        checkpoint.files = sorted({info.file for info in checkpoint.tensors.values()})
        for info in checkpoint.tensors.values():
            check_name(info.name, path)
            if info.dtype not in DTYPE_BITS:
                raise QtoolError(f"`{info.name}` in {path} has the unknown type {info.dtype}")
        return checkpoint

    @property
    def home(self) -> Path:
        """Where its config and its tokenizer are: the folder, or the file that has all in it."""
        return self.root

    @property
    def own_files(self) -> list[str]:
        """Names of the files that say what it is: those of the weights, and config.json where there is one."""
        return [*self.files, *(["config.json"] if self.config else [])]

    @cached_property
    def size_bytes(self) -> int:
        return sum(info.size_bytes for info in self.tensors.values())

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, copied out of the file."""
        return next(self.read_many([name]))[1]

    def read_small(self, name: str) -> np.ndarray:
        """A small tensor of a type that numpy has, such as a shape: without torch."""
        from safetensors import SafetensorError, safe_open

        path = self.root / self.tensors[name].file
        try:
            with safe_open(path, framework="np") as handle:
                return handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ReadError(f"cannot read {path}: {error}") from None

    def read_many(self, names: Iterable[str], as_float32: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors in the order of the names, in float32 if asked."""
        import torch

        for name, tensor in self.borrow(names):
            yield name, tensor.to(torch.float32 if as_float32 else tensor.dtype, copy=True)

    def borrow(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same without a copy: each tensor lies in the map of its file and is gone when the next is asked for.

        A map counts as memory of the process as far as it was read, so every tensor gets one of its own.
        """
        from safetensors import SafetensorError, safe_open

        for name in names:
            path = self.root / self.tensors[name].file
            try:
                with safe_open(path, framework="pt") as handle:
                    yield name, handle.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise ReadError(f"cannot read {path}: {error}") from None

    borrow_stored = borrow  # as they lie in the file

    def identity(self, known: Iterable[FileIdentity] = (), others: Iterable[str] = ()) -> list[FileIdentity]:
        """Each of its own files and the `others` of the folder, by content.

        A file whose size and time `known` has is not hashed again.
        """
        cache = {(f.name, f.size_bytes, f.mtime_ns): f for f in known}

        def identify(name: str) -> FileIdentity:
            stat = (self.root / name).stat()
            cached = cache.get((name, stat.st_size, stat.st_mtime_ns))
            return cached or FileIdentity(name, stat.st_size, stat.st_mtime_ns, sha256_file(self.root / name))

        names = [*self.own_files, *others]
        with ThreadPoolExecutor(max_workers=2) as pool:
            return list(pool.map(identify, names))


def check_name(name: str, path: Path) -> None:
    """Raises QtoolError for the name of a tensor that could not be shown in a line."""
    if not name.isprintable() or len(name) > LONGEST_NAME:
        raise QtoolError(f"{path} has a tensor of the impossible name `{shown(name)}`")


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _weight_files(root: Path) -> tuple[list[str], dict[str, str]]:
    """The safetensors files of a folder, and what its index says is where."""
    if (root / INDEX).is_file():
        weight_map = _read_json(root / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
            raise QtoolError(f"{root / INDEX} has no `weight_map` of tensor names to files")
        files = sorted(set(weight_map.values()))
        for file in files:
            plain = Path(file).name == file and file.isprintable() and len(file) < 256
            if not plain or not file.endswith(".safetensors"):
                raise QtoolError(
                    f"{root / INDEX} names `{shown(file)}`, which is not a safetensors file of this folder"
                )
        missing = [file for file in files if not (root / file).is_file()]
        if missing:
            some = shown(", ".join(missing[:3]))
            raise QtoolError(
                f"{root / INDEX} names {len(missing)} of {len(files)} files that are missing: {some}",
                "download the checkpoint again",
            )
        return files, weight_map
    files = sorted(p.name for p in root.glob("*.safetensors"))
    if "model.safetensors" in files:
        files = ["model.safetensors"]
    if files:
        return files, {}
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in root.glob(pattern))
    if pickles:
        raise UsageError(
            f"{root} has no safetensors, only {pickles[0]}: pickle files can run code and are not read",
            f'convert it once: `python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{root}').save_pretrained('{root}-safetensors')\"`",
        )
    raise UsageError(f"{root} holds no *.safetensors", "give a folder with a model in safetensors, or a hub id")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise QtoolError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise QtoolError(f"{path} is not a JSON object")
    return value


def _read_header(path: Path) -> Iterator[TensorInfo]:
    from safetensors import SafetensorError, safe_open

    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    if MOST_HEADER_BYTES < header_bytes < path.stat().st_size:
        raise QtoolError(f"{path} has a header of {header_bytes} bytes: at most {MOST_HEADER_BYTES} are read")
    try:
        with safe_open(path, framework="np") as handle:
            for name in handle.offset_keys():
                check_name(name, path)
                tensor = handle.get_slice(name)
                if tensor.get_dtype() not in DTYPE_BITS:
                    raise QtoolError(f"`{name}` in {path} has the unknown type {tensor.get_dtype()}")
                yield TensorInfo(name, tensor.get_dtype(), tuple(tensor.get_shape()), path.name)
    except (SafetensorError, OSError) as error:
        raise QtoolError(
            f"{path} is truncated or not a safetensors file ({path.stat().st_size} bytes): {shown(error)}",
            "download the file again",
        ) from None
