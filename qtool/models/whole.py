"""A transformers model with all its weights in float32 in memory, to train it.

It computes what `BlockModel` does, with the inputs, keys and values rounded as the checkpoint says that they are when
it is served, and it never drops anything out. A linear may be replaced by another module, and what is trained is what
has `requires_grad`: at first nothing.

Shapes: B rows of a batch, T tokens, N tokens of all rows, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qtool.models.blockwise import BlockModel, Source, document_arguments, put, replace_module, with_cache
from qtool.runtime.inputs import round_inputs


@dataclass
class States:
    """What was seen inside the model in one pass, in the order of the blocks; [B, T, E] each."""

    hidden: list[Tensor] = field(default_factory=list)  # leaving a block
    attention: list[Tensor] = field(default_factory=list)  # leaving the last linear of its attention


class WholeModel(nn.Module):
    """`model` is the module of transformers; parameters keep its names, tied ones are one Parameter."""

    def __init__(self, home: Path, source: Source, device: torch.device, without: Collection[str] = ()) -> None:
        """`without` are tensors of the checkpoint that are not loaded: whoever names them replaces their modules.

        Raises QtoolError for tensors that are missing or of another shape than config.json asks for.
        """
        super().__init__()
        self.parts = BlockModel(home, source, device)
        self.architecture, self.config, self.device = self.parts.architecture, self.parts.config, device
        self.model: nn.Module = self.parts.model
        self.names: dict[str, str] = {}  # of parameters of `model` -> of the checkpoint's tensors
        self._load(source, without)
        embedding = self.model.get_submodule(self.architecture.embedding)
        assert isinstance(embedding, nn.Embedding)
        embedding.padding_idx = None  # its token may stand in texts, too, and would get no gradient
        self._hooks = ExitStack()
        self._serve_as_the_checkpoint_says()

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.model.get_submodule(self.architecture.blocks).children())

    @property
    def context(self) -> int:
        """Tokens that the model was made for."""
        return self.parts.context

    def block_name(self, index: int) -> str:
        """What the checkpoint calls block `index`."""
        return self.parts.block_name(index)

    def checkpoint_name(self, parameter: str) -> str:
        """What the checkpoint calls a parameter of `model` (of two tied ones the first); KeyError for a new one."""
        return self.names[parameter]

    def train(self, mode: bool = True) -> WholeModel:
        """Dropout and the like stay off: what is trained is what is served."""
        super().train(False)
        return self

    def replace(self, name: str, module: nn.Module) -> nn.Module:
        """See `replace_module`; the name is that of `model`."""
        return replace_module(self.model, name, module)

    def hidden(self, tokens_BT: Tensor, positions_BT: Tensor | None = None) -> Tensor:
        """The hidden states [B, T, E] that leave the last block, before the final norm.

        Positions begin again at 0 with each document of a row, and no token sees another document.
        """
        self.parts.check_length(tokens_BT)
        path = self.architecture.blocks.rpartition(".")[0]
        embedding = self.model.get_submodule(self.architecture.embedding)
        with self.watch(hidden=[len(self.blocks) - 1]) as states:
            self.model.get_submodule(path)(
                inputs_embeds=embedding(tokens_BT.to(self.device)),
                use_cache=False,
                **document_arguments(self.architecture, positions_BT, self.device),
            )
        return states.hidden[0]

    def logits(self, hidden_NE: Tensor) -> Tensor:
        """Final norm, where there is one, and output head: hidden states -> logits [N, V]."""
        return self.parts.logits(hidden_NE)

    def forward(self, tokens_BT: Tensor, positions_BT: Tensor | None = None) -> Tensor:
        """All logits [B, T, V]: for a few tokens."""
        return self.logits(self.hidden(tokens_BT, positions_BT))

    def recompute(self) -> None:
        """From now on a block keeps only its input for the gradient, and is computed again when its turn comes."""
        for block in self.blocks:
            # inside the module's call, so that hooks, those of FSDP too, run once a pass
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)

    @contextmanager
    def watch(self, hidden: Iterable[int] = (), attention: Iterable[int] = ()) -> Iterator[States]:
        """While active, one pass leaves the outputs of these blocks and of the attention of those."""
        states, blocks = States(), self.blocks

        def keep(into: list[Tensor]) -> Callable[..., None]:
            def hook(_: nn.Module, __: Any, output: Tensor | tuple[Tensor, ...]) -> None:
                into.append(output[0] if isinstance(output, tuple) else output)

            return hook

        outputs = [(blocks[i], states.hidden) for i in sorted(hidden)]
        ends = [(blocks[i].get_submodule(self.architecture.attention_output), states.attention) for i in attention]
        handles = [module.register_forward_hook(keep(into)) for module, into in outputs + ends]
        try:
            yield states
        finally:
            for handle in handles:
                handle.remove()

    def _load(self, source: Source, without: Collection[str]) -> None:
        """Block by block, so that no more than one lies in memory twice."""
        named = self.model.named_parameters(remove_duplicate=False)
        metas = {name: p for name, p in named if not without or self.parts.source_name(name) not in without}
        begin = self.architecture.blocks + "."
        groups: dict[str, list[str]] = {}
        for name in metas:
            index = name.removeprefix(begin).partition(".")[0] if name.startswith(begin) else ""
            groups.setdefault(index, []).append(name)
        made: dict[nn.Parameter, nn.Parameter] = {}  # tied parameters are one on the meta device already
        for names in groups.values():
            found = {name: self.parts.source_name(name) for name in names if metas[name] not in made}
            for name, in_file in found.items():
                self.parts.check_shape(in_file, metas[name])
            values = source.read(dict.fromkeys(found.values()))
            for name in names:
                if metas[name] not in made:
                    self.names[name] = found[name]
                    value = values.pop(found[name]).to(self.device)
                    made[metas[name]] = nn.Parameter(value, requires_grad=False)
                put(self.model, name, made[metas[name]])

    def _serve_as_the_checkpoint_says(self) -> None:
        """Hooks that round inputs, keys and values."""
        parts = self.parts
        outside = parts.present((*self.architecture.before, *parts.head_modules()))
        named = [(name, parts.module_in_file(name)) for name in outside]
        named += [(f"{self.architecture.blocks}.{i}", self.block_name(i)) for i in range(len(self.blocks))]
        for name, in_file in named:
            self._hooks.enter_context(round_inputs(self.model.get_submodule(name), parts.roundings(in_file)))
        for index, block in enumerate(self.blocks):
            cache = parts.kv_cache(index)
            if cache is not None:
                block.register_forward_pre_hook(partial(self._with_cache, cache), with_kwargs=True)

    def _with_cache(
        self, cache: Any, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        others, kwargs = with_cache(cache, self.architecture, args[1:], kwargs)
        return (args[0], *others), kwargs
