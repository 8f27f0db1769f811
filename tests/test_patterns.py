"""Regular expressions of a config.json: those of real checkpoints fit as `re` has it, others are refused."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from qtool.checkpoint.reader import Checkpoint
from qtool.cli import run
from qtool.errors import QtoolError
from qtool.formats import Contents, get_format
from qtool.formats.patterns import LONGEST_NAME, begins, problem
from qtool.inspection.overview import overview
from qtool.scheme import QuantScheme

LAYERS = "|".join(map(str, range(3, 61)))
REAL = [
    r".*mlp\.(gate|up)_proj$", r".*\.self_attn\..*", r"model\.layers\.\d+\.mlp.*", r"^(?!.*lm_head).*$", r".*lm_head",
    r"^(?!.*(lm_head|router)).*proj$", r"(?=.*mlp)(?!.*gate)(?!.*shared).*", r"^((?!lm_head).)*$", r".*", r"",
    r".*\.layers\.\d+\.block_sparse_moe\.experts\.\d+\.w[123]$", r".*layers.*mlp.*gate.*", r"visual.*", r".*mlp.gate$",
    r".*layers\.\d+\.mlp\.experts\.\d+\..*_proj$", r"model\.layers\.(\d+)\.mlp", rf"model\.layers\.({LAYERS})\.mlp.*",
    r"(model\.)?(language_model\.)?layers\.[0-9]+\.", r"(?:.*\.)?(\d{1,2})\.mlp", r"(?i).*DOWN_proj", r"[^.]+\.layers",
    r"^model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj$", r".*?\.(?P<part>attn|mlp)\b",
    r"\w+\.(?<=\.)l",
]  # fmt: skip
HANGS = [
    r"([a-z_.0-9]+)+QQ$", r"(.*)*Q", r"(.*|b)+Q", r"(a|a)*Q", r"(a|aa)+Q", r"(?:(?:a+)?)+Q", r"(?:a{1,2}){150}Q",
    "(?:a|a)" * 30 + "Q", "a?" * 30 + "a" * 30 + "Q", r".*a.*a.*a.*a.*Q", r"(?=(a|aa)+Q)", r"(?!(a*)*Q)x",
    r"(?:(?!.*.*.*Q)a)*Q", r"(?i)A+a+A+a+A+Q", r"\w+a\w+a\w+a\w+a\w+Q", r"(?:a+){2,}Q", r"(a+)\1+Q", r"(a|(?:a*)*)?Q",
]  # fmt: skip
NONE = [r"(", r"*", r"[", "(" * 5000, "a" * 5000, r"a{5000000000}", r"(?P<a", r"(?<=a*)", "\\"]
NAMES = ["model.layers.11.mlp.down_proj", "model.layers.3.self_attn.q_proj", "lm_head", "visual.blocks.0.mlp.gate",
         "model.language_model.layers.0.mlp.experts.255.gate_proj", "model.layers.1.block_sparse_moe.experts.1.w2",
         "transformer.h.0.attn"]  # fmt: skip


@pytest.mark.parametrize("pattern", REAL)
def test_those_of_real_checkpoints(pattern: str) -> None:
    for name in NAMES:
        assert begins(pattern, name) == (re.match(pattern, name) is not None)


@pytest.mark.parametrize("pattern", [*HANGS, *NONE])
def test_refused_by_name(pattern: str) -> None:
    with pytest.raises(QtoolError) as caught:
        begins(pattern, "a" * 100)
    assert f"the pattern `{pattern[:100]}" in caught.value.message.replace("\\\\", "\\")
    assert caught.value.message.isprintable()


def test_long_names() -> None:
    assert begins(".*a$", "a" * LONGEST_NAME)
    with pytest.raises(QtoolError, match=f"has {LONGEST_NAME + 1} characters"):
        begins(".*a$", "a" * (LONGEST_NAME + 1))


atoms = st.sampled_from(["a", "b", ".", r"\w", r"\d", "[ab]", "[^b]", "^", r"\b", "(?!b)", "(?=.*b)", r"\."])
repeats = st.sampled_from(["", "*", "+", "?", "*?", "{2}", "{1,3}", "{2,}", "{30,}"])


def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    group = st.sampled_from(["({})", "(?:{})", "(?!{})", "(?={})", "(?i:{})", "(?:{}|a)", "(?:|{})"])
    grouped = st.builds(lambda form, text, repeat: form.format(text) + repeat, group, inner, repeats)
    return st.one_of(grouped, st.lists(inner, max_size=6).map("".join), st.lists(inner, max_size=3).map("|".join))


@settings(max_examples=400, deadline=None)
@given(
    pattern=st.recursive(st.builds(str.__add__, atoms, repeats), larger, max_leaves=16),
    name=st.text("ab1.", max_size=12).map(lambda text: (text * 100)[:LONGEST_NAME]),
)
@example(pattern=".*.*.*Q", name="a" * LONGEST_NAME)
@example(pattern=".*?.*?.*?" + "a" * 97 + "b", name="a" * LONGEST_NAME)
@example(pattern="a?" * 23 + "a" * 23 + "Q", name="a" * LONGEST_NAME)
@example(pattern="(?:a|a)" * 23 + "Q", name="a" * LONGEST_NAME)
@example(pattern="((?!.*.*x).)*Q", name="a" * LONGEST_NAME)
@example(pattern=r".*.*" + r"\w+\." * 100 + "Q", name="a." * (LONGEST_NAME // 2))
def test_what_is_tried_ends_soon(pattern: str, name: str) -> None:
    name += "!"[: LONGEST_NAME - len(name)]
    start = time.process_time()
    if problem(pattern, name) is None:
        assert begins(pattern, name) == (re.match(pattern, name) is not None)
    assert time.process_time() - start < 4


def checkpoint_with(folder: Path, format: str, scheme: str, entry: dict[str, Any]) -> Path:
    """One packed linear, whose name takes `HANGS[0]` very long."""
    from tests.test_fuzz import CONFIG, MODULE, SHAPE, quantized

    folder.mkdir()
    made = get_format(format)
    tensors = made.pack(MODULE, quantized(QuantScheme.parse(scheme), made.scale_dtype("BF16")))
    save_file({**tensors, "lm_head.weight": torch.ones(8, SHAPE[1])}, folder / "model.safetensors")
    said = {**(made.config(Contents({MODULE: QuantScheme.parse(scheme)}, [])) or {}), **entry}
    (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": said}))
    return folder


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_a_config_that_would_hang(format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoint_with(tmp_path / "m", format, "int4-g128-sym", {})
    entry = json.loads((path / "config.json").read_text())["quantization_config"]
    if format == "gptq":
        entry["dynamic"] = {f"+:{HANGS[0]}": {}}
    else:
        entry["config_groups"]["group_0"]["targets"] = [f"re:{HANGS[0]}"]
    path = checkpoint_with(tmp_path / "hangs", format, "int4-g128-sym", entry)
    assert run(["inspect", str(path)]) == 1
    assert f"error: the quantization_config has the pattern `{HANGS[0]}`: it repeats" in capsys.readouterr().err


def test_an_ignore_list_that_would_hang(tmp_path: Path) -> None:
    path = checkpoint_with(tmp_path / "m", "compressed-tensors", "int4-g128-sym", {"ignore": [f"re:{HANGS[0]}"]})
    reasons = {kind.pattern: kind.why_not_quantized for kind in overview(Checkpoint(path)).kinds}
    assert reasons["lm_head"] == "the ignore list of config.json has patterns that are not read"
