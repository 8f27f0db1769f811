"""What an evaluation would do, from headers alone. Never imports torch."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from qtool.calibration.texts import local_files
from qtool.checkpoint.reader import sha256_file
from qtool.formats.weights import Weights
from qtool.gguf.checkpoint import open_checkpoint
from qtool.models.architectures import architecture_of
from qtool.recipe import EvalSpec


def describe(path: Path, base_path: Path | None, spec: EvalSpec) -> dict[str, Any]:
    """Models, their schemes, data and protocol; raises what the evaluation itself would about the models."""
    models = {"model": path, **({"baseline": base_path} if base_path else {})}
    description: dict[str, Any] = {}
    for name, root in models.items():
        checkpoint = open_checkpoint(root)
        architecture_of(checkpoint.config, root)
        schemes = sorted({str(scheme) for scheme in Weights(checkpoint).schemes.values()})
        description[name] = f"{root} ({checkpoint.config['model_type']}, {', '.join(schemes) or 'dense'})"
    description["data"] = spec.data.source
    description["protocol"] = spec.protocol
    description["context"] = spec.data.seqlen or "the model's, at most 2048"
    return description


def evaluation_tree(spec: EvalSpec | None) -> dict[str, Any] | None:
    """The evaluation that is asked for, with the contents of its files."""
    if not spec:
        return None
    return {**asdict(spec), "files": {str(path): sha256_file(path) for path in local_files(spec.data)}}
