"""The table of formats: how codes lie on disk.

A format is a class with `problem` (why it cannot store a scheme), `layout` (the tensors of a linear, from its
shape alone), `pack` and its exact inverse `unpack`, `config` (the entry in config.json) and its inverses `modules`
and `kv_of`, and `readers` (who loads it). Never imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from qtool.errors import unknown
from qtool.headers import TensorInfo
from qtool.scheme import ActivationScheme, QuantScheme

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.checkpoint.reader import Checkpoint
    from qtool.numerics.grid import QTensor

FORMATS = {
    "compressed-tensors": "qtool.formats.compressed_tensors:CompressedTensors",
    "bitsandbytes": "qtool.formats.bitsandbytes:BitsAndBytes",
    "qtool": "qtool.formats.own:Own",
}


class Format(Protocol):
    """What the pipeline and the readers ask of a format.

    `name` is its key in the table and the `quant_method` of its checkpoints; `parts` are the endings that the
    tensors of a quantized module may have. `takes_transposed`: its readers know linears that store their weight
    [in, out], such as GPT-2's. `container` is what the tensors lie in: "safetensors" or "gguf". `serves_fused`: its
    readers join q, k and v, and gate and up, which then need one scheme.
    """

    name: str
    parts: tuple[str, ...]
    takes_transposed: bool
    container: str
    serves_fused: bool

    def problem(self, scheme: QuantScheme, shape: tuple[int, ...] | None = None) -> str | None:
        """Why this format cannot store the scheme, or a weight of this shape [out, in] in it, or None."""
        ...

    def scale_dtype(self, weight_dtype: str) -> str:
        """How the scales of a weight of this type are stored, where the scheme leaves it open."""
        ...

    def layout(self, module: str, scheme: QuantScheme, shape: tuple[int, ...], scale_dtype: str) -> list[TensorInfo]:
        """The tensors that stand for the weight of `module`, [out, in]."""
        ...

    def pack(self, module: str, weight: QTensor, dtype: str = "BF16") -> dict[str, Tensor]:
        """Those tensors. `dtype` is the type of the weight before, for formats that note it."""
        ...

    def unpack(self, module: str, tensors: dict[str, Tensor], scheme: QuantScheme) -> QTensor:
        """The inverse of `pack`: `tensors` holds at least those of `layout`."""
        ...

    def config(
        self,
        schemes: dict[str, QuantScheme],
        left_alone: list[str],
        kv: ActivationScheme | None = None,
        dtype: str = "BF16",
    ) -> dict[str, Any]:
        """config.json's `quantization_config` for modules and their schemes; `left_alone` are unquantized modules,
        `kv` says how keys and values are stored, `dtype` is the type of the weights before. Raises UsageError for
        what one checkpoint cannot hold together."""
        ...

    def modules(self, checkpoint: Checkpoint) -> dict[str, tuple[QuantScheme, tuple[int, ...]]]:
        """Scheme and shape [out, in] of each quantized module of a checkpoint in this format."""
        ...

    def kv_of(self, config: dict[str, Any]) -> ActivationScheme | None:
        """How keys and values are stored, by config.json; None for as they are."""
        ...

    def readers(self, scheme: QuantScheme, shape: tuple[int, ...] | None = None) -> str:
        """Which programs load a linear of this scheme and shape [out, in]."""
        ...


def get_format(name: str) -> Format:
    """The format of that name. Raises UsageError for one that is in no table."""
    if name not in FORMATS:
        raise unknown("format", name, ("auto", *FORMATS))
    module, _, cls = FORMATS[name].partition(":")
    return getattr(import_module(module), cls)()


def format_for(schemes: Iterable[QuantScheme], transposed: bool = False) -> str:
    """The format that these schemes are usually stored in: the first of the table that can store them all.

    `transposed`: the linears of the model store their weight [in, out], which only some readers know.
    """
    candidates = [name for name in FORMATS if get_format(name).takes_transposed or not transposed]
    wanted = list(schemes)
    return next(name for name in candidates if not any(get_format(name).problem(scheme) for scheme in wanted))


def least_capable(readers: Iterable[str]) -> str:
    """Of what formats say of their readers, that of the scheme which fewest load, or under most conditions."""
    return min(readers, key=lambda text: ("vLLM" in text, "SGLang" in text, -len(text)))
