"""A whole run that ends in a GGUF file: the file holds what was solved, and it can be killed, resumed and repeated."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.checkpoint.writer import StagedOutput, partial_path
from qtool.cli import run as run_command
from qtool.errors import QtoolError, UsageError
from qtool.evaluation.evaluate import evaluate
from qtool.formats.weights import Weights
from qtool.gguf.checkpoint import GGUFCheckpoint, open_checkpoint
from qtool.job import prepare
from qtool.methods import METHODS
from qtool.pipeline import MANIFEST, RunOptions, quantize
from qtool.recipe import PROTOCOLS, DataSpec, EvalSpec, build
from qtool.solving import record
from qtool.solving.record import UnitRecord
from qtool.solving.unit import UnitWork
from qtool.transforms import TRANSFORMS
from tests.conftest import MakeModel

CPU = RunOptions(device="cpu")
KINDS: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen2": {"use_sliding_window": False}, "gemma2": {}, "gemma3_text": {}, "phi3": {},
    "gpt_neox": {"tied": False},
}  # fmt: skip
# Rows of 64 and 128 columns are no multiple of 256: what the mix q4_k_m makes of its types.
OF_64 = {"q4_k": "iq4_nl", "q6_k": "q5_1"}


def quiet(*_: object) -> None:
    """A progress callback that says nothing."""


def job_of(model: Path, tree: dict[str, Any]) -> Any:
    return prepare(str(model), build(tree, [*METHODS, *TRANSFORMS]))


def run(model: Path, out: Path, tree: dict[str, Any], options: RunOptions = CPU) -> tuple[Any, bool]:
    return quantize(job_of(model, tree), out, options, quiet)


def recipe_tree(text: Path, **changes: Any) -> dict[str, Any]:
    return {"scheme": "q4_k_m", "data": {"source": str(text), "rows": 24, "seqlen": 32}, **changes}


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    source = Weights(open_checkpoint(path))
    return source.read(source.shapes)


def file_of(out: Path) -> bytes:
    return (out / "model.gguf").read_bytes()


def types_of(out: Path) -> dict[str, str]:
    """The type of each tensor of a file, in lower case, by its Hugging Face name without `.weight`."""
    checkpoint = GGUFCheckpoint(out)
    return {
        name.removesuffix(".weight"): checkpoint.kinds.get(name, info.dtype.lower())
        for name, info in checkpoint.tensors.items()
    }


class Killed(BaseException):
    """Stands in for a process that is gone."""


# --- what is in the file ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(make_model: MakeModel, calibration_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`made(kind, method) -> (model, out, report, solved)`: a GGUF file by q4_k_m, and every weight that was solved."""

    @functools.cache
    def make(kind: str, method: str) -> tuple[Path, Path, Any, dict[str, torch.Tensor]]:
        model, out = make_model(kind, **KINDS[kind]), tmp_path_factory.mktemp(f"{kind}-{method}") / "out"
        solved: dict[str, torch.Tensor] = {}
        pack = UnitRecord.pack

        def noted(self: UnitRecord, linear: Any, weight: Any) -> None:
            solved[linear.source.name] = weight.dequantize().clone()
            pack(self, linear, weight)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(UnitRecord, "pack", noted)
            report, _ = run(model, out, recipe_tree(calibration_text, method=method))
        return model, out, report, solved

    return make


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_file_holds_what_was_solved_and_the_rest_as_it_was(made: Any, kind: str, method: str) -> None:
    model, out, report, solved = made(kind, method)
    source, written = weights_of(model), weights_of(out / "model.gguf")
    assert written.keys() == source.keys()
    assert {layer.module + ".weight" for layer in report.layers} == solved.keys()
    for name, weight in written.items():
        assert torch.equal(weight, solved.get(name, source[name])), name
        assert (name in solved) == (weight.dim() == 2)
    assert sorted(path.name for path in out.iterdir()) == [MANIFEST, "model.gguf"]
    assert report.bytes_after == GGUFCheckpoint(out).size_bytes
    assert set(types_of(out).values()) == {*OF_64.values(), "f32"}
    tables = [layer for layer in report.layers if ".layers." not in layer.module]
    assert all(("rounded to nearest" in " ".join(layer.notes)) == (method == "gptq") for layer in tables)


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_is_measured_beside_its_source(made: Any, calibration_text: Path, kind: str) -> None:
    model, out, _, _ = made(kind, "gptq")
    for protocol in PROTOCOLS:
        spec = EvalSpec(DataSpec(str(calibration_text), rows=6, seqlen=32), protocol)
        found = evaluate(out / "model.gguf", model, spec, "cpu", quiet).comparison
        assert found is not None
        assert 0 < found.kl.value < 0.3, protocol
        assert abs(found.relative_increase.value) < 0.3


def test_k_quants(make_model: MakeModel, calibration_text: Path, tmp_path: Path) -> None:
    """Widths of 256, where the mix is what its name says; GPTQ's codes change the model less than rounding's."""
    model = make_model(hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    divergence = {}
    for method in ("rtn", "gptq"):
        tree = recipe_tree(calibration_text, scheme="q4_k", method=method)
        tree["eval"] = {"data": {"source": str(calibration_text), "seqlen": 32, "rows": 8}}
        report, _ = run(model, tmp_path / method, tree)
        assert not [note for note in report.notes if "instead of" in note]
        divergence[method] = report.evaluation["comparison"]["kl"]["value"]
    assert divergence["gptq"] < divergence["rtn"]
    types = types_of(tmp_path / "gptq")
    block = {name.removeprefix("model.layers.0."): kind for name, kind in types.items()}
    assert block["self_attn.q_proj"] == block["mlp.up_proj"] == "q4_k"
    assert block["self_attn.v_proj"] == block["mlp.down_proj"] == types["model.embed_tokens"] == "q6_k"
    assert GGUFCheckpoint(tmp_path / "gptq").metadata["general.file_type"] == 15


def test_what_stays_unquantized(make_model: MakeModel, tmp_path: Path) -> None:
    """Vectors are float32 there, matrices stay in their type; masks and rotary frequencies are no part of a file."""
    model = tmp_path / "model"
    shutil.copytree(make_model("gpt_neox", tied=False), model)
    tensors = load_file(model / "model.safetensors")
    buffers = {
        "gpt_neox.layers.0.attention.bias": torch.ones((1, 1, 128, 128), dtype=torch.bool),
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
        "gpt_neox.layers.1.attention.rotary_emb.inv_freq": torch.ones(8),
    }
    save_file({**tensors, **buffers}, model / "model.safetensors", {"format": "pt"})
    report, _ = run(model, tmp_path / "out", {"scheme": "q8_0", "method": "rtn", "ignore": ["*.dense", "*embed*"]})
    left = {kept.name: kept.reason for kept in report.kept}
    assert left.keys() >= buffers.keys()
    types, written = types_of(tmp_path / "out"), weights_of(tmp_path / "out")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        if tensor.dim() == 1:
            assert types[name.removesuffix(".weight")] == "f32"
        elif name.endswith(".dense.weight") or "embed" in name:
            assert types[name.removesuffix(".weight")] == "bf16"
        else:
            assert types[name.removesuffix(".weight")] == "q8_0"
            continue
        assert torch.equal(written[name], tensor.float()), name


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_language_model_of_a_model_that_sees(make_model: MakeModel, tmp_path: Path, prefix: str) -> None:
    """Gemma 3 with a vision tower: names are other ones in its checkpoint than in that of the file."""
    model, plain = tmp_path / "model", make_model("gemma3_text")
    shutil.copytree(plain, model)
    tensors = load_file(model / "model.safetensors")
    nested = {name.replace("model.", prefix, 1): tensor for name, tensor in tensors.items()}
    nested["vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"] = torch.ones(64, 64)
    save_file(nested, model / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    config = {"model_type": "gemma3", "text_config": config, "vision_config": {}, "vocab_size": config["vocab_size"]}
    (model / "config.json").write_text(json.dumps(config))
    tree = {"scheme": "q8_0", "method": "rtn"}
    for folder, out in ((plain, tmp_path / "plain"), (model, tmp_path / "nested")):
        run(folder, out, tree)
    one, other = weights_of(tmp_path / "plain"), weights_of(tmp_path / "nested")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_head_in_the_files_of_a_tied_model_is_left_out(make_model: MakeModel, tmp_path: Path, kind: str) -> None:
    """Some checkpoints hold it all the same; llama.cpp uses the embedding."""
    model = tmp_path / "model"
    shutil.copytree(make_model(kind), model)
    tensors = load_file(model / "model.safetensors")
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file({**tensors, **head}, model / "model.safetensors", {"format": "pt"})
    report, _ = run(model, tmp_path / "out", {"scheme": "q6_k", "method": "rtn"})
    types = types_of(tmp_path / "out")
    assert "lm_head" not in types
    assert types["model.embed_tokens"] == "q5_1"
    assert "lm_head.weight" in {kept.name for kept in report.kept}


# --- the same bytes -----------------------------------------------------------------------------------------------

CHANGED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gptq": ("llama", {}, {"method": "gptq"}),
    "norms": ("llama", {}, {"method": "gptq", "transforms": ["awq"]}),
    "norms-plus-1": ("gemma2", {}, {"method": "gptq", "transforms": ["smoothquant"]}),
    "norms-plus-1-awq": ("gemma2", {}, {"method": "gptq", "transforms": ["awq"]}),
    "norms-plus-1-float32": ("gemma2", {"dtype": "float32"}, {"method": "gptq", "transforms": ["smoothquant"]}),
    "untied": ("llama", {}, {"method": "gptq", "transforms": ["rotation"]}),
    "gptaq": ("qwen2", {"use_sliding_window": False}, {"method": "gptaq", "transforms": ["smoothquant"]}),
    "biases": (
        "qwen2",
        {"use_sliding_window": False},
        {"method": "gptq", "transforms": ["smoothquant", "bias-correction"]},
    ),
    "joined": ("phi3", {}, {"method": "gptq", "transforms": ["awq"]}),
    "layer-norms": ("gpt_neox", {"tied": False}, {"method": "gptq", "transforms": ["awq", "bias-correction"]}),
}
SLOW = ("gptq", "norms", "norms-plus-1-awq", "norms-plus-1-float32", "joined", "layer-norms")


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CHANGED])
def changed(request: pytest.FixtureRequest, make_model: MakeModel, calibration_text: Path) -> tuple[Path, Any]:
    """A model, and a recipe that changes more of it than codes."""
    kind, overrides, tree = CHANGED[request.param]
    quick = {tree["method"]: {"scales": "minmax"}, "smoothquant": {"strength": 0.5}}
    return make_model(kind, **overrides), recipe_tree(calibration_text, scheme="q4_0", **quick, **tree)


def killed_after_every_unit(model: Path, out: Path, tree: dict[str, Any]) -> int:
    """A run in as many pieces as it has units; how many."""
    units, finish = len(job_of(model, tree).plan.units), StagedOutput.finish_unit

    def finish_and_die(self: StagedOutput, unit: str, record: dict[str, Any]) -> None:
        finish(self, unit, record)
        raise Killed

    for _ in range(units):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StagedOutput, "finish_unit", finish_and_die)
            with pytest.raises(Killed):
                run(model, out, tree)
        assert not out.exists()
    report, _ = run(model, out, tree)
    assert report.resumed_units == units
    assert not partial_path(out).exists()
    return units


def test_interrupted_after_every_unit_it_ends_with_the_same_bytes(changed: tuple[Path, Any], tmp_path: Path) -> None:
    model, tree = changed
    run(model, tmp_path / "whole", tree)
    assert killed_after_every_unit(model, tmp_path / "out", tree) == 3
    assert file_of(tmp_path / "out") == file_of(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_changed_tensors_are_what_the_blocks_after_them_saw(
    make_model: MakeModel, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Norms are float32 there, with an offset or without: what the file says is what the run went on with."""
    finished: dict[str, torch.Tensor] = {}
    finish = UnitRecord.finish

    def noted(self: UnitRecord, parameters: Any) -> None:
        finished.update({name: parameters[name].clone() for name in parameters.changed})
        finish(self, parameters)

    monkeypatch.setattr(UnitRecord, "finish", noted)
    quick = {"gptq": {"scales": "minmax"}, "smoothquant": {"strength": 0.5}}
    tree = recipe_tree(calibration_text, scheme="q4_0", transforms=["smoothquant"], **quick)
    model = make_model(kind)
    report, _ = run(model, tmp_path / "out", tree)
    written, source = weights_of(tmp_path / "out"), weights_of(model)
    assert len(finished) == 4  # two norms of each block feed linears
    assert {kept.name for kept in report.kept if kept.changed} == finished.keys()
    for name, value in finished.items():
        assert torch.equal(written[name], value), name
        assert not torch.equal(written[name], source[name])
        assert not torch.equal(value, value.bfloat16().float()), "rounded for nothing to the type of the source"


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_small_values_lose_bits_where_norms_have_an_offset(make_model: MakeModel, kind: str) -> None:
    job = job_of(make_model(kind), {"scheme": "q8_0", "method": "rtn"})
    name = "model.layers.0.input_layernorm.weight"
    values = 1e-5 * torch.randn(64, generator=torch.Generator().manual_seed(0))
    stored = job.as_stored(name, values)
    assert torch.equal(stored, (values + 1) - 1 if kind == "gemma2" else values)
    assert torch.equal(stored, values) == (kind == "llama")
    assert torch.equal(job.container.decode(name, job.container.encode(name, stored)), stored)


@pytest.mark.parametrize("saved", ["stats", "imatrix"])
def test_from_saved_statistics(make_model: MakeModel, calibration_text: Path, tmp_path: Path, saved: str) -> None:
    """Also interrupted; an imatrix weighs the columns when it is rounded to nearest."""
    from qtool.calibrate import CalibrateOptions
    from qtool.calibrate import prepare as prepare_calibration
    from qtool.calibrate import run as calibrate

    model, stats = make_model(), tmp_path / ("imatrix.gguf" if saved == "imatrix" else "stats")
    spec = DataSpec(str(calibration_text), rows=24, seqlen=32)
    calibrate(prepare_calibration(str(model), spec, saved == "stats", saved), stats, CalibrateOptions("cpu"), quiet)
    tree = {"scheme": "q4_0", "method": "rtn" if saved == "imatrix" else "gptq", "stats": str(stats)}
    report, _ = run(model, tmp_path / "whole", tree)
    assert types_of(tmp_path / "whole")["model.embed_tokens"] == "q5_1"
    killed_after_every_unit(model, tmp_path / "out", tree)
    assert file_of(tmp_path / "out") == file_of(tmp_path / "whole")
    plain, _ = run(model, tmp_path / "plain", {"scheme": "q4_0", "method": "rtn"})
    weighted = {layer.module: layer.weight_error for layer in report.layers}
    for layer in plain.layers:
        same = layer.module == "model.embed_tokens"
        assert (weighted[layer.module] == layer.weight_error) == same, layer.module


def test_same_recipe_same_bytes_and_another_is_refused(
    make_model: MakeModel, calibration_text: Path, tmp_path: Path
) -> None:
    model, out = make_model(shards=True), tmp_path / "out"
    tree = recipe_tree(calibration_text, scheme="q4_0")
    run(model, out, tree)
    run(model, tmp_path / "again", tree)
    assert file_of(out) == file_of(tmp_path / "again")
    before = (out / "model.gguf").stat().st_mtime_ns
    report, up_to_date = run(model, out, {**tree, "format": "gguf"})
    assert up_to_date
    assert report.layers
    assert (out / "model.gguf").stat().st_mtime_ns == before
    with pytest.raises(UsageError, match=r"recipe\.scheme was `q4_0` and is now `q8_0`"):
        run(model, out, {**tree, "scheme": "q8_0"})
    report, up_to_date = run(model, out, {**tree, "scheme": "q8_0"}, dataclasses.replace(CPU, force=True))
    assert not up_to_date
    assert set(types_of(out).values()) == {"q8_0", "f32"}
    assert not (tmp_path / "out.replaced").exists()
    (out / "model.gguf").write_bytes(b"short")
    with pytest.raises(UsageError, match="damaged"):
        run(model, out, {**tree, "scheme": "q8_0"})


def test_a_changed_tokenizer_is_another_source(make_model: MakeModel, tmp_path: Path) -> None:
    """It is part of the file."""
    model, tree = tmp_path / "model", {"scheme": "q8_0", "method": "rtn"}
    shutil.copytree(make_model(), model)
    run(model, tmp_path / "out", tree)
    config = model / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": "{{ messages }}"}))
    with pytest.raises(UsageError, match=r"source\.tokenizer_config\.json"):
        run(model, tmp_path / "out", tree)


@pytest.mark.parametrize(
    ("scheme", "format"), [("int4-g32-sym", "qtool"), ("int4-g32-sym", "dense"), ("q4_k", "gguf"), ("f16", "gguf")]
)
def test_large_embeddings_are_rounded_a_few_rows_at_a_time(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, format: str
) -> None:
    """To the same bytes as at once; 37 rows are no share of the vocabulary."""
    model = make_model(hidden_size=256, intermediate_size=256, num_hidden_layers=1, tied=False)
    tree = {"scheme": scheme, "method": "rtn", "format": format, "ignore": ["*norm*"]}
    if format == "qtool":  # which has no place for an embedding
        tree["ignore"] = ["*norm*", "*embed*"]
    run(model, tmp_path / "whole", tree)
    parts = []
    by_rows = UnitWork._solve_by_rows
    monkeypatch.setattr(record, "AT_ONCE", 37 * 256)
    monkeypatch.setattr(UnitWork, "_solve_by_rows", lambda self, name: (parts.append(name), by_rows(self, name)))
    run(model, tmp_path / "parts", tree)
    assert {"lm_head", "model.embed_tokens"} - set(parts) == ({"model.embed_tokens"} if format == "qtool" else set())
    for path in (tmp_path / "whole").iterdir():
        assert path.name == MANIFEST or path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes(), path.name
    reports = [json.loads((tmp_path / name / MANIFEST).read_text())["report"] for name in ("whole", "parts")]
    for one, other in zip(*(report["layers"] for report in reports), strict=True):
        assert one["weight_error"] == pytest.approx(other["weight_error"], rel=1e-5)


# --- what is asked for --------------------------------------------------------------------------------------------


@pytest.fixture
def plain(make_model: MakeModel, tmp_path: Path) -> Callable[..., dict[str, str]]:
    """`plain(*arguments, model=...) -> types`: the types in the file that `qtool quantize` by rtn makes."""

    def make(*arguments: str, model: Path | None = None) -> dict[str, str]:
        command = ["quantize", str(model or make_model()), "-o", str(tmp_path / "out"), "--method", "rtn", "-q"]
        assert run_command([*command, *arguments]) == 0
        return types_of(tmp_path / "out")

    return make


def test_embeddings_can_be_left_alone(make_model: MakeModel, plain: Any) -> None:
    """A mix rounds them; asked to, by the very pattern that other schemes ignore by themselves, it does not."""
    for pattern in ("*embed*", "*embed_tokens"):
        types = plain("--scheme", "q8_0", "--ignore", pattern, "--force")
        assert types.pop("model.embed_tokens") == "bf16"
        assert set(types.values()) == {"q8_0", "f32"}
    types = plain("--scheme", "q8_0", "--ignore", "*lm_head", "--force", model=make_model(tied=False))
    assert (types["lm_head"], types["model.embed_tokens"]) == ("bf16", "q8_0")
    job = job_of(make_model(tied=False), {"scheme": "q8_0", "method": "rtn", "ignore": ["*o_proj", "*embed*"]})
    assert {kept.source.name for kept in job.plan.kept if len(kept.source.shape) == 2} == {
        "model.embed_tokens.weight", *(f"model.layers.{i}.self_attn.o_proj.weight" for i in range(2))
    }  # fmt: skip


def test_layers_can_have_types_of_their_own(make_model: MakeModel, plain: Any, capsys: Any) -> None:
    model = make_model(hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    layers = ["--layer", "*embed_tokens=q8_0", "--layer", "*.down_proj=q6_k", "--layer", "*.o_proj=f16"]
    types = plain("--scheme", "q4_k_m", *layers, model=model)
    assert types["model.embed_tokens"] == "q8_0"
    assert types["model.layers.0.mlp.down_proj"] == "q6_k"
    assert types["model.layers.0.self_attn.o_proj"] == "f16"
    assert types["model.layers.0.self_attn.q_proj"] == "q4_k"
    capsys.readouterr()
    plain("--scheme", "q6_k", "--layer", "*_proj=q8_0", "--force")
    assert capsys.readouterr().err == "warning: q5_1 instead of q6_k: 64 inputs are not a multiple of 256\n"
    plain("--scheme", "q6_k", "--layer", "*=q8_0", "--force")  # nothing is left of what the mix cannot have
    assert capsys.readouterr().err == ""


def test_schemes_and_mixes_of_one_name(plain: Any) -> None:
    """`mxfp4a16` is a scheme that leaves embeddings alone, `mxfp4` in GGUF a mix that does not."""
    types = plain("--scheme", "mxfp4a16", "--format", "gguf")
    assert (types["model.embed_tokens"], types["model.layers.0.mlp.up_proj"]) == ("bf16", "mxfp4")
    types = plain("--scheme", "mxfp4", "--format", "gguf", "--force")
    assert (types["model.embed_tokens"], types["model.layers.0.mlp.up_proj"]) == ("q8_0", "mxfp4")
    assert plain("--format", "gguf", "--force") == plain("--scheme", "q4_k", "--force")  # q4_k_m, by its alias
    assert set(plain("--scheme", "BF16", "--force").values()) == {"bf16", "f32"}


def test_a_head_that_a_rotation_unties_is_what_the_mix_says(make_model: MakeModel, plain: Any) -> None:
    tied = plain("--scheme", "q4_k_m", "--transform", "rotation")
    untied = plain("--scheme", "q4_k_m", "--transform", "rotation", "--force", model=make_model(tied=False))
    assert tied == untied
    assert (tied["lm_head"], tied["model.embed_tokens"]) == (OF_64["q6_k"], OF_64["q4_k"])
    kept = plain("--scheme", "q4_k_m", "--transform", "rotation", "--ignore", "*lm_head", "--force")
    assert kept["lm_head"] == "bf16"


# --- errors -------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[str, str, str, str]] = {  # model, what is typed, the beginning of the error, part of the hint
    "kv": ("llama", "--scheme q4_k_m --kv fp8", "gguf has no place for how keys and values", "leave --kv out"),
    "not-a-type": ("llama", "--scheme int4-g32-sym --format gguf", "int4-g32-sym is not a type", "`--scheme q4_k_m`"),
    "activations": ("llama", "--scheme w8a8 --format gguf", "int8-channel-sym+int8-token is not a type", "q8_0"),
    "mix-as-awq": ("llama", "--scheme q4_k_m --format awq", "`q4_k_m` is a mix of llama.cpp's", "`--format gguf`"),
    "mix-as-dense": ("llama", "--scheme q4_k --format dense", "`q4_k_m` is a mix of llama.cpp's", "`--format gguf`"),
    "layer": (
        "llama", "--scheme q4_k_m --layer *.down_proj=int8-channel-sym",
        "`model.layers.0.mlp.down_proj` cannot be int8-channel-sym in this output", "another scheme",
    ),
    "width": (
        "llama", "--scheme q4_k_m --layer *.down_proj=q6_k",
        "`model.layers.0.mlp.down_proj.weight` cannot use q6_k: 128 inputs are not a multiple of 256",
        "`--layer '*.down_proj=q8_0'`",
    ),
    "two-formats": (
        "llama", "--scheme int4-g32-sym --layer *.down_proj=q8_0", "no format stores int4-g32-sym and q8_0", "dense"
    ),
    "strict": ("llama", "--scheme q4_k_m --strict", "--strict: q5_1 instead of q6_k", "--layer"),
    "architecture": ("opt", "--scheme q4_k_m", "qtool cannot write the architecture `opt` for llama.cpp", "llama, "),
    "transposed": ("gpt2", "--scheme q4_k_m", "qtool cannot write the architecture `gpt2` for llama.cpp", "llama, "),
    "tokenizer": ("lowercase", "--scheme q8_0", "the tokenizer has the normalizer Lowercase", ""),
    "cut-off": ("cut-off", "--scheme q8_0", "model/model.safetensors is truncated or not a safetensors file", "again"),
    "misnamed": ("misnamed", "--scheme q8_0", "llama.cpp has no place for `model.layers.0.mlp.extra.weight`", ""),
    "no-rotation": ("gemma2", "--scheme q8_0 --transform rotation", "model cannot take `rotation`", "leave"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_said_in_a_line(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, case: str
) -> None:
    kind, typed, message, hint = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(make_model(kind if kind in ("opt", "gpt2", "gemma2") else "llama"), "model")
    weights = Path("model/model.safetensors")
    if kind == "lowercase":
        tokenizer = json.loads(Path("model/tokenizer.json").read_text())
        tokenizer["normalizer"] = {"type": "Lowercase"}
        Path("model/tokenizer.json").write_text(json.dumps(tokenizer))
    elif kind == "cut-off":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif kind == "misnamed":
        extra = {"model.layers.0.mlp.extra.weight": torch.ones(32, 64)}
        save_file({**load_file(weights), **extra}, weights, {"format": "pt"})
    capsys.readouterr()
    code = run_command(["quantize", "model", "-o", "out", "--method", "rtn", *typed.split()])
    out, err = capsys.readouterr()
    assert code == (1 if kind == "cut-off" else 2)
    first, *rest = (line for line in err.splitlines() if not line.startswith("identify"))
    assert out == ""
    assert first.startswith(f"error: {message}")
    assert hint in "".join(rest)
    assert len(rest) == (2 if hint else len(rest) and 2)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_output_is_a_folder(make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["quantize", str(make_model()), "-o", str(tmp_path / "x.gguf"), "--scheme", "q4_k_m"]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'x.gguf'} is the name of a file, but the output is a folder\n\n"
        f"hint: `-o {tmp_path / 'x'}`\n"
    )
    assert not list(tmp_path.iterdir())


def test_a_full_disk_and_bad_weights_leave_nothing(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tree = tmp_path / "model", {"scheme": "q8_0", "method": "rtn"}
    shutil.copytree(make_model(), model)
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=50_000))
        with pytest.raises(QtoolError, match=r"no space for .*out: it needs 0\.00 GB, 0\.00 GB are free"):
            run(model, tmp_path / "out", tree)
    tensors = load_file(model / "model.safetensors")
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"):
        bad = {**tensors, name: tensors[name].clone()}
        bad[name].view(-1)[5] = float("nan")
        save_file(bad, model / "model.safetensors", {"format": "pt"})
        with pytest.raises(QtoolError, match=f"`{name}` has 1 NaN or infinite values of {bad[name].numel()}"):
            run(model, tmp_path / "out", tree)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_reads_back_otherwise_is_an_error(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qtool.formats.gguf import GGUF

    pack = GGUF.pack

    def faulty(self: GGUF, module: str, weight: Any, dtype: str) -> dict[str, torch.Tensor]:
        tensors = pack(self, module, weight, dtype)
        if module.endswith("1.mlp.up_proj"):
            tensors[module + ".weight"][3, 4] ^= 1
        return tensors

    monkeypatch.setattr(GGUF, "pack", faulty)
    with pytest.raises(QtoolError, match=r"model\.layers\.1\.mlp\.up_proj` does not unpack to what was solved"):
        run(make_model(), tmp_path / "out", {"scheme": "q8_0", "method": "rtn"})
    assert not list(tmp_path.iterdir())


# --- before any work ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_a_dry_run_tells_sizes_readers_and_what_is_otherwise(
    made: Any, calibration_text: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out, report, _ = made(kind, "gptq")
    capsys.readouterr()
    command = ["quantize", str(model), "--scheme", "q4_k_m", "--data", str(calibration_text), "--dry-run"]
    assert run_command([*command, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["format"] == "gguf"
    assert plan["readers"] == report.readers == "llama.cpp, Ollama, LM Studio"
    assert plan["bytes_after"] == report.bytes_after == GGUFCheckpoint(out).size_bytes
    assert plan["bits_per_weight"] == report.bits_per_weight
    assert {(layer["scheme"], layer["layers"]) for layer in plan["layers"]}
    assert "iq4_nl instead of q4_k: 64 inputs are not a multiple of 256" in plan["notes"]
    assert any("no sliding window" in note for note in plan["notes"]) == (kind == "phi3")
    assert set(plan["notes"]) <= set(report.notes)
    assert run_command(command) == 0
    shown = capsys.readouterr().out
    assert all(note in shown for note in plan["notes"])


# --- GGUF files in ------------------------------------------------------------------------------------------------


def test_a_dense_file_is_a_model_like_any_other(make_model: MakeModel, calibration_text: Path, tmp_path: Path) -> None:
    """Its weights, norms and tokens are those of the folder that it was made from; so are the codes."""
    model = make_model("gemma2", dtype="float16")
    run(model, tmp_path / "f16", {"scheme": "f16", "method": "rtn"})
    quick = {"gptq": {"scales": "minmax"}, "smoothquant": {"strength": 0.5}}
    tree = recipe_tree(calibration_text, scheme="q4_0", transforms=["smoothquant"], **quick)
    run(model, tmp_path / "one", tree)
    report, _ = run(tmp_path / "f16" / "model.gguf", tmp_path / "other", tree)
    assert report.architecture == "gemma2"
    one, other = weights_of(tmp_path / "one"), weights_of(tmp_path / "other")
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name


def test_a_file_that_llama_cpp_quantized(make_model: MakeModel, calibration_text: Path, tmp_path: Path) -> None:
    """Its own quantizer, with keys and tensors in its own order: measured beside the folder, and laid out anew."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: `make test-consumers`")
    import ctypes

    @llama_cpp.llama_log_callback
    def silent(*_: object) -> None:
        """llama.cpp's log."""

    model = make_model(hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    run(model, tmp_path / "f16", {"scheme": "f16", "method": "rtn"})
    source, theirs = tmp_path / "f16" / "model.gguf", tmp_path / "theirs.gguf"
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype = 1, llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    llama_cpp.llama_log_set(silent, None)
    llama_cpp.kept_for_its_log = silent  # which it calls as long as the process lives
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(theirs).encode(), ctypes.byref(params)) == 0
    ours = tmp_path / "ours"
    run(model, ours, {"scheme": "q4_k_m", "method": "rtn"})
    files = GGUFCheckpoint(ours), GGUFCheckpoint(theirs)
    assert list(files[0].tensors) != list(files[1].tensors)
    assert list(files[0].metadata) != list(files[1].metadata)
    assert types_of(ours) == types_of(theirs)
    spec = EvalSpec(DataSpec(str(calibration_text), rows=8, seqlen=32))
    divergence = {}
    for path in (ours / "model.gguf", theirs):
        comparison = evaluate(path, model, spec, "cpu", quiet).comparison
        assert comparison is not None
        divergence[path] = comparison.kl.value
    assert divergence[ours / "model.gguf"] < 1.2 * divergence[theirs] < 0.1, divergence
    run(theirs, tmp_path / "anew", {"format": "gguf"})
    before, after = weights_of(theirs), weights_of(tmp_path / "anew")
    assert all(torch.equal(before[name], after[name]) for name in before)
