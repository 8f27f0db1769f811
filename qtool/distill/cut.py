"""A student cut out of its teacher: how large it is, and what its tensors are called and look like.

Known from headers alone, before anything is measured: which blocks and channels it keeps is chosen in
`qtool.distill.students`, how many of them here. Never imports torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from qtool.distill.recipe import StudentSpec
from qtool.errors import QtoolError, UsageError, shown
from qtool.formats.weights import Weights
from qtool.headers import TORCH_NAMES, TensorInfo
from qtool.models.architectures import Architecture, config_value
from qtool.models.widths import WIDTHS, Axes, Sizes, axes_in_block, axes_outside, changed_config, sizes_of


@dataclass(frozen=True)
class Cut:
    """`blocks` are the teacher's, as far as they are known beforehand; `tensors` are what the student's tensors are
    made of: the teacher's name with `{}` for the number of the block, and the axes that get narrower."""

    before: Sizes
    after: Sizes
    prefix: str  # of blocks in the checkpoint, with the last dot
    blocks: tuple[int, ...] | None
    inside: dict[str, Axes]  # by name inside a block
    outside: dict[str, Axes]
    infos: dict[str, TensorInfo]  # of the student
    config_changes: dict[str, Any]

    @property
    def is_narrower(self) -> bool:
        return replace(self.before, blocks=0) != replace(self.after, blocks=0)

    @property
    def needs_rows(self) -> bool:
        """Whether the teacher has to be run to choose what is kept."""
        return self.is_narrower or self.blocks is None

    def source(self, name: str, blocks: list[int]) -> tuple[str, int | None, Axes]:
        """Where a tensor of the student with these blocks comes from: name, number among its blocks, and axes."""
        if not (match := _numbered(name, self.prefix)):
            return name, None, self.outside[name]
        index, inner = int(match[1]), match[2]
        return f"{self.prefix}{blocks[index]}.{inner}", index, self.inside[inner]


def plan_cut(spec: StudentSpec, weights: Weights, architecture: Architecture) -> Cut:
    """The cut that a spec asks of a teacher. Raises UsageError for what that does not have or cannot spare."""
    config = weights.checkpoint.config
    first = architecture.linears()[0]
    prefixes = [
        f"{blocks}." for blocks in architecture.spellings(architecture.blocks)
        if f"{blocks}.0.{first}.weight" in weights.shapes
    ]  # fmt: skip
    if not prefixes:
        raise QtoolError(f"the checkpoint has no tensor `{architecture.blocks}.0.{first}.weight`")
    prefix = prefixes[0]
    inner: dict[int, dict[str, tuple[int, ...]]] = {}
    outside: dict[str, Axes] = {}
    for name, shape in weights.shapes.items():
        if match := _numbered(name, prefix):
            inner.setdefault(int(match[1]), {})[match[2]] = shape
        else:
            outside[name] = _outside(architecture, name)
    said = config_value(config, "num_hidden_layers")
    if sorted(inner) != list(range(len(inner))) or said != len(inner):
        raise QtoolError(f"config.json has {shown(said)} blocks, but the checkpoint {len(inner)}, up to {max(inner)}")
    if other := next((i for i, shapes in sorted(inner.items()) if shapes != inner[0]), None):
        raise UsageError(f"block {other} has other tensors than block 0, so blocks cannot be left out")
    if missing := next((x for x in architecture.linears() if f"{x}.weight" not in inner[0]), None):
        raise QtoolError(f"the checkpoint has no tensor `{prefix}0.{missing}.weight`, which its architecture needs")
    widths = WIDTHS[config["model_type"]]
    linears = {linear: inner[0][f"{linear}.weight"] for linear in architecture.linears()}
    before = sizes_of(config, architecture, len(inner), linears)
    blocks = _blocks(spec, before.blocks)
    after = _after(spec, before, spec.layers if blocks is None else len(blocks), widths.head_dim)
    between = [name for name in outside if name.startswith(tuple(f"{x}." for x in widths.between))]
    if between and after.hidden != before.hidden:
        raise UsageError(f"this model has a `{between[0]}`: its hidden size stays", "leave --hidden out")
    if between:  # the embedding is as wide as it likes
        outside = dict.fromkeys(outside, ())
    inside = {name: axes_in_block(widths, architecture, name) for name in inner[0]}
    cut = Cut(before, after, prefix, blocks, inside, outside, {}, changed_config(config, widths, before, after))
    for name, axes in outside.items():
        cut.infos[name] = _info(weights, name, name, after.shape(axes, weights.shapes[name]))
    for index in range(after.blocks):
        for inner_name, axes in inside.items():
            name = f"{prefix}{index}.{inner_name}"
            shape = after.shape(axes, inner[0][inner_name])
            cut.infos[name] = _info(weights, name, f"{prefix}0.{inner_name}", shape)
    return cut


def _numbered(name: str, prefix: str) -> re.Match[str] | None:
    """The number of a block in a tensor's name, and the name inside the block."""
    return re.fullmatch(re.escape(prefix) + r"(\d+)\.(.+)", name)


def _outside(architecture: Architecture, name: str) -> Axes:
    """The axes of a tensor outside the blocks, by the name that the file has for it."""
    file_module, _, kind = name.rpartition(".")
    ends = (architecture.embedding, architecture.head, architecture.norm, *architecture.before)
    module = next((own for own in ends if file_module in architecture.spellings(own)), file_module)
    module = next((own for own in ends if name in architecture.spellings(f"{own}.{kind}")), module)
    return axes_outside(architecture, module, kind)


def _info(weights: Weights, name: str, source: str, shape: tuple[int, ...]) -> TensorInfo:
    """A tensor of the student: of the teacher's type, and of bfloat16 where that is none to train in."""
    dtype = weights.dense[source].dtype
    return TensorInfo(name, "BF16" if dtype.startswith("F") and dtype not in TORCH_NAMES else dtype, shape)


def _blocks(spec: StudentSpec, count: int) -> tuple[int, ...] | None:
    """The teacher's blocks that stay; None where they are chosen by what they do."""
    if spec.drop_layers:
        for index in spec.drop_layers:
            if not 0 <= index < count:
                raise UsageError(f"--drop-layers {index}: the teacher's layers are 0 to {count - 1}")
        kept = tuple(index for index in range(count) if index not in spec.drop_layers)
        if not kept:
            raise UsageError(f"--drop-layers names all {count} layers", "leave at least one")
        return kept
    wanted = spec.layers or count
    if wanted > count:
        raise UsageError(f"--layers {wanted}: the teacher has {count}")
    if wanted == count or spec.importance == "even":
        return evenly_spaced(wanted, count)
    return None


def evenly_spaced(wanted: int, count: int) -> tuple[int, ...]:
    """So many of `count` layers, the first and the last among them: layer i (count - 1) / (wanted - 1), rounded."""
    if wanted == 1:
        return (0,)
    return tuple((2 * i * (count - 1) + wanted - 1) // (2 * (wanted - 1)) for i in range(wanted))


def _after(spec: StudentSpec, before: Sizes, blocks: int | None, has_head_dim: bool) -> Sizes:
    """The sizes of the student. Heads go with the keys and values that they share, unless `kv_heads` says otherwise."""
    for flag, wanted, there in (
        ("--hidden", spec.hidden, before.hidden), ("--heads", spec.heads, before.heads),
        ("--kv-heads", spec.kv_heads, before.kv_heads), ("--mlp", spec.mlp, before.mlp),
    ):  # fmt: skip
        if wanted is not None and wanted > there:
            raise UsageError(f"{flag} {wanted}: the teacher has {there}, and a student is cut out of that")
    heads = spec.heads or before.heads
    shared = before.heads // before.kv_heads
    if not has_head_dim and spec.kv_heads not in (None, heads):
        raise UsageError("--kv-heads means nothing for this architecture: every head has its own keys and values")
    kv_heads = spec.kv_heads or max(1, heads // shared)  # one that all heads share stays
    if not spec.kv_heads and before.kv_heads > 1 and heads % shared:
        sizes = ", ".join(str(n) for n in range(shared, before.heads, shared))
        raise UsageError(
            f"--heads {heads}: the teacher's heads share keys and values in groups of {shared}",
            f"a multiple of that ({sizes}), or say with --kv-heads how many keys and values there shall be",
        )
    if heads % kv_heads or heads // kv_heads > shared:
        raise UsageError(
            f"{heads} heads cannot share the keys and values of {kv_heads}: groups are equal, of at most {shared} heads"
        )
    return replace(before, blocks=blocks or before.blocks, hidden=spec.hidden or before.hidden, heads=heads,
                   kv_heads=kv_heads, mlp=spec.mlp or before.mlp)  # fmt: skip
