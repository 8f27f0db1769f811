"""Headers x recipe -> what happens to each tensor, with every impossible shape and unknown name at once.

Tensors are grouped into units, the steps of a run: `model.layers.3` and so on by the first number in a
name, and one unit for all that is outside such a list. Never imports torch.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

from qtool.errors import UsageError
from qtool.headers import WEIGHT_DTYPES, TensorInfo
from qtool.recipe import DEFAULT_IGNORE, Recipe
from qtool.scheme import BLOCK_TYPES, QuantScheme

OUTSIDE = "outside the blocks"
MASK = "a mask, not a weight"


@dataclass(frozen=True)
class Linear:
    """A weight [out, in] that is quantized; `module` is its name without `.weight`."""

    module: str
    source: TensorInfo
    scheme: QuantScheme
    transposed: bool = False  # stored [in, out]

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, in]"""
        return self.source.shape[::-1] if self.transposed else self.source.shape

    @property
    def size_bits(self) -> int:
        return self.scheme.size_bits(self.shape)


@dataclass(frozen=True)
class Kept:
    """A tensor that stays as it is; `asked` when the recipe says so or nothing else was possible to ask."""

    source: TensorInfo
    reason: str
    asked: bool

    named: bool = False  # by a pattern of the user's own

    @property
    def must_be_finite(self) -> bool:
        """Whether NaN or infinity in it is damage: not in masks, nor in what the user chose to leave alone."""
        return self.source.dtype in WEIGHT_DTYPES and self.reason != MASK and not self.named


@dataclass(frozen=True)
class Unit:
    """One step: what it reads, and what it writes."""

    name: str
    linears: tuple[Linear, ...]
    kept: tuple[Kept, ...]
    added: tuple[TensorInfo, ...] = ()  # what the source does not have


Layout = Callable[[Linear], list[TensorInfo]]  # the tensors that stand for a linear
Stored = Callable[[TensorInfo], TensorInfo | str]  # how a kept tensor is written, or why no such tensor is
Files = Callable[[list[TensorInfo]], dict[str, TensorInfo]]  # in which file each is


def _as_it_is(info: TensorInfo) -> TensorInfo:
    return info


def _in_no_file(infos: list[TensorInfo]) -> dict[str, TensorInfo]:
    return {info.name: info for info in infos}


@dataclass(frozen=True)
class Plan:
    """What happens to every tensor; `outputs` are the tensors written, each with its file."""

    units: tuple[Unit, ...]
    outputs: dict[str, TensorInfo]

    @property
    def linears(self) -> list[Linear]:
        return [linear for unit in self.units for linear in unit.linears]

    @property
    def kept(self) -> list[Kept]:
        return [kept for unit in self.units for kept in unit.kept]

    @property
    def size_bytes(self) -> int:
        return sum(info.size_bytes for info in self.outputs.values())

    @property
    def bits_on_disk(self) -> float:
        """The same as `bits_per_weight` with all that the format adds, such as padding."""
        others = {kept.source.name for kept in self.kept} | {info.name for unit in self.units for info in unit.added}
        size_bytes = sum(info.size_bytes for name, info in self.outputs.items() if name not in others)
        return 8 * size_bytes / self.weights if self.linears else 0.0

    @property
    def bits_per_weight(self) -> float:
        """Of the quantized weights, scales and zeros included."""
        return sum(linear.size_bits for linear in self.linears) / self.weights if self.linears else 0.0

    @property
    def weights(self) -> int:
        """How many weights are quantized."""
        return sum(prod(linear.shape) for linear in self.linears)


def make_plan(
    tensors: Mapping[str, TensorInfo],
    recipe: Recipe,
    layout: Layout,
    fused: Iterable[tuple[str, ...]] = (),
    solvable: Callable[[str], bool] | None = None,
    storable: Callable[[Linear], str | None] | None = None,
    transposed: Callable[[str], bool] | None = None,
    added: Iterable[TensorInfo] = (),
    scheme_of: Callable[[str, tuple[int, ...]], QuantScheme | None] | None = None,
    stored: Stored = _as_it_is,
    files: Files = _in_no_file,
    written_out: Collection[str] = (),
) -> Plan:
    """The plan for a checkpoint's headers. `fused` names linears (relative to a block) that are served as one;
    `solvable` says which modules the method can work on, `storable` why the format cannot store a linear, if so,
    `transposed` which modules store their weight [in, out]. `added` are tensors that the source does not have.
    `scheme_of` gives module and shape their scheme where it is not the same for all, None to keep a matrix as it is.
    `stored` and `files` are those of the container: what it leaves out is kept, whatever it is. `written_out`
    are quantized tensors that become dense. Raises UsageError with every problem in it."""
    problems: list[str] = []
    hints: list[str] = []
    for pattern in (*recipe.layers, *recipe.ignore):
        _check_pattern(pattern)
    default = None if scheme_of else QuantScheme.parse(recipe.scheme)
    overrides = {pattern: QuantScheme.parse(scheme) for pattern, scheme in recipe.layers.items()}
    linears: list[Linear] = []
    kept: list[Kept] = []
    modules = []
    for info in tensors.values():
        module = info.name.removesuffix(".weight")
        reason = _why_kept(info, recipe.ignore)
        if info.name in written_out:
            reason = Kept(info, "written out as it is worth", True)
        place = stored(info)
        if isinstance(place, str):
            reason = Kept(info, place, True)
        if reason:
            kept.append(reason)
            modules.append(module)
            continue
        is_transposed = bool(transposed and transposed(module))
        scheme = scheme_of(module, info.shape[::-1] if is_transposed else info.shape) if scheme_of else default
        for pattern, override in overrides.items():
            scheme = override if matches(module, pattern) else scheme
        if scheme is None:
            kept.append(Kept(info, "not quantized before", True))
        else:
            linears.append(Linear(module, info, scheme, is_transposed))
        modules.append(module)
    _check_patterns(recipe, modules, linears, problems, hints)
    _check_shapes(linears, problems, hints)
    if storable:
        _check_storable(linears, storable, problems, hints)
    if solvable:
        _check_solvable([x for x in linears if not solvable(x.module)], recipe.method, problems, hints)
    _check_fused(linears, tuple(fused), set(modules), problems, hints)
    if not linears and not problems and not written_out:
        problems.append("no tensor of this checkpoint is a linear layer to quantize")
    unasked = [k for k in kept if not k.asked]
    if recipe.strict and unasked:
        problems.append(
            f"--strict: `{unasked[0].source.name}` would be left alone: {unasked[0].reason}{_more(unasked)}"
        )
        hints.append("name what may stay as it is with --ignore")
    if problems:
        raise UsageError("\n".join(problems), hints[0] if hints else None)
    units = _units(linears, kept, list(added))
    return Plan(units, files(_outputs(units, layout, stored)))


def matches(module: str, pattern: str) -> bool:
    """Whether a shell pattern (`*.down_proj`), or a regular expression after `re:`, names a module."""
    if pattern.startswith("re:"):
        return re.search(pattern[3:], module) is not None
    return fnmatchcase(module, pattern)


def unit_of(name: str) -> str:
    """The unit of a tensor: its name up to the first number in it."""
    match = re.match(r"(.*?\.\d+)(?:\.|$)", name)
    return match[1] if match else OUTSIDE


def _why_kept(info: TensorInfo, ignore: Iterable[str]) -> Kept | None:
    module = info.name.removesuffix(".weight")
    for pattern in ignore:
        if matches(module, pattern):
            return Kept(info, f"ignored by `{pattern}`", True, named=pattern not in DEFAULT_IGNORE)
    if len(info.shape) < 2:
        return Kept(info, "a vector, not a matrix", True)
    if info.name.endswith("bias"):
        return Kept(info, MASK, True)
    if len(info.shape) > 2:
        return Kept(info, f"{len(info.shape)}-D tensors are not supported", False)
    if module == info.name:
        return Kept(info, "its name does not end in `.weight`", False)
    if info.dtype not in WEIGHT_DTYPES:
        return Kept(info, f"stored as {info.dtype}", False)
    return None


def _check_pattern(pattern: str) -> None:
    try:
        matches("", pattern)
    except re.error as error:
        raise UsageError(f"pattern `{pattern}` is not a regular expression: {error}") from None


def _check_patterns(
    recipe: Recipe, modules: list[str], linears: list[Linear], problems: list[str], hints: list[str]
) -> None:
    quantized = [linear.module for linear in linears]
    asked = [(p, quantized, "--layer") for p in recipe.layers]
    asked += [(p, modules, "--ignore") for p in recipe.ignore if p not in DEFAULT_IGNORE]
    for pattern, candidates, flag in asked:
        if not any(matches(module, pattern) for module in candidates):
            what = "layer to quantize" if flag == "--layer" else "tensor"
            problems.append(
                f"{flag} pattern `{pattern}` matches no {what} (for example `{candidates[0] if candidates else '-'}`)"
            )
            if any(pattern in module for module in candidates):
                hints.append(f"patterns match whole names: try `*{pattern}*`")


def _check_shapes(linears: list[Linear], problems: list[str], hints: list[str]) -> None:
    by_cause: dict[tuple[str, str], list[Linear]] = {}
    for linear in linears:
        cause = linear.scheme.shape_error(linear.shape)
        if cause:
            by_cause.setdefault((str(linear.scheme), cause), []).append(linear)
    for (scheme, cause), members in by_cause.items():
        problems.append(f"`{members[0].source.name}` cannot use {scheme}: {cause}{_more(members)}")
        kinds = "|".join(dict.fromkeys(member.module.rpartition(".")[2] for member in members))
        pattern = f"re:({kinds})$" if "|" in kinds else f"*.{kinds}"
        inputs, wanted = members[0].shape[-1], members[0].scheme
        divisor = inputs & -inputs  # the largest power of two that divides
        usable = wanted.kind == "int" and wanted.group_size and 16 <= divisor < wanted.group_size
        smaller = f", or use `--scheme {dataclasses.replace(wanted, group_size=divisor)}`" if usable else ""
        if wanted.kind in ("nf4", "nf4-dq", "fp4", "fp4-dq"):  # their format has nothing that fits every shape
            hints.append(f"leave these layers as they are: `--ignore '{pattern}'`")
            continue
        others = {"fp8-e4m3": "fp8-dynamic", **dict.fromkeys(BLOCK_TYPES, "q8_0" if inputs % 32 == 0 else "f16")}
        instead = others.get(wanted.kind, "int8-channel-sym")
        hints.append(f"give these layers another scheme: `--layer '{pattern}={instead}'`{smaller}")


def _check_storable(
    linears: list[Linear],
    storable: Callable[[Linear], str | None],
    problems: list[str],
    hints: list[str],
) -> None:
    by_cause: dict[str, list[Linear]] = {}
    for linear in linears:
        cause = storable(linear)
        if cause:
            by_cause.setdefault(cause, []).append(linear)
    for cause, members in by_cause.items():
        first = members[0]
        problems.append(f"`{first.module}` cannot be {first.scheme} in this output: {cause}{_more(members)}")
        hints.append(
            "choose one `--format` that stores every scheme of the recipe, another scheme, "
            f"or leave it alone with `--ignore '{first.module}'`"
        )


def _check_solvable(unsolvable: list[Linear], method: str, problems: list[str], hints: list[str]) -> None:
    if unsolvable:
        first = unsolvable[0].module
        problems.append(f"`{first}` is not among the linear layers that {method} has data for{_more(unsolvable)}")
        hints.append(f"leave it alone with `--ignore '*{first.rpartition('.')[2]}'`, or use `--method rtn`")


def _check_fused(
    linears: list[Linear],
    fused: tuple[tuple[str, ...], ...],
    modules: set[str],
    problems: list[str],
    hints: list[str],
) -> None:
    found = {linear.module: linear.scheme for linear in linears}
    layers = {
        (linear.module.removesuffix(member), group): None
        for linear in linears
        for group in fused
        for member in group
        if linear.module.endswith("." + member)
    }
    all_schemes = [  # of the members that the model has
        (prefix, {member: found.get(prefix + member) for member in group if prefix + member in modules})
        for prefix, group in layers
    ]
    differing = [(prefix, schemes) for prefix, schemes in all_schemes if len(set(schemes.values())) > 1]
    if differing:
        prefix, schemes = differing[0]
        listed = ", ".join(f"{m.rpartition('.')[2]} {s or 'left alone'}" for m, s in schemes.items())
        problems.append(f"`{prefix}*` are served as one layer but have several schemes: {listed}{_more(differing)}")
        names = "|".join(m.rpartition(".")[2] for m in schemes)
        hints.append(f"give them one scheme: `--layer 're:({names})$={next(s for s in schemes.values() if s)}'`")


def _more(members: Sequence[object]) -> str:
    return f" ({len(members) - 1} more like it)" if len(members) > 1 else ""


def _units(linears: list[Linear], kept: list[Kept], added: list[TensorInfo]) -> tuple[Unit, ...]:
    names = [*(k.source.name for k in kept), *(x.source.name for x in linears), *(x.name for x in added)]
    ordered = sorted(
        dict.fromkeys(map(unit_of, names)),
        key=lambda n: (n != OUTSIDE, [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", n)]),
    )
    return tuple(
        Unit(
            name,
            tuple(x for x in linears if unit_of(x.source.name) == name),
            tuple(x for x in kept if unit_of(x.source.name) == name),
            tuple(x for x in added if unit_of(x.name) == name),
        )
        for name in ordered
    )


def _outputs(units: Iterable[Unit], layout: Layout, stored: Stored) -> list[TensorInfo]:
    """Every tensor that is written, in order."""
    outputs: list[TensorInfo] = []
    for unit in units:
        kept = [stored(kept.source) for kept in unit.kept]
        outputs += [*(info for info in kept if isinstance(info, TensorInfo)), *unit.added]
        for linear in unit.linears:
            outputs += layout(linear)
    return outputs
