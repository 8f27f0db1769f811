"""Architectures that llama.cpp and transformers both have, as data, keyed by config.json's `model_type`.

Keys and defaults of a file are those that llama.cpp reads (llama-cpp-python 0.3.36), modules and the defaults of a
config.json those of transformers 5.17. Never imports torch or gguf.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import EllipsisType
from typing import Any

MOST_BLOCKS = 512  # of llama.cpp
MOST_INTEGER = 2**31 - 1
MOST_TOKENS = 2**22  # sixteen times the largest vocabulary that is published


@dataclass(frozen=True)
class Hyperparameter:
    """`key` in a file, after the name of the architecture; `name` in config.json.

    `missing` is what a file without the key means: ... that it is damaged, None that the model has no such thing (so
    does a zero), a string the hyperparameter of that name.
    """

    key: str
    name: str
    kind: type = int
    most: float = MOST_INTEGER
    missing: int | float | str | EllipsisType | None = ...


SIZES = (
    Hyperparameter("block_count", "num_hidden_layers", most=MOST_BLOCKS),
    Hyperparameter("context_length", "max_position_embeddings"),
    Hyperparameter("embedding_length", "hidden_size"),
    Hyperparameter("feed_forward_length", "intermediate_size"),
    Hyperparameter("attention.head_count", "num_attention_heads"),
    Hyperparameter("attention.head_count_kv", "num_key_value_heads", missing="num_attention_heads"),
)
RMS_NORM = Hyperparameter("attention.layer_norm_rms_epsilon", "rms_norm_eps", float)
WINDOW, FINAL_CAP = "attention.sliding_window", "final_logit_softcapping"


HIDDEN, INNER, VOCABULARY, HEAD = "hidden_size", "intermediate_size", "vocab_size", "head_dim"
QUERY, KEY = "num_attention_heads * head_dim", "num_key_value_heads * head_dim"
JOINED, GATED = "(num_attention_heads + 2 * num_key_value_heads) * head_dim", "2 * intermediate_size"
SHAPES = {  # of weights [out, in], by the last part of a module's name; a bias has the first length, a norm HIDDEN
    "embed_tokens": (VOCABULARY, HIDDEN), "embed_in": (VOCABULARY, HIDDEN),
    "lm_head": (VOCABULARY, HIDDEN), "embed_out": (VOCABULARY, HIDDEN),
    "q_proj": (QUERY, HIDDEN), "k_proj": (KEY, HIDDEN), "v_proj": (KEY, HIDDEN), "o_proj": (HIDDEN, QUERY),
    "qkv_proj": (JOINED, HIDDEN), "query_key_value": (JOINED, HIDDEN), "dense": (HIDDEN, QUERY),
    "q_norm": (HEAD,), "k_norm": (HEAD,),
    "gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER),
    "gate_up_proj": (GATED, HIDDEN), "dense_h_to_4h": (INNER, HIDDEN), "dense_4h_to_h": (HIDDEN, INNER),
}  # fmt: skip


@dataclass(frozen=True)
class RowOrder:
    """How llama.cpp lays the rows of a linear: those of each head [heads, parts, rest], with the axes transposed."""

    heads: str  # which hyperparameter counts them
    parts: int
    axes: tuple[int, int, int]


LLAMA_MODULES = (
    "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """Module names are those of transformers, in `layers`.N. or outside."""

    name: str  # of llama.cpp
    causal_lm: str  # class of transformers
    layers: str = "model.layers"
    outside: tuple[str, ...] = ("model.embed_tokens", "model.norm")
    head: str = "lm_head"
    aliases: tuple[tuple[str, str], ...] = ()  # beginnings of names: in files, and here
    modules: tuple[str, ...] = LLAMA_MODULES
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # modules, by the field of config.json; "": all
    rows: Mapping[str, RowOrder] = field(default_factory=dict)
    norm_offset: float = 0.0  # a norm of the checkpoint multiplies by its weight plus this, llama.cpp by the weight
    hyperparameters: tuple[Hyperparameter, ...] = (*SIZES, RMS_NORM)
    defaults: Mapping[str, Any] = field(default_factory=dict)  # what a config.json may leave out
    fixed: Mapping[str, tuple[object, ...]] = field(default_factory=dict)  # all that llama.cpp can do; first: if absent
    head_dim: bool = True  # a head may have another size than hidden_size / num_attention_heads
    partial_rotary: bool = False  # some dimensions of a head may be left unrotated
    ropes: tuple[str, ...] = ("default", "linear")
    window_period: int | None = None  # every so many blocks one has no window; None: llama.cpp knows no windows here
    wide_scale: int | None = None  # with so many blocks scores are scaled by hidden_size / heads, else by head_dim


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
SWIGLU: dict[str, tuple[object, ...]] = {"hidden_act": ("silu",)}
LLAMA = Architecture(
    name="llama",
    causal_lm="LlamaForCausalLM",
    biases={
        "attention_bias": (*QKV, "self_attn.o_proj"),
        "mlp_bias": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    },
    rows={
        "self_attn.q_proj": RowOrder("num_attention_heads", 2, (0, 2, 1)),  # its rotation turns neighbouring rows
        "self_attn.k_proj": RowOrder("num_key_value_heads", 2, (0, 2, 1)),
    },
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "vocab_size": 32000},
    fixed=SWIGLU,
    ropes=("default", "linear", "yarn", "llama3", "longrope"),
)
MISTRAL = Architecture(
    name="llama",
    causal_lm="MistralForCausalLM",
    rows=LLAMA.rows,
    defaults={
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
        "vocab_size": 32000,
    },
    fixed=SWIGLU,
    ropes=LLAMA.ropes,
)
QWEN2 = Architecture(
    name="qwen2",
    causal_lm="Qwen2ForCausalLM",
    biases={"": QKV},
    defaults={
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "vocab_size": 151936,
    },
    fixed=SWIGLU,
    head_dim=False,
    ropes=("default", "linear", "yarn"),
)
QWEN3 = Architecture(
    name="qwen3",
    causal_lm="Qwen3ForCausalLM",
    modules=(*LLAMA_MODULES, "self_attn.q_norm", "self_attn.k_norm"),
    defaults={**QWEN2.defaults, "head_dim": 128},
    fixed={**SWIGLU, "attention_bias": (False,)},
    ropes=("default", "linear", "yarn"),
)
GEMMA_FIXED: dict[str, tuple[object, ...]] = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False,),
    "use_bidirectional_attention": (False,),
}
GEMMA_MODULES = (*LLAMA_MODULES, "pre_feedforward_layernorm", "post_feedforward_layernorm")
GEMMA_DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
GEMMA2 = Architecture(
    name="gemma2",
    causal_lm="Gemma2ForCausalLM",
    modules=GEMMA_MODULES,
    norm_offset=1.0,
    hyperparameters=(
        *SIZES,
        RMS_NORM,
        Hyperparameter(WINDOW, "sliding_window", missing=4096),
        Hyperparameter("attn_logit_softcapping", "attn_logit_softcapping", float, missing=50.0),
        Hyperparameter(FINAL_CAP, FINAL_CAP, float, missing=30.0),
    ),
    defaults={
        **GEMMA_DEFAULTS,
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "vocab_size": 256000,
    },
    fixed={**GEMMA_FIXED, "tie_word_embeddings": (True,)},
    window_period=2,
    wide_scale=46,
)
GEMMA3 = Architecture(
    name="gemma3",
    causal_lm="Gemma3ForCausalLM",
    aliases=(
        ("model.language_model.", "model."),
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
    ),
    modules=(*GEMMA_MODULES, "self_attn.q_norm", "self_attn.k_norm"),
    norm_offset=1.0,
    hyperparameters=(
        *SIZES,
        RMS_NORM,
        Hyperparameter(WINDOW, "sliding_window", missing=None),
        Hyperparameter(FINAL_CAP, FINAL_CAP, float, missing=None),
    ),
    defaults={
        **GEMMA_DEFAULTS,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "vocab_size": 262208,
    },
    fixed={**GEMMA_FIXED, "attn_logit_softcapping": (None,)},
    window_period=6,
    wide_scale=62,
)
PHI3_MODULES = (
    "input_layernorm", "self_attn.qkv_proj", "self_attn.o_proj",
    "post_attention_layernorm", "mlp.gate_up_proj", "mlp.down_proj",
)  # fmt: skip
PHI3 = Architecture(
    name="phi3",
    causal_lm="Phi3ForCausalLM",
    modules=PHI3_MODULES,
    hyperparameters=(*SIZES, RMS_NORM, Hyperparameter(WINDOW, "sliding_window", missing=None)),
    defaults={
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "vocab_size": 32064,
    },
    fixed=SWIGLU,
    head_dim=False,
    partial_rotary=True,
    ropes=("default", "longrope"),
)
GPT_NEOX_MODULES = (
    "input_layernorm", "attention.query_key_value", "attention.dense",
    "post_attention_layernorm", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h",
)  # fmt: skip
GPT_NEOX = Architecture(
    name="gptneox",
    causal_lm="GPTNeoXForCausalLM",
    layers="gpt_neox.layers",
    outside=("gpt_neox.embed_in", "gpt_neox.final_layer_norm"),
    head="embed_out",  # in files, also those of transformers 5.17
    aliases=(("lm_head.", "embed_out."),),
    modules=GPT_NEOX_MODULES,
    biases={"": (*GPT_NEOX_MODULES, "gpt_neox.final_layer_norm")},
    rows={"attention.query_key_value": RowOrder("num_attention_heads", 3, (1, 0, 2))},
    hyperparameters=(
        *SIZES,
        Hyperparameter("attention.layer_norm_epsilon", "layer_norm_eps", float),
        Hyperparameter("use_parallel_residual", "use_parallel_residual", bool),
    ),
    defaults={
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
        "rotary_pct": 0.25,
        "vocab_size": 50432,
    },
    fixed={
        "attention_bias": (True,),
        "tie_word_embeddings": (False,),
        "hidden_act": ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"),
    },
    head_dim=False,
    partial_rotary=True,
)

ARCHITECTURES = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "phi3": PHI3,
    "gpt_neox": GPT_NEOX,
}
NESTED = {"gemma3": "gemma3_text"}  # whose text_config describes the language model
GGUF_NAMES = {kind: architecture.name for kind, architecture in ARCHITECTURES.items()} | {"gpt2": "gpt2"}  # of weights
