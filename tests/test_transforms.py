"""Transforms: the float model computes what it did, and what a search returns is what a naive search finds.

Shapes: O out features, I in features, N tokens.
"""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qtool.calibration.stats import InputStats, Moments
from qtool.checkpoint.reader import Checkpoint
from qtool.errors import UsageError
from qtool.formats.weights import Weights
from qtool.models.architectures import ARCHITECTURES, architecture_of
from qtool.numerics.grid import Grid, grid_of
from qtool.parameters import Parameters
from qtool.plan import Kept, Linear, Unit
from qtool.scheme import ActivationScheme, QuantScheme
from qtool.transforms import TRANSFORMS, BiasTransform, ScaleTransform, SourceTransform, get_transform
from qtool.transforms.awq import AWQ, relative_magnitudes
from qtool.transforms.bias_correction import BiasCorrection
from qtool.transforms.fold import fold, sharing
from qtool.transforms.hadamard import hadamard, paley, random_orthogonal
from qtool.transforms.input_error import mean_square_of_largest, rounding_noise
from qtool.transforms.rotated import RotatedSource
from qtool.transforms.rotation import Rotation
from qtool.transforms.scaling import LARGEST, SMALLEST, powers, shared, weight_error
from qtool.transforms.smoothquant import SmoothQuant

ROTATABLE = sorted(kind for kind, known in ARCHITECTURES.items() if known.rotatable)
TOKENS_BT = torch.arange(64).view(2, 32) * 37 % 300


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def grid(scheme: str) -> Grid:
    return grid_of(QuantScheme.parse(scheme), torch.bfloat16)


def inputs_with_outliers(
    tokens: int = 1024, inputs: int = 64, seed: int = 0, factor: float = 40.0, every: int = 25
) -> Tensor:
    """Correlated inputs of unequal size [N, I], one channel of so many much larger."""
    generator = rng(seed)
    x_NI = torch.randn(tokens, inputs, generator=generator)
    x_NI += torch.randn(tokens, 4, generator=generator) @ torch.randn(4, inputs, generator=generator) / 2
    x_NI *= torch.exp(0.5 * torch.randn(inputs, generator=generator))
    x_NI[:, ::every] *= factor
    return x_NI


def make_weights(inputs: int = 64, seed: int = 1) -> list[Tensor]:
    generator = rng(seed)
    return [0.05 * torch.randn(rows, inputs, generator=generator) for rows in (48, 32)]


def moments_of(x_NI: Tensor) -> Moments:
    stats = InputStats.empty(x_NI.shape[1], {"vectors", "second"}, x_NI.device)
    stats.add(x_NI)
    return stats.moments("x")


def close(ours: Tensor, other: Tensor, tolerance: float) -> None:
    """Equal but for a share of the largest value."""
    gap = (ours.double() - other.double()).abs() / other.abs().max()
    assert gap.max() <= tolerance, f"max relative difference {gap.max():.3e}, mean {gap.mean():.3e}"


# The whole model


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval(), json.loads((folder / "config.json").read_text())


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS_BT).logits


def unit_of_block(checkpoint: Checkpoint, block: str, linears: list[str]) -> Unit:
    scheme = QuantScheme.parse("int8-channel-sym")
    modules = [f"{block}.{linear}" for linear in linears]
    inside = [info for name, info in checkpoint.tensors.items() if name.startswith(block + ".")]
    kept = [Kept(info, "", True) for info in inside if info.name.removesuffix(".weight") not in modules]
    return Unit(block, tuple(Linear(m, checkpoint.tensors[f"{m}.weight"], scheme) for m in modules), tuple(kept))


def fold_everywhere(
    folder: Path, model: Any, config: dict[str, Any], scales: Callable[[Parameters, Any, Tensor | None], Tensor | None]
) -> int:
    """Fold scales into every input of the model that can take them; how many there were."""
    architecture = architecture_of(config, folder)
    weights = Weights(Checkpoint(folder))
    folded = 0
    for index in range(2):
        unit = unit_of_block(weights.checkpoint, f"{architecture.blocks}.{index}", architecture.linears())
        parameters = Parameters(unit, weights, torch.device("cpu"), architecture.transposed, {})
        for source in architecture.inputs:
            if source.producer is None:
                continue
            share_I = sharing(parameters, source, config)
            scale_I = scales(parameters, source, share_I)
            if scale_I is not None:
                fold(parameters, source, scale_I, architecture, share_I)
                folded += 1
        for name, value in parameters.tensors.items():
            model.get_parameter(name).data.copy_(value)
    return folded


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_folded_scales_leave_the_model_as_it_is(make_model: Any, kind: str, dtype: str) -> None:
    """Also where the norm is stored in 16 bits: the scales are then what the stored norm amounts to."""
    folder = make_model(kind, dtype=dtype)
    model, config = load(folder)
    before = logits(model)
    generator = rng(0)

    def scales(parameters: Parameters, source: Any, share_I: Tensor | None) -> Tensor:
        inputs = parameters.weight(parameters.full(source.linears[0])).shape[1]
        scale_I = torch.exp(2 * torch.rand(inputs, generator=generator) - 1)
        return scale_I if share_I is None else shared(scale_I, share_I, "mean")

    original = copy.deepcopy(model)
    assert fold_everywhere(folder, model, config, scales) >= 4
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, original.get_parameter(n))]
    assert len(moved) >= 8  # it did something
    tolerance = 1e-4
    if dtype == "bfloat16" and kind in ("gpt_neox", "gpt2", "opt", "qwen2"):
        tolerance = 2e-2  # the bias of the norm or of the values is rounded again
    close(logits(model), before, tolerance)
    if dtype == "bfloat16":
        for name in moved:
            if "norm" in name or "ln_" in name:
                value = model.get_parameter(name)
                assert torch.equal(value, value.bfloat16().float()), f"{name} cannot be stored"


@pytest.mark.parametrize(("transform", "options"), [("smoothquant", {}), ("awq", {"grid": 3})])
@pytest.mark.parametrize("kind", ["llama", "phi3", "gemma2"])
def test_searched_scales_leave_the_model_as_it_is(
    make_model: Any, kind: str, transform: str, options: dict[str, int]
) -> None:
    folder = make_model(kind, dtype="float32")
    model, config = load(folder)
    before = logits(model)

    def scales(parameters: Parameters, source: Any, share_I: Tensor | None) -> Tensor | None:
        weights = [parameters.weight(parameters.full(linear)) for linear in source.linears]
        moments = moments_of(inputs_with_outliers(512, weights[0].shape[1]))
        found = get_transform(transform, options).scales(weights, grid("w8a8"), moments, share_I)
        return found and found.scale_I

    assert fold_everywhere(folder, model, config, scales) >= 4
    close(logits(model), before, 1e-4)


def test_a_norm_of_weight_zero_takes_no_scale(make_model: Any) -> None:
    folder = make_model("llama", dtype="bfloat16")
    _, config = load(folder)
    architecture = architecture_of(config, folder)
    weights = Weights(Checkpoint(folder))
    unit = unit_of_block(weights.checkpoint, "model.layers.0", architecture.linears())
    parameters = Parameters(unit, weights, torch.device("cpu"), False, {})
    parameters["model.layers.0.input_layernorm.weight"][3] = 0
    before = parameters["model.layers.0.self_attn.q_proj.weight"].clone()
    scale_I = fold(parameters, architecture.inputs[0], torch.full((64,), 1e9), architecture, None)
    assert scale_I[3] == 1
    assert torch.isfinite(scale_I).all()
    assert (scale_I > 0).all()
    assert scale_I.max() < 1.01 * LARGEST
    close(parameters["model.layers.0.self_attn.q_proj.weight"], before * scale_I, 1e-6)


# Rotation


@pytest.mark.parametrize("kind", ROTATABLE)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("options", [Rotation(), Rotation(kind="orthogonal", seed=3), Rotation(heads=False)], ids=str)
def test_a_rotated_model_computes_the_same(make_model: Any, kind: str, tied: bool, options: Rotation) -> None:
    overrides = {"attention_bias": True, "mlp_bias": True} if kind == "llama" else {}
    folder = make_model(kind, dtype="float32", tied=tied, **overrides)
    model, config = load(folder)
    before = logits(model)
    source = options.wrap(Weights(Checkpoint(folder)), architecture_of(config, folder), config)
    assert source.config_changes == ({"tie_word_embeddings": False} if tied else {})
    assert [info.name for info in source.added] == (["lm_head.weight"] if tied else [])
    rotated = type(model)(type(model.config).from_dict({**config, "tie_word_embeddings": False})).eval()
    tensors = source.read(source.shapes)
    rotated.load_state_dict(tensors)
    close(logits(rotated), before, 2e-5)
    assert source.changed <= set(Checkpoint(folder).tensors)
    for name, old in Weights(Checkpoint(folder)).read(Checkpoint(folder).tensors).items():
        assert torch.equal(tensors[name], old) == (name not in source.changed), name
        if name.endswith("layernorm.weight") or name == "model.norm.weight":
            assert (tensors[name] == 1).all()
    value = {"phi3": "self_attn.qkv_proj"}.get(kind, "self_attn.v_proj")
    if not options.heads:  # then the values themselves are as they were, and only what they are made from is turned
        weight, gain = (
            Weights(Checkpoint(folder))
            .read([f"model.layers.0.{value}.weight", "model.layers.0.input_layernorm.weight"])
            .values()
        )
        close(tensors[f"model.layers.0.{value}.weight"].norm(dim=1), (weight * gain).norm(dim=1), 1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_what_is_stored_of_a_rotated_model(make_model: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the types of the source, the same in parts of any size, the same rows one by one, the same every time."""
    folder = make_model(kind, dtype="bfloat16")
    config = json.loads((folder / "config.json").read_text())
    source, again, other = (
        Rotation(seed=seed).wrap(Weights(Checkpoint(folder)), architecture_of(config, folder), config)
        for seed in (0, 0, 1)
    )
    for name in sorted(source.changed | {info.name for info in source.added}):
        value = source.read([name])[name]
        monkeypatch.setattr("qtool.transforms.rotated.PART_ELEMENTS", 200)
        stored = again.read_stored(name)
        monkeypatch.undo()
        assert stored.dtype == torch.bfloat16
        assert torch.equal(stored, value.bfloat16()), name
        assert torch.equal(stored, other.read_stored(name)) == ("norm" in name)
        if value.dim() == 2:
            rows = torch.tensor([5, 0, 7])
            assert torch.equal(source.read_rows(name, rows), value[rows])
    assert source.shapes["lm_head.weight"] == source.shapes["model.embed_tokens.weight"]
    assert {info.name: (info.dtype, info.shape) for info in source.added} == {"lm_head.weight": ("BF16", (320, 64))}


def test_rotation_spreads_outlier_channels(make_model: Any) -> None:
    folder = make_model("llama", dtype="float32")
    config = json.loads((folder / "config.json").read_text())

    class WithOutlier(Weights):
        def read(self, names: Any) -> dict[str, Tensor]:
            tensors = super().read(names)
            for name, tensor in tensors.items():
                if name == "model.embed_tokens.weight":
                    tensor[:, 5] += 20
            return tensors

        def read_rows(self, name: str, rows: Tensor) -> Tensor:
            return self.read([name])[name][rows]

    plain = WithOutlier(Checkpoint(folder))
    rotated = Rotation().wrap(plain, architecture_of(config, folder), config)

    def peak(source: Any) -> float:
        x_NE = source.read(["model.embed_tokens.weight"])["model.embed_tokens.weight"]
        return float(x_NE.abs().max() / x_NE.square().mean().sqrt())

    assert peak(plain) > 7
    assert peak(rotated) < 2


@pytest.mark.parametrize("kind", [*ARCHITECTURES, None])
def test_which_models_can_be_rotated(kind: str | None) -> None:
    problem = Rotation().problem(ARCHITECTURES[kind] if kind else None, {"model_type": kind or "mamba"})
    if kind in ("llama", "mistral", "qwen2", "qwen3", "phi3"):
        assert problem is None
    else:
        assert problem == (
            f"`{kind or 'mamba'}` is not among the architectures that can be rotated: "
            "llama, mistral, phi3, qwen2, qwen3"
        )


@pytest.mark.parametrize("n", [1, 2, 3, 7, 12, 14, 40, 48, 64, 80, 96, 112, 128, 144, 896])
def test_hadamard_is_orthogonal_and_flat(n: int) -> None:
    rotation = hadamard(n, seed=0)
    matrix = rotation.apply(torch.eye(n))
    naive = torch.ones(1, 1, dtype=torch.float64)
    for factor in rotation.factors:
        naive = torch.kron(naive, factor.contiguous())
    close(matrix, rotation.signs[:, None] * naive, 1e-12)
    close(matrix @ matrix.T, torch.eye(n), 1e-12)
    if n not in (3, 7, 14):  # of these there is no Hadamard matrix
        close(matrix.abs(), torch.full((n, n), n**-0.5, dtype=torch.float64), 1e-12)
    x_NI = torch.randn(5, 2 * n, generator=rng(0), dtype=torch.float64)
    close(rotation.apply(x_NI), torch.cat([x_NI[:, :n] @ matrix, x_NI[:, n:] @ matrix], 1), 1e-12)
    turned = random_orthogonal(n, seed=0).apply(torch.eye(n))
    close(turned @ turned.T, torch.eye(n), 1e-12)


def test_paley_matrices() -> None:
    found = {order: matrix for order in range(4, 200) if (matrix := paley(order)) is not None}
    assert {4, 8, 12, 20, 24, 28, 36, 44, 60, 76}.issubset(found)
    for order, matrix in found.items():
        assert matrix.shape == (order, order)
        assert torch.equal(matrix.abs(), torch.ones_like(matrix)), order
        assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64)), order


# What rounding the inputs costs


def rounded(x_NI: Tensor, scheme: ActivationScheme) -> Tensor:
    """Inputs rounded as a naive reader of the scheme would."""
    if scheme.kind == "int":
        largest = x_NI.abs().amax() if scheme.granularity == "tensor" else x_NI.abs().amax(1, keepdim=True)
        step = largest / ((2**scheme.bits - 1) / 2)
        return (x_NI / step).round() * step
    groups = x_NI.unflatten(1, (-1, scheme.group_size or x_NI.shape[1]))
    largest = groups.abs().amax(-1, keepdim=True)
    if scheme.kind == "fp8-e4m3":
        return ((groups / largest * 448).to(torch.float8_e4m3fn).float() * largest / 448).flatten(1)
    if scheme.kind == "mxfp8":
        scale = torch.exp2(largest.log2().floor() - 8)
        return ((groups / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).flatten(1)
    scale = largest / 6 if scheme.kind == "nvfp4" else torch.exp2(largest.log2().floor() - 2)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    nearest = ((groups / scale).abs()[..., None] - values).abs().argmin(-1)
    return (values[nearest] * groups.sign() * scale).flatten(1)


def simulated(x_NI: Tensor, weights: list[Tensor], scale_I: Tensor, scheme: str) -> float:
    """Mean squared error of the outputs when weights and inputs are rounded."""
    the_grid = grid(scheme)
    activations = the_grid.scheme.activations
    total = 0.0
    for weight_OI in weights:
        scaled = weight_OI * scale_I
        importance_I = (x_NI / scale_I).square().mean(0)
        read = the_grid.nearest(scaled, the_grid.fit(scaled, importance_I)).dequantize()
        given = x_NI / scale_I
        total += float(
            ((rounded(given, activations) if activations else given) @ read.T - x_NI @ weight_OI.T)
            .square()
            .mean(0)
            .sum()
        )
    return total


@pytest.mark.parametrize("distribution", ["normal", "laplace", "uniform", "spikes"])
@pytest.mark.parametrize("width", [8, 64])
def test_expected_largest_magnitude(distribution: str, width: int) -> None:
    """Within a quarter, but for a few tokens with spikes, where it is within a factor of 1.5."""
    generator = rng(3)
    x_NI = torch.randn(8192, 64, generator=generator)
    if distribution == "laplace":
        x_NI = x_NI.abs() * x_NI
    elif distribution == "uniform":
        x_NI = torch.rand(8192, 64, generator=generator) - 0.5
    elif distribution == "spikes":
        x_NI[torch.randint(0, 8192, (80,), generator=generator), torch.arange(80) % 4] *= 50
    x_NI *= torch.exp(torch.randn(64, generator=generator))
    moments = moments_of(x_NI)
    truth = x_NI.unflatten(1, (-1, width)).abs().amax(-1).square().mean(0)
    absmax, square = moments.vectors.absmax_I.view(-1, width), moments.diagonal_I.view(-1, width)
    ratio = mean_square_of_largest(absmax, square, 8192) / truth
    bound = 1.5 if distribution == "spikes" else 1.25
    assert (ratio < bound).all(), ratio
    assert (ratio > 1 / bound).all(), ratio


@pytest.mark.parametrize(
    "scheme",
    [
        "w8a8",
        "w8a8-static",
        "w4a8",
        "fp8-dynamic",
        "fp8-block",
        "nvfp4",
        "mxfp4",
        "mxfp8",
        "int8-channel-sym+int4-token",
    ],
)
@pytest.mark.parametrize("factor", [1.0, 40.0])
def test_rounding_noise_is_what_rounding_does(scheme: str, factor: float) -> None:
    x_NI = inputs_with_outliers(inputs=128, factor=factor)
    activations = QuantScheme.parse(scheme).activations
    assert activations
    scale_I = torch.exp(0.3 * torch.randn(128, generator=rng(5)))
    given = x_NI / scale_I
    weight_I = 1 / given.square().mean(0)  # so that small channels count as well
    truth = float(((rounded(given, activations) - given).square().mean(0) * weight_I).sum())
    ours = float((rounding_noise(activations, moments_of(x_NI), scale_I) * weight_I).sum())
    assert 0.6 < ours / truth < 1.6, ours / truth


def test_inputs_with_outliers_stay_exact_in_llm_int8() -> None:
    x_NI = inputs_with_outliers()
    activations = QuantScheme.parse("llm-int8").activations
    noise_I = rounding_noise(activations, moments_of(x_NI), torch.ones(64))
    large_I = x_NI.abs().amax(0) >= 6
    assert large_I.any()
    assert (noise_I[large_I] == 0).all()
    assert (noise_I[~large_I] > 0).all()
    assert noise_I.max() <= (6 / 127) ** 2 / 12 * 1.01


# The searches


def naive_weight_error(weights: list[Tensor], the_grid: Grid, second_II: Tensor, scale_I: Tensor) -> float:
    """sum_k tr(D_k H' D_k^T) on the scaled grid, H' = H / (s s^T), in float64."""
    scaled_II = second_II.double() / torch.outer(scale_I, scale_I).double()
    total = 0.0
    for weight_OI in weights:
        scaled = weight_OI * scale_I
        params = the_grid.fit(scaled, second_II.diagonal() / scale_I**2)
        error = the_grid.nearest(scaled, params).dequantize().double() - scaled.double()
        total += float(torch.einsum("oi,ij,oj->", error, scaled_II, error))
    return total


def geometric_one(scale_I: Tensor) -> Tensor:
    return scale_I / scale_I.log().mean().exp()


@pytest.mark.parametrize("scheme", ["int8-channel-sym", "w8a8-static", "int4-g32-sym", "int4-g32-asym+int8-tensor"])
def test_smoothquant_finds_the_best_strength(scheme: str) -> None:
    x_NI, weights, the_grid = inputs_with_outliers(), make_weights(), grid(scheme)
    moments = moments_of(x_NI)
    absmax_I, wmax_I = x_NI.abs().amax(0), torch.cat(weights).abs().amax(0)
    squares_I = torch.cat(weights).square().sum(0)
    errors: dict[str, float] = {}
    scales: dict[str, Tensor] = {}
    for i in range(21):
        scale_I = geometric_one(absmax_I ** (i / 20) / wmax_I ** (1 - i / 20))
        error = naive_weight_error(weights, the_grid, moments.second_II, scale_I)
        if the_grid.scheme.activations:
            step = 2 * float((absmax_I / scale_I).max()) / 255
            noise_I = (moments.diagonal_I / scale_I**2).clamp(max=step**2 / 12)
            error += float((noise_I * scale_I**2 * squares_I).sum())
        errors[f"{i / 20:.2f}"], scales[f"{i / 20:.2f}"] = error, scale_I
    best = min(errors, key=errors.__getitem__)
    found = SmoothQuant().scales(weights, the_grid, moments, None)
    if scheme == "int4-g32-sym":  # without rounding of inputs here nothing is best
        assert naive_weight_error(weights, the_grid, moments.second_II, torch.ones(64)) < errors[best]
        assert found is None
    else:
        assert found is not None
        assert found.note.startswith(f"strength {best}, "), (found.note, errors)
        close(found.scale_I, scales[best], 1e-4)
    fixed = SmoothQuant(strength=0.5).scales(weights, the_grid, moments, None)
    assert fixed is not None
    close(fixed.scale_I, scales["0.50"], 1e-4)


@pytest.mark.parametrize("scheme", ["int4-g32-sym", "int3-channel-asym", "nvfp4a16"])
def test_awq_finds_the_best_exponent(scheme: str) -> None:
    x_NI, weights, the_grid = inputs_with_outliers(), make_weights(), grid(scheme)
    moments = moments_of(x_NI)
    width = the_grid.scheme.group_size or 64
    stacked = torch.cat(weights)
    relative = torch.stack(
        [(row.view(-1, width).abs() / row.view(-1, width).abs().amax(1, keepdim=True)).flatten() for row in stacked]
    ).mean(0)
    close(relative_magnitudes(weights, the_grid), relative, 1e-5)
    tried: dict[str, Tensor] = {}
    for i in range(11):
        if i:
            tried[f"inputs^{i / 10:.2f},"] = geometric_one(x_NI.abs().mean(0) ** (i / 10))
        if i < 10:
            name = f"inputs^{i / 10:.2f} / weights^{1 - i / 10:.2f},"
            tried[name] = geometric_one(x_NI.abs().mean(0) ** (i / 10) / relative ** (1 - i / 10))
    errors = {n: naive_weight_error(weights, the_grid, moments.second_II, s) for n, s in tried.items()}
    best = min(errors, key=errors.__getitem__)
    found = AWQ(grid=10).scales(weights, the_grid, moments, None)
    assert found is not None
    assert found.note.startswith(best), (found.note, errors)
    close(found.scale_I, tried[best], 1e-4)


@given(
    seed=st.integers(0, 10**6),
    factor=st.sampled_from([1.0, 5.0, 100.0]),
    transform=st.sampled_from([AWQ(4), SmoothQuant()]),
)
@settings(max_examples=10, deadline=None)
def test_doing_nothing_is_never_better(seed: int, factor: float, transform: Any) -> None:
    x_NI, weights, the_grid = inputs_with_outliers(128, 32, seed, factor), make_weights(32, seed), grid("int3-g16-sym")
    moments = moments_of(x_NI)
    found = transform.scales(weights, the_grid, moments, None)
    nothing = naive_weight_error(weights, the_grid, moments.second_II, torch.ones(32))
    if found:
        assert naive_weight_error(weights, the_grid, moments.second_II, found.scale_I) < nothing * 1.0001


def test_smoothquant_saves_eight_bit_inputs() -> None:
    x_NI, weights = inputs_with_outliers(), make_weights()
    found = SmoothQuant().scales(weights, grid("w8a8"), moments_of(x_NI), None)
    assert found is not None
    plain, smooth = (simulated(x_NI, weights, s, "w8a8") for s in (torch.ones(64), found.scale_I))
    assert smooth < plain / 5, (smooth, plain)


def test_the_expected_error_is_the_simulated_one() -> None:
    x_NI, weights = inputs_with_outliers(4096), make_weights()
    found = SmoothQuant().scales(weights, grid("w8a8"), moments_of(x_NI), None)
    assert found is not None
    numbers = [float(word) for word in found.note.split() if word.replace(".", "").isdigit()]
    outputs = sum(float((x_NI @ weight_OI.T).square().mean(0).sum()) for weight_OI in weights)
    for expected, scale_I in zip(numbers[-2:], (torch.ones(64), found.scale_I), strict=True):
        truth = math.sqrt(simulated(x_NI, weights, scale_I, "w8a8") / outputs)
        assert 0.8 < expected / truth < 1.25, (expected, truth)


def test_awq_lowers_the_error_of_four_bits() -> None:
    x_NI, weights = inputs_with_outliers(factor=10, every=8), make_weights()
    found = AWQ().scales(weights, grid("int4-g32-sym"), moments_of(x_NI), None)
    assert found is not None
    plain, scaled = (simulated(x_NI, weights, s, "int4-g32-sym") for s in (torch.ones(64), found.scale_I))
    assert scaled < 0.8 * plain, (scaled, plain)


@pytest.mark.parametrize("transform", [AWQ(), SmoothQuant(), SmoothQuant(strength=0.7)], ids=str)
def test_shared_channels_share_scales(transform: Any) -> None:
    """As the query heads of a group do, here two of 16 channels each on the same values, the numbers anything."""
    share_I = 100 + torch.arange(64).view(4, 16)[[0, 0, 1, 1]].flatten()
    x_NI = inputs_with_outliers(factor=10, every=8)
    found = transform.scales(make_weights(), grid("int4-g32-sym+int8-token"), moments_of(x_NI), share_I)
    assert found is not None
    heads = found.scale_I.view(4, 16)
    assert torch.equal(heads[0], heads[1])
    assert torch.equal(heads[2], heads[3])
    assert len(found.scale_I.unique()) > 16
    if transform == SmoothQuant(strength=0.7):
        absmax, wmax = (v.view(2, 2, 16).amax(1) for v in (x_NI.abs().amax(0), torch.cat(make_weights()).abs().amax(0)))
        close(heads[::2].flatten(), geometric_one((absmax**0.7 / wmax**0.3).flatten()), 1e-4)


@pytest.mark.parametrize("transform", [AWQ(), SmoothQuant(), SmoothQuant(strength=1.0)], ids=str)
@pytest.mark.parametrize("scheme", ["w8a8", "int4-g32-sym", "nvfp4", "fp8-dynamic", "int4-g32-asym"])
def test_extremes_give_usable_scales(transform: Any, scheme: str) -> None:
    x_NI, weights = inputs_with_outliers(), make_weights()
    x_NI[:, 7] = 0  # a dead channel
    x_NI[0, 9] = 1e4  # one outlier
    x_NI[:, 11] *= 1e-12
    weights[0][:, 13] = weights[1][:, 13] = 0
    found = transform.scales(weights, grid(scheme), moments_of(x_NI), None)
    assert found is not None
    assert torch.isfinite(found.scale_I).all()
    assert found.scale_I.min() >= SMALLEST * 0.99
    assert found.scale_I.max() <= LARGEST * 1.01
    assert found.scale_I[7] == 1
    if isinstance(transform, SmoothQuant):
        assert found.scale_I[13] == 1
    assert powers(torch.zeros(4), torch.ones(4), 1, 1).tolist() == [1, 1, 1, 1]


def test_some_rows_stand_for_all() -> None:
    x_NI = inputs_with_outliers()
    weights = [0.05 * torch.randn(1000, 64, generator=rng(0)), 0.02 * torch.randn(300, 64, generator=rng(1))]
    second_II = moments_of(x_NI).second_II
    for scheme in ("int4-g32-sym", "int4-tensor-sym", "nvfp4a16"):
        few, whole = (weight_error(weights, grid(scheme), second_II, torch.ones(64), rows) for rows in (256, None))
        assert 0.85 < few / whole < 1.15, scheme
        assert whole == pytest.approx(naive_weight_error(weights, grid(scheme), second_II, torch.ones(64)), rel=1e-3)


# The table


def test_bias_correction_keeps_the_mean_output() -> None:
    x_NI, weight_OI = inputs_with_outliers() + 1, make_weights()[0]
    read = grid("int3-g32-sym").nearest(weight_OI, grid("int3-g32-sym").fit(weight_OI)).dequantize()
    shift_O = BiasCorrection().shift(weight_OI - read, moments_of(x_NI))
    close((x_NI @ read.T + shift_O).mean(0), (x_NI @ weight_OI.T).mean(0), 1e-5)
    assert shift_O.abs().max() > 1e-2


def test_kinds_of_transforms() -> None:
    kinds = {
        "rotation": SourceTransform,
        "smoothquant": ScaleTransform,
        "awq": ScaleTransform,
        "bias-correction": BiasTransform,
    }
    for name in TRANSFORMS:
        transform = get_transform(name, {})
        fits = [kind for kind in (SourceTransform, ScaleTransform, BiasTransform) if isinstance(transform, kind)]
        assert fits == [kinds[name]]
        assert transform.needs <= {"vectors", "second"}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("smoothquant", {"strength": 1.5}, "smoothquant.strength=1.5 is not between 0 and 1"),
        ("smoothquant", {"alpha": 0.5}, "unknown recipe key `smoothquant.alpha`"),
        ("awq", {"grid": 0}, "awq.grid=0 is not a positive number of exponents"),
        ("rotation", {"kind": "hadamar"}, "unknown value of rotation.kind: `hadamar`"),
        ("bias-correction", {"x": 1}, "unknown recipe key `bias-correction.x`"),
        ("awk", {}, "unknown transform `awk`"),
    ],
)
def test_wrong_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        get_transform(name, options)
    assert error.value.message == message


def test_options_are_checked_and_headers_changed_without_torch(make_model: Any) -> None:
    code = f"""
import json, sys
from pathlib import Path
from qtool.checkpoint.reader import Checkpoint
from qtool.formats.weights import Weights
from qtool.models.architectures import ARCHITECTURES
from qtool.transforms import TRANSFORMS, get_transform
for name in TRANSFORMS: get_transform(name, {{}})
checkpoint = Checkpoint(Path({str(make_model("llama"))!r}))
source = get_transform("rotation", {{}}).wrap(Weights(checkpoint), ARCHITECTURES["llama"], checkpoint.config)
assert source.added
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_rotated_source_is_a_source(make_model: Any) -> None:
    folder = make_model("llama")
    config = json.loads((folder / "config.json").read_text())
    plain = Weights(Checkpoint(folder))
    source = RotatedSource(plain, ARCHITECTURES["llama"], config, Rotation())
    assert source.roundings("model.layers.0") == {}
    assert source.kv_scales("model.layers.0") is None
    assert source.format is None
