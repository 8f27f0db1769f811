"""Losses per token of a model, and of a second one beside it, block by block.

Memory is one block, dense or packed, one slice of logits, and the hidden states of a portion of the rows: of those
that fit a budget, all; else the blocks are read again for every portion.
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
CPU_BYTES = 1 << 30  # of hidden states of both models; likewise
DEVICE_BYTES = 1 << 33  # where blocks take longer to read than to run
SLICE_LOGITS = 1 << 22  # logits computed at once

Batch = tuple[Tensor, list[int]]  # token ids [B, T], and which rows they are


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
    base_s: float = 0.0  # in those of the baseline


def token_losses(model: BlockModel, base: BlockModel | None, rows: EvalRows, progress: Progress) -> TokenLosses:
    """The losses of `model` on the scored tokens. Raises QtoolError for a loss that is not finite."""
    portions = _portions(model, base, rows)
    step = max(1, SLICE_LOGITS // model.config.vocab_size)
    found: dict[int, dict[str, list[Tensor]]] = {}  # by row, what there is of its tokens
    model_s = base_s = 0.0
    for number, portion in enumerate(portions):
        passes = number, len(portions)
        started = time.perf_counter()
        hidden = _final_hidden(model, rows, portion, "model", passes, progress)
        model_s += time.perf_counter() - started
        started = time.perf_counter()
        base_hidden = _final_hidden(base, rows, portion, "baseline", passes, progress) if base else {}
        base_s += time.perf_counter() - started
        with ExitStack() as stack:
            head = stack.enter_context(model.head())
            base_head = stack.enter_context(base.head()) if base else None
            for index in sorted(hidden):
                first = rows.first_scored[index]
                true = targets(rows.rows[index], first).to(model.device)
                columns = found[index] = {
                    "row": [torch.full((len(true),), index)],
                    "position": [torch.arange(first, first + len(true))],
                }
                for start in range(0, len(true), step):
                    part = slice(start, start + step)
                    logits_SV = head(hidden[index][part])
                    base_SV = base_head(base_hidden[index][part]) if base_head else None
                    _collect(columns, logits_SV, base_SV, true[part])
                progress("score", len(found), len(rows.rows), f"row {index}") if len(found) % 64 == 0 else None
    in_order = [found[index] for index in range(len(rows.rows))]
    joined = {name: torch.cat([part for columns in in_order for part in columns[name]]) for name in in_order[0]}
    for name, column in (("model", "loss"), ("baseline", "base_loss")):
        bad = ~torch.isfinite(joined[column]) if column in joined else torch.zeros(1, dtype=torch.bool)
        if bad.any():
            at = int(bad.nonzero()[0])
            raise QtoolError(
                f"the {name}'s loss is not finite for {int(bad.sum())} of {len(bad)} tokens, "
                f"first in row {int(joined['row'][at])} at token {int(joined['position'][at])}"
            )
    return TokenLosses(**joined, model_s=model_s, base_s=base_s)


def _portions(model: BlockModel, base: BlockModel | None, rows: EvalRows) -> list[list[Batch]]:
    """All batches in as few portions as their hidden states fit memory; how many is nothing to the results."""
    budget = CPU_BYTES if model.device.type == "cpu" else DEVICE_BYTES
    token_bytes = sum(4 * int(x.config.hidden_size) for x in (model, base) if x)
    portions: list[list[Batch]] = [[]]
    filled = 0
    for batch, indexes in batches(rows.rows, BATCH_TOKENS):
        size = batch.numel() * token_bytes
        if filled and filled + size > budget:
            portions.append([])
            filled = 0
        portions[-1].append((batch, indexes))
        filled += size
    return portions


def _final_hidden(
    model: BlockModel, rows: EvalRows, portion: list[Batch], name: str, passes: tuple[int, int], progress: Progress
) -> dict[int, Tensor]:
    """For each row of a portion, the hidden states [T, E] after the last block that predict its scored tokens."""
    before, total = (len(model.blocks) * count for count in passes)
    stream = model.start(batch for batch, _ in portion)
    for index in range(len(model.blocks)):
        with model.block(index) as block:
            for batch in range(len(stream.hidden)):
                stream.hidden[batch] = model.run(block, index, stream, batch)
        progress(f"evaluate {name}", before + index + 1, total, model.block_name(index))
    result: dict[int, Tensor] = {}
    for hidden_BTE, (_, indexes) in zip(stream.hidden, portion, strict=True):
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
