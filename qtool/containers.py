"""What the output of a job lies in: shards of safetensors, or one GGUF file, and what a mix makes of its matrices.

Never imports torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import PurePath
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
from qtool.plan import Plan, matches
from qtool.recipe import Recipe
from qtool.scheme import FLOATS, KINDS, QuantScheme


def container_for(format: Format, checkpoint: Checkpoint, config: Mapping[str, Any], mix: Mix | None) -> Container:
    """What the tensors of the output lie in. Raises the errors of a GGUF file's config and, if it has none, tokenizer.

    Some tokenizers that llama.cpp does not have are found only when the file is laid out: that takes transformers.
    """
    if format.container == "safetensors":
        return Safetensors()
    from qtool.gguf.tokenizer import check_tokenizer, tokenizer_metadata

    model = GGUFModel.of_config(config, _name_of(checkpoint, config))
    metadata = {**model.metadata(), "general.quantization_version": 2}
    if mix:
        metadata["general.file_type"] = mix.file_type
    if isinstance(checkpoint, GGUFCheckpoint):
        keys = {key: value for key, value in checkpoint.metadata.items() if key.startswith("tokenizer.")}
        metadata |= {key: value for key, value in keys.items() if type(value) is not int or value >= 0}  # -1: none
        return GGUFContainer(model, metadata, {})
    check_tokenizer(checkpoint.root)
    return GGUFContainer(model, metadata, {}, partial(tokenizer_metadata, checkpoint.root, model.values["vocab_size"]))


def with_kinds(container: Container, plan: Plan) -> Container:
    """A container that knows which tensors are blocks of which type.

    Raises UsageError where the tensors of a GGUF file are not those that config.json describes.
    """
    if not isinstance(container, GGUFContainer):
        return container
    shapes = {x.source.name: x.shape for x in plan.linears} | {x.source.name: x.source.shape for x in plan.kept}
    shapes |= {info.name: info.shape for unit in plan.units for info in unit.added}
    if problem := container.model.problem(shapes):
        raise UsageError(problem, "copy the config.json that belongs to these weights beside them")
    kinds = {x.source.name: x.scheme.kind for x in plan.linears if x.scheme.kind not in FLOATS}
    return container.with_kinds(kinds)


def name_in(container: Container) -> str | None:
    """What a model is called in a container that has a place for that."""
    return container.model.name if isinstance(container, GGUFContainer) else None


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

    def __init__(self, mix: Mix, container: Any, weighted: bool) -> None:
        self.mix, self.model, self.weighted = mix, container.model, weighted
        self.gqa = self.model.values["num_attention_heads"] // self.model.values["num_key_value_heads"]
        self.tied = self.model.tied

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


def _name_of(checkpoint: Checkpoint, config: Mapping[str, Any]) -> str | None:
    """What a GGUF file calls a model: as its source does, or as its folder is called or its repository on the hub.

    By the name llama.cpp knows Phi-3, whose special tokens it reads otherwise: where config.json has that, it stays.
    """
    if isinstance(checkpoint, GGUFCheckpoint):
        name = checkpoint.metadata.get("general.name")
        return name if isinstance(name, str) else None
    folder = PurePath(os.path.abspath(checkpoint.root))
    on_hub = re.search(r"models--.*--([^/]+)/snapshots/[^/]+$", folder.as_posix())
    names = [on_hub[1] if on_hub else folder.name, PurePath(str(config.get("_name_or_path") or "")).name]
    name = next((name for name in names if "phi-3" in name.lower()), names[0])
    return name.encode(errors="replace").decode()
