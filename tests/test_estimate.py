"""What a run takes, said from headers alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qtool.estimate import AT_ONCE, SEARCH_NS
from qtool.job import describe, prepare
from qtool.methods import METHODS
from qtool.recipe import build
from qtool.scheme import BLOCK_TYPES, FLOATS
from tests.conftest import MakeModel

ROWS, WIDTH, HIDDEN, LAYERS = 128256, 4096, 14336, 32


@pytest.fixture(scope="module")
def llama(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 8 billion weights, all of them a hole in the file."""
    folder = Path(shutil.copytree(make_model(), tmp_path_factory.mktemp("llama") / "8b"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"vocab_size": ROWS, "hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS,
               "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
               "max_position_embeddings": 2048}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shapes = {"model.embed_tokens": (ROWS, WIDTH), "model.norm": (WIDTH,), "lm_head": (ROWS, WIDTH)}
    block = {"self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (1024, WIDTH), "self_attn.v_proj": (1024, WIDTH),
             "self_attn.o_proj": (WIDTH, WIDTH), "mlp.gate_proj": (HIDDEN, WIDTH), "mlp.up_proj": (HIDDEN, WIDTH),
             "mlp.down_proj": (WIDTH, HIDDEN), "input_layernorm": (WIDTH,),
             "post_attention_layernorm": (WIDTH,)}  # fmt: skip
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in block.items()}
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * shape[0] * (shape[1] if len(shape) == 2 else 1)
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


def said(model: Path, **tree: Any) -> dict[str, Any]:
    return describe(prepare(str(model), build({"method": "rtn", **tree}, METHODS)))


def test_types_of_gguf_take_their_time(llama: Path) -> None:
    """The bulk of the mix is q4_k and q6_k: 8 billion weights at 600 to 700 ns on one core."""
    gguf, plain = said(llama, scheme="q4_k_m"), said(llama, scheme="w4a16")
    assert 2000 < gguf["expected_wall_s"] < 3500
    assert 200 < plain["expected_wall_s"] < 500
    assert SEARCH_NS.keys() >= BLOCK_TYPES.keys() | FLOATS.keys()


def test_large_matrices_are_never_whole_in_float32(llama: Path) -> None:
    head_bytes = ROWS * WIDTH * 6.5625 / 8
    assert head_bytes + 16 * AT_ONCE < said(llama, scheme="q4_k_m")["expected_memory_bytes"] < 1.5e9
    whole = said(llama, scheme="fp8-block")["expected_memory_bytes"]  # blocks of 128 rows: as a whole
    assert whole > 16 * HIDDEN * WIDTH


def test_with_data_memory_is_that_of_a_block(llama: Path, calibration_text: Path) -> None:
    """Embedding and head, of which there is no data, do not count as blocks."""
    data = {"source": str(calibration_text), "rows": 16, "seqlen": 512}
    gguf, plain = (said(llama, scheme=s, method="gptq", data=data) for s in ("q4_k_m", "w4a16"))
    assert gguf["expected_memory_bytes"] == pytest.approx(plain["expected_memory_bytes"], rel=0.01)
    assert gguf["expected_wall_s"] > plain["expected_wall_s"] + 1500
