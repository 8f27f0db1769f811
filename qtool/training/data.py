"""Rows to train on: texts packed one after the other, positions from 0 again where another begins.

Whole documents are held out, every so many of them, so that nothing of a text is trained on before it is measured;
where a source has too few documents for that (one long file), its last rows are. Shapes: T tokens of a row.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.calibration.texts import is_local, read_texts
from qtool.calibration.tokens import Tokenizer, TokenRows, row_length
from qtool.checkpoint.writer import counted
from qtool.errors import QtoolError
from qtool.recipe import DataSpec
from qtool.training.options import HELD_OUT_SHARE, MOST_ROWS

Row = tuple[list[int], list[int]]  # token ids and positions, [T] each


@dataclass(frozen=True)
class TrainingRows:
    """Rows of token ids with the position of each token in its document's part of the row, [T] each.

    Rows named in `held_out` are not in `training`.
    """

    rows: list[Tensor]
    positions: list[Tensor]
    training: list[int]
    held_out: list[int]
    source: str
    sha256: str  # of ids and positions

    def calibration(self, count: int) -> TokenRows:
        """Some of the rows that are trained on, evenly spaced."""
        there = len(self.training)
        chosen = [self.training[i * there // count] for i in range(count)] if count < there else self.training
        return TokenRows([self.rows[i] for i in chosen], self.source, self.sha256)

    @property
    def tokens(self) -> int:
        return sum(len(self.rows[i]) for i in self.training)


def training_rows(spec: DataSpec, held_out: int | None, tokenizer: Tokenizer, context: int) -> TrainingRows:
    """At most `spec.rows` rows; `held_out` of them, or a sixteenth, are kept from training.

    Raises QtoolError when there is not at least one row to train on, and one to keep.
    """
    seqlen = row_length(spec, context)
    wanted = spec.rows or (None if is_local(spec) else MOST_ROWS)
    documents = (tokenizer.encode(text) for text in read_texts(spec, "train", tokenizer.render))
    every = max(2, wanted // held_out) if wanted and held_out else HELD_OUT_SHARE
    trained, kept = _Rows(seqlen, spec.pack), _Rows(seqlen, spec.pack)
    for number, ids in enumerate(documents):
        (kept if number % every == every - 1 else trained).add(ids)
        if not is_local(spec) and wanted and min(len(trained.rows), every * len(kept.rows)) >= wanted:
            break
    there = len(trained.rows) + len(kept.rows)
    total = min(wanted or there, there)
    count = max(1, total // HELD_OUT_SHARE) if held_out is None else held_out
    to_keep = _some(kept.rows, count, spec.seed)
    first = len(trained.rows) - (count - len(to_keep))  # too few documents: the last rows are held out
    if first < 1 or not 0 < count < total:
        raise QtoolError(
            f"`{spec.source}` gives {counted(total, 'row')} of {seqlen} tokens: too few to keep {count} for the "
            "held-out loss and train on others",
            f"give more text, shorter rows (`--seqlen {max(2, seqlen // 4)}`), or one row per text (`--no-pack`)",
        )
    to_keep = [*to_keep, *trained.rows[first:]]
    to_train = _some(trained.rows[:first], total - count, spec.seed)
    rows = [*to_train, *to_keep]
    return TrainingRows(
        [torch.tensor(ids, dtype=torch.long) for ids, _ in rows],
        [torch.tensor(positions, dtype=torch.long) for _, positions in rows],
        list(range(len(to_train))),
        list(range(len(to_train), len(rows))),
        spec.source,
        hashlib.sha256(repr(rows).encode()).hexdigest(),
    )


class _Rows:
    """Rows that fill up with documents; packed, what does not fill the last one is left out."""

    def __init__(self, seqlen: int, pack: bool) -> None:
        self.seqlen, self.pack = seqlen, pack
        self.rows: list[Row] = []
        self._ids: list[int] = []
        self._positions: list[int] = []

    def add(self, ids: list[int]) -> None:
        if not self.pack:
            if len(ids) > 1:
                self.rows.append((ids[: self.seqlen], list(range(len(ids[: self.seqlen])))))
            return
        start = 0
        while start < len(ids):
            part = ids[start : start + self.seqlen - len(self._ids)]
            start += len(part)
            self._ids += part
            self._positions += range(len(part))
            if len(self._ids) == self.seqlen:
                self.rows.append((self._ids, self._positions))
                self._ids, self._positions = [], []


def _some(rows: list[Row], count: int, seed: int) -> list[Row]:
    """So many of the rows, in their order."""
    if len(rows) <= count:
        return rows
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]
    return [rows[i] for i in sorted(chosen.tolist())]
