"""Architectures as data, keyed by config.json's `model_type`. Never imports torch.

An entry says where the decoder blocks are, which linears of a block read the same input, in the order in
which they run, and what that input comes from. A model that is in no entry can still be quantized by methods
without data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qtool.errors import UsageError, shown

SPELLINGS = {  # what the older architectures call these keys of config.json
    "num_hidden_layers": ("n_layer",), "hidden_size": ("n_embd",), "intermediate_size": ("n_inner", "ffn_dim"),
    "num_attention_heads": ("n_head",), "max_position_embeddings": ("n_positions",),
}  # fmt: skip


@dataclass(frozen=True)
class Input:
    """One distinct input of linears of a block: who reads it, and what a scale of its channels can be folded into.

    `producer` is the norm, or the linear with `rows` of whose output the channels vary in proportion: "all",
    "value" (the value heads, each shared by the query heads of its group), "value-of-each-head" (the same where the
    rows of each head are its query, key and value), or "second-half". None: nothing can.
    """

    linears: tuple[str, ...]
    producer: str | None = None
    rows: str = "all"
    when: tuple[tuple[str, object], ...] = ()  # fields of config.json that must be so, or left out, for the producer


@dataclass(frozen=True)
class Architecture:
    """Module names are those of transformers (`blocks`.N.`inputs`...); `spellings` are those that files may use."""

    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    before: tuple[str, ...] = ()  # what works on embeddings before the blocks, where the model has it
    after: tuple[str, ...] = ()  # likewise on what leaves the norm, before the head
    aliases: tuple[tuple[str, str], ...] = ()  # beginnings of names: in transformers, and in files instead
    inputs: tuple[Input, ...] = (
        Input(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
        Input(("self_attn.o_proj",), "self_attn.v_proj", "value"),
        Input(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
        Input(("mlp.down_proj",), "mlp.up_proj"),
    )
    cache_argument: str | int = "past_key_values"  # of a block: the keyword, or which argument after the hidden states
    transposed: bool = False  # its linears store their weight [in, out]
    positions: bool = False  # it has a table of positions, so rows cannot be longer than its context
    norm_offset: float = 0.0  # a norm multiplies by its weight plus this
    rotatable: bool = True  # its residual stream can be rotated: all that reads it goes through a norm, RMS and first
    attention: str = "sdpa"  # the attention code of transformers that computes this model exactly
    document_mask: bool = False  # positions that begin again do not make it mask other documents: it wants a mask

    def linears(self) -> list[str]:
        """The linears of a block, relative to it."""
        return [linear for source in self.inputs for linear in source.linears]

    @property
    def attention_output(self) -> str:
        """The linear of a block that attention ends in, relative to it."""
        return self.inputs[1].linears[0]

    def fused(self) -> list[tuple[str, ...]]:
        """The linears that are served as one."""
        return [source.linears for source in self.inputs if len(source.linears) > 1]

    def spellings(self, name: str) -> list[str]:
        """What a module or tensor may be called in files, transformers' name for it first."""
        aliases = [file + name.removeprefix(own) for own, file in self.aliases if name.startswith(own)]
        return [name, *aliases]

    def is_block_linear(self, module: str) -> bool:
        """Whether a module of the checkpoint is one of those linears."""
        inside = module.startswith(tuple(self.spellings(self.blocks + ".")))
        return inside and module.endswith(tuple(f".{linear}" for linear in self.linears()))


LLAMA = Architecture()
GEMMA_INPUTS = (  # these norms multiply by 1 + weight, and what leaves attention and mlp is normed again
    LLAMA.inputs[0],
    LLAMA.inputs[1],
    Input(("mlp.gate_proj", "mlp.up_proj"), "pre_feedforward_layernorm"),
    LLAMA.inputs[3],
)
PHI3 = Architecture(
    inputs=(
        Input(("self_attn.qkv_proj",), "input_layernorm"),
        Input(("self_attn.o_proj",), "self_attn.qkv_proj", "value"),
        Input(("mlp.gate_up_proj",), "post_attention_layernorm"),
        Input(("mlp.down_proj",), "mlp.gate_up_proj", "second-half"),
    ),
)
GPT_NEOX = Architecture(
    blocks="gpt_neox.layers",
    embedding="gpt_neox.embed_in",
    norm="gpt_neox.final_layer_norm",
    aliases=(("lm_head.", "embed_out."),),  # in files, also those of transformers 5.17
    inputs=(
        Input(("attention.query_key_value",), "input_layernorm"),
        Input(("attention.dense",), "attention.query_key_value", "value-of-each-head"),
        Input(("mlp.dense_h_to_4h",), "post_attention_layernorm"),
        Input(("mlp.dense_4h_to_h",)),
    ),
    cache_argument="layer_past",
    rotatable=False,
)
GPT2 = Architecture(
    blocks="transformer.h",
    embedding="transformer.wte",
    norm="transformer.ln_f",
    before=("transformer.wpe",),
    aliases=(("transformer.", ""),),  # the first published files
    inputs=(
        Input(("attn.c_attn",), "ln_1"),
        Input(("attn.c_proj",), "attn.c_attn", "value"),
        Input(("mlp.c_fc",), "ln_2"),
        Input(("mlp.c_proj",)),
    ),
    cache_argument=0,
    transposed=True,
    positions=True,
    rotatable=False,
)
NORM_FIRST = (("do_layer_norm_before", True), ("layer_norm_elementwise_affine", True))
OPT = Architecture(
    blocks="model.decoder.layers",
    embedding="model.decoder.embed_tokens",
    norm="model.decoder.final_layer_norm",
    before=("model.decoder.embed_positions", "model.decoder.project_in"),
    after=("model.decoder.project_out",),
    aliases=(("model.decoder.", "decoder."),),
    inputs=(
        Input(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn_layer_norm", when=NORM_FIRST),
        Input(("self_attn.out_proj",), "self_attn.v_proj", "value"),
        Input(("fc1",), "final_layer_norm", when=NORM_FIRST),  # norms that come last feed the residual stream too
        Input(("fc2",), "fc1", when=(("activation_function", "relu"),)),  # relu(s x) = s relu(x) for s > 0
    ),
    positions=True,
    rotatable=False,
    document_mask=True,
)

ARCHITECTURES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": Architecture(
        inputs=GEMMA_INPUTS, norm_offset=1.0, rotatable=False, attention="eager"
    ),  # sdpa leaves out the soft cap of the scores
    "gemma3_text": Architecture(inputs=GEMMA_INPUTS, norm_offset=1.0, rotatable=False),
    "phi3": PHI3,
    "gpt_neox": GPT_NEOX,
    "gpt2": GPT2,
    "opt": OPT,
}


def architecture_of(config: Mapping[str, Any], root: Path) -> Architecture:
    """The architecture of a config.json, with the producers that it has there.

    Raises UsageError for one that no entry describes.
    """
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        raise UsageError(
            f"{root} is of architecture `{shown(kind)}`, which qtool cannot run; "
            f"it runs {', '.join(sorted(ARCHITECTURES))}",
            "`qtool quantize --method rtn` without --eval runs no model and works on every safetensors checkpoint",
        )
    architecture = ARCHITECTURES[kind]
    inputs = tuple(
        source if all(config.get(key, value) == value for key, value in source.when) else replace(source, producer=None)
        for source in architecture.inputs
    )
    return replace(architecture, inputs=inputs)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that describes the language model."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def config_value(config: Mapping[str, Any], key: str) -> Any:
    """What a config.json says of the language model, by transformers' usual name for it; None where it does not."""
    known = text_config(config)
    return next((known[name] for name in (key, *SPELLINGS.get(key, ())) if known.get(name) is not None), None)
