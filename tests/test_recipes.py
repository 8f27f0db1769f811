"""Every shipped recipe runs, and the page that helps to choose knows them all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qtool.cli import run

RECIPES = Path(__file__).parents[1] / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_recipe_runs(name, make_model, calibration_text, tmp_path, capsys):
    """On a model wide enough for groups of 128; only the data is replaced, to be quick."""
    model = make_model(hidden_size=128, intermediate_size=256)
    command = ["quantize", str(model), "-o", str(tmp_path / "out"), "--recipe", str(RECIPES / f"{name}.yaml")]
    command += ["--rows", "16", "--seqlen", "32", "--data", str(calibration_text), "--json", "-q", "--device", "cpu"]
    if name == "ci-gated":
        command += ["--set", f"eval.data.source={calibration_text}", "--max-kl", "100", "--max-ppl-increase", "1000%"]
    assert run(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["layers"]) == 14
    assert bool(report["gates"]) == (name == "ci-gated")


def test_the_page_names_every_recipe():
    page = (RECIPES / "README.md").read_text()
    assert [name for name in NAMES if f"| `{name}` |" not in page] == []
    assert page.count("\n| `") == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_says_when_to_choose_it(name):
    assert (RECIPES / f"{name}.yaml").read_text().startswith("# ")
