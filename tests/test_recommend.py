"""`--recommend`: which recipe, at the borders of memory, for engines and hardware, and what it says when none fits."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.checkpoint.reader import Checkpoint
from qtool.errors import QtoolError, UsageError
from qtool.headers import TensorInfo
from qtool.inspection.memory import USABLE
from qtool.recommend import (
    parse_memory,
    recommend,
    recommendation_view,
)
from qtool.report.table import plain_lines
from qtool.targets import (
    CARDS,
    CLASSES,
    ENGINES,
    GPUS,
    HARDWARE,
    TARGETS,
    hardware_text,
)

HIDDEN, WIDE, LAYERS, VOCABULARY, CONTEXT = 512, 1024, 2, 1000, 256
CACHE_BYTES = LAYERS * 2 * 2 * 128 * CONTEXT * 2  # keys and values, 2 heads of 128, 16 bits
SHAPES = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (256, HIDDEN), "self_attn.v_proj": (256, HIDDEN),
          "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (WIDE, HIDDEN), "mlp.up_proj": (WIDE, HIDDEN),
          "mlp.down_proj": (HIDDEN, WIDE)}  # fmt: skip
KEPT_BYTES = 2 * (2 * VOCABULARY * HIDDEN + HIDDEN)
BY_NAME = {target.name: target for target in TARGETS}


def headers(tmp_path, kind="llama", layers=LAYERS, **changed):
    """A llama of which only headers exist; `changed` overrides shapes of linears (`down_proj=(512, 1000)`)."""
    config = {"model_type": kind, "num_hidden_layers": layers, "hidden_size": HIDDEN, "num_attention_heads": 4,
              "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 8192, "vocab_size": VOCABULARY,
              "intermediate_size": WIDE, "tie_word_embeddings": False}  # fmt: skip
    tensors = [("model.embed_tokens.weight", (VOCABULARY, HIDDEN)), ("lm_head.weight", (VOCABULARY, HIDDEN))]
    tensors.append(("model.norm.weight", (HIDDEN,)))
    for layer in range(layers):
        for name, shape in SHAPES.items():
            shape = changed.get(name.rpartition(".")[2], shape)
            tensors.append((f"model.layers.{layer}.{name}.weight", shape))
    infos = [TensorInfo(name, "BF16", shape, "model.safetensors") for name, shape in tensors]
    return Checkpoint.from_headers(tmp_path, config, infos)


@pytest.fixture
def model(tmp_path):
    return headers(tmp_path)


def naive_bytes(bits, group, scale_bits=16):
    """Weights of `bits` with one scale per `group` inputs (None: per row), beside what stays in 16 bits."""
    total = KEPT_BYTES
    for rows, inputs in SHAPES.values():
        total += LAYERS * ceil((rows * inputs * bits + rows * (inputs // (group or inputs)) * scale_bits) / 8)
    return total


DENSE, W8, W4, W3, W2 = (
    naive_bytes(16, None, 0), naive_bytes(8, None), naive_bytes(4, 128), naive_bytes(3, 128), naive_bytes(2, 64),
)  # fmt: skip


def card(size_bytes):
    """The smallest card of which `USABLE` holds so many bytes and the cache."""
    return (size_bytes + CACHE_BYTES) / USABLE * (1 + 1e-12)


@pytest.mark.parametrize(
    ("size_bytes", "fits", "below"),
    [
        (DENSE, None, "w8a16-rtn"),
        (W8, "w8a16-rtn", "mixed-4-8-gptq"),
        (W4, "w4a16-gptq", "w3a16-gptaq"),
        (W3, "w3a16-gptaq", "w2a16-gptaq"),
    ],
    ids=["16 bits", "8 bits", "4 bits", "3 bits"],
)
def test_one_byte_decides(model, size_bytes, fits, below):
    assert recommend(model, budget_bytes=card(size_bytes), context=CONTEXT).recipe == fits
    assert recommend(model, budget_bytes=card(size_bytes - 1), context=CONTEXT).recipe == below


def test_nothing_fits(model):
    assert recommend(model, budget_bytes=card(W2), context=CONTEXT).recipe == "w2a16-gptaq"
    with pytest.raises(QtoolError) as error:
        recommend(model, budget_bytes=card(W2 - 1), context=CONTEXT)
    assert error.value.exit_code == 1
    needed = f"{(W2 + CACHE_BYTES) / 1e6:.2f} MB"
    assert f"w2a16-gptaq needs least, {needed}" in error.value.message
    assert f"with {CONTEXT} tokens of context (a cache of {CACHE_BYTES / 1e3:.2f} kB)" in error.value.message
    assert "--memory" in error.value.hint


def test_the_sentence_has_the_numbers(model):
    found = recommend(model, budget_bytes=card(W4), context=CONTEXT)
    assert (
        f"16 bits need {(DENSE + CACHE_BYTES) / 1e6:.2f} MB, w8a16-rtn {(W8 + CACHE_BYTES) / 1e6:.2f} MB"
        in (found.reasons[1])
    )
    assert f"w4a16-gptq {(W4 + CACHE_BYTES) / 1e6:.2f} MB: w4a16-gptq is the best that fits" in found.reasons[1]
    assert any("it needs data: 128 rows" in reason for reason in found.reasons)


@settings(max_examples=40, deadline=None)
@given(share=st.floats(0.3, 1.2), context=st.integers(1, 8192), batch=st.integers(1, 4))
def test_more_memory_is_never_worse_and_what_is_chosen_fits(tmp_path_factory, share, context, batch):
    model = headers(tmp_path_factory.getbasetemp())
    cache = CACHE_BYTES // CONTEXT * context * batch
    smaller, larger = share * (DENSE + cache), 1.1 * share * (DENSE + cache)
    ranks = []
    for budget in (smaller, larger):
        try:
            found = recommend(model, budget_bytes=budget, context=context, batch=batch)
        except QtoolError:
            assert W2 + cache > USABLE * budget
            ranks.append(len(TARGETS))
            continue
        names = [target.name for target in TARGETS]
        ranks.append(names.index(found.recipe) if found.recipe else -1)
        if found.recipe is None:
            assert DENSE + cache <= USABLE * budget
        chosen = [c for c in found.candidates if c.recipe in (found.recipe, *found.alternatives)]
        assert all(c.fits and c.total_bytes <= USABLE * budget for c in chosen)
        assert {c.recipe for c in found.candidates if c.fits} == {c.recipe for c in chosen}
    assert ranks[1] <= ranks[0]


def test_an_fp8_cache_counts_half(model):
    """With a long context the recipe with a cache in fp8 is the only one of 4 bits that fits."""
    cache = CACHE_BYTES // CONTEXT * 8192
    budget = (W4 + cache / 2) / USABLE * (1 + 1e-12)
    found = recommend(model, "vllm", "hopper", budget, context=8192)
    assert found.recipe == "w4a16-gptq-fp8-kv"
    assert "--kv fp8" in found.command
    assert next(c for c in found.candidates if c.recipe == found.recipe).total_bytes == W4 + cache // 2


@pytest.mark.parametrize(
    ("engine", "hardware", "has_data", "expected"),
    [
        (None, None, True, "w8a16-rtn"),  # one file for every GPU
        ("vllm", "h100", True, "fp8-dynamic"),
        ("vllm", "RTX 4090", True, "fp8-dynamic"),
        ("sglang", "4090", False, "fp8-dynamic"),
        ("vllm", "b200", True, "fp8-dynamic"),
        ("vllm", "A100", True, "w8a8-int8"),
        ("vllm", "a100", False, "w8a16-rtn"),
        ("vLLM", "cpu", True, "w8a8-int8"),
        ("vllm", "cpu", False, "w4a16-rtn"),
        ("transformers", "cpu", True, "llm-int8"),
        ("bitsandbytes", "ampere", False, "llm-int8"),
        (None, "m3", True, "gguf-q8_0"),
        (None, "cpu", True, "gguf-q8_0"),
        ("bitsandbytes", "m3", True, "nf4"),
        ("llama.cpp", None, True, "gguf-q8_0"),
        ("Ollama", "rtx 3090", False, "gguf-q8_0"),
        ("LM Studio", "apple", True, "gguf-q8_0"),
        ("llama-cpp", "h100", True, "gguf-q8_0"),
    ],
)
def test_without_a_budget_engine_and_hardware_decide(model, engine, hardware, has_data, expected):
    found = recommend(model, engine, hardware, has_data=has_data)
    assert found.recipe == expected
    assert all(c.fits is None and c.total_bytes is None for c in found.candidates)
    assert has_data or not any(c.needs_data for c in found.candidates)


@pytest.mark.parametrize("engine", [None, *ENGINES])
@pytest.mark.parametrize("hardware", [None, *HARDWARE])
def test_candidates_are_what_the_table_says(model, engine, hardware):
    """Against a walk over the table's own fields: GGUF is for its engine, and for CPUs and Apple, where it leads."""
    wanted = [hardware] if hardware else list(GPUS)
    expected = []
    for target in TARGETS:
        places = {"vllm": target.vllm, "sglang": target.sglang, "transformers": target.bitsandbytes + target.gptqmodel,
                  "bitsandbytes": target.bitsandbytes, "llama.cpp": target.llama_cpp}  # fmt: skip
        engines = [engine] if engine else [*places] if hardware in ("cpu", "apple") else [*places][:-1]
        if any(all(w in places[e] for w in wanted) for e in engines):
            expected.append(target.name)
    if engine is None and hardware in ("cpu", "apple"):
        first = [name for name in expected if name.startswith("gguf")]
        expected = [name for quality in CLASSES for part in (first, [n for n in expected if n not in first])
                    for name in part if BY_NAME[name].quality == quality]  # fmt: skip
    if not expected:
        with pytest.raises(QtoolError, match="no recipe is what runs in"):
            recommend(model, engine, hardware)
    else:
        found = recommend(model, engine, hardware)
        assert [c.recipe for c in found.candidates] == expected
        assert found.recipe == expected[0]
        assert found.alternatives == expected[1:]


def test_cards_are_of_known_hardware():
    assert set(CARDS.values()) == set(HARDWARE)
    for target in TARGETS:
        assert target.quality in CLASSES
        engines = (target.vllm, target.sglang, target.bitsandbytes, target.gptqmodel, target.llama_cpp)
        assert {name for engine in engines for name in engine} <= set(HARDWARE)


def test_shapes_and_names_that_do_not_fit_are_told(tmp_path):
    """1056 inputs are a multiple of 32, not of 64 or 128; and a model whose layers have other names."""
    odd = headers(tmp_path, down_proj=(HIDDEN, 1056))
    found = recommend(odd, "vllm", "blackwell", card(W4 * 1.1), context=CONTEXT)
    assert found.recipe == "nvfp4"
    reason = "`model.layers.0.mlp.down_proj`: 1056 inputs are not a multiple of 128"
    assert found.left_out["w4a16-gptq"] == found.left_out["fp8-block"] == reason
    assert (
        "w4a16-gptq, w4a16-gptaq, w4a16-qat, w4a16-asym-gptq, w4a16-gptq-fp8-kv, w4a16-awq, w4a16-rtn, gptq-w4, "
        f"awq-w4, w3a16-gptaq, w3a16-qat: {reason}" in ("\n".join(plain_lines(recommendation_view(found))))
    )
    tensors = [TensorInfo(i.name.replace("down_proj", "out"), i.dtype, i.shape) for i in odd.tensors.values()]
    renamed = recommend(Checkpoint.from_headers(tmp_path, {"model_type": "other"}, tensors), has_data=True)
    assert renamed.recipe == "w8a16-rtn"
    assert not any(c.needs_data for c in renamed.candidates)
    assert "qtool cannot run models of architecture `other`, so only recipes without data were considered" in (
        renamed.reasons
    )


def test_a_layer_of_its_own_must_exist(tmp_path):
    infos = [
        TensorInfo(i.name.replace("down_proj", "out_proj"), i.dtype, i.shape)
        for i in headers(tmp_path).tensors.values()
    ]
    found = recommend(Checkpoint.from_headers(tmp_path, headers(tmp_path).config, infos))
    assert found.left_out == {"mixed-4-8-gptq": "no layer is called `*.down_proj`"}


@pytest.mark.parametrize(
    ("engine", "hardware", "message", "hint"),
    [
        ("vlm", None, "unknown engine `vlm`", "`vllm`"),
        ("tgi", None, "unknown engine `tgi`", "known: vllm, sglang, transformers, bitsandbytes, llama.cpp, ollama"),
        ("olama", None, "unknown engine `olama`", "`ollama`"),
        (None, "hoper", "unknown hardware `hoper`", "`hopper`"),
        (None, "h1000", "unknown hardware `h1000`", "`h100`"),
    ],
)
def test_unknown_names(model, engine, hardware, message, hint):
    with pytest.raises(UsageError) as error:
        recommend(model, engine, hardware)
    assert message in error.value.message
    assert hint in error.value.hint


def test_a_quantized_model_is_refused(make_model, tmp_path):
    from qtool.cli import run

    out = tmp_path / "out"
    model = make_model()
    assert run(["quantize", str(model), "-o", str(out), "--scheme", "w8a16", "--method", "rtn", "-q"]) == 0
    with pytest.raises(UsageError, match="already quantized"):
        recommend(Checkpoint(out))


# GGUF

EMBEDDINGS = 2 * VOCABULARY * HIDDEN  # embedding and head are rounded, too


def test_gguf_recipes_are_weighed_as_their_files(model):
    found = recommend(model, "llama.cpp")
    sizes = {c.recipe: c.weight_bytes for c in found.candidates}
    norms = 4 * HIDDEN  # in 32 bits
    values = LAYERS * sum(rows * inputs for rows, inputs in SHAPES.values())
    assert sizes["gguf-q8_0"] == (values + EMBEDDINGS) * 34 // 32 + norms
    assert sizes["gguf-q6_k"] == (values + EMBEDDINGS) * 210 // 256 + norms
    # Q4_K_M of two blocks: the second has its values and its down projection in Q6_K, and so has the head
    more = 256 * HIDDEN + HIDDEN * WIDE + EMBEDDINGS // 2
    assert (
        sizes["gguf-q4_k_m"]
        == sizes["gguf-q4_k_m-rtn"]
        == ((values + EMBEDDINGS - more) * 144 // 256 + more * 210 // 256 + norms)
    )
    ranks = [c.weight_bytes for c in found.candidates if c.recipe != "gguf-q4_k_m-rtn"]
    assert ranks == sorted(ranks, reverse=True)
    assert found.candidates[0].scheme == "q8_0"


def test_with_data_a_mix_is_that_of_an_importance_matrix(tmp_path):
    """Without one IQ4_XS gives the first eighth of the down projections more bits: one of these eight."""
    found = recommend(headers(tmp_path, layers=8), "llama.cpp")
    size_bytes = next(c.weight_bytes for c in found.candidates if c.recipe == "gguf-iq4_xs")
    values = 8 * sum(rows * inputs for rows, inputs in SHAPES.values()) + EMBEDDINGS // 2
    assert size_bytes == values * 136 // 256 + EMBEDDINGS // 2 * 210 // 256 + 4 * HIDDEN


def test_gguf_sizes_are_those_of_the_file(make_model, tmp_path):
    from qtool.cli import run
    from qtool.gguf.checkpoint import GGUFCheckpoint

    model = make_model(hidden_size=256, intermediate_size=512)
    found = {c.recipe: c.weight_bytes for c in recommend(Checkpoint(model), "llama.cpp").candidates}
    words = BY_NAME["gguf-q4_k_m-rtn"].command(str(model)).replace("OUT", str(tmp_path / "out"))
    assert run([*shlex.split(words)[1:], "-q"]) == 0
    assert GGUFCheckpoint(tmp_path / "out").size_bytes == found["gguf-q4_k_m-rtn"]


def test_gptq_and_awq_are_weighed_as_their_files(make_model, tmp_path):
    from qtool.cli import run

    model = make_model(hidden_size=128, intermediate_size=256)
    found = {c.recipe: c.weight_bytes for c in recommend(Checkpoint(model), "vllm").candidates}
    for name, scheme, format in (("gptq-w4", "w4a16", "gptq"), ("awq-w4", "int4-g128-asym", "awq")):
        command = ["quantize", str(model), "-o", str(tmp_path / name), "--scheme", scheme, "--method", "rtn"]
        assert run([*command, "--format", format, "-q"]) == 0
        assert Checkpoint(tmp_path / name).size_bytes == found[name]


def test_llama_cpp_wants_a_gguf_file_also_of_16_bits(model):
    found = recommend(model, "ollama", budget_bytes=card(2 * DENSE), context=CONTEXT)
    assert found.recipe is None
    assert found.command == f"qtool quantize {model.path} -o OUT --scheme bf16 --method rtn"
    page = plain_lines(recommendation_view(found))
    assert page[0] == f"{model.path}: leave it in 16 bits"
    assert "- llama.cpp loads GGUF files only: the command makes one of the same weights" in page
    assert page[-1] == found.command
    elsewhere = recommend(model, "vllm", budget_bytes=card(2 * DENSE), context=CONTEXT)
    assert (elsewhere.recipe, elsewhere.command) == (None, None)
    assert plain_lines(recommendation_view(elsewhere))[0] == f"{model.path}: leave it as it is"


def test_a_gguf_file_of_floats_is_weighed_and_left_as_any_other(make_model, tmp_path):
    from qtool.cli import run
    from qtool.gguf.checkpoint import open_checkpoint

    model = make_model(hidden_size=256, intermediate_size=512)
    words = ["quantize", str(model), "-o", str(tmp_path / "f16"), "--scheme", "f16", "--method", "rtn", "-q"]
    assert run(words) == 0
    floats = open_checkpoint(tmp_path / "f16")
    assert recommend(floats, "llama.cpp").recipe == "gguf-q8_0"
    fits = recommend(floats, "llama.cpp", budget_bytes=1e9, context=64)
    assert (fits.recipe, fits.command) == (None, None)
    assert run(["quantize", str(tmp_path / "f16"), "-o", str(tmp_path / "q8"), "--scheme", "q8_0", "--method", "rtn",
                "-q"]) == 0  # fmt: skip
    with pytest.raises(UsageError, match="already quantized"):
        recommend(open_checkpoint(tmp_path / "q8"), "llama.cpp")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"model_type": "opt"}, "qtool cannot write the architecture `opt` for llama.cpp"),
        ({"num_local_experts": 8}, "qtool writes no mixtures of experts for llama.cpp"),
        ({"hidden_act": "relu"}, "hidden_act"),
    ],
)
def test_what_llama_cpp_cannot_do_is_said(model, change, why):
    model.config.update(change)
    with pytest.raises(QtoolError, match=r"no recipe is what runs in llama\.cpp") as error:
        recommend(model, "llama.cpp")
    assert why in error.value.message
    beside = recommend(model, hardware="cpu", has_data=False)
    assert not any(c.recipe.startswith("gguf") for c in beside.candidates)
    assert why in beside.left_out["gguf-q8_0"]


def test_a_tensor_that_llama_cpp_has_no_place_for_is_said(model):
    infos = [*model.tensors.values(), TensorInfo("model.layers.0.mlp.extra.weight", "BF16", (HIDDEN, HIDDEN))]
    found = recommend(Checkpoint.from_headers(model.path, model.config, infos), hardware="cpu")
    assert "llama.cpp has no place for `model.layers.0.mlp.extra.weight`" in found.left_out["gguf-q4_k_m"]


def test_rows_that_do_not_fit_a_block_leave_nothing_out(tmp_path, model):
    infos = [TensorInfo(i.name, i.dtype, (i.shape[0], 480), i.file) if "down_proj" in i.name else i
             for i in model.tensors.values()]  # fmt: skip
    found = recommend(Checkpoint.from_headers(tmp_path, model.config, infos), "llama.cpp")
    assert found.left_out == {}
    assert len(found.candidates) == sum(bool(target.llama_cpp) for target in TARGETS)


def test_where_llama_cpp_differs_is_among_the_reasons(model):
    model.config.update({"model_type": "mistral", "sliding_window": 128})
    found = recommend(model, "llama.cpp")
    assert any("window" in reason for reason in found.reasons)


@pytest.mark.parametrize("hardware", [None, "h100", "cpu"])
def test_who_names_no_engine_is_told_of_gguf(model, hardware):
    found = recommend(model, hardware=hardware)
    told = "for a GGUF file (llama.cpp, Ollama, LM Studio) add `--engine llama.cpp`" in found.reasons
    assert told == (hardware != "cpu")


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("8GB", 8e9), ("8", 8e9), ("7.5 gb", 7.5e9), ("900MB", 9e8), ("24GiB", 24 * 2**30), ("1T", 1e12), ("80g", 8e10)],
)
def test_sizes_of_memory(text, size_bytes):
    assert parse_memory(text) == size_bytes


@pytest.mark.parametrize("text", ["", "GB", "-8GB", "8B", "8 pounds", "0", "1e3", "0.0GB"])
def test_sizes_that_are_none(text):
    with pytest.raises(UsageError, match="is not a size of memory"):
        parse_memory(text)


def test_hardware_for_people():
    assert hardware_text(GPUS) == "every GPU"
    assert hardware_text((*GPUS, "cpu")) == "every GPU, CPU"
    assert hardware_text(("ada", "cpu", "apple")) == "Ada, CPU, Apple"
    assert hardware_text(()) == "-"


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_the_command_resolves_to_the_recipe(target, make_model, capsys):
    """What is printed, typed back, is the recipe of the file but for the data's name."""
    from qtool.cli import run
    from qtool.methods import get_method
    from qtool.recipe import to_tree

    model = make_model(hidden_size=128, intermediate_size=256)
    words = shlex.split(target.command(str(model)))
    assert words[:3] == ["qtool", "quantize", str(model)]
    assert run([*words[1:], "--print-recipe", "--json"]) == 0
    typed = json.loads(capsys.readouterr().out)
    assert typed["data"].pop("source") == ("TEXT" if target.needs_data else "python-docs")
    expected = json.loads(json.dumps(to_tree(target.recipe())))
    expected["data"].pop("source")
    expected["finish"] = list(get_method(expected["method"], {}).finish)  # what is printed says it
    assert typed == expected


VIEW = """\
MODEL: w4a16-gptq
- considered: what runs in vLLM on Ampere
- 16 bits need 12.01 MB, w8a8-int8 7.31 MB, mixed-4-8-gptq 5.52 MB, w4a16-gptq 5.01 MB: w4a16-gptq is the best that \
fits the 5.40 MB usable of 6.00 MB, with 256 tokens of context (a cache of 524.29 kB)
- w4a16-gptq: the default at 4 bits
- it needs data: 128 rows of text like what the model will see

recipe           class           weights  with cache  data  when
w4a16-gptq       4-bit integers  4.48 MB     5.01 MB  yes   the default at 4 bits
"""


def test_the_page_and_the_tree(model):
    found = recommend(model, "vllm", "a100", 6e6, context=CONTEXT)
    text = "\n".join(plain_lines(recommendation_view(found))).replace(str(model.path), "MODEL")
    assert text.startswith(VIEW), text
    assert text.endswith("\nqtool quantize MODEL -o OUT --scheme int4-g128-sym --method gptq --data TEXT --rows 128"), (
        text
    )
    tree = json.loads(json.dumps(found.to_tree()))
    assert list(tree) == ["model", "recipe", "command", "reasons", "alternatives", "candidates", "left_out"]
    assert tree["candidates"][0] == {
        "recipe": "w8a8-int8", "quality": "8 bits", "scheme": "int8-channel-sym+int8-token", "needs_data": True,
        "weight_bytes": W8, "total_bytes": W8 + CACHE_BYTES, "fits": False, "when": BY_NAME["w8a8-int8"].when,
    }  # fmt: skip


def test_it_loads_nothing_heavy(make_model):
    code = (
        "import sys\nfrom pathlib import Path\nfrom qtool.checkpoint.reader import Checkpoint\n"
        "from qtool.recommend import recommend, recommendation_view\n"
        f"recommendation_view(recommend(Checkpoint(Path({str(make_model())!r})), 'vllm', 'h100', 1e9))\n"
        "sys.exit(str([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules] or ''))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


def on_the_command_line(words, capsys):
    from qtool.cli import run

    code = run(["quantize", *words])
    return code, *capsys.readouterr()


def test_the_command_prints_the_page_and_writes_nothing(make_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = make_model(hidden_size=128, intermediate_size=256)
    wishes = ["--recommend", "--engine", "vllm", "--hardware", "h100"]
    found = recommend(Checkpoint(model), "vllm", "h100")
    page = "\n".join(plain_lines(recommendation_view(found))) + "\n"
    assert on_the_command_line([str(model), *wishes], capsys) == (0, page, "")
    code, out, err = on_the_command_line([str(model), *wishes, "--json"], capsys)
    assert (code, json.loads(out), err) == (0, found.to_tree(), "")
    code, out, _ = on_the_command_line([str(model), "--recommend", "--data", "none", "--json"], capsys)
    assert code == 0
    assert not any(c["needs_data"] for c in json.loads(out)["candidates"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--recommend", "--engine", "vlm"], 2, "unknown engine `vlm`"),
        (["--recommend", "--memory", "much"], 2, "`much` is not a size of memory"),
        (["--recommend", "--memory", "1kB"], 1, "nothing fits the 900 B usable of 1.00 kB"),
        (["--recommend", "--scheme", "w4a16"], 2, "--scheme means nothing with it"),
        (["--memory", "8GB"], 2, "--memory means nothing without --recommend"),
    ],
)
def test_mistakes_on_the_command_line(make_model, capsys, words, code, message):
    found, out, err = on_the_command_line([str(make_model()), *words], capsys)
    assert (found, out) == (code, "")
    assert message in err
