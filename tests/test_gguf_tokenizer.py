"""Tokenizers to and from GGUF keys: the same ids from transformers, from llama.cpp and from what is read back."""

from __future__ import annotations

import functools
import itertools
import json
import random
import time
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors, trainers
from tokenizers import pre_tokenizers as pre
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qtool.errors import QtoolError, UsageError
from qtool.gguf import merges as joining
from qtool.gguf.file import Metadata
from qtool.gguf.merges import LONGEST_TOKEN, joined_otherwise, merges_of_scores, scores_of
from qtool.gguf.pretokenizers import DIGIT, GPT2, LLAMA3, PRETOKENIZERS, QWEN2, SPELLED_OUT, pre_of
from qtool.gguf.tokenizer import (
    BYTE,
    BYTE_TOKENS,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    same_vocabulary,
    tokenizer_metadata,
    tokenizer_of,
)

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-llama"
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    *(
        "",
        " ",
        "\n",
        "\n\n",
        "  ",
        "a",
        " a",
        "a ",
        " \n a",
        "Hello world",
        "  two  spaces ",
        "\t\ttabs\t and   \t mixed ",
    ),
    "I'll DON'T we've WE'VE he's HE'S I'm I'D 'tis rock'n'roll 's 'S 't  'll  'LL '’s 'ſ",
    "x\n\n\ny\n \n\tz\r\n\r\n  end\n",
    "1 12 123 1234 12345678901 3.14159 1,000,000 ²³½Ⅷ٣٤٥",
    "Ünïcödé naïve ÀÉÎ Straße ŒUVRE œuvre ΑΒΓ αβγ АБВ абв dÉs",
    "日本語のテキスト 中文字符 한국어 ไทย हिन्दी العربية עברית",
    "e\u0301 a\u0308\u0323 n\u0303o \u0301 lone",
    "😀👍🏽👨‍👩‍👧 ❤️ 🇩🇪 ♥ ☃",
    'def f(x: int) -> str:\n    return f"{x!r}" # ok\n\n\nclass A_b(C):\n\tpass\n',
    "<s>a</s> <|im_start|>user\nhi<|im_end|>\n",
    "<|im_start|><|im_end|>x <b>bold</b>",
    "a\u00a0b\u2003c\u3000d\u200be\u2028f\u0085g\ufeff",
    "!!!???...---___===+++ $€£ <=> ^~`|\\ @#%&*()[]{} http://ex.com/a?b=c&d=1#e foo@bar.com",
    "camelCaseWordsHTTPServer XMLHttpRequest iPhone",
    "\x01\x7f ctrl word ▁ under ▁▁ bars aaaa aaaaaaa      aaaaaaaaaaa",
]
CORPUS = [*TEXTS * 3, *["function return value error token the quick brown fox jumps over the lazy dog"] * 20]
CHARS = [
    *map(chr, range(9, 14)),
    *map(chr, range(28, 128)),
    *"éÉßÀüΑαЖж日本한ไहि٣²½Ⅷ…’“€😀👍🏽ǅªº\u0301\u00a0\u2003\u3000\ufeff",
]
FUZZ = ["".join(random.Random(i).choices([*CHARS, *"      ''ssttLLVVee\n\n\r"], k=i % 30 + 1)) for i in range(300)]


def byte_level(cut: Any, normalizer: Any = None, ignore_merges: bool = False, bos: bool = True) -> Tokenizer:
    """A trained byte-level BPE with the pre-tokenizer `cut`, four special tokens and one of the user's."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = cut
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=800, special_tokens=SPECIAL, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False
        ),
    )
    return finished(tokenizer, bos)


def sentencepiece(normalizer: Any = None, cut: Any = None, all_ways: bool = False, bos: bool = True) -> Tokenizer:
    """A trained BPE with ▁ for spaces and tokens for bytes.

    With `all_ways` its merges are all ways to make each token, as the converters of SentencePiece models write them.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if normalizer:
        tokenizer.normalizer = normalizer
    if cut:
        tokenizer.pre_tokenizer = cut
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=700, special_tokens=[*SPECIAL, *BYTE_TOKENS], limit_alphabet=120, show_progress=False
        ),
    )
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [added for added in spec["added_tokens"] if added["content"] in SPECIAL]
    if all_ways:
        own = [token for token in spec["model"]["vocab"] if token not in SPECIAL + BYTE_TOKENS]
        spec["model"]["merges"] = merges_of_scores({token: -float(spec["model"]["vocab"][token]) for token in own})
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    strip = [decoders.Strip(" ", 1, 0)] if normalizer is PREPEND else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return finished(tokenizer, bos)


def finished(tokenizer: Tokenizer, bos: bool) -> Tokenizer:
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
    tokenizer.add_tokens([AddedToken("<b>", special=False, normalized=False)])
    return tokenizer


def split(regex: str) -> Any:
    return pre.Sequence([pre.Split(Regex(regex), "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)])


def removing(regex: str) -> Any:
    """As some conversions of tiktoken's files have it."""
    return pre.Sequence(
        [pre.Split(Regex(regex), "removed", invert=True), pre.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def gpt2() -> Any:
    return pre.ByteLevel(add_prefix_space=False, use_regex=True)


PREPEND = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
REPLACE = normalizers.Replace(" ", "▁")
GEMMA_CUT = pre.Split(" ", "merged_with_previous")
KINDS: dict[str, tuple[str | None, Callable[[], Tokenizer]]] = {
    "gpt-2": ("gpt-2", lambda: byte_level(gpt2())),
    "gpt-2 without bos": ("gpt-2", lambda: byte_level(gpt2(), bos=False)),
    "starcoder": ("starcoder", lambda: byte_level(pre.Sequence([pre.Digits(True), gpt2()]))),
    "llama-3": ("llama-bpe", lambda: byte_level(split(LLAMA3), ignore_merges=True)),
    "llama-3 merging": ("dbrx", lambda: byte_level(split(LLAMA3.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", SPELLED_OUT)))),
    "qwen2": ("qwen2", lambda: byte_level(split(QWEN2), bos=False)),
    "qwen2 removing": ("qwen2", lambda: byte_level(removing(QWEN2), ignore_merges=True)),
    "llama-2": (None, lambda: sentencepiece(PREPEND)),
    "llama-2 converted": (None, lambda: sentencepiece(PREPEND, all_ways=True)),
    "gemma": (None, lambda: sentencepiece(REPLACE, GEMMA_CUT, all_ways=True)),
    "gemma without bos": (None, lambda: sentencepiece(REPLACE, GEMMA_CUT, bos=False)),
    "metaspace never": (None, lambda: sentencepiece(cut=pre.Metaspace("▁", "never", split=False))),
}


@functools.cache
def trained(kind: str) -> Tokenizer:
    return KINDS[kind][1]()


def saved(tokenizer: Tokenizer, folder: Path, **options: Any) -> Any:
    """What transformers loads from the folder it was saved to."""
    named = {"bos_token": "<s>", "eos_token": "</s>", "clean_up_tokenization_spaces": False} | options
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def in_llama(metadata: Metadata, folder: Path) -> Any:
    """llama.cpp with a file of these keys and no tensors."""
    llama_cpp = pytest.importorskip("llama_cpp")
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(folder / "vocabulary.gguf"), "llama")
    for add in ("block_count", "embedding_length", "feed_forward_length", "head_count"):
        getattr(writer, f"add_{add}")(8)
    writer.add_context_length(1 << 16)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in metadata.items():
        kind = type(value)
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}[kind]
        add(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return llama_cpp.Llama(str(folder / "vocabulary.gguf"), vocab_only=True, verbose=False)


def ids_of(llama: Any, text: str) -> list[int]:
    found: list[int] = llama.tokenize(text.encode(), add_bos=True, special=True)
    return found


def different(first: Callable[[str], list[int]], second: Callable[[str], list[int]], texts: Iterable[str]) -> list[str]:
    return [text for text in texts if first(text) != second(text)]


def ids(tokenizer: Any) -> Callable[[str], list[int]]:
    return lambda text: list(tokenizer(text)["input_ids"])


# The same ids everywhere


@pytest.mark.parametrize("kind", KINDS)
def test_read_back_gives_the_same_ids(kind: str, tmp_path: Path) -> None:
    source = saved(trained(kind), tmp_path)
    metadata = tokenizer_metadata(tmp_path, len(source) + 3)
    assert metadata.get("tokenizer.ggml.pre") == KINDS[kind][0]
    assert metadata["tokenizer.ggml.add_bos_token"] == ("without bos" not in kind and kind != "qwen2")
    back = tokenizer_of(metadata)
    assert different(ids(source), ids(back), TEXTS + FUZZ) == []
    assert same_vocabulary(source, back, len(source))
    for text in TEXTS:
        found = ids(source)(text)
        assert back.decode(found) == source.decode(found)


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_gives_the_same_ids(kind: str, tmp_path: Path) -> None:
    source = saved(trained(kind), tmp_path)
    metadata = tokenizer_metadata(tmp_path, len(source) + 3)
    llama = in_llama(metadata, tmp_path)
    assert llama.n_vocab() == len(source) + 3
    assert different(ids(source), functools.partial(ids_of, llama), TEXTS + FUZZ) == []


def test_the_tokenizers_of_the_tests_and_of_the_example(tiny_tokenizer: Any, tmp_path: Path) -> None:
    tiny_tokenizer.save_pretrained(tmp_path)
    for root in (tmp_path, EXAMPLE):
        source = AutoTokenizer.from_pretrained(root)
        metadata = tokenizer_metadata(root, 2048)
        assert metadata["tokenizer.ggml.pre"] == "gpt-2"
        assert metadata["tokenizer.ggml.add_bos_token"]
        assert different(ids(source), ids(tokenizer_of(metadata)), TEXTS + FUZZ) == []
        assert different(ids(source), functools.partial(ids_of, in_llama(metadata, tmp_path)), TEXTS + FUZZ) == []


@pytest.mark.parametrize("name", ["qwen35", "deepseek-v3", "deepseek-coder", "seed-coder", "bloom", "gpt-4o", "tekken"])
def test_other_regexes(name: str, tmp_path: Path) -> None:
    """`gpt-4o` and `tekken` are approximations in llama.cpp: equal as long as words have no marks and no É."""
    cut = PRETOKENIZERS[name]
    steps = [pre.Digits(True) if regex == DIGIT else pre.Split(Regex(regex), "isolated") for regex in cut.regexes]
    whole = pre.Sequence([*steps, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    source = saved(byte_level(whole, ignore_merges=cut.ignore_merges), tmp_path)
    metadata = tokenizer_metadata(tmp_path, len(source))
    assert metadata["tokenizer.ggml.pre"] == name
    approximate = name in ("gpt-4o", "tekken")
    texts = [text for text in TEXTS + FUZZ if text.isascii() or not approximate]
    assert different(ids(source), ids(tokenizer_of(metadata)), TEXTS + FUZZ) == []
    llama = functools.partial(ids_of, in_llama(metadata, tmp_path))
    assert different(ids(source), llama, texts) == []
    assert bool(different(ids(source), llama, TEXTS)) == approximate, "llama.cpp has changed its regex"


def test_llama_cpp_knows_every_name(tmp_path: Path) -> None:
    saved(trained("gpt-2"), tmp_path)
    metadata = tokenizer_metadata(tmp_path, 1000)
    back = tokenizer_of(metadata)
    for name in PRETOKENIZERS:
        other = metadata | {"tokenizer.ggml.pre": name}
        llama = in_llama(other, tmp_path)
        texts = [text for text in TEXTS if text.isascii()]
        assert different(ids(tokenizer_of(other)), functools.partial(ids_of, llama), texts) == [], name
    assert different(ids(back), ids(tokenizer_of(metadata | {"tokenizer.ggml.pre": "qwen2"})), TEXTS)


def naive_ids(text: str, metadata: Metadata) -> list[int]:
    """llama.cpp's algorithm for texts without special tokens, one join at a time."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    where = {token: i for i, token in enumerate(tokens)}
    prefix = "▁" if metadata["tokenizer.ggml.add_space_prefix"] and text else ""
    parts = list(prefix + text.replace(" ", "▁"))
    while True:
        joins = [(-scores[where[a + b]], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in where]
        if not joins:
            break
        _, i = min(joins)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    bos = [metadata["tokenizer.ggml.bos_token_id"]] if metadata["tokenizer.ggml.add_bos_token"] else []
    spelled = [[part] if part in where else [f"<0x{byte:02X}>" for byte in part.encode()] for part in parts]
    return bos + [where[token] for part in spelled for token in part]


@pytest.mark.parametrize("kind", ["llama-2", "llama-2 converted", "gemma"])
def test_scores_join_as_merges_do(kind: str, tmp_path: Path) -> None:
    source = saved(trained(kind), tmp_path)
    metadata = tokenizer_metadata(tmp_path, len(source))
    texts = [text for text in TEXTS + FUZZ[:150] if not any(token in text for token in [*SPECIAL, "<b>"])]
    assert different(ids(source), lambda text: naive_ids(text, metadata), texts) == []


# What differs, and how


def test_text_that_is_not_nfc_stays_so_in_llama_cpp(tmp_path: Path) -> None:
    source = saved(byte_level(split(QWEN2), normalizers.NFC()), tmp_path)
    metadata = tokenizer_metadata(tmp_path, len(source))
    llama = functools.partial(ids_of, in_llama(metadata, tmp_path))
    assert different(ids(source), lambda text: llama(unicodedata.normalize("NFC", text)), TEXTS + FUZZ) == []
    assert different(ids(source), llama, ["e\u0301"]) == ["e\u0301"]
    assert different(ids(tokenizer_of(metadata)), llama, TEXTS) == []


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_metaspace_puts_no_space_before_a_space(scheme: str, tmp_path: Path) -> None:
    source = saved(sentencepiece(cut=pre.Metaspace("▁", scheme, split=False)), tmp_path)
    metadata = tokenizer_metadata(tmp_path, len(source))
    llama = functools.partial(ids_of, in_llama(metadata, tmp_path))
    plain = [text for text in TEXTS + FUZZ if not any(token in text for token in [*SPECIAL, "<b>"])]
    spaced = [text for text in plain if text.startswith((" ", "▁"))]
    assert different(ids(source), llama, [text for text in plain if text not in spaced]) == []
    assert len(spaced) > 5
    assert different(ids(source), llama, spaced) == spaced
    assert different(ids(tokenizer_of(metadata)), llama, TEXTS) == []
    assert bool(different(ids(source), llama, ["<s>a"])) == (scheme == "first")


# What the keys say


def test_types_fillers_and_special_ids(tmp_path: Path) -> None:
    source = saved(trained("llama-2"), tmp_path, unk_token="<unk>", chat_template="{{ messages }}")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 4]}))
    metadata = tokenizer_metadata(tmp_path, len(source) + 2)
    tokens = metadata["tokenizer.ggml.tokens"]
    types = dict(zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True))
    assert tokens[-2:] == [f"[PAD{len(source)}]", f"[PAD{len(source) + 1}]"]
    assert types[tokens[-1]] == types[tokens[-2]] == UNUSED
    assert [types[token] for token in ["<unk>", "<s>", "<0x0A>", "<b>", "▁t"]] == [
        UNKNOWN,
        CONTROL,
        BYTE,
        USER_DEFINED,
        NORMAL,
    ]
    keys = ["bos_token_id", "eos_token_id", "eot_token_id", "unknown_token_id", "add_bos_token", "add_eos_token"]
    assert [metadata[f"tokenizer.ggml.{key}"] for key in keys] == [1, 2, 4, 0, True, False]
    assert metadata["tokenizer.chat_template"] == tokenizer_of(metadata).chat_template == "{{ messages }}"
    back = tokenizer_of(metadata)
    assert (back.bos_token, back.eos_token, back.unk_token, back.pad_token) == ("<s>", "</s>", "<unk>", None)
    llama = in_llama(metadata, tmp_path)
    assert (llama.token_bos(), llama.token_eos(), llama.metadata["tokenizer.ggml.eot_token_id"]) == (1, 2, "4")


def test_several_chat_templates(tmp_path: Path) -> None:
    saved(trained("gpt-2"), tmp_path, chat_template={"default": "a", "tool_use": "b"})
    metadata = tokenizer_metadata(tmp_path, 1000)
    assert metadata["tokenizer.chat_template"] == "a"
    assert metadata["tokenizer.chat_template.tool_use"] == "b"
    assert metadata["tokenizer.chat_templates"] == ["tool_use"]


def test_an_end_token_after_every_text(tmp_path: Path) -> None:
    tokenizer = byte_level(gpt2())
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A </s>", special_tokens=[("<|im_start|>", 3), ("</s>", 2)]
    )
    source = saved(tokenizer, tmp_path)
    metadata = tokenizer_metadata(tmp_path, len(source))
    assert metadata["tokenizer.ggml.bos_token_id"] == 3, "what the tokenizer puts there is the first token"
    assert metadata["tokenizer.ggml.add_eos_token"]
    assert different(ids(source), ids(tokenizer_of(metadata)), TEXTS) == []
    assert different(ids(source), functools.partial(ids_of, in_llama(metadata, tmp_path)), TEXTS) == []


def test_added_tokens_past_the_last_row_are_left_out(tmp_path: Path) -> None:
    source = saved(trained("gpt-2"), tmp_path)
    metadata = tokenizer_metadata(tmp_path, len(source) - 1)
    assert len(metadata["tokenizer.ggml.tokens"]) == len(source) - 1
    assert "<b>" not in metadata["tokenizer.ggml.tokens"]
    with pytest.raises(UsageError, match="rows"):
        tokenizer_metadata(tmp_path, len(source) - 2)


def test_added_spaces(tmp_path: Path) -> None:
    """As Gemma has them (made by merges as well) and as GPT-NeoX has them (only found in the text)."""
    gemma = sentencepiece(REPLACE, GEMMA_CUT, all_ways=True)
    gemma.add_tokens(
        [AddedToken("▁▁", special=False, normalized=False), AddedToken("\n\n", special=False, normalized=False)]
    )
    gemma.add_tokens([AddedToken("▁" * 7, special=False, normalized=True)])
    neox = byte_level(gpt2())
    neox.add_tokens([AddedToken(" " * i, special=False, normalized=True) for i in (2, 3, 4, 8)])
    for name, tokenizer in {"gemma": gemma, "neox": neox}.items():
        folder = tmp_path / name
        source = saved(tokenizer, folder)
        metadata = tokenizer_metadata(folder, len(source))
        assert (" " * 7 in metadata["tokenizer.ggml.tokens"]) == (name == "gemma")
        texts = [text for text in TEXTS + FUZZ if "▁" not in text]  # that character itself only finds Gemma's in HF
        texts += [f"a{' ' * i}b\n\n\n\nc" for i in range(20)]
        assert different(ids(source), ids(tokenizer_of(metadata)), texts) == []
        assert different(ids(source), functools.partial(ids_of, in_llama(metadata, folder)), texts) == []


# What llama.cpp cannot do


def changed(kind: str, change: Callable[[dict[str, Any]], None]) -> Tokenizer:
    spec = json.loads(trained(kind).to_str())
    change(spec)
    return Tokenizer.from_str(json.dumps(spec))


def set_model(**options: Any) -> Callable[[dict[str, Any]], None]:
    return lambda spec: spec["model"].update(options)


def without(*tokens: str) -> Callable[[dict[str, Any]], None]:
    """Takes single tokens, and every merge with them, out of the vocabulary."""

    def change(spec: dict[str, Any]) -> None:
        model = spec["model"]
        for token in tokens:
            model["vocab"].pop(token)
        model["merges"] = [merge for merge in model["merges"] if all(part in model["vocab"] for part in merge)]
        model["merges"] = [merge for merge in model["merges"] if "".join(merge) in model["vocab"]]

    return change


def step(part: str, value: dict[str, Any] | None) -> Callable[[dict[str, Any]], None]:
    return lambda spec: spec.update({part: value})


def reversed_merges(spec: dict[str, Any]) -> None:
    spec["model"]["merges"].reverse()


UNSUPPORTED: dict[str, tuple[str, Callable[[dict[str, Any]], None], str]] = {
    "normalizer": ("gpt-2", step("normalizer", {"type": "NFKC"}), "NFKC"),
    "spm normalizer": ("llama-2", step("normalizer", {"type": "Lowercase"}), "Lowercase"),
    "prefix": (
        "gpt-2",
        step("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}),
        "add_prefix_space",
    ),
    "no regex": (
        "gpt-2",
        step(
            "pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        ),
        "no name",
    ),
    "whitespace": ("gpt-2", step("pre_tokenizer", {"type": "Whitespace"}), "Whitespace"),
    "no pre-tokenizer": ("gpt-2", step("pre_tokenizer", None), "neither byte-level"),
    "dropout": ("gpt-2", set_model(dropout=0.1), "dropout"),
    "affix": ("gpt-2", set_model(end_of_word_suffix="</w>"), "end_of_word_suffix"),
    "bytes": ("gpt-2", without("Ã"), "bytes"),
    "spm bytes": ("llama-2", without("<0x41>"), "<0x41>"),
    "spm no bytes": ("llama-2", set_model(byte_fallback=False), "byte"),
    "spm whole": ("llama-2", set_model(ignore_merges=True), "ignore_merges"),
    "spm order": ("llama-2", reversed_merges, "no merge for some ways"),
    "no spaces": ("llama-2", step("normalizer", None), "neither byte-level"),
    "spm words": (
        "metaspace never",
        step("pre_tokenizer", {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": True}),
        "at every space",
    ),
}


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_what_llama_cpp_cannot_do_is_an_error(what: str, tmp_path: Path) -> None:
    kind, change, words = UNSUPPORTED[what]
    saved(changed(kind, change), tmp_path)
    with pytest.raises(UsageError, match=words):
        tokenizer_metadata(tmp_path, 1000)


def test_an_unknown_regex_is_an_error(tmp_path: Path) -> None:
    saved(byte_level(split(QWEN2.replace(r"\p{N}", r"\p{N}{1,2}"))), tmp_path)
    with pytest.raises(UsageError, match=r"no name for it"):
        tokenizer_metadata(tmp_path, 1000)


def with_a_whole_word(kind: str) -> Tokenizer:
    """With a token that no merges make."""
    return changed(kind, lambda spec: spec["model"]["vocab"].update(zzzunreachable=900))


def test_skipping_merges(tmp_path: Path) -> None:
    source = saved(with_a_whole_word("llama-3"), tmp_path)
    metadata = tokenizer_metadata(tmp_path, 1000)
    texts = ["zzzunreachable", "a zzzunreachable", "\nzzzunreachable zzz"]
    assert source("zzzunreachable")["input_ids"] == [1, 900]
    assert different(ids(source), ids(tokenizer_of(metadata)), texts) == []
    assert different(ids(source), functools.partial(ids_of, in_llama(metadata, tmp_path)), texts) == []


def test_skipping_merges_where_llama_cpp_does_not(tmp_path: Path) -> None:
    """Only an error where a token can be had in no other way."""
    saved(with_a_whole_word("qwen2 removing"), tmp_path)
    with pytest.raises(UsageError, match="ignore_merges"):
        tokenizer_metadata(tmp_path, 1000)


@pytest.mark.parametrize("kind", [models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"), models.Unigram([("a", 0.0)])])
def test_other_models_are_an_error(kind: Any, tmp_path: Path) -> None:
    saved(Tokenizer(kind), tmp_path)
    with pytest.raises(UsageError, match="only BPE"):
        tokenizer_metadata(tmp_path, 1000)


def test_two_tokens_before_a_text_are_an_error(tmp_path: Path) -> None:
    tokenizer = byte_level(gpt2())
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> <|im_start|> $A", special_tokens=[("<s>", 1), ("<|im_start|>", 3)]
    )
    saved(tokenizer, tmp_path)
    with pytest.raises(UsageError, match="2 tokens before"):
        tokenizer_metadata(tmp_path, 1000)


def test_no_end_of_text(tmp_path: Path) -> None:
    PreTrainedTokenizerFast(tokenizer_object=trained("qwen2")).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="end-of-text"):
        tokenizer_metadata(tmp_path, 1000)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 4}')
    assert tokenizer_metadata(tmp_path, 1000)["tokenizer.ggml.eos_token_id"] == 4
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(QtoolError, match="generation_config"):
        tokenizer_metadata(tmp_path, 1000)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(QtoolError, match="no tokenizer"):
        tokenizer_metadata(tmp_path, 1000)
    saved(trained("gpt-2"), tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    spec["model"]["merges"].append(["no", "merge"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(QtoolError, match="no tokenizer"):
        tokenizer_metadata(tmp_path, 1000)


def test_pre_of_needs_no_folder() -> None:
    spec = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    assert pre_of(spec, ignore_merges=False) == "gpt-2"
    assert PRETOKENIZERS["gpt-2"].regexes == (GPT2,)
    with pytest.raises(UsageError, match="ignore_merges"):
        pre_of(spec, ignore_merges=True)


# Files of others, and damaged ones


def test_a_file_of_llama_cpp_s_own_converter(tmp_path: Path) -> None:
    """Scores as SentencePiece has them, spaces spelled out in the user's tokens, and no key that has a default."""
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *BYTE_TOKENS,
        "    ",
        "▁▁",
        "▁t",
        "er",
        "in",
        "▁a",
        "▁in",
        *"▁teraindx",
        "[PAD99]",
    ]
    control = len(BYTE_TOKENS) + 3
    metadata: Metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * control + [-1000.0] + [-float(i) for i in range(len(tokens) - control - 1)],
        "tokenizer.ggml.token_type": [UNKNOWN, CONTROL, CONTROL]
        + [BYTE] * 256
        + [USER_DEFINED]
        + [NORMAL] * (len(tokens) - control - 2)
        + [UNUSED],
    }
    back = tokenizer_of(metadata)
    assert (back.bos_token_id, back.eos_token_id, back.unk_token_id) == (1, 2, 0)
    texts = ["in a tin", "   in    diner  x", "é\n", "</s>a", "", "ter▁in"]
    assert back("in a")["input_ids"] == [1, tokens.index("▁in"), tokens.index("▁a")]
    assert different(ids(back), functools.partial(ids_of, in_llama(metadata, tmp_path)), texts) == []


def example(kind: str, folder: Path) -> Metadata:
    saved(trained(kind), folder)
    return tokenizer_metadata(folder, 1000)


@pytest.mark.parametrize("kind", ["gpt-2", "llama-2"])
def test_missing_and_damaged_keys_are_named(kind: str, tmp_path: Path) -> None:
    metadata = example(kind, tmp_path)
    needed = ["model", "tokens", *(["pre", "merges"] if kind == "gpt-2" else ["scores"])]
    for key in (f"tokenizer.ggml.{name}" for name in needed):
        with pytest.raises(QtoolError, match=key):
            tokenizer_of({name: value for name, value in metadata.items() if name != key})
        with pytest.raises(QtoolError, match=key):
            tokenizer_of(metadata | {key: 7})
    damaged: dict[str, Any] = {
        "tokens": [*metadata["tokenizer.ggml.tokens"][:-1], "<s>"],
        "token_type": [1],
        "bos_token_id": 1000,
        "eos_token_id": "2",
        "add_bos_token": 1,
    }
    damaged |= {"pre": "mine", "merges": ["a b c"]} if kind == "gpt-2" else {"scores": [float("nan")] * 1000}
    for name, value in damaged.items():
        with pytest.raises(QtoolError, match=f"tokenizer.ggml.{name}"):
            tokenizer_of(metadata | {f"tokenizer.ggml.{name}": value})
    with pytest.raises(QtoolError, match="`t5`"):
        tokenizer_of(metadata | {"tokenizer.ggml.model": "t5"})


def test_a_first_token_that_there_is_not(tmp_path: Path) -> None:
    metadata = example("gpt-2", tmp_path)
    del metadata["tokenizer.ggml.bos_token_id"]
    with pytest.raises(QtoolError, match="bos_token_id"):
        tokenizer_of(metadata)


def test_the_first_merge_to_a_token_counts() -> None:
    merges = [("a", "a"), ("aa", "a"), ("b", "b"), ("a", "aa")]
    assert scores_of(merges, ["aaa", "bb", "aa", "b"]) == [-1.0, -2.0, 0.0, -4.0]
    assert merges_of_scores({"aaa": 1.0, "aa": 0.0, "a": 2.0}) == [("aa", "a"), ("a", "aa"), ("a", "a")]


def test_a_token_too_long_to_take_apart() -> None:
    with pytest.raises(QtoolError, match=f"a token of {LONGEST_TOKEN + 1} characters"):
        merges_of_scores({"a" * (LONGEST_TOKEN + 1): 0.0})


@pytest.mark.parametrize("long", [True, False], ids=["too much to read", "too many ways"])
def test_tokens_too_many_to_take_apart(long: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = ["a" * length for length in range(1, LONGEST_TOKEN + 1)]
    monkeypatch.setattr(joining, "MOST_CHARACTERS" if long else "MOST_MERGES", 32000)
    with pytest.raises(QtoolError, match="32896 in all" if long else "the 256 tokens can be made .* in 32000 ways"):
        merges_of_scores(dict.fromkeys(tokens, 0.0))
    if long:
        with pytest.raises(QtoolError, match="32896 in all"):
            joined_otherwise({"vocab": dict.fromkeys(tokens, 0), "merges": []}, ())


def test_long_tokens_end_soon() -> None:
    chance = random.Random(0)
    scores = {"".join(chance.choices("ab", k=LONGEST_TOKEN)): 0.0 for _ in range(17000)}
    start = time.perf_counter()
    with pytest.raises(QtoolError, match="in all"):
        merges_of_scores(scores)
    assert time.perf_counter() - start < 1


@given(tokens=st.lists(st.text("abc", min_size=1, max_size=6), unique=True, max_size=30))
def test_every_way_to_make_a_token_counts(tokens: list[str]) -> None:
    scores = {token: -float(i) for i, token in enumerate(tokens)}
    pairs = [(left, right) for left in tokens for right in tokens if left + right in scores]
    order = sorted(pairs, key=lambda pair: (-scores["".join(pair)], -len(pair[0])))
    assert merges_of_scores(scores) == order


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_keys_give_a_tokenizer_or_an_error(data: st.DataObject, tmp_path: Path) -> None:
    texts = st.lists(st.text(max_size=4), max_size=12)
    numbers = st.lists(st.integers(-1, 7), max_size=12)
    scores = st.lists(st.floats(width=32), max_size=12)
    anything = st.one_of(texts, numbers, scores, st.integers(-1, 20), st.booleans(), st.text(max_size=5), st.none())
    likely = {
        "model": st.sampled_from(["gpt2", "llama"]),
        "pre": st.sampled_from(["gpt-2", "qwen2", "llama-bpe"]),
        "tokens": texts,
        "merges": st.lists(st.text("ab ", max_size=4), max_size=3),
        "scores": scores,
        "token_type": numbers,
        "bos_token_id": st.integers(0, 12),
        "add_bos_token": st.booleans(),
    }
    metadata = {f"tokenizer.ggml.{key}": data.draw(st.one_of(usual, usual, anything)) for key, usual in likely.items()}
    try:
        tokenizer = tokenizer_of(metadata)
    except QtoolError as error:
        said = error.message
    else:
        said = ""
        assert isinstance(tokenizer("a b")["input_ids"], list)
    assert not said or "tokenizer.ggml." in said
    assert "\n" not in said
