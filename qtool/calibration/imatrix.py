"""Importance matrix for llama.cpp's llama-quantize, as GGUF: per weight the sum of squares of each input column.

Written as llama.cpp's imatrix tool does since its pull request 9400 (2025): general.type "imatrix", and for each weight
`<weight>.in_sum2` [columns, 1] and `<weight>.counts` [1, 1], the tokens, by which llama-quantize divides.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtool.calibration.saved import SavedStats
from qtool.errors import QtoolError, UsageError
from qtool.gguf.architectures import GGUF_NAMES
from qtool.gguf.model import name_map

TYPE = "imatrix"
MANIFEST_KEY = "qtool.manifest"  # JSON; llama.cpp takes no notice of keys that it does not know
SMALLEST = 1e-6  # of the mean importance of a weight's columns


def check_architecture(kind: str) -> None:
    """Raises UsageError for a model_type that llama.cpp does not have."""
    if kind not in GGUF_NAMES:
        raise UsageError(
            f"llama.cpp has no architecture `{kind}`, so there is no imatrix for it",
            f"it has {', '.join(GGUF_NAMES)}; `--format stats` works for every model that qtool runs",
        )


def gguf_names(linears: list[str], kind: str, blocks: int) -> dict[str, str]:
    """What llama.cpp calls the weights of these linears. Raises QtoolError for one that its converter does not know."""
    names = name_map(GGUF_NAMES[kind], blocks)
    found = {linear: names.get_name(linear) for linear in linears}
    unknown = [linear for linear, translated in found.items() if translated is None]
    if unknown:
        raise QtoolError(f"llama.cpp has no name for `{unknown[0]}` of architecture {GGUF_NAMES[kind]}")
    return {linear: f"{translated}.weight" for linear, translated in found.items()}


def write_imatrix(path: Path, saved: SavedStats) -> None:
    """The file of saved statistics. Every linear has its own entry; the order is that of the model."""
    import gguf
    import numpy as np

    kind = saved.manifest["model"]["architecture"]
    data = saved.manifest["data"]
    chunk = max(record["seqlen"] for record in data)
    linears = [linear for inputs in saved.blocks.values() for source in inputs for linear in source.linears]
    names = gguf_names(linears, kind, len(saved.blocks))
    writer = gguf.GGUFWriter(path, GGUF_NAMES[kind])
    writer.add_type(TYPE)
    writer.add_array("imatrix.datasets", [record["source"] for record in data])
    writer.add_uint32("imatrix.chunk_count", -(-sum(record["tokens"] for record in data) // chunk))
    writer.add_uint32("imatrix.chunk_size", chunk)
    kept = ("qtool", "identity", "model", "data", "sha256", "report")
    writer.add_string(MANIFEST_KEY, json.dumps({key: saved.manifest[key] for key in kept}))
    for inputs in saved.blocks.values():
        for source in inputs:
            stats = saved.stats(source.name, {"vectors"})
            assert stats.channels is not None
            sums = stats.channels.sum_squares_I
            # llama.cpp b4585 divides by the importance of a block of columns, and writes NaN where that is zero
            sums = sums.clamp(min=SMALLEST * float(sums.mean()) or 1.0)
            for linear in source.linears:
                writer.add_tensor(f"{names[linear]}.in_sum2", sums.float().numpy()[None])
                writer.add_tensor(f"{names[linear]}.counts", np.full((1, 1), stats.tokens, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_manifest(path: Path) -> Mapping[str, Any] | None:
    """What qtool wrote into an imatrix; {} for one of others, None where there is no file.

    Raises UsageError for a file that is no imatrix: that is not to be replaced.
    """
    import gguf

    if not path.exists():
        return None
    try:
        fields = gguf.GGUFReader(path).fields
        found = {key: fields[key].contents() for key in ("general.type", MANIFEST_KEY) if key in fields}
    except (OSError, ValueError, IndexError, KeyError):  # whatever the reader makes of a file that is none
        found = {}
    if found.get("general.type") != TYPE:
        raise UsageError(f"{path} is there already and is no imatrix", "give another -o/--output")
    manifest: Mapping[str, Any] = json.loads(found.get(MANIFEST_KEY, "{}"))
    return manifest
