"""What `qtool distill` does, as frozen dataclasses. Never imports torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from qtool.errors import UsageError, unknown
from qtool.finishing import BLOCK, FINISHES
from qtool.methods import METHODS
from qtool.recipe import PROTOCOLS, DataSpec, EvalSpec, Recipe, options_of, section
from qtool.recipe import build as build_quantize
from qtool.training.objective import Objective
from qtool.training.options import Training
from qtool.transforms import TRANSFORMS

EVEN = "even"
IMPORTANCES = (EVEN, "cosine")
CACHED, LIVE = "cached", "live"
DEFAULT_METHOD, DEFAULT_FINISH = "gptaq", "scales"  # of a quantized student


@dataclass(frozen=True)
class StudentSpec:
    """Who learns: a model of its own, or what is cut out of the teacher."""

    path: str | None = None  # a folder or a hub id; excludes all below
    layers: int | None = None  # so many of the teacher's
    drop_layers: tuple[int, ...] = ()  # all but these, counted from 0
    importance: str = EVEN  # which `layers`: evenly spaced, or cosine: those that turn the hidden states most
    hidden: int | None = None  # channels of the hidden states
    heads: int | None = None  # of attention
    kv_heads: int | None = None  # keys and values that they share; default: as many heads to each as before
    mlp: int | None = None  # channels inside the MLP
    rows: int = 32  # training rows on which importance is measured

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "kv_heads", "mlp", "rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"student.{name} is {value}, but must be at least 1")
        if self.importance not in IMPORTANCES:
            raise unknown("importance", self.importance, IMPORTANCES)
        if self.layers and self.drop_layers:
            raise UsageError("--layers and --drop-layers both say which layers stay", "leave one of them out")
        if self.path and self.is_cut:
            raise UsageError("--student names a model as it is, which --layers, --hidden and the like would change",
                             "leave one or the other out")  # fmt: skip

    @property
    def is_cut(self) -> bool:
        """Whether anything is taken from the teacher."""
        return bool(self.layers or self.drop_layers or self.hidden or self.heads or self.kv_heads or self.mlp)


@dataclass(frozen=True)
class Distillation:
    """The recipe of `qtool distill`."""

    student: StudentSpec = field(default_factory=StudentSpec)
    data: DataSpec = field(default_factory=DataSpec)  # the rows to train on
    objective: Objective = field(default_factory=Objective)
    training: Training = field(default_factory=Training)
    teacher: str = CACHED  # cached: run once over the rows; live: in memory beside the student
    cache_teacher: int | None = None  # so many of its most likely tokens are cached on disk instead of hidden states
    eval: EvalSpec | None = None  # measure teacher, student before and after, and gate

    def __post_init__(self) -> None:
        if self.teacher not in (CACHED, LIVE):
            raise unknown("kind of teacher", self.teacher, (CACHED, LIVE))
        if self.cache_teacher is not None and self.cache_teacher < 1:
            raise UsageError(f"cache_teacher is {self.cache_teacher}, but must be at least 1")
        if self.cache_teacher:
            if self.teacher == LIVE:
                raise UsageError("a live teacher is not cached", "leave --cache-teacher out")
            self.objective.check_cached()
            if not self.objective.diverges:
                raise UsageError("--cache-teacher means nothing where only cross entropy counts: the teacher is not "
                                 "asked", "leave it out, or give --alpha above 0")  # fmt: skip
            if self.objective.top_k not in (None, self.cache_teacher):
                raise UsageError(f"--top-k {self.objective.top_k} and --cache-teacher {self.cache_teacher} differ",
                                 "--cache-teacher alone says both")  # fmt: skip
        if not self.training.held_out and self.training.held_out is not None:
            raise UsageError("held_out is 0, but without held-out rows nothing says which step is the best",
                             "leave it out, or give at least 1")  # fmt: skip
        if self.eval and self.eval.protocol not in PROTOCOLS:
            raise unknown("protocol", self.eval.protocol, PROTOCOLS)

    @property
    def needs_teacher(self) -> bool:
        """Whether anything is learned from it; else cross entropy alone."""
        return self.objective.diverges or self.objective.has_states

    @property
    def is_live(self) -> bool:
        """Whether it is in memory beside the student."""
        return self.needs_teacher and (self.teacher == LIVE or self.objective.has_states)


def build(tree: Mapping[str, Any]) -> Distillation:
    """The recipe that a tree of plain values describes. Raises UsageError for unknown keys and wrong types."""
    recipe: Distillation = options_of(Distillation, tree, "")
    return recipe


def quantized(tree: Mapping[str, Any]) -> Recipe:
    """The recipe of `quantize` whose student is the teacher itself, rounded and then trained by `finish`.

    `objective` and `training` are those of every finish that trains all layers together. Raises UsageError.
    """
    tree = dict(tree)
    for key in ("student", "teacher", "cache_teacher"):
        if tree.pop(key, None):
            raise UsageError(f"`{key}` means nothing with --scheme: the student is the teacher with rounded weights",
                             "leave one of them out")  # fmt: skip
    learned = {**section(tree, "objective"), **section(tree, "training")}
    tree.pop("objective", None)
    tree.pop("training", None)
    tree = {"method": DEFAULT_METHOD, "finish": [DEFAULT_FINISH], **tree}
    names = [*METHODS, *TRANSFORMS, *FINISHES]
    finish = build_quantize(tree, names).finish
    if not set(finish) - {BLOCK}:
        raise UsageError(f"finish {list(finish)} trains nothing that learns from the teacher's distributions",
                         "`--finish scales`, full or lora; `qtool quantize` does without")  # fmt: skip
    for name in finish:
        if name in FINISHES and name != BLOCK:
            tree[name] = {**section(tree, name), **learned}
    return build_quantize(tree, names)


def to_tree(recipe: Distillation) -> dict[str, Any]:
    """The plain values that `build` takes: the inverse of it."""
    tree = dataclasses.asdict(recipe)
    tree["student"]["drop_layers"] = list(recipe.student.drop_layers)
    return tree


def to_yaml(recipe: Distillation) -> str:
    return yaml.safe_dump(to_tree(recipe), sort_keys=False, allow_unicode=True)
