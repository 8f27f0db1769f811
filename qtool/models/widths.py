"""Which sizes of a model the axes of its tensors have, as data: what a narrower model takes of them.

Never imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qtool.errors import QtoolError, UsageError
from qtool.models.architectures import SPELLINGS, Architecture, config_value

HIDDEN, QUERY, KEY, MLP = "hidden", "query", "key", "mlp"
EACH_HEAD = "query, key and value of each head"
Axes = tuple[tuple[str, ...], ...]  # of each axis of a tensor, what lies along it, one after the other; (): neither


@dataclass(frozen=True)
class Widths:
    """`qkv` are the outputs of each linear that attention reads its input with, `up` those of the MLP's."""

    qkv: Axes = ((QUERY,), (KEY,), (KEY,))
    up: tuple[str, ...] = (MLP,)
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")  # of a block, over hidden
    head_dim: bool = True  # config.json may say how wide a head is; else it is hidden_size / num_attention_heads
    divides: bool = False  # transformers 5.17 wants hidden_size to be a multiple of num_attention_heads all the same
    mlp_key: str = "intermediate_size"
    between: tuple[str, ...] = ()  # modules that stand between hidden and the embedding, where a model has them


USUAL = Widths()
GEMMA = Widths(norms=(*USUAL.norms, "pre_feedforward_layernorm", "post_feedforward_layernorm"), divides=True)
WIDTHS = {
    "llama": Widths(divides=True),
    "mistral": USUAL,
    "qwen2": USUAL,
    "qwen3": USUAL,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "phi3": Widths(((QUERY, KEY, KEY),), (MLP, MLP)),
    "gpt_neox": Widths(((EACH_HEAD,),), head_dim=False),
    "gpt2": Widths(((QUERY, KEY, KEY),), norms=("ln_1", "ln_2"), head_dim=False, mlp_key="n_inner"),
    "opt": Widths(
        norms=("self_attn_layer_norm", "final_layer_norm"),
        head_dim=False,
        mlp_key="ffn_dim",
        between=("model.decoder.project_in", "model.decoder.project_out"),
    ),
}


@dataclass(frozen=True)
class Sizes:
    """How large a model is."""

    blocks: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int

    def count(self, part: str) -> int:
        """How long what lies along an axis is."""
        return {
            HIDDEN: self.hidden, MLP: self.mlp, QUERY: self.heads * self.head_dim, KEY: self.kv_heads * self.head_dim,
            EACH_HEAD: 3 * self.heads * self.head_dim,
        }[part]  # fmt: skip

    def shape(self, axes: Axes, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a tensor with these axes in a model of this size; axes of neither kind stay as in `shape`."""
        return tuple(
            sum(map(self.count, parts)) if parts else n
            for n, parts in zip(shape, axes or ((),) * len(shape), strict=True)
        )


def sizes_of(config: Mapping[str, Any], architecture: Architecture, blocks: int, shapes: Mapping[str, Any]) -> Sizes:
    """The sizes of a model with so many blocks; `shapes` are those of a block's linears, [out, in] unless transposed.

    Raises QtoolError where config.json and the tensors do not belong together.
    """

    def inputs(place: int) -> int:
        return int(shapes[architecture.inputs[place].linears[0]][0 if architecture.transposed else 1])

    heads = int(config_value(config, "num_attention_heads") or 0)
    kv_heads = int(config_value(config, "num_key_value_heads") or heads)
    if not heads or not kv_heads or inputs(1) % heads or heads % kv_heads:
        raise QtoolError(
            f"config.json has {heads} heads on {kv_heads} of keys and values, but "
            f"`{architecture.inputs[1].linears[0]}` {inputs(1)} inputs: they do not belong together"
        )
    return Sizes(blocks, inputs(0), heads, kv_heads, inputs(1) // heads, inputs(3))


def axes_in_block(widths: Widths, architecture: Architecture, name: str) -> Axes:
    """The axes of a tensor by its name inside a block; () for one that has the same shape in a narrower model."""
    module, _, kind = name.rpartition(".")
    if module in widths.norms:
        return ((HIDDEN,),)
    qkv, out, up, down = (source.linears for source in architecture.inputs)
    linears = {linear: (outputs, (HIDDEN,)) for linear, outputs in zip(qkv, widths.qkv, strict=True)}
    linears |= {out[0]: ((HIDDEN,), (QUERY,)), down[0]: ((HIDDEN,), (MLP,))}
    linears |= dict.fromkeys(up, (widths.up, (HIDDEN,)))
    if module not in linears:
        return ()
    axes = linears[module]
    return axes[:1] if kind == "bias" else axes[::-1] if architecture.transposed else axes


def axes_outside(architecture: Architecture, module: str, kind: str) -> Axes:
    """Likewise for a module outside the blocks, by transformers' name."""
    if module in (architecture.embedding, architecture.head, *architecture.before) and kind == "weight":
        return ((), (HIDDEN,))
    return ((HIDDEN,),) if module == architecture.norm else ()


def changed_config(config: Mapping[str, Any], widths: Widths, before: Sizes, after: Sizes) -> dict[str, Any]:
    """The keys of config.json that say how large a model is, spelled as this one spells them.

    Raises UsageError where a model of that size cannot be described.
    """
    changes: dict[str, Any] = {}
    for key, value, old in (
        ("num_hidden_layers", after.blocks, before.blocks),
        ("hidden_size", after.hidden, before.hidden),
        ("num_attention_heads", after.heads, before.heads),
    ):
        if value != old:
            changes[next(name for name in (key, *SPELLINGS.get(key, ())) if name in config)] = value
    if (after.hidden, after.mlp) != (before.hidden, before.mlp):
        changes[widths.mlp_key] = after.mlp  # GPT-2's default depends on its hidden size
    if after.kv_heads != before.kv_heads and ("num_key_value_heads" in config or after.kv_heads != after.heads):
        changes["num_key_value_heads"] = after.kv_heads
    if "word_embed_proj_dim" in config and config["word_embed_proj_dim"] == before.hidden:
        changes["word_embed_proj_dim"] = after.hidden
    if (after.hidden, after.heads) != (before.hidden, before.heads):
        if widths.divides and after.hidden % after.heads:
            raise UsageError(f"{after.hidden} hidden channels are not a multiple of {after.heads} heads, which "
                             "transformers wants of this architecture", "another --hidden or --heads")  # fmt: skip
        if widths.head_dim:
            changes["head_dim"] = after.head_dim
        elif after.hidden != after.heads * after.head_dim:
            raise UsageError(
                f"{after.hidden} hidden channels do not make {after.heads} heads of {before.head_dim}, and this "
                "architecture has no others",
                f"`--hidden {after.heads * before.head_dim} --heads {after.heads}`",
            )
    return changes
