"""What lies on disk as a checkpoint does but is none: statistics of a model's inputs, as `qtool calibrate` and
llama.cpp's imatrix tool write them. Never imports torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qtool.calibration.imatrix import MANIFEST_KEY, TYPE
from qtool.calibration.saved import STATS_FILE, SavedStats
from qtool.checkpoint.reader import Checkpoint
from qtool.errors import shown
from qtool.gguf.checkpoint import GGUFCheckpoint
from qtool.headers import kind_of

SUMS = ".in_sum2"  # ends of names in an imatrix
STATS, IMATRIX = "statistics of qtool calibrate", "importance matrix of llama.cpp"


@dataclass(frozen=True)
class InputKind:
    """Inputs whose names differ only in the number of the block: what reads them, and how many columns each has."""

    pattern: str
    inputs: int
    columns: int


@dataclass(frozen=True)
class Statistics:
    """What was measured, of which model, on which data; `use` is what to type with it."""

    path: str
    kind: str  # STATS or IMATRIX
    model: str | None
    architecture: str | None
    data: list[str]
    holds: str
    size_bytes: int
    inputs: list[InputKind]
    use: str

    def to_tree(self) -> dict[str, Any]:
        return asdict(self)


def statistics_of(checkpoint: Checkpoint) -> Statistics | None:
    """What statistics a checkpoint is, or None for a model."""
    if isinstance(checkpoint, GGUFCheckpoint):
        return _imatrix(checkpoint) if checkpoint.metadata.get("general.type") == TYPE else None
    if checkpoint.path.name == STATS_FILE or not (checkpoint.path / STATS_FILE).is_file():
        return None
    return _saved(checkpoint)


def _saved(checkpoint: Checkpoint) -> Statistics | None:
    """A folder of `qtool calibrate`; None where its manifest does not say what it is."""
    try:
        saved = SavedStats(checkpoint.path)
        model, records = saved.manifest["model"], saved.manifest["data"]
        data = [f"{r['source']}, {r['rows']} rows, {r['tokens']} tokens" for r in records]
        name, architecture = str(model["name"]), str(model["architecture"])
    except (KeyError, TypeError, AttributeError):
        return None
    found = Counter((kind_of(x.name), x.features) for inputs in saved.blocks.values() for x in inputs)
    return Statistics(
        path=str(checkpoint.path),
        kind=STATS,
        model=name,
        architecture=architecture,
        data=data,
        holds="ranges, means and mean squares of each column" + ", second moments" * saved.has_hessians,
        size_bytes=checkpoint.size_bytes,
        inputs=[InputKind(pattern, inputs, columns) for (pattern, columns), inputs in found.items()],
        use=f"qtool quantize {name} -o OUT --stats {checkpoint.path}",
    )


def _imatrix(checkpoint: GGUFCheckpoint) -> Statistics:
    keys = checkpoint.metadata
    sums = {name.removesuffix(SUMS): info.shape for name, info in checkpoint.tensors.items() if name.endswith(SUMS)}
    found = Counter((kind_of(name.removesuffix(".weight")), shape[-1] if shape else 1) for name, shape in sums.items())
    return Statistics(
        path=str(checkpoint.path),
        kind=IMATRIX,
        model=None,
        architecture=checkpoint.config["gguf_architecture"] if "general.architecture" in keys else None,
        data=_datasets(keys),
        holds="mean squares of each column" + ("; made by qtool" if MANIFEST_KEY in keys else ""),
        size_bytes=checkpoint.size_bytes,
        inputs=[InputKind(pattern, inputs, columns) for (pattern, columns), inputs in found.items()],
        use=f"qtool quantize MODEL -o OUT --scheme q4_k_m --method rtn --stats {checkpoint.path}",
    )


def _datasets(keys: Mapping[str, Any]) -> list[str]:
    names, chunks, tokens = (keys.get(f"imatrix.{key}") for key in ("datasets", "chunk_count", "chunk_size"))
    listed = [shown(name) for name in names] if isinstance(names, list) else []
    if isinstance(chunks, int) and isinstance(tokens, int):
        listed[-1:] = [", ".join([*listed[-1:], f"{chunks} chunks of {tokens} tokens"])]
    return listed
