"""What is written of one unit: for the journal, the report and the verification."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.writer import raw_bytes
from qtool.estimate import AT_ONCE
from qtool.formats.weights import check_finite
from qtool.job import Job
from qtool.numerics.grid import QTensor
from qtool.parameters import TORCH_DTYPES, Parameters
from qtool.plan import Linear, Unit
from qtool.report.model import LayerRecord
from qtool.scheme import FLOATS

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.solving.solver import Solver


class UnitRecord:
    """What is written of a unit, for the journal, the report and the verification."""

    def __init__(self, solver: Solver, unit: Unit) -> None:
        self.solver, self.unit = solver, unit
        self.layers: list[LayerRecord] = []
        self.tensors: dict[str, str] = {}  # sha256 of the bytes of each tensor written
        self.solved: dict[str, str] = {}  # digest of what was solved for each module
        self.training: dict[str, Any] | None = None  # how the unit's training went

    def write(self, name: str, tensor: Tensor) -> None:
        self.tensors[name] = self.solver.staged.write(name, tensor)

    def pack(self, linear: Linear, weight: QTensor) -> None:
        """A linear as the format holds it."""
        with self.solver.watch.stage("write"):
            for name, tensor in self.solver.job.format.pack(linear.module, weight, linear.source.dtype).items():
                self.write(name, tensor)
            self.solved[linear.module] = digest(weight)

    def pack_rows(self, linear: Linear, parts: Iterable[QTensor]) -> None:
        """The same where rows come a few at a time, for formats `by_rows`: no more than the packed ones are kept."""
        format, digests = self.solver.job.format, Digests()
        (info,) = format.tensors(linear)
        packed, filled = None, 0
        for part in parts:
            with self.solver.watch.stage("write"):
                rows = format.pack(linear.module, part, linear.source.dtype)[info.name]
                packed = rows.new_empty(info.shape) if packed is None else packed
                packed[filled : filled + len(rows)] = rows
                filled += len(rows)
                digests.update(part)
        assert packed is not None
        with self.solver.watch.stage("write"):
            self.write(info.name, packed)
        self.solved[linear.module] = digests.whole()

    def finish(self, parameters: Parameters) -> None:
        """The tensors that stay unquantized, and then the unit is done."""
        solver, source = self.solver, self.solver.job.source
        with solver.watch.stage("write"):
            outputs = solver.job.plan.outputs
            kept = [k.source.name for k in self.unit.kept if k.source.name in outputs]
            changed = [name for name in kept if name in parameters.changed]
            for name in changed:
                self.write(name, parameters[name].to(TORCH_DTYPES[outputs[name].dtype]))
            made = source.changed.union(info.name for info in source.added)
            for name in [*(n for n in kept if n in made), *(i.name for i in self.unit.added)]:
                if name not in self.tensors:
                    self.write(name, source.read_stored(name))
            checked = {k.source.name for k in self.unit.kept if k.must_be_finite}
            for name, tensor in solver.job.checkpoint.borrow(name for name in kept if name not in self.tensors):
                if name in checked:
                    check_finite(name, tensor)
                self.write(name, tensor)
            solver.staged.finish_unit(self.unit.name, self._to_tree(changed))
        errors = [layer.output_error or layer.weight_error for layer in self.layers]
        detail = f"{len(errors)} layers, relative error {max(errors):.4f} at most" if errors else ""
        done, name = len(solver.staged.done), self.unit.name
        solver.progress("quantize", done, len(solver.job.plan.units), f"{name}: {detail}" if detail else name)

    def _to_tree(self, changed: list[str]) -> dict[str, Any]:
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "tensors": self.tensors,
            "solved": self.solved,
            "changed": changed,
            "training": self.training,
            "data": self.solver.data_record(),
            "notes": self.solver.notes,
        }


class Digests:
    """sha256 of what was solved: of codes, scales, zeros and whatever else it is made of. Rows may come in parts."""

    def __init__(self) -> None:
        self.parts: list[Any] = []

    def update(self, weight: QTensor) -> None:
        tensors = [weight.codes] if weight.scheme.kind in FLOATS else weight.tensors()  # those have no scale
        self.parts = self.parts or [hashlib.sha256() for _ in tensors]
        for part, tensor in zip(self.parts, tensors, strict=True):
            part.update(raw_bytes(tensor))

    def whole(self) -> str:
        return hashlib.sha256("".join(part.hexdigest() for part in self.parts).encode()).hexdigest()


def rows_at_once(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """The numbers of the rows of a weight [out, in] in parts to work on; one part where it does not outgrow a block."""
    import torch

    return torch.arange(shape[0]).split(max(1, AT_ONCE // shape[1]))


def read_back(written: Checkpoint, job: Job, linear: Linear) -> QTensor:
    """A linear as it stands in the written files."""
    parts = dict(written.read_many(info.name for info in job.format.tensors(linear)))
    return job.format.unpack(linear.module, parts, linear.scheme)


def digest_written(written: Checkpoint, job: Job, linear: Linear) -> str:
    """The same digest of a linear as it stands in the written files, in parts where that is possible."""
    digests = Digests()
    if job.format.by_rows:
        for name, stored in written.borrow(info.name for info in job.format.tensors(linear)):
            for rows in rows_at_once(linear.shape):
                digests.update(job.format.unpack(linear.module, {name: stored[rows]}, linear.scheme))
    else:
        digests.update(read_back(written, job, linear))
    return digests.whole()


def digest(weight: QTensor) -> str:
    """That of a weight at once."""
    digests = Digests()
    digests.update(weight)
    return digests.whole()


def digest_bytes(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes."""
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()
