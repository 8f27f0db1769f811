"""Plans: what happens to each tensor, and every problem told at once before any work."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.checkpoint import writer as writer_module
from qtool.checkpoint.writer import Safetensors
from qtool.errors import UsageError
from qtool.formats.compressed_tensors import CompressedTensors
from qtool.headers import DTYPE_BITS, TensorInfo, kind_of, scale_dtype
from qtool.models.architectures import LLAMA
from qtool.plan import OUTSIDE, Plan, make_plan, matches, unit_of
from qtool.recipe import DEFAULT_IGNORE, Recipe

FUSED = tuple(LLAMA.fused())
LAYOUT = CompressedTensors().tensors
RECIPE = Recipe(scheme="int4-g32-sym", method="gptq")


def tensor(name: str, *shape: int, dtype: str = "BF16") -> TensorInfo:
    return TensorInfo(name, dtype, shape, "model.safetensors")


def llama(layers: int = 2, hidden: int = 64, inner: int = 128, dtype: str = "BF16") -> dict[str, TensorInfo]:
    infos = [tensor("model.embed_tokens.weight", 320, hidden, dtype=dtype)]
    for i in range(layers):
        at = f"model.layers.{i}."
        infos += [tensor(f"{at}self_attn.{p}_proj.weight", hidden, hidden, dtype=dtype) for p in "qkvo"]
        infos += [tensor(f"{at}mlp.{p}_proj.weight", inner, hidden, dtype=dtype) for p in ("gate", "up")]
        infos += [tensor(f"{at}mlp.down_proj.weight", hidden, inner, dtype=dtype)]
        infos += [tensor(f"{at}{p}_layernorm.weight", hidden, dtype=dtype) for p in ("input", "post_attention")]
    infos += [tensor("model.norm.weight", hidden, dtype=dtype), tensor("lm_head.weight", 320, hidden, dtype=dtype)]
    return {info.name: info for info in infos}


def plan(tensors: dict[str, TensorInfo], recipe: Recipe = RECIPE, **options: object) -> Plan:
    return make_plan(tensors, recipe, LAYOUT, FUSED, files=Safetensors().files, **options)  # type: ignore[arg-type]


def failure(tensors: dict[str, TensorInfo], recipe: Recipe = RECIPE, **options: object) -> UsageError:
    with pytest.raises(UsageError) as caught:
        plan(tensors, recipe, **options)
    return caught.value


def test_a_plain_plan() -> None:
    made = plan(llama())
    assert [unit.name for unit in made.units] == [OUTSIDE, "model.layers.0", "model.layers.1"]
    assert len(made.linears) == 14
    assert {k.source.name for k in made.units[0].kept} == {
        "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
    }  # fmt: skip
    assert all(k.asked for k in made.kept)
    assert {k.reason for k in made.kept} == {"ignored by `*embed*`", "ignored by `*norm*`", "ignored by `*lm_head`"}
    assert set(made.outputs) == {k.source.name for k in made.kept} | {
        f"{linear.module}.weight_{part}" for linear in made.linears for part in ("packed", "scale", "shape")
    }
    assert made.bits_per_weight == 4.5
    assert made.size_bytes == sum(info.size_bytes for info in made.outputs.values())


def test_every_problem_is_told_at_once() -> None:
    tensors = llama(inner=136)  # down_proj has 136 inputs
    recipe = Recipe(
        scheme="int4-g32-sym",
        method="gptq",
        layers={"*.v_proj": "int8-channel-sym", "*.w2": "int8-channel-sym"},
        ignore=(*DEFAULT_IGNORE, "*.gate_proj", "*.absent"),
        strict=True,
    )
    tensors["model.layers.0.extra"] = tensor("model.layers.0.extra", 64, 64)
    error = failure(tensors, recipe, solvable=lambda module: not module.endswith("o_proj"))
    lines = error.message.split("\n")
    for part in (
        "`model.layers.0.mlp.down_proj.weight` cannot use int4-g32-sym: "
        "136 inputs are not a multiple of 32 (1 more like it)",
        "--layer pattern `*.w2` matches no layer to quantize",
        "--ignore pattern `*.absent` matches no tensor",
        "`model.layers.0.self_attn.o_proj` is not among the linear layers that gptq has data for (1 more like it)",
        "are served as one layer but have several schemes",
        "--strict: `model.layers.0.extra` would be left alone: its name does not end in `.weight`",
    ):
        assert any(part in line for line in lines), f"{part}\nis not in\n{error.message}"
    assert error.hint
    assert error.exit_code == 2


@pytest.mark.parametrize(
    ("inputs", "hint"),
    [
        (4304, "`--scheme int4-g16-sym`"),  # 16 * 269
        (96, "`--scheme int4-g32-sym`"),
        (100, "`--layer '*.down_proj=int8-channel-sym'`"),
    ],
)
def test_an_impossible_shape_gives_the_numbers_and_a_way_out(inputs: int, hint: str) -> None:
    tensors = {"a.0.down_proj.weight": tensor("a.0.down_proj.weight", 64, inputs)}
    error = failure(tensors, Recipe(scheme="int4-g128-sym"))
    assert (
        error.message == f"`a.0.down_proj.weight` cannot use int4-g128-sym: {inputs} inputs are not a multiple of 128"
    )
    assert hint in (error.hint or "")
    # and what the hint says works
    recipe = Recipe(scheme="int4-g128-sym", layers={"*.down_proj": "int8-channel-sym"})
    assert str(plan(tensors, recipe).linears[0].scheme) == "int8-channel-sym"


def test_impossible_shapes_are_grouped_by_cause() -> None:
    tensors = {f"a.{i}.w.weight": tensor(f"a.{i}.w.weight", 8, 100 if i < 3 else 60) for i in range(5)}
    lines = failure(tensors).message.split("\n")
    assert len(lines) == 2
    assert lines[0].endswith("100 inputs are not a multiple of 32 (2 more like it)")
    assert lines[1].endswith("60 inputs are not a multiple of 32 (1 more like it)")


def test_the_last_pattern_wins() -> None:
    recipe = Recipe(
        scheme="int4-g32-sym", layers={"*.down_proj": "int8-channel-sym", r"re:layers\.1\..*down": "int3-g32-asym"}
    )
    schemes = {linear.module: str(linear.scheme) for linear in plan(llama(), recipe).linears}
    assert schemes["model.layers.0.mlp.down_proj"] == "int8-channel-sym"
    assert schemes["model.layers.1.mlp.down_proj"] == "int3-g32-asym"
    assert schemes["model.layers.1.mlp.up_proj"] == "int4-g32-sym"


def test_patterns_that_match_nothing() -> None:
    error = failure(llama(), Recipe(scheme="int4-g32-sym", layers={"down_proj": "int8-channel-sym"}))
    assert error.message.startswith(
        "--layer pattern `down_proj` matches no layer to quantize (for example `model.layers.0."
    )
    assert error.hint == "patterns match whole names: try `*down_proj*`"
    error = failure(llama(), Recipe(scheme="int4-g32-sym", layers={"*lm_head": "int8-channel-sym"}))
    assert "matches no layer to quantize" in error.message, "what is ignored is not there for --layer"
    error = failure(llama(), Recipe(scheme="int4-g32-sym", ignore=(*DEFAULT_IGNORE, "*.mlp.router_x")))
    assert "--ignore pattern `*.mlp.router_x` matches no tensor" in error.message
    assert plan(llama()), "the default patterns may match nothing"


@pytest.mark.parametrize("where", ["layers", "ignore"])
def test_a_pattern_that_is_no_regular_expression(where: str) -> None:
    recipe = Recipe(
        scheme="int4-g32-sym",
        layers={"re:[": "int8-channel-sym"} if where == "layers" else {},
        ignore=("re:[",) if where == "ignore" else DEFAULT_IGNORE,
    )
    error = failure(llama(), recipe)
    assert "pattern `re:[` is not a regular expression" in error.message


def test_ignore() -> None:
    made = plan(llama(), Recipe(scheme="int4-g32-sym", ignore=(*DEFAULT_IGNORE, "*.layers.1.mlp.*", "*.o_proj")))
    assert {linear.module.rpartition(".")[2] for linear in made.linears} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    assert not any("layers.1.mlp" in linear.module for linear in made.linears)
    kept = {k.source.name: k for k in made.kept}["model.layers.1.mlp.up_proj.weight"]
    assert kept.asked
    assert kept.reason == "ignored by `*.layers.1.mlp.*`"
    assert made.outputs["model.layers.1.mlp.up_proj.weight"].dtype == "BF16"


def test_without_ignore_the_head_and_the_embedding_are_quantized() -> None:
    made = plan(llama(), Recipe(scheme="int4-g32-sym", ignore=()))
    assert {"lm_head", "model.embed_tokens"} <= {linear.module for linear in made.linears}
    assert {k.reason for k in made.kept} == {"a vector, not a matrix"}


ODD = {
    "m.0.experts.weight": (tensor("m.0.experts.weight", 4, 64, 64), "3-D tensors are not supported", False),
    "m.0.conv.weight": (tensor("m.0.conv.weight", 4, 8, 3, 3), "4-D tensors are not supported", False),
    "m.0.table": (tensor("m.0.table", 64, 64), "its name does not end in `.weight`", False),
    "m.0.ids.weight": (tensor("m.0.ids.weight", 64, 64, dtype="I64"), "stored as I64", False),
    "m.0.fp8.weight": (tensor("m.0.fp8.weight", 64, 64, dtype="F8_E4M3"), "stored as F8_E4M3", False),
    "m.0.q.bias": (tensor("m.0.q.bias", 64), "a vector, not a matrix", True),
    "m.0.scalar": (tensor("m.0.scalar"), "a vector, not a matrix", True),
}


def test_what_cannot_be_quantized_is_kept_with_its_reason() -> None:
    tensors = {"m.0.q.weight": tensor("m.0.q.weight", 64, 64), **{n: t for n, (t, _, _) in ODD.items()}}
    made = plan(tensors)
    assert {k.source.name: (k.source, k.reason, k.asked) for k in made.kept} == ODD
    for name, (info, _, _) in ODD.items():
        written = made.outputs[name]
        assert (written.dtype, written.shape) == (info.dtype, info.shape), "it is written as it was"


@pytest.mark.parametrize("name", ODD)
def test_strict_takes_nothing_left_alone_unasked(name: str) -> None:
    info, reason, asked = ODD[name]
    tensors = {"m.0.q.weight": tensor("m.0.q.weight", 64, 64), name: info}
    strict = Recipe(scheme="int4-g32-sym", strict=True)
    if asked:
        assert plan(tensors, strict)
    else:
        error = failure(tensors, strict)
        assert error.message == f"--strict: `{name}` would be left alone: {reason}"
        module = name.removesuffix(".weight")
        assert plan(tensors, Recipe(scheme="int4-g32-sym", strict=True, ignore=(module,))), "unless it is ignored"


def test_nothing_to_quantize() -> None:
    for tensors in ({}, {"a.bias": tensor("a.bias", 4)}, {"model.embed.weight": tensor("model.embed.weight", 4, 4)}):
        assert "no tensor of this checkpoint is a linear layer" in failure(tensors).message


@pytest.mark.parametrize("member", ["q_proj", "k_proj", "v_proj"])
@pytest.mark.parametrize("how", ["another scheme", "left alone"])
def test_linears_that_are_served_as_one_need_one_scheme(member: str, how: str) -> None:
    layers = {f"*.{member}": "int8-channel-sym"} if how == "another scheme" else {}
    ignore = DEFAULT_IGNORE if layers else (*DEFAULT_IGNORE, f"*.{member}")
    error = failure(llama(), Recipe(scheme="int4-g32-sym", layers=layers, ignore=ignore))
    schemes = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "int4-g32-sym")
    schemes[member] = "int8-channel-sym" if layers else "left alone"
    listed = ", ".join(f"{p} {s}" for p, s in schemes.items())
    expected = f"`model.layers.0.*` are served as one layer but have several schemes: {listed} (1 more like it)"
    assert error.message == expected
    assert "`--layer 're:(q_proj|k_proj|v_proj)$=" in (error.hint or "")


def test_linears_that_are_served_as_one_may_share_another_scheme() -> None:
    layers = {r"re:\.(q|k|v)_proj$": "int8-channel-sym", r"re:layers\.0\..*(gate|up)_proj": "int3-g32-sym"}
    assert plan(llama(), Recipe(scheme="int4-g32-sym", layers=layers))
    whole = (*DEFAULT_IGNORE, "*.q_proj", "*.k_proj", "*.v_proj")
    assert plan(llama(), Recipe(scheme="int4-g32-sym", ignore=whole)), "or all be left alone"


def test_units_are_ordered_by_number() -> None:
    tensors = dict(reversed(llama(layers=12).items()))
    names = [unit.name for unit in plan(tensors).units]
    assert names == [OUTSIDE, *(f"model.layers.{i}" for i in range(12))]
    both = {
        n: tensor(n, 32, 32)
        for n in ("vision.blocks.10.w.weight", "model.layers.2.w.weight", "vision.blocks.9.w.weight")
    }
    assert [unit.name for unit in plan(both).units] == ["model.layers.2", "vision.blocks.9", "vision.blocks.10"]


@pytest.mark.parametrize(
    ("name", "unit", "kind"),
    [
        ("model.layers.3.mlp.up_proj", "model.layers.3", "*.mlp.up_proj"),
        ("model.layers.3.mlp.experts.17.up_proj", "model.layers.3", "*.up_proj"),
        ("transformer.h.0.attn", "transformer.h.0", "*.attn"),
        ("lm_head", OUTSIDE, "lm_head"),
        ("model.layer3.w", OUTSIDE, "model.layer3.w"),
        ("score.0", "score.0", "*"),
    ],
)
def test_units_and_kinds_of_names(name: str, unit: str, kind: str) -> None:
    assert unit_of(name + ".weight") == unit
    assert kind_of(name) == kind


def test_every_tensor_is_in_one_unit_and_written_once() -> None:
    tensors = llama(layers=3)
    made = plan(tensors)
    seen = [x.source.name for unit in made.units for x in (*unit.linears, *unit.kept)]
    assert sorted(seen) == sorted(tensors)


def assert_aligned(made: Plan) -> None:
    """Each tensor starts at a multiple of its own type's size, as its shard's header will have it."""
    position: dict[str, int] = {}
    for info in made.outputs.values():
        start = position.get(info.file, 0)
        assert start % max(1, DTYPE_BITS[info.dtype] // 8) == 0, f"{info.name} starts at byte {start}"
        position[info.file] = start + info.size_bytes


def test_shards_are_filled_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = plan(llama(layers=4))
    assert {info.file for info in whole.outputs.values()} == {"model.safetensors"}
    monkeypatch.setattr(writer_module, "SHARD_BYTES", 30_000)
    made = plan(llama(layers=4))
    sizes: dict[str, int] = {}
    for info in made.outputs.values():
        sizes[info.file] = sizes.get(info.file, 0) + info.size_bytes
    count = len(sizes)
    assert count > 2
    assert list(sizes) == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    largest = max(info.size_bytes for info in made.outputs.values())
    assert all(size <= max(30_000, largest) for size in sizes.values()), sizes
    assert {n: (i.dtype, i.shape) for n, i in made.outputs.items()} == {
        n: (i.dtype, i.shape) for n, i in whole.outputs.items()
    }
    # a unit is never in a shard before that of an earlier unit
    last = ""
    for unit in made.units:
        parts = [k.source.name for k in unit.kept]
        parts += [t.name for x in unit.linears for t in LAYOUT(x)]
        files = [made.outputs[name].file for name in parts]
        assert min(files) >= last
        last = max(files)


@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.sampled_from([32, 64, 96])), min_size=1, max_size=6),
    vectors=st.lists(st.tuples(st.integers(1, 7), st.sampled_from(["BF16", "F32", "U8", "I64", "F16"])), max_size=5),
    scheme=st.sampled_from(["int4-g32-asym", "int3-channel-asym", "int2-tensor-asym", "int8-channel-sym"]),
    limit=st.integers(1, 3000),
)
@settings(deadline=None, max_examples=100)
def test_every_tensor_is_aligned_to_its_type(shapes: list, vectors: list, scheme: str, limit: int) -> None:
    tensors = {f"a.{i}.w.weight": tensor(f"a.{i}.w.weight", *shape) for i, shape in enumerate(shapes)}
    for i, (length, dtype) in enumerate(vectors):
        tensors[f"b.{i}.bias"] = tensor(f"b.{i}.bias", length, dtype=dtype)
    before = writer_module.SHARD_BYTES
    writer_module.SHARD_BYTES = limit
    try:
        made = make_plan(tensors, Recipe(scheme=scheme, ignore=()), LAYOUT, files=Safetensors().files)
    finally:
        writer_module.SHARD_BYTES = before
    assert_aligned(made)


@pytest.mark.parametrize(("dtype", "scale"), [("BF16", "BF16"), ("F16", "F16"), ("F32", "BF16")])
def test_scales_are_stored_in_the_range_of_the_weight(dtype: str, scale: str) -> None:
    assert scale_dtype(dtype) == scale
    made = plan(llama(dtype=dtype))
    assert made.outputs["model.layers.0.mlp.up_proj.weight_scale"].dtype == scale


@pytest.mark.parametrize(
    ("pattern", "module", "found"),
    [
        ("*.down_proj", "a.down_proj", True),
        ("*.down_proj", "down_proj", False),
        ("down_proj", "a.down_proj", False),
        ("*DOWN*", "a.down_proj", False),
        ("model.layers.[01].*", "model.layers.1.x", True),
        ("model.layers.[01].*", "model.layers.10.x", False),
        (r"re:layers\.\d+\.mlp", "model.layers.10.mlp.up", True),
        (r"re:^layers", "model.layers.10", False),
    ],
)
def test_patterns(pattern: str, module: str, found: bool) -> None:
    assert matches(module, pattern) is found


def test_sizes_of_headers() -> None:
    assert tensor("a", 3, 5).size_bytes == 30
    assert tensor("a", dtype="F32").size_bytes == 4
    assert tensor("a", 4, 4, dtype="F4").size_bytes == 8
    assert tensor("a", 0, 4).size_bytes == 0
