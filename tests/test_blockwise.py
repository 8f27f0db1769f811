"""Models run block by block compute what transformers computes for the whole model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtool.checkpoint.reader import Checkpoint
from qtool.errors import QtoolError, UsageError
from qtool.formats.weights import Weights
from qtool.models.architectures import ARCHITECTURES, architecture_of
from qtool.models.blockwise import BlockModel, linear_of, pick_device

MakeModel = Callable[..., Path]
CPU = torch.device("cpu")


def open_model(path: Path) -> BlockModel:
    weights = Weights(Checkpoint(path))
    return BlockModel(path, weights, CPU)


def whole_model(path: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def random_batches(shapes: list[tuple[int, int]], vocabulary: int = 320) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocabulary, shape, generator=generator) for shape in shapes]


def logits_by_block(model: BlockModel, batches: list[Tensor]) -> list[Tensor]:
    """Logits [B, T, V] of each batch, the batches going through the blocks together."""
    stream = model.start(batches)
    for index in range(len(model.blocks)):
        with model.block(index) as block:
            stream.hidden = [model.run(block, index, stream, batch) for batch in range(len(batches))]
    with model.head() as head:
        return [head(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2]) for hidden in stream.hidden]


def assert_close(ours: Tensor, other: Tensor, told: str) -> None:
    gap = (ours - other).abs()
    size = other.abs().max()
    told = f"{told}: max difference {gap.max():.3e}, mean {gap.mean():.3e}, of values up to {size:.2f}"
    assert size > 0.5, f"{told}: logits so small say nothing"
    assert gap.max() <= 1e-6 * max(1.0, float(size)), told


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logits_are_those_of_the_whole_model(make_model: MakeModel, kind: str, tied: bool) -> None:
    path = make_model(kind, tied=tied, shards=tied)
    assert any(name in Checkpoint(path).tensors for name in ARCHITECTURES[kind].spellings("lm_head.weight")) != tied
    assert_as_a_whole(path, kind)


def assert_as_a_whole(path: Path, kind: str) -> None:
    """Logits by block are those of the model that transformers loads from the same folder."""
    batches = random_batches([(2, 32), (1, 32), (3, 9)])  # longer than the sliding windows, and a second length
    ours = logits_by_block(open_model(path), batches)
    whole = whole_model(path)
    whole.set_attn_implementation(ARCHITECTURES[kind].attention)
    with torch.no_grad():
        for batch, logits in zip(batches, ours, strict=True):
            assert_close(logits, whole(input_ids=batch, use_cache=False).logits, f"{kind}, batch {tuple(batch.shape)}")


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_neox sequential": ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    "gpt2 scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "opt norm last, narrow embeddings": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "opt narrow embeddings": ("opt", {"word_embed_proj_dim": 32}),
    "opt without the last norm": ("opt", {"_remove_final_layer_norm": True}),
    "opt plain norms": ("opt", {"layer_norm_elementwise_affine": False, "enable_bias": False}),
    "opt gelu": ("opt", {"activation_function": "gelu"}),
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_an_architecture(make_model: MakeModel, name: str, tied: bool) -> None:
    kind, fields = VARIANTS[name]
    path = make_model(kind, dtype="float32", tied=tied, **fields)
    config = json.loads((path / "config.json").read_text())
    assert all(config[key] == value for key, value in fields.items())
    assert_as_a_whole(path, kind)
    model = open_model(path)
    model.start(random_batches([(1, 8)]))
    assert all(p.is_meta for p in model.model.parameters()), "what is before the blocks is dropped again"


def test_rows_longer_than_the_table_of_positions(make_model: MakeModel) -> None:
    for kind in ("gpt2", "opt"):
        model = open_model(make_model(kind))
        assert len(model.start(random_batches([(1, 128)])).hidden) == 1
        with pytest.raises(UsageError, match="rows of 129 tokens are too long for a model with 128 positions"):
            model.start(random_batches([(1, 20), (1, 129)]))
    assert len(open_model(make_model("gpt_neox")).start(random_batches([(1, 129)])).hidden) == 1


def without_prefix(tensors: dict[str, Tensor]) -> None:
    """GPT-2 as it was first published: the names of the model without a head, and the masks."""
    for name in list(tensors):
        tensors[name.removeprefix("transformer.")] = tensors.pop(name)
    for index in range(2):
        tensors[f"h.{index}.attn.bias"] = torch.ones(1, 1, 128, 128).tril()
        tensors[f"h.{index}.attn.masked_bias"] = torch.tensor(-1e4)


def with_buffers(tensors: dict[str, Tensor]) -> None:
    """GPT-NeoX as older versions of transformers wrote it."""
    assert "embed_out.weight" in tensors, "the name of the head that transformers 5.17 still writes"
    for index in range(2):
        attention = f"gpt_neox.layers.{index}.attention"
        tensors[f"{attention}.bias"] = torch.ones(1, 1, 128, 128, dtype=torch.bool).tril()
        tensors[f"{attention}.masked_bias"] = torch.tensor(-1e4)
        tensors[f"{attention}.rotary_emb.inv_freq"] = torch.zeros(2)


def head_as_module(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors.pop("embed_out.weight")


def without_model(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


RENAMED = [
    ("gpt2", without_prefix, True, "h.1"),
    ("gpt2", without_prefix, False, "h.1"),
    ("gpt_neox", with_buffers, False, "gpt_neox.layers.1"),
    ("gpt_neox", head_as_module, False, "gpt_neox.layers.1"),
    ("opt", without_model, True, "decoder.layers.1"),
    ("opt", without_model, False, "decoder.layers.1"),
]


@pytest.mark.parametrize(("kind", "change", "tied", "block"), RENAMED)
def test_other_names_in_files(
    broken: Callable[..., Path], kind: str, change: Callable[[dict[str, Tensor]], None], tied: bool, block: str
) -> None:
    path = broken(change, kind=kind, tied=tied)
    assert_as_a_whole(path, kind)
    model, tensors = open_model(path), Checkpoint(path).tensors
    assert model.block_name(1) == block
    assert {n for n in tensors if model.architecture.is_block_linear(n.removesuffix(".weight"))} == {
        f"{model.block_name(index)}.{linear}.weight" for index in range(2) for linear in model.architecture.linears()
    }


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_weights_of_linears_are_views(make_model: MakeModel, kind: str) -> None:
    """[out, in] however they are stored, and writing into one changes what the linear computes."""
    model = open_model(make_model(kind))
    with model.block(0) as block:
        for name in model.architecture.linears():
            linear = linear_of(block, name)
            weight_OI = linear.weight.data.T if model.architecture.transposed else linear.weight.data
            x_NI = torch.randn(5, linear.in_features, generator=torch.Generator().manual_seed(0))
            bias = 0.0 if linear.bias is None else linear.bias
            assert_close(x_NI @ weight_OI.T + bias, linear(x_NI), name)
            assert weight_OI.shape == (linear.out_features, linear.in_features)
            weight_OI[-1].zero_()
            changed_NO = linear(x_NI) - bias
            assert (changed_NO[:, -1] == 0).all()
            assert (changed_NO[:, :-1] != 0).all()
        with pytest.raises(AssertionError):
            linear_of(block, name.rpartition(".")[0])


def test_producers_depend_on_the_config() -> None:
    def producers(kind: str = "opt", **config: Any) -> list[str | None]:
        return [x.producer for x in architecture_of({"model_type": kind, **config}, Path("m")).inputs]

    value = "self_attn.v_proj"
    first = ["self_attn_layer_norm", value, "final_layer_norm", "fc1"]
    assert producers() == first
    assert producers(do_layer_norm_before=True, activation_function="relu") == first
    assert producers(activation_function="gelu") == [*first[:3], None]
    assert producers(do_layer_norm_before=False) == [None, value, None, "fc1"]
    assert producers(layer_norm_elementwise_affine=False) == [None, value, None, "fc1"]
    assert producers("gpt2", activation_function="relu") == ["ln_1", "attn.c_attn", "ln_2", None]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_attention_code_is_exact(make_model: MakeModel, kind: str) -> None:
    """Against plain matrix products, whatever the table chose: a faster code may leave something out."""
    path, batch = make_model(kind), random_batches([(2, 32)])[0]
    ours = logits_by_block(open_model(path), [batch])[0]
    whole = whole_model(path)
    whole.set_attn_implementation("eager")
    with torch.no_grad():
        gap = (ours - whole(input_ids=batch, use_cache=False).logits).abs()
    assert gap.max() < 1e-4, f"max difference {gap.max():.3e}, mean {gap.mean():.3e}"


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gemma3_text", "qwen2", "phi3"])
def test_the_sliding_window_is_felt(make_model: MakeModel, kind: str) -> None:
    """Otherwise the test above would not notice a wrong mask."""
    windowed, wide = whole_model(make_model(kind)), whole_model(make_model(kind))
    assert windowed.config.sliding_window == 8
    wide.config.sliding_window = 1000
    batch = random_batches([(1, 32)])[0]
    with torch.no_grad():
        gap = (windowed(input_ids=batch, use_cache=False).logits - wide(input_ids=batch, use_cache=False).logits).abs()
    assert gap[:, :8].max() == 0
    assert gap[:, 8:].max() > 1e-2, f"max difference {gap.max():.3e}"


def test_rows_do_not_depend_on_their_batch(make_model: MakeModel) -> None:
    model = open_model(make_model())
    tokens = random_batches([(6, 20)])[0]
    together = logits_by_block(model, [tokens])[0]
    alone = torch.cat(logits_by_block(model, [row[None] for row in tokens]))
    gap = (together - alone).abs()
    assert gap.max() < 1e-5, f"max difference {gap.max():.3e}, mean {gap.mean():.3e}"


def test_running_a_block_changes_nothing(make_model: MakeModel) -> None:
    model = open_model(make_model())
    stream = model.start(random_batches([(2, 16)]))
    before = stream.hidden[0].clone()
    with model.block(0) as block:
        first = model.run(block, 0, stream, 0)
        assert torch.equal(model.run(block, 0, stream, 0), first)
    assert torch.equal(stream.hidden[0], before)


def test_only_one_block_is_in_memory(make_model: MakeModel) -> None:
    model = open_model(make_model())

    def loaded() -> set[str]:
        return {
            n.rpartition(".layers.")[2][:1] if ".layers." in n else n
            for n, p in model.model.named_parameters()
            if not p.is_meta
        }

    assert loaded() == set()
    stream = model.start(random_batches([(1, 8)]))
    assert loaded() == set(), "the embedding is dropped again"
    for index in range(len(model.blocks)):
        with model.block(index) as block:
            assert loaded() == {str(index)}
            assert all(p.dtype == torch.float32 and not p.requires_grad for p in block.parameters())
            model.run(block, index, stream, 0)
        assert loaded() == set()
    with model.head():
        assert "model.norm.weight" in loaded()
        assert loaded() <= {"model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"}
    assert loaded() == set()


def test_weights_are_dropped_after_an_error_too(make_model: MakeModel) -> None:
    model = open_model(make_model())
    with pytest.raises(ZeroDivisionError), model.block(0):
        raise ZeroDivisionError
    assert all(p.is_meta for p in model.model.parameters())
    ours = logits_by_block(model, random_batches([(1, 8)]))
    assert torch.isfinite(ours[0]).all()


def test_a_changed_weight_is_used(make_model: MakeModel) -> None:
    """What solvers rely on: writing into a loaded block changes what it computes, and only while it is loaded."""
    model = open_model(make_model())
    stream = model.start(random_batches([(1, 8)]))
    with model.block(0) as block:
        before = model.run(block, 0, stream, 0)
        block.get_submodule("mlp.down_proj").weight.zero_()
        assert not torch.equal(model.run(block, 0, stream, 0), before)
    with model.block(0) as block:
        assert torch.equal(model.run(block, 0, stream, 0), before)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_architecture_names_what_is_there(make_model: MakeModel, kind: str) -> None:
    path = make_model(kind)
    architecture, model = ARCHITECTURES[kind], open_model(path)
    tensors = Checkpoint(path).tensors
    for index in range(len(model.blocks)):
        prefix = model.block_name(index) + "."
        matrices = {
            n.removeprefix(prefix).removesuffix(".weight")
            for n, t in tensors.items()
            if n.startswith(prefix) and len(t.shape) == 2
        }
        assert matrices == set(architecture.linears())
        needed = {f"{model.block_name(index)}.{name}" for name, _ in model.blocks[index].named_parameters()}
        assert needed == {n for n in tensors if n.startswith(prefix)}
    assert f"{architecture.embedding}.weight" in tensors
    assert f"{architecture.norm}.weight" in tensors
    assert model.context == 128


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_linears_of_a_group_read_the_same_input(make_model: MakeModel, kind: str) -> None:
    model = open_model(make_model(kind))
    stream = model.start(random_batches([(2, 12)]))
    seen: dict[str, Tensor] = {}
    with model.block(0) as block:
        for name in model.architecture.linears():
            block.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: seen.update({name: args[0].clone()})
            )
        model.run(block, 0, stream, 0)
    assert list(seen) == model.architecture.linears(), "they are listed in the order in which they run"
    for group in (x.linears for x in model.architecture.inputs):
        for name in group[1:]:
            assert torch.equal(seen[name], seen[group[0]]), f"{name} and {group[0]}"
    firsts = [seen[group[0]] for group in (x.linears for x in model.architecture.inputs)]
    assert not any(a.shape == b.shape and torch.equal(a, b) for i, a in enumerate(firsts) for b in firsts[:i])


# What may be wrong with a checkpoint


@pytest.fixture
def broken(make_model: MakeModel, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a model with its tensors changed."""

    def make(change: Callable[[dict[str, Tensor]], Any], kind: str = "llama", **arguments: Any) -> Path:
        path = Path(shutil.copytree(make_model(kind, **arguments), tmp_path / "broken"))
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors")
        return path

    return make


def failure(path: Path) -> QtoolError:
    with pytest.raises(QtoolError) as caught:
        logits_by_block(open_model(path), random_batches([(1, 8)]))
    return caught.value


NAMES = [
    "model.layers.1.mlp.up_proj.weight",
    "model.layers.0.input_layernorm.weight",
    "model.norm.weight",
    "model.embed_tokens.weight",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_tensor_is_named(broken: Callable[..., Path], name: str) -> None:
    message = failure(broken(lambda tensors: tensors.pop(name))).message
    assert message == f"the checkpoint has no tensor `{name}`, which config.json's model needs"


def test_a_missing_head_of_an_untied_model_is_named(broken: Callable[..., Path]) -> None:
    message = failure(broken(lambda tensors: tensors.pop("lm_head.weight"), tied=False)).message
    assert "no tensor `lm_head.weight`" in message


def test_a_missing_bias_is_named(broken: Callable[..., Path]) -> None:
    name = "model.layers.1.self_attn.q_proj.bias"
    assert f"no tensor `{name}`" in failure(broken(lambda tensors: tensors.pop(name), kind="qwen2")).message


def test_a_tied_model_that_stores_only_its_head(broken: Callable[..., Path], make_model: MakeModel) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    batches = random_batches([(1, 8)])
    ours = logits_by_block(open_model(broken(rename)), batches)[0]
    assert torch.equal(ours, logits_by_block(open_model(make_model()), batches)[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_shape_is_named_with_both_shapes(broken: Callable[..., Path], name: str) -> None:
    shapes: list[tuple[int, ...]] = []

    def cut(tensors: dict[str, Tensor]) -> None:
        shapes.append(tuple(tensors[name].shape))
        tensors[name] = tensors[name][1:].clone()
        shapes.append(tuple(tensors[name].shape))

    message = failure(broken(cut)).message
    assert message == f"`{name}` has shape {shapes[1]}, but config.json asks for {shapes[0]}"


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_that_is_not_finite_is_named(broken: Callable[..., Path], name: str) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[:2] = torch.tensor([float("nan"), float("inf")])

    assert f"`{name}` has 2 NaN or infinite values" in failure(broken(spoil)).message


def test_an_unknown_architecture_says_what_works(make_model: MakeModel, tmp_path: Path) -> None:
    path = Path(shutil.copytree(make_model(), tmp_path / "model"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "model_type": "rwkv"}))
    with pytest.raises(UsageError) as caught:
        open_model(path)
    assert f"{path} is of architecture `rwkv`, which qtool cannot run" in caught.value.message
    assert all(kind in caught.value.message for kind in ARCHITECTURES)
    assert "--method rtn" in (caught.value.hint or "")
    with pytest.raises(UsageError, match="is of architecture `None`"):
        architecture_of({}, path)


def test_no_config(make_model: MakeModel, tmp_path: Path) -> None:
    path = Path(shutil.copytree(make_model(), tmp_path / "model"))
    (path / "config.json").unlink()
    with pytest.raises(UsageError, match=r"has no config\.json"):
        open_model(path)


def test_a_config_that_transformers_does_not_take(make_model: MakeModel, tmp_path: Path) -> None:
    path = Path(shutil.copytree(make_model(), tmp_path / "model"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_attention_heads": 3}))
    with pytest.raises(QtoolError):
        logits_by_block(open_model(path), random_batches([(1, 8)]))


def test_devices() -> None:
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(UsageError, match=r"device `tpu` is not available; here there is: .*cpu"):
        pick_device("tpu")


def test_a_padding_token_beyond_the_rows_in_use_does_no_harm(make_model: MakeModel) -> None:
    model = open_model(make_model(pad_token_id=319))
    assert len(model.start([torch.tensor([[2, 3, 4]])]).hidden) == 1
