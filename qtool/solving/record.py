"""What is written of one unit: for the journal, the report and the verification."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.writer import raw_bytes
from qtool.formats.weights import check_finite
from qtool.job import Job
from qtool.numerics.grid import QTensor
from qtool.parameters import TORCH_DTYPES, Parameters
from qtool.plan import Linear, Unit
from qtool.report.model import LayerRecord

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

    def write(self, name: str, tensor: Tensor) -> None:
        self.tensors[name] = self.solver.staged.write(name, tensor)

    def pack(self, linear: Linear, weight: QTensor) -> None:
        """A linear as the format holds it."""
        with self.solver.watch.stage("write"):
            for name, tensor in self.solver.job.format.pack(linear.module, weight, linear.source.dtype).items():
                self.write(name, tensor)
            self.solved[linear.module] = digest([weight])

    def pack_rows(self, linear: Linear, parts: Iterable[QTensor]) -> None:
        """The same of one whose rows come a few at a time; no more of it than its packed bytes is kept."""
        format, dtype = self.solver.job.format, linear.source.dtype
        packed: list[Tensor] = []

        def packing() -> Iterator[QTensor]:
            for part in parts:
                with self.solver.watch.stage("write"):
                    packed.extend(format.pack(linear.module, part, dtype).values())
                yield part

        self.solved[linear.module] = digest(packing())
        with self.solver.watch.stage("write"):
            self.write(format.tensors(linear)[0].name, joined(packed))

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
            "data": self.solver.data_record(),
            "notes": self.solver.notes,
        }


def read_back(written: Checkpoint, job: Job, linear: Linear) -> QTensor:
    """A linear as it stands in the written files."""
    parts = dict(written.read_many(info.name for info in job.format.tensors(linear)))
    return job.format.unpack(linear.module, parts, linear.scheme)


def digest(weight: QTensor) -> str:
    """sha256 of what was solved: codes, scales, zeros and whatever else it is made of."""
    return hashlib.sha256("".join(map(digest_bytes, weight.tensors())).encode()).hexdigest()


def digest_bytes(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes."""
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()
