"""All linears trained together, once every block is packed and staged: the whole model learns from the float one.

The float model runs once, block by block; its last hidden states and its head are what the student learns from. The
trained weights go to a folder of their own first and then, unit by unit, to their places in the staged files: a run
that is killed at any moment goes on with the same result. Of several processes all train; the first alone writes.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qtool.calibration.self_data import rows_of
from qtool.calibration.tokens import Tokenizer, TokenRows
from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.writer import SCRATCH, StagedOutput, fsync, write_json
from qtool.finishing import ADAPTER, EndToEnd, held_out_of
from qtool.finishing.blockwise import alignment
from qtool.finishing.linear import BETAS, QuantizedLinear
from qtool.finishing.lora import LoRA
from qtool.finishing.norms import TrainedNorm, norms_of, train_norm
from qtool.formats.adapter import PREFIX, Adapted, write_adapter
from qtool.formats.weights import Weights, check_finite
from qtool.gguf.checkpoint import open_checkpoint
from qtool.job import Job
from qtool.models.blockwise import BlockModel, Source, linear_of
from qtool.models.whole import WholeModel
from qtool.numerics.grid import QTensor, grid_of
from qtool.parameters import TORCH_DTYPES
from qtool.plan import Linear, Unit
from qtool.report.model import Stopwatch
from qtool.scheme import FLOATS
from qtool.solving.compare import compare
from qtool.solving.record import digest, read_back
from qtool.training.loop import Progress, train
from qtool.training.task import StudentTask
from qtool.training.teacher import MEMORY_BYTES, HiddenTeacher, Teacher
from qtool.training.world import World
from qtool.transforms import ScaleTransform

RESULT, TENSORS, FACTS = "result", "trained.safetensors", "facts.json"


class FinishTask(StudentTask):
    """A student whose trained parameters are those of quantized linears and of norms."""

    def __init__(self, student: WholeModel, teacher: Teacher | None, options: EndToEnd, rows: list[Tensor]) -> None:
        super().__init__(student, teacher, options, rows)
        self._options = options

    def groups(self) -> list[dict[str, Any]]:
        modules = list(self.student.modules())
        linears = [module for module in modules if isinstance(module, QuantizedLinear)]
        norms = [module.shares for module in modules if isinstance(module, TrainedNorm)]
        of_weights = [p for linear in linears for p in linear.of_weights]
        of_scales = [p for linear in linears for p in linear.of_scales] + norms
        groups: list[dict[str, Any]] = [
            {"params": of_weights, "betas": BETAS},
            {"params": of_scales, "betas": BETAS, "lr_scale": self._options.scales_rate},
        ]
        return [group for group in groups if group["params"]]


class EndToEndFinish:
    """One of the finishes of a job. `staged` is None in all processes but the first."""

    def __init__(
        self, job: Job, name: str, folder: Path, staged: StagedOutput | None, world: World, progress: Progress
    ) -> None:
        self.job, self.name, self.options = job, name, job.end_to_end[name]
        self.folder, self.staged, self.world, self.progress = folder, staged, world, progress
        self.scratch = folder / SCRATCH / name
        assert job.architecture
        in_block = job.architecture.is_block_linear
        self.linears = [x for x in job.plan.linears if in_block(x.module) and x.scheme.kind not in FLOATS]

    @property
    def unit(self) -> str:
        """What the journal calls it."""
        return f"finish {self.name}"

    def run(self, rows: TokenRows | None, watch: Stopwatch) -> None:
        """Train, unless that was done before an interruption, and put the result into the staged files."""
        done = self.staged is not None and self.unit in self.staged.done
        trained = (self.scratch / RESULT).is_dir()
        if self.world.agree(self.staged is not None and not done and not trained):
            with watch.stage("train"):
                self._train(rows)
        if self.staged and not done:
            with watch.stage("write"):
                self._apply(self.staged)
            shutil.rmtree(self.scratch)

    def _train(self, known_rows: TokenRows | None) -> None:
        job, device = self.job, self.world.device
        float_model = BlockModel(job.checkpoint.home, job.source, device)
        rows = known_rows or self._rows(float_model)
        held_out, learned = held_out_of(len(rows.rows), self.options.held_out)
        written = open_checkpoint(self.folder)
        student, linears, norms = self._student(written)
        task = FinishTask(student, self._teacher(float_model, rows), self.options, rows.rows)
        if self.options.recompute:
            student.recompute()
        curve = train(task, self.options, self.world, self.scratch / "training", self.progress, f"train {self.name}",
                      held_out, learned)  # fmt: skip
        with torch.no_grad():
            sample_T = rows.rows[(held_out or learned)[0]]
            with self.world.whole(task):
                logits_TV = student(sample_T[None])[0]
            tensors, facts = self._result(task, linears, norms)
        if self.world.main:
            tensors |= {"sample": sample_T, "sample.logits": logits_TV.cpu()}
            self._save(tensors, {**facts, "curve": curve.to_tree(), "data": rows.record()})
        self.world.barrier()

    def _rows(self, model: BlockModel) -> TokenRows:
        home = self.job.checkpoint.home
        tokenizer = Tokenizer(home, model.config.vocab_size)
        return rows_of(self.job.recipe.data, home, tokenizer, model.context, self.world.device, self.progress)

    def _teacher(self, model: BlockModel, rows: TokenRows) -> Teacher | None:
        """The float model's last hidden states; in files, which the first process makes, where several share them."""
        if not self.options.diverges:
            return None
        memory_bytes = MEMORY_BYTES if self.world.size == 1 else 0
        made = None

        def open_teacher() -> Teacher:
            folder = self.scratch / "teacher"
            return HiddenTeacher(model, rows.rows, folder=folder, memory_bytes=memory_bytes, progress=self.progress)

        if self.world.main:
            made = open_teacher()
        self.world.barrier()
        return made or open_teacher()

    def _student(self, written: Checkpoint) -> tuple[WholeModel, dict[str, QuantizedLinear], dict[str, TrainedNorm]]:
        """The model as it is staged, with what is trained of it by checkpoint names."""
        job = self.job
        assert job.architecture
        by_name = {f"{linear.module}.weight": linear for linear in self.linears}
        student = WholeModel(written.home, Weights(written), self.world.device, without=by_name)
        linears: dict[str, QuantizedLinear] = {}
        for index, block in enumerate(student.blocks):
            for name in job.architecture.linears():
                if linear := by_name.get(f"{student.block_name(index)}.{name}.weight"):
                    linears[linear.module] = self._linear(written, linear, linear_of(block, name).bias)
                    student.replace(f"{job.architecture.blocks}.{index}.{name}", linears[linear.module])
        norms: dict[str, TrainedNorm] = {}
        for name, norm in norms_of(student.model).items() if self.options.norms else ():
            in_file = student.checkpoint_name(f"{name}.weight")
            if in_file in job.plan.outputs:
                norms[in_file] = train_norm(norm, job.architecture.norm_offset, partial(job.as_stored, in_file))
        return student, linears, norms

    def _linear(self, written: Checkpoint, linear: Linear, bias: nn.Parameter | None) -> QuantizedLinear:
        device = self.world.device
        quantized = read_back(written, self.job, linear).to(device)
        grid = grid_of(linear.scheme, TORCH_DTYPES[self.job.scale_dtype(linear)])

        def float_weight() -> Tensor:
            return self._float_weight(linear).to(device) if self._source_is_target else quantized.dequantize()

        return self.options.linear(quantized, grid, bias, float_weight)

    @property
    def _source_is_target(self) -> bool:
        """Whether the weights of the source are what the codes stand for: transforms scale, and training moves them."""
        return self.job.block is None and not any(isinstance(t, ScaleTransform) for t in self.job.transforms)

    def _float_weight(self, linear: Linear) -> Tensor:
        name = f"{linear.module}.weight"
        weight = self.job.source.read([name])[name]
        return weight.T if linear.transposed else weight

    def _result(
        self, task: FinishTask, linears: dict[str, QuantizedLinear], norms: dict[str, TrainedNorm]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What was trained, as it will be in the files, and what is to be said of it; each part is gathered once."""
        job, tensors, found = self.job, dict[str, Tensor](), dict[str, Any]()
        planned = {linear.module: linear for linear in self.linears}
        adapter: dict[str, Tensor] = {}
        for part in (*task.units(), task):
            with self.world.whole(part):
                inside = set(part.modules())
                for module in [name for name, linear in linears.items() if linear in inside and name not in found]:
                    linear, trained = planned[module], linears[module]
                    held = job.format.held(trained.result().to(torch.device("cpu")), linear.source.dtype)
                    tensors |= job.format.pack(module, held, linear.source.dtype)
                    found[module] = {"solved": digest(held), "weight_error": self._weight_error(linear, held)}
                    kept = trained.adapter().items()  # copied: the parameters are shards again after this
                    adapter |= {f"{PREFIX}{module}.{key}": x.cpu().clone() for key, x in kept}
                for name in [name for name, norm in norms.items() if norm in inside and name not in tensors]:
                    value = job.as_stored(name, norms[name].value())
                    check_finite(name, value)
                    tensors[name] = value.to(TORCH_DTYPES[job.plan.outputs[name].dtype]).cpu()
        return tensors, {"linears": found, "norms": sorted(norms), "adapter": adapter}

    def _weight_error(self, linear: Linear, weight: QTensor) -> float | None:
        if any(isinstance(t, ScaleTransform) for t in self.job.transforms):
            return None
        return compare(self._float_weight(linear), weight.dequantize(), None).weight

    def _save(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """The result in a folder that appears whole."""
        new = self.scratch / f"{RESULT}.new"
        new.mkdir(parents=True, exist_ok=True)
        if adapter := facts.pop("adapter"):
            assert isinstance(self.options, LoRA)
            assert self.job.architecture
            transposed = self.job.architecture.transposed
            write_adapter(new / ADAPTER, adapter, self.options.rank, transposed)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, new / TENSORS)
        write_json(new / FACTS, facts)
        for path in (path for path in new.rglob("*") if path.is_file()):
            fsync(path)
        new.replace(self.scratch / RESULT)

    def _apply(self, staged: StagedOutput) -> None:
        """The result to its places, and the records of the units with it."""
        result = self.scratch / RESULT
        facts = json.loads((result / FACTS).read_text(encoding="utf-8"))
        with safe_open(result / TENSORS, framework="pt") as stored:
            for unit in self.job.plan.units:
                self._apply_unit(staged, unit, facts, stored)
            sample_T, logits_TV = stored.get_tensor("sample"), stored.get_tensor("sample.logits")
        if (result / ADAPTER).is_dir():
            shutil.copytree(result / ADAPTER, self.folder / ADAPTER, dirs_exist_ok=True)
        training = {"finish": self.name, "unit": "all blocks", **facts["curve"]}
        training["alignment"] = alignment(logits_TV, self._written_logits(sample_T), self.name)
        nothing: dict[str, Any] = {"layers": [], "tensors": {}, "solved": {}, "changed": [], "notes": []}
        staged.finish_unit(self.unit, {**nothing, "data": facts["data"], "training": training})

    def _apply_unit(self, staged: StagedOutput, unit: Unit, facts: dict[str, Any], stored: Any) -> None:
        record = staged.done[unit.name]
        changed = [kept.source.name for kept in unit.kept if kept.source.name in facts["norms"]]
        linears = [linear for linear in unit.linears if linear.module in facts["linears"]]
        names = [*changed, *(info.name for linear in linears for info in self.job.format.tensors(linear))]
        names = [name for name in names if name in stored.keys()]  # noqa: SIM118 (it is no mapping)
        if not names:
            return
        found = {linear.module: facts["linears"][linear.module] for linear in linears}
        layers = [
            {
                **layer,
                "weight_error": found[layer["module"]]["weight_error"] or layer["weight_error"],
                "output_error": None,
            }
            if layer["module"] in found
            else layer
            for layer in record["layers"]
        ]
        written = {name: staged.write(name, stored.get_tensor(name)) for name in names}
        solved = {module: linear["solved"] for module, linear in found.items()}
        staged.finish_unit(unit.name, {
            **record, "layers": layers, "tensors": {**record["tensors"], **written},
            "solved": {**record["solved"], **solved}, "changed": sorted({*record["changed"], *changed}),
        })  # fmt: skip

    def _written_logits(self, sample_T: Tensor) -> Tensor:
        """What the staged files compute for a row, [T, V]."""
        written = open_checkpoint(self.folder)
        source: Source = Weights(written)
        if (self.folder / ADAPTER).is_dir():
            source = Adapted(source, self.folder / ADAPTER)
        model = BlockModel(written.home, source, self.world.device)
        stream = model.start([sample_T[None]])
        for index in range(len(model.blocks)):
            with model.block(index) as block:
                stream.hidden[0] = model.run(block, index, stream, 0)
        with model.head() as head:
            return head(stream.hidden[0][0]).cpu()
