"""The life of a `calibrate` run: rows through the float model block by block, or the sums of what was saved before.

Blocks are staged like those of a quantized model, so an interrupted run goes on at the first unfinished one, and its
output appears whole or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

from qtool import __version__
from qtool.calibration.saved import (
    LAYOUT,
    STATS_FILE,
    SavedInput,
    SavedStats,
    check_alike,
    content_sha256,
    tensors_of,
)
from qtool.calibration.texts import SELF, check_source
from qtool.checkpoint.existing import check_apart, check_replaceable, check_same, read_manifest
from qtool.checkpoint.hub import locate
from qtool.checkpoint.reader import sha256_file
from qtool.checkpoint.writer import MANIFEST, StagedOutput, write_json
from qtool.errors import QtoolError, ReadError, UsageError, unknown
from qtool.estimate import FLOP_PER_S, PROCESS_BYTES
from qtool.formats.weights import Weights
from qtool.gather import CalibrateOptions, FromModel, Merge, Progress, Staged
from qtool.gguf.checkpoint import open_checkpoint
from qtool.memory import return_freed_memory
from qtool.models.architectures import Architecture, architecture_of, config_value
from qtool.recipe import DataSpec
from qtool.report.model import Stopwatch, peak_memory_bytes, versions

FORMATS = ("stats", "imatrix")


def prepare(model: str, data: DataSpec, hessians: bool, format: str) -> FromModel:
    """The work, or a UsageError with what is wrong. Reads headers only."""
    _check_format(format, hessians)
    checkpoint = open_checkpoint(locate(model))
    source = Weights(checkpoint)
    if source.format:
        raise UsageError(f"{checkpoint.path} is already quantized", "give the model that it was made from")
    if not checkpoint.config:
        raise UsageError(f"{checkpoint.path} has no config.json, so the model cannot be run")
    architecture = architecture_of(checkpoint.config, checkpoint.path)
    if format == "imatrix":
        from qtool.calibration.imatrix import check_architecture

        check_architecture(checkpoint.config["model_type"])
    check_source(data, calibrating=True)
    blocks = _blocks(source, architecture)
    return FromModel(model, checkpoint, source, architecture, blocks, data, hessians, format)


def prepare_merge(paths: Sequence[Path], hessians: bool | None, format: str) -> Merge:
    """Likewise for saved statistics; `hessians` None keeps what all of them have."""
    _check_format(format, bool(hessians))
    if len(paths) < (1 if format == "imatrix" else 2):
        raise UsageError(
            f"--merge takes two statistics folders or more, not {len(paths)}",
            "one alone can only be written in another form, with --format imatrix",
        )
    parts = [SavedStats(path) for path in paths]
    check_alike(parts)
    seen: dict[str, SavedStats] = {}
    for part in parts:
        if part.sha256 in seen:
            raise UsageError(f"{part.path} is the same as {seen[part.sha256].path}", "give each data set once")
        seen[part.sha256] = part
    if format == "imatrix":
        from qtool.calibration.imatrix import check_architecture

        check_architecture(parts[0].manifest["model"]["architecture"])
        hessians = False
    without = [part.path for part in parts if not part.has_hessians]
    if hessians is None:
        hessians = len(without) < len(parts)
    if hessians and without:
        raise QtoolError(
            f"{without[0]} has no second moments", "leave those of the others out with --no-hessians, or make it again"
        )
    return Merge(tuple(parts), parts[0].blocks, hessians, format)


def describe(work: FromModel | Merge) -> dict[str, Any]:
    """What a run would do and about what it would take."""
    facts: dict[str, Any] = {
        "format": work.format,
        "blocks": len(work.blocks),
        "inputs": sum(map(len, work.blocks.values())),
        "hessians": work.hessians,
        "size_bytes": _size_bytes(work),
    }
    if isinstance(work, Merge):
        return {"merge": [str(part.path) for part in work.parts], **facts}
    config, shapes = work.checkpoint.config, work.source.shapes
    context = int(config_value(config, "max_position_embeddings") or 2048)
    tokens = (work.data.rows or 128) * (work.data.seqlen or min(context, 2048))
    of_block = [sum(prod(shape) for name, shape in shapes.items() if name.startswith(f"{b}.")) for b in work.blocks]
    widths = [source.features for source in next(iter(work.blocks.values()))]
    moments = sum(n * n for n in widths) if work.hessians else 0
    hidden = tokens * int(config_value(config, "hidden_size") or 0)
    everything = 4 * sum(map(prod, shapes.values())) if work.data.source == SELF else 0
    flop = 2 * tokens * (sum(of_block) + moments * len(work.blocks))
    return {
        "model": work.model,
        "architecture": config["model_type"],
        "data": work.data.source,
        "tokens": tokens,
        **facts,
        "expected_memory_bytes": int(PROCESS_BYTES) + max(4 * (max(of_block) + moments + hidden), everything),
        "expected_wall_s": round(flop / FLOP_PER_S, 2),  # without writing rows, with `--data self`
    }


def run(work: FromModel | Merge, out: Path, options: CalibrateOptions, progress: Progress) -> tuple[Any, bool]:
    """Make OUT; the report as a tree, and whether it was up to date already.

    Raises UsageError when OUT holds something else and `force` is not set.
    """
    watch = Stopwatch()
    typed, out = out, Path(os.path.realpath(out))
    return_freed_memory()
    for source in work.sources:
        check_apart(out, source)
    known = _known(typed, out, work.format)
    with watch.stage("identify"):
        progress("identify", 0, 1, str(work.sources[0]))
        identity, model = work.identify(known or {})
    if known is not None and not options.force:
        if not known:
            raise UsageError(f"{typed} is there already", "give another -o/--output, or replace it with --force")
        check_same(typed, known, identity)
        return known["report"], True
    staged = StagedOutput(out, tensors_of(work.blocks, work.hessians), identity, options.force)
    resumed = len(staged.done)
    filled = Staged(staged, work.blocks)
    try:
        work.fill(filled, options, progress, watch)
    except QtoolError as error:  # what the user has to mend makes another run: nothing to go on from
        if not resumed and not isinstance(error, ReadError):
            staged.discard()
        raise
    manifest = _manifest(work, filled, identity, model)
    report = _report(work, typed, filled, manifest, resumed)
    report.update(stages_s=watch.stages_s, wall_s=watch.wall_s, peak_memory_bytes=peak_memory_bytes())
    manifest["report"] = report
    if work.format == "imatrix":
        _publish_imatrix(staged, manifest)
    else:
        staged.publish(manifest)
    return report, False


def _publish_imatrix(staged: StagedOutput, manifest: Mapping[str, Any]) -> None:
    """The staged statistics as one file; then they are not needed any more."""
    from qtool.calibration.imatrix import write_imatrix

    write_json(staged.folder / MANIFEST, manifest)
    temporary = staged.folder / staged.out.name
    write_imatrix(temporary, SavedStats(staged.folder))
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(staged.out)
    staged.discard()


def _manifest(
    work: FromModel | Merge, staged: Staged, identity: dict[str, Any], model: dict[str, Any]
) -> dict[str, Any]:
    tensors = {name: sha256 for record in staged.records for name, sha256 in record["tensors"].items()}
    files = [staged.output.folder / STATS_FILE]
    return {
        "qtool": __version__,
        "layout": LAYOUT,
        "identity": identity,
        **model,
        "tokenizer_sha256": staged.records[0]["tokenizer_sha256"],
        "data": staged.records[0]["data"],
        "hessians": work.hessians,
        "blocks": {block: [asdict(source) for source in inputs] for block, inputs in work.blocks.items()},
        "sha256": content_sha256(tensors),
        "tensors": tensors,
        "files": [{"name": p.name, "size_bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in files],
        "versions": versions("torch", "transformers", "safetensors"),
    }


def _report(
    work: FromModel | Merge, out: Path, staged: Staged, manifest: Mapping[str, Any], resumed: int
) -> dict[str, Any]:
    from qtool.calibration.tokens import too_little_data

    inputs = [record for block in staged.records for record in block["inputs"]]
    data = manifest["data"]
    widest = max(record["channels"] for record in inputs)
    tokens = sum(record["tokens"] for record in data)
    few = too_little_data(tokens, widest, max(record["seqlen"] for record in data))
    dead = [record["input"] for record in inputs if record["dead_channels"] == record["channels"]]
    notes = [f"the inputs of `{name}` are zero for all tokens: give more varied data" for name in dead]
    return {
        "model": manifest["model"]["name"],
        "architecture": manifest["model"]["architecture"],
        "output": str(out),
        "format": work.format,
        "sha256": manifest["sha256"],
        "hessians": work.hessians,
        "data": data,
        "rows": sum(record["rows"] for record in data),
        "tokens": tokens,
        "too_little_data": few,
        "size_bytes": _size_bytes(work),
        "inputs": inputs,
        "notes": [*notes, *([few] if few and work.hessians else [])],
        "device": staged.records[-1]["device"],
        "resumed_blocks": resumed,
        "versions": manifest["versions"],
    }


def _size_bytes(work: FromModel | Merge) -> int:
    """Of all tensors written."""
    if work.format == "imatrix":
        return sum(4 * (x.features + 1) * len(x.linears) for inputs in work.blocks.values() for x in inputs)
    return sum(info.size_bytes for info in tensors_of(work.blocks, work.hessians).values())


def _known(typed: Path, out: Path, format: str) -> Mapping[str, Any] | None:
    """The manifest of what is at OUT, {} for what is not ours but may be replaced, None for nothing."""
    if format == "imatrix":
        from qtool.calibration import imatrix

        if typed.suffix != ".gguf":
            raise UsageError(f"an imatrix is one file, not `{typed}`", "give a name that ends in .gguf")
        return imatrix.read_manifest(out)
    if typed.suffix == ".gguf":
        raise UsageError(f"statistics are a folder, not `{typed}`", "`--format imatrix` writes a .gguf file")
    known = read_manifest(out)
    check_replaceable(typed, known or {})
    return known


def _blocks(source: Weights, architecture: Architecture) -> dict[str, list[SavedInput]]:
    """The blocks of a checkpoint by its own names for them. Raises QtoolError for a block that lacks a linear."""
    first = architecture.linears()[0]
    blocks: dict[str, list[SavedInput]] = {}
    for index in range(len(source.shapes)):
        names = architecture.spellings(f"{architecture.blocks}.{index}")
        block = next((name for name in names if f"{name}.{first}.weight" in source.shapes), None)
        if block is None:
            break
        blocks[block] = []
        for group in architecture.inputs:
            linears = tuple(f"{block}.{linear}" for linear in group.linears)
            missing = [linear for linear in linears if f"{linear}.weight" not in source.shapes]
            if missing:
                raise QtoolError(f"the checkpoint has no tensor `{missing[0]}.weight`, which its architecture needs")
            features = source.shapes[f"{linears[0]}.weight"][0 if architecture.transposed else -1]
            blocks[block].append(SavedInput(linears, features))
    if not blocks:
        name = f"{architecture.blocks}.0.{first}.weight"
        raise QtoolError(f"the checkpoint has no tensor `{name}`, which its architecture needs")
    return blocks


def _check_format(format: str, hessians: bool) -> None:
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    if format == "imatrix" and hessians:
        raise UsageError(
            "an imatrix has no second moments", "leave --hessians out, or write statistics without --format"
        )
