"""GPTQ and AWQ: a second, naive unpacker agrees, unpacking is the inverse, and gptqmodel reads and writes the same."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtool.checkpoint.reader import Checkpoint
from qtool.errors import QtoolError, UsageError
from qtool.formats import Contents, Format
from qtool.formats.awq import AWQ
from qtool.formats.gptq import GPTQ, GPTQv2
from qtool.numerics.grid import GridParams, QTensor, grid_of
from qtool.scheme import KV_SCHEMES, QuantScheme

V1, V2, GEMM = GPTQ(), GPTQv2(), AWQ()
SAFETENSORS = {torch.int32: "I32", torch.float16: "F16"}
GPTQ_SCHEMES = [
    f"int{bits}-{granularity}-{symmetry}"
    for bits, granularity, symmetry in itertools.product((2, 3, 4, 8), ("channel", "g16", "g32"), ("sym", "asym"))
]
AWQ_SCHEMES = ["int4-g16-sym", "int4-g16-asym", "int4-g32-asym"]
CASES = [(V1, s) for s in GPTQ_SCHEMES] + [(V2, s) for s in GPTQ_SCHEMES] + [(GEMM, s) for s in AWQ_SCHEMES]
LLAMA = [
    f"model.layers.{i}.{name}"
    for i in range(12)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                 "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
]  # fmt: skip
WITH_GPTQMODEL = pytest.mark.skipif(find_spec("gptqmodel") is None, reason="gptqmodel is not installed")


def make_qtensor(scheme: str, out: int, inputs: int, seed: int = 0) -> QTensor:
    """Any codes and parameters that the grid could give: symmetric scales of both signs, all zero points."""
    parsed, generator = QuantScheme.parse(scheme), torch.Generator().manual_seed(seed)
    shape = (out, parsed.groups(inputs))
    scale = (0.01 * torch.randn(shape, generator=generator)).half()
    codes = torch.randint(0, 2**parsed.bits, (out, inputs), generator=generator, dtype=torch.uint8)
    if parsed.symmetric:
        return QTensor(codes, GridParams(scale), parsed)
    zero = torch.randint(0, 2**parsed.bits, shape, generator=generator).float()
    return QTensor(codes, GridParams(scale.abs(), zero), parsed)


def assert_same(ours: QTensor, other: QTensor) -> None:
    assert ours.scheme == other.scheme
    for mine, theirs in zip(ours.tensors(), other.tensors(), strict=True):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        assert torch.equal(mine, theirs), f"{int((mine != theirs).sum())} of {mine.numel()} differ"
    assert torch.equal(ours.dequantize(), other.dequantize())


def bit_field(words: list[int], bits: int, i: int) -> int:
    """Code i of a stream of words, low bits first."""
    stream = sum((word % 2**32) << (32 * w) for w, word in enumerate(words))
    return stream >> (bits * i) & 2**bits - 1


def naive_gptq(tensors: dict[str, Tensor], bits: int, version: int) -> Tensor:
    """W[n, k] = scales[g_idx[k], n] (q[k, n] - z[g_idx[k], n]), one weight at a time."""
    qweight, qzeros, scales, g_idx = (tensors[f"m.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx"))
    weight = torch.empty(qweight.shape[1], len(g_idx))
    for n, k in itertools.product(range(qweight.shape[1]), range(len(g_idx))):
        group = int(g_idx[k])
        zero = bit_field(qzeros[group].tolist(), bits, n) + (version == 1)
        code = bit_field(qweight[:, n].tolist(), bits, k)
        weight[n, k] = scales[group, n].float() * (code - zero)
    return weight


def naive_awq(tensors: dict[str, Tensor], inputs: int, group: int) -> Tensor:
    qweight, qzeros, scales = (tensors[f"m.{part}"] for part in ("qweight", "qzeros", "scales"))
    place = {output: i for i, output in enumerate([0, 2, 4, 6, 1, 3, 5, 7])}
    weight = torch.empty(scales.shape[1], inputs)
    for n, k in itertools.product(range(scales.shape[1]), range(inputs)):
        shift = 4 * place[n % 8]
        code, zero = (int(x[n // 8]) % 2**32 >> shift & 15 for x in (qweight[k], qzeros[k // group]))
        weight[n, k] = scales[k // group, n].float() * (code - zero)
    return weight


@given(case=st.sampled_from(CASES), out=st.integers(1, 3), groups=st.integers(1, 3), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=150)
def test_packing_and_its_inverse(case: tuple[Format, str], out: int, groups: int, seed: int) -> None:
    format, scheme = case
    shape = 32 * out, 32 * groups
    weight = make_qtensor(scheme, *shape, seed)
    assert format.problem(weight.scheme, shape) is None
    packed = format.pack("m", weight)
    layout = {t.name: (t.dtype, t.shape) for t in format.layout("m", weight.scheme, shape, format.scale_dtype("BF16"))}
    assert layout == {name: (SAFETENSORS[t.dtype], tuple(t.shape)) for name, t in packed.items()}
    assert all(t.stride() == torch.empty(t.shape).stride() for t in packed.values())
    assert {name.removeprefix("m") for name in packed} == set(format.parts)
    assert_same(format.unpack("m", {**packed, "m.bias": torch.zeros(1)}, weight.scheme), weight)
    assert format.held(weight, "BF16") is weight, "nothing is lost"


@pytest.mark.parametrize(("format", "scheme"), [case for case in CASES if case[1][5:8] != "g32"])
def test_a_naive_unpacker_agrees(format: Format, scheme: str) -> None:
    weight = make_qtensor(scheme, 32, 32)
    packed = format.pack("m", weight)
    if format is GEMM:
        naive = naive_awq(packed, 32, 16)
    else:
        naive = naive_gptq(packed, weight.scheme.bits, 1 if format is V1 else 2)
    assert torch.equal(naive, weight.dequantize())


def test_worked_examples_with_their_bits() -> None:
    """Codes 0..7 and 15..8 of two of eight outputs; zeros 8 (stored 7 in version 1)."""
    codes = torch.zeros(8, 16, dtype=torch.uint8)
    codes[1], codes[7] = torch.arange(16), torch.arange(15, -1, -1)
    weight = QTensor(codes, GridParams(torch.full((8, 1), 0.5).half()), QuantScheme.parse("int4-channel-sym"))
    packed = {name: t.tolist() for name, t in V1.pack("m", weight).items()}
    assert [word % 2**32 for word in packed["m.qweight"][0]] == [0, 0x76543210, 0, 0, 0, 0, 0, 0x89ABCDEF]
    assert [word % 2**32 for word in packed["m.qweight"][1]] == [0, 0xFEDCBA98, 0, 0, 0, 0, 0, 0x01234567]
    assert packed["m.qzeros"] == [[0x77777777]]
    assert packed["m.scales"] == [[0.5] * 8]
    assert packed["m.g_idx"] == [0] * 16
    assert V2.pack("m", weight)["m.qzeros"].tolist() == [[0x88888888 - 2**32]]
    for bits, stored in ((2, 0x55555555), (8, 0x7F7F7F7F)):
        weight = make_qtensor(f"int{bits}-channel-sym", 16, 16)
        assert set(V1.pack("m", weight)["m.qzeros"].flatten().tolist()) == {stored}
    weight = make_qtensor("int3-channel-sym", 32, 32)  # zeros of 4, stored as 3: 011 011 ... across words
    assert [w % 2**32 for w in V1.pack("m", weight)["m.qzeros"][0].tolist()] == [0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D]
    awq = QTensor(
        torch.arange(8, dtype=torch.uint8)[:, None].repeat(1, 16),
        GridParams(torch.ones(8, 1).half(), torch.arange(8, 16)[:, None].float()),
        QuantScheme.parse("int4-g16-asym"),
    )
    packed = {name: t.tolist() for name, t in GEMM.pack("m", awq).items()}
    assert packed["m.qweight"] == [[0x75316420]] * 16  # from the low bits: outputs 0 2 4 6 1 3 5 7
    assert [word % 2**32 for word in packed["m.qzeros"][0]] == [0xFDB9ECA8]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_version_1_never_stores_a_zero_that_readers_take_differently(bits: int) -> None:
    """One reader adds one to each field, the other to whole words: the same where no field is full."""
    weight = make_qtensor(f"int{bits}-g16-asym", 64, 64)
    assert weight.params.zero is not None
    weight.params.zero[:, ::2] = 0
    packed = V1.pack("m", weight)
    fields = [bit_field(row.tolist(), bits, n) for row in packed["m.qzeros"] for n in range(64)]
    assert max(fields) < 2**bits - 1
    assert bool((packed["m.scales"][::2] <= 0).all()), "a zero of 0 stands upside down"
    assert torch.equal(naive_gptq(packed, bits, 1), weight.dequantize())
    assert_same(V1.unpack("m", packed, weight.scheme), weight)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_version_1_zeros_that_borrowed_from_their_neighbours(bits: int) -> None:
    """gptqmodel takes one from all fields of a word at once, so that a zero of 0 borrows, and adds it back."""
    weight = make_qtensor(f"int{bits}-g16-asym", 64, 32)
    packed = V2.pack("m", weight)
    ones = sum(1 << shift for shift in range(0, 32, bits))
    words = [[(word - ones + 2**31) % 2**32 - 2**31 for word in row] for row in packed["m.qzeros"].tolist()]
    packed["m.qzeros"] = torch.tensor(words, dtype=torch.int32)
    assert_same(V1.unpack("m", packed, weight.scheme), weight)


def test_negative_scales_of_others_keep_their_values() -> None:
    weight = make_qtensor("int4-g16-asym", 16, 64)
    weight = replace(weight, params=weight.params._replace(scale=-weight.params.scale))
    held = V1.held(weight, "F16")
    assert bool((held.params.scale >= 0).all())
    assert torch.equal(held.dequantize(), weight.dequantize())
    for format in (V1, V2, GEMM):
        kept = format.held(weight, "F16")
        assert_same(format.unpack("m", format.pack("m", kept), weight.scheme), kept)
        assert torch.equal(kept.dequantize(), weight.dequantize())


def test_what_cannot_be_stored() -> None:
    def cause(format: Format, scheme: str, shape: tuple[int, int] | None = None) -> str:
        return format.problem(QuantScheme.parse(scheme), shape) or ""

    for scheme in ("int5-g32-sym", "nvfp4", "q4_0", "fp8-e4m3-channel", "int6-channel-asym"):
        assert "2, 3, 4 or 8 bits" in cause(V1, scheme)
    assert "outliers" in cause(V1, "int3-g64-sym+outliers-0.5%")
    assert "inputs are rounded" in cause(V2, "w4a8")
    assert "not one for the tensor" in cause(V1, "int4-tensor-sym")
    assert "16, 32, 64, 128, 256, 512 or 1024" in cause(V1, "int4-g48-sym")
    assert cause(V1, "int4-g32-sym", (64, 68)) == "68 inputs are not a multiple of 8, which share a word"
    assert cause(V1, "int3-g16-sym", (48, 48)) == (
        "48 outputs and 48 inputs are not a multiple of 32, which share a word"
    )
    assert cause(V1, "int8-channel-sym", (62, 64)) == "62 outputs are not a multiple of 4, which share a word"
    assert cause(V1, "int2-g16-asym", (48, 48)) == ""
    assert "4 bits" in cause(GEMM, "int8-g32-sym")
    assert "whole row" in cause(GEMM, "int4-channel-sym")
    assert "16, 32, 64 or 128" in cause(GEMM, "int4-g256-sym")
    assert cause(GEMM, "int4-g32-sym", (12, 32)) == "12 outputs are not a multiple of 8, which share a word"
    order = torch.arange(2, dtype=torch.int32).repeat(16)
    for format in (V1, V2, GEMM):
        with pytest.raises(QtoolError, match="act-order"):
            format.pack("m", replace(make_qtensor("int4-g16-sym", 8, 32), group_of=order))


def test_who_reads_it() -> None:
    def readers(format: Format, scheme: str, shape: tuple[int, int] | None = (128, 256)) -> str:
        return format.readers(QuantScheme.parse(scheme), shape)

    for format in (V1, V2):
        for scheme in ("int4-g128-sym", "int8-channel-sym", "int4-g32-sym"):
            assert readers(format, scheme) == "vLLM, SGLang, transformers (with gptqmodel and optimum)"
            assert "vLLM" in readers(format, scheme, None)
        for scheme, shape in (("int4-g128-sym", (96, 256)), ("int4-g32-sym", (64, 64)), ("int4-g256-sym", (64, 256)),
                              ("int3-g32-sym", (64, 256)), ("int2-channel-sym", (64, 256))):  # fmt: skip
            assert readers(format, scheme, shape) == "transformers (with gptqmodel and optimum)"
    assert "gptq-v2" in readers(V1, "int4-g128-asym")
    assert readers(V2, "int4-g128-asym") == "transformers (with gptqmodel and optimum)"
    assert "vLLM, SGLang" in readers(GEMM, "int4-g128-asym")
    assert "vLLM" not in readers(GEMM, "int4-g16-asym")
    assert "vLLM" not in readers(GEMM, "int4-g32-asym", (40, 64))


def test_the_plain_config() -> None:
    schemes = dict.fromkeys(LLAMA, QuantScheme.parse("int4-g128-sym"))
    entry = V1.config(Contents(schemes, ["lm_head", "model.embed_tokens"]))
    assert entry == {
        "quant_method": "gptq", "checkpoint_format": "gptq", "bits": 4, "group_size": 128, "sym": True,
        "desc_act": False, "lm_head": False, "pack_dtype": "int32",
    }  # fmt: skip
    assert V1.files(entry) == {"quantize_config.json": entry}
    entry = V2.config(Contents({**dict.fromkeys(LLAMA, QuantScheme.parse("int2-channel-asym"))}, ["lm_head"]))
    assert (entry["checkpoint_format"], entry["quant_method"]) == ("gptq_v2", "gptq")
    assert (entry["bits"], entry["group_size"], entry["sym"]) == (2, -1, False)
    assert V1.config(Contents({**schemes, "lm_head": QuantScheme.parse("int4-g128-sym")}, []))["lm_head"] is True
    entry = GEMM.config(Contents(schemes, ["lm_head", "model.layers.3.router"]))
    assert entry == {
        "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 128, "zero_point": True, "lm_head": False,
        "modules_to_not_convert": ["lm_head", "model.layers.3.router"],
        "dynamic": {r"-:model\.layers\.\d+\.router$": {}},
    }  # fmt: skip
    assert GEMM.files(entry) == {}
    with pytest.raises(UsageError, match="32 and 128"):
        GEMM.config(Contents({**schemes, "a": QuantScheme.parse("int4-g32-asym")}, []))
    with pytest.raises(UsageError, match=r"cannot leave `model\.layers\.1\.mlp` alone"):
        GEMM.config(Contents(schemes, ["model.layers.1.mlp"]))
    for format in (V1, GEMM):
        with pytest.raises(UsageError, match="keys and values"):
            format.quantization_config(Contents(schemes, [], KV_SCHEMES["fp8"]))


def chosen_by_vllm(dynamic: dict[str, dict[str, Any]], module: str) -> Any:
    """The first rule whose pattern matches from the start; False for modules left alone."""
    for text, change in dynamic.items():
        if re.match(text[2:], module):
            return False if text.startswith("-:") else change
    return None


def test_several_schemes_in_one_checkpoint() -> None:
    four, eight = QuantScheme.parse("int4-g128-sym"), QuantScheme.parse("int8-channel-sym")
    schemes = dict.fromkeys(LLAMA, four)
    schemes |= {m: eight for m in LLAMA if m.endswith("down_proj") or ".1.self_attn" in m}
    left = [m for m in LLAMA if ".11." in m or m == "model.layers.2.mlp.down_proj"]
    schemes = {m: s for m, s in schemes.items() if m not in left}
    entry = V1.config(Contents(schemes, [*left, "lm_head"]))
    assert (entry["bits"], entry["group_size"]) == (4, 128)
    for module in LLAMA:
        rule = chosen_by_vllm(entry["dynamic"], module)
        expected: Any = {"bits": 8, "group_size": -1, "sym": True} if schemes.get(module) == eight else None
        assert rule == (False if module in left else expected), module
    joined = {i: chosen_by_vllm(entry["dynamic"], f"model.layers.{i}.self_attn.qkv_proj") for i in (0, 1, 11)}
    assert joined == {0: None, 1: {"bits": 8, "group_size": -1, "sym": True}, 11: False}
    assert chosen_by_vllm(entry["dynamic"], "model.layers.11.mlp.gate_up_proj") is False
    assert entry["modules_in_block_to_quantize"] == [list(schemes)], "`mlp.down_proj` would name one left alone"
    left = [m for m in LLAMA if m.endswith("down_proj")]
    entry = V1.config(Contents({m: four for m in LLAMA if m not in left}, left))
    assert entry["dynamic"] == {r"-:model\.layers\.\d+\.mlp\.down_proj$": {}}
    assert entry["modules_in_block_to_quantize"] == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"]
    ]


def write(folder: Path, tensors: dict[str, Tensor], entry: Any) -> Checkpoint:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": entry}))
    return Checkpoint(folder)


def format_for(checkpoint: Checkpoint) -> Format:
    entry = checkpoint.config["quantization_config"]
    return GEMM if entry["quant_method"] == "awq" else V1.version_of(entry)


def read(checkpoint: Checkpoint) -> dict[str, QTensor]:
    """Every quantized module of a checkpoint; its shape must be what its header said."""
    format, found = format_for(checkpoint), {}
    for module, (scheme, shape) in format.modules(checkpoint).items():
        names = [module + part for part in format.parts if module + part in checkpoint.tensors]
        found[module] = format.unpack(module, dict(checkpoint.read_many(names)), scheme)
        assert tuple(found[module].codes.shape) == shape
    return found


@given(
    chosen=st.dictionaries(st.sampled_from(LLAMA[:28]), st.sampled_from(GPTQ_SCHEMES), min_size=1),
    version=st.sampled_from([V1, V2]),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_schemes_come_back_from_a_checkpoint(
    chosen: dict[str, str], version: Format, seed: int, tmp_path: Path
) -> None:
    weights = {module: make_qtensor(scheme, 64, 32, seed + i) for i, (module, scheme) in enumerate(chosen.items())}
    tensors = {name: t for module, w in weights.items() for name, t in version.pack(module, w).items()}
    left = [module for module in LLAMA[:28] if module not in chosen]
    tensors |= {f"{module}.weight": torch.ones(2, 2) for module in left}
    entry = version.config(Contents({module: w.scheme for module, w in weights.items()}, [*left, "lm_head"]))
    checkpoint = write(tmp_path, tensors, entry)
    assert format_for(checkpoint).name == version.name
    found = read(checkpoint)
    assert found.keys() == weights.keys()
    for module, weight in weights.items():
        assert_same(found[module], weight)


def test_awq_from_a_checkpoint(tmp_path: Path) -> None:
    weights = {"a.0.b": make_qtensor("int4-g32-asym", 24, 64), "a.1.b": make_qtensor("int4-g32-sym", 8, 32)}
    tensors = {name: t for module, w in weights.items() for name, t in GEMM.pack(module, w).items()}
    entry = GEMM.config(Contents({module: w.scheme for module, w in weights.items()}, []))
    found = read(write(tmp_path, tensors, entry))
    assert_same(found["a.0.b"], weights["a.0.b"])
    assert found["a.1.b"].scheme == QuantScheme.parse("int4-g32-asym"), "only the data would tell"
    assert torch.equal(found["a.1.b"].dequantize(), weights["a.1.b"].dequantize())
    old = {"quant_method": "awq", "version": "GEMM", "w_bit": 4, "q_group_size": 32, "zero_point": False}
    assert_same(read(write(tmp_path, GEMM.pack("b", weights["a.1.b"]), old))["b"], weights["a.1.b"])
    channel = make_qtensor("int4-channel-asym", 8, 48)
    entry["group_size"] = -1
    assert_same(read(write(tmp_path, GEMM.pack("b", channel), entry))["b"], channel)
    with pytest.raises(QtoolError, match=r"`b\.qzeros` has \d+ zero points other than 8"):
        read(write(tmp_path, GEMM.pack("b", weights["a.0.b"]), old))


def test_what_older_programs_wrote(tmp_path: Path) -> None:
    """No checkpoint_format, no g_idx or one of zeros, no `sym`; `format` in place of `checkpoint_format`."""
    weight = make_qtensor("int4-g16-sym", 16, 64)
    entry = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True, "desc_act": False, "damp_percent": 0.1,
             "model_name_or_path": None, "model_file_base_name": None, "is_marlin_format": False}  # fmt: skip
    packed = V1.pack("m", weight)
    assert_same(read(write(tmp_path, packed, entry))["m"], weight)
    assert_same(read(write(tmp_path, {**packed, "m.g_idx": torch.zeros(64, dtype=torch.int32)}, entry))["m"], weight)
    del packed["m.g_idx"]
    assert_same(read(write(tmp_path, packed, entry))["m"], weight)
    assert_same(read(write(tmp_path, V2.pack("m", weight), {**entry, "format": "gptq_v2"}))["m"], weight)
    del entry["sym"]
    found = read(write(tmp_path, packed, entry))["m"]
    assert found.scheme == QuantScheme.parse("int4-g16-asym")
    assert torch.equal(found.dequantize(), weight.dequantize())
    packed = {f"a.{name}": tensor for name, tensor in packed.items()}
    rules = {"-:m": {}, ".*n$": {"group_size": 32, "damp_percent": 0.2}, "+:a": {"sym": True}, "a.m": {"bits": 8}}
    assert_same(read(write(tmp_path, packed, {**entry, "dynamic": rules}))["a.m"], weight)


@pytest.mark.parametrize("version", [V1, V2])
@pytest.mark.parametrize("scheme", ["int4-g16-sym", "int3-g16-asym"])
def test_act_order(version: Format, scheme: str, tmp_path: Path) -> None:
    weight = make_qtensor(scheme, 32, 64)
    packed = version.pack("m", weight)
    packed["m.g_idx"] = packed["m.g_idx"][torch.randperm(64, generator=torch.Generator().manual_seed(1))]
    entry = {**(version.config(Contents({"m": weight.scheme}, [])) or {}), "desc_act": True}
    found = read(write(tmp_path, packed, entry))["m"]
    assert found.group_of is not None
    assert torch.equal(found.group_of, packed["m.g_idx"])
    assert torch.equal(found.dequantize(), naive_gptq(packed, weight.scheme.bits, 1 if version is V1 else 2))


def put(name: str, tensor: Tensor | None) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    def change(tensors: dict[str, Tensor], entry: dict[str, Any]) -> None:
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor

    return change


def say(**said: Any) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda tensors, entry: entry.update(said)


def words(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


DAMAGES = {
    "bits": (V1, say(bits=5), "have 5 bits: 2, 3, 4 or 8 are read"),
    "bits that are no number": (V1, say(bits="4"), "have '4' bits"),
    "no bits": (GEMM, say(bits=None), "have None bits: 4 are read"),
    "other bits": (V1, say(bits=8), "m.qzeros"),
    "group size": (V1, say(group_size=0), "0 weights share a scale"),
    "true groups": (V1, say(group_size=True), "True weights share a scale"),
    "another group size": (V1, say(group_size=32), "m.qzeros"),
    "a group that does not divide": (V1, say(group_size=24), "64 inputs are not a multiple of 24"),
    "sym": (V1, say(sym="yes"), "'yes'"),
    "not symmetric": (V1, put("m.qzeros", words(4, 2)), "zero points other than 8"),
    "marlin": (V1, say(checkpoint_format="marlin"), "`marlin`"),
    "old marlin": (V1, say(is_marlin_format=True), "`marlin`"),
    "planar": (V1, say(checkpoint_format="gptq_p"), "`gptq_p`"),
    "packed into bytes": (V1, say(pack_dtype="int8"), "int8"),
    "dynamic": (V1, say(dynamic=[1]), "`dynamic`"),
    "no settings": (V1, say(dynamic={"+:m": 3}), "`dynamic`"),
    "no pattern": (V1, say(dynamic={"+:(": {}}), "the pattern `(`: missing )"),
    "left alone": (V1, say(dynamic={"-:m": {}}), "left alone"),
    "dynamic bits": (V2, say(dynamic={"m": {"bits": []}}), "have [] bits"),
    "no qweight": (V1, put("m.qweight", None), "has qzeros but no qweight"),
    "no qzeros": (V2, put("m.qzeros", None), "m.qzeros"),
    "no scales": (GEMM, put("m.scales", None), "m.scales"),
    "integer scales": (V1, put("m.scales", words(4, 16)), "m.scales"),
    "fewer scales": (V1, put("m.scales", torch.ones(3, 16).half()), "m.scales"),
    "flat qweight": (V1, put("m.qweight", words(128)), "impossible shape"),
    "no columns": (V1, put("m.qweight", words(2**40, 0)), "impossible shape"),
    "no rows": (GEMM, put("m.qweight", words(0, 2)), "impossible shape"),
    "3 bits in 4 words": (V1, lambda t, e: (t.update({"m.qweight": words(4, 16)}), e.update(bits=3)), "impossible"),
    "bytes": (GEMM, put("m.qweight", torch.zeros(64, 2, dtype=torch.int8)), "m.qweight"),
    "short g_idx": (V1, put("m.g_idx", words(63)), "m.g_idx"),
    "g_idx outside": (V1, put("m.g_idx", words(64) + 4), "into each of 4 groups"),
    "negative g_idx": (V1, put("m.g_idx", words(64) - 1), "into each of 4 groups"),
    "uneven g_idx": (V1, put("m.g_idx", torch.arange(64).clamp(max=3).int()), "into each of 4 groups"),
    "gemv": (GEMM, say(version="gemv"), "`gemv`"),
    "llm-awq": (GEMM, say(backend="llm-awq"), "`llm-awq`"),
    "zero_point": (GEMM, say(zero_point=8), "8 where it should say"),
}  # fmt: skip


IN_THE_DATA = {"not symmetric", "g_idx outside", "negative g_idx", "uneven g_idx"}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints(damage: str, tmp_path: Path) -> None:
    format, change, words = DAMAGES[damage]
    weight = make_qtensor("int4-g16-sym", 16, 64)
    tensors, entry = format.pack("m", weight), format.config(Contents({"m": weight.scheme}, [])) or {}
    change(tensors, entry)
    checkpoint = write(tmp_path, tensors, entry)
    with pytest.raises(QtoolError) as caught:
        read(checkpoint) if damage in IN_THE_DATA else format_for(checkpoint).modules(checkpoint)
    assert words in caught.value.message
    assert "\n" not in caught.value.message


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 2**70), st.floats(), st.text(max_size=3),
    st.sampled_from([2, 3, 4, 8, 16]), st.lists(st.integers(0, 9), max_size=2),
    st.dictionaries(st.text("+-:m.*(a", max_size=4), st.dictionaries(st.sampled_from(["bits", "sym"]), st.integers())),
)  # fmt: skip
KEYS = ["bits", "group_size", "sym", "dynamic", "checkpoint_format", "format", "pack_dtype", "version", "zero_point"]
SHAPES = st.lists(st.sampled_from([0, 1, 2, 4, 8, 16, 64, 96]), max_size=3)


@given(
    format=st.sampled_from([V1, V2, GEMM]),
    said=st.dictionaries(st.sampled_from(KEYS), JUNK, max_size=3),
    shapes=st.dictionaries(st.sampled_from(["m.qweight", "m.qzeros", "m.scales", "m.g_idx"]), SHAPES, max_size=2),
    dtype=st.sampled_from([torch.int32, torch.float16, torch.float32, torch.uint8, torch.int64]),
)
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_of_any_kind_is_one_line(
    format: Format, said: dict[str, Any], shapes: dict[str, list[int]], dtype: torch.dtype, tmp_path: Path
) -> None:
    weight = make_qtensor("int4-g16-sym", 16, 64)
    tensors, entry = format.pack("m", weight), {**(format.config(Contents({"m": weight.scheme}, [])) or {}), **said}
    tensors |= {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
    checkpoint, message = write(tmp_path, tensors, entry), ""
    try:
        assert read(checkpoint)["m"].dequantize().numel() > 0
    except QtoolError as error:
        message = error.message
    assert "\n" not in message


def peer(folder: Path, *arguments: str) -> None:
    """Run gptqmodel_peer.py; gptqmodel writes its logs to the folder that it runs in."""
    command = [sys.executable, Path(__file__).with_name("gptqmodel_peer.py"), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def dense_logits(source: Path, out: Path, weights: dict[str, Tensor]) -> Tensor:
    """The logits of a model with these weights, in float16."""
    from gptqmodel_peer import TOKENS
    from transformers import AutoModelForCausalLM

    shutil.copytree(source, out)
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, **{f"{m}.weight": w.half() for m, w in weights.items()}}, out / "model.safetensors")
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float16)(TOKENS).logits


def write_model(source: Path, out: Path, format: Format, schemes: dict[str, str]) -> dict[str, Tensor]:
    """A model in this format, its layers in the scheme of the ending that fits; returns what they are worth."""
    shutil.copytree(source, out)
    tensors = load_file(source / "model.safetensors")
    weights: dict[str, QTensor] = {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        module = name.removesuffix(".weight")
        scheme = next((scheme for ending, scheme in schemes.items() if module.endswith(ending)), "")
        if scheme:
            weight, parsed = tensors.pop(name).float(), QuantScheme.parse(scheme)
            if not parsed.symmetric:
                weight[::5] = weight[::5].abs() + 0.01  # zero points of 0
            grid = grid_of(parsed, torch.float16)
            weights[module] = format.held(grid.nearest(weight, grid.fit(weight)), "F16")
            assert format.problem(parsed, tuple(weight.shape)) is None
            tensors |= format.pack(module, weights[module])
    left = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight") and tensors[name].dim() == 2]
    entry = format.config(Contents({module: weight.scheme for module, weight in weights.items()}, left)) or {}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    for name, tree in {"config.json": {**config, "quantization_config": entry}, **format.files(entry)}.items():
        (out / name).write_text(json.dumps(tree))
    return {module: weight.dequantize() for module, weight in weights.items()}


WRITTEN: dict[str, tuple[Format, dict[str, str]]] = {
    **{f"v1-{bits}": (V1, {"": f"int{bits}-g32-sym"}) for bits in (2, 3, 4, 8)},
    **{f"v2-{bits}": (V2, {"": f"int{bits}-g16-asym"}) for bits in (2, 3, 4, 8)},
    "v1-asym-3": (V1, {"": "int3-g32-asym"}),
    "v1-asym-4": (V1, {"": "int4-g32-asym"}),
    "v2-sym": (V2, {"": "int4-channel-sym"}),
    "v1-left": (V1, {"down_proj": "", "": "int4-g32-sym"}),
    "v2-mixed": (V2, {"1.mlp.down_proj": "int8-g64-asym", "q_proj": "int3-channel-sym", "0.self_attn.o_proj": "",
                      "": "int4-g32-sym"}),
    "awq-sym": (GEMM, {"": "int4-g32-sym"}),
    "awq-asym": (GEMM, {"": "int4-g16-asym"}),
    "awq-left": (GEMM, {"0.mlp.down_proj": "", "": "int4-g32-asym"}),
}  # fmt: skip
ALONE = [name for name in WRITTEN if not name.startswith("v1-asym")]  # which gptqmodel refuses from others
WITH_TRANSFORMERS = ["v1-3", "v1-asym-3", "v1-asym-4", "v2-4", "v1-left", "awq-asym", "awq-left"]


@pytest.mark.parametrize(("program", "names"), [("load", ALONE), ("transformers", WITH_TRANSFORMERS)])
@pytest.mark.peer
@pytest.mark.slow
@pytest.mark.timeout(1200)
@WITH_GPTQMODEL
def test_gptqmodel_reads_what_we_write(program: str, names: list[str], make_model: Any, tmp_path: Path) -> None:
    """The same weights to the last bit, and logits to the rounding of float16."""
    if program == "transformers" and find_spec("optimum") is None:
        pytest.skip("optimum is not installed")
    source = make_model("llama", dtype="float16", tied=False, attention_bias=True, mlp_bias=True)
    weights = {name: write_model(source, tmp_path / name, *WRITTEN[name]) for name in names}
    peer(tmp_path, program, *(str(tmp_path / name) for name in names))
    for name in names:
        found = load_file(tmp_path / name / "peer.safetensors")
        logits = found.pop("logits")
        assert found.keys() == weights[name].keys(), name
        for module, weight in weights[name].items():
            gap = (found[module].float() - weight).abs()
            assert torch.equal(found[module], weight.half()), f"{name} {module}: max {gap.max()}, mean {gap.mean()}"
        ours = dense_logits(source, tmp_path / f"dense-{name}", weights[name])
        gap = (logits.float() - ours.float()).abs().max() / ours.float().std()
        assert gap < 0.02, f"{name}: {gap}"


MADE: dict[str, dict[str, Any]] = {
    "order": {"method": "gptq", "bits": 4, "group_size": 16, "sym": True, "desc_act": True, "act_group_aware": False},
    "order-asym": {"method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": True,
                   "act_group_aware": False},
    "v2": {"method": "gptq", "bits": 2, "group_size": 32, "sym": False, "desc_act": False, "format": "gptq_v2"},
    "mixed": {"method": "gptq", "bits": 3, "group_size": 32, "sym": False, "desc_act": False,
              "dynamic": {"+:.*down_proj": {"bits": 8, "group_size": 64}, "-:.*o_proj": {}}},
    "awq": {"method": "awq", "bits": 4, "group_size": 32, "sym": False},
    "awq-sym": {"method": "awq", "bits": 4, "group_size": 32, "sym": True},
}  # fmt: skip


@pytest.mark.peer
@pytest.mark.slow
@pytest.mark.timeout(1200)
@WITH_GPTQMODEL
def test_we_read_what_gptqmodel_makes(make_model: Any, tmp_path: Path) -> None:
    """Weights of one sign too, whose zero point of 0 borrows from its neighbours in version 1."""
    source = tmp_path / "source"  # gptqmodel's AWQ wants multiples of 64 outputs
    shutil.copytree(make_model("llama", dtype="float16", tied=False, hidden_size=128, intermediate_size=256), source)
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[name][::5] = tensors[name][::5].abs() + 0.01
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    jobs = [text for name, options in MADE.items() for text in (str(tmp_path / name), json.dumps(options))]
    peer(tmp_path, "quantize", str(source), *jobs)
    peer(tmp_path, "load", *(str(tmp_path / name) for name in MADE))
    for name, options in MADE.items():
        found = load_file(tmp_path / name / "peer.safetensors")
        checkpoint = Checkpoint(tmp_path / name)
        weights = read(checkpoint)
        assert weights.keys() == found.keys() - {"logits"}
        assert all((weight.group_of is not None) == ("order" in name) for weight in weights.values())
        for module, weight in weights.items():
            down = name == "mixed" and module.endswith("down_proj")
            assert weight.scheme.bits == (8 if down else options["bits"])
            assert weight.scheme.group_size == (64 if down else options["group_size"])
            assert weight.scheme.symmetric == options["sym"]
            gap = (found[module].float() - weight.dequantize()).abs()
            assert torch.equal(found[module], weight.dequantize().half()), f"{name} {module}: max {gap.max()}"
        zeros = [weight.params.zero for weight in weights.values() if weight.params.zero is not None]
        assert bool(zeros) != options["sym"]
        assert options["sym"] or any(bool((zero == 0).any()) for zero in zeros), f"{name} does not test what it should"
    assert format_for(Checkpoint(tmp_path / "v2")).name == "gptq-v2"
