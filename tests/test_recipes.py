"""Every shipped recipe runs, and the page that helps to choose shows them all as the table in the code has them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from qtool.cli import run
from qtool.distill.recipe import build as build_distillation
from qtool.distill.recipe import quantized
from qtool.finishing import FINISHES
from qtool.formats import format_for, get_format
from qtool.methods import METHODS
from qtool.mixes import get_mix
from qtool.recipe import build, load_tree
from qtool.targets import CLASSES, ENGINES, PAGE_COLUMNS, TARGETS, mix_bits
from qtool.transforms import TRANSFORMS

RECIPES = Path(__file__).parents[1] / "recipes"
ALL = sorted(path.stem for path in RECIPES.glob("*.yaml"))
NAMES = [name for name in ALL if not name.startswith("distill-")]
BY_NAME = {target.name: target for target in TARGETS}
NO_TARGET = ["ci-gated", "w4a16-lora"]  # about measuring, and about what lies beside the weights
DISTILLED = {  # what the command line says besides a recipe of `qtool distill`
    "distill-layers": ["--layers", "1"],
    "distill-width": ["--hidden", "32", "--heads", "2", "--mlp", "64"],
    "distill-student": ["--student"],
    "distill-w2": [],
}
TRAINED = {"w4a16-lora": ["lora"], "distill-w2": ["block", "scales"]}  # and qat, always by the same


@pytest.mark.parametrize("name", NAMES)
def test_recipe_runs(name, make_model, calibration_text, tmp_path, capsys):
    """On a model wide enough for groups of 128, or blocks of 256; little data and one epoch, to be quick."""
    gguf = name.startswith("gguf-")
    model = make_model(hidden_size=256 if gguf else 128, intermediate_size=256)
    command = ["quantize", str(model), "-o", str(tmp_path / "out"), "--recipe", str(RECIPES / f"{name}.yaml")]
    command += ["--rows", "16", "--seqlen", "32", "--data", str(calibration_text), "--json", "-q", "--device", "cpu"]
    if name.endswith("-qat"):
        command += ["--set", "block.epochs=1", "--set", "scales.epochs=1"]
    if name == "ci-gated":
        command += ["--set", f"eval.data.source={calibration_text}", "--max-kl", "100", "--max-ppl-increase", "1000%"]
    assert run(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["layers"]) == (15 if gguf else 14)  # with the embedding, which is the head, too
    assert bool(report["gates"]) == (name == "ci-gated")
    needs_data = name in NO_TARGET or BY_NAME[name].needs_data
    assert bool(report["data"]) == needs_data, f"the table says {needs_data} to data, the run used {report['data']}"
    trained = TRAINED.get(name, ["block", "scales"] if name.endswith("-qat") else [])
    assert list(dict.fromkeys(entry["finish"] for entry in report["training"])) == trained
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").exists() == (name == "w4a16-lora")


@pytest.mark.parametrize("name", DISTILLED)
def test_distillation_runs(name, make_model, calibration_text, tmp_path, capsys):
    """On a tiny model in a few steps; what the recipe says of the student and of the loss is what was trained."""
    teacher = make_model()
    command = ["distill", str(teacher), "-o", str(tmp_path / "out"), "--recipe", str(RECIPES / f"{name}.yaml")]
    command += [*DISTILLED[name], *([str(make_model(num_hidden_layers=1))] if name == "distill-student" else [])]
    command += ["--rows", "16", "--seqlen", "32", "--steps", "2", "--data", str(calibration_text), "--device", "cpu"]
    command += ["--json", "-q", *(["--set", "scheme=int2-g32-sym"] if name == "distill-w2" else [])]
    assert run([*command, "--dry-run"]) == 0
    capsys.readouterr()
    assert run(command) == 0
    report = json.loads(capsys.readouterr().out)
    if name == "distill-w2":
        assert list(dict.fromkeys(entry["finish"] for entry in report["training"])) == TRAINED[name]
        assert {layer["scheme"] for layer in report["layers"]} == {"int2-g32-sym"}
        return
    recipe = build_distillation(load_tree(RECIPES / f"{name}.yaml"))
    assert report["parameters"]["student"] < report["parameters"]["teacher"]
    assert report["curve"]["steps"] == 2
    assert report["recipe"]["cache_teacher"] == recipe.cache_teacher
    assert report["recipe"]["objective"] == json.loads(json.dumps(dataclasses.asdict(recipe.objective)))


def test_files_and_table_name_the_same_recipes():
    assert sorted([*BY_NAME, *NO_TARGET, *DISTILLED]) == ALL


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_file_says_what_the_table_says(target):
    recipe = build(load_tree(RECIPES / f"{target.name}.yaml"), [*METHODS, *TRANSFORMS, *FINISHES])
    assert recipe == target.recipe()


def test_a_distilled_scheme_is_a_recipe_of_quantize():
    recipe = quantized(load_tree(RECIPES / "distill-w2.yaml"))
    assert (recipe.method, recipe.finish) == ("gptaq", ("block", "scales"))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_the_formats_name_the_engines_of_the_table(target):
    schemes = target.schemes
    format = target.format if target.format != "auto" else format_for(schemes)
    readers = [get_format(format).readers(scheme, (4096, 4096)) for scheme in schemes]
    engines = [name for engine, name in ENGINES.items() if target.hardware(engine)]
    assert [name for name in engines for text in readers if name not in text] == [], readers
    assert bool(target.bitsandbytes) == (format == "bitsandbytes")
    assert bool(target.gptqmodel) == all("gptqmodel" in text for text in readers)
    assert bool(target.llama_cpp) == (format == "gguf") == (target.mix is not None)


def test_the_page_shows_the_table():
    """Row by row, in the order of the table, and nothing else."""
    page, _, distillation = (RECIPES / "README.md").read_text(encoding="utf-8").partition("## For distillation")
    shown = [line for line in page.splitlines() if line.startswith("| `")]
    assert shown == [f"| {' | '.join(target.cells())} |" for target in TARGETS]
    assert f"| {' | '.join(PAGE_COLUMNS)} |" in page
    shown = [line.split("`")[1] for line in distillation.splitlines() if line.startswith("| `")]
    assert shown == list(DISTILLED)
    assert all(f"`{name}`" in page for name in NO_TARGET)


# llama.cpp's table of Llama 3.1 8B (tools/quantize/README.md, 2025), which also counts norms: 0.0013 bits at most
BITS = {"Q2_K": 3.1593, "Q3_K_S": 3.6429, "Q3_K_L": 4.2979, "Q4_K_S": 4.6672, "Q4_K_M": 4.8944, "Q5_K_S": 5.5704,
        "Q5_K_M": 5.7036, "Q6_K": 6.5633, "Q8_0": 8.5008, "IQ4_XS": 4.4597, "IQ4_NL": 4.6818}  # fmt: skip


@pytest.mark.parametrize("name", BITS)
def test_bits_of_a_mix_are_those_of_llama_cpp(name):
    assert 0 <= BITS[name] - mix_bits(get_mix(name), weighted=False) < 0.0013


def test_the_table_falls_in_quality():
    order = [CLASSES.index(target.quality) for target in TARGETS]
    assert order == sorted(order)


@pytest.mark.parametrize("name", ALL)
def test_recipe_says_when_to_choose_it(name):
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert max(map(len, text.splitlines())) <= 120
