"""Students cut out of a teacher: what they compute is what the teacher computes without the parts that went."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import OWN, MakeModel
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qtool.calibration.tokens import make_rows
from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.writer import MANIFEST
from qtool.cli import run
from qtool.distill.cut import Cut, evenly_spaced, plan_cut
from qtool.distill.recipe import StudentSpec
from qtool.distill.students import Choice, choose, largest, measure, write_student
from qtool.errors import QtoolError, UsageError
from qtool.formats.weights import Weights
from qtool.gguf.checkpoint import open_checkpoint
from qtool.models.architectures import ARCHITECTURES, architecture_of
from qtool.models.blockwise import BlockModel
from qtool.models.widths import WIDTHS

TOKENS = torch.arange(32).reshape(2, 16) * 7 % 300
LLAMAS = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"]  # they say how wide a head is
LAYER_NORMS = ["gpt_neox", "gpt2", "opt"]


def quiet(*_: Any) -> None:
    pass


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    attention = "eager" if "gemma2" in json.loads((folder / "config.json").read_text())["model_type"] else "sdpa"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def cut_of(folder: Path, **spec: Any) -> tuple[Weights, Cut]:
    weights = Weights(Checkpoint(folder))
    return weights, plan_cut(StudentSpec(**spec), weights, architecture_of(weights.checkpoint.config, folder))


def student(folder: Path, out: Path, **spec: Any) -> Choice:
    """The student in `out`, and what was chosen."""
    weights, cut = cut_of(folder, **spec)
    importance = None
    if cut.needs_rows:
        model = BlockModel(folder, weights, torch.device("cpu"))
        importance = measure(model, make_rows(TOKENS.tolist(), "test"), cut.before.heads, 64, quiet)
    choice = choose(cut, importance)
    write_student(out, cut, choice, weights, {"of": "test"}, quiet)
    return choice


def linear(model: Any, block: int, place: int) -> Any:
    """Of inputs 1 and 3 of a block, the linear that reads it."""
    architecture = architecture_of(model.config.to_dict(), Path())
    name = architecture.inputs[place].linears[0]
    return model.get_submodule(f"{architecture.blocks}.{block}.{name}"), architecture.transposed


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("spec", [{"layers": 2}, {"drop_layers": (0, 2)}])
def test_fewer_layers_are_the_teacher_without_those_blocks(
    kind: str, spec: dict[str, Any], make_model: MakeModel, tmp_path: Path
) -> None:
    """Where layers differ in kind, such as in their windows, each keeps its own."""
    kinds = {"layer_types": None} if kind == "gemma3_text" else {}
    own = {"max_window_layers": 2} if kind == "qwen2" else {}
    folder = make_model(kind, "float32", num_hidden_layers=4, **kinds, **own)
    choice = student(folder, tmp_path / "student", **spec)
    assert choice.blocks == ([0, 3] if "layers" in spec else [1, 3])
    teacher = load(folder)
    path, _, name = architecture_of(teacher.config.to_dict(), Path()).blocks.rpartition(".")
    blocks = teacher.get_submodule(path)
    setattr(blocks, name, torch.nn.ModuleList([getattr(blocks, name)[i] for i in choice.blocks]))
    if getattr(teacher.config, "layer_types", None):  # which the model itself looks up by number
        teacher.config.layer_types = [teacher.config.layer_types[i] for i in choice.blocks]
        blocks.config.layer_types = teacher.config.layer_types
    teacher.config.num_hidden_layers = 2
    torch.testing.assert_close(logits(load(tmp_path / "student")), logits(teacher), rtol=0, atol=0)


@pytest.mark.parametrize("kind", OWN)
def test_a_narrower_mlp_is_the_teacher_with_the_rest_of_it_at_zero(
    kind: str, make_model: MakeModel, tmp_path: Path
) -> None:
    folder = make_model(kind, "float32")
    choice = student(folder, tmp_path / "student", mlp=48)
    teacher = load(folder)
    for block, kept in enumerate(choice.mlp):
        assert len(kept) == 48
        down, transposed = linear(teacher, block, 3)
        weight_OM = down.weight.data.T if transposed else down.weight.data
        weight_OM[:, [m for m in range(128) if m not in kept]] = 0
    torch.testing.assert_close(logits(load(tmp_path / "student")), logits(teacher))


@pytest.mark.parametrize("kind", LLAMAS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, None), (2, 2), (3, 3), (1, None)])
def test_fewer_heads_are_the_teacher_with_the_others_at_zero(
    kind: str, heads: int, kv_heads: int | None, make_model: MakeModel, tmp_path: Path
) -> None:
    """Whole groups, or some of each group; four heads on two, and each on its own."""
    groups = 4 if heads in (1, 3) else 2
    folder = make_model(kind, "float32", num_key_value_heads=groups)
    if heads == 3 and kind in ("llama", "gemma2", "gemma3_text"):
        with pytest.raises(UsageError, match="64 hidden channels are not a multiple of 3 heads"):
            cut_of(folder, heads=heads)
        return
    choice = student(folder, tmp_path / "student", heads=heads, kv_heads=kv_heads)
    zero_other_heads(folder, tmp_path / "student", choice, heads)
    shared = {h // (4 // groups) for h in choice.heads[0]}
    assert sorted(shared) == choice.kv_heads[0]


def test_a_key_and_value_that_all_heads_share_stays(make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model("mistral", "float32", num_key_value_heads=1)
    for heads in (2, 3):
        choice = student(folder, tmp_path / f"{heads}", heads=heads)
        assert choice.kv_heads == [[0], [0]]
        zero_other_heads(folder, tmp_path / f"{heads}", choice, heads)


@pytest.mark.parametrize("kind", LAYER_NORMS)
def test_fewer_heads_and_channels_where_they_depend_on_each_other(
    kind: str, make_model: MakeModel, tmp_path: Path
) -> None:
    folder = make_model(kind, "float32")
    with pytest.raises(UsageError, match="64 hidden channels do not make 2 heads of 16"):
        cut_of(folder, heads=2)
    with pytest.raises(UsageError, match="48 hidden channels do not make 4 heads"):
        cut_of(folder, hidden=48)
    choice = student(folder, tmp_path / "student", heads=3, hidden=48)
    assert [len(x) for x in choice.heads] == [3, 3]
    assert load(tmp_path / "student").config.hidden_size == 48
    assert torch.isfinite(logits(load(tmp_path / "student"))).all()
    with pytest.raises(UsageError, match="own keys and values"):
        cut_of(folder, heads=2, kv_heads=1, hidden=32)


@pytest.mark.parametrize("kind", LAYER_NORMS)
def test_rows_of_fused_heads_are_the_right_ones(kind: str, make_model: MakeModel, tmp_path: Path) -> None:
    """With all channels kept by hand, only heads go: the size of a model that its own config could not describe."""
    folder = make_model(kind, "float32")
    weights, cut = cut_of(folder, heads=3, hidden=48)
    choice = Choice([0, 1], list(range(48)), [[0, 2, 3], [1, 2, 3]], [[0, 2, 3], [1, 2, 3]], [list(range(128))] * 2)
    write_student(tmp_path / "student", cut, choice, weights, {}, quiet)
    mine, theirs = load(tmp_path / "student"), load(folder)
    architecture = architecture_of(theirs.config.to_dict(), Path())
    for block, heads in enumerate(choice.heads):
        base = f"{architecture.blocks}.{block}."
        for name in architecture.inputs[0].linears:
            a, b = mine.get_submodule(base + name).bias, theirs.get_submodule(base + name).bias
            if kind == "gpt_neox":
                expected = b.reshape(4, 3, 16)[heads].flatten()
            else:
                expected = b.reshape(-1, 4, 16)[:, heads].flatten()
            assert torch.equal(a, expected), name


def zero_other_heads(folder: Path, out: Path, choice: Choice, heads: int) -> None:
    teacher = load(folder)
    for block, kept in enumerate(choice.heads):
        assert len(kept) == heads
        output, transposed = linear(teacher, block, 1)
        weight_OI = output.weight.data.T if transposed else output.weight.data
        weight_OHD = weight_OI.reshape(len(weight_OI), 4, -1)
        weight_OHD[:, [h for h in range(4) if h not in kept]] = 0
        weight_OI.copy_(weight_OHD.flatten(1))
    torch.testing.assert_close(logits(load(out)), logits(teacher))


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "phi3"])
@pytest.mark.parametrize("tied", [True, False])
def test_fewer_channels_are_the_teacher_with_the_others_at_zero(
    kind: str, tied: bool, make_model: MakeModel, tmp_path: Path
) -> None:
    """An RMS norm over E of which only E' are not zero is that over E', times sqrt(E' / E)."""
    folder = make_model(kind, "float32", tied)
    choice = student(folder, tmp_path / "student", hidden=40)
    teacher, gone = load(folder), [e for e in range(64) if e not in choice.hidden]
    for name, parameter in teacher.named_parameters():
        if name.endswith(("layernorm.weight", "model.norm.weight")):
            parameter.data *= math.sqrt(40 / 64)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data[gone] = 0
        elif "embed" in name:
            parameter.data[:, gone] = 0
    torch.testing.assert_close(logits(load(tmp_path / "student")), logits(teacher), rtol=1e-3, atol=1e-3)


def test_gemma_gets_narrower_too(make_model: MakeModel, tmp_path: Path) -> None:
    choice = student(make_model("gemma2"), tmp_path / "student", hidden=40, heads=2, mlp=32, layers=1)
    assert choice.blocks == [0]
    assert torch.isfinite(logits(load(tmp_path / "student"))).all()
    assert load(tmp_path / "student").config.layer_types == ["sliding_attention"]


def test_importance_is_what_the_whole_model_says(make_model: MakeModel) -> None:
    folder = make_model("llama", "float32", num_hidden_layers=3)
    weights, _cut = cut_of(folder, mlp=100)
    rows = make_rows(TOKENS.tolist(), "test")
    importance = measure(BlockModel(folder, weights, torch.device("cpu")), rows, 4, 16, quiet)
    model = load(folder)
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0].double()}))
    states: list[Tensor] = []
    for block in model.model.layers:
        block.register_forward_hook(lambda m, args, out: states.extend([args[0].double(), out.double()]))
    logits(model)
    hidden_E = torch.zeros(64, dtype=torch.float64)
    for i in range(3):
        before, after = states[2 * i], states[2 * i + 1]
        cosine = (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)
        torch.testing.assert_close(importance.blocks_L[i], 1 - cosine.mean(), rtol=1e-5, atol=1e-6)
        for name in ("self_attn.q_proj", "mlp.up_proj"):
            hidden_E += seen[f"model.layers.{i}.{name}"].abs().mean((0, 1))
        heads = seen[f"model.layers.{i}.self_attn.o_proj"].reshape(2, 16, 4, 16)
        torch.testing.assert_close(
            importance.heads_LH[i], heads.square().sum(-1).mean((0, 1)).sqrt(), rtol=1e-5, atol=0
        )
        down = seen[f"model.layers.{i}.mlp.down_proj"].abs().mean((0, 1))
        torch.testing.assert_close(importance.mlp_LM[i], down, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(importance.hidden_E, hidden_E, rtol=1e-5, atol=1e-9)


def test_the_layer_that_does_nothing_goes_first(make_model: MakeModel, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "teacher"
    shutil.copytree(make_model("llama", "float32", num_hidden_layers=4), folder)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.startswith("model.layers.3.") and name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] *= 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert student(folder, tmp_path / "a", layers=3, importance="cosine").blocks == [0, 1, 2]
    assert student(folder, tmp_path / "b", layers=3).blocks == [0, 2, 3]


@given(st.integers(1, 200), st.integers(1, 200))
def test_evenly_spaced_layers(a: int, b: int) -> None:
    wanted, count = sorted((a, b))
    chosen = evenly_spaced(wanted, count)
    assert len(set(chosen)) == wanted
    assert list(chosen) == sorted(chosen)
    assert chosen[0] == 0
    if wanted > 1:
        assert chosen[-1] == count - 1
        gaps = [y - x for x, y in itertools.pairwise(chosen)]
        assert max(gaps) - min(gaps) <= 1


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.data())
def test_largest_are_the_largest(scores: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(scores)))
    found = largest(torch.tensor(scores, dtype=torch.float64), count)
    expected = sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])
    assert found == expected


def test_the_files_are_a_whole_checkpoint(make_model: MakeModel, tmp_path: Path) -> None:
    """Types, config and tokenizer of the teacher; what is not narrower has its very bytes."""
    folder = make_model("llama", "bfloat16", False)
    student(folder, tmp_path / "student", mlp=64)
    mine, theirs = Checkpoint(tmp_path / "student"), Checkpoint(folder)
    assert {info.dtype for info in mine.tensors.values()} == {"BF16"}
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.1.self_attn.q_proj.weight"):
        assert torch.equal(mine.read(name), theirs.read(name))
    assert mine.config == {**theirs.config, "intermediate_size": 64}
    assert (tmp_path / "student" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "student" / MANIFEST).read_text())["choice"]["blocks"] == [0, 1]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"layers": 3}, r"--layers 3: the teacher has 2"),
        ({"drop_layers": (2,)}, r"--drop-layers 2: the teacher's layers are 0 to 1"),
        ({"drop_layers": (0, 1)}, r"--drop-layers names all 2 layers"),
        ({"hidden": 65}, r"--hidden 65: the teacher has 64"),
        ({"mlp": 129}, r"--mlp 129: the teacher has 128"),
        ({"heads": 3}, r"--heads 3: the teacher's heads share keys and values in groups of 2"),
        ({"heads": 4, "kv_heads": 1}, r"4 heads cannot share the keys and values of 1"),
        ({"heads": 3, "kv_heads": 2}, r"3 heads cannot share the keys and values of 2"),
    ],
)
def test_what_a_teacher_cannot_spare(spec: dict[str, Any], message: str, make_model: MakeModel) -> None:
    with pytest.raises(UsageError, match=message):
        cut_of(make_model("llama"), **spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"layers": 0}, "at least 1"),
        ({"importance": "evne"}, "unknown importance `evne`"),
        ({"layers": 1, "drop_layers": (1,)}, "both say which layers"),
        ({"path": "x", "mlp": 4}, "a model as it is"),
    ],
)
def test_impossible_specs(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        StudentSpec(**spec)


def test_opt_with_a_projection_keeps_its_hidden_size(make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model("opt", "float32", word_embed_proj_dim=32)
    with pytest.raises(UsageError, match="project_"):
        cut_of(folder, hidden=48, heads=3)
    student(folder, tmp_path / "student", mlp=32)
    assert torch.isfinite(logits(load(tmp_path / "student"))).all()


@pytest.mark.parametrize("scheme", ["int4-g32-sym", "fp8-dynamic", "nf4", "q8_0"])
def test_of_a_packed_teacher_the_student_has_what_its_weights_are_worth(
    scheme: str, make_model: MakeModel, tmp_path: Path
) -> None:
    """Dense, under dense names, and loaded as any other; some formats keep codes under the name of the weight."""
    shutil.copytree(make_model("llama", "float32"), tmp_path / "m")
    assert run(["quantize", str(tmp_path / "m"), "-o", str(tmp_path / "q"), "--scheme", scheme, "--method", "rtn"]) == 0
    packed = tmp_path / "q" / "model.gguf" if scheme == "q8_0" else tmp_path / "q"
    weights = Weights(open_checkpoint(packed))
    cut = plan_cut(StudentSpec(drop_layers=(0,)), weights, architecture_of(weights.checkpoint.config, packed))
    write_student(tmp_path / "student", cut, choose(cut, None), weights, {}, quiet)
    written = Checkpoint(tmp_path / "student")
    assert "quantization_config" not in written.config
    for name in written.tensors:
        dense = written.read(name)
        worth = weights.read([name.replace("layers.0", "layers.1")])[name.replace("layers.0", "layers.1")]
        assert torch.equal(dense, worth.to(dense.dtype)), name
    assert torch.isfinite(logits(load(tmp_path / "student"))).all()


def test_blocks_that_differ_are_refused(make_model: MakeModel, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(make_model("llama"), tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match="block 1 has other tensors than block 0"):
        cut_of(tmp_path / "model", layers=1)
    tensors["model.layers.999999999999.mlp.down_proj.weight"] = torch.zeros(1)
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(QtoolError, match="has 2 blocks, but the checkpoint 3, up to 999999999999"):
        cut_of(tmp_path / "model", layers=1)


def test_every_architecture_can_be_cut() -> None:
    assert WIDTHS.keys() == ARCHITECTURES.keys()
