"""A transformers model run block by block, with only one block's weights in memory.

The model is built on the meta device. Embeddings are loaded, one recording pass per batch captures what
enters the first block and what each block is given besides (masks, position embeddings), and then every
block is loaded, run over all batches and dropped. This reproduces the whole model exactly.

Shapes: B rows of a batch, T tokens, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from qtool.errors import QtoolError, UsageError
from qtool.models.architectures import Architecture, architecture_of
from qtool.models.loading import config_tree, load_config
from qtool.runtime.inputs import round_inputs
from qtool.runtime.kv import KVCache
from qtool.scheme import ActivationScheme


class Source(Protocol):
    """Where weights come from, float32 and by checkpoint name; `qtool.formats.weights.Weights` is one."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]: ...

    def read_rows(self, name: str, rows: Tensor) -> Tensor: ...

    def roundings(self, unit: str) -> Mapping[str, tuple[ActivationScheme, Tensor | None]]: ...

    def kv_scales(self, unit: str) -> tuple[ActivationScheme, Tensor, Tensor] | None: ...


class _AllRecorded(Exception):  # noqa: N818 (not an error)
    """Ends a recording pass after the last block."""


class _Recorder(nn.Module):
    """Stands in for a block: notes its arguments and hands the hidden states on."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.last = last
        self.call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def forward(self, hidden_BTE: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.call = (hidden_BTE, *args), kwargs
        if self.last:
            raise _AllRecorded
        return hidden_BTE


@dataclass
class Stream:
    """Hidden states of all batches on their way through the blocks, and the arguments of each block for each batch."""

    hidden: list[Tensor]  # [B, T, E] each
    arguments: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = field(default_factory=list)


class BlockModel:
    """A causal language model whose weights are read when they are needed."""

    def __init__(self, root: Path, source: Source, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM

        self.architecture = architecture_of(config_tree(root), root)
        try:
            self.config = load_config(root)
            with torch.device("meta"):
                self.model = AutoModelForCausalLM.from_config(
                    self.config, attn_implementation=self.architecture.attention, dtype=torch.float32
                )
        except Exception as error:  # a config.json may be wrong in any way
            raise QtoolError(f"transformers cannot use the config of {root}: {' '.join(str(error).split())}") from None
        self.home, self.source, self.device = root, source, device
        self.cache: KVCache | None = None
        self.model.eval().requires_grad_(False)
        self._rebuild_buffers()
        self.blocks: list[nn.Module] = list(self.model.get_submodule(self.architecture.blocks).children())
        first = f"{self.architecture.blocks}.0.{self.architecture.linears()[0]}.weight"
        in_file = next((name for name in self.architecture.spellings(first) if name in source.shapes), first)
        self._blocks_in_file = in_file.removesuffix(first.removeprefix(self.architecture.blocks))

    @property
    def context(self) -> int:
        """Tokens that the model was made for."""
        return int(getattr(self.config, "max_position_embeddings", 0) or 2048)

    def block_name(self, index: int) -> str:
        """What the checkpoint calls block `index`."""
        return f"{self._blocks_in_file}.{index}"

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Block `index` with its weights in float32, dropped again at the end.

        Inputs, keys and values are rounded as the checkpoint says that they are when it is served.
        """
        cache = self.kv_cache(index)
        with self._serving(f"{self.architecture.blocks}.{index}", self.block_name(index)) as block:
            self.cache = cache
            try:
                yield block
            finally:
                self.cache = None

    def start(self, batches: Iterable[Tensor], positions: Sequence[Tensor] | None = None) -> Stream:
        """Token batches [B, T] -> what enters the first block. Of the embedding only the rows in use are loaded.

        `positions` [B, T] of each batch begin again at 0 with each document of a row; no token sees another document.
        Raises UsageError for rows longer than a table of positions.
        """
        stream, tokens = Stream([]), list(batches)
        for tokens_BT in tokens:
            self.check_length(tokens_BT)
        used = torch.unique(torch.cat([batch.flatten() for batch in tokens]))
        path, _, name = self.architecture.blocks.rpartition(".")
        decoder = self.model.get_submodule(path)
        recorders = [_Recorder(b is self.blocks[-1]) for b in self.blocks]
        of_shape: dict[tuple[int, ...], list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        embedding = self.model.get_submodule(self.architecture.embedding)
        assert isinstance(embedding, nn.Embedding)
        embedding.padding_idx = None  # matters to gradients only, and would point outside the rows in use
        with ExitStack() as stack, torch.no_grad():
            stack.enter_context(self._loaded(self.architecture.embedding, used))
            for part in self.present(self.architecture.before):
                stack.enter_context(self._serving(part, self.module_in_file(part)))
            setattr(decoder, name, nn.ModuleList(recorders))
            try:
                for batch, tokens_BT in enumerate(tokens):
                    positions_BT = positions[batch] if positions is not None else None
                    with suppress(_AllRecorded):
                        rows_BT = torch.searchsorted(used, tokens_BT)
                        # numbers of rows are no tokens: what looks for padding must not see them
                        decoder(
                            inputs_embeds=embedding(rows_BT.to(self.device)),
                            use_cache=False,
                            **document_arguments(self.architecture, positions_BT, self.device),
                        )
                    calls = [recorder.call for recorder in recorders]
                    stream.hidden.append(calls[0][0][0])
                    arguments = [(args[1:], kwargs) for args, kwargs in calls]
                    if positions is None:  # batches of one shape share theirs
                        arguments = of_shape.setdefault(tuple(tokens_BT.shape), arguments)
                    stream.arguments.append(arguments)
            finally:
                setattr(decoder, name, nn.ModuleList(self.blocks))
        return stream

    def run(self, block: nn.Module, index: int, stream: Stream, batch: int, cache: KVCache | None = None) -> Tensor:
        """The output of a loaded block for one batch, [B, T, E]; does not change the stream.

        `cache` sees, and may change, its keys and values.
        """
        with torch.no_grad():
            return self.forward(block, index, stream, batch, cache)

    def forward(self, block: nn.Module, index: int, stream: Stream, batch: int, cache: KVCache | None = None) -> Tensor:
        """The same with the gradient of whatever the block has that asks for one."""
        hidden_BTE = stream.hidden[batch]
        args, kwargs = stream.arguments[batch][index]
        args, kwargs = with_cache(cache or self.cache, self.architecture, args, kwargs)
        output = block(hidden_BTE, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Final norm, where there is one, and output head: a function from hidden states [N, E] to logits [N, V]."""
        with ExitStack() as stack:
            for name in self.head_modules():
                stack.enter_context(self._serving(name, self.module_in_file(name)))
            yield self.logits

    def logits(self, hidden_NE: Tensor) -> Tensor:
        """Final norm, where there is one, and output head, both loaded: hidden states [N, E] -> logits [N, V]."""
        values, final = hidden_NE, getattr(self.config, "final_logit_softcapping", None)
        for name in self.head_modules():
            values = self.model.get_submodule(name)(values)
        return torch.tanh(values / final) * final if final else values

    def head_modules(self) -> list[str]:
        """What hidden states go through to become logits."""
        return self.present((self.architecture.norm, *self.architecture.after, self.architecture.head))

    def present(self, names: Iterable[str]) -> list[str]:
        """Those modules that the model of this config has."""
        found: list[str] = []
        for name in names:
            with suppress(AttributeError):  # what a config leaves out is None or not there
                self.model.get_submodule(name)
                found.append(name)
        return found

    def check_length(self, tokens_BT: Tensor) -> None:
        """Raises UsageError for rows longer than a table of positions."""
        if self.architecture.positions and tokens_BT.shape[1] > self.context:
            raise UsageError(
                f"rows of {tokens_BT.shape[1]} tokens are too long for a model with {self.context} positions",
                f"make them shorter: `--seqlen {self.context}`",
            )

    def module_in_file(self, name: str) -> str:
        """What the checkpoint calls a module; a norm may have no weight to tell by."""
        spellings = self.architecture.spellings(f"{name}.weight")
        return next((s for s in spellings if s in self.source.shapes), spellings[0]).removesuffix(".weight")

    @contextmanager
    def _serving(self, name: str, in_file: str) -> Iterator[nn.Module]:
        """A loaded module that rounds its inputs as the checkpoint says; `in_file` is what that calls it."""
        with self._loaded(name) as module, round_inputs(module, self.roundings(in_file)):
            yield module

    def roundings(self, in_file: str) -> dict[str, tuple[ActivationScheme, Tensor | None]]:
        """How the inputs of linears of a module are rounded, on the device; `in_file` is what files call it."""
        found = self.source.roundings(in_file).items()
        return {name: (scheme, None if scale is None else scale.to(self.device)) for name, (scheme, scale) in found}

    def kv_cache(self, index: int) -> KVCache | None:
        """What rounds the keys and values of block `index`, where the checkpoint says that they are."""
        kv = self.source.kv_scales(self.block_name(index))
        return kv and KVCache(kv[0], kv[1].to(self.device), kv[2].to(self.device))

    @contextmanager
    def _loaded(self, name: str, rows: Tensor | None = None) -> Iterator[nn.Module]:
        """A module with its weights, or with these rows of its one weight; afterwards without them again."""
        module = self.model.get_submodule(name)
        expected = dict(module.named_parameters())
        sources = {n: self.source_name(f"{name}.{n}") for n in expected}
        for n, parameter in expected.items():
            self.check_shape(sources[n], parameter)
        if rows is None:
            values = self.source.read(dict.fromkeys(sources.values()))
        else:
            values = {source: self.source.read_rows(source, rows) for source in sources.values()}
        for n in expected:
            put(module, n, nn.Parameter(values[sources[n]].to(self.device), requires_grad=False))
        del values  # whoever replaces a weight of the module frees it
        try:
            yield module
        finally:
            for n, parameter in expected.items():
                put(module, n, parameter)

    def check_shape(self, source: str, parameter: Tensor) -> None:
        """Raises QtoolError where the checkpoint's tensor of that name has another shape."""
        shape, wanted = self.source.shapes[source], tuple(parameter.shape)
        if shape != wanted:
            raise QtoolError(f"`{source}` has shape {shape}, but config.json asks for {wanted}")

    def source_name(self, name: str) -> str:
        """The checkpoint's name of a parameter; with tied embeddings either of the two may be in the file."""
        names = self.architecture.spellings(name)
        tied = {f"{self.architecture.head}.weight", f"{self.architecture.embedding}.weight"}
        if name in tied and getattr(self.config, "tie_word_embeddings", False):
            names += self.architecture.spellings((tied - {name}).pop())
        for found in names:
            if found in self.source.shapes:
                return found
        raise QtoolError(f"the checkpoint has no tensor `{name}`, which config.json's model needs")

    def _rebuild_buffers(self) -> None:
        """Buffers that are in no checkpoint (rotary frequencies, embedding scales) stay on meta otherwise."""
        for module in self.model.modules():
            own = dict(module.named_buffers(recurse=False))
            if any(buffer.is_meta for buffer in own.values()):
                for n, buffer in own.items():
                    setattr(module, n, torch.empty_like(buffer, device=self.device))
                self.model._init_weights(module)


def put(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Make it the parameter of that dotted name."""
    path, _, last = name.rpartition(".")
    module.get_submodule(path)._parameters[last] = parameter


def with_cache(
    cache: KVCache | None, architecture: Architecture, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a block after its hidden states, with the cache in its place."""
    place = architecture.cache_argument
    if cache is None:
        return args, kwargs
    if isinstance(place, int):
        return (*args[:place], cache, *args[place + 1 :]), kwargs
    return args, {**kwargs, place: cache}


def document_arguments(
    architecture: Architecture, positions_BT: Tensor | None, device: torch.device
) -> dict[str, Tensor]:
    """What a decoder is given besides embeddings so that no token sees another document.

    transformers 5.17 makes such masks by itself where positions begin again, but for those models that it gives a
    mask of ones before it looks.
    """
    if positions_BT is None:
        return {}
    positions_BT = positions_BT.to(device)
    if not architecture.document_mask:
        return {"position_ids": positions_BT}
    document_BT = (positions_BT == 0).cumsum(1)
    same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
    return {"position_ids": positions_BT, "attention_mask": same_BTT.tril()[:, None]}


def replace_module(parent: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put `module` in the place of the submodule of that dotted name; returns the one that was there.

    It gets the hooks of that one, which round its inputs.
    """
    before = parent.get_submodule(name)
    for hook in before._forward_pre_hooks.values():
        module.register_forward_pre_hook(hook)
    parent.set_submodule(name, module)
    return before


def linear_of(block: nn.Module, name: str) -> nn.Linear:
    """A linear of a block by its name relative to the block; a Conv1D is one too, whose weight is [in, out]."""
    from transformers.pytorch_utils import Conv1D

    module = block.get_submodule(name)
    if isinstance(module, Conv1D):
        module.in_features, module.out_features = module.nx, module.nf
        return cast(nn.Linear, module)
    assert isinstance(module, nn.Linear), (name, type(module))
    return module


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA, then MPS, then the CPU. Raises UsageError when it is not there."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in present.items() if there)
    if not present.get(name.partition(":")[0], False):
        there = ", ".join(kind for kind, is_there in present.items() if is_there)
        raise UsageError(f"device `{name}` is not available; here there is: {there}")
    try:
        return torch.device(name)
    except RuntimeError:
        raise UsageError(f"`{name}` is no device", "known: cpu, cuda, cuda:1, mps, auto") from None
