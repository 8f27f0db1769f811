"""The life of a model: plan -> blocks -> codes -> files -> verify. The only module that knows every stage."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool import __version__
from qtool.calibration.texts import BUILT_IN, local_files
from qtool.checkpoint.beside import rest_of_files
from qtool.checkpoint.existing import check_apart, check_replaceable, check_same, read_manifest
from qtool.checkpoint.reader import FileIdentity, sha256_file
from qtool.checkpoint.writer import MANIFEST, StagedOutput, partial_path, write_json
from qtool.errors import QtoolError, ReadError, TrainingError, UsageError
from qtool.evaluation.describe import evaluation_tree
from qtool.finishing import ADAPTER, EndToEnd
from qtool.gguf.checkpoint import open_checkpoint
from qtool.gguf.container import GGUFContainer
from qtool.job import Job, readers
from qtool.memory import return_freed_memory
from qtool.models.loading import load_tokenizer
from qtool.processes import processes, rank
from qtool.recipe import to_tree
from qtool.report.model import KeptRecord, LayerRecord, Report, Stopwatch, peak_memory_bytes, versions

if TYPE_CHECKING:
    from qtool.calibration.tokens import TokenRows
    from qtool.training.world import World

Progress = Callable[[str, int, int, str], None]  # stage, steps done, steps in all, detail
ADDED = "was tied to the embedding, and is a tensor of its own now"
LICENCES = ("LICENSE", "LICENCE", "NOTICE")


@dataclass(frozen=True)
class RunOptions:
    """Where and how to run: nothing here changes what the output means."""

    device: str = "auto"
    force: bool = False
    batch_tokens: int = 512  # that run through a block at once; speed and memory only


def quantize(job: Job, out: Path, options: RunOptions, progress: Progress) -> tuple[Report | None, bool]:
    """Make OUT; the report, and whether it was up to date already. The output appears whole or not at all.

    Of several processes of torchrun the first does it, and has the report; the others share its end-to-end training.
    Raises UsageError when OUT holds something else and `force` is not set.
    """
    is_first = rank() == 0
    progress = progress if is_first else silent
    if processes() > 1 and not job.end_to_end:
        raise UsageError(
            f"{processes()} processes, but nothing here that they could share: that is training end to end",
            "`--finish scales`, full or lora; or run without torchrun",
        )
    watch = Stopwatch()
    typed, out = out, Path(os.path.realpath(out))
    return_freed_memory()
    known = read_manifest(out) or {}
    check_apart(typed, job.checkpoint.root)
    check_replaceable(typed, known)
    with watch.stage("identify"):
        progress("identify", 0, 1, str(job.checkpoint.path))
        files = [FileIdentity(**file) for file in known.get("source_files", [])]
        source = job.checkpoint.identity(files, [path.name for path in rest_of_files(job.checkpoint)])
        identity = _identity(job, source)
    if known and not options.force:
        check_same(typed, known, identity)
        report = Report.from_tree(known["report"])
        if is_first and job.recipe.eval and known.get("evaluation_recipe") != evaluation_tree(job.recipe.eval):
            _evaluate(job, out, known, report, options, progress, watch)
        return report if is_first else None, True
    if job.recipe.eval:
        _check_evaluation(job, options)
    from qtool.models.blockwise import pick_device
    from qtool.solving.solver import Solver
    from qtool.training.world import World

    world = World.of_environment(pick_device(options.device))
    device = world.device
    if not world.main:
        finish(job, partial_path(out), None, world, None, progress, watch)
        world.close()
        return None, False
    staged = StagedOutput(out, job.plan.outputs, identity, options.force, job.container)
    resumed = len(staged.done)
    solver = Solver(job, staged, device, progress, watch)
    try:
        solver.run(options.batch_tokens)
        _describe(job, staged)
        finish(job, staged.folder, staged, world, solver.rows, progress, watch)
    except QtoolError as error:  # what the user has to mend makes another run: nothing to go on from
        if not resumed and not isinstance(error, (ReadError, TrainingError)):
            staged.discard()
        raise
    world.close()
    with watch.stage("verify"):
        try:
            _verify(job, staged, progress)
        except QtoolError:
            staged.discard()
            raise
    report = _report(job, typed, str(device), staged, resumed)
    report.stages_s, report.wall_s, report.peak_memory_bytes = watch.stages_s, watch.wall_s, peak_memory_bytes()
    manifest = {
        "qtool": __version__,
        "identity": identity,
        "source_files": [asdict(f) for f in source],
        "files": [
            {"name": str(p.relative_to(staged.folder)), "size_bytes": p.stat().st_size, "sha256": sha256_file(p)}
            for p in staged.files()
        ],
        "report": report.to_tree(),
    }
    staged.publish(manifest)
    if job.recipe.eval:  # of what is there already: if it fails, no work is lost
        _evaluate(job, out, manifest, report, options, progress, watch)
    return report, False


def finish(
    job: Job,
    folder: Path,
    staged: StagedOutput | None,
    world: World,
    rows: TokenRows | None,
    progress: Progress,
    watch: Stopwatch,
) -> None:
    """The end-to-end finishes of what is staged in `folder`; `staged` is None in all processes but the first."""
    for name in job.end_to_end:
        from qtool.finishing.end_to_end import EndToEndFinish

        EndToEndFinish(job, name, folder, staged, world, progress).run(rows, watch)


def silent(stage: str, done: int, total: int, detail: str) -> None:
    """Progress of a process that is not the first."""


def _describe(job: Job, staged: StagedOutput) -> None:
    """Config, tokenizer and whatever else belongs beside the weights; a GGUF file has all that in itself."""
    rest = rest_of_files(job.checkpoint)
    if job.format.container == "gguf":
        staged.copy_files(path for path in rest if path.name.upper().startswith(LICENCES))
        return
    entry = job.quantization_config()
    config = {**job.checkpoint.config, **job.config_changes, "quantization_config": entry}
    if entry is None:
        del config["quantization_config"]
    else:
        for name, tree in job.format.files(entry).items():
            write_json(staged.folder / name, tree)
    write_json(staged.folder / "config.json", config)
    staged.write_index()
    staged.copy_files(rest)
    if job.checkpoint.home.is_file():
        load_tokenizer(job.checkpoint.home).save_pretrained(staged.folder)


def _identity(job: Job, source: list[FileIdentity]) -> dict[str, Any]:
    """What decides the bytes of the output: a run with the same identity is the same run."""
    recipe = to_tree(job.recipe)
    recipe.pop("eval")
    recipe.pop("strict")
    for name in job.recipe.options:
        recipe.pop(name)
    names = [job.recipe.method, *job.recipe.transforms, *job.recipe.finish]
    for name, options in zip(names, [job.method, *job.transforms, *job.finishes], strict=True):
        recipe[name] = asdict(options) if options else {}  # type: ignore[arg-type]
        if isinstance(options, EndToEnd):  # whatever saves memory may be another when it goes on
            recipe[name] = options.deciding()
    recipe["format"] = job.format.name
    data = {}
    if job.stats:
        recipe["stats"] = job.stats.sha256
    if not job.needs_data:
        recipe.pop("data")
    elif job.recipe.data.source in BUILT_IN:
        data = {job.recipe.data.source: f"of Python {platform.python_version()}"}
    else:
        data = {str(path): sha256_file(path) for path in local_files(job.recipe.data)}
    weights = {f.name: f.sha256 for f in source}
    named = {"name": job.name} if job.name else {}
    return {"qtool": __version__, "recipe": recipe, "source": weights, "data_files": data, **named}


def _verify(job: Job, staged: StagedOutput, progress: Progress) -> None:
    """Read everything back: the bytes of each tensor, and that each linear unpacks to exactly what was solved."""
    from qtool.solving.record import digest_bytes, digest_written

    written = open_checkpoint(staged.folder)
    for done, unit in enumerate(job.plan.units):
        record = staged.done[unit.name]
        for name, tensor in written.borrow_stored(record["tensors"]):
            if digest_bytes(tensor) != record["tensors"][name]:
                raise QtoolError(
                    f"`{name}` reads back other bytes than were written to {staged.folder}: a faulty disk?"
                )
        for linear in unit.linears:
            if digest_written(written, job, linear) != record["solved"][linear.module]:
                raise QtoolError(f"`{linear.module}` does not unpack to what was solved: please report this bug")
        progress("verify", done + 1, len(job.plan.units), unit.name)


def _report(job: Job, out: Path, device: str, staged: StagedOutput, resumed: int) -> Report:
    layers = [LayerRecord.from_tree(x) for unit in job.plan.units for x in staged.done[unit.name]["layers"]]
    changed = job.source.changed.union(*(record["changed"] for record in staged.done.values()))
    kept = [
        KeptRecord(k.source.name, k.source.dtype, k.source.size_bytes, k.reason, k.source.name in changed)
        for k in job.plan.kept
    ]
    planned = {x.source.name for x in job.plan.linears} | {k.source.name for k in job.plan.kept}
    added = [info for info in job.source.added if info.name not in planned]
    kept += [KeptRecord(info.name, info.dtype, info.size_bytes, ADDED, changed=True) for info in added]
    training = [record["training"] for record in staged.done.values() if record["training"]]
    notes_of_training = [
        f"`{tree['finish']}` did not make the held-out loss of {tree['unit']} better: it stays as it was"
        for tree in training
        if tree["held_out"] and tree["best_step"] == 0
    ]
    if (staged.folder / ADAPTER).is_dir():
        notes_of_training.append(f"the weights are as they were rounded: the PEFT adapter in {ADAPTER}/ was trained")
    unasked = [k for k in job.plan.kept if not k.asked]
    notes = [f"{len(unasked)} left alone unasked: {unasked[0].source.name}: {unasked[0].reason}"] if unasked else []
    on_disk = job.plan.bits_on_disk
    in_bytes = [x.scheme for x in job.plan.linears if x.scheme.kind == "int" and x.scheme.bits < 8 < on_disk]
    if in_bytes and job.format.name != "dense":
        notes.append(f"{on_disk:.3f} bits per weight on disk: readers of {in_bytes[0]} want every code in a byte")
    return Report(
        model=job.model,
        output=str(out),
        architecture=str(job.checkpoint.config.get("model_type", "unknown")),
        scheme=job.recipe.scheme,
        transforms=list(job.recipe.transforms),
        method=job.recipe.method,
        finish=list(job.recipe.finish),
        training=training,
        kv=job.recipe.kv,
        format=job.format.name,
        readers=readers(job),
        layers=layers,
        kept=kept,
        bytes_before=job.checkpoint.size_bytes,
        bytes_after=job.plan.size_bytes,
        bits_per_weight=job.plan.bits_per_weight,
        notes=[
            *dict.fromkeys(n for record in staged.done.values() for n in record["notes"]),
            *notes_of_training,
            *notes,
        ],
        data=next((record["data"] for record in staged.done.values() if record["data"]), None),
        device=device,
        resumed_units=resumed,
        versions=versions("torch", "transformers", "safetensors"),
    )


def _check_evaluation(job: Job, options: RunOptions) -> None:
    """Raises what the evaluation would after all the work."""
    from qtool.evaluation.evaluate import check

    assert job.recipe.eval
    gguf = job.container.metadata if isinstance(job.container, GGUFContainer) else None
    check(job.checkpoint.path, job.recipe.eval, options.device, gguf)


def _evaluate(
    job: Job,
    out: Path,
    manifest: Mapping[str, Any],
    report: Report,
    options: RunOptions,
    progress: Progress,
    watch: Stopwatch,
) -> None:
    """Measure the output against its source, hold it to the gates, and put that into its manifest."""
    from qtool.evaluation.evaluate import evaluate
    from qtool.evaluation.gates import check_gates

    assert job.recipe.eval
    try:
        with watch.stage("evaluate"):
            adapter = out / ADAPTER if (out / ADAPTER).is_dir() else None
            result = evaluate(out, job.checkpoint.path, job.recipe.eval, options.device, progress, adapter)
    except QtoolError as error:
        message = f"{report.output} is whole, but could not be evaluated: {error.message}"
        raise type(error)(message, error.hint or "the same command evaluates again, and does no other work") from None
    report.evaluation = {**result.to_tree(), "model": report.output}
    report.gates = check_gates(result, job.recipe.eval)
    took_s = watch.stages_s["evaluate"]
    report.wall_s += took_s - report.stages_s.get("evaluate", 0.0)  # of another evaluation, long ago
    report.stages_s = {**report.stages_s, "evaluate": took_s}
    report.peak_memory_bytes = max(report.peak_memory_bytes, peak_memory_bytes())
    newer = {**manifest, "evaluation_recipe": evaluation_tree(job.recipe.eval), "report": report.to_tree()}
    write_json(out / (MANIFEST + ".new"), newer)
    (out / (MANIFEST + ".new")).replace(out / MANIFEST)
