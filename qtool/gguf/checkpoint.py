"""A GGUF file as if it were a Hugging Face checkpoint: names, order of rows, values of norms and config."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qtool.checkpoint.reader import Checkpoint
from qtool.errors import QtoolError, UsageError
from qtool.gguf.architectures import ARCHITECTURES
from qtool.gguf.container import decode
from qtool.gguf.file import PART, GGUFFile
from qtool.gguf.model import GGUFModel, config_of
from qtool.gguf.rope import TENSORS as FACTORS
from qtool.headers import TensorInfo
from qtool.scheme import FLOATS

if TYPE_CHECKING:
    import numpy as np
    import torch

PREFERRED = "model.gguf"
QUANTIZATION = {"quant_method": "gguf"}
BESIDE_A_MODEL = re.compile("mmproj|imatrix", re.IGNORECASE)  # GGUF files that are no model, by their usual names


class GGUFCheckpoint(Checkpoint):
    """A .gguf file (of a split one the first part), or a folder with one model in it.

    `tensors` are in file order under their Hugging Face names; what is stored in blocks is U8 [rows, row_bytes], and
    `kinds` says of what type: a key of qtool.scheme.BLOCK_TYPES, "mxfp4", or in capitals a type that is not read.
    `config` is what config.json would say, and `metadata` what the file does. Of an architecture that is not known,
    or has experts, the config names only that, and tensors keep the names that they have in the file. Raises
    QtoolError naming a damaged file or a tensor that its architecture has not, UsageError when a folder has not
    exactly one model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = GGUFFile(_model_file(path) if path.is_dir() else path)
        self.root, self.files, self.metadata = self.file.path.parent, self.file.files, self.file.metadata
        self.model: GGUFModel | None = None
        architecture = self.metadata.get("general.architecture")
        self.config = {"gguf_architecture": "unknown"}
        if isinstance(architecture, str) and architecture.isprintable():
            self.config = {"gguf_architecture": architecture[:80]}
        is_model = self.metadata.get("general.type", "model") == "model"  # others are adapters, an imatrix, ...
        experts = self.metadata.get(f"{architecture}.expert_count")
        if is_model and not experts and architecture in [known.name for known in ARCHITECTURES.values()]:
            self.config = config_of(self.metadata, list(self.file.tensors), self._factors())
            self.model = GGUFModel.of_config(self.config)
            shapes = {self.model.hf_name(x.name) or x.name: x.shape for x in self.file.tensors.values()}
            if problem := self.model.problem(shapes, "the GGUF file"):
                raise QtoolError(f"{self.file.path}: {problem}")
        self.config = {**self.config, "quantization_config": QUANTIZATION}
        self.tensors: dict[str, TensorInfo] = {}
        self.kinds: dict[str, str] = {}
        for tensor in self.file.tensors.values():
            name = self.model.hf_name(tensor.name) if self.model else tensor.name
            if name is None:  # factors of the rotary embedding: the config has them
                continue
            self.tensors[name] = TensorInfo(name, tensor.info.dtype, tensor.info.shape, tensor.file)
            if tensor.kind not in FLOATS:
                self.kinds[name] = tensor.kind
                if self.model and self.model.offset(name):
                    raise QtoolError(f"`{tensor.name}` in {self.file.path} is a norm in blocks of {tensor.kind}")

    def _factors(self) -> dict[str, np.ndarray]:
        """By what the file divides frequencies of the rotary embedding."""
        import numpy as np

        found = [tensor for name, tensor in self.file.tensors.items() if name in FACTORS and tensor.kind == "f32"]
        return {x.name: self.file.read_bytes(x.name).view(np.float32).reshape(x.shape) for x in found}

    def borrow(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors as Hugging Face has them, also the rows of those in blocks; with no copy where that is possible."""
        for name, tensor in self.borrow_stored(names):
            yield name, decode(self.model, name, tensor) if self.model else tensor

    def borrow_stored(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors exactly as they lie in the file; also under other spellings of their names."""
        for name in names:
            stored = self.model.gguf_name(name) if self.model else name
            assert stored is not None, name
            yield name, self.file.read(stored)

    def read_small(self, name: str) -> np.ndarray:
        return self.read(name).numpy()

    @property
    def home(self) -> Path:
        return self.file.path

    @property
    def own_files(self) -> list[str]:
        return self.files


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`: a GGUF file, a folder with one and no safetensors, or what Checkpoint reads."""
    if path.is_dir():
        is_gguf = any(path.glob("*.gguf")) and not any(path.glob("*.safetensors"))
    else:
        is_gguf = path.suffix == ".gguf"
    return GGUFCheckpoint(path) if is_gguf else Checkpoint(path)


def _model_file(folder: Path) -> Path:
    """The one model of a folder."""
    paths = sorted(path for path in folder.glob("*.gguf") if not BESIDE_A_MODEL.search(path.name))
    paths = [path for path in paths if not (part := PART.fullmatch(path.name)) or int(part[2]) == 1]
    if folder / PREFERRED in paths:
        return folder / PREFERRED
    if not paths:
        raise UsageError(f"{folder} holds no *.gguf with a model or the first part of one")
    if len(paths) > 1:
        names = ", ".join(path.name for path in paths[:4])
        raise UsageError(f"{folder} holds {len(paths)} models as GGUF: {names}", f"give one of them: {paths[0]}")
    return paths[0]
