"""Schemes and recipes: what a person types, and that it comes back the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.errors import QtoolError, UsageError
from qtool.methods import METHODS
from qtool.methods.gptq import GPTQ
from qtool.recipe import (
    DEFAULT_IGNORE,
    DataSpec,
    EvalSpec,
    Recipe,
    build,
    load_tree,
    options_of,
    set_key,
    to_tree,
    to_yaml,
)
from qtool.scheme import QuantScheme, packed_words

schemes = st.builds(
    lambda bits, granularity, size, symmetric: QuantScheme(
        bits, granularity, size if granularity == "group" else None, symmetric
    ),
    st.integers(2, 8),
    st.sampled_from(["tensor", "channel", "group"]),
    st.integers(1, 4096),
    st.booleans(),
)


@given(schemes)
@settings(deadline=None, max_examples=200)
def test_a_scheme_parses_from_what_it_prints(scheme: QuantScheme) -> None:
    assert QuantScheme.parse(str(scheme)) == scheme
    assert QuantScheme.parse(f" {str(scheme).upper()} ") == scheme


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("w4a16", "int4-g128-sym"),
        ("w4a16-g64-asym", "int4-g64-asym"),
        ("w4a16-asym", "int4-g128-asym"),
        ("w2a16", "int2-g128-sym"),
        ("w3a16-g32", "int3-g32-sym"),
        ("w8a16", "int8-channel-sym"),
        ("w8a16-g128", "int8-g128-sym"),
        ("int8", "int8-channel-sym"),
        ("int4", "int4-g128-sym"),
        ("int4-asym-g32", "int4-g32-asym"),
        ("int5-tensor", "int5-tensor-sym"),
        ("int6-channel-asym", "int6-channel-asym"),
    ],
)
def test_aliases(text: str, printed: str) -> None:
    assert str(QuantScheme.parse(text)) == printed


@pytest.mark.parametrize(
    ("text", "shape", "size_bits"),
    [
        # codes + scales of 16 bits + zero points of `bits` bits
        ("int4-g128-sym", (64, 256), 64 * 256 * 4 + 64 * 2 * 16),
        ("int4-g128-asym", (64, 256), 64 * 256 * 4 + 64 * 2 * (16 + 4)),
        ("int3-g32-asym", (10, 64), 10 * 64 * 3 + 10 * 2 * (16 + 3)),
        ("int8-channel-sym", (7, 33), 7 * 33 * 8 + 7 * 16),
        ("int8-channel-asym", (7, 33), 7 * 33 * 8 + 7 * (16 + 8)),
        ("int2-tensor-sym", (5, 5), 5 * 5 * 2 + 16),
        ("int2-tensor-asym", (5, 5), 5 * 5 * 2 + 16 + 2),
    ],
)
def test_size_by_hand(text: str, shape: tuple[int, int], size_bits: int) -> None:
    scheme = QuantScheme.parse(text)
    assert scheme.size_bits(shape) == size_bits
    assert scheme.bits_per_weight(shape) == pytest.approx(size_bits / (shape[0] * shape[1]), abs=0)


@pytest.mark.parametrize(
    ("text", "bits_per_weight"),
    [
        ("int4-g128-sym", 4.125),  # 4 + 16/128
        ("int4-g128-asym", 4.15625),  # 4 + 20/128
        ("int4-g32-sym", 4.5),
        ("int3-g64-asym", 3 + 19 / 64),
        ("int2-g16-sym", 3.0),
        ("int8-channel-sym", 8 + 16 / 1024),
        ("int8-tensor-asym", 8 + 24 / 1024**2),
    ],
)
def test_bits_per_weight_by_hand(text: str, bits_per_weight: float) -> None:
    assert QuantScheme.parse(text).bits_per_weight((1024, 1024)) == bits_per_weight


def test_packed_words() -> None:
    assert [packed_words(32, bits) for bits in range(2, 9)] == [2, 3, 4, 5, 6, 7, 8]
    assert [packed_words(count, 3) for count in (1, 10, 11, 21, 22, 32, 33)] == [1, 1, 2, 2, 3, 3, 4]


def test_shape_errors_give_the_numbers() -> None:
    scheme = QuantScheme.parse("int4-g128-sym")
    assert scheme.shape_error((5, 256)) is None
    assert scheme.shape_error((128, 200)) == "200 inputs are not a multiple of 128"
    assert scheme.shape_error((2, 128, 128)) == "3-D tensors are not supported"
    assert QuantScheme.parse("int4-channel-sym").shape_error((3, 7)) is None


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("w4a61", "unknown scheme `w4a61`", "`w4a16`"),
        ("nt4-g128-sym", "unknown scheme `nt4-g128-sym`", "`int4-g128-sym`"),
        ("fp9", "unknown scheme `fp9`", "`fp8`"),
        ("int8-channel-sym+int9-token", "unknown rounding of inputs", "`int8-token`"),
        ("nvfp4+int8-token", "inputs of nvfp4 are rounded as that, or not at all", "leave `+int8-token` out"),
        ("int8-channel-sym+int8-token+int8-tensor", "says twice how inputs are rounded", "leave `+int8-tensor` out"),
        ("nvfp4a16+outliers-1%", "outliers go with integer weights", "int3-g64-sym+outliers-0.5%"),
        ("int3-g64-sym+outliers-50%", "at most 20 % of them", "outliers-0.5%"),
        ("", "unknown scheme ``", "known:"),
        ("int4-g128-symm", "unknown part of scheme `int4-g128-symm`: `symm`", "`sym`"),
        ("int4-chanel", "unknown part of scheme `int4-chanel`: `chanel`", "`channel`"),
        ("int4-g0", "unknown part of scheme `int4-g0`: `g0`", "g32"),
        ("int9", "asks for 9 bits: integer schemes have 2 to 8", "int4-g128-sym"),
        ("int1-g32", "asks for 1 bits", "int4-g128-sym"),
        ("w16a16", "asks for 16 bits", "int4-g128-sym"),
    ],
)
def test_a_wrong_scheme_names_the_nearest(text: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        QuantScheme.parse(text)
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")
    assert caught.value.exit_code == 2


FULL = """
scheme: w4a16-g64
layers: {"*.down_proj": w8a16, "re:layers\\\\.0\\\\..*": int3-g32-asym}
ignore: ["*lm_head", "*.q_proj"]
method: gptq
format: compressed-tensors
strict: true
data: {source: wiki.txt, rows: 16, seqlen: 64, pack: false, seed: 3}
eval: {data: {source: test.txt}, protocol: rows, max_ppl_increase: 1%, max_kl: 1}
gptq: {damp: 0.05, order: natural}
rtn: {scales: minmax}
"""


def test_a_full_recipe() -> None:
    recipe = build(yaml.safe_load(FULL), METHODS)
    assert recipe == Recipe(
        scheme="int4-g64-sym",
        layers={"*.down_proj": "int8-channel-sym", r"re:layers\.0\..*": "int3-g32-asym"},
        ignore=("*lm_head", "*.q_proj"),
        method="gptq",
        options={"gptq": {"damp": 0.05, "order": "natural"}, "rtn": {"scales": "minmax"}},
        format="compressed-tensors",
        data=DataSpec("wiki.txt", rows=16, seqlen=64, pack=False, seed=3),
        eval=EvalSpec(DataSpec("test.txt"), protocol="rows", max_ppl_increase="1%", max_kl=1.0),
        strict=True,
    )
    assert list(recipe.layers) == ["*.down_proj", r"re:layers\.0\..*"], "the last match wins: order matters"


def test_an_empty_recipe_is_the_default() -> None:
    recipe = build({}, METHODS)
    assert recipe == Recipe()
    assert recipe.ignore == DEFAULT_IGNORE


@pytest.mark.parametrize("text", ["{}", FULL, "eval: {}", "{layers: {a: int4}, eval: {data: x.txt}}"])
def test_a_recipe_comes_back_from_its_tree_and_its_yaml(text: str) -> None:
    recipe = build(yaml.safe_load(text), METHODS)
    assert build(to_tree(recipe), METHODS) == recipe
    again = build(yaml.safe_load(to_yaml(recipe)), METHODS)
    assert again == recipe
    assert list(again.layers) == list(recipe.layers)
    assert to_yaml(again) == to_yaml(recipe)


specs = st.builds(
    DataSpec,
    source=st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12),
    split=st.none() | st.sampled_from(["train", "yes", "1e3", "null", "3"]),
    column=st.none() | st.just("text"),
    rows=st.none() | st.integers(1, 10**6),
    seqlen=st.none() | st.integers(2, 10**6),
    pack=st.booleans(),
    seed=st.integers(0, 2**32),
)
recipes = st.builds(
    Recipe,
    scheme=schemes.map(str),
    layers=st.dictionaries(st.sampled_from(["*.down_proj", "a", "re:x$", "0", "null"]), schemes.map(str)),
    ignore=st.lists(st.sampled_from(["*lm_head", "yes", "~", "1"]), max_size=3).map(tuple),
    method=st.sampled_from(sorted(METHODS)),
    options=st.dictionaries(st.sampled_from(sorted(METHODS)), st.just({"scales": "minmax"})),
    data=specs,
    eval=st.none()
    | st.builds(
        EvalSpec,
        data=specs,
        protocol=st.sampled_from(["windows", "rows", "llama.cpp"]),
        max_ppl_increase=st.none() | st.sampled_from(["1%", "0.2", "1e-3"]),
        max_kl=st.none() | st.floats(0, 10),
    )
    | st.builds(EvalSpec, data=specs, stride=st.integers(1, 512)),
    strict=st.booleans(),
)


@given(recipes)
@settings(deadline=None, max_examples=100)
def test_every_recipe_survives_yaml(recipe: Recipe) -> None:
    assert build(yaml.safe_load(to_yaml(recipe)), METHODS) == recipe


@pytest.mark.parametrize(
    ("tree", "message", "hint"),
    [
        ({"schema": "w4a16"}, "unknown recipe key `schema`", "`scheme`"),
        ({"gtpq": {"damp": 1}}, "unknown recipe key `gtpq`", "`gptq`"),
        ({"data": {"row": 3}}, "unknown recipe key `data.row`", "`data.rows`"),
        ({"eval": {"protokol": "rows"}}, "unknown recipe key `eval.protokol`", "`eval.protocol`"),
        ({"eval": {"data": {"sorce": "x"}}}, "unknown recipe key `eval.data.sorce`", "`eval.data.source`"),
        ({"eval": {"protocol": "windos"}}, "unknown protocol `windos`", "`windows`"),
        ({"layers": {"a": "w4a61"}}, "unknown scheme `w4a61`", "`w4a16`"),
        ({"scheme": "w4a61"}, "unknown scheme `w4a61`", "`w4a16`"),
        ({"options": {}}, "unknown recipe key `options`", "gptq"),
        ({1: 2}, "unknown recipe key `1`", "known:"),
    ],
)
def test_an_unknown_key_or_name_names_the_nearest(tree: dict, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        build(tree, METHODS)
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")


def test_an_unknown_option_of_a_method_names_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        options_of(GPTQ, {"dampp": 0.1}, "gptq")
    assert caught.value.message == "unknown recipe key `gptq.dampp`"
    assert "`gptq.damp`" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"strict": "yes"}, "`strict` takes true or false, not `yes`"),
        ({"strict": 1}, "`strict` takes true or false, not `1`"),
        ({"ignore": 3}, "`ignore` takes a list of text, not `3`"),
        ({"ignore": ["a", 3]}, "`ignore` takes a list of text"),
        ({"layers": ["a"]}, "`layers` must hold keys and values"),
        ({"data": {"rows": "many"}}, "`data.rows` takes a whole number, not `many`"),
        ({"data": {"rows": 1.5}}, "`data.rows` takes a whole number, not `1.5`"),
        ({"data": {"rows": True}}, "`data.rows` takes a whole number, not `True`"),
        ({"data": {"seed": None}}, "`data.seed` takes a whole number, not `None`"),
        ({"data": 3}, "`data` must hold keys and values, not `3`"),
        ({"eval": {"max_kl": "little"}}, "`eval.max_kl` takes a number, not `little`"),
        ({"eval": {"max_kl": False}}, "`eval.max_kl` takes a number, not `False`"),
        ({"method": ["rtn"]}, "`method` takes text, not `['rtn']`"),
        ({"scheme": True}, "`scheme` takes text, not `True`"),
        ({"gptq": 0.05}, "gptq must hold keys and values, not `0.05`"),
    ],
)
def test_a_wrong_type_names_the_key_and_the_value(tree: dict, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        build(tree, METHODS)
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damp": "lots"}, "`gptq.damp` takes a number"),
        ({"block": 1.5}, "`gptq.block` takes a whole number"),
        ({"order": "actvation"}, "unknown value of gptq.order: `actvation`"),
        ({"scales": "max"}, "unknown value of gptq.scales: `max`"),
        ({"damp": -0.1}, "gptq.damp=-0.1 must not be negative"),
        ({"block": 0}, "gptq.block=0 must be positive"),
    ],
)
def test_a_wrong_option_of_a_method(options: dict, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        options_of(GPTQ, options, "gptq")
    assert message in caught.value.message


def test_shorthands() -> None:
    assert build({"data": "wiki.txt"}, METHODS).data == DataSpec("wiki.txt")
    assert build({"ignore": "*.gate"}, METHODS).ignore == ("*.gate",)
    assert build({"eval": {"data": "wiki.txt"}}, METHODS).eval == EvalSpec(DataSpec("wiki.txt"))
    assert build({"gptq": None}, METHODS).options == {"gptq": {}}


def test_set_makes_and_replaces_keys() -> None:
    tree: dict = {"scheme": "int4", "gptq": {"damp": 0.1, "block": 64}}
    for assignment in (
        "gptq.damp=0.05",
        "data.rows=12",
        "strict=true",
        "eval.data.source=a=b.txt",
        "method=rtn",
        "eval.max_kl=",
    ):
        set_key(tree, assignment)
    assert tree == {
        "scheme": "int4",
        "gptq": {"damp": 0.05, "block": 64},
        "data": {"rows": 12},
        "strict": True,
        "eval": {"data": {"source": "a=b.txt"}, "max_kl": None},
        "method": "rtn",
    }
    assert build(tree, METHODS).data.rows == 12


def test_set_takes_lists_and_mappings() -> None:
    tree: dict = {}
    set_key(tree, "ignore=['*.q_proj', '*.k_proj']")
    set_key(tree, "layers={'*.down_proj': int8}")
    recipe = build(tree, METHODS)
    assert recipe.ignore == ("*.q_proj", "*.k_proj")
    assert recipe.layers == {"*.down_proj": "int8-channel-sym"}


def test_set_keeps_the_source_of_a_data_set_given_as_one_word() -> None:
    tree: dict = {"data": "wiki.txt"}
    set_key(tree, "data.rows=4")
    assert build(tree, METHODS).data == DataSpec("wiki.txt", rows=4)


def test_set_takes_numbers_as_people_write_them() -> None:
    tree: dict = {}
    set_key(tree, "gptq.damp=1e-3")  # YAML 1.1 reads this as text
    options = build(tree, METHODS).options["gptq"]
    assert options_of(GPTQ, options, "gptq").damp == 1e-3


def test_set_does_not_change_what_the_tree_was_made_from() -> None:
    original = {"gptq": {"damp": 0.1}}
    tree: dict = dict(original)
    set_key(tree, "gptq.damp=0.2")
    assert original == {"gptq": {"damp": 0.1}}


@pytest.mark.parametrize("assignment", ["damp", "=3", "a=[1", "gptq.damp={"])
def test_a_wrong_set_is_an_error(assignment: str) -> None:
    with pytest.raises(UsageError) as caught:
        set_key({}, assignment)
    assert f"`--set {assignment}`" in caught.value.message


def test_a_recipe_file(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(FULL)
    assert build(load_tree(path), METHODS) == build(yaml.safe_load(FULL), METHODS)
    path.write_text("")
    assert load_tree(path) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n- b\n", "must hold keys and values"),
        (b"a: [1\n", "is not YAML"),
        (b"\xff\xfe\x00", "is not YAML"),
        (b"just text", "must hold keys and values"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        load_tree(path)
    assert message in caught.value.message
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message


def test_a_recipe_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read recipe"):
        load_tree(tmp_path / "absent.yaml")


def test_flag_over_set_over_file_over_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from qtool.cli import run

    path = tmp_path / "r.yaml"
    path.write_text(
        "scheme: int3-g32-sym\nmethod: rtn\ndata: {source: file.txt, rows: 1, seqlen: 11}\ngptq: {damp: 0.5}\n"
    )
    command = ["quantize", "somewhere", "--recipe", str(path), "--print-recipe"]
    command += ["--set", "scheme=int5-g32-sym", "--set", "data.rows=2", "--set", "data.seed=7", "--set", "gptq.block=9"]
    command += ["--scheme", "int6-g32-sym", "--rows", "3", "--layer", "*.q_proj=w8a16", "--ignore", "*.v_proj"]
    assert run(command) == 0
    recipe = build(yaml.safe_load(capsys.readouterr().out), METHODS)
    assert recipe.scheme == "int6-g32-sym"  # flag over --set over file
    assert recipe.method == "rtn"  # file over default
    assert recipe.data == DataSpec("file.txt", rows=3, seqlen=11, seed=7)  # merged key by key
    assert recipe.options["gptq"] == {"damp": 0.5, "block": 9}
    assert recipe.layers == {"*.q_proj": "int8-channel-sym"}
    assert recipe.ignore == (*DEFAULT_IGNORE, "*.v_proj")
    assert recipe.format == Recipe().format


def test_errors_carry_their_exit_codes() -> None:
    assert (QtoolError("a").exit_code, UsageError("a").exit_code) == (1, 2)
    assert QtoolError("a", "b").hint == "b"


def test_recipes_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().scheme = "int8"  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantScheme(4).bits = 8  # type: ignore[misc]
