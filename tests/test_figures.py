"""Perplexities that must hold on a small trained model, where it lies beside the checkout."""

from __future__ import annotations

from pathlib import Path

import pytest

from qtool.job import prepare
from qtool.methods import METHODS
from qtool.pipeline import RunOptions, quantize
from qtool.recipe import build
from qtool.transforms import TRANSFORMS

SHARED = Path(__file__).parents[2] / "shared"
MODEL = SHARED / "models" / "tinystories-656k"
DATA = SHARED / "data"


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.is_dir(), reason="the measuring model is not beside the checkout")
@pytest.mark.parametrize(
    ("steps", "scheme", "most"),
    [
        ("gptq", "w4a16", 25.5),
        ("rtn", "w2a16", 120.0),
        ("gptaq", "w2a16", 50.0),
        ("awq rtn", "w4a16", 26.0),
        ("gptq", "nvfp4", 27.2),
        ("gptq", "mxfp4a16", 25.9),
        ("rtn", "llm-int8", 24.7),
    ],
)
def test_perplexity_is_at_most(steps, scheme, most, tmp_path):
    *transforms, method = steps.split()
    tree = {
        "transforms": transforms,
        "method": method,
        "scheme": scheme,
        "data": {"source": str(DATA / "tinystories-calib.jsonl"), "rows": 128, "seqlen": 512},
        "eval": {"data": {"source": str(DATA / "tinystories-eval.jsonl"), "seqlen": 512}, "protocol": "rows"},
    }
    job = prepare(str(MODEL), build(tree, [*METHODS, *TRANSFORMS]))
    report, _ = quantize(job, tmp_path / "out", RunOptions("cpu"), lambda *_: None)
    assert report.evaluation["tokens"] == 60090
    assert report.evaluation["comparison"]["perplexity"]["value"] == pytest.approx(24.484, abs=5e-4)
    assert report.evaluation["perplexity"]["value"] <= most
