"""compressed-tensors: what is laid out is what is packed, unpacking is the inverse, and the library agrees."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from qtool.checkpoint.reader import Checkpoint
from qtool.errors import QtoolError, UsageError
from qtool.formats import FORMATS, Contents, get_format
from qtool.formats.compressed_tensors import CompressedTensors
from qtool.formats.weights import Weights
from qtool.numerics.grid import GridParams, QTensor
from qtool.scheme import QuantScheme

FORMAT = CompressedTensors()
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}
SAFETENSORS = {torch.int32: "I32", torch.int64: "I64", torch.int8: "I8", torch.bfloat16: "BF16", torch.float16: "F16"}
SCHEMES = [
    f"int{bits}-{granularity}-{symmetry}"
    for bits, granularity, symmetry in itertools.product(range(2, 9), ("tensor", "channel", "g16"), ("sym", "asym"))
]


def make_qtensor(scheme: str, out: int, inputs: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> QTensor:
    """Any codes and parameters that the grid could give: scales of both signs, all zero points."""
    parsed, generator = QuantScheme.parse(scheme), torch.Generator().manual_seed(seed)
    shape = (1, 1) if parsed.granularity == "tensor" else (out, parsed.groups(inputs))
    scale = (0.01 * torch.randn(shape, generator=generator)).to(dtype)
    codes = torch.randint(0, 2**parsed.bits, (out, inputs), generator=generator, dtype=torch.uint8)
    zero = None if parsed.symmetric else torch.randint(0, 2**parsed.bits, shape, generator=generator).float()
    return QTensor(codes, GridParams(scale if parsed.symmetric else scale.abs(), zero), parsed)


def assert_same(ours: QTensor, other: QTensor) -> None:
    assert ours.scheme == other.scheme
    assert torch.equal(ours.codes, other.codes), f"{int((ours.codes != other.codes).sum())} codes differ"
    assert ours.codes.dtype == other.codes.dtype
    assert ours.params.scale.dtype == other.params.scale.dtype
    assert torch.equal(ours.params.scale, other.params.scale)
    if other.params.zero is None:
        assert ours.params.zero is None
    else:
        assert ours.params.zero is not None
        assert ours.params.zero.dtype == other.params.zero.dtype
        assert torch.equal(ours.params.zero, other.params.zero)
    assert torch.equal(ours.dequantize(), other.dequantize())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("scale", ["BF16", "F16"])
def test_the_layout_is_what_is_packed(scheme: str, scale: str) -> None:
    for out, inputs in ((8, 64), (5, 48), (33, 80), (1, 16)):
        weight = make_qtensor(scheme, out, inputs, dtype=DTYPES[scale])
        packed = FORMAT.pack("a.b", weight)
        layout = {t.name: (t.dtype, t.shape) for t in FORMAT.layout("a.b", weight.scheme, (out, inputs), scale)}
        assert layout == {n: (SAFETENSORS[t.dtype], tuple(t.shape)) for n, t in packed.items()}
        assert all(t.is_contiguous() for t in packed.values())
        assert all(n.startswith("a.b.weight_") for n in packed)
        assert ("a.b.weight_zero_point" in packed) == scheme.endswith("-asym"), "a symmetric scheme has no zero point"


def test_the_layout_by_hand() -> None:
    def told(scheme: str, shape: tuple[int, int]) -> dict[str, tuple[str, tuple[int, ...]]]:
        tensors = FORMAT.layout("m", QuantScheme.parse(scheme), shape, "BF16")
        return {t.name.removeprefix("m.weight_"): (t.dtype, t.shape) for t in tensors}

    # 256 inputs of 4 bits: 32 words; 2 groups; zero points of 40 rows: 160 bits, 5 words
    assert told("int4-g128-asym", (40, 256)) == {
        "packed": ("I32", (40, 32)), "scale": ("BF16", (40, 2)), "shape": ("I64", (2,)), "zero_point": ("I32", (5, 2)),
    }  # fmt: skip
    # 33 inputs of 3 bits: 99 bits, 4 words; 11 rows of 3 bits: 33 bits, 2 words
    assert told("int3-channel-asym", (11, 33)) == {
        "packed": ("I32", (11, 4)), "scale": ("BF16", (11, 1)), "shape": ("I64", (2,)), "zero_point": ("I32", (2, 1)),
    }  # fmt: skip
    assert told("int8-tensor-asym", (3, 5)) == {
        "packed": ("I32", (3, 2)), "scale": ("BF16", (1,)), "shape": ("I64", (2,)), "zero_point": ("I8", (1,)),
    }  # fmt: skip
    assert told("int4-channel-sym", (2, 8)) == {
        "packed": ("I32", (2, 1)), "scale": ("BF16", (2, 1)), "shape": ("I64", (2,)),
    }  # fmt: skip


def test_a_worked_example_with_its_bits() -> None:
    """Two rows of 9 inputs, 4 bits: code 8 means 0, so -8..7 are stored as 0..15, low bits first."""
    codes = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8], [15, 14, 13, 12, 11, 10, 9, 8, 7]], dtype=torch.uint8)
    scale = torch.tensor([[0.5], [2.0]], dtype=torch.bfloat16)
    zero = torch.tensor([[8.0], [3.0]])
    packed = FORMAT.pack("m", QTensor(codes, GridParams(scale, zero), QuantScheme.parse("int4-channel-asym")))
    words = [[word % 2**32 for word in row] for row in packed["m.weight_packed"].tolist()]
    assert words == [[0x76543210, 0x8], [0x89ABCDEF, 0x7]]
    assert packed["m.weight_zero_point"].tolist() == [[0x38]]  # row 0 in the low bits, row 1 next
    assert packed["m.weight_shape"].tolist() == [2, 9]
    assert packed["m.weight_scale"].tolist() == [[0.5], [2.0]]
    # per tensor the zero point is signed and not packed: 3 - 8
    whole = QTensor(codes, GridParams(scale[:1], zero[1:]), QuantScheme.parse("int4-tensor-asym"))
    assert FORMAT.pack("m", whole)["m.weight_zero_point"].tolist() == [-5]
    assert FORMAT.pack("m", whole)["m.weight_scale"].tolist() == [0.5]


@given(
    scheme=st.sampled_from(SCHEMES),
    out=st.integers(1, 70),
    groups=st.integers(1, 7),
    rest=st.integers(0, 15),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(list(DTYPES.values())),
)
@settings(deadline=None, max_examples=200)
def test_unpacking_undoes_packing(scheme: str, out: int, groups: int, rest: int, seed: int, dtype: torch.dtype) -> None:
    inputs = 16 * groups if "g16" in scheme else max(1, 16 * groups - rest)  # only groups must divide
    weight = make_qtensor(scheme, out, inputs, seed, dtype)
    packed = FORMAT.pack("m", weight)
    assert_same(FORMAT.unpack("m", packed, weight.scheme), weight)
    unrelated = {**packed, "other.weight": torch.zeros(1)}
    assert_same(FORMAT.unpack("m", unrelated, weight.scheme), weight)


def library_scheme(scheme: QuantScheme) -> QuantizationScheme:
    args = QuantizationArgs(
        num_bits=scheme.bits,
        type="int",
        symmetric=scheme.symmetric,
        strategy=scheme.granularity,
        group_size=scheme.group_size,
    )
    return QuantizationScheme(targets=["Linear"], weights=args)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))
def test_the_library_unpacks_our_weights(scheme: str, dtype: torch.dtype) -> None:
    for out, inputs in ((8, 64), (33, 48), (5, 16)):
        weight = make_qtensor(scheme, out, inputs, dtype=dtype)
        state = {n.removeprefix("m."): t for n, t in FORMAT.pack("m", weight).items()}
        ours = weight.dequantize()
        # with a float32 scale the library computes (code - zero) * scale in float32, as we do: the very same numbers
        wide = {**state, "weight_scale": state["weight_scale"].float()}
        theirs = PackedQuantizationCompressor.decompress(wide, library_scheme(weight.scheme))["weight"]
        assert theirs.dtype == torch.float32
        gap = (theirs - ours).abs()
        assert torch.equal(theirs, ours), f"max difference {gap.max():.3e}, mean {gap.mean():.3e}"
        # with the scale as it is stored it rounds once, at the end: differences of codes up to 255 are exact in 16 bits
        narrow = PackedQuantizationCompressor.decompress(state, library_scheme(weight.scheme))["weight"]
        gap = (narrow.float() - ours.to(dtype).float()).abs()
        assert torch.equal(narrow, ours.to(dtype)), f"max difference {gap.max():.3e}, mean {gap.mean():.3e}"


@pytest.mark.parametrize("scheme", ["int4-g16-sym", "int3-channel-asym", "int8-channel-sym"])
def test_the_library_packs_the_same_tensors(scheme: str) -> None:
    weight = make_qtensor(scheme, 33, 48)
    ours = {n.removeprefix("m."): t for n, t in FORMAT.pack("m", weight).items()}
    dense = {"weight": weight.dequantize(), "weight_scale": weight.params.scale.float()}
    if weight.params.zero is not None:
        dense["weight_zero_point"] = (weight.params.zero - 2 ** (weight.scheme.bits - 1)).to(torch.int8)
    theirs = PackedQuantizationCompressor.compress(dense, library_scheme(weight.scheme))
    assert set(theirs) == set(ours)
    for name in ("weight_packed", "weight_shape", "weight_zero_point"):
        if name in ours:
            assert torch.equal(theirs[name], ours[name]), name


MIXED = {
    "model.layers.0.self_attn.q_proj": "int4-g16-sym",
    "model.layers.0.self_attn.k_proj": "int4-g16-sym",
    "model.layers.0.mlp.down_proj": "int8-channel-sym",
    "model.layers.1.self_attn.q_proj": "int4-g16-sym",
    "model.layers.1.self_attn.k_proj": "int4-g16-sym",
    "model.layers.1.mlp.down_proj": "int3-channel-asym",  # other than in layer 0: no pattern covers both
    "model.layers.10.self_attn.q_proj": "int4-g16-sym",
    "model.layers.10.self_attn.k_proj": "int2-tensor-asym",
    "model.layers.10.mlp.down_proj": "int8-channel-sym",
    "score.0": "int5-g32-asym",
    "score.0.extra": "int6-channel-sym",
}
SHAPES = {module: (33, 64) if "q_proj" in module else (17, 96) for module in MIXED}


def write_packed(
    folder: Path, schemes: dict[str, str], change: Callable[[dict[str, Tensor], dict[str, Any]], None] | None = None
) -> dict[str, QTensor]:
    """A checkpoint with these modules and one dense norm; `change` may damage its tensors and its config."""
    weights = {m: make_qtensor(s, *SHAPES[m], seed=i) for i, (m, s) in enumerate(schemes.items())}
    tensors: dict[str, Tensor] = {"model.norm.weight": torch.ones(4)}
    for module, weight in weights.items():
        tensors.update(FORMAT.pack(module, weight))
    parsed = {module: weight.scheme for module, weight in weights.items()}
    config = {"model_type": "llama", "quantization_config": FORMAT.config(Contents(parsed, ["lm_head"]))}
    if change:
        change(tensors, config)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return weights


@pytest.mark.parametrize(
    "schemes",
    [
        MIXED,
        dict.fromkeys(MIXED, "int4-g32-sym"),
        dict.fromkeys(MIXED, "int3-tensor-asym"),
        dict.fromkeys(MIXED, "int8-channel-asym"),
    ],
    ids=["mixed", "one", "tensor", "channel"],
)
def test_a_written_checkpoint_reads_back(tmp_path: Path, schemes: dict[str, str]) -> None:
    written = write_packed(tmp_path, schemes)
    checkpoint = Checkpoint(tmp_path)
    assert FORMAT.modules(checkpoint) == {m: (w.scheme, SHAPES[m]) for m, w in written.items()}
    weights = Weights(checkpoint)
    assert weights.schemes == {m: w.scheme for m, w in written.items()}
    assert weights.shapes == {"model.norm.weight": (4,), **{f"{m}.weight": SHAPES[m] for m in schemes}}
    read = weights.read([*(f"{m}.weight" for m in schemes), "model.norm.weight"])
    for module, weight in written.items():
        assert torch.equal(read[f"{module}.weight"], weight.dequantize()), module
    assert torch.equal(read["model.norm.weight"], torch.ones(4))


def test_the_config_is_what_the_library_takes() -> None:
    from compressed_tensors.quantization import QuantizationConfig

    config = FORMAT.config(Contents({m: QuantScheme.parse(s) for m, s in MIXED.items()}, ["lm_head"]))
    parsed = QuantizationConfig.model_validate(config)
    assert parsed.ignore == ["lm_head"]
    assert parsed.format == "pack-quantized"
    found = {QuantScheme(g.weights.num_bits, str(g.weights.strategy), g.weights.group_size, g.weights.symmetric)
             for g in parsed.config_groups.values()}  # fmt: skip
    assert found == {QuantScheme.parse(s) for s in MIXED.values()}
    assert json.loads(json.dumps(config)) == config


def test_the_library_matches_each_module_to_its_own_scheme() -> None:
    """Its own matching of targets to modules, on modules of these names."""
    from compressed_tensors.utils import match_named_modules

    model = torch.nn.Module()
    for module in MIXED:
        owner = model
        *parents, last = module.split(".")
        for parent in parents:
            if parent not in owner._modules:
                owner.add_module(parent, torch.nn.Module())
            owner = owner.get_submodule(parent)
        if last not in owner._modules:
            owner.add_module(last, torch.nn.Linear(2, 2))
    config = FORMAT.config(Contents({m: QuantScheme.parse(s) for m, s in MIXED.items()}, ["lm_head"]))
    for group in config["config_groups"].values():
        weights = group["weights"]
        scheme = QuantScheme(weights["num_bits"], weights["strategy"], weights["group_size"], weights["symmetric"])
        matched = {name for name, _ in match_named_modules(model, group["targets"])}
        assert matched == {m for m, s in MIXED.items() if QuantScheme.parse(s) == scheme}, group["targets"]


def test_one_scheme_is_one_class_target() -> None:
    config = FORMAT.config(
        Contents({"a.0.b": QuantScheme.parse("int4"), "a.1.b": QuantScheme.parse("int4")}, ["lm_head"])
    )
    assert list(config["config_groups"]) == ["group_0"]
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    weights = config["config_groups"]["group_0"]["weights"]
    assert {k: weights[k] for k in ("num_bits", "type", "symmetric", "strategy", "group_size")} == {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128,
    }  # fmt: skip


def test_patterns_stay_short_where_whole_kinds_share_a_scheme() -> None:
    schemes = {f"model.layers.{i}.mlp.{kind}_proj": QuantScheme.parse("int8" if kind == "down" else "int4")
               for i in range(12) for kind in ("up", "gate", "down")}  # fmt: skip
    groups = FORMAT.config(Contents(schemes, []))["config_groups"].values()
    assert sorted(len(group["targets"]) for group in groups) == [1, 2]


GROUPED = "model.layers.0.self_attn.q_proj"  # int4-g16-asym
CHANNEL = "model.layers.0.mlp.down_proj"  # int3-channel-asym


def drop(name: str) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda tensors, config: tensors.__delitem__(name)


def put(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda tensors, config: tensors.update({name: tensor})


def cast(name: str, dtype: torch.dtype) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda tensors, config: tensors.update({name: tensors[name].to(dtype)})


DAMAGES = {
    "no scale": (drop(GROUPED + ".weight_scale"), GROUPED),
    "no shape": (drop(GROUPED + ".weight_shape"), GROUPED),
    "no zero point": (drop(GROUPED + ".weight_zero_point"), GROUPED + ".weight_zero_point"),
    "no zero point of a channel": (drop(CHANNEL + ".weight_zero_point"), CHANNEL + ".weight_zero_point"),
    "short words": (put(GROUPED + ".weight_packed", torch.zeros(33, 7, dtype=torch.int32)), GROUPED + ".weight_packed"),
    "flat words": (put(GROUPED + ".weight_packed", torch.zeros(33, dtype=torch.int32)), GROUPED + ".weight_packed"),
    "a scalar for words": (put(GROUPED + ".weight_packed", torch.tensor(1).int()), GROUPED + ".weight_packed"),
    "scale of fewer rows": (put(GROUPED + ".weight_scale", torch.ones(32, 4)), GROUPED + ".weight_scale"),
    "scale of more groups": (put(GROUPED + ".weight_scale", torch.ones(33, 5)), GROUPED),
    "a scalar for a scale": (put(GROUPED + ".weight_scale", torch.tensor(1.0)), GROUPED + ".weight_scale"),
    "wrong zero points": (
        put(GROUPED + ".weight_zero_point", torch.zeros(33, 4, dtype=torch.int32)), GROUPED + ".weight_zero_point",
    ),
    "wrong shape tensor": (put(CHANNEL + ".weight_shape", torch.tensor([17, 96, 1])), CHANNEL + ".weight_shape"),
    "wrong shape type": (cast(CHANNEL + ".weight_shape", torch.float32), CHANNEL + ".weight_shape"),
    "another number of inputs": (put(CHANNEL + ".weight_shape", torch.tensor([17, 960])), CHANNEL),
    "a negative number of inputs": (put(CHANNEL + ".weight_shape", torch.tensor([17, -96])), CHANNEL),
    "shape against the words": (put(GROUPED + ".weight_shape", torch.tensor([33, 48])), GROUPED),
    "rows against the words": (put(CHANNEL + ".weight_shape", torch.tensor([16, 96])), CHANNEL),
    "words of another type": (cast(GROUPED + ".weight_packed", torch.int64), GROUPED + ".weight_packed"),
    "words as floats": (cast(GROUPED + ".weight_packed", torch.float32), GROUPED + ".weight_packed"),
    "an integer scale": (cast(GROUPED + ".weight_scale", torch.int32), GROUPED + ".weight_scale"),
    "zero points as floats": (cast(GROUPED + ".weight_zero_point", torch.float32), GROUPED + ".weight_zero_point"),
    "a scale that is not a number": (put(GROUPED + ".weight_scale", torch.full((33, 4), torch.nan)), GROUPED),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_an_error_that_names_the_tensor(tmp_path: Path, damage: str) -> None:
    change, named = DAMAGES[damage]
    write_packed(tmp_path, {GROUPED: "int4-g16-asym", CHANNEL: "int3-channel-asym"}, change)
    with pytest.raises(QtoolError) as caught:
        Weights(Checkpoint(tmp_path)).read([f"{GROUPED}.weight", f"{CHANNEL}.weight"])
    assert f"`{named}" in caught.value.message, caught.value.message


def edit(**changes: Any) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        group = config["quantization_config"]["config_groups"]["group_0"]
        for key, value in changes.items():
            (group["weights"] if key in group["weights"] else group)[key] = value

    return change


CONFIGS = {
    "float": (edit(type="float"), "4-bit float per group"),
    "blocks": (edit(strategy="block"), "4-bit int per block"),
    "activations": (edit(input_activations={"num_bits": 8}), "not read"),
    "no weights": (edit(weights=None), "not read"),
    "no target": (edit(targets=["re:nothing"]), f"`{GROUPED}`"),
    "no bits": (edit(num_bits=None), "not read"),
    "too many bits": (edit(num_bits=16), "16"),
    "no group size": (edit(group_size=None), "None"),
    "a bad pattern": (edit(targets=["re:("]), "the pattern `(`"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_that_is_not_read_is_an_error(tmp_path: Path, kind: str) -> None:
    change, message = CONFIGS[kind]
    write_packed(tmp_path, {GROUPED: "int4-g16-sym"}, change)
    with pytest.raises(QtoolError) as caught:
        Weights(Checkpoint(tmp_path))
    assert message in caught.value.message, caught.value.message


def test_another_quantization_method_is_named(tmp_path: Path) -> None:
    write_packed(
        tmp_path,
        {GROUPED: "int4-g16-sym"},
        lambda tensors, config: config["quantization_config"].update(quant_method="quip"),
    )
    with pytest.raises(QtoolError, match="is quantized as `quip`"):
        Weights(Checkpoint(tmp_path))


def test_a_dense_checkpoint_has_no_format(make_model: Callable[..., Path]) -> None:
    checkpoint = Checkpoint(make_model())
    weights = Weights(checkpoint)
    assert weights.format is None
    assert weights.schemes == {}
    assert weights.shapes == {n: t.shape for n, t in checkpoint.tensors.items()}
    name = "model.layers.0.self_attn.q_proj.weight"
    read = weights.read([name])[name]
    assert read.dtype == torch.float32
    assert torch.equal(read, checkpoint.read(name).float())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_names_its_tensor(tmp_path: Path, value: float) -> None:
    weight = torch.ones(3, 4)
    weight[1, 2] = value
    save_file({"a.weight": weight, "b.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    weights = Weights(Checkpoint(tmp_path))
    assert torch.equal(weights.read(["b.weight"])["b.weight"], torch.ones(2))
    with pytest.raises(QtoolError, match=r"`a\.weight` has 1 NaN or infinite values of 12"):
        weights.read(["a.weight"])


def test_the_table_of_formats() -> None:
    for name in FORMATS:
        assert get_format(name).readers(QuantScheme.parse("int4"))
    with pytest.raises(UsageError) as caught:
        get_format("compressed-tensor")
    assert "`compressed-tensors`" in (caught.value.hint or "")
    assert "vLLM" in FORMAT.readers(QuantScheme.parse("int4"))
    assert "only in versions" in FORMAT.readers(QuantScheme.parse("int3"))
