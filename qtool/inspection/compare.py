"""How far each tensor of a checkpoint is from that of another, dense or packed on both sides.

Values are float32 as the model computes with them, sums are float64. SQNR = 10 log10(|base|^2 / |model - base|^2)
in dB; relative = |model - base| / |base|, Frobenius norms. Memory is that of one tensor of each side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from math import log10, sqrt
from typing import TYPE_CHECKING, Any

from qtool.checkpoint.reader import Checkpoint
from qtool.errors import QtoolError
from qtool.formats.weights import Weights
from qtool.inspection.logical import entries, open_weights, tied_pair

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 1 << 22  # values in float64 at a time

Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class Difference:
    """One tensor that differs. `sqnr_db` and `relative` are None where the base is zero throughout."""

    name: str
    shape: tuple[int, ...]
    stored_as: str
    base_stored_as: str
    sqnr_db: float | None
    relative: float | None
    mean_absolute: float
    max_absolute: float


@dataclass(frozen=True)
class Reshaped:
    """A tensor whose shapes differ, so that it cannot be compared."""

    name: str
    shape: tuple[int, ...]
    base_shape: tuple[int, ...]


@dataclass(frozen=True)
class Comparison:
    """All tensors of both sides: `different` worst first, the others by name."""

    model: str
    base: str
    different: list[Difference]
    identical: list[str]
    reshaped: list[Reshaped]
    unread: list[str]  # stored in blocks of GGUF's that qtool does not read, on either side
    only_model: list[str]
    only_base: list[str]
    relative: float | None  # of all compared tensors together
    sqnr_db: float | None  # likewise; None also when all are identical
    notes: list[str]

    def to_tree(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class ErrorSums:
    """Sums over the values of a pair of tensors, from which all measures of their difference follow."""

    count: int = 0
    base_squares: float = 0.0
    error_squares: float = 0.0
    error_absolute: float = 0.0
    max_absolute: float = 0.0

    def __add__(self, other: ErrorSums) -> ErrorSums:
        return ErrorSums(
            self.count + other.count,
            self.base_squares + other.base_squares,
            self.error_squares + other.error_squares,
            self.error_absolute + other.error_absolute,
            max(self.max_absolute, other.max_absolute),
        )

    @property
    def relative(self) -> float | None:
        return sqrt(self.error_squares / self.base_squares) if self.base_squares else None

    @property
    def sqnr_db(self) -> float | None:
        if not self.base_squares or not self.error_squares:
            return None
        return 10 * (log10(self.base_squares) - log10(self.error_squares))


def compare(model: Checkpoint, base: Checkpoint, progress: Progress) -> Comparison:
    """Every tensor of `model` against the one of that name in `base`. Raises QtoolError when they share none."""
    ours, theirs = open_weights(model), open_weights(base)
    our_names, their_names, notes = _untied(ours, theirs)
    shared = [name for name in our_names if name in their_names]
    if not shared:
        raise QtoolError(
            f"{model.path} and {base.path} have no tensor in common: `{next(iter(our_names), '-')}` is not among "
            f"`{next(iter(their_names), '-')}` and the like",
            "compare two checkpoints of the same architecture",
        )
    our_entries, their_entries = ({e.name: e for e in entries(side)} for side in (ours, theirs))
    different: list[Difference] = []
    identical, reshaped, unread, total = [], [], [], ErrorSums()
    for done, name in enumerate(shared, 1):
        mine, other = our_names[name], their_names[name]
        shape, base_shape = our_entries[mine].shape, their_entries[other].shape
        if our_entries[mine].is_unread or their_entries[other].is_unread:
            unread.append(name)
            continue
        if shape != base_shape:
            reshaped.append(Reshaped(name, shape, base_shape))
            continue
        sums = error_sums(ours.read([mine])[mine], theirs.read([other])[other])
        total += sums
        if sums.max_absolute:
            stored, base_stored = our_entries[mine].stored_as, their_entries[other].stored_as
            mean = sums.error_absolute / sums.count
            different.append(
                Difference(name, shape, stored, base_stored, sums.sqnr_db, sums.relative, mean, sums.max_absolute)
            )
        else:
            identical.append(name)
        progress("compare", done, len(shared), name)
    different.sort(key=lambda d: float("-inf") if d.sqnr_db is None else d.sqnr_db)
    return Comparison(
        model=str(model.path),
        base=str(base.path),
        different=different,
        identical=identical,
        reshaped=reshaped,
        unread=unread,
        only_model=_missing(our_names, their_names),
        only_base=_missing(their_names, our_names),
        relative=total.relative,
        sqnr_db=total.sqnr_db,
        notes=notes,
    )


def error_sums(tensor: Tensor, base: Tensor) -> ErrorSums:
    """The sums for two float32 tensors of one shape."""
    sums = ErrorSums()
    for part, base_part in zip(tensor.reshape(-1).split(CHUNK), base.reshape(-1).split(CHUNK), strict=True):
        if not part.numel():
            continue
        reference = base_part.double()
        error = part.double() - reference
        absolute = error.abs()
        sums += ErrorSums(
            count=part.numel(),
            base_squares=reference.square().sum().item(),
            error_squares=error.square().sum().item(),
            error_absolute=absolute.sum().item(),
            max_absolute=absolute.max().item(),
        )
    return sums


def _untied(ours: Weights, theirs: Weights) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Each side's names, with the tensor to read for each: a tied one that is not stored is its twin."""
    names: list[dict[str, str]] = [{n: n for n in side.shapes} for side in (ours, theirs)]
    notes = []
    for weights, mine, others in ((ours, names[0], names[1]), (theirs, names[1], names[0])):
        pair = tied_pair(weights.checkpoint)
        for name, stored in (pair, pair[::-1]) if pair else ():
            if name in others and name not in weights.shapes and stored in weights.shapes:
                mine[name] = stored
                if stored not in others:  # one tensor on both sides, under different names
                    del mine[stored]
                notes.append(f"`{name}` is `{stored}` in {weights.checkpoint.path}: embedding and head are tied")
    return names[0], names[1], notes


def _missing(names: Iterable[str], others: dict[str, str]) -> list[str]:
    return [name for name in names if name not in others]
