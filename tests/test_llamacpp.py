"""GGUF files that the whole pipeline makes, in the program that they are for: llama.cpp, through llama-cpp-python.

It computes the same logits from them. With weights in blocks llama.cpp also rounds the inputs of every matrix to 8 bits
(on a CPU; to the type of the weights where that is a float type), so those logits agree loosely; the weights
themselves, as the `gguf` package dequantizes them, agree to the last bit.
"""

from __future__ import annotations

import ctypes
import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from qtool.calibrate import CalibrateOptions
from qtool.calibrate import prepare as prepare_calibration
from qtool.calibrate import run as calibrate
from qtool.calibration.python_docs import texts
from qtool.checkpoint.reader import Checkpoint
from qtool.formats.weights import Weights
from qtool.gguf.checkpoint import open_checkpoint
from qtool.job import prepare
from qtool.methods import METHODS
from qtool.mixes import MIXES
from qtool.models.blockwise import BlockModel
from qtool.pipeline import RunOptions, quantize
from qtool.recipe import DataSpec, build
from tests.conftest import MakeModel
from tests.test_gguf_model import CASES, llama_logits, load, logits_of

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: `make test-consumers`")

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-llama"
HEADS, KV_HEADS, BLOCKS = 8, 4, 4  # of the example
# Most that logits may differ, root mean square over that of the logits. Where weights lie in blocks rounded inputs make
# 0.006 to 0.019 of it. Swapped nibbles make 0.04 to 0.2 in one matrix of the example, and 0.5 to 1.5 in all.
MOST = {"f32": 1e-5, "f16": 1e-3, "bf16": 5e-3}
MOST_IN_BLOCKS = 0.03
ROWS = torch.randint(2, 2048, (1, 64), generator=torch.Generator().manual_seed(1))
QUICK = ("f32", "f16", "bf16", "q8_0", "q4_k_m")
MESSAGES = [
    {"role": "system", "content": "You know Python."},
    {"role": "user", "content": "What does a dictionary do?"},
]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
PROMPT = "The sorted() function returns a new list. For example,"

MakeGGUF = Callable[..., Path]


@pytest.fixture(scope="module")
def make_gguf(tmp_path_factory: pytest.TempPathFactory) -> MakeGGUF:
    """`make_gguf(scheme, model=EXAMPLE, **recipe) -> Path`: the file; made once for the same arguments."""

    @functools.cache
    def make(scheme: str, model: Path, recipe: str) -> Path:
        out = tmp_path_factory.mktemp("gguf") / "out"
        tree = {"scheme": scheme, "method": "rtn", "format": "gguf", **json.loads(recipe)}
        quantize(prepare(str(model), build(tree, METHODS)), out, RunOptions("cpu"), lambda *_: None)
        return out / "model.gguf"

    return lambda scheme, model=EXAMPLE, **recipe: make(scheme, model, json.dumps(recipe))


@torch.no_grad()
def our_logits(path: Path, tokens_BT: torch.Tensor) -> torch.Tensor:
    """What our reader makes of a file."""
    checkpoint = open_checkpoint(path)
    model = BlockModel(checkpoint.home, Weights(checkpoint), torch.device("cpu"))
    stream = model.start([tokens_BT])
    for index in range(len(model.blocks)):
        with model.block(index) as block:
            stream.hidden[0] = model.run(block, index, stream, 0)
    with model.head() as head:
        return head(stream.hidden[0])[0]


def dequantized(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file as the `gguf` package reads it."""
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
        for tensor in gguf.GGUFReader(path).tensors
        for shape in [tensor.shape[::-1].tolist()]
    }


def rotated_back(weight_OI: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q and k as transformers has them: the halves of each head one after the other, not in turns."""
    return weight_OI.reshape(heads, -1, 2, weight_OI.shape[1]).swapaxes(1, 2).reshape(weight_OI.shape)


def relative_rms(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def llama(path: Path, **options: Any) -> Any:
    return llama_cpp.Llama(
        str(path), n_ctx=512, n_gpu_layers=0, n_threads=1, n_threads_batch=1, verbose=False, type_k=0, type_v=0,
        flash_attn=False, **options,
    )  # fmt: skip


# --- every type ---------------------------------------------------------------------------------------------------


every_mix = pytest.mark.parametrize(
    "mix", [pytest.param(mix, marks=[pytest.mark.slow] * (mix not in QUICK)) for mix in MIXES]
)


@every_mix
def test_llama_cpp_computes_what_our_reader_does(mix: str, make_gguf: MakeGGUF) -> None:
    path = make_gguf(mix)
    found, wanted = llama_logits(path, ROWS), our_logits(path, ROWS)
    assert relative_rms(found, wanted) < MOST.get(mix, MOST_IN_BLOCKS), (found - wanted).abs().max()


@every_mix
def test_the_gguf_package_reads_the_same_weights(mix: str, make_gguf: MakeGGUF) -> None:
    """To the last bit, under llama.cpp's names and with rows of q and k in its order; no tensor is missing."""
    path = make_gguf(mix)
    theirs = dequantized(path)
    source = Checkpoint(EXAMPLE)
    ours = Weights(open_checkpoint(path)).read(source.tensors)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, BLOCKS)
    for name, weight in ours.items():
        their_name = names.get_name(name.removesuffix(".weight"))
        stored = theirs.pop(f"{their_name}.weight")
        if re.search(r"attn_[qk]$", their_name):
            stored = rotated_back(stored, HEADS if their_name.endswith("q") else KV_HEADS)
        assert np.array_equal(stored, weight.numpy()), name
        if mix in ("f32", "bf16") or weight.dim() == 1:
            assert torch.equal(weight, source.read(name).float()), name
    assert not theirs


@pytest.mark.slow
def test_gptq_in_k_quants(make_gguf: MakeGGUF) -> None:
    """GPTQ under scales of Q4_K and Q3_K: computed alike, and on text closer to the model than nearest codes."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    rows = torch.tensor([tokenizer(max(texts("test"), key=len))["input_ids"][:256]])
    exact = our_logits(EXAMPLE, rows)
    for mix in ("q4_k_s", "q3_k_m"):
        path = make_gguf(mix, method="gptq", data={"source": "python-docs", "rows": 32, "seqlen": 512})
        wanted = our_logits(path, rows)
        assert relative_rms(llama_logits(path, rows), wanted) < MOST_IN_BLOCKS
        assert relative_rms(wanted, exact) < 0.95 * relative_rms(our_logits(make_gguf(mix), rows), exact)


# --- a model that writes ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example model with a chat template."""
    folder = tmp_path_factory.mktemp("chatty") / "model"
    shutil.copytree(EXAMPLE, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def transformers_writes(folder: Path, ids: list[int], count: int) -> list[int]:
    written = load(folder).generate(torch.tensor([ids]), do_sample=False, max_new_tokens=count)
    return written[0, len(ids) :].tolist()


def test_50_tokens_are_those_of_transformers(make_gguf: MakeGGUF) -> None:
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(EXAMPLE), llama(make_gguf("f32"))
    ids = tokenizer(PROMPT)["input_ids"]
    assert model.tokenize(PROMPT.encode()) == ids
    wanted = transformers_writes(EXAMPLE, ids, 50)
    assert len(wanted) == 50
    found = [token for token, _ in zip(model.generate(ids, temp=0.0, repeat_penalty=1.0), range(50), strict=False)]
    assert found == wanted
    assert model.detokenize(found).decode() == tokenizer.decode(wanted)
    completion = model.create_completion(PROMPT, max_tokens=50, temperature=0.0, repeat_penalty=1.0)
    assert completion["choices"][0]["text"] == tokenizer.decode(wanted)
    model.close()


def test_chat(chatty: Path, make_gguf: MakeGGUF) -> None:
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(chatty), llama(make_gguf("f32", chatty))
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    formatter = llama_cpp.llama_chat_format.Jinja2ChatFormatter(
        model.metadata["tokenizer.chat_template"], eos_token="</s>", bos_token="<s>"
    )
    prompt = formatter(messages=MESSAGES).prompt
    assert model.tokenize(prompt.encode(), add_bos=False, special=True) == ids
    wanted = transformers_writes(chatty, ids, 50)
    answer = model.create_chat_completion(MESSAGES, max_tokens=50, temperature=0.0, repeat_penalty=1.0)
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert answer["choices"][0]["message"]["content"] == tokenizer.decode(wanted, skip_special_tokens=True)
    model.close()


# --- other architectures ------------------------------------------------------------------------------------------


def with_weights(folder: Path, path: Path) -> torch.nn.Module:
    """The model in a folder, with the weights of a GGUF file as our reader gives them."""
    model = load(folder)
    weights = Weights(open_checkpoint(path))
    named = {name.replace("embed_out.", "lm_head."): x for name, x in weights.read(weights.shapes).items()}
    missing, unexpected = model.load_state_dict(named, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


@pytest.mark.parametrize("scheme", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("kind", [case for case in CASES if "-" not in case])
def test_every_architecture(kind: str, scheme: str, make_model: MakeModel, make_gguf: MakeGGUF) -> None:
    """As transformers computes with the same weights; gelu is a table of float16 in llama.cpp."""
    name, tied, overrides = CASES[kind]
    folder = make_model(name, "float32", tied, **overrides)
    path = make_gguf(scheme, folder)
    rows = ROWS % 300
    found, wanted = llama_logits(path, rows), logits_of(with_weights(folder, path), rows)
    has_gelu = name in ("gemma2", "gemma3_text", "gpt_neox")
    most = 1e-3 if has_gelu and scheme == "f32" else MOST.get(scheme, MOST_IN_BLOCKS)
    assert relative_rms(found, wanted) < most, (found - wanted).abs().max()


# --- an imatrix ---------------------------------------------------------------------------------------------------


def test_llama_cpp_takes_our_imatrix(make_gguf: MakeGGUF, tmp_path: Path) -> None:
    """Its quantizer refuses IQ2_XXS where one matrix has no importance: so every name is right. Read as llama-quantize
    does."""
    imatrix, out = tmp_path / "imatrix.gguf", tmp_path / "out.gguf"
    data = DataSpec("python-docs", rows=8, seqlen=128)
    calibrate(prepare_calibration(str(EXAMPLE), data, False, "imatrix"), imatrix, CalibrateOptions("cpu"), quiet)
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(imatrix).tensors}
    importance = {
        name: (tensors[f"{name}.in_sum2"] / tensors[f"{name}.counts"]).astype(np.float32).flatten()
        for name in (key.removesuffix(".in_sum2") for key in tensors if key.endswith(".in_sum2"))
    }
    assert len(importance) == 7 * BLOCKS
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype = 1, llama_cpp.LLAMA_FTYPE_MOSTLY_IQ2_XXS
    llama_cpp.llama_log_set(no_log, None)

    def run() -> int:
        source = str(make_gguf("f32")).encode()
        return int(llama_cpp.llama_model_quantize(source, str(out).encode(), ctypes.byref(params)))

    assert run() != 0
    entry = llama_cpp.llama_model_imatrix_data
    pointer = ctypes.POINTER(ctypes.c_float)
    entries = [entry(name.encode(), x.ctypes.data_as(pointer), len(x)) for name, x in importance.items()]
    params.imatrix = (entry * (len(entries) + 1))(*entries)  # an entry without a name ends the list
    assert run() == 0
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors}
    assert "IQ2_XXS" in kinds


def quiet(*_: object) -> None:
    """A progress callback that says nothing."""


@llama_cpp.llama_log_callback
def no_log(*_: object) -> None:
    """llama.cpp's log."""
