"""The report of a `quantize` run: one object, of which the table, `--json` and the manifest are views."""

from __future__ import annotations

import dataclasses
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class LayerRecord:
    """What became of one linear layer. Errors are relative Frobenius norms, of the weight and of its output."""

    module: str
    scheme: str
    shape: tuple[int, ...]
    bits_per_weight: float
    weight_error: float
    output_error: float | None  # None when there was no data
    wall_s: float
    notes: tuple[str, ...] = ()
    transforms: tuple[str, ...] = ()  # what they did to its input

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> LayerRecord:
        return cls(**{**tree, **{key: tuple(tree[key]) for key in ("shape", "notes", "transforms")}})


@dataclass(frozen=True)
class KeptRecord:
    """A tensor left alone, and why."""

    name: str
    dtype: str
    size_bytes: int
    reason: str
    changed: bool = False  # by a transform, which left what the float model computes as it is


@dataclass
class Report:
    """All that `quantize` knows at the end."""

    model: str
    output: str
    architecture: str
    scheme: str
    transforms: list[str]
    method: str
    kv: str | None
    format: str
    readers: str
    layers: list[LayerRecord]
    kept: list[KeptRecord]
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    finish: list[str] = field(default_factory=list)
    training: list[dict[str, Any]] = field(default_factory=list)  # the curve of each, by finish and unit
    notes: list[str] = field(default_factory=list)
    data: dict[str, Any] | None = None
    stages_s: dict[str, float] = field(default_factory=dict)
    wall_s: float = 0.0
    peak_memory_bytes: int = 0
    device: str = "cpu"
    resumed_units: int = 0
    evaluation: dict[str, Any] | None = None
    gates: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def to_tree(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> Report:
        layers = [LayerRecord.from_tree(x) for x in tree["layers"]]
        return cls(**{**tree, "layers": layers, "kept": [KeptRecord(**x) for x in tree["kept"]]})


class Stopwatch:
    """Wall time by stage."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.stages_s: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.stages_s[name] = self.stages_s.get(name, 0.0) + time.perf_counter() - start

    @property
    def wall_s(self) -> float:
        return time.perf_counter() - self.started


def peak_memory_bytes() -> int:
    """The most memory that this process has had resident."""
    try:  # ru_maxrss of a child begins at what its parent had when it forked; this does not
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def versions(*packages: str) -> dict[str, str]:
    """Of Python and of the packages that decide results."""
    from importlib.metadata import version

    return {"python": platform.python_version(), **{p: version(p) for p in packages}}
