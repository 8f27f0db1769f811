"""The options of a training run. Never imports torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from qtool.errors import UsageError, unknown

SCHEDULES = ("cosine", "linear", "constant")
PRECISIONS = ("float32", "bf16", "fp16")
MOST_ROWS = 2048  # of a data set, which may have no end, unless more are asked for
HELD_OUT_SHARE = 16  # one row in so many is held out
EVALUATIONS = 8  # in a run, besides that of the start
# What changes the result by float rounding at most.
MEMORY_ONLY = ("accumulate", "recompute", "checkpoint_every")


@dataclass(frozen=True)
class Training:
    """AdamW (arXiv 1711.05101) with a warm-up. Stages of training have their own defaults."""

    epochs: int | None = None  # times through all rows; default as many as `steps` take, without these 1
    steps: int | None = None  # at most so many steps of the optimizer
    batch: int = 8  # rows per step, all processes together
    accumulate: int = 1  # parts that a batch goes through the model in; memory only
    lr: float = 1e-4
    warmup: float = 0.05  # share of the steps in which the learning rate rises
    schedule: str = "cosine"  # how it falls to 0 then: cosine, linear; or constant
    clip: float = 1.0  # the largest norm of the gradient; 0: any
    weight_decay: float = 0.0
    precision: str = "float32"  # of matrix products: float32, bf16, fp16; parameters and optimizer are float32
    recompute: bool = True  # keep only the blocks' inputs for the backward pass; memory only
    held_out: int | None = None  # rows kept for the held-out loss; default 1/16 of them, at least one
    evaluate_every: int | None = None  # steps; default an eighth of the run
    patience: int | None = None  # evaluations without a better held-out loss before it stops
    checkpoint_every: int | None = None  # steps; default at every evaluation
    seed: int = 0  # of the order of rows

    def __post_init__(self) -> None:
        for key in ("epochs", "steps", "batch", "accumulate", "evaluate_every", "patience", "checkpoint_every"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UsageError(f"{key}={value} must be at least 1")
        for key in ("clip", "weight_decay", "held_out"):
            value = getattr(self, key)
            if value is not None and not 0 <= value < math.inf:
                raise UsageError(f"{key}={value} must not be negative")
        if not 0 < self.lr < math.inf:
            raise UsageError(f"lr={self.lr} must be positive")
        if not 0 <= self.warmup <= 1:
            raise UsageError(f"warmup={self.warmup} is a share of the steps, from 0 to 1")
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)
        if self.precision not in PRECISIONS:
            raise unknown("precision", self.precision, PRECISIONS)

    def total_rows(self, rows: int) -> int:
        """How many rows the run takes of so many, which come again in every epoch."""
        by_epochs = (self.epochs or 1) * rows
        if self.steps is None:
            return by_epochs
        by_steps = self.steps * self.batch
        return min(by_epochs, by_steps) if self.epochs else by_steps

    def total_steps(self, rows: int) -> int:
        """How many steps the run has; the last batch may be smaller."""
        return math.ceil(self.total_rows(rows) / self.batch)

    def evaluation_steps(self, total: int) -> int:
        """The steps from one evaluation to the next."""
        return self.evaluate_every or max(1, math.ceil(total / EVALUATIONS))

    def rate(self, step: int, total: int) -> float:
        """The learning rate of a step, counted from 0, as a share of `lr`.

        It rises in equal parts to 1 at step round(warmup * total) and would fall to 0 at step `total`.
        """
        warm = round(self.warmup * total)
        if step < warm:
            return (step + 1) / (warm + 1)
        share = (step - warm) / (total - warm)
        return {"cosine": (1 + math.cos(math.pi * share)) / 2, "linear": 1 - share, "constant": 1.0}[self.schedule]

    def deciding(self) -> dict[str, Any]:
        """The options that decide the result."""
        return {key: value for key, value in asdict(self).items() if key not in MEMORY_ONLY}
