"""Quantization-aware training: what `gptaq` has solved, trained block by block and then its scales end to end.

The order of EfficientQAT (arXiv 2407.11062), which starts from rounding to nearest. `--finish` names other trainings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qtool.methods.gptaq import GPTAQ


@dataclass(frozen=True)
class QAT(GPTAQ):
    """Options of `qat`: those of `gptaq`."""

    finish: ClassVar[tuple[str, ...]] = ("block", "scales")  # where the recipe names none
