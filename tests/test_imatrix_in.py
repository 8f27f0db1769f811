"""Importance matrices read as statistics: those that qtool wrote, and those of llama.cpp in both its formats."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qtool.calibration import imatrix
from qtool.calibration.imatrix_file import ImatrixStats, open_stats
from qtool.calibration.saved import SQUARES, SavedStats
from qtool.calibration.stats import VECTORS
from qtool.checkpoint.reader import Checkpoint
from qtool.cli import run
from qtool.errors import QtoolError, UsageError
from qtool.models.architectures import ARCHITECTURES
from qtool.numerics.grid import grid_of
from qtool.scheme import QuantScheme

CONFIG = {"model_type": "llama", "num_hidden_layers": 2}
LINEAR, WEIGHT = "model.layers.1.mlp.down_proj", "blk.1.ffn_down.weight"
Q = "model.layers.0.self_attn.q_proj"
ROWS = ("--rows", "12", "--seqlen", "32")


def gguf_imatrix(path: Path, sums: Mapping[str, Any], counts: float | list[float] = 4.0, kind: str = "imatrix") -> Path:
    """As llama.cpp's imatrix tool writes it: names in order, sums and counts of each."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(kind)
    writer.add_array("imatrix.datasets", ["wiki.txt"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    counts = [counts] if isinstance(counts, float) else counts
    for name, values in sorted(sums.items()):
        writer.add_tensor(f"{name}.in_sum2", np.array(values, np.float32).reshape(len(counts), -1))
        writer.add_tensor(f"{name}.counts", np.array(counts, np.float32).reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def legacy_imatrix(path: Path, sums: Mapping[str, Any], calls: int = 4, end: bytes | None = None) -> Path:
    """As llama.cpp's imatrix tool wrote it in 2024."""
    data = struct.pack("<i", len(sums))
    for name, values in sums.items():
        data += struct.pack(f"<i{len(name)}sii", len(name), name.encode(), calls, len(values))
        data += struct.pack(f"<{len(values)}f", *values)
    path.write_bytes(data + (struct.pack("<ii8s", 3, 8, b"wiki.txt") if end is None else end))
    return path


WRITERS: dict[str, Callable[..., Path]] = {"gguf": gguf_imatrix, "dat": legacy_imatrix}


@pytest.fixture(params=WRITERS)
def write(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., ImatrixStats]:
    """An imatrix of these sums, in one of the two formats."""

    def make(sums: Mapping[str, Any], *arguments: Any, **options: Any) -> ImatrixStats:
        path = WRITERS[request.param](tmp_path / f"m.{request.param}", sums, *arguments, **options)
        return ImatrixStats(path, CONFIG)

    return make


# What is read


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "phi3", "gpt_neox", "gpt2"])
def test_what_qtool_wrote_comes_back(kind: str, make_model: Any, calibration_text: Path, tmp_path: Path) -> None:
    model = make_model(kind, dtype="float32")
    command = ["calibrate", str(model), "--data", str(calibration_text), "-q", *ROWS]
    assert run([*command, "-o", str(tmp_path / "stats")]) == 0
    assert run([*command, "-o", str(tmp_path / "m.gguf"), "--format", "imatrix"]) == 0
    checkpoint = Checkpoint(model)
    ours, theirs = (open_stats(tmp_path / name, checkpoint, {SQUARES}) for name in ("stats", "m.gguf"))
    assert isinstance(ours, SavedStats)
    assert isinstance(theirs, ImatrixStats)
    inputs = {linear: x.features for block in ours.blocks.values() for x in block for linear in x.linears}
    assert len(inputs) == 2 * len(ARCHITECTURES[kind].linears())
    theirs.check_inputs(inputs)
    ours.check_inputs(inputs)
    for linear in inputs:
        expected, found = (stats.stats(linear, {SQUARES}).moments(linear) for stats in (ours, theirs))
        assert (found.second_II, found.vectors, found.tokens) == (None, None, 384)
        torch.testing.assert_close(found.diagonal_I, expected.diagonal_I, rtol=1e-6, atol=0)
        assert torch.equal(expected.diagonal_I, ours.stats(linear, {VECTORS}).moments(linear).diagonal_I)
    assert theirs.data_record() == {**ours.data_record(), "sha256": theirs.sha256}
    theirs.check_tokenizer("of any tokens")


def test_sums_become_means(write: Callable[..., ImatrixStats]) -> None:
    stats = write({WEIGHT: [8.0, 2.0, 1.0], "blk.0.attn_q.weight": [4.0, 4.0], "output.weight": [1.0]})
    stats.check_inputs({LINEAR: 3, Q: 2})
    moments = stats.stats(LINEAR, {SQUARES}).moments(LINEAR)
    assert moments.diagonal_I.tolist() == [2.0, 0.5, 0.25]
    assert moments.diagonal_I.dtype == torch.float32
    assert moments.tokens == 4
    assert stats.stats(Q, {SQUARES}).moments(Q).diagonal_I.tolist() == [1.0, 1.0]


def test_data_record(tmp_path: Path) -> None:
    record = ImatrixStats(gguf_imatrix(tmp_path / "a.gguf", {WEIGHT: [1.0]}), CONFIG).data_record()
    assert record == {"source": "wiki.txt", "rows": 3, "tokens": 1536, "sha256": record["sha256"]}
    legacy = legacy_imatrix(tmp_path / "a.dat", {WEIGHT: [1.0]})
    unsaid = " (an imatrix that does not say how long its chunks are)"
    assert ImatrixStats(legacy, CONFIG).data_record()["source"] == "wiki.txt" + unsaid
    legacy_imatrix(legacy, {WEIGHT: [1.0]}, end=b"")  # the oldest ones end here
    assert ImatrixStats(legacy, CONFIG).data_record() | {"sha256": ""} == {
        "source": "a.dat" + unsaid, "rows": 0, "tokens": 0, "sha256": "",
    }  # fmt: skip


def test_legacy_sums_without_calls(tmp_path: Path) -> None:
    """llama.cpp takes them as they are."""
    stats = ImatrixStats(legacy_imatrix(tmp_path / "a.dat", {WEIGHT: [3.0, 1.0]}, calls=0), CONFIG)
    assert stats.stats(LINEAR, {SQUARES}).moments(LINEAR).diagonal_I.tolist() == [3.0, 1.0]


def test_columns_that_saw_nothing_count_a_little(write: Callable[..., ImatrixStats]) -> None:
    found = write({WEIGHT: [8.0, 0.0, 4.0, 0.0]}).stats(LINEAR, {SQUARES}).moments(LINEAR).diagonal_I
    assert found.tolist() == pytest.approx([2.0, 0.75 * imatrix.SMALLEST, 1.0, 0.75 * imatrix.SMALLEST])


# What is refused


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([1.0, float("nan"), float("inf")], "2 of its 3 sums of squares are negative or not finite"),
        ([1.0, -1e-9, 1.0], "1 of its 3 sums of squares are negative or not finite"),
        ([0.0, 0.0, 0.0], "all 3 sums of squares are zero"),
    ],
)
def test_values_that_no_input_has(values: list[float], said: str, write: Callable[..., ImatrixStats]) -> None:
    stats = write({WEIGHT: values})
    with pytest.raises(QtoolError) as error:
        stats.stats(LINEAR, {SQUARES})
    assert error.value.message == f"`{WEIGHT}` in {stats.path} says nothing of its inputs: {said}"


@pytest.mark.parametrize("count", [0.0, -3.0, float("nan"), float("inf"), 1e-30])
def test_counts_that_are_none(count: float, tmp_path: Path) -> None:
    stats = ImatrixStats(gguf_imatrix(tmp_path / "m.gguf", {WEIGHT: [1.0]}, count), CONFIG)
    with pytest.raises(QtoolError, match=r"its sums are those of .* tokens"):
        stats.stats(LINEAR, {SQUARES})


def test_another_model(write: Callable[..., ImatrixStats], tmp_path: Path) -> None:
    stats = write({WEIGHT: [1.0, 1.0]})
    for linears, said in (
        ({LINEAR: 2, Q: 2}, f"no `blk.0.attn_q.weight` is among its 1 weights, for `{Q}`"),
        ({LINEAR: 3}, f"`{WEIGHT}` has 2 columns, `{LINEAR}` 3 inputs"),
    ):
        with pytest.raises(QtoolError) as error:
            stats.check_inputs(linears)
        assert error.value.message == f"{stats.path} is an imatrix of another model: {said}"
    with pytest.raises(QtoolError, match=r"is an imatrix of another model: no `blk.0.attn_q.weight`"):
        stats.stats(Q, {SQUARES})
    experts = ImatrixStats(gguf_imatrix(tmp_path / "e.gguf", {WEIGHT: [1.0, 1.0]}, [2.0, 2.0]), CONFIG)
    with pytest.raises(QtoolError, match="is an imatrix of another model"):
        experts.check_inputs({LINEAR: 1})
    with pytest.raises(UsageError, match=r"llama.cpp has no architecture `opt`"):
        ImatrixStats(stats.path, {"model_type": "opt"})


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"second"}, "no second moments"),
        ({"vectors", "second"}, "no second moments and no ranges and means"),
        ({"kv"}, "no ranges of keys and values"),
    ],
)
def test_more_than_an_imatrix_has(wanted: set[str], said: str, tmp_path: Path) -> None:
    path = gguf_imatrix(tmp_path / "m.gguf", {WEIGHT: [1.0]})
    with pytest.raises(UsageError) as error:
        ImatrixStats(path, CONFIG, wanted)
    assert error.value.message == f"{path} is an imatrix, which has the mean squares of inputs only: {said}"
    assert "`qtool calibrate MODEL -o STATS --hessians`" in str(error.value.hint)


def test_files_that_are_no_imatrix(tmp_path: Path, make_model: Any) -> None:
    model = gguf_imatrix(tmp_path / "model.gguf", {WEIGHT: [1.0]}, kind="model")
    with pytest.raises(UsageError, match=r"model.gguf is a GGUF file of a model, not an imatrix"):
        ImatrixStats(model, CONFIG)
    halves = gguf.GGUFWriter(tmp_path / "half.gguf", "llama")
    halves.add_type("imatrix")
    halves.add_tensor(f"{WEIGHT}.in_sum2", np.ones((1, 4), np.float16))
    halves.add_tensor(f"{WEIGHT}.counts", np.ones((1, 1), np.float32))
    halves.write_header_to_file()
    halves.write_kv_data_to_file()
    halves.write_tensors_to_file()
    halves.close()
    with pytest.raises(QtoolError, match=f"has no sums and counts of `{WEIGHT}` as float32"):
        ImatrixStats(tmp_path / "half.gguf", CONFIG)
    with pytest.raises(UsageError, match=r"no such file: .*none.gguf"):
        open_stats(tmp_path / "none.gguf", Checkpoint(make_model()), {SQUARES})
    with pytest.raises(UsageError, match=r"no such folder: .*none"):
        open_stats(tmp_path / "none", Checkpoint(make_model()), {SQUARES})
    with pytest.raises(QtoolError, match="is damaged or not an imatrix"):
        ImatrixStats(make_model() / "model.safetensors", CONFIG)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: b"", "is empty, not an imatrix"),
        (lambda d: b"\0" * 4, "the number of entries 0 at byte 4 of 4"),
        (lambda d: struct.pack("<i", 2**30) + d[4:], "the number of entries 1073741824 at byte 4"),
        (lambda d: d[:4] + struct.pack("<i", -5) + d[8:], "the length of a name -5 at byte 8"),
        (lambda d: d[:4] + struct.pack("<i", 200) + d[8:], "a name of 200 bytes at byte 8"),
        (lambda d: d[:8] + b"\xff" + d[9:], "a name that is not UTF-8"),
        (lambda d: d[:33] + struct.pack("<i", 2**30) + d[37:], "of 4294967296 bytes at byte 37"),
        (lambda d: d[:33] + struct.pack("<i", -1) + d[37:], "the columns -1 at byte 37"),
        (lambda d: d + b"\0" * 3, "the number of chunks of 4 bytes at byte 45 of 48"),
    ],
)
def test_damaged_streams(change: Callable[[bytes], bytes], said: str, tmp_path: Path) -> None:
    path = legacy_imatrix(tmp_path / "m.dat", {WEIGHT: [1.0, 2.0]}, end=b"")
    assert len(path.read_bytes()) == 8 + len(WEIGHT) + 8 + 8 == 45
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(QtoolError) as error:
        ImatrixStats(path, CONFIG)
    assert said in error.value.message
    assert "\n" not in error.value.message


@pytest.mark.parametrize("suffix", WRITERS)
def test_files_cut_or_flipped_anywhere_end_in_one_line(suffix: str, tmp_path: Path) -> None:
    path = WRITERS[suffix](tmp_path / f"m.{suffix}", {WEIGHT: [1.0, 2.0], "blk.0.attn_q.weight": [1.0] * 4})
    whole = path.read_bytes()
    chance = random.Random(0)
    damaged = [whole[:size] for size in range(len(whole))]
    for _ in range(500):
        bits = bytearray(whole)
        bits[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        damaged.append(bytes(bits))
    messages = []
    for data in damaged:
        path.write_bytes(data)
        try:
            stats = ImatrixStats(path, CONFIG)
            stats.check_inputs({LINEAR: 2, Q: 4})
            for linear in (LINEAR, Q):
                assert stats.stats(linear, {SQUARES}).moments(linear).diagonal_I.isfinite().all()
            stats.data_record()
        except QtoolError as error:
            messages.append(error.message)
    assert len(messages) > len(whole) // 2
    assert not any("\n" in message for message in messages)


# What it is for


def test_rtn_with_statistics_of_either_kind(
    make_model: Any, calibration_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same weights from an imatrix as from our own statistics; what weighs more is rounded better."""
    model = make_model("llama", dtype="float32")
    data = ["--data", str(calibration_text), "-q", *ROWS]
    file = tmp_path / "m.imatrix.gguf"
    assert run(["calibrate", str(model), "-o", str(tmp_path / "stats"), *data]) == 0
    assert run(["calibrate", "--merge", str(tmp_path / "stats"), "--format", "imatrix", "-o", str(file), "-q"]) == 0
    reader = gguf.GGUFReader(file)
    sums = {x.name.removesuffix(".in_sum2"): x.data.flatten() for x in reader.tensors if x.name.endswith(".in_sum2")}
    legacy_imatrix(tmp_path / "m.dat", sums, 384)
    command = ["quantize", str(model), "--scheme", "int3-g32-sym", "--format", "qtool", "--method", "rtn", "-q"]
    made = {}
    for name in ("", "stats", "m.imatrix.gguf", "m.dat"):
        out = tmp_path / f"of-{name}-"
        assert run([*command, "-o", str(out), *(["--stats", str(tmp_path / name)] if name else [])]) == 0
        made[name] = load_file(out / "model.safetensors")
    assert all(torch.equal(made["stats"][name], made["m.imatrix.gguf"][name]) for name in made["stats"])
    assert all(torch.equal(made["m.dat"][name], made["m.imatrix.gguf"][name]) for name in made["stats"])
    weight_OI = load_file(model / "model.safetensors")[f"{LINEAR}.weight"]
    importance_I = ImatrixStats(file, CONFIG).stats(LINEAR, {SQUARES}).moments(LINEAR).diagonal_I
    grid = grid_of(QuantScheme.parse("int3-g32-sym"), torch.bfloat16)
    expected = grid.nearest(weight_OI, grid.fit(weight_OI, importance_I))
    codes = [name for name in made["stats"] if name.startswith(LINEAR)]
    assert any(not torch.equal(made[""][name], made["stats"][name]) for name in codes)
    assert expected.dequantize().sub(weight_OI).square().mul(importance_I).sum() < grid.nearest(
        weight_OI, grid.fit(weight_OI)
    ).dequantize().sub(weight_OI).square().mul(importance_I).sum()  # fmt: skip
    manifest = json.loads((tmp_path / "of-m.imatrix.gguf-" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["report"]["data"]["sha256"] == ImatrixStats(file, CONFIG).sha256
    assert run([*command, "-o", str(tmp_path / "again"), "--stats", str(file), "--method", "gptq"]) == 2
    assert "which has the mean squares of inputs only: no second moments" in capsys.readouterr().err
