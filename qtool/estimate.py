"""About what a run takes, from its plan alone. The rates were measured on two CPU cores (tests/benchmarks)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod
from typing import Any

from qtool.finishing import BLOCK
from qtool.models.architectures import config_value
from qtool.plan import Linear, Plan
from qtool.recipe import DataSpec
from qtool.training.options import Training

PROCESS_BYTES = 350e6  # Python with torch and transformers
CORES = 2
SEARCH_NS = {  # per weight on one core: the search for scales and codes
    "q4_0": 180, "q4_1": 370, "q5_0": 150, "q5_1": 430, "q8_0": 150, "q2_k": 680, "q3_k": 310, "q4_k": 670,
    "q5_k": 680, "q6_k": 480, "iq4_nl": 780, "iq4_xs": 820, "mxfp4": 80, "nvfp4": 170, "nf4": 160, "nf4-dq": 160,
    "fp4": 160, "fp4-dq": 160, "f32": 5, "f16": 5, "bf16": 5,
}  # fmt: skip
OTHERS_NS = 60
WRITE_S = 10e-9  # per weight: reading, packing, hashing
ROUNDING_BYTES = 16  # per weight that is rounded at once
AT_ONCE = 1 << 24  # weights that are rounded at once where rows stand for themselves
FLOP_PER_S = 1.5e11  # float32 matrix products
FAKE_QUANT_NS = 25  # per weight and step on one core: rounding with gradients
BLOCK_BYTES = 45  # per weight of a block in training: with AdamW's moments, gradients, the best state, the float block
FULL_BYTES, CODED_BYTES = 28, 6  # likewise end to end; of codes alone
KEPT_OF_BLOCK = 30  # hidden states that a block keeps for its backward pass
SCALES_S = 4e-6  # per weight on which a transform compares some forty scales, of which there are SAMPLE_ROWS rows
SAMPLE_ROWS = 256


def estimate(
    plan: Plan,
    needs: Collection[str],
    data: DataSpec,
    config: Mapping[str, Any],
    scalings: int = 0,
    searched: bool = True,
    finishes: Mapping[str, Training] | None = None,
) -> tuple[float, float]:
    """Bytes of memory and seconds of time of a run, rough but of the right order.

    It `needs` these moments, and has so many transforms that search for scales; weights that are laid out anew as
    they are need no search. `finishes` train what was rounded.
    """
    memory_bytes, wall_s = _solving(plan, needs, data, config, scalings, searched)
    for name, options in (finishes or {}).items():
        more_bytes, more_s = _training(plan, name, options, data, config)
        memory_bytes, wall_s = max(memory_bytes, PROCESS_BYTES + more_bytes), wall_s + more_s
    return memory_bytes, wall_s


def _training(
    plan: Plan, name: str, options: Training, data: DataSpec, config: Mapping[str, Any]
) -> tuple[float, float]:
    """Of one finish: what is trained of a weight, the rest of the model, and what a step keeps of its tokens."""
    seqlen = data.seqlen or min(_size(config, "max_position_embeddings", 2048), 2048)
    rows = data.rows or 128
    sizes = [sum(prod(linear.shape) for linear in unit.linears) for unit in plan.units]
    hidden, steps = _size(config, "hidden_size", 0), options.total_steps(rows)
    at_once = -(-options.batch // options.accumulate) * seqlen * hidden * 4
    weights = sum(sizes)
    whole_s = steps * (8 * weights * options.batch * seqlen / FLOP_PER_S + weights * FAKE_QUANT_NS * 1e-9 / CORES)
    if name == BLOCK:
        streams = 3 * rows * seqlen * hidden * 4
        return max(sizes, default=0) * BLOCK_BYTES + streams + at_once * KEPT_OF_BLOCK, whole_s
    others = 4 * sum(prod(kept.source.shape) for kept in plan.kept)
    trained = weights * (FULL_BYTES if name == "full" else CODED_BYTES) + others
    kept_blocks = 1 if options.recompute else len(sizes)
    return trained + at_once * (KEPT_OF_BLOCK * kept_blocks + len(sizes)), whole_s


def _solving(
    plan: Plan, needs: Collection[str], data: DataSpec, config: Mapping[str, Any], scalings: int, searched: bool
) -> tuple[float, float]:
    search_ns = sum(prod(x.shape) * SEARCH_NS.get(x.scheme.kind, OTHERS_NS) for x in plan.linears) if searched else 0
    round_s = search_ns * 1e-9 / CORES + sum(prod(x.shape) for x in plan.linears) * WRITE_S
    if not needs:
        kept = max((k.source.size_bytes for k in plan.kept), default=0)
        return PROCESS_BYTES + max([kept, *map(_rounding_bytes, plan.linears)]), round_s
    streams = 2 if "cross" in needs else 1
    context = min(_size(config, "max_position_embeddings", 2048), 2048)
    tokens = (data.rows or 128) * (data.seqlen or context)
    hidden = tokens * _size(config, "hidden_size", 0) * 4 * streams
    units = [unit for unit in plan.units if unit.linears]
    blocks = [unit for unit in units if unit.name.rpartition(".")[2].isdigit()] or units
    tables = [linear for unit in units if unit not in blocks for linear in unit.linears]  # no data comes there
    shapes = [linear.shape for unit in blocks for linear in unit.linears]
    block = max(sum(4 * prod(linear.shape) for linear in unit.linears) for unit in blocks) * streams
    inputs = {linear.shape[1] for linear in blocks[0].linears}
    matrices = streams if "second" in needs else 0
    moments = sum(4 * n * n for n in inputs) * matrices + (3 * 4 * max(inputs) ** 2 if matrices else 0)
    forward = 2 * sum(map(prod, shapes)) * tokens * (2 if streams == 1 else 6)
    solve = sum(6 * out * n * n + n**3 for out, n in shapes) if matrices else 0
    moment_flop = sum(2 * tokens * n * n for n in inputs) * len(blocks) * matrices
    compared = scalings * sum(min(out, SAMPLE_ROWS) * n for out, n in shapes)
    wall_s = round_s + compared * SCALES_S + (forward + solve + moment_flop) / FLOP_PER_S
    return PROCESS_BYTES + hidden + max([block + moments, *map(_rounding_bytes, tables)]), wall_s


def _size(config: Mapping[str, Any], key: str, missing: int) -> int:
    """A size that config.json gives, as far as it is one."""
    value = config_value(config, key)
    return value if type(value) is int and 0 < value < 1 << 32 else missing


def _rounding_bytes(linear: Linear) -> float:
    """Of a weight while it is rounded without data, a few rows at a time where that gives the same."""
    scheme, weights = linear.scheme, prod(linear.shape)
    if weights <= AT_ONCE or not scheme.by_rows or linear.transposed:
        return ROUNDING_BYTES * weights
    return ROUNDING_BYTES * AT_ONCE + weights * scheme.bits_per_weight(linear.shape) / 8
