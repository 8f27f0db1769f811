r"""What `tokenizer.ggml.pre` names: how llama.cpp cuts a text before byte-level BPE (src/llama-vocab.cpp).

A name stands for regexes, applied one after another to the pieces that the one before left, and for whether a piece
that is a token as a whole skips the merges. A tokenizer.json spells the same out, so the name follows from what is
written there, and from nothing else. Several names stand for the same: the first of them is written.

The regexes are spelled as Hugging Face spells them. llama.cpp has two of them as approximations, with no case of
letters beyond a-z and no combining marks: `tekken` and `gpt-4o` cut words such as "dÉs" differently there. Some cut as
no tokenizer.json does, and are only read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qtool.errors import QtoolError, UsageError, shown

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPELLED_OUT = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
CAPITALS, SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SLASH_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CASED = r"[^\r\n\p{{L}}\p{{N}}]?{0}*{1}+{2}|[^\r\n\p{{L}}\p{{N}}]?{0}+{1}*{2}|"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
DIGITS_3 = r"\p{N}{1,3}"
LLAMA3 = rf"{CONTRACTIONS}|{WORD}|\p{{N}}{{1,3}}|{REST}"
QWEN2 = rf"{CONTRACTIONS}|{WORD}|\p{{N}}|{REST}"
QWEN35 = (
    rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}|"
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = CASED.format(CAPITALS, SMALL, CONTRACTIONS + "?") + rf"\p{{N}}{{1,3}}|{SLASH_REST}"
TEKKEN = CASED.format(CAPITALS, SMALL, "") + rf"\p{{N}}|{SLASH_REST}"
SEED = rf"{CONTRACTIONS}|{WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
HAN_KANA = "[一-龥\u3040-ゟ゠-ヿ]+"
DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
    r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥\u0800-一가-\ud7ff]+", DIGIT)
FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")
DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")


@dataclass(frozen=True)
class Cut:
    """The regexes of a name, whether a whole piece that is a token skips the merges, and the default of add_bos."""

    regexes: tuple[str, ...]
    ignore_merges: bool = False
    adds_bos: bool = False
    written: bool = True


LLAMA_BPE = Cut((LLAMA3,), ignore_merges=True, adds_bos=True)
PRETOKENIZERS = {
    **dict.fromkeys(
        ["gpt-2", "olmo", "mpt", "phi-2", "jais", "trillion", "exaone4", "gigachat", "mellum", "a.x-4.0"], Cut((GPT2,))
    ),
    **dict.fromkeys(
        ["starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"], Cut((DIGIT, GPT2))
    ),
    **dict.fromkeys(["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0"], LLAMA_BPE),
    **dict.fromkeys(["dbrx", "smaug-bpe", "chatglm-bpe", "glm4"], Cut((LLAMA3,))),
    **dict.fromkeys(["qwen2", "stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan", "grok-2"], Cut((QWEN2,))),
    "qwen35": Cut((QWEN35,)),
    **dict.fromkeys(["gpt-4o", "llama4", "kanana2", "minimax-m2"], Cut((GPT4O,))),
    "tekken": Cut((TEKKEN,), ignore_merges=True, adds_bos=True),
    **dict.fromkeys(["deepseek-v3", "hunyuan-dense"], Cut((DIGITS_3, HAN_KANA, DEEPSEEK3))),
    "deepseek-coder": Cut(DEEPSEEK_CODER),
    "seed-coder": Cut((SEED,)),
    **dict.fromkeys(["bloom", "poro-chat", "gpt3-finnish"], Cut((BLOOM,))),
    "falcon": Cut(FALCON, written=False),
    "default": Cut(DEFAULT, written=False),
}


def pre_of(pre_tokenizer: dict[str, Any] | None, ignore_merges: bool, matters: bool = True) -> str:
    """The name of a tokenizer.json's byte-level `pre_tokenizer`.

    `matters` is whether `ignore_merges` changes any token. Raises UsageError where llama.cpp has no name for it.
    """
    steps = flat(pre_tokenizer, "pretokenizers")
    regexes = tuple(_canonical(regex) for step in steps for regex in _regexes(step, step is steps[-1]))
    if not any(step["type"] == "ByteLevel" for step in steps[-1:]):
        raise _not_known(f"the pre-tokenizer {_types(steps)}, which does not end in ByteLevel")
    same = {name: cut for name, cut in PRETOKENIZERS.items() if cut.regexes == regexes and cut.written}
    fits = [name for name, cut in same.items() if cut.ignore_merges == ignore_merges]
    if fits or (same and not matters):
        return next(iter(fits or same))
    if same:
        raise _not_known(f"`ignore_merges` {str(ignore_merges).lower()} with the pre-tokenizer of `{next(iter(same))}`")
    raise _not_known(f"the pre-tokenizer {_types(steps)} with the regexes {list(regexes)}")


def pre_tokenizer_of(pre: str) -> PreTokenizer:
    """What `pre` names, for the `tokenizers` package. Raises QtoolError for a name that is not in the table."""
    from tokenizers import Regex, pre_tokenizers

    cut = cut_of(pre)
    splits = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in cut.regexes]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def cut_of(pre: str) -> Cut:
    """The table's entry. Raises QtoolError for a name that is not there."""
    if pre not in PRETOKENIZERS:
        raise QtoolError(
            f"`tokenizer.ggml.pre` is `{shown(pre)}`, a pre-tokenizer that is not known here",
            f"known: {', '.join(PRETOKENIZERS)}",
        )
    return PRETOKENIZERS[pre]


def flat(step: dict[str, Any] | None, parts: str) -> list[dict[str, Any]]:
    """A step of a tokenizer.json, which may be nothing, one thing or a `Sequence` with the list `parts`, as a list."""
    if step is None:
        return []
    return [inner for part in step[parts] for inner in flat(part, parts)] if step["type"] == "Sequence" else [step]


def _regexes(step: dict[str, Any], last: bool) -> list[str]:
    """What a step splits by. Raises UsageError for one that does anything else."""
    kind = step["type"]
    if kind == "ByteLevel" and last and not step["add_prefix_space"]:
        return [GPT2] if step["use_regex"] else []
    if kind == "Digits":
        return [DIGIT] if step["individual_digits"] else [r"\p{N}+"]
    if kind == "Split" and "Regex" in step["pattern"]:
        regex = str(step["pattern"]["Regex"])
        # to remove what lies between the matches is the same where the matches are all there is
        removes_nothing = step["behavior"] == "Removed" and step["invert"] and regex.endswith(r"|\s+")
        if (step["behavior"] == "Isolated" and not step["invert"]) or removes_nothing:
            return [regex]
    detail = {key: value for key, value in step.items() if key not in ("type", "trim_offsets")}
    raise _not_known(f"the pre-tokenizer {kind} with {detail}")


def _canonical(regex: str) -> str:
    return regex.replace("\r", r"\r").replace("\n", r"\n").replace(SPELLED_OUT, CONTRACTIONS)


def _types(steps: list[dict[str, Any]]) -> str:
    return " + ".join(step["type"] for step in steps) or "none"


def _not_known(what: str) -> UsageError:
    return UsageError(f"the tokenizer has {what}: llama.cpp has no name for it, so a GGUF cannot say it")
