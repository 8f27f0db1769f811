"""Perplexities that must hold on a small trained model, where it lies beside the checkout."""

from __future__ import annotations

from pathlib import Path

import pytest

from qtool.methods import METHODS
from qtool.pipeline import RunOptions, prepare, quantize
from qtool.recipe import build

SHARED = Path(__file__).parents[2] / "shared"
MODEL = SHARED / "models" / "tinystories-656k"
DATA = SHARED / "data"


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.is_dir(), reason="the measuring model is not beside the checkout")
@pytest.mark.parametrize(
    ("method", "scheme", "most"),
    [
        ("gptq", "w4a16", 25.5),
        ("gptq", "w3a16", 30.0),
        ("rtn", "w2a16", 120.0),
        ("gptaq", "w3a16", 28.0),
        ("gptaq", "w2a16", 50.0),
    ],
)
def test_perplexity_is_at_most(method, scheme, most, tmp_path):
    tree = {
        "method": method,
        "scheme": scheme,
        "data": {"source": str(DATA / "tinystories-calib.jsonl"), "rows": 128, "seqlen": 512},
        "eval": {"data": {"source": str(DATA / "tinystories-eval.jsonl"), "seqlen": 512}, "protocol": "rows"},
    }
    job = prepare(str(MODEL), build(tree, METHODS))
    report, _ = quantize(job, tmp_path / "out", RunOptions("cpu"), lambda *_: None)
    assert report.evaluation["tokens"] == 60090
    assert report.evaluation["comparison"]["perplexity"]["value"] == pytest.approx(24.484, abs=5e-4)
    assert report.evaluation["perplexity"]["value"] <= most
