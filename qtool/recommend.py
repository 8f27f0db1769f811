"""Which recipe to take for a model, given memory, engine and hardware, and why. Never imports torch.

`TARGETS` is all that is known about what runs where; the page beside the recipes shows the same table. It follows the
documentation and sources of vLLM (to 0.32), SGLang, transformers 5.17, gptqmodel 7.7, bitsandbytes 0.50 and llama.cpp
(ggml 0.25). Its order is that of quality: 16 bits, 8 bits, 5 and 6 bits, 4 bits with 8 where it hurts, 4-bit integers,
4-bit floats, 3 bits, 2 bits; within a class, what suits most comes first. That is a rule of thumb and no measurement of
the model: `--eval` measures.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil, prod
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
from qtool.methods import get_method
from qtool.mixes import MIXES, Mix
from qtool.mixes import scheme_of as mix_scheme
from qtool.models.architectures import ARCHITECTURES, LLAMA
from qtool.plan import Kept, Linear, make_plan, matches
from qtool.recipe import DEFAULT_IGNORE, EMBEDDINGS, DataSpec, Recipe
from qtool.report.table import Table, View, size
from qtool.scheme import QuantScheme
from qtool.transforms import get_transform

GPUS = ("ampere", "ada", "hopper", "blackwell")
HARDWARE = (*GPUS, "cpu", "apple")
CARDS = {
    "a10": "ampere", "a30": "ampere", "a40": "ampere", "a100": "ampere", "a6000": "ampere", "rtx3060": "ampere",
    "rtx3080": "ampere", "rtx3090": "ampere", "l4": "ada", "l40": "ada", "l40s": "ada", "rtx4060": "ada",
    "rtx4070": "ada", "rtx4080": "ada", "rtx4090": "ada", "h100": "hopper", "h200": "hopper", "h20": "hopper",
    "gh200": "hopper", "b100": "blackwell", "b200": "blackwell", "b300": "blackwell", "gb200": "blackwell",
    "rtx5070": "blackwell", "rtx5080": "blackwell", "rtx5090": "blackwell", "x86": "cpu", "arm": "cpu",
    "m1": "apple", "m2": "apple", "m3": "apple", "m4": "apple", "m5": "apple",
}  # fmt: skip
LLAMA_CPP = "llama.cpp"
ENGINES = {"vllm": "vLLM", "sglang": "SGLang", "transformers": "transformers", "bitsandbytes": "bitsandbytes",
           LLAMA_CPP: LLAMA_CPP}  # fmt: skip
BUILT_ON = {"ollama": LLAMA_CPP, "lmstudio": LLAMA_CPP}  # programs that run models with another engine
AT_HOME = ("cpu", "apple")  # where llama.cpp comes first when no engine is named; elsewhere it has to be named
CLASSES = (  # by falling quality
    "8 bits", "5 and 6 bits", "4 and 8 bits", "4-bit integers", "4-bit floats", "3 bits", "2 bits",
)  # fmt: skip
# The matrices of Llama 3.1 8B: of its 32 blocks by llama.cpp's names, and embedding and head
REFERENCE = {"attn_q": (4096, 4096), "attn_k": (1024, 4096), "attn_v": (1024, 4096), "attn_output": (4096, 4096),
             "ffn_gate": (14336, 4096), "ffn_up": (14336, 4096), "ffn_down": (4096, 14336)}  # fmt: skip
REFERENCE_ENDS = {"token_embd": (128256, 4096), "output": (128256, 4096)}
REFERENCE_BLOCKS, REFERENCE_GQA = 32, 4
CONTEXT = 4096
SHOWN = 8  # rows of the table; --json has all


@dataclass(frozen=True)
class Target:
    """A recipe, and the hardware on which each engine has kernels made for it."""

    name: str
    quality: str  # one of CLASSES
    scheme: str
    method: str
    when: str
    vllm: tuple[str, ...] = ()
    sglang: tuple[str, ...] = ()
    bitsandbytes: tuple[str, ...] = ()  # with which transformers keeps it packed
    gptqmodel: tuple[str, ...] = ()  # likewise
    llama_cpp: tuple[str, ...] = ()  # where there is any, the scheme is a mix of llama.cpp's
    format: str = "auto"
    transforms: tuple[str, ...] = ()
    layers: tuple[tuple[str, str], ...] = ()
    kv: str | None = None
    rows: int = 128  # of calibration, where data is needed

    @property
    def mix(self) -> Mix | None:
        return MIXES[self.scheme] if self.llama_cpp else None

    @property
    def schemes(self) -> list[QuantScheme]:
        """Those of its matrices; of a mix the one that most have."""
        base = self.mix.base if self.mix else self.scheme
        return [QuantScheme.parse(text) for text in dict.fromkeys([base, *dict(self.layers).values()])]

    @property
    def needs_data(self) -> bool:
        static = any(s.activations and s.activations.is_static for s in self.schemes)
        parts = [get_method(self.method, {}), *(get_transform(name, {}) for name in self.transforms)]
        return static or self.kv is not None or any(part.needs for part in parts)

    @property
    def time(self) -> str:
        """About what it takes for a billion parameters."""
        quick = not self.needs_data and not self.mix  # the search for the scales of a mix's types takes minutes
        return "seconds" if quick else "longer" if self.method == "gptaq" else "minutes"

    @property
    def bits(self) -> str:
        """Bits per weight, scales and zero points included: of a matrix of 4096 x 4096, of a mix of Llama 3.1 8B."""
        if self.mix:
            return f"{mix_bits(self.mix, self.needs_data):.4g}"
        return " and ".join(f"{scheme.bits_per_weight((4096, 4096)):.4g}" for scheme in self.schemes)

    def hardware(self, engine: str) -> tuple[str, ...]:
        """Where an engine runs it without unpacking it to 16 bits.

        transformers 5.17 unpacks compressed-tensors when it loads them, or at the first forward pass, and GGUF.
        """
        return {"vllm": self.vllm, "sglang": self.sglang, "transformers": self.bitsandbytes or self.gptqmodel,
                "bitsandbytes": self.bitsandbytes, LLAMA_CPP: self.llama_cpp}[engine]  # fmt: skip

    def recipe(self) -> Recipe:
        """What its file in `recipes/` says."""
        layers = {pattern: str(QuantScheme.parse(scheme)) for pattern, scheme in self.layers}
        data = DataSpec(rows=self.rows) if self.needs_data else DataSpec()
        return Recipe(self.scheme_text, layers, transforms=self.transforms, method=self.method, kv=self.kv,
                      format=self.format, data=data)  # fmt: skip

    @property
    def scheme_text(self) -> str:
        """As a recipe says it."""
        return self.scheme if self.mix else str(self.schemes[0])

    def command(self, model: str) -> str:
        """What to type; TEXT and OUT are for the reader to fill in."""
        words = ["qtool", "quantize", model, "-o", "OUT", "--scheme", self.scheme]
        words += [w for pattern, scheme in self.layers for w in ("--layer", f"{pattern}={scheme}")]
        words += [w for name in self.transforms for w in ("--transform", name)]
        words += ["--method", self.method, *(["--kv", self.kv] if self.kv else [])]
        words += ["--format", self.format] if self.format != "auto" else []
        words += ["--data", "TEXT", "--rows", str(self.rows)] if self.needs_data else []
        return shlex.join(words)

    def cells(self) -> tuple[str, ...]:
        """Its row of the page that helps to choose."""
        packed = "packed" if self.hardware("transformers") else "unpacks"
        loads = "no" if self.schemes[0].outliers else packed
        data = "yes" if self.needs_data else "no"
        return (f"`{self.name}`", self.bits, data, self.time, hardware_text(self.vllm), hardware_text(self.sglang),
                hardware_text(self.llama_cpp), loads, self.when)  # fmt: skip


def mix_bits(mix: Mix, weighted: bool) -> float:
    """Bits per weight of a mix of llama.cpp's on Llama 3.1 8B, embedding and head included."""
    matrices = [(role, i, shape) for i in range(REFERENCE_BLOCKS) for role, shape in REFERENCE.items()]
    matrices += [(role, 0, shape) for role, shape in REFERENCE_ENDS.items()]
    bits = 0
    for role, index, shape in matrices:
        kind, _ = mix_scheme(mix, role, index, REFERENCE_BLOCKS, shape, REFERENCE_GQA, weighted)
        bits += QuantScheme.parse(kind).size_bits(shape)
    return bits / sum(prod(shape) for _, _, shape in matrices)


INT8 = ("ampere", "ada", "hopper")  # and not Blackwell: vLLM refuses int8 products there
FP8 = ("ada", "hopper", "blackwell")
EVERYWHERE = (*GPUS, "cpu", "apple")
PAGE_COLUMNS = ("recipe", "bits", "data", "time", "vLLM", "SGLang", "llama.cpp", "transformers", "when")
TARGETS = (
    Target("fp8-dynamic", "8 bits", "fp8-dynamic", "rtn", "the first choice from Ada on: next to no loss, fast",
           FP8, FP8),
    Target("fp8-block", "8 bits", "fp8-block", "rtn", "fp8 with a scale per 128 x 128, as in DeepSeek-V3",
           ("hopper", "blackwell"), ("hopper", "blackwell")),
    Target("mxfp8", "8 bits", "mxfp8", "rtn", "8-bit floats in groups of 32; newer vLLM", ("blackwell",)),
    Target("w8a8-int8", "8 bits", "w8a8-int8", "gptq", "the fast 8 bits of Ampere, and of CPUs", (*INT8, "cpu"), INT8,
           transforms=("smoothquant",)),
    Target("w8a16-rtn", "8 bits", "int8-channel-sym", "rtn", "8 bits that run on every GPU, when nothing may be lost",
           GPUS, GPUS),
    Target("fp8-static", "8 bits", "fp8-static", "rtn", "like fp8-dynamic with ranges of inputs fixed beforehand",
           FP8, FP8),
    Target("w8a8-static", "8 bits", "w8a8-static", "gptq", "like w8a8-int8 with fixed ranges: faster, a little worse",
           (*INT8, "cpu"), transforms=("smoothquant",)),
    Target("llm-int8", "8 bits", "llm-int8", "rtn", "8 bits in transformers, outlier columns of inputs in 16 bits",
           INT8, bitsandbytes=(*GPUS, "cpu")),
    Target("gguf-q8_0", "8 bits", "q8_0", "rtn", "8 bits in llama.cpp: next to no loss", llama_cpp=EVERYWHERE),
    Target("gguf-q6_k", "5 and 6 bits", "q6_k", "rtn", "hardly any loss at three quarters of the size of Q8_0",
           llama_cpp=EVERYWHERE),
    Target("gguf-q5_k_m", "5 and 6 bits", "q5_k_m", "gptq", "Q4_K_M loses a little too much", llama_cpp=EVERYWHERE),
    Target("mixed-4-8-gptq", "4 and 8 bits", "int4-g128-sym", "gptq", "4 bits lose a little too much", GPUS, GPUS,
           layers=(("*.down_proj", "int8-channel-sym"),)),
    Target("w4a16-gptq", "4-bit integers", "int4-g128-sym", "gptq", "the default at 4 bits", (*GPUS, "cpu"), GPUS),
    Target("w4a16-gptaq", "4-bit integers", "int4-g128-sym", "gptaq", "the closest model at 4 bits", (*GPUS, "cpu"),
           GPUS),
    Target("w4a16-asym-gptq", "4-bit integers", "int4-g128-asym", "gptq",
           "weights that do not lie evenly around zero", GPUS, GPUS),
    Target("w4a16-gptq-fp8-kv", "4-bit integers", "int4-g128-sym", "gptq",
           "long contexts: the key/value cache takes half", FP8, kv="fp8"),
    Target("w4a16-awq", "4-bit integers", "int4-g128-sym", "rtn", "4 bits from few or foreign texts", (*GPUS, "cpu"),
           GPUS, transforms=("awq",)),
    Target("w4afp8", "4-bit integers", "w4afp8", "gptq", "4-bit weights, 8-bit products: large batches; newer vLLM",
           ("hopper",)),
    Target("w4a8", "4-bit integers", "w4a8", "gptq", "4-bit weights, 8-bit products of Arm CPUs", ("cpu",)),
    Target("w4a16-rtn", "4-bit integers", "int4-g128-sym", "rtn", "a first try, or a model that qtool cannot run",
           (*GPUS, "cpu"), GPUS),
    Target("gptq-w4", "4-bit integers", "int4-g128-sym", "gptq", "w4a16-gptq for programs that read GPTQ's own format",
           (*GPUS, "cpu"), GPUS, gptqmodel=GPUS, format="gptq"),
    Target("awq-w4", "4-bit integers", "int4-g128-asym", "rtn", "AWQ as its own tools write it", (*GPUS, "cpu"), GPUS,
           gptqmodel=GPUS, format="awq", transforms=("awq",)),
    Target("gguf-q4_k_m", "4-bit integers", "q4_k_m", "gptq", "the default at 4 bits in llama.cpp",
           llama_cpp=EVERYWHERE),
    Target("gguf-iq4_xs", "4-bit integers", "iq4_xs", "gptq", "a tenth smaller than Q4_K_M",
           llama_cpp=EVERYWHERE),
    Target("gguf-q4_k_m-rtn", "4-bit integers", "q4_k_m", "rtn", "Q4_K_M without data, or from an imatrix",
           llama_cpp=EVERYWHERE),
    Target("nf4", "4-bit integers", "nf4", "rtn", "4 bits in transformers, the base of QLoRA", INT8,
           bitsandbytes=HARDWARE),
    Target("nf4-dq", "4-bit integers", "nf4-dq", "rtn", "nf4 with scales of 8 bits", INT8, bitsandbytes=HARDWARE),
    Target("nvfp4", "4-bit floats", "nvfp4", "gptq", "4-bit products of Blackwell, for large batches",
           ("blackwell",), ("blackwell",)),
    Target("nvfp4a16", "4-bit floats", "nvfp4a16", "gptq", "nvfp4 for the weights alone", GPUS),
    Target("mxfp4", "4-bit floats", "mxfp4", "gptq", "the 4-bit floats of the OCP standard; newer vLLM",
           ("blackwell",)),
    Target("mxfp4a16", "4-bit floats", "mxfp4a16", "gptq", "mxfp4 for the weights alone; newer vLLM", GPUS),
    Target("gguf-q3_k_m", "3 bits", "q3_k_m", "gptq", "4 bits do not fit in llama.cpp", llama_cpp=EVERYWHERE),
    Target("w3a16-gptaq", "3 bits", "int3-g128-sym", "gptaq", "4 bits do not fit; newer vLLM", GPUS),
    Target("w3a16-outliers", "3 bits", "int3-g64-sym+outliers-0.5%", "gptq",
           "0.5 % of the weights in 16 bits; qtool alone reads it"),
    Target("gguf-q2_k", "2 bits", "q2_k", "gptq", "3 bits do not fit in llama.cpp: a visibly worse model",
           llama_cpp=EVERYWHERE, rows=256),
    Target("w2a16-gptaq", "2 bits", "int2-g64-sym", "gptaq", "research; newer vLLM", GPUS, rows=256),
)  # fmt: skip


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


def hardware_text(hardware: Sequence[str]) -> str:
    """Names of hardware for people: every GPU, Hopper Blackwell CPU, or a dash."""
    names = [] if not set(GPUS) <= set(hardware) else ["every GPU"]
    names += [h.upper() if h == "cpu" else h.title() for h in hardware if not names or h not in GPUS]
    return ", ".join(names) or "-"


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
