"""What a number is stored as: the number type, what shares a scale, symmetric or not.

A scheme parses from and prints to one short string: `int4-g128-sym`, `int8-channel-sym`,
`int3-tensor-asym`. Aliases such as `w4a16-g64-asym` expand to it. Never imports torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import ceil, prod

from qtool.errors import UsageError, unknown

DEFAULT_GROUP_SIZE = 128
EXAMPLES = ("int4-g128-sym", "int8-channel-sym", "w4a16", "w4a16-g64-asym", "w3a16", "w8a16", "w2a16")


@dataclass(frozen=True)
class QuantScheme:
    """One weight format. `bits` per code; `group_size` inputs share a scale when granularity is "group"."""

    bits: int
    granularity: str = "group"
    group_size: int | None = DEFAULT_GROUP_SIZE
    symmetric: bool = True

    @classmethod
    def parse(cls, text: str) -> QuantScheme:
        """The scheme that `text` names. Raises UsageError with the nearest known one."""
        match = re.fullmatch(r"(?:int(?P<int>\d+)|w(?P<w>\d+)a16)(?P<rest>(?:-\w+)*)", text.strip().lower())
        if match is None:
            raise unknown("scheme", text, EXAMPLES)
        bits = int(match["int"] or match["w"])
        if not 2 <= bits <= 8:
            raise UsageError(
                f"scheme `{text}` asks for {bits} bits: integer schemes have 2 to 8", "try `int4-g128-sym`"
            )
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
                raise unknown(
                    f"part of scheme `{text}`:", part, ("sym", "asym", "tensor", "channel", "g32", "g64", "g128")
                )
        return cls(bits, granularity, group_size, symmetric)

    def __str__(self) -> str:
        granularity = f"g{self.group_size}" if self.granularity == "group" else self.granularity
        return f"int{self.bits}-{granularity}-{'sym' if self.symmetric else 'asym'}"

    def groups(self, in_features: int) -> int:
        """How many scales one row of `in_features` weights has."""
        return in_features // self.group_size if self.group_size else 1

    def shape_error(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of shape [out, in] cannot be stored so, or None."""
        if len(shape) != 2:
            return f"{len(shape)}-D tensors are not supported"
        if self.group_size and shape[1] % self.group_size:
            return f"{shape[1]} inputs are not a multiple of {self.group_size}"
        return None

    def size_bits(self, shape: tuple[int, ...], scale_bits: int = 16) -> int:
        """Bits of a weight of shape [out, in]: codes, scales and zero points, without padding."""
        scales = {"tensor": 1, "channel": shape[0], "group": shape[0] * self.groups(shape[1])}[self.granularity]
        zero_bits = 0 if self.symmetric else self.bits
        return prod(shape) * self.bits + scales * (scale_bits + zero_bits)

    def bits_per_weight(self, shape: tuple[int, ...], scale_bits: int = 16) -> float:
        """`size_bits` per weight."""
        return self.size_bits(shape, scale_bits) / prod(shape)


def packed_words(count: int, bits: int) -> int:
    """32-bit words that hold a dense stream of `count` codes of `bits` bits."""
    return ceil(count * bits / 32)
