"""Grids of every number type beside integers, their two-level scales, and outliers kept beside the codes.

Shapes: O out features, I in features.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qtool.numerics.codecs import codec_of
from qtool.numerics.grid import Grid, Outliers, QTensor, grid_of, stackable
from qtool.numerics.scales import dynamic_map, nest, unnest
from qtool.scheme import QuantScheme

SCHEMES = [
    "fp8-e4m3-tensor", "fp8-e4m3-channel", "fp8-e4m3-block", "fp8-e5m2-tensor", "fp8-e5m2-channel", "nvfp4a16",
    "mxfp4a16", "mxfp8a16", "nf4", "nf4-dq", "fp4", "fp4-dq", "llm-int8",
]  # fmt: skip
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def make_grid(scheme: str) -> Grid:
    return grid_of(QuantScheme.parse(scheme), torch.bfloat16)


def make_weight(rows: int = 130, inputs: int = 256, seed: int = 0) -> Tensor:
    """Ordinary weights with outliers, a row of one sign, and groups of zeros."""
    weight = 0.05 * torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))
    weight[2, ::17] *= 12
    weight[3] = -weight[3].abs()
    weight[4, :128] = 0
    return weight


def values_of(scheme: str) -> Tensor:
    """Every value that a code stands for, from the definitions and not from the codecs."""
    if scheme.startswith(("nvfp4", "mxfp4")):
        return torch.tensor([s * v for v in E2M1 for s in (1, -1)])
    if scheme == "llm-int8":
        return torch.arange(-127, 128).float()
    if scheme.startswith("fp4"):
        return torch.tensor([sign * v for v in (0, 1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1) for sign in (1, -1)])
    if scheme.startswith("nf4"):
        probabilities = torch.linspace(0.9677083, 0.5, 9)[:-1], torch.linspace(0.9677083, 0.5, 8)[:-1]
        normal = torch.distributions.Normal(0.0, 1.0)
        positive, negative = normal.icdf(probabilities[0]), normal.icdf(probabilities[1])
        values = torch.cat([positive, -negative, torch.zeros(1)])
        return values / values.max()
    values = torch.arange(256).to(torch.uint8).view(torch.float8_e5m2 if "e5m2" in scheme else torch.float8_e4m3fn)
    return values.float()[values.float().isfinite()]


def naive_scales(grid: Grid, weight: Tensor, quantized: QTensor) -> Tensor:
    """The scale of each weight, [O, I], read off the stored parameters by the definition of the scheme."""
    params, kind = quantized.params, grid.scheme.kind
    scale = params.scale
    if kind == "nvfp4":
        scale = scale.float() / params.super_scale
    elif kind.startswith("mx"):
        scale = 2.0 ** (scale.double() - 127).float()
    elif kind.endswith("-dq"):
        flat = dynamic_map()[scale.flatten().long()].clone()
        for i in range(len(flat)):
            flat[i] = flat[i] * params.super_scale[i // 256] + params.super_zero[0]
        scale = flat.reshape(scale.shape)
    scale = scale.float()
    rows, inputs = weight.shape
    if grid.scheme.granularity == "block":
        return scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :inputs]
    return scale.repeat_interleave(inputs // scale.shape[1], 1).expand(rows, inputs)


@every_scheme
@pytest.mark.parametrize("search", [True, False])
def test_rounding_takes_the_nearest_value_of_the_definition(scheme: str, search: bool) -> None:
    grid, weight = make_grid(scheme), make_weight()
    quantized = grid.nearest(weight, grid.fit(weight, search=search))
    scale = naive_scales(grid, weight, quantized)
    values = values_of(scheme).double().sort().values
    gaps = (weight.double()[..., None] / scale.double()[..., None] - values).abs()
    back = quantized.dequantize()
    ours = (back.double() / scale.double() - weight.double() / scale.double()).abs()
    worse = (ours - gaps.amin(-1)) / values.abs().max()
    assert worse.max() < 1e-6, f"{scheme}: farther than the nearest by {worse.max():.3e}, mean {worse.mean():.3e}"
    known = (back.double()[..., None] / scale.double()[..., None] - values).abs().amin(-1)
    assert known.max() < 2e-6 * values.abs().max(), f"{scheme}: {known.max():.3e} from any value of the type"
    assert (back[weight == 0] == 0).all(), "zero stays zero"


@every_scheme
def test_the_search_is_never_worse_than_the_range(scheme: str) -> None:
    grid = make_grid(scheme)
    for seed in range(3):
        weight = make_weight(seed=seed)
        importance = torch.rand(256, generator=torch.Generator().manual_seed(seed)) ** 3

        def error(search: bool, importance_I: Tensor | None, weight: Tensor = weight) -> float:
            back = grid.nearest(weight, grid.fit(weight, importance_I, search=search)).dequantize()
            squares = (back - weight).double().square()
            return float((squares if importance_I is None else squares * importance_I).sum())

        slack = 1.02 if scheme.endswith("-dq") else 1 + 1e-6  # the second level is rounded after the search
        assert error(True, None) <= error(False, None) * slack
        assert error(True, importance) <= error(False, importance) * slack


def test_nvfp4_uses_four_over_six() -> None:
    """A group of 3s and a 4: on 6 the 3s have no code, on 4 everything is exact."""
    weight = torch.tensor([[4.0, *[3.0] * 15], [6.0, *[1.5] * 15]])
    grid = make_grid("nvfp4a16")
    searched, plain = (grid.nearest(weight, grid.fit(weight, search=s)).dequantize() for s in (True, False))
    assert (searched - weight).abs().max() < 1e-5, (searched - weight).abs().max()
    assert (plain - weight).abs().max() > 0.2


def test_mx_scales_are_searched_powers_of_two() -> None:
    weight = torch.tensor([[7.0, *[1.0] * 31]])
    grid = make_grid("mxfp4a16")
    params = grid.fit(weight, search=False)
    assert params.scale.dtype == torch.uint8
    assert params.scale.item() in (127, 128)
    for scheme in ("mxfp4a16", "mxfp8a16"):
        for exponent in (-40, -20, 0, 30):
            scaled = make_weight(8, 64) * 2.0**exponent
            params = make_grid(scheme).fit(scaled)
            back = make_grid(scheme).decode(make_grid(scheme).encode(scaled, params), params)
            assert (back - scaled).norm() < 0.2 * scaled.norm(), (scheme, exponent)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 1000), st.integers(0, 10**6))
def test_nested_maxima_come_back_within_a_step(count: int, seed: int) -> None:
    absmax = torch.rand(count, generator=torch.Generator().manual_seed(seed)) + 0.01
    codes, scale, offset = nest(absmax)
    assert (len(codes), len(scale), len(offset)) == (count, -(-count // 256), 1)
    gap = (unnest(codes, scale, offset) - absmax).abs()
    assert gap.max() <= 0.01 * float(scale.max()), f"max difference {gap.max():.3e}, mean {gap.mean():.3e}"


@every_scheme
def test_columns_through_a_rounder_are_columns_of_the_whole(scheme: str) -> None:
    grid, weight = make_grid(scheme), make_weight()
    params = grid.fit(weight)
    rounder = grid.rounder(params, (130, 256))
    order = torch.randperm(256, generator=torch.Generator().manual_seed(3))
    whole = grid.nearest(weight, params)
    for columns in order.split(100):
        rounder.start(columns)
        for j, column in enumerate(columns.tolist()):
            assert torch.equal(rounder.round(j, weight[:, column]), whole.dequantize()[:, column])
    assert torch.equal(rounder.result().codes, whole.codes)


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if stackable(QuantScheme.parse(s))])
def test_a_stack_splits_into_its_parts(scheme: str) -> None:
    grid, weight = make_grid(scheme), make_weight()
    whole = grid.nearest(weight, grid.fit(weight))
    parts = whole.split([30, 100])
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), whole.dequantize())


class TestOutliers:
    SCHEME = "int3-g64-sym+outliers-1%"

    def test_the_worst_weights_stay_exact(self) -> None:
        grid, weight = make_grid(self.SCHEME), make_weight().bfloat16().float()
        importance = torch.rand(256, generator=torch.Generator().manual_seed(0))
        quantized = grid.nearest(weight, grid.fit(weight, importance))
        outliers = quantized.outliers
        assert isinstance(outliers, Outliers)
        assert len(outliers.values) == QuantScheme.parse(self.SCHEME).outlier_count((130, 256)) == 332
        back = quantized.dequantize()
        rows, columns = outliers.rows, outliers.columns.long()
        assert torch.equal(back[rows, columns], weight[rows, columns])
        plain_grid = make_grid("int3-g64-sym")
        plain = plain_grid.nearest(weight, plain_grid.fit(weight, importance)).dequantize()
        cost = (plain - weight).square() * importance
        assert cost[rows, columns].min() >= cost.flatten().sort(descending=True).values[331] * (1 - 1e-6)
        assert ((back - weight).square() * importance).sum() < 0.8 * cost.sum()

    def test_error_feedback_goes_into_the_outliers_too(self) -> None:
        from qtool.calibration.stats import Moments
        from qtool.methods.gptq import GPTQ

        weight = make_weight(32, 128)
        x = torch.randn(500, 128, generator=torch.Generator().manual_seed(0))
        x += 2 * x[:, :1]
        second = x.T @ x / 500
        losses = {}
        for scheme in (self.SCHEME, "int3-g64-sym"):
            for name, solved in (
                ("gptq", GPTQ().solve(weight, make_grid(scheme), Moments(second.clone())).weight),
                ("rtn", make_grid(scheme).nearest(weight, make_grid(scheme).fit(weight))),
            ):
                error = solved.dequantize() - weight
                losses[scheme, name] = float(((error @ second) * error).sum())
                assert (solved.outliers is not None) == ("outliers" in scheme)
        assert losses[self.SCHEME, "gptq"] < losses["int3-g64-sym", "gptq"] < losses["int3-g64-sym", "rtn"]
        assert losses[self.SCHEME, "gptq"] < losses[self.SCHEME, "rtn"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_code_decodes_and_encodes_to_itself(scheme: str) -> None:
    codec = codec_of(QuantScheme.parse(scheme))
    bits = QuantScheme.parse(scheme).bits
    codes = torch.arange(2**bits, dtype=torch.int32).to(torch.uint8)
    values = codec.decode(codes)
    finite = (
        values.isfinite() & (values.abs() <= codec.largest) if bits == 8 else torch.ones_like(values, dtype=torch.bool)
    )
    again = codec.decode(codec.encode(values[finite].clone()))
    assert torch.equal(again, values[finite])
    assert torch.equal(codec.round(values[finite].clone()), values[finite])
