"""What training minimizes, as options. Never imports torch.

L = alpha T^2 D(teacher, student; T) + (1 - alpha) CE + hidden MSE_h + attention MSE_a, per predicted token in nats
(Hinton, arXiv 1503.02531, sec. 2). The losses themselves are in `qtool.training.losses`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from qtool.errors import UsageError, unknown

NONE = "none"
DIVERGENCES = ("kl", "reverse-kl", "jsd", NONE)


@dataclass(frozen=True)
class Objective:
    """Options of the loss. A schedule is a number, or `FROM:TO`: linear from the first step to the last."""

    divergence: str = "kl"  # kl: of the teacher to the student; reverse-kl, jsd, or none
    alpha: str | float = 1.0  # weight of the divergence against cross entropy, which has the rest; schedule in [0, 1]
    temperature: str | float = 1.0  # T of the divergence; schedule
    top_k: int | None = None  # so many of the teacher's most likely tokens, all others as one; default all tokens
    hidden: float = 0.0  # weight of the squared error of hidden states after each block
    attention: float = 0.0  # weight of that of the attention's outputs

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise unknown("divergence", self.divergence, DIVERGENCES)
        for name, most in (("alpha", 1.0), ("temperature", math.inf)):
            for value in _ends(name, getattr(self, name)):
                if not (0 <= value <= most and math.isfinite(value) and (value or name == "alpha")):
                    wanted = "from 0 to 1" if name == "alpha" else "above 0"
                    raise UsageError(f"{name} is {value:g}, but must be a number {wanted}")
        for name in ("hidden", "attention"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name} is {getattr(self, name)}, but must be a number of at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top_k is {self.top_k}, but must be at least 1")
        if not (self.diverges or self.has_cross_entropy or self.has_states):
            raise UsageError(
                f"divergence `{self.divergence}` with alpha {self.alpha} leaves nothing to train on",
                "`alpha` 0 is cross entropy alone",
            )

    def check_cached(self) -> float:
        """The temperature for which a teacher's distributions can be kept; UsageError where not all of it can be."""
        temperature = self.fixed_temperature
        if self.has_states:
            raise UsageError(
                "a cache of the teacher's distributions has no hidden states and attention outputs",
                "leave `hidden` and `attention` at 0, or do without the cache",
            )
        if temperature is None:
            raise UsageError(
                f"a cache of the teacher's distributions is for one temperature, not for {self.temperature}",
                "give one temperature, or do without the cache",
            )
        return temperature

    def alpha_at(self, share: float) -> float:
        """The weight of the divergence when this share of the steps is done."""
        return _at("alpha", self.alpha, share)

    def temperature_at(self, share: float) -> float:
        return _at("temperature", self.temperature, share)

    @property
    def diverges(self) -> bool:
        """Whether a teacher's distributions count, at some step."""
        return self.divergence != NONE and max(_ends("alpha", self.alpha)) > 0

    @property
    def has_cross_entropy(self) -> bool:
        """Whether the true tokens count, at some step."""
        return min(_ends("alpha", self.alpha)) < 1

    @property
    def has_states(self) -> bool:
        """Whether a teacher's states inside the model count."""
        return self.hidden > 0 or self.attention > 0

    @property
    def fixed_temperature(self) -> float | None:
        """The temperature of every step, or None where it changes."""
        first, last = _ends("temperature", self.temperature)
        return first if first == last else None


def _ends(name: str, schedule: str | float) -> tuple[float, float]:
    """The values at the first and at the last step. Raises UsageError."""
    first, colon, last = str(schedule).partition(":")
    try:
        return float(first), float(last if colon else first)
    except ValueError:
        raise UsageError(
            f"{name} is `{schedule}`, but must be a number, or two as in `0.9:0.5`: at the first step and at the last"
        ) from None


def _at(name: str, schedule: str | float, share: float) -> float:
    first, last = _ends(name, schedule)
    return first + (last - first) * min(max(share, 0.0), 1.0)
