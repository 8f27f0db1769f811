"""What transformers makes of a model's own description: the files of a folder, or a GGUF file that has all in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qtool.errors import UsageError


def config_tree(home: Path) -> dict[str, Any]:
    """What config.json says. Raises UsageError where there is none."""
    if home.is_file():
        from qtool.gguf.checkpoint import GGUFCheckpoint

        return GGUFCheckpoint(home).config
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
        from qtool.gguf.file import GGUFFile
        from qtool.gguf.tokenizer import tokenizer_of

        return tokenizer_of(GGUFFile(home).metadata)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(home, trust_remote_code=False, local_files_only=True)
