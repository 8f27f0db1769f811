"""Teachers: what another model says of the training rows, and of what it holds in memory for that.

HiddenTeacher   its final hidden states, cached, and its head: exact distributions, without its blocks
TopKTeacher     the top of its distributions, cached in files: nothing of the model itself
LiveTeacher     the whole model, which also shows its states inside

The first two run the model once over all rows, block by block. Caches in a folder are made in parts: an interrupted
run goes on after the last whole part, and what is there already is not made again, so that one process makes them and
others then open them.

Shapes: B rows of a batch, T tokens, S tokens asked for, E hidden size, V vocabulary, K tokens kept.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qtool.calibration.tokens import batches
from qtool.checkpoint.writer import write_json
from qtool.errors import QtoolError
from qtool.models.blockwise import BlockModel
from qtool.models.whole import States, WholeModel
from qtool.training.losses import TopK, slice_tokens, top_k

Progress = Callable[[str, int, int, str], None]
BATCH_TOKENS = 4096  # that run through a block at once; speed and memory only
PORTION_BYTES = 1 << 30  # of hidden states on their way through the blocks; likewise, and the size of a part
MEMORY_BYTES = 4 << 30  # of cached hidden states, beyond which they go to a file

TOP = ("ids", "log_p", "log_tail")

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """Rows by their numbers, padded on the right to T tokens, and the blocks whose states are wanted."""

    indexes: list[int]
    tokens_BT: Tensor
    positions_BT: Tensor | None = None
    hidden: Sequence[int] = ()  # of their outputs
    attention: Sequence[int] = ()  # of those of their attention


@dataclass(frozen=True)
class Answer:
    """What a teacher says of a batch. `distribution` takes places [S] in the batch laid out as B T tokens."""

    distribution: Callable[[Tensor], Tensor | TopK]  # logits [S, V], or their top
    states: States | None = None


class Teacher(Protocol):
    """`temperature` is the one that its distributions are for, or None for any."""

    temperature: float | None

    def answer(self, batch: Batch) -> Answer: ...


class LiveTeacher:
    """A model in memory, in the precision that surrounds it."""

    temperature: float | None = None

    def __init__(self, model: WholeModel) -> None:
        self.model = model.requires_grad_(False)

    def answer(self, batch: Batch) -> Answer:
        with torch.no_grad(), self.model.watch(batch.hidden, batch.attention) as states:
            hidden_FE = self.model.hidden(batch.tokens_BT, batch.positions_BT).flatten(0, 1)

        def logits(places_S: Tensor) -> Tensor:
            with torch.no_grad():
                return self.model.logits(hidden_FE[places_S])

        return Answer(logits, states)


class HiddenTeacher:
    """`model` runs once over the rows; of it only the head stays in memory, until `close`."""

    temperature: float | None = None

    def __init__(
        self,
        model: BlockModel,
        rows: Sequence[Tensor],
        positions: Sequence[Tensor] | None = None,
        *,
        folder: Path | None = None,
        identity: str = "",
        memory_bytes: int = MEMORY_BYTES,
        progress: Progress = lambda *_: None,
    ) -> None:
        """States of up to `memory_bytes` stay in memory, more go to `folder`; 0: all do.

        `identity` names the model. Raises QtoolError where they fit nowhere, or the folder is of something else.
        """
        size_bytes = 4 * sum(map(len, rows)) * int(model.config.hidden_size)
        if size_bytes > memory_bytes and folder is None:
            raise QtoolError(
                f"the teacher's hidden states take {size_bytes / 2**30:.1f} GiB, more than {memory_bytes / 2**30:.1f}",
                "train with fewer rows",
            )
        where = folder if size_bytes > memory_bytes else None
        self.cache = _Cache(where, model, rows, positions, f"hidden {identity}", ("hidden",))
        self.cache.fill(model, lambda hidden_TE: {"hidden": hidden_TE}, progress)
        self.device = model.device
        self._stack = ExitStack()
        self._head = self._stack.enter_context(model.head())

    def close(self) -> None:
        """The head is dropped."""
        self._stack.close()

    def answer(self, batch: Batch) -> Answer:
        hidden_FE = self.cache.batch(batch)["hidden"]

        def logits(places_S: Tensor) -> Tensor:
            chosen_SE = hidden_FE[places_S.to(hidden_FE.device)].to(self.device)
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                return self._head(chosen_SE)

        return Answer(logits)


class TopKTeacher:
    """The K most likely tokens at one temperature and the mass of all others, in files; the model is let go."""

    def __init__(
        self,
        model: BlockModel,
        rows: Sequence[Tensor],
        positions: Sequence[Tensor] | None = None,
        *,
        k: int,
        folder: Path,
        temperature: float = 1.0,
        vocabulary: int | None = None,
        identity: str = "",
        progress: Progress = lambda *_: None,
    ) -> None:
        """`vocabulary` is the student's, where it may be the shorter one; `identity` names the model.

        Raises QtoolError where the folder is of something else.
        """
        self.temperature: float | None = temperature
        size = int(model.config.vocab_size)
        self.vocabulary = min(size, vocabulary or size)
        step = slice_tokens(model.device, size)

        def top(hidden_TE: Tensor) -> Tensors:
            tops = [top_k(head(part_SE)[:, : self.vocabulary], k, temperature) for part_SE in hidden_TE.split(step)]
            parts = ([t.ids_SK.int() for t in tops], [t.log_p_SK for t in tops], [t.log_tail_S for t in tops])
            return {name: torch.cat(part) for name, part in zip(TOP, parts, strict=True)}

        self.cache = _Cache(
            folder, model, rows, positions, f"top {k} of {self.vocabulary} at {temperature} {identity}", TOP
        )
        with model.head() as head:
            self.cache.fill(model, top, progress)

    def answer(self, batch: Batch) -> Answer:
        kept = self.cache.batch(batch)

        def tops(places_S: Tensor) -> TopK:
            ids_SK, log_p_SK, log_tail_S = (kept[name][places_S.cpu()].to(places_S.device) for name in TOP)
            return TopK(ids_SK.long(), log_p_SK, log_tail_S, self.vocabulary)

        return Answer(tops)


class _Cache:
    """Tensors [T, ...] of each row, in memory or in a folder: a file for every portion of rows, and what they are."""

    def __init__(
        self,
        folder: Path | None,
        model: BlockModel,
        rows: Sequence[Tensor],
        positions: Sequence[Tensor] | None,
        identity: str,
        names: tuple[str, ...],
    ) -> None:
        self.folder, self.rows, self.positions, self.names = folder, rows, positions, names
        self._memory: dict[int, Tensors] = {}
        token_bytes = 4 * int(model.config.hidden_size) + (max(map(len, rows)) if positions else 0)  # state, and mask
        self.firsts, filled = [0], 0  # the rows with which portions begin
        self._starts: list[int] = []  # the tokens of its portion with which each row begins
        for index, row in enumerate(rows):
            if filled and (filled + len(row)) * token_bytes > PORTION_BYTES:
                self.firsts.append(index)
                filled = 0
            self._starts.append(filled)
            filled += len(row)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._check(folder / "cache.json", {"of": identity, "rows": _digest(rows, positions), "parts": self.firsts})

    def fill(self, model: BlockModel, keep: Callable[[Tensor], Tensors], progress: Progress) -> None:
        """What `keep` makes of the final hidden states [T, E] of each row, for all portions that are not there yet."""
        ends = [*self.firsts[1:], len(self.rows)]
        for number, (first, end) in enumerate(zip(self.firsts, ends, strict=True)):
            if self.folder is not None and self._file(first).exists():
                continue
            made: dict[int, Tensors] = {}
            for index, hidden_TE in self._final_hidden(model, range(first, end), number, progress):
                with torch.no_grad():
                    made[index] = {name: tensor.cpu() for name, tensor in keep(hidden_TE).items()}
            if self.folder is None:
                self._memory.update(made)
            else:
                self._write(first, [made[index] for index in range(first, end)])

    def batch(self, batch: Batch) -> Tensors:
        """The tensors of these rows [B T, ...], with zeros for the padding."""
        found = [self._memory[index] if self.folder is None else self._read(index) for index in batch.indexes]
        length = batch.tokens_BT.shape[1]
        return {name: torch.cat([_padded(tensors[name], length) for tensors in found]) for name in found[0]}

    def _final_hidden(
        self, model: BlockModel, indexes: range, portion: int, progress: Progress
    ) -> Iterator[tuple[int, Tensor]]:
        """The hidden states [T, E] that leave the last block, for each row of a portion."""
        rows = list(batches([self.rows[i] for i in indexes], BATCH_TOKENS))
        members = [[indexes[i] for i in inside] for _, inside in rows]
        given = self.positions
        positions = None if given is None else [torch.stack([given[i] for i in inside]) for inside in members]
        stream = model.start([tokens_BT for tokens_BT, _ in rows], positions)
        blocks = len(model.blocks)
        for index in range(blocks):
            with model.block(index) as block:
                for batch in range(len(stream.hidden)):
                    stream.hidden[batch] = model.run(block, index, stream, batch)
            progress("teacher", portion * blocks + index + 1, len(self.firsts) * blocks, model.block_name(index))
        for batch, inside in enumerate(members):
            yield from zip(inside, stream.hidden[batch], strict=True)

    def _file(self, first: int) -> Path:
        assert self.folder
        return self.folder / f"rows-{first:08}.safetensors"

    def _write(self, first: int, rows: list[Tensors]) -> None:
        """One file, there as a whole or not at all."""
        path = self._file(first)
        staged = path.with_suffix(".partial")
        save_file({name: torch.cat([tensors[name] for tensors in rows]) for name in self.names}, staged)
        with staged.open("rb") as file:
            os.fsync(file.fileno())
        staged.rename(path)

    def _read(self, index: int) -> Tensors:
        first = self.firsts[bisect_right(self.firsts, index) - 1]
        start = self._starts[index]
        with safe_open(self._file(first), framework="pt") as file:
            return {name: file.get_slice(name)[start : start + len(self.rows[index])] for name in self.names}

    @staticmethod
    def _check(path: Path, identity: Mapping[str, object]) -> None:
        """Raises QtoolError where the folder was begun for something else."""
        if not path.exists():
            staged = path.with_suffix(".partial")
            write_json(staged, identity)
            staged.rename(path)
        elif json.loads(path.read_text(encoding="utf-8")) != identity:
            raise QtoolError(f"{path.parent} holds what another teacher says, or of other rows", "remove that folder")


def _padded(tensor: Tensor, length: int) -> Tensor:
    """[T, ...] -> [length, ...] with zeros after it."""
    missing = tensor.new_zeros(length - len(tensor), *tensor.shape[1:])
    return torch.cat([tensor, missing]) if len(missing) else tensor


def _digest(rows: Sequence[Tensor], positions: Sequence[Tensor] | None) -> str:
    listed = [row.tolist() for row in rows], [row.tolist() for row in positions or ()]
    return hashlib.sha256(repr(listed).encode()).hexdigest()
