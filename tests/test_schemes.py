"""Every scheme, transform and type of cache through whole runs: what is written, who reads it, and the same again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.writer import StagedOutput
from qtool.cli import run as cli
from qtool.errors import UsageError
from qtool.formats.weights import Weights
from qtool.job import prepare
from qtool.methods import METHODS
from qtool.models.blockwise import BlockModel
from qtool.pipeline import MANIFEST, RunOptions, quantize
from qtool.recipe import build
from qtool.transforms import TRANSFORMS

CPU = RunOptions(device="cpu")
COMPRESSED = [
    "w8a8", "w8a8-static", "w4a8-g32", "int8-tensor-sym+int8-token", "fp8", "fp8-dynamic", "fp8-block",
    "fp8-e4m3-channel", "nvfp4", "nvfp4a16", "mxfp4", "mxfp4a16", "mxfp8", "mxfp8a16",
]  # fmt: skip
BITSANDBYTES = ["nf4", "nf4-dq", "llm-int8"]
OWN = ["fp8-e5m2-channel", "int3-g64-sym+outliers-1%"]
WIDE = {"hidden_size": 128, "intermediate_size": 256}


def quiet(*_: object) -> None:
    """A progress callback that says nothing."""


def run(model: Path, out: Path, text: Path, **changes: Any) -> Any:
    tree = {"data": {"source": str(text), "rows": 24, "seqlen": 32}, "method": "rtn", **changes}
    return quantize(prepare(str(model), build(tree, [*METHODS, *TRANSFORMS])), out, CPU, quiet)[0]


def files(folder: Path) -> dict[str, bytes]:
    """The bytes of every file but the manifest, which holds times."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != MANIFEST}


def tokens(rows: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(2, 300, (rows, length), generator=torch.Generator().manual_seed(0))


class InBfloat16(Weights):
    """Weights as a reader has them that makes bfloat16 of them."""

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        return {name: tensor.bfloat16().float() for name, tensor in super().read(names).items()}


def our_logits(folder: Path, reader: type[Weights] = Weights) -> torch.Tensor:
    model = BlockModel(folder, reader(Checkpoint(folder)), torch.device("cpu"))
    stream = model.start([tokens()])
    for index in range(len(model.blocks)):
        with model.block(index) as block:
            stream.hidden[0] = model.run(block, index, stream, 0)
    with model.head() as head:
        return head(stream.hidden[0])


def their_logits(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of transformers, which makes weights of `dtype` when the model runs first, and then computes in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        model(tokens())
        torch.nn.Module.float(model)
        return model(tokens()).logits


def near(ours: torch.Tensor, other: torch.Tensor, share: float) -> None:
    gap, size = (ours - other).abs(), other.abs().max()
    assert gap.max() <= share * size, (
        f"max difference {gap.max() / size:.2e} of the largest, mean {gap.mean() / size:.2e}"
    )


# --- what others load ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", COMPRESSED)
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_transformers_computes_what_our_reader_computes(make_model, calibration_text, tmp_path, scheme, method):
    pytest.importorskip("compressed_tensors")
    report = run(make_model(**WIDE), tmp_path / "out", calibration_text, scheme=scheme, method=method)
    assert report.format == "compressed-tensors"
    assert {layer.scheme for layer in report.layers} == {report.scheme}
    out = tmp_path / "out"
    if scheme.startswith(("nv", "mx")):  # of which compressed-tensors 0.19 always makes bfloat16
        near(our_logits(out, InBfloat16), their_logits(out, torch.bfloat16), 1e-5)
    else:
        near(our_logits(out), their_logits(out), 1e-5)


@pytest.mark.parametrize("scheme", BITSANDBYTES)
def test_bitsandbytes_computes_what_our_reader_computes(make_model, calibration_text, tmp_path, scheme):
    pytest.importorskip("bitsandbytes")
    report = run(make_model(**WIDE), tmp_path / "out", calibration_text, scheme=scheme)
    assert report.format == "bitsandbytes"
    near(our_logits(tmp_path / "out"), their_logits(tmp_path / "out"), 4e-2)


@pytest.mark.parametrize("scheme", OWN)
def test_what_only_qtool_reads_has_nothing_that_others_mistake_for_weights(
    make_model, calibration_text, tmp_path, scheme
):
    model, out = make_model(**WIDE), tmp_path / "out"
    report = run(model, out, calibration_text, scheme=scheme)
    assert report.format == "qtool"
    assert report.readers.startswith("qtool")
    near(our_logits(out), our_logits(model), 0.7)
    assert not any(f"{layer.module}.weight" in Checkpoint(out).tensors for layer in report.layers)


@pytest.mark.parametrize("scheme", [*COMPRESSED, *BITSANDBYTES, *OWN])
def test_the_report_counts_the_bits_that_are_on_disk(make_model, calibration_text, tmp_path, scheme):
    report = run(make_model(tied=False, **WIDE), tmp_path / "out", calibration_text, scheme=scheme)
    written = Checkpoint(tmp_path / "out")
    kept = {k.name for k in report.kept}
    bits = 8 * sum(info.size_bytes for name, info in written.tensors.items() if name not in kept)
    weights = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
    # shapes, quant_maps and fixed scales of inputs come on top: a few hundred bytes for each layer
    expected = 8.5 if scheme == "w4a8-g32" else report.bits_per_weight  # its readers want each code in a byte
    assert expected <= bits / weights <= expected + 8 * 1400 * len(report.layers) / weights
    assert any("in bytes" in note or "on disk" in note for note in report.notes) == (scheme == "w4a8-g32")


# --- caches of keys and values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi3", "gpt_neox", "opt"])
@pytest.mark.parametrize("kv", ["fp8", "int8"])
def test_a_rounded_cache_is_written_read_and_felt(make_model, calibration_text, tmp_path, kind, kv):
    model = make_model(kind)
    plain, cached = tmp_path / "plain", tmp_path / "cached"
    run(model, plain, calibration_text, scheme="int8-channel-sym")
    report = run(model, cached, calibration_text, scheme="int8-channel-sym", kv=kv)
    assert report.kv == kv
    added = set(Checkpoint(cached).tensors) - set(Checkpoint(plain).tensors)
    assert len(added) == 4
    assert all(name.endswith(("k_scale", "v_scale")) for name in added)
    config = json.loads((cached / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert (config["num_bits"], config["type"]) == (8, {"fp8": "float", "int8": "int"}[kv])
    difference = (our_logits(plain) - our_logits(cached)).abs().max() / our_logits(plain).abs().max()
    assert 0 < difference < 0.2, difference


# --- transforms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transforms", [["smoothquant"], ["awq"], ["rotation"], ["bias-correction"],
                                        ["rotation", "awq"], ["smoothquant", "bias-correction"]])  # fmt: skip
@pytest.mark.parametrize("method", METHODS)
def test_transforms_go_with_every_method(make_model, calibration_text, tmp_path, transforms, method):
    model, out = make_model("qwen2"), tmp_path / "out"
    report = run(model, out, calibration_text, scheme="int4-g32-sym", method=method, transforms=transforms)
    assert report.transforms == transforms
    near(our_logits(out), their_logits(out), 1e-5)
    near(our_logits(out), our_logits(model), 1.0)
    changed = {k.name for k in report.kept if k.changed}
    assert changed, "a transform changes tensors that are not rounded, and the report says which"


@pytest.mark.parametrize("kind", ["gemma2", "gpt2"])
def test_a_transform_that_does_not_fit_is_named(make_model, calibration_text, tmp_path, kind):
    with pytest.raises(UsageError, match="llama") as raised:
        run(make_model(kind), tmp_path / "out", calibration_text, transforms=["rotation"])
    assert "rotation" in str(raised.value)
    assert not (tmp_path / "out").exists()


# --- the same again -----------------------------------------------------------------------------------------------

RUNS = {
    "static": {"scheme": "fp8"},
    "static gptq": {"scheme": "w8a8-static", "method": "gptq", "transforms": ["smoothquant"]},
    "awq gptq": {"scheme": "int4-g32-sym", "method": "gptq", "transforms": ["awq"]},
    "awq gptaq": {"scheme": "int4-g32-sym", "method": "gptaq", "transforms": ["awq"], "kv": "fp8"},
    "smoothquant gptaq": {"scheme": "w8a8", "method": "gptaq", "transforms": ["smoothquant"]},
    "rotation": {"scheme": "int4-g32-sym", "transforms": ["rotation"]},
    "nvfp4 gptaq": {"scheme": "nvfp4", "method": "gptaq"},
    "bias": {"scheme": "int4-g32-sym", "transforms": ["awq", "bias-correction"]},
    "outliers": {"scheme": "int3-g32-sym+outliers-1%", "method": "gptq"},
}


class Killed(BaseException):
    """Stands in for a process that is gone."""


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_interrupted_after_every_unit_it_ends_with_the_same_bytes(
    make_model, calibration_text, tmp_path, monkeypatch, changes
):
    model = make_model("qwen2")
    run(model, tmp_path / "whole", calibration_text, **changes)
    finish = StagedOutput.finish_unit

    def finish_and_die(self: StagedOutput, unit: str, record: dict[str, Any]) -> None:
        finish(self, unit, record)
        raise Killed

    monkeypatch.setattr(StagedOutput, "finish_unit", finish_and_die)
    for _ in range(10):
        try:
            report = run(model, tmp_path / "parts", calibration_text, **changes)
            break
        except Killed:
            continue
    assert report.resumed_units == 3
    whole, parts = files(tmp_path / "whole"), files(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert [name for name in whole if whole[name] != parts[name]] == []


@pytest.mark.parametrize("method", ["rtn", "gptq", "gptaq"])
@pytest.mark.parametrize("left", [["re:layers\\.0\\."], ["*o_proj", "re:mlp"]], ids=["a block", "all after attention"])
def test_what_is_left_alone_does_not_stop_the_rest(make_model, calibration_text, tmp_path, method, left):
    """A whole block, or all that comes after the keys and values: the rows still go through, and ranges are found."""
    model, ignore = make_model("qwen2"), ["*lm_head", "*embed*", "*norm*", *left]
    plain = {"scheme": "int4-g32-sym", "method": method, "ignore": ignore}
    run(model, tmp_path / "plain", calibration_text, **plain)
    run(model, tmp_path / "cached", calibration_text, kv="fp8", **plain)
    scales = [
        name for name in Checkpoint(tmp_path / "cached").tensors if name.endswith("_scale") and "weight" not in name
    ]
    assert len(scales) == 4
    near(our_logits(tmp_path / "plain"), their_logits(tmp_path / "plain"), 1e-5)


def test_a_head_with_rounded_inputs_rounds_them(make_model, calibration_text, tmp_path):
    out, ignore = tmp_path / "out", ["*embed*", "*norm*"]
    run(make_model(tied=False), out, calibration_text, scheme="w8a8", ignore=ignore)
    near(our_logits(out), their_logits(out), 1e-5)


def test_embeddings_are_not_packed_for_readers_that_want_them_whole(make_model, calibration_text, tmp_path):
    model, changes = make_model(tied=False), {"scheme": "int8-channel-sym", "ignore": ["*norm*"]}
    with pytest.raises(UsageError, match="embed_tokens` cannot be int8-channel-sym in this output: it is an embedding"):
        run(model, tmp_path / "out", calibration_text, format="compressed-tensors", **changes)
    report = run(model, tmp_path / "out", calibration_text, format="qtool", **changes)
    assert "model.embed_tokens" in {layer.module for layer in report.layers}
    near(our_logits(tmp_path / "out"), our_logits(model), 0.2)


def test_what_a_transform_did_or_could_not_do_is_told(make_model, calibration_text, tmp_path):
    model = make_model("llama")
    report = run(model, tmp_path / "bias", calibration_text, scheme="int4-g32-sym", transforms=["bias-correction"])
    assert "none of the 14 layers has a bias to correct" in report.notes
    report = run(model, tmp_path / "turned", calibration_text, scheme="int4-g32-sym", transforms=["rotation"])
    assert [k.name for k in report.kept if "was tied to the embedding" in k.reason] == ["lm_head.weight"]
    for transforms, told in ((["awq", "rotation"], "comes before `awq`"), (["awq", "awq"], "`awq` is given twice")):
        with pytest.raises(UsageError, match=told):
            run(model, tmp_path / "out", calibration_text, transforms=transforms)


def test_one_format_is_found_for_all_schemes(make_model, calibration_text, tmp_path):
    layers = {"*.down_proj": "int4-g32-sym"}
    report = run(make_model(), tmp_path / "out", calibration_text, scheme="nf4", layers=layers)
    assert report.format == "qtool"


SAVED = {
    "fp8": {"scheme": "fp8"},
    "nvfp4": {"scheme": "nvfp4"},
    "w8a8-static smoothquant": {"scheme": "w8a8-static", "transforms": ["smoothquant"]},
    "awq": {"scheme": "int4-g32-asym", "transforms": ["awq"]},
    "bias": {"scheme": "int3-g32-sym+outliers-1%", "transforms": ["smoothquant", "bias-correction"]},
    "cache": {"scheme": "mxfp4a16", "kv": "int8"},
    "both": {"scheme": "int4-channel-sym+int8-tensor", "transforms": ["awq", "smoothquant"], "kv": "fp8"},
}


@pytest.fixture(scope="module")
def saved(make_model, calibration_text, tmp_path_factory):
    out = tmp_path_factory.mktemp("stats") / "stats"
    arguments = [
        "--data",
        str(calibration_text),
        "--rows",
        "24",
        "--seqlen",
        "32",
        "--hessians",
        "-q",
        "--device",
        "cpu",
    ]
    assert cli(["calibrate", str(make_model("qwen2")), "-o", str(out), "--device", "cpu", *arguments]) == 0
    return out


@pytest.mark.parametrize("changes", SAVED.values(), ids=SAVED)
def test_saved_statistics_give_the_same_bytes_as_the_data(make_model, calibration_text, tmp_path, saved, changes):
    model = make_model("qwen2")
    run(model, tmp_path / "data", calibration_text, **changes)
    report = run(model, tmp_path / "saved", calibration_text, stats=str(saved), **changes)
    ours, others = files(tmp_path / "data"), files(tmp_path / "saved")
    assert [name for name in ours if ours[name] != others[name]] == []
    assert report.data["tokens"] == 24 * 32
    assert not any("saved statistics" in note for note in report.notes)


def test_error_feedback_on_saved_statistics_says_what_differs(make_model, calibration_text, tmp_path, saved):
    model = make_model("qwen2")
    changes = {"scheme": "int4-g32-sym", "method": "gptq"}
    run(model, tmp_path / "data", calibration_text, **changes)
    report = run(model, tmp_path / "saved", calibration_text, stats=str(saved), **changes)
    assert any("saved statistics" in note and "errors of the blocks before" in note for note in report.notes)
    assert files(tmp_path / "data") != files(tmp_path / "saved")
    first = [layer.output_error for layer in report.layers if ".0.self_attn." in layer.module]
    assert max(first) < 0.2


def test_an_added_transform_is_another_recipe(make_model, calibration_text, tmp_path):
    model, out = make_model(), tmp_path / "out"
    run(model, out, calibration_text, scheme="int4-g32-sym", transforms=["awq"])
    for changes in ({"transforms": ["smoothquant"]}, {"transforms": ["awq"], "awq": {"grid": 5}}, {"kv": "fp8"}):
        with pytest.raises(UsageError, match="was made otherwise"):
            run(model, out, calibration_text, **{"scheme": "int4-g32-sym", "transforms": ["awq"], **changes})


def test_shapes_that_a_scheme_cannot_store_are_all_named(make_model, calibration_text, tmp_path):
    with pytest.raises(UsageError, match="64 inputs are not a multiple of 128"):
        run(make_model(), tmp_path / "out", calibration_text, scheme="fp8-block")
    with pytest.raises(UsageError, match="cannot be nf4 in this output"):
        run(make_model(), tmp_path / "out", calibration_text, scheme="nf4", format="compressed-tensors")
    assert not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path)
