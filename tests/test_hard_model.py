"""A trained model made hard on purpose: what smoothquant, LLM.int8() and awq are for.

The example model is rescaled so that it computes what it did, but 1 % of the input channels of its linears are 50 to
100 times as large as the others.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.evaluation.evaluate import Evaluation, evaluate
from qtool.job import prepare
from qtool.methods import METHODS
from qtool.pipeline import RunOptions, quantize
from qtool.recipe import DataSpec, EvalSpec, build
from qtool.transforms import TRANSFORMS

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-llama"
EVAL = EvalSpec(DataSpec("python-docs", rows=24, seqlen=256))
PAIRS = [  # what produces an input, and who reads it
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp.up_proj", ("mlp.down_proj",)),
]

pytestmark = pytest.mark.slow


def quiet(*_: object) -> None:
    """A progress callback that says nothing."""


@pytest.fixture(scope="module")
def hard_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hard") / "model"
    shutil.copytree(EXAMPLE, folder)
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(0)
    blocks = {name.split(".")[2] for name in tensors if name.startswith("model.layers.")}
    for block in sorted(blocks):
        for producer, readers in PAIRS:
            weight = tensors[f"model.layers.{block}.{producer}.weight"]
            channels = torch.randperm(len(weight), generator=generator)[: max(2, len(weight) // 100)]
            factor = 50 + 50 * torch.rand(len(channels), generator=generator)
            weight[channels] *= factor if weight.dim() == 1 else factor[:, None]
            for reader in readers:
                tensors[f"model.layers.{block}.{reader}.weight"][:, channels] /= factor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def increase(model: Path, out: Path, **changes: Any) -> float:
    """Quantize, and by which share the perplexity rose."""
    tree = {"method": "rtn", "data": {"rows": 32, "seqlen": 256}, **changes}
    quantize(prepare(str(model), build(tree, [*METHODS, *TRANSFORMS])), out, RunOptions(device="cpu"), quiet)
    return compared(out, model).comparison.relative_increase.value  # type: ignore[union-attr]


def compared(out: Path, model: Path) -> Evaluation:
    return evaluate(out, model, EVAL, "cpu", quiet)


def test_it_computes_what_the_example_does(hard_model: Path) -> None:
    comparison = compared(hard_model, EXAMPLE).comparison
    assert comparison is not None
    assert comparison.kl.value < 1e-6


def test_int8_inputs_lose_it_and_smoothquant_and_llm_int8_keep_it(hard_model: Path, tmp_path: Path) -> None:
    plain = increase(hard_model, tmp_path / "plain", scheme="w8a8")
    smooth = increase(hard_model, tmp_path / "smooth", scheme="w8a8", transforms=["smoothquant"])
    mixed = increase(hard_model, tmp_path / "mixed", scheme="llm-int8")
    told = f"perplexity rose by {100 * plain:.1f} % plain, {100 * smooth:.2f} % smooth, {100 * mixed:.2f} % LLM.int8()"
    assert plain > 0.05, told
    assert plain > 20 * max(smooth, mixed), told
    assert smooth < 0.01, told
    assert mixed < 0.005, told


def test_awq_clearly_beats_rounding_at_4_bits(hard_model: Path, tmp_path: Path) -> None:
    plain = increase(hard_model, tmp_path / "plain", scheme="w4a16")
    scaled = increase(hard_model, tmp_path / "scaled", scheme="w4a16", transforms=["awq"])
    assert scaled < 0.5 * plain, f"perplexity rose by {100 * plain:.2f} % with rtn, by {100 * scaled:.2f} % with awq"
