"""Laying a quantized model out anew: the same weights in another format, or a clear error of what would be lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.cli import run as run_command
from qtool.errors import QtoolError
from qtool.formats import FORMATS, get_format
from qtool.formats.relaying import relaid_scheme, relay
from qtool.formats.weights import Weights
from qtool.gguf.checkpoint import open_checkpoint
from qtool.numerics.grid import GridParams, QTensor, grid_of
from qtool.scheme import QuantScheme


def run(*arguments: object, code: int = 0) -> None:
    assert run_command([str(a) for a in arguments]) == code


def quantized(model: Path, out: Path, scheme: str, *more: str) -> Path:
    run("quantize", model, "-o", out, "--scheme", scheme, "--method", "rtn", "-q", *more)
    return out


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    source = Weights(open_checkpoint(path))
    return source.read(source.shapes)


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights_of(one), weights_of(other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


CHAINS = [
    ("int4-g32-sym", ["gptq", "awq", "compressed-tensors"]),
    ("int4-g32-asym", ["gptq", "awq", "compressed-tensors"]),
    ("int4-g32-asym", ["awq", "gptq-v2", "compressed-tensors", "gptq"]),
    ("int4-g32-sym", ["gguf", "gptq", "gguf", "compressed-tensors", "awq"]),
    ("int4-g64-sym", ["gguf", "dense"]),
    ("int8-channel-sym", ["gguf"]),
    ("int4-channel-sym", ["gptq", "gguf"]),
    ("int3-g32-sym", ["gptq", "qtool", "gptq-v2"]),
    ("mxfp4a16", ["gguf", "compressed-tensors"]),
    ("fp8-block", ["qtool", "dense"]),
    ("w8a8", ["qtool", "compressed-tensors"]),
    ("nf4", ["qtool", "bitsandbytes"]),
]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("scheme", "formats"), CHAINS, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_every_step_keeps_every_weight(
    make_model: Any, tmp_path: Path, scheme: str, formats: list[str], dtype: str
) -> None:
    model = make_model(dtype=dtype, hidden_size=128, intermediate_size=256)
    path = quantized(model, tmp_path / "0", scheme)
    first = path
    for i, format in enumerate(formats, 1):
        out = tmp_path / str(i)
        run("quantize", path, "-o", out, "--format", format, "-q")
        if format != "dense":  # which rounds to the model's own 16 bits
            assert_same_weights(first, out)
        path = out


def test_dense_is_what_the_weights_are_worth_in_the_type_of_the_model(make_model: Any, tmp_path: Path) -> None:
    model = make_model(dtype="bfloat16")
    packed = quantized(model, tmp_path / "packed", "int4-g32-sym")
    run("quantize", packed, "-o", tmp_path / "dense", "--format", "dense", "-q")
    quantized(model, tmp_path / "at once", "int4-g32-sym", "--format", "dense")
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("dense", "at once")]
    assert files[0] == files[1]
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).state_dict()
    expected = weights_of(packed)
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor.bfloat16().float()), name


def test_a_gguf_file_becomes_a_folder_for_transformers(make_model: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = make_model(dtype="float16")
    quantized(model, tmp_path / "gguf", "q8_0")
    run("quantize", tmp_path / "gguf" / "model.gguf", "-o", tmp_path / "dense", "--format", "dense", "-q")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    before = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (model, tmp_path / "dense")]
    text = "every weight and each scale"
    ids = [tokenizer(text)["input_ids"] for tokenizer in tokenizers]
    assert ids[0] == ids[1]
    with torch.no_grad():
        logits = [m(torch.tensor([ids[0]])).logits for m in (before, loaded)]
    assert (logits[0] - logits[1]).abs().max() < 0.05 * logits[0].abs().max()


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.partition("\n")[0]


def test_what_cannot_be_kept_is_said(make_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(dtype="bfloat16")
    packed = quantized(model, tmp_path / "packed", "int3-g32-sym")
    capsys.readouterr()
    for arguments, message in (
        (["--format", "awq"], "`model.layers.0.mlp.down_proj` is int3-g32-sym, which awq cannot hold"),
        (["--format", "gguf"], "is int3-g32-sym, which gguf cannot hold"),
        ([], "is already quantized"),
        (["--format", "gptq", "--scheme", "w3a16"], "--scheme would round it a second time"),
        (["--format", "gptq", "--method", "gptq"], "--method would round it a second time"),
        (["--format", "gptq", "--transform", "awq"], "--transform would round it a second time"),
    ):
        run("quantize", packed, "-o", tmp_path / "out", *arguments, code=2)
        assert message in said(capsys)
    assert not (tmp_path / "out").exists()


def test_rounding_a_second_time_has_to_be_asked_for(
    make_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model()
    packed = quantized(model, tmp_path / "packed", "int8-channel-sym")
    out = quantized(packed, tmp_path / "again", "int4-g32-sym", "--requantize")
    assert {str(s) for s in Weights(open_checkpoint(out)).schemes.values()} == {"int4-g32-sym"}
    dense = Weights(open_checkpoint(packed)).read(["model.layers.1.mlp.up_proj.weight"])
    weight_OI = dense["model.layers.1.mlp.up_proj.weight"]
    grid = grid_of(QuantScheme.parse("int4-g32-sym"), torch.bfloat16)
    expected = grid.nearest(weight_OI, grid.fit(weight_OI)).dequantize()
    assert torch.equal(weights_of(out)["model.layers.1.mlp.up_proj.weight"], expected)
    capsys.readouterr()
    run("quantize", model, "-o", tmp_path / "no", "--requantize", code=2)
    assert "is not quantized yet" in said(capsys)


def test_what_was_packed_and_is_now_left_alone_is_written_out(make_model: Any, tmp_path: Path) -> None:
    """The embedding of a GGUF file is rounded; of compressed-tensors it is not."""
    packed = quantized(make_model(), tmp_path / "packed", "q8_0", "--format", "gguf")
    out = quantized(packed, tmp_path / "again", "int4-g32-sym", "--requantize")
    name = "model.embed_tokens.weight"
    assert name.removesuffix(".weight") in Weights(open_checkpoint(packed)).schemes
    assert torch.equal(weights_of(out)[name], weights_of(packed)[name].half().float())


def test_scales_that_do_not_exist_in_the_other_type_are_counted() -> None:
    scheme = QuantScheme.parse("int4-g32-sym")
    codes = torch.zeros((2, 64), dtype=torch.uint8)
    scale = torch.tensor([[1.0, 1e30], [2.0**-30, 0.5]], dtype=torch.bfloat16)
    weight = QTensor(codes, GridParams(scale), scheme)
    with pytest.raises(QtoolError, match=r"2 of 4 scales of `a\.b` do not exist in float16"):
        relay("a.b", weight, QuantScheme.parse("q4_0"), torch.float16)


def test_zero_points_that_are_no_middle_are_not_dropped() -> None:
    scheme = QuantScheme.parse("int4-g32-asym")
    codes = torch.arange(64, dtype=torch.uint8).reshape(2, 32) % 16
    scale, zero = torch.ones((2, 1), dtype=torch.float16), torch.tensor([[8.0], [7.0]])
    weight = QTensor(codes, GridParams(scale, zero), scheme)
    with pytest.raises(QtoolError, match="zero points other than 8"):
        relay("a.b", weight, QuantScheme.parse("int4-g32-sym"), torch.float16)
    middle = QTensor(codes, GridParams(scale, torch.full((2, 1), 8.0)), scheme)
    symmetric = relay("a.b", middle, QuantScheme.parse("int4-g32-sym"), torch.float16)
    assert symmetric.params.zero is None
    assert torch.equal(symmetric.dequantize(), middle.dequantize())


@pytest.mark.parametrize("target", ["int4-g32-asym", "int4-g32-sym"])
def test_minima_that_are_no_multiples_of_a_scale_are_an_error(target: str) -> None:
    codes = torch.randint(0, 16, (3, 64), dtype=torch.uint8)
    params = GridParams(torch.tensor([[0.25, 0.5], [1, 0], [2, 3]]).half(), None, None, torch.full((3, 2), 0.3).half())
    weight = QTensor(codes, params, QuantScheme.parse("q4_1"))
    with pytest.raises(QtoolError, match=r"would change|zero points other than"):
        relay("a.b", weight, QuantScheme.parse(target), torch.float16)


def test_a_searched_q4_1_file_is_no_affine_grid(
    make_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = quantized(make_model(), tmp_path / "packed", "q4_1")
    capsys.readouterr()
    for format in ("gptq", "awq", "compressed-tensors"):
        run("quantize", packed, "-o", tmp_path / "out", "--format", format, "-q", code=1)
        assert "would change: int4-g32-asym has zero points" in said(capsys)
        assert not (tmp_path / "out").exists()


def test_what_the_ends_of_a_model_become(make_model: Any, tmp_path: Path) -> None:
    """A mix rounds embedding and head, too, which other formats keep in 16 bits."""
    packed = quantized(make_model(tied=False), tmp_path / "packed", "q4_0")
    run("quantize", packed, "-o", tmp_path / "out", "--format", "gptq", "-q")
    written = Weights(open_checkpoint(tmp_path / "out"))
    assert set(written.schemes.values()) == {QuantScheme.parse("int4-g32-sym")}
    before, after = weights_of(packed), weights_of(tmp_path / "out")
    for name, weight in before.items():
        at_end = name in ("model.embed_tokens.weight", "lm_head.weight")
        assert torch.equal(after[name], weight.half().float() if at_end else weight), name
    kept = json.loads((tmp_path / "out" / "manifest.json").read_text())["report"]["kept"]
    assert "written out as it is worth" in {k["reason"] for k in kept if k["name"] == "lm_head.weight"}


def test_what_is_ignored_is_written_out(make_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = quantized(make_model(), tmp_path / "packed", "int4-g32-sym", "--layer", "*.down_proj=int5-g32-sym")
    capsys.readouterr()
    run("quantize", packed, "-o", tmp_path / "out", "--format", "awq", code=2)
    assert "is int5-g32-sym, which awq cannot hold" in said(capsys)
    run(
        "quantize",
        packed,
        "-o",
        tmp_path / "out",
        "--format",
        "awq",
        "--ignore",
        "*.down_proj",
        "--ignore",
        "*.nil",
        code=2,
    )
    assert "matches no" in said(capsys)
    run("quantize", packed, "-o", tmp_path / "out", "--format", "awq", "--ignore", "*.down_proj", "-q")
    assert not any("down_proj" in module for module in Weights(open_checkpoint(tmp_path / "out")).schemes)


def test_dense_alone_is_a_conversion(make_model: Any, tmp_path: Path) -> None:
    model = make_model(dtype="bfloat16")
    run("quantize", model, "-o", tmp_path / "gguf", "--scheme", "bf16", "-q")
    run("quantize", tmp_path / "gguf", "-o", tmp_path / "out", "--format", "dense", "-q")
    before, after = weights_of(model), weights_of(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", ["q4_1", "q5_1"])
def test_minima_and_zero_points(kind: str) -> None:
    bits = int(kind[1])
    scheme = QuantScheme.parse(f"int{bits}-g64-asym")
    codes = torch.randint(0, 2**bits, (3, 128), dtype=torch.uint8)
    scale = torch.tensor([[0.25, 0.5], [1.0, 2.0], [0.125, 3.0]], dtype=torch.float16)
    weight = QTensor(codes, GridParams(scale, torch.randint(0, 2**bits, (3, 2)).float()), scheme)
    there = relay("a.b", weight, QuantScheme.parse(kind), torch.float16)
    assert torch.equal(there.dequantize(), weight.dequantize())
    back = relay("a.b", there, QuantScheme.parse(f"int{bits}-g32-asym"), torch.float16)
    assert torch.equal(back.dequantize(), weight.dequantize())


def test_the_same_scheme_comes_first() -> None:
    for name in FORMATS:
        format = get_format(name)
        for text in ("int4-g128-sym", "q4_0", "nf4", "fp8-block", "mxfp4a16", "int8-g32-asym"):
            scheme, shape = QuantScheme.parse(text), (256, 512)
            if format.problem(scheme, shape) is None:
                assert relaid_scheme(scheme, shape, format) == scheme
