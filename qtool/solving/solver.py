"""Every unit of a plan: tensor by tensor where no statistics are wanted, else block by block.

In each block what the transforms ask for is measured, they change the weights, and the method rounds them. A
finished unit is packed, written and recorded before the next begins. An interrupted run puts the finished
blocks' written weights back and lets the rows advance through them, so that it ends with the same bytes as
an undisturbed one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from qtool.calibration.rows import Rows
from qtool.calibration.self_data import rows_of
from qtool.calibration.stats import CROSS
from qtool.calibration.tokens import Tokenizer, TokenRows, too_little_data
from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.writer import StagedOutput
from qtool.errors import QtoolError
from qtool.formats.relaying import relay
from qtool.formats.weights import Weights
from qtool.gguf.checkpoint import open_checkpoint
from qtool.job import KV_PARTS, Job
from qtool.models.architectures import LLAMA
from qtool.models.blockwise import BlockModel
from qtool.parameters import TORCH_DTYPES, Parameters
from qtool.plan import Unit
from qtool.report.model import Stopwatch
from qtool.solving.compare import Errors
from qtool.solving.record import UnitRecord
from qtool.solving.unit import UnitWork, layer_record
from qtool.transforms import BiasTransform, ScaleTransform

if TYPE_CHECKING:
    from torch import Tensor, nn

Progress = Callable[[str, int, int, str], None]  # stage, steps done, steps in all, detail


class Solver:
    """Fills a staged output. `rows` are the calibration rows, once there are any; `notes` what a person should know."""

    def __init__(
        self, job: Job, staged: StagedOutput, device: torch.device, progress: Progress, watch: Stopwatch
    ) -> None:
        self.job, self.staged, self.device, self.progress, self.watch = job, staged, device, progress, watch
        self.architecture = job.architecture or LLAMA
        named = dict(zip(job.recipe.transforms, job.transforms, strict=True))
        self.scalings = {name: t for name, t in named.items() if isinstance(t, ScaleTransform)}
        self.biasings = [t for t in job.transforms if isinstance(t, BiasTransform)]
        self.notes = self._notes()
        self.rows: TokenRows | None = None

    @cached_property
    def written(self) -> Checkpoint:
        """What is staged, by its headers: they stand from the beginning."""
        return open_checkpoint(self.staged.folder)

    def run(self, batch_tokens: int) -> None:
        """Every unit that is not done."""
        undone = [unit for unit in self.job.plan.units if unit.name not in self.staged.done]
        wanted = {unit.name for unit in undone if self._is_measured(unit)} if self.job.runs_blocks else set()
        if wanted:
            self._run_blocks(wanted, batch_tokens)
        if self.job.stats and undone:
            root, config = self.job.checkpoint.home, self.job.checkpoint.config
            self.job.stats.check_tokenizer(Tokenizer(root, int(config["vocab_size"])).sha256)
        for unit in undone:  # only now: the model and its rows are out of memory
            if self.job.method is None:
                self._lay_out_anew(unit)
            elif unit.name not in wanted:
                self._solve_alone(unit)

    def _notes(self) -> list[str]:
        """What a person should know of the run before it begins."""
        job, notes = self.job, list(self.job.notes)
        linears = job.plan.linears
        if self.biasings and not any(f"{linear.module}.bias" in job.source.shapes for linear in linears):
            notes.append(f"none of the {len(linears)} layers has a bias to correct")
        if job.stats and job.follows_rounding:
            notes.append(
                f"{job.recipe.method} worked with saved statistics, which are those of the float model: "
                "with data each block sees the errors of the blocks before it"
            )
        return notes

    def data_record(self) -> dict[str, Any] | None:
        """What the calibration data was; None when none was used in this run."""
        if self.job.stats:
            return self.job.stats.data_record()
        return self.rows.record() if self.rows else None

    def _solve_alone(self, unit: Unit) -> None:
        """A unit whose statistics, if any, were saved."""
        parameters = self._parameters(unit, {})
        record = UnitRecord(self, unit)
        stats = self.job.stats if self._is_measured(unit) else None
        work = UnitWork(self, unit, parameters, record)
        if stats:
            with self.watch.stage("read"):
                wanted = self.job.wanted
                for group in work.groups if wanted - {"kv"} else ():
                    name = parameters.full(group[0])
                    work.moments[group[0]] = stats.stats(name, wanted, self.device).moments(name)
                if _has_cache(unit):
                    work.set_kv(*stats.kv(unit.name))
            work.transform()
        for group in work.groups:
            work.solve(group)
        work.finish()

    def _lay_out_anew(self, unit: Unit) -> None:
        """A unit that is quantized already, in another format."""
        record, source = UnitRecord(self, unit), self.job.source
        assert isinstance(source, Weights)
        for linear in unit.linears:
            start = time.perf_counter()
            dtype = TORCH_DTYPES[self.job.scale_dtype(linear)]
            weight = source.read_packed(linear.module)
            if self.job.format.name != "dense":  # of which only the values are left
                weight = relay(linear.module, weight, linear.scheme, dtype)
            held = self.job.format.held(weight, linear.source.dtype)
            record.pack(linear, held)
            record.layers.append(layer_record(linear, Errors(0.0, None), time.perf_counter() - start))
        record.finish(self._parameters(unit, {}))

    def _run_blocks(self, wanted: set[str], batch_tokens: int) -> None:
        """The units named `wanted`; the rows go through the blocks before them as they were written."""
        job = self.job
        with self.watch.stage("calibrate"):
            root = job.checkpoint.home
            model = BlockModel(root, job.source, self.device)
            tokenizer = Tokenizer(root, model.config.vocab_size)
            spec = job.recipe.data
            self.rows = rows_of(spec, root, tokenizer, model.context, self.device, self.progress)
            self._check_amount(self.rows.tokens, len(self.rows.rows[0]))
            if job.block:  # what goes through a block together decides what it learns at a step
                batch_tokens = job.block.rows_at_once() * max(len(row) for row in self.rows.rows)
            rows = Rows(model, self.rows, batch_tokens, cross=CROSS in job.wanted or job.block is not None)
        units = {unit.name: unit for unit in job.plan.units}
        names = [model.block_name(index) for index in range(len(model.blocks))]
        beyond = sorted(wanted - set(names))
        if beyond:
            raise QtoolError(f"the checkpoint has weights of `{beyond[0]}`, but config.json only {len(names)} blocks")
        last = max(index for index, name in enumerate(names) if name in wanted)
        for index in range(last + 1):
            with model.block(index) as block:
                self._run_block(block, units[names[index]], rows, index, wanted, is_last=index == last)

    def _run_block(self, block: nn.Module, unit: Unit, rows: Rows, index: int, wanted: set[str], is_last: bool) -> None:
        loaded = {f"{unit.name}.{name}": parameter for name, parameter in block.named_parameters()}
        work = UnitWork(self, unit, self._parameters(unit, loaded), UnitRecord(self, unit))
        rows.enter(index)
        if unit.name in wanted:
            if self.job.follows_rounding:
                work.follow(block, rows)
            else:
                work.measure(block, rows, advance=not is_last)
                work.transform()
                for group in work.groups:
                    work.solve(group)
            work.finish()
        elif self.job.follows_rounding:
            if rows.cross:
                rows.split(block)
            if unit.name in self.staged.done:  # else nothing of it is quantized
                work.put_back()
        if not is_last and (self.job.follows_rounding or unit.name not in wanted):
            with self.watch.stage("calibrate"):
                rows.leave(block, work.rounded, work.cache)

    def _is_measured(self, unit: Unit) -> bool:
        """Whether data says anything of a unit: embedding and head are rounded without."""
        return _has_cache(unit) or any(self.architecture.is_block_linear(x.module) for x in unit.linears)

    def _parameters(self, unit: Unit, loaded: Mapping[str, Tensor]) -> Parameters:
        transposed = self.architecture.transposed
        return Parameters(unit, self.job.source, self.device, transposed, loaded, self.job.as_stored)

    def _check_amount(self, tokens: int, seqlen: int) -> None:
        widest = max(linear.shape[1] for linear in self.job.plan.linears)
        note = too_little_data(tokens, widest, seqlen)
        if note:
            self.notes.append(note)


def _has_cache(unit: Unit) -> bool:
    """Whether scales of keys and values are to be found for it."""
    return any(info.name.endswith(KV_PARTS) for info in unit.added)
