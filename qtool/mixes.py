"""llama.cpp's file types, called mixes here: what every matrix of a model becomes, as data. Never imports torch.

A mix is named after the type that most matrices get; those whose errors cost most get more bits. The rules are those of
`llama_tensor_get_type_impl` (src/llama-quant.cpp, ggml 0.25) for models without experts, read in the order that
they have there. Two things are otherwise. A type of 256 columns that does not fit becomes one of 32 without more bits
where there is one (llama.cpp takes more: Q5_0 for Q4_K, Q8_0 for Q6_K), and a note says so. And MXFP4 is that in every
block, while llama.cpp has it for experts alone and makes everything else Q8_0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qtool.errors import unknown
from qtool.scheme import BLOCK_TYPES, FLOATS, MXFP4_BLOCK

Where = Literal["everywhere", "spread", "first 2", "first 4", "first 8th", "first 16th"]
VALUES, DOWN, OUT = ("attn_v", "attn_qkv"), ("ffn_down",), ("attn_output",)
MXFP4 = "mxfp4a16"  # the scheme of GGUF's MXFP4
# What a type of 256 columns becomes where only 32 fit: the most bits up to its own, 4.5 at least. Of the types with 4.5
# IQ4_NL loses least: relative errors of libggml on normal weights are 0.076, for Q4_0 0.086.
UNALIGNED = {
    "q2_k": "iq4_nl",
    "q3_k": "iq4_nl",
    "iq4_xs": "iq4_nl",
    "q4_k": "iq4_nl",
    "q5_k": "q5_0",
    "q6_k": "q5_1",
}


@dataclass(frozen=True)
class Rule:
    """What matrices of some roles become instead of the mix's base.

    `where`: in all blocks; in the first so many, or in that share of them; or "spread": in the first and the last
    eighth, and in every third block between.
    """

    kind: str
    roles: tuple[str, ...]
    where: Where = "everywhere"
    least_gqa: int = 1  # query heads that share one key/value head
    weighted: bool | None = None  # only when it is known how much each column matters, or only when not


@dataclass(frozen=True)
class Mix:
    """A file type of llama.cpp, by its name and its number in general.file_type.

    Kinds are names of schemes. The first rule that fits a matrix counts. `output` is also for the embedding where that
    is the output, too (tied).
    """

    name: str
    file_type: int
    base: str
    output: str
    rules: tuple[Rule, ...] = ()


MIXES = {
    mix.name.lower(): mix
    for mix in (
        Mix("F32", 0, "f32", "f32"),
        Mix("F16", 1, "f16", "f16"),
        Mix("BF16", 32, "bf16", "bf16"),
        Mix("Q8_0", 7, "q8_0", "q8_0"),
        Mix("Q4_0", 2, "q4_0", "q6_k", (Rule("q4_1", DOWN, "first 8th", weighted=True),)),
        Mix("Q4_1", 3, "q4_1", "q6_k"),
        Mix("Q5_0", 8, "q5_0", "q6_k", (Rule("q5_1", DOWN, "first 8th", weighted=True),)),
        Mix("Q5_1", 9, "q5_1", "q6_k"),
        Mix("Q2_K", 10, "q2_k", "q6_k", (Rule("q4_k", VALUES, least_gqa=4), Rule("q3_k", VALUES + DOWN + OUT))),
        Mix("Q3_K_S", 11, "q3_k", "q6_k"),
        Mix(
            "Q3_K_M",
            12,
            "q3_k",
            "q6_k",
            (
                Rule("q5_k", VALUES, "first 2"),
                Rule("q5_k", DOWN, "first 16th"),
                Rule("q4_k", VALUES + DOWN + OUT),
            ),
        ),
        Mix("Q3_K_L", 13, "q3_k", "q6_k", (Rule("q5_k", VALUES + DOWN + OUT),)),
        Mix("Q4_K_S", 14, "q4_k", "q6_k", (Rule("q5_k", VALUES, "first 4"), Rule("q5_k", DOWN, "first 8th"))),
        Mix("Q4_K_M", 15, "q4_k", "q6_k", (Rule("q6_k", VALUES + DOWN, "spread"),)),
        Mix("Q5_K_S", 16, "q5_k", "q6_k"),
        Mix("Q5_K_M", 17, "q5_k", "q6_k", (Rule("q6_k", VALUES + DOWN, "spread"),)),
        Mix("Q6_K", 18, "q6_k", "q6_k"),
        *(
            Mix(
                name,
                file_type,
                name.lower(),
                "q6_k",
                (Rule("q5_k", VALUES, least_gqa=4), Rule("q5_k", DOWN, "first 8th", weighted=False)),
            )
            for name, file_type in (("IQ4_NL", 25), ("IQ4_XS", 30))
        ),
        Mix("MXFP4", 38, MXFP4, "q8_0", (Rule("q8_0", ("token_embd",)),)),  # 38 is MXFP4_MOE
    )
}
ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}  # those of llama-quantize


def get_mix(name: str) -> Mix:
    """The mix of that name, in any case, or of that alias. Raises UsageError with the nearest known one."""
    lower = name.strip().lower()
    found = MIXES.get(ALIASES.get(lower, lower))
    if found is None:
        raise unknown("mix", name, [mix.name for mix in MIXES.values()])
    return found


def scheme_of(
    mix: Mix, role: str, index: int, blocks: int, shape: tuple[int, int], gqa: int, weighted: bool = False
) -> tuple[str, str | None]:
    """The scheme of a matrix [out, in], by name, and a note where it is not what llama.cpp would have taken.

    `role` is llama.cpp's name of the tensor without block and `.weight` ("attn_v", "ffn_down", "token_embd",
    "output"); a tied embedding has the role "output". `index` of `blocks` is its block, `gqa` the number of query heads
    that share a key/value head, and `weighted` says whether the importance of its columns is known.
    """
    kind = mix.output if role == "output" else mix.base
    for rule in mix.rules:
        known = rule.weighted is None or rule.weighted == weighted
        if role in rule.roles and known and gqa >= rule.least_gqa and _covers(rule.where, index, blocks):
            kind = rule.kind
            break
    # 80 blocks and grouped heads are what llama.cpp calls a 70B (llama, qwen2): its value matrices are small
    if role in VALUES and blocks == 80 and gqa > 1 and kind in ("q3_k", "q4_k"):
        kind = "q5_k"
    return _fitting(kind, shape[1])


def _covers(where: Where, index: int, blocks: int) -> bool:
    """Whether a rule holds in a block."""
    eighth = blocks // 8
    if where == "spread":
        return index < eighth or index >= 7 * blocks // 8 or (index - eighth) % 3 == 2
    firsts = {"everywhere": blocks, "first 2": 2, "first 4": 4, "first 8th": eighth, "first 16th": blocks // 16}
    return index < firsts[where]


def _fitting(kind: str, columns: int) -> tuple[str, str | None]:
    """A scheme that rows of so many columns can have, and a note where it is another one."""
    block = MXFP4_BLOCK if kind == MXFP4 else (BLOCK_TYPES | FLOATS)[kind]
    if columns % block.weights == 0:
        return kind, None
    other, multiple = ("f16", 32) if columns % 32 else (UNALIGNED[kind], block.weights)
    return other, f"{other} instead of {kind}: {columns} inputs are not a multiple of {multiple}"
