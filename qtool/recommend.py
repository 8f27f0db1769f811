"""Which recipe of `qtool.targets` to take for a model, given memory, engine and hardware, and why.

Never imports torch.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

from qtool.checkpoint.reader import Checkpoint
from qtool.containers import Mixed
from qtool.errors import QtoolError, UsageError, unknown
from qtool.formats import get_format
from qtool.gguf.checkpoint import GGUFCheckpoint
from qtool.gguf.container import GGUFContainer
from qtool.gguf.model import GGUFModel
from qtool.headers import DTYPE_BITS, scale_dtype
from qtool.inspection.logical import is_quantized, open_weights
from qtool.inspection.memory import SCHEMES, USABLE, Memory, memory
from qtool.mixes import Mix
from qtool.models.architectures import ARCHITECTURES, LLAMA
from qtool.plan import Kept, Linear, make_plan, matches
from qtool.recipe import DEFAULT_IGNORE, EMBEDDINGS, Recipe
from qtool.report.table import Table, View, size
from qtool.scheme import QuantScheme
from qtool.targets import (
    AT_HOME,
    BUILT_ON,
    CARDS,
    CLASSES,
    ENGINES,
    GPUS,
    HARDWARE,
    LLAMA_CPP,
    TARGETS,
    Target,
    hardware_text,
)

CONTEXT = 4096
SHOWN = 8  # rows of the table; --json has all


@dataclass(frozen=True)
class Candidate:
    """A recipe that would run: the weights of this model, and with the cache. Without a budget `fits` is None."""

    recipe: str
    quality: str
    scheme: str
    needs_data: bool
    weight_bytes: int
    total_bytes: int | None
    fits: bool | None
    when: str


@dataclass(frozen=True)
class Recommendation:
    """The recipe to take, or None when the model fits as it is; `alternatives` are those that fit as well.

    `command` is what to type; with no recipe it is None, too, or lays the model out for the engine.
    """

    model: str
    recipe: str | None
    command: str | None
    reasons: list[str]
    alternatives: list[str]
    candidates: list[Candidate]
    left_out: dict[str, str]  # recipes that this model cannot take, and why

    def to_tree(self) -> dict[str, Any]:
        return asdict(self)


def recommend(
    checkpoint: Checkpoint,
    engine: str | None = None,
    hardware: str | None = None,
    budget_bytes: float | None = None,
    context: int = CONTEXT,
    batch: int = 1,
    has_data: bool = True,
) -> Recommendation:
    """The recipe of best quality that runs there and fits the memory of a card, of which `USABLE` counts.

    Raises UsageError for unknown names and for a quantized checkpoint, QtoolError where nothing runs or fits.
    """
    engine, hardware = _known(engine, hardware)
    if is_quantized(open_weights(checkpoint)):
        raise UsageError(f"{checkpoint.path} is already quantized", "give the model that it was made from")
    linears, kept = _tensors(checkpoint)
    kind = checkpoint.config.get("model_type", checkpoint.config.get("gguf_architecture"))
    with_data = has_data and kind in ARCHITECTURES
    needed = None if budget_bytes is None else memory(checkpoint, context, batch)
    gguf = _container(checkpoint)
    candidates, left_out = [], {}
    for target in _considered(engine, hardware):
        if target.needs_data and not with_data:
            continue
        problem = gguf if target.mix and isinstance(gguf, str) else _problem(target, linears)
        if problem:
            left_out[target.name] = problem
            continue
        if target.mix and isinstance(gguf, GGUFContainer):
            weight_bytes = _mix_bytes(target, target.mix, checkpoint, gguf)
        else:
            weight_bytes = _weight_bytes(target, linears, kept)
        total, fits = None, None
        if needed and budget_bytes is not None:
            total = weight_bytes + needed.kv_cache.size_bytes[target.kv or "fp16"]
            fits = total <= USABLE * budget_bytes
        candidates.append(
            Candidate(target.name, target.quality, target.scheme_text, target.needs_data, weight_bytes, total, fits,
                      target.when)
        )  # fmt: skip
    considered = "what " + ("" if with_data else "needs no data and ") + f"runs {_where(engine, hardware)}"
    if not candidates:
        why = next((f" for this model: {name}: {problem}" for name, problem in left_out.items()), "")
        raise QtoolError(f"no recipe is {considered}{why}", "leave out --engine or --hardware to see what there is")
    reasons = [f"considered: {considered}" + ("" if hardware else "; name yours with --hardware")]
    if has_data and not with_data:
        reasons.append(
            f"qtool cannot run models of architecture `{kind}`, so only recipes without data were considered"
        )
    if engine in ("transformers", "bitsandbytes"):
        reasons.append(
            "transformers keeps bitsandbytes packed, and GPTQ and AWQ with gptqmodel; it unpacks all else to 16 bits"
        )
    chosen: str | None = candidates[0].recipe
    if needed and budget_bytes is not None:
        reason, chosen = _by_memory(candidates, needed, budget_bytes, considered)
        reasons.append(reason)
        reasons += [note for note in needed.notes if not note.startswith(SCHEMES)]  # those are of other schemes
    else:
        reasons.append(f"no --memory is given, so the best quality comes first: {candidates[0].quality}")
    command = None
    if chosen:
        target = next(t for t in TARGETS if t.name == chosen)
        command = target.command(str(checkpoint.path))
        reasons.append(f"{chosen}: {target.when}")
        if target.needs_data:
            reasons.append(f"it needs data: {target.rows} rows of text like what the model will see")
        if target.mix:
            assert isinstance(gguf, GGUFContainer)
            reasons += gguf.model.notes
    elif engine == LLAMA_CPP and not isinstance(checkpoint, GGUFCheckpoint):
        command = _unrounded(checkpoint, linears)
        reasons.append(f"{LLAMA_CPP} loads GGUF files only: the command makes one of the same weights")
    if not engine and hardware not in AT_HOME:
        reasons.append(f"for a GGUF file (llama.cpp, Ollama, LM Studio) add `--engine {LLAMA_CPP}`")
    others = [c.recipe for c in candidates if c.recipe != chosen and c.fits is not False]
    return Recommendation(str(checkpoint.path), chosen, command, reasons, others, candidates, left_out)


def parse_memory(text: str) -> float:
    """Bytes of `8GB`, `7.5 GB`, `900MB`, `8GiB`; a bare number is in GB. Raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b?)?", text.strip().lower())
    if not match or not float(match[1]):
        raise UsageError(f"`{text}` is not a size of memory", "for example `--memory 24GB`")
    return float(match[1]) * (1024 if match[3] else 1000) ** (" kmgt".index(match[2] or "g"))


def recommendation_view(found: Recommendation) -> View:
    """The recipe, the reasons, what else was considered, and what to type."""
    shown = [c for c in found.candidates if c.recipe in (found.recipe, *found.alternatives)]
    rows = [
        (
            c.recipe,
            c.quality,
            size(c.weight_bytes),
            "-" if c.total_bytes is None else size(c.total_bytes),
            "yes" if c.needs_data else "no",
            c.when,
        )
        for c in sorted(shown, key=lambda c: c.recipe != found.recipe)
    ]
    leave = "leave it in 16 bits" if found.command else "leave it as it is"
    view: View = [f"{found.model}: {found.recipe or leave}", *(f"- {reason}" for reason in found.reasons)]
    view.append(Table(("recipe", "class", ">weights", ">with cache", "data", "when"), rows[:SHOWN]))
    if len(rows) > SHOWN:
        view.append(f"... and {len(rows) - SHOWN} more in --json")
    for problem in dict.fromkeys(found.left_out.values()):
        names = ", ".join(name for name, its in found.left_out.items() if its == problem)
        view.append(f"not for this model: {names}: {problem}")
    return [*view, found.command] if found.command else view


def _known(engine: str | None, hardware: str | None) -> tuple[str | None, str | None]:
    """The names as the table spells them."""
    if engine is not None:
        given = re.sub(r"[\s_-]", "", engine.lower())
        engine = BUILT_ON.get(given, LLAMA_CPP if given == "llamacpp" else given)
        if engine not in ENGINES:
            raise unknown("engine", engine, [*ENGINES, *BUILT_ON])
    if hardware is not None:
        given = re.sub(r"[\s_-]|nvidia|geforce", "", hardware.lower())
        hardware = CARDS.get(given) or CARDS.get(f"rtx{given}", given)
        if hardware not in HARDWARE:
            raise unknown("hardware", given, [*HARDWARE, *CARDS])
    return engine, hardware


def _considered(engine: str | None, hardware: str | None) -> list[Target]:
    """What an engine has kernels for, by falling quality; hardware that nobody named is every GPU.

    Without an engine, GGUF files are considered where llama.cpp is at home: there they come first in their class.
    """
    wanted = {hardware} if hardware else set(GPUS)
    engines = [engine] if engine else [name for name in ENGINES if name != LLAMA_CPP or hardware in AT_HOME]
    found = [target for target in TARGETS if any(wanted <= set(target.hardware(name)) for name in engines)]
    if engine is None and hardware in AT_HOME:
        found.sort(key=lambda target: (CLASSES.index(target.quality), target.mix is None))
    return found


def _where(engine: str | None, hardware: str | None) -> str:
    on = f"on {hardware_text([hardware])}" if hardware else "on every GPU since Ampere"
    return f"in {ENGINES[engine]} {on}" if engine else on


def _tensors(checkpoint: Checkpoint) -> tuple[list[Linear], list[Kept]]:
    """What quantize would round, and what it would leave alone: under a scheme that fits every matrix."""
    known = ARCHITECTURES.get(str(checkpoint.config.get("model_type")), LLAMA)
    plan = make_plan(
        checkpoint.tensors,
        Recipe(scheme="int8-channel-sym", method="rtn"),
        lambda *_: [],
        transposed=known.is_block_linear if known.transposed else None,
    )
    return plan.linears, plan.kept


def _scheme_of(target: Target, module: str) -> QuantScheme:
    fitting = [scheme for pattern, scheme in target.layers if matches(module, pattern)]
    return QuantScheme.parse(fitting[-1] if fitting else target.scheme)


def _problem(target: Target, linears: list[Linear]) -> str | None:
    """Why the model cannot take it, or None. A mix has something for every shape."""
    if target.mix:
        return None
    for pattern, _ in target.layers:
        if not any(matches(linear.module, pattern) for linear in linears):
            return f"no layer is called `{pattern}`"
    format = get_format(target.format) if target.format != "auto" else None
    for linear in linears:
        scheme = _scheme_of(target, linear.module)
        error = scheme.shape_error(linear.shape)
        if format and not error:
            error = format.problem(scheme, linear.shape)
            if linear.transposed and not format.takes_transposed:
                error = f"it is stored [in, out], which readers of {format.name} do not know"
        if error:
            return f"`{linear.module}`: {error}"
    return None


def _weight_bytes(target: Target, linears: list[Linear], kept: list[Kept]) -> int:
    """All tensors; without the padding that a format may add, where the recipe names none."""
    rounded = 0
    for linear in linears:
        scheme = _scheme_of(target, linear.module)
        if target.format == "auto":
            rounded += ceil(scheme.size_bits(linear.shape, DTYPE_BITS[scale_dtype(linear.source.dtype)]) / 8)
        else:
            tensors = get_format(target.format).tensors(replace(linear, scheme=scheme))
            rounded += sum(info.size_bytes for info in tensors)
    return rounded + sum(k.source.size_bytes for k in kept)


def _container(checkpoint: Checkpoint) -> GGUFContainer | str:
    """The model as a GGUF file, or why llama.cpp cannot have it."""
    try:
        container = GGUFContainer(GGUFModel.of_config(checkpoint.config), {}, {})
        for info in checkpoint.tensors.values():
            container.stored(info)
    except QtoolError as error:  # what it says is what people want to know
        return error.message
    return container


def _mix_bytes(target: Target, mix: Mix, checkpoint: Checkpoint, container: GGUFContainer) -> int:
    """All tensors of a GGUF file."""
    mixed = Mixed(mix, container, target.needs_data)
    ignore = tuple(pattern for pattern in DEFAULT_IGNORE if pattern not in EMBEDDINGS)
    plan = make_plan(
        checkpoint.tensors,
        replace(target.recipe(), ignore=ignore),
        get_format("gguf").tensors,
        scheme_of=mixed.scheme_of,
        stored=container.stored,
        files=container.files,
    )
    return plan.size_bytes


def _unrounded(checkpoint: Checkpoint, linears: list[Linear]) -> str:
    """What to type for a GGUF file in the type of the weights."""
    scheme = linears[0].source.dtype.lower()
    return shlex.join(["qtool", "quantize", str(checkpoint.path), "-o", "OUT", "--scheme", scheme, "--method", "rtn"])


def _by_memory(
    candidates: list[Candidate], needed: Memory, budget_bytes: float, considered: str
) -> tuple[str, str | None]:
    """The first that fits, as a sentence with the numbers; None when 16 bits fit. Raises QtoolError if nothing does."""
    dense_bytes = next(option for option in needed.options if option.weights == "bf16").total_bytes["fp16"]
    given = f"{needed.context} tokens of context" + (f" in {needed.batch} sequences" if needed.batch > 1 else "")
    cache = size(needed.kv_cache.size_bytes["fp16"])
    room = f"the {size(USABLE * budget_bytes)} usable of {size(budget_bytes)}, with {given} (a cache of {cache})"
    if dense_bytes <= USABLE * budget_bytes:
        return f"16 bits need {size(dense_bytes)} and fit {room}: nothing has to be quantized", None
    chosen = next((c for c in candidates if c.fits), None)
    if chosen is None:
        least = min(candidates, key=lambda c: c.total_bytes or 0)
        raise QtoolError(
            f"nothing fits {room}: of {considered}, {least.recipe} needs least, {size(least.total_bytes or 0)}",
            "give more memory with --memory, or a shorter --context",
        )
    better = candidates[: candidates.index(chosen)]
    steps = [next(c for c in better if c.quality == quality) for quality in dict.fromkeys(c.quality for c in better)]
    listed = ", ".join(f"{c.recipe} {size(c.total_bytes or 0)}" for c in [*steps, chosen])
    return f"16 bits need {size(dense_bytes)}, {listed}: {chosen.recipe} is the best that fits {room}", chosen.recipe
