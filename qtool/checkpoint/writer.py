"""Writing a checkpoint that is whole or absent, and resumable at the last finished unit.

Everything is staged in `OUT.partial/` beside OUT. All tensors are known beforehand, so each shard gets its
header and its full size at once (a full disk is found here) and tensors go straight to their place. The
journal advances only after a unit's bytes are on disk. At the end the folder is renamed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.checkpoint.reader import INDEX
from qtool.errors import QtoolError
from qtool.headers import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

JOURNAL = "journal.jsonl"
MANIFEST = "manifest.json"


def partial_path(out: Path) -> Path:
    return out.parent / (out.name + ".partial")


def replaced_path(out: Path) -> Path:
    """Where an older output stands for the moment between two renames."""
    return out.parent / (out.name + ".replaced")


class StagedOutput:
    """The folder under construction. `done` maps each finished unit to the record it left."""

    def __init__(self, out: Path, tensors: Mapping[str, TensorInfo], identity: Mapping[str, Any], force: bool) -> None:
        self.out, self.tensors = out, tensors
        self.folder = partial_path(out)
        self.done: dict[str, dict[str, Any]] = {}
        self._offsets: dict[str, tuple[Path, int]] = {}
        self._headers = dict(self._lay_out())
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
                raise QtoolError(
                    f"{self.folder} holds an interrupted run of another recipe or source ({len(lines) - 1} units done)",
                    "run that command again to finish it, or discard it with --force",
                )
            shutil.rmtree(self.folder)
        self._create(identity)

    def write(self, name: str, tensor: Tensor) -> str:
        """Put a tensor in its place; its sha256."""
        path, offset = self._offsets[name]
        info = self.tensors[name]
        data = raw_bytes(tensor)
        assert (tuple(tensor.shape), data.nbytes) == (info.shape, info.size_bytes), (name, tensor.shape, info)
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(data)
        return hashlib.sha256(data).hexdigest()

    def finish_unit(self, unit: str, record: dict[str, Any]) -> None:
        """Everything written so far is safe on disk, and so is the fact that this unit is done."""
        for path in self._headers:
            _fsync(path)
        with (self.folder / JOURNAL).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"unit": unit, "record": record}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.done[unit] = record

    def write_index(self) -> None:
        """The index that says which shard holds what; none for a single file."""
        if len(self._headers) > 1:
            size = sum(info.size_bytes for info in self.tensors.values())
            weight_map = {name: info.file for name, info in sorted(self.tensors.items())}
            write_json(self.folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})

    def copy_files(self, files: Iterable[Path]) -> None:
        for path in files:
            shutil.copyfile(path, self.folder / path.name)

    def discard(self) -> None:
        """Throw away what was staged."""
        shutil.rmtree(self.folder)

    def files(self) -> list[Path]:
        """What the output will hold besides its manifest."""
        return sorted(p for p in self.folder.iterdir() if p.name not in (JOURNAL, MANIFEST))

    def publish(self, manifest: Mapping[str, Any]) -> None:
        """Manifest last, then the rename that makes the output appear."""
        write_json(self.folder / MANIFEST, manifest)
        for path in self.folder.iterdir():
            _fsync(path)
        _fsync(self.folder)
        replaced = replaced_path(self.out)
        if self.out.exists():
            if replaced.exists():
                shutil.rmtree(replaced)
            self.out.rename(replaced)
        self.folder.rename(self.out)
        (self.out / JOURNAL).unlink()  # only now: until the rename a crash must find it
        _fsync(self.out.parent)
        if replaced.exists():
            shutil.rmtree(replaced)

    def _whole(self) -> bool:
        """Whether every shard is there in its full size."""
        return all(path.is_file() and path.stat().st_size == size for path, (_, size) in self._headers.items())

    def _lay_out(self) -> Iterable[tuple[Path, tuple[bytes, int]]]:
        """Header and full size of each shard; notes where each tensor goes."""
        shards: dict[str, list[TensorInfo]] = {}
        for info in self.tensors.values():
            shards.setdefault(info.file, []).append(info)
        for file, members in shards.items():
            entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            position = 0
            for info in members:
                end = position + info.size_bytes
                entries[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [position, end]}
                position = end
            text = json.dumps(entries, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            header = len(text).to_bytes(8, "little") + text
            path = self.folder / file
            for info in members:
                self._offsets[info.name] = (path, len(header) + entries[info.name]["data_offsets"][0])
            yield path, (header, len(header) + position)

    def _create(self, identity: Mapping[str, Any]) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        needed = sum(size for _, size in self._headers.values())
        free = shutil.disk_usage(self.folder.parent).free
        try:
            if free < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.folder.mkdir()
            with (self.folder / JOURNAL).open("w", encoding="utf-8") as file:
                file.write(json.dumps({"identity": identity}) + "\n")
            for path, (header, size) in self._headers.items():
                with path.open("wb") as file:
                    if hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(file.fileno(), 0, size)
                    else:
                        file.truncate(size)
                    file.write(header)
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


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
