"""The life of a distillation: first student -> teacher's answers -> training -> files -> verify -> verdict.

All is staged beside the output: what an interrupted run needs to go on (the first student, the teacher's answers,
checkpoints of the training) in its scratch folder. Of several processes all train; the first alone writes.
"""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool import __version__
from qtool.calibration.texts import BUILT_IN, local_files
from qtool.calibration.tokens import Tokenizer
from qtool.checkpoint.beside import rest_of_files
from qtool.checkpoint.existing import check_apart, check_replaceable, check_same, read_manifest
from qtool.checkpoint.reader import Checkpoint, FileIdentity, sha256_file
from qtool.checkpoint.writer import MANIFEST, SCRATCH, StagedOutput, counted, partial_path, write_json
from qtool.distill.job import DistillJob, identity_tree, loss_text, student_text, teacher_text
from qtool.distill.students import Progress, choose, measure, units_of, write_student
from qtool.errors import QtoolError, ReadError, TrainingError
from qtool.evaluation.describe import evaluation_tree
from qtool.evaluation.evaluate import check, common_tokenizer, evaluate
from qtool.evaluation.gates import check_gates
from qtool.formats.weights import Weights, check_finite
from qtool.gguf.checkpoint import open_checkpoint
from qtool.headers import TORCH_NAMES, TensorInfo
from qtool.memory import return_freed_memory
from qtool.models.architectures import config_value
from qtool.models.blockwise import BlockModel, pick_device
from qtool.models.whole import WholeModel
from qtool.pipeline import RunOptions, silent
from qtool.report.model import Stopwatch, peak_memory_bytes, versions
from qtool.solving.record import digest_bytes
from qtool.training.curve import Curve
from qtool.training.data import TrainingRows, training_rows
from qtool.training.loop import train
from qtool.training.task import StudentTask
from qtool.training.teacher import MEMORY_BYTES, HiddenTeacher, LiveTeacher, Teacher, TopKTeacher
from qtool.training.world import World

STUDENT, BEFORE, TRAINING = "student", "student before", "training"  # steps in the journal besides the units


def distill(job: DistillJob, out: Path, options: RunOptions, progress: Progress) -> tuple[dict[str, Any] | None, bool]:
    """Make OUT; the report, which only the first of several processes has, and whether it was up to date already.

    The output appears whole or not at all. Raises UsageError when OUT holds something else and `force` is not set.
    """
    world = World.of_environment(pick_device(options.device))
    result = _Run(job, out, options, world, progress if world.main else silent).run()
    world.close()  # not after an error: the others may be in the middle of an exchange, for which it would wait
    return result


class _Run:
    def __init__(self, job: DistillJob, out: Path, options: RunOptions, world: World, progress: Progress) -> None:
        self.job, self.options, self.world, self.progress = job, options, world, progress
        self.recipe = job.recipe
        self.typed, self.out = out, Path(os.path.realpath(out))
        self.watch = Stopwatch()
        return_freed_memory()

    def run(self) -> tuple[dict[str, Any] | None, bool]:
        known = read_manifest(self.out) or {}
        for model in self.job.models:
            check_apart(self.typed, model.root)
        check_replaceable(self.typed, known)
        with self.watch.stage("identify"):
            self.progress("identify", 0, 1, str(self.job.checkpoint.path))
            keys = ("source_files", "student_files")
            files = {key: self._files(x, known.get(key, [])) for key, x in zip(keys, self.job.models, strict=False)}
            self.identity = self._identity(*files.values())
        if known and not self.options.force:
            check_same(self.typed, known, self.identity)
            report: dict[str, Any] = known["report"]
            asked = evaluation_tree(self.recipe.eval)
            if self.world.main and asked and known.get("evaluation_recipe") != asked:
                with self._first_student() as home:
                    before = self._measure(home)
                self._judge(known, report, before)
            return (report if self.world.main else None), True
        with self.watch.stage("rows"):
            self.rows = self._rows()
            if self.recipe.eval:
                check(self.job.checkpoint.path, self.recipe.eval, self.options.device)
        self.scratch = partial_path(self.out) / SCRATCH
        staged = None
        if self.world.main:
            staged = StagedOutput(self.out, self.job.outputs, self.identity, self.options.force)
            self.scratch = staged.scratch
        resumed = len(staged.done) if staged else 0
        try:
            curve = self._make(staged)
        except QtoolError as error:  # what the user has to mend makes another run: nothing to go on from
            if staged and not resumed and not isinstance(error, (ReadError, TrainingError)):
                staged.discard()
            raise
        if staged is None:
            return None, False
        with self.watch.stage("verify"):
            self._describe(staged, self._home())
            try:
                self._verify(staged)
            except QtoolError:
                staged.discard()
                raise
        report = self._report(staged, curve, resumed)
        manifest = {
            "qtool": __version__,
            "identity": self.identity,
            **{key: [asdict(file) for file in found] for key, found in files.items()},
            "files": [
                {"name": p.name, "size_bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in staged.files()
            ],
            "report": report,
        }
        staged.publish(manifest)
        if self.recipe.eval:  # of what is there already: if it fails, no work is lost
            self._judge(manifest, report, staged.done[BEFORE]["measured"])
        return report, False

    # What decides the output

    @staticmethod
    def _files(model: Checkpoint, known: list[dict[str, Any]]) -> list[FileIdentity]:
        """The files of a model; `known` are those of an earlier run."""
        names = [path.name for path in rest_of_files(model)]
        return model.identity([FileIdentity(**file) for file in known], names)

    def _identity(self, *models: list[FileIdentity]) -> dict[str, Any]:
        """What decides the bytes of the output: a run with the same identity is the same run.

        `models` are the files of the teacher, and those of a student of its own.
        """
        data = {str(path): sha256_file(path) for path in local_files(self.recipe.data)}
        if self.recipe.data.source in BUILT_IN:
            data = {self.recipe.data.source: f"of Python {platform.python_version()}"}
        files = [{file.name: file.sha256 for file in found} for found in models]
        return {"qtool": __version__, "distill": identity_tree(self.job),
                **dict(zip(("teacher", "student"), files, strict=False)), "data_files": data}  # fmt: skip

    def _rows(self) -> TrainingRows:
        """The rows to train on. Raises UsageError where the same token stands for other text in the two models."""
        self.progress("rows", 0, 1, self.recipe.data.source)
        teacher, *others = (Tokenizer(x.home, int(config_value(x.config, "vocab_size"))) for x in self.job.models)
        tokenizer = common_tokenizer(others[0], teacher) if others else teacher
        return training_rows(self.recipe.data, self.recipe.training.held_out, tokenizer, self.job.context)

    # The steps

    def _make(self, staged: StagedOutput | None) -> Curve:
        """All that is in the output but its manifest, in files."""
        home = self._home()
        if staged:
            if STUDENT not in staged.done:
                choice = self._cut(home) if self.job.cut else {}
                staged.finish_unit(STUDENT, {**choice, "rows": self.rows.sha256})
            elif staged.done[STUDENT]["rows"] != self.rows.sha256:  # of a data set, whose files are not known
                raise QtoolError(f"`{self.rows.source}` gives other rows than before the interruption",
                                 f"remove {staged.folder} to begin again")  # fmt: skip
            if self.recipe.eval and staged.done.get(BEFORE, {}).get("of") != evaluation_tree(self.recipe.eval):
                staged.finish_unit(BEFORE, {"of": evaluation_tree(self.recipe.eval), "measured": self._measure(home)})
        units = units_of(self.job.outputs)
        if not self.world.agree(staged is not None and any(unit not in staged.done for unit in (TRAINING, *units))):
            return Curve.from_tree(staged.done[TRAINING]) if staged else Curve(0, 0.0)
        student = WholeModel(home, Weights(open_checkpoint(home)), self.world.device).requires_grad_(True)
        if self.recipe.training.recompute:
            student.recompute()
        with self.watch.stage("teacher"):
            teacher = self._teacher()
        task = StudentTask(student, teacher, self.recipe.objective, self.rows.rows, self.rows.positions)
        with self.watch.stage("train"):
            curve = train(
                task, self.recipe.training, self.world, self.scratch / "training", self.progress, "distill",
                self.rows.held_out, self.rows.training,
            )  # fmt: skip
        if staged and TRAINING not in staged.done:
            staged.finish_unit(TRAINING, curve.to_tree())
        with self.watch.stage("write"):
            self._write(staged, student, home, units)
        return curve

    def _home(self) -> Path:
        """Where the first student is."""
        return self.job.student.path if self.job.student else self.scratch / "student"

    @contextmanager
    def _first_student(self) -> Iterator[Path]:
        """It once more, for as long as it is needed."""
        if self.job.student:
            yield self.job.student.path
        else:
            self.rows = self._rows()
            with tempfile.TemporaryDirectory(prefix=self.out.name + ".", dir=self.out.parent) as folder:
                self._cut(Path(folder) / "student")
                yield Path(folder) / "student"

    def _cut(self, home: Path) -> dict[str, Any]:
        """The first student, cut out of the teacher, in a folder of its own; what was chosen."""
        assert self.job.cut
        with self.watch.stage("student"):
            importance = None
            if self.job.cut.needs_rows:
                model = BlockModel(self.job.checkpoint.home, self.job.source, self.world.device)
                rows = self.rows.calibration(self.recipe.student.rows)
                importance = measure(model, rows, self.job.cut.before.heads, self.options.batch_tokens, self.progress)
            choice = choose(self.job.cut, importance)
            write_student(home, self.job.cut, choice, self.job.source, {"of": self.identity}, self.progress)
        influence = importance.blocks_L.tolist() if importance else None
        return {"blocks": choice.blocks, "influence": influence}

    def _teacher(self) -> Teacher | None:
        """What the student learns from; what it caches on disk is made by the first process."""
        recipe, job, device = self.recipe, self.job, self.world.device
        if not recipe.needs_teacher:
            return None
        if recipe.is_live:
            return LiveTeacher(WholeModel(job.checkpoint.home, job.source, device))
        model = BlockModel(job.checkpoint.home, job.source, device)
        rows, positions, folder = self.rows.rows, self.rows.positions, self.scratch / "teacher"

        def open_teacher() -> Teacher:
            if recipe.cache_teacher:
                temperature = recipe.objective.check_cached()
                return TopKTeacher(model, rows, positions, k=recipe.cache_teacher, folder=folder,
                                   temperature=temperature, progress=self.progress)  # fmt: skip
            in_memory = MEMORY_BYTES if self.world.size == 1 else 0
            return HiddenTeacher(model, rows, positions, folder=folder, memory_bytes=in_memory,
                                 progress=self.progress)  # fmt: skip

        if self.world.main:
            teacher = open_teacher()
        self.world.barrier()
        return teacher if self.world.main else open_teacher()

    def _write(self, staged: StagedOutput | None, student: WholeModel, home: Path, units: dict[str, list[str]]) -> None:
        """The trained tensors in the types of the output, and what is no parameter as the first student has it."""
        parameters: dict[str, Tensor] = {}
        for name, parameter in student.model.named_parameters(remove_duplicate=False):
            for spelling in student.architecture.spellings(name):
                parameters.setdefault(spelling, parameter)
        for name, parameter in student.model.named_parameters():
            parameters.setdefault(student.checkpoint_name(name), parameter)
        first = open_checkpoint(home)
        for number, (unit, names) in enumerate(units.items(), 1):
            sha256 = {}
            for name in names:
                if name in parameters:  # all processes gather it
                    tensor = self.world.full(parameters[name].detach()).to(_dtype(self.job.outputs[name].dtype))
                    check_finite(name, tensor)
                else:
                    tensor = first.read(name)
                if staged:
                    sha256[name] = staged.write(name, tensor)
            if staged:
                staged.finish_unit(unit, sha256)
                self.progress("write", number, len(units), unit)

    def _describe(self, staged: StagedOutput, home: Path) -> None:
        """Config, tokenizer and whatever else belongs beside the weights."""
        first = open_checkpoint(home)
        write_json(staged.folder / "config.json", first.config)
        staged.write_index()
        staged.copy_files(rest_of_files(first))

    def _verify(self, staged: StagedOutput) -> None:
        """Every tensor reads back as what was written."""
        written = open_checkpoint(staged.folder)
        for unit in units_of(self.job.outputs):
            for name, tensor in written.borrow_stored(staged.done[unit]):
                if digest_bytes(tensor) != staged.done[unit][name]:
                    raise QtoolError(f"`{name}` reads back other bytes than were written to {staged.folder}: "
                                     "a faulty disk?")  # fmt: skip

    # What is said of it

    def _measure(self, path: Path) -> dict[str, Any]:
        """A model beside the teacher, and the gates that it would pass."""
        assert self.recipe.eval
        with self.watch.stage("evaluate"):
            found = evaluate(path, self.job.checkpoint.path, self.recipe.eval, self.options.device, self.progress)
        return {**found.to_tree(), "gates": check_gates(found, self.recipe.eval)}

    def _judge(self, manifest: Mapping[str, Any], report: dict[str, Any], before: dict[str, Any]) -> None:
        """The verdict, into the report and the manifest of the output."""
        try:
            after = self._measure(self.out)
        except QtoolError as error:
            message = f"{self.typed} is whole, but could not be evaluated: {error.message}"
            hint = error.hint or "the same command evaluates again, and does no other work"
            raise type(error)(message, hint) from None
        report["gates"] = after.pop("gates")
        report["evaluation"] = {
            "before": {**before, "model": "student before"},
            "after": {**after, "model": str(self.typed)},
        }
        took_s = self.watch.stages_s["evaluate"]
        report["wall_s"] += took_s - report["stages_s"].get("evaluate", 0.0)  # of another evaluation, or so far
        report["stages_s"] = {**report["stages_s"], "evaluate": took_s}
        report["peak_memory_bytes"] = max(report["peak_memory_bytes"], peak_memory_bytes())
        newer = {**manifest, "evaluation_recipe": evaluation_tree(self.recipe.eval), "report": report}
        write_json(self.out / (MANIFEST + ".new"), newer)
        (self.out / (MANIFEST + ".new")).replace(self.out / MANIFEST)

    def _report(self, staged: StagedOutput, curve: Curve, resumed: int) -> dict[str, Any]:
        job, recipe = self.job, self.recipe
        held_out = len(self.rows.held_out)
        return {
            "teacher": job.teacher,
            "output": str(self.typed),
            "architecture": job.checkpoint.config["model_type"],
            "student": student_text(job),
            "chosen": staged.done[STUDENT],
            "parameters": {"teacher": _parameters(job.source.dense), "student": _parameters(job.outputs)},
            "size_bytes": {"teacher": job.checkpoint.size_bytes,
                           "student": sum(x.size_bytes for x in job.outputs.values())},
            "layers": {"teacher": _layers(job.checkpoint), "student": _layers(open_checkpoint(staged.folder))},
            "loss": loss_text(recipe),
            "teacher_is": teacher_text(recipe),
            "recipe": {**asdict(recipe), "eval": None},
            "data": {"source": self.rows.source, "rows": len(self.rows.training), "tokens": self.rows.tokens,
                     "held_out_rows": held_out, "sha256": self.rows.sha256},
            "curve": curve.to_tree(),
            "evaluation": None,
            "gates": [],
            "notes": _notes(curve),
            "stages_s": dict(self.watch.stages_s),
            "wall_s": self.watch.wall_s,
            "peak_memory_bytes": peak_memory_bytes(),
            "device": str(self.world.device),
            "processes": self.world.size,
            "resumed_units": resumed,
            "versions": versions("torch", "transformers", "safetensors"),
        }  # fmt: skip


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, TORCH_NAMES[name])
    return dtype


def _layers(checkpoint: Checkpoint) -> int:
    return int(config_value(checkpoint.config, "num_hidden_layers"))


def _parameters(tensors: Mapping[str, TensorInfo]) -> int:
    return sum(prod(info.shape) for info in tensors.values())


def _notes(curve: Curve) -> list[str]:
    """What a person should know of the training."""
    notes = []
    if curve.best_step == 0:
        notes.append("training did not make the held-out loss better: the student is what it was before")
    elif curve.stopped == "patience":
        notes.append(f"stopped at step {curve.train[-1][0]} of {curve.steps}: the held-out loss got no better")
    elif curve.best_step < curve.steps:
        notes.append(
            f"the student is that of step {curve.best_step} of {curve.steps}: then the held-out loss got worse"
        )
    if curve.skipped:
        notes.append(f"skipped for a gradient that was not finite in fp16: {counted(curve.skipped, 'step')}")
    return notes
