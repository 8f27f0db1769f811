"""Schemes other than plain integers on disk: compressed-tensors' own decompression agrees, and qtool's own format."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.writer import raw_bytes
from qtool.errors import QtoolError
from qtool.formats import FORMATS, Contents, Format, format_for, get_format
from qtool.formats.compressed_tensors import CompressedTensors
from qtool.formats.compressed_tensors_config import format_name, group_of, scheme_of
from qtool.formats.own import Own
from qtool.formats.weights import Weights
from qtool.numerics.grid import GridParams, Outliers, QTensor
from qtool.scheme import KV_SCHEMES, QuantScheme

FORMAT, OWN = CompressedTensors(), Own()
SAFETENSORS = {
    torch.int32: "I32", torch.int64: "I64", torch.int8: "I8", torch.uint8: "U8", torch.uint16: "U16",
    torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
SCALES = {"BF16": torch.bfloat16, "F16": torch.float16}
# of compressed-tensors, each with the name that it has for how the weights lie
STORED = {
    "w8a8": "int-quantized",
    "w8a8-static": "int-quantized",
    "int8-tensor-asym+int8-token": "int-quantized",
    "int8-tensor-sym+int8-tensor": "int-quantized",
    "int4-g32-asym+int8-token": "int-quantized",
    "int3-channel-asym+int4-token": "int-quantized",
    "int4-g32-sym+fp8-e4m3-token": "pack-quantized",
    "int8-channel-asym+fp8-e4m3-tensor": "pack-quantized",
    "fp8": "float-quantized",
    "fp8-dynamic": "float-quantized",
    "fp8-block": "float-quantized",
    "fp8-e4m3-block": "naive-quantized",
    "fp8-e4m3-channel": "naive-quantized",
    "fp8-e4m3-tensor": "naive-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "nvfp4a16": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "mxfp4a16": "mxfp4-pack-quantized",
    "mxfp8": "mxfp8-quantized",
    "mxfp8a16": "mxfp8-quantized",
}
OWN_ONLY = [
    "fp8-e5m2-tensor", "fp8-e5m2-channel+fp8-e4m3-tensor", "fp8-e5m2-block", "int3-g16-sym+outliers-3%",
    "int4-channel-asym+outliers-0.5%", "int8-tensor-sym+int8-tensor+outliers-20%", "nf4+int8-tensor",
]  # fmt: skip
OF_BITSANDBYTES = ["nf4", "nf4-dq", "fp4", "fp4-dq", "llm-int8"]


def any_qtensor(text: str, out: int, inputs: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> QTensor:
    """Any codes and parameters that a grid could give."""
    scheme, generator = QuantScheme.parse(text), torch.Generator().manual_seed(seed)
    kind, rows, groups = scheme.kind, out, scheme.groups(inputs)
    codes = torch.randint(0, 2**scheme.bits, (out, inputs), generator=generator, dtype=torch.uint8)
    if kind in ("fp8-e4m3", "mxfp8"):
        codes[codes & 0x7F == 0x7F] = 0x7E  # not NaN
    elif kind == "fp8-e5m2":
        codes[codes & 0x7F >= 0x7C] = 0x7B  # neither NaN nor infinite
    elif kind == "llm-int8":
        codes.clamp_(min=1)
    if scheme.granularity == "tensor":
        rows = groups = 1
    elif scheme.granularity == "block":
        rows = ceil(out / 128)
    scale = (0.01 * torch.randn((rows, groups), generator=generator)).abs() + 1e-4
    zero = None if scheme.symmetric else torch.randint(0, 2**scheme.bits, scale.shape, generator=generator).float()
    params = GridParams(scale.to(dtype), zero)
    if kind == "nvfp4":
        params = GridParams((scale * 1e4).clamp(max=448).to(torch.float8_e4m3fn), None, torch.tensor([2688 / 3.1]))
    elif kind.startswith("mx"):
        params = GridParams(torch.randint(100, 140, scale.shape, generator=generator, dtype=torch.uint8))
    elif kind in ("nf4", "fp4"):
        params = GridParams(scale)
    elif kind == "llm-int8":
        params = GridParams(scale * 127 / 127)
    elif kind.endswith("-dq"):
        nested = torch.randint(0, 256, scale.shape, generator=generator, dtype=torch.uint8)
        maxima = torch.rand(ceil(scale.numel() / 256), generator=generator)
        params = GridParams(nested, None, maxima, torch.rand(1, generator=generator))
    inputs_scale = None
    if scheme.activations and scheme.activations.is_static:
        inputs_scale = torch.rand(1, generator=generator).to(torch.float32 if kind == "nvfp4" else dtype)
    weight = QTensor(codes, params, scheme, input_scale=inputs_scale)
    count = scheme.outlier_count((out, inputs))
    if scheme.outliers:
        places = torch.randperm(out * inputs, generator=generator)[:count].sort().values
        ends = torch.tensor([int((places < inputs * (r)).sum()) for r in range(out + 1)], dtype=torch.int32)
        values = torch.randn(count, generator=generator).to(dtype)
        weight = replace(weight, outliers=Outliers(ends, (places % inputs).int(), values))
    return weight


def assert_same(ours: QTensor, other: QTensor) -> None:
    assert ours.scheme == other.scheme
    mine, theirs = ours.tensors(), other.tensors()
    assert [(t.dtype, t.shape) for t in mine] == [(t.dtype, t.shape) for t in theirs]
    for a, b in zip(mine, theirs, strict=True):
        assert raw_bytes(a) == raw_bytes(b), f"{a} {b}"
    assert torch.equal(ours.dequantize(), other.dequantize())


def format_of(text: str) -> Format:
    return FORMAT if text in STORED else OWN


def told(tensors: dict[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name.removeprefix("m."): (SAFETENSORS[t.dtype], tuple(t.shape)) for name, t in tensors.items()}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("text", [*STORED, *OWN_ONLY, *OF_BITSANDBYTES])
def test_the_layout_is_what_is_packed(text: str, scale: str) -> None:
    format = format_of(text)
    for out, inputs in ((8, 128), (5, 256), (131, 384), (1, 128)):
        weight = any_qtensor(text, out, inputs, dtype=SCALES[scale])
        packed = format.pack("m", weight, scale)
        layout = format.layout("m", weight.scheme, (out, inputs), scale)
        assert {t.name.removeprefix("m."): (t.dtype, t.shape) for t in layout} == told(packed)
        assert all(t.is_contiguous() for t in packed.values())
        assert {name.removeprefix("m") for name in packed} <= set(format.parts)
        bits = 8 * sum(t.size_bytes for t in layout if "shape" not in t.name and "input" not in t.name)
        if text not in OF_BITSANDBYTES and "int" not in text:
            assert bits == weight.scheme.size_bits((out, inputs)), "the scheme counts what is written"


@given(
    text=st.sampled_from([*STORED, *OWN_ONLY, *OF_BITSANDBYTES]),
    out=st.integers(1, 140),
    groups=st.integers(1, 5),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(list(SCALES.values())),
)
@settings(deadline=None, max_examples=150)
def test_unpacking_undoes_packing(text: str, out: int, groups: int, seed: int, dtype: torch.dtype) -> None:
    scheme = QuantScheme.parse(text)
    columns = {"channel": 7, "tensor": 9, "block": 128}.get(scheme.granularity, scheme.group_size or 1)
    weight = any_qtensor(text, out, columns * groups, seed, dtype)
    format = format_of(text)
    packed = format.pack("m", weight)
    assert all(len(raw_bytes(tensor)) == tensor.nbytes for tensor in packed.values()), "can be written"
    assert_same(format.unpack("m", {**packed, "x.weight": torch.zeros(1)}, scheme), weight)


def test_worked_examples_with_their_bits() -> None:
    def pack(text: str, codes: list[list[int]], params: GridParams, **others: Any) -> dict[str, Tensor]:
        weight = QTensor(torch.tensor(codes, dtype=torch.uint8), params, QuantScheme.parse(text), **others)
        format = FORMAT if FORMAT.problem(weight.scheme) is None else OWN
        return {name.removeprefix("m.").removeprefix("qtool."): t for name, t in format.pack("m", weight).items()}

    two = torch.tensor([[2.0]], dtype=torch.bfloat16)
    # code 128 stands for 0
    packed = pack("w8a8", [[0, 127, 128, 255]], GridParams(two))
    assert packed["weight"].tolist() == [[-128, -1, 0, 127]]
    assert packed["weight_scale"].tolist() == [[2.0]]
    # four bits in a byte each, zero points likewise
    packed = pack("int4-channel-asym+int8-token", [[0, 7, 8, 15]], GridParams(two, torch.tensor([[3.0]])))
    assert packed["weight"].tolist() == [[-8, -1, 0, 7]]
    assert packed["weight_zero_point"].tolist() == [[-5]]
    # e4m3: sign, 4 bits of exponent with a bias of 7, 3 bits of fraction
    packed = pack("fp8-e4m3-channel", [[0b0_0111_000, 0b1_1000_100, 0b0_1111_110, 1]], GridParams(two))
    assert packed["weight"].dtype == torch.float8_e4m3fn
    assert packed["weight"].float().tolist() == [[1.0, -3.0, 448.0, 2.0**-9]]
    # e5m2: 5 bits of exponent with a bias of 15, 2 of fraction
    packed = pack("fp8-e5m2-channel", [[0b0_01111_00, 0b1_10000_10, 0b0_11110_11, 1]], GridParams(two))
    assert packed["weight"].float().tolist() == [[1.0, -3.0, 57344.0, 2.0**-16]]
    # e2m1: sign, 2 bits of exponent, 1 of fraction; the first in the low bits
    codes = [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]]
    one = torch.ones(1, 1).to(torch.float8_e4m3fn)
    inputs = {"input_scale": torch.tensor([7.0])}
    packed = pack("nvfp4", codes, GridParams(one, None, torch.tensor([0.5])), **inputs)
    assert packed["weight_packed"].tolist() == [[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]]
    assert packed["weight_scale"].view(torch.uint8).tolist() == [[0b0_0111_000]]
    assert (packed["weight_global_scale"].tolist(), packed["input_global_scale"].tolist()) == ([0.5], [7.0])
    # 130 stands for 2^3
    packed = pack("mxfp4a16", [codes[0] * 2], GridParams(torch.tensor([[130]], dtype=torch.uint8)))
    assert packed["weight_scale"].tolist() == [[130]]
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    weight = FORMAT.unpack("m", {f"m.{n}": t for n, t in packed.items()}, QuantScheme.parse("mxfp4a16"))
    assert weight.dequantize().tolist() == [[8.0 * s * v for s in (1, -1) for v in values] * 2]
    packed = pack("mxfp8a16", [[0b0_0111_000] * 32], GridParams(torch.tensor([[130]], dtype=torch.uint8)))
    assert packed["weight"].float().tolist() == [[1.0] * 32]
    # outliers: none in row 0, columns 1 and 3 of row 1
    outliers = Outliers(torch.tensor([0, 0, 2]).int(), torch.tensor([1, 3]).int(), torch.tensor([9.0, -8.0]).bfloat16())
    scale = torch.ones(2, 1).bfloat16()
    packed = pack("int4-channel-sym+outliers-20%", [[8] * 5, [9] * 5], GridParams(scale), outliers=outliers)
    assert packed["outlier_row_ends"].tolist() == [0, 0, 2]
    assert packed["outlier_columns"].tolist() == [1, 3]
    assert packed["outlier_values"].tolist() == [9.0, -8.0]
    scheme = QuantScheme.parse("int4-channel-sym+outliers-20%")
    weight = OWN.unpack("m", {f"m.qtool.{n}": t for n, t in packed.items()}, scheme)
    assert weight.dequantize().tolist() == [[0.0] * 5, [1.0, 9.0, 1.0, -8.0, 1.0]]


def test_columns_of_outliers_that_16_bits_do_not_hold() -> None:
    scheme = QuantScheme.parse("int4-channel-sym+outliers-0.01%")
    for inputs, kind in ((2**16, "U16"), (2**16 + 1, "I32")):
        layout = {t.name: t for t in OWN.layout("m", scheme, (2, inputs), "BF16")}
        assert (layout["m.qtool.outlier_columns"].dtype, layout["m.qtool.outlier_columns"].shape) == (kind, (13,))
        weight = any_qtensor(str(scheme), 2, inputs)
        assert weight.outliers is not None
        weight.outliers.columns[0] = 0
        weight.outliers.columns[-1] = inputs - 1
        assert_same(OWN.unpack("m", OWN.pack("m", weight), scheme), weight)


def library_scheme(scheme: QuantScheme) -> Any:
    from compressed_tensors.quantization import QuantizationScheme

    return QuantizationScheme.model_validate(group_of(scheme, ["Linear"]))


@pytest.mark.parametrize("text", STORED)
def test_the_names_are_those_that_the_library_infers(text: str) -> None:
    from compressed_tensors.compressors.format import infer_module_format

    scheme = QuantScheme.parse(text)
    inferred = infer_module_format(torch.nn.Linear, library_scheme(scheme)).value
    assert format_name(scheme) == STORED[text]
    if scheme.kind == "int" and scheme.activations and scheme.activations.kind != "int":
        assert inferred == "int-quantized", "the library would now pack these as well: nothing to name any more"
    else:
        assert inferred == STORED[text]


PRESETS = {
    "W8A8": "w8a8", "W4A16": "w4a16", "W4A16_ASYM": "w4a16-asym", "W4AFP8": "w4afp8", "W4A8": "w4a8", "FP8": "fp8",
    "FP8_DYNAMIC": "fp8-dynamic", "FP8_BLOCK": "fp8-block", "NVFP4": "nvfp4", "NVFP4A16": "nvfp4a16",
    "MXFP4": "mxfp4", "MXFP4A16": "mxfp4a16", "MXFP8": "mxfp8", "MXFP8A16": "mxfp8a16",
}  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
def test_the_groups_are_those_of_the_library(preset: str) -> None:
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    scheme = QuantScheme.parse(PRESETS[preset])
    theirs = preset_name_to_scheme(preset, ["Linear"])
    ours = library_scheme(scheme)
    unsaid = {"observer", "zp_dtype"}
    for part in ("weights", "input_activations"):
        mine, other = getattr(ours, part), getattr(theirs, part)
        assert (mine and mine.model_dump(exclude=unsaid)) == (other and other.model_dump(exclude=unsaid)), part
    assert scheme_of(json.loads(theirs.model_dump_json())) == scheme, "with all its null fields"


def as_the_library_reads_it(scheme: QuantScheme, state: dict[str, Tensor]) -> Tensor:
    from compressed_tensors.compressors import BaseCompressor

    compressor = BaseCompressor.get_value_from_registry(format_name(scheme))
    return compressor.decompress(state, library_scheme(scheme))["weight"]


@pytest.mark.parametrize("text", STORED)
def test_the_library_unpacks_our_weights(text: str) -> None:
    for out, inputs in ((8, 128), (131, 256)):
        weight = any_qtensor(text, out, inputs)
        state = {name.removeprefix("m."): tensor for name, tensor in FORMAT.pack("m", weight).items()}
        ours, kind = weight.dequantize(), weight.scheme.kind
        theirs = as_the_library_reads_it(weight.scheme, state)
        gap = (theirs.float() - ours.to(theirs.dtype).float()).abs()
        # nvfp4: the library's scale over its global scale is in float32 as ours, and rounds once at the end
        assert theirs.dtype == torch.bfloat16
        assert torch.equal(theirs, ours.to(theirs.dtype)), f"max difference {gap.max():.3e}, mean {gap.mean():.3e}"
        if kind in ("int", "fp8-e4m3"):
            wide = as_the_library_reads_it(weight.scheme, state | {"weight_scale": state["weight_scale"].float()})
            assert torch.equal(wide, ours), "with scales in float32 nothing is rounded at all"


@pytest.mark.parametrize("text", ["w8a8", "fp8-dynamic", "fp8-block", "nvfp4a16", "mxfp4a16", "mxfp8a16"])
def test_the_library_packs_the_same_tensors(text: str) -> None:
    from compressed_tensors.compressors import BaseCompressor

    weight = any_qtensor(text, 131, 256)
    ours = {name.removeprefix("m."): tensor for name, tensor in FORMAT.pack("m", weight).items()}
    kind, scale = weight.scheme.kind, weight.params.scale
    dense = {"weight": weight.dequantize(), "weight_scale": scale.float()}
    if kind.startswith("mx"):
        dense["weight_scale"] = torch.exp2(scale.float() - 127)
    elif weight.params.super_scale is not None:
        dense["weight_global_scale"] = weight.params.super_scale
    compressor = BaseCompressor.get_value_from_registry(format_name(weight.scheme))
    theirs = compressor.compress(dense, library_scheme(weight.scheme))
    assert set(theirs) == set(ours)
    part = "weight_packed" if "weight_packed" in ours else "weight"
    mine, other = ours[part].view(torch.uint8), theirs[part].view(torch.uint8)
    if kind == "fp8-e4m3" or kind == "mxfp8":
        mine, other = mine.clone(), other.clone()
        mine[mine == 0x80], other[other == 0x80] = 0, 0  # either sign of zero
    elif kind in ("nvfp4", "mxfp4"):
        mine, other = ([torch.where(h == 8, 0, h) for h in (p & 15, p >> 4)] for p in (mine, other))  # likewise
        mine, other = torch.stack(mine), torch.stack(other)
    assert torch.equal(mine, other), f"{int((mine != other).sum())} of {mine.numel()} differ"
    assert torch.equal(ours["weight_scale"].float(), theirs["weight_scale"].float())


MODULES = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj",
           "model.layers.1.mlp.down_proj", "model.layers.11.mlp.down_proj"]  # fmt: skip
Change = Callable[[dict[str, Tensor], dict[str, Any]], None]


def write(
    folder: Path, format: Format, schemes: list[str], kv: str | None = None, change: Change | None = None
) -> dict[str, QTensor]:
    """A checkpoint with MODULES of these schemes in turn; `change` may damage its tensors and its config."""
    weights = {
        module: any_qtensor(schemes[i % len(schemes)], 131 if "mlp" in module else 16, 256, seed=i)
        for i, module in enumerate(MODULES)
    }
    tensors: dict[str, Tensor] = {"model.norm.weight": torch.ones(4)}
    for module, weight in weights.items():
        tensors.update(format.pack(module, weight))
    entry = format.config(
        Contents({m: w.scheme for m, w in weights.items()}, ["lm_head"], KV_SCHEMES[kv] if kv else None)
    )
    config = {"model_type": "llama", "quantization_config": json.loads(json.dumps(entry))}
    if change:
        change(tensors, config["quantization_config"])
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return weights


@pytest.mark.parametrize("kv", [None, "fp8", "int8"])
@pytest.mark.parametrize("schemes", [[*STORED][i : i + 4] for i in range(0, len(STORED), 4)] + [["fp8"]], ids=str)
def test_a_written_checkpoint_reads_back(tmp_path: Path, schemes: list[str], kv: str | None) -> None:
    weights = write(tmp_path, FORMAT, schemes, kv)
    assert_reads_back(tmp_path, FORMAT, weights, kv)
    entry = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    names = {STORED[text] for text in schemes}
    assert entry["format"] == ("mixed-precision" if len(names) > 1 else names.pop())
    from compressed_tensors.quantization import QuantizationConfig

    parsed = QuantizationConfig.model_validate({k: v for k, v in entry.items() if k in QuantizationConfig.model_fields})
    assert (parsed.kv_cache_scheme is None) == (kv is None)


@pytest.mark.parametrize("kv", [None, "fp8", "int8"])
@pytest.mark.parametrize("schemes", [OWN_ONLY, [*OF_BITSANDBYTES, "int4-g128-sym"], [*STORED][:5], ["nf4"]], ids=str)
def test_the_own_format_stores_any_mixture(tmp_path: Path, schemes: list[str], kv: str | None) -> None:
    assert_reads_back(tmp_path, OWN, write(tmp_path, OWN, schemes, kv), kv)


def assert_reads_back(folder: Path, format: Format, weights: dict[str, QTensor], kv: str | None) -> None:
    checkpoint = Checkpoint(folder)
    assert format.modules(checkpoint) == {m: (w.scheme, tuple(w.codes.shape)) for m, w in weights.items()}
    assert format.kv_of(checkpoint.config) == (KV_SCHEMES[kv] if kv else None)
    for module, weight in weights.items():
        parts = [module + part for part in format.parts if module + part in checkpoint.tensors]
        assert_same(format.unpack(module, dict(checkpoint.read_many(parts)), weight.scheme), weight)
    whole = Weights(checkpoint)
    assert whole.format is not None
    assert whole.format.name == format.name
    assert set(whole.shapes) == {"model.norm.weight", *(f"{m}.weight" for m in weights)}
    for module, weight in weights.items():
        assert torch.equal(whole.read([f"{module}.weight"])[f"{module}.weight"], weight.dequantize())


def test_scales_as_others_write_them(tmp_path: Path) -> None:
    """Per-tensor scales without dimensions, in float32, and integers under float inputs a byte each."""

    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        for name in list(tensors):
            if name.endswith(("_scale", ".input_scale")):
                tensors[name] = tensors[name].float().reshape(() if tensors[name].numel() == 1 else -1)
        for group in config["config_groups"].values():
            group["weights"] |= {"scale_dtype": None, "zp_dtype": None, "block_structure": None}

    weights = write(tmp_path, FORMAT, ["fp8"], None, change)
    whole = Weights(Checkpoint(tmp_path))
    for module, weight in weights.items():
        assert torch.equal(whole.read([f"{module}.weight"])[f"{module}.weight"], weight.dequantize())

    weight = any_qtensor("int4-channel-sym+fp8-e4m3-token", 8, 64)
    plain = FORMAT.pack("m", replace(weight, scheme=QuantScheme.parse("int4-channel-sym+int8-token")))
    save_file(plain, tmp_path / "model.safetensors")
    entry = FORMAT.config(Contents({"m": weight.scheme}, []))
    entry["format"] = entry["config_groups"]["group_0"]["format"] = "int-quantized"
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": entry}))
    assert FORMAT.modules(Checkpoint(tmp_path)) == {"m": (weight.scheme, (8, 64))}
    assert_same(FORMAT.unpack("m", plain, weight.scheme), weight)


def drop(name: str) -> Change:
    return lambda tensors, config: tensors.__delitem__(name)


def put(name: str, tensor: Tensor) -> Change:
    return lambda tensors, config: tensors.update({name: tensor})


def edit(part: str, **changes: Any) -> Change:
    return lambda tensors, config: config["config_groups"]["group_0"][part].update(changes)


Q, D = MODULES[0], MODULES[1]
OUTLIERS = "int3-g16-sym+outliers-3%"
DAMAGES: dict[str, tuple[Format, str, Change, str]] = {
    "no scale": (FORMAT, "fp8", drop(f"{Q}.weight_scale"), f"{Q}.weight_scale"),
    "no scale of packed": (FORMAT, "nvfp4", drop(f"{Q}.weight_scale"), f"{Q}.weight_scale"),
    "no codes": (FORMAT, "w8a8", drop(f"{Q}.weight"), f"{Q}` has weight_scale but no weight"),
    "a flat weight": (FORMAT, "fp8", put(f"{Q}.weight", torch.zeros(9).to(torch.float8_e4m3fn)), f"{Q}.weight"),
    "no scale of inputs": (FORMAT, "fp8", drop(f"{D}.input_scale"), f"{D}.input_scale"),
    "no global scale": (FORMAT, "nvfp4", drop(f"{D}.weight_global_scale"), f"{D}.weight_global_scale"),
    "no scale of nvfp4 inputs": (FORMAT, "nvfp4", drop(f"{D}.input_global_scale"), f"{D}.input_global_scale"),
    "integers for floats": (FORMAT, "fp8", put(f"{Q}.weight", torch.zeros(16, 256).char()), f"{Q}.weight"),
    "a dense weight": (FORMAT, "w8a8", put(f"{Q}.weight", torch.zeros(16, 256)), f"{Q}.weight"),
    "few blocks": (FORMAT, "fp8-block", put(f"{D}.weight_scale", torch.ones(1, 2)), f"{D}.weight_scale"),
    "broken blocks": (FORMAT, "fp8-block", put(f"{D}.weight", torch.zeros(131, 250)), "250 inputs are not a multiple"),
    "float scales for bytes": (FORMAT, "mxfp8", put(f"{D}.weight_scale", torch.ones(131, 8)), f"{D}.weight_scale"),
    "words of floats": (FORMAT, "fp8-dynamic", put(f"{D}.weight_packed", torch.ones(131, 64).int()), "integers, but"),
    "a group of fp8": (FORMAT, "fp8-dynamic", edit("weights", strategy="group", group_size=64), "per group of 64"),
    "mxfp8 without bytes": (FORMAT, "mxfp8a16", edit("weights", scale_dtype=None), "8-bit float per group of 32"),
    "other blocks": (FORMAT, "fp8-block", edit("weights", block_structure=[64, 64]), "per block of [64, 64]"),
    "fp4 of 64": (FORMAT, "nvfp4", edit("weights", group_size=64), "4-bit float per tensor_group of 64"),
    "asymmetric floats": (FORMAT, "fp8", edit("weights", symmetric=False), "8-bit float per tensor"),
    "dynamic weights": (FORMAT, "fp8", edit("weights", dynamic=True), "8-bit float per tensor"),
    "asymmetric inputs": (FORMAT, "w8a8", edit("input_activations", symmetric=False), "asymmetric"),
    "dynamic tensors": (FORMAT, "fp8", edit("input_activations", dynamic=True), "dynamic True"),
    "static tokens": (FORMAT, "w8a8", edit("input_activations", dynamic=False), "dynamic False"),
    "4-bit keys": (FORMAT, "w8a8", lambda t, c: c.update(kv_cache_scheme={"num_bits": 4, "type": "int",
                   "strategy": "tensor", "dynamic": False}), "keys and values of int4-tensor"),
    "no outliers": (OWN, OUTLIERS, drop(f"{Q}.qtool.outlier_values"), f"{Q}.qtool.outlier_values"),
    "fewer outliers": (OWN, OUTLIERS, put(f"{Q}.qtool.outlier_values", torch.ones(3)), f"{Q}.qtool.outlier_values"),
    "outliers outside": (OWN, OUTLIERS, put(f"{Q}.qtool.outlier_columns", torch.full((122,), 256, dtype=torch.uint16)),
                         f"{Q}.qtool` has outliers outside of its 16 rows of 256"),
    "outliers in no order": (OWN, OUTLIERS, put(f"{Q}.qtool.outlier_row_ends", torch.arange(17).flip(0).int()), Q),
    "no scheme": (OWN, "nf4", lambda t, c: c.update(schemes={}), "covers `model.layers"),
    "a newer version": (OWN, "nf4", lambda t, c: c.update(version=2), "version 2"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_an_error_that_says_where(tmp_path: Path, damage: str) -> None:
    format, scheme, change, message = DAMAGES[damage]
    write(tmp_path, format, [scheme], None, change)
    with pytest.raises(QtoolError) as caught:
        Weights(Checkpoint(tmp_path)).read([f"{Q}.weight", f"{D}.weight"])
    assert message in caught.value.message, caught.value.message
    assert "\n" not in caught.value.message


def test_which_format_stores_what() -> None:
    for text in STORED:
        assert format_for([QuantScheme.parse(text)]) == "compressed-tensors"
    for text in OWN_ONLY:
        assert format_for([QuantScheme.parse(text)]) == "qtool"
    for text in OF_BITSANDBYTES:
        assert format_for([QuantScheme.parse(text)]) == "bitsandbytes"
    problem = get_format("compressed-tensors").problem(QuantScheme.parse("fp8-e5m2-channel"))
    assert problem == "fp8-e5m2 is not among the types of compressed-tensors"
    assert "outliers" in (FORMAT.problem(QuantScheme.parse(OUTLIERS)) or "")
    for name in FORMATS:
        assert get_format(name).name == name


def quantize_by_hand(
    source: Path, folder: Path, format: Format, text: str, kv: str | None = None
) -> dict[str, QTensor]:
    """A copy of a model whose block linears are rounded to nearest by the grid."""
    from qtool.numerics.grid import grid_of

    shutil.copytree(source, folder)
    tensors, weights = load_file(source / "model.safetensors"), {}
    scheme = QuantScheme.parse(text)
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        dense, module = tensors.pop(name).float(), name.removesuffix(".weight")
        grid = grid_of(scheme, torch.bfloat16)
        weight = grid.nearest(dense, grid.fit(dense, search=False))
        if scheme.activations and scheme.activations.is_static:
            weight = replace(
                weight,
                input_scale=torch.tensor([4.0 if scheme.kind == "nvfp4" else 0.0625]).to(
                    torch.float32 if scheme.kind == "nvfp4" else torch.bfloat16
                ),
            )
        weights[module] = weight
        tensors |= format.pack(module, weight)
    attentions = {module.rpartition(".")[0] for module in weights if "self_attn" in module}
    for attention in attentions if kv else ():
        tensors |= {f"{attention}.{part}_scale": torch.tensor([0.5], dtype=torch.bfloat16) for part in "kv"}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    schemes = {module: weight.scheme for module, weight in weights.items()}
    config["quantization_config"] = format.config(Contents(schemes, ["lm_head"], KV_SCHEMES[kv] if kv else None))
    (folder / "config.json").write_text(json.dumps(config))
    return weights


@pytest.mark.parametrize(
    "text",
    ["w8a8", "w8a8-static", "int4-g32-sym+int8-token", "int4-g32-sym+fp8-e4m3-token", "fp8", "fp8-dynamic",
     "fp8-block", "fp8-e4m3-channel", "nvfp4", "nvfp4a16", "mxfp4", "mxfp4a16", "mxfp8", "mxfp8a16"],
)  # fmt: skip
def test_transformers_loads_what_is_written(tmp_path: Path, make_model: Callable[..., Path], text: str) -> None:
    from transformers import AutoModelForCausalLM

    wide = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    source = make_model(**wide)
    weights = quantize_by_hand(source, tmp_path / "out", FORMAT, text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, told = AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", dtype=torch.bfloat16, output_loading_info=True
        )
    assert not told["missing_keys"], told
    assert not told["unexpected_keys"], told
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    tokens = torch.arange(2, 26).view(2, 12)
    with torch.no_grad():
        logits = model(tokens).logits  # the first call unpacks the weights
        for module, weight in weights.items():
            ours, theirs = weight.dequantize().bfloat16(), model.get_submodule(module).weight
            gap = (ours.float() - theirs.float()).abs()
            assert torch.equal(ours, theirs), f"{module}: max difference {gap.max():.3e}, mean {gap.mean():.3e}"
            dense.get_submodule(module).weight.copy_(ours)
            if weight.input_scale is not None:
                name = "input_global_scale" if text == "nvfp4" else "input_scale"
                assert torch.equal(getattr(model.get_submodule(module), name), weight.input_scale)
        expected = dense(tokens).logits
    if QuantScheme.parse(text).activations is None:
        assert torch.equal(logits, expected), f"max difference {(logits - expected).abs().max():.3e}"
    else:  # inputs are rounded on the way
        off = ((logits - expected).norm() / expected.norm()).item()
        assert 0 < off < 0.5, off


@pytest.mark.parametrize("kv", KV_SCHEMES)
def test_transformers_takes_the_scales_of_keys_and_values(
    tmp_path: Path, make_model: Callable[..., Path], kv: str
) -> None:
    from transformers import AutoModelForCausalLM

    quantize_by_hand(make_model(), tmp_path / "out", FORMAT, "int4-g32-sym", kv)
    model, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16, output_loading_info=True)
    assert not told["missing_keys"], told
    assert not told["unexpected_keys"], told
    attention = model.model.layers[1].self_attn
    assert attention.k_scale.tolist() == attention.v_scale.tolist() == [0.5]
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(2, 14)[None]).logits).all()
    unit = "model.layers.1"
    scheme, keys, values = Weights(Checkpoint(tmp_path / "out")).kv_scales(unit) or (None, None, None)
    assert scheme == KV_SCHEMES[kv]
    assert keys == values == 0.5


def test_transformers_finds_no_weights_in_the_own_format(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    """It warns of the unknown method and goes on (5.17): what it must not do is to take codes for weights."""
    from transformers import AutoModelForCausalLM

    weights = quantize_by_hand(make_model(), tmp_path / "out", OWN, "int4-g32-sym+outliers-1%")
    _, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert set(told["missing_keys"]) == {f"{module}.weight" for module in weights}
