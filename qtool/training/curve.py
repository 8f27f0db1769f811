"""How a training run went. Never imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from qtool.report.table import seconds, size

WINDOW = 8  # losses whose mean shows where a run is


@dataclass
class Curve:
    """Losses over the steps, and what they cost. A loss is a mean over terms: of tokens, in nats."""

    steps: int  # of the whole run
    lr: float  # the highest learning rate
    train: list[tuple[int, float]] = field(default_factory=list)  # (step, loss) of each batch; steps count from 1
    held_out: list[tuple[int, float]] = field(default_factory=list)  # after so many steps
    best_step: int = 0  # whose state was kept
    tokens: int = 0  # terms trained on
    skipped: int = 0  # steps whose gradient was not finite in fp16
    wall_s: float = 0.0  # with evaluations and checkpoints
    peak_memory_bytes: int = 0
    stopped: str | None = None  # end, patience; None: not yet

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.wall_s if self.wall_s else 0.0

    @property
    def best_held_out(self) -> float | None:
        """The held-out loss of the state that was kept."""
        return dict(self.held_out).get(self.best_step)

    @property
    def evaluated(self) -> int:
        """The step of the last held-out loss; -1 before the first."""
        return self.held_out[-1][0] if self.held_out else -1

    @property
    def worse_evaluations(self) -> int:
        """How many have been without a better loss since the best."""
        return sum(step > self.best_step for step, _ in self.held_out)

    @property
    def exploded(self) -> str | None:
        """In words, when the mean of the last 8 losses is above twice that of the first 8, plus 1."""
        first, last = _mean(self.train[:WINDOW]), _mean(self.train[-WINDOW:])
        return f"the loss has exploded from {first:.4g} to {last:.4g}" if last > first + abs(first) + 1 else None

    def describe(self, step: int) -> str:
        """Where the run is after so many steps: loss 2.314, held-out 2.402, 3100 tokens/s, 1.20 GB, 12.3 s left."""
        said = [f"loss {_mean(self.train[-WINDOW:]):.4g}"] if self.train else []
        said += [f"held-out {self.held_out[-1][1]:.4g}"] if self.held_out else []
        said += [f"{self.tokens_per_s:.0f} tokens/s"] if self.train else []
        said += [size(self.peak_memory_bytes)]
        said += [f"{seconds(self.wall_s / step * (self.steps - step))} left"] if step else []
        return ", ".join(said)

    def to_tree(self) -> dict[str, Any]:
        return {**asdict(self), "tokens_per_s": self.tokens_per_s}

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> Curve:
        losses = {key: [(step, loss) for step, loss in tree[key]] for key in ("train", "held_out")}
        return cls(**{**{key: value for key, value in tree.items() if key != "tokens_per_s"}, **losses})


def _mean(losses: list[tuple[int, float]]) -> float:
    return sum(loss for _, loss in losses) / len(losses)
