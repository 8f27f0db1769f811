"""Losses per token of a model, and of a second one beside it, block by block.

Memory is one block, the hidden states of all rows (per model) and one slice of logits, dense or packed.
Shapes: N scored tokens, S tokens of a slice, V vocabulary, E hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.calibration.tokens import batches
from qtool.errors import QtoolError
from qtool.evaluation.protocols import EvalRows, hidden_positions, targets
from qtool.models.blockwise import BlockModel

Progress = Callable[[str, int, int, str], None]
BATCH_TOKENS = 4096  # that run through a block at once; speed and memory only
SLICE_LOGITS = 1 << 22  # logits computed at once


@dataclass(frozen=True)
class TokenLosses:
    """Per scored token, float64 [N], in row order; what compares two models is None for one alone."""

    row: Tensor  # int64: which row
    position: Tensor  # int64: which token of the row
    loss: Tensor  # nats
    base_loss: Tensor | None = None
    kl: Tensor | None = None  # KL(base || model), nats
    agree: Tensor | None = None  # 1 where both have the same most likely token
    delta_p: Tensor | None = None  # change of the true token's probability
    model_s: float = 0.0  # time in the blocks of the model, without the baseline


def token_losses(model: BlockModel, base: BlockModel | None, rows: EvalRows, progress: Progress) -> TokenLosses:
    """The losses of `model` on the scored tokens. Raises QtoolError for a loss that is not finite."""
    started = time.perf_counter()
    hidden = _final_hidden(model, rows, "model", progress)
    model_s = time.perf_counter() - started
    base_hidden = _final_hidden(base, rows, "baseline", progress) if base else None
    columns: dict[str, list[Tensor]] = {}
    with ExitStack() as stack:
        head = stack.enter_context(model.head())
        base_head = stack.enter_context(base.head()) if base else None
        step = max(1, SLICE_LOGITS // model.config.vocab_size)
        for index, (row, first) in enumerate(zip(rows.rows, rows.first_scored, strict=True)):
            true = targets(row, first).to(model.device)
            for start in range(0, len(true), step):
                part = slice(start, start + step)
                logits_SV = head(hidden[index][part])
                base_SV = base_head(base_hidden[index][part]) if base_head and base_hidden else None
                _collect(columns, logits_SV, base_SV, true[part])
            columns.setdefault("row", []).append(torch.full((len(true),), index))
            columns.setdefault("position", []).append(torch.arange(first, first + len(true)))
            progress("score", index + 1, len(rows.rows), f"row {index}") if index % 64 == 63 else None
    joined = {name: torch.cat(parts) for name, parts in columns.items()}
    for name, column in (("model", "loss"), ("baseline", "base_loss")):
        bad = ~torch.isfinite(joined[column]) if column in joined else torch.zeros(1, dtype=torch.bool)
        if bad.any():
            at = int(bad.nonzero()[0])
            raise QtoolError(
                f"the {name}'s loss is not finite for {int(bad.sum())} of {len(bad)} tokens, "
                f"first in row {int(joined['row'][at])} at token {int(joined['position'][at])}"
            )
    return TokenLosses(**joined, model_s=model_s)


def _final_hidden(model: BlockModel, rows: EvalRows, name: str, progress: Progress) -> list[Tensor]:
    """For each row, the hidden states [T, E] after the last block that predict its scored tokens."""
    order: list[list[int]] = []

    def feed() -> list[Tensor]:
        tokens = []
        for batch, indexes in batches(rows.rows, BATCH_TOKENS):
            tokens.append(batch)
            order.append(indexes)
        return tokens

    stream = model.start(feed())
    for index in range(len(model.blocks)):
        with model.block(index) as block:
            for batch in range(len(stream.hidden)):
                stream.hidden[batch] = model.run(block, index, stream, batch)
        progress(f"evaluate {name}", index + 1, len(model.blocks), model.block_name(index))
    result: list[Tensor] = [torch.empty(0)] * len(rows.rows)
    for hidden_BTE, indexes in zip(stream.hidden, order, strict=True):
        for hidden_TE, i in zip(hidden_BTE, indexes, strict=True):
            result[i] = hidden_TE[hidden_positions(rows.rows[i], rows.first_scored[i])]
    return result


def _collect(columns: dict[str, list[Tensor]], logits_SV: Tensor, base_SV: Tensor | None, true_S: Tensor) -> None:
    """Add one slice of tokens to the columns."""

    def add(name: str, values_S: Tensor) -> None:
        columns.setdefault(name, []).append(values_S.cpu().double())

    log_p_SV = logits_SV.float().log_softmax(-1)
    log_p_S = log_p_SV.gather(1, true_S[:, None])[:, 0]
    add("loss", -log_p_S)
    if base_SV is not None:
        base_log_p_SV = base_SV.float().log_softmax(-1)
        base_log_p_S = base_log_p_SV.gather(1, true_S[:, None])[:, 0]
        add("base_loss", -base_log_p_S)
        add("agree", log_p_SV.argmax(-1) == base_log_p_SV.argmax(-1))
        add("delta_p", log_p_S.exp() - base_log_p_S.exp())
        add("kl", (base_log_p_SV.exp() * (base_log_p_SV - log_p_SV)).sum(-1).clamp_(min=0))
