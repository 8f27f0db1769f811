"""What a number is stored as: the number type, what shares a scale, and how the inputs are rounded.

A scheme parses from and prints to one short string: `int4-g128-sym`, `fp8-e4m3-channel+fp8-e4m3-token`,
`nvfp4`. After the weights a `+` names the rounding of the inputs and, for sparse outliers, their share:
`int3-g64-sym+outliers-0.5%`. The usual short names are aliases: `w4a16`, `w8a8`, `fp8-dynamic`. Never imports torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from math import ceil, prod

from qtool.errors import UsageError, unknown

DEFAULT_GROUP_SIZE = 128
BLOCK = 128  # rows and columns that share a scale when granularity is "block"
NESTED_BLOCK = 256  # absolute maxima of nf4-dq and fp4-dq that share a second-level scale
EXAMPLES = (
    "int4-g128-sym", "int8-channel-sym", "w4a16", "w4a16-g64-asym", "w3a16", "w8a16", "w2a16", "w8a8", "w4a8",
    "fp8", "fp8-dynamic", "fp8-block", "fp8-e4m3-channel", "fp8-e5m2-channel", "nvfp4", "nvfp4a16", "mxfp4",
    "mxfp4a16", "mxfp8", "mxfp8a16", "nf4", "nf4-dq", "fp4", "fp4-dq", "llm-int8", "int3-g64-sym+outliers-0.5%",
    "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs",
    "f16", "bf16", "f32",
)  # fmt: skip
ACTIVATION_EXAMPLES = ("int8-token", "int8-tensor", "fp8-e4m3-token", "fp8-e4m3-tensor", "fp8-e4m3-g128")
ALIASES = {
    "w8a8": "int8-channel-sym+int8-token",
    "w8a8-int8": "int8-channel-sym+int8-token",
    "w8a8-static": "int8-channel-sym+int8-tensor",
    "w4a8": "int4-g128-sym+int8-token",
    "w4afp8": "int4-g128-sym+fp8-e4m3-token",
    "fp8": "fp8-e4m3-tensor+fp8-e4m3-tensor",
    "fp8-static": "fp8-e4m3-tensor+fp8-e4m3-tensor",
    "fp8-dynamic": "fp8-e4m3-channel+fp8-e4m3-token",
    "w8a8-fp8": "fp8-e4m3-channel+fp8-e4m3-token",
    "fp8-block": "fp8-e4m3-block+fp8-e4m3-g128",
}


@dataclass(frozen=True)
class BlockType:
    """A tensor type of GGUF: `weights` of a row lie together in `size_bytes`, scales included.

    `number` is its id in the file. `group` weights share a scale; of float types every weight stands alone.
    """

    number: int
    bits: int
    weights: int
    size_bytes: int
    group: int | None = None


FLOATS = {"f32": BlockType(0, 32, 1, 4), "f16": BlockType(1, 16, 1, 2), "bf16": BlockType(30, 16, 1, 2)}
BLOCK_TYPES = {
    "q4_0": BlockType(2, 4, 32, 18, 32),
    "q4_1": BlockType(3, 4, 32, 20, 32),
    "q5_0": BlockType(6, 5, 32, 22, 32),
    "q5_1": BlockType(7, 5, 32, 24, 32),
    "q8_0": BlockType(8, 8, 32, 34, 32),
    "q2_k": BlockType(10, 2, 256, 84, 16),
    "q3_k": BlockType(11, 3, 256, 110, 16),
    "q4_k": BlockType(12, 4, 256, 144, 32),
    "q5_k": BlockType(13, 5, 256, 176, 32),
    "q6_k": BlockType(14, 6, 256, 210, 16),
    "iq4_nl": BlockType(20, 4, 32, 18, 32),
    "iq4_xs": BlockType(23, 4, 256, 136, 32),
}
MXFP4_BLOCK = BlockType(39, 4, 32, 17, 32)  # of the scheme mxfp4a16


@dataclass(frozen=True)
class Kind:
    """A number type that is not a plain integer: what a code takes and what its scales are."""

    bits: int
    group_size: int | None  # fixed by the type, or None when the scheme chooses its granularity
    scale_bits: int | None = None  # None: the 16 bits of the model's own type


KINDS = {
    "fp8-e4m3": Kind(8, None),
    "fp8-e5m2": Kind(8, None),
    "nvfp4": Kind(4, 16, 8),  # and one float32 per tensor
    "mxfp4": Kind(4, 32, 8),
    "mxfp8": Kind(8, 32, 8),
    "nf4": Kind(4, 64, 32),
    "nf4-dq": Kind(4, 64, 8),  # and one float32 for every 256 of them
    "fp4": Kind(4, 64, 32),
    "fp4-dq": Kind(4, 64, 8),  # likewise
    "llm-int8": Kind(8, None, 32),
    **{name: Kind(block.bits, block.group) for name, block in (FLOATS | BLOCK_TYPES).items()},
}
WITH_OWN_ACTIVATIONS = ("nvfp4", "mxfp4", "mxfp8")  # named alone they round the inputs the same way


@dataclass(frozen=True)
class ActivationScheme:
    """How the input of a linear is rounded while the model runs.

    `kind` is int, fp8-e4m3, nvfp4, mxfp4, mxfp8 or llm-int8. Granularity: "token" and "group" take their
    scales from the values as they come; "tensor" has one fixed scale, from calibration. nvfp4 has both: a
    fixed scale for the tensor and one for each group of 16. llm-int8 is int8 per token, without the input
    columns that reach `threshold`: those stay as they are.
    """

    kind: str = "int"
    bits: int = 8
    granularity: str = "token"
    group_size: int | None = None
    threshold: float | None = None

    @property
    def is_static(self) -> bool:
        """Whether it needs a scale from calibration."""
        return self.granularity == "tensor" or self.kind == "nvfp4"

    @classmethod
    def parse(cls, text: str, scheme: str) -> ActivationScheme:
        if match := re.fullmatch(r"int([2-8])-(token|tensor)", text):
            return cls("int", int(match[1]), match[2])
        if match := re.fullmatch(r"fp8-e4m3-(token|tensor|g[1-9]\d*)", text):
            group_size = int(match[1][1:]) if match[1][0] == "g" else None
            return cls("fp8-e4m3", 8, "group" if group_size else match[1], group_size)
        raise unknown(f"rounding of inputs in scheme `{scheme}`:", text, ACTIVATION_EXAMPLES)

    def __str__(self) -> str:
        number = f"int{self.bits}" if self.kind == "int" else self.kind
        return f"{number}-g{self.group_size}" if self.granularity == "group" else f"{number}-{self.granularity}"


@dataclass(frozen=True)
class QuantScheme:
    """How the weight of a linear [out, in] is stored, and how its input is rounded while the model runs.

    `bits` per code. Granularity, what shares a scale: "tensor", "channel" (a row), "group" (`group_size`
    inputs of a row), "block" (128 x 128). `outliers` is the share of weights kept in 16 bits beside the codes.
    """

    bits: int = 4
    granularity: str = "group"
    group_size: int | None = DEFAULT_GROUP_SIZE
    symmetric: bool = True
    kind: str = "int"
    activations: ActivationScheme | None = None
    outliers: float = 0.0

    @classmethod
    def parse(cls, text: str) -> QuantScheme:
        """The scheme that `text` names. Raises UsageError with the nearest known one."""
        given = text.strip().lower()
        weights, *extras = ALIASES.get(given, given).split("+")
        scheme = _of_kind(weights) or _integer(weights, text)
        for extra in extras:
            if match := re.fullmatch(r"outliers-(\d+(?:\.\d*)?)%", extra):
                scheme = replace(scheme, outliers=float(match[1]) / 100)
            elif scheme.activations is not None or scheme.kind in WITH_OWN_ACTIVATIONS:
                hint = f"leave `+{extra}` out"
                if scheme.kind in WITH_OWN_ACTIVATIONS:
                    raise UsageError(
                        f"scheme `{text}`: inputs of {scheme.kind} are rounded as that, or not at all", hint
                    )
                raise UsageError(f"scheme `{text}` says twice how inputs are rounded", hint)
            else:
                scheme = replace(scheme, activations=ActivationScheme.parse(extra, text))
        if scheme.outliers and (scheme.kind != "int" or not 0 < scheme.outliers <= 0.2):
            raise UsageError(
                f"scheme `{text}`: outliers go with integer weights and are at most 20 % of them",
                "for example `int3-g64-sym+outliers-0.5%`",
            )
        return scheme

    def __str__(self) -> str:
        if self.kind == "int":
            granularity = f"g{self.group_size}" if self.granularity == "group" else self.granularity
            text = f"int{self.bits}-{granularity}-{'sym' if self.symmetric else 'asym'}"
        elif KINDS[self.kind].group_size or self.kind == "llm-int8" or self.kind in FLOATS:
            text = self.kind
        else:
            text = f"{self.kind}-{self.granularity}"
        if self.kind in WITH_OWN_ACTIVATIONS:
            text += "" if self.activations else "a16"
        elif self.activations and self.kind != "llm-int8":
            text += f"+{self.activations}"
        return text + (f"+outliers-{100 * self.outliers:g}%" if self.outliers else "")

    def groups(self, in_features: int) -> int:
        """How many scales one row of `in_features` weights has."""
        return in_features // self._columns if self._columns else 1

    @property
    def by_rows(self) -> bool:
        """Whether every row of a weight is rounded by itself."""
        alone = self.granularity in ("channel", "group") and not self.outliers
        return self.kind in FLOATS or (alone and self.kind != "nvfp4" and not self.kind.endswith("-dq"))

    @property
    def _columns(self) -> int | None:
        return BLOCK if self.granularity == "block" else self.group_size

    def outlier_count(self, shape: tuple[int, ...]) -> int:
        """How many weights of a matrix stay in 16 bits."""
        return int(self.outliers * prod(shape))

    def shape_error(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of shape [out, in] cannot be stored so, or None."""
        if len(shape) != 2:
            return f"{len(shape)}-D tensors are not supported"
        if not all(shape):
            return f"it has {shape[0]} rows of {shape[1]} inputs"
        columns = BLOCK_TYPES[self.kind].weights if self.kind in BLOCK_TYPES else self._columns
        if columns and shape[1] % columns:
            return f"{shape[1]} inputs are not a multiple of {columns}"
        group = self.activations.group_size if self.activations else None
        if group and shape[1] % group:
            return f"{shape[1]} inputs are not a multiple of {group}, over which their rounding shares a scale"
        return None

    def size_bits(self, shape: tuple[int, ...], scale_bits: int = 16) -> int:
        """Bits of a weight of shape [out, in]: codes, scales, zero points and outliers, without padding.

        `scale_bits` are those of a scale in the model's own type; some kinds have others.
        """
        if block := (FLOATS | BLOCK_TYPES).get(self.kind):
            return 8 * block.size_bytes * prod(shape) // block.weights
        kind = KINDS.get(self.kind)
        groups = self.groups(shape[1])
        scales = {"tensor": 1, "block": ceil(shape[0] / BLOCK) * groups}.get(self.granularity, shape[0] * groups)
        zero_bits = 0 if self.symmetric else self.bits
        bits = prod(shape) * self.bits + scales * (
            (kind.scale_bits if kind and kind.scale_bits else scale_bits) + zero_bits
        )
        if self.kind == "nvfp4":
            bits += 32
        elif self.kind.endswith("-dq"):
            bits += 32 * (ceil(scales / NESTED_BLOCK) + 1)
        if self.outliers:
            bits += 32 * (self.outlier_count(shape) + shape[0] + 1)  # column and value; where each row begins
        return bits

    def bits_per_weight(self, shape: tuple[int, ...], scale_bits: int = 16) -> float:
        """`size_bits` per weight."""
        return self.size_bits(shape, scale_bits) / prod(shape)


KV_SCHEMES = {  # of the key/value cache, with one fixed scale for keys and one for values of a layer
    "fp8": ActivationScheme("fp8-e4m3", 8, "tensor"),
    "int8": ActivationScheme("int", 8, "tensor"),
}


def packed_words(count: int, bits: int) -> int:
    """32-bit words that hold a dense stream of `count` codes of `bits` bits."""
    return -(-count * bits // 32)


def _of_kind(text: str) -> QuantScheme | None:
    """A scheme of one of KINDS, or None."""
    if text == "llm-int8":
        return QuantScheme(8, "channel", None, True, text, ActivationScheme("llm-int8", 8, "token", None, 6.0))
    if text in FLOATS:
        return QuantScheme(FLOATS[text].bits, "tensor", None, True, text)
    if text in BLOCK_TYPES:
        return QuantScheme(BLOCK_TYPES[text].bits, "group", BLOCK_TYPES[text].group, True, text)
    name = text.removesuffix("a16")
    if name in KINDS and (group_size := KINDS[name].group_size):
        bits = KINDS[name].bits
        activations = None
        if text == name and name in WITH_OWN_ACTIVATIONS:
            activations = ActivationScheme(name, bits, "group", group_size)
        return QuantScheme(bits, "group", group_size, True, name, activations)
    if match := re.fullmatch(r"(fp8-e4m3|fp8-e5m2)(?:-(tensor|channel|block))?", text):
        return QuantScheme(8, match[2] or "channel", None, True, match[1])
    return None


def _integer(weights: str, text: str) -> QuantScheme:
    match = re.fullmatch(r"(?:int(?P<int>\d+)|w(?P<w>\d+)a(?P<a>4|8|16))(?P<rest>(?:-\w+)*)", weights)
    if match is None:
        raise unknown("scheme", text, EXAMPLES)
    bits = int(match["int"] or match["w"])
    if not 2 <= bits <= 8:
        raise UsageError(f"scheme `{text}` asks for {bits} bits: integer schemes have 2 to 8", "try `int4-g128-sym`")
    input_bits = int(match["a"] or 16)
    granularity, group_size = ("channel", None) if bits == 8 else ("group", DEFAULT_GROUP_SIZE)
    symmetric = True
    for part in match["rest"].split("-")[1:]:
        if part in ("sym", "asym"):
            symmetric = part == "sym"
        elif part in ("tensor", "channel"):
            granularity, group_size = part, None
        elif re.fullmatch(r"g[1-9]\d*", part):
            granularity, group_size = "group", int(part[1:])
        else:
            known = ("sym", "asym", "tensor", "channel", "g32", "g64", "g128", "static")
            raise unknown(f"part of scheme `{text}`:", part, known)
    activations = ActivationScheme("int", input_bits, "token") if input_bits != 16 else None
    return QuantScheme(bits, granularity, group_size, symmetric, "int", activations)
