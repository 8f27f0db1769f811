"""Which recipe runs where, as a table. Never imports torch.

`TARGETS` is all that is known about that; the page beside the recipes shows the same table. It follows the
documentation and sources of vLLM (to 0.32), SGLang, transformers 5.17, gptqmodel 7.7, bitsandbytes 0.50 and llama.cpp
(ggml 0.25). Its order is that of quality: 16 bits, 8 bits, 5 and 6 bits, 4 bits with 8 where it hurts, 4-bit integers,
4-bit floats, 3 bits, 2 bits; within a class, what suits most comes first. That is a rule of thumb and no measurement of
the model: `--eval` measures.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from qtool.finishing import ROWS
from qtool.methods import get_method
from qtool.mixes import MIXES, Mix
from qtool.mixes import scheme_of as mix_scheme
from qtool.recipe import DataSpec, Recipe
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
        return "seconds" if quick else {"gptaq": "longer", "qat": "hours"}.get(self.method, "minutes")

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


def hardware_text(hardware: Sequence[str]) -> str:
    """Names of hardware for people: every GPU, Hopper Blackwell CPU, or a dash."""
    names = [] if not set(GPUS) <= set(hardware) else ["every GPU"]
    names += [h.upper() if h == "cpu" else h.title() for h in hardware if not names or h not in GPUS]
    return ", ".join(names) or "-"


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
    Target("w4a16-qat", "4-bit integers", "int4-g128-sym", "qat",
           "w4a16-gptaq loses a little too much: the same, trained", (*GPUS, "cpu"), GPUS, rows=ROWS),
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
    Target("nvfp4-qat", "4-bit floats", "nvfp4", "qat", "nvfp4 loses too much: the same, trained", ("blackwell",),
           ("blackwell",), rows=ROWS),
    Target("nvfp4a16", "4-bit floats", "nvfp4a16", "gptq", "nvfp4 for the weights alone", GPUS),
    Target("mxfp4", "4-bit floats", "mxfp4", "gptq", "the 4-bit floats of the OCP standard; newer vLLM",
           ("blackwell",)),
    Target("mxfp4a16", "4-bit floats", "mxfp4a16", "gptq", "mxfp4 for the weights alone; newer vLLM", GPUS),
    Target("gguf-q3_k_m", "3 bits", "q3_k_m", "gptq", "4 bits do not fit in llama.cpp", llama_cpp=EVERYWHERE),
    Target("w3a16-gptaq", "3 bits", "int3-g128-sym", "gptaq", "4 bits do not fit; newer vLLM", GPUS),
    Target("w3a16-qat", "3 bits", "int3-g128-sym", "qat",
           "w3a16-gptaq loses too much: the same, trained; newer vLLM", GPUS, rows=ROWS),
    Target("w3a16-outliers", "3 bits", "int3-g64-sym+outliers-0.5%", "gptq",
           "0.5 % of the weights in 16 bits; qtool alone reads it"),
    Target("gguf-q2_k", "2 bits", "q2_k", "gptq", "3 bits do not fit in llama.cpp: a visibly worse model",
           llama_cpp=EVERYWHERE, rows=256),
    Target("gguf-q2_k-qat", "2 bits", "q2_k", "qat", "gguf-q2_k loses too much: the same, trained",
           llama_cpp=EVERYWHERE, rows=ROWS),
    Target("w2a16-gptaq", "2 bits", "int2-g64-sym", "gptaq", "research; newer vLLM", GPUS, rows=256),
    Target("w2a16-qat", "2 bits", "int2-g64-sym", "qat",
           "w2a16-gptaq loses too much: the same, trained; newer vLLM", GPUS, rows=ROWS),
)  # fmt: skip
