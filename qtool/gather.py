"""Where statistics come from: a float model and its calibration rows, block by block, or statistics saved before."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool import __version__
from qtool.calibration.saved import ABSMAX, KV, Blocks, SavedStats, added, tensors_of_input
from qtool.calibration.texts import BUILT_IN, local_files
from qtool.checkpoint.reader import Checkpoint, FileIdentity, sha256_file
from qtool.checkpoint.writer import StagedOutput
from qtool.errors import QtoolError
from qtool.formats.weights import Weights
from qtool.models.architectures import Architecture
from qtool.recipe import DataSpec
from qtool.report.model import Stopwatch

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.calibration.tokens import TokenRows

TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model",
                   "chat_template*")  # fmt: skip
Progress = Callable[[str, int, int, str], None]  # stage, steps done, steps in all, detail


@dataclass(frozen=True)
class CalibrateOptions:
    """Where and how to run: nothing here changes what the output means."""

    device: str = "auto"
    force: bool = False
    batch_tokens: int = 512  # that run through a block at once; speed and memory only


class Staged:
    """The output under construction; each block's record has its tensors' sha256, the summaries, and the data."""

    def __init__(self, output: StagedOutput, blocks: Blocks) -> None:
        self.output, self.blocks = output, blocks

    @property
    def records(self) -> list[dict[str, Any]]:
        return [self.output.done[block] for block in self.blocks if block in self.output.done]

    def finish(self, block: str, tensors: Mapping[str, Tensor], summaries: list[Any], **facts: Any) -> None:
        sha256 = {name: self.output.write(name, tensor) for name, tensor in tensors.items()}
        self.output.finish_unit(block, {"tensors": sha256, "inputs": summaries, **facts})


@dataclass(frozen=True)
class FromModel:
    """The statistics of a dense model."""

    model: str
    checkpoint: Checkpoint
    source: Weights
    architecture: Architecture
    blocks: Blocks
    data: DataSpec
    hessians: bool
    format: str

    @property
    def sources(self) -> list[Path]:
        return [self.checkpoint.root]

    def identify(self, known: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        root = self.checkpoint.root
        cached = [FileIdentity(**file) for file in known.get("source_files", [])]
        found = sorted({path.name for pattern in TOKENIZER_FILES for path in root.glob(pattern) if path.is_file()})
        tokenizer = [name for name in found if name not in self.checkpoint.files]
        files = self.checkpoint.identity(cached, tokenizer)
        sha256 = {file.name: file.sha256 for file in files}
        data = {str(path): sha256_file(path) for path in local_files(self.data)}
        if self.data.source in BUILT_IN:
            data = {self.data.source: f"of Python {platform.python_version()}"}
        identity = {
            "qtool": __version__,
            "format": self.format,
            "hessians": self.hessians,
            "data": asdict(self.data),
            "data_files": data,
            "model": {name: value for name, value in sha256.items() if name not in tokenizer},
            "tokenizer": {name: sha256[name] for name in tokenizer},
        }
        kind = str(self.checkpoint.config["model_type"])
        model = {"name": self.model, "architecture": kind, "files": identity["model"]}
        return identity, {"model": model, "source_files": [asdict(file) for file in files]}

    def fill(self, staged: Staged, options: CalibrateOptions, progress: Progress, watch: Stopwatch) -> None:
        from qtool.calibration.rows import Rows
        from qtool.calibration.self_data import rows_of
        from qtool.calibration.tokens import Tokenizer
        from qtool.models.blockwise import BlockModel, pick_device

        undone = [block for block in self.blocks if block not in staged.output.done]
        if not undone:
            return
        device = pick_device(options.device)
        with watch.stage("rows"):
            model = BlockModel(self.checkpoint.home, self.source, device)
            tokenizer = Tokenizer(self.checkpoint.home, model.config.vocab_size)
            token_rows = rows_of(self.data, self.checkpoint.home, tokenizer, model.context, device, progress)
        names = [model.block_name(index) for index in range(len(model.blocks))]
        if names != list(self.blocks):
            raise QtoolError(f"config.json has {len(names)} blocks, but the checkpoint {len(self.blocks)}")
        facts = {"data": [_data_record(token_rows)], "tokenizer_sha256": tokenizer.sha256, "device": str(device)}
        for record in staged.records:
            if (record["data"], record["tokenizer_sha256"]) != (facts["data"], facts["tokenizer_sha256"]):
                raise QtoolError(
                    "the calibration rows are not those that this run began with",
                    f"remove {staged.output.folder}, and begin again",
                )
        rows = Rows(model, token_rows, options.batch_tokens, cross=False)
        for index, name in enumerate(names[: names.index(undone[-1]) + 1]):
            progress("calibrate", index, len(names), name)
            with watch.stage("calibrate"), model.block(index) as block:
                rows.enter(index)
                if name in staged.output.done:
                    rows.leave(block)
                else:
                    tensors, summaries = self._measure(block, name, rows)
                    staged.finish(name, tensors, summaries, **facts)
        progress("calibrate", len(names), len(names), names[-1])

    def _measure(self, block: Any, name: str, rows: Any) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """The tensors of a block, and what they say; the rows go through it."""
        from qtool.calibration.ranges import watch_ranges
        from qtool.calibration.stats import SECOND, VECTORS
        from qtool.calibration.summary import summary
        from qtool.runtime.kv import KVCache

        inputs = [source.linears for source in self.architecture.inputs]
        firsts = [linears[0] for linears in inputs]
        cache = KVCache.recording()
        wanted = {VECTORS, SECOND} if self.hessians else {VECTORS}
        with watch_ranges(block, self.architecture.linears(), firsts) as ranges:
            stats = rows.measure(block, firsts, wanted, cache=cache, advance=True)
        tensors: dict[str, Tensor] = {}
        summaries = []
        for source, linears in zip(self.blocks[name], inputs, strict=True):
            of_input, peaks = stats.pop(linears[0]), ranges.peak_squares[linears[0]]
            outputs = [ranges.output_absmax[linear] for linear in linears]
            summaries.append(summary(source.linears, of_input, peaks, outputs))
            tensors.update(tensors_of_input(source, of_input, peaks))
            named = zip(source.linears, outputs, strict=True)
            tensors.update({linear + ABSMAX: absmax.reshape(1) for linear, absmax in named})
        for part, absmax in zip(KV, cache.absmax(), strict=True):
            if not absmax.isfinite().all():
                raise QtoolError(f"the keys or values of `{name}` are not finite on the calibration data")
            tensors[f"{name}.{part}"] = absmax.float().reshape(1)
        return tensors, summaries


@dataclass(frozen=True)
class Merge:
    """The statistics of one model over the data of all parts; of one part alone, itself in another format."""

    parts: tuple[SavedStats, ...]
    blocks: Blocks
    hessians: bool
    format: str

    @property
    def sources(self) -> list[Path]:
        return [part.path for part in self.parts]

    def identify(self, known: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        merged = [part.sha256 for part in self.parts]
        identity = {"qtool": __version__, "format": self.format, "hessians": self.hessians, "merge": merged}
        first = self.parts[0].manifest
        return identity, {"model": first["model"], "source_files": first["source_files"]}

    def fill(self, staged: Staged, options: CalibrateOptions, progress: Progress, watch: Stopwatch) -> None:
        from qtool.calibration.summary import summary

        first = self.parts[0].manifest
        data = [record for part in self.parts for record in part.manifest["data"]]
        facts = {"data": data, "tokenizer_sha256": first["tokenizer_sha256"], "device": "cpu"}
        for done, (block, inputs) in enumerate(self.blocks.items()):
            progress("merge", done, len(self.blocks), block)
            if block in staged.output.done:
                continue
            with watch.stage("merge"):
                tensors: dict[str, Tensor] = {}
                summaries = []
                for source in inputs:
                    stats, peaks = added(self.parts, source, self.hessians)
                    outputs = [_largest(part.output_absmax(linear) for part in self.parts) for linear in source.linears]
                    summaries.append(summary(source.linears, stats, peaks, outputs))
                    tensors.update(tensors_of_input(source, stats, peaks))
                    named = zip(source.linears, outputs, strict=True)
                    tensors.update({linear + ABSMAX: absmax for linear, absmax in named})
                for index, part in enumerate(KV):
                    tensors[f"{block}.{part}"] = _largest(saved.kv(block)[index] for saved in self.parts)
                staged.finish(block, tensors, summaries, **facts)
        progress("merge", len(self.blocks), len(self.blocks), "all")


def _data_record(rows: TokenRows) -> dict[str, Any]:
    seqlen = max(map(len, rows.rows))
    return {**rows.record(), "seqlen": seqlen}


def _largest(values: Iterable[Tensor]) -> Tensor:
    import torch

    return torch.stack(list(values)).amax(0)
