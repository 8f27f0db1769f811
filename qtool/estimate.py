"""About what a run takes, from its plan alone. The rates were measured on two CPU cores (tests/benchmarks)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod
from typing import Any

from qtool.models.architectures import config_value
from qtool.plan import Plan
from qtool.recipe import DataSpec

PROCESS_BYTES = 350e6  # Python with torch and transformers
SEARCH_S = 30e-9  # per weight: scale search, packing, hashing
FLOP_PER_S = 1.5e11  # float32 matrix products
SCALES_S = 4e-6  # per weight on which a transform compares some forty scales, of which there are SAMPLE_ROWS rows
SAMPLE_ROWS = 256


def estimate(
    plan: Plan, needs: Collection[str], data: DataSpec, config: Mapping[str, Any], scalings: int = 0
) -> tuple[float, float]:
    """Bytes of memory and seconds of time of a run, rough but of the right order.

    It `needs` these moments, and has so many transforms that search for scales.
    """
    shapes = [linear.shape for linear in plan.linears]
    weights = sum(map(prod, shapes))
    if not needs:
        largest = max(prod(info.shape) for info in [*(x.source for x in plan.linears), *(k.source for k in plan.kept)])
        return PROCESS_BYTES + 16 * largest, weights * SEARCH_S
    streams = 2 if "cross" in needs else 1
    context = min(int(config_value(config, "max_position_embeddings") or 2048), 2048)
    tokens = (data.rows or 128) * (data.seqlen or context)
    hidden = tokens * int(config_value(config, "hidden_size") or 0) * 4 * streams
    blocks = [unit for unit in plan.units if unit.linears]
    block = max(sum(4 * prod(linear.shape) for linear in unit.linears) for unit in blocks) * streams
    inputs = {linear.shape[1] for linear in blocks[0].linears}
    matrices = streams if "second" in needs else 0
    moments = sum(4 * n * n for n in inputs) * matrices + (3 * 4 * max(inputs) ** 2 if matrices else 0)
    forward = 2 * weights * tokens * (2 if streams == 1 else 6)
    solve = sum(6 * out * n * n + n**3 for out, n in shapes) if matrices else 0
    moment_flop = sum(2 * tokens * n * n for n in inputs) * len(blocks) * matrices
    searched = scalings * sum(min(out, SAMPLE_ROWS) * n for out, n in shapes)
    wall_s = weights * SEARCH_S + searched * SCALES_S + (forward + solve + moment_flop) / FLOP_PER_S
    return PROCESS_BYTES + hidden + block + moments, wall_s
