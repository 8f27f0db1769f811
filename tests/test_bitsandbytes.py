"""The format bitsandbytes: its functions and transformers read what we pack, and we read what transformers writes."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtool.checkpoint.reader import Checkpoint
from qtool.errors import QtoolError, UsageError
from qtool.formats import Contents
from qtool.formats.bitsandbytes import BitsAndBytes
from qtool.formats.weights import Weights
from qtool.numerics.grid import GridParams, QTensor, grid_of
from qtool.numerics.scales import nest
from qtool.scheme import KV_SCHEMES, QuantScheme

FORMAT = BitsAndBytes()
KINDS = ["nf4", "nf4-dq", "fp4", "fp4-dq", "llm-int8"]
STATE = "weight.quant_state.bitsandbytes__nf4"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def any_qtensor(kind: str, out: int, inputs: int, seed: int = 0) -> QTensor:
    """Any codes under scales as they are stored; those of llm-int8 come from an SCB, the magnitude of 127."""
    scheme, generator = QuantScheme.parse(kind), torch.Generator().manual_seed(seed)
    low, high = (1, 256) if kind == "llm-int8" else (0, 16)
    codes = torch.randint(low, high, (out, inputs), generator=generator, dtype=torch.uint8)
    scale = torch.rand(out, scheme.groups(inputs), generator=generator) + 1e-3
    if kind == "llm-int8":
        return QTensor(codes, GridParams(scale * 127 / 127), scheme)
    if kind in ("nf4", "fp4"):
        return QTensor(codes, GridParams(scale), scheme)
    nested, maxima, offset = nest(scale)
    return QTensor(codes, GridParams(nested, None, maxima, offset), scheme)


def assert_same(ours: QTensor, other: QTensor) -> None:
    assert ours.scheme == other.scheme
    for mine, theirs in zip(ours.tensors(), other.tensors(), strict=True):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        assert torch.equal(mine, theirs), f"{int((mine != theirs).sum())} of {mine.numel()} differ"


def parts(kind: str, weight: QTensor, dtype: str = "BF16") -> dict[str, Tensor]:
    return {name.removeprefix("m."): tensor for name, tensor in FORMAT.pack("m", weight, dtype).items()}


@given(kind=st.sampled_from(KINDS), out=st.integers(1, 70), groups=st.integers(1, 9), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=100)
def test_packing_and_its_inverse(kind: str, out: int, groups: int, seed: int) -> None:
    inputs = 7 * groups if kind == "llm-int8" else 64 * groups
    weight = any_qtensor(kind, out, inputs, seed)
    for dtype in DTYPES:
        packed = FORMAT.pack("m", weight, dtype)
        names = {torch.int8: "I8", torch.uint8: "U8", torch.float32: "F32"}
        layout = {t.name: (t.dtype, t.shape) for t in FORMAT.layout("m", weight.scheme, (out, inputs), "BF16")}
        assert layout == {name: (names[t.dtype], tuple(t.shape)) for name, t in packed.items()}
        assert all(t.is_contiguous() for t in packed.values())
        assert {name.removeprefix("m") for name in packed} <= set(FORMAT.parts)
        assert_same(FORMAT.unpack("m", {**packed, "x.weight": torch.zeros(1)}, weight.scheme), weight)


def test_worked_examples_with_their_bits() -> None:
    codes = torch.tensor([[1, 128, 255], [127, 129, 128]], dtype=torch.uint8)
    packed = parts("llm-int8", QTensor(codes, GridParams(torch.tensor([[0.5], [2.0]])), QuantScheme.parse("llm-int8")))
    assert packed["weight"].tolist() == [[-127, 0, 127], [-1, 1, 0]]
    assert packed["SCB"].tolist() == [63.5, 254.0]
    assert (packed["weight_format"].tolist(), packed["weight_format"].dtype) == (0, torch.uint8)
    codes = torch.arange(16, dtype=torch.uint8).repeat(4)[None]
    weight = QTensor(codes, GridParams(torch.tensor([[3.0]])), QuantScheme.parse("nf4"))
    packed = parts("nf4", weight, "F16")
    assert packed["weight"].tolist() == [[0x01], [0x23], [0x45], [0x67], [0x89], [0xAB], [0xCD], [0xEF]] * 4
    assert packed["weight.absmax"].tolist() == [3.0]
    text = bytes(packed[STATE].tolist()).decode()
    assert text == '{"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [1, 64]} '
    assert packed["weight.quant_map"][[0, 7, 15]].tolist() == [-1.0, 0.0, 1.0]
    params = GridParams(torch.tensor([[255]], dtype=torch.uint8), None, torch.tensor([2.0]), torch.tensor([0.125]))
    packed = parts("nf4-dq", QTensor(codes, params, QuantScheme.parse("nf4-dq")))
    assert packed["weight.absmax"].tolist() == [255]
    assert packed["weight.nested_absmax"].tolist() == [2.0]
    assert packed["weight.nested_quant_map"][[0, 127, 255]].tolist() == pytest.approx([-0.9929688, 0.0, 1.0])
    text = bytes(packed[STATE].tolist()).decode()
    assert json.loads(text)["nested_offset"] == 0.125
    assert len(text) == len(text.rstrip()) + 19, "as long as with the longest offset, of 24 characters"


@pytest.mark.parametrize("offset", [1e-30, -1.2345678e-7, 0.1, 3.4e38, -3.4028234663852886e38, 1.17549435e-38])
def test_the_length_of_the_json_does_not_depend_on_its_numbers(offset: float) -> None:
    weight = any_qtensor("nf4-dq", 3, 128)
    weight.params.super_zero.fill_(offset)  # type: ignore[union-attr]
    assert_same(FORMAT.unpack("m", FORMAT.pack("m", weight), weight.scheme), weight)
    lengths = {len(parts("nf4-dq", weight, dtype)[STATE]) for dtype in DTYPES}
    layout = {t.name: t.shape for t in FORMAT.layout("m", weight.scheme, (3, 128), "F16")}
    assert lengths == {layout[f"m.{STATE}"][0]}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bitsandbytes_reads_our_weights(kind: str, dtype: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    for out, inputs in ((5, 192), (64, 640), (33, 1024)):
        weight = any_qtensor(kind, out, inputs)
        packed, ours = parts(kind, weight, dtype), weight.dequantize()
        if kind == "llm-int8":
            theirs = bnb.functional.int8_vectorwise_dequant(packed["weight"], packed["SCB"])
            # it multiplies by SCB and then by 1/127, rounding each time
            gap = ((theirs - ours).abs() / ours.abs().clamp(min=1e-20)).max()
            assert gap <= 2**-22, f"relative difference {gap:.3e}"
        else:
            data = packed.pop("weight")
            state = bnb.functional.QuantState.from_dict(packed, torch.device("cpu"))
            assert state.dtype == DTYPES[dtype]
            theirs = bnb.functional.dequantize_4bit(data, state)
            gap = (theirs.float() - ours.to(theirs.dtype).float()).abs()
            assert theirs.dtype == DTYPES[dtype]
            assert torch.equal(theirs, ours.to(theirs.dtype)), f"max difference {gap.max():.3e}, mean {gap.mean():.3e}"


@pytest.mark.parametrize("kind", KINDS)
def test_bitsandbytes_packs_the_same_tensors(kind: str) -> None:
    """What it makes of a weight is, unpacked and packed by us, the same bytes."""
    bnb = pytest.importorskip("bitsandbytes")
    dense = torch.randn(48, 320, generator=torch.Generator().manual_seed(3))
    if kind == "llm-int8":
        codes, scb, _ = bnb.functional.int8_vectorwise_quant(dense.half())
        theirs = {"weight": codes, "SCB": scb, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    else:
        data, state = bnb.functional.quantize_4bit(
            dense.bfloat16(), quant_type=kind[:3], compress_statistics=kind.endswith("-dq")
        )
        theirs = {"weight": data, **{f"weight.{n}": t for n, t in state.as_dict(packed=True).items()}}
    ours = parts(kind, FORMAT.unpack("m", {f"m.{n}": t for n, t in theirs.items()}, QuantScheme.parse(kind)))
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        if "quant_state" in name:
            assert json.loads(bytes(ours[name].tolist())) == json.loads(bytes(tensor.tolist()))
        elif name == "SCB":
            assert torch.allclose(ours[name], tensor, rtol=2**-23, atol=0), (
                "127 times a 127th may be the number beside it"
            )
        else:
            assert torch.equal(ours[name], tensor), name


def test_the_config_is_what_transformers_writes() -> None:
    from transformers import BitsAndBytesConfig

    def ours(kinds: list[str]) -> dict[str, Any]:
        return FORMAT.config(
            Contents({f"m{i}": QuantScheme.parse(k) for i, k in enumerate(kinds)}, ["lm_head"], None, "F16")
        )

    assert ours(["llm-int8"]) == BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"]).to_dict()
    four: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float16"}
    four["llm_int8_skip_modules"] = ["lm_head"]
    assert ours(["nf4"]) == BitsAndBytesConfig(**four).to_dict()
    assert ours(["nf4", "nf4-dq"]) == BitsAndBytesConfig(**four, bnb_4bit_use_double_quant=True).to_dict()
    four["bnb_4bit_quant_type"] = "fp4"
    assert ours(["fp4"]) == BitsAndBytesConfig(**four).to_dict()
    assert ours(["fp4-dq"]) == BitsAndBytesConfig(**four, bnb_4bit_use_double_quant=True).to_dict()
    for kinds in (["nf4", "llm-int8"], ["nf4", "fp4-dq"]):
        with pytest.raises(UsageError, match="holds llm-int8, nf4 or fp4 in one checkpoint"):
            ours(kinds)
    with pytest.raises(UsageError, match="keys and values"):
        FORMAT.quantization_config(Contents({"m": QuantScheme.parse("nf4")}, kv=KV_SCHEMES["fp8"]))


def write(folder: Path, kind: str, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> QTensor:
    weight = any_qtensor(kind, 6, 128)
    tensors = FORMAT.pack("a.b", weight)
    config = FORMAT.config(Contents({"a.b": weight.scheme}, []))
    change(tensors, config)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return weight


def put(name: str, tensor: Tensor | None) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor

    return change


def spelled(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


WRONG_BLOCKS = '{"quant_type": "nf4", "blocksize": 128, "dtype": "float16", "shape": [6, 128]}'
WRONG_SHAPE = '{"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [6, 100]}'
FP4 = '{"quant_type": "fp4", "blocksize": 64, "dtype": "float16", "shape": [6, 128]}'
NO_OFFSET = '{"quant_type": "fp4", "blocksize": 64, "nested_blocksize": 256, "dtype": "float16", "shape": [6, 128]}'
DAMAGES = {
    "a flat weight": ("llm-int8", put("a.b.weight", torch.zeros(9).char()), "a.b.weight"),
    "no weight": ("llm-int8", put("a.b.weight", None), "a.b` has SCB but no weight"),
    "fewer SCB": ("llm-int8", put("a.b.SCB", torch.ones(5)), "a.b.SCB"),
    "tiles": ("llm-int8", put("a.b.weight_format", torch.tensor(2, dtype=torch.uint8)), "a.b.weight_format` is 2"),
    "no absmax": ("nf4", put("a.b.weight.absmax", None), "a.b.weight.absmax"),
    "no map": ("nf4", put("a.b.weight.quant_map", None), "a.b.weight.quant_map"),
    "half a weight": ("nf4", put("a.b.weight", torch.zeros(192, 1).byte()), "a.b.weight"),
    "words": ("nf4", put("a.b.weight", torch.zeros(384, 1)), "a.b.weight` in"),
    "no JSON": ("nf4", put(f"a.b.{STATE}", spelled('{"shape": ')), f"a.b.{STATE}"),
    "a list": ("nf4", put(f"a.b.{STATE}", spelled("[]")), "is not a JSON object"),
    "no shape": ("nf4", put(f"a.b.{STATE}", spelled('{"shape": null}')), "impossible shape None"),
    "a shape of words": ("nf4", put(f"a.b.{STATE}", spelled('{"shape": ["a", 1]}')), "impossible shape"),
    "other blocks": ("nf4", put(f"a.b.{STATE}", spelled(WRONG_BLOCKS)), "a scale for 128 weights"),
    "broken blocks": ("nf4", put(f"a.b.{STATE}", spelled(WRONG_SHAPE)), "100 inputs are not a multiple of 64"),
    "two types": ("nf4", put(f"a.b.{STATE}".replace("nf4", "fp4"), spelled(FP4)), "said to be fp4 and nf4"),
    "a long text": ("nf4", put(f"a.b.{STATE}", spelled("[" * 5000)), "is U8, 5000 bytes"),
    "a deep text": ("nf4", put(f"a.b.{STATE}", spelled("[" * 4000)), f"a.b.{STATE}"),
    "no offset": ("fp4-dq", put(f"a.b.{STATE}".replace("nf4", "fp4"), spelled(NO_OFFSET)), "impossible offset"),
    "other values": ("fp4", put("a.b.weight.quant_map", torch.ones(16)), "has other values"),
    "a wide format": ("llm-int8", put("a.b.weight_format", torch.zeros(9).byte()), "a.b.weight_format` in"),
    "endless threshold": ("llm-int8", lambda t, c: c.update(llm_int8_threshold=1e999), "llm_int8_threshold inf"),
    "no nested map": ("nf4-dq", put("a.b.weight.nested_quant_map", None), "a.b.weight.nested_quant_map"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_an_error_that_says_where(tmp_path: Path, damage: str) -> None:
    kind, change, message = DAMAGES[damage]
    write(tmp_path, kind, change)
    with pytest.raises(QtoolError) as caught:
        Weights(Checkpoint(tmp_path)).read(["a.b.weight"])
    assert message in caught.value.message, caught.value.message


def test_what_older_versions_leave_out(tmp_path: Path) -> None:
    weight = write(tmp_path, "llm-int8", put("a.b.weight_format", None))
    checkpoint = Checkpoint(tmp_path)
    assert FORMAT.modules(checkpoint) == {"a.b": (weight.scheme, (6, 128))}
    assert_same(FORMAT.unpack("a.b", dict(checkpoint.read_many(checkpoint.tensors)), weight.scheme), weight)
    threshold = write(tmp_path, "llm-int8", lambda tensors, config: config.update(llm_int8_threshold=4.0))
    ((scheme, _),) = FORMAT.modules(Checkpoint(tmp_path)).values()
    assert scheme.activations is not None
    assert scheme.activations.threshold == 4.0 != threshold.scheme.activations.threshold  # type: ignore[union-attr]


def load(folder: Path, **options: Any) -> Any:
    """The model, without the kernel of bitsandbytes for some CPUs (avx512_bf16), which rounds otherwise."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def block_linears(source: Path, tensors: dict[str, Tensor]) -> list[str]:
    conv = json.loads((source / "config.json").read_text())["model_type"] == "gpt2"
    ends = ("c_attn.weight", "c_proj.weight", "c_fc.weight") if conv else ("_proj.weight",)
    return [name.removesuffix(".weight") for name in tensors if name.endswith(ends)]


TOKENS = torch.arange(2, 26).view(2, 12)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("kinds", [["llm-int8"], ["nf4"], ["nf4-dq"], ["nf4", "nf4-dq"], ["fp4"], ["fp4-dq"]], ids=str)
def test_transformers_loads_what_is_written(
    tmp_path: Path, make_model: Callable[..., Path], architecture: str, kinds: list[str]
) -> None:
    pytest.importorskip("accelerate")
    bnb = pytest.importorskip("bitsandbytes")
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    source, folder = make_model(architecture), tmp_path / "out"
    transposed = architecture == "gpt2"
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    weights: dict[str, QTensor] = {}
    dense = load(source)
    modules = block_linears(source, tensors)
    left_out = modules[-1]  # one of them stays as it is, by its name
    for i, module in enumerate(modules[:-1]):
        stored = tensors.pop(f"{module}.weight").float()
        weight_OI = (stored.T if transposed else stored).contiguous()
        grid = grid_of(QuantScheme.parse(kinds[i % len(kinds)]), torch.bfloat16)
        weight = grid.nearest(weight_OI, grid.fit(weight_OI, search=False))
        weights[module] = weight
        tensors |= FORMAT.pack(module, weight)
        rounded = weight.dequantize()
        dense.get_parameter(f"{module}.weight").data = (rounded.T if transposed else rounded).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    schemes = {module: weight.scheme for module, weight in weights.items()}
    config["quantization_config"] = FORMAT.config(Contents(schemes, ["lm_head", left_out]))
    (folder / "config.json").write_text(json.dumps(config))

    whole = Weights(Checkpoint(folder))
    for module, weight in weights.items():
        read, rounded = whole.read([f"{module}.weight"])[f"{module}.weight"], weight.dequantize()
        assert torch.equal(read, rounded.T if transposed else rounded), module

    model = load(folder)
    for module, weight in weights.items():
        loaded = model.get_submodule(module)
        assert isinstance(loaded, bnb.nn.Linear8bitLt if kinds == ["llm-int8"] else bnb.nn.Linear4bit), module
        theirs = dequantize_bnb_weight(loaded.weight, getattr(loaded, "state", None)).bfloat16()
        assert torch.equal(theirs, weight.dequantize().bfloat16()), module
    assert not isinstance(model.get_submodule(left_out), bnb.nn.Linear8bitLt | bnb.nn.Linear4bit)
    with torch.no_grad():
        expected, logits = dense(TOKENS).logits.float(), model(TOKENS).logits.float()
    off = ((logits - expected).norm() / expected.norm()).item()
    if kinds == ["llm-int8"]:
        assert 0 < off < 0.05, f"inputs are rounded to 8 bits: {off}"
    else:
        assert torch.equal(logits, expected), f"relative difference {off}"


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_we_read_what_transformers_writes(
    tmp_path: Path, make_model: Callable[..., Path], architecture: str, kind: str
) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    asked = (
        BitsAndBytesConfig(load_in_8bit=True)
        if kind == "llm-int8"
        else BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=kind[:3], bnb_4bit_use_double_quant=kind.endswith("-dq")
        )
    )
    source = make_model(architecture)
    model = load(source, quantization_config=asked)
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    whole, found = Weights(checkpoint), FORMAT.modules(checkpoint)
    assert set(found) == set(block_linears(source, load_file(source / "model.safetensors")))
    assert {str(scheme) for scheme, _ in found.values()} == {kind}
    assert set(whole.shapes) == set(Checkpoint(source).tensors)
    for module, (_, shape) in found.items():
        loaded = model.get_submodule(module)
        assert shape == (loaded.out_features, loaded.in_features)
        theirs = dequantize_bnb_weight(loaded.weight, getattr(loaded, "state", None))
        ours = whole.read([f"{module}.weight"])[f"{module}.weight"]
        ours = ours.T if architecture == "gpt2" else ours
        tolerance = 2**-22 * ours.abs().max() if kind == "llm-int8" else 0
        matching = ours if kind == "llm-int8" else ours.to(theirs.dtype)
        gap = (matching.float() - theirs.float()).abs()
        assert gap.max() <= tolerance, f"{module}: max difference {gap.max():.3e}, mean {gap.mean():.3e}"
