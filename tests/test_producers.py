"""Scaling what produces an input and dividing the columns that read it leaves a model as it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qtool.checkpoint.reader import Checkpoint
from qtool.errors import QtoolError
from qtool.formats.weights import Weights
from qtool.models.architectures import ARCHITECTURES, Architecture, Input, architecture_of
from qtool.models.blockwise import BlockModel, linear_of
from qtool.models.producers import producer_rows

MakeModel = Callable[..., Path]
KINDS = [*ARCHITECTURES, "opt norm last", "opt gelu"]
FIELDS = {"opt norm last": {"do_layer_norm_before": False}, "opt gelu": {"activation_function": "gelu"}}


class Block:
    """The first block of a random float32 model with what enters it."""

    def __init__(self, model: BlockModel, module: nn.Module, config: dict[str, Any]) -> None:
        self.model, self.module, self.config = model, module, config
        self.architecture: Architecture = model.architecture
        tokens_BT = torch.randint(0, 320, (2, 16), generator=torch.Generator().manual_seed(0))
        self.stream = model.start([tokens_BT])

    def run(self) -> Tensor:
        return self.model.run(self.module, 0, self.stream, 0)

    def input_of(self, linear: str) -> Tensor:
        """[N, I]"""
        seen: list[Tensor] = []
        module = self.module.get_submodule(linear)
        handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2).clone()))
        self.run()
        handle.remove()
        return seen[0]

    def weight(self, linear: str) -> Tensor:
        weight = linear_of(self.module, linear).weight.data
        return weight.T if self.architecture.transposed else weight

    def is_norm(self, producer: str) -> bool:
        return self.module.get_submodule(producer).weight.dim() == 1

    def rows(self, source: Input) -> list[int]:
        return producer_rows(source, self.config, *self.sizes(source))

    def sizes(self, source: Input) -> tuple[int, int]:
        assert source.producer
        return len(self.weight(source.producer)), linear_of(self.module, source.linears[0]).in_features

    def scale_rows(self, producer: str, by_row: Tensor) -> None:
        """A norm's or a linear's outputs times `by_row`."""
        module = self.module.get_submodule(producer)
        if self.is_norm(producer):
            offset = self.architecture.norm_offset
            module.weight.copy_((module.weight + offset) * by_row - offset)
        else:
            self.weight(producer).mul_(by_row[:, None])
        if getattr(module, "bias", None) is not None:
            module.bias.mul_(by_row)


@pytest.fixture
def opened(make_model: MakeModel) -> Callable[[str], Any]:
    @contextmanager
    def open_block(name: str) -> Iterator[Block]:
        path = make_model(name.split()[0], dtype="float32", **FIELDS.get(name, {}))
        model = BlockModel(path, Weights(Checkpoint(path)), torch.device("cpu"))
        with model.block(0) as module:
            yield Block(model, module, json.loads((path / "config.json").read_text()))

    return open_block


def gap_after_scaling(block: Block, source: Input, rows: list[int] | None) -> float:
    """How far the block's output moves, relative to its size, when an input is scaled and its readers divided."""
    assert source.producer
    before = block.run()
    outputs = block.sizes(source)[0] if rows is not None else len(block.module.get_submodule(source.producer).weight)
    by_row = torch.empty(outputs).uniform_(0.3, 3.0, generator=torch.Generator().manual_seed(1))
    if rows is not None:  # the producer's other rows are somebody else's input
        by_row[sorted(set(range(outputs)) - set(rows))] = 1.0
    block.scale_rows(source.producer, by_row)
    for linear in source.linears:
        block.weight(linear).div_(by_row if rows is None else by_row[rows])
    return float((block.run() - before).abs().max() / before.abs().max())


@pytest.mark.parametrize("name", KINDS)
def test_scaling_the_producer_and_dividing_the_readers_changes_nothing(opened: Callable[[str], Any], name: str) -> None:
    tried = 0
    for index in range(len(ARCHITECTURES[name.split()[0]].inputs)):
        with opened(name) as block:
            source = block.architecture.inputs[index]
            if source.producer:
                rows = None if block.is_norm(source.producer) else block.rows(source)
                gap = gap_after_scaling(block, source, rows)
                assert gap < 1e-5, f"{source}: {gap:.2e}"
                tried += 1
    assert tried == {"gpt_neox": 3, "gpt2": 3, "opt norm last": 2, "opt gelu": 3}.get(name, 4)


@pytest.mark.parametrize("name", KINDS)
def test_wrong_rows_would_be_noticed(opened: Callable[[str], Any], name: str) -> None:
    for index in range(len(ARCHITECTURES[name.split()[0]].inputs)):
        with opened(name) as block:
            source = block.architecture.inputs[index]
            if source.producer and not block.is_norm(source.producer):
                rows = block.rows(source)
                gap = gap_after_scaling(block, source, [*rows[1:], rows[0]])
                assert gap > 1e-2, f"{source}: {gap:.2e}"


def test_a_producer_that_is_named_none_is_none(opened: Callable[[str], Any]) -> None:
    """What the table leaves out would change the model."""
    wrong = {
        "gpt_neox": Input(("mlp.dense_4h_to_h",), "mlp.dense_h_to_4h"),
        "gpt2": Input(("mlp.c_proj",), "mlp.c_fc"),
        "opt gelu": Input(("fc2",), "fc1"),
    }
    for name, source in wrong.items():
        with opened(name) as block:
            assert gap_after_scaling(block, source, block.rows(source)) > 1e-2, name
    with opened("opt norm last") as block:
        before = block.run()
        block.scale_rows("self_attn_layer_norm", torch.full((64,), 2.0))
        block.weight("fc1").div_(2.0)
        assert (block.run() - before).abs().max() > 1e-2


@pytest.mark.parametrize("name", KINDS)
def test_rows_are_those_that_scale_the_channels(opened: Callable[[str], Any], name: str) -> None:
    """Found the slow way: double each row of the producer in turn and see which channels double."""
    with opened(name) as block:
        for source in block.architecture.inputs:
            if source.producer is None or block.is_norm(source.producer):
                continue
            outputs, inputs = block.sizes(source)
            before_NI, found = block.input_of(source.linears[0]), dict[int, int]()
            for row in range(outputs):
                by_row = torch.ones(outputs)
                by_row[row] = 2.0
                block.scale_rows(source.producer, by_row)
                after_NI = block.input_of(source.linears[0])
                block.scale_rows(source.producer, 1 / by_row)
                moved_I = (after_NI - before_NI).abs().amax(0) > 1e-6
                doubled_I = torch.isclose(after_NI, 2 * before_NI, rtol=1e-3, atol=1e-6).all(0) & moved_I
                found.update(dict.fromkeys(doubled_I.nonzero().flatten().tolist(), row))
            alive = [channel for channel in range(inputs) if before_NI[:, channel].any()]  # behind a ReLU not all are
            assert len(alive) > inputs / 2
            assert found == {channel: block.rows(source)[channel] for channel in alive}, source


def test_heads_written_out() -> None:
    def rows(kind: str, index: int, out_features: int, in_features: int, **config: int) -> list[int]:
        architecture = architecture_of({"model_type": kind}, Path("m"))
        return producer_rows(architecture.inputs[index], config, out_features, in_features)

    heads = {"num_attention_heads": 4}
    assert rows("llama", 1, 8, 8, **heads) == list(range(8))
    assert rows("llama", 1, 4, 8, **heads) == [0, 1, 0, 1, 2, 3, 2, 3]
    assert rows("llama", 1, 2, 8, **heads) == [0, 1] * 4
    assert rows("llama", 3, 5, 5) == list(range(5))
    assert rows("phi3", 1, 16, 8, **heads) == [12, 13, 12, 13, 14, 15, 14, 15]  # 4 query, 2 key, 2 value heads
    assert rows("phi3", 1, 12, 8, **heads) == [10, 11] * 4
    assert rows("phi3", 3, 6, 3) == [3, 4, 5]
    assert rows("gpt2", 1, 24, 8, n_head=4) == list(range(16, 24))
    assert rows("gpt_neox", 1, 24, 8, **heads) == [4, 5, 10, 11, 16, 17, 22, 23]


@pytest.mark.parametrize(
    ("kind", "index", "outputs", "inputs", "heads"),
    [
        ("llama", 1, 8, 8, 0),  # no heads in the config
        ("llama", 1, 6, 8, 4),  # 3 value heads for 4
        ("llama", 1, 8, 10, 4),
        ("llama", 1, 7, 8, 4),
        ("llama", 3, 8, 4, 4),
        ("phi3", 1, 14, 8, 4),  # 7 heads: 4 and one and a half twice
        ("phi3", 3, 7, 3, 4),
        ("gpt_neox", 1, 16, 8, 4),
    ],
)
def test_sizes_that_do_not_belong_together(kind: str, index: int, outputs: int, inputs: int, heads: int) -> None:
    source = ARCHITECTURES[kind].inputs[index]
    with pytest.raises(QtoolError) as caught:
        producer_rows(source, {"num_attention_heads": heads}, outputs, inputs)
    assert f"`{source.producer}` has {outputs} outputs" in caught.value.message
    assert f"`{source.linears[0]}` {inputs} inputs" in caught.value.message
