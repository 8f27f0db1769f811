"""What stands beside a model's weights and goes with them: tokenizer, generation config, licence and so on."""

from __future__ import annotations

from pathlib import Path

from qtool.checkpoint.reader import INDEX, Checkpoint
from qtool.checkpoint.writer import MANIFEST

OWN_FILES = {MANIFEST, "config.json", "quantize_config.json"}
SKIPPED_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".partial"}


def rest_of_files(checkpoint: Checkpoint) -> list[Path]:
    """Those of its folder; none for a single file."""
    if checkpoint.path.is_file() or checkpoint.home.is_file():
        return []
    names = OWN_FILES | {INDEX}
    files = sorted(p for p in checkpoint.root.iterdir() if p.is_file() and p.name not in names)
    return [p for p in files if not p.name.startswith(".") and p.suffix not in SKIPPED_SUFFIXES]
