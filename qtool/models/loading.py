"""What transformers makes of a model's own description: the files of a folder, or a GGUF file that has all in it."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from qtool.errors import UsageError
from qtool.gguf.checkpoint import GGUFCheckpoint


def config_tree(home: Path) -> dict[str, Any]:
    """What config.json says. Raises UsageError where there is none."""
    if home.is_file():
        return _gguf(home).config
    try:
        config: dict[str, Any] = json.loads((home / "config.json").read_text(encoding="utf-8"))
    except OSError:
        raise UsageError(f"{home} has no config.json, so the model cannot be run") from None
    return config


def load_config(home: Path) -> Any:
    """The transformers config, without a word of how the weights are quantized: they arrive dequantized."""
    from transformers import AutoConfig

    if home.is_file():
        tree = config_tree(home)
        config = AutoConfig.for_model(**{key: value for key, value in tree.items() if key != "quantization_config"})
    else:
        config = AutoConfig.from_pretrained(home, trust_remote_code=False, local_files_only=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def load_tokenizer(home: Path) -> Any:
    """The transformers tokenizer."""
    if home.is_file():
        from qtool.gguf.tokenizer import tokenizer_of

        return tokenizer_of(_gguf(home).metadata)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(home, trust_remote_code=False, local_files_only=True)


def _gguf(file: Path) -> GGUFCheckpoint:
    """The header of a GGUF file, which takes a second for a large vocabulary: parsed once while the file stays."""
    status = file.stat()
    return _parsed(file, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=2)  # a model and its baseline
def _parsed(file: Path, size_bytes: int, mtime_ns: int) -> GGUFCheckpoint:
    return GGUFCheckpoint(file)
