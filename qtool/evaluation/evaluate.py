"""One evaluation: a model, optionally beside a baseline, on one data set under one protocol."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qtool.calibration.tokens import Tokenizer
from qtool.errors import UsageError
from qtool.evaluation import statistics
from qtool.evaluation.losses import Progress, TokenLosses, token_losses
from qtool.evaluation.protocols import EvalRows, eval_rows, scored_bytes
from qtool.evaluation.statistics import Estimate
from qtool.formats.adapter import Adapted
from qtool.formats.weights import Weights
from qtool.gguf.checkpoint import open_checkpoint
from qtool.gguf.file import Metadata
from qtool.gguf.tokenizer import same_vocabulary, tokenizer_of
from qtool.memory import return_freed_memory
from qtool.models.blockwise import BlockModel, pick_device
from qtool.recipe import EvalSpec
from qtool.report.model import peak_memory_bytes

WORST_PLACES = 10
CONTEXT_TOKENS = 12  # shown before each of the worst places


@dataclass(frozen=True)
class WorstPlace:
    """A token whose distribution changed most."""

    row: int
    position: int
    kl: float
    context: str
    token: str


@dataclass(frozen=True)
class Comparison:
    """The model against its baseline, paired token by token; divergences in nats per token."""

    baseline: str
    perplexity: Estimate  # of the baseline
    delta: Estimate  # of the perplexity
    relative_increase: Estimate
    delta_nats: Estimate
    kl: Estimate
    kl_percentiles: dict[str, float]
    top1_agreement: Estimate
    rms_delta_p: float
    worst: list[WorstPlace]
    tokens_per_s: float = 0.0  # of the baseline


@dataclass(frozen=True)
class Evaluation:
    """What was measured and on what."""

    model: str
    data: str
    data_sha256: str  # of the token rows
    protocol: str
    context: int
    stride: int | None
    tokenizer: str
    rows: int
    tokens: int
    perplexity: Estimate
    bits_per_byte: float
    tokens_per_s: float
    wall_s: float
    peak_memory_bytes: int
    comparison: Comparison | None

    def to_tree(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    path: Path, base_path: Path | None, spec: EvalSpec, device: str, progress: Progress, adapter: Path | None = None
) -> Evaluation:
    """Measure the model in `path`, dense or packed, with the LoRA adapter beside it, beside the one in `base_path`.

    Raises UsageError when the two do not take the same tokens.
    """
    started = time.perf_counter()
    return_freed_memory()
    target = pick_device(device)
    model = _open(path, target, adapter)
    tokenizer = Tokenizer(model.home, model.config.vocab_size)
    context = model.context
    base = None
    if base_path:
        base = _open(base_path, target)
        base_tokenizer = Tokenizer(base.home, base.config.vocab_size)
        tokenizer = common_tokenizer(tokenizer, base_tokenizer)
        if base.config.vocab_size != model.config.vocab_size:
            raise UsageError(f"{path} predicts {model.config.vocab_size} tokens, {base_path} {base.config.vocab_size}")
        context = min(context, base.context)
    rows = eval_rows(spec, tokenizer, context)
    losses = token_losses(model, base, rows, progress)
    size = sum(scored_bytes(row, first, tokenizer) for row, first in zip(rows.rows, rows.first_scored, strict=True))
    return Evaluation(
        model=str(path),
        data=spec.data.source,
        data_sha256=rows.sha256,
        protocol=spec.protocol,
        context=rows.context,
        stride=spec.stride,
        tokenizer=tokenizer.name,
        rows=len(rows.rows),
        tokens=rows.tokens,
        perplexity=statistics.perplexity(losses.loss, losses.row),
        bits_per_byte=float(losses.loss.sum()) / math.log(2) / size,
        tokens_per_s=sum(len(row) for row in rows.rows) / losses.model_s,
        wall_s=time.perf_counter() - started,
        peak_memory_bytes=peak_memory_bytes(),
        comparison=_compare(str(base_path), losses, rows, tokenizer) if base_path else None,
    )


def check(path: Path, spec: EvalSpec, device: str, gguf: Metadata | None = None) -> None:
    """Raises before any work what `evaluate` would of a model that is made from the one in `path`, and the latter.

    `gguf` is what the model says of itself if it is a GGUF file.
    """
    base = _open(path, pick_device(device))
    tokenizer = Tokenizer(base.home, base.config.vocab_size)
    if gguf and not same_vocabulary(tokenizer_of(gguf), tokenizer.inner, tokenizer.vocabulary):
        raise UsageError(
            f"the tokenizer of {base.home} becomes another one in a GGUF file: their tokens cannot be compared",
            "leave the evaluation out",
        )
    eval_rows(spec, tokenizer, base.context)


def common_tokenizer(tokenizer: Tokenizer, base: Tokenizer) -> Tokenizer:
    """The tokenizer for both models; beside a GGUF file's, put together from its keys, that of the files themselves.

    Raises UsageError where the same token stands for other text.
    """
    of_file, of_base = tokenizer.home.is_file(), base.home.is_file()
    same = tokenizer.sha256 == base.sha256
    if not same and (of_file or of_base):
        same = same_vocabulary(tokenizer.inner, base.inner, min(tokenizer.vocabulary, base.vocabulary))
    if not same:
        raise UsageError(f"{tokenizer.home} and {base.home} have different tokenizers: their tokens cannot be compared")
    return base if of_file else tokenizer


def _open(path: Path, device: Any, adapter: Path | None = None) -> BlockModel:
    checkpoint = open_checkpoint(path)
    weights = Weights(checkpoint)
    return BlockModel(checkpoint.home, Adapted(weights, adapter) if adapter else weights, device)


def _compare(baseline: str, losses: TokenLosses, rows: EvalRows, tokenizer: Tokenizer) -> Comparison:
    loss, base, row = losses.loss, losses.base_loss, losses.row
    assert base is not None
    assert losses.kl is not None
    assert losses.agree is not None
    assert losses.delta_p is not None
    return Comparison(
        baseline=baseline,
        perplexity=statistics.perplexity(base, row),
        delta=statistics.perplexity_delta(loss, base, row),
        relative_increase=statistics.perplexity_ratio(loss, base, row),
        delta_nats=statistics.mean(loss - base, row),
        kl=statistics.mean(losses.kl, row),
        kl_percentiles=statistics.percentiles(losses.kl),
        top1_agreement=statistics.mean(losses.agree, row),
        rms_delta_p=float(losses.delta_p.square().mean().sqrt()),
        worst=_worst(losses, rows, tokenizer),
        tokens_per_s=sum(len(row) for row in rows.rows) / losses.base_s,
    )


def _worst(losses: TokenLosses, rows: EvalRows, tokenizer: Tokenizer) -> list[WorstPlace]:
    assert losses.kl is not None
    places = []
    for at in losses.kl.argsort(descending=True, stable=True)[:WORST_PLACES].tolist():
        row, position = int(losses.row[at]), int(losses.position[at])
        ids: list[int] = rows.rows[row].tolist()
        before = tokenizer.decode(ids[max(0, position - CONTEXT_TOKENS) : position])
        places.append(WorstPlace(row, position, float(losses.kl[at]), before, tokenizer.decode([ids[position]])))
    return places
