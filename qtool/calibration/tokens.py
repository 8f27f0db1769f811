"""Texts to rows of token ids, as the model expects them.

Whether a text starts with BOS is what the tokenizer itself does; a row cut from a longer stream has none
of its own. Shapes: T tokens of a row.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool.calibration.texts import is_local, read_texts
from qtool.errors import QtoolError, UsageError
from qtool.models.loading import load_tokenizer
from qtool.recipe import DataSpec

DEFAULT_ROWS = 128
LONGEST_DEFAULT = 2048  # tokens of a row, however long the model's context is
TOKENS_PER_INPUT = 4  # calibration tokens per input feature below which a second moment is poorly known


class Tokenizer:
    """A model's tokenizer: ids with BOS where the model expects it, and no EOS."""

    def __init__(self, root: Path, vocabulary: int) -> None:
        self.home, self.vocabulary = root, vocabulary
        try:
            self.inner: Any = load_tokenizer(root)
        except Exception as error:  # tokenizers raises nothing more exact for a damaged tokenizer.json
            if isinstance(error, QtoolError):
                raise
            raise QtoolError(
                f"{root} has no tokenizer that transformers can load: {' '.join(str(error).split())[:200]}",
                "copy the model's tokenizer files beside its weights",
            ) from None
        tokens = self.inner.vocab_size  # of added ones Gemma 3 has one more than its embedding
        if tokens > vocabulary:
            raise QtoolError(
                f"the tokenizer in {root} has {tokens} tokens, but the model's embedding {vocabulary} rows",
                "copy the tokenizer files that came with the model",
            )
        self.name = f"{type(self.inner).__name__} ({len(self.inner)} tokens)"
        with_special = self.inner("a")["input_ids"]
        self.adds_bos = bool(with_special) and with_special[0] == self.inner.bos_token_id is not None
        self.bos: list[int] = [self.inner.bos_token_id] if self.adds_bos else []

    @cached_property
    def sha256(self) -> str:
        """Identifies the vocabulary: the same ids mean the same text."""
        vocabulary = sorted(self.inner.get_vocab().items(), key=lambda item: item[1])
        return hashlib.sha256(repr(vocabulary).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        ids = self.inner(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids if self.bos and ids[:1] == self.bos else [*self.bos, *ids]  # a chat template may write its own

    def decode(self, ids: list[int]) -> str:
        return str(self.inner.decode(ids, skip_special_tokens=True))

    def render(self, messages: list[dict[str, str]]) -> str:
        """Chat messages as the model's own template writes them."""
        if not self.inner.chat_template:
            raise UsageError(
                "the data holds chat messages, but the model's tokenizer has no chat template", "name a text column"
            )
        try:
            return str(self.inner.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # a template is code of the checkpoint and may raise anything
            raise UsageError(f"the model's chat template does not take these messages: {error}") from None


@dataclass(frozen=True)
class TokenRows:
    """Rows of token ids [T] each, and where they came from."""

    rows: list[Tensor]
    source: str
    sha256: str  # of the ids: the same text under the same tokenizer

    @property
    def tokens(self) -> int:
        return sum(len(row) for row in self.rows)

    def record(self) -> dict[str, Any]:
        """What a report says of them."""
        return {"source": self.source, "rows": len(self.rows), "tokens": self.tokens, "sha256": self.sha256}


def calibration_rows(spec: DataSpec, tokenizer: Tokenizer, context: int) -> TokenRows:
    """Rows to calibrate with: packed windows, or the beginning of each text. Raises QtoolError when there is none."""
    seqlen = row_length(spec, context)
    wanted = spec.rows or DEFAULT_ROWS
    ids = (tokenizer.encode(text) for text in read_texts(spec, "train", tokenizer.render))
    made = _packed(ids, seqlen) if spec.pack else (row[:seqlen] for row in ids if len(row) > 1)
    # of a data set, which may have no end, the first rows; of what is here, a choice among all
    rows = list(made if is_local(spec) else itertools.islice(made, wanted))
    if not rows:
        raise QtoolError(
            f"`{spec.source}` gives no row of {seqlen} tokens: it is empty or too short",
            f"give more text, shorter rows (`--seqlen {max(2, seqlen // 4)}`), or one row per text (`--no-pack`)",
        )
    if len(rows) > wanted:
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(spec.seed))[:wanted]
        rows = [rows[i] for i in sorted(chosen.tolist())]
    return make_rows(rows, spec.source)


def row_length(spec: DataSpec, context: int) -> int:
    """Tokens per row: as asked, else the model's context up to 2048."""
    if spec.seqlen is None:
        return min(context, LONGEST_DEFAULT)
    if not 2 <= spec.seqlen <= context:
        raise UsageError(f"rows of {spec.seqlen} tokens do not fit the model: its context is {context}")
    return spec.seqlen


def make_rows(rows: list[list[int]], source: str) -> TokenRows:
    digest = hashlib.sha256(repr(rows).encode()).hexdigest()
    return TokenRows([torch.tensor(row, dtype=torch.long) for row in rows], source, digest)


def too_little_data(tokens: int, inputs: int, seqlen: int) -> str | None:
    """What to say when there are too few tokens for a layer of so many inputs, with the number that would do."""
    enough = TOKENS_PER_INPUT * inputs
    if tokens >= enough:
        return None
    return (
        f"{tokens} calibration tokens are few for layers of {inputs} inputs: "
        f"{enough} would do (`--rows {-(-enough // seqlen)}` of {seqlen} tokens)"
    )


def batches(rows: list[Tensor], batch_tokens: int) -> Iterator[tuple[Tensor, list[int]]]:
    """Batches [B, T] of rows of equal length with at most `batch_tokens` tokens, and the indexes of their rows."""
    by_length: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(index)
    for length, members in sorted(by_length.items()):
        size = max(1, batch_tokens // length)
        for start in range(0, len(members), size):
            indexes = members[start : start + size]
            yield torch.stack([rows[i] for i in indexes]), indexes


def _packed(texts: Iterable[list[int]], seqlen: int) -> Iterator[list[int]]:
    """Windows of one stream of all texts; what does not fill the last one is left out."""
    stream: list[int] = []
    for ids in texts:
        stream += ids
        full = len(stream) // seqlen * seqlen
        yield from (stream[i : i + seqlen] for i in range(0, full, seqlen))
        stream = stream[full:]
