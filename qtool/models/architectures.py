"""Architectures as data, keyed by config.json's `model_type`. Never imports torch.

An entry says where the decoder blocks are, which linears of a block read the same input, in the order in
which they run, and what that input comes from. A model that is in no entry can still be quantized by methods
without data.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtool.errors import UsageError


@dataclass(frozen=True)
class Input:
    """One distinct input of linears of a block: who reads it, and what a scale of its channels can be folded into.

    `producer` is the norm, or the linear with `rows` of whose output the channels vary in proportion: "all",
    "value" (the value heads, each shared by the query heads of its group), or "second-half". None: nothing can.
    """

    linears: tuple[str, ...]
    producer: str | None = None
    rows: str = "all"


@dataclass(frozen=True)
class Architecture:
    """Module names are those of the checkpoint (`blocks`.N.`inputs`...)."""

    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    inputs: tuple[Input, ...] = (
        Input(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
        Input(("self_attn.o_proj",), "self_attn.v_proj", "value"),
        Input(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
        Input(("mlp.down_proj",), "mlp.up_proj"),
    )
    norm_offset: float = 0.0  # a norm multiplies by its weight plus this
    rotatable: bool = True  # its residual stream can be rotated: all that reads it goes through a norm, RMS and first
    attention: str = "sdpa"  # the attention code of transformers that computes this model exactly

    def linears(self) -> list[str]:
        """The linears of a block, relative to it."""
        return [linear for source in self.inputs for linear in source.linears]

    def fused(self) -> list[tuple[str, ...]]:
        """The linears that are served as one."""
        return [source.linears for source in self.inputs if len(source.linears) > 1]

    def is_block_linear(self, module: str) -> bool:
        """Whether a module of the checkpoint is one of those linears."""
        inside = module.startswith(self.blocks + ".")
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
}


def architecture_of(config: dict[str, Any], root: Path) -> Architecture:
    """The architecture of a config.json. Raises UsageError for one that no entry describes."""
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise UsageError(
            f"{root} is of architecture `{kind}`, which qtool cannot run; it runs {', '.join(sorted(ARCHITECTURES))}",
            "`qtool quantize --method rtn` without --eval runs no model and works on every safetensors checkpoint",
        )
    return ARCHITECTURES[kind]
