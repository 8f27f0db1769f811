"""Quantized checkpoints that are only read, and what is read of formats besides what we write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtool.checkpoint.reader import Checkpoint
from qtool.cli import run
from qtool.errors import QtoolError, UsageError
from qtool.formats import Contents, Format, get_format, reader_of
from qtool.formats.compressed_tensors import CompressedTensors
from qtool.formats.compressed_tensors_config import group_of, scheme_of
from qtool.formats.fp8 import FP8
from qtool.formats.mxfp4 import MXFP4
from qtool.formats.weights import Weights
from qtool.inspection.logical import entries
from qtool.numerics.grid import GridParams, QTensor, grid_of
from qtool.scheme import QuantScheme

E4M3 = torch.float8_e4m3fn
Change = Callable[[dict[str, Tensor], dict[str, Any]], None]
FP4_VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return Checkpoint(folder)


def same(ours: Tensor, theirs: Tensor) -> None:
    gap = (ours.double() - theirs.double()).abs()
    assert ours.shape == theirs.shape
    assert torch.equal(ours, theirs.to(ours.dtype)), f"max difference {gap.max():.3e}, mean {gap.mean():.3e}"


# fp8


def fp8_weight(out: int, inputs: int, seed: int = 0) -> Tensor:
    """All bytes but those of NaN."""
    codes = torch.randint(0, 254, (out, inputs), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    return torch.where(codes >= 127, codes + 1, codes).view(E4M3)


def by_blocks(out: int, inputs: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    scale = torch.rand(-(-out // 128), -(-inputs // 128), generator=torch.Generator().manual_seed(1)) + 0.01
    if dtype == torch.float8_e8m0fnu:
        scale = scale.log2().round().exp2()
    return {"m.weight": fp8_weight(out, inputs), "m.weight_scale_inv": scale.to(dtype)}


BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
TENSOR = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu], ids=str)
@pytest.mark.parametrize(("out", "inputs"), [(256, 128), (576, 384), (1, 256), (100, 128)])
def test_fp8_by_blocks(tmp_path: Path, out: int, inputs: int, dtype: torch.dtype) -> None:
    tensors = by_blocks(out, inputs, dtype)
    weights = Weights(write(tmp_path, tensors, BLOCKS))
    assert {m: str(s) for m, s in weights.schemes.items()} == {"m": "fp8-e4m3-block+fp8-e4m3-g128"}
    assert weights.shapes == {"m.weight": (out, inputs)}
    codes, scale = tensors["m.weight"].float(), tensors["m.weight_scale_inv"].float()
    expected = torch.empty(out, inputs)
    for i in range(out):
        for block in range(inputs // 128):
            columns = slice(128 * block, 128 * block + 128)
            expected[i, columns] = codes[i, columns] * scale[i // 128, block]
    same(weights.read(["m.weight"])["m.weight"], expected)


@pytest.mark.parametrize("scale_name", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("input_name", [None, "input_scale", "activation_scale"])
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_fp8_per_tensor(tmp_path: Path, scale_name: str, input_name: str | None, shape: tuple[int, ...]) -> None:
    tensors = {"a.m.weight": fp8_weight(6, 40), f"a.m.{scale_name}": torch.full(shape, 0.3)}
    config = {**TENSOR, "activation_scheme": "static" if input_name else "dynamic"}
    if input_name:
        tensors[f"a.m.{input_name}"] = torch.full(shape, 0.7)
    weights = Weights(write(tmp_path, tensors, config))
    kind = "tensor" if input_name else "token"
    assert {m: str(s) for m, s in weights.schemes.items()} == {"a.m": f"fp8-e4m3-tensor+fp8-e4m3-{kind}"}
    assert list(weights.shapes) == ["a.m.weight"]
    same(weights.read(["a.m.weight"])["a.m.weight"], tensors["a.m.weight"].float() * torch.tensor(0.3))
    _, scale = weights.roundings("a")["m"]
    assert scale is None if input_name is None else float(scale) == pytest.approx(0.7)  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [BLOCKS, TENSOR], ids=["blocks", "tensor"])
def test_fp8_is_what_transformers_makes_of_it(
    tmp_path: Path, make_model: Callable[..., Path], config: dict[str, Any]
) -> None:
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    source = make_model("llama", hidden_size=128, intermediate_size=256, dtype="float32")
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    tensors = load_file(source / "model.safetensors")
    scheme = "fp8-block" if config is BLOCKS else "fp8-e4m3-tensor"
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight_OI = tensors[name]
        if config is BLOCKS and weight_OI.shape[0] % 128:
            continue  # transformers 5.17 refuses them
        grid = grid_of(QuantScheme.parse(scheme), torch.float32)
        weight = grid.nearest(weight_OI, grid.fit(weight_OI))
        tensors[name] = weight.codes.view(E4M3)
        scale = weight.params.scale
        tensors[f"{name}_scale_inv"] = scale if config is BLOCKS else scale.reshape(())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    known = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**known, "quantization_config": config}))
    weights = Weights(Checkpoint(tmp_path))
    assert len(weights.schemes) == (10 if config is BLOCKS else 14)
    dequantized = FineGrainedFP8Config(dequantize=True, weight_block_size=config["weight_block_size"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=dequantized)
    for name, read in weights.read(weights.shapes).items():
        same(read, model.get_parameter(name).data)


FP8_DAMAGES: dict[str, tuple[dict[str, Any], Change, str]] = {
    "no scale": (BLOCKS, lambda t, c: t.pop("m.weight_scale_inv"), "m.weight_scale_inv` in"),
    "no weight": (BLOCKS, lambda t, c: t.pop("m.weight"), "`m` has weight_scale_inv but no weight"),
    "a weight of 16 bits": (BLOCKS, lambda t, c: t.update({"m.weight": torch.ones(256, 128).half()}), "m.weight` in"),
    "too few scales": (BLOCKS, lambda t, c: t.update({"m.weight_scale_inv": torch.ones(1, 1)}), "needs F16 or BF16"),
    "other inputs": (BLOCKS, lambda t, c: t.update(by_blocks(256, 200)), "200 inputs are not a multiple of 128"),
    "other blocks": (BLOCKS, lambda t, c: c.update(weight_block_size=[1, 128]), "in blocks of [1, 128] is not read"),
    "static blocks": (BLOCKS, lambda t, c: c.update(activation_scheme="static"), "dynamic, not static"),
    "unknown inputs": (TENSOR, lambda t, c: c.update(activation_scheme=7), "or static, not 7"),
    "e5m2": (BLOCKS, lambda t, c: t.update({"m.weight": torch.ones(256, 128).to(torch.float8_e5m2)}), "F8_E5M2"),
    "experts": (BLOCKS, lambda t, c: t.update({"e.up_proj": torch.zeros(2, 128, 128).to(E4M3)}), "`e.up_proj`"),
    "experts as weights": (BLOCKS, lambda t, c: t.update({"e.weight": torch.zeros(2, 3, 4).to(E4M3)}), "(2, 3, 4)"),
    "NaN": (BLOCKS, lambda t, c: t.update({"m.weight": torch.full((256, 128), torch.nan).to(E4M3)}), "32768 NaN"),
}  # fmt: skip


@pytest.mark.parametrize("damage", FP8_DAMAGES)
def test_fp8_that_is_not_read(tmp_path: Path, damage: str) -> None:
    config, change, message = FP8_DAMAGES[damage]
    tensors, config = by_blocks(256, 128), dict(config)
    if config["weight_block_size"] is None:
        tensors["m.weight_scale_inv"] = torch.ones(1)
    change(tensors, config)
    with pytest.raises(QtoolError) as caught:
        Weights(write(tmp_path, tensors, config)).read(["m.weight"])
    assert message in caught.value.message, caught.value.message


def test_fp8_without_the_size_of_its_blocks_goes_by_its_scales(tmp_path: Path) -> None:
    config = {"quant_method": "fp8"}
    (scheme,) = Weights(write(tmp_path / "blocks", by_blocks(256, 128), config)).schemes.values()
    assert scheme.granularity == "block"
    tensors = {**by_blocks(256, 128), "m.weight_scale_inv": torch.ones(())}
    (scheme,) = Weights(write(tmp_path / "tensor", tensors, config)).schemes.values()
    assert scheme.granularity == "tensor"


# mxfp4


def random_blocks(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Any codes; scales whose products a bfloat16 holds."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (*shape, 16), generator=generator).to(torch.uint8)
    return blocks, torch.randint(10, 240, shape, generator=generator).to(torch.uint8)


def test_experts_of_mxfp4_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = random_blocks(3, 10, 2)  # 3 experts of 10 outputs and 64 inputs
    tensors = {
        "e.gate_up_proj_blocks": blocks,
        "e.gate_up_proj_scales": scales,
        "e.gate_up_proj_bias": torch.ones(3, 10),
    }
    weights = Weights(write(tmp_path, tensors, {"quant_method": "mxfp4"}))
    assert weights.shapes == {"e.gate_up_proj_bias": (3, 10), "e.gate_up_proj": (3, 64, 10)}
    for dtype in (torch.float32, torch.bfloat16):
        theirs = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
        same(weights.read(["e.gate_up_proj"])["e.gate_up_proj"], theirs.float())
    (entry,) = [entry for entry in entries(weights) if entry.scheme]
    assert (entry.name, entry.matrix, entry.stored_as) == ("e.gate_up_proj", (30, 64), "mxfp4a16")
    assert (entry.parameters, entry.size_bits / entry.parameters) == (3 * 10 * 64, 4.25)
    assert entry.size_bytes * 8 == entry.size_bits


def test_a_model_of_mxfp4_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import AutoConfig, AutoModelForCausalLM, Mxfp4Config

    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 320, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = AutoConfig.for_model("gpt_oss", **sizes, **heads, quantization_config={"quant_method": "mxfp4"})
    config.save_pretrained(tmp_path)
    tensors: dict[str, Tensor] = {}
    for name, tensor in AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, out = tensor.shape
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = random_blocks(experts, out, inputs // 32)
        else:
            tensors[name] = tensor.contiguous().clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    weights = Weights(Checkpoint(tmp_path))
    assert sorted(weights.schemes) == [f"model.layers.0.mlp.experts.{name}_proj" for name in ("down", "gate_up")]
    dense = Mxfp4Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=dense)
    assert set(weights.shapes) == set(model.state_dict())
    for name, read in weights.read(weights.shapes).items():
        same(read, model.get_parameter(name).data)
    out = tmp_path / "dense"
    assert run(["quantize", str(tmp_path), "-o", str(out), "--format", "dense", "-q"]) == 0
    written = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        same(written.get_parameter(name).data, tensor)


def test_a_linear_of_mxfp4(tmp_path: Path) -> None:
    blocks, scales = random_blocks(5, 3)
    tensors = {"m.weight_blocks": blocks, "m.weight_scales": scales, "n.weight": torch.ones(2, 2)}
    weights = Weights(write(tmp_path, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["n"]}))
    assert weights.shapes == {"n.weight": (2, 2), "m.weight": (5, 96)}
    expected = torch.empty(5, 96)
    for i in range(5):
        for j in range(96):
            byte = int(blocks[i, j // 32, j % 32 // 2])
            code = byte >> 4 if j % 2 else byte & 15
            expected[i, j] = FP4_VALUES[code] * 2.0 ** (int(scales[i, j // 32]) - 127)
    same(weights.read(["m.weight"])["m.weight"], expected)


MXFP4_DAMAGES: dict[str, tuple[Change, str]] = {
    "no scales": (lambda t, c: t.pop("e.up_scales"), "e.up_scales` in"),
    "no blocks": (lambda t, c: t.pop("e.up_blocks"), "`e.up` has scales but no blocks"),
    "scales of 16 bits": (lambda t, c: t.update({"e.up_scales": torch.ones(3, 10, 2).half()}), "e.up_scales` in"),
    "fewer scales": (lambda t, c: t.update({"e.up_scales": torch.ones(3, 10, 1).byte()}), "needs U8 (3, 10, 2)"),
    "flat blocks": (lambda t, c: t.update({"e.up_blocks": torch.ones(3, 10, 32).byte()}), "shape (3, 10, 32)"),
    "short blocks": (lambda t, c: t.update({"e.up_blocks": torch.ones(3, 10, 2, 8).byte()}), "needs U8 (3, 10, 2, 16)"),
    "no experts": (lambda t, c: t.update({"e.up_blocks": torch.ones(0, 10, 2, 16).byte()}), "impossible shape (0,"),
    "beyond float32": (lambda t, c: t.update({"e.up_scales": torch.full((3, 10, 2), 255).byte()}), "NaN or infinite"),
}  # fmt: skip


@pytest.mark.parametrize("damage", MXFP4_DAMAGES)
def test_mxfp4_that_is_not_read(tmp_path: Path, damage: str) -> None:
    change, message = MXFP4_DAMAGES[damage]
    blocks, scales = random_blocks(3, 10, 2)
    tensors, config = {"e.up_blocks": blocks, "e.up_scales": scales}, {"quant_method": "mxfp4"}
    change(tensors, config)
    with pytest.raises(QtoolError) as caught:
        Weights(write(tmp_path, tensors, config)).read(["e.up"])
    assert message in caught.value.message, caught.value.message


@pytest.mark.parametrize("name", ["fp8", "mxfp4"])
def test_formats_that_are_only_read_say_so(name: str) -> None:
    found: Format = FP8() if name == "fp8" else MXFP4()
    scheme = QuantScheme.parse("fp8-block" if name == "fp8" else "mxfp4a16")
    assert isinstance(reader_of(name), type(found))
    with pytest.raises(UsageError, match="only read"):
        get_format(name)
    assert found.problem(scheme) == f"{name} checkpoints are only read"
    weight = QTensor(torch.zeros(1, 128).byte(), GridParams(torch.ones(1, 1)), scheme)
    for write_it in (lambda: found.pack("m", weight), lambda: found.config(Contents({"m": scheme}, []))):
        with pytest.raises(UsageError, match=f"{name} checkpoints are only read"):
            write_it()
    assert "vLLM" in found.readers(scheme)


# compressed-tensors


ACT_ORDER = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "actorder": "group"}


def in_act_order(symmetric: bool, seed: int = 0) -> tuple[QTensor, Tensor, dict[str, Tensor], dict[str, Any]]:
    """A weight whose groups are columns side by side, where each belongs, and the same with the columns moved there."""
    generator = torch.Generator().manual_seed(seed)
    scheme = QuantScheme.parse(f"int4-g32-{'sym' if symmetric else 'asym'}")
    codes = torch.randint(0, 16, (6, 128), generator=generator).to(torch.uint8)
    scale = (torch.rand(6, 4, generator=generator) + 0.1).bfloat16()
    zero = None if symmetric else torch.randint(0, 16, (6, 4), generator=generator).float()
    weight = QTensor(codes, GridParams(scale, zero), scheme)
    place = torch.randperm(128, generator=generator)
    moved = torch.empty_like(codes)
    moved[:, place] = codes
    group_of = torch.empty(128, dtype=torch.int32)
    group_of[place] = torch.arange(128, dtype=torch.int32) // 32
    tensors = CompressedTensors().pack("m", QTensor(moved, weight.params, scheme))
    config = CompressedTensors().config(Contents({"m": scheme}, []))
    config["config_groups"]["group_0"]["weights"] |= {**ACT_ORDER, "symmetric": symmetric}
    return weight, place, {**tensors, "m.weight_g_idx": group_of}, config


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_groups_of_columns_by_activation(tmp_path: Path, symmetric: bool) -> None:
    """compressed-tensors 0.19 has no act-order any more: it unpacks the columns side by side, and they are moved."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    weight, place, tensors, config = in_act_order(symmetric)
    weights = Weights(write(tmp_path, tensors, config))
    assert {m: str(s) for m, s in weights.schemes.items()} == {"m": str(weight.scheme)}
    assert list(weights.shapes) == ["m.weight"]
    read = weights.read(["m.weight"])["m.weight"]
    side_by_side = CompressedTensors().pack("m", weight)
    theirs = PackedQuantizationCompressor.decompress(
        {name.removeprefix("m."): tensor for name, tensor in side_by_side.items()},
        QuantizationScheme(targets=["Linear"], weights={**ACT_ORDER, "actorder": None, "symmetric": symmetric}),
    )["weight"]
    same(read.bfloat16(), theirs[:, place.argsort()])
    same(read[:, place], weight.dequantize())


@pytest.mark.parametrize("unset", [True, False], ids=["-1", "missing"])
def test_an_order_that_was_never_set(tmp_path: Path, unset: bool) -> None:
    _, _, tensors, config = in_act_order(symmetric=True)
    order = tensors.pop("m.weight_g_idx")
    plain = Weights(write(tmp_path / "plain", tensors, config)).read(["m.weight"])["m.weight"]
    if unset:
        tensors["m.weight_g_idx"] = order.fill_(-1)
    same(Weights(write(tmp_path / "unset", tensors, config)).read(["m.weight"])["m.weight"], plain)


MXFP8_INPUTS = {"input_activations": group_of(QuantScheme.parse("mxfp8"), [])["input_activations"]}
UNREAD: dict[str, tuple[Change, str]] = {
    "groups of all sizes": (lambda t, c: t["m.weight_g_idx"].zero_(), "128 inputs evenly over 4 groups"),
    "a group too many": (lambda t, c: t["m.weight_g_idx"].add_(1), "128 inputs evenly over 4 groups"),
    "a short order": (lambda t, c: t.update({"m.weight_g_idx": torch.zeros(9).int()}), "m.weight_g_idx` in"),
    "a wide order": (lambda t, c: t.update({"m.weight_g_idx": torch.zeros(128).long()}), "m.weight_g_idx` in"),
    "2:4": (lambda t, c: c.update(sparsity_config={"format": "sparse-24-bitmask"}), "sparse-24-bitmask"),
    "rotated": (lambda t, c: c.update(transform_config={"config_groups": {"u": {"type": "hadamard"}}}), "transforms"),
    "mxfp6": (
        lambda t, c: c["config_groups"]["group_0"]["weights"].update(num_bits=6, type="float"),
        "6-bit float per group of 32",
    ),
    "two types": (
        lambda t, c: c["config_groups"].update(group_0=group_of(QuantScheme.parse("mxfp4"), ["Linear"]) | MXFP8_INPUTS),
        "weights of mxfp4 with inputs of mxfp8",
    ),
}


@pytest.mark.parametrize("damage", UNREAD)
def test_compressed_tensors_that_are_not_read(tmp_path: Path, damage: str) -> None:
    change, message = UNREAD[damage]
    _, _, tensors, config = in_act_order(symmetric=True)
    change(tensors, config)
    with pytest.raises(QtoolError) as caught:
        Weights(write(tmp_path, tensors, config)).read(["m.weight"])
    assert message in caught.value.message, caught.value.message


def test_every_preset_of_the_library_is_read_or_refused() -> None:
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

    refused = []
    for name, preset in PRESET_SCHEMES.items():
        group = json.loads(QuantizationScheme(targets=["Linear"], **preset).model_dump_json())
        try:
            scheme = scheme_of(group)
        except QtoolError:
            refused.append(name)
        else:
            assert QuantScheme.parse(str(scheme)) == scheme
    assert set(refused) <= {"UNQUANTIZED", "MXFP4XFP8", "MXFP6A16", "MXFP6A8"}  # all but the first since 0.20


def test_what_is_read_is_laid_out_as_said() -> None:
    tensors = by_blocks(300, 256)
    layout = FP8().layout("m", QuantScheme.parse("fp8-block"), (300, 256), "F32")
    assert {i.name: i.shape for i in layout} == {name: tuple(t.shape) for name, t in tensors.items()}
    experts = MXFP4().layout("e.up", QuantScheme.parse("mxfp4a16"), (3, 64, 10), "")
    assert [(i.name, i.shape) for i in experts] == [("e.up_blocks", (3, 10, 2, 16)), ("e.up_scales", (3, 10, 2))]
