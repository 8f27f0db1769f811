"""Architectures as data, keyed by config.json's `model_type`. Never imports torch.

An entry says where the decoder blocks are, and which linears of a block read the same input, in the
order in which they run. A model that is in no entry can still be quantized by methods without data.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtool.errors import UsageError


@dataclass(frozen=True)
class Architecture:
    """Module names are those of the checkpoint (`blocks`.N.`inputs`...)."""

    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    inputs: tuple[tuple[str, ...], ...] = (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    )
    attention: str = "sdpa"  # the attention code of transformers that computes this model exactly

    def linears(self) -> list[str]:
        """The linears of a block, relative to it."""
        return [linear for group in self.inputs for linear in group]

    def is_block_linear(self, module: str) -> bool:
        """Whether a module of the checkpoint is one of those linears."""
        inside = module.startswith(self.blocks + ".")
        return inside and module.endswith(tuple(f".{linear}" for linear in self.linears()))


LLAMA = Architecture()
PHI3 = Architecture(
    inputs=(("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
)

ARCHITECTURES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": Architecture(attention="eager"),  # sdpa leaves out the soft cap of the scores
    "gemma3_text": LLAMA,
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
