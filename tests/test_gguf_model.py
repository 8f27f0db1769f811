"""What llama.cpp calls a model's tensors and how it computes them: llama.cpp itself and transformers are the judges."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from qtool.checkpoint.reader import Checkpoint
from qtool.containers import Mixed, container_for
from qtool.errors import QtoolError, UsageError
from qtool.formats import get_format
from qtool.gguf import rope
from qtool.gguf.architectures import ARCHITECTURES
from qtool.gguf.container import GGUFContainer
from qtool.gguf.file import header_bytes
from qtool.gguf.model import GGUFModel, config_of
from qtool.mixes import MIXES
from tests.conftest import OWN, SMALL, VOCABULARY, MakeModel

FULL = {"use_sliding_window": False}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7], "long_factor": [1.0, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0],
}  # fmt: skip
FULL_VIEW, WINDOW = "full_attention", "sliding_attention"
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
# The first of each model_type runs in the fast suite.
CASES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "llama": ("llama", True, {}),
    "llama-untied": ("llama", False, {"head_dim": 32}),
    "llama-biases": ("llama", True, {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("llama", True, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama-llama3": ("llama", True, {"rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", True, {"rope_parameters": YARN}),
    "llama-yarn-attention": ("llama", True, {"rope_parameters": {**YARN, "attention_factor": 1.0}}),
    "llama-longrope": ("llama", True, {"rope_parameters": LONGROPE}),
    "mistral": ("mistral", True, {"sliding_window": None, "head_dim": 32}),
    "qwen2": ("qwen2", True, FULL),
    "qwen2-yarn": ("qwen2", False, {**FULL, "rope_parameters": YARN}),
    "qwen3": ("qwen3", True, {}),
    "gemma2": ("gemma2", True, {}),
    "gemma2-all-windows": ("gemma2", True, {"layer_types": [WINDOW] * 2}),
    "gemma3": ("gemma3_text", True, {}),
    "gemma3-untied-capped": (
        "gemma3_text", False, {"rope_parameters": GEMMA3_ROPE, "head_dim": 32, "query_pre_attn_scalar": 32,
        "final_logit_softcapping": 3.0},
    ),
    "gemma3-odd-windows": (
        "gemma3_text", True, {"num_hidden_layers": 5, "layer_types": [FULL_VIEW, WINDOW, WINDOW, FULL_VIEW, WINDOW]},
    ),
    "gemma3-no-window": ("gemma3_text", True, {"layer_types": [FULL_VIEW] * 2}),
    "phi3": ("phi3", True, {"sliding_window": None}),
    "phi3-partial": (
        "phi3", False, {"sliding_window": None, "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "phi3-longrope": (
        "phi3", False, {"sliding_window": None, "original_max_position_embeddings": 32, "rope_parameters": LONGROPE},
    ),
    "gpt_neox": ("gpt_neox", False, {}),
    "gpt_neox-sequential": ("gpt_neox", False, {"use_parallel_residual": False, "rotary_pct": 0.5}),
}  # fmt: skip
every_case = pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * ("-" in case)) for case in CASES]
)
ROWS = torch.randint(2, 300, (1, 64), generator=torch.Generator().manual_seed(1))


def source(make_model: MakeModel, case: str) -> Path:
    kind, tied, overrides = CASES[case]
    return make_model(kind, "float32", tied, **overrides)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def to_gguf(model: GGUFModel, tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The tensors of a file, in float32."""
    found = {}
    for name, tensor in tensors.items():
        stored = model.gguf_name(name)
        if stored is not None:
            order = model.row_order(name, tensor.shape[0])
            tensor = tensor if order is None else tensor[torch.tensor(order)]
            found[stored] = (tensor + model.offset(name)).float().numpy()
    return found


def from_gguf(model: GGUFModel, tensors: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The inverse."""
    found = {}
    for stored, array in tensors.items():
        name = model.hf_name(stored)
        assert name is not None
        tensor = torch.from_numpy(array) - model.offset(name)
        order = model.row_order(name, tensor.shape[0])
        if order is not None:
            tensor = torch.empty_like(tensor).index_copy_(0, torch.tensor(order), tensor)
        found[name] = tensor
    return found


def write(path: Path, metadata: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    """A file with a vocabulary of made-up tokens, by the `gguf` package."""
    import gguf

    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            kinds[type(value)](key, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{i}" for i in range(VOCABULARY)])
    writer.add_token_types([1] * VOCABULARY)
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_logits(path: Path, rows: torch.Tensor) -> torch.Tensor:
    """What llama.cpp computes for a row."""
    llama_cpp = pytest.importorskip("llama_cpp")
    tokens = rows[0].tolist()
    model = llama_cpp.Llama(
        str(path), n_ctx=len(tokens), n_batch=len(tokens), n_ubatch=len(tokens), logits_all=True, n_gpu_layers=0,
        type_k=0, type_v=0, flash_attn=False, n_threads=1, n_threads_batch=1, verbose=False, swa_full=True,
    )  # fmt: skip
    model.eval(tokens)
    logits = torch.tensor(np.array(model.scores[: len(tokens)]))
    model.close()
    return logits


@torch.no_grad()
def logits_of(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    return model(rows).logits[0].float()


def load(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, of the largest."""
    return float((found - wanted).abs().max() / wanted.abs().max())


class TableGelu(torch.nn.Module):
    """gelu of llama.cpp on a CPU: the tanh approximation from a table with an entry for each float16."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, table))


@every_case
def test_llama_cpp_computes_what_transformers_does(case: str, make_model: MakeModel, tmp_path: Path) -> None:
    """In float32, over rows longer than windows and original contexts: to 5e-6 of the largest logit.

    With gelu the median is: single inputs fall to neighbours in llama.cpp's table, which moves logits by 1e-4.
    """
    pytest.importorskip("llama_cpp")
    folder = source(make_model, case)
    config, tensors = read(folder)
    model = GGUFModel.of_config(config)
    path = tmp_path / "model.gguf"
    write(path, model.metadata(), to_gguf(model, tensors) | model.extra())
    found, judge = llama_logits(path, ROWS), load(folder)
    plain = distance(found, logits_of(judge, ROWS))
    with_gelu = model.architecture in ("gemma2", "gemma3", "gptneox")
    assert plain < (2e-3 if with_gelu else 5e-6)
    if with_gelu:
        for module in judge.modules():
            for name in ("act", "act_fn"):
                if hasattr(module, name):
                    setattr(module, name, TableGelu())
        wanted = logits_of(judge, ROWS)
        assert distance(found, wanted) < min(5e-4, plain / 1.5), f"{plain} with an exact gelu"
        assert float((found - wanted).abs().median() / wanted.abs().max()) < 2e-5


@every_case
def test_a_file_says_what_the_model_was(case: str, make_model: MakeModel) -> None:
    """Back through config_of: transformers computes the same logits from the same weights, and writes the same keys."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = source(make_model, case)
    config, tensors = read(folder)
    model = GGUFModel.of_config(config)
    metadata, extra, stored = model.metadata(), model.extra(), to_gguf(model, tensors)
    again = config_of(metadata, [*stored, *extra], extra)
    back = GGUFModel.of_config(again, name=model.name)
    assert back.metadata() == {k: pytest.approx(v, rel=1e-6) if type(v) is float else v for k, v in metadata.items()}
    for name, array in back.extra().items():
        assert np.allclose(array, extra[name], rtol=1e-6)
    found = from_gguf(back, stored)
    assert found.keys() == {name for name in tensors if model.gguf_name(name)}
    for name, tensor in found.items():
        assert torch.allclose(tensor, tensors[name], atol=1e-6), name
    kind = again.pop("model_type")
    built = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **again), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    names = {name.replace("embed_out.", "lm_head."): tensor for name, tensor in found.items()}
    missing, unexpected = built.load_state_dict(names, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    built.tie_weights()
    assert distance(logits_of(built, ROWS), logits_of(load(folder), ROWS)) < 2e-5


def tiny(kind: str, **overrides: Any) -> dict[str, Any]:
    """A config.json as older files spell it, without what may be left out."""
    known = {**SMALL, **OWN[kind], "model_type": kind, "tie_word_embeddings": kind != "gpt_neox", **overrides}
    return {key: value for key, value in known.items() if value is not None}


def published(kind: str = "llama", **overrides: Any) -> GGUFModel:
    return GGUFModel.of_config(tiny(kind, **overrides))


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        ("llama", {"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}),
        (
            "llama",
            {"rope_theta": 500.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
            {"rope_parameters": LLAMA3},
        ),
        (
            "qwen2",
            {"rope_theta": 1e3, "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 32}},
            {"rope_parameters": YARN},
        ),
        (
            "gemma3_text",
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            {"rope_parameters": GEMMA3_ROPE},
        ),
        (
            "phi3",
            {
                "original_max_position_embeddings": 32,
                "rope_scaling": {"type": "su", **{k: LONGROPE[k] for k in ("short_factor", "long_factor")}},
            },
            {"original_max_position_embeddings": 32, "rope_parameters": LONGROPE},
        ),
        (
            "gpt_neox",
            {"rotary_emb_base": 5000, "rotary_pct": 0.5},
            {"rope_parameters": {"rope_theta": 5000, "partial_rotary_factor": 0.5}},
        ),
    ],
)  # fmt: skip
def test_older_files_say_the_same_about_rotation(kind: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    one, other = published(kind, **old), published(kind, **new)
    assert one.metadata() == other.metadata()
    assert one.extra().keys() == other.extra().keys()
    assert all(np.array_equal(array, other.extra()[name]) for name, array in one.extra().items())


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_defaults_are_those_of_transformers(kind: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind)
    own = {"rope_theta", "rope_local_base_freq", "rotary_pct", "use_sliding_window", "sliding_window"}
    assert {key: getattr(config, key) for key in ARCHITECTURES[kind].defaults if key not in own} == {
        key: value for key, value in ARCHITECTURES[kind].defaults.items() if key not in own
    }
    for key in {"sliding_window", "use_sliding_window"} & ARCHITECTURES[kind].defaults.keys():
        assert ARCHITECTURES[kind].defaults[key] == type(config).__dataclass_fields__[key].default
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    rotary = GGUFModel.of_config(
        {"model_type": kind, **sizes, "num_key_value_heads": 2, "head_dim": None if kind == "gpt_neox" else 256}
        if ARCHITECTURES[kind].head_dim
        else {"model_type": kind, **sizes, "num_key_value_heads": 2}
    ).rope
    whole = config.rope_parameters
    whole = whole.get("full_attention", whole)
    assert rotary["rope_theta"] == whole["rope_theta"]
    assert rotary.get("partial_rotary_factor", 1.0) == whole.get("partial_rotary_factor", 1.0)
    if "local_theta" in rotary:
        assert rotary["local_theta"] == config.rope_parameters["sliding_attention"]["rope_theta"]


def test_rows_lie_as_llama_cpp_reads_them() -> None:
    model = published(num_attention_heads=4, num_key_value_heads=2)  # heads of 16
    name = "model.layers.1.self_attn.{}_proj.weight"
    weight = torch.randn(64, 8)
    for letter, heads in (("q", 4), ("k", 2)):
        rows = weight[: 16 * heads]
        order = model.row_order(name.format(letter), len(rows))
        wanted = rows.reshape(heads, 2, 8, 8).swapaxes(1, 2).reshape(rows.shape)
        assert torch.equal(rows[order], wanted)
    assert model.row_order(name.format("v"), 32) is None
    with pytest.raises(QtoolError, match="has 30 rows, which are not 2 heads of 16"):
        model.row_order(name.format("k"), 30)
    neox = published("gpt_neox")
    fused = torch.randn(192, 8)
    heads = fused.reshape(4, 3, 16, 8)
    order = neox.row_order("gpt_neox.layers.0.attention.query_key_value.weight", 192)
    assert torch.equal(fused[order], torch.cat([heads[:, part].reshape(64, 8) for part in range(3)]))
    assert neox.row_order("gpt_neox.layers.0.attention.query_key_value.bias", 192) == order


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_names_both_ways(kind: str) -> None:
    model = published(kind)
    assert model.blocks == 2
    assert len(set(model.tensors.values())) == len(model.tensors)
    for name, stored in model.tensors.items():
        assert model.gguf_name(name) == stored
        assert model.hf_name(stored) == name
    assert model.hf_name("rope_freqs.weight") is None
    with pytest.raises(UsageError, match=r"no place for `model\.layers\.0\.mlp\.experts"):
        model.gguf_name("model.layers.0.mlp.experts.weight")
    with pytest.raises(UsageError, match="no place"):
        model.gguf_name("model.layers.2.input_layernorm.weight")


def test_what_files_call_them_otherwise() -> None:
    neox = published("gpt_neox")
    assert neox.gguf_name("lm_head.weight") == neox.gguf_name("embed_out.weight") == "output.weight"
    assert neox.hf_name("output.weight") == "embed_out.weight"
    assert neox.gguf_name("gpt_neox.layers.0.attention.masked_bias") is None
    assert published().gguf_name("model.layers.0.self_attn.rotary_emb.inv_freq") is None
    assert published().gguf_name("lm_head.weight") is None
    assert published(tie_word_embeddings=False).gguf_name("lm_head.weight") == "output.weight"
    nested = GGUFModel.of_config({"model_type": "gemma3", "text_config": tiny("gemma3_text"), "vision_config": {}})
    assert nested == published("gemma3_text")
    for name in ("model.language_model.norm.weight", "language_model.model.norm.weight", "model.norm.weight"):
        assert (nested.gguf_name(name), nested.offset(name)) == ("output_norm.weight", 1.0)
    assert nested.gguf_name("model.vision_tower.embeddings.weight") is None
    assert nested.offset("model.layers.0.self_attn.k_norm.weight") == 1.0
    assert nested.offset("model.layers.0.self_attn.k_proj.weight") == 0.0
    assert published().offset("model.norm.weight") == 0.0


def test_the_name() -> None:
    assert published().metadata()["general.name"] == "model"
    assert published(_name_or_path="/home/someone/Llama-3").metadata()["general.name"] == "Llama-3"
    assert GGUFModel.of_config(tiny("llama"), "mine").metadata()["general.name"] == "mine"


LLAMA_31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def naive_llama3_factors(scaling: dict[str, Any], theta: float, dims: int) -> list[float]:
    """As the published code has it, frequency by frequency."""
    found = []
    for i in range(0, dims, 2):
        wavelength = 2 * math.pi * theta ** (i / dims)
        low = scaling["original_max_position_embeddings"] / scaling["low_freq_factor"]
        high = scaling["original_max_position_embeddings"] / scaling["high_freq_factor"]
        if wavelength < high:
            found.append(1.0)
        elif wavelength > low:
            found.append(scaling["factor"])
        else:
            smooth = scaling["original_max_position_embeddings"] / wavelength - scaling["low_freq_factor"]
            smooth /= scaling["high_freq_factor"] - scaling["low_freq_factor"]
            found.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return found


@pytest.mark.parametrize(
    ("scaling", "theta", "dims"),
    [(LLAMA_31, 5e5, 128), ({**LLAMA_31, "factor": 32.0}, 5e5, 64), ({**LLAMA_31, "factor": 32.0}, 5e5, 128)],
)
def test_published_scalings_are_found_exactly(scaling: dict[str, Any], theta: float, dims: int) -> None:
    factors = np.float32(naive_llama3_factors(scaling, theta, dims))
    assert np.allclose(rope.llama3_factors({**scaling, "rope_theta": theta}, dims), factors, rtol=1e-6)
    found = rope.llama3_parameters([float(str(value)) for value in factors], theta)
    assert found == {**scaling, "rope_type": "llama3"}


@settings(max_examples=200, deadline=None)
@given(
    factor=st.floats(1.01, 64),
    low=st.floats(0.1, 8),
    wide=st.floats(1.05, 16),
    original=st.integers(4, 200_000),
    theta=st.floats(100, 1e7),
    pairs=st.integers(1, 128),
)
def test_any_scaling_is_found_from_its_factors(
    factor: float, low: float, wide: float, original: int, theta: float, pairs: int
) -> None:
    scaling = {"factor": factor, "low_freq_factor": low, "high_freq_factor": low * wide}
    scaling["original_max_position_embeddings"] = original
    wanted = np.float32(naive_llama3_factors(scaling, theta, 2 * pairs))
    try:
        found = rope.llama3_parameters([float(str(value)) for value in wanted], theta)
    except QtoolError:  # all alike: that is no curve
        assert wanted.min() == wanted.max() > 1
        return
    again = rope.llama3_factors({**found, "rope_theta": theta}, 2 * pairs) if found else np.ones(pairs)
    assert np.allclose(again, wanted, rtol=1.1e-5)


def test_other_curves_are_refused() -> None:
    for factors in ([1.0, 4.0, 2.0, 8.0], [8.0, 4.0, 2.0, 1.0], [1.0, 2.0, 2.1, 8.0, 8.0, 8.0]):
        with pytest.raises(QtoolError, match=r"rope_freqs\.weight.* is not the scaling of Llama 3\.1"):
            rope.llama3_parameters(factors, 1e4)


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        ("opt", {}, "cannot write the architecture `opt`"),
        ("llama", {"num_local_experts": 8}, "mixtures of experts"),
        ("llama", {"hidden_act": "gelu"}, "`hidden_act`: gelu.* only with silu"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "`dynamic`"),
        ("llama", {"partial_rotary_factor": 0.5}, "cannot rotate 0.5 of 16 dimensions in llama"),
        ("llama", {"rope_scaling": {**YARN, "beta_fast": 16}}, "only without .*beta_fast"),
        ("qwen2", {"rope_parameters": LLAMA3}, "`llama3`"),
        ("qwen2", {"head_dim": 32}, "4 heads of 32 with a hidden size of 64"),
        ("qwen3", {"attention_bias": True}, "`attention_bias`"),
        ("gemma2", {"tie_word_embeddings": False}, "`tie_word_embeddings`"),
        ("gemma2", {"query_pre_attn_scalar": 20}, "`query_pre_attn_scalar` of 20, but llama.cpp takes 16"),
        ("gemma2", {"layer_types": [FULL_VIEW] * 2}, "gemma2 only with some"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "`use_bidirectional_attention`"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "`attn_logit_softcapping`"),
        ("gpt_neox", {"tie_word_embeddings": True}, "`tie_word_embeddings`"),
        ("llama", {"hidden_size": None}, "no `hidden_size`"),
    ],
)
def test_what_llama_cpp_cannot_do_is_refused(kind: str, overrides: dict[str, Any], message: str) -> None:
    if kind == "opt":
        with pytest.raises(UsageError, match=message):
            GGUFModel.of_config({"model_type": "opt"})
        return
    with pytest.raises(UsageError, match=message):
        published(kind, **overrides)


def test_what_llama_cpp_does_otherwise_is_noted() -> None:
    assert published().notes == published("gemma2").notes == ()
    for kind in ("mistral", "qwen2", "phi3"):
        assert "after 8 tokens" in published(kind).notes[0]
    assert published("mistral", sliding_window=4096).notes == ()  # as long as its context
    assert published("qwen2", use_sliding_window=False).notes == ()
    assert "tanh" in published("gpt_neox").notes[0]
    assert published("gpt_neox", hidden_act="gelu_fast").notes == ()


def made(kind: str = "llama", **overrides: Any) -> tuple[dict[str, Any], list[str], dict[str, np.ndarray]]:
    """Keys, names and factors of a file."""
    model = published(kind, **overrides)
    return model.metadata(), [*model.tensors.values(), *model.extra()], model.extra()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("general.architecture", "mamba", "architecture 'mamba'; qtool reads gemma2"),
        ("general.architecture", None, "architecture None"),
        ("general.type", "imatrix", "is no model"),
        ("llama.expert_count", 8, "mixture of experts"),
        ("llama.attention.head_count", None, "no key `llama.attention.head_count`"),
        ("llama.attention.head_count", 0, "`llama.attention.head_count` .* is 0"),
        ("llama.attention.head_count", [4, 4], "not an integer"),
        ("llama.attention.head_count", "4", "not an integer"),
        ("llama.attention.head_count", True, "not an integer"),
        ("llama.attention.head_count_kv", 3, "do not divide"),
        ("llama.block_count", 10**9, "`llama.block_count` .* is 1000000000: not within 1..512"),
        ("llama.block_count", 3, "no tensor `blk.2.attn_k.weight`"),
        ("llama.block_count", 1, "has a tensor `blk.1.attn_k.weight`"),
        ("llama.embedding_length", 2**40, "`llama.embedding_length`"),
        ("llama.attention.layer_norm_rms_epsilon", math.nan, "`llama.attention.layer_norm_rms_epsilon`"),
        ("llama.rope.freq_base", -1.0, "`llama.rope.freq_base`"),
        ("llama.rope.freq_base", "x", "`llama.rope.freq_base`"),
        ("llama.rope.dimension_count", 8, "rotates 8 of 16"),
        ("llama.rope.scaling.type", "ntk", "unknown way: `ntk`"),
        ("llama.rope.scaling.type", 3, "`llama.rope.scaling.type` .* not a string"),
        ("llama.attention.value_length", 8, "different lengths"),
        ("llama.vocab_size", None, "neither a key `vocab_size` nor"),
    ],
)
def test_damaged_keys_are_named(key: str, value: Any, message: str) -> None:
    metadata, names, _ = made()
    metadata[key] = value
    with pytest.raises(QtoolError, match=message):
        config_of({k: v for k, v in metadata.items() if v is not None}, names)


def test_a_missing_key_means_what_it_does_to_llama_cpp() -> None:
    metadata, names, _ = made("gemma2", num_key_value_heads=4)
    kept = "block_count", "context_length", "embedding_length", "feed_forward_length", "head_count", "rms_epsilon"
    few = {k: v for k, v in metadata.items() if k.endswith(kept) or k.startswith("general")}
    config = config_of({**few, "tokenizer.ggml.tokens": ["a"] * 7, "tokenizer.ggml.bos_token_id": 9}, names)
    wanted = {
        "num_key_value_heads": 4, "head_dim": 16, "sliding_window": 4096, "vocab_size": 7,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "layer_types": [WINDOW, FULL_VIEW],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "tie_word_embeddings": True,
        "bos_token_id": None,
    }  # fmt: skip
    assert {key: config[key] for key in wanted} == wanted


def test_factors_alone_mean_longrope() -> None:
    """As llama.cpp's converter writes Phi-3, and 0 for no window."""
    metadata, names, extra = made("phi3", rope_parameters=LONGROPE, sliding_window=None)
    assert metadata.pop("phi3.rope.scaling.type") == "longrope"
    assert metadata["phi3.attention.sliding_window"] == 0
    config = config_of(metadata, names, extra)
    assert config["rope_parameters"]["long_factor"] == LONGROPE["long_factor"]
    assert config["sliding_window"] is None


def test_largest_gemmas_scale_their_scores_otherwise() -> None:
    model = published("gemma2", num_hidden_layers=46, head_dim=32, query_pre_attn_scalar=16)
    config = config_of(model.metadata(), list(model.tensors.values()))
    assert (config["query_pre_attn_scalar"], config["head_dim"]) == (16, 32)


@pytest.mark.parametrize("name", ["rope_freqs.weight", "rope_factors_long.weight"])
@pytest.mark.parametrize("damage", [lambda a: a[:-1], lambda a: a * np.nan, lambda a: -a, None])
def test_damaged_factors_are_named(name: str, damage: Any) -> None:
    metadata, names, extra = made(rope_parameters=LLAMA3 if name == "rope_freqs.weight" else LONGROPE)
    config_of(metadata, names, extra)
    if damage:
        extra[name] = damage(extra[name])
    else:
        del extra[name]
    with pytest.raises(QtoolError, match=name):
        config_of(metadata, names, extra)


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=3),
    st.dictionaries(st.sampled_from(["rope_type", "factor", "full_attention"]), st.integers(), max_size=2),
)  # fmt: skip
BROKEN = {kind: made(kind) for kind in ARCHITECTURES}
FIELDS = ("rope_scaling", "rope_theta", "layer_types", "head_dim", "sliding_window", "text_config", "attention_bias")


@settings(max_examples=200, deadline=None)
@given(data=st.data(), kind=st.sampled_from(list(ARCHITECTURES)), value=ANYTHING)
def test_no_key_does_more_harm_than_an_error(data: st.DataObject, kind: str, value: Any) -> None:
    """Whatever stands in a key of a file or a field of a config.json."""
    metadata, names, _ = BROKEN[kind]
    key = data.draw(st.sampled_from(list(metadata)))
    with contextlib.suppress(QtoolError):
        config_of({**metadata, key: value}, names)
    config = tiny(kind)
    key = data.draw(st.sampled_from([*config, *FIELDS]))
    with contextlib.suppress(QtoolError):
        GGUFModel.of_config({**config, key: value}).metadata()


NUMBERS = (None, True, -1, 0, 1, 3, 2**31, 10**20, 10**400, 1.5, math.nan, math.inf, 1e-320)
OTHERS: tuple[Any, ...] = (
    "", "x", "\ud800", [], [None], [WINDOW], {}, {"type": 5}, {"rope_type": []}, {"rope_type": "llama3"},
    {"rope_type": "linear", "factor": None}, {"rope_type": "longrope", "factor": 1e15}, {"full_attention": 3},
    {"full_attention": {}, "sliding_attention": {"rope_type": []}}, {"rope_type": "yarn", "truncate": [], "factor": 2},
    {"rope_type": "yarn", "factor": 1e15, "mscale": 1e-30, "mscale_all_dim": 1e15},
)  # fmt: skip
MORE_FIELDS = (
    *FIELDS, "_name_or_path", "attn_logit_softcapping", "hidden_activation", "mlp_bias", "num_local_experts",
    "original_max_position_embeddings", "partial_rotary_factor", "rope_local_base_freq", "rope_parameters",
    "rotary_emb_base", "sliding_window_pattern", "use_bidirectional_attention",
)  # fmt: skip


@pytest.mark.parametrize("kind", [*ARCHITECTURES, "gemma3"])
def test_no_field_of_a_config_does_more_harm_than_an_error(kind: str, make_model: MakeModel) -> None:
    """Wrong types, nothing, and numbers as large as JSON has them; also of what is made of the config.json later."""
    nested = kind == "gemma3"
    config = tiny("gemma3_text" if nested else kind)
    checkpoint, mix = Checkpoint(make_model()), MIXES["q4_k_m"]
    for field in {*config, *MORE_FIELDS}:
        for value in (*NUMBERS, *OTHERS):
            changed = {**config, field: value}
            with contextlib.suppress(QtoolError):
                changed = {"model_type": "gemma3", "text_config": changed, field: value} if nested else changed
                container = container_for(get_format("gguf"), checkpoint, changed, mix)
                assert isinstance(container, GGUFContainer)
                assert container.model.problem({}) is not None
                header_bytes(container.metadata, [])
                Mixed(mix, container, False)


def test_a_rotation_of_windows_that_is_null_is_the_usual_one() -> None:
    assert published("gemma3_text", rope_local_base_freq=None) == published("gemma3_text")
