"""Checkpoints of a training run: tensors in safetensors files, and `state.json`, which names the ones that count.

It is replaced in one step after they are on disk, so that a run killed at any moment goes on from the last one. The
tensors are whole, however many processes share them, and are written one at a time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from qtool.checkpoint.writer import Safetensors, fsync, raw_bytes, write_json
from qtool.errors import QtoolError
from qtool.headers import TensorInfo
from qtool.training.world import World

STATE = "state.json"


class Checkpoints:
    """The checkpoints of one run in `folder`. `run` is what the run is: those of another one are refused."""

    def __init__(self, folder: Path, run: str, world: World) -> None:
        self.folder, self.run, self.world = folder, run, world
        folder.mkdir(parents=True, exist_ok=True)
        self.state = self._read_state()  # of the last checkpoint; empty: none
        world.barrier()  # all have read it

    @property
    def step(self) -> int | None:
        """The step of the last checkpoint, if there is one."""
        return self.state.get("step")

    def write(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """A checkpoint: float32 tensors, and a state with its `step` and the best one in its `curve`."""
        self._write(_file(state["step"]), tensors)
        self.state = {"run": self.run, **state}
        if self.world.main:
            new = self.folder / f"{STATE}.new"
            write_json(new, self.state)
            fsync(new)
            new.replace(self.folder / STATE)
            fsync(self.folder)
            self._remove_all_but(self._needed())

    def write_best(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """The tensors of the best step; it does not count before a checkpoint names it."""
        self._write(_best(step), tensors)
        if self.world.main:
            self._remove_all_but({_best(step), *self._needed()})

    def read(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Fill the tensors from the checkpoint of that step."""
        self._read(_file(step), tensors)

    def read_best(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        self._read(_best(step), tensors)

    def _write(self, file: str, tensors: Mapping[str, Tensor]) -> None:
        layout = Safetensors().lay_out([TensorInfo(name, "F32", tuple(t.shape)) for name, t in tensors.items()])
        path = self.folder / file if self.world.main else Path(os.devnull)
        with path.open("wb") as out:
            out.write(layout.header)
            for tensor in tensors.values():
                whole = self.world.full(tensor)
                if self.world.main:
                    assert whole.dtype == torch.float32, whole.dtype
                    out.write(raw_bytes(whole))
        if self.world.main:
            fsync(path)
        self.world.barrier()

    def _read(self, file: str, tensors: Mapping[str, Tensor]) -> None:
        with safe_open(self.folder / file, framework="pt") as stored:
            for name, tensor in tensors.items():
                self.world.put(tensor, stored.get_tensor(name))

    def _needed(self) -> set[str]:
        """The files of the last checkpoint."""
        return {_file(self.state["step"]), _best(self.state["curve"]["best_step"])} if self.state else set()

    def _remove_all_but(self, files: set[str]) -> None:
        for path in self.folder.glob("*.safetensors"):
            if path.name not in files:
                path.unlink()

    def _read_state(self) -> dict[str, Any]:
        path = self.folder / STATE
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if state and state["run"] != self.run:
            raise QtoolError(f"{self.folder} holds a training with other options or rows", f"remove {self.folder}")
        return state


def _file(step: int) -> str:
    return f"step-{step}.safetensors"


def _best(step: int) -> str:
    return f"best-{step}.safetensors"
