"""The table of formats: how codes lie on disk.

A format is a class with `problem` (why it cannot store a scheme), `layout` (the tensors of a linear, from its
shape alone), `pack` and its exact inverse `unpack`, `config` (the entry in config.json) and its inverses `modules`
and `kv_of`, and `readers` (who loads it). Some are only read. Never imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from qtool.errors import UsageError, unknown
from qtool.headers import TensorInfo, scale_dtype
from qtool.scheme import ActivationScheme, QuantScheme

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.checkpoint.reader import Checkpoint
    from qtool.numerics.grid import QTensor
    from qtool.plan import Linear

FORMATS = {
    "compressed-tensors": "qtool.formats.compressed_tensors:CompressedTensors",
    "bitsandbytes": "qtool.formats.bitsandbytes:BitsAndBytes",
    "qtool": "qtool.formats.own:Own",
    "gptq": "qtool.formats.gptq:GPTQ",
    "gptq-v2": "qtool.formats.gptq:GPTQv2",
    "awq": "qtool.formats.awq:AWQ",
    "gguf": "qtool.formats.gguf:GGUF",
    "dense": "qtool.formats.dense:Dense",
}
READ_ONLY = {  # by the `quant_method` of config.json
    "fp8": "qtool.formats.fp8:FP8",
    "mxfp4": "qtool.formats.mxfp4:MXFP4",
}


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds besides its tensors: the schemes of its quantized modules, the modules `left_alone`, how
    keys and values are stored, and the type that the weights had before."""

    schemes: dict[str, QuantScheme]
    left_alone: list[str] = field(default_factory=list)
    kv: ActivationScheme | None = None
    dtype: str = "BF16"


class Format(Protocol):
    """What the pipeline and the readers ask of a format; what is given here holds for most.

    `name` is its key in the table, `quant_method` that of config.json where it is another; `parts` are the endings
    that the tensors of a quantized module may have.
    """

    name: str
    parts: tuple[str, ...]
    quant_method: str = ""
    container: str = "safetensors"  # what the tensors lie in, or "gguf"
    takes_transposed: bool = False  # its readers know linears that store their weight [in, out], such as GPT-2's
    takes_embeddings: bool = False  # its readers know embeddings that are quantized
    takes_kv: bool = False  # it says how keys and values are stored
    by_rows: bool = False  # a row of a weight is a row of its one tensor
    serves_fused: bool = True  # its readers join q, k and v, and gate and up, which then need one scheme

    def problem(self, scheme: QuantScheme, shape: tuple[int, ...] | None = None) -> str | None:
        """Why this format cannot store the scheme, or a weight of this shape [out, in] in it, or None."""
        ...

    def scale_dtype(self, weight_dtype: str) -> str:
        """How the scales of a weight of this type are stored, where the scheme leaves it open."""
        return scale_dtype(weight_dtype)

    def layout(self, module: str, scheme: QuantScheme, shape: tuple[int, ...], dtype: str) -> list[TensorInfo]:
        """The tensors that stand for the weight of `module`, [out, in]; `dtype` is that of `scale_dtype`."""
        ...

    def tensors(self, linear: Linear) -> list[TensorInfo]:
        """The layout of a linear of a plan."""
        return self.layout(linear.module, linear.scheme, linear.shape, self.scale_dtype(linear.source.dtype))

    def held(self, weight: QTensor, dtype: str) -> QTensor:
        """What is left of a weight, of type `dtype` before, in this format: all of it, but for dense ones."""
        return weight

    def pack(self, module: str, weight: QTensor, dtype: str = "BF16") -> dict[str, Tensor]:
        """Those tensors. `dtype` is the type of the weight before, for formats that note it."""
        ...

    def unpack(self, module: str, tensors: dict[str, Tensor], scheme: QuantScheme) -> QTensor:
        """The inverse of `pack`: `tensors` holds at least those of `layout`."""
        ...

    def config(self, contents: Contents) -> dict[str, Any] | None:
        """config.json's `quantization_config`, None where there is none.

        Raises UsageError for what one checkpoint cannot hold together. Asked through `quantization_config`.
        """
        return None

    def quantization_config(self, contents: Contents) -> dict[str, Any] | None:
        """`config`, of what this format has a place for. Raises UsageError for what else there is."""
        if contents.kv is not None and not self.takes_kv:
            raise UsageError(
                f"{self.name} has no place for how keys and values are rounded",
                "leave --kv out: many programs have a setting of their own for that; or use `--format qtool`",
            )
        return self.config(contents)

    def files(self, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """JSON files beside config.json that repeat its entry, by name."""
        return {}

    def version_of(self, config: dict[str, Any]) -> Format:
        """The version of this format in which a checkpoint with this entry in config.json is."""
        return self

    def modules(self, checkpoint: Checkpoint) -> dict[str, tuple[QuantScheme, tuple[int, ...]]]:
        """Scheme and shape [out, in] of each quantized module of a checkpoint in this format."""
        ...

    def kv_of(self, config: dict[str, Any]) -> ActivationScheme | None:
        """How keys and values are stored, by config.json; None for as they are."""
        return None

    def readers(self, scheme: QuantScheme, shape: tuple[int, ...] | None = None) -> str:
        """Which programs load a linear of this scheme and shape [out, in]."""
        ...


def get_format(name: str) -> Format:
    """The format of that name. Raises UsageError for one that is in no table."""
    if name in READ_ONLY:
        raise UsageError(f"checkpoints of format `{name}` are only read", f"write one of {', '.join(FORMATS)}")
    if name not in FORMATS:
        raise unknown("format", name, ("auto", *FORMATS))
    return _imported(FORMATS[name])


def reader_of(quant_method: str) -> Format | None:
    """The format that reads checkpoints whose config.json says so, or None."""
    entry = {**FORMATS, **READ_ONLY}.get(quant_method)
    return _imported(entry) if entry and quant_method != "dense" else None


def _imported(entry: str) -> Format:
    module, _, cls = entry.partition(":")
    return getattr(import_module(module), cls)()


def format_for(schemes: Iterable[QuantScheme], transposed: bool = False) -> str:
    """The format that these schemes are usually stored in: the first of the table that can store them all.

    `transposed`: the linears of the model store their weight [in, out], which only some readers know.
    Raises UsageError where none but dense can.
    """
    wanted = list(dict.fromkeys(schemes))
    for name in FORMATS:
        format = get_format(name)
        can = name != "dense" and (format.takes_transposed or not transposed)
        if can and not any(format.problem(scheme) for scheme in wanted):
            return name
    raise UsageError(
        f"no format stores {' and '.join(map(str, wanted))}{' of this model' if transposed else ' together'}",
        "choose schemes of one format, or `--format dense`, which writes out what they are worth",
    )


def least_capable(readers: Iterable[str]) -> str:
    """Of what formats say of their readers, that of the scheme which fewest load, or under most conditions."""
    return min(readers, key=lambda text: ("vLLM" in text, "SGLang" in text, -len(text)))
