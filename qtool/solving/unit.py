"""The work on one unit: its statistics, its transforms, its linears.

Shapes: O out features, I in features.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qtool.calibration.rows import Rows
from qtool.calibration.stats import CROSS, SECOND, VECTORS, Moments
from qtool.finishing import BLOCK
from qtool.formats.weights import check_finite
from qtool.job import KV_PARTS
from qtool.methods import Method
from qtool.methods.rtn import RTN
from qtool.models.architectures import Input
from qtool.numerics.activations import static_scale
from qtool.numerics.grid import Grid, QTensor, grid_of, stackable
from qtool.numerics.scales import FloatStore
from qtool.parameters import TORCH_DTYPES, Parameters
from qtool.plan import Linear, Unit
from qtool.report.model import LayerRecord
from qtool.runtime.inputs import round_inputs
from qtool.runtime.kv import KVCache
from qtool.scheme import FLOATS, ActivationScheme, QuantScheme
from qtool.solving.compare import Errors, compare, squares
from qtool.solving.record import UnitRecord, read_back, rows_at_once
from qtool.transforms.fold import fold, sharing

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qtool.solving.solver import Solver


@dataclass(frozen=True)
class Solved:
    """A linear that waits for its block to be trained: what it was, what it is now, and what to say of it."""

    linear: Linear
    weight_OI: Tensor
    quantized: QTensor
    record: LayerRecord


class UnitWork:
    """The work on one unit: its statistics, its transforms, its linears."""

    def __init__(self, solver: Solver, unit: Unit, parameters: Parameters, record: UnitRecord) -> None:
        self.solver, self.job, self.unit, self.parameters, self.record = solver, solver.job, unit, parameters, record
        self.linears = {linear.module.removeprefix(unit.name + "."): linear for linear in unit.linears}
        found = [(source, [x for x in source.linears if x in self.linears]) for source in solver.architecture.inputs]
        self.inputs = {present[0]: present for _, present in found if present} if self.job.architecture else {}
        self.sources = {present[0]: source for source, present in found if present and self.inputs}
        self.groups = self._groups()
        self.moments: dict[str, Moments] = {}  # by the first quantized linear of each input
        self.scales: dict[str, Tensor] = {}  # by which transforms divided them, likewise
        self.scaled: dict[str, list[str]] = {}  # what the transforms did, likewise
        self.rounded: dict[str, tuple[ActivationScheme, Tensor | None]] = {}
        self.cache: KVCache | None = None
        self.waiting: dict[str, Solved] = {}  # by name in the block

    def measure(self, block: nn.Module, rows: Rows, advance: bool = False) -> None:
        """The statistics of all inputs, and the ranges of keys and values, with the block as it is."""
        with self.solver.watch.stage("calibrate"):
            ranges = KVCache.recording() if self.job.kv else None
            wanted = self.job.wanted - {CROSS}
            if CROSS in self.job.wanted and not self.solver.scalings:
                wanted -= {SECOND}  # measured for each input, after the linears before it were solved
            stats = rows.measure(block, [group[0] for group in self.groups], wanted, cache=ranges, advance=advance)
            for name in list(stats) if wanted & {VECTORS, SECOND} else ():
                self.moments[name] = stats.pop(name).moments(self.parameters.full(name))
            if ranges:
                self.set_kv(*ranges.absmax())

    def follow(self, block: nn.Module, rows: Rows) -> None:
        """Measure and solve, and train, while the block sees the rounding of everything before it."""
        cross = CROSS in self.job.wanted
        first_look = self.job.wanted - {SECOND, CROSS} or self.solver.scalings
        if rows.cross:  # before the transforms: a resumed run has the block as it is in the source
            rows.split(block)
        if first_look or (self.job.wanted and not cross):
            self.measure(block, rows)
            self.transform()
        if cross:  # each input is measured after the linears before it were solved
            vectors = {name: moments.vectors for name, moments in self.moments.items()}
            scales = {name: self._input_scale(name, moments) for name, moments in self.moments.items()}
            self.moments = {}
            for group in self.groups:
                name = group[0]
                scale = scales.get(name)
                activations = self.linears[name].scheme.activations
                rounded = {**self.rounded, **({name: (activations, scale)} if activations else {})}
                with self.solver.watch.stage("calibrate"):
                    stats = rows.measure(block, [name], {SECOND, CROSS}, rounded, self.cache, scales=self.scales)
                moments = stats[name].moments(self.parameters.full(name))
                self.moments[name] = replace(moments, vectors=vectors.get(name))
                self.solve(group)
        else:
            for group in self.groups:
                self.solve(group)
        if self.waiting:
            self.train(block, rows)

    def train(self, block: nn.Module, rows: Rows) -> None:
        """Train what was solved towards the float block's output, and write it."""
        from qtool.finishing.blockwise import Serving, alignment, train_block

        assert self.job.block
        weights = {name: (x.quantized, self._grid(x.linear), x.weight_OI) for name, x in self.waiting.items()}
        with self.solver.watch.stage("train"):
            served = Serving(self.rounded, self.cache)
            name, progress = self.unit.name, self.solver.progress
            trained, curve, sample_BTE = train_block(block, rows, weights, served, self.job.block, name, progress)
        for name, solved in self.waiting.items():
            linear = solved.linear
            quantized = self.job.format.held(trained[name], linear.source.dtype)
            with self.solver.watch.stage("measure"):
                new = quantized.dequantize()
                errors = compare(solved.weight_OI, new, None)
                self.parameters.weight(linear.module).copy_(new)
            self.record.pack(linear, quantized)
            self.record.layers.append(replace(solved.record, weight_error=errors.weight, output_error=None))
        self.waiting = {}
        with round_inputs(block, self.rounded):
            aligned = alignment(
                sample_BTE, rows.model.run(block, rows.index, rows.stream, 0, self.cache), self.unit.name
            )
        self.record.training = {"finish": BLOCK, "unit": self.unit.name, **curve.to_tree(), "alignment": aligned}

    def transform(self) -> None:
        """Let every transform scale every input that it can."""
        for transform, scaling in self.solver.scalings.items():
            for name, source in self.sources.items():
                notes = self.scaled.setdefault(name, [])
                if not self._can_fold(source):
                    notes.append(f"{transform}: nothing to fold into")
                    continue
                with self.solver.watch.stage("transform"):
                    share_I = sharing(self.parameters, source, self.job.checkpoint.config)
                    weights = [self.parameters.weight(self.parameters.full(x)) for x in source.linears]
                    grid = self._grid(self.linears[name])
                    found = scaling.scales(weights, grid, self.moments[name], share_I)
                    if found:
                        scale_I = fold(self.parameters, source, found.scale_I, self.solver.architecture, share_I)
                        self.moments[name] = self.moments[name].divided(scale_I)
                        self.scales[name] = self.scales.get(name, 1.0) * scale_I
                    notes.append(f"{transform}: {found.note if found else 'best as it is'}")

    def _can_fold(self, source: Input) -> bool:
        """Whether what produces an input can take scales: not where rows of a linear share the scale of their codes."""
        if source.producer is None:
            return False
        producer = self.linears.get(source.producer)
        return producer is None or producer.scheme.granularity not in ("tensor", "block")

    def solve(self, group: list[str]) -> None:
        """The linears of one input."""
        moments = self.moments.pop(group[0], None)
        alike: dict[QuantScheme, list[str]] = {}
        for name in group:
            alike.setdefault(self.linears[name].scheme, []).append(name)
        parts = [p for scheme, names in alike.items() for p in ([names] if stackable(scheme) else [[n] for n in names])]
        scale = self._input_scale(group[0], moments)
        dead = int((moments.diagonal_I == 0).sum()) if moments else 0
        notes = (
            [f"{dead} of {self.linears[group[0]].shape[1]} inputs are always zero on the calibration data"]
            if dead
            else []
        )
        for part in parts:
            if moments is None and self._is_too_large(part[0]):
                self._solve_by_rows(part[0])
            else:
                self._solve(part, moments, scale, notes, self.scaled.get(group[0], []))
        for name in group:
            if activations := self.linears[name].scheme.activations:
                self.rounded[name] = activations, scale

    def _is_too_large(self, name: str) -> bool:
        """Whether to round a weight a few rows at a time: it outgrows a block, as embeddings do."""
        linear = self.linears[name]
        loaded = f"{linear.module}.weight" in self.parameters.tensors
        return len(rows_at_once(linear.shape)) > 1 and linear.scheme.by_rows and not loaded and not linear.transposed

    def _solve_by_rows(self, name: str) -> None:
        """Round a linear without data and without its whole weight in float32."""
        start, linear = time.perf_counter(), self.linears[name]
        method, notes = self._without_data()
        grid, watch = self._grid(linear), self.solver.watch
        sums = []

        def parts() -> Iterator[QTensor]:
            for rows in rows_at_once(linear.shape):
                with watch.stage("read"):
                    weight_OI = self.job.source.read_rows(f"{linear.module}.weight", rows).to(self.parameters.device)
                with watch.stage("solve"):
                    solved = method.solve(weight_OI, grid, None).weight
                    held = self.job.format.held(solved, linear.source.dtype)
                with watch.stage("measure"):
                    sums.append(squares(weight_OI, held.dequantize()))
                yield held

        if self.job.format.by_rows:
            self.record.pack_rows(linear, parts())
        else:
            self.record.pack(linear, QTensor.joined(list(parts())))
        self.record.layers.append(layer_record(linear, Errors.of(sums), time.perf_counter() - start, notes))

    def _without_data(self) -> tuple[Method, list[str]]:
        """The method for a linear without statistics, and what to say of that."""
        method = self.job.method
        assert method
        if not method.needs:
            return method, []
        return RTN(), [f"rounded to nearest: {self.job.recipe.method} has no data for it"]

    def _solve(
        self,
        part: list[str],
        moments: Moments | None,
        input_scale: Tensor | None,
        notes: list[str],
        transforms: list[str],
    ) -> None:
        """Solve linears of one scheme and one input, stacked along their rows; the weight is dequantized in place."""
        start = time.perf_counter()
        watch, linears = self.solver.watch, [self.linears[name] for name in part]
        with watch.stage("read"):
            weight_OI = self.parameters.stacked([linear.module for linear in linears])
        rows = [linear.shape[0] for linear in linears]
        with watch.stage("solve"):
            method, why = (self.job.method, []) if moments else self._without_data()
            assert method
            notes = [*notes, *why]
            solution = method.solve(weight_OI, self._grid(linears[0]), moments)
            parts = solution.weight.split(rows) if len(rows) > 1 else [solution.weight]
            parts = [self.job.format.held(x, linear.source.dtype) for x, linear in zip(parts, linears, strict=True)]
        wall_s = (time.perf_counter() - start) / len(weight_OI)
        for linear, solved, weight in zip(linears, parts, weight_OI.split(rows), strict=True):
            with watch.stage("measure"):
                new = solved.dequantize()
                errors = compare(weight, new, moments.second_II if moments else None)
                if moments:
                    self._shift_bias(linear.module, weight, new, moments)
                was = weight.clone() if self.job.block else weight
                weight.copy_(new)
            notes = [*notes, *solution.notes]
            record = layer_record(linear, errors, wall_s * linear.shape[0], notes, transforms)
            quantized = replace(solved, input_scale=input_scale)
            if self.job.block and self.inputs and linear.scheme.kind not in FLOATS:
                name = linear.module.removeprefix(self.unit.name + ".")
                self.waiting[name] = Solved(linear, was, quantized, record)
                continue
            self.record.pack(linear, quantized)
            self.record.layers.append(record)
            if not self.job.wanted:
                self.parameters.drop(linear.module)

    def _shift_bias(self, module: str, weight_OI: Tensor, new_OI: Tensor, moments: Moments) -> None:
        name = f"{module}.bias"
        for biasing in self.solver.biasings:
            if name in self.parameters:
                shifted = self.parameters[name] + biasing.shift(weight_OI - new_OI, moments)
                self.parameters.change(name, self.parameters.as_stored(name, shifted))

    def _input_scale(self, name: str, moments: Moments | None) -> Tensor | None:
        """The fixed scale of an input, as it is stored, [1]."""
        linear = self.linears[name]
        activations = linear.scheme.activations
        if activations is None or not activations.is_static:
            return None
        assert moments is not None
        assert moments.vectors is not None
        scale = static_scale(moments.vectors.absmax_I.amax().reshape(1), activations)
        return scale if activations.kind == "nvfp4" else FloatStore(self._grid(linear).scale_dtype).pack(scale)

    def set_kv(self, k_absmax: Tensor, v_absmax: Tensor) -> None:
        """The scales of keys and values from their largest magnitudes."""
        assert self.job.kv
        scales = {}
        for part, absmax in zip(KV_PARTS, (k_absmax, v_absmax), strict=True):
            info = next(info for info in self.unit.added if info.name.endswith(part))
            check_finite(info.name, absmax)
            scales[part] = FloatStore(TORCH_DTYPES[info.dtype]).pack(static_scale(absmax.reshape(1), self.job.kv))
            self.record.write(info.name, scales[part])
        self.cache = KVCache(self.job.kv, *(scale.float() for scale in scales.values()))

    def put_back(self) -> None:
        """The written tensors of a finished unit back into its block."""
        written = self.solver.written
        for linear in self.unit.linears:
            solved = read_back(written, self.job, linear)
            self.parameters.weight(linear.module).copy_(solved.dequantize())
            if linear.scheme.activations:
                scale = None if solved.input_scale is None else solved.input_scale.float().to(self.parameters.device)
                self.rounded[linear.module.removeprefix(self.unit.name + ".")] = linear.scheme.activations, scale
        for name in self.solver.staged.done[self.unit.name]["changed"]:
            self.parameters[name].copy_(written.read(name))
        if self.job.kv:
            scales = [written.read(info.name).float().to(self.parameters.device) for info in self.unit.added]
            self.cache = KVCache(self.job.kv, *scales)

    def finish(self) -> None:
        self.record.finish(self.parameters)

    def _grid(self, linear: Linear) -> Grid:
        return grid_of(linear.scheme, TORCH_DTYPES[self.job.scale_dtype(linear)])

    def _groups(self) -> list[list[str]]:
        """The quantized linears by input; each alone where nothing is known of the model, or where memory counts."""
        others = sorted(self.linears.keys() - {name for group in self.inputs.values() for name in group})
        known = [*self.inputs.values(), *([name] for name in others)]
        if self.job.wanted:
            return known
        groups: list[list[str]] = []
        for group in known:
            together = self.linears[group[0]].scheme.kind == "nvfp4"  # served as one, they share its divisor
            groups += [list(group)] if together else [[name] for name in group]
        return groups


def layer_record(
    linear: Linear, errors: Errors, wall_s: float, notes: Iterable[str] = (), transforms: Iterable[str] = ()
) -> LayerRecord:
    """What the report says of a linear."""
    return LayerRecord(
        module=linear.module,
        scheme=str(linear.scheme),
        shape=linear.shape,
        bits_per_weight=linear.scheme.bits_per_weight(linear.shape),
        weight_error=errors.weight,
        output_error=errors.output,
        wall_s=wall_s,
        notes=tuple(notes),
        transforms=tuple(transforms),
    )
