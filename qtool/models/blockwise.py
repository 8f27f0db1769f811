"""A transformers model run block by block, with only one block's weights in memory.

The model is built on the meta device. Embeddings are loaded, one recording pass per batch captures what
enters the first block and what each block is given besides (masks, position embeddings), and then every
block is loaded, run over all batches and dropped. This reproduces the whole model exactly.

Shapes: B rows of a batch, T tokens, E hidden size, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qtool.errors import QtoolError, UsageError
from qtool.models.architectures import architecture_of


class Source(Protocol):
    """Where weights come from, float32 and by checkpoint name; `qtool.formats.weights.Weights` is one."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]: ...

    def read_rows(self, name: str, rows: Tensor) -> Tensor: ...


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
    """Hidden states of all batches on their way through the blocks, and the arguments each block needs by shape."""

    hidden: list[Tensor]  # [B, T, E] each
    arguments: dict[tuple[int, ...], list[tuple[tuple[Any, ...], dict[str, Any]]]] = field(default_factory=dict)


class BlockModel:
    """A causal language model whose weights are read when they are needed."""

    def __init__(self, root: Path, source: Source, device: torch.device) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        self.architecture = architecture_of(_config(root), root)
        try:
            self.config = AutoConfig.from_pretrained(root, trust_remote_code=False, local_files_only=True)
            if hasattr(self.config, "quantization_config"):
                del self.config.quantization_config  # the weights arrive dequantized
            with torch.device("meta"):
                self.model = AutoModelForCausalLM.from_config(
                    self.config, attn_implementation=self.architecture.attention, dtype=torch.float32
                )
        except Exception as error:  # a config.json may be wrong in any way
            raise QtoolError(
                f"transformers cannot use {root / 'config.json'}: {' '.join(str(error).split())}"
            ) from None
        self.source, self.device = source, device
        self.model.eval().requires_grad_(False)
        self._rebuild_buffers()
        self.blocks: list[nn.Module] = list(self.model.get_submodule(self.architecture.blocks).children())

    @property
    def context(self) -> int:
        """Tokens that the model was made for."""
        return int(getattr(self.config, "max_position_embeddings", 0) or 2048)

    def block_name(self, index: int) -> str:
        return f"{self.architecture.blocks}.{index}"

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Block `index` with its weights in float32, dropped again at the end."""
        with self._loaded(self.block_name(index)) as block:
            yield block

    def start(self, batches: Iterable[Tensor]) -> Stream:
        """Token batches [B, T] -> what enters the first block. Of the embedding only the rows in use are loaded."""
        stream, tokens = Stream([]), list(batches)
        used = torch.unique(torch.cat([batch.flatten() for batch in tokens]))
        path, _, name = self.architecture.blocks.rpartition(".")
        decoder = self.model.get_submodule(path)
        recorders = [_Recorder(b is self.blocks[-1]) for b in self.blocks]
        embedding = self.model.get_submodule(self.architecture.embedding)
        assert isinstance(embedding, nn.Embedding)
        embedding.padding_idx = None  # matters to gradients only, and would point outside the rows in use
        with self._loaded(self.architecture.embedding, used), torch.no_grad():
            setattr(decoder, name, nn.ModuleList(recorders))
            try:
                for tokens_BT in tokens:
                    with suppress(_AllRecorded):
                        rows_BT = torch.searchsorted(used, tokens_BT)
                        decoder(input_ids=rows_BT.to(self.device), use_cache=False)
                    calls = [recorder.call for recorder in recorders]
                    stream.hidden.append(calls[0][0][0])
                    if tuple(tokens_BT.shape) not in stream.arguments:
                        stream.arguments[tuple(tokens_BT.shape)] = [(args[1:], kwargs) for args, kwargs in calls]
            finally:
                setattr(decoder, name, nn.ModuleList(self.blocks))
        return stream

    def run(self, block: nn.Module, index: int, stream: Stream, batch: int) -> Tensor:
        """The output of a loaded block for one batch, [B, T, E]; does not change the stream."""
        hidden_BTE = stream.hidden[batch]
        args, kwargs = stream.arguments[tuple(hidden_BTE.shape[:2])][index]
        with torch.no_grad():
            output = block(hidden_BTE, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Final norm and output head: a function from hidden states [N, E] to logits [N, V]."""
        final = getattr(self.config, "final_logit_softcapping", None)
        with (
            self._loaded(self.architecture.norm) as norm,
            self._loaded(self.architecture.head) as head,
            torch.no_grad(),
        ):

            def logits(hidden_NE: Tensor) -> Tensor:
                values = head(norm(hidden_NE))
                return torch.tanh(values / final) * final if final else values

            yield logits

    @contextmanager
    def _loaded(self, name: str, rows: Tensor | None = None) -> Iterator[nn.Module]:
        """A module with its weights, or with these rows of its one weight; afterwards without them again."""
        module = self.model.get_submodule(name)
        expected = dict(module.named_parameters())
        sources = {n: self._source_name(f"{name}.{n}") for n in expected}
        for n, parameter in expected.items():
            shape, wanted = self.source.shapes[sources[n]], tuple(parameter.shape)
            if shape != wanted:
                raise QtoolError(f"`{sources[n]}` has shape {shape}, but config.json asks for {wanted}")
        if rows is None:
            values = self.source.read(dict.fromkeys(sources.values()))
        else:
            values = {source: self.source.read_rows(source, rows) for source in sources.values()}
        for n in expected:
            _put(module, n, values[sources[n]].to(self.device))
        del values  # whoever replaces a weight of the module frees it
        try:
            yield module
        finally:
            for n, parameter in expected.items():
                _put(module, n, parameter)

    def _source_name(self, name: str) -> str:
        """The checkpoint's name of a parameter; with tied embeddings either of the two may be in the file."""
        if name in self.source.shapes:
            return name
        tied = {f"{self.architecture.head}.weight", f"{self.architecture.embedding}.weight"}
        other = (tied - {name}).pop() if name in tied else None
        if other in self.source.shapes and getattr(self.config, "tie_word_embeddings", False):
            return other
        raise QtoolError(f"the checkpoint has no tensor `{name}`, which config.json's model needs")

    def _rebuild_buffers(self) -> None:
        """Buffers that are in no checkpoint (rotary frequencies, embedding scales) stay on meta otherwise."""
        for module in self.model.modules():
            own = dict(module.named_buffers(recurse=False))
            if any(buffer.is_meta for buffer in own.values()):
                for n, buffer in own.items():
                    setattr(module, n, torch.empty_like(buffer, device=self.device))
                self.model._init_weights(module)


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    """Make `value` the parameter of that dotted name."""
    path, _, last = name.rpartition(".")
    module.get_submodule(path)._parameters[last] = nn.Parameter(value, requires_grad=False)


def linear_of(block: nn.Module, name: str) -> nn.Linear:
    """A linear of a block by its name relative to the block."""
    module = block.get_submodule(name)
    assert isinstance(module, nn.Linear), (name, type(module))
    return module


def _config(root: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((root / "config.json").read_text(encoding="utf-8"))
    except OSError:
        raise UsageError(f"{root} has no config.json, so the model cannot be run") from None
    return config


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
