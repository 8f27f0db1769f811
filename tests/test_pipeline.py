"""A whole run: what is written, that others load it, that it can be killed and repeated."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.writer import StagedOutput, partial_path
from qtool.errors import QtoolError, UsageError
from qtool.formats.weights import Weights
from qtool.job import describe, prepare
from qtool.methods import METHODS
from qtool.models.architectures import ARCHITECTURES
from qtool.models.blockwise import BlockModel
from qtool.pipeline import MANIFEST, RunOptions, quantize
from qtool.recipe import build
from qtool.transforms import TRANSFORMS

CPU = RunOptions(device="cpu")


def quiet(*_: object) -> None:
    """A progress callback that says nothing."""


def recipe_tree(text: Path, **changes: Any) -> dict[str, Any]:
    return {"scheme": "int4-g32-sym", "data": {"source": str(text), "rows": 24, "seqlen": 32}, **changes}


def run(model: Path, out: Path, tree: dict[str, Any], options: RunOptions = CPU) -> tuple[Any, bool]:
    return quantize(prepare(str(model), build(tree, [*METHODS, *TRANSFORMS])), out, options, quiet)


def files(folder: Path) -> dict[str, bytes]:
    """The bytes of every file but the manifest, which holds times."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != MANIFEST}


def our_logits(folder: Path, tokens_BT: torch.Tensor) -> torch.Tensor:
    weights = Weights(Checkpoint(folder))
    model = BlockModel(folder, weights, torch.device("cpu"))
    stream = model.start([tokens_BT])
    for index in range(len(model.blocks)):
        with model.block(index) as block:
            stream.hidden[0] = model.run(block, index, stream, 0)
    with model.head() as head:
        return head(stream.hidden[0])


class Killed(BaseException):
    """Stands in for a process that is gone."""


# --- what others load ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheme", ["w4a16-g32", "w4a16-g32-asym", "w8a16", "w3a16-g32", "w2a16-g32", "int5-channel-sym"]
)
def test_transformers_computes_what_our_reader_computes(make_model, calibration_text, tmp_path, scheme):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    run(make_model(), out, recipe_tree(calibration_text, scheme=scheme))
    tokens_BT = torch.randint(2, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(tokens_BT).logits
    difference = (our_logits(out, tokens_BT) - expected).abs()
    assert difference.max() <= 1e-5 * expected.abs().max(), (difference.max(), difference.mean())


@pytest.mark.slow
@pytest.mark.parametrize("kind", [k for k in ARCHITECTURES if k != "llama"])
def test_every_architecture_goes_through_gptq_and_loads(make_model, calibration_text, tmp_path, kind):
    transposed = ARCHITECTURES[kind].transposed  # those are loaded by bitsandbytes, which computes in bfloat16
    pytest.importorskip("bitsandbytes" if transposed else "compressed_tensors")
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    scheme = "nf4" if transposed else "int4-g32-sym"
    report, _ = run(make_model(kind), out, recipe_tree(calibration_text, scheme=scheme))
    assert len(report.layers) == 2 * len(ARCHITECTURES[kind].linears())
    tokens_BT = torch.randint(2, 300, (1, 24), generator=torch.Generator().manual_seed(0))
    attention = ARCHITECTURES[kind].attention
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation=attention)
    with torch.no_grad():
        expected = theirs(tokens_BT).logits
    difference = (our_logits(out, tokens_BT) - expected).abs()
    share = 4e-2 if transposed else 1e-5
    assert difference.max() <= share * expected.abs().max(), (difference.max(), difference.mean())


def test_layers_can_have_schemes_of_their_own(make_model, calibration_text, tmp_path):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    tree = recipe_tree(
        calibration_text, layers={"*.1.mlp.down_proj": "int8-channel-sym"}, ignore=["*embed*", "*o_proj"]
    )
    tree["ignore"] += ["*norm*", "*lm_head"]
    report, _ = run(make_model(tied=False), out, tree)
    schemes = {layer.module: layer.scheme for layer in report.layers}
    assert schemes["model.layers.0.mlp.down_proj"] == "int4-g32-sym"
    assert schemes["model.layers.1.mlp.down_proj"] == "int8-channel-sym"
    assert not any("o_proj" in module for module in schemes)
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokens_BT = torch.randint(2, 300, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens_BT).logits
    difference = (our_logits(out, tokens_BT) - expected).abs()
    assert difference.max() <= 1e-5 * expected.abs().max(), difference.max()


# --- the report ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_report_tells_true_errors_bits_and_sizes(make_model, calibration_text, tmp_path, method):
    model, out = make_model(), tmp_path / "out"
    report, up_to_date = run(model, out, recipe_tree(calibration_text, method=method))
    assert not up_to_date
    dense, packed = Weights(Checkpoint(model)), Weights(Checkpoint(out))
    for layer in report.layers:
        name = f"{layer.module}.weight"
        before, after = dense.read([name])[name], packed.read([name])[name]
        assert layer.weight_error == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)
        assert layer.bits_per_weight == 4.5
        assert (layer.output_error is None) == (method in ("rtn", "qat"))  # which trains the outputs of whole blocks
    assert report.bytes_before == Checkpoint(model).size_bytes
    assert report.bytes_after == Checkpoint(out).size_bytes
    quantized = {f"{layer.module}.weight" for layer in report.layers}
    assert {kept.name for kept in report.kept} | quantized == set(Checkpoint(model).tensors)
    manifest = json.loads((out / MANIFEST).read_text())
    assert manifest["report"]["layers"] == json.loads(json.dumps(report.to_tree()))["layers"]
    assert {f["name"] for f in manifest["files"]} == set(files(out))


def test_gptq_changes_the_model_less_than_rtn_and_gptaq_less_than_gptq(make_model, calibration_text, tmp_path):
    from qtool.calibration.tokens import Tokenizer, calibration_rows

    model, divergence = make_model(initializer_range=0.2), {}
    tree = recipe_tree(calibration_text, scheme="int2-g32-sym")
    tree["data"]["rows"] = 64
    rows = calibration_rows(build(tree, [*METHODS, *TRANSFORMS]).data, Tokenizer(model, 320), 128)
    tokens_BT = torch.stack(rows.rows)
    truth = our_logits(model, tokens_BT).log_softmax(-1)
    for method in METHODS:
        run(model, tmp_path / method, {**tree, "method": method})
        ours = our_logits(tmp_path / method, tokens_BT).log_softmax(-1)
        divergence[method] = float((truth.exp() * (truth - ours)).sum(-1).mean())
    assert divergence["gptaq"] < divergence["gptq"] < divergence["rtn"], divergence


def test_too_little_data_is_said_with_the_number_that_would_do(make_model, calibration_text, tmp_path):
    tree = recipe_tree(calibration_text)
    tree["data"]["rows"] = 4
    report, _ = run(make_model(), tmp_path / "out", tree)
    assert any("128 calibration tokens are few" in note and "--rows 16" in note for note in report.notes), report.notes


def test_describe_writes_nothing_and_knows_the_size(make_model, calibration_text, tmp_path):
    job = prepare(str(make_model()), build(recipe_tree(calibration_text), METHODS))
    description = describe(job)
    report, _ = quantize(job, tmp_path / "out", CPU, quiet)
    assert description["bytes_after"] == report.bytes_after
    assert description["bits_per_weight"] == report.bits_per_weight
    assert description["expected_memory_bytes"] > 0
    assert description["expected_wall_s"] > 0


# --- the same bytes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_two_runs_give_the_same_bytes(make_model, calibration_text, tmp_path, method):
    tree = recipe_tree(calibration_text, method=method)
    for name in ("a", "b"):
        run(make_model(shards=True), tmp_path / name, tree)
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.parametrize("method", METHODS)
def test_interrupted_after_every_unit_it_ends_with_the_same_bytes(
    make_model, calibration_text, tmp_path, method, monkeypatch
):
    tree, model = recipe_tree(calibration_text, method=method), make_model(tied=False)
    run(model, tmp_path / "whole", tree)
    units = len(prepare(str(model), build(tree, [*METHODS, *TRANSFORMS])).plan.units)
    finish = StagedOutput.finish_unit
    out = tmp_path / "out"
    for _ in range(units):
        with monkeypatch.context() as patch:

            def finish_and_die(self: StagedOutput, unit: str, record: dict[str, Any]) -> None:
                finish(self, unit, record)
                raise Killed

            patch.setattr(StagedOutput, "finish_unit", finish_and_die)
            with pytest.raises(Killed):
                run(model, out, tree)
        assert not out.exists()
    report, _ = run(model, out, tree)
    assert report.resumed_units == units
    assert files(out) == files(tmp_path / "whole")
    assert not partial_path(out).exists()


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "moments"), [("int4-g32-sym", (2, 5)), ("q4_0", (1, 3))])
def test_killed_at_any_moment_the_same_command_ends_with_the_same_bytes(
    make_model, calibration_text, tmp_path, scheme, moments
):
    """SIGKILL after so many lines of progress, and then the same command again."""
    command = [sys.executable, "-m", "qtool", "quantize", str(make_model()), "--scheme", scheme, "--device", "cpu"]
    command += ["--data", str(calibration_text), "--rows", "24", "--seqlen", "32", "-o"]
    whole = tmp_path / "whole"
    subprocess.run([*command, str(whole), "-q"], check=True, stdout=subprocess.DEVNULL)
    for lines in moments:
        out = tmp_path / f"killed-{lines}"
        with subprocess.Popen([*command, str(out)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
            assert process.stderr
            for _ in range(lines):
                process.stderr.readline()
            process.send_signal(signal.SIGKILL)
        assert not (out / MANIFEST).exists() or process.returncode == 0
        subprocess.run([*command, str(out), "-q"], check=True, stdout=subprocess.DEVNULL)
        assert files(out) == files(whole)


@pytest.mark.parametrize("method", ["gptq", "gptaq"])
def test_speed_knobs_change_rounding_at_most(make_model, calibration_text, tmp_path, method):
    weights = {}
    for name, batch_tokens, block in (("a", 2048, 128), ("b", 32, 128), ("c", 2048, 7)):
        tree = recipe_tree(calibration_text, method=method, **{method: {"block": block}})
        run(make_model(), tmp_path / name, tree, dataclasses.replace(CPU, batch_tokens=batch_tokens))
        packed = Weights(Checkpoint(tmp_path / name))
        weights[name] = packed.read([f"{module}.weight" for module in packed.schemes])
    for other in ("b", "c"):
        for name, weight in weights["a"].items():
            changed = (weights[other][name] != weight).double().mean()
            assert changed < 0.02, f"{other}: {changed:.4f} of {name} differ"


# --- outputs ------------------------------------------------------------------------------------------------------


def test_same_again_is_up_to_date_and_another_recipe_is_refused(make_model, calibration_text, tmp_path):
    model, out = make_model(), tmp_path / "out"
    tree = recipe_tree(calibration_text)
    run(model, out, tree)
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    report, up_to_date = run(model, out, tree)
    assert up_to_date
    assert report.layers
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
    with pytest.raises(
        UsageError, match=r"was made otherwise: recipe\.scheme was `int4-g32-sym` and is now `int8-g32-sym`"
    ):
        run(model, out, {**tree, "scheme": "int8-g32-sym"})
    report, up_to_date = run(model, out, {**tree, "scheme": "int8-g32-sym"}, dataclasses.replace(CPU, force=True))
    assert not up_to_date
    assert report.scheme == "int8-g32-sym"
    assert not (tmp_path / "out.replaced").exists()


def test_an_alias_is_the_same_recipe(make_model, calibration_text, tmp_path):
    run(make_model(), tmp_path / "out", recipe_tree(calibration_text, scheme="w4a16-g32"))
    _, up_to_date = run(make_model(), tmp_path / "out", recipe_tree(calibration_text, scheme="int4-g32-sym"))
    assert up_to_date


def test_changed_weights_or_data_are_noticed(make_model, calibration_text, tmp_path):
    model, text, out = tmp_path / "model", tmp_path / "text.jsonl", tmp_path / "out"
    shutil.copytree(make_model(), model)
    shutil.copy(calibration_text, text)
    run(model, out, recipe_tree(text))
    with text.open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(UsageError, match=r"data_files.*text\.jsonl"):
        run(model, out, recipe_tree(text))
    shutil.copy(calibration_text, text)
    weights = model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UsageError, match=r"source\.model\.safetensors"):
        run(model, out, recipe_tree(text))


def test_a_damaged_output_is_not_up_to_date(make_model, calibration_text, tmp_path):
    out = tmp_path / "out"
    run(make_model(), out, recipe_tree(calibration_text))
    (out / "model.safetensors").write_bytes(b"short")
    with pytest.raises(UsageError, match="damaged"):
        run(make_model(), out, recipe_tree(calibration_text))


def test_evaluation_can_be_added_to_an_output_that_is_there(make_model, calibration_text, tmp_path):
    out, tree = tmp_path / "out", recipe_tree(calibration_text)
    run(make_model(), out, tree)
    weights = files(out)
    tree["eval"] = {"data": {"source": str(calibration_text), "seqlen": 32}, "max_kl": 1e-9}
    report, up_to_date = run(make_model(), out, tree)
    assert up_to_date
    assert report.evaluation["comparison"]["kl"]["value"] > 0
    assert not all(gate["passed"] for gate in report.gates)
    assert files(out) == weights
    assert json.loads((out / MANIFEST).read_text())["report"]["gates"][0]["passed"] is False


def test_what_reads_back_otherwise_is_an_error(make_model, calibration_text, tmp_path, monkeypatch):
    from qtool.formats.compressed_tensors import CompressedTensors

    pack = CompressedTensors.pack

    def faulty(self: CompressedTensors, module: str, weight: Any, dtype: str) -> dict[str, torch.Tensor]:
        tensors = pack(self, module, weight, dtype)
        if module.endswith("1.mlp.up_proj"):
            tensors[module + ".weight_packed"][0, 0] ^= 1
        return tensors

    monkeypatch.setattr(CompressedTensors, "pack", faulty)
    with pytest.raises(QtoolError, match=r"model\.layers\.1\.mlp\.up_proj` does not unpack to what was solved"):
        run(make_model(), tmp_path / "out", recipe_tree(calibration_text))
    assert not (tmp_path / "out").exists()


def test_the_rest_of_the_source_comes_along_and_pickles_do_not(make_model, calibration_text, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(make_model(), model)
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (model / "optimizer.pt").write_bytes(b"pickle")
    (model / ".gitattributes").write_text("x")
    run(model, tmp_path / "out", recipe_tree(calibration_text))
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"chat_template.jinja", "tokenizer.json", "config.json", MANIFEST} <= names
    assert not {"optimizer.pt", ".gitattributes"} & names


def test_rtn_takes_any_architecture_and_needs_no_tokenizer(tmp_path):
    from safetensors.torch import save_file

    model = tmp_path / "model"
    model.mkdir()
    names = ["backbone.stage.0.mix.weight", "backbone.stage.1.mix.weight", "token_embed.weight"]
    save_file({name: torch.randn(32, 64) for name in names}, model / "model.safetensors")
    (model / "config.json").write_text('{"model_type": "something-new"}')
    report, _ = run(model, tmp_path / "out", {"scheme": "int4-g32-sym", "method": "rtn"})
    assert [layer.module for layer in report.layers] == ["backbone.stage.0.mix", "backbone.stage.1.mix"]
    with pytest.raises(UsageError, match="something-new"):
        run(model, tmp_path / "other", {"scheme": "int4-g32-sym", "method": "gptq"})


def test_a_nan_in_a_weight_ends_the_run_with_its_name(make_model, tmp_path):
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(make_model(), model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        QtoolError, match=r"`model\.layers\.1\.mlp\.up_proj\.weight` has 1 NaN or infinite values of 8192"
    ):
        run(model, tmp_path / "out", {"scheme": "int4-g32-sym", "method": "rtn"})
    assert not (tmp_path / "out").exists()
