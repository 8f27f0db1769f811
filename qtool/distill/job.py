"""A teacher and a recipe, checked against each other: all that can be known before any work. Never imports torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from typing import Any

from qtool.calibration.texts import SELF, check_source, is_local, local_files
from qtool.checkpoint.hub import locate
from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.writer import Safetensors
from qtool.distill.cut import Cut, plan_cut
from qtool.distill.recipe import EVEN, Distillation
from qtool.errors import UsageError
from qtool.estimate import FLOP_PER_S, PROCESS_BYTES
from qtool.formats.weights import Weights
from qtool.gguf.checkpoint import open_checkpoint
from qtool.headers import TORCH_NAMES, TensorInfo
from qtool.models.architectures import Architecture, architecture_of, config_value
from qtool.training.options import MOST_ROWS

BYTES_PER_TOKEN = 3.5  # of text
PARAMETER_BYTES = 16  # float32: itself, its gradient, and two moments
LONGEST_DEFAULT = 2048


@dataclass(frozen=True)
class DistillJob:
    """`student` is a model of its own; else `cut` says what is taken from the teacher."""

    teacher: str  # as it was typed
    checkpoint: Checkpoint  # the teacher's
    source: Weights
    architecture: Architecture
    recipe: Distillation
    cut: Cut | None
    student: Checkpoint | None

    @cached_property
    def outputs(self) -> dict[str, TensorInfo]:
        """The tensors of the student, each with its file."""
        infos = self.cut.infos if self.cut else self.student.tensors if self.student else {}
        return Safetensors().files([TensorInfo(info.name, info.dtype, info.shape) for info in infos.values()])

    @property
    def models(self) -> list[Checkpoint]:
        """Whose files decide the output."""
        return [self.checkpoint, *([self.student] if self.student else [])]

    @property
    def context(self) -> int:
        """Tokens that both models were made for."""
        return min(int(config_value(x.config, "max_position_embeddings") or 2048) for x in self.models)


def prepare(model: str, recipe: Distillation) -> DistillJob:
    """The job, or a UsageError with what is wrong with it. Reads headers only."""
    spec = recipe.student
    checkpoint = open_checkpoint(locate(model))
    architecture = _architecture(checkpoint)
    source = Weights(checkpoint)
    if not spec.path and not spec.is_cut:
        raise UsageError(
            "there is no student",
            "`--layers N`, `--drop-layers 3,5`, `--hidden N`, `--heads N` and `--mlp N` cut one out of the teacher; "
            "`--student DIR` is another model; `--scheme S` is the teacher itself, quantized",
        )
    if spec.importance != EVEN and not spec.layers:
        raise UsageError(f"importance `{spec.importance}` chooses layers, but --layers does not say how many",
                         "give --layers, or leave --importance out")  # fmt: skip
    cut = student = None
    if spec.path:
        student = open_checkpoint(locate(spec.path))
        _architecture(student)
        if Weights(student).format or student.home.is_file():
            raise UsageError(f"{student.path} is quantized: a student is trained, and written, in 16 or 32 bits",
                             "give the model that it was made from")  # fmt: skip
        if odd := next((x for x in student.tensors.values() if x.dtype[0] == "F" and x.dtype not in TORCH_NAMES), None):
            raise UsageError(f"`{odd.name}` of {student.path} is {odd.dtype}: a student is trained, and written, in 16 "
                             "or 32 bits", "convert it to BF16 or F32")  # fmt: skip
        sizes = [config_value(x.config, "vocab_size") for x in (student, checkpoint)]
        if sizes[0] != sizes[1]:
            raise UsageError(f"{student.path} predicts {sizes[0]} tokens, {checkpoint.path} {sizes[1]}",
                             "teacher and student need the same tokens")  # fmt: skip
    else:
        cut = plan_cut(spec, source, architecture)
        if cut.before == cut.after:
            raise UsageError("the student would be the teacher itself: nothing is left out",
                             "give fewer layers, or less of another size")  # fmt: skip
    if recipe.data.source == SELF:
        raise UsageError("distillation takes texts, not what the model writes by itself", "give a text with --data")
    check_source(recipe.data)
    if recipe.eval:
        check_source(recipe.eval.data)
    return DistillJob(model, checkpoint, source, architecture, recipe, cut, student)


def describe(job: DistillJob) -> dict[str, Any]:
    """What a run would do and about what it would take."""
    recipe, training = job.recipe, job.recipe.training
    seqlen = recipe.data.seqlen or min(job.context, LONGEST_DEFAULT)
    rows = recipe.data.rows or _rows(job, seqlen)
    trained = max(1, rows - (training.held_out or max(1, rows // 16)))
    steps = training.total_steps(trained)
    theirs, ours = _parameters(job.source.shapes.values()), _parameters(x.shape for x in job.outputs.values())
    tokens = training.total_rows(trained) * seqlen
    vocabulary, hidden = (int(config_value(job.checkpoint.config, key) or 0) for key in ("vocab_size", "hidden_size"))
    flop = tokens * (8.0 if training.recompute else 6.0) * ours
    memory = PROCESS_BYTES + PARAMETER_BYTES * ours + 4 * (training.batch // training.accumulate or 1) * seqlen * hidden
    if recipe.is_live:
        flop += 2.0 * theirs * tokens
        memory += 4 * theirs
    elif recipe.needs_teacher:
        flop += 2.0 * theirs * rows * seqlen + (0 if recipe.cache_teacher else 2.0 * tokens * vocabulary * hidden)
        memory += 0 if recipe.cache_teacher else min(4 * rows * seqlen * hidden, 4 << 30) + 4 * vocabulary * hidden
    return {
        "teacher": f"{job.teacher} ({job.checkpoint.config['model_type']})",
        "student": student_text(job),
        "parameters": [theirs, ours],
        "size_bytes": [job.checkpoint.size_bytes, sum(info.size_bytes for info in job.outputs.values())],
        "loss": loss_text(recipe),
        "data": recipe.data.source,
        "seqlen": seqlen,
        "rows": rows,
        "rows_are_known": recipe.data.rows is not None,
        "steps": steps,
        "batch": training.batch,
        "lr": training.lr,
        "precision": training.precision,
        "expected_memory_bytes": int(memory),
        "expected_wall_s": round(flop / FLOP_PER_S, 2),
    }


def student_text(job: DistillJob) -> str:
    """Who learns, in a line."""
    if not job.cut:
        assert job.student
        return str(job.student.path)
    before, after = job.cut.before, job.cut.after
    named = (("layers", "blocks"), ("hidden channels", "hidden"), ("heads", "heads"), ("key/value heads", "kv_heads"),
             ("MLP channels", "mlp"))  # fmt: skip
    parts = [
        f"{getattr(after, key)} of {getattr(before, key)} {name}"
        for name, key in named if getattr(after, key) != getattr(before, key)
    ]  # fmt: skip
    chosen = "those that change most" if job.cut.blocks is None else ""
    if job.cut.blocks is not None and after.blocks != before.blocks:
        chosen = f"layer{'s' * (after.blocks > 1)} " + ", ".join(map(str, job.cut.blocks))
    return "the teacher's " + ", ".join(parts) + (f" ({chosen})" if chosen else "")


def loss_text(recipe: Distillation) -> str:
    """What is minimized, in a line."""
    goal = recipe.objective
    parts = []
    if goal.diverges:
        top = recipe.cache_teacher or goal.top_k
        of = f" of the top {top}" if top else ""
        share = f"{goal.alpha} x " if goal.has_cross_entropy else ""
        parts.append(f"{share}{goal.divergence}{of} at temperature {goal.temperature}")
    if goal.has_cross_entropy:
        parts.append("cross entropy with the rest" if goal.diverges else "cross entropy")
    for name, weight in (("hidden states", goal.hidden), ("attention", goal.attention)):
        parts += [f"{weight:g} x squared error of {name}"] if weight else []
    return " + ".join(parts)


def teacher_text(recipe: Distillation) -> str:
    """How the teacher is asked, in a line."""
    if not recipe.needs_teacher:
        return "not asked: cross entropy alone"
    if recipe.is_live:
        return "in memory beside the student"
    if recipe.cache_teacher:
        return f"its {recipe.cache_teacher} most likely tokens, cached"
    return "its last hidden states, cached: all of its distributions"


def identity_tree(job: DistillJob) -> dict[str, Any]:
    """The part of a recipe that decides the bytes of the output, beside the files of the models."""
    recipe = job.recipe
    tree = {**asdict(recipe), "training": recipe.training.deciding()}
    del tree["eval"]
    if recipe.is_live or not recipe.needs_teacher:
        tree["teacher"] = "live" if recipe.is_live else "none"
    if not job.cut:
        del tree["student"]
        return tree
    tree["student"]["drop_layers"] = sorted(set(recipe.student.drop_layers))
    if not job.cut.needs_rows:
        del tree["student"]["rows"]
    return tree


def _architecture(checkpoint: Checkpoint) -> Architecture:
    if not checkpoint.config:
        raise UsageError(f"{checkpoint.path} has no config.json, so the model cannot be run")
    return architecture_of(checkpoint.config, checkpoint.path)


def _parameters(shapes: Iterable[tuple[int, ...]]) -> int:
    return sum(map(prod, shapes))


def _rows(job: DistillJob, seqlen: int) -> int:
    """About how many rows a source gives."""
    data = job.recipe.data
    if not is_local(data):
        return MOST_ROWS
    size_bytes = sum(path.stat().st_size for path in local_files(data)) or 2.0e6  # of the built-in text
    return max(2, int(size_bytes / BYTES_PER_TOKEN / seqlen))
