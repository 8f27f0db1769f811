"""Training of what was rounded: it starts where the method ended, trains what is packed, and can be killed anywhere."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.writer import StagedOutput, partial_path
from qtool.errors import QtoolError, TrainingError, UsageError
from qtool.finishing import FINISHES, end_to_end, get_finish, held_out_of
from qtool.finishing.blockwise import alignment
from qtool.finishing.end_to_end import EndToEndFinish
from qtool.finishing.linear import AdaptedLinear, CodedLinear, LatentLinear, MergedLinear
from qtool.formats.adapter import Adapted
from qtool.formats.weights import Weights
from qtool.gguf.checkpoint import open_checkpoint
from qtool.job import prepare
from qtool.methods import METHODS
from qtool.numerics.grid import grid_of
from qtool.pipeline import MANIFEST, RunOptions, quantize
from qtool.recipe import build
from qtool.scheme import EXAMPLES, FLOATS, QuantScheme
from qtool.transforms import TRANSFORMS

SCHEMES = [name for name in EXAMPLES if name not in FLOATS]
QUICK = {"epochs": 6, "batch": 4}  # of the tiny models here


def quiet(*_: object) -> None:
    """A progress callback that says nothing."""


def tree_of(text: Path, *finish: str, **changes: Any) -> dict[str, Any]:
    tree = {"scheme": "int3-g32-sym", "method": "rtn", "finish": list(finish), **{name: dict(QUICK) for name in finish}}
    return {**tree, "data": {"source": str(text), "rows": 24, "seqlen": 32}, **changes}


def run(model: Path, out: Path, tree: dict[str, Any], progress: Any = quiet, force: bool = False) -> Any:
    job = prepare(str(model), build(tree, [*METHODS, *TRANSFORMS, *FINISHES]))
    return quantize(job, out, RunOptions(device="cpu", force=force), progress)[0]


def files(folder: Path) -> dict[str, bytes]:
    """The bytes of every file but the manifest, which holds times."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST}


def losses(report: Any, finish: str) -> list[tuple[float, float]]:
    """For each curve of a finish its first and its kept held-out loss."""
    curves = [tree for tree in report.training if tree["finish"] == finish]
    return [(tree["held_out"][0][1], dict(tree["held_out"])[tree["best_step"]]) for tree in curves]


class Killed(BaseException):
    """Stands in for a process that is gone."""


# --- linears ------------------------------------------------------------------------------------------------------


def quantized(scheme: str) -> tuple[Any, Any, torch.Tensor]:
    weight_OI = 0.05 * torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    grid = grid_of(QuantScheme.parse(scheme), torch.float32)
    return grid.nearest(weight_OI, grid.fit(weight_OI)), grid, weight_OI


@pytest.mark.parametrize("scheme", SCHEMES)
def test_linears_begin_with_the_weight_that_they_are_given(scheme: str) -> None:
    """Latent weights between the grid and the float weight are in the cells of their codes, on every grid."""
    weight, grid, weight_OI = quantized(scheme)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    elsewhere = weight_OI + 0.1 * torch.randn(weight_OI.shape, generator=torch.Generator().manual_seed(2))
    for linear in (
        CodedLinear(weight, grid, None),
        LatentLinear(weight, grid, None, weight_OI),
        LatentLinear(weight, grid, None, elsewhere),  # as error feedback leaves them: far from their codes
        MergedLinear(weight, grid, None, weight_OI, 4),
        AdaptedLinear(weight, grid, None, 4),
    ):
        assert torch.equal(linear.result().dequantize(), weight.dequantize()), type(linear)
        assert torch.equal(linear(x), torch.nn.functional.linear(x, weight.dequantize()))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", [CodedLinear, LatentLinear, MergedLinear])
def test_after_steps_the_result_is_what_it_computes_with(scheme: str, kind: Any) -> None:
    weight, grid, weight_OI = quantized(scheme)
    linear = kind(weight, grid, None, *({LatentLinear: (weight_OI,), MergedLinear: (weight_OI, 4)}.get(kind, ())))
    optimizer = torch.optim.Adam([*linear.of_weights, *linear.of_scales], lr=0.3)
    x = torch.randn(16, 256, generator=torch.Generator().manual_seed(1))
    for _ in range(8):
        optimizer.zero_grad()
        (linear(x) - x @ weight_OI.T.roll(1, 0)).square().mean().backward()
        optimizer.step()
    result = linear.result()
    assert torch.equal(linear.weight(), result.dequantize())
    parts = zip(result.tensors(), weight.tensors(), strict=True)
    moved = [not torch.equal(a.float(), b.float()) for a, b in parts]
    assert any(moved)
    assert kind is not CodedLinear or torch.equal(result.codes, weight.codes)


def test_adapter_is_the_sum() -> None:
    weight, grid, _ = quantized("int4-g32-sym")
    linear = AdaptedLinear(weight, grid, None, 4)
    torch.nn.init.normal_(linear.up_OR)
    kept = linear.adapter()
    x = torch.randn(3, 256)
    expected = x @ (weight.dequantize() + kept["lora_B.weight"] @ kept["lora_A.weight"]).T
    assert torch.allclose(linear(x), expected, atol=1e-5)


def test_a_merged_change_is_rounded_alike_in_every_precision() -> None:
    """Autocast would multiply A and B in bfloat16, and a code near a border would be another one in the file."""
    weight, grid, weight_OI = quantized("int4-g32-sym")
    linear = MergedLinear(weight, grid, None, weight_OI, 4)
    torch.nn.init.normal_(linear.up_OR, std=10.0)
    with torch.autocast("cpu", torch.bfloat16):
        trained_OI = linear.weight()
    assert torch.equal(trained_OI, linear.result().dequantize())


def test_held_out_rows_are_spread_and_not_trained_on() -> None:
    held_out, learned = held_out_of(32, None)
    assert held_out == [8, 24]
    assert sorted(held_out + learned) == list(range(32))
    assert held_out_of(1, None) == ([], [0])
    assert held_out_of(3, 10) == ([0, 2], [1])


# --- whole runs ---------------------------------------------------------------------------------------------------


def test_block_training_comes_closer_to_the_float_block(make_model, calibration_text, tmp_path):
    model = make_model()
    tree = tree_of(calibration_text, "block")
    tree["block"] |= {"lr": 0.02, "scale_lr": 0.002, "epochs": 8}
    report = run(model, tmp_path / "out", tree)
    assert len(losses(report, "block")) == 2
    assert all(after < 0.98 * before for before, after in losses(report, "block")), losses(report, "block")
    assert all(tree["alignment"]["max_difference"] <= 1e-5 * tree["alignment"]["rms"] for tree in report.training)
    plain = run(model, tmp_path / "plain", tree_of(calibration_text))
    assert losses(plain, "block") == []


@pytest.mark.parametrize("finish", ["scales", "full", "lora"])
def test_training_end_to_end_lowers_the_divergence(make_model, calibration_text, tmp_path, finish):
    model = make_model()
    report = run(model, tmp_path / "out", tree_of(calibration_text, finish))
    ((before, after),) = losses(report, finish)
    assert after < 0.98 * before
    (curve,) = report.training
    assert curve["alignment"]["max_difference"] <= 1e-4 * curve["alignment"]["rms"]
    run(model, tmp_path / "plain", tree_of(calibration_text))
    last = tree_of(calibration_text, finish)
    last[finish] |= {"held_out": 0, "lr": 0.05}  # the last state is kept, be it better or not
    run(model, tmp_path / "out", last, force=True)
    sources = [Weights(Checkpoint(tmp_path / name)) for name in ("out", "plain")]
    codes = [[source.read_packed(module).codes for module in source.schemes] for source in sources]
    assert len(codes[0]) == 14
    assert all(torch.equal(a, b) for a, b in zip(*codes, strict=True)) == (finish == "scales")
    norms = [source.read([name for name in source.dense if "norm" in name]) for source in sources]
    assert any(not torch.equal(norms[0][n], norms[1][n]) for n in norms[0]) == (finish != "lora")


@pytest.mark.parametrize(
    ("scheme", "changes"),
    [
        ("nvfp4", {}),
        ("mxfp4", {}),
        ("w8a8-static", {}),
        ("fp8-block", {}),
        ("int3-g32-sym+outliers-1%", {}),
        ("nf4-dq", {}),
        ("llm-int8", {}),
        ("w4a16-g32", {"kv": "fp8", "method": "gptaq", "transforms": ["awq"]}),
        ("w4a16-g32-asym", {"format": "gptq"}),
        ("q4_0", {}),
    ],
)
def test_every_kind_of_scheme_is_trained_as_it_is_packed(make_model, calibration_text, tmp_path, scheme, changes):
    """The run itself compares what it trained with what it wrote; here that the differences are those of rounding."""
    model = make_model(hidden_size=128, intermediate_size=128) if scheme == "fp8-block" else make_model()
    tree = tree_of(calibration_text, "block", "scales", scheme=scheme, **changes)
    tree["block"]["epochs"] = tree["scales"]["epochs"] = 1
    report = run(model, tmp_path / "out", tree)
    assert [curve["finish"] for curve in report.training] == ["block", "block", "scales"]
    assert all(after <= before for name in ("block", "scales") for before, after in losses(report, name))
    for curve in report.training:  # a value near a border may be rounded the other way
        assert curve["alignment"]["max_difference"] <= 0.05 * curve["alignment"]["rms"]


def test_a_model_with_rounded_inputs_is_trained_again(make_model, calibration_text, tmp_path):
    """Its blocks round their inputs before anything is trained, and go on doing so while it is."""
    run(make_model(), tmp_path / "w8a8", tree_of(calibration_text, scheme="w8a8"))
    tree = tree_of(calibration_text, "block", scheme="w4a16-g32", requantize=True)
    tree["block"]["epochs"] = 1
    report = run(tmp_path / "w8a8", tmp_path / "out", tree)
    assert all(curve["alignment"]["max_difference"] <= 1e-5 * curve["alignment"]["rms"] for curve in report.training)


def test_an_adapter_is_kept_beside_the_weights(make_model, calibration_text, tmp_path):
    model = make_model()
    tree = tree_of(calibration_text, "lora")
    tree["lora"] |= {"merge": False, "rank": 4, "epochs": 4}
    report = run(model, tmp_path / "out", {**tree, "eval": {"data": {"source": str(calibration_text), "seqlen": 32}}})
    plain = run(
        model, tmp_path / "plain", {**tree_of(calibration_text), "eval": tree_of(calibration_text)["data"]["source"]}
    )
    folder = tmp_path / "out" / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 4)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    assert tensors[name].shape == (4, Weights(Checkpoint(model)).shapes["model.layers.0.mlp.down_proj.weight"][1])
    packed = [load_file(tmp_path / x / "model.safetensors") for x in ("out", "plain")]
    assert all(torch.equal(packed[0][n], packed[1][n]) for n in packed[0])
    merged = Adapted(Weights(Checkpoint(tmp_path / "out")), folder).read(["model.layers.0.mlp.down_proj.weight"])
    dense = Weights(Checkpoint(tmp_path / "out")).read(list(merged))
    change = tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
    assert all(torch.equal(merged[x], dense[x] + change) for x in merged)
    assert change.abs().max() > 0
    verdicts = [x.evaluation["comparison"]["kl"]["value"] for x in (report, plain)]
    assert verdicts[0] < verdicts[1]  # of the weights with the adapter
    assert "adapter/adapter_config.json" in json.loads((tmp_path / "out" / MANIFEST).read_text())["files"][0]["name"]


def test_an_adapter_of_transposed_linears(make_model, calibration_text, tmp_path):
    """GPT-2 stores [in, out]: the run itself compares what it trained with what the files and the adapter compute."""
    tree = tree_of(calibration_text, "lora")
    tree["lora"] |= {"merge": False, "lr": 0.3, "held_out": 0}
    report = run(make_model("gpt2"), tmp_path / "out", tree)
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"]
    tensors = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for tensor in tensors.values())
    (curve,) = report.training
    assert curve["alignment"]["max_difference"] <= 1e-4 * curve["alignment"]["rms"]


def test_two_processes_finish_as_one_does(make_model, calibration_text, tmp_path):
    """Scales and an adapter, under torchrun: the losses are those of one process, and so is what is written."""
    tree = tree_of(calibration_text, "scales", "lora")
    for name in ("scales", "lora"):
        tree[name] |= {"epochs": 2, "held_out": 3}
    tree["lora"] |= {"merge": False, "lr": 0.1}
    one = run(make_model(), tmp_path / "one", tree)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(tree))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "qtool", "quantize", str(make_model()), "--recipe", str(recipe), "--json",
               "-o", str(tmp_path / "two"), "--device", "cpu"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)
    for ours, theirs in zip(one.training, two["training"], strict=True):
        for a, b in zip(ours["held_out"], theirs["held_out"], strict=True):
            assert a == pytest.approx(b, rel=1e-3)
        assert theirs["alignment"]["max_difference"] <= 1e-4 * theirs["alignment"]["rms"]
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        tensors = [load_file(tmp_path / folder / name) for folder in ("one", "two")]
        for key, tensor in tensors[0].items():  # sums in another order: few scales round the other way
            same = torch.isclose(tensor.float(), tensors[1][key].float(), rtol=1e-2, atol=1e-4)
            assert same.float().mean() > 0.98, (key, float(same.float().mean()))


def test_an_output_with_an_adapter_is_up_to_date_and_can_be_replaced(make_model, calibration_text, tmp_path):
    model, tree = make_model(), tree_of(calibration_text, "lora")
    tree["lora"] |= {"merge": False, "rank": 2, "epochs": 1}
    run(model, tmp_path / "out", tree)
    before = files(tmp_path / "out")
    job = prepare(str(model), build(tree, [*METHODS, *TRANSFORMS, *FINISHES]))
    assert quantize(job, tmp_path / "out", RunOptions(device="cpu"), quiet)[1]
    run(model, tmp_path / "out", tree, force=True)
    assert files(tmp_path / "out") == before


def test_layers_that_stay_floats_are_not_trained(make_model, calibration_text, tmp_path):
    layers = {"*.o_proj": "f32", "*.down_proj": "f16"}
    tree = tree_of(calibration_text, "block", "scales", scheme="q4_0", layers=layers)
    model = make_model()
    run(model, tmp_path / "out", tree)
    sources = [Weights(open_checkpoint(path)) for path in (model, tmp_path / "out" / "model.gguf")]
    for name, close in (("self_attn.o_proj", 0.0), ("mlp.down_proj", 2.0**-11)):
        weights = [
            source.read([f"model.layers.1.{name}.weight"])[f"model.layers.1.{name}.weight"] for source in sources
        ]
        assert torch.allclose(*weights, rtol=close, atol=1e-7)


def test_how_memory_is_saved_is_no_part_of_the_recipe(make_model, calibration_text, tmp_path):
    """A run that was too large for the memory goes on in smaller parts."""
    model, tree = make_model(), tree_of(calibration_text, "scales")

    def killing(stage: str, done: int, total: int, detail: str) -> None:
        if stage == "train scales" and done:
            raise Killed

    with pytest.raises(Killed):
        run(model, tmp_path / "out", tree, killing)
    tree["scales"] |= {"accumulate": 2, "recompute": False}
    report = run(model, tmp_path / "out", tree)
    assert report.resumed_units > 0


def test_qat_is_gptaq_with_its_finishes(make_model, calibration_text, tmp_path):
    options = {"block": QUICK, "scales": QUICK}
    short = run(make_model(), tmp_path / "a", {**tree_of(calibration_text), **options, "method": "qat"})
    long = run(make_model(), tmp_path / "b", tree_of(calibration_text, "block", "scales", method="gptaq"))
    assert short.finish == long.finish == ["block", "scales"]
    assert files(tmp_path / "a") == files(tmp_path / "b")


# --- killed and resumed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", ["train model.layers.1", "train scales 0", "train scales 6", "result", "unit", "done"])
def test_interrupted_anywhere_it_ends_with_the_same_bytes(make_model, calibration_text, tmp_path, monkeypatch, stop):
    model, tree = make_model(), tree_of(calibration_text, "block", "scales")
    tree["scales"] |= {"evaluate_every": 3}
    run(model, tmp_path / "whole", tree)
    out = tmp_path / "out"

    def killing(stage: str, done: int, total: int, detail: str) -> None:
        if f"{stage} {done}".startswith(stop):
            raise Killed

    def killed_before(function: Any, count: int) -> Any:
        calls = []

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == count:
                raise Killed
            return function(*args, **kwargs)

        return wrapper

    with monkeypatch.context() as patch:
        if stop == "result":  # trained, but the result is not kept yet
            patch.setattr(EndToEndFinish, "_save", killed_before(EndToEndFinish._save, 1))
        elif stop == "unit":  # the scales of one block are in their places, those of the other are not
            patch.setattr(EndToEndFinish, "_apply_unit", killed_before(EndToEndFinish._apply_unit, 3))
        elif stop == "done":
            patch.setattr(StagedOutput, "publish", killed_before(StagedOutput.publish, 1))
        with pytest.raises(Killed):
            run(model, out, tree, killing)
    assert not out.exists()
    assert partial_path(out).exists()
    run(model, out, tree)
    assert files(out) == files(tmp_path / "whole")


def test_an_exploding_run_stops_and_keeps_its_last_checkpoint(make_model, calibration_text, tmp_path):
    out, tree = tmp_path / "out", tree_of(calibration_text, "full")
    tree["full"] |= {"lr": 1e30, "scale_lr": 1e30, "epochs": 40, "clip": 0.0, "warmup": 0.0, "checkpoint_every": 1}
    with pytest.raises(TrainingError, match="training stopped at step"):
        run(make_model(), out, tree)
    assert not out.exists()
    assert list((partial_path(out) / "scratch" / "full" / "training").glob("*"))


# --- what is refused ----------------------------------------------------------------------------------------------


def refused(model: Path, tree: dict[str, Any]) -> str:
    with pytest.raises(UsageError) as raised:
        prepare(str(model), build(tree, [*METHODS, *TRANSFORMS, *FINISHES]))
    return raised.value.message


def test_what_cannot_be_is_said_before_any_work(make_model, calibration_text):
    model = make_model()
    assert "it comes first" in refused(model, tree_of(calibration_text, "scales", "block"))
    assert "given twice" in refused(model, tree_of(calibration_text, "block", "block"))
    assert "unknown finish `bloc`" in refused(model, {**tree_of(calibration_text), "finish": ["bloc"]})
    assert "`block.lrr`" in refused(model, tree_of(calibration_text, "block", block={"lrr": 1}))
    assert "lr=0" in refused(model, tree_of(calibration_text, "block", block={"lr": 0}))
    assert "hidden states" in refused(model, tree_of(calibration_text, "scales", scales={"hidden": 1.0}))
    assert "trains on rows of text" in refused(model, tree_of(calibration_text, "block", stats="somewhere"))
    assert "keeps no codes" in refused(model, tree_of(calibration_text, "block", format="dense"))
    floats = {"scheme": "f16", "format": "gguf"}
    assert "nothing to train" in refused(model, tree_of(calibration_text, "scales", **floats))
    beside = tree_of(calibration_text, "lora", "scales")
    beside["lora"] |= {"merge": False}
    assert "does not know it" in refused(model, beside)


@pytest.mark.parametrize("name", FINISHES)
def test_options_are_checked(name: str) -> None:
    assert dataclasses.is_dataclass(get_finish(name, {"epochs": 3}))
    with pytest.raises(UsageError):
        get_finish(name, {"epochs": 0})
    with pytest.raises(UsageError):
        get_finish(name, {"precision": "fp17"})


def test_files_that_compute_something_else_are_an_error() -> None:
    trained = torch.randn(4, 8)
    assert alignment(trained, trained, "x") == {
        "max_difference": 0.0,
        "rms": pytest.approx(float(trained.square().mean().sqrt())),
    }
    with pytest.raises(QtoolError, match="not what is in the files"):
        alignment(trained, trained + 0.1, "x")
    with pytest.raises(QtoolError):
        alignment(trained, trained * torch.nan, "x")
    assert end_to_end  # the module that calls it for whole models
