"""The documentation says what the program does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qtool.cli import app
from qtool.cli.reference import reference

ROOT = Path(__file__).parents[1]


def test_the_command_reference_is_what_the_help_texts_say():
    written = (ROOT / "examples" / "COMMANDS.md").read_text(encoding="utf-8")
    assert written == reference(), "run `make commands`"


def test_every_option_is_explained():
    import typer.main

    root = typer.main.get_command(app)
    silent = [
        f"{name} {parameter.name}"
        for name, command in root.commands.items()
        for parameter in command.params
        if not getattr(parameter, "help", None)
    ]
    assert silent == []


def test_readme_commands_are_commands_of_the_program():
    """Every `qtool ...` line of README and recipes uses subcommands and options that exist."""
    known = reference()
    for page in ("README.md", "recipes/README.md", "examples/README.md"):
        text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"^ *qtool .*$", text, re.MULTILINE):
            words = line.partition("#")[0].split()
            assert f"## qtool {words[1]}\n" in known, line
            section = known.partition(f"## qtool {words[1]}\n")[2].partition("\n## ")[0]
            for option in [w.partition("=")[0] for w in words if w.startswith("-")]:
                assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", section), (page, option)


@pytest.mark.parametrize("name", ["demo", "test", "lint", "bench", "help"])
def test_makefile_has_the_target(name):
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.search(rf"make {name}\b", listed), listed


def test_top_level_is_the_agreed_one():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    top = {line.partition("/")[0] for line in tracked.stdout.splitlines()}
    agreed = {"pyproject.toml", "constraints.txt", "qtool", "recipes", "tests", "examples"}
    agreed |= {"README.md", "LICENSE", "Makefile", "CHANGELOG.md"}
    assert {name for name in top if not name.startswith(".")} <= agreed


@pytest.mark.slow
def test_the_example_makefile_makes_once_and_the_ci_job_tells_a_worse_model(make_model, calibration_text, tmp_path):
    model = make_model()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"scheme: int4-g32-sym\ndata: {{source: {calibration_text}, rows: 16, seqlen: 32}}\n")
    command = ["make", "-f", str(ROOT / "examples" / "compress.mk"), f"MODEL={model}", f"OUT={tmp_path}/out"]
    command += [f"RECIPE={recipe}", f"QTOOL={sys.executable} -m qtool"]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "bits per weight" in first.stdout
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "up to date" in again.stdout
    assert "quantize" not in again.stderr

    recipe.write_text(recipe.read_text() + f"eval: {{data: {calibration_text}, max_kl: 0.000001}}\n")
    missed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "Error 3" in missed.stderr
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime < recipe.stat().st_mtime  # so that make tries again

    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "qtool"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m qtool "$@" --set scheme=int4-g32-sym --max-kl 1e-9\n')
    program.chmod(0o755)
    path = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    job = [str(ROOT / "examples" / "ci.sh"), str(model), str(tmp_path / "ci")]
    done = subprocess.run(job, cwd=tmp_path, env=path, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert "worse than the gates allow" in done.stdout
    assert json.loads((tmp_path / "quantize-report.json").read_text())["gates"][-1]["passed"] is False


@pytest.mark.slow
def test_the_examples_of_training_quantize_distill_and_gate(make_model, calibration_text, tmp_path):
    """The Makefile makes each part once, and its gate again and again; the CI job trains where a gate was missed."""
    model = make_model()
    data = f"data: {{source: {calibration_text}, rows: 16, seqlen: 32}}"
    held_out = tmp_path / "held-out.txt"
    held_out.write_text(calibration_text.read_text()[:2000])
    quantize, distill = tmp_path / "quantize.yaml", tmp_path / "distill.yaml"
    quantize.write_text(f"scheme: int2-g32-sym\nmethod: gptq\n{data}\n")
    distill.write_text(f"scheme: int2-g32-sym\nmethod: gptq\ntraining: {{epochs: 1}}\n{data}\n")
    command = ["make", "-f", str(ROOT / "examples" / "distill.mk"), f"MODEL={model}", f"OUT={tmp_path}/out"]
    command += [f"QUANTIZE={quantize}", f"DISTILL={distill}", f"TEXT={calibration_text}"]
    command += [f"HELD_OUT={held_out}", f"QTOOL={sys.executable} -m qtool"]
    missed = subprocess.run([*command, "GATES=--max-kl 1e-9"], cwd=ROOT, capture_output=True, text=True)
    assert "Error 3" in missed.stderr
    assert "finished by scales" in missed.stdout
    made = tmp_path / "out" / "trained" / "manifest.json"
    before = made.stat().st_mtime_ns
    passed = subprocess.run([*command, "GATES=--max-kl 1000"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "gate max_kl 1000: passed" in passed.stdout
    assert made.stat().st_mtime_ns == before  # what is trained is not trained again for another gate
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "up to date" in again.stdout

    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "qtool"
    small = "--rows 16 --seqlen 32 --set scheme=int2-g32-sym --set block.epochs=1 --max-kl $GATE"
    program.write_text(f'#!/bin/sh\ntest $1 = quantize && GATE=1e-9\nexec "{sys.executable}" -m qtool "$@" {small}\n')
    program.chmod(0o755)
    path = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    job = [
        str(ROOT / "examples" / "ci-distill.sh"),
        str(model),
        str(tmp_path / "ci"),
        str(calibration_text),
        str(held_out),
    ]
    for gate, code, last in (("1000", 0, "is within the gates"), ("1e-9", 3, "is still worse than the gates allow")):
        done = subprocess.run(job, cwd=tmp_path, env={**path, "GATE": gate}, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert f"{tmp_path}/ci/rounded is worse than the gates allow" in done.stdout
        assert f"{tmp_path}/ci/trained {last}" in done.stdout
        report = json.loads((tmp_path / "distill-report.json").read_text())
        assert report["training"]
        assert report["up_to_date"] == (code == 3)
