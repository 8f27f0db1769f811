"""What the output of a job lies in: shards of safetensors, or one GGUF file, and what a mix makes of its matrices.

Never imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.writer import Container, Safetensors
from qtool.errors import UsageError
from qtool.formats import Format
from qtool.gguf.checkpoint import GGUFCheckpoint
from qtool.gguf.container import GGUFContainer
from qtool.gguf.model import GGUFModel
from qtool.mixes import MIXES, Mix
from qtool.mixes import scheme_of as mix_scheme
from qtool.models.architectures import config_value
from qtool.plan import Plan, matches
from qtool.recipe import Recipe
from qtool.scheme import FLOATS, KINDS, QuantScheme


def container_for(format: Format, checkpoint: Checkpoint, config: Mapping[str, Any], mix: Mix | None) -> Container:
    """What the tensors of the output lie in."""
    if format.container == "safetensors":
        return Safetensors()
    from qtool.gguf.tokenizer import tokenizer_metadata

    model = GGUFModel.of_config(dict(config))
    if isinstance(checkpoint, GGUFCheckpoint):
        keys = {key: value for key, value in checkpoint.metadata.items() if key.startswith("tokenizer.")}
        tokenizer = {key: value for key, value in keys.items() if type(value) is not int or value >= 0}  # -1: none
    else:
        tokenizer = tokenizer_metadata(checkpoint.root, int(config["vocab_size"]))
    general = {"general.quantization_version": 2}
    if mix:
        general["general.file_type"] = mix.file_type
    return GGUFContainer(model, {**model.metadata(), **general, **tokenizer}, {})


def with_kinds(container: Container, plan: Plan) -> Container:
    """A container that knows which tensors are blocks of which type."""
    if not isinstance(container, GGUFContainer):
        return container
    kinds = {x.source.name: x.scheme.kind for x in plan.linears if x.scheme.kind not in FLOATS}
    return GGUFContainer(container.model, container.metadata, kinds)


def notes_of(container: Container) -> tuple[str, ...]:
    """Where the readers of a container compute something else than transformers."""
    return container.model.notes if isinstance(container, GGUFContainer) else ()


def mix_of(recipe: Recipe) -> Mix | None:
    """The mix that a recipe asks for; a name that is also a scheme of other formats is one for GGUF alone."""
    mix = MIXES.get(recipe.scheme)
    if recipe.format == "gguf" or mix is None or (recipe.format == "auto" and recipe.scheme != "mxfp4"):
        return mix
    if recipe.scheme in (*KINDS, *FLOATS):
        return None
    raise UsageError(f"`{recipe.scheme}` is a mix of llama.cpp's, for GGUF files", "use `--format gguf`")


class Mixed:
    """What a mix makes of each matrix of a model."""

    def __init__(
        self, mix: Mix, container: Any, config: Mapping[str, Any], names: Collection[str], weighted: bool
    ) -> None:
        self.mix, self.model, self.weighted = mix, container.model, weighted
        heads = int(config_value(config, "num_attention_heads") or 1)
        self.gqa = heads // int(config_value(config, "num_key_value_heads") or heads)
        self.tied = not any(self.model.gguf_name(name) == "output.weight" for name in names)

    def scheme_of(self, module: str, shape: tuple[int, ...]) -> QuantScheme:
        return QuantScheme.parse(self._choice(module, shape)[0])

    def notes(self, plan: Plan, recipe: Recipe) -> tuple[str, ...]:
        """Where the scheme of a matrix is not what the name of the mix promises."""
        by_mix = [x for x in plan.linears if not any(matches(x.module, pattern) for pattern in recipe.layers)]
        found = [self._choice(linear.module, linear.shape)[1] for linear in by_mix]
        return tuple(dict.fromkeys(note for note in found if note))

    def _choice(self, module: str, shape: tuple[int, ...]) -> tuple[str, str | None]:
        name = self.model.gguf_name(f"{module}.weight") or module
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(.*?)(?:\.weight)?", name)
        assert match
        role = "output" if self.tied and match[2] == "token_embd" else match[2]
        index, blocks = int(match[1] or 0), self.model.blocks
        return mix_scheme(self.mix, role, index, blocks, (shape[0], shape[1]), self.gqa, self.weighted)
