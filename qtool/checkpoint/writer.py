"""Writing a checkpoint that is whole or absent, and resumable at the last finished unit.

Everything is staged in `OUT.partial/` beside OUT. All tensors are known beforehand, so each file gets its
header and its full size at once (a full disk is found here) and tensors go straight to their place. The
journal advances only after a unit's bytes are on disk. At the end the folder is renamed. What a file looks
like is its container's business: safetensors here, GGUF in `qtool.gguf.container`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from qtool.checkpoint.reader import INDEX
from qtool.errors import QtoolError
from qtool.headers import DTYPE_BITS, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

JOURNAL = "journal.jsonl"
SCRATCH = "scratch"
MANIFEST = "manifest.json"
SHARD_BYTES = 5_000_000_000


class FileLayout(NamedTuple):
    """A file before its tensors: what stands before the first, where each begins, and its full size."""

    header: bytes
    offsets: dict[str, int]
    size_bytes: int


class Container(Protocol):
    """How tensors lie in files."""

    def stored(self, info: TensorInfo) -> TensorInfo | str:
        """How a tensor of the source that stays unquantized stands there, or why it is left out."""
        ...

    def files(self, tensors: list[TensorInfo]) -> dict[str, TensorInfo]:
        """The tensors in the order in which they lie, by name, each with its file."""
        ...

    def encode(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor as it lies there."""
        ...

    def decode(self, name: str, tensor: Tensor) -> Tensor:
        """What a reader makes of a tensor that lies there: the inverse of `encode`, up to rounding."""
        ...

    def lay_out(self, tensors: list[TensorInfo]) -> FileLayout:
        """One file with these tensors."""
        ...


class Safetensors:
    """The container of most formats: shards of at most 5 GB."""

    def stored(self, info: TensorInfo) -> TensorInfo:
        return info

    def files(self, tensors: list[TensorInfo]) -> dict[str, TensorInfo]:
        shards: list[list[TensorInfo]] = [[]]
        filled = 0
        for info in tensors:
            if filled and filled + info.size_bytes > SHARD_BYTES:
                shards.append([])
                filled = 0
            shards[-1].append(info)
            filled += info.size_bytes
        total = len(shards)
        result = {}
        for number, shard in enumerate(shards, 1):
            file = "model.safetensors" if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"
            # safetensors wants each tensor aligned to its own type: wide types first
            for info in sorted(shard, key=lambda i: (-DTYPE_BITS[i.dtype], i.name)):
                result[info.name] = replace(info, file=file)
        return result

    def encode(self, name: str, tensor: Tensor) -> Tensor:
        return tensor

    decode = encode

    def lay_out(self, tensors: list[TensorInfo]) -> FileLayout:
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for info in tensors:
            end = position + info.size_bytes
            entries[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [position, end]}
            position = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        offsets = {info.name: len(header) + entries[info.name]["data_offsets"][0] for info in tensors}
        return FileLayout(header, offsets, len(header) + position)


def partial_path(out: Path) -> Path:
    return out.parent / (out.name + ".partial")


def replaced_path(out: Path) -> Path:
    """Where an older output stands for the moment between two renames."""
    return out.parent / (out.name + ".replaced")


class StagedOutput:
    """The folder under construction. `done` maps each finished unit to the record it left."""

    def __init__(
        self,
        out: Path,
        tensors: Mapping[str, TensorInfo],
        identity: Mapping[str, Any],
        force: bool,
        container: Container | None = None,
    ) -> None:
        self.out, self.tensors, self.container = out, tensors, container or Safetensors()
        self.folder = partial_path(out)
        self.done: dict[str, dict[str, Any]] = {}
        members: dict[str, list[TensorInfo]] = {}
        for info in tensors.values():
            members.setdefault(info.file, []).append(info)
        self._layouts = {self.folder / file: self.container.lay_out(infos) for file, infos in members.items()}
        journal = self.folder / JOURNAL
        if self.folder.exists():
            lines = _journal_lines(journal)
            if not journal.exists() and any(self.folder.iterdir()):
                raise QtoolError(
                    f"{self.folder} is where the output is staged, but holds something else", "move it away"
                )
            if lines and lines[0] == {"identity": identity} and self._whole():
                self.done = {line["unit"]: line["record"] for line in lines[1:]}
                whole = journal.with_suffix(".new")  # without a last line that was cut off
                whole.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
                whole.replace(journal)
                return
            if len(lines) > 1 and not force:
                done = counted(len(lines) - 1, "unit")
                raise QtoolError(
                    f"{self.folder} holds an interrupted run of another recipe or source ({done} done)",
                    "run that command again to finish it, or discard it with --force",
                )
            shutil.rmtree(self.folder)
        self._create(identity)

    def write(self, name: str, tensor: Tensor) -> str:
        """Put a tensor in its place; the sha256 of its bytes there."""
        info = self.tensors[name]
        path = self.folder / info.file
        tensor = self.container.encode(name, tensor)
        data = raw_bytes(tensor)
        assert (tuple(tensor.shape), data.nbytes) == (info.shape, info.size_bytes), (name, tensor.shape, info)
        with path.open("r+b") as file:
            file.seek(self._layouts[path].offsets[name])
            file.write(data)
        return hashlib.sha256(data).hexdigest()

    def finish_unit(self, unit: str, record: dict[str, Any]) -> None:
        """Everything written so far is safe on disk, and so is the fact that this unit is done."""
        for path in self._layouts:
            fsync(path)
        with (self.folder / JOURNAL).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"unit": unit, "record": record}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.done[unit] = record

    def write_index(self) -> None:
        """The index that says which shard holds what; none for a single file."""
        if len(self._layouts) > 1:
            size = sum(info.size_bytes for info in self.tensors.values())
            weight_map = {name: info.file for name, info in sorted(self.tensors.items())}
            write_json(self.folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})

    def copy_files(self, files: Iterable[Path]) -> None:
        for path in files:
            shutil.copyfile(path, self.folder / path.name)

    def discard(self) -> None:
        """Throw away what was staged."""
        shutil.rmtree(self.folder)

    @property
    def scratch(self) -> Path:
        """A folder for what an interrupted run needs to go on, and the output does not have: gone once it is there."""
        folder = self.folder / SCRATCH
        folder.mkdir(exist_ok=True)
        return folder

    def files(self) -> list[Path]:
        """What the output will hold besides its manifest."""
        own = {self.folder / name for name in (JOURNAL, MANIFEST, SCRATCH)}
        found = [path for path in self.folder.iterdir() if path not in own]
        return sorted(p for path in found for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())

    def publish(self, manifest: Mapping[str, Any]) -> None:
        """Manifest last, then the rename that makes the output appear."""
        write_json(self.folder / MANIFEST, manifest)
        for path in [*self.files(), self.folder / MANIFEST]:
            fsync(path)
        shutil.rmtree(self.folder / SCRATCH, ignore_errors=True)
        fsync(self.folder)
        replaced = replaced_path(self.out)
        if self.out.exists():
            if replaced.exists():
                shutil.rmtree(replaced)
            self.out.rename(replaced)
        self.folder.rename(self.out)
        (self.out / JOURNAL).unlink()  # only now: until the rename a crash must find it
        fsync(self.out.parent)
        if replaced.exists():
            shutil.rmtree(replaced)

    def _whole(self) -> bool:
        """Whether every shard is there in its full size."""
        return all(path.is_file() and path.stat().st_size == x.size_bytes for path, x in self._layouts.items())

    def _create(self, identity: Mapping[str, Any]) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        needed = sum(layout.size_bytes for layout in self._layouts.values())
        free = shutil.disk_usage(self.folder.parent).free
        try:
            if free < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.folder.mkdir()
            with (self.folder / JOURNAL).open("w", encoding="utf-8") as file:
                file.write(json.dumps({"identity": identity}) + "\n")
            for path, layout in self._layouts.items():
                with path.open("wb") as file:
                    if hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(file.fileno(), 0, layout.size_bytes)
                    else:
                        file.truncate(layout.size_bytes)
                    file.write(layout.header)
        except OSError as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            if error.errno != errno.ENOSPC:
                raise
            raise QtoolError(
                f"no space for {self.out}: it needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free",
                "free some space or give another -o/--output; nothing was written",
            ) from None


def raw_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes as safetensors stores them, without a copy where it is on the CPU already."""
    import torch

    # reshaped first: a tensor of one element counts as contiguous whatever its strides are
    return tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data


def counted(count: int, what: str) -> str:
    """1 unit, 2 units."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _journal_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; a last line that was cut off does not count."""
    lines = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
    return lines


def fsync(path: Path) -> None:
    """A file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
