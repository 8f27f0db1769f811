"""Which tokens are fed and which are scored.

windows    one stream of all texts in windows of the context, each token scored once; with a stride shorter
           than the context, windows overlap and a token is scored where it has most context
rows       each text by itself, cut at the context
llama.cpp  as `llama-perplexity` counts: windows that begin with BOS, the second half of each scored
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.calibration.texts import read_texts
from qtool.calibration.tokens import Tokenizer, make_rows, row_length
from qtool.errors import QtoolError, UsageError
from qtool.recipe import EvalSpec


@dataclass(frozen=True)
class EvalRows:
    """Rows of token ids [T]; tokens from `first_scored` on are predicted from those before them and scored."""

    rows: list[Tensor]
    first_scored: list[int]
    sha256: str  # of the ids
    context: int

    @property
    def tokens(self) -> int:
        return sum(len(row) - first for row, first in zip(self.rows, self.first_scored, strict=True))


def eval_rows(spec: EvalSpec, tokenizer: Tokenizer, model_context: int) -> EvalRows:
    """The rows of an evaluation. Raises UsageError for impossible lengths, QtoolError when nothing can be scored."""
    context = row_length(spec.data, model_context)
    stride = context if spec.stride is None else spec.stride
    if not 1 <= stride <= context:
        raise UsageError(f"a stride of {stride} tokens is not between 1 and the context, {context}")
    texts = read_texts(spec.data, "test", tokenizer.render)
    if spec.protocol == "rows":
        rows = [ids[:context] for ids in map(tokenizer.encode, texts) if len(ids) > 1]
        first = [1] * len(rows)
    else:
        text = "\n\n".join(texts)
        if spec.protocol == "llama.cpp":
            stream = tokenizer.encode(text.removesuffix("\n"))
            starts = range(0, len(stream) - context + 1, context)
            rows = [(tokenizer.bos or stream[s : s + 1]) + stream[s + 1 : s + context] for s in starts]
            first = [context // 2 + 1] * len(rows)
        else:
            rows, first = _windows(tokenizer.encode(text), context, stride)
    if spec.data.rows:
        rows, first = rows[: spec.data.rows], first[: spec.data.rows]
    if not rows:
        raise QtoolError(
            f"`{spec.data.source}` gives nothing to score in windows of {context} tokens: it is empty or too short",
            f"give more text or shorter rows (`--seqlen {max(2, context // 4)}`)",
        )
    made = make_rows(rows, spec.data.source)
    return EvalRows(made.rows, first, made.sha256, context)


def _windows(stream: list[int], context: int, stride: int) -> tuple[list[list[int]], list[int]]:
    """Windows and the first token of each that no window before it has scored."""
    rows, first = [], []
    scored = 1  # the very first token has nothing before it
    for start in range(0, max(1, len(stream)), stride):
        end = min(start + context, len(stream))
        if stride == context:  # without overlap the first token of each window is not scored
            scored = start + 1
        if end > scored:
            rows.append(stream[start:end])
            first.append(scored - start)
            scored = end
        if end == len(stream):
            break
    return rows, first


def scored_bytes(row: Tensor, first: int, tokenizer: Tokenizer) -> int:
    """Bytes of the text that the scored tokens of a row stand for."""
    ids: list[int] = row.tolist()
    return max(1, len(tokenizer.decode(ids).encode()) - len(tokenizer.decode(ids[:first]).encode()))


def hidden_positions(row: Tensor, first: int) -> slice:
    """Where the hidden states stand that predict the scored tokens."""
    return slice(first - 1, len(row) - 1)


def targets(row: Tensor, first: int) -> Tensor:
    """The scored tokens."""
    return row[first:].to(torch.long)
