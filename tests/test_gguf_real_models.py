"""Checkpoints as people have them, and a config.json that does not belong to them, on their way into a GGUF file.

Names and shapes of tensors are those that transformers makes; files of real sizes hold headers and nothing else.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.checkpoint.writer import Safetensors
from qtool.errors import QtoolError, UsageError
from qtool.gguf.architectures import ARCHITECTURES, MOST_TOKENS
from qtool.gguf.checkpoint import GGUFCheckpoint
from qtool.gguf.model import GGUFModel
from qtool.headers import TensorInfo
from qtool.job import Job, prepare
from qtool.methods import METHODS
from qtool.pipeline import RunOptions, quantize
from qtool.recipe import build
from qtool.transforms import TRANSFORMS
from tests.conftest import OWN, SMALL, MakeModel

# Lengths that no two dimensions share.
UNEVEN: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 56, "num_attention_heads": 6, "num_key_value_heads": 2
}  # fmt: skip
WIDE_HEADS = {"llama": 12, "mistral": 12, "qwen3": 12, "gemma2": 10, "gemma3_text": 10}
GEMMA3 = {  # the text_config of what Google publishes; what is missing there is missing here
    "4b": {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34},
    "12b": {
        "hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48, "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
    "27b": {
        "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62, "num_attention_heads": 32,
        "num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 168,
    },
}  # fmt: skip
SIGHT = {
    "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "model_type": "siglip_vision_model",
    "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
ON_THE_HUB = {"model.language_model.": "language_model.model.", "model.vision_tower.": "vision_tower.",
              "model.multi_modal_projector.": "multi_modal_projector."}  # fmt: skip
ELSEWHERE, TIED = "llama.cpp keeps it in another file", "tied to the embedding"


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of transformers' model, which takes no memory."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForImageTextToText if "text_config" in config else AutoModelForCausalLM
    known = AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = kind.from_config(known)
    tied = set(model.all_tied_weights_keys) if known.tie_word_embeddings else set()
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def write_headers(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A model.safetensors of bfloat16 zeros that takes no room on the disk."""
    layout = Safetensors().lay_out([TensorInfo(name, "BF16", shape) for name, shape in shapes.items()])
    with (folder / "model.safetensors").open("wb") as file:
        file.write(layout.header)
        file.truncate(layout.size_bytes)


def change(folder: Path, **fields: Any) -> Path:
    """Other fields in its config.json; None takes one away."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def plan(folder: Path, **tree: Any) -> Job:
    return prepare(str(folder), build({"scheme": "q4_k_m", "method": "rtn", **tree}, [*METHODS, *TRANSFORMS]))


def left(job: Job) -> dict[str, str]:
    return {kept.source.name: kept.reason for kept in job.plan.kept}


@pytest.fixture
def model(make_model: MakeModel, tmp_path: Path) -> Path:
    """A small llama of its own."""
    return Path(shutil.copytree(make_model(), tmp_path / "a-llama"))


# --- config.json and tensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_shapes_are_those_of_transformers(kind: str, tied: bool) -> None:
    """And any other shape is found, and any tensor that is missing."""
    config = {"model_type": kind, **SMALL, **OWN[kind], **UNEVEN, "tie_word_embeddings": tied}
    if kind in WIDE_HEADS:
        config |= {"head_dim": WIDE_HEADS[kind], "query_pre_attn_scalar": WIDE_HEADS[kind]}
    if kind == "gpt_neox":
        del config["num_key_value_heads"]
    if tied != ARCHITECTURES[kind].fixed.get("tie_word_embeddings", (tied,))[0]:
        return
    biased = {"attention_bias": True, "mlp_bias": True} if kind == "llama" else {}
    shapes = shapes_of({**config, **biased})
    wanted = GGUFModel.of_config({**config, **biased})
    assert wanted.problem(shapes) is None
    for name, shape in shapes.items():
        for place in range(len(shape)):
            other = (*shape[:place], shape[place] + 1, *shape[place + 1 :])
            problem = wanted.problem({**shapes, name: other})
            assert problem is not None
            assert problem.startswith(f"`{name.replace('lm_head', wanted.table.head)}` has the shape {list(other)}")
            assert problem.endswith(f"= {list(shape)}")
        missing = {other: value for other, value in shapes.items() if other != name}
        assert "there is no tensor" in str(wanted.problem(missing))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"vocab_size": 321},
            r"`model.embed_tokens.weight` .* \[320, 64\], .* \[vocab_size, hidden_size\] = \[321",
        ),
        ({"vocab_size": 319}, r"`model.embed_tokens.weight` has the shape \[320, 64\], but config.json says"),
        ({"vocab_size": MOST_TOKENS}, r"`model.embed_tokens.weight` has the shape \[320, 64\]"),
        ({"vocab_size": 2_000_000_000}, r"`vocab_size` of config.json is 2000000000: not within 1\.\."),
        ({"num_hidden_layers": 3}, r"no tensor `model.layers.2.input_layernorm.weight`, .* llama with 3 blocks"),
        ({"num_hidden_layers": 1}, r"no place for `model.layers.1.* llama with 1 blocks"),
        ({"intermediate_size": 256}, r"`model.layers.0.mlp.gate_proj.weight` .*\[intermediate_size, hidden_size\]"),
        ({"num_key_value_heads": 4}, r"`model.layers.0.self_attn.k_proj.weight` .*\[num_key_value_heads \* head_dim,"),
        ({"head_dim": 32}, r"`model.layers.0.self_attn.q_proj.weight` .*\[num_attention_heads \* head_dim, hidden_"),
        ({"attention_bias": True}, r"no tensor `model.layers.0.self_attn.q_proj.bias`"),
        ({"tie_word_embeddings": False}, r"no tensor `lm_head.weight`"),
    ],
)
def test_a_config_of_another_model_is_found_at_once(
    model: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("qtool.gguf.tokenizer.tokenizer_metadata", pytest.fail)  # it would make a token for each row
    with pytest.raises(QtoolError, match=message):
        plan(change(model, **fields))


def test_two_spellings_of_a_tensor(make_model: MakeModel, tmp_path: Path) -> None:
    model = Path(shutil.copytree(make_model("gpt_neox", tied=False), tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    head = next(tensors[name] for name in ("embed_out.weight", "lm_head.weight") if name in tensors)
    save_file({**tensors, "embed_out.weight": head.clone(), "lm_head.weight": head}, model / "model.safetensors")
    with pytest.raises(UsageError, match=r"`(embed_out|lm_head)\.weight` is there twice"):
        plan(model)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"token_embd.weight": torch.zeros(319, 64)}, r"embed_tokens.weight. has the shape \[319, 64\], .* \[320"),
        ({"blk.1.attn_k.weight": torch.zeros(64, 64)}, r"layers.1.self_attn.k_proj.weight. .* GGUF file says"),
        ({"output_norm.weight": torch.zeros(32)}, r"model.norm.weight. has the shape \[32\], .*\[hidden_size\] = \[64"),
    ],
)
def test_a_file_whose_tensors_are_not_what_its_keys_say(
    model: Path, tmp_path: Path, changed: dict[str, torch.Tensor], message: str
) -> None:
    made = GGUFModel.of_config(json.loads((model / "config.json").read_text()))
    tensors = {str(made.gguf_name(name)): tensor for name, tensor in load_file(model / "model.safetensors").items()}
    for name, replaced in (("right", {}), ("wrong", changed)):
        writer = gguf.GGUFWriter(tmp_path / f"{name}.gguf", "llama")
        for key, value in made.metadata().items():
            if key != "general.architecture":
                kind = {int: "uint32", float: "float32", str: "string"}[type(value)]
                getattr(writer, f"add_{kind}")(key, value)
        for tensor, values in {**tensors, **replaced}.items():
            writer.add_tensor(tensor, values.float().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    assert GGUFCheckpoint(tmp_path / "right.gguf").model is not None
    with pytest.raises(QtoolError, match=message):
        GGUFCheckpoint(tmp_path / "wrong.gguf")


# --- what is in no GGUF file --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", GEMMA3)
def test_gemma_3_as_it_is_published(make_model: MakeModel, tmp_path: Path, size: str) -> None:
    """Its language model; the tower and the projector stay out, and are in the report."""
    config = {
        "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "vision_config": SIGHT,
        "text_config": {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                        "sliding_window": 1024, **GEMMA3[size]},
    }  # fmt: skip
    shapes = {}
    for name, shape in shapes_of(config).items():
        there, here = next(((a, b) for a, b in ON_THE_HUB.items() if name.startswith(a)), ("", ""))
        shapes[here + name.removeprefix(there)] = shape
    folder = tmp_path / f"gemma-3-{size}-it"
    shutil.copytree(make_model("gemma3_text"), folder)
    (folder / "config.json").write_text(json.dumps(config))
    write_headers(folder, shapes)
    job = plan(folder)
    seeing = {name for name in shapes if name.startswith(("vision_tower.", "multi_modal_projector."))}
    assert len(seeing) > 400
    assert {name for name, reason in left(job).items() if reason == ELSEWHERE} == seeing
    assert not seeing & job.plan.outputs.keys()
    assert {linear.source.name for linear in job.plan.linears} == {
        name for name, shape in shapes.items() if len(shape) == 2 and name not in seeing
    }
    assert job.container.model.values["vocab_size"] == 262208  # type: ignore[attr-defined]
    types = {linear.module.removeprefix("language_model.model."): linear.scheme.kind for linear in job.plan.linears}
    assert types["embed_tokens"] == "q6_k"
    assert types["layers.0.self_attn.q_proj"] == "q4_k"
    with pytest.raises(UsageError, match="architecture `gemma3`, which qtool cannot run"):
        plan(folder, method="gptq")


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_a_model_that_sees_is_written(make_model: MakeModel, tmp_path: Path, prefix: str) -> None:
    """Without its tower, from a config.json that has no vocab_size of its own; with a head that is tied."""
    model = Path(shutil.copytree(make_model("gemma3_text"), tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    nested = {name.replace("model.", prefix, 1): tensor for name, tensor in tensors.items()}
    others = {
        prefix.partition("language_model")[0] + "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": ELSEWHERE,
        prefix.partition("language_model")[0] + "multi_modal_projector.mm_soft_emb_norm.weight": ELSEWHERE,
        "lm_head.weight": TIED,
    }
    nested |= {name: torch.ones(64, 64, dtype=torch.bfloat16) for name in others}
    save_file(nested, model / "model.safetensors", {"format": "pt"})
    text = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text, "vision_config": {}}))
    report, _ = quantize(plan(model), tmp_path / "out", RunOptions(device="cpu"), lambda *_: None)
    assert {kept.name: kept.reason for kept in report.kept}.items() >= others.items()
    assert GGUFCheckpoint(tmp_path / "out").tensors.keys() == tensors.keys()


def test_a_tied_head_and_buffers_are_kept_out_by_the_plan(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file({**tensors, **head, **buffer}, model / "model.safetensors", {"format": "pt"})
    for scheme in ("q4_k_m", "q8_0"):
        job = plan(model, scheme=scheme)
        assert left(job)["lm_head.weight"] == TIED
        assert left(job)[next(iter(buffer))] == "not in a GGUF file"
        assert not (head | buffer).keys() & job.plan.outputs.keys()
    untied = plan(change(model, tie_word_embeddings=False))
    assert "lm_head.weight" in untied.plan.outputs


# --- its name -----------------------------------------------------------------------------------------------------


def test_a_file_has_the_name_of_its_source(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    def name(folder: str, **fields: Any) -> str:
        if not Path(folder).exists():
            shutil.copytree(make_model(), folder)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            tokenizer.add_special_tokens({"additional_special_tokens": ["<unk>", "<|endoftext|>"]})
            tokenizer.save_pretrained(folder)
        return str(plan(change(Path(folder), **fields)).container.metadata["general.name"])  # type: ignore[attr-defined]

    monkeypatch.chdir(tmp_path)
    assert name("TinyLlama-1.1B") == "TinyLlama-1.1B"
    snapshot = "hub/models--microsoft--Phi-3-mini-4k-instruct/snapshots/0a67737"
    assert name(snapshot) == "Phi-3-mini-4k-instruct"
    assert name("mine", _name_or_path="someone/Llama-3-8B") == "mine"
    assert name("mine", _name_or_path="microsoft/Phi-3-mini-4k-instruct") == "Phi-3-mini-4k-instruct"
    monkeypatch.chdir(tmp_path / "mine")
    assert name(".", _name_or_path=7) == "mine"
    quantize(plan(Path(".")), tmp_path / "out", RunOptions(device="cpu"), lambda *_: None)
    again = plan(tmp_path / "out", format="gguf", scheme="auto", method="auto")
    assert again.container.metadata["general.name"] == "mine"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("called", "name"), [("Phi-3-mini", "Phi 3-mini"), ("my_phi3", "my_phi 3"), ("phi-4", "phi-4")]
)
def test_a_name_that_llama_cpp_would_not_load(make_model: MakeModel, tmp_path: Path, called: str, name: str) -> None:
    """It takes a file with Phi-3's name for one with Phi-3's tokens."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model = Path(shutil.copytree(make_model(), tmp_path / called))
    quantize(plan(model), tmp_path / "out", RunOptions(device="cpu"), lambda *_: None)
    file = GGUFCheckpoint(tmp_path / "out")
    assert file.metadata["general.name"] == name
    assert llama_cpp.Llama(str(file.home), vocab_only=True, verbose=False).n_vocab() == 320


# --- the tokenizer ------------------------------------------------------------------------------------------------


def test_planning_is_quick(model: Path) -> None:
    """It imports neither torch nor transformers."""
    text = (
        "import sys; from qtool.job import prepare; from qtool.recipe import build\n"
        "tree = {'scheme': 'q4_k_m', 'method': 'rtn'}\n"
        f"prepare({str(model)!r}, build(tree, []))\n"
        "print(*{'torch', 'transformers', 'tokenizers'} & sys.modules.keys())"
    )
    assert subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True).stdout == "\n"


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (None, "has no tokenizer"),
        ("{", "tokenizer.json is no tokenizer: JSONDecodeError"),
        ("[]", "tokenizer.json is no tokenizer: TypeError"),
        ("{}", "tokenizer.json is no tokenizer: KeyError"),
        ('{"model": 3}', "tokenizer.json is no tokenizer: AttributeError"),
        ("[" * 100_000, "tokenizer.json is no tokenizer: RecursionError"),
        ('{"model": {"type": "Unigram"}}', "is Unigram: only BPE has a form in GGUF"),
        ('{"model": {"type": ["BPE"]}}', "only BPE"),
    ],
)
def test_a_tokenizer_that_cannot_be_is_found_by_the_plan(model: Path, tokenizer: str | None, message: str) -> None:
    if tokenizer is None:
        (model / "tokenizer.json").unlink()
    else:
        (model / "tokenizer.json").write_text(tokenizer)
    with pytest.raises(QtoolError, match=message):
        plan(model)


def test_all_others_before_anything_is_solved(model: Path, tmp_path: Path) -> None:
    """The tokens of a tokenizer are looked at when the file is laid out."""
    spec = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps({**spec, "normalizer": {"type": "Lowercase"}}))
    job, steps = plan(model), []
    with pytest.raises(UsageError, match="has the normalizer Lowercase"):
        quantize(job, tmp_path / "out", RunOptions(device="cpu"), lambda stage, *_: steps.append(stage))
    assert set(steps) == {"identify"}
    assert not list(tmp_path.glob("out*"))
