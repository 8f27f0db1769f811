"""Statistics of a float model on disk: `stats.safetensors` with sums over tokens, and a manifest that says of what.

Sums, not means: what is read gives the same moments as the run that saw the data, and folders can be added up.
Each tensor's sha256 is in the manifest and checked when it is read.

Shapes: I input features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.checkpoint.existing import first_difference, read_manifest
from qtool.checkpoint.reader import Checkpoint, FileIdentity
from qtool.errors import QtoolError, UsageError
from qtool.headers import DTYPE_BITS, TensorInfo

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qtool.calibration.stats import InputStats

STATS_FILE = "stats.safetensors"
LAYOUT = 1  # of the file and its manifest
PARTS = {"absmax": "F32", "sum": "F64", "sum_abs": "F64", "sum_squares": "F64", "large": "I64"}  # [I] each
ABSMAX = ".output.absmax"
KV = ("k_absmax", "v_absmax")
SQUARES = "squares"  # what is asked for where nothing needs more: E x^2 alone, which weights the search for scales


@dataclass(frozen=True)
class SavedInput:
    """One distinct input: the linears that read it, named in full, and its features. The first linear names it."""

    linears: tuple[str, ...]
    features: int

    @property
    def name(self) -> str:
        return self.linears[0]

    def part(self, part: str) -> str:
        return f"{self.name}.input.{part}"


Blocks = Mapping[str, Sequence[SavedInput]]  # by the block's name


def tensors_of(blocks: Blocks, hessians: bool) -> dict[str, TensorInfo]:
    """Every tensor of a statistics file, wide types first, so that each lies at a multiple of its size."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for block, inputs in blocks.items():
        for source in inputs:
            tensors[source.part("tokens")] = "I64", ()
            tensors[source.part("peak_squares")] = "F64", ()
            tensors.update({source.part(part): (dtype, (source.features,)) for part, dtype in PARTS.items()})
            if hessians:
                tensors[source.part("second")] = "F32", (source.features, source.features)
            tensors.update({linear + ABSMAX: ("F32", (1,)) for linear in source.linears})
        tensors.update({f"{block}.{part}": ("F32", (1,)) for part in KV})
    ordered = sorted(tensors.items(), key=lambda item: -DTYPE_BITS[item[1][0]])
    return {name: TensorInfo(name, dtype, shape, STATS_FILE) for name, (dtype, shape) in ordered}


def tensors_of_input(source: SavedInput, stats: InputStats, peak_squares: Tensor) -> dict[str, Tensor]:
    """What is written of an input."""
    import torch

    channels = stats.channels
    assert channels is not None
    tensors = {
        "tokens": torch.tensor(stats.tokens),
        "peak_squares": peak_squares,
        **{part: getattr(channels, f"{part}_I") for part in PARTS},
    }
    if stats.second_II is not None:
        tensors["second"] = stats.second_II
    return {source.part(part): tensor for part, tensor in tensors.items()}


def content_sha256(tensors: Mapping[str, str]) -> str:
    """Identifies statistics by the sha256 of each tensor."""
    return hashlib.sha256(json.dumps(sorted(tensors.items())).encode()).hexdigest()


class SavedStats:
    """A statistics folder. Headers and manifest are read at once, tensors when they are asked for.

    `sha256` identifies its content. With a checkpoint, its files must be those of the model that was measured; one
    whose size and time are as they were is not hashed again. Raises UsageError for what is no such folder, QtoolError
    for statistics of another model.
    """

    def __init__(self, path: Path, checkpoint: Checkpoint | None = None) -> None:
        self.path = path
        manifest = read_manifest(path)
        if manifest is None or "blocks" not in manifest:
            raise UsageError(
                f"{path} holds no statistics" if path.exists() else f"no such folder: {path}",
                f"make them: `qtool calibrate MODEL -o {path}`",
            )
        if manifest["layout"] != LAYOUT:
            raise QtoolError(f"{path} was written by qtool {manifest['qtool']} in another layout", "make it again")
        self.manifest = manifest
        self.blocks: dict[str, list[SavedInput]] = {
            block: [SavedInput(tuple(x["linears"]), x["features"]) for x in inputs]
            for block, inputs in manifest["blocks"].items()
        }
        self.has_hessians: bool = manifest["hessians"]
        self.sha256: str = manifest["sha256"]
        self._inputs = {linear: x for inputs in self.blocks.values() for x in inputs for linear in x.linears}
        self._file = Checkpoint(path / STATS_FILE)
        missing = tensors_of(self.blocks, self.has_hessians).keys() - self._file.tensors.keys()
        if missing:
            raise QtoolError(f"{path / STATS_FILE} has no `{min(missing)}`", "make it again with --force")
        if checkpoint is not None:
            known = [FileIdentity(**file) for file in manifest["source_files"]]
            self.check(checkpoint.identity(known))

    def check(self, model: Iterable[FileIdentity]) -> None:
        """Raises QtoolError unless the statistics are those of this model.

        Of the files only those count that were recorded: weights and config.json.
        """
        saved, given = self.manifest["model"]["files"], {file.name: file.sha256 for file in model}
        differs = first_difference(saved, {name: given.get(name) for name in {**saved, **_weights(given)}})
        if differs:
            raise self._other("model", f"{differs.partition(' was ')[0]} differs")

    def check_tokenizer(self, sha256: str) -> None:
        """Raises QtoolError unless the statistics are of text in the tokens of this vocabulary."""
        if sha256 != self.manifest["tokenizer_sha256"]:
            was = self.manifest["tokenizer_sha256"]
            raise self._other("tokenizer", f"its vocabulary was {was[:12]} and is now {sha256[:12]}")

    def check_inputs(self, columns: Mapping[str, int]) -> None:
        """Raises QtoolError unless these linears, named in full, were measured with so many inputs."""
        for linear, count in columns.items():
            features = self.input_of(linear).features
            if features != count:
                raise self._other("model", f"`{linear}` had {features} inputs and has {count}")

    def _other(self, what: str, why: str) -> QtoolError:
        hint = "`qtool calibrate MODEL -o STATS` makes those of this one"
        return QtoolError(f"{self.path} has statistics of another {what}: {why}", hint)

    def input_of(self, linear: str) -> SavedInput:
        """The input that a linear, named in full, reads. Raises QtoolError when it was not measured."""
        if linear not in self._inputs:
            raise QtoolError(f"{self.path} has no statistics of the inputs of `{linear}`")
        return self._inputs[linear]

    def stats(self, name: str, wanted: Collection[str], device: torch.device | None = None) -> InputStats:
        """The sums of the input of the linear `name`, as they were when the data had gone through.

        `wanted` are SQUARES or some of VECTORS and SECOND of `qtool.calibration.stats`. Raises QtoolError for what was
        not saved.
        """
        from qtool.calibration import stats as kinds

        source = self.input_of(name)
        if kinds.CROSS in wanted:
            raise QtoolError(f"{self.path} has statistics of the float model only, no cross moments", "give data")
        if kinds.SECOND in wanted and not self.has_hessians:
            raise QtoolError(
                f"{self.path} has no second moments", f"make them: `qtool calibrate MODEL -o {self.path} --hessians`"
            )

        def read(part: str) -> Tensor:
            return self._read(source.part(part)).to(device)

        channels = None
        if kinds.VECTORS in wanted or SQUARES in wanted:
            channels = kinds.Channels(**{f"{part}_I": read(part) for part in PARTS})
        second = read("second") if kinds.SECOND in wanted else None
        return kinds.InputStats(int(read("tokens")), channels, second)

    def kv(self, block: str) -> tuple[Tensor, Tensor]:
        """The largest magnitude of the keys and of the values of a block, float32 [1] each."""
        if block not in self.blocks:
            raise QtoolError(f"{self.path} has no ranges of keys and values of `{block}`")
        return self._read(f"{block}.{KV[0]}"), self._read(f"{block}.{KV[1]}")

    def output_absmax(self, linear: str) -> Tensor:
        """The largest magnitude of what a linear puts out, float32 [1]."""
        self.input_of(linear)
        return self._read(linear + ABSMAX)

    def peak_squares(self, linear: str) -> Tensor:
        """Of the input of a linear the sum over tokens of the largest square, float64 []."""
        return self._read(self.input_of(linear).part("peak_squares"))

    def data_record(self) -> dict[str, Any]:
        """What the data was, with one source for all."""
        data = self.manifest["data"]
        digests = [record["sha256"] for record in data]
        return {
            "source": " + ".join(dict.fromkeys(record["source"] for record in data)),
            "rows": sum(record["rows"] for record in data),
            "tokens": sum(record["tokens"] for record in data),
            "sha256": digests[0] if len(digests) == 1 else hashlib.sha256(repr(digests).encode()).hexdigest(),
        }

    def _read(self, name: str) -> Tensor:
        from qtool.checkpoint.writer import raw_bytes

        tensor = self._file.read(name)
        if hashlib.sha256(raw_bytes(tensor)).hexdigest() != self.manifest["tensors"].get(name):
            raise QtoolError(f"`{name}` in {self.path} is damaged", "make the statistics again with --force")
        return tensor


def check_alike(parts: Sequence[SavedStats]) -> None:
    """Raises QtoolError unless all are of one model and one tokenizer."""
    first = parts[0]
    for other in parts[1:]:
        for what in ("model", "tokenizer_sha256", "blocks"):
            difference = first_difference(_comparable(first, what), _comparable(other, what))
            if difference:
                raise QtoolError(
                    f"{other.path} is of another {what.removesuffix('_sha256')} than {first.path}: "
                    f"{difference.replace(' and is now ', ' and is there ')}",
                    "merge statistics of one model only",
                )


def added(parts: Sequence[SavedStats], source: SavedInput, hessians: bool) -> tuple[InputStats, Tensor]:
    """The statistics of an input over all data, and its `peak_squares`. Matrices are added in float64.

    Vectors come to the same bits in any order of two; float64 sums of more may differ in the last.
    """
    import torch

    from qtool.calibration.stats import SECOND, VECTORS, Channels, InputStats

    every = [part.stats(source.name, {VECTORS}) for part in parts]
    channels = [stats.channels for stats in every if stats.channels is not None]
    vectors = {name: torch.stack([getattr(c, f"{name}_I") for c in channels]) for name in PARTS}
    sums = {f"{name}_I": x.amax(0) if name == "absmax" else x.sum(0) for name, x in vectors.items()}
    second = None
    if hessians:
        total = torch.zeros(source.features, source.features, dtype=torch.float64)
        for part in parts:
            matrix = part.stats(source.name, {SECOND}).second_II
            assert matrix is not None
            total += matrix
        second = total.float()
    peaks = torch.stack([part.peak_squares(source.name) for part in parts]).sum()
    return InputStats(sum(stats.tokens for stats in every), Channels(**sums), second), peaks


def _weights(files: Mapping[str, str]) -> dict[str, str]:
    return {name: sha256 for name, sha256 in files.items() if name.endswith(".safetensors")}


def _comparable(saved: SavedStats, what: str) -> Any:
    return saved.manifest["model"]["files"] if what == "model" else {what: saved.manifest[what]}
