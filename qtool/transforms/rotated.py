"""A checkpoint whose tensors are rotated as they are read; see `qtool.transforms.rotation`.

With the residual stream h a row and R orthogonal, h becomes h R: embeddings E R; readers of a norm with weight g
W diag(g) R; writers R^T W and R^T b; norms 1. With a block-diagonal S of one matrix per head, the rows that make the
values become S^T W and S^T b, and the columns that read them W S. Arithmetic is float64, in parts.

Every linear of a block reads a norm or writes to the residual stream: that is what `Architecture.rotatable` says.

Shapes: O out features, I in features, N rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qtool.headers import TensorInfo
from qtool.models.architectures import Architecture, Input, config_value
from qtool.models.producers import producer_rows

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.formats.weights import Weights
    from qtool.scheme import ActivationScheme
    from qtool.transforms.hadamard import Orthogonal
    from qtool.transforms.rotation import Rotation

STREAM, HEAD = "stream", "head"  # what is rotated
PART_ELEMENTS = 1 << 22  # of a matrix worked on at once


@dataclass(frozen=True)
class _Change:
    """What becomes of a matrix [O, I], or of a bias, which counts as one with a single column.

    Its columns are multiplied by the weight of the norm `gain`, then rotated as `columns` says; of its rows those
    in `span` as `rows` says.
    """

    source: str  # the tensor of the checkpoint that it is made of
    gain: str | None = None
    columns: str | None = None
    rows: str | None = None
    span: slice = field(default_factory=lambda: slice(None))


class RotatedSource:
    """See `qtool.formats.weights.Source`. No torch is loaded before the first tensor is read."""

    def __init__(
        self, source: Weights, architecture: Architecture, config: Mapping[str, Any], options: Rotation
    ) -> None:
        self.source, self.architecture, self.config, self.options = source, architecture, config, options
        self.format, self.shapes, self.added = source.format, dict(source.shapes), list(source.added)
        self.config_changes = dict(source.config_changes)
        self.changes: dict[str, _Change] = {}
        self.norms = {f"{architecture.norm}.weight"}
        self._plan_ends()
        inside = architecture.blocks + "."
        numbers = [name.removeprefix(inside).partition(".")[0] for name in self.shapes if name.startswith(inside)]
        for number in dict.fromkeys(numbers):
            for each in architecture.inputs:
                self._plan_input(inside + number, each)
        self.changed = {*source.changed, *self.norms, *self.changes} - {info.name for info in self.added}

    def _plan_ends(self) -> None:
        """The embedding and the head, each a tensor of its own from now on."""
        embedding, head, norm = (
            f"{module}.weight"
            for module in (self.architecture.embedding, self.architecture.head, self.architecture.norm)
        )
        if self.config.get("tie_word_embeddings"):
            self.config_changes["tie_word_embeddings"] = False
        for name, other in ((embedding, head), (head, embedding)):
            origin = name
            if name not in self.source.shapes and self.config.get("tie_word_embeddings"):
                origin = other
                self.shapes[name] = self.source.shapes[other]
                self.added.append(TensorInfo(name, self._dtype(other), self.shapes[name]))
            if name in self.shapes:
                self.changes[name] = _Change(origin, gain=norm if name == head else None, columns=STREAM)

    def _plan_input(self, block: str, each: Input) -> None:
        """The linears that read an input, and what produces it."""
        producer = f"{block}.{each.producer}"
        if len(self.shapes[f"{producer}.weight"]) == 1:
            self.norms.add(f"{producer}.weight")
            for linear in each.linears:
                self._change(f"{block}.{linear}.weight", gain=f"{producer}.weight", columns=STREAM)
            return
        values = self.options.heads and each.rows == "value"
        for linear in each.linears:
            self._change(f"{block}.{linear}.weight", columns=HEAD if values else None, rows=STREAM)
            self._change(f"{block}.{linear}.bias", rows=STREAM)
        if values:
            inputs = self.shapes[f"{block}.{each.linears[0]}.weight"][1]
            rows = producer_rows(each, self.config, self.shapes[f"{producer}.weight"][0], inputs)
            for name in (f"{producer}.weight", f"{producer}.bias"):
                self._change(name, rows=HEAD, span=slice(min(rows), max(rows) + 1))

    def _change(
        self,
        name: str,
        gain: str | None = None,
        columns: str | None = None,
        rows: str | None = None,
        span: slice | None = None,
    ) -> None:
        """Plan what is given for a tensor, if there is one of that name, beside what is planned for it already."""
        if name in self.shapes:
            old = self.changes.get(name, _Change(name))
            self.changes[name] = replace(
                old,
                gain=gain or old.gain,
                columns=columns or old.columns,
                rows=rows or old.rows,
                span=span or old.span,
            )

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """float32 tensors by name."""
        import torch

        result = {}
        for name in names:
            if name in self.norms:
                result[name] = torch.full(self.shapes[name], 1 - self.architecture.norm_offset)
                continue
            change = self.changes.get(name, _Change(name))
            result[name] = self.source.read([change.source])[change.source]
            self._apply(change, result[name])
        return result

    def read_rows(self, name: str, rows: Tensor) -> Tensor:
        """Some rows of a matrix in float32."""
        change = self.changes.get(name, _Change(name))
        if change.rows:
            return self.read([name])[name][rows]
        chosen = self.source.read_rows(change.source, rows)
        self._apply(change, chosen)
        return chosen

    def read_stored(self, name: str) -> Tensor:
        """A tensor in the type in which it is stored; beside it there are never more than parts of it in memory."""
        import torch

        from qtool.parameters import TORCH_DTYPES

        if name not in self.norms and name not in self.changes:
            return self.source.read_stored(name)
        shape = self.shapes[name]
        stored = torch.empty(shape, dtype=TORCH_DTYPES[self._dtype(self.changes.get(name, _Change(name)).source)])
        if len(shape) < 2 or self.changes[name].rows:
            return stored.copy_(self.read([name])[name])
        for rows in torch.arange(shape[0]).split(max(1, PART_ELEMENTS // shape[1])):
            stored[rows[0] : rows[-1] + 1] = self.read_rows(name, rows)
        return stored

    def roundings(self, unit: str) -> Mapping[str, tuple[ActivationScheme, Tensor | None]]:
        return self.source.roundings(unit)

    def kv_scales(self, unit: str) -> tuple[ActivationScheme, Tensor, Tensor] | None:
        return self.source.kv_scales(unit)

    @cached_property
    def rotations(self) -> dict[str, Orthogonal]:
        """R of the residual stream and of one head."""
        from qtool.transforms.hadamard import hadamard, random_orthogonal

        make = hadamard if self.options.kind == "hadamard" else random_orthogonal
        width = self.shapes[f"{self.architecture.embedding}.weight"][1]
        made = {STREAM: make(width, self.options.seed)}
        if self.options.heads:
            heads = int(config_value(self.config, "num_attention_heads"))
            each = next(each for each in self.architecture.inputs if each.rows == "value")
            reader = next(name for name in self.changes if name.endswith(f".{each.linears[0]}.weight"))
            made[HEAD] = make(self.shapes[reader][1] // heads, self.options.seed + 1)
        return made

    def _apply(self, change: _Change, tensor: Tensor) -> None:
        """A change in place."""
        matrix_OI = tensor if tensor.dim() == 2 else tensor[:, None]
        if change.columns:
            gain_I = self._gain(change.gain) if change.gain else 1.0
            rotation = self.rotations[change.columns]
            _by_parts(matrix_OI, lambda x_NI: rotation.apply(x_NI * gain_I))
        if change.rows:
            _by_parts(matrix_OI[change.span].T, self.rotations[change.rows].apply)

    def _gain(self, norm: str) -> Tensor:
        """What a norm multiplies by, float64 [I]."""
        return self.source.read([norm])[norm].double() + self.architecture.norm_offset

    def _dtype(self, name: str) -> str:
        return self.source.checkpoint.tensors[name].dtype


def _by_parts(matrix_NI: Tensor, function: Callable[[Tensor], Tensor]) -> None:
    """Replace the rows of a matrix, or view, by what a function of float64 rows makes of them."""
    for part_NI in matrix_NI.split(max(1, PART_ELEMENTS // matrix_NI.shape[1])):
        part_NI.copy_(function(part_NI.double()))
