"""A model and a recipe, checked against each other: all that can be known before any work. Never imports torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.calibration.texts import check_source
from qtool.checkpoint.hub import locate
from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.writer import Container
from qtool.containers import Mixed, container_for, mix_of, name_in, notes_of, with_kinds
from qtool.errors import UsageError, shown
from qtool.estimate import estimate
from qtool.finishing import BLOCK, ROWS, EndToEnd, get_finish
from qtool.finishing.block import Block
from qtool.finishing.lora import LoRA
from qtool.formats import FORMATS, Contents, Format, format_for, get_format, least_capable
from qtool.formats.relaying import HINT, relaid_scheme
from qtool.formats.weights import Source, Weights
from qtool.gguf.checkpoint import GGUFCheckpoint, open_checkpoint
from qtool.headers import TORCH_NAMES, TensorInfo, kind_of, scale_dtype
from qtool.methods import Method, get_method
from qtool.mixes import MIXES
from qtool.models.architectures import ARCHITECTURES, LLAMA, Architecture, architecture_of
from qtool.plan import Linear, Plan, make_plan, matches
from qtool.recipe import AUTO, DEFAULT_IGNORE, DEFAULT_METHOD, DEFAULT_SCHEME, EMBEDDINGS, NO_METHOD, Recipe
from qtool.scheme import FLOATS, KV_SCHEMES, ActivationScheme, QuantScheme
from qtool.training.options import Training
from qtool.transforms import ScaleTransform, SourceTransform, Transform, get_transform

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.calibration.imatrix_file import ImatrixStats
    from qtool.calibration.saved import SavedStats

KV_PARTS = ("k_scale", "v_scale")
DEFAULT_MIX = "q4_k_m"  # of GGUF files


@dataclass(frozen=True)
class Job:
    """`source` is the checkpoint as the transforms leave it before anything is measured; without a `method` its
    quantized weights are laid out anew as they are."""

    model: str
    checkpoint: Checkpoint
    source: Source
    recipe: Recipe
    method: Method | None
    transforms: tuple[Transform, ...]
    format: Format
    container: Container
    plan: Plan
    architecture: Architecture | None
    finishes: tuple[Training, ...] = ()  # how the linears are trained afterwards
    kv: ActivationScheme | None = None  # how keys and values are stored when the model is served
    stats: SavedStats | ImatrixStats | None = None
    config_changes: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what a person should know of the plan

    @property
    def wanted(self) -> frozenset[str]:
        """The statistics of the inputs that the run needs: of `qtool.calibration.stats`, or "kv"."""
        return _wanted(self.recipe, self.method, self.transforms, (x.scheme for x in self.plan.linears))

    @property
    def needs_data(self) -> bool:
        return self.runs_blocks or bool(self.finishes)

    @property
    def runs_blocks(self) -> bool:
        """Whether the rows go through the blocks while these are solved."""
        return (bool(self.wanted) and self.stats is None) or self.block is not None

    @property
    def follows_rounding(self) -> bool:
        """Whether what is measured in a block shall have seen the rounding of the blocks before it.

        Methods with error feedback make up for it, and so does training; for all others the float model's statistics
        are the right ones.
        """
        return bool(self.method and self.method.needs) or self.block is not None

    @property
    def block(self) -> Block | None:
        """How a block's linears are trained while it is at hand."""
        first = self.finishes[0] if self.finishes else None
        return first if isinstance(first, Block) else None

    @property
    def end_to_end(self) -> dict[str, EndToEnd]:
        """How all linears are trained together, by name and in order."""
        named = zip(self.recipe.finish, self.finishes, strict=True)
        return {name: finish for name, finish in named if isinstance(finish, EndToEnd)}

    @property
    def name(self) -> str | None:
        """What the model is called in its output, where there is a place for that."""
        return name_in(self.container)

    def scale_dtype(self, linear: Linear) -> str:
        """How the scales of a linear are stored."""
        return self.format.scale_dtype(linear.source.dtype)

    def as_stored(self, name: str, value: Tensor) -> Tensor:
        """A value of a tensor that stays unquantized as the output gives it back, float32."""
        import torch

        dtype = getattr(torch, TORCH_NAMES[self.plan.outputs[name].dtype])
        return self.container.decode(name, self.container.encode(name, value.to(dtype))).float()

    def quantization_config(self) -> dict[str, Any] | None:
        """config.json's entry. Raises UsageError for what one checkpoint of the format cannot hold together."""
        schemes = {linear.module: linear.scheme for linear in self.plan.linears}
        matrices = [k.source.name for k in self.plan.kept if len(k.source.shape) >= 2]
        left = {name.removesuffix(".weight") for name in matrices}
        head = (self.architecture or LLAMA).head  # a tied one is in no file
        left_alone = sorted(left | ({head} - schemes.keys()))
        dtype = next((linear.source.dtype for linear in self.plan.linears), "BF16")
        return self.format.quantization_config(Contents(schemes, left_alone, self.kv, dtype))


def prepare(model: str, recipe: Recipe) -> Job:
    """The job, or a UsageError with everything that is wrong with it. Reads headers only."""
    checkpoint = open_checkpoint(locate(model))
    if isinstance(checkpoint, GGUFCheckpoint) and checkpoint.model is None:
        raise UsageError(
            f"{checkpoint.path} is a GGUF file of an architecture that qtool does not know: "
            f"`{shown(checkpoint.config['gguf_architecture'])}`",
            "`qtool inspect` shows what is in it",
        )
    weights = Weights(checkpoint)
    if weights.schemes and not recipe.requantize:
        return _relaying(model, weights, recipe)
    if recipe.requantize and not weights.schemes:
        raise UsageError(f"{checkpoint.path} is not quantized yet", "leave --requantize out")
    recipe = _with_defaults(recipe, weights)
    method = get_method(recipe.method, recipe.options.get(recipe.method, {}))
    recipe = replace(recipe, finish=recipe.finish or method.finish)
    transforms = tuple(get_transform(name, recipe.options.get(name, {})) for name in recipe.transforms)
    finishes = _finishes(recipe)
    if finishes and recipe.data.rows is None:
        recipe = replace(recipe, data=replace(recipe.data, rows=ROWS))
    source: Source = weights
    mix = mix_of(recipe)
    schemes = [QuantScheme.parse(text) for text in (mix.base if mix else recipe.scheme, *recipe.layers.values())]
    wanted = _wanted(recipe, method, transforms, schemes)
    architecture = _architecture(checkpoint, recipe, bool(wanted or finishes), bool(transforms))
    known = architecture or LLAMA  # names of fused linears are much the same everywhere
    format = get_format("gguf" if mix else _format_name(recipe, known, schemes))
    if format.container == "gguf" and (problem := format.problem(schemes[0])):
        raise UsageError(problem, f"use a mix of llama.cpp's, such as `--scheme {DEFAULT_MIX}`: {', '.join(MIXES)}")
    stats = _saved_stats(recipe, checkpoint, wanted)
    if (wanted or finishes) and not stats:
        check_source(recipe.data, calibrating=True)
    if recipe.eval:
        check_source(recipe.eval.data)
    changes: dict[str, Any] = {}
    for place, (name, transform) in enumerate(zip(recipe.transforms, transforms, strict=True)):
        if isinstance(transform, SourceTransform):
            if place:
                raise UsageError(
                    f"`{name}` changes the model before anything is measured: it comes before `{recipe.transforms[0]}`",
                    f"`--transform {name}` first",
                )
            problem = transform.problem(architecture, checkpoint.config)
            if problem:
                raise UsageError(f"{checkpoint.path} cannot take `{name}`: {problem}", f"leave `{name}` out")
            if stats:
                raise UsageError(
                    f"statistics of the model as it is do not fit it after `{name}`", "give data instead of --stats"
                )
            assert architecture
            source = transform.wrap(source, architecture, checkpoint.config)
            changes.update(source.config_changes)
    if finishes and format.name == "dense":
        raise UsageError(
            "dense keeps no codes that could be trained",
            "write a packed format; `qtool quantize OUT -o DENSE --format dense` then lays that out as numbers",
        )
    container = container_for(format, checkpoint, {**checkpoint.config, **changes}, mix)
    tensors, added = weights.dense, source.added
    if mix:  # which says also what embedding and head become, be it one that a transform has added
        tensors, added = {**tensors, **{info.name: info for info in added}}, []
        if recipe.ignore[: len(DEFAULT_IGNORE)] == DEFAULT_IGNORE:
            others = tuple(pattern for pattern in DEFAULT_IGNORE if pattern not in EMBEDDINGS)
            recipe = replace(recipe, ignore=others + recipe.ignore[len(DEFAULT_IGNORE) :])
    mixed = Mixed(mix, container, bool(wanted)) if mix else None
    plan = make_plan(
        tensors,
        recipe,
        format.tensors,
        known.fused() if format.serves_fused else (),
        _solvable(architecture, format) if architecture and (wanted or finishes) else None,
        storable=lambda linear: _problem(format, linear, known),
        transposed=known.is_block_linear if known.transposed else None,
        added=[*added, *_kv_scales(checkpoint, recipe, architecture)],
        scheme_of=mixed.scheme_of if mixed else None,
        stored=container.stored,
        files=container.files,
    )
    weights.write_out(k.source.name for k in plan.kept if k.source.name.removesuffix(".weight") in weights.schemes)
    container = with_kinds(container, plan)
    kv = KV_SCHEMES[recipe.kv] if recipe.kv else None
    others = mixed.notes(plan, recipe) if mixed else ()
    if recipe.strict and others:
        more = f" ({len(others) - 1} more like it)" if len(others) > 1 else ""
        raise UsageError(f"--strict: {others[0]}{more}", "give these layers a scheme that fits with --layer")
    notes = (*notes_of(container), *others)
    job = Job(model, checkpoint, source, recipe, method, transforms, format, container, plan, architecture, finishes,
              kv, stats, changes, notes)  # fmt: skip
    if finishes and not any(x.scheme.kind not in FLOATS and known.is_block_linear(x.module) for x in plan.linears):
        raise UsageError("no linear of a block is rounded: there is nothing to train", "leave --finish out")
    if stats and architecture:
        stats.check_inputs({x.module: x.shape[1] for x in plan.linears if architecture.is_block_linear(x.module)})
    job.quantization_config()
    return job


def _with_defaults(recipe: Recipe, weights: Weights) -> Recipe:
    """A recipe that names its scheme and method. Dense output alone is a conversion, and floats need no data."""
    if recipe.scheme == AUTO:
        matrices = [info.dtype for info in weights.dense.values() if len(info.shape) == 2 and info.dtype in TORCH_NAMES]
        common = max(sorted(set(matrices)), key=matrices.count, default="BF16").lower()
        usual = {"gguf": DEFAULT_MIX, "dense": common}.get(recipe.format, DEFAULT_SCHEME)
        recipe = replace(recipe, scheme=usual)
    if recipe.method == AUTO:
        recipe = replace(recipe, method="rtn" if recipe.scheme in FLOATS and not recipe.layers else DEFAULT_METHOD)
    return recipe


def _finishes(recipe: Recipe) -> tuple[Training, ...]:
    if BLOCK in recipe.finish[1:]:
        raise UsageError(f"`{BLOCK}` trains while blocks are rounded: it comes first", f"`--finish {BLOCK}` first")
    if recipe.finish and recipe.stats:
        raise UsageError("--finish trains on rows of text", "give data instead of --stats")
    finishes = tuple(get_finish(name, recipe.options.get(name, {})) for name in recipe.finish)
    if any(isinstance(finish, LoRA) and not finish.merge for finish in finishes[:-1]):
        raise UsageError(
            "what is trained after an adapter does not know it", "`--finish lora` last, or lora.merge=true"
        )
    return finishes


def _relaying(model: str, weights: Weights, recipe: Recipe) -> Job:
    """The job for a model that is quantized already: the same weights in another format."""
    path = weights.checkpoint.path
    rounding = {
        "--scheme": recipe.scheme != AUTO, "--method": recipe.method != AUTO, "--layer": bool(recipe.layers),
        "--finish": bool(recipe.finish),
        "--transform": bool(recipe.transforms), "--kv": recipe.kv is not None, "--stats": recipe.stats is not None,
    }  # fmt: skip
    asked = [flag for flag, given in rounding.items() if given]
    if asked:
        raise UsageError(
            f"{path} is already quantized, and {asked[0]} would round it a second time",
            "`--format NAME` alone lays it out anew as it is; --requantize rounds again, from what it is worth now",
        )
    if recipe.format == "auto":
        raise UsageError(
            f"{path} is already quantized",
            f"lay it out anew with `--format NAME` ({', '.join(FORMATS)}), or give the model that it was made from",
        )
    format = get_format(recipe.format)
    architecture = _architecture(weights.checkpoint, recipe, False, False)
    known = architecture or LLAMA
    ignore = tuple(pattern for pattern in recipe.ignore if pattern not in DEFAULT_IGNORE)
    ends = {spelling for part in (known.embedding, known.head) for spelling in known.spellings(f"{part}.weight")}
    targets: dict[str, QuantScheme] = {}
    impossible: list[str] = []
    written_out = set(weights.experts) if format.name == "dense" else set()
    for module, scheme in weights.schemes.items():
        if module in weights.experts:
            if format.name != "dense":
                impossible.append(f"`{module}` are fused experts, which {format.name} cannot hold")
            continue
        shape, name = weights.matrix_shape(module), f"{module}.weight"
        target = relaid_scheme(scheme, shape, format)
        holds = target and (format.takes_embeddings or name not in known.spellings(f"{known.embedding}.weight"))
        if any(matches(module, pattern) for pattern in ignore) or (name in ends and not holds):
            written_out.add(name)
        elif target is None:
            why = format.problem(scheme, shape) or scheme.shape_error(shape)
            impossible.append(f"`{module}` is {scheme}, which {format.name} cannot hold: {why}")
        else:
            targets[module] = target
    if impossible:
        more = f" ({len(impossible) - 1} more like it)" if len(impossible) > 1 else ""
        raise UsageError(impossible[0] + more, HINT)
    container = container_for(format, weights.checkpoint, weights.checkpoint.config, None)
    weights.write_out(written_out)
    recipe = replace(recipe, scheme="as it is", method=NO_METHOD, ignore=ignore)
    plan = make_plan(
        {**weights.dense, **weights.kv_tensors},
        recipe,
        format.tensors,
        storable=lambda linear: _problem(format, linear, known),
        transposed=weights.is_transposed,
        scheme_of=lambda module, shape: targets.get(module),
        written_out=written_out,
        stored=container.stored,
        files=container.files,
    )
    container = with_kinds(container, plan)
    job = Job(model, weights.checkpoint, weights, recipe, None, (), format, container, plan, architecture,
              kv=weights.kv, notes=notes_of(container))  # fmt: skip
    job.quantization_config()
    return job


def describe(job: Job) -> dict[str, Any]:
    """What a run would do and about what it would take; see `qtool.estimate` for the last two."""
    kinds: dict[tuple[str, str], list[Linear]] = {}
    for linear in job.plan.linears:
        kinds.setdefault((kind_of(linear.module), str(linear.scheme)), []).append(linear)
    reasons: dict[str, list[int]] = {}
    for kept in job.plan.kept:
        reasons.setdefault(kept.reason, []).append(kept.source.size_bytes)
    scalings = sum(isinstance(transform, ScaleTransform) for transform in job.transforms)
    needs = job.wanted - {"squares"}  # which come from a file
    searched = job.method is not None
    finishes, config = dict(zip(job.recipe.finish, job.finishes, strict=True)), job.checkpoint.config
    memory_bytes, wall_s = estimate(job.plan, needs, job.recipe.data, config, scalings, searched, finishes)
    return {
        "model": job.model,
        "architecture": job.checkpoint.config.get("model_type", "unknown"),
        "transforms": list(job.recipe.transforms),
        "method": job.recipe.method,
        "finish": list(job.recipe.finish),
        "kv": job.recipe.kv,
        "data": None if not (job.wanted or job.finishes) else job.recipe.stats or job.recipe.data.source,
        "format": job.format.name,
        "readers": readers(job),
        "layers": [
            {
                "kind": kind,
                "scheme": scheme,
                "layers": len(m),
                "bits_per_weight": m[0].scheme.bits_per_weight(m[0].shape),
            }
            for (kind, scheme), m in kinds.items()
        ],
        "notes": list(job.notes),
        "left_alone": [{"reason": r, "tensors": len(x), "size_bytes": sum(x)} for r, x in reasons.items()],
        "bytes_before": job.checkpoint.size_bytes,
        "bytes_after": job.plan.size_bytes,
        "bits_per_weight": job.plan.bits_per_weight,
        "expected_memory_bytes": memory_bytes,
        "expected_wall_s": wall_s,
    }


def readers(job: Job) -> str:
    """Who loads the output: whoever loads its most unusual layer."""
    linears = job.plan.linears
    said = {job.format.readers(linear.scheme, linear.shape) for linear in linears}
    return least_capable(said or {job.format.readers(QuantScheme())})


def _wanted(recipe: Recipe, method: Method | None, transforms: tuple[Transform, ...], schemes: Any) -> frozenset[str]:
    if method is None:
        return frozenset()
    static = any(s.activations and s.activations.is_static for s in schemes)
    wanted = set(method.needs).union(*(t.needs for t in transforms), {"vectors"} if static else ())
    wanted |= {"kv"} if recipe.kv else set()
    return frozenset(wanted or ({"squares"} if recipe.stats else ()))


def _format_name(recipe: Recipe, architecture: Architecture, schemes: list[QuantScheme]) -> str:
    """The format asked for, or the first that can store every scheme."""
    return recipe.format if recipe.format != "auto" else format_for(schemes, architecture.transposed)


def _solvable(architecture: Architecture, format: Format) -> Callable[[str], bool]:
    """Whether a module can be rounded in this run: by the method, or, outside the blocks, to nearest."""
    outside = [architecture.embedding, architecture.head] if format.takes_embeddings else []
    names = {spelling for module in outside for spelling in architecture.spellings(f"{module}.")}
    return lambda module: architecture.is_block_linear(module) or f"{module}." in names


def _problem(format: Format, linear: Linear, architecture: Architecture) -> str | None:
    """Why a format cannot store a linear, or None."""
    if architecture.transposed and not format.takes_transposed:
        return f"its linears store their weight [in, out], which readers of {format.name} do not know"
    tables = [name for part in (architecture.embedding, *architecture.before) for name in architecture.spellings(part)]
    if linear.module in tables and not format.takes_embeddings:
        return f"it is an embedding, which readers of {format.name} load as it is"
    return format.problem(linear.scheme, linear.shape)


def _architecture(checkpoint: Checkpoint, recipe: Recipe, data: bool, transforms: bool) -> Architecture | None:
    """The entry that describes the model; it may lack one where nothing has to know the model."""
    if data or transforms or recipe.eval:
        if not checkpoint.config:
            raise UsageError(
                f"{checkpoint.path} has no config.json, so the model cannot be run",
                "`--method rtn` without --eval needs no data and no model",
            )
        return architecture_of(checkpoint.config, checkpoint.path)
    return ARCHITECTURES.get(str(checkpoint.config.get("model_type")))


def _saved_stats(recipe: Recipe, checkpoint: Checkpoint, wanted: frozenset[str]) -> SavedStats | ImatrixStats | None:
    if recipe.stats is None:
        return None
    from qtool.calibration.imatrix_file import open_stats

    if "cross" in wanted:
        raise UsageError(
            f"`{recipe.method}` compares the float and the rounded model on the same rows: saved statistics do not do",
            "give data instead of --stats, or use `--method gptq`",
        )
    return open_stats(Path(recipe.stats), checkpoint, wanted)


def _kv_scales(checkpoint: Checkpoint, recipe: Recipe, architecture: Architecture | None) -> list[TensorInfo]:
    """The scales of keys and values of each block."""
    if recipe.kv is None or architecture is None:
        return []
    first = architecture.inputs[0].linears[0]
    attention, _, _ = first.rpartition(".")
    return [
        TensorInfo(f"{name.removesuffix(f'{first}.weight')}{attention}.{part}", scale_dtype(info.dtype), (1,))
        for name, info in checkpoint.tensors.items()
        if name.endswith(f".{first}.weight") and architecture.is_block_linear(name.removesuffix(".weight"))
        for part in KV_PARTS
    ]
