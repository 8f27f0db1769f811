"""Solving a plan unit by unit: without a model where nothing needs data, else block by block.

A finished unit is packed, written and recorded before the next begins. An interrupted run puts the
finished blocks' written weights back and lets the rows advance through them, so that it ends with the
same bytes as an undisturbed one.
"""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from qtool.calibration.stats import InputStats, Moments, inputs_of
from qtool.calibration.tokens import Tokenizer, TokenRows, batches, calibration_rows, too_little_data
from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.writer import StagedOutput, raw_bytes
from qtool.errors import QtoolError
from qtool.formats import Format
from qtool.formats.weights import Weights, check_finite
from qtool.headers import scale_dtype
from qtool.methods import Method, Solution
from qtool.models.blockwise import BlockModel, Stream, linear_of
from qtool.numerics.grid import IntGrid, QTensor, grid_of
from qtool.plan import Linear, Plan, Unit
from qtool.recipe import DataSpec
from qtool.report.model import LayerRecord, Stopwatch

if TYPE_CHECKING:
    from torch import Tensor, nn

Progress = Callable[[str, int, int, str], None]  # stage, steps done, steps in all, detail
ERROR_ROWS = 512  # of a weight compared at once
TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}


def digest(weight: QTensor) -> str:
    """sha256 of what was solved: codes, scales and zeros."""
    parts = [weight.codes, weight.params.scale, *([] if weight.params.zero is None else [weight.params.zero])]
    return hashlib.sha256("".join(map(digest_bytes, parts)).encode()).hexdigest()


def digest_bytes(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes."""
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()


class Solver:
    """Fills a staged output. `rows` are the calibration rows, once there are any; `notes` what a person should know."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        method: Method,
        format: Format,
        staged: StagedOutput,
        device: torch.device,
        progress: Progress,
        watch: Stopwatch,
    ) -> None:
        self.checkpoint, self.plan, self.method, self.format = checkpoint, plan, method, format
        self.staged, self.device, self.progress, self.watch = staged, device, progress, watch
        self.notes: list[str] = []
        self.rows: TokenRows | None = None

    def without_data(self) -> None:
        """Every unit that is not done, tensor by tensor, with no model."""
        for unit in self.plan.units:
            if unit.name not in self.staged.done:
                record = _UnitRecord(self)
                for linear in unit.linears:
                    record.add([linear], self._solve([linear], self._source(linear), None))
                self._finish(unit, record)

    def with_data(self, spec: DataSpec, batch_tokens: int) -> None:
        """Every unit that is not done, block by block, over the calibration rows that `spec` names."""
        undone = [unit for unit in self.plan.units if unit.name not in self.staged.done]
        wanted = {unit.name for unit in undone if unit.linears}
        if wanted:
            self._solve_blocks(wanted, spec, batch_tokens)
        for unit in undone:  # only now: the model and its rows are out of memory
            if not unit.linears:
                self._finish(unit, _UnitRecord(self))

    def _solve_blocks(self, wanted: set[str], spec: DataSpec, batch_tokens: int) -> None:
        """The units named `wanted`; the rows go through the blocks before them as they were written."""
        with self.watch.stage("calibrate"):
            model = BlockModel(self.checkpoint.root, Weights(self.checkpoint), self.device)
            tokenizer = Tokenizer(self.checkpoint.root, model.config.vocab_size)
            self.rows = calibration_rows(spec, tokenizer, model.context)
            self._check_amount(self.rows)
            rows = _Rows(model, self.rows, batch_tokens, cross="cross" in self.method.needs)
        units = {unit.name: unit for unit in self.plan.units}
        names = [model.block_name(index) for index in range(len(model.blocks))]
        beyond = sorted(wanted - set(names))
        if beyond:
            raise QtoolError(f"the checkpoint has weights of `{beyond[0]}`, but config.json only {len(names)} blocks")
        last = max(index for index, name in enumerate(names) if name in wanted)
        for index in range(last + 1):
            with model.block(index) as block:
                unit = units[names[index]]
                with self.watch.stage("calibrate"):
                    rows.enter(block, index)
                if unit.name in wanted:
                    self._solve_block([x.linears for x in model.architecture.inputs], block, unit, rows)
                else:
                    self._put_back(unit, block)
                if index < last:
                    with self.watch.stage("calibrate"):
                        rows.leave(block)

    def data_record(self) -> dict[str, Any] | None:
        """What the calibration data was; None when none was used in this run."""
        if self.rows is None:
            return None
        return {"source": self.rows.source, "rows": len(self.rows.rows), "tokens": self.rows.tokens,
                "sha256": self.rows.sha256}  # fmt: skip

    def _solve_block(self, inputs: Iterable[tuple[str, ...]], block: nn.Module, unit: Unit, rows: _Rows) -> None:
        linears = {linear.module.removeprefix(unit.name + "."): linear for linear in unit.linears}
        groups = [group for group in inputs if group[0] in linears]
        record = _UnitRecord(self)
        # with the cross moment each input is measured after the linears before it were solved
        for step in [[group] for group in groups] if rows.cross else [groups]:
            with self.watch.stage("calibrate"):
                stats = rows.measure(block, [group[0] for group in step])
            for group in step:
                moments = stats.pop(group[0]).moments(f"{unit.name}.{group[0]}")
                # linears that share an input are solved as one, unless each has one scale for all of its weights
                whole = linears[group[0]].scheme.granularity == "tensor"
                for part in [[name] for name in group] if whole else [list(group)]:
                    stacked = stack([linear_of(block, name) for name in part])
                    members = [linears[name] for name in part]
                    record.add(members, self._solve(members, stacked, moments))
        self._finish(unit, record)

    def _solve(
        self, linears: list[Linear], weight_OI: Tensor, moments: Moments | None
    ) -> list[tuple[QTensor, LayerRecord]]:
        """Solve linears of one scheme and one input, stacked along their rows; each one's result and record.

        `weight_OI` is dequantized in place.
        """
        start = time.perf_counter()
        rows = [linear.source.shape[0] for linear in linears]
        with self.watch.stage("solve"):
            solution = self.method.solve(weight_OI, self._grid(linears[0]), moments)
            parts = solution.weight.split(rows) if len(rows) > 1 else [solution.weight]
        with self.watch.stage("measure"):
            second_II = moments.second_II if moments else None
            errors = [
                replace_and_compare(weight, part.dequantize(), second_II)
                for weight, part in zip(weight_OI.split(rows), parts, strict=True)
            ]
        wall_s = (time.perf_counter() - start) / len(weight_OI)
        return [
            (part, _layer_record(linear, error, wall_s * linear.source.shape[0], solution))
            for linear, part, error in zip(linears, parts, errors, strict=True)
        ]

    def _grid(self, linear: Linear) -> IntGrid:
        return grid_of(linear.scheme, TORCH_DTYPES[scale_dtype(linear.source.dtype)])

    def _source(self, linear: Linear) -> Tensor:
        with self.watch.stage("read"):
            weight = self.checkpoint.read(linear.source.name).to(self.device).float()
            check_finite(linear.source.name, weight)
            return weight

    def _put_back(self, unit: Unit, block: nn.Module) -> None:
        """The written weights of a finished unit back into its block."""
        written = Checkpoint(self.staged.folder)
        for linear in unit.linears:
            weight = read_back(written, self.plan, self.format, linear).dequantize()
            linear_of(block, linear.module.removeprefix(unit.name + ".")).weight.copy_(weight)

    def _check_amount(self, rows: TokenRows) -> None:
        widest = max(linear.source.shape[1] for linear in self.plan.linears)
        note = too_little_data(rows.tokens, widest, len(rows.rows[0]))
        if note:
            self.notes.append(note)

    def _finish(self, unit: Unit, record: _UnitRecord) -> None:
        with self.watch.stage("write"):
            for name, tensor in self.checkpoint.borrow(kept.source.name for kept in unit.kept):
                record.tensors[name] = self.staged.write(name, tensor)
            self.staged.finish_unit(unit.name, record.to_tree())
        errors = [layer.output_error or layer.weight_error for layer in record.layers]
        detail = f"{unit.name}: {len(errors)} layers, relative error {max(errors):.4f} at most" if errors else unit.name
        self.progress("quantize", len(self.staged.done), len(self.plan.units), detail)


class _UnitRecord:
    """What is written of a unit, for the journal, the report and the verification."""

    def __init__(self, solver: Solver) -> None:
        self.solver = solver
        self.layers: list[LayerRecord] = []
        self.tensors: dict[str, str] = {}  # sha256 of the bytes of each tensor written
        self.solved: dict[str, str] = {}  # digest of what was solved for each module

    def add(self, linears: list[Linear], solved: list[tuple[QTensor, LayerRecord]]) -> None:
        with self.solver.watch.stage("write"):
            for linear, (weight, record) in zip(linears, solved, strict=True):
                for name, tensor in self.solver.format.pack(linear.module, weight).items():
                    self.tensors[name] = self.solver.staged.write(name, tensor)
                self.solved[linear.module] = digest(weight)
                self.layers.append(record)

    def to_tree(self) -> dict[str, Any]:
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "tensors": self.tensors,
            "solved": self.solved,
            "data": self.solver.data_record(),
            "notes": self.solver.notes,
        }


class _Rows:
    """The calibration rows on their way through the blocks; with `cross`, through the float model as well."""

    def __init__(self, model: BlockModel, rows: TokenRows, batch_tokens: int, cross: bool) -> None:
        self.model, self.cross = model, cross
        self.stream = model.start(batch for batch, _ in batches(rows.rows, batch_tokens))
        self.float_stream = Stream(list(self.stream.hidden), self.stream.arguments) if cross else None
        self.float_block: nn.Module | None = None
        self.index = 0

    def enter(self, block: nn.Module, index: int) -> None:
        """Before anything of a block is solved."""
        self.index = index
        if self.cross:
            self.float_block = copy.deepcopy(block)

    def measure(self, block: nn.Module, layers: list[str]) -> dict[str, InputStats]:
        """Statistics of the inputs of these linears, as the block is now."""
        features = {layer: linear_of(block, layer).in_features for layer in layers}
        stats = {layer: InputStats.empty(n, self.cross, self.model.device) for layer, n in features.items()}
        for batch in range(len(self.stream.hidden)):
            inputs = self._inputs(block, self.stream, batch, layers)
            float_inputs = {}
            if self.float_block is not None and self.float_stream is not None:
                float_inputs = self._inputs(self.float_block, self.float_stream, batch, layers)
            for layer in layers:
                stats[layer].add(inputs[layer], float_inputs.get(layer))
        return stats

    def leave(self, block: nn.Module) -> None:
        """The rows advance to the next block."""
        for module, stream in ((block, self.stream), (self.float_block, self.float_stream)):
            if module is not None and stream is not None:
                for batch in range(len(stream.hidden)):
                    stream.hidden[batch] = self.model.run(module, self.index, stream, batch)
        self.float_block = None

    def _inputs(self, block: nn.Module, stream: Stream, batch: int, layers: list[str]) -> dict[str, Tensor]:
        return inputs_of(lambda: self.model.run(block, self.index, stream, batch), block, layers)


def read_back(written: Checkpoint, plan: Plan, format: Format, linear: Linear) -> QTensor:
    """A linear as it stands in the written files."""
    layout = format.layout(linear.module, linear.scheme, linear.source.shape, scale_dtype(linear.source.dtype))
    return format.unpack(linear.module, dict(written.read_many(t.name for t in layout)), linear.scheme)


def stack(linears: list[nn.Linear]) -> Tensor:
    """The weights of linears along their rows, [O, I]; from now on each linear's weight is its part of that."""
    if len(linears) == 1:
        return linears[0].weight.data
    stacked_OI = torch.cat([linear.weight.data for linear in linears])
    for linear, part in zip(linears, stacked_OI.split([len(x.weight) for x in linears]), strict=True):
        linear.weight.data = part
    return stacked_OI


def replace_and_compare(weight_OI: Tensor, new_OI: Tensor, second_II: Tensor | None) -> tuple[float, float | None]:
    """Overwrite a weight; the relative Frobenius errors of weight and, given E[x x^T] of its input, of output."""
    sums = torch.zeros(4, dtype=torch.float64)  # |D|^2, |W|^2, tr D H D^T, tr W H W^T
    for weight, new in zip(weight_OI.split(ERROR_ROWS), new_OI.split(ERROR_ROWS), strict=True):
        error = new - weight
        products = [error.square().sum(), weight.square().sum()]
        if second_II is not None:
            products += [((x @ second_II).mul_(x)).sum() for x in (error, weight)]
        sums[: len(products)] += torch.stack(products).cpu().double()
        weight.copy_(new)
    weight_error, output_error = _ratio(sums[0], sums[1]), _ratio(sums[2], sums[3])
    return weight_error, None if second_II is None else output_error


def _ratio(part: Tensor, whole: Tensor) -> float:
    """The square root of a share, 0 where the whole is 0."""
    return math.sqrt(max(float(part), 0.0) / float(whole)) if float(whole) > 0 else 0.0


def _layer_record(linear: Linear, errors: tuple[float, float | None], wall_s: float, solution: Solution) -> LayerRecord:
    shape = linear.source.shape
    return LayerRecord(
        module=linear.module,
        scheme=str(linear.scheme),
        shape=shape,
        bits_per_weight=linear.scheme.bits_per_weight(shape),
        weight_error=errors[0],
        output_error=errors[1],
        wall_s=wall_s,
        notes=tuple(solution.notes),
    )
