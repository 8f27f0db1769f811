"""A model and a recipe, checked against each other: all that can be known before any work. Never imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.calibration.texts import check_source
from qtool.checkpoint.hub import locate
from qtool.checkpoint.reader import Checkpoint
from qtool.errors import UsageError
from qtool.estimate import estimate
from qtool.formats import Format, format_for, get_format, least_capable
from qtool.formats.weights import Source, Weights
from qtool.headers import TensorInfo, kind_of, scale_dtype
from qtool.methods import Method, get_method
from qtool.models.architectures import ARCHITECTURES, LLAMA, Architecture, architecture_of
from qtool.plan import Linear, Plan, make_plan
from qtool.recipe import Recipe
from qtool.scheme import KV_SCHEMES, ActivationScheme, QuantScheme
from qtool.transforms import ScaleTransform, SourceTransform, Transform, get_transform

if TYPE_CHECKING:
    from qtool.calibration.saved import SavedStats

KV_PARTS = ("k_scale", "v_scale")


@dataclass(frozen=True)
class Job:
    """`source` is the checkpoint as the transforms leave it before anything is measured."""

    model: str
    checkpoint: Checkpoint
    source: Source
    recipe: Recipe
    method: Method
    transforms: tuple[Transform, ...]
    format: Format
    plan: Plan
    architecture: Architecture | None
    stats: SavedStats | None = None
    config_changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kv(self) -> ActivationScheme | None:
        """How keys and values are stored when the model is served."""
        return KV_SCHEMES[self.recipe.kv] if self.recipe.kv else None

    @property
    def wanted(self) -> frozenset[str]:
        """The statistics of the inputs that the run needs: of `qtool.calibration.stats`, or "kv"."""
        return _wanted(self.recipe, self.method, self.transforms, (x.scheme for x in self.plan.linears))

    @property
    def needs_data(self) -> bool:
        return bool(self.wanted) and self.stats is None

    @property
    def follows_rounding(self) -> bool:
        """Whether what is measured in a block shall have seen the rounding of the blocks before it.

        Methods with error feedback make up for it; for all others the float model's statistics are the right ones.
        """
        return bool(self.method.needs)

    def quantization_config(self) -> dict[str, Any]:
        """config.json's entry. Raises UsageError for what one checkpoint of the format cannot hold together."""
        schemes = {linear.module: linear.scheme for linear in self.plan.linears}
        matrices = [k.source.name for k in self.plan.kept if len(k.source.shape) >= 2]
        left = {name.removesuffix(".weight") for name in matrices}
        head = (self.architecture or LLAMA).head  # a tied one is in no file
        left_alone = sorted(left | ({head} - schemes.keys()))
        return self.format.config(schemes, left_alone, self.kv, self.plan.linears[0].source.dtype)


def prepare(model: str, recipe: Recipe) -> Job:
    """The job, or a UsageError with everything that is wrong with it. Reads headers only."""
    method = get_method(recipe.method, recipe.options.get(recipe.method, {}))
    transforms = tuple(get_transform(name, recipe.options.get(name, {})) for name in recipe.transforms)
    checkpoint = Checkpoint(locate(model))
    source: Source = Weights(checkpoint)
    if source.format:
        raise UsageError(f"{checkpoint.path} is already quantized", "give the model that it was made from")
    schemes = [QuantScheme.parse(text) for text in (recipe.scheme, *recipe.layers.values())]
    wanted = _wanted(recipe, method, transforms, schemes)
    architecture = _architecture(checkpoint, recipe, bool(wanted), bool(transforms))
    known = architecture or LLAMA  # names of fused linears are much the same everywhere
    format = get_format(_format_name(recipe, known))
    stats = _saved_stats(recipe, checkpoint, wanted)
    if wanted and not stats:
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
    solvable = architecture.is_block_linear if architecture and wanted else None
    plan = make_plan(
        {**checkpoint.tensors},
        recipe,
        format.layout,
        known.fused(),
        solvable,
        storable=lambda linear: _problem(format, linear, known),
        transposed=known.is_block_linear if known.transposed else None,
        added=[*source.added, *_kv_scales(checkpoint, recipe, architecture)],
    )
    job = Job(model, checkpoint, source, recipe, method, transforms, format, plan, architecture, stats, changes)
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
    memory_bytes, wall_s = estimate(job.plan, job.wanted, job.recipe.data, job.checkpoint.config, scalings)
    return {
        "model": job.model,
        "architecture": job.checkpoint.config.get("model_type", "unknown"),
        "transforms": list(job.recipe.transforms),
        "method": job.recipe.method,
        "kv": job.recipe.kv,
        "data": None if not job.wanted else job.recipe.stats or job.recipe.data.source,
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
        "left_alone": [{"reason": r, "tensors": len(x), "size_bytes": sum(x)} for r, x in reasons.items()],
        "bytes_before": job.checkpoint.size_bytes,
        "bytes_after": job.plan.size_bytes,
        "bits_per_weight": job.plan.bits_per_weight,
        "expected_memory_bytes": memory_bytes,
        "expected_wall_s": wall_s,
    }


def readers(job: Job) -> str:
    """Who loads the output: whoever loads its most unusual layer."""
    return least_capable({job.format.readers(linear.scheme) for linear in job.plan.linears})


def _wanted(recipe: Recipe, method: Method, transforms: tuple[Transform, ...], schemes: Any) -> frozenset[str]:
    static = any(s.activations and s.activations.is_static for s in schemes)
    wanted = set(method.needs).union(*(t.needs for t in transforms), {"vectors"} if static else ())
    return frozenset(wanted | ({"kv"} if recipe.kv else set()))


def _format_name(recipe: Recipe, architecture: Architecture) -> str:
    """The format asked for, or the first that can store every scheme."""
    if recipe.format != "auto":
        return recipe.format
    schemes = [QuantScheme.parse(text) for text in (recipe.scheme, *recipe.layers.values())]
    return format_for(schemes, architecture.transposed)


def _problem(format: Format, linear: Linear, architecture: Architecture) -> str | None:
    """Why a format cannot store a linear, or None."""
    if architecture.transposed and not format.takes_transposed:
        return f"its linears store their weight [in, out], which readers of {format.name} do not know"
    tables = [name for part in (architecture.embedding, *architecture.before) for name in architecture.spellings(part)]
    if linear.module in tables and format.name != "qtool":
        return f"it is an embedding, which readers of {format.name} load as it is"
    return format.problem(linear.scheme)


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


def _saved_stats(recipe: Recipe, checkpoint: Checkpoint, wanted: frozenset[str]) -> SavedStats | None:
    if recipe.stats is None:
        return None
    from qtool.calibration.saved import SavedStats

    if not wanted:
        raise UsageError(
            f"`{recipe.method}` with this scheme uses no statistics of the inputs, but --stats gives some",
            "leave --stats out, or choose another --method or a --transform",
        )
    if "cross" in wanted:
        raise UsageError(
            f"`{recipe.method}` compares the float and the rounded model on the same rows: saved statistics do not do",
            "give data instead of --stats, or use `--method gptq`",
        )
    return SavedStats(Path(recipe.stats), checkpoint)


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
