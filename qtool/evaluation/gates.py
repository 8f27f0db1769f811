"""Quality gates: a limit, what was measured, and whether it holds. Never imports torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from qtool.errors import UsageError
from qtool.recipe import EvalSpec

if TYPE_CHECKING:
    from qtool.evaluation.evaluate import Evaluation


def parse_increase(text: str) -> tuple[float, bool]:
    """`1%` -> (0.01, relative); `0.2` -> (0.2, absolute). Raises UsageError for anything else."""
    relative = text.strip().endswith("%")
    try:
        value = float(text.strip().removesuffix("%"))
        if not math.isfinite(value):
            raise ValueError
    except ValueError:
        raise UsageError(
            f"--max-ppl-increase `{text}` is neither a share such as `1%` nor a number such as `0.2`"
        ) from None
    return (value / 100, True) if relative else (value, False)


def check_spec(spec: EvalSpec, has_baseline: bool) -> None:
    """Raises UsageError for gates that cannot be held."""
    if spec.max_ppl_increase is not None:
        parse_increase(spec.max_ppl_increase)
    if not has_baseline and (spec.max_ppl_increase is not None or spec.max_kl is not None):
        raise UsageError("a gate compares two models, but there is no baseline", "give one with --baseline MODEL")


def check_gates(result: Evaluation, spec: EvalSpec) -> list[dict[str, Any]]:
    """Each gate that `spec` sets, with what was measured."""
    gates: list[dict[str, Any]] = []
    if spec.max_ppl_increase is not None and result.comparison:
        limit, relative = parse_increase(spec.max_ppl_increase)
        increase = result.comparison.relative_increase if relative else result.comparison.delta
        gates.append(_gate("max_ppl_increase", spec.max_ppl_increase, limit, increase.value))
    if spec.max_kl is not None and result.comparison:
        gates.append(_gate("max_kl", f"{spec.max_kl:g}", spec.max_kl, result.comparison.kl.value))
    return gates


def _gate(name: str, asked: str, limit: float, measured: float) -> dict[str, Any]:
    return {"gate": name, "asked": asked, "limit": limit, "measured": measured, "passed": measured <= limit}
