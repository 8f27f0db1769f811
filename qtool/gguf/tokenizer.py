"""Tokenizers to and from GGUF keys (tokenizer.ggml.*, as llama.cpp's src/llama-vocab.cpp reads them).

Two kinds. `gpt2` is byte-level BPE: tokens, merges in order, and in `pre` the name of the regexes that cut the text.
`llama` is SentencePiece's BPE: tokens with scores, in the order of which neighbours are joined.

What is written is what transformers makes of a folder, not what lies in one file of it. Where llama.cpp cannot cut a
text the same way, that is an error; these differences are in llama.cpp and remain:
- it has no normalizer: text that is not in Unicode's form NFC stays so, where a tokenizer such as Qwen2's changes it;
- it puts the `llama` kind's space before a text and after every special token, also where one stands already; a
  Metaspace pre-tokenizer puts none before a space, and with `first` none after a special token;
- it knows no `lstrip`, `rstrip`, `single_word` of added tokens (but `rstrip` for a model that is named phi-3).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.errors import QtoolError, UsageError, shown
from qtool.gguf.file import Metadata
from qtool.gguf.merges import joined_otherwise, merges_of, merges_of_scores, merges_reach, scores_of
from qtool.gguf.pretokenizers import cut_of, flat, pre_of, pre_tokenizer_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
SPACE = "▁"  # U+2581, how the `llama` kind spells a space
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
OLDER_FILES = ("tokenizer.model", "vocab.json")  # of which transformers makes a tokenizer.json
BESIDE = "copy the model's tokenizer files beside its weights"
LLAMA_DEFAULTS = {"bos": 1, "eos": 2, "unk": 0}  # what llama.cpp takes for the `llama` kind where the key is missing


def check_tokenizer(root: Path) -> None:
    """Raises the errors of `tokenizer_metadata` that files alone tell, at once: it takes seconds, and this does not."""
    path = root / "tokenizer.json"
    if not path.is_file():
        if not any((root / name).is_file() for name in OLDER_FILES):
            raise QtoolError(f"{root} has no tokenizer", BESIDE)
        return
    try:
        kind = json.loads(path.read_bytes())["model"].get("type", "BPE")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise QtoolError(f"{path} is no tokenizer: {type(error).__name__} {error!s:.80}", BESIDE) from None
    _check_kind(kind)


def tokenizer_metadata(root: Path, vocabulary: int) -> Metadata:
    """The keys that make llama.cpp cut texts as the tokenizer in the folder `root` does.

    `vocabulary` is the number of rows of the embedding: ids without a token become unused tokens `[PAD7]`; added
    tokens past the last row, which the model cannot take, are left out. Raises QtoolError where there is no tokenizer,
    UsageError where llama.cpp has none like it.
    """
    tokenizer = _load(root)
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    model = spec["model"]
    _check_model(model, vocabulary)
    if any(step["type"] == "ByteLevel" for step in flat(spec["pre_tokenizer"], "pretokenizers")):
        metadata = _byte_level(spec)
    else:
        metadata = _sentencepiece(spec)
    tokens, types = _tokens(spec, vocabulary, metadata["tokenizer.ggml.model"] == "llama")
    metadata["tokenizer.ggml.tokens"] = tokens
    metadata["tokenizer.ggml.token_type"] = types
    if "tokenizer.ggml.pre" in metadata:
        metadata["tokenizer.ggml.merges"] = [" ".join(merge) for merge in merges_of(model)]
    else:
        metadata["tokenizer.ggml.scores"] = scores_of(merges_of(model), tokens)
    return metadata | _special_tokens(tokenizer, root, vocabulary) | _chat_templates(tokenizer)


def tokenizer_of(metadata: Metadata) -> PreTrainedTokenizerFast:
    """The tokenizer that a GGUF file's keys describe; it cuts texts as llama.cpp does.

    Raises QtoolError naming the key that is missing, damaged, or of a kind that is not read.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    kind = _text(metadata, "tokenizer.ggml.model")
    tokens = _array(metadata, "tokenizer.ggml.tokens", str)
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]  # as llama.cpp names them
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        raise _damaged("tokens", f"has {len(tokens)} tokens, of which {len(vocab)} differ")
    types = [NORMAL] * len(tokens)
    if "tokenizer.ggml.token_type" in metadata:
        types = _array(metadata, "tokenizer.ggml.token_type", int, len(tokens))
    ids = _special_ids(metadata, len(tokens), LLAMA_DEFAULTS if kind == "llama" else {})

    decoder: Any
    if kind == "gpt2":
        pre = _text(metadata, "tokenizer.ggml.pre")
        cut = cut_of(pre)
        inner = Tokenizer(models.BPE(vocab, _read_merges(metadata, vocab), ignore_merges=cut.ignore_merges))
        inner.pre_tokenizer = pre_tokenizer_of(pre)
        decoder = decoders.ByteLevel()
        adds_bos = cut.adds_bos
    elif kind == "llama":
        scores = _array(metadata, "tokenizer.ggml.scores", float, len(tokens))
        unknown = tokens[ids["unk"]] if "unk" in ids else None
        # the others are found in a text before anything is joined
        joined = {t: score for t, kind, score in zip(tokens, types, scores, strict=True) if kind in (NORMAL, UNUSED)}
        merges = merges_of_scores(joined)
        inner = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, byte_fallback=True, fuse_unk=True))
        prefixed = _flag(metadata, "add_space_prefix", True)
        prefix = [normalizers.Prepend(SPACE)] if prefixed else []
        inner.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
        strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
        decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
        adds_bos = True
    else:
        raise QtoolError(f"`tokenizer.ggml.model` is `{shown(kind)}`: only `gpt2` and `llama` tokenizers are read")

    inner.decoder = decoder
    control = [token for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, UNKNOWN)]
    user = [token for token, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    inner.add_tokens([AddedToken(token, special=False, normalized=False) for token in user])
    _add_template(inner, metadata, tokens, ids, adds_bos)
    template = metadata.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": tokens[i] for name, i in ids.items()},
        **({"chat_template": template} if isinstance(template, str) else {}),
    )


def same_vocabulary(first: Any, second: Any, vocabulary: int) -> bool:
    """Whether two tokenizers of transformers have the same tokens under the same ids, fillers `[PAD7]` aside.

    `vocabulary` is the number of rows of the embedding: a token past the last row does not count.
    """
    return _real_tokens(first, vocabulary) == _real_tokens(second, vocabulary)


def _real_tokens(tokenizer: Any, vocabulary: int) -> dict[str, int]:
    # llama.cpp's converter spells the spaces of some added tokens as spaces
    vocab: dict[str, int] = tokenizer.get_vocab()
    return {token.replace(SPACE, " "): i for token, i in vocab.items() if i < vocabulary and token != f"[PAD{i}]"}


# Writing


def _load(root: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(root, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # tokenizers raises nothing more exact for a damaged tokenizer.json
        raise QtoolError(
            f"{root} has no tokenizer that transformers can load: {' '.join(str(error).split())[:200]}",
            BESIDE,
        ) from None
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise _unsupported(f"is a {type(tokenizer).__name__}, which has no tokenizer.json")
    return tokenizer


def _check_model(model: dict[str, Any], vocabulary: int) -> None:
    """Raises UsageError for a model other than plain BPE, or with more tokens than `vocabulary`."""
    _check_kind(model["type"])
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model[option]:
            raise _unsupported(f"has `{option}` {model[option]!r}")
    last = max(model["vocab"].values(), default=-1)
    if last >= vocabulary:
        raise UsageError(
            f"the tokenizer has a token {last}, but the model's embedding {vocabulary} rows",
            "copy the tokenizer files that came with the model",
        )


def _check_kind(kind: object) -> None:
    if kind != "BPE":
        raise _unsupported(f"is {kind!s:.40}: only BPE has a form in GGUF that is written here")


def _byte_level(spec: dict[str, Any]) -> Metadata:
    """The first keys of byte-level BPE. Raises UsageError where llama.cpp would cut another way."""
    model = spec["model"]
    for step in flat(spec["normalizer"], "normalizers"):
        if step["type"] != "NFC":
            raise _unsupported(f"has the normalizer {step['type']}")
    missing = [char for char in _bytes_as_chars() if char not in model["vocab"]]
    if missing or model["byte_fallback"]:
        raise _unsupported(f"has no token for {len(missing)} of the 256 bytes, or falls back to others")
    if any(" " in part for merge in merges_of(model) for part in merge):
        raise _unsupported("has a space inside a merge")
    matters = not merges_reach(model, model["vocab"].keys() - _added(spec))
    pre = pre_of(spec["pre_tokenizer"], model["ignore_merges"], matters)
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre}


def _sentencepiece(spec: dict[str, Any]) -> Metadata:
    """The first keys of SentencePiece's BPE. Raises UsageError where llama.cpp would cut another way."""
    model = spec["model"]
    steps = [*flat(spec["normalizer"], "normalizers"), *flat(spec["pre_tokenizer"], "pretokenizers")]
    prefix = spaces = False
    for step in steps:
        kind = step["type"]
        if kind == "Prepend" and step["prepend"] == SPACE and not spaces:
            prefix = True
        elif kind == "Replace" and step["pattern"] == {"String": " "} and step["content"] == SPACE:
            spaces = True
        elif kind == "Metaspace" and step["replacement"] == SPACE:
            prefix, spaces = prefix or step["prepend_scheme"] != "never", True
            if step["split"] and (inner := next((t for t in model["vocab"] if SPACE in t[1:]), None)):
                raise _unsupported(f"cuts the text at every space, but has the token {inner!r}")
        elif kind != "NFC" and not (kind == "Split" and spaces and step["pattern"] == {"String": " "}):
            raise _unsupported(f"has the step {kind} before BPE: {step}")
    if not spaces:
        raise _unsupported(f"is neither byte-level nor has {SPACE!r} for spaces")
    if model["ignore_merges"]:
        raise _unsupported("has `ignore_merges` without being byte-level")
    missing = [token for token in BYTE_TOKENS if token not in model["vocab"]]
    if missing or not model["byte_fallback"]:
        raise UsageError(
            f"the tokenizer has no token {(missing or BYTE_TOKENS)[0]} for a byte of what it does not know:"
            " llama.cpp ends at such a character",
            "use a format of Hugging Face for this model",
        )
    if others := joined_otherwise(model, {*_added(spec), *BYTE_TOKENS}):
        raise _unsupported(f"has no merge for some ways to make {len(others)} tokens, such as {min(others)!r}")
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.add_space_prefix": prefix,
        "tokenizer.ggml.remove_extra_whitespaces": False,
    }


def _tokens(spec: dict[str, Any], vocabulary: int, sentencepiece: bool) -> tuple[list[str], list[int]]:
    """The text and the type of each of `vocabulary` tokens."""
    tokens, types = [f"[PAD{i}]" for i in range(vocabulary)], [UNUSED] * vocabulary
    vocab = spec["model"]["vocab"]
    for token, i in vocab.items():
        tokens[i], types[i] = token, NORMAL
    if sentencepiece:
        for token in BYTE_TOKENS:
            types[vocab[token]] = BYTE
    for added in spec["added_tokens"]:
        i, token = added["id"], added["content"]
        if i >= vocabulary:
            continue
        if sentencepiece and SPACE in token and not added["special"]:
            # looked for in a text as it is it is not found (no text has ▁), so merges make it; else spaces are found
            if token in vocab and not (added["normalized"] and spec["normalizer"]):
                continue
            token = token.replace(SPACE, " ")
        unknown = sentencepiece and token == spec["model"]["unk_token"]
        tokens[i] = token
        types[i] = UNKNOWN if unknown else CONTROL if added["special"] else USER_DEFINED
    if twice := len(tokens) - len(set(tokens)):
        raise _unsupported(f"has {twice} tokens twice")
    if any("\0" in token for token in tokens):
        raise _unsupported("has a token with a NUL, where llama.cpp ends it")
    return tokens, types


def _special_tokens(tokenizer: Any, root: Path, vocabulary: int) -> Metadata:
    """Ids of special tokens, and whether a text gets the first two: seen from what the tokenizer does with one."""
    text = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = next((i for i in range(len(whole)) if whole[i : i + len(text)] == text), 0)
    before, after = whole[:start], whole[start + len(text) :]
    if len(before) > 1 or len(after) > 1:
        raise _unsupported(f"puts {len(before)} tokens before a text and {len(after)} after it")
    ends = _end_tokens(root)
    eos = after[0] if after else tokenizer.eos_token_id
    if eos is None and not ends:
        raise UsageError(
            "the tokenizer has no end-of-text token, and llama.cpp would take token 2 or 11 for it",
            f"name it as `eos_token` in {root / 'tokenizer_config.json'}",
        )
    ids = {
        "bos_token_id": before[0] if before else tokenizer.bos_token_id,
        "eos_token_id": ends[0] if eos is None else eos,
        "unknown_token_id": tokenizer.unk_token_id,
        "padding_token_id": tokenizer.pad_token_id,
    }
    ids["eot_token_id"] = next((i for i in ends if i != ids["eos_token_id"]), None)  # chat models end turns with it
    found = {f"tokenizer.ggml.{key}": i for key, i in ids.items() if i is not None and i < vocabulary}
    return found | {"tokenizer.ggml.add_bos_token": bool(before), "tokenizer.ggml.add_eos_token": bool(after)}


def _end_tokens(root: Path) -> list[int]:
    """The ids in generation_config.json at which generating ends."""
    path = root / "generation_config.json"
    if not path.is_file():
        return []
    try:
        ends = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError) as error:
        raise QtoolError(f"{path} is not a readable JSON object: {error}") from None
    return [i for i in (ends if isinstance(ends, list) else [ends]) if isinstance(i, int)]


def _chat_templates(tokenizer: Any) -> Metadata:
    """The chat template; where there are several, the others under their names."""
    templates = tokenizer.chat_template or {}
    if isinstance(templates, str):
        templates = {"default": templates}
    others = {f"tokenizer.chat_template.{name}": text for name, text in templates.items() if name != "default"}
    default = {"tokenizer.chat_template": templates["default"]} if "default" in templates else {}
    names = {"tokenizer.chat_templates": [name for name in templates if name != "default"]} if others else {}
    return default | names | others


def _added(spec: dict[str, Any]) -> set[str]:
    return {added["content"] for added in spec["added_tokens"]}


def _bytes_as_chars() -> list[str]:
    """The characters that stand for the bytes of UTF-8 in byte-level BPE: printable ones for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    chars = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [char for byte, char in chars.items() if byte not in NEVER_IN_UTF8]


def _unsupported(what: str) -> UsageError:
    return UsageError(f"the tokenizer {what}: llama.cpp would cut texts differently, so no GGUF is written")


# Reading


def _read_merges(metadata: Metadata, vocab: dict[str, int]) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for rank, merge in enumerate(_array(metadata, "tokenizer.ggml.merges", str)):
        left, right = merge[:1] + merge[1:].partition(" ")[0], merge[1:].partition(" ")[2]
        if not (left in vocab and right in vocab and left + right in vocab):
            raise _damaged(
                "merges", f"has in place {rank} `{shown(merge[:80])}`, which does not join two tokens to a third"
            )
        pairs.append((left, right))
    return pairs


def _add_template(inner: Tokenizer, metadata: Metadata, tokens: list[str], ids: dict[str, int], adds_bos: bool) -> None:
    """Puts the first and the last token around a text, as the keys say."""
    from tokenizers import processors

    wanted = {"bos": _flag(metadata, "add_bos_token", adds_bos), "eos": _flag(metadata, "add_eos_token", False)}
    for name in (name for name, adds in wanted.items() if adds and name not in ids):
        raise _damaged(SPECIAL[name], f"is missing, but `tokenizer.ggml.add_{name}_token` is true")
    used = [{"id": name, "ids": [ids[name]], "tokens": [tokens[ids[name]]]} for name, adds in wanted.items() if adds]
    pieces = [*["bos"] * wanted["bos"], "$A", *["eos"] * wanted["eos"]]
    inner.post_processor = processors.TemplateProcessing(
        single=pieces, pair=[*pieces, *("$B" if piece == "$A" else piece for piece in pieces)], special_tokens=used
    )


def _special_ids(metadata: Metadata, count: int, defaults: dict[str, int]) -> dict[str, int]:
    """Ids of the special tokens that there are, by the names that transformers has for them."""
    found = {name: i for name, i in defaults.items() if i < count}
    for name, key in SPECIAL.items():
        if (value := metadata.get(f"tokenizer.ggml.{key}")) is not None:
            if not isinstance(value, int) or not 0 <= value < count:
                raise _damaged(key, f"is {value}, but there are {count} tokens")
            found[name] = value
    return found


def _text(metadata: Metadata, key: str) -> str:
    value = metadata.get(key)
    if not isinstance(value, str):
        raise QtoolError(f"`{key}` is missing from the GGUF file" if value is None else f"`{key}` is not a text")
    return value


def _flag(metadata: Metadata, key: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{key}", default)
    if not isinstance(value, bool):
        raise _damaged(key, "is neither true nor false")
    return value


def _array(metadata: Metadata, key: str, kind: type, count: int | None = None) -> list[Any]:
    """The list under `key`, with `count` items of the type `kind`."""
    value = metadata.get(key)
    if value is None:
        raise QtoolError(f"`{key}` is missing from the GGUF file")
    if not isinstance(value, list) or not all(type(item) is kind for item in value):
        raise QtoolError(f"`{key}` is not a list of {kind.__name__}")
    if count is not None and len(value) != count:
        raise QtoolError(f"`{key}` has {len(value)} items, but there are {count} tokens")
    return value


def _damaged(key: str, what: str) -> QtoolError:
    return QtoolError(f"`tokenizer.ggml.{key}` {what}")
