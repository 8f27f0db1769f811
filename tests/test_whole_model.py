"""The whole model in memory computes what the model run block by block does, and can be trained."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qtool.checkpoint.reader import Checkpoint
from qtool.errors import UsageError
from qtool.formats.weights import Weights
from qtool.models.architectures import ARCHITECTURES
from qtool.models.blockwise import BlockModel, linear_of
from qtool.models.whole import WholeModel
from qtool.numerics.activations import fake_quantize
from qtool.scheme import KV_SCHEMES, ActivationScheme, QuantScheme
from tests.conftest import MakeModel
from tests.test_blockwise import (
    CPU,
    RENAMED,
    VARIANTS,
    assert_close,
    broken,  # noqa: F401 (a fixture)
    failure,
    logits_by_block,
    open_model,
    random_batches,
    whole_model,
)

BATCHES = [(2, 32), (1, 32), (3, 9)]
DOCUMENTS = [5, 1, 11, 15]  # tokens of each in one row, longer than the sliding windows and shorter
every_architecture = pytest.mark.parametrize("kind", ARCHITECTURES)
either_tied = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def load(path: Path) -> WholeModel:
    return WholeModel(path, Weights(Checkpoint(path)), CPU)


def packed_row() -> tuple[Tensor, Tensor]:
    """One row of several documents [1, T], and its positions."""
    tokens = random_batches([(1, sum(DOCUMENTS))])[0]
    return tokens, torch.cat([torch.arange(count) for count in DOCUMENTS])[None]


@every_architecture
@either_tied
def test_logits_are_those_of_the_blocks(make_model: MakeModel, kind: str, tied: bool) -> None:
    path = make_model(kind, tied=tied, shards=tied)
    model, batches = load(path), random_batches(BATCHES)
    for batch, expected in zip(batches, logits_by_block(open_model(path), batches), strict=True):
        assert_close(model(batch), expected, f"{kind}, batch {tuple(batch.shape)}")
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_an_architecture(make_model: MakeModel, name: str) -> None:
    kind, fields = VARIANTS[name]
    path = make_model(kind, dtype="float32", tied=False, **fields)
    batches = random_batches([(2, 32)])
    assert_close(load(path)(batches[0]), logits_by_block(open_model(path), batches)[0], name)


@every_architecture
def test_documents_of_one_row_do_not_see_each_other(make_model: MakeModel, kind: str) -> None:
    """The whole model and the blocks: a packed row gives what each document gives alone."""
    path = make_model(kind)
    model, (tokens, positions) = load(path), packed_row()
    packed = model(tokens, positions)
    for part, alone in zip(packed.split(DOCUMENTS, 1), tokens.split(DOCUMENTS, 1), strict=True):
        assert_close(part, model(alone), f"{kind}, {alone.shape[1]} tokens")
    assert (packed - model(tokens))[0, DOCUMENTS[0] :].abs().max() > 1e-2, "it matters"
    by_block = logits_with(
        open_model(path), torch.cat([tokens, tokens]), torch.cat([positions, torch.arange(len(tokens[0]))[None]])
    )
    assert_close(by_block[:1], packed, f"{kind} by block")
    assert_close(by_block[1:], model(tokens), f"{kind} by block, one document")


def logits_with(model: BlockModel, tokens: Tensor, positions: Tensor) -> Tensor:
    """Logits [B, T, V] by block, of a batch with positions; another batch of that shape goes before it."""
    stream = model.start([tokens, tokens], [positions.flip(0), positions])
    for index in range(len(model.blocks)):
        with model.block(index) as block:
            stream.hidden = [model.run(block, index, stream, batch) for batch in range(2)]
    with model.head() as head:
        return head(stream.hidden[1])


@every_architecture
@either_tied
def test_parameters_have_their_names_and_ties(make_model: MakeModel, kind: str, tied: bool) -> None:
    path = make_model(kind, dtype="float32", tied=tied)
    model, stored = load(path), Weights(Checkpoint(path))
    assert set(model.names) == set(dict(model.model.named_parameters()))
    for name, parameter in model.model.named_parameters():
        in_file = model.checkpoint_name(name)
        assert torch.equal(parameter, stored.read([in_file])[in_file]), name
    architecture = model.architecture
    head, embedding = (model.model.get_submodule(n).weight for n in (architecture.head, architecture.embedding))
    assert (head is embedding) == tied
    with pytest.raises(KeyError):
        model.checkpoint_name("model.new.weight")


def test_other_names_in_files(broken: Callable[..., Path]) -> None:  # noqa: F811
    for kind, change, tied, block in RENAMED[:1] + RENAMED[3:4]:
        path = broken(change, kind=kind, tied=tied)
        model, batches = load(path), random_batches([(1, 9)])
        assert_close(model(batches[0]), logits_by_block(open_model(path), batches)[0], kind)
        assert model.block_name(1) == block
        assert set(model.names.values()) <= set(Checkpoint(path).tensors)
        shutil.rmtree(path)


@every_architecture
def test_gradients_are_those_of_transformers(make_model: MakeModel, kind: str) -> None:
    path = make_model(kind, dtype="float32", attention_dropout=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    model, tokens = load(path).requires_grad_(True), random_batches([(2, 32)])[0]
    tokens[tokens == 1] = 5  # transformers gives the token of padding no gradient
    other = whole_model(path)
    other.set_attn_implementation(ARCHITECTURES[kind].attention)
    other(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    model.train()
    logits = model(tokens)[:, :-1].flatten(0, 1)
    nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()).backward()
    expected = dict(other.named_parameters())
    for name, parameter in model.model.named_parameters():
        assert parameter.grad is not None, name
        gap = (parameter.grad - expected[name].grad).abs().max()
        assert gap <= 1e-5 * max(1e-2, float(expected[name].grad.abs().max())), f"{name}: {gap:.3e}"


def saved_bytes(model: WholeModel, tokens: Tensor) -> tuple[int, dict[str, Tensor]]:
    """What a pass keeps for the gradient, and the gradients."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.hidden(tokens)
    before = sum(kept.values())
    model.logits(hidden).square().sum().backward()
    return before, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@every_architecture
def test_recomputing_keeps_less_and_changes_nothing(make_model: MakeModel, kind: str) -> None:
    path = make_model(kind)
    plain, again = load(path).requires_grad_(True), load(path).requires_grad_(True)
    weights = sum(p.nbytes for p in plain.parameters())
    again.recompute()
    tokens = random_batches([(4, 32)])[0]
    (full, expected), (less, found) = saved_bytes(plain, tokens), saved_bytes(again, tokens)
    assert less < (full - weights) / 3, f"{less} bytes kept, without it {full}, of which {weights} are weights"
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_recomputing_under_autocast_changes_nothing(make_model: MakeModel) -> None:
    gradients = []
    for recompute in (False, True):
        model = load(make_model()).requires_grad_(True)
        if recompute:
            model.recompute()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(random_batches([(2, 16)])[0]).float().square().mean()
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_nothing_is_dropped_out_in_training(make_model: MakeModel) -> None:
    for kind, fields in (
        ("gpt2", {"resid_pdrop": 0.5, "embd_pdrop": 0.5}),
        ("opt", {"dropout": 0.5, "layerdrop": 0.9}),
    ):
        model, tokens = load(make_model(kind, **fields)), random_batches([(1, 9)])[0]
        expected = model(tokens)
        holder = nn.ModuleList([model]).train()
        assert holder.training
        assert torch.equal(model(tokens), expected)


def test_the_token_of_padding_is_trained_like_any_other(make_model: MakeModel) -> None:
    model = load(make_model(tied=False)).requires_grad_(True)
    model.hidden(torch.tensor([[3, 1, 4]])).square().sum().backward()
    gradient = model.model.get_submodule("model.embed_tokens").weight.grad
    assert gradient is not None
    assert (gradient.abs().sum(1) > 0).nonzero()[:, 0].tolist() == [1, 3, 4]


@every_architecture
def test_states_inside_are_those_of_transformers(make_model: MakeModel, kind: str) -> None:
    path = make_model(kind, dtype="float32")
    model, tokens = load(path), random_batches([(2, 9)])[0]
    model.recompute()
    with model.watch(hidden=[0, 1], attention=[1]) as states:
        hidden = model.hidden(tokens)
    model.hidden(tokens)  # no longer watched
    other = whole_model(path)
    other.set_attn_implementation(ARCHITECTURES[kind].attention)
    attention: list[Tensor] = []
    parent = ARCHITECTURES[kind].attention_output.rpartition(".")[0]
    block = other.get_submodule(f"{ARCHITECTURES[kind].blocks}.1.{parent}")
    block.register_forward_hook(lambda _, __, output: attention.append(output[0]))
    with torch.no_grad():
        expected = other(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states[1]
    assert len(states.hidden) == 2
    assert len(states.attention) == 1
    assert torch.equal(states.hidden[1], hidden)
    assert_close(states.hidden[0], expected, "first block")
    assert_close(states.attention[0] + 1, attention[0] + 1, "attention")


class Served(Weights):
    """A checkpoint that rounds the inputs of its linears, keys and values when it is served."""

    scheme = QuantScheme.parse("w8a8-int8").activations

    def roundings(self, unit: str) -> Mapping[str, tuple[ActivationScheme, Tensor | None]]:
        assert self.scheme
        names = [name.removesuffix(".weight") for name in self.shapes if self.is_linear(name)]
        inside = [name for name in names if f"{name}.".startswith(unit + ".")]
        return {name.removeprefix(unit).removeprefix("."): (self.scheme, None) for name in inside}

    def is_linear(self, name: str) -> bool:
        return ".layers." in name and "norm" not in name and name.endswith(".weight")

    def kv_scales(self, unit: str) -> tuple[ActivationScheme, Tensor, Tensor]:
        return KV_SCHEMES["fp8"], torch.tensor([0.01]), torch.tensor([0.003])


class ServedGPT2(Served):
    def is_linear(self, name: str) -> bool:
        return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


@every_architecture
def test_inputs_keys_and_values_are_rounded_as_served(make_model: MakeModel, kind: str) -> None:
    path = make_model(kind)
    source = (ServedGPT2 if kind == "gpt2" else Served)(Checkpoint(path))
    tokens, positions = packed_row()
    model = WholeModel(path, source, CPU)
    expected = logits_by_block(BlockModel(path, source, CPU), [tokens])[0]
    assert_close(model(tokens), expected, kind)
    assert (expected - load(path)(tokens)).abs().max() > 1e-3, "something was rounded"
    assert_close(model(tokens, positions), logits_with(BlockModel(path, source, CPU), tokens, positions), "documents")


def watch_inputs(model: WholeModel) -> list[weakref.ref[Tensor]]:
    """Will have the inputs of all linears of blocks, as these get them."""
    seen: list[weakref.ref[Tensor]] = []
    for name, module in model.model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(lambda _, args: seen.append(weakref.ref(args[0])))
    return seen


def test_rounding_is_trained_through_and_leaves_nothing_in_memory(make_model: MakeModel) -> None:
    """Recomputed or not; of the inputs that were rounded nothing is kept once the pass is over."""
    path, gradients = make_model(), []
    for recompute in (False, True):
        model = WholeModel(path, Served(Checkpoint(path)), CPU).requires_grad_(True)
        if recompute:
            model.recompute()
        seen = watch_inputs(model)
        model(random_batches([(2, 16)])[0]).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        assert len(seen) == 7 * 2 * (1 + recompute)
        assert all(ref() is None for ref in seen)
        with torch.no_grad():
            model(random_batches([(2, 16)])[0])
        assert all(ref() is None for ref in seen)
    for name, gradient in gradients[0].items():
        assert gradient is not None
        assert gradient.any(), name
        assert torch.equal(gradient, gradients[1][name]), name


class Doubled(nn.Module):
    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear, self.factor = linear, nn.Parameter(torch.tensor(2.0))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.linear(x) * self.factor


def test_a_replaced_linear_gets_its_inputs_rounded(make_model: MakeModel) -> None:
    path = make_model()
    source, tokens = Served(Checkpoint(path)), random_batches([(2, 16)])[0]
    model, name = WholeModel(path, source, CPU), "model.layers.1.mlp.down_proj"
    before = model(tokens)
    fresh = nn.Linear(128, 64, bias=False)
    doubled = Doubled(fresh)
    was = model.replace(name, doubled)
    fresh.weight = linear_of(model.blocks[0], "mlp.down_proj").weight  # any other, and then its own
    assert not torch.equal(model(tokens), before)
    fresh.weight = nn.Parameter(was.weight / 2)  # type: ignore[operator]
    assert_close(model(tokens), before, "half of it, doubled")
    came: list[Tensor] = []
    doubled.register_forward_pre_hook(lambda _, args: came.append(args[0]), prepend=True)
    model(tokens)
    assert source.scheme
    assert torch.equal(doubled.seen[-1], fake_quantize(came[-1], source.scheme))
    assert not torch.equal(doubled.seen[-1], came[-1])
    model(tokens).square().sum().backward()
    assert doubled.factor.grad is not None
    assert doubled.factor.grad != 0
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"model.{name}.{end}" for end in ("factor", "linear.weight")
    }


def test_what_is_missing_or_too_long_is_named(make_model: MakeModel, broken: Callable[..., Path]) -> None:  # noqa: F811
    path = broken(lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(type(failure(path)), match=r"no tensor `model\.layers\.1\.mlp\.up_proj\.weight`"):
        load(path)
    with pytest.raises(UsageError, match="rows of 129 tokens are too long for a model with 128 positions"):
        load(make_model("gpt2")).hidden(random_batches([(1, 129)])[0])


def test_memory_holds_the_weights_once(make_model: MakeModel) -> None:
    """Reading goes block by block: of what was asked for at once, nothing is more than a block or all else."""
    asked: list[int] = []

    class Counting(Weights):
        def read(self, names: Iterable[str]) -> dict[str, Tensor]:
            names = list(names)
            asked.append(len(names))
            return super().read(names)

    path = make_model(tied=False, num_hidden_layers=4)
    model = WholeModel(path, Counting(Checkpoint(path)), CPU)
    assert sorted(asked) == [3, 9, 9, 9, 9]
    assert sum(asked) == len(list(model.parameters()))
